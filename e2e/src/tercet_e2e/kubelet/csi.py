"""The CSI calls that a kubelet makes to a driver's node service, over its Unix socket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from tercet_csi.v1 import csi_pb2, csi_pb2_grpc
from tercet_e2e.errors import E2eError
from tercet_e2e.kubelet.records import VolumeSpec

CALL_TIMEOUT_S = 120.0  # the kubelet's own limit for CSI operations is two minutes
PROBE_TIMEOUT_S = 5.0
RECONNECT_MAX_MS = 500  # a driver that is killed in a test comes back at once


class CsiError(E2eError):
    """A driver refused a call, or is not there."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What a driver says of this node."""

    driver: str
    node_id: str
    volumes_max: int
    topology: Mapping[str, str]


class CsiNode:
    """A connection to one driver. An async context manager."""

    def __init__(self, endpoint: Path) -> None:
        self._endpoint = endpoint
        self._multi_writer = False
        self._expands = False

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(
            f"unix:{self._endpoint}",
            options=[
                ("grpc.enable_http_proxy", 0),
                ("grpc.initial_reconnect_backoff_ms", RECONNECT_MAX_MS // 5),
                ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
            ],
        )
        self._identity = csi_pb2_grpc.IdentityStub(self._channel)
        self._node = csi_pb2_grpc.NodeStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def _call(self, stub: Any, name: str, request: Any, timeout_s: float) -> Any:
        try:
            return await getattr(stub, name)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise CsiError(f"{name}: {error.code().name}: {error.details()}") from error

    async def info(self) -> NodeInfo:
        """Who the driver is and where this node is; learns what the driver can."""
        request = csi_pb2.GetPluginInfoRequest()
        plugin = await self._call(self._identity, "GetPluginInfo", request, PROBE_TIMEOUT_S)
        asked = csi_pb2.NodeGetCapabilitiesRequest()
        answer = await self._call(self._node, "NodeGetCapabilities", asked, PROBE_TIMEOUT_S)
        kinds = csi_pb2.NodeServiceCapability.RPC
        offered = {capability.rpc.type for capability in answer.capabilities}
        self._multi_writer = kinds.SINGLE_NODE_MULTI_WRITER in offered
        self._expands = kinds.EXPAND_VOLUME in offered
        if kinds.STAGE_UNSTAGE_VOLUME not in offered:
            raise CsiError(f"driver {plugin.name} does not stage volumes: not served here")
        node = await self._call(
            self._node, "NodeGetInfo", csi_pb2.NodeGetInfoRequest(), PROBE_TIMEOUT_S
        )
        return NodeInfo(
            driver=plugin.name,
            node_id=node.node_id,
            volumes_max=node.max_volumes_per_node,
            topology=dict(node.accessible_topology.segments),
        )

    def _capability(self, volume: VolumeSpec) -> Any:
        modes = csi_pb2.VolumeCapability.AccessMode
        names = {
            "ReadWriteOnce": modes.SINGLE_NODE_WRITER,
            "ReadWriteOncePod": modes.SINGLE_NODE_WRITER,
            "ReadOnlyMany": modes.MULTI_NODE_READER_ONLY,
            "ReadWriteMany": modes.MULTI_NODE_MULTI_WRITER,
        }
        if self._multi_writer:
            names["ReadWriteOnce"] = modes.SINGLE_NODE_MULTI_WRITER
            names["ReadWriteOncePod"] = modes.SINGLE_NODE_SINGLE_WRITER
        mode = modes(mode=names[volume.access_mode])
        if volume.block:
            block = csi_pb2.VolumeCapability.BlockVolume()
            return csi_pb2.VolumeCapability(access_mode=mode, block=block)
        mount = csi_pb2.VolumeCapability.MountVolume(
            fs_type=volume.fs_type, mount_flags=list(volume.mount_options)
        )
        return csi_pb2.VolumeCapability(access_mode=mode, mount=mount)

    async def stage(self, volume: VolumeSpec, context: Mapping[str, str], path: Path) -> None:
        """Makes a volume ready on this node."""
        request = csi_pb2.NodeStageVolumeRequest(
            volume_id=volume.handle,
            publish_context=dict(context),
            staging_target_path=str(path),
            volume_capability=self._capability(volume),
            volume_context=volume.attributes,
        )
        await self._call(self._node, "NodeStageVolume", request, CALL_TIMEOUT_S)

    async def unstage(self, volume: VolumeSpec, path: Path) -> None:
        """Undoes `stage`."""
        request = csi_pb2.NodeUnstageVolumeRequest(
            volume_id=volume.handle, staging_target_path=str(path)
        )
        await self._call(self._node, "NodeUnstageVolume", request, CALL_TIMEOUT_S)

    async def publish(
        self,
        volume: VolumeSpec,
        context: Mapping[str, str],
        *,
        staging: Path,
        target: Path,
        read_only: bool,
    ) -> None:
        """Brings a staged volume to a pod."""
        request = csi_pb2.NodePublishVolumeRequest(
            volume_id=volume.handle,
            publish_context=dict(context),
            staging_target_path=str(staging),
            target_path=str(target),
            volume_capability=self._capability(volume),
            readonly=read_only,
            volume_context=volume.attributes,
        )
        await self._call(self._node, "NodePublishVolume", request, CALL_TIMEOUT_S)

    async def unpublish(self, volume: VolumeSpec, target: Path) -> None:
        """Undoes `publish`."""
        request = csi_pb2.NodeUnpublishVolumeRequest(
            volume_id=volume.handle, target_path=str(target)
        )
        await self._call(self._node, "NodeUnpublishVolume", request, CALL_TIMEOUT_S)

    async def expand(self, volume: VolumeSpec, *, staging: Path, path: Path) -> int:
        """Grows what is on the volume; the bytes that it has then."""
        if not self._expands:
            return volume.capacity_bytes
        request = csi_pb2.NodeExpandVolumeRequest(
            volume_id=volume.handle,
            volume_path=str(path),
            staging_target_path=str(staging),
            capacity_range=csi_pb2.CapacityRange(required_bytes=volume.capacity_bytes),
            volume_capability=self._capability(volume),
        )
        answer = await self._call(self._node, "NodeExpandVolume", request, CALL_TIMEOUT_S)
        return int(answer.capacity_bytes) or volume.capacity_bytes
