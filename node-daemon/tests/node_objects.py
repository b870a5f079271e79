"""Objects for tests of the pure parts."""

from __future__ import annotations

import uuid

from tercet_api.names import FINALIZER
from tercet_api.objects import (
    Attachment,
    Config,
    ConfigState,
    Fence,
    Member,
    Metadata,
    Primary,
    Snapshot,
    SnapshotPhase,
    SnapshotSpec,
    SnapshotStatus,
    Source,
    Volume,
    VolumePhase,
    VolumeReplica,
    VolumeSpec,
    VolumeStatus,
)
from tercet_node.primary import Serving
from tercet_node.protos import engine_pb2 as pb

GIB = 1 << 30
VOLUME = "11111111-1111-4111-8111-111111111111"
INSTANCE = "22222222-2222-4222-8222-222222222222"
DELETED_AT = "2026-11-20T00:00:00Z"


def replica_id(node: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, node))


def config(*nodes: str, epoch: int = 1, primary: str = "a", **more) -> Config:
    return Config(
        epoch=epoch,
        state=ConfigState.ACTIVE,
        primary=Primary(node=primary, instance=INSTANCE),
        members=[Member(node=node, replica=replica_id(node)) for node in nodes or ("a", "b", "c")],
        **more,
    )


def entry(node: str, state: str, *, named: bool = True, **more) -> VolumeReplica:
    replica = replica_id(node) if named else None
    return VolumeReplica(node=node, replica=replica, state=state, **more)


def volume(
    *entries: VolumeReplica,
    version: int = 10,
    generation: int = 1,
    deleting: bool = False,
    uid: str = "u1",
    source: Source | None = None,
    hosts: tuple[str, ...] = (),
    size_bytes: int = GIB,
    **status,
) -> Volume:
    metadata = Metadata(
        name="v",
        uid=uid,
        resource_version=str(version),
        generation=generation,
        deletion_timestamp=DELETED_AT if deleting else None,
        finalizers=[FINALIZER],
    )
    if deleting:
        status.setdefault("phase", VolumePhase.DELETING)
    attachments = [Attachment(node_name="w", host_nqn=host) for host in hosts]
    spec = VolumeSpec(uuid=VOLUME, size_bytes=size_bytes, source=source, attachments=attachments)
    return Volume(
        metadata=metadata, spec=spec, status=VolumeStatus(replicas=list(entries), **status)
    )


def snapshot(*, deleting: bool = False, finalizer: bool = True, **status) -> Snapshot:
    metadata = Metadata(
        name="s",
        uid="s-uid",
        resource_version="5",
        generation=1,
        deletion_timestamp=DELETED_AT if deleting else None,
        finalizers=[FINALIZER] if finalizer else [],
    )
    if deleting:
        status.setdefault("phase", SnapshotPhase.DELETING)
    return Snapshot(
        metadata=metadata, spec=SnapshotSpec(volume="v"), status=SnapshotStatus(**status)
    )


def held(node: str = "a", **more) -> pb.ReplicaStatus:
    fields = {"volume": VOLUME, "name": "v", "replica": replica_id(node), "size_bytes": GIB}
    return pb.ReplicaStatus(**(fields | more))


def serving(epoch: int = 1, links: dict[str, bool] | None = None, **more) -> Serving:
    members = more.pop("members", ())
    status = held("a", epoch=epoch, serving=True, members=members, **more)
    return Serving("a", INSTANCE, status, links if links is not None else {"b": True, "c": True})


def member(
    node: str, *, in_sync: bool, lag_bytes: int = 0, incomplete: bool = False
) -> pb.MemberStatus:
    return pb.MemberStatus(
        node=node,
        replica=replica_id(node),
        in_sync=in_sync,
        lag_bytes=lag_bytes,
        incomplete=incomplete,
    )


def fence(epoch: int, generation: int) -> Fence:
    return Fence(epoch=epoch, generation=generation)
