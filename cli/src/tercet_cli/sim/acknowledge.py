"""The rival that prevents errors instead of repairing them: acknowledgements up the tree.

A node that gets a command carries it out, forwards it to its children, and acknowledges when all of
them have. Who waits too long (longer the more levels are below) sends the command again, to those
that have not acknowledged; after ATTEMPTS_MAX times it gives up, and the command has failed: the
newcomer is removed again, a child that does not answer either.

A child that has done its part acknowledges again when it is asked again; one that is still waiting
for its own children does not. So a lost message near the leaves makes every node above it send
again, as the source describes; its remedy (a second kind of acknowledgement) is not in it.

Attempts, as they are counted here: the first, and one more for each time that any node sends again.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field

from tercet_cli.sim.rounds import FLOOD_MESSAGES, Counts
from tercet_cli.sim.walk import Step
from tercet_node.membership import Nid

ATTEMPTS_MAX = 10
COMMAND_BYTES = 64
ACK_BYTES = 16


@dataclass(slots=True)
class _Node:
    """What one node knows of the command."""

    parent: Nid | None
    waiting: set[Nid]
    tries: int = 1
    done: bool = False


@dataclass(order=True, slots=True)
class _Happening:
    time: int
    number: int
    kind: str = field(compare=False)
    sender: Nid = field(compare=False)
    to: Nid = field(compare=False)


class Acknowledged:
    """One command, with acknowledgements."""

    def __init__(self, step: Step, drop: float, rng: random.Random) -> None:
        self._list = step.before
        self._entry = step.entry
        self._drop = drop
        self._rng = rng
        self._nodes: dict[Nid, _Node] = {}
        self._heap: list[_Happening] = []
        self._number = 0
        self._arrivals: Counter[tuple[Nid, int]] = Counter()
        self.counts = Counts()
        self.attempts = 1
        self.failed = False
        members = step.before.drop(step.entry.nid)
        self._size = len(members)
        self._first = members.instigator()
        self._height = (members.highest() + 1).bit_length()
        self._run()

    def inconsistent(self) -> int:
        """Nodes that the command has not reached."""
        return self._size - len(self._nodes)

    def _run(self) -> None:
        self._command(0, None, self._first)
        while self._heap and not self._nodes[self._first].done and not self.failed:
            happening = heapq.heappop(self._heap)
            now, sender, to = happening.time, happening.sender, happening.to
            if happening.kind == "time-out":
                self._late(now, to)
                continue
            self._arrivals[to, now] += 1
            self.counts.flooded += self._arrivals[to, now] == FLOOD_MESSAGES + 1
            if happening.kind == "command":
                self._command(now, sender, to)
            else:
                self._acknowledged(now, sender, to)

    def _at(self, time: int, kind: str, sender: Nid, to: Nid) -> None:
        self._number += 1
        heapq.heappush(self._heap, _Happening(time, self._number, kind, sender, to))

    def _send(self, now: int, kind: str, sender: Nid, to: Nid) -> None:
        self.counts.messages += 1
        self.counts.bytes += COMMAND_BYTES if kind == "command" else ACK_BYTES
        if self._rng.random() < self._drop:
            self.counts.lost += 1
        else:
            self._at(now + 1, kind, sender, to)

    def _wait(self, now: int, nid: Nid) -> None:
        """Longer, the more levels are below."""
        level = 0 if nid == self._first else (nid + 1).bit_length()
        below = max(1, self._height - level)
        self._at(now + 2 * below + 1, "time-out", nid, nid)

    def _command(self, now: int, parent: Nid | None, nid: Nid) -> None:
        node = self._nodes.get(nid)
        if node is not None:
            if node.done and node.parent is not None:
                self._send(now, "ack", nid, node.parent)
            return
        children = self._list.targets(nid, self._entry.nid)
        self._nodes[nid] = _Node(parent, set(children))
        for child in children:
            self._send(now, "command", nid, child)
        if children:
            self._wait(now, nid)
        else:
            self._finish(now, nid)

    def _finish(self, now: int, nid: Nid) -> None:
        node = self._nodes[nid]
        node.done = True
        if node.parent is not None:
            self._send(now, "ack", nid, node.parent)

    def _acknowledged(self, now: int, child: Nid, nid: Nid) -> None:
        node = self._nodes[nid]
        node.waiting.discard(child)
        if not node.waiting and not node.done:
            self._finish(now, nid)

    def _late(self, now: int, nid: Nid) -> None:
        node = self._nodes[nid]
        if node.done:
            return
        if node.tries == ATTEMPTS_MAX:
            self.failed = True
            return
        node.tries += 1
        self.attempts += 1
        for child in sorted(node.waiting):
            self._send(now, "command", nid, child)
        self._wait(now, nid)
