"""What happens to a machine (`Event`) and what it wants done about it (`Effect`).

The executor of effects (the agent, a simulation, a test) owns sockets, clock and logs. It delivers
`Tick` when `Machine.wake_s` has come. Messages may be lost, doubled and late; the machine asks for
no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tercet_node.membership.entries import Entry, Nid
from tercet_node.membership.messages import Message

# ------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class Received:
    """A message of a peer, who is who its certificate says."""

    peer: Nid
    message: Message


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Introduce:
    """A node is to be added, or removed (its entry is a tombstone): tell the others."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class AddNoProp:
    """Fault injection: take this entry and tell nobody. Test builds only."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class CheckNow:
    """Compare with both neighbours, or with one peer, now."""

    full: bool = False
    """Send the list itself, without the preliminary check."""
    peer: Nid | None = None


@dataclass(frozen=True, slots=True)
class Lock:
    """A person works: no checks, no changes."""


@dataclass(frozen=True, slots=True)
class Unlock:
    """The person is done."""


@dataclass(frozen=True, slots=True)
class Busy:
    """How busy the node is, within 0..1: its own checks move away from it."""

    share: float


@dataclass(frozen=True, slots=True)
class Dead:
    """These are held dead (bits by nid): news and checks go round them."""

    nids: int


Event = Received | Tick | Introduce | AddNoProp | CheckNow | Lock | Unlock | Busy | Dead

# ------------------------------------------------------------------ effects


class Cause(StrEnum):
    """Why an entry of the own list changed."""

    TOLD = "told"
    """By command, or down the tree."""
    REPAIRED = "repaired"
    """By a check: the list had been wrong, or so a neighbour's list says."""
    INJECTED = "injected"


class Reason(StrEnum):
    """Why a message was not taken."""

    LOCKED = "locked"
    BAD_SIGNATURE = "bad-signature"
    GARBLED = "garbled"
    """A list that is not what its digest says."""
    TOO_LONG = "too-long"
    """A list of more entries than a list may have."""
    UNASKED = "unasked"
    """An answer to a question that was not put, or not any more."""


@dataclass(frozen=True, slots=True)
class Send:
    """Deliver this to that node."""

    to: Nid
    message: Message
    at: Entry | None = None
    """Where it is, if it is not in the list (yet)."""


@dataclass(frozen=True, slots=True)
class Changed:
    """The own list has another entry for this nid."""

    nid: Nid
    before: Entry | None
    after: Entry | None
    cause: Cause


@dataclass(frozen=True, slots=True)
class Refused:
    """A peer's message was not taken: count it, report it."""

    peer: Nid
    reason: Reason
    about: Nid | None = None


Effect = Send | Changed | Refused


@dataclass(frozen=True, slots=True)
class Suspected:
    """The detector: a node did not answer in time (cleared: now it has)."""

    nid: Nid
    tries: int
    """Probes it has not answered."""
    cleared: bool = False


@dataclass(frozen=True, slots=True)
class Judged:
    """The detector: a node is dead, or alive after all; all are told."""

    nid: Nid
    alive: bool
