"""Carries out what concerns this node's own StorageNode object: its status and its Lease.

The Lease is renewed only while the engine answers: a node whose engine is gone must not look alive
because its agent is. Nothing in the data path depends on either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from tercet_api.clients import Api, ApiError, Json, Objects
from tercet_api.coordination import leases, renew_node_lease
from tercet_api.coordination.membership import NODE_LEASE_RENEW_S
from tercet_api.objects import DeviceState, DeviceStatus, StorageNode
from tercet_node import nodestatus
from tercet_node.world import World

FIGURES_S = 10.0
"""Least time between two writes for figures alone."""
ANSWER_AGE_S_MAX = 5.0
"""An engine whose last answer is older than this does not answer."""
RENEW_TIMEOUT_S = 5.0

log = structlog.get_logger(__name__)


class NodeWork:
    """The executor for this node's StorageNode."""

    def __init__(self, world: World, api: Api, nodes: Objects[StorageNode]) -> None:
        self._world = world
        self._nodes = nodes
        self._leases = leases(api)
        self._written_s = float("-inf")
        self.refusal: str | None = None
        """Why the engine does not take its configuration, while it does not."""

    async def status(self, name: str) -> float | None:
        """Write this agent's part of StorageNode.status."""
        own = self._world.own
        if own is None or not self._world.volumes_known.is_set():
            return None
        now = self._now(own) | nodestatus.membership(self._world.membership)
        changed, urgent = nodestatus.difference(own.status.to_json(), now)
        if not changed:
            return None
        now_s = asyncio.get_running_loop().time()
        if not urgent and now_s < self._written_s + FIGURES_S:
            return self._written_s + FIGURES_S - now_s
        self._written_s = now_s
        patch = {"metadata": {"uid": own.uid}, "status": changed}
        await self._nodes.patch_status(name, patch)
        return None

    def _now(self, own: StorageNode) -> Json:
        state = self._world.engine
        if state is not None and state.status is not None:
            found = nodestatus.orphans(
                state.status.replicas, self._world.volumes.values(), self._world.node
            )
            return nodestatus.observed(state.status, found)
        if self.refusal is not None:
            return {"devices": _failed_devices(own, self.refusal)}
        return {}

    async def renew(self, answered_s: Callable[[], float]) -> None:
        """Renew the Lease until cancelled. answered_s: when the engine answered last."""
        loop = asyncio.get_running_loop()
        while True:
            state, own = self._world.engine, self._world.own
            fresh = loop.time() - answered_s() < ANSWER_AGE_S_MAX
            if state is not None and own is not None and fresh:
                try:
                    async with asyncio.timeout(RENEW_TIMEOUT_S):
                        await renew_node_lease(
                            self._leases, own.name, state.instance, datetime.now(UTC)
                        )
                except (ApiError, TimeoutError) as error:
                    log.warning("lease not renewed", node=own.name, error=str(error))
            await asyncio.sleep(NODE_LEASE_RENEW_S)


def _failed_devices(own: StorageNode, message: str) -> list[Json]:
    return [
        DeviceStatus(id=device.id, state=DeviceState.FAILED, message=message).to_json()
        for device in own.spec.devices
    ]
