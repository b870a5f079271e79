"""Which of the many sights of a Volume object the engine is shown, and in which order.

The agent sees an object in three ways: by watch, by consistent read, in a swap's answer. They
overtake each other. An engine that were shown an older attachment list after a newer one would let
a host in again that had been refused (H5, T7), so each sight is judged against the newest shown.

Within one object (uid), resourceVersion orders. After a restore of the API server it starts lower:
then the list that follows looks old, and a consistent read, which is always right, settles it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from tercet_api.objects import Config, Member, Volume
from tercet_node import convert
from tercet_node.protos import engine_pb2 as pb


class Origin(Enum):
    """How an object was seen."""

    WATCH = auto()
    """An event of a watch: may be older than what a read has shown."""
    LIST = auto()
    """The list before a watch: consistent when it was made, but may have been overtaken."""
    READ = auto()
    """A consistent read or a write's answer, asked for after all that was shown before."""


class Verdict(Enum):
    """What to do with a sight."""

    SHOW = auto()
    SKIP = auto()
    READ = auto()
    """It contradicts what was shown: read the object consistently."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The newest sight of an object that the engine has been shown."""

    volume: Volume
    view: pb.VolumeView


def version(volume: Volume) -> int:
    """The resourceVersion as a number; the API server's are comparable."""
    text = volume.metadata.resource_version
    return int(text) if text.isdecimal() else 0


def judge(shown: Shown | None, volume: Volume, origin: Origin) -> Verdict:
    """Whether a sight may be shown to the engine."""
    if shown is None or origin is Origin.READ:
        return Verdict.SHOW
    if shown.volume.uid != volume.uid:
        return Verdict.READ
    known, new = version(shown.volume), version(volume)
    if new > known:
        return Verdict.SHOW
    if new < known and origin is Origin.LIST:
        return Verdict.READ
    return Verdict.SKIP


def needs_telling(shown: Shown | None, view: pb.VolumeView) -> bool:
    """Whether the engine does not know this yet. A consistent view is always news (T7)."""
    if shown is None or view.consistent:
        return True
    known = pb.VolumeView()
    known.CopyFrom(shown.view)
    known.consistent = False
    return known != view


def answered_view(shown: Shown | None, answer: Volume) -> pb.VolumeView:
    """The view that goes with a swap's answer: never an older spec than one that was shown.

    Between the API server's answer and now a later object may have been shown to the engine; its
    spec is the newer truth (generation grows with each change of spec), the answer's config is
    what the engine asked about.
    """
    newest = latest = answer
    if shown is not None and shown.volume.uid == answer.uid:
        if shown.volume.metadata.generation > answer.metadata.generation:
            newest = shown.volume
        if version(shown.volume) > version(answer):
            latest = shown.volume
    return convert.view(
        answer.status.config,
        newest.spec.attachments,
        newest.spec.size_bytes,
        answer.status.fence,
        generation=newest.metadata.generation,
        consistent=True,
        replacement=convert.replacement(latest),
    )


def config_members(config: Config | None) -> Iterable[Member]:
    """Everyone whom a configuration names."""
    if config is None:
        return ()
    return (*config.members, *(config.previous_members or ()), *(config.learners or ()))


def concerns(volume: Volume, node: str, *, held: bool) -> bool:
    """Whether this node's engine is to know of the volume."""
    if held:
        return True
    if any(entry.node == node for entry in volume.status.replicas):
        return True
    return any(member.node == node for member in config_members(volume.status.config))
