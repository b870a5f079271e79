"""Which replica is rebuilt where, and what becomes of the one that is replaced (M1, M2)."""

from __future__ import annotations

from operator_world import (
    NOW,
    config,
    entry,
    later,
    node,
    nodes,
    only,
    reason,
    serving,
    some_id,
    volume,
    world,
    written,
)

from tercet_api.coordination import Sighting
from tercet_api.objects import (
    Condition,
    ConditionStatus,
    ConfigState,
    Member,
    ReplicaPhase,
    Volume,
    VolumeReplica,
)
from tercet_operator import volume as volumes
from tercet_operator.actions import LookAgain, Notice, WriteStatus
from tercet_operator.world import World

OLD = some_id("replica on n1")


def without_n1(found: Volume, *more: Volume, gone_s: float = 700.0, count: int = 4) -> World:
    """A world in which n1 has been silent for so long."""
    made = world(*nodes(count), found, *more)
    made.sightings["n1"] = Sighting("seen", NOW.s - gone_s)
    return made


def decide(found: Volume, made: World):
    return volumes.decide(found, made, NOW)


def entries(actions) -> list[VolumeReplica]:
    return [VolumeReplica.model_validate(each) for each in written(actions)["replicas"]]


def on_the_way(state: ReplicaPhase = ReplicaPhase.REBUILDING, **more) -> Volume:
    """A volume whose replica on n1 is being rebuilt on n4."""
    replicas = [
        entry("n1", ReplicaPhase.UNREACHABLE),
        entry("n2", ReplicaPhase.IN_SYNC),
        entry("n3", ReplicaPhase.IN_SYNC),
        entry("n4", state, replaces=OLD),
    ]
    status = {"config": config("n1", "n2", "n3"), "replicas": replicas, **more}
    return serving("v", "n1", "n2", "n3", status=status)


def test_a_node_that_is_away_for_long_is_replaced():
    found = serving("v", "n1", "n2", "n3")
    actions = decide(found, without_n1(found))
    assert only(WriteStatus, actions).exact
    last = entries(actions)[-1]
    assert (last.node, last.state, last.replaces) == ("n4", ReplicaPhase.PLACED, OLD)
    assert last.replica is None, "the agent draws it"
    assert "n1 has not been ready for 700 s" in only(Notice, actions).message
    assert reason(actions, "Rebuilding") == "Rebuilding"


def test_before_that_nothing_is_done_but_to_look_again_in_time():
    found = serving("v", "n1", "n2", "n3")
    actions = decide(found, without_n1(found, gone_s=100.0))
    assert "replicas" not in written(actions)
    assert 499 < only(LookAgain, actions).after_s < 502


def test_an_operator_that_has_just_started_goes_by_the_condition():
    """It saw the Lease a moment ago, and the object says since when the node is not ready."""
    found = serving("v", "n1", "n2", "n3")
    made = without_n1(found, gone_s=1.0)
    said = Condition(
        type="Ready",
        status=ConditionStatus.FALSE,
        reason="LeaseExpired",
        last_transition_time=later(-650).text,
    )
    made.nodes["n1"].status.conditions.append(said)
    assert entries(decide(found, made))[-1].node == "n4"


def test_what_is_in_sync_stays_though_another_device_of_its_node_has_failed():
    found = serving("v", "n1", "n2", "n3")
    made = world(*nodes(4), found)
    said = Condition(
        type="Ready",
        status=ConditionStatus.FALSE,
        reason="DeviceFailed",
        last_transition_time=later(-3000).text,
    )
    made.nodes["n1"].status.conditions.append(said)
    assert "replicas" not in written(decide(found, made))
    found.status.replicas[0].state = ReplicaPhase.LAGGING
    assert entries(decide(found, made))[-1].replaces == OLD


def test_a_node_that_is_given_up_is_replaced_at_once_though_it_lives():
    found = serving("v", "n1", "n2", "n3")
    given_up = node("n1", metadata={"deletion_timestamp": "2026-11-20T00:00:00Z"})
    made = world(given_up, *nodes(4)[1:], found)
    last = entries(decide(found, made))[-1]
    assert (last.node, last.replaces) == ("n4", OLD)


def test_rather_a_dead_member_than_one_that_lives():
    found = serving("v", "n1", "n2", "n3")
    given_up = node("n2", metadata={"deletion_timestamp": "2026-11-20T00:00:00Z"})
    four = nodes(4)
    made = world(four[0], given_up, *four[2:], found)
    made.sightings["n1"] = Sighting("seen", NOW.s - 700)
    assert entries(decide(found, made))[-1].replaces == OLD


def test_one_change_at_a_time_for_a_volume():
    found = on_the_way()
    made = without_n1(found, count=5)
    made.nodes["n2"] = node("n2", metadata={"deletion_timestamp": "2026-11-20T00:00:00Z"})
    actions = decide(found, made)
    assert "replicas" not in written(actions)
    assert reason(actions, "Rebuilding") == "Rebuilding"


