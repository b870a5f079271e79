"""The node service on real loop devices, real mkfs and real mounts; only the attacher is a fake.

A story for each thing that an impatient kubelet does: repeats, crashes in between, wrong order.
"""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

import tercet_csi.node.service as node_service
from tercet_api.names import host_id, host_nqn, volume_nqn
from tercet_csi.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from tercet_csi.node.commands import run
from tercet_csi.node.filesystem import FileSystems, mounted_at, mounts
from tercet_csi.node.records import Records
from tercet_csi.node.service import NodeOptions, NodeService, device_bytes
from tercet_csi.node.targets import Paths, Target
from tercet_csi.v1 import csi_pb2 as csi

VOLUME = "0b0c0d0e-0000-4000-8000-000000000001"
MIB = 1024**2
CAP_SYS_RESOURCE = 24
MODE = csi.VolumeCapability.AccessMode
WRITER, ONE_POD = MODE.SINGLE_NODE_WRITER, MODE.SINGLE_NODE_SINGLE_WRITER


def has_capability(number: int) -> bool:
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    return bool(int(status["CapEff"], 16) >> number & 1)


class LoopAttacher:
    """Shows one file as a loop device."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.devices: dict[str, str] = {}

    async def attach(self, target: Target) -> str:
        if target.nqn not in self.devices:
            done = await run("losetup", "--find", "--show", str(self.file))
            self.devices[target.nqn] = done.output
        return self.devices[target.nqn]

    async def detach(self, nqn: str) -> None:
        device = self.devices.pop(nqn, None)
        if device is not None:
            await run("losetup", "--detach", device)

    async def device_of(self, nqn: str) -> str | None:
        return self.devices.get(nqn)

    async def paths(self) -> dict[str, Paths]:
        return {}

    async def set_paths(self, target: Target) -> None:
        raise AssertionError(f"no path of {target} is asked for")

    async def ready(self) -> bool:
        return True


class Node:
    """A service, its folder, and requests with everything filled in."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "disk"
        self.file.touch()
        os.truncate(self.file, 64 * MIB)
        self.attacher = LoopAttacher(self.file)
        self.folder = folder
        self.staging = folder / "staging"
        self.target = folder / "pods" / "target"
        self.service = self.restarted()

    def restarted(self) -> NodeService:
        options = NodeOptions("n1", {"zone": "a"})
        records = Records(self.folder / "staged")
        self.service = NodeService(options, self.attacher, FileSystems(run), records)
        return self.service

    async def stage(self, *, block: bool = False, volume: str = VOLUME, mode: int = WRITER) -> None:
        await self.service.NodeStageVolume(
            csi.NodeStageVolumeRequest(
                volume_id=volume,
                staging_target_path=str(self.staging),
                volume_capability=capability(block=block, mode=mode),
                publish_context=publish_context(VOLUME),
            ),
            None,
        )

    async def publish(
        self, *, block: bool = False, read_only: bool = False, mode: int = WRITER
    ) -> None:
        await self.service.NodePublishVolume(
            csi.NodePublishVolumeRequest(
                volume_id=VOLUME,
                staging_target_path=str(self.staging),
                target_path=str(self.target),
                volume_capability=capability(block=block, mode=mode),
                readonly=read_only,
            ),
            None,
        )

    async def unpublish(self) -> None:
        await self.service.NodeUnpublishVolume(
            csi.NodeUnpublishVolumeRequest(volume_id=VOLUME, target_path=str(self.target)), None
        )

    async def unstage(self) -> None:
        await self.service.NodeUnstageVolume(
            csi.NodeUnstageVolumeRequest(volume_id=VOLUME, staging_target_path=str(self.staging)),
            None,
        )


def capability(
    *, block: bool, file_system: str = "ext4", mode: int = WRITER
) -> csi.VolumeCapability:
    access = MODE(mode=mode)
    if block:
        return csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=access)
    mount = csi.VolumeCapability.MountVolume(fs_type=file_system)
    return csi.VolumeCapability(mount=mount, access_mode=access)


def publish_context(volume: str) -> dict[str, str]:
    return {
        "nqn": volume_nqn(volume),
        "hostNqn": host_nqn("n1"),
        "hostId": host_id("n1"),
        "endpoints": "127.0.1.1:4420,127.0.1.2:4420",
    }


@pytest.fixture
async def node(tmp_path: Path):
    made = Node(tmp_path)
    yield made
    for path in (made.target, made.staging / "mount"):
        while mounted_at(str(path)) is not None:
            subprocess.run(["umount", path], check=True)
    for nqn in list(made.attacher.devices):
        await made.attacher.detach(nqn)


async def test_a_pod_writes_and_its_successor_reads(node: Node):
    await node.stage()
    await node.publish()
    (node.target / "file").write_text("kept")
    await node.unpublish()
    await node.unstage()
    assert not node.target.exists()
    assert node.attacher.devices == {}
    await node.stage()
    await node.publish()
    assert (node.target / "file").read_text() == "kept"


