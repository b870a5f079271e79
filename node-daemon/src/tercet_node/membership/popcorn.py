"""The source's rules: the lower nid's view wins, once the node in question is not simply alive.

Lists are compared whole: that an entry is missing means something. So the parts of a list are put
together first (one list at a time for each peer, bounded), then compared entry by entry:

- the lower of the two looks only at nodes that it lacks: it probes them, and takes those that are
  alive. If anything differs it sends its own list back, by which the higher corrects itself;
- the higher takes what only the lower has; what only itself has it probes, and drops what is not
  alive. Where both have a nid with different tokens, who answers decides, else the lower's view.

The source has one sentence for it ("first checking if the node is still active and then choosing
the node list with the lowest node ID"), which can be understood in other ways: that who does not
answer is gone (`Reading.ACTIVE`), or that the lower nid wins unasked (`Reading.LOWER`).

The known weakness is part of it, because it is what is compared with: a lower node that has missed
the news of a newcomer takes it away from the next higher one if the newcomer's answer to the probe
is lost, and gives a removed node back. docs/membership.md has how often.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from tercet_node.membership.entries import Entry, Nid
from tercet_node.membership.errors import CommandError
from tercet_node.membership.events import Cause, Effect, Reason, Refused, Send
from tercet_node.membership.machine import NODES_MAX, Machine, Settings
from tercet_node.membership.messages import Ack, Part, Prelim, Probe
from tercet_node.membership.nodelist import NodeList

ASSEMBLIES_MAX = 8
"""Lists that are being put together at a time; the oldest is given up."""
PROBES_MAX = 64


class Reading(Enum):
    """How the source's rule for conflicts is read."""

    PROBE = auto()
    """The node in question is asked; if it does not answer, the lower nid's view holds."""
    ACTIVE = auto()
    """The node in question is asked; if it does not answer, it is gone."""
    LOWER = auto()
    """The lower nid's view holds."""


