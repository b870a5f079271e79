"""CSI Node service: stage (attach, make or check the file system, mount), publish (bind), and back.

Every step looks at what is there before it acts, so each call can be repeated after a crash at any
point. The order on the way back is the reverse: unmount before detaching, detach before forgetting.
What the volume is and who may reach it is left to the controller: all that is needed comes in the
publish context.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tercet_api.names import TOPOLOGY_NODE, host_id, host_nqn, is_uuid, volume_nqn
from tercet_csi.capabilities import Access, read_access
from tercet_csi.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from tercet_csi.locks import ObjectLocks
from tercet_csi.node.attach import Attacher
from tercet_csi.node.discovery import Identity
from tercet_csi.node.filesystem import FileSystems, Mount, mounted_at
from tercet_csi.node.paths import PathFollower, current
from tercet_csi.node.records import Records, Staged
from tercet_csi.node.targets import Target
from tercet_csi.v1 import csi_pb2 as csi
from tercet_csi.v1 import csi_pb2_grpc

_BLKGETSIZE64 = 0x80081272
STAGED_MOUNT = "mount"
VOLUMES_MAX = 128
"""Volumes that a node takes when it is not told otherwise; the scheduler counts them."""
GROWN_TIMEOUT_S = 20.0
GROWN_PAUSE_S = 0.05


@dataclass(frozen=True)
class NodeOptions:
    """Who this node is."""

    name: str
    topology: dict[str, str]
    volumes_max: int = VOLUMES_MAX


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
        identity = Identity(host_nqn(options.name), host_id(options.name))
        self.paths = PathFollower(identity, attacher, records, self._locks)

    async def NodeGetInfo(  # noqa: N802
        self, request: csi.NodeGetInfoRequest, context: Any
    ) -> csi.NodeGetInfoResponse:
        """Node id is the node's name."""
        segments = {TOPOLOGY_NODE: self._options.name, **self._options.topology}
        return csi.NodeGetInfoResponse(
            node_id=self._options.name,
            max_volumes_per_node=self._options.volumes_max,
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
        _need(request.volume_id, "volume_id")
        staging = _path(request.staging_target_path, "staging_target_path")
        access = _access(request)
        volume = _known(request.volume_id)
        target = Target.from_context(dict(request.publish_context))
        if target.nqn != volume_nqn(volume):
            raise InvalidArgument(f"publish_context is of {target.nqn}, not of volume {volume}")
        with self._locks.hold(volume):
            await self._stage(volume, staging, access, target)
        self.paths.changed()
        return csi.NodeStageVolumeResponse()

    async def _stage(self, volume: str, staging: Path, access: Access, target: Target) -> None:
        record = self._records.get(volume)
        wanted = Staged(volume, target.nqn, str(staging), access.block, access.read_only)
        if record is not None and record.staging_path != wanted.staging_path:
            raise FailedPrecondition(
                f"volume {volume} is staged at {record.staging_path}: unstage it there first"
            )
        if record is not None and replace(record, targets=()) != wanted:
            kind = "a block device" if record.block else "a file system"
            mode = "for reading only" if record.read_only else "for writing"
            raise AlreadyExists(
                f"volume {volume} is staged at {staging} as {kind} {mode}: unstage it first"
            )
        if record is None:
            # Crash window: a record without a device; Unstage and Stage both start from it.
            self._records.put(wanted)
        device = await self._attacher.attach(await current(target))
        if access.block:
            return
        mount_point = staging / STAGED_MOUNT
        mount_point.mkdir(parents=True, exist_ok=True)
        mounted = self._mounted(str(mount_point))
        if mounted is not None and mounted.file_system != access.file_system:
            raise AlreadyExists(
                f"volume {volume} is staged at {staging} with {mounted.file_system}, not "
                f"{access.file_system}: unstage it first"
            )
        if mounted is None:
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
        _need(request.volume_id, "volume_id")
        staging = _path(request.staging_target_path, "staging_target_path")
        volume = _known(request.volume_id)
        with self._locks.hold(volume):
            record = self._records.get(volume)
            if record is None or record.staging_path == str(staging):
                await self._unstage(volume, staging / STAGED_MOUNT, known=record is not None)
        self.paths.changed()
        return csi.NodeUnstageVolumeResponse()

    async def _unstage(self, volume: str, mount_point: Path, *, known: bool) -> None:
        """Without a record only what is mounted from this volume's own device is unmounted."""
        nqn = volume_nqn(volume)
        mounted = self._mounted(str(mount_point))
        if mounted is not None and (known or await self._is_from(mounted, nqn)):
            await self._fs.unmount(str(mount_point))
            mounted = None
        await self._attacher.detach(nqn)
        if mounted is None and mount_point.is_dir():
            mount_point.rmdir()
        self._records.remove(volume)

    async def _is_from(self, mounted: Mount, nqn: str) -> bool:
        device = await self._attacher.device_of(nqn)
        if device is None:
            return False
        number = Path(device).stat().st_rdev
        return mounted.device == f"{os.major(number)}:{os.minor(number)}"

    async def NodePublishVolume(  # noqa: N802
        self, request: csi.NodePublishVolumeRequest, context: Any
    ) -> csi.NodePublishVolumeResponse:
        """Bind the staged mount, or the device's node, to the target."""
        _need(request.volume_id, "volume_id")
        target = _path(request.target_path, "target_path")
        access = _access(request)
        volume = _known(request.volume_id)
        staging = _plain(request.staging_target_path)
        with self._locks.hold(volume):
            record = self._records.get(volume)
            if record is None or record.staging_path != staging:
                raise FailedPrecondition(
                    f"volume {volume} is not staged at {staging or 'any path'}: stage it first"
                )
            if record.block != access.block:
                kind = "a block device" if record.block else "a file system"
                raise InvalidArgument(f"volume {volume} is staged as {kind}")
            if access.single_writer:
                self._check_alone(record, target)
            await self._publish(record, target, read_only=request.readonly or access.read_only)
        return csi.NodePublishVolumeResponse()

    def _check_alone(self, record: Staged, target: Path) -> None:
        """Raises FailedPrecondition when the volume is published at another path."""
        for other in record.targets:
            if other != str(target) and self._mounted(other) is not None:
                raise FailedPrecondition(
                    f"volume {record.volume} is published at {other} and is for one pod "
                    "(ReadWriteOncePod): unpublish it there first"
                )

    async def _publish(self, record: Staged, target: Path, *, read_only: bool) -> None:
        mounted = self._mounted(str(target))
        if mounted is not None:
            if ("ro" in mounted.options) != (read_only or record.read_only):
                raise AlreadyExists(
                    f"{target} is published with another read-only setting: unpublish it first"
                )
            return
        # Crash window: a target that is not mounted, which counts for nothing.
        self._records.put(record.with_target(str(target)))
        target.parent.mkdir(parents=True, exist_ok=True)
        if record.block:
            device = await self._attacher.device_of(record.nqn)
            if device is None:
                raise FailedPrecondition(f"volume {record.volume} has no device: stage it again")
            target.touch()
            await self._fs.bind(device, str(target), read_only=read_only)
        else:
            source = _staged_mount(record)
            if self._mounted(str(source)) is None:
                raise FailedPrecondition(f"nothing is mounted at {source}: stage the volume again")
            target.mkdir(exist_ok=True)
            await self._fs.bind(str(source), str(target), read_only=read_only)

    async def NodeUnpublishVolume(  # noqa: N802
        self, request: csi.NodeUnpublishVolumeRequest, context: Any
    ) -> csi.NodeUnpublishVolumeResponse:
        """Unmount the target and remove it."""
        _need(request.volume_id, "volume_id")
        target = _path(request.target_path, "target_path")
        volume = _known(request.volume_id)
        with self._locks.hold(volume):
            await self._fs.unmount(str(target))
            if target.is_dir():
                target.rmdir()
            else:
                target.unlink(missing_ok=True)
            record = self._records.get(volume)
            if record is not None and str(target) in record.targets:
                self._records.put(record.without_target(str(target)))
        return csi.NodeUnpublishVolumeResponse()

    async def NodeGetVolumeStats(  # noqa: N802
        self, request: csi.NodeGetVolumeStatsRequest, context: Any
    ) -> csi.NodeGetVolumeStatsResponse:
        """Bytes and inodes of a file system; bytes of a device."""
        _need(request.volume_id, "volume_id")
        _need(request.volume_path, "volume_path")
        record, device = await self._at(_known(request.volume_id), _plain(request.volume_path))
        usage = csi.VolumeUsage
        if record.block:
            total = device_bytes(device)
            return csi.NodeGetVolumeStatsResponse(usage=[usage(total=total, unit=usage.BYTES)])
        found = os.statvfs(_staged_mount(record))
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
        _need(request.volume_id, "volume_id")
        _need(request.volume_path, "volume_path")
        volume = _known(request.volume_id)
        if request.HasField("volume_capability"):
            read_access(request.volume_capability)
        with self._locks.hold(volume):
            record, device = await self._at(volume, _plain(request.volume_path))
            size = await _grown(device, request.capacity_range.required_bytes)
            if not record.block:
                await self._fs.grow(device, str(_staged_mount(record)))
        return csi.NodeExpandVolumeResponse(capacity_bytes=size)

    async def _at(self, volume: str, path: str) -> tuple[Staged, str]:
        """The record and the device of the volume that is staged or published at the path.

        Raises NotFound when there is none, or another volume.
        """
        record = self._records.get(volume)
        if record is None:
            raise NotFound(f"volume {volume} is not staged on node {self._options.name}")
        device = await self._attacher.device_of(record.nqn)
        missing = NotFound(f"volume {volume} is neither staged nor published at {path}")
        if device is None:
            raise missing
        if record.block:
            found = path == record.staging_path or _is_device(path, device)
        else:
            staged = self._mounted(str(_staged_mount(record)))
            mounted = staged if path == record.staging_path else self._mounted(path)
            found = bool(staged and mounted and staged.device == mounted.device)
        if not found:
            raise missing
        return record, device


def device_bytes(path: str) -> int:
    """Size of a block device in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        raw = fcntl.ioctl(descriptor, _BLKGETSIZE64, b"\0" * 8)
    finally:
        os.close(descriptor)
    (size,) = struct.unpack("=Q", raw)
    return int(size)


async def _grown(device: str, wanted_bytes: int) -> int:
    """The device's size once it has what is wanted: news of it travel through the host."""
    deadline_s = time.monotonic() + GROWN_TIMEOUT_S
    while (size := device_bytes(device)) < wanted_bytes:
        if time.monotonic() > deadline_s:
            raise Unavailable(
                f"{device} has {size} bytes, {wanted_bytes} are wanted: the volume has not grown "
                "yet; try again"
            )
        await asyncio.sleep(GROWN_PAUSE_S)
    return size


def _staged_mount(record: Staged) -> Path:
    return Path(record.staging_path) / STAGED_MOUNT


def _is_device(path: str, device: str) -> bool:
    """Whether the path is a node of this block device."""
    try:
        found, wanted = Path(path).stat(), Path(device).stat()
    except OSError:
        return False
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == wanted.st_rdev


def _access(request: csi.NodeStageVolumeRequest | csi.NodePublishVolumeRequest) -> Access:
    if not request.HasField("volume_capability"):
        raise InvalidArgument("volume_capability is missing")
    return read_access(request.volume_capability)


def _need(value: str, field: str) -> None:
    if not value:
        raise InvalidArgument(f"{field} is missing")


def _known(volume_id: str) -> str:
    """The id, if it can be a volume's. Checked after what is missing: that is said first."""
    if not is_uuid(volume_id):
        raise NotFound(f"volume_id {volume_id!r} is no id of a Tercet volume (a UUID)")
    return volume_id


def _plain(path: str) -> str:
    """The path as records have it, without a slash at its end; an empty one stays empty."""
    return str(Path(path)) if path else ""


def _path(path: str, field: str) -> Path:
    _need(path, field)
    if not path.startswith("/"):
        raise InvalidArgument(f"{field} {path!r} is not absolute")
    return Path(path)
