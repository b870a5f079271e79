"""Health and metrics over HTTP: `/healthz` (alive), `/readyz` (can work), `/metrics`.

An operator that does not lead is healthy and ready: it can lead at any moment. One that leads is
healthy while its watches move.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tercet_operator.metrics import Metrics

Check = Callable[[], str | None]
"""None when all is well, else what is wrong."""


@asynccontextmanager
async def serving(
    address: str, metrics: Metrics, healthy: Check, ready: Check
) -> AsyncIterator[None]:
    """Serve on HOST:PORT until the block ends."""

    def answer(check: Check) -> web.Response:
        wrong = check()
        return web.Response(text=f"{wrong or 'ok'}\n", status=503 if wrong else 200)

    async def healthz(_: web.Request) -> web.Response:
        return answer(healthy)

    async def readyz(_: web.Request) -> web.Response:
        return answer(ready)

    async def show_metrics(_: web.Request) -> web.Response:
        body = generate_latest(metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes(
        [
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", show_metrics),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    host, _, port = address.rpartition(":")
    try:
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
        yield
    finally:
        await runner.cleanup()
