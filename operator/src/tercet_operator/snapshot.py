"""What a Snapshot needs next (pure): its finalizer, a word about it, leave to be deleted, release.

The primary's agent takes it and says that it is ready (S1); the operator says where it stands when
there is no primary that could, and keeps a snapshot that a clone is being made of.
"""

from __future__ import annotations

from tercet_api.names import FINALIZER, clone_snapshot
from tercet_api.objects import ReplicaPhase, Snapshot, SnapshotPhase, Volume
from tercet_operator.actions import Action, Adopt, Notice, Release, Severity, WriteStatus
from tercet_operator.conditions import DELETING, READY, Verdict, status_actions
from tercet_operator.world import Moment, World


def decide(snapshot: Snapshot, world: World, now: Moment) -> list[Action]:
    """What to do about one snapshot."""
    if snapshot.deleting:
        return _deletion(snapshot, world, now)
    if FINALIZER not in snapshot.metadata.finalizers:
        return [Adopt()]
    status = snapshot.status
    if not status.ready_to_use and parent(snapshot, world) is None:
        message = f"there is no Volume {snapshot.spec.volume}"
        verdict = Verdict(READY, False, "NoVolume", message, False)
        members = {"phase": SnapshotPhase.PENDING.value}
        # exact: the primary's agent writes conditions too.
        return status_actions(
            status, [verdict], now, snapshot.metadata.generation, members, exact=True
        )
    phase = SnapshotPhase.READY if status.ready_to_use else SnapshotPhase.PENDING
    if status.phase is phase:
        return []
    actions: list[Action] = [WriteStatus({"phase": phase.value})]
    if phase is SnapshotPhase.READY:
        message = f"of {snapshot.spec.volume} at epoch {status.epoch}, lsn {status.lsn}"
        actions.append(Notice("SnapshotReady", message))
    return actions


def parent(snapshot: Snapshot, world: World) -> Volume | None:
    """The Volume that a snapshot is of; None when it is gone, or another has its name now."""
    found = world.volumes.get(snapshot.spec.volume)
    if found is None or snapshot.status.volume_uuid not in {None, found.spec.uuid}:
        return None
    return found


def _deletion(snapshot: Snapshot, world: World, now: Moment) -> list[Action]:
    if FINALIZER not in snapshot.metadata.finalizers:
        return []
    if snapshot.status.deleted or parent(snapshot, world) is None:
        return [Release()]
    if snapshot.deletion_allowed:
        return []
    clones = sorted(v.name for v in world.volumes.values() if _starts_from(v, snapshot))
    if clones:
        message = f"{', '.join(clones)} is being made of it: waiting"
        verdict = Verdict(DELETING, False, "Cloning", message, True)
        return status_actions(
            snapshot.status, [verdict], now, snapshot.metadata.generation, {}, exact=True
        )
    return [
        WriteStatus({"phase": SnapshotPhase.DELETING.value}),
        Notice(
            "Deleting", f"its entry in {snapshot.spec.volume} is being deleted", Severity.NORMAL
        ),
    ]


def _starts_from(volume: Volume, snapshot: Snapshot) -> bool:
    """Whether a volume is just being made of this snapshot.

    It is as long as a replica awaits the snapshot on its node (S3): for as long as the snapshot is
    here its volume is not deleted, from whose log that node gets it.
    """
    source = volume.spec.source
    if source is None or volume.deleting:
        return False
    awaited = any(e.state is ReplicaPhase.REBUILDING for e in volume.status.replicas)
    if volume.status.config is not None and not awaited:
        return False
    if not volume.status.replicas:
        return False  # not begun: it finds its source gone, and says so
    return snapshot.name in {source.snapshot, clone_snapshot(volume.uid)}
