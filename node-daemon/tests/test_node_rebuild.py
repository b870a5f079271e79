"""A replica that takes another's place, as its agent and the primary's see it (M1, M2, C3)."""

from __future__ import annotations

import pytest
from node_objects import GIB, config, entry, held, replica_id, serving, volume

from tercet_api.objects import ConfigState, Member, ReplicaPhase
from tercet_node import convert, primary, rates
from tercet_node.protos import engine_pb2 as pb
from tercet_node.replicas import Create, Delete, Report, created, decide, is_stray

OLD = replica_id("a")
MIB = 1 << 20


def asked(node: str, state: str, *, named: bool = True):
    return entry(node, state, named=named, replaces=OLD)


def member(node: str, **more) -> pb.MemberStatus:
    return pb.MemberStatus(node=node, replica=replica_id(node), **more)


def with_learner(*entries):
    learner = Member(node="d", replica=replica_id("d"))
    return volume(*entries, config=config("a", "b", "c", learners=[learner]), size_bytes=GIB)


# ------------------------------------------------------------------ the newcomer's agent


def test_a_learner_is_made_though_there_is_a_config_and_starts_from_nothing():
    found = volume(asked("d", "Placed", named=False), config=config("a", "b", "c"))
    found.status.size_bytes = 3 * GIB
    step = decide(found, "d", None, {})
    assert isinstance(step, Create)
    assert step.request.learner
    assert not step.request.HasField("source")
    assert step.request.size_bytes == 3 * GIB, "as big as the volume is by now"
    made = created(found.status.replicas[0], replica_id("d"), incomplete=True)
    assert (made.state, made.replaces) == (ReplicaPhase.REBUILDING, OLD)
    assert "copy" in made.message


def test_what_is_reported_and_not_here_has_failed():
    """Its disk was swapped: the operator looks for another node, nobody makes it again (T9)."""
    found = with_learner(asked("d", "Rebuilding"))
    assert decide(found, "d", held("d"), {}) is None
    step = decide(found, "d", None, {})
    assert isinstance(step, Report)
    assert step.entry.state is ReplicaPhase.FAILED


def test_the_engine_is_told_of_a_change_once_the_newcomer_has_its_id():
    assert convert.replacement(volume(asked("d", "Placed", named=False))) is None
    assert convert.replacement(volume(asked("d", "Former"))) is None
    assert convert.replacement(volume(asked("d", "Failed"))) is None
    found = convert.volume_view(with_learner(asked("d", "Rebuilding")), consistent=False)
    assert found.replacement.old == OLD
    assert found.replacement.learner.replica == replica_id("d")


# ------------------------------------------------------------------ M2


def test_what_no_configuration_names_is_deleted_by_its_id():
    found = volume(entry("d", "Former"), config=config("a", "b", "c", epoch=4))
    step = decide(found, "d", held("d", epoch=4), {})
    assert isinstance(step, Delete)
    assert (step.replica, step.index) == (replica_id("d"), 0)
    assert step.entry is not None
    assert step.entry.state is ReplicaPhase.DELETED
    assert is_stray(found, replica_id("d"))
    # The operator has forgotten it already.
    step = decide(volume(config=config("a", "b", "c", epoch=4)), "d", held("d", epoch=3), {})
    assert isinstance(step, Delete)
    assert step.entry is None


def test_deleted_and_not_reported_is_reported():
    found = volume(entry("d", "Former"), config=config("a", "b", "c"))
    step = decide(found, "d", None, {})
    assert isinstance(step, Report)
    assert step.entry.state is ReplicaPhase.DELETED


@pytest.mark.parametrize(
    "found",
    [
        volume(entry("d", "Former"), config=config("a", "b", "c", epoch=3)),
        volume(entry("d", "Former")),
        volume(asked("d", "Rebuilding"), config=config("a", "b", "c", epoch=4)),
        volume(asked("d", "Placed", named=False), config=config("a", "b", "c", epoch=4)),
        with_learner(entry("d", "Former")),
    ],
    ids=["older than its promise", "no config", "asked for", "made, not reported", "a learner"],
)
def test_what_may_still_count_is_kept(found):
    """M2: a restored object, or one that wants it, deletes nothing."""
    assert not isinstance(decide(found, "d", held("d", epoch=4), {}), Delete)


def test_while_members_change_nothing_is_deleted():
    both = config("d", "b", "c", epoch=4, primary="b", previous_members=config().members)
    both.state = ConfigState.RECOVERING
    found = volume(entry("x", "Former"), config=both)
    assert decide(found, "x", held("x", epoch=1), {}) is None


# ------------------------------------------------------------------ what the primary's agent says


def shown(found, seen):
    patch = primary.status_patch(found, seen)
    assert patch is not None
    return {o["path"]: o["value"] for o in patch.operations if o["op"] == "replace"}


def copying(done: int, sent: int) -> pb.CopyStatus:
    return pb.CopyStatus(done_bytes=done, total_bytes=GIB, sent_bytes=sent)


def test_a_learner_is_rebuilding_with_percent_and_pace():
    found = with_learner(asked("d", "Rebuilding"))
    learner = member("d", learner=True, incomplete=True, copy=copying(GIB // 4, 100 * MIB))
    rate = rates.Rate(0.0, GIB // 4, 100 * MIB, done_per_s=64.0 * MIB, sent_per_s=20.0 * MIB)
    seen = serving(links={"d": True}, members=[learner])
    seen.rates[replica_id("d")] = rate  # type: ignore[index]
    entry_ = shown(found, seen)["/status/replicas/0"]
    assert (entry_["state"], entry_["rebuildPercent"]) == ("Rebuilding", 25)
    assert (entry_["rebuildBytesPerSecond"], entry_["rebuildSecondsLeft"]) == (20 * MIB, 12)
    # Complete, and no member yet: it counts in no majority, so it is not in sync.
    seen = serving(links={"d": True}, members=[member("d", learner=True, in_sync=True)])
    entry_ = shown(found, seen)["/status/replicas/0"]
    assert (entry_["state"], entry_["rebuildPercent"]) == ("Rebuilding", 100)


def test_figures_of_a_rebuild_end_with_it():
    done = asked("d", "Rebuilding").model_copy(
        update={"rebuild_percent": 99, "rebuild_seconds_left": 1, "rebuild_bytes_per_second": 5}
    )
    found = volume(done, config=config("a", "b", "d"))
    seen = serving(links={"d": True}, members=[member("d", in_sync=True)])
    entry_ = shown(found, seen)["/status/replicas/0"]
    assert entry_["state"] == "InSync"
    assert not any(key.startswith("rebuild") for key in entry_)


def test_a_rate_is_smoothed_and_begins_anew_with_a_pass():
    first = rates.follow(None, copying(0, 0), 10.0)
    second = rates.follow(first, copying(100 * MIB, 50 * MIB), 12.0)
    assert (second.done_per_s, second.sent_per_s) == (50.0 * MIB, 25.0 * MIB)
    assert second.seconds_left(GIB) == round((GIB - 100 * MIB) / (50 * MIB))
    slower = rates.follow(second, copying(120 * MIB, 60 * MIB), 14.0)
    assert 10.0 * MIB < slower.done_per_s < 50.0 * MIB
    assert rates.follow(second, copying(110 * MIB, 55 * MIB), 12.1) is second
    assert rates.follow(slower, copying(1 * MIB, 60 * MIB), 16.0).done_per_s is None
