"""CSI Node service: stage (attach, make or check the file system, mount), publish (bind), and back.

Every step looks at what is there before it acts, so each call can be repeated after a crash at any
point. The order on the way back is the reverse: unmount before detaching, detach before forgetting.
What the volume is and who may reach it is left to the controller: all that is needed comes in the
publish context.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet_api.names import TOPOLOGY_NODE, is_uuid, volume_nqn
from tercet_csi.capabilities import Access, read_access
from tercet_csi.errors import FailedPrecondition, InvalidArgument, NotFound
from tercet_csi.locks import ObjectLocks
from tercet_csi.node.attach import Attacher, Target
from tercet_csi.node.filesystem import FileSystems, Mount, mounted_at
from tercet_csi.node.records import Records, Staged
from tercet_csi.v1 import csi_pb2 as csi
from tercet_csi.v1 import csi_pb2_grpc

_BLKGETSIZE64 = 0x80081272
STAGED_MOUNT = "mount"
VOLUMES_PER_NODE_MAX = 128


@dataclass(frozen=True)
class NodeOptions:
    """Who this node is."""

    name: str
    topology: dict[str, str]


class NodeService(csi_pb2_grpc.NodeServicer):
    """The calls. `mounted` is given for tests."""

    def __init__(
        self,
        options: NodeOptions,
        attacher: Attacher,
        file_systems: FileSystems,
        records: Records,
        mounted: Callable[[str], Mount | None] = mounted_at,
    ) -> None:
        self._options = options
        self._attacher = attacher
        self._fs = file_systems
        self._records = records
        self._mounted = mounted
        self._locks = ObjectLocks()

    async def NodeGetInfo(  # noqa: N802
        self, request: csi.NodeGetInfoRequest, context: Any
    ) -> csi.NodeGetInfoResponse:
        """Node id is the node's name."""
        segments = {TOPOLOGY_NODE: self._options.name, **self._options.topology}
        return csi.NodeGetInfoResponse(
            node_id=self._options.name,
            max_volumes_per_node=VOLUMES_PER_NODE_MAX,
            accessible_topology=csi.Topology(segments=segments),
        )

    async def NodeGetCapabilities(  # noqa: N802
        self, request: csi.NodeGetCapabilitiesRequest, context: Any
    ) -> csi.NodeGetCapabilitiesResponse:
        """Stage, stats, expand, several pods on one node."""
        rpc = csi.NodeServiceCapability.RPC
        kinds = (
            rpc.STAGE_UNSTAGE_VOLUME,
            rpc.GET_VOLUME_STATS,
            rpc.EXPAND_VOLUME,
            rpc.SINGLE_NODE_MULTI_WRITER,
        )
        return csi.NodeGetCapabilitiesResponse(
            capabilities=[csi.NodeServiceCapability(rpc=rpc(type=kind)) for kind in kinds]
        )

    async def NodeStageVolume(  # noqa: N802
        self, request: csi.NodeStageVolumeRequest, context: Any
    ) -> csi.NodeStageVolumeResponse:
        """Attach; for a mount: file system at `<staging>/mount`."""
        volume = _volume_id(request.volume_id)
        staging = _path(request.staging_target_path, "staging_target_path")
        if not request.HasField("volume_capability"):
            raise InvalidArgument("volume_capability is missing")
        access = read_access(request.volume_capability)
        target = Target.from_context(dict(request.publish_context))
        if target.nqn != volume_nqn(volume):
            raise InvalidArgument(f"publish_context is of {target.nqn}, not of volume {volume}")
        with self._locks.hold(volume):
            await self._stage(volume, staging, access, target)
        return csi.NodeStageVolumeResponse()

    async def _stage(self, volume: str, staging: Path, access: Access, target: Target) -> None:
        record = self._records.get(volume)
        if record is not None and (record.staging_path, record.block) != (
            str(staging),
            access.block,
        ):
            raise FailedPrecondition(
                f"volume {volume} is staged at {record.staging_path}: unstage it there first"
            )
        # Crash window: a record without a device; Unstage and Stage both start from it.
        self._records.put(Staged(volume, target.nqn, str(staging), access.block, access.read_only))
        device = await self._attacher.attach(target)
        if access.block:
            return
        mount_point = staging / STAGED_MOUNT
        mount_point.mkdir(parents=True, exist_ok=True)
        if self._mounted(str(mount_point)) is None:
            await self._fs.prepare(device, access.file_system, read_only=access.read_only)
            options = access.mount_flags + (("ro",) if access.read_only else ())
            await self._fs.mount(device, str(mount_point), access.file_system, options)
        if not access.read_only and access.file_system == "xfs":
            # A clone or restore may be larger than its source; ext4 has grown before its mount.
            await self._fs.grow(device, str(mount_point))

    async def NodeUnstageVolume(  # noqa: N802
        self, request: csi.NodeUnstageVolumeRequest, context: Any
    ) -> csi.NodeUnstageVolumeResponse:
        """Unmount, detach, forget."""
        volume = _volume_id(request.volume_id)
        staging = _path(request.staging_target_path, "staging_target_path")
        with self._locks.hold(volume):
            await self._fs.unmount(str(staging / STAGED_MOUNT))
            await self._attacher.detach(volume_nqn(volume))
            (staging / STAGED_MOUNT).rmdir() if (staging / STAGED_MOUNT).is_dir() else None
            self._records.remove(volume)
        return csi.NodeUnstageVolumeResponse()

    async def NodePublishVolume(  # noqa: N802
        self, request: csi.NodePublishVolumeRequest, context: Any
    ) -> csi.NodePublishVolumeResponse:
        """Bind the staged mount, or the device's node, to the target."""
        volume = _volume_id(request.volume_id)
        staging = _path(request.staging_target_path, "staging_target_path")
        target = _path(request.target_path, "target_path")
        if not request.HasField("volume_capability"):
            raise InvalidArgument("volume_capability is missing")
        access = read_access(request.volume_capability)
        with self._locks.hold(volume):
            record = self._records.get(volume)
            if record is None or record.staging_path != str(staging):
                raise FailedPrecondition(
                    f"volume {volume} is not staged at {staging}: stage it first"
                )
            if record.block != access.block:
                kind = "a block device" if record.block else "a file system"
                raise InvalidArgument(f"volume {volume} is staged as {kind}")
            await self._publish(record, target, read_only=request.readonly or access.read_only)
        return csi.NodePublishVolumeResponse()

    async def _publish(self, record: Staged, target: Path, *, read_only: bool) -> None:
        mounted = self._mounted(str(target))
        if mounted is not None:
            if ("ro" in mounted.options) != (read_only or record.read_only):
                raise FailedPrecondition(f"{target} is published with another read-only setting")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if record.block:
            device = await self._attacher.device_of(record.nqn)
            if device is None:
                raise FailedPrecondition(f"volume {record.volume} has no device: stage it again")
            target.touch()
            await self._fs.bind(device, str(target), read_only=read_only)
        else:
            source = Path(record.staging_path) / STAGED_MOUNT
            if self._mounted(str(source)) is None:
                raise FailedPrecondition(f"nothing is mounted at {source}: stage the volume again")
            target.mkdir(exist_ok=True)
            await self._fs.bind(str(source), str(target), read_only=read_only)

    async def NodeUnpublishVolume(  # noqa: N802
        self, request: csi.NodeUnpublishVolumeRequest, context: Any
    ) -> csi.NodeUnpublishVolumeResponse:
        """Unmount the target and remove it."""
        volume = _volume_id(request.volume_id)
        target = _path(request.target_path, "target_path")
        with self._locks.hold(volume):
            await self._fs.unmount(str(target))
            if target.is_dir():
                target.rmdir()
            else:
                target.unlink(missing_ok=True)
        return csi.NodeUnpublishVolumeResponse()

    async def NodeGetVolumeStats(  # noqa: N802
        self, request: csi.NodeGetVolumeStatsRequest, context: Any
    ) -> csi.NodeGetVolumeStatsResponse:
        """Bytes and inodes of a file system; bytes of a device."""
        volume = _volume_id(request.volume_id)
        path = _path(request.volume_path, "volume_path")
        if self._records.get(volume) is None:
            raise NotFound(f"volume {volume} is not staged on node {self._options.name}")
        if not path.exists() or self._mounted(str(path)) is None:
            raise NotFound(f"volume {volume} is not published at {path}")
        usage = csi.VolumeUsage
        if stat.S_ISBLK(path.stat().st_mode):
            total = device_bytes(str(path))
            return csi.NodeGetVolumeStatsResponse(usage=[usage(total=total, unit=usage.BYTES)])
        found = os.statvfs(path)
        size, used = found.f_blocks * found.f_frsize, found.f_blocks - found.f_bfree
        return csi.NodeGetVolumeStatsResponse(
            usage=[
                usage(
                    total=size,
                    available=found.f_bavail * found.f_frsize,
                    used=used * found.f_frsize,
                    unit=usage.BYTES,
                ),
                usage(
                    total=found.f_files,
                    available=found.f_ffree,
                    used=found.f_files - found.f_ffree,
                    unit=usage.INODES,
                ),
            ]
        )

    async def NodeExpandVolume(  # noqa: N802
        self, request: csi.NodeExpandVolumeRequest, context: Any
    ) -> csi.NodeExpandVolumeResponse:
        """Grow the file system to the device, which has grown with the volume."""
        volume = _volume_id(request.volume_id)
        path = _path(request.volume_path, "volume_path")
        with self._locks.hold(volume):
            record = self._records.get(volume)
            if record is None or not path.exists():
                raise NotFound(f"volume {volume} is not published at {path}")
            device = await self._attacher.device_of(record.nqn)
            if device is None:
                raise FailedPrecondition(f"volume {volume} has no device: stage it again")
            size = device_bytes(device)
            if size < request.capacity_range.required_bytes:
                raise FailedPrecondition(
                    f"{device} has {size} bytes, {request.capacity_range.required_bytes} are "
                    "wanted: the volume has not grown yet; try again"
                )
            if not record.block:
                staged = Path(record.staging_path) / STAGED_MOUNT
                await self._fs.grow(device, str(staged))
        return csi.NodeExpandVolumeResponse(capacity_bytes=size)


def device_bytes(path: str) -> int:
    """Size of a block device in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        raw = fcntl.ioctl(descriptor, _BLKGETSIZE64, b"\0" * 8)
    finally:
        os.close(descriptor)
    (size,) = struct.unpack("=Q", raw)
    return int(size)


def _volume_id(volume_id: str) -> str:
    if not volume_id:
        raise InvalidArgument("volume_id is missing")
    if not is_uuid(volume_id):
        raise NotFound(f"volume_id {volume_id!r} is no id of a Tercet volume (a UUID)")
    return volume_id


def _path(path: str, field: str) -> Path:
    if not path:
        raise InvalidArgument(f"{field} is missing")
    if not path.startswith("/"):
        raise InvalidArgument(f"{field} {path!r} is not absolute")
    return Path(path)