@dataclass(slots=True)
class _Assembly:
    """A peer's list of which parts have come."""

    digest: int
    total: int
    parts: dict[int, tuple[Entry, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A probe under way, and what holds if nobody answers."""

    nid: Nid
    until_s: float
    otherwise: Entry | None


class PopcornMachine(Machine):
    """A node that keeps the source's rules."""

    def __init__(
        self,
        me: Entry,
        known: NodeList | None = None,
        settings: Settings | None = None,
        now_s: float = 0.0,
        reading: Reading = Reading.PROBE,
    ) -> None:
        super().__init__(me, known, settings, now_s)
        self.reading = reading
        self._assemblies: dict[Nid, _Assembly] = {}
        self._asked: dict[int, _Asked] = {}
        """Probes by nonce."""
        self._nonce = 0
        self._joining = known is None
        """The first list that comes is taken as it is: a newcomer has no view of its own."""

    @property
    def wake_s(self) -> float:
        """When the next check or the next time-out of a probe is due."""
        wake_s = super().wake_s
        if self._asked and not self.locked:
            return min(wake_s, *(asked.until_s for asked in self._asked.values()))
        return wake_s

    # ------------------------------------------------------------------ tree

    def _introduce(self, entry: Entry, now_s: float) -> Iterator[Effect]:
        if entry.nid == self.me:
            raise CommandError(f"node {self.me} does not add or remove itself: tell another node")
        first = self.list.drop(entry.nid).instigator()
        if self.me != first:
            raise CommandError(f"node {self.me} is not the instigator: tell node {first}")
        before = self.list.get(entry.nid)
        if entry.present and before is not None:
            gap = self.list.first_gap()
            raise CommandError(f"nid {entry.nid} is taken: the first gap is {gap}")
        yield from self._apply(entry, now_s)
        if entry.present:
            # The newcomer has no list yet: this is its connection to the first node.
            for part in self._parts():
                yield Send(entry.nid, part, entry)

    def _news(self, peer: Nid, entry: Entry, now_s: float) -> Iterator[Effect]:
        if entry.nid == self.me:
            yield Refused(peer, Reason.UNASKED, entry.nid)
            return
        yield from self._apply(entry, now_s)

    def _apply(self, entry: Entry, now_s: float) -> Iterator[Effect]:
        self._joining = False
        before = self.list.get(entry.nid)
        if entry.present:
            if entry == before:
                return
            yield self._put(entry, Cause.TOLD, now_s)
        elif before is not None:
            yield self._drop(entry.nid, Cause.TOLD, now_s)
        else:
            return
        yield from self._forward(entry)

    # ------------------------------------------------------------------ the full check

    def _mismatch(self, peer: Nid) -> Iterator[Effect]:
        # The higher one's list comes first, whoever asked: the lower answers with its own, but
        # would never see what the higher has if it began.
        if self.me > peer:
            yield from self._differs(peer)
        else:
            yield Send(peer, Prelim(self.list.digest))

    def _differs(self, peer: Nid) -> Iterator[Effect]:
        for part in self._parts():
            yield Send(peer, part)

    def _parts(self) -> list[Part]:
        size = self.settings.entries_per_part
        digest, total = self.list.digest, len(self.list)
        entries = tuple(self._by_recency()) if total > size else tuple(self.list)
        return [
            Part(digest, index, total, entries[at : at + size], answer=False)
            for index, at in enumerate(range(0, total, size))
        ]

    def _part(self, peer: Nid, part: Part, now_s: float) -> Iterator[Effect]:
        if part.digest == self.list.digest:
            self._assemblies.pop(peer, None)
            return
        if part.total > NODES_MAX:
            yield Refused(peer, Reason.TOO_LONG)
            return
        entries = self._assemble(peer, part)
        if entries is None:
            return
        theirs = NodeList.of(entries)
        if theirs.digest != part.digest:
            yield Refused(peer, Reason.GARBLED)
        elif self._joining:
            self._joining = False
            for entry in entries:
                if entry.nid != self.me:
                    yield self._put(entry, Cause.TOLD, now_s)
        else:
            yield from self._compare(peer, theirs, now_s)

    def _assemble(self, peer: Nid, part: Part) -> list[Entry] | None:
        """The peer's whole list, once all of it is here."""
        found = self._assemblies.get(peer)
        if found is None or (found.digest, found.total) != (part.digest, part.total):
            self._assemblies.pop(peer, None)
            found = self._assemblies[peer] = _Assembly(part.digest, part.total)
            if len(self._assemblies) > ASSEMBLIES_MAX:
                del self._assemblies[next(iter(self._assemblies))]
        found.parts[part.index] = part.entries
        if sum(len(entries) for entries in found.parts.values()) < found.total:
            return None
        del self._assemblies[peer]
        return [entry for entries in found.parts.values() for entry in entries]

    def _compare(self, peer: Nid, theirs: NodeList, now_s: float) -> Iterator[Effect]:
        lower = self.me < peer
        repaired = False
        for nid in self.list.differing(theirs):
            mine, other = self.list.get(nid), theirs.get(nid)
            if nid == self.me:
                continue
            if self.reading is Reading.ACTIVE:
                yield from self._ask(nid, None, mine or other, now_s)
            elif self.reading is Reading.PROBE and (lower or mine is not None):
                if not lower or other is not None:
                    yield from self._ask(nid, mine if lower else other, mine or other, now_s)
            elif not lower:
                yield self._take(nid, other, now_s)
                repaired = True
        if lower:
            yield from self._differs(peer)
        if repaired:
            yield from self._repaired()

    def _take(self, nid: Nid, entry: Entry | None, now_s: float) -> Effect:
        if entry is None:
            return self._drop(nid, Cause.REPAIRED, now_s)
        return self._put(entry, Cause.REPAIRED, now_s)

    def _repaired(self) -> Iterator[Effect]:
        if self.settings.check_after_repair:
            yield from self._check(full=False, peer=None)

    # ------------------------------------------------------------------ probes

    def _ask(
        self, nid: Nid, otherwise: Entry | None, at: Entry | None, now_s: float
    ) -> Iterator[Effect]:
        if len(self._asked) >= PROBES_MAX or any(a.nid == nid for a in self._asked.values()):
            return
        self._nonce += 1
        until_s = now_s + self.settings.probe_timeout_s
        self._asked[self._nonce] = _Asked(nid, until_s, otherwise)
        yield Send(nid, Probe(self._nonce), at)

    def _ack(self, peer: Nid, ack: Ack, now_s: float) -> Iterator[Effect]:
        asked = self._asked.get(ack.nonce)
        if asked is None or asked.nid != peer or ack.entry.nid != peer:
            yield Refused(peer, Reason.UNASKED)
            return
        del self._asked[ack.nonce]
        yield from self._settle(peer, ack.entry, now_s)

    def _expire(self, now_s: float) -> Iterator[Effect]:
        due = [nonce for nonce, asked in self._asked.items() if asked.until_s <= now_s]
        for nonce in due:
            asked = self._asked.pop(nonce)
            yield from self._settle(asked.nid, asked.otherwise, now_s)

    def _settle(self, nid: Nid, entry: Entry | None, now_s: float) -> Iterator[Effect]:
        if self.list.get(nid) != entry:
            yield self._take(nid, entry, now_s)
            yield from self._repaired()
