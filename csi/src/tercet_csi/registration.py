"""Registers the node service with the kubelet, so that no sidecar is needed for it.

The kubelet watches a folder for sockets (`<root>/plugins_registry`), asks each who it is, and then
talks to the endpoint that it is told (k8s.io/kubelet, pluginregistration/v1). What fails it tries
again by itself, as it looks through the folder again when it starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog

from tercet_api.names import CSI_DRIVER
from tercet_csi.v1 import pluginregistration_pb2 as pb
from tercet_csi.v1 import pluginregistration_pb2_grpc as pb_grpc

SOCKET = f"{CSI_DRIVER}-reg.sock"
CSI_PLUGIN = "CSIPlugin"
VERSIONS = ("1.0.0",)
"""Of CSI, as the kubelet counts them: the major version alone matters."""

log = structlog.get_logger("csi")
Context = grpc.aio.ServicerContext[Any, Any]


class Registration(pb_grpc.RegistrationServicer):
    """Tells the kubelet who is here, and logs what it makes of it."""

    def __init__(self, endpoint: Path) -> None:
        self._endpoint = endpoint

    async def GetInfo(  # noqa: N802
        self, request: pb.InfoRequest, context: Context
    ) -> pb.PluginInfo:
        """Type, name and endpoint."""
        return pb.PluginInfo(
            type=CSI_PLUGIN,
            name=CSI_DRIVER,
            endpoint=str(self._endpoint),
            supported_versions=VERSIONS,
        )

    async def NotifyRegistrationStatus(  # noqa: N802
        self, request: pb.RegistrationStatus, context: Context
    ) -> pb.RegistrationStatusResponse:
        """What came of it."""
        if request.plugin_registered:
            log.info("registered with the kubelet", endpoint=str(self._endpoint))
        else:
            log.warning("the kubelet refuses, and will ask again", why=request.error)
        return pb.RegistrationStatusResponse()


@contextlib.asynccontextmanager
async def registered(folder: Path | None, endpoint: str) -> AsyncIterator[None]:
    """Offers the service to the kubelet while the block runs; nothing without a folder.

    folder: the kubelet's plugins_registry. endpoint: `unix://PATH`, where CSI is served already, as
    the kubelet sees it.
    """
    if folder is None:
        yield
        return
    path = folder / SOCKET
    path.unlink(missing_ok=True)
    server = grpc.aio.server()
    service = Registration(Path(endpoint.removeprefix("unix://")))
    pb_grpc.add_RegistrationServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)
        path.unlink(missing_ok=True)
