"""How the source's network grows: additions and removals at random until it has 100 nodes.

Each step adds or removes with equal probability (the last node is never removed); an addition takes
the first gap, a removal a random node. All errors are settled before the next command, so a step
depends on nothing but the list before it: the steps can be had without simulating any of them, and
those of one length can be simulated alone (tests show that they are the very same).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tercet_node.membership import Entry, Incarnation, Nid, NodeList, State

LENGTH_MAX = 100
SIGNATURE_BYTES = 64
TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Step:
    """One command, and the list that all nodes have before it."""

    number: int
    before: NodeList
    """As `popcorn` has it: only nodes that are present."""
    entry: Entry
    """Who comes, or (a tombstone) goes."""
    stones: NodeList
    """As `versioned` has it: with tombstones."""

    @property
    def length(self) -> int:
        """Nodes after the step."""
        return len(self.before) + (1 if self.entry.present else -1)


def entry_of(nid: int, incarnation: int, state: State, *, signed: bool = False) -> Entry:
    """The entry that every run has for this nid and incarnation."""
    name = f"{nid} {incarnation} {state}".encode()
    token = hashlib.shake_128(name).digest(SIGNATURE_BYTES if signed else TOKEN_BYTES)
    node = hashlib.shake_128(f"node {nid} {incarnation}".encode()).digest(16)
    address = f"10.{nid >> 16 & 255}.{nid >> 8 & 255}.{nid & 255}:4424"
    return Entry(Nid(nid), node, node, address, Incarnation(incarnation), state, token)


def walk(seed: str, length_max: int = LENGTH_MAX) -> Iterator[Step]:
    """The steps of one trial."""
    rng = random.Random(seed)  # noqa: S311 - a simulation
    incarnations = {0: 1}
    first = entry_of(0, 1, State.PRESENT)
    plain = stones = NodeList.of([first])
    number = 0
    while len(plain) < length_max:
        grows = len(plain) == 1 or rng.random() < 0.5
        nid = plain.first_gap() if grows else rng.choice(plain.nids())
        incarnations[nid] = incarnations.get(nid, 0) + 1
        state = State.PRESENT if grows else State.GONE
        entry = entry_of(nid, incarnations[nid], state)
        yield Step(number, plain, entry, stones)
        plain = plain.put(entry) if grows else plain.drop(nid)
        stones = stones.put(entry)
        number += 1
