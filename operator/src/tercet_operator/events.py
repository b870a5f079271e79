"""Events: what happened, for `kubectl describe` and `kubectl get events`.

Posted beside the passes, by one task from a bounded queue: no pass waits for an Event, and a slow
API server loses news rather than time. What is lost is logged; conditions tell the present anyway.
"""

from __future__ import annotations

import asyncio
import secrets
from datetime import UTC, datetime

import structlog

from tercet_api.clients import Api, ApiError, Json
from tercet_api.objects import Object
from tercet_operator.actions import Notice
from tercet_operator.metrics import Metrics

NAMESPACE = "default"
"""Where events of cluster-scoped objects stand."""
COMPONENT = "tercet-operator"
WAITING_MAX = 4096
NAME_CHARS_MAX = 230
MESSAGE_CHARS_MAX = 1024

log = structlog.get_logger(__name__)


class Events:
    """Posts Events on objects."""

    def __init__(self, api: Api, metrics: Metrics) -> None:
        self._api = api
        self._metrics = metrics
        self._waiting: asyncio.Queue[Json] = asyncio.Queue(WAITING_MAX)

    def post(self, target: Object, notice: Notice) -> None:
        """Log it, count it, and have it posted."""
        said = {"reason": notice.reason, "message": notice.message}
        log.info("transition", kind=target.KIND, name=target.name, **said)
        self._metrics.transitions.labels(target.KIND, notice.reason).inc()
        try:
            self._waiting.put_nowait(event(target, notice, datetime.now(UTC)))
        except asyncio.QueueFull:
            log.warning("event lost: too many", kind=target.KIND, name=target.name, **said)

    async def run(self) -> None:
        """Until cancelled."""
        path = f"/api/v1/namespaces/{NAMESPACE}/events"
        while True:
            body = await self._waiting.get()
            try:
                await self._api.request("POST", path, body)
            except ApiError as error:
                log.warning("event lost", name=body["metadata"]["name"], error=str(error))


def event(target: Object, notice: Notice, now: datetime) -> Json:
    """The Event object."""
    text = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{target.name[:NAME_CHARS_MAX]}.{secrets.token_hex(8)}"},
        "involvedObject": {
            "apiVersion": target.API_VERSION,
            "kind": target.KIND,
            "name": target.name,
            "uid": target.uid,
        },
        "type": notice.severity.value,
        "reason": notice.reason,
        "message": notice.message[:MESSAGE_CHARS_MAX],
        "firstTimestamp": text,
        "lastTimestamp": text,
        "count": 1,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": COMPONENT,
    }
