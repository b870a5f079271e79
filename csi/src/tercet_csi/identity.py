"""CSI Identity: who the driver is and what it can do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from google.protobuf.wrappers_pb2 import BoolValue

from tercet_api.names import CSI_DRIVER
from tercet_csi.v1 import csi_pb2 as csi
from tercet_csi.v1 import csi_pb2_grpc

Ready = Callable[[], Awaitable[bool]]


class Identity(csi_pb2_grpc.IdentityServicer):
    """The same for controller and node; only readiness differs."""

    def __init__(self, ready: Ready) -> None:
        self._ready = ready

    async def GetPluginInfo(  # noqa: N802
        self, request: csi.GetPluginInfoRequest, context: Any
    ) -> csi.GetPluginInfoResponse:
        """Name and version."""
        return csi.GetPluginInfoResponse(name=CSI_DRIVER, vendor_version=version("tercet-csi"))

    async def GetPluginCapabilities(  # noqa: N802
        self, request: csi.GetPluginCapabilitiesRequest, context: Any
    ) -> csi.GetPluginCapabilitiesResponse:
        """Controller service, topology, expansion while in use."""
        service = csi.PluginCapability.Service
        expansion = csi.PluginCapability.VolumeExpansion
        capabilities = [
            csi.PluginCapability(service=service(type=kind))
            for kind in (service.CONTROLLER_SERVICE, service.VOLUME_ACCESSIBILITY_CONSTRAINTS)
        ]
        capabilities.append(csi.PluginCapability(volume_expansion=expansion(type=expansion.ONLINE)))
        return csi.GetPluginCapabilitiesResponse(capabilities=capabilities)

    async def Probe(  # noqa: N802
        self, request: csi.ProbeRequest, context: Any
    ) -> csi.ProbeResponse:
        """Healthy; ready says whether what it needs answers."""
        return csi.ProbeResponse(ready=BoolValue(value=await self._ready()))
