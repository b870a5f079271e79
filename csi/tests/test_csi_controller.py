"""The controller service against an API server in memory and a stand-in for operator and agents.

The stand-in makes volumes Ready, or says why not, confirms fences and cuts snapshots, each when the
test lets it: so a test decides what the controller has to wait for.
"""

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from csi_stand_in import Cluster as StandIn
from fakeapi import FakeApi

import tercet_csi.controller.volumes as controller_volumes
from tercet_api.clients import Unreachable
from tercet_api.names import CLONE_LABEL, CSI_DRIVER
from tercet_csi.controller.cluster import Cluster, refusal
from tercet_csi.controller.service import ControllerService
from tercet_csi.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
)
from tercet_csi.v1 import csi_pb2 as csi

MIB = 1024**2
MODE = csi.VolumeCapability.AccessMode
WRITER = csi.VolumeCapability(
    mount=csi.VolumeCapability.MountVolume(fs_type="ext4"),
    access_mode=MODE(mode=MODE.SINGLE_NODE_WRITER),
)


class World:
    """A controller, its API server, and the stand-in."""

    def __init__(self) -> None:
        self.api = FakeApi()
        self.cluster = Cluster(self.api)  # type: ignore[arg-type]
        self.service = ControllerService(self.cluster)
        self.rest = StandIn(self.api)

    async def create(self, name: str = "pvc-1", **wishes: Any) -> csi.Volume:
        request = csi.CreateVolumeRequest(
            name=name,
            volume_capabilities=[WRITER],
            capacity_range=csi.CapacityRange(required_bytes=wishes.pop("size", 64 * MIB)),
            **wishes,
        )
        return (await self.service.CreateVolume(request, None)).volume

    async def publish(self, volume: str, node: str, *, readonly: bool = False) -> dict[str, str]:
        request = csi.ControllerPublishVolumeRequest(
            volume_id=volume, node_id=node, volume_capability=WRITER, readonly=readonly
        )
        answer = await self.service.ControllerPublishVolume(request, None)
        return dict(answer.publish_context)

    async def unpublish(self, volume: str, node: str) -> None:
        request = csi.ControllerUnpublishVolumeRequest(volume_id=volume, node_id=node)
        await self.service.ControllerUnpublishVolume(request, None)

    async def delete(self, volume: str) -> None:
        await self.service.DeleteVolume(csi.DeleteVolumeRequest(volume_id=volume), None)

    async def snapshot(self, volume: str, name: str = "snap-1") -> csi.Snapshot:
        request = csi.CreateSnapshotRequest(source_volume_id=volume, name=name)
        return (await self.service.CreateSnapshot(request, None)).snapshot


@asynccontextmanager
async def running(world: World):
    tasks = [
        asyncio.create_task(kind.follow())
        for kind in (world.cluster.volumes, world.cluster.snapshots, world.cluster.nodes)
    ]
    tasks.append(asyncio.create_task(world.rest.run()))
    try:
        yield world
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def world():
    made = World()
    for node in ("n1", "n2", "n3"):
        made.rest.add_node(node)
    async with running(made):
        yield made


async def test_a_volume_is_made_once_however_often_it_is_asked_for(world: World):
    first = await world.create()
    for _ in range(10):
        assert (await world.create()).volume_id == first.volume_id
    assert first.capacity_bytes == 64 * MIB
    assert len(world.rest.volumes()) == 1


async def test_an_own_create_is_marked_new_for_the_operator(world: World):
    await world.create()
    (volume,) = world.rest.volumes()
    assert volume["status"]["newUid"] == volume["metadata"]["uid"]


async def test_the_same_name_with_other_wishes_is_refused(world: World):
    await world.create(size=64 * MIB)
    with pytest.raises(AlreadyExists, match="pvc-1 exists with"):
        await world.create(size=128 * MIB)
    with pytest.raises(AlreadyExists):
        await world.create(size=64 * MIB, parameters={"replicas": "2"})