def test_no_more_than_so_many_at_once_in_all():
    found, other = serving("v", "n1", "n2", "n3"), on_the_way()
    other = other.model_copy(update={"metadata": volume("w").metadata})
    made = without_n1(found, other)
    made.rebuilds_max = 1
    actions = decide(found, made)
    assert "replicas" not in written(actions)
    assert reason(actions, "Rebuilding") == "RebuildQueued"
    made.rebuilds_max = 2
    assert entries(decide(found, made))[-1].node == "n4"


def test_without_another_node_it_says_why():
    found = serving("v", "n1", "n2", "n3")
    actions = decide(found, without_n1(found, count=3))
    assert "replicas" not in written(actions)
    assert reason(actions, "Rebuilding") == "Unplaceable"


def test_two_of_three_lost_are_not_replaced():
    """M1: the old set's majority has to agree; a new set without it would have lost commits."""
    found = serving("v", "n1", "n2", "n3")
    made = without_n1(found, count=6)
    made.sightings["n2"] = Sighting("seen", NOW.s - 700)
    actions = decide(found, made)
    assert "replicas" not in written(actions)
    assert reason(actions, "Rebuilding") == "NoMajority"


def test_the_newcomer_is_spread_from_those_that_stay():
    found = serving("v", "n1", "n2", "n3", placement={"topology_key": "zone"})
    made = world(*nodes(3), node("n4", topology={"zone": "z2"}), found)
    made.nodes["n5"] = node("n5", gib=1, topology={"zone": "z1"})
    made.sightings["n5"] = made.sightings["n4"]
    made.sightings["n1"] = Sighting("seen", NOW.s - 700)
    assert entries(decide(found, made))[-1].node == "n5", "z1 is free when n1 has gone"


def test_a_member_that_is_well_again_stays_and_the_newcomer_goes():
    found = on_the_way()
    found.status.replicas[0] = entry("n1", ReplicaPhase.IN_SYNC)
    made = world(*nodes(4), found)
    left = entries(decide(found, made))
    assert [e.state for e in left if e.node == "n4"] == [ReplicaPhase.FORMER]
    assert left[-1].replaces is None
    # Back, and not in sync yet: it goes on.
    found.status.replicas[0] = entry("n1", ReplicaPhase.LAGGING)
    assert "replicas" not in written(decide(found, made))


def test_once_both_sets_count_it_is_not_taken_back_here():
    both = config("n4", "n2", "n3", epoch=2, state=ConfigState.RECOVERING)
    both.previous_members = [Member(node="n1", replica=OLD), *both.members[1:]]
    found = on_the_way(config=both)
    found.status.replicas[0] = entry("n1", ReplicaPhase.IN_SYNC)
    actions = decide(found, world(*nodes(4), found))
    assert "replicas" not in written(actions)
    assert reason(actions, "Rebuilding") == "MembersChange"


def test_a_newcomer_whose_node_goes_away_is_given_up():
    found = on_the_way()
    made = without_n1(found)
    made.sightings["n4"] = Sighting("seen", NOW.s - 700)
    left = entries(decide(found, made))
    assert [(e.node, e.state) for e in left][-1] == ("n4", ReplicaPhase.FORMER)
    # Before its agent has answered it is waited for half a minute only.
    found.status.replicas[3] = entry("n4", ReplicaPhase.PLACED, replaces=OLD)
    made.sightings["n4"] = Sighting("seen", NOW.s - 31)
    assert {e.node for e in entries(decide(found, made))} == {"n1", "n2", "n3"}


def test_after_the_change_the_old_one_is_former_until_it_is_deleted():
    found = on_the_way(config=config("n4", "n2", "n3", epoch=2))
    made = without_n1(found)
    actions = decide(found, made)
    states = {e.node: (e.state, e.replaces) for e in entries(actions)}
    assert states["n1"] == (ReplicaPhase.FORMER, None)
    assert states["n4"] == (ReplicaPhase.REBUILDING, None)
    assert "Replaced" in [a.reason for a in actions if isinstance(a, Notice)]
    # Nothing more is written for it while its node is away.
    found.status.replicas = entries(actions)
    assert "replicas" not in written(decide(found, made))
    # Its agent has deleted it: forgotten.
    found.status.replicas[0].state = ReplicaPhase.DELETED
    assert {e.node for e in entries(decide(found, made))} == {"n2", "n3", "n4"}


def test_a_former_replica_of_a_node_that_is_given_up_and_silent_is_forgotten():
    """Or the StorageNode would wait for ever for an agent that is no more."""
    found = on_the_way(config=config("n4", "n2", "n3", epoch=2))
    found.status.replicas[0] = entry("n1", ReplicaPhase.FORMER)
    found.status.replicas[3] = entry("n4", ReplicaPhase.IN_SYNC)
    made = without_n1(found)
    assert "replicas" not in written(decide(found, made))
    made.nodes["n1"] = node("n1", metadata={"deletion_timestamp": "2026-11-20T00:00:00Z"})
    assert {e.node for e in entries(decide(found, made))} == {"n2", "n3", "n4"}


def test_one_that_could_not_be_made_is_tried_elsewhere():
    found = on_the_way()
    found.status.replicas[3] = VolumeReplica(
        node="n4", state=ReplicaPhase.FAILED, message="no space", replaces=OLD
    )
    left = entries(decide(found, without_n1(found, count=5)))
    assert (left[-1].node, left[-1].replaces) == ("n5", OLD)
