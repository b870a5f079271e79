"""What this node owes a Volume object about its replica here: make, report, delete (pure).

The life of a replica, as architecture.md has it: the operator places (state Placed), the agent has
the engine make it and reports the id (Created, or Rebuilding while a clone's snapshot is not
applied here yet, S3), or says why it cannot (Failed). One that takes another's place is made though
there is a configuration: as a learner, Rebuilding until it is a member (M1).

What no set of an Active configuration names is deleted (M2): its promise must not be newer than
that configuration, which was read consistently, and nobody may expect it to become a member.

Deletion of all of a volume needs the object's own deletionTimestamp and the operator's word that
nothing depends on the volume any more (phase Deleting); it goes by replica ids that the object
names, never by UUID or name.

`decide` returns one step; the executor reads the object consistently, takes it, writes the result
with a `test` of what it decided upon, and looks again. Between any two of these the agent may die:
making and deleting are idempotent in the engine, so the same step is simply taken again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tercet_api.clients import Json, expect, put
from tercet_api.names import clone_snapshot, is_uuid
from tercet_api.objects import ConfigState, ReplicaPhase, Snapshot, Volume, VolumeReplica
from tercet_node.protos import engine_pb2 as pb
from tercet_node.views import config_members

MESSAGE_CHARS_MAX = 1024
AWAITS = "its snapshot is not applied on this node yet"
LEARNS = "waits for the primary to copy to it"
LOST = "its replica is not on its node any more"


NOT_REBUILDING = {
    "rebuild_percent": None,
    "rebuild_bytes_per_second": None,
    "rebuild_seconds_left": None,
}


@dataclass(frozen=True, slots=True)
class Create:
    """Make the replica of status.replicas[index], then report its id."""

    index: int
    request: pb.CreateReplicaRequest


@dataclass(frozen=True, slots=True)
class Report:
    """Write this into status.replicas[index] (None: append)."""

    index: int | None
    entry: VolumeReplica


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the replica with this id, then report `entry`, if any, at index (None: append)."""

    replica: str
    index: int | None
    entry: VolumeReplica | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be done before something else changes."""

    reason: str


Step = Create | Report | Delete | Wait


def decide(
    volume: Volume, node: str, held: pb.ReplicaStatus | None, snapshots: Mapping[str, Snapshot]
) -> Step | None:
    """The next step for a volume here, or None. `held`: the engine's replica of (uuid, name)."""
    if volume.spec.uuid is None:
        return None
    if volume.deletion_allowed:
        return _deletion(volume, node, held)
    if volume.deleting:
        return Wait("its deletion is asked for, and the operator has not allowed it yet")
    return _stray(volume, node, held) or _making(volume, node, held, snapshots)


def is_stray(volume: Volume, replica: str) -> bool:
    """Whether an Active configuration names it nowhere (M2)."""
    config = volume.status.config
    named = {member.replica for member in config_members(config)}
    return config is not None and config.state is ConfigState.ACTIVE and replica not in named


def _making(
    volume: Volume, node: str, held: pb.ReplicaStatus | None, snapshots: Mapping[str, Snapshot]
) -> Step | None:
    for index, entry in enumerate(volume.status.replicas):
        if entry.node != node:
            continue
        if _is_filled(volume, entry, held):
            return Report(index, created(entry, entry.replica or ""))
        if _is_lost(entry, held):
            return failure(volume, index, LOST)
        if entry.state is not ReplicaPhase.PLACED or entry.replica:
            continue
        if entry.replaces is not None:
            return Create(index, _learner(volume))
        # T9: replicas are made at creation only. A volume that has a config has its replicas; one
        # of them that is missing here comes back as a learner (M1) and never as an empty member.
        if volume.status.config is not None:
            return Wait("status.config is there already: a new replica would be a learner (M1)")
        return _creation(volume, index, snapshots)
    return None


def _learner(volume: Volume) -> pb.CreateReplicaRequest:
    """A clone's learner is no clone: what it shares comes with the copy."""
    assert volume.spec.uuid is not None
    size_bytes = volume.status.size_bytes or volume.spec.size_bytes
    return pb.CreateReplicaRequest(
        volume=volume.spec.uuid, name=volume.name, size_bytes=size_bytes, learner=True
    )


def _is_lost(entry: VolumeReplica, held: pb.ReplicaStatus | None) -> bool:
    """A newcomer that was reported is not here: its disk is another one, nobody can copy to it."""
    waits = {ReplicaPhase.FORMER, ReplicaPhase.FAILED, ReplicaPhase.DELETED}
    here = held is not None and held.replica == entry.replica
    return bool(entry.replaces and entry.replica) and entry.state not in waits and not here


