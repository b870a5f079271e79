"""`/healthz`, `/readyz` and `/metrics` over plain HTTP.

Healthy: the event loop answers. Ready: the objects have been listed and the engine is configured,
so that a rolling update waits for a node that can take part again.

Three fixed pages for probes and scrapers, one request a connection: a web framework would cost the
agent several MiB for them. Whatever is not such a request is answered with 400, or with silence.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

REQUEST_BYTES_MAX = 8192
REQUEST_TIMEOUT_S = 5.0
CONNECTIONS_MAX = 32
TEXT = "text/plain; charset=utf-8"

Page = tuple[HTTPStatus, str, bytes]


class Pages:
    """What there is to see."""

    def __init__(self, registry: CollectorRegistry, ready: Callable[[], str | None]) -> None:
        self._registry = registry
        self._ready = ready

    def page(self, request: bytes) -> Page:
        """The answer to the head of a request."""
        line = request.split(b"\r\n", 1)[0].split(b" ")
        if len(line) != 3 or not line[2].startswith(b"HTTP/1."):
            return HTTPStatus.BAD_REQUEST, TEXT, b"bad request\n"
        if line[0] != b"GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, TEXT, b"GET only\n"
        known: dict[bytes, Callable[[], Page]] = {
            b"/healthz": lambda: (HTTPStatus.OK, TEXT, b"ok\n"),
            b"/readyz": self._readyz,
            b"/metrics": self._metrics,
        }
        found = known.get(line[1].split(b"?", 1)[0])
        return found() if found else (HTTPStatus.NOT_FOUND, TEXT, b"not found\n")

    def _readyz(self) -> Page:
        missing = self._ready()
        if missing is None:
            return HTTPStatus.OK, TEXT, b"ok\n"
        return HTTPStatus.SERVICE_UNAVAILABLE, TEXT, f"not ready: {missing}\n".encode()

    def _metrics(self) -> Page:
        return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self._registry)


async def serve(listen: str, registry: CollectorRegistry, ready: Callable[[], str | None]) -> None:
    """Serve on `listen` until cancelled. ready() says what is missing, or None."""
    pages = Pages(registry, ready)
    places = asyncio.Semaphore(CONNECTIONS_MAX)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(
            ConnectionError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
        ):
            if not places.locked():
                async with places, asyncio.timeout(REQUEST_TIMEOUT_S):
                    await _answer(pages, reader, writer)
        writer.close()

    host, _, port = listen.rpartition(":")
    server = await asyncio.start_server(
        connected, host.strip("[]"), int(port), limit=REQUEST_BYTES_MAX
    )
    async with server:
        await server.serve_forever()


async def _answer(pages: Pages, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    status, kind, body = pages.page(await reader.readuntil(b"\r\n\r\n"))
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
