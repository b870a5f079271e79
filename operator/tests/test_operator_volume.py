"""What a volume needs next: each test is a moment of its life."""

from __future__ import annotations

from typing import Any

from operator_world import (
    GIB,
    NOW,
    config,
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

from tercet_api.names import clone_snapshot
from tercet_api.objects import (
    Attachment,
    Condition,
    ConditionStatus,
    ConfigState,
    Orphan,
    Placement,
    ReplicaPhase,
    Source,
)
from tercet_operator.actions import (
    Adopt,
    DropCloneSnapshot,
    LookAgain,
    MakeCloneSnapshot,
    Notice,
    Release,
    Severity,
    SwapFirst,
    WriteStatus,
)
from tercet_operator.volume import decide

DELETED_AT = "2026-11-20T12:00:00Z"


def said(kind: str, status: ConditionStatus, why: str, ago_s: float = 0.0) -> Condition:
    """A condition that somebody wrote some time ago."""
    return Condition(type=kind, status=status, reason=why, last_transition_time=later(-ago_s).text)


# ------------------------------------------------------------------ is it new


def test_first_the_finalizer() -> None:
    """Nothing is made of an object that could vanish unseen."""
    assert decide(volume(metadata={"finalizers": []}), world(*nodes()), NOW) == [Adopt()]
    assert decide(volume(uuid=None), world(*nodes()), NOW) == [Adopt()]


def test_new_by_its_creators_word() -> None:
    """newUid is this object's uid: placed at once, on three nodes, each Placed."""
    wanted = new()
    actions = decide(wanted, world(*nodes(), wanted), NOW)
    write = only(WriteStatus, actions)
    assert write.exact, "others write status.replicas too"
    assert [(e["node"], e["state"]) for e in write.members["replicas"]] == [
        ("n1", "Placed"),
        ("n2", "Placed"),
        ("n3", "Placed"),
    ]


def test_the_word_of_another_object_counts_for_nothing() -> None:
    """A backup of a Volume brings newUid along: it is that of the object it was taken from."""
    wanted = volume(status={"new_uid": some_id("another object")})
    silent = node("n3", status={"orphans_instance": None})
    actions = decide(wanted, world(node("n1"), node("n2"), silent, wanted), NOW)
    assert reason(actions, "Placed") == "OrphansUnknown"
    assert "n3" in written(actions)["conditions"][0]["message"]


def test_reports_of_an_earlier_instance_count_for_nothing() -> None:
    """An engine that has restarted has to say it again."""
    wanted = volume()
    restarted = node("n2", status={"orphans_instance": some_id("before")})
    actions = decide(wanted, world(node("n1"), restarted, wanted), NOW)
    assert reason(actions, "Placed") == "OrphansUnknown"


def test_a_dead_nodes_report_counts_for_nothing() -> None:
    """Nobody knows what a node holds that has fallen silent."""
    wanted = volume()
    actions = decide(wanted, world(*nodes(), wanted, dead=("n2",)), NOW)
    assert reason(actions, "Placed") == "OrphansUnknown"


def test_no_node_at_all_is_no_knowledge() -> None:
    """An empty cluster, or one whose StorageNodes are not restored yet."""
    wanted = volume()
    assert reason(decide(wanted, world(wanted), NOW), "Placed") == "OrphansUnknown"


def test_every_node_has_said_it() -> None:
    """Without a creator's word: placed once all have reported, and the object has settled."""
    wanted = volume()
    assert written(decide(wanted, world(*nodes(), wanted), NOW))["replicas"]
    fresh = volume(metadata={"creation_timestamp": later(-3).wall.isoformat()})
    actions = decide(fresh, world(*nodes(), fresh), NOW)
    assert "replicas" not in written(actions)
    assert only(LookAgain, actions).after_s > 0


def test_no_news_of_the_very_young() -> None:
    """Between the two requests of the CSI controller nothing is worth a word."""
    fresh = volume(metadata={"creation_timestamp": NOW.wall.isoformat()})
    assert [type(a) for a in decide(fresh, world(*nodes(), fresh), NOW)] == [LookAgain]


def test_orphans_stand_against_every_word() -> None:
    """By UUID or by name, and even when newUid says otherwise (a restored API server)."""
    for orphan in (
        Orphan(volume=some_id("uuid of v"), name="x", replica=some_id("r")),
        Orphan(volume=some_id("other"), name="v", replica=some_id("r")),
    ):
        for wanted in (new(), volume()):
            holder = node("n2", status={"orphans": [orphan]})
            actions = decide(wanted, world(node("n1"), holder, node("n3"), wanted), NOW)
            assert reason(actions, "Placed") == "OrphansFound"
            assert "tercet volume adopt" in written(actions)["conditions"][0]["message"]


# ------------------------------------------------------------------ making it


def test_unplaceable_is_said() -> None:
    """The word that the CSI controller waits for, with the reason for each node."""
    wanted = new(size_bytes=200 * GIB)
    actions = decide(wanted, world(*nodes(), wanted), NOW)
    assert reason(actions, "Ready") == "Unplaceable"
    notice = only(Notice, actions)
    assert notice.severity is Severity.WARNING
    assert "has room for" in notice.message


def test_said_once() -> None:
    """Level-triggered is not noisy: what status says already is not written again."""
    wanted = new(size_bytes=200 * GIB)
    there = world(*nodes(), wanted)
    status = written(decide(wanted, there, NOW))
    again = wanted.model_copy(
        update={"status": wanted.status.model_validate({**wanted.status.to_json(), **status})}
    )
    there.volumes["v"] = again
    assert decide(again, there, later(5)) == []


def test_a_refused_replica_goes_elsewhere() -> None:
    """The failed entry stays, so that the node is not asked again at once."""
    entries = [entry("n1"), entry("n2"), entry("n3", ReplicaPhase.FAILED, message="disk full")]
    wanted = new()
    wanted.status.replicas = entries
    actions = decide(wanted, world(*nodes(4), wanted), NOW)
    states = {e["node"]: e["state"] for e in written(actions)["replicas"]}
    assert states == {"n1": "Created", "n2": "Created", "n3": "Failed", "n4": "Placed"}


def test_failed_nodes_are_asked_again_later() -> None:
    """With no other node left, after a pause."""
    wanted = new()
    wanted.status.replicas = [entry("n1"), entry("n2"), entry("n3", ReplicaPhase.FAILED)]
    wanted.status.conditions = [said("Placed", ConditionStatus.FALSE, "Unplaceable", ago_s=10)]
    assert "replicas" not in written(decide(wanted, world(*nodes(), wanted), NOW))
    actions = decide(wanted, world(*nodes(), wanted), later(25))
    assert [e["node"] for e in written(actions)["replicas"]] == ["n1", "n2"]


def test_waits_for_every_report() -> None:
    """T9: no configuration before every member has its replica."""
    wanted = new()
    wanted.status.replicas = [entry("n1"), entry("n2"), entry("n3", ReplicaPhase.PLACED)]
    actions = decide(wanted, world(*nodes(), wanted), NOW)
    assert not [a for a in actions if isinstance(a, SwapFirst)]
    assert reason(actions, "Ready") == "Creating"


def test_a_node_that_went_away_before_it_answered() -> None:
    """It keeps its placement for a while; then the volume goes elsewhere."""
    wanted = new()
    wanted.status.replicas = [entry("n1"), entry("n2"), entry("n3", ReplicaPhase.PLACED)]
    wanted.status.conditions = [said("Placed", ConditionStatus.TRUE, "Placed", ago_s=10)]
    there = world(*nodes(4), wanted, dead=("n3",))
    assert isinstance(decide(wanted, there, NOW)[0], LookAgain)
    states = [e["state"] for e in written(decide(wanted, there, later(25)))["replicas"]]
    assert states == ["Created", "Created", "Failed"]


def test_the_first_configuration() -> None:
    """{1, Recovering}, primary with its present instance, members by replica id, where to go."""
    wanted = new()
    wanted.status.replicas = [
        entry("n1"),
        entry("n4", ReplicaPhase.FAILED),
        entry("n2"),
        entry("n3"),
    ]
    swap = only(SwapFirst, decide(wanted, world(*nodes(4), wanted), NOW))
    assert swap.config == config("n1", "n2", "n3", state=ConfigState.RECOVERING)
    paths = [(each["op"], each["path"]) for each in swap.also]
    assert ("remove", "/status/replicas/1") in paths
    tests = {each["path"]: each["value"] for each in swap.also if each["op"] == "test"}
    assert tests["/status/replicas/0/replica"] == some_id("replica on n1")
    (put_endpoints,) = [each for each in swap.also if each["path"] == "/status/endpoints"]
    assert [place["address"] for place in put_endpoints["value"]] == [
        "127.0.1.1",
        "127.0.1.2",
        "127.0.1.3",
    ]


def test_who_leads_first() -> None:
    """The preferred node, else where it is attached, else the first; but only who is there."""
    host = Attachment(node_name="n3", host_nqn="nqn.2026-11.io.tercet:host:x")
    cases: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
        ({"placement": Placement(preferred_node="n2"), "attachments": [host]}, (), "n2"),
        ({"attachments": [host]}, (), "n3"),
        ({}, (), "n1"),
        ({}, ("n1",), "n2"),
    ]
    for spec, dead, leads in cases:
        wanted = new(**spec)
        wanted.status.replicas = [entry("n1"), entry("n2"), entry("n3")]
        swap = only(SwapFirst, decide(wanted, world(*nodes(), wanted, dead=dead), NOW))
        assert swap.config.primary.node == leads


