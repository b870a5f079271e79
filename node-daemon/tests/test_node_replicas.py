"""What this node owes an object about its replica: T9, deletion by id, crash windows."""

from __future__ import annotations

from node_objects import GIB, VOLUME, config, entry, held, replica_id, snapshot, volume

from tercet_api.objects import ReplicaPhase, Source
from tercet_node.replicas import Create, Delete, Report, Wait, created, decide, patch


def test_placed_replica_is_made():
    step = decide(volume(entry("b", "Created"), entry("a", "Placed", named=False)), "a", None, {})
    assert isinstance(step, Create)
    assert (step.index, step.request.volume, step.request.size_bytes) == (1, VOLUME, GIB)
    assert not step.request.HasField("source")


def test_only_what_is_placed_here_is_made():
    for found in (
        volume(entry("b", "Placed", named=False)),
        volume(entry("a", "Failed", named=False)),
        volume(entry("a", "Created")),
        volume(),
    ):
        assert decide(found, "a", None, {}) is None


def test_no_empty_replica_is_made_for_a_volume_that_has_a_config():
    """T9: a wiped node's replica comes back as a learner only."""
    found = volume(entry("a", "Placed", named=False), config=config("a", "b", "c"))
    assert isinstance(decide(found, "a", None, {}), Wait)
    # A config that names the node, without any placement, makes nothing either.
    assert decide(volume(config=config("a")), "a", None, {}) is None


def test_clone_starts_from_the_snapshot_of_its_source():
    source = Source(snapshot="s")
    found = volume(entry("a", "Placed", named=False), source=source)
    origin = "33333333-3333-4333-8333-333333333333"
    ready = snapshot(ready_to_use=True, volume_uuid=origin, epoch=3, lsn=17)
    step = decide(found, "a", None, {"s": ready})
    assert isinstance(step, Create)
    asked = step.request.source
    assert (asked.volume, asked.snapshot, asked.epoch, asked.lsn) == (origin, "s-uid", 3, 17)
    assert isinstance(decide(found, "a", None, {"s": snapshot()}), Wait)
    for gone in ({}, {"s": snapshot(deleting=True, ready_to_use=True, volume_uuid=origin)}):
        step = decide(found, "a", None, gone)
        assert isinstance(step, Report)
        assert step.entry.state is ReplicaPhase.FAILED
        assert "no Snapshot s" in step.entry.message
    # A volume as the source: the operator makes a Snapshot of it for this clone.
    found = volume(entry("a", "Placed", named=False), source=Source(volume="parent"), uid="u7")
    step = decide(found, "a", None, {"clone-u7": ready})
    assert isinstance(step, Create)
    assert step.request.source.snapshot == "s-uid"


def test_clone_that_awaits_its_snapshot_is_rebuilding_until_it_has_it():
    """S3: no copy before the snapshot is applied here; with a config the primary says how it is."""
    made = created(entry("a", "Placed", named=False), replica_id("a"), incomplete=True)
    assert (made.state, made.replica) == (ReplicaPhase.REBUILDING, replica_id("a"))
    waiting = held("a")
    waiting.incomplete = True
    assert decide(volume(made), "a", waiting, {}) is None
    assert decide(volume(made), "a", None, {}) is None, "its engine has said nothing yet"
    assert decide(volume(made, config=config("a")), "a", held("a"), {}) is None
    stranger = held("a", replica="99999999-9999-4999-8999-999999999999")
    assert decide(volume(made), "a", stranger, {}) is None
    step = decide(volume(made), "a", held("a"), {})
    assert isinstance(step, Report)
    assert (step.entry.state, step.entry.message) == (ReplicaPhase.CREATED, "")


def test_deletion_goes_by_the_id_that_the_object_names():
    found = volume(entry("b", "InSync"), entry("a", "InSync"), deleting=True)
    step = decide(found, "a", held("a"), {})
    assert isinstance(step, Delete)
    assert (step.replica, step.index) == (replica_id("a"), 1)
    assert step.entry.state is ReplicaPhase.DELETED


def test_nothing_is_deleted_without_the_deletion_timestamp():
    found = volume(entry("a", "InSync"), config=config("a"))
    assert decide(found, "a", held("a"), {}) is None


def test_nothing_is_deleted_before_the_operator_allows_it():
    found = volume(entry("a", "InSync"), deleting=True, phase="Ready")
    assert isinstance(decide(found, "a", held("a"), {}), Wait)


def test_replica_of_another_id_is_not_deleted():
    """An orphan under the same UUID and name: the object does not name it."""
    found = volume(entry("a", "Deleted"), deleting=True)
    stranger = held("a", replica="99999999-9999-4999-8999-999999999999")
    assert decide(found, "a", stranger, {}) is None


def test_replica_made_but_not_reported_is_named_before_it_is_deleted():
    found = volume(entry("a", "Placed", named=False), deleting=True)
    step = decide(found, "a", held("a"), {})
    assert isinstance(step, Report)
    assert (step.entry.replica, step.entry.state) == (replica_id("a"), ReplicaPhase.CREATED)


def test_placement_that_was_never_carried_out_is_deleted_at_once():
    for state in ("Placed", "Failed"):
        step = decide(volume(entry("a", state, named=False), deleting=True), "a", None, {})
        assert isinstance(step, Report)
        assert (step.entry.replica, step.entry.state) == (None, ReplicaPhase.DELETED)


def test_member_that_the_list_lost_is_deleted_and_reported():
    found = volume(entry("b", "Deleted"), deleting=True, config=config("a", "b"))
    step = decide(found, "a", held("a"), {})
    assert isinstance(step, Delete)
    assert (step.replica, step.index) == (replica_id("a"), None)
    operations = patch(found, step.index, step.entry)
    assert operations[-1]["path"] == "/status/replicas/-"


def test_patch_tests_what_was_decided_upon():
    found = volume(entry("a", "Placed", named=False))
    operations = patch(found, 0, entry("a", "Created"))
    tested = {op["path"]: op["value"] for op in operations if op["op"] == "test"}
    assert tested == {
        "/metadata/uid": "u1",
        "/status/replicas/0/node": "a",
        "/status/replicas/0/state": "Placed",
        "/status/replicas/0/replica": None,
    }
