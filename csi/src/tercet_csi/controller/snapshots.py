"""Snapshots: create, delete, find, list. Cutting one is left to the primary's agent (S1).

A snapshot that the operator makes for a clone is an internal of that clone: it is neither found
nor listed here.
"""

from __future__ import annotations

from tercet_api.clients import Conflict
from tercet_api.clients import NotFound as NoObject
from tercet_api.objects import Metadata, Snapshot, SnapshotSpec
from tercet_csi.controller.cluster import Cluster, internal
from tercet_csi.errors import Aborted, AlreadyExists, DeadlineExceeded, FailedPrecondition, NotFound

READY_TIMEOUT_S = 50.0
GONE_TIMEOUT_S = 50.0


class Snapshots:
    """What the controller does with Snapshot objects."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._objects = cluster.snapshots.objects

    async def create(self, name: str, volume_id: str) -> tuple[Snapshot, str]:
        """Make it, or find it made; returns it once it is ready, with its volume's id.

        Raises NotFound (volume), AlreadyExists (the name is of another volume's snapshot).
        """
        volume = await self._cluster.find_volume(volume_id)
        if volume.deleting:
            raise FailedPrecondition(f"volume {volume.name} is being deleted")
        new = Snapshot(metadata=Metadata(name=name), spec=SnapshotSpec(volume=volume.name))
        try:
            made = await self._objects.create(new)
        except Conflict:
            try:
                made = await self._objects.get(name)
            except NoObject:
                raise Aborted(f"snapshot {name} was deleted meanwhile: try again") from None
            if made.spec.volume != volume.name:
                raise AlreadyExists(f"snapshot {name} is of volume {made.spec.volume}") from None
            if made.deleting:
                raise Aborted(
                    f"snapshot {name} is being deleted: try again when it is gone"
                ) from None

        def ready() -> Snapshot | None:
            known = self._cluster.snapshots.known.get(name)
            same = known is not None and known.uid == made.uid
            return known if same and known is not None and known.status.ready_to_use else None

        what = f"snapshot {name} is not ready (kubectl describe tsnap {name})"
        found = await self._cluster.snapshots.until(ready, READY_TIMEOUT_S, what)
        return found, volume_id

    async def delete(self, snapshot_id: str) -> None:
        """Delete it and wait until the volume has dropped it; nothing when there is none."""
        try:
            snapshot = await self._cluster.find_snapshot(snapshot_id)
        except NotFound:
            return
        try:
            await self._objects.delete(snapshot.name, uid=snapshot.uid)
        except (NoObject, Conflict):
            return

        def gone() -> bool | None:
            known = self._cluster.snapshots.known.get(snapshot.name)
            return True if known is None or known.uid != snapshot.uid else None

        what = f"snapshot {snapshot.name} is being deleted"
        await self._cluster.snapshots.until(gone, GONE_TIMEOUT_S, what)

    async def all(self) -> list[tuple[Snapshot, str]]:
        """Every snapshot that has been cut, with its volume's id."""
        ids = {v.name: v.spec.uuid for v in await self._cluster.volumes.objects.list()}
        found = []
        for snapshot in await self._objects.list():
            volume_id = snapshot.status.volume_uuid or ids.get(snapshot.spec.volume)
            if volume_id and is_cut(snapshot) and not internal(snapshot):
                found.append((snapshot, volume_id))
        return found

    async def get(self, snapshot_id: str) -> tuple[Snapshot, str]:
        """One that has been cut, with its volume's id. Raises NotFound."""
        found = await self._cluster.find_snapshot(snapshot_id)
        if not is_cut(found) or found.status.volume_uuid is None:
            raise NotFound(f"snapshot {snapshot_id} has not been cut yet")
        return found, found.status.volume_uuid

    async def usable(self, snapshot_id: str) -> Snapshot:
        """A snapshot that a volume can start from. Raises NotFound, FailedPrecondition."""
        snapshot = await self._cluster.find_snapshot(snapshot_id)
        if snapshot.deleting:
            raise NotFound(f"snapshot {snapshot_id} is being deleted: choose another source")
        if not snapshot.status.ready_to_use:
            raise DeadlineExceeded(f"snapshot {snapshot_id} is not ready yet: try again")
        return snapshot


def is_cut(snapshot: Snapshot) -> bool:
    """Whether its content is settled; before that it is nobody's to see (CSI, ListSnapshots)."""
    return snapshot.status.creation_time is not None
