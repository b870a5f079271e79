"""The membership as a state machine: `step(event, now) -> effects`. What both policies share.

Here: news down the tree, preliminary checks, pace, lock and unlock, fault injection, probes. What a
policy decides: which of two different views holds, and how lists are compared (popcorn.py,
versioned.py). No clock, no random numbers, no I/O: the agent, the simulations and the tests drive
the same code.

A step is atomic: it returns what is to be sent and what has changed, and the machine is already in
the state that follows. Losing any of the messages is harmless; nothing waits for an answer but a
probe, whose time-out is an answer too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tercet_node.membership.entries import Entry, Nid
from tercet_node.membership.errors import CommandError
from tercet_node.membership.events import (
    AddNoProp,
    Busy,
    Cause,
    Changed,
    CheckNow,
    Dead,
    Effect,
    Event,
    Introduce,
    Lock,
    Reason,
    Received,
    Refused,
    Send,
    Tick,
    Unlock,
)
from tercet_node.membership.messages import (
    ENTRIES_PER_PART,
    Ack,
    Change,
    Heard,
    Hello,
    Message,
    Part,
    Prelim,
    Probe,
    Relay,
    Verdict,
)
from tercet_node.membership.nodelist import NodeList
from tercet_node.membership.pace import INTERVAL_S_MIN, interval_s

RECENT_MAX = 1024
"""Changes whose order is remembered; the rest of a list is sent by nid, the highest first."""
NODES_MAX = 16_384
NEVER_S = float("inf")


@dataclass(frozen=True, slots=True)
class Settings:
    """What an installation, or an experiment, sets."""

    check_after_repair: bool = True
    """A node that had to repair itself checks its neighbours at once."""
    entries_per_part: int = ENTRIES_PER_PART
    """An experiment that knows no message size sends lists whole."""
    probe_timeout_s: float = 0.5
    periodic: bool = True
    """An experiment in rounds says itself when to check."""
    after_change_s: float = INTERVAL_S_MIN
    """The first check comes this soon after a change, however busy the node: what is wrong with it
    shall be noticed within 2 s, and the agent leaves a part of them to the message's way."""
    faults: bool = False
    """Whether faults may be injected: test builds only."""


