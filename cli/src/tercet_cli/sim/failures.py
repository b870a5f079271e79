"""The failure detector on a simulated network: how soon a death is known, how often it is imagined.

`run_death`: all nodes live, the detectors run; then one node says nothing any more. Until when have
all others judged it dead? `run_peace`: nobody dies; every death that is judged is a false alarm.

A day of a hundred nodes is fifty million messages: twenty minutes of a core, an hour of that day a
part of its own. Beside the alarms themselves, peace counts how many probes in vain came in a row
(`tries`): each further one is as unlikely as the one before, and the end of that ladder is the
alarm (`alarms_a_day`), which a part of a day can say something about.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from tercet_cli.sim.scale import DELAY_S_MEAN, DELAY_S_MIN
from tercet_cli.sim.walk import entry_of
from tercet_node.membership import (
    Detector,
    Judged,
    Message,
    Nid,
    NodeList,
    Received,
    Send,
    State,
    Suspected,
    Tick,
    decode_message,
    encode_message,
    size_bytes,
)
from tercet_node.membership.detector import TRIES_MAX

GIVE_UP_S = 30.0


@dataclass(slots=True)
class Peace:
    """What was counted while nobody died."""

    seconds: float
    messages: int = 0
    bytes: int = 0
    alarms: int = 0
    """Of those who probed; who is told of it has not judged."""
    tries: Counter[int] = field(default_factory=Counter)
    """How often a node answered after so many probes in vain, if more than one."""

    def add(self, other: Peace) -> None:
        """Take what another run has counted."""
        self.seconds += other.seconds
        self.messages += other.messages
        self.bytes += other.bytes
        self.alarms += other.alarms
        self.tries += other.tries

    def alarms_a_day(self) -> float:
        """What the ladder says of a day, be there an alarm in this time or not.

        From the second try on each is direct and through others: all are alike. How unlikely a
        further one is comes from all of them together.
        """
        rungs = range(2, TRIES_MAX + 1)
        reached = [sum(n for tries, n in self.tries.items() if tries >= k) for k in rungs]
        if not reached[0]:
            return 0.0
        again = sum(reached[1:]) / sum(reached[:-1])
        return reached[0] * again ** (TRIES_MAX - 1) * 86_400.0 / self.seconds


class Failing:
    """Detectors, and what is on its way."""

    def __init__(self, nodes: int, drop: float, seed: str, *, encoded: bool = False) -> None:
        self._encoded = encoded
        """Messages go through their bytes."""
        self._rng = random.Random(seed)  # noqa: S311 - a simulation
        self._drop = drop
        self._number = count()
        self._heap: list[tuple[float, int, Nid, Nid, Message | None]] = []
        members = NodeList.of(entry_of(nid, 1, State.PRESENT, signed=True) for nid in range(nodes))
        self.nodes = {entry.nid: Detector(entry, members) for entry in members}
        self.silent: set[Nid] = set()
        self.cut: set[Nid] = set()
        """These and the others do not hear each other."""
        self.judged: dict[tuple[Nid, Nid], bool] = {}
        """By (who, about whom): alive."""
        self.counts = Peace(0.0)
        self._scheduled: dict[Nid, float] = {}
        for nid in self.nodes:
            self._wake(nid)

    def _wake(self, nid: Nid) -> None:
        wake_s = self.nodes[nid].wake_s
        if wake_s < self._scheduled.get(nid, float("inf")):
            self._scheduled[nid] = wake_s
            heapq.heappush(self._heap, (wake_s, next(self._number), nid, nid, None))

    def _take(
        self,
        nid: Nid,
        effects: Iterable[Send | Judged | Suspected],
        now_s: float,
        *,
        own: bool = False,
    ) -> None:
        """Of a step; own: of time, not of a message."""
        for effect in effects:
            if isinstance(effect, Send):
                self._send(nid, effect, now_s)
            elif isinstance(effect, Judged):
                self.judged[nid, effect.nid] = effect.alive
                wrong = not effect.alive and effect.nid not in self.silent
                self.counts.alarms += wrong and own
            elif effect.cleared:
                self.counts.tries[effect.tries] += 1

    def _send(self, nid: Nid, send: Send, now_s: float) -> None:
        self.counts.messages += 1
        self.counts.bytes += size_bytes(send.message)
        if self._rng.random() < self._drop or (nid in self.cut) != (send.to in self.cut):
            return
        late_s = DELAY_S_MIN + self._rng.expovariate(1.0 / DELAY_S_MEAN)
        message = send.message
        if self._encoded:
            message = decode_message(encode_message(message))
        at = (now_s + late_s, next(self._number), send.to, nid, message)
        heapq.heappush(self._heap, at)

    def run(self, until_s: float, about: Nid | None = None) -> float:
        """Go on until then, or until all have judged that node dead; says when that was."""
        now_s = self.counts.seconds
        while self._heap and self._heap[0][0] <= until_s:
            now_s, _, nid, sender, message = heapq.heappop(self._heap)
            if message is None:
                self._scheduled.pop(nid, None)
            if nid in self.silent:
                continue
            node = self.nodes[nid]
            if message is not None:
                self._take(nid, node.step(Received(sender, message), now_s), now_s)
            elif now_s >= node.wake_s:
                self._take(nid, node.step(Tick(), now_s), now_s, own=True)
            self._wake(nid)
            if about is not None and not self.unaware(about):
                break
        else:
            now_s = until_s
        self.counts.seconds = now_s
        return now_s

    def unaware(self, about: Nid) -> int:
        """How many do not hold the node dead."""
        return sum(nid not in self.silent and node.alive(about) for nid, node in self.nodes.items())


def run_death(nodes: int, drop: float, seed: int, together: int = 1) -> float:
    """Seconds from a death until all know of it; of several neighbours, until all know of all."""
    network = Failing(nodes, drop, f"death {nodes} {drop} {seed}")
    rng = random.Random(f"who {seed}")  # noqa: S311
    died_s = 5.0 + rng.random()
    network.run(died_s)
    first = rng.randrange(nodes)
    dead = [Nid((first + each) % nodes) for each in range(together)]
    network.silent = set(dead)
    return max(network.run(died_s + GIVE_UP_S, nid) for nid in dead) - died_s


def run_peace(nodes: int, drop: float, seed: int, hours: float) -> Peace:
    """So many hours in which nobody dies."""
    network = Failing(nodes, drop, f"peace {nodes} {drop} {seed}")
    network.run(hours * 3600.0)
    return network.counts


def cpu_share(nodes: int, seconds: float) -> float:
    """The part of a core that one node's detector and its messages' bytes take, in peace.

    The simulation's own work is in it; sockets and encryption are not.
    """
    network = Failing(nodes, 0.0, f"cpu {nodes}", encoded=True)
    began_s = time.process_time()
    network.run(seconds)
    return (time.process_time() - began_s) / (nodes * seconds)
