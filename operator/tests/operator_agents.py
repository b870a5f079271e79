"""Agents as the operator sees them: a Lease that is renewed, and words in status.

Each does what the real agent does to objects (tercet_node): it reports its instance and that it has
no orphans, makes the replicas that are placed on it, calls them in sync and the configuration
Active when its node is primary, takes and deletes snapshots, deletes replicas once that is allowed.
It keeps no data.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import TypeVar

from tercet_api.clients import (
    Api,
    ApiError,
    Changed,
    Conflict,
    Listed,
    Objects,
    Unreachable,
    expect,
    put,
    snapshots,
    storage_nodes,
    volumes,
)
from tercet_api.coordination import Swapped, Unknown, leases, renew_node_lease, swap_config
from tercet_api.names import FINALIZER
from tercet_api.objects import (
    ConfigState,
    Metadata,
    Object,
    Orphan,
    ReplicaPhase,
    Snapshot,
    StorageNode,
    StorageNodeSpec,
    Volume,
)

GIB = 1024**3
RENEW_S = 0.5
O = TypeVar("O", bound=Object)  # noqa: E741


class Agent:
    """One node's agent."""

    def __init__(self, api: Api, name: str, number: int, topology: dict[str, str]) -> None:
        self.api = api
        self.name = name
        self.number = number
        self.topology = topology
        self.instance = str(uuid.uuid4())
        self.capacity_bytes = 100 * GIB
        self.used_percent = 0
        """Reported; the operator repeats it, which shows that it has seen the report."""
        self.orphans: list[Orphan] = []
        self.refuses: str | None = None
        """Why it cannot make a replica."""
        self.reports_orphans = True
        self.renews = True
        self.renewed_s = 0.0
        """When it last began to renew, by the monotonic clock."""

    async def register(self) -> None:
        """Make the StorageNode and say what is on it."""
        spec = StorageNodeSpec(
            node_name=f"machine-{self.name}",
            address=f"127.0.1.{self.number}",
            topology=self.topology,
        )
        with contextlib.suppress(Conflict):
            await storage_nodes(self.api).create(
                StorageNode(metadata=Metadata(name=self.name), spec=spec)
            )
        await self.report()

    async def report(self) -> None:
        """Write its part of StorageNode.status."""
        status = {
            "instance": self.instance,
            "capacityBytes": self.capacity_bytes,
            "allocatedBytes": self.capacity_bytes // 100 * self.used_percent,
            "orphans": [orphan.to_json() for orphan in self.orphans],
            "orphansInstance": self.instance if self.reports_orphans else None,
        }
        await storage_nodes(self.api).patch_status(self.name, {"status": status})

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew())
            group.create_task(self._follow_volumes())
            group.create_task(self._follow_snapshots())

    async def _renew(self) -> None:
        while True:
            if self.renews:
                self.renewed_s = time.monotonic()
                with contextlib.suppress(ApiError):  # a slow API server: the next one counts
                    await renew_node_lease(
                        leases(self.api), self.name, self.instance, datetime.now(UTC)
                    )
            await asyncio.sleep(RENEW_S)

    async def _follow_volumes(self) -> None:
        await _follow(volumes(self.api), self._volume)

    async def _follow_snapshots(self) -> None:
        await _follow(snapshots(self.api), self._snapshot)

    async def _volume(self, seen: Volume) -> None:
        for index, entry in enumerate(seen.status.replicas):
            if entry.node != self.name:
                continue
            path = f"/status/replicas/{index}"
            same = [expect(f"{path}/node", self.name), expect(f"{path}/state", entry.state.value)]
            if seen.deletion_allowed and entry.state is not ReplicaPhase.DELETED:
                await self._patch(seen, [*same, put(f"{path}/state", "Deleted")])
            elif entry.state is ReplicaPhase.PLACED and not seen.deleting and self.refuses:
                words = [put(f"{path}/state", "Failed"), put(f"{path}/message", self.refuses)]
                await self._patch(seen, [*same, *words])
            elif entry.state is ReplicaPhase.PLACED and not seen.deleting:
                made = [put(f"{path}/replica", str(uuid.uuid4())), put(f"{path}/state", "Created")]
                await self._patch(seen, [*same, *made])
        await self._lead(seen)

    async def _lead(self, seen: Volume) -> None:
        config = seen.status.config
        if config is None or config.primary.instance != self.instance or seen.deleting:
            return
        if config.state is ConfigState.RECOVERING:
            active = config.model_copy(update={"state": ConfigState.ACTIVE})
            answer = await swap_config(volumes(self.api), seen.name, seen.uid, config, active)
            if isinstance(answer, Unknown):
                raise Unreachable(answer.message)
            if not isinstance(answer, Swapped):
                return
            seen = answer.volume
        if seen.status.size_bytes != seen.spec.size_bytes:
            states = [
                put(f"/status/replicas/{index}/state", "InSync")
                for index in range(len(seen.status.replicas))
            ]
            await self._patch(seen, [put("/status/sizeBytes", seen.spec.size_bytes), *states])

    async def _snapshot(self, seen: Snapshot) -> None:
        volume = await volumes(self.api).get(seen.spec.volume)
        config = volume.status.config
        if config is None or config.primary.instance != self.instance:
            return
        if seen.deletion_allowed and not seen.status.deleted:
            await self._patch_snapshot(seen, {"deleted": True, "readyToUse": False})
        elif not seen.deleting and not seen.status.ready_to_use:
            if FINALIZER not in seen.metadata.finalizers:
                return
            await self._patch_snapshot(
                seen,
                {
                    "readyToUse": True,
                    "epoch": config.epoch,
                    "lsn": 1,
                    "volumeUuid": volume.spec.uuid,
                    "sizeBytes": volume.status.size_bytes,
                },
            )

    async def _patch(self, seen: Volume, patch: list[dict[str, object]]) -> None:
        await volumes(self.api).patch_status(seen.name, patch)

    async def _patch_snapshot(self, seen: Snapshot, status: dict[str, object]) -> None:
        await snapshots(self.api).patch_status(seen.name, {"status": status})


async def _follow(objects: Objects[O], take: Callable[[O], Awaitable[None]]) -> None:
    """Hand over each object at each change; all afresh when the API server did not answer."""
    while True:
        try:
            async with aclosing(objects.watch()) as events:
                async for event in events:
                    match event:
                        case Listed(everything):
                            for found in everything:
                                await _taken(found, take)
                        case Changed(found):
                            await _taken(found, take)
        except Unreachable:
            await asyncio.sleep(RENEW_S)


async def _taken(found: O, take: Callable[[O], Awaitable[None]]) -> None:
    try:
        await take(found)
    except Unreachable:
        raise
    except ApiError:
        return  # changed or gone meanwhile: the next event has it


@asynccontextmanager
async def agents(api: Api, count: int = 3) -> AsyncIterator[list[Agent]]:
    """Registered, running agents n1..; each in a zone of its own."""
    made = [
        Agent(api, f"n{number}", number, {"zone": f"z{number}"}) for number in range(1, count + 1)
    ]
    running = []
    for agent in made:
        await agent.register()
        running.append(asyncio.create_task(agent.run(), name=f"agent-{agent.name}"))
    try:
        yield made
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