async def test_a_volume_that_fits_nowhere_leaves_nothing_behind(world: World):
    world.rest.unplaceable = "no three nodes have 64 MiB free"
    with pytest.raises(Exhausted, match="no three nodes"):
        await world.create()
    assert world.rest.volumes() == []


async def test_bad_requests_change_nothing(world: World):
    with pytest.raises(InvalidArgument, match="'replica'"):
        await world.create(parameters={"replica": "2"})
    with pytest.raises(OutOfRange):
        await world.create(size=2**62)
    with pytest.raises(InvalidArgument, match="name is missing"):
        await world.create(name="")
    with pytest.raises(InvalidArgument, match="'iops' is unknown"):
        await world.create(mutable_parameters={"iops": "100"})
    assert world.rest.volumes() == []


async def test_one_node_at_a_time_writes_and_the_other_is_named(world: World):
    volume = await world.create()
    context = await world.publish(volume.volume_id, "n1")
    assert context["nqn"].endswith(volume.volume_id)
    assert context["endpoints"].count(",") == 2
    assert await world.publish(volume.volume_id, "n1") == context
    with pytest.raises(FailedPrecondition, match="attached to n1"):
        await world.publish(volume.volume_id, "n2")
    await world.unpublish(volume.volume_id, "n1")
    await world.publish(volume.volume_id, "n2")


async def test_unknown_volumes_and_nodes_are_not_found(world: World):
    volume = await world.create()
    with pytest.raises(NotFound, match="no node n9"):
        await world.publish(volume.volume_id, "n9")
    with pytest.raises(NotFound):
        await world.publish("nonsense", "n1")
    for node in ("../volumes", "n1/status", "n1?x", "N" * 300):
        with pytest.raises(NotFound, match="no node"):
            await world.publish(volume.volume_id, node)
    await world.unpublish("0b0c0d0e-0000-4000-8000-00000000ffff", "n1")
    await world.delete("nonsense")


async def test_unpublish_returns_only_when_the_host_is_fenced(world: World, monkeypatch):
    """H5: the next node may write as soon as this call has returned, so not a moment earlier."""
    monkeypatch.setattr(controller_volumes, "FENCE_TIMEOUT_S", 0.2)
    volume = await world.create()
    await world.publish(volume.volume_id, "n1")
    world.rest.fencing = False
    with pytest.raises(DeadlineExceeded, match="shut out"):
        await world.unpublish(volume.volume_id, "n1")
    # The attachment is out of the spec by now: a repeated call must wait all the same.
    with pytest.raises(DeadlineExceeded, match="shut out"):
        await world.unpublish(volume.volume_id, "n1")
    world.rest.fencing = True
    await world.unpublish(volume.volume_id, "n1")


async def test_a_fence_of_an_older_epoch_does_not_count(world: World, monkeypatch):
    monkeypatch.setattr(controller_volumes, "FENCE_TIMEOUT_S", 0.2)
    volume = await world.create()
    await world.publish(volume.volume_id, "n1")
    world.rest.fence_epoch = 0
    with pytest.raises(DeadlineExceeded):
        await world.unpublish(volume.volume_id, "n1")


async def test_what_is_in_use_is_not_deleted(world: World):
    volume = await world.create()
    await world.publish(volume.volume_id, "n1")
    with pytest.raises(FailedPrecondition, match="attached to n1"):
        await world.delete(volume.volume_id)
    await world.unpublish(volume.volume_id, "n1")
    await world.snapshot(volume.volume_id)
    with pytest.raises(FailedPrecondition, match="snap-1"):
        await world.delete(volume.volume_id)
    request = csi.DeleteSnapshotRequest(snapshot_id="snap-1")
    for _ in range(3):
        await world.service.DeleteSnapshot(request, None)
    for _ in range(3):
        await world.delete(volume.volume_id)
    assert world.rest.volumes() == []


