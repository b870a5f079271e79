"""Worlds for tests of decisions: a few words make nodes, volumes and snapshots."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from tercet_api.coordination import Sighting
from tercet_api.names import FINALIZER
from tercet_api.objects import (
    Config,
    ConfigState,
    Member,
    Metadata,
    Primary,
    ReplicaPhase,
    Snapshot,
    SnapshotSpec,
    SnapshotStatus,
    StorageNode,
    StorageNodeSpec,
    StorageNodeStatus,
    Volume,
    VolumeReplica,
    VolumeSpec,
    VolumeStatus,
)
from tercet_operator.actions import Action, WriteStatus
from tercet_operator.world import Moment, World

GIB = 1024**3
WALL = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
NOW = Moment(1000.0, WALL)


def later(seconds: float) -> Moment:
    """NOW, and some."""
    return Moment(NOW.s + seconds, WALL + timedelta(seconds=seconds))


def some_id(text: str) -> str:
    """The same UUID for the same text."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, text))


def metadata(name: str, **more: Any) -> Metadata:
    """Of an object that is a minute old and has the finalizer."""
    fields: dict[str, Any] = {
        "uid": some_id(f"uid of {name}"),
        "resource_version": "7",
        "generation": 1,
        "creation_timestamp": (WALL - timedelta(seconds=60)).isoformat(),
        "finalizers": [FINALIZER],
    }
    return Metadata(name=name, **{**fields, **more})


def node(
    name: str, *, gib: int = 100, status: dict[str, Any] | None = None, **spec: Any
) -> StorageNode:
    """A StorageNode that has reported that it has no orphans."""
    instance = some_id(f"instance of {name}")
    said: dict[str, Any] = {
        "instance": instance,
        "orphans_instance": instance,
        "capacity_bytes": gib * GIB,
    }
    meta = spec.pop("metadata", {})
    number = int(name.removeprefix("n")) if name.startswith("n") else 99
    wanted = {"node_name": f"machine-{name}", "address": f"127.0.1.{number}", **spec}
    return StorageNode(
        metadata=metadata(name, **meta),
        spec=StorageNodeSpec(**wanted),
        status=StorageNodeStatus(**{**said, **(status or {})}),
    )


def volume(name: str = "v", *, status: dict[str, Any] | None = None, **spec: Any) -> Volume:
    """A Volume with a uuid, of one GiB."""
    meta = spec.pop("metadata", {})
    wanted = {"uuid": some_id(f"uuid of {name}"), "size_bytes": GIB, **spec}
    return Volume(
        metadata=metadata(name, **meta),
        spec=VolumeSpec(**wanted),
        status=VolumeStatus(**(status or {})),
    )


def new(name: str = "v", **spec: Any) -> Volume:
    """A Volume that its creator calls new."""
    return volume(name, status={"new_uid": some_id(f"uid of {name}")}, **spec)


def entry(on: str, state: ReplicaPhase = ReplicaPhase.CREATED, **more: Any) -> VolumeReplica:
    """An entry of status.replicas; made ones have an id."""
    made = state not in {ReplicaPhase.PLACED, ReplicaPhase.FAILED}
    replica = some_id(f"replica on {on}") if made else None
    return VolumeReplica(node=on, **{"replica": replica, "state": state, **more})


def config(*members: str, epoch: int = 1, state: ConfigState = ConfigState.ACTIVE) -> Config:
    """A configuration whose first member is primary."""
    return Config(
        epoch=epoch,
        state=state,
        primary=Primary(node=members[0], instance=some_id(f"instance of {members[0]}")),
        members=[Member(node=name, replica=some_id(f"replica on {name}")) for name in members],
    )


def serving(name: str, *members: str, **more: Any) -> Volume:
    """A Volume that is Active and in sync on these nodes."""
    status = {
        "config": config(*members),
        "replicas": [entry(member, ReplicaPhase.IN_SYNC) for member in members],
        "size_bytes": GIB,
        **more.pop("status", {}),
    }
    return volume(name, status=status, replicas=len(members), **more)


def snapshot(name: str, of: Volume, *, ready: bool = True, **more: Any) -> Snapshot:
    """A Snapshot of a Volume."""
    status = SnapshotStatus(
        ready_to_use=ready,
        volume_uuid=of.spec.uuid if ready else None,
        size_bytes=of.spec.size_bytes,
        **more.pop("status", {}),
    )
    return Snapshot(
        metadata=metadata(name, **more), spec=SnapshotSpec(volume=of.name), status=status
    )


def world(*things: StorageNode | Volume | Snapshot, dead: tuple[str, ...] = ()) -> World:
    """A world of these, where every node but the dead ones renews its Lease."""
    made = World()
    for thing in things:
        if isinstance(thing, StorageNode):
            made.nodes[thing.name] = thing
            expires_s = NOW.s - 1 if thing.name in dead else NOW.s + 1000
            made.sightings[thing.name] = Sighting("seen", expires_s)
        elif isinstance(thing, Volume):
            made.volumes[thing.name] = thing
        else:
            made.snapshots[thing.name] = thing
    return made


def nodes(count: int = 3) -> list[StorageNode]:
    """n1.. in zones of their own."""
    return [node(f"n{number}", topology={"zone": f"z{number}"}) for number in range(1, count + 1)]


def only(kind: type[Any], actions: list[Action]) -> Any:
    """The one action of this kind."""
    found = [action for action in actions if isinstance(action, kind)]
    assert len(found) == 1, f"{kind.__name__} in {actions}"
    return found[0]


def written(actions: list[Action]) -> dict[str, Any]:
    """What is written to status."""
    found: dict[str, Any] = only(WriteStatus, actions).members
    return found


def reason(actions: list[Action], kind: str) -> str:
    """The reason that is written for a condition."""
    said = {c["type"]: c["reason"] for c in written(actions)["conditions"]}
    return str(said[kind])
