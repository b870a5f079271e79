"""The membership list: a persistent map from nid to entry, read as a heap and as a ring.

Persistent: `put` and `drop` give a new list and share all but one chunk with the old one. So a
snapshot costs nothing (a message can hold the list as it was when it was sent), and ten thousand
simulated nodes that agree hold one list, not ten thousand.

Which nids are present is one integer's bits: next, previous and first gap are arithmetic on it.

- Heap: node i forwards to 2i+1 and 2i+2; for a missing child its parent takes over that child's
  children. The lowest nid present is the instigator; where the heap's top is missing, it takes over
  what the top would have done.
- Ring: a node's neighbours are the next lower and the next higher nid present.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tercet_api.enrolment import NID_MAX
from tercet_node.membership.entries import Entry, Nid

CHUNK_ENTRIES = 64

Chunk = tuple[Entry | None, ...]
EMPTY_CHUNK: Chunk = (None,) * CHUNK_ENTRIES


@dataclass(frozen=True, slots=True)
class NodeList:
    """All entries. Equal lists have equal digests."""

    _chunks: tuple[Chunk, ...] = ()
    present: int = 0
    """Bit i: nid i is present."""
    digest: int = 0
    """XOR of the fingerprints of all entries, tombstones too."""
    entries: int = 0
    """How many there are, tombstones too."""

    @staticmethod
    def of(entries: Iterable[Entry]) -> NodeList:
        """A list of these."""
        by_nid = {entry.nid: entry for entry in entries}
        if not by_nid:
            return NodeList()
        places = [by_nid.get(Nid(nid)) for nid in range(max(by_nid) + 1)]
        places += [None] * (-len(places) % CHUNK_ENTRIES)
        digest = present = 0
        for nid, entry in by_nid.items():
            digest ^= entry.fingerprint
            present |= entry.present << nid
        chunks = (places[at : at + CHUNK_ENTRIES] for at in range(0, len(places), CHUNK_ENTRIES))
        return NodeList(tuple(map(tuple, chunks)), present, digest, len(by_nid))

    def get(self, nid: int) -> Entry | None:
        """The entry of that nid, be it a tombstone."""
        chunk, place = divmod(nid, CHUNK_ENTRIES)
        return self._chunks[chunk][place] if chunk < len(self._chunks) else None

    def put(self, entry: Entry) -> NodeList:
        """With this entry in its nid's place."""
        assert 0 <= entry.nid <= NID_MAX
        return self._set(entry.nid, entry)

    def drop(self, nid: Nid) -> NodeList:
        """Without an entry for that nid."""
        return self if self.get(nid) is None else self._set(nid, None)

    def _set(self, nid: Nid, entry: Entry | None) -> NodeList:
        chunk, place = divmod(nid, CHUNK_ENTRIES)
        chunks = self._chunks
        if chunk >= len(chunks):
            chunks += (EMPTY_CHUNK,) * (chunk + 1 - len(chunks))
        old = chunks[chunk]
        before = old[place]
        new = (*old[:place], entry, *old[place + 1 :])
        digest = self.digest
        if before is not None:
            digest ^= before.fingerprint
        if entry is not None:
            digest ^= entry.fingerprint
        bit = 1 << nid
        present = self.present | bit
        if entry is None or not entry.present:
            present ^= bit
        entries = self.entries + (entry is not None) - (before is not None)
        return NodeList((*chunks[:chunk], new, *chunks[chunk + 1 :]), present, digest, entries)

    def __contains__(self, nid: int) -> bool:
        return bool(self.present >> nid & 1)

    def __len__(self) -> int:
        return self.present.bit_count()

    def __iter__(self) -> Iterator[Entry]:
        """All entries by nid, tombstones too."""
        for chunk in self._chunks:
            for entry in chunk:
                if entry is not None:
                    yield entry

    def descending(self) -> Iterator[Entry]:
        """All entries, the highest nid first."""
        for chunk in reversed(self._chunks):
            for entry in reversed(chunk):
                if entry is not None:
                    yield entry

    def differing(self, other: NodeList) -> list[Nid]:
        """Nids whose entries differ; looks only into chunks that are not shared."""
        count = max(len(self._chunks), len(other._chunks))
        mine = self._chunks + (EMPTY_CHUNK,) * (count - len(self._chunks))
        theirs = other._chunks + (EMPTY_CHUNK,) * (count - len(other._chunks))
        return [
            Nid(index * CHUNK_ENTRIES + place)
            for index in range(count)
            if mine[index] is not theirs[index]
            for place in range(CHUNK_ENTRIES)
            if mine[index][place] is not theirs[index][place]
            and mine[index][place] != theirs[index][place]
        ]

    # ------------------------------------------------------------------ who is present

    def nids(self) -> list[Nid]:
        """Nids present, ascending."""
        return [entry.nid for entry in self if entry.present]

    def instigator(self) -> Nid:
        """The lowest nid present; the list must not be empty."""
        assert self.present, "an empty list has no instigator"
        return Nid((self.present & -self.present).bit_length() - 1)

    def top(self, dead: int) -> Nid | None:
        """The lowest nid present and not dead: where a tree begins."""
        there = self.present & ~dead
        return Nid((there & -there).bit_length() - 1) if there else None

    def highest(self) -> Nid:
        """The highest nid present; the list must not be empty."""
        assert self.present, "an empty list has no highest nid"
        return Nid(self.present.bit_length() - 1)

    def first_gap(self) -> Nid:
        """The lowest nid that is not present: a newcomer's."""
        return Nid((~self.present & (self.present + 1)).bit_length() - 1)

    # ------------------------------------------------------------------ the ring

    def next_from(self, nid: int) -> Nid:
        """The lowest nid present that is at least this one, around the ring's end."""
        return _next_from(self.present, nid)

    def neighbours(self, nid: Nid, dead: int = 0) -> tuple[Nid, ...]:
        """The next lower and next higher nid present, without doubles and without itself.

        Nids of `dead` (bits) count as missing, here and in the heap: they are in the list, but to
        check with them or to have them forward would be in vain.
        """
        there = self.present & ~dead & ~(1 << nid)
        if not there:
            return ()
        below = there & ((1 << nid) - 1)
        lower = Nid((below or there).bit_length() - 1)
        higher = _next_from(there, nid + 1)
        return (lower,) if lower == higher else (lower, higher)

    # ------------------------------------------------------------------ the heap

    def targets(self, nid: Nid, about: Nid, dead: int = 0) -> list[Nid]:
        """To whom `nid` forwards news about `about`, which counts as missing.

        A newcomer does not forward yet and a removed node does not any more: either way the
        parent takes over.
        """
        there = self.present & ~(1 << about) & ~dead
        if not there:
            return []
        last = there.bit_length() - 1
        found: list[Nid] = []
        top = (there & -there).bit_length() - 1 == nid
        stack = [0] if top else [2 * nid + 2, 2 * nid + 1]
        while stack:
            at = stack.pop()
            if at > last:
                continue
            if at != nid and there >> at & 1:
                found.append(Nid(at))
            else:
                stack += (2 * at + 2, 2 * at + 1)
        return found


def _next_from(there: int, nid: int) -> Nid:
    above = there >> nid
    if above:
        return Nid(nid + (above & -above).bit_length() - 1)
    return Nid((there & -there).bit_length() - 1)
