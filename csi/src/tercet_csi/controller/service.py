"""CSI Controller service: checks each request at the edge, then calls `volumes` and `snapshots`.

Every deadline here lies below the sidecars' (--timeout=60s), so that the caller hears what is
awaited rather than that time is up.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import Int64Value

from tercet_api.names import TOPOLOGY_NODE, is_uuid
from tercet_api.objects import VOLUME_BYTES_MIN, Snapshot, Source, Volume
from tercet_csi.capabilities import check_all, read_access
from tercet_csi.controller.cluster import Cluster
from tercet_csi.controller.naming import object_name
from tercet_csi.controller.paging import page
from tercet_csi.controller.parameters import read_parameters, size_bytes
from tercet_csi.controller.snapshots import Snapshots
from tercet_csi.controller.volumes import Volumes, Wanted
from tercet_csi.errors import CsiError, InvalidArgument, NotFound, OutOfRange
from tercet_csi.locks import ObjectLocks
from tercet_csi.v1 import csi_pb2 as csi
from tercet_csi.v1 import csi_pb2_grpc

_RPC = csi.ControllerServiceCapability.RPC
CAPABILITIES = (
    _RPC.CREATE_DELETE_VOLUME,
    _RPC.PUBLISH_UNPUBLISH_VOLUME,
    _RPC.LIST_VOLUMES,
    _RPC.LIST_VOLUMES_PUBLISHED_NODES,
    _RPC.GET_CAPACITY,
    _RPC.CREATE_DELETE_SNAPSHOT,
    _RPC.LIST_SNAPSHOTS,
    _RPC.GET_SNAPSHOT,
    _RPC.CLONE_VOLUME,
    _RPC.EXPAND_VOLUME,
    _RPC.SINGLE_NODE_MULTI_WRITER,
    _RPC.PUBLISH_READONLY,
)


class ControllerService(csi_pb2_grpc.ControllerServicer):
    """The calls."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._volumes = Volumes(cluster)
        self._snapshots = Snapshots(cluster)
        self._locks = ObjectLocks()

    async def ControllerGetCapabilities(  # noqa: N802
        self, request: csi.ControllerGetCapabilitiesRequest, context: Any
    ) -> csi.ControllerGetCapabilitiesResponse:
        """What this controller can do."""
        return csi.ControllerGetCapabilitiesResponse(
            capabilities=[csi.ControllerServiceCapability(rpc=_RPC(type=k)) for k in CAPABILITIES]
        )

    async def CreateVolume(  # noqa: N802
        self, request: csi.CreateVolumeRequest, context: Any
    ) -> csi.CreateVolumeResponse:
        """Make a Volume and wait until it is Ready."""
        name = object_name(request.name)
        check_all(request.volume_capabilities)
        parameters = read_parameters(dict(request.parameters))
        if request.mutable_parameters:
            first = min(request.mutable_parameters)
            raise InvalidArgument(f"mutable parameter {first!r} is unknown; none is known")
        size = size_bytes(request.capacity_range)
        with self._locks.hold(f"volume {name}"):
            source, least = await self._source(request.volume_content_source)
            if size < least:
                if (
                    request.capacity_range.limit_bytes
                    and least > request.capacity_range.limit_bytes
                ):
                    raise OutOfRange(f"the source has {least} bytes, more than the limit")
                if request.capacity_range.required_bytes:
                    raise OutOfRange(f"the source has {least} bytes, {size} are asked for")
                size = least
            wanted = Wanted(
                name,
                size,
                request.capacity_range.limit_bytes,
                parameters,
                source,
                self._preferred_node(request.accessibility_requirements),
            )
            volume = await self._volumes.create(wanted)
        answer = _volume(volume)
        if source is not None:
            answer.content_source.CopyFrom(request.volume_content_source)
        return csi.CreateVolumeResponse(volume=answer)

    async def _source(self, source: csi.VolumeContentSource) -> tuple[Source | None, int]:
        """The object's source and its size in bytes. Raises NotFound."""
        kind = source.WhichOneof("type")
        if kind == "snapshot":
            snapshot = await self._snapshots.usable(source.snapshot.snapshot_id)
            return Source(snapshot=snapshot.name), snapshot.status.size_bytes
        if kind == "volume":
            volume = await self._cluster.find_volume(source.volume.volume_id)
            if volume.deleting:
                raise NotFound(f"volume {volume.name} is being deleted: choose another source")
            return Source(volume=volume.name), volume.spec.size_bytes
        return None, VOLUME_BYTES_MIN

    def _preferred_node(self, requirement: csi.TopologyRequirement) -> str | None:
        """The StorageNode on the node that the scheduler has chosen, if there is one."""
        for topology in requirement.preferred:
            node = topology.segments.get(TOPOLOGY_NODE)
            if node in self._cluster.nodes.known:
                return node
        return None

    async def DeleteVolume(  # noqa: N802
        self, request: csi.DeleteVolumeRequest, context: Any
    ) -> csi.DeleteVolumeResponse:
        """Delete a Volume and wait until its replicas are gone."""
        _need(request.volume_id, "volume_id")
        with self._locks.hold(f"volume {request.volume_id}"):
            await self._volumes.delete(request.volume_id)
        return csi.DeleteVolumeResponse()

    async def ControllerPublishVolume(  # noqa: N802
        self, request: csi.ControllerPublishVolumeRequest, context: Any
    ) -> csi.ControllerPublishVolumeResponse:
        """Let a node's host connect."""
        _need(request.volume_id, "volume_id")
        _need(request.node_id, "node_id")
        if not request.HasField("volume_capability"):
            raise InvalidArgument("volume_capability is missing")
        access = read_access(request.volume_capability)
        _known(request.volume_id)
        with self._locks.hold(f"volume {request.volume_id}"):
            publish_context = await self._volumes.publish(
                request.volume_id, request.node_id, read_only=request.readonly or access.read_only
            )
        return csi.ControllerPublishVolumeResponse(publish_context=publish_context)

    async def ControllerUnpublishVolume(  # noqa: N802
        self, request: csi.ControllerUnpublishVolumeRequest, context: Any
    ) -> csi.ControllerUnpublishVolumeResponse:
        """Shut a node's host out, confirmed."""
        _need(request.volume_id, "volume_id")
        with self._locks.hold(f"volume {request.volume_id}"):
            await self._volumes.unpublish(request.volume_id, request.node_id)
        return csi.ControllerUnpublishVolumeResponse()

    async def ValidateVolumeCapabilities(  # noqa: N802
        self, request: csi.ValidateVolumeCapabilitiesRequest, context: Any
    ) -> csi.ValidateVolumeCapabilitiesResponse:
        """Confirm what can be given."""
        _need(request.volume_id, "volume_id")
        if not request.volume_capabilities:
            raise InvalidArgument("volume_capabilities is missing")
        _known(request.volume_id)
        await self._cluster.find_volume(request.volume_id)
        answer = csi.ValidateVolumeCapabilitiesResponse
        try:
            check_all(request.volume_capabilities)
            read_parameters(dict(request.parameters))
        except CsiError as error:
            return answer(message=str(error))
        return answer(
            confirmed=answer.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
        )

    async def ListVolumes(  # noqa: N802
        self, request: csi.ListVolumesRequest, context: Any
    ) -> csi.ListVolumesResponse:
        """All volumes, page by page."""
        listed = [v for v in await self._cluster.volumes.objects.list() if v.spec.uuid]
        chosen, token = page(
            listed, lambda v: v.spec.uuid or "", request.starting_token, request.max_entries
        )
        entry = csi.ListVolumesResponse.Entry
        status = csi.ListVolumesResponse.VolumeStatus
        return csi.ListVolumesResponse(
            entries=[
                entry(
                    volume=_volume(volume),
                    status=status(
                        published_node_ids=[a.node_name for a in volume.spec.attachments]
                    ),
                )
                for volume in chosen
            ],
            next_token=token,
        )

    async def GetCapacity(  # noqa: N802
        self, request: csi.GetCapacityRequest, context: Any
    ) -> csi.GetCapacityResponse:
        """The largest volume that could be placed now."""
        if request.volume_capabilities:
            check_all(request.volume_capabilities)
        parameters = read_parameters(dict(request.parameters))
        segments = {
            key: value
            for key, value in request.accessible_topology.segments.items()
            if key != TOPOLOGY_NODE  # every volume is reachable from every node
        }
        free = await self._volumes.capacity_bytes(parameters.replicas, segments)
        return csi.GetCapacityResponse(
            available_capacity=free,
            maximum_volume_size=Int64Value(value=free),
            minimum_volume_size=Int64Value(value=VOLUME_BYTES_MIN),
        )

    async def CreateSnapshot(  # noqa: N802
        self, request: csi.CreateSnapshotRequest, context: Any
    ) -> csi.CreateSnapshotResponse:
        """Cut a snapshot and wait until it is ready."""
        _need(request.source_volume_id, "source_volume_id")
        name = object_name(request.name)
        own = [k for k in request.parameters if not k.startswith("csi.storage.k8s.io/")]
        if own:
            raise InvalidArgument(
                f"VolumeSnapshotClass parameter {own[0]!r} is unknown; none is known"
            )
        _known(request.source_volume_id)
        with self._locks.hold(f"snapshot {name}"):
            snapshot, volume_id = await self._snapshots.create(name, request.source_volume_id)
        return csi.CreateSnapshotResponse(snapshot=_snapshot(snapshot, volume_id))

    async def DeleteSnapshot(  # noqa: N802
        self, request: csi.DeleteSnapshotRequest, context: Any
    ) -> csi.DeleteSnapshotResponse:
        """Delete a snapshot and wait until the volume has dropped it."""
        _need(request.snapshot_id, "snapshot_id")
        with self._locks.hold(f"snapshot {request.snapshot_id}"):
            await self._snapshots.delete(request.snapshot_id)
        return csi.DeleteSnapshotResponse()

    async def ListSnapshots(  # noqa: N802
        self, request: csi.ListSnapshotsRequest, context: Any
    ) -> csi.ListSnapshotsResponse:
        """Snapshots page by page, of one id or one volume if asked."""
        found = [
            _snapshot(snapshot, volume_id)
            for snapshot, volume_id in await self._snapshots.all()
            if request.snapshot_id in ("", snapshot.name)
            and request.source_volume_id in ("", volume_id)
        ]
        chosen, token = page(
            found, lambda s: s.snapshot_id, request.starting_token, request.max_entries
        )
        entry = csi.ListSnapshotsResponse.Entry
        return csi.ListSnapshotsResponse(
            entries=[entry(snapshot=snapshot) for snapshot in chosen], next_token=token
        )

    async def GetSnapshot(  # noqa: N802
        self, request: csi.GetSnapshotRequest, context: Any
    ) -> csi.GetSnapshotResponse:
        """One snapshot."""
        _need(request.snapshot_id, "snapshot_id")
        snapshot, volume_id = await self._snapshots.get(request.snapshot_id)
        return csi.GetSnapshotResponse(snapshot=_snapshot(snapshot, volume_id))

    async def ControllerExpandVolume(  # noqa: N802
        self, request: csi.ControllerExpandVolumeRequest, context: Any
    ) -> csi.ControllerExpandVolumeResponse:
        """Grow a volume while it is in use."""
        _need(request.volume_id, "volume_id")
        if not request.HasField("capacity_range"):
            raise InvalidArgument("capacity_range is missing")
        if request.HasField("volume_capability"):
            read_access(request.volume_capability)
        _known(request.volume_id)
        size = size_bytes(request.capacity_range)
        with self._locks.hold(f"volume {request.volume_id}"):
            volume = await self._volumes.expand(
                request.volume_id, size, request.capacity_range.limit_bytes
            )
        block = request.volume_capability.WhichOneof("access_type") == "block"
        return csi.ControllerExpandVolumeResponse(
            capacity_bytes=volume.status.size_bytes, node_expansion_required=not block
        )


def _need(value: str, field: str) -> None:
    if not value:
        raise InvalidArgument(f"{field} is missing")


def _known(volume_id: str) -> None:
    if not is_uuid(volume_id):
        raise NotFound(f"volume_id {volume_id!r} is no id of a Tercet volume (a UUID)")


def _volume(volume: Volume) -> csi.Volume:
    size = volume.status.size_bytes or volume.spec.size_bytes
    return csi.Volume(volume_id=volume.spec.uuid or "", capacity_bytes=size)


def _snapshot(snapshot: Snapshot, volume_id: str) -> csi.Snapshot:
    created = Timestamp()
    if snapshot.status.creation_time is not None:
        created.FromDatetime(datetime.fromisoformat(snapshot.status.creation_time))
    return csi.Snapshot(
        snapshot_id=snapshot.name,
        source_volume_id=volume_id,
        size_bytes=snapshot.status.size_bytes,
        creation_time=created,
        ready_to_use=snapshot.status.ready_to_use,
    )
