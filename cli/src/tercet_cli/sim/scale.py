"""Ten thousand nodes of the production policy, asynchronous, on a network that delays and loses.

Every node has its own clock phase; a message takes DELAY_S_MIN and an exponential share more, is
lost with the drop rate, and messages overtake each other. The list has been the same everywhere for
long; then one node is added, and the simulation goes on for a minute:

- when the last node has heard of it, and how many rounds of checks that took (`rounds_until`);
- how many messages and bytes a node sends in that minute, and in a minute in which nothing happens.

All nodes share what is equal in their lists (`NodeList` is persistent), which is what makes this
possible at all.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from itertools import count

from tercet_cli.sim.walk import entry_of
from tercet_node.membership import (
    Changed,
    Effect,
    Event,
    Introduce,
    Message,
    Nid,
    NodeList,
    OpenSeal,
    Received,
    Send,
    Settings,
    State,
    Tick,
    VersionedMachine,
    size_bytes,
)
from tercet_node.membership.pace import INTERVAL_S_MAX, interval_s

DELAY_S_MIN = 0.0002
DELAY_S_MEAN = 0.001
"""Of what is added to it: now and then a message takes ten times as long."""
MINUTE_S = 60.0
HORIZON_S = 3_600.0
LONG_AGO_S = -10_000.0


@dataclass(frozen=True, slots=True)
class Variant:
    """What of our additions is on."""

    name: str
    spread: bool = True
    """What a check brings goes down the tree."""
    at_once: bool = True
    """Who had to repair itself checks its neighbours at once."""


VARIANTS = (
    Variant("versioned"),
    Variant("without the tree", spread=False),
    Variant("without both", spread=False, at_once=False),
)


@dataclass(frozen=True, slots=True)
class Scale:
    """What came of one run: a line of the CSV."""

    variant: str
    nodes: int
    drop_rate: float
    seed: int
    missed: int
    """Nodes that the tree did not reach: had not heard before the first check."""
    seconds: float
    """Until the last node has heard; HORIZON_S if one has not by then."""
    rounds: int
    hops: int
    """The longest chain of messages by which a node heard, from a command or a timer on."""
    messages_per_node_minute: float
    bytes_per_node_minute: float
    """In the minute of the change."""
    quiet_messages_per_node_minute: float
    quiet_bytes_per_node_minute: float
    wrong_repairs: int


def rounds_until(seconds: float) -> int:
    """How many checks a node that heard at 0 has begun until then."""
    rounds, at_s = 0, interval_s(0.0)
    while at_s <= seconds:
        rounds += 1
        at_s += interval_s(at_s)
    return rounds


class Asynchronous:
    """The nodes, and what is on its way."""

    def __init__(self, variant: Variant, nodes: int, drop: float, seed: int) -> None:
        self._rng = random.Random(f"{variant.name} {nodes} {drop} {seed}")  # noqa: S311
        self._drop = drop
        self._number = count()
        self._heap: list[tuple[float, int, Nid, Nid, Message | None, int]] = []
        known = NodeList.of(entry_of(nid, 1, State.PRESENT, signed=True) for nid in range(nodes))
        settings = Settings(check_after_repair=variant.at_once)
        self.machines = [
            VersionedMachine(me, OpenSeal(), known, settings, LONG_AGO_S, variant.spread)
            for me in known
        ]
        self.truth = known
        self.unaware = 0
        self.missed = 0
        self.agreed_s = HORIZON_S
        self.hops = 0
        self.messages = self.bytes = self.wrong = 0
        for machine in self.machines:
            phase_s = -self._rng.random() * INTERVAL_S_MAX
            machine.step(Tick(), phase_s)
            self._wake(machine)

    def _wake(self, machine: VersionedMachine) -> None:
        at = (machine.wake_s, next(self._number), machine.me, machine.me, None, 0)
        heapq.heappush(self._heap, at)

    def add(self, now_s: float) -> None:
        """The instigator is told of a newcomer, which knows the list."""
        entry = entry_of(len(self.machines), 1, State.PRESENT, signed=True)
        self.unaware = len(self.machines)
        self.truth = self.truth.put(entry)
        self._step(self.machines[0], Introduce(entry), now_s, 0)
        self.machines.append(VersionedMachine(entry, OpenSeal(), self.truth, now_s=now_s))
        self._wake(self.machines[-1])

    def _step(self, machine: VersionedMachine, event: Event, now_s: float, hops: int) -> None:
        before_s = machine.wake_s
        for effect in machine.step(event, now_s):
            self._effect(machine.me, effect, now_s, hops)
        if machine.wake_s < before_s:
            self._wake(machine)

    def _effect(self, nid: Nid, effect: Effect, now_s: float, hops: int) -> None:
        if isinstance(effect, Send):
            self.messages += 1
            self.bytes += size_bytes(effect.message)
            if self._rng.random() >= self._drop:
                late_s = DELAY_S_MIN + self._rng.expovariate(1.0 / DELAY_S_MEAN)
                number = next(self._number)
                at = (now_s + late_s, number, effect.to, nid, effect.message, hops + 1)
                heapq.heappush(self._heap, at)
        elif isinstance(effect, Changed):
            right = self.truth.get(effect.nid)
            self.wrong += effect.before == right
            self.unaware -= effect.after == right
            self.hops = max(self.hops, hops)
            if not self.unaware:
                self.agreed_s = now_s

    def run(self, until_s: float, *, until_agreed: bool = False) -> None:
        """Deliver and tick until then."""
        while self._heap and self._heap[0][0] <= until_s:
            if until_agreed and not self.unaware:
                return
            now_s, _, nid, sender, message, hops = heapq.heappop(self._heap)
            machine = self.machines[nid]
            if message is not None:
                self._step(machine, Received(sender, message), now_s, hops)
            elif now_s >= machine.wake_s:
                before_s = machine.wake_s
                self._step(machine, Tick(), now_s, 0)
                assert machine.wake_s > before_s
                self._wake(machine)


def run_scale(variant: Variant, nodes: int, drop: float, seed: int) -> Scale:
    """One newcomer among so many nodes."""
    network = Asynchronous(variant, nodes, drop, seed)
    network.run(MINUTE_S)
    quiet = (network.messages, network.bytes)
    network.messages = network.bytes = 0
    network.add(MINUTE_S)
    network.run(MINUTE_S + interval_s(0.0) - DELAY_S_MIN)
    missed = network.unaware
    network.run(2 * MINUTE_S)
    sent = (network.messages, network.bytes)
    network.run(MINUTE_S + HORIZON_S, until_agreed=True)
    seconds = network.agreed_s - MINUTE_S if not network.unaware else HORIZON_S
    return Scale(
        variant.name,
        nodes,
        drop,
        seed,
        missed,
        round(seconds, 4),
        rounds_until(seconds),
        network.hops,
        sent[0] / nodes,
        sent[1] / nodes,
        quiet[0] / nodes,
        quiet[1] / nodes,
        network.wrong,
    )
