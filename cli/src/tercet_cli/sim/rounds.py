"""A network in which everything happens in a fixed order: the source's experiment.

A message is delivered, and all that follows from it, before the next one is sent (depth first);
each message but those of a command's first contact is lost with the drop rate. A round lets every
node check once. The machines are the production's; only who is told to check, and when, is here.

What the source does not say, and what changes the results (docs/membership.md compares them), are
parameters: in which order nodes have their turn (`Order`), and how a conflict is settled
(`popcorn.Reading`).
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from tercet_cli.sim.walk import Step
from tercet_node.membership import (
    Ack,
    Cause,
    Change,
    Changed,
    CheckNow,
    Effect,
    Entry,
    Introduce,
    Machine,
    Nid,
    NodeList,
    OpenSeal,
    PopcornMachine,
    Probe,
    Reading,
    Received,
    Send,
    Settings,
    Tick,
    VersionedMachine,
    size_bytes,
)

ROUNDS_MAX = 200
"""A network that is not consistent by then is taken not to become so."""
FLOOD_MESSAGES = 5
"""A node that gets more messages than this at one artificial time counts as flooded."""
TURN_S = 10.0
"""Artificial seconds between turns: longer than any probe's time-out."""
WHOLE_LIST = 1 << 20

SETTINGS = Settings(check_after_repair=False, entries_per_part=WHOLE_LIST, periodic=False)


class Order(StrEnum):
    """In which order the nodes of a round have their turn."""

    NID = "nid"
    """Ascending; each turn ends before the next begins."""
    TREE = "tree"
    """Down the tree, depth first; each turn ends before the next begins."""
    TOGETHER = "together"
    """All send what they have when the round begins; then everything is delivered."""


class Policy(StrEnum):
    """Whose rules hold."""

    PROBE = "popcorn"
    """The source's; the node in question is probed first."""
    ACTIVE = "popcorn-active"
    """The source's; who does not answer the probe is gone."""
    LOWER = "popcorn-lower"
    """The source's; the lower nid wins at once."""
    VERSIONED = "versioned"


class Loss(StrEnum):
    """What a lost command costs."""

    SUBTREE = "subtree"
    """Nobody below hears of it: it is not forwarded, as the protocol has it."""
    NODE = "node"
    """Only this node: those below hear of it all the same."""


class Sure(StrEnum):
    """What cannot be lost, as in a simulation that calls instead of sending."""

    NOTHING = "nothing"
    PROBES = "probes"
    """A probe of the node in question, and its answer."""
    OFFSETS = "probes+offset"
    """Those, and the instigator's offset on its way down the tree."""


READINGS = {
    Policy.PROBE: Reading.PROBE,
    Policy.ACTIVE: Reading.ACTIVE,
    Policy.LOWER: Reading.LOWER,
}


def machine_of(
    policy: Policy, me: Entry, known: NodeList | None, settings: Settings = SETTINGS
) -> Machine:
    """A node of the production code."""
    if policy is Policy.VERSIONED:
        return VersionedMachine(me, OpenSeal(), known, settings, spread=settings.periodic)
    return PopcornMachine(me, known, settings, reading=READINGS[policy])


@dataclass(slots=True)
class Counts:
    """What is counted in one step."""

    messages: int = 0
    bytes: int = 0
    lost: int = 0
    flooded: int = 0
    wrong: int = 0
    """Correct entries that a check put a wrong one, or none, in the place of."""
    right: int = 0
    """Wrong entries that a check made right."""


