"""Serves CSI over a Unix socket, turns errors into statuses, and answers health and metrics.

Every call is logged with its method, duration and outcome; requests are not, since they may carry
secrets. What a call does is left to the services.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import _async as health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import Counter, Histogram, start_http_server

from tercet_csi.errors import CsiError
from tercet_csi.registration import registered

GRACE_S = 5.0
MESSAGE_BYTES_MAX = 4 * 1024 * 1024

CALLS = Counter("tercet_csi_calls_total", "CSI calls by method and status", ["method", "code"])
SECONDS = Histogram("tercet_csi_call_seconds", "Duration of CSI calls", ["method"])

log = structlog.get_logger("csi")

Handler = Callable[[Any, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[Any]]


Translate = Callable[[Exception], CsiError | None]


def _unknown(error: Exception) -> CsiError | None:
    return None


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns CsiError into its status and everything else into INTERNAL with a logged traceback.

    `translate` names the errors of what a service is built on that are no surprise.
    """

    def __init__(self, translate: Translate = _unknown) -> None:
        self._translate = translate

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap a unary handler; leave streams (health watches) alone."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        method = handler_call_details.method.rsplit("/", 1)[-1]
        wrapped = _guarded(method, handler.unary_unary, self._translate)
        return grpc.unary_unary_rpc_method_handler(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _guarded(method: str, call: Any, translate: Translate) -> Handler:
    async def run(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        started = time.monotonic()
        code, message = grpc.StatusCode.OK, ""
        try:
            return await call(request, context)
        except CsiError as error:
            code, message = error.code, str(error)
        except Exception as error:  # the boundary: a bug must not end the service
            if (known := translate(error)) is not None:
                code, message = known.code, str(known)
            else:
                log.exception("call failed unexpectedly", method=method)
                code = grpc.StatusCode.INTERNAL
                message = f"{method} failed unexpectedly: see the log"
        finally:
            seconds = time.monotonic() - started
            CALLS.labels(method, code.name).inc()
            SECONDS.labels(method).observe(seconds)
            if code is not grpc.StatusCode.OK:
                log.warning("refused", method=method, code=code.name, message=message)
            elif method not in {"Probe", "Check"}:
                log.info("done", method=method, seconds=round(seconds, 3))
        await context.abort(code, message)
        raise AssertionError("abort raises")

    return run


async def serve(
    endpoint: str,
    http: str | None,
    register: Callable[[grpc.aio.Server], None],
    translate: Translate = _unknown,
    *,
    kubelet: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    endpoint: `unix://PATH`; a stale socket is replaced. http: `ADDRESS:PORT` of metrics, or none.
    kubelet: its plugins_registry, for a node service that shall register itself.
    """
    if not endpoint.startswith("unix://"):
        raise ValueError(f"endpoint {endpoint!r} must be unix://PATH")
    path = Path(endpoint.removeprefix("unix://"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(translate)],
        options=[("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)],
    )
    register(server)
    probes = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(probes, server)
    await probes.set("", health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    if http is not None:
        address, port = http.rsplit(":", 1)
        start_http_server(int(port), address)
    log.info("serving", endpoint=endpoint, http=http)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with registered(kubelet, endpoint):
        await stop.wait()
    await server.stop(GRACE_S)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
