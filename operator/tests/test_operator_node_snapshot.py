"""What a StorageNode and a Snapshot need next, conditions and events, and what the world keeps."""

from __future__ import annotations

from operator_world import (
    GIB,
    NOW,
    entry,
    later,
    new,
    node,
    nodes,
    only,
    reason,
    serving,
    snapshot,
    some_id,
    volume,
    world,
    written,
)

from tercet_api.coordination import Sighting
from tercet_api.objects import DeviceState, DeviceStatus, ReplicaPhase, Snapshot, Source
from tercet_operator import snapshot as snapshots
from tercet_operator import storagenode
from tercet_operator.actions import Adopt, LookAgain, Notice, Release, Severity, WriteStatus
from tercet_operator.conditions import Verdict, merged, notices
from tercet_operator.world import newer

DELETED_AT = "2026-11-20T12:00:00Z"


# ------------------------------------------------------------------ StorageNode


def test_node_ready_and_how_full() -> None:
    """From its Lease and its report; looked at again just when the Lease would expire."""
    found = node("n1", gib=100, status={"allocated_bytes": 25 * GIB})
    there = world(found)
    there.sightings["n1"] = Sighting("seen", NOW.s + 7.0)
    actions = storagenode.decide(found, there, NOW)
    members = written(actions)
    assert (members["phase"], members["usedPercent"]) == ("Ready", 25)
    assert 7.0 < only(LookAgain, actions).after_s < 7.2
    assert only(Notice, actions).reason == "Ready"


def test_node_expires() -> None:
    """One look after the Lease's end is enough."""
    found = node("n1")
    there = world(found)
    there.sightings["n1"] = Sighting("seen", NOW.s + 7.0)
    assert reason(storagenode.decide(found, there, later(6.9)), "Ready") == "Ready"
    late = storagenode.decide(found, there, later(7.0))
    assert (reason(late, "Ready"), written(late)["phase"]) == ("LeaseExpired", "NotReady")
    assert only(Notice, late).severity is Severity.WARNING


def test_node_words() -> None:
    """Each state has its reason and its phase."""
    broken = DeviceStatus(id="d1", state=DeviceState.FAILED, message="EIO at 4096")
    unheard = world(node("n1"))
    unheard.sightings.clear()
    cases = [
        (node("n1"), unheard, "NoLease", "NotReady"),
        (node("n1", status={"instance": None}), None, "NoEngine", "Pending"),
        (node("n1", status={"devices": [broken]}), None, "DeviceFailed", "NotReady"),
        (node("n1", cordoned=True), None, "Ready", "Cordoned"),
        (node("n1", drained=True), None, "Ready", "Cordoned"),
    ]
    for found, there, why, phase in cases:
        actions = storagenode.decide(found, there or world(found), NOW)
        assert (reason(actions, "Ready"), written(actions)["phase"]) == (why, phase)
    said = written(storagenode.decide(cases[2][0], world(cases[2][0]), NOW))["conditions"]
    assert "EIO at 4096" in said[0]["message"]


def test_node_finalizer() -> None:
    """On while it lives; off when no volume names a replica there, not even a failed one."""
    bare = node("n1", metadata={"finalizers": []})
    assert storagenode.decide(bare, world(bare), NOW) == [Adopt()]
    going = node("n1", metadata={"deletion_timestamp": DELETED_AT})
    keeper = serving("v", "n1", "n2")
    held = storagenode.decide(going, world(going, keeper), NOW)
    assert reason(held, "Deleting") == "HasReplicas"
    keeper.status.replicas[0].state = ReplicaPhase.DELETED
    assert storagenode.decide(going, world(going, keeper), NOW) == [Release()]
    assert storagenode.decide(going, world(going), NOW) == [Release()]


# ------------------------------------------------------------------ Snapshot


