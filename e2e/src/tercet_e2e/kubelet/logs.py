"""Serves container logs to the API server, so that `kubectl logs` works.

HTTPS with the cluster's certificates; only the API server's own client certificate is let in.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

API_SERVER_NAME = "kube-apiserver"
CHUNK_BYTES = 64 << 10
FOLLOW_PAUSE_S = 0.2
TAIL_BYTES_MAX = 4 << 20

# namespace, pod, container -> the log and whether the container still runs; None: no such one
Find = Callable[[str, str, str], tuple[Path, Callable[[], bool]] | None]


def server_context(cert: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """TLS that demands a certificate of the cluster's authority."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(cert, key)
    return context


class LogServer:
    """The part of a kubelet's API that reads logs."""

    def __init__(self, find: Find) -> None:
        self._find = find
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self, address: str, port: int, context: ssl.SSLContext) -> None:
        """Starts to serve."""
        await self._runner.setup()
        await web.TCPSite(self._runner, address, port, ssl_context=context).start()

    async def stop(self) -> None:
        """Stops serving."""
        await self._runner.cleanup()

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        peer = transport.get_extra_info("peercert") if transport is not None else None
        names = [value for rdn in (peer or {}).get("subject", ()) for _, value in rdn]
        if API_SERVER_NAME not in names:
            raise web.HTTPForbidden(text="only the API server may read logs here")
        found = self._find(
            request.match_info["namespace"],
            request.match_info["pod"],
            request.match_info["container"],
        )
        if found is None:
            raise web.HTTPNotFound(text="no such container on this node")
        path, running = found
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        tail = request.query.get("tailLines")
        await _copy(
            path,
            response,
            running if request.query.get("follow") == "true" else None,
            int(tail) if tail else None,
        )
        await response.write_eof()
        return response


async def _copy(
    path: Path,
    response: web.StreamResponse,
    follow: Callable[[], bool] | None,
    tail_lines: int | None,
) -> None:
    if not path.exists():
        return
    with path.open("rb") as handle:
        if tail_lines is not None:
            handle.seek(_tail_offset(path, tail_lines))
        while True:
            alive = follow is not None and follow()  # before the read: what it says last is read
            while chunk := handle.read(CHUNK_BYTES):
                await response.write(chunk)
            if not alive:
                return
            await asyncio.sleep(FOLLOW_PAUSE_S)


def _tail_offset(path: Path, lines: int) -> int:
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = max(size - TAIL_BYTES_MAX, 0)
        handle.seek(start)
        content = handle.read(size - start)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n") and i + 1 < len(content)]
    if lines == 0:
        return size
    return start + (ends[-lines] if len(ends) >= lines else 0)
