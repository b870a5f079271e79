"""What the agent of a serving primary says, and that it says nothing for anybody else."""

from __future__ import annotations

import pytest
from node_objects import GIB, config, entry, fence, member, serving, snapshot, volume

from tercet_node import convert, primary, snapshots


def applied(found, patch):
    return {op["path"]: op["value"] for op in patch.operations if op["op"] != "test"}


def entries(*states):
    return [entry(node, state) for node, state in zip("abc", states, strict=True)]


def test_states_of_replicas_as_the_primary_sees_them():
    found = volume(*entries("Created", "Created", "Created"), config=config(), size_bytes=GIB)
    seen = serving(
        members=[member("b", in_sync=True), member("c", in_sync=False, lag_bytes=9)],
        links={"b": True, "c": True},
    )
    patch = primary.status_patch(found, seen)
    assert patch is not None
    assert patch.urgent
    values = applied(found, patch)
    assert values["/status/sizeBytes"] == GIB
    states = [values[f"/status/replicas/{i}"]["state"] for i in range(3)]
    assert states == ["InSync", "InSync", "Lagging"]
    assert values["/status/replicas/2"]["lagBytes"] == 9
    tested = {op["path"] for op in patch.operations if op["op"] == "test"}
    assert {"/status/config/epoch", "/status/config/primary"} <= tested


def test_replica_behind_a_cut_link_is_unreachable():
    found = volume(*entries("InSync", "InSync", "InSync"), config=config())
    seen = serving(members=[member("b", in_sync=True)], links={"b": True, "c": False})
    patch = primary.status_patch(found, seen)
    assert applied(found, patch)["/status/replicas/2"]["state"] == "Unreachable"


def test_member_that_is_no_copy_is_rebuilding():
    """S3, R1: it counts in no commit."""
    found = volume(*entries("InSync", "InSync", "Created"), config=config())
    incomplete = member("c", in_sync=False, incomplete=True)
    seen = serving(members=[member("b", in_sync=True), incomplete], links={"b": True, "c": True})
    patch = primary.status_patch(found, seen)
    assert applied(found, patch)["/status/replicas/2"]["state"] == "Rebuilding"


def test_nothing_to_say_when_all_is_said():
    found = volume(*entries("InSync", "InSync", "InSync"), config=config(), size_bytes=GIB)
    found.status.size_bytes = GIB
    everyone = [member("b", in_sync=True), member("c", in_sync=True)]
    assert primary.status_patch(found, serving(members=everyone)) is None
    # Figures alone are not urgent.
    moved = primary.status_patch(found, serving(members=everyone, allocated_bytes=7))
    assert moved is not None
    assert not moved.urgent


@pytest.mark.parametrize(
    ("found", "seen"),
    [
        (volume(), serving()),
        (volume(config=config(epoch=2)), serving(epoch=1)),
        (volume(config=config(primary="b")), serving()),
    ],
)
def test_who_is_not_the_primary_of_the_config_does_not_speak_for_it(found, seen):
    assert not primary.leads(found, seen)


def test_own_lease_is_needed_to_speak():
    seen = serving()
    seen.replica.serving = False
    assert not primary.leads(volume(config=config()), seen)
    assert primary.leads(volume(config=config()), serving())


def test_growth_only_upwards():
    assert primary.grow_to(volume(size_bytes=2 * GIB), serving()) == 2 * GIB
    assert primary.grow_to(volume(size_bytes=GIB), serving()) is None
    assert primary.grow_to(volume(size_bytes=2 * GIB, deleting=True), serving()) is None


# ------------------------------------------------------------------ H5


def test_fence_is_due_for_each_generation_in_each_epoch():
    assert primary.fence_due(volume(config=config(), generation=3))
    assert primary.fence_due(volume(config=config(), generation=3, fence=fence(1, 2)))
    assert not primary.fence_due(volume(config=config(), generation=3, fence=fence(1, 3)))
    assert primary.fence_due(volume(config=config(epoch=2), generation=3, fence=fence(1, 3)))
    assert not primary.fence_due(volume(generation=3))


def test_fence_is_written_only_in_its_own_epoch_and_never_backwards():
    found = volume(config=config(epoch=2), generation=5, fence=fence(2, 4))
    assert primary.fence_patch(found, fence(1, 5)) is None
    assert primary.fence_patch(found, fence(2, 3)) is None
    assert primary.fence_patch(volume(config=config(epoch=2), generation=5), fence(1, 5)) is None
    operations = primary.fence_patch(found, fence(2, 5))
    assert operations is not None
    assert operations[-1]["value"] == {"epoch": 2, "generation": 5}
    tested = {op["path"]: op["value"] for op in operations if op["op"] == "test"}
    assert tested["/status/config/epoch"] == 2


def test_engine_is_asked_once_for_each_generation():
    found = volume(config=config(), generation=3)
    assert primary.fence_asked(found, fence(1, 2))
    assert not primary.fence_asked(found, fence(1, 3))
    consistent = convert.volume_view(found, consistent=True)
    cached = convert.volume_view(found, consistent=False)
    older = convert.volume_view(volume(config=config(), generation=2), consistent=True)
    assert primary.shown_for_fence(found, consistent)
    assert not primary.shown_for_fence(found, cached), "T7: never from a watch's cache"
    assert not primary.shown_for_fence(found, older)
    assert not primary.shown_for_fence(found, None)


# ------------------------------------------------------------------ snapshots


def test_snapshot_is_taken_once_and_not_without_its_finalizer():
    assert snapshots.decide(snapshot(), volume()) == snapshots.Take()
    assert snapshots.decide(snapshot(finalizer=False), volume()) is None
    assert snapshots.decide(snapshot(ready_to_use=True), volume()) is None
    assert snapshots.decide(snapshot(), volume(deleting=True)) is None


def test_snapshot_of_a_volume_that_once_had_the_name_is_left_alone():
    other = "33333333-3333-4333-8333-333333333333"
    assert snapshots.decide(snapshot(deleting=True, volume_uuid=other), volume()) is None


def test_snapshot_is_dropped_until_that_is_said():
    assert snapshots.decide(snapshot(deleting=True), volume()) == snapshots.Drop()
    waiting = snapshot(deleting=True, phase="Pending")
    assert snapshots.decide(waiting, volume()) is None, "a clone may be about to start from it"
    assert snapshots.decide(snapshot(deleting=True, deleted=True), volume()) is None


def test_patch_of_a_snapshot_is_for_one_version_of_one_object():
    patch = snapshots.taken(
        snapshot(),
        "11111111-1111-4111-8111-111111111111",
        epoch=2,
        lsn=9,
        size_bytes=GIB,
        asked_at="2026-11-20T00:00:00Z",
    )
    assert patch["metadata"] == {"uid": "s-uid", "resourceVersion": "5"}
    assert (patch["status"]["epoch"], patch["status"]["lsn"]) == (2, 9)
    assert patch["status"]["readyToUse"] is True
    assert "phase" not in patch["status"], "the operator's"