async def test_every_call_may_be_made_ten_times_and_by_a_restarted_service(node: Node):
    for _ in range(10):
        await node.stage()
        node.restarted()
    for _ in range(10):
        await node.publish()
    assert (
        len(
            [
                m
                for m in mounts(Path("/proc/self/mountinfo").read_text())
                if m.target == str(node.target)
            ]
        )
        == 1
    )
    for _ in range(10):
        await node.unpublish()
    for _ in range(10):
        await node.unstage()
        node.restarted()


async def test_a_foreign_file_system_is_never_overwritten(node: Node):
    subprocess.run(["mkfs.ext2", "-q", "-F", node.file], check=True)
    before = node.file.read_bytes()[:MIB]
    with pytest.raises(FailedPrecondition, match="holds ext2"):
        await node.stage()
    assert node.file.read_bytes()[:MIB] == before


async def test_a_restored_larger_volume_grows_its_file_system(node: Node):
    subprocess.run(["mkfs.ext4", "-q", "-F", node.file, "32M"], check=True)
    await node.stage()
    await node.publish()
    stats = os.statvfs(node.target)
    assert stats.f_blocks * stats.f_frsize > 50 * MIB


async def test_a_device_is_published_as_it_is(node: Node):
    await node.stage(block=True)
    await node.publish(block=True)
    assert device_bytes(str(node.target)) == 64 * MIB
    answer = await node.service.NodeGetVolumeStats(
        csi.NodeGetVolumeStatsRequest(volume_id=VOLUME, volume_path=str(node.target)), None
    )
    assert answer.usage[0].total == 64 * MIB
    await node.unpublish()
    await node.unstage()


async def test_online_growth_reaches_the_file_system(node: Node):
    await node.stage()
    await node.publish()
    os.truncate(node.file, 128 * MIB)
    await run("losetup", "--set-capacity", node.attacher.devices[volume_nqn(VOLUME)])
    request = csi.NodeExpandVolumeRequest(volume_id=VOLUME, volume_path=str(node.target))
    request.capacity_range.required_bytes = 128 * MIB
    if has_capability(CAP_SYS_RESOURCE):
        answer = await node.service.NodeExpandVolume(request, None)
        assert answer.capacity_bytes == 128 * MIB
    else:
        # The kernel refuses to grow a mounted ext4; the message says so, and staging grows it.
        with pytest.raises(FailedPrecondition, match="CAP_SYS_RESOURCE"):
            await node.service.NodeExpandVolume(request, None)
        await node.unpublish()
        await node.unstage()
        await node.stage()
        await node.publish()
    stats = os.statvfs(node.target)
    assert stats.f_blocks * stats.f_frsize > 100 * MIB


async def test_growth_that_has_not_arrived_is_said_and_not_claimed(node: Node, monkeypatch):
    monkeypatch.setattr(node_service, "GROWN_TIMEOUT_S", 0.1)
    await node.stage()
    await node.publish()
    request = csi.NodeExpandVolumeRequest(volume_id=VOLUME, volume_path=str(node.target))
    request.capacity_range.required_bytes = 256 * MIB
    with pytest.raises(Unavailable, match="has not grown yet"):
        await node.service.NodeExpandVolume(request, None)


async def test_growth_that_is_on_its_way_is_waited_for(node: Node):
    await node.stage(block=True)
    await node.publish(block=True)
    request = csi.NodeExpandVolumeRequest(volume_id=VOLUME, volume_path=str(node.target))
    request.capacity_range.required_bytes = 128 * MIB
    expanding = asyncio.create_task(node.service.NodeExpandVolume(request, None))
    await asyncio.sleep(0)
    os.truncate(node.file, 128 * MIB)
    await run("losetup", "--set-capacity", node.attacher.devices[volume_nqn(VOLUME)])
    assert (await expanding).capacity_bytes == 128 * MIB


async def test_a_slash_at_the_end_makes_no_other_path(node: Node):
    await node.stage()
    request = csi.NodePublishVolumeRequest(
        volume_id=VOLUME,
        staging_target_path=f"{node.staging}/",
        target_path=f"{node.target}/",
        volume_capability=capability(block=False, mode=ONE_POD),
    )
    await node.service.NodePublishVolume(request, None)
    await node.publish(mode=ONE_POD)
    for path in (f"{node.staging}/", f"{node.target}/"):
        stats = csi.NodeGetVolumeStatsRequest(volume_id=VOLUME, volume_path=path)
        assert (await node.service.NodeGetVolumeStats(stats, None)).usage[0].total > 0


async def test_growth_reaches_a_volume_that_is_only_staged(node: Node):
    await node.stage()
    request = csi.NodeExpandVolumeRequest(volume_id=VOLUME, volume_path=str(node.staging))
    request.capacity_range.required_bytes = 64 * MIB
    assert (await node.service.NodeExpandVolume(request, None)).capacity_bytes == 64 * MIB
    for wrong in (str(node.folder), "some/path", "/nowhere", "/"):
        request.volume_path = wrong
        with pytest.raises(NotFound):
            await node.service.NodeExpandVolume(request, None)


