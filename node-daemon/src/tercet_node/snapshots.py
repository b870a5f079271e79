"""What the agent of a serving primary owes the Snapshots of its volume (pure).

A Snapshot is an entry in the volume's log (S1), so only the serving primary can make or delete one;
both are idempotent by the Snapshot's uid. Nothing is made before the finalizer is on the object:
otherwise a Snapshot deleted at once would leave its entry, and its space, behind.
"""

from __future__ import annotations

from dataclasses import dataclass

from tercet_api.clients import Json
from tercet_api.names import FINALIZER
from tercet_api.objects import Condition, ConditionStatus, Snapshot, SnapshotStatus, Volume

READY = "Ready"


@dataclass(frozen=True, slots=True)
class Take:
    """Append the snapshot, then report it ready."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Append the snapshot's deletion, then report it deleted."""


Step = Take | Drop


def decide(snapshot: Snapshot, volume: Volume) -> Step | None:
    """The next step for a snapshot of a volume that is served here, or None."""
    uuid = snapshot.status.volume_uuid
    if uuid is not None and uuid != volume.spec.uuid:
        return None  # another volume that once had this name
    if snapshot.deleting:
        return Drop() if snapshot.deletion_allowed and not snapshot.status.deleted else None
    if snapshot.status.ready_to_use or FINALIZER not in snapshot.metadata.finalizers:
        return None
    if volume.deleting:
        return None
    return Take()


def taken(
    snapshot: Snapshot, volume_uuid: str, *, epoch: int, lsn: int, size_bytes: int, asked_at: str
) -> Json:
    """The patch that says it is committed at (epoch, lsn).

    asked_at is before the entry was appended: whatever was acknowledged before that moment is in.
    """
    status = _merged(
        snapshot,
        asked_at,
        Condition(
            type=READY,
            status=ConditionStatus.TRUE,
            reason="Committed",
            message=f"committed at epoch {epoch}, lsn {lsn}",
            last_transition_time=asked_at,
            observed_generation=snapshot.metadata.generation,
        ),
    )
    update = {
        "ready_to_use": True,
        "creation_time": asked_at,
        "size_bytes": size_bytes,
        "epoch": epoch,
        "lsn": lsn,
        "volume_uuid": volume_uuid,
        "observed_generation": snapshot.metadata.generation,
    }
    return _patch(snapshot, status.model_copy(update=update))


def refused(snapshot: Snapshot, message: str, now: str) -> Json | None:
    """The patch that says why it is not ready, or None when that is said already."""
    condition = Condition(
        type=READY,
        status=ConditionStatus.FALSE,
        reason="SnapshotFailed",
        message=message,
        last_transition_time=now,
        observed_generation=snapshot.metadata.generation,
    )
    said = next((c for c in snapshot.status.conditions if c.type == READY), None)
    if said is not None and (said.reason, said.message) == (condition.reason, message):
        return None
    return _patch(snapshot, _merged(snapshot, now, condition))


def dropped(snapshot: Snapshot) -> Json:
    """The patch that says that the deletion is committed: the finalizer may go."""
    status = snapshot.status.model_copy(update={"deleted": True, "ready_to_use": False})
    return _patch(snapshot, status)


def _merged(snapshot: Snapshot, now: str, condition: Condition) -> SnapshotStatus:
    """Status with this condition in place of the one of its type."""
    before = next((c for c in snapshot.status.conditions if c.type == condition.type), None)
    if before is not None and before.status is condition.status:
        condition = condition.model_copy(
            update={"last_transition_time": before.last_transition_time}
        )
    others = [c for c in snapshot.status.conditions if c.type != condition.type]
    return snapshot.status.model_copy(update={"conditions": [*others, condition]})


def _patch(snapshot: Snapshot, status: SnapshotStatus) -> Json:
    """A merge patch of the fields that differ, for just this version of this object.

    A merge of single members leaves what others write (phase) alone, and works where there is no
    status yet; the resourceVersion keeps two writers of the list of conditions apart.
    """
    before, after = snapshot.status.to_json(), status.to_json()
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    version = {"uid": snapshot.uid, "resourceVersion": snapshot.metadata.resource_version}
    return {"metadata": version, "status": changed}