def test_clone_of_a_snapshot_goes_to_its_holders() -> None:
    """S3: exactly the nodes that hold it, and a majority of them complete."""
    parent = serving("p", "n2", "n3", "n4")
    taken = snapshot("s", parent)
    wanted = new("c", source=Source(snapshot="s"))
    there = world(*nodes(5), parent, taken, wanted)
    assert {e["node"] for e in written(decide(wanted, there, NOW))["replicas"]} == {
        "n2",
        "n3",
        "n4",
    }
    behind = ReplicaPhase.REBUILDING
    wanted.status.replicas = [entry("n2"), entry("n3", behind), entry("n4", behind)]
    assert not [a for a in decide(wanted, there, NOW) if isinstance(a, SwapFirst)]
    wanted.status.replicas = [entry("n2"), entry("n3", behind), entry("n4")]
    assert [a for a in decide(wanted, there, NOW) if isinstance(a, SwapFirst)]
    # Who is no copy yet never leads, wherever the volume is wanted.
    wanted.spec.placement = Placement(preferred_node="n3")
    swap = only(SwapFirst, decide(wanted, there, NOW))
    assert swap.config.primary.node == "n2"


def test_bad_sources() -> None:
    """Each says what is wrong, and nothing is made."""
    parent = serving("p", "n1", "n2", "n3")
    taken = snapshot("s", parent)
    going = snapshot("d", parent, deletion_timestamp=DELETED_AT)
    early = snapshot("e", parent, ready=False)
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("none", {"source": Source(snapshot="x")}, "NoSource"),
        ("going", {"source": Source(snapshot="d")}, "NoSource"),
        ("early", {"source": Source(snapshot="e")}, "SourceNotReady"),
        ("small", {"source": Source(snapshot="s"), "size_bytes": GIB // 2}, "TooSmall"),
        ("nobody", {"source": Source(volume="x")}, "NoSource"),
    )
    for name, spec, why in cases:
        wanted = new(name, **spec)
        there = world(*nodes(), parent, taken, going, early, wanted)
        assert reason(decide(wanted, there, NOW), "Placed") == why, name


def test_clone_of_a_volume_takes_a_snapshot_of_its_own() -> None:
    """Made first, waited for, deleted when the clone is Ready."""
    parent = serving("p", "n1", "n2", "n3")
    wanted = new("c", source=Source(volume="p"))
    made = only(MakeCloneSnapshot, decide(wanted, world(*nodes(), parent, wanted), NOW))
    assert made == MakeCloneSnapshot(clone_snapshot(wanted.uid), "p")
    taken = snapshot(made.name, parent)
    placed = decide(wanted, world(*nodes(), parent, wanted, taken), NOW)
    assert len(written(placed)["replicas"]) == 3
    clone = serving("c", "n1", "n2", "n3", source=Source(volume="p"))
    actions = decide(clone, world(*nodes(), parent, clone, taken), NOW)
    assert only(DropCloneSnapshot, actions).name == made.name


# ------------------------------------------------------------------ how it is


def test_ready() -> None:
    """Active, its primary's very instance alive, a majority in sync."""
    found = serving("v", "n1", "n2", "n3")
    members = written(decide(found, world(*nodes(), found), NOW))
    assert (members["phase"], members["copies"]) == ("Ready", "3/3")


def test_what_makes_it_unavailable_or_degraded() -> None:
    """Each with its reason; the operator says it and does nothing about the primary."""
    base = serving("v", "n1", "n2", "n3")
    recovering = base.model_copy(deep=True)
    recovering.status.config = config("n1", "n2", "n3", state=ConfigState.RECOVERING)
    alone = base.model_copy(deep=True)
    alone.status.replicas = [
        entry("n1", ReplicaPhase.IN_SYNC),
        entry("n2", ReplicaPhase.UNREACHABLE),
        entry("n3", ReplicaPhase.LAGGING),
    ]
    restarted = node("n1", status={"instance": some_id("another start")})
    cases = [
        (base, world(*nodes(), base, dead=("n1",)), "PrimaryLost", "Unavailable"),
        (base, world(restarted, *nodes()[1:], base), "PrimaryLost", "Unavailable"),
        (recovering, world(*nodes(), recovering), "Recovering", "Unavailable"),
        (alone, world(*nodes(), alone), "NoMajority", "Unavailable"),
    ]
    for found, there, why, phase in cases:
        actions = decide(found, there, NOW)
        assert (reason(actions, "Ready"), written(actions)["phase"]) == (why, phase)
        assert {type(a) for a in actions} <= {WriteStatus, Notice, LookAgain}
    one_behind = base.model_copy(deep=True)
    one_behind.status.replicas[2].state = ReplicaPhase.LAGGING
    actions = decide(one_behind, world(*nodes(), one_behind), NOW)
    assert (written(actions)["phase"], written(actions)["copies"]) == ("Degraded", "2/3")
    assert reason(actions, "Degraded") == "ReplicasBehind"


def test_endpoints_follow_addresses() -> None:
    """A node that moves is found again."""
    found = serving("v", "n1", "n2", "n3")
    moved = node("n2", address="127.0.9.9")
    members = written(decide(found, world(node("n1"), moved, node("n3"), found), NOW))
    assert members["endpoints"][1]["address"] == "127.0.9.9"


# ------------------------------------------------------------------ deletion


def test_deletion_is_held_by_what_depends() -> None:
    """Nothing is allowed while a host or a snapshot needs it."""
    host = Attachment(node_name="w1", host_nqn="nqn.2026-11.io.tercet:host:x")
    attached = serving("v", "n1", "n2", "n3", attachments=[host])
    attached.metadata.deletion_timestamp = DELETED_AT
    actions = decide(attached, world(*nodes(), attached), NOW)
    assert reason(actions, "Deleting") == "Attached"
    assert "phase" not in written(actions)
    parent = serving("v", "n1", "n2", "n3")
    parent.metadata.deletion_timestamp = DELETED_AT
    taken = snapshot("s", parent)
    actions = decide(parent, world(*nodes(), parent, taken), NOW)
    assert reason(actions, "Deleting") == "HasSnapshots"
    assert "phase" not in written(actions)


def test_snapshots_of_an_earlier_volume_do_not_hold_it() -> None:
    """A name is not an identity."""
    other = volume("v", uuid=some_id("another"))
    found = serving("v", "n1", "n2", "n3", metadata={"deletion_timestamp": DELETED_AT})
    actions = decide(found, world(*nodes(), found, snapshot("s", other)), NOW)
    assert written(actions)["phase"] == "Deleting"


def test_deletion_waits_for_each_named_replica() -> None:
    """Reported Deleted, or on a StorageNode that no longer exists; then the finalizer goes."""
    found = serving("v", "n1", "n2", "n3", metadata={"deletion_timestamp": DELETED_AT})
    members = written(decide(found, world(*nodes(), found), NOW))
    assert members["phase"] == "Deleting"
    found.status.replicas[0].state = ReplicaPhase.DELETED
    found.status.replicas[1].state = ReplicaPhase.DELETED
    assert Release() not in decide(found, world(*nodes(), found), NOW)
    assert decide(found, world(node("n1"), node("n2"), found), NOW) == [Release()]
    found.status.replicas[2].state = ReplicaPhase.DELETED
    assert decide(found, world(*nodes(), found), NOW) == [Release()]


def test_a_dead_node_does_not_let_go() -> None:
    """A node that is away still has its replica: only its object's end speaks for it."""
    found = serving("v", "n1", "n2", "n3", metadata={"deletion_timestamp": DELETED_AT})
    for each in found.status.replicas[:2]:
        each.state = ReplicaPhase.DELETED
    assert Release() not in decide(found, world(*nodes(), found, dead=("n3",)), NOW)


def test_a_placement_that_was_never_answered_counts() -> None:
    """Its agent may have made the replica and died before it could say so."""
    found = new(metadata={"deletion_timestamp": DELETED_AT})
    found.status.replicas = [entry("n1", ReplicaPhase.PLACED)]
    assert Release() not in decide(found, world(*nodes(), found), NOW)


def test_members_that_status_does_not_list_are_named_first() -> None:
    """Agents report in status.replicas: an entry for every replica of the configuration."""
    found = serving("v", "n1", "n2", "n3", metadata={"deletion_timestamp": DELETED_AT})
    del found.status.replicas[2]
    entries = written(decide(found, world(*nodes(), found), NOW))["replicas"]
    assert entries[2]["replica"] == some_id("replica on n3")


def test_never_placed_goes_at_once() -> None:
    """Nothing was made, nothing is waited for."""
    found = new(metadata={"deletion_timestamp": DELETED_AT})
    assert decide(found, world(*nodes(), found), NOW) == [Release()]
    bare = volume(metadata={"deletion_timestamp": DELETED_AT, "finalizers": []})
    assert decide(bare, world(bare), NOW) == []