@pytest.mark.parametrize("block", [False, True])
async def test_a_volume_for_one_pod_is_published_once(node: Node, block: bool):
    first, second = node.target, node.folder / "pods" / "second"
    await node.stage(block=block, mode=ONE_POD)
    await node.publish(block=block, mode=ONE_POD)
    await node.publish(block=block, mode=ONE_POD)
    node.restarted()
    node.target = second
    with pytest.raises(FailedPrecondition, match=f"published at {first}"):
        await node.publish(block=block, mode=ONE_POD)
    assert not second.exists()
    node.target = first
    await node.unpublish()
    node.target = second
    await node.publish(block=block, mode=ONE_POD)
    await node.unpublish()


async def test_several_pods_of_a_node_may_write_unless_it_is_for_one(node: Node):
    first, second = node.target, node.folder / "pods" / "second"
    await node.stage(mode=MODE.SINGLE_NODE_MULTI_WRITER)
    await node.publish(mode=MODE.SINGLE_NODE_MULTI_WRITER)
    node.target = second
    await node.publish(mode=MODE.SINGLE_NODE_MULTI_WRITER)
    (second / "file").write_text("shared")
    assert (first / "file").read_text() == "shared"
    await node.unpublish()
    node.target = first


async def test_what_is_staged_in_another_way_is_not_taken_for_it(node: Node):
    await node.stage()
    with pytest.raises(AlreadyExists, match="as a file system"):
        await node.stage(block=True)
    await node.publish()
    with pytest.raises(AlreadyExists, match="read-only"):
        await node.publish(read_only=True)
    staging, node.staging = node.staging, node.folder / "elsewhere"
    with pytest.raises(FailedPrecondition, match="unstage it there first"):
        await node.stage()
    await node.unstage()  # it is not staged there: nothing to undo
    assert mounted_at(str(staging / "mount")) is not None
    node.staging = staging


async def test_unstaging_leaves_another_volumes_mount_alone(node: Node):
    await node.stage()
    other = csi.NodeUnstageVolumeRequest(
        volume_id=VOLUME.replace("1", "2"), staging_target_path=str(node.staging)
    )
    await node.service.NodeUnstageVolume(other, None)
    assert mounted_at(str(node.staging / "mount")) is not None


async def test_a_lost_record_does_not_leave_the_mount_behind(node: Node):
    await node.stage()
    (node.folder / "staged" / f"{VOLUME}.json").unlink()
    await node.unstage()
    assert mounted_at(str(node.staging / "mount")) is None
    assert node.attacher.devices == {}


async def test_a_record_of_an_older_version_is_read(node: Node):
    await node.stage()
    path = node.folder / "staged" / f"{VOLUME}.json"
    old = json.loads(path.read_text())
    del old["targets"]
    path.write_text(json.dumps(old))
    await node.publish(mode=ONE_POD)


async def test_what_is_missing_is_said_before_what_is_wrong(node: Node):
    requests = [
        (node.service.NodeStageVolume, csi.NodeStageVolumeRequest(volume_id="wrong")),
        (node.service.NodeUnstageVolume, csi.NodeUnstageVolumeRequest(volume_id="wrong")),
        (node.service.NodePublishVolume, csi.NodePublishVolumeRequest(volume_id="wrong")),
        (node.service.NodeUnpublishVolume, csi.NodeUnpublishVolumeRequest(volume_id="wrong")),
        (node.service.NodeGetVolumeStats, csi.NodeGetVolumeStatsRequest(volume_id="wrong")),
        (node.service.NodeExpandVolume, csi.NodeExpandVolumeRequest(volume_id="wrong")),
    ]
    for call, request in requests:
        with pytest.raises(InvalidArgument, match="path is missing"):
            await call(request, None)
        with pytest.raises(InvalidArgument, match="volume_id is missing"):
            await call(type(request)(), None)


async def test_publishing_before_staging_is_refused(node: Node):
    with pytest.raises(FailedPrecondition, match="stage it first"):
        await node.publish()
    assert not node.target.exists()


async def test_a_context_of_another_volume_is_refused_before_anything_is_done(node: Node):
    other = VOLUME.replace("1", "2")
    with pytest.raises(InvalidArgument, match="not of volume"):
        await node.stage(volume=other)
    assert node.attacher.devices == {}


async def test_a_second_call_on_the_same_volume_is_aborted(node: Node):
    with node.service._locks.hold(VOLUME), pytest.raises(Aborted):
        await node.stage()


async def test_stats_of_what_is_not_there_are_not_found(node: Node):
    await node.stage()
    await node.publish()
    for path in ("/nowhere", str(node.folder), "some/path", "/"):
        with pytest.raises(NotFound):
            await node.service.NodeGetVolumeStats(
                csi.NodeGetVolumeStatsRequest(volume_id=VOLUME, volume_path=path), None
            )


async def test_node_info_names_the_node_and_where_it_is(node: Node):
    info = await node.service.NodeGetInfo(csi.NodeGetInfoRequest(), None)
    assert info.node_id == "n1"
    assert info.accessible_topology.segments["zone"] == "a"
    assert info.accessible_topology.segments["topology.csi.tercet.io/node"] == "n1"