async def test_snapshots_are_cut_once_and_belong_to_their_volume(world: World):
    volume, other = await world.create(), await world.create("pvc-2")
    first = await world.snapshot(volume.volume_id)
    again = await world.snapshot(volume.volume_id)
    assert first == again
    assert first.ready_to_use
    assert first.source_volume_id == volume.volume_id
    with pytest.raises(AlreadyExists, match="of volume pvc-1"):
        await world.snapshot(other.volume_id)


async def test_a_deleted_snapshot_as_source_is_not_found(world: World):
    source = csi.VolumeContentSource(
        snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id="snap-9")
    )
    with pytest.raises(NotFound, match="snap-9"):
        await world.create(volume_content_source=source)


async def test_a_restore_is_at_least_as_large_as_its_source(world: World):
    volume = await world.create()
    await world.snapshot(volume.volume_id)
    source = csi.VolumeContentSource(
        snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id="snap-1")
    )
    with pytest.raises(OutOfRange, match="the source has"):
        await world.create("restored", size=4 * MIB, volume_content_source=source)
    restored = await world.create("restored", size=128 * MIB, volume_content_source=source)
    assert restored.content_source.snapshot.snapshot_id == "snap-1"


async def test_growth_waits_until_the_volume_has_grown(world: World):
    volume = await world.create()
    request = csi.ControllerExpandVolumeRequest(volume_id=volume.volume_id)
    request.capacity_range.required_bytes = 128 * MIB
    answer = await world.service.ControllerExpandVolume(request, None)
    assert answer.capacity_bytes == 128 * MIB
    assert answer.node_expansion_required
    request.volume_capability.CopyFrom(WRITER)
    request.volume_capability.access_mode.mode = MODE.MULTI_NODE_MULTI_WRITER
    with pytest.raises(InvalidArgument, match="MULTI_NODE_MULTI_WRITER"):
        await world.service.ControllerExpandVolume(request, None)
    request.volume_capability.CopyFrom(WRITER)
    request.capacity_range.required_bytes = 64 * MIB
    assert (await world.service.ControllerExpandVolume(request, None)).capacity_bytes == 128 * MIB


async def test_growth_beyond_a_nodes_room_is_refused_and_changes_nothing(world: World):
    volume, _ = await world.create(), await world.create("pvc-2", size=900 * MIB)
    request = csi.ControllerExpandVolumeRequest(volume_id=volume.volume_id)
    request.capacity_range.required_bytes = 128 * MIB
    with pytest.raises(OutOfRange, match=f"n2 has room for {124 * MIB} bytes"):
        await world.service.ControllerExpandVolume(request, None)
    sizes = sorted(v["spec"]["sizeBytes"] for v in world.rest.volumes())
    assert sizes == [64 * MIB, 900 * MIB]
    request.capacity_range.required_bytes = 124 * MIB
    grown = await world.service.ControllerExpandVolume(request, None)
    assert grown.capacity_bytes == 124 * MIB


async def test_lists_come_in_pages_and_bad_tokens_are_refused(world: World):
    for number in range(5):
        await world.create(f"pvc-{number}")
    seen: list[str] = []
    token = ""
    while True:
        request = csi.ListVolumesRequest(max_entries=2, starting_token=token)
        answer = await world.service.ListVolumes(request, None)
        seen += [entry.volume.volume_id for entry in answer.entries]
        token = answer.next_token
        if not token:
            break
    assert len(set(seen)) == 5
    with pytest.raises(Aborted, match="starting_token"):
        await world.service.ListVolumes(csi.ListVolumesRequest(starting_token="x"), None)


async def test_what_comes_and_goes_between_pages_hides_nothing_else(world: World):
    made = {(await world.create(f"pvc-{number}")).volume_id for number in range(6)}
    first = await world.service.ListVolumes(csi.ListVolumesRequest(max_entries=3), None)
    seen = [entry.volume.volume_id for entry in first.entries]
    for volume_id in seen:
        await world.delete(volume_id)
    await world.create("pvc-new")
    rest = await world.service.ListVolumes(
        csi.ListVolumesRequest(starting_token=first.next_token), None
    )
    listed = [entry.volume.volume_id for entry in rest.entries]
    assert made - set(seen) <= set(listed)
    assert not set(seen) & set(listed)
    assert len(first.next_token.encode()) <= 128


