"""The stand-in's decisions, step by step, without a cluster."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tercet_e2e.kubelet.decide import decide, in_use
from tercet_e2e.kubelet.model import (
    Container,
    CsiUse,
    Expand,
    Finish,
    Forget,
    Kill,
    Observed,
    Phase,
    Pod,
    PodUid,
    Prepare,
    Publish,
    ReportInUse,
    Resolve,
    Run,
    Stage,
    Start,
    Terminate,
    Unpublish,
    Unstage,
    VolumeHandle,
)

UID = PodUid("uid-1")
VOLUME = VolumeHandle("vol-1")
USE = CsiUse("data", VOLUME, attached=True, reported=True)
POD = Pod(UID, "default/p", prepared=True, csi=(USE,), main=(Container("c"),))
RUNNING = Container("c", Run.RUNNING)


def observed(*pods, staged=None, now_s=100.0, busy=(), retry=None, reported=None):
    made = Observed(now_s, pods, staged or {}, frozenset(busy), retry or {}, frozenset())
    return replace(made, in_use=in_use(made) if reported is None else frozenset(reported))


def actions(*pods, **more):
    return decide(observed(*pods, **more)).actions


def test_a_volume_comes_up_in_the_kubelets_order():
    unknown = replace(POD, prepared=False, csi=(CsiUse("data", None),))
    assert actions(unknown) == (Prepare(UID), Resolve(UID, "data"))

    waiting = replace(POD, csi=(CsiUse("data", VOLUME),))
    assert actions(waiting, reported=()) == (ReportInUse(frozenset({VOLUME})),)
    assert actions(replace(POD, csi=(replace(USE, attached=False),))) == ()
    assert actions(replace(POD, csi=(replace(USE, reported=False),))) == ()

    assert actions(POD) == (Stage(VOLUME, UID),)
    assert actions(POD, staged={VOLUME: Phase.UNCERTAIN}) == (Stage(VOLUME, UID),)
    assert actions(POD, staged={VOLUME: Phase.DONE}) == (Publish(VOLUME, UID, "data"),)

    published = replace(POD, csi=(replace(USE, published=Phase.DONE),))
    assert actions(published, staged={VOLUME: Phase.DONE}) == (Start(UID, "c"),)


def test_a_pod_goes_down_in_the_kubelets_order():
    used = replace(USE, published=Phase.DONE)
    going = replace(POD, deleting=True, deadline_s=130.0, csi=(used,), main=(RUNNING,))
    staged = {VOLUME: Phase.DONE}
    assert actions(going, staged=staged) == (Terminate(UID),)
    told = replace(going, terminating=True)
    assert actions(told, staged=staged) == ()
    assert decide(observed(told, staged=staged)).wake_s == 130.0
    assert actions(told, staged=staged, now_s=130.0) == (Kill(UID),)

    stopped = replace(told, main=(Container("c", Run.EXITED, 143),))
    assert actions(stopped, staged=staged) == (Unpublish(VOLUME, UID, "data"),)
    unpublished = replace(stopped, csi=(USE,))
    assert actions(unpublished, staged=staged) == (Finish(UID), Unstage(VOLUME))
    assert actions(unpublished, staged={}, reported={VOLUME}) == (
        ReportInUse(frozenset()),
        Finish(UID),
    )


def test_a_volume_is_in_use_for_as_long_as_anything_of_it_is_here():
    gone = replace(POD, present=False, main=())
    assert in_use(observed(gone, staged={VOLUME: Phase.UNCERTAIN})) == {VOLUME}
    left = replace(gone, csi=(replace(USE, published=Phase.UNCERTAIN),))
    assert in_use(observed(left)) == {VOLUME}
    assert in_use(observed(gone)) == frozenset()


def test_a_pod_that_was_removed_by_force_is_killed_at_once():
    gone = replace(POD, present=False, main=(RUNNING,), csi=())
    assert actions(gone) == (Kill(UID),)
    assert actions(replace(gone, main=())) == (Forget(UID),)


def test_a_volume_that_another_pod_uses_is_not_unstaged():
    used = replace(USE, published=Phase.DONE)
    here = replace(POD, csi=(used,), main=(RUNNING,))
    other = replace(POD, uid=PodUid("uid-2"), deleting=True, deadline_s=130.0, main=())
    found = actions(here, other, staged={VOLUME: Phase.DONE})
    assert not [action for action in found if isinstance(action, Unstage)]


def test_a_grown_volume_is_expanded_once_it_is_published():
    use = replace(USE, published=Phase.DONE, grow=True)
    pod = replace(POD, csi=(use,), main=(RUNNING,))
    assert actions(pod, staged={VOLUME: Phase.DONE}) == (Expand(VOLUME, UID, "data"),)


def test_restart_policies():
    def after(policy, code):
        container = Container("c", Run.EXITED, code, next_start_s=99.0)
        return actions(replace(POD, csi=(), policy=policy, main=(container,)))

    assert after("Always", 0) == (Start(UID, "c"),)
    assert after("OnFailure", 1) == (Start(UID, "c"),)
    assert after("OnFailure", 0) == ()
    assert after("Never", 1) == ()


def test_a_container_waits_before_it_starts_again():
    container = Container("c", Run.EXITED, 1, next_start_s=105.0)
    decision = decide(observed(replace(POD, csi=(), main=(container,))))
    assert decision.actions == ()
    assert decision.wake_s == 105.0


def test_init_containers_run_one_after_the_other_before_the_others():
    init = (Container("a"), Container("b"))
    pod = replace(POD, csi=(), init=init)
    assert actions(pod) == (Start(UID, "a"),)
    done = Container("a", Run.EXITED, 0)
    assert actions(replace(pod, init=(done, Container("b")))) == (Start(UID, "b"),)
    both = (done, Container("b", Run.EXITED, 0))
    assert actions(replace(pod, init=both)) == (Start(UID, "c"),)


def test_what_failed_waits_and_what_is_under_way_is_not_doubled():
    key = Stage(VOLUME, UID).key
    decision = decide(observed(POD, retry={key: 107.0}))
    assert decision.actions == ()
    assert decision.wake_s == 107.0
    assert actions(POD, busy={key}) == ()


def test_a_pod_is_not_taken_away_while_its_staging_is_under_way():
    going = replace(POD, deleting=True, deadline_s=130.0)
    assert actions(going, busy={Stage(VOLUME, UID).key}) == ()


PHASES = st.sampled_from(Phase)
USES = st.builds(
    CsiUse,
    volume=st.just("data"),
    handle=st.just(VOLUME),
    attached=st.booleans(),
    reported=st.booleans(),
    published=PHASES,
    grow=st.booleans(),
)
CONTAINERS = st.builds(
    Container, name=st.just("c"), run=st.sampled_from(Run), exit_code=st.sampled_from([0, 1])
)
PODS = st.builds(
    Pod,
    uid=st.just(UID),
    name=st.just("default/p"),
    present=st.booleans(),
    deleting=st.booleans(),
    deadline_s=st.sampled_from([None, 50.0, 150.0]),
    policy=st.sampled_from(["Always", "OnFailure", "Never"]),
    prepared=st.booleans(),
    csi=st.tuples(USES),
    main=st.tuples(CONTAINERS),
)


@given(PODS, PHASES)
def test_no_volume_is_taken_from_a_running_container_nor_given_to_an_ending_pod(pod, staged):
    found = actions(pod, staged={VOLUME: staged})
    kinds = {type(action) for action in found}
    running = any(container.run is Run.RUNNING for container in pod.containers)
    published = pod.csi[0].published is not Phase.NONE
    if running:
        assert Unpublish not in kinds
    if running and published:
        assert Unstage not in kinds
    if pod.ending:
        assert kinds.isdisjoint({Stage, Publish, Start, Expand})
    if Stage in kinds or Publish in kinds:
        assert pod.csi[0].attached
    if {Forget, Finish} & kinds:
        assert not published
        assert not running
    if published or staged is not Phase.NONE:
        assert VOLUME in in_use(observed(pod, staged={VOLUME: staged}))