def test_snapshot_phase_follows_its_primary() -> None:
    """The agent says ready; the operator says the word and the event."""
    parent = serving("v", "n1")
    bare = snapshot("s", parent, finalizers=[])
    assert snapshots.decide(bare, world(parent, bare), NOW) == [Adopt()]
    waiting = snapshot("s", parent, ready=False)
    assert snapshots.decide(waiting, world(parent, waiting), NOW) == [
        WriteStatus({"phase": "Pending"})
    ]
    ready = snapshot("s", parent, status={"epoch": 3, "lsn": 14})
    actions = snapshots.decide(ready, world(parent, ready), NOW)
    assert written(actions) == {"phase": "Ready"}
    assert only(Notice, actions).reason == "SnapshotReady"


def test_snapshot_of_nothing() -> None:
    """There is no primary that could say so: the operator does, without overwriting an agent."""
    lost = Snapshot.model_validate(
        {"metadata": snapshot("s", volume()).metadata, "spec": {"volume": "x"}}
    )
    actions = snapshots.decide(lost, world(lost), NOW)
    assert reason(actions, "Ready") == "NoVolume"
    assert only(WriteStatus, actions).exact


def test_snapshot_deletion() -> None:
    """Allowed, then done by the primary's agent, then released; or its volume is gone."""
    parent = serving("v", "n1")
    going = snapshot("s", parent, deletion_timestamp=DELETED_AT)
    assert written(snapshots.decide(going, world(parent, going), NOW)) == {"phase": "Deleting"}
    going.status.deleted = True
    assert snapshots.decide(going, world(parent, going), NOW) == [Release()]
    going.status.deleted = False
    assert snapshots.decide(going, world(going), NOW) == [Release()]
    another = serving("v", "n1", uuid=some_id("another"))
    assert snapshots.decide(going, world(another, going), NOW) == [Release()]


def test_snapshot_is_kept_for_a_clone_that_is_being_made() -> None:
    """Its blocks are shared only when the clone's replicas are made."""
    parent = serving("v", "n1")
    going = snapshot("s", parent, deletion_timestamp=DELETED_AT)
    clone = new("c", source=Source(snapshot="s"))
    clone.status.replicas = [entry("n1", ReplicaPhase.PLACED)]
    actions = snapshots.decide(going, world(parent, going, clone), NOW)
    assert reason(actions, "Deleting") == "Cloning"
    done = serving("c", "n1", source=Source(snapshot="s"))
    actions = snapshots.decide(going, world(parent, going, done), NOW)
    assert written(actions) == {"phase": "Deleting"}
    # It is served, and a replica still awaits the snapshot on its node (S3).
    done.status.replicas = [entry("n1", ReplicaPhase.REBUILDING)]
    actions = snapshots.decide(going, world(parent, going, done), NOW)
    assert reason(actions, "Deleting") == "Cloning"


# ------------------------------------------------------------------ conditions, world


def test_transition_times_move_with_the_status_only() -> None:
    """A new reason is no transition; a new status is."""
    one = Verdict("Ready", False, "Creating", "", True)
    first = merged([], [one], NOW, 1)
    second = merged(first, [Verdict("Ready", False, "Unplaceable", "x", False)], later(9), 2)
    assert second[0].last_transition_time == first[0].last_transition_time
    assert (second[0].reason, second[0].observed_generation) == ("Unplaceable", 2)
    third = merged(second, [Verdict("Ready", True, "Serving", "", True)], later(20), 2)
    assert third[0].last_transition_time == later(20).text


def test_one_event_for_one_cause() -> None:
    """Two conditions that turn for the same reason are told once; others' are not touched."""
    both = [
        Verdict("Placed", False, "Unplaceable", "no room", False),
        Verdict("Ready", False, "Unplaceable", "no room", False),
    ]
    assert notices([], both) == [Notice("Unplaceable", "no room", Severity.WARNING)]
    assert notices(merged([], both, NOW, 1), both) == []


def test_an_older_version_does_not_replace_a_newer() -> None:
    """A watch may tell of a write after its answer did."""
    old, young = node("n1"), node("n1")
    young.metadata.resource_version = "10"
    old.metadata.resource_version = "9"
    assert not newer(young, old)
    assert newer(old, young)
    other = node("n1", metadata={"uid": some_id("made again"), "resource_version": "3"})
    assert newer(young, other), "another object of the same name"
    assert nodes(1)[0].name == "n1"