class Machine(ABC):
    """One node's membership."""

    def __init__(
        self,
        me: Entry,
        known: NodeList | None = None,
        settings: Settings | None = None,
        now_s: float = 0.0,
    ) -> None:
        self.me = me.nid
        self.settings = settings or Settings()
        known = known or NodeList()
        self.list = known if known.get(me.nid) is me else known.put(me)
        self.locked = False
        self.busy = 0.0
        self.dead = 0
        """Bits by nid."""
        self._recent: dict[Nid, None] = {me.nid: None}
        """Nids by time of their last change, the latest last."""
        self._changed_s = now_s
        self._check_s = now_s + interval_s(0.0)

    @property
    def wake_s(self) -> float:
        """When it wants a Tick; NEVER_S if only an event can matter."""
        return NEVER_S if self.locked or not self.settings.periodic else self._check_s

    @property
    def own(self) -> Entry:
        """The entry of this node."""
        entry = self.list.get(self.me)
        assert entry is not None, f"node {self.me} is not in its own list"
        return entry

    # ------------------------------------------------------------------ the step

    def step(self, event: Event, now_s: float) -> list[Effect]:
        """Take an event; says what is to be done. Raises CommandError for commands only."""
        match event:
            case Received(peer, message):
                return list(self._received(peer, message, now_s))
            case Tick():
                return self._tick(now_s)
            case CheckNow(full, peer):
                self._refuse_if_locked("check")
                return list(self._check(full, peer))
            case Introduce(entry):
                self._refuse_if_locked("add or remove a node")
                return list(self._introduce(entry, now_s))
            case AddNoProp(entry):
                return list(self._inject(entry, now_s))
            case Lock():
                self.locked = True
            case Unlock():
                self.locked = False
                self._check_s = min(self._check_s, now_s)
            case Dead(nids):
                self.dead = nids
            case Busy(share):
                self.busy = share
                self._pace(now_s)
        return []

    def _received(self, peer: Nid, message: Message, now_s: float) -> Iterator[Effect]:
        match message:
            case Prelim(digest):
                if digest != self.list.digest:
                    yield from self._mismatch(peer)
            case Probe(nonce, _):
                yield Send(peer, Ack(nonce, self.own))
            case Change() | Part() | Ack() if self.locked:
                yield Refused(peer, Reason.LOCKED)
            case Part():
                yield from self._part(peer, message, now_s)
            case Change(entry):
                yield from self._news(peer, entry, now_s)
            case Ack():
                yield from self._ack(peer, message, now_s)
            case Relay() | Verdict() | Heard() | Hello():
                # The detector's, and it has them; the connection's, and it has read it.
                yield Refused(peer, Reason.UNASKED)

    def _tick(self, now_s: float) -> list[Effect]:
        if self.locked:
            return []
        effects = list(self._expire(now_s))
        if self.settings.periodic and now_s >= self._check_s:
            effects += self._check(full=False, peer=None)
            self._check_s = now_s + self._interval_s(now_s)
        return effects

    # ------------------------------------------------------------------ commands

    def _refuse_if_locked(self, what: str) -> None:
        if self.locked:
            raise CommandError(f"node {self.me} is locked and will not {what}: unlock it first")

    def _inject(self, entry: Entry, now_s: float) -> Iterator[Effect]:
        if not self.settings.faults:
            raise CommandError(f"node {self.me}: faults are injected into test builds only")
        yield self._put(entry, Cause.INJECTED, now_s)

    def _check(self, full: bool, peer: Nid | None) -> Iterator[Effect]:
        peers = self.list.neighbours(self.me, self.dead) if peer is None else (peer,)
        for each in peers:
            if full:
                yield from self._differs(each)
            else:
                yield Send(each, Prelim(self.list.digest))

    # ------------------------------------------------------------------ what a policy decides

    @abstractmethod
    def _introduce(self, entry: Entry, now_s: float) -> Iterator[Effect]:
        """A command to add or remove."""

    @abstractmethod
    def _news(self, peer: Nid, entry: Entry, now_s: float) -> Iterator[Effect]:
        """An addition or a removal has come down the tree."""

    def _mismatch(self, peer: Nid) -> Iterator[Effect]:
        """The peer's digest is another."""
        return self._differs(peer)

    @abstractmethod
    def _differs(self, peer: Nid) -> Iterator[Effect]:
        """Begin the full check with this peer."""

    @abstractmethod
    def _part(self, peer: Nid, part: Part, now_s: float) -> Iterator[Effect]:
        """A part of the peer's list."""

    @abstractmethod
    def _ack(self, peer: Nid, ack: Ack, now_s: float) -> Iterator[Effect]:
        """Somebody is alive."""

    @abstractmethod
    def _expire(self, now_s: float) -> Iterator[Effect]:
        """Time-outs of the policy's own."""

    # ------------------------------------------------------------------ what policies use

    def _put(self, entry: Entry, cause: Cause, now_s: float) -> Changed:
        return self._set(entry.nid, entry, cause, now_s)

    def _drop(self, nid: Nid, cause: Cause, now_s: float) -> Changed:
        return self._set(nid, None, cause, now_s)

    def _set(self, nid: Nid, entry: Entry | None, cause: Cause, now_s: float) -> Changed:
        before = self.list.get(nid)
        assert nid != self.me or entry is not None, f"node {nid} would forget itself"
        self.list = self.list.drop(nid) if entry is None else self.list.put(entry)
        self._recent.pop(nid, None)
        self._recent[nid] = None
        if len(self._recent) > RECENT_MAX:
            del self._recent[next(iter(self._recent))]
        self._changed_s = now_s
        self._check_s = min(self._check_s, now_s + self.settings.after_change_s)
        return Changed(nid, before, entry, cause)

    def _pace(self, now_s: float) -> None:
        """The next check comes sooner if the interval has become shorter."""
        self._check_s = min(self._check_s, now_s + self._interval_s(now_s))

    def _interval_s(self, now_s: float) -> float:
        return interval_s(max(0.0, now_s - self._changed_s), self.busy)

    def _forward(self, entry: Entry, but: Iterable[Nid] = ()) -> Iterator[Effect]:
        for nid in self.list.targets(self.me, entry.nid, self.dead):
            if nid not in but:
                yield Send(nid, Change(entry))

    def _by_recency(self) -> Iterator[Entry]:
        """All entries, the most recently changed first."""
        for nid in reversed(self._recent):
            entry = self.list.get(nid)
            if entry is not None:
                yield entry
        for entry in self.list.descending():
            if entry.nid not in self._recent:
                yield entry