async def test_a_snapshot_is_found_by_its_id_and_only_by_that(world: World):
    volume = await world.create()
    made = await world.snapshot(volume.volume_id)
    found = await world.service.GetSnapshot(csi.GetSnapshotRequest(snapshot_id="snap-1"), None)
    assert found.snapshot == made
    for wrong in ("snap-2", "../volumes/pvc-1", "snap-1\n", "x" * 300, "a/status", "\u00fc"):
        with pytest.raises(NotFound):
            await world.service.GetSnapshot(csi.GetSnapshotRequest(snapshot_id=wrong), None)
        await world.service.DeleteSnapshot(csi.DeleteSnapshotRequest(snapshot_id=wrong), None)
        request = csi.ListSnapshotsRequest(snapshot_id=wrong)
        assert not (await world.service.ListSnapshots(request, None)).entries


async def test_the_snapshot_of_a_clone_is_nobodys(world: World):
    """The operator makes and drops it; a user who saw it could delete it under the clone."""
    volume = await world.create()
    made = await world.snapshot(volume.volume_id, "snap-9")
    stored = world.api.objects["/apis/tercet.io/v1alpha1/snapshots/snap-9"]
    stored["metadata"]["labels"] = {CLONE_LABEL: "pvc-1"}
    assert not (await world.service.ListSnapshots(csi.ListSnapshotsRequest(), None)).entries
    with pytest.raises(NotFound):
        await world.service.GetSnapshot(csi.GetSnapshotRequest(snapshot_id=made.snapshot_id), None)
    await world.service.DeleteSnapshot(csi.DeleteSnapshotRequest(snapshot_id="snap-9"), None)
    assert "/apis/tercet.io/v1alpha1/snapshots/snap-9" in world.api.objects
    await world.delete(volume.volume_id)  # nor does it hold up its volume's end


async def test_a_full_node_takes_no_further_volume(world: World):
    first, second = await world.create("pvc-1"), await world.create("pvc-2")
    driver = {"name": CSI_DRIVER, "nodeID": "n1", "allocatable": {"count": 1}}
    world.api.objects["/apis/storage.k8s.io/v1/csinodes/n1"] = {
        "metadata": {"name": "n1"},
        "spec": {"drivers": [{"name": "other", "allocatable": {"count": 9}}, driver]},
    }
    await world.publish(first.volume_id, "n1")
    await world.publish(first.volume_id, "n1")
    with pytest.raises(Exhausted, match="node n1 has 1 volumes and takes 1"):
        await world.publish(second.volume_id, "n1")
    await world.publish(second.volume_id, "n2")
    await world.unpublish(first.volume_id, "n1")
    await world.unpublish(second.volume_id, "n2")
    await world.publish(second.volume_id, "n1")


async def test_an_api_server_that_is_away_is_no_final_answer():
    """INTERNAL would be one: the caller would forget a volume that may have been made."""
    unreachable = refusal(Unreachable("POST /volumes: no answer"))
    assert unreachable is not None
    assert unreachable.code is grpc.StatusCode.UNAVAILABLE
    assert refusal(ValueError("a bug")) is None


async def test_capacity_is_what_the_fullest_needed_node_has(world: World):
    world.rest.add_node("n4", capacity_bytes=10 * MIB)
    request = csi.GetCapacityRequest(parameters={"replicas": "3"})
    before = (await world.service.GetCapacity(request, None)).available_capacity
    await world.create(size=64 * MIB)
    after = (await world.service.GetCapacity(request, None)).available_capacity
    assert before - after == 64 * MIB


async def test_two_calls_on_one_volume_do_not_overlap(world: World):
    world.rest.placing = False
    first = asyncio.create_task(world.create())
    await asyncio.sleep(0.05)
    with pytest.raises(Aborted):
        await world.create()
    world.rest.placing = True
    world.rest.kick.set()
    await first
