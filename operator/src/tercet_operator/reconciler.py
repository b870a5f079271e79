"""Which object is looked at next: a queue of keys, each at most once in it and once at work.

Level-triggered: a key says that something may have changed, never what. A pass decides on the world
as it is then, takes the actions, and leaves the rest to the next pass, which the change itself
wakes. What fails is looked at again after a pause that grows with jitter up to RETRY_MAX_S, read
afresh first when it was stale.

Passes of different objects run side by side. Between a decision and the executor's note of the room
that it promises there is no await, so two volumes are never promised the same room.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from datetime import UTC, datetime

import structlog

from tercet_api.clients import Api, ApiError
from tercet_api.objects import Object
from tercet_operator import snapshot, storagenode, volume
from tercet_operator.actions import Action
from tercet_operator.events import Events
from tercet_operator.executor import NODE, SNAPSHOT, VOLUME, Executor, Key, Stale
from tercet_operator.metrics import Metrics
from tercet_operator.world import Moment, World

WORKERS = 16
RETRY_MIN_S = 0.05
RETRY_MAX_S = 30.0

log = structlog.get_logger(__name__)


class Reconciler:
    """Looks at objects until it is cancelled."""

    def __init__(self, api: Api, world: World, metrics: Metrics) -> None:
        self._world = world
        self._metrics = metrics
        self._events = Events(api, metrics)
        self._executor = Executor(api, world, self._events, metrics, self.wake)
        self._ready: asyncio.Queue[Key] = asyncio.Queue()  # holds each key once: bounded by them
        self._waiting: set[Key] = set()
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}

    def wake(self, key: Key, after_s: float = 0.0) -> None:
        """Look at an object, now or after this time (of several, the earliest counts)."""
        if after_s <= 0.0:
            self._push(key)
            return
        due_s = asyncio.get_running_loop().time() + after_s
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= due_s:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_at(due_s, self._fire, key)

    def _fire(self, key: Key) -> None:
        self._timers.pop(key, None)
        self._push(key)

    def _push(self, key: Key) -> None:
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._events.run(), name="events")
                for number in range(WORKERS):
                    group.create_task(self._work(), name=f"reconciler-{number}")
        finally:
            for timer in self._timers.values():
                timer.cancel()

    async def _work(self) -> None:
        while True:
            key = await self._ready.get()
            self._waiting.discard(key)
            self._working.add(key)
            started_s = time.perf_counter()
            outcome = await self._look(key)
            self._working.discard(key)
            self._metrics.passes.labels(key.kind, outcome).inc()
            self._metrics.pass_seconds.labels(key.kind).observe(time.perf_counter() - started_s)
            if key in self._again:
                self._again.discard(key)
                self._push(key)

    async def _look(self, key: Key) -> str:
        """One pass; how it ended."""
        try:
            await self._pass(key)
        except Stale as error:
            log.info("stale", kind=key.kind, name=key.name, error=str(error))
            with contextlib.suppress(ApiError):
                await self._executor.refresh(key)
            self._retry(key)
            return "stale"
        except ApiError as error:
            log.warning("pass failed", kind=key.kind, name=key.name, error=str(error))
            with contextlib.suppress(ApiError):
                await self._executor.refresh(key)
            self._retry(key)
            return "failed"
        self._failures.pop(key, None)
        return "done"

    def _retry(self, key: Key) -> None:
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        pause_s = min(RETRY_MIN_S * 2 ** min(failures, 16), RETRY_MAX_S)
        self.wake(key, pause_s * random.uniform(0.5, 1.0))  # noqa: S311

    async def _pass(self, key: Key) -> None:
        found = self._decide(key)
        if found is None:
            return
        target, actions = found
        await self._executor.run(target, actions)

    def _decide(self, key: Key) -> tuple[Object, list[Action]] | None:
        world = self._world
        now = Moment(time.monotonic(), datetime.now(UTC))
        if key.kind == NODE and (node := world.nodes.get(key.name)) is not None:
            return node, storagenode.decide(node, world, now)
        if key.kind == VOLUME and (found := world.volumes.get(key.name)) is not None:
            return found, volume.decide(found, world, now)
        if key.kind == SNAPSHOT and (taken := world.snapshots.get(key.name)) is not None:
            return taken, snapshot.decide(taken, world, now)
        return None
