"""The cluster's objects as the controller sees them: followed by watches, never polled.

`find_*` look into what the watches have shown and, when a thing is not there, ask the API server
itself: only a consistent read may say that something does not exist. `until` waits for a change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from tercet_api.clients import (
    Api,
    ApiError,
    Changed,
    Listed,
    Objects,
    Removed,
    Unreachable,
    snapshots,
    storage_nodes,
    volumes,
)
from tercet_api.clients import NotFound as NoObject
from tercet_api.names import CLONE_LABEL, CSI_DRIVER
from tercet_api.objects import Object, Snapshot, StorageNode, Volume
from tercet_csi.controller.naming import is_object_name
from tercet_csi.errors import CsiError, DeadlineExceeded, Internal, NotFound, Unavailable

O = TypeVar("O", bound=Object)  # noqa: E741
T = TypeVar("T")


class Followed(Generic[O]):
    """One kind, kept up to date by a watch."""

    def __init__(self, objects: Objects[O]) -> None:
        self.objects = objects
        self.known: dict[str, O] = {}
        self.listed = asyncio.Event()
        self._changed = asyncio.Condition()

    async def follow(self) -> None:
        """Follow until cancelled."""
        async for event in self.objects.watch():
            match event:
                case Listed(everything):
                    self.known = {item.name: item for item in everything}
                    self.listed.set()
                case Changed(item):
                    self.known[item.name] = item
                case Removed(item):
                    self.known.pop(item.name, None)
            async with self._changed:
                self._changed.notify_all()

    async def until(self, check: Callable[[], T | None], timeout_s: float, what: str) -> T:
        """Wait until `check` gives something. Raises DeadlineExceeded: what is awaited."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                while (found := check()) is None:
                    await self._changed.wait()
                return found
        except TimeoutError:
            raise DeadlineExceeded(f"{what}: not yet after {timeout_s:.0f} s; try again") from None


class Cluster:
    """Volumes, Snapshots and StorageNodes."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.volumes: Followed[Volume] = Followed(volumes(api))
        self.snapshots: Followed[Snapshot] = Followed(snapshots(api))
        self.nodes: Followed[StorageNode] = Followed(storage_nodes(api))

    @property
    def ready(self) -> bool:
        """Whether every watch has listed once."""
        return all(f.listed.is_set() for f in (self.volumes, self.snapshots, self.nodes))

    async def find_volume(self, uuid: str) -> Volume:
        """The Volume with this spec.uuid, freshly read. Raises NotFound."""
        for known in self.volumes.known.values():
            if known.spec.uuid == uuid:
                try:
                    fresh = await self.volumes.objects.get(known.name)
                except NoObject:
                    break
                if fresh.spec.uuid == uuid:
                    return fresh
        for listed in await self.volumes.objects.list():
            if listed.spec.uuid == uuid:
                return listed
        raise NotFound(f"there is no volume with the id {uuid}")

    async def find_snapshot(self, snapshot_id: str) -> Snapshot:
        """The Snapshot of this name, freshly read. Raises NotFound."""
        missing = NotFound(f"there is no snapshot with the id {snapshot_id!r}")
        if not is_object_name(snapshot_id):
            raise missing
        try:
            found = await self.snapshots.objects.get(snapshot_id)
        except NoObject:
            raise missing from None
        if internal(found):
            raise missing
        return found

    async def snapshots_of(self, volume_name: str) -> list[Snapshot]:
        """All Snapshots of a Volume, from a consistent read."""
        return [s for s in await self.snapshots.objects.list() if s.spec.volume == volume_name]

    async def node_exists(self, name: str) -> bool:
        """Whether the Kubernetes node exists."""
        if not is_object_name(name):
            return False
        try:
            await self.api.request("GET", f"/api/v1/nodes/{name}")
        except NoObject:
            return False
        return True

    async def volumes_max(self, node: str) -> int | None:
        """How many volumes the node takes, as the kubelet wrote it down; none: nobody says."""
        try:
            found = await self.api.request("GET", f"/apis/storage.k8s.io/v1/csinodes/{node}")
        except NoObject:
            return None
        for driver in found.get("spec", {}).get("drivers") or []:
            if driver["name"] == CSI_DRIVER:
                count = (driver.get("allocatable") or {}).get("count")
                return None if count is None else int(count)
        return None

    def attached_to(self, node: str) -> list[str]:
        """Names of the volumes that the node's host may use, as the watch has shown them."""
        return [
            volume.name
            for volume in self.volumes.known.values()
            if any(entry.node_name == node for entry in volume.spec.attachments)
        ]


def internal(snapshot: Snapshot) -> bool:
    """Whether the operator made it for a clone: no user's, and gone when the clone is there."""
    return CLONE_LABEL in snapshot.metadata.labels


def refusal(error: Exception) -> CsiError | None:
    """What a failure of the API server means to a caller; none for any other error.

    Unreachable leaves open what was done, so it must not be an error that the specification calls
    final: the caller would think that nothing is left behind.
    """
    match error:
        case Unreachable():
            return Unavailable(f"the API server does not answer ({error}): try again")
        case ApiError():
            return Internal(str(error))
    return None
