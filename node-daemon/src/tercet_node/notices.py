"""Kubernetes events out of what the engine finds worth telling.

Best effort, by design: an event is for people, nothing may wait for one. The queue is bounded and
drops (counted) when the API server is away; the same words about the same object are said once a
minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from tercet_api.clients import Api, ApiError, Json, Unreachable
from tercet_api.names import API_VERSION

QUEUE_MAX = 256
AGAIN_S = 60.0
REMEMBERED_MAX = 1024
TRIES_MAX = 3
PAUSE_S = 1.0
MESSAGE_CHARS_MAX = 1024
EVENTS_PATH = "/api/v1/namespaces/default/events"
"""Events about cluster-scoped objects live in `default`: there kubectl describe looks for them."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class About:
    """The object that an event is about."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Said:
    """One event."""

    about: About
    reason: str
    message: str
    warning: bool


def body(said: Said, node: str, now: datetime) -> Json:
    """A core/v1 Event."""
    stamp = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{said.about.name}.", "namespace": "default"},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": said.about.kind,
            "name": said.about.name,
            "uid": said.about.uid,
        },
        "reason": said.reason,
        "message": said.message[:MESSAGE_CHARS_MAX],
        "type": "Warning" if said.warning else "Normal",
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
        "source": {"component": "tercet-agent", "host": node},
        "reportingComponent": "tercet.io/agent",
        "reportingInstance": node,
    }


class Notices:
    """A bounded queue of events, and the task that posts them."""

    def __init__(self, api: Api, node: str, dropped: Callable[[], None]) -> None:
        self._api = api
        self._node = node
        self._dropped = dropped
        self._queue: asyncio.Queue[Said] = asyncio.Queue(QUEUE_MAX)
        self._last: dict[Said, float] = {}

    def say(self, said: Said) -> None:
        """Post an event soon, unless it was said just now or too much is waiting."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._last.get(said, -AGAIN_S) < AGAIN_S:
            self._dropped()
            return
        if len(self._last) >= REMEMBERED_MAX:
            self._last.clear()
        self._last[said] = now_s
        try:
            self._queue.put_nowait(said)
        except asyncio.QueueFull:
            self._dropped()

    async def run(self) -> None:
        """Post until cancelled."""
        while True:
            said = await self._queue.get()
            posted = False
            for _ in range(TRIES_MAX):
                with contextlib.suppress(Unreachable):
                    posted = await self._post(said)
                    break
                await asyncio.sleep(PAUSE_S * random.uniform(0.5, 1.0))  # noqa: S311
            if not posted:
                self._dropped()

    async def _post(self, said: Said) -> bool:
        try:
            await self._api.request("POST", EVENTS_PATH, body(said, self._node, datetime.now(UTC)))
        except Unreachable:
            raise
        except ApiError as error:
            log.warning("event refused", object=said.about.name, error=str(error))
            return False
        return True