class Network:
    """The nodes of one step."""

    def __init__(
        self,
        policy: Policy,
        step: Step,
        drop: float,
        rng: random.Random,
        loss: Loss = Loss.SUBTREE,
        sure: Sure = Sure.NOTHING,
    ) -> None:
        self.policy = policy
        self._sure = sure
        self._loss = loss
        versioned = policy is Policy.VERSIONED
        before = step.stones if versioned else step.before
        self.truth = before.put(step.entry)
        if not versioned and not step.entry.present:
            self.truth = before.drop(step.entry.nid)
        self.machines: dict[Nid, Machine] = {
            entry.nid: machine_of(policy, entry, before)
            for entry in before
            if entry.present and entry.nid != step.entry.nid
        }
        self._drop = drop
        self._rng = rng
        self._now_s = 0.0
        self._arrivals: Counter[tuple[Nid, int]] = Counter()
        self._probing: dict[Nid, None] = {}
        self.counts = Counts()
        self._command(step, before)

    def _command(self, step: Step, before: NodeList) -> None:
        """Tell the instigator; its own first message to a newcomer is never lost."""
        entry = step.entry
        first = min(self.machines)
        if entry.present:
            known = before if self.policy is Policy.VERSIONED else None
            self.machines[entry.nid] = machine_of(self.policy, entry, known)
        effects = self.machines[first].step(Introduce(entry), self._now_s)
        sure = [e for e in effects if isinstance(e, Send) and e.to == entry.nid]
        for send in sure:
            self.machines[entry.nid].step(Received(first, send.message), self._now_s)
        self.deliver(first, (e for e in effects if e not in sure), 0)

    # ------------------------------------------------------------------ messages

    def deliver(self, sender: Nid, effects: Iterable[Effect], time: int) -> None:
        """Carry out effects and all that follows from them, depth first."""
        stack = [(sender, time, iter(effects))]
        while stack:
            who, when, rest = stack[-1]
            effect = next(rest, None)
            if effect is None:
                stack.pop()
            elif isinstance(effect, Send):
                answer = self._arrive(who, effect, when + 1)
                if answer:
                    stack.append((effect.to, when + 1, iter(answer)))
            elif isinstance(effect, Changed):
                self._judge(effect)

    def _arrive(self, sender: Nid, send: Send, time: int) -> list[Effect]:
        self.counts.messages += 1
        self.counts.bytes += size_bytes(send.message)
        if isinstance(send.message, Probe):
            self._probing[sender] = None
        to = self.machines.get(send.to)
        sure = self._sure is not Sure.NOTHING and isinstance(send.message, Probe | Ack)
        if not sure and self._rng.random() < self._drop:
            self.counts.lost += 1
            if to is not None and self._loss is Loss.NODE and isinstance(send.message, Change):
                targets = to.list.targets(send.to, send.message.entry.nid)
                return [Send(nid, send.message) for nid in targets]
            return []
        if to is None:
            return []
        self._arrivals[send.to, time] += 1
        if self._arrivals[send.to, time] == FLOOD_MESSAGES + 1:
            self.counts.flooded += 1
        return to.step(Received(sender, send.message), self._now_s)

    def _judge(self, effect: Changed) -> None:
        if effect.cause is Cause.REPAIRED:
            right = self.truth.get(effect.nid)
            self.counts.wrong += effect.before == right
            self.counts.right += effect.after == right

    def _end_turn(self, time: int) -> None:
        """Let the probes that nobody answered time out."""
        while self._probing:
            asking = tuple(self._probing)
            self._probing.clear()
            self._now_s += SETTINGS.probe_timeout_s
            for nid in asking:
                self.deliver(nid, self.machines[nid].step(Tick(), self._now_s), time)
        self._now_s += TURN_S

    # ------------------------------------------------------------------ rounds

    def inconsistent(self) -> int:
        """Nodes whose list is not the true one."""
        return sum(m.list.digest != self.truth.digest for m in self.machines.values())

    def turns(self, turns: Iterable[tuple[Nid, Nid | None]], order: Order, time: int) -> None:
        """Let these nodes check (their neighbours, or the given peer), in this order."""
        check: Callable[[Nid, Nid | None], list[Effect]] = lambda nid, peer: self.machines[  # noqa: E731
            nid
        ].step(CheckNow(full=True, peer=peer), self._now_s)
        if order is Order.TOGETHER:
            waiting = deque((nid, effect) for nid, peer in turns for effect in check(nid, peer))
            while waiting:
                nid, effect = waiting.popleft()
                if isinstance(effect, Send):
                    waiting += ((effect.to, e) for e in self._arrive(nid, effect, time))
                elif isinstance(effect, Changed):
                    self._judge(effect)
            self._end_turn(time)
            return
        for nid, peer in turns:
            self.deliver(nid, check(nid, peer), time)
            self._end_turn(time)

    def neighbours_round(self, order: Order, number: int) -> None:
        """Every node checks its neighbours."""
        nids = sorted(self.machines) if order is not Order.TREE else self._down()
        self.turns([(nid, None) for nid in nids], order, number * 100)

    def random_round(self, order: Order, number: int) -> None:
        """The instigator draws an offset and sends it down the tree; who got it checks one node."""
        first = min(self.machines)
        span = self.machines[first].list.highest() + 1
        offset = self._rng.randrange(1, span) if span > 1 else 0
        heard = {first}
        down = [first]
        for nid in down:
            for target in self.machines[nid].list.targets(nid, Nid(span + 1)):
                self.counts.messages += 1
                if target not in self.machines or target in down:
                    continue
                if self._sure is Sure.OFFSETS or self._rng.random() >= self._drop:
                    heard.add(target)
                    down.append(target)
                else:
                    self.counts.lost += 1
                    if self._loss is Loss.NODE:
                        down.append(target)
        reached = [nid for nid in down if nid in heard]
        if order is not Order.TREE:
            reached.sort()
        turns: list[tuple[Nid, Nid | None]] = []
        for nid in reached:
            known = self.machines[nid].list
            peer = known.next_from((nid + offset) % (known.highest() + 1))
            if peer != nid:
                turns.append((nid, peer))
        self.turns(turns, order, number * 100)

    def _down(self) -> list[Nid]:
        """All nodes in the order of a walk down the true tree, depth first."""
        span = Nid(self.truth.highest() + 1)
        order: list[Nid] = []
        stack = [self.truth.instigator()]
        while stack:
            nid = stack.pop()
            order.append(nid)
            stack += reversed(self.truth.targets(nid, span))
        assert len(order) == len(self.machines)
        return order
