"""Carries out what the agent of a serving primary owes Volumes and Snapshots.

Thin: what is to be done is decided in `primary` and `snapshots`. None of it is on the way of a
fail-over: it follows once the engine serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import structlog

from tercet_api.clients import NotFound, Objects
from tercet_api.objects import Snapshot, Volume
from tercet_node import primary, snapshots
from tercet_node.engine import Engine
from tercet_node.errors import NoSpace, NotHere, Rejected
from tercet_node.keyed import NotYet
from tercet_node.primary import Serving
from tercet_node.protos import engine_pb2 as pb
from tercet_node.volume_work import VolumeWork
from tercet_node.world import World

log = structlog.get_logger(__name__)


def timestamp(now: datetime) -> str:
    """A metav1.Time."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class PrimaryWork:
    """The executor for volumes that this node serves."""

    def __init__(
        self,
        world: World,
        volumes: Objects[Volume],
        snapshots_: Objects[Snapshot],
        engine: Engine,
        work: VolumeWork,
        refresh: Callable[[], Awaitable[pb.StatusResponse]],
    ) -> None:
        self._world = world
        self._volumes = volumes
        self._snapshots = snapshots_
        self._engine = engine
        self._work = work
        self._refresh = refresh
        self._written_s: dict[str, float] = {}

    def forget(self, name: str) -> None:
        """The object is gone."""
        self._written_s.pop(name, None)

    async def volume(self, name: str) -> float | None:
        """Fence, status, growth of one volume, as far as this node serves it."""
        volume = self._world.volumes.get(name)
        served = self._world.serving(volume) if volume is not None else None
        if volume is None or served is None or not primary.leads(volume, served):
            return None
        if primary.fence_due(volume):
            await self._fence(volume)
        later_s = await self._status(volume, served)
        size_bytes = primary.grow_to(volume, served)
        if size_bytes is not None:
            await self._grow(volume, size_bytes)
        return later_s

    async def _status(self, volume: Volume, served: Serving) -> float | None:
        patch = primary.status_patch(volume, served)
        if patch is None:
            return None
        now_s = asyncio.get_running_loop().time()
        least_s = primary.URGENT_S if patch.urgent else primary.QUIET_S
        wait_s = self._written_s.get(volume.name, now_s - least_s) + least_s - now_s
        if wait_s > 0:
            return wait_s
        self._written_s[volume.name] = now_s
        await self._volumes.patch_status(volume.name, patch.operations)
        return None

    async def _grow(self, volume: Volume, size_bytes: int) -> None:
        assert volume.spec.uuid is not None
        place = await self._engine.grow(volume.spec.uuid, size_bytes)
        log.info("grown", volume=volume.name, size_bytes=size_bytes, lsn=place.lsn)
        await self._refresh()

    async def _fence(self, volume: Volume) -> None:
        """Steps 2 and 4 of the fence (see `primary`)."""
        state = self._world.engine
        assert state is not None
        assert volume.spec.uuid is not None
        confirmed = state.fenced.get(volume.spec.uuid)
        patch = primary.fence_patch(volume, confirmed) if confirmed is not None else None
        if patch is not None:
            await self._volumes.patch_status(volume.name, patch)
        if confirmed is None or primary.fence_asked(volume, confirmed):
            shown = state.shown.get(volume.name)
            if not primary.shown_for_fence(volume, shown.view if shown is not None else None):
                await self._work.read(volume.name)

    # -------------------------------------------------------------- snapshots

    async def snapshot(self, name: str) -> float | None:
        """Take or drop one snapshot, if its volume is served here."""
        snapshot = self._world.snapshots.get(name)
        volume = self._served_volume(snapshot)
        if snapshot is None or volume is None or snapshots.decide(snapshot, volume) is None:
            return None
        try:
            snapshot = await self._snapshots.get(name)
        except NotFound:
            return None
        assert volume.spec.uuid is not None
        match snapshots.decide(snapshot, volume):
            case snapshots.Take():
                return await self._take(snapshot, volume.spec.uuid)
            case snapshots.Drop():
                try:
                    await self._engine.delete_snapshot(volume.spec.uuid, snapshot.uid)
                except NotHere:
                    log.info("snapshot was not in the log", snapshot=name, volume=volume.name)
                await self._snapshots.patch_status(name, snapshots.dropped(snapshot))
            case None:
                pass
        return None

    def _served_volume(self, snapshot: Snapshot | None) -> Volume | None:
        volume = self._world.volumes.get(snapshot.spec.volume) if snapshot is not None else None
        served = self._world.serving(volume) if volume is not None else None
        if volume is None or served is None or not primary.leads(volume, served):
            return None
        return volume

    async def _take(self, snapshot: Snapshot, uuid: str) -> float | None:
        asked_at = timestamp(datetime.now(UTC))
        try:
            place = await self._engine.create_snapshot(uuid, snapshot.uid)
        except (NoSpace, NotHere) as error:
            await self._refused(snapshot, str(error))
            raise
        except Rejected as error:
            # Not the serving primary any more, most likely: whoever is takes it.
            raise NotYet(str(error)) from error
        # Crash window: committed and not reported. Asked again, the engine names the same place.
        size_bytes = await self._size_of(uuid, snapshot.uid)
        patch = snapshots.taken(
            snapshot,
            uuid,
            epoch=place.epoch,
            lsn=place.lsn,
            size_bytes=size_bytes,
            asked_at=asked_at,
        )
        await self._snapshots.patch_status(snapshot.name, patch)
        log.info("snapshot", snapshot=snapshot.name, epoch=place.epoch, lsn=place.lsn)
        return None

    async def _size_of(self, uuid: str, snapshot: str) -> int:
        status = await self._refresh()
        held = next((r for r in status.replicas if r.volume == uuid), None)
        found = next((s for s in held.snapshots if s.snapshot == snapshot), None) if held else None
        if found is None:
            raise NotYet(f"snapshot {snapshot} is not in Status yet")
        return found.size_bytes

    async def _refused(self, snapshot: Snapshot, message: str) -> None:
        patch = snapshots.refused(snapshot, message, timestamp(datetime.now(UTC)))
        if patch is not None:
            await self._snapshots.patch_status(snapshot.name, patch)
