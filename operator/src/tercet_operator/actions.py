"""What a decision can ask for: the operator's whole reach, as data.

A decision is a list of these; the executor takes them in order and stops at the first that fails,
so a Notice stands after the write that it tells of. At most one of them writes to the object that
was decided upon: the rest follows when the world shows the write.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tercet_api.clients import Json
from tercet_api.objects import Config, Enrolment


class Severity(StrEnum):
    """`type` of an Event."""

    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(frozen=True, slots=True)
class Adopt:
    """Put the finalizer on the object; for a Volume without spec.uuid also draw one."""


@dataclass(frozen=True, slots=True)
class Release:
    """Take the finalizer off: the object may go."""


@dataclass(frozen=True, slots=True)
class Bury:
    """Keep a removed node's tombstone, from which agents learn that it is gone."""

    tombstone: Enrolment


@dataclass(frozen=True, slots=True)
class WriteStatus:
    """Merge these members into status.

    exact: only if the object still is at the version that was decided upon. Needed wherever a list
    that others write as well is replaced.
    """

    members: Json
    exact: bool = False


@dataclass(frozen=True, slots=True)
class SwapFirst:
    """Swap in a volume's first configuration (T9), with these further operations."""

    config: Config
    also: tuple[Json, ...]


@dataclass(frozen=True, slots=True)
class MakeCloneSnapshot:
    """Make the Snapshot that a clone starts from."""

    name: str
    volume: str


@dataclass(frozen=True, slots=True)
class DropCloneSnapshot:
    """Delete the Snapshot that a clone started from."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Notice:
    """An Event on the object."""

    reason: str
    message: str
    severity: Severity = Severity.NORMAL


@dataclass(frozen=True, slots=True)
class LookAgain:
    """Decide again after this time, whatever happens meanwhile."""

    after_s: float


Action = (
    Adopt
    | Release
    | Bury
    | WriteStatus
    | SwapFirst
    | MakeCloneSnapshot
    | DropCloneSnapshot
    | Notice
    | LookAgain
)
