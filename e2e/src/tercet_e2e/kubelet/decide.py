"""Decides, from what is observed, what the stand-in does next. Pure: no clock, no I/O.

The order is the kubelet's, because the attach-detach controller relies on it:

    up:    volumesInUse says the volume -> the controller says attached -> stage -> publish -> start
    down:  SIGTERM, grace, SIGKILL -> unpublish -> unstage -> volumesInUse drops it -> detached

A volume stays in `volumesInUse` for as long as anything of it may be on this node, so that it is
never detached below a mounted file system.
"""

from __future__ import annotations

from collections.abc import Iterator

from tercet_e2e.kubelet.model import (
    Action,
    Container,
    Decision,
    Expand,
    Finish,
    Forget,
    Kill,
    Observed,
    Phase,
    Pod,
    Prepare,
    Publish,
    ReportInUse,
    Resolve,
    RestartPolicy,
    Run,
    Stage,
    Start,
    Terminate,
    Unpublish,
    Unstage,
    VolumeHandle,
)


def decide(observed: Observed) -> Decision:
    """The next actions: at most one for each key, none for a key that is busy or must wait."""
    actions: dict[str, Action] = {}
    wake_s: list[float] = []
    for action in _wanted(observed):
        if action.key in observed.busy or action.key in actions:
            continue
        not_before_s = observed.not_before_s.get(action.key, 0.0)
        if not_before_s > observed.now_s:
            wake_s.append(not_before_s)
            continue
        actions[action.key] = action
    wake_s += _timers(observed)
    return Decision(tuple(actions.values()), min(wake_s, default=None))


def in_use(observed: Observed) -> frozenset[VolumeHandle]:
    """Volumes that must not be detached from this node."""
    wanted = {
        use.handle
        for pod in observed.pods
        for use in pod.csi
        if use.handle is not None and (not pod.ending or use.published is not Phase.NONE)
    }
    held = {handle for handle, phase in observed.staged.items() if phase is not Phase.NONE}
    return frozenset(wanted | held)


def _wanted(observed: Observed) -> Iterator[Action]:
    handles = in_use(observed)
    if handles != observed.in_use:
        yield ReportInUse(handles)
    for pod in observed.pods:
        yield from _wind_down(pod, observed) if pod.ending else _bring_up(pod, observed)
    yield from _unstage(observed)


def _bring_up(pod: Pod, observed: Observed) -> Iterator[Action]:
    if not pod.prepared:
        yield Prepare(pod.uid)
    for use in pod.csi:
        if use.handle is None:
            yield Resolve(pod.uid, use.volume)
        elif not (use.reported and use.attached):
            continue  # the attach-detach controller's turn
        elif observed.staged.get(use.handle) is not Phase.DONE:
            yield Stage(use.handle, pod.uid)
        elif use.published is not Phase.DONE:
            yield Publish(use.handle, pod.uid, use.volume)
        elif use.grow:
            yield Expand(use.handle, pod.uid, use.volume)
    if pod.prepared and all(use.published is Phase.DONE for use in pod.csi):
        yield from _run(pod, observed.now_s)


def _run(pod: Pod, now_s: float) -> Iterator[Action]:
    for container in pod.init:
        if container.run is Run.EXITED and container.exit_code == 0:
            continue
        # Containers before the others run one after the other, each to its success.
        if _startable(container, pod.policy, now_s):
            yield Start(pod.uid, container.name)
        return
    for container in pod.main:
        if _startable(container, pod.policy, now_s):
            yield Start(pod.uid, container.name)


def _startable(container: Container, policy: RestartPolicy, now_s: float) -> bool:
    if container.run is Run.NEVER:
        return True
    if container.run is Run.RUNNING or container.finished(policy):
        return False
    return container.next_start_s <= now_s


def _wind_down(pod: Pod, observed: Observed) -> Iterator[Action]:
    if any(container.run is Run.RUNNING for container in pod.containers):
        overdue = pod.deadline_s is not None and pod.deadline_s <= observed.now_s
        if overdue or not pod.present:
            yield Kill(pod.uid)  # removed by force: nobody waits for it any more
        elif not pod.terminating:
            yield Terminate(pod.uid)
        return
    published = [use for use in pod.csi if use.published is not Phase.NONE]
    for use in published:
        assert use.handle is not None, "published without a handle"
        yield Unpublish(use.handle, pod.uid, use.volume)
    if published:
        return
    if not pod.present:
        yield Forget(pod.uid)
    elif pod.deleting and not _staging(pod, observed):
        yield Finish(pod.uid)


def _staging(pod: Pod, observed: Observed) -> bool:
    """A start or a staging for this pod is still under way: its outcome must be known first."""
    keys = {f"container/{pod.uid}/{container.name}" for container in pod.containers}
    keys |= {f"volume/{use.handle}" for use in pod.csi if use.handle is not None}
    keys.add(f"prepare/{pod.uid}")
    return not keys.isdisjoint(observed.busy)


def _unstage(observed: Observed) -> Iterator[Action]:
    needed = {
        use.handle
        for pod in observed.pods
        for use in pod.csi
        if not pod.ending or use.published is not Phase.NONE
    }
    for handle, phase in observed.staged.items():
        if phase is not Phase.NONE and handle not in needed:
            yield Unstage(handle)


def _timers(observed: Observed) -> Iterator[float]:
    """When time alone changes the decision."""
    for pod in observed.pods:
        if pod.deleting and pod.deadline_s is not None and pod.deadline_s > observed.now_s:
            yield pod.deadline_s
        if not pod.ending:
            for container in pod.containers:
                if container.run is Run.EXITED and container.next_start_s > observed.now_s:
                    yield container.next_start_s
