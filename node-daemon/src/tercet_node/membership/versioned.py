"""Our rules: entries are signed and numbered, the newer one holds, whoever brings it.

An entry changes only by the authority (the operator, for StorageNode objects), which signs each
state of each nid with the next incarnation; a removal is a tombstone. For every pair of entries it
is defined once for all nodes which one holds (`entries.newer`), so a list is a join-semilattice:
merging is commutative, associative and idempotent, and no order of messages, no loss and no replay
can put an older view in the place of a newer one. That is what `popcorn` cannot promise.

Where the source's protocol is changed beyond that:

- A missing entry means "has not heard", never "was removed", so each part of a list is merged as it
  comes, and the full check ends as soon as the digests agree: two nodes that lack each other's
  latest change have each other's first part in two messages, however long the list is.
- A node that learns something from a neighbour forwards it down its own tree as well. Without that
  a lost message to a subtree's root leaves half of a tree's level unknowing, next to each other on
  the ring, to be repaired one by one; with it the subtree has it in O(log n) steps.
- Who lives is not in the list. An address stays when its node is down, so that two halves of a cut
  network find each other again: their lists are still the same. Only the authority removes.
- Tombstones have no life time: there is at most one for each nid, and it is replaced when the nid
  is taken again. One that expired would let a node that was cut off for longer bring back what was
  removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tercet_node.membership.entries import Entry, Nid, newer
from tercet_node.membership.errors import CommandError
from tercet_node.membership.events import Cause, Effect, Reason, Refused, Send
from tercet_node.membership.machine import NODES_MAX, Machine, Settings
from tercet_node.membership.messages import INDEX_MAX, Ack, Change, Part
from tercet_node.membership.nodelist import NodeList
from tercet_node.membership.seals import Seal


class VersionedMachine(Machine):
    """A node that keeps our rules."""

    def __init__(
        self,
        me: Entry,
        seal: Seal,
        known: NodeList | None = None,
        settings: Settings | None = None,
        now_s: float = 0.0,
        spread: bool = True,
    ) -> None:
        super().__init__(me, known, settings, now_s)
        self._seal = seal
        self._spread = spread
        """Whether what a check brings goes down the tree; off only to show what it is good for."""

    # ------------------------------------------------------------------ tree

    def _introduce(self, entry: Entry, now_s: float) -> Iterator[Effect]:
        if not self._is_news(entry):
            return
        if not self._seal.holds(entry):
            raise CommandError(f"nid {entry.nid}: its entry's signature does not hold: sign it")
        yield from self._learn(entry, Cause.TOLD, now_s)
        first = self.list.top(self.dead | 1 << entry.nid)
        if first not in (None, self.me):
            yield Send(first, Change(entry))

    def _news(self, peer: Nid, entry: Entry, now_s: float) -> Iterator[Effect]:
        if self._is_news(entry):
            yield from self._judge(peer, entry, Cause.TOLD, now_s)

    def _is_news(self, entry: Entry) -> bool:
        mine = self.list.get(entry.nid)
        return mine is None or (mine is not entry and newer(mine, entry) != mine)

    def _judge(self, peer: Nid, entry: Entry, cause: Cause, now_s: float) -> Iterator[Effect]:
        if entry.nid >= NODES_MAX:
            yield Refused(peer, Reason.TOO_LONG, entry.nid)
        elif self._seal.holds(entry):
            yield from self._learn(entry, cause, now_s, peer)
        else:
            yield Refused(peer, Reason.BAD_SIGNATURE, entry.nid)

    def _learn(
        self, entry: Entry, cause: Cause, now_s: float, source: Nid | None = None
    ) -> Iterator[Effect]:
        yield self._put(entry, cause, now_s)
        if cause is Cause.TOLD or self._spread:
            yield from self._forward(entry, () if source is None else (source,))

    # ------------------------------------------------------------------ the full check

    def _differs(self, peer: Nid) -> Iterator[Effect]:
        yield Send(peer, self._slice(0, answer=False))

    def _slice(self, index: int, *, answer: bool) -> Part:
        size = self.settings.entries_per_part
        total = self.list.entries
        if total <= size:
            entries = tuple(self.list) if index == 0 else ()
        else:
            entries = tuple(islice(self._by_recency(), index * size, (index + 1) * size))
        return Part(self.list.digest, index, max(total, index * size), entries, answer)

    def _part(self, peer: Nid, part: Part, now_s: float) -> Iterator[Effect]:
        if part.digest == self.list.digest:
            return
        if part.total > NODES_MAX:
            yield Refused(peer, Reason.TOO_LONG)
            return
        before = self.list
        for entry in part.entries:
            if self._is_news(entry):
                yield from self._judge(peer, entry, Cause.REPAIRED, now_s)
        if part.digest != self.list.digest:
            yield from self._go_on(peer, part)
        if self.list is not before and self.settings.check_after_repair:
            for effect in self._check(full=False, peer=None):
                if isinstance(effect, Send) and effect.to != peer:
                    yield effect

    def _go_on(self, peer: Nid, part: Part) -> Iterator[Effect]:
        """The lists still differ: answer with the same part, or go on with the next one."""
        size = self.settings.entries_per_part
        index = part.index + 1 if part.answer else part.index
        more = max(self.list.entries, part.total)
        if index * size < more and index <= INDEX_MAX:
            yield Send(peer, self._slice(index, answer=not part.answer))

    # ------------------------------------------------------------------ no probes of the list's

    def _ack(self, peer: Nid, ack: Ack, now_s: float) -> Iterator[Effect]:
        del ack, now_s
        yield Refused(peer, Reason.UNASKED)

    def _expire(self, now_s: float) -> Iterator[Effect]:
        del now_s
        return iter(())
