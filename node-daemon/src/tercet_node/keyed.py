"""Runs a handler for keys that were marked: level-triggered, bounded, one at a time for each key.

A mark says only "look at this again". A key that is marked while its handler runs is looked at once
more afterwards; marks that pile up are one look. A handler that fails with an expected error is run
again after a pause that grows from 50 ms to 2 s and has jitter, without end: the state of the world
has to be reached whenever it becomes reachable. Other exceptions end the agent (crash-only).

The queue holds each key once, so that it is as long as there are objects, at most.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable

import structlog

from tercet_api.clients import ApiError
from tercet_node.errors import EngineError

PAUSE_S_MIN = 0.05
PAUSE_S_MAX = 2.0
FAILURES_LOGGED_EVERY = 20

log = structlog.get_logger(__name__)


class NotYet(Exception):
    """What the handler needs is not there yet and no mark will say when it is: look again."""


Handler = Callable[[str], Awaitable[float | None]]
"""Returns after how many seconds to look again without a mark, or None."""


def pause_s(failures: int, jitter: float) -> float:
    """How long to wait after that many failures in a row; jitter is within 0..1."""
    assert failures >= 1
    longest = min(PAUSE_S_MAX, PAUSE_S_MIN * 2.0 ** min(failures - 1, 16))
    return longest * (0.5 + 0.5 * jitter)


class Keyed:
    """Marked keys and the workers that look at them."""

    def __init__(self, name: str, handler: Handler, *, parallel: int) -> None:
        assert parallel >= 1
        self.name = name
        self._handler = handler
        self._parallel = parallel
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self._running: set[str] = set()
        self._again: set[str] = set()
        self._failures: dict[str, int] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def mark(self, key: str) -> None:
        """Have the key looked at, soon."""
        if key in self._running:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._queue.put_nowait(key)

    def mark_all(self, keys: Iterable[str]) -> None:
        """Have all these keys looked at."""
        for key in tuple(keys):
            self.mark(key)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._parallel):
                group.create_task(self._work(), name=f"{self.name}-{number}")

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            self._queued.discard(key)
            self._running.add(key)
            if timer := self._timers.pop(key, None):
                timer.cancel()
            try:
                self._later(key, await self._handler(key))
                self._failures.pop(key, None)
            except (ApiError, EngineError, NotYet) as error:
                self._failed(key, error)
            finally:
                self._running.discard(key)
            if key in self._again:
                self._again.discard(key)
                self.mark(key)

    def _failed(self, key: str, error: Exception) -> None:
        failures = self._failures.get(key, 0) + 1
        self._failures[key] = failures
        if not isinstance(error, NotYet) and failures % FAILURES_LOGGED_EVERY == 1:
            log.warning("will try again", work=self.name, object=key, error=str(error))
        # The random number spreads load; nothing depends on who draws it.
        self._later(key, pause_s(failures, random.random()))  # noqa: S311

    def _later(self, key: str, delay_s: float | None) -> None:
        if delay_s is None:
            return
        loop = asyncio.get_running_loop()
        self._timers[key] = loop.call_later(delay_s, self._timer_fired, key)

    def _timer_fired(self, key: str) -> None:
        self._timers.pop(key, None)
        self.mark(key)
