"""What the agent of a serving primary writes into its Volume: sizes, replicas' states, the fence.

Pure: observed object and engine status in, JSON Patches and calls out. Every patch `test`s the
configuration under which it was decided, so that an agent whose engine has been succeeded cannot
overwrite its successor's words.

The fence (H5), step by step:

1. ControllerUnpublish takes the attachment out of spec (generation G) and waits for
   `status.fence` to be {epoch of status.config, generation >= G} in one and the same object.
2. The primary's agent reads the object consistently and shows it to the engine, with G.
3. The engine ends the refused host's associations, refuses a new Connect of it, commits whatever it
   had appended, and sends the event Fenced {epoch, generation}; again until it sees the fence.
4. The agent writes `status.fence` with a `test` on the config's epoch and primary.

A later epoch needs no new fence for what was refused: its primary reads the attachments after the
swap that made it one (T7), and everything before its first entry is committed (T6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tercet_api.clients import Json, expect, put
from tercet_api.objects import (
    SECONDS_LEFT_MAX,
    Config,
    Fence,
    ReplicaPhase,
    Volume,
    VolumeReplica,
)
from tercet_node.protos import engine_pb2 as pb
from tercet_node.rates import Rate
from tercet_node.replicas import LEARNS, NOT_REBUILDING
from tercet_node.views import config_members

QUIET_S = 5.0
"""Least time between two writes for figures alone (bytes, lag)."""
URGENT_S = 0.5
"""Least time between two writes when a state changed, so that a flapping link cannot storm."""


@dataclass(frozen=True, slots=True)
class Serving:
    """The engine of this node as the serving primary of a volume."""

    node: str
    instance: str
    replica: pb.ReplicaStatus
    links: Mapping[str, bool]
    """Whether the replication link to a node is up."""
    rates: Mapping[str, Rate] = field(default_factory=dict)
    """How fast replicas are copied to, by their ids."""


@dataclass(frozen=True, slots=True)
class Patch:
    """A JSON Patch of the Volume's status; urgent: a state, not only a figure."""

    operations: list[Json]
    urgent: bool


def leads(volume: Volume, serving: Serving) -> bool:
    """Whether the object's configuration is the one that this engine serves."""
    config = volume.status.config
    return (
        config is not None
        and serving.replica.serving
        and serving.replica.epoch == config.epoch
        and config.primary.node == serving.node
        and config.primary.instance == serving.instance
    )


def status_patch(volume: Volume, serving: Serving) -> Patch | None:
    """What status lacks, or None when it is as the engine says."""
    config = volume.status.config
    assert config is not None, f"volume {volume.name} is led without a config"
    operations: list[Json] = []
    urgent = False
    for path, was, now in (
        ("sizeBytes", volume.status.size_bytes, serving.replica.size_bytes),
        ("allocatedBytes", volume.status.allocated_bytes, serving.replica.allocated_bytes),
    ):
        if was != now:
            operations.append(put(f"/status/{path}", now))
            urgent = urgent or path == "sizeBytes"
    for index, entry in enumerate(volume.status.replicas):
        shown = _entry(config, entry, serving)
        if shown == entry:
            continue
        urgent = urgent or shown.state is not entry.state
        path = f"/status/replicas/{index}"
        operations += [
            expect(f"{path}/node", entry.node),
            expect(f"{path}/replica", entry.replica),
            {"op": "replace", "path": path, "value": shown.to_json()},
        ]
    if not operations:
        return None
    return Patch([*_same_epoch(volume, config), *operations], urgent)


def _entry(config: Config, entry: VolumeReplica, serving: Serving) -> VolumeReplica:
    """An entry of status.replicas as the primary sees that replica."""
    named = {member.replica for member in config_members(config)}
    if entry.replica is None or entry.replica not in named:
        return entry
    shown: dict[str, Any] = {"lag_bytes": 0, "message": "", **NOT_REBUILDING}
    if entry.replica == serving.replica.replica:
        return entry.model_copy(update={**shown, "state": ReplicaPhase.IN_SYNC})
    found = next((m for m in serving.replica.members if m.replica == entry.replica), None)
    linked = serving.links.get(entry.node, False)
    if found is not None and found.in_sync and not found.learner:
        return entry.model_copy(update={**shown, "state": ReplicaPhase.IN_SYNC})
    shown["lag_bytes"] = found.lag_bytes if found is not None else entry.lag_bytes
    shown["state"] = ReplicaPhase.LAGGING if linked else ReplicaPhase.UNREACHABLE
    if linked and found is not None and (found.incomplete or found.learner):
        shown |= {"state": ReplicaPhase.REBUILDING, **_rebuilding(found, serving)}
    return entry.model_copy(update=shown)


def _rebuilding(member: pb.MemberStatus, serving: Serving) -> dict[str, Any]:
    """How far a copy is (C3). Who is complete lacks the log's end at most."""
    if not member.HasField("copy"):
        if not member.incomplete:
            return {"rebuild_percent": 100}
        return {"message": LEARNS if member.learner else ""}
    copy, rate = member.copy, serving.rates.get(member.replica)
    percent = copy.done_bytes * 100 // copy.total_bytes if copy.total_bytes else 0
    speed = rate.sent_per_s if rate is not None else None
    left_s = rate.seconds_left(copy.total_bytes) if rate is not None else None
    return {
        "rebuild_percent": min(99, percent),
        "rebuild_bytes_per_second": None if speed is None else round(speed),
        "rebuild_seconds_left": None if left_s is None else min(left_s, SECONDS_LEFT_MAX),
    }


def _same_epoch(volume: Volume, config: Config) -> list[Json]:
    return [
        expect("/metadata/uid", volume.uid),
        expect("/status/config/epoch", config.epoch),
        expect("/status/config/primary", config.primary.to_json()),
    ]


def grow_to(volume: Volume, serving: Serving) -> int | None:
    """The size in bytes that the volume shall grow to, or None."""
    if volume.deleting or volume.spec.size_bytes <= serving.replica.size_bytes:
        return None
    return volume.spec.size_bytes


def fence_due(volume: Volume) -> bool:
    """Whether the current generation is not confirmed in the current epoch."""
    config, fence = volume.status.config, volume.status.fence
    if config is None:
        return False
    return (
        fence is None
        or fence.epoch != config.epoch
        or fence.generation < volume.metadata.generation
    )


def fence_patch(volume: Volume, confirmed: Fence) -> list[Json] | None:
    """Writes what the engine has confirmed, or None when that is said, or of another epoch."""
    config, said = volume.status.config, volume.status.fence
    if config is None or confirmed.epoch != config.epoch:
        return None
    if said is not None and (said.epoch, said.generation) >= (
        confirmed.epoch,
        confirmed.generation,
    ):
        return None
    return [*_same_epoch(volume, config), put("/status/fence", confirmed.to_json())]


def fence_asked(volume: Volume, confirmed: Fence) -> bool:
    """Whether the engine has not yet confirmed this generation in this epoch."""
    config = volume.status.config
    return (
        config is None
        or confirmed.epoch != config.epoch
        or confirmed.generation < volume.metadata.generation
    )


def shown_for_fence(volume: Volume, view: pb.VolumeView | None) -> bool:
    """Whether the engine has been shown this generation in this epoch, consistently."""
    config = volume.status.config
    return (
        view is not None
        and config is not None
        and view.consistent
        and view.config.epoch == config.epoch
        and view.generation >= volume.metadata.generation
    )