def _stray(volume: Volume, node: str, held: pb.ReplicaStatus | None) -> Delete | Report | None:
    """M2: what no set of an Active configuration names, and nobody wants to become a member."""
    config = volume.status.config
    if config is None or config.state is not ConfigState.ACTIVE:
        return None
    mine = [(i, e) for i, e in enumerate(volume.status.replicas) if e.node == node]
    former = next(((i, e) for i, e in mine if e.state is ReplicaPhase.FORMER), None)
    if held is None or not is_stray(volume, held.replica):
        # Deleted and not reported (crash window), or its disk is another one.
        gone = former is not None and is_stray(volume, former[1].replica or "")
        return Report(former[0], _as_deleted(former[1])) if former is not None and gone else None
    wanted = any(
        e.state is ReplicaPhase.PLACED or e.replica == held.replica
        for _, e in mine
        if e.state is not ReplicaPhase.FORMER
    )
    # An object older than the promise has been restored (M3): it says nothing of this replica.
    if wanted or held.epoch > config.epoch:
        return None
    if former is not None and former[1].replica == held.replica:
        return Delete(held.replica, former[0], _as_deleted(former[1]))
    return Delete(held.replica, None, None)


def _is_filled(volume: Volume, entry: VolumeReplica, held: pb.ReplicaStatus | None) -> bool:
    """S3: a clone's replica has its snapshot now. With a config the primary's agent says so."""
    return (
        entry.state is ReplicaPhase.REBUILDING
        and volume.status.config is None
        and held is not None
        and held.replica == entry.replica
        and not held.incomplete
    )


def origin(volume: Volume) -> str | None:
    """Name of the Snapshot that a volume starts from; None: from nothing."""
    source = volume.spec.source
    if source is None:
        return None
    return source.snapshot or clone_snapshot(volume.uid)


def _creation(volume: Volume, index: int, snapshots: Mapping[str, Snapshot]) -> Step:
    assert volume.spec.uuid is not None
    request = pb.CreateReplicaRequest(
        volume=volume.spec.uuid, name=volume.name, size_bytes=volume.spec.size_bytes
    )
    name = origin(volume)
    if name is None:
        return Create(index, request)
    snapshot = snapshots.get(name)
    if snapshot is None or snapshot.deleting:
        return failure(volume, index, f"spec.source: there is no Snapshot {name}")
    status = snapshot.status
    if not status.ready_to_use or None in {status.volume_uuid, status.epoch, status.lsn}:
        return Wait(f"Snapshot {name} is not ready yet")
    # The place tells the engine whether the snapshot is still to come there (S3).
    clone = pb.CloneSource(
        volume=status.volume_uuid, snapshot=snapshot.uid, epoch=status.epoch, lsn=status.lsn
    )
    request.source.CopyFrom(clone)
    return Create(index, request)


def _deletion(volume: Volume, node: str, held: pb.ReplicaStatus | None) -> Step | None:
    named: set[str] = set()
    for index, entry in enumerate(volume.status.replicas):
        if entry.node != node:
            continue
        if entry.replica:
            named.add(entry.replica)
        if entry.state is ReplicaPhase.DELETED:
            continue
        if entry.replica:
            return Delete(entry.replica, index, _as_deleted(entry))
        # Crash window: the replica may have been made and not reported. Name it first, so that
        # its deletion goes by an id that the object names.
        if held is not None and entry.state is ReplicaPhase.PLACED:
            return Report(index, created(entry, held.replica, incomplete=held.incomplete))
        return Report(index, _as_deleted(entry))
    for member in config_members(volume.status.config):
        if member.node == node and member.replica not in named:
            entry = VolumeReplica(
                node=node, replica=member.replica, state=ReplicaPhase.DELETED, message=""
            )
            return Delete(member.replica, None, entry)
    return None


def created(entry: VolumeReplica, replica: str, *, incomplete: bool = False) -> VolumeReplica:
    """The entry of a replica that was made; incomplete: it is no copy yet (S3)."""
    assert is_uuid(replica), f"the engine named its replica {replica!r}"
    state = ReplicaPhase.REBUILDING if incomplete else ReplicaPhase.CREATED
    why = AWAITS if entry.replaces is None else LEARNS
    message = why if incomplete else ""
    return entry.model_copy(update={"replica": replica, "state": state, "message": message})


def failure(volume: Volume, index: int, message: str) -> Report:
    """The entry of a replica that cannot be made."""
    entry = volume.status.replicas[index]
    update = {"state": ReplicaPhase.FAILED, "message": message[:MESSAGE_CHARS_MAX]}
    return Report(index, entry.model_copy(update=update))


def _as_deleted(entry: VolumeReplica) -> VolumeReplica:
    update = {"state": ReplicaPhase.DELETED, "lag_bytes": 0, "message": "", **NOT_REBUILDING}
    return entry.model_copy(update=update)


def patch(volume: Volume, index: int | None, entry: VolumeReplica) -> list[Json]:
    """The JSON Patch that writes an entry if the object still is what was decided upon."""
    operations = [expect("/metadata/uid", volume.uid)]
    if index is None:
        return [*operations, put("/status/replicas/-", entry.to_json())]
    path = f"/status/replicas/{index}"
    before = volume.status.replicas[index]
    return [
        *operations,
        expect(f"{path}/node", before.node),
        expect(f"{path}/state", before.state.value),
        expect(f"{path}/replica", before.replica),
        {"op": "replace", "path": path, "value": entry.to_json()},
    ]
