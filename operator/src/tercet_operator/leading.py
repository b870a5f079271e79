"""One operator's life: wait to be elected, work while it leads, leave when it does not.

When leadership is lost the process ends with an error, as upstream controllers do: a fresh start is
the one way back to a state that is known to be clean (crash-only).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path

import structlog

from tercet_api.clients import Api, ApiError, Json
from tercet_api.coordination import Election, leases
from tercet_api.names import OPERATOR_LEASE
from tercet_operator.metrics import Metrics
from tercet_operator.reconciler import Reconciler
from tercet_operator.serving import serving
from tercet_operator.signer import Signer
from tercet_operator.watching import STILL_S, Resync, Watching, run_kopf
from tercet_operator.world import World

OPEN_RETRY_S = 1.0
GAUGES_S = 5.0
REQUESTS_MAX = 1024
REQUEST_TRIES_MAX = 5

log = structlog.get_logger(__name__)


class LeadershipLost(Exception):
    """Another operator may lead now: this process must end."""


class Operator:
    """A candidate, and the leader while it is elected."""

    def __init__(self, api: Api, kubeconfig: Path | None, namespace: str, world: World) -> None:
        self._api = api
        self._kubeconfig = kubeconfig
        self._metrics = Metrics()
        self._world = world
        identity = f"{socket.gethostname()}_{os.getpid()}_{uuid.uuid4().hex[:8]}"
        self._election = Election(leases(api, namespace), OPERATOR_LEASE, identity)
        self._reconciler = Reconciler(api, self._world, self._metrics)
        self._requests: asyncio.Queue[Json] = asyncio.Queue(REQUESTS_MAX)
        self._watching = Watching(self._world, self._reconciler.wake, self._request)
        self._leads_since_s: float | None = None
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End in order: give the Lease back, answer what is under way."""
        self._stopping.set()

    def healthy(self) -> str | None:
        """What is wrong with this process, if anything."""
        if self._leads_since_s is None:
            return None
        still_s = time.monotonic() - max(self._watching.moved_s, self._leads_since_s)
        return f"watches stand still for {still_s:.0f} s" if still_s > STILL_S else None

    def ready(self) -> str | None:
        """Whether it can lead, or does."""
        return self.healthy()

    async def run(self, http: str) -> None:
        """Until `stop`. Raises LeadershipLost."""
        async with serving(http, self._metrics, self.healthy, self.ready):
            await self._until_stopped(self._lead())

    async def _until_stopped(self, work: Awaitable[None]) -> None:
        running = asyncio.ensure_future(work)
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        try:
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        finally:
            running.cancel()
            stopping.cancel()
            await asyncio.gather(running, stopping, return_exceptions=True)

    async def _lead(self) -> None:
        async with self._election.lead() as lost:
            self._leads_since_s = time.monotonic()
            self._metrics.leading.set(1)
            try:
                await self._work(lost)
            except BaseExceptionGroup as group:
                if group.subgroup(LeadershipLost) is not None:
                    raise LeadershipLost("another operator may lead now") from group
                raise
            finally:
                self._metrics.leading.set(0)
                self._leads_since_s = None

    async def _work(self, lost: asyncio.Event) -> None:
        signer = Signer(self._api)
        await self._open(signer)
        resync = Resync(self._api, self._watching)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._leave(lost), name="leave")
            # Everything is known before anything is decided: a world with holes would place a
            # volume where another one is promised the room.
            while True:
                try:
                    await resync.once()
                    break
                except ApiError as error:
                    log.warning("cannot list yet", error=str(error))
                    await asyncio.sleep(OPEN_RETRY_S)
            group.create_task(self._reconciler.run(), name="reconciler")
            group.create_task(self._watch(), name="watches")
            group.create_task(resync.run(), name="resync")
            group.create_task(self._sign(signer), name="signer")
            group.create_task(self._gauges(), name="gauges")

    async def _watch(self) -> None:
        # kopf takes the process's signals for itself: when it returns, it was told to end.
        await run_kopf(self._watching, self._kubeconfig)
        self.stop()

    async def _leave(self, lost: asyncio.Event) -> None:
        await lost.wait()
        raise LeadershipLost

    async def _open(self, signer: Signer) -> None:
        while True:
            try:
                await signer.open()
                self._world.roll = await signer.roll()
                return
            except ApiError as error:
                log.warning("certificate authority is not there yet", error=str(error))
                await asyncio.sleep(OPEN_RETRY_S)

    def _request(self, item: Json) -> None:
        try:
            self._requests.put_nowait(item)
        except asyncio.QueueFull:
            # Its next event, or the next list of the watch, brings it again.
            log.warning("too many certificate requests", left_out=item["metadata"]["name"])

    async def _sign(self, signer: Signer) -> None:
        decided: dict[str, None] = {}
        while True:
            item = await self._requests.get()
            uid = item["metadata"]["uid"]
            if uid in decided:
                continue  # an event of our own approval
            outcome = await self._sign_one(signer, item)
            self._metrics.certificates.labels(outcome).inc()
            if outcome != "failed":
                decided[uid] = None
                while len(decided) > REQUESTS_MAX:
                    decided.pop(next(iter(decided)))

    async def _sign_one(self, signer: Signer, item: Json) -> str:
        name = item["metadata"]["name"]
        for attempt in range(REQUEST_TRIES_MAX):
            try:
                return "signed" if await signer.handle(item, self._world) else "denied"
            except ApiError as error:
                log.warning("certificate request failed", request=name, error=str(error))
                await asyncio.sleep(0.1 * 2**attempt)
                item = await self._reread(item)
        return "failed"

    async def _reread(self, item: Json) -> Json:
        path = f"/apis/certificates.k8s.io/v1/certificatesigningrequests/{item['metadata']['name']}"
        try:
            return await self._api.request("GET", path)
        except ApiError:
            return item

    async def _gauges(self) -> None:
        while True:
            world = self._world
            for kind, count in (
                ("StorageNode", len(world.nodes)),
                ("Volume", len(world.volumes)),
                ("Snapshot", len(world.snapshots)),
            ):
                self._metrics.objects.labels(kind).set(count)
            phases = Counter(v.status.phase or "Pending" for v in world.volumes.values())
            self._metrics.volumes.clear()
            for phase, number in phases.items():
                self._metrics.volumes.labels(phase).set(number)
            await asyncio.sleep(GAUGES_S)
