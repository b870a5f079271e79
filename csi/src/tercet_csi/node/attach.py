"""How a volume becomes a block device on this node: one protocol, two ways.

`KernelAttacher` where the kernel has an NVMe/TCP host, `UserSpaceAttacher` (tercet-attach over
`attach.proto`) elsewhere; `choose` decides once at start. Both are idempotent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio

from tercet_api.protos import attach_pb2, attach_pb2_grpc
from tercet_csi.errors import (
    CsiError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from tercet_csi.node.kernel import KernelAttacher
from tercet_csi.node.targets import Paths, Target, endpoint

ATTACH_TIMEOUT_MS = 60_000
CALL_TIMEOUT_S = 90.0
FABRICS = Path("/dev/nvme-fabrics")


class Attacher(Protocol):
    """Makes a volume a block device here."""

    async def attach(self, target: Target) -> str:
        """The device's path, usable."""
        ...

    async def detach(self, nqn: str) -> None:
        """Take it away; nothing when it is not there."""
        ...

    async def device_of(self, nqn: str) -> str | None:
        """The path of an attached volume's device."""
        ...

    async def paths(self) -> Mapping[str, Paths]:
        """Of every attached volume, by NQN: which paths it has."""
        ...

    async def set_paths(self, target: Target) -> None:
        """Give a volume that is attached these paths and no others, while it is in use."""
        ...

    async def ready(self) -> bool:
        """Whether it answers."""
        ...


_CODES: dict[grpc.StatusCode, type[CsiError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.PERMISSION_DENIED: FailedPrecondition,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


class UserSpaceAttacher:
    """tercet-attach on this node."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.replace("unix://", "unix:", 1)
        # tercet-attach's HTTP/2 refuses the socket's path as authority.
        self._channel = grpc.aio.insecure_channel(
            self._endpoint, options=[("grpc.default_authority", "localhost")]
        )
        self._stub = attach_pb2_grpc.AttacherStub(self._channel)

    async def attach(self, target: Target) -> str:
        """Attach by RPC. Raises the CsiError that fits its status."""
        request = attach_pb2.AttachRequest(
            subsystem_nqn=target.nqn,
            host_nqn=target.host_nqn,
            host_id=target.host_id,
            endpoints=[attach_pb2.Endpoint(address=a, port=p) for a, p in target.endpoints],
            timeout_ms=ATTACH_TIMEOUT_MS,
        )
        try:
            answer = await self._stub.Attach(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _mapped(error, f"attach {target.nqn}") from None
        return str(answer.device_path)

    async def detach(self, nqn: str) -> None:
        """Detach by RPC."""
        try:
            await self._stub.Detach(
                attach_pb2.DetachRequest(subsystem_nqn=nqn), timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise _mapped(error, f"detach {nqn}") from None

    async def device_of(self, nqn: str) -> str | None:
        """Ask what is attached."""
        try:
            answer = await self._stub.List(attach_pb2.ListRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _mapped(error, "list") from None
        for attached in answer.attached:
            if attached.subsystem_nqn == nqn:
                return str(attached.device_path)
        return None

    async def paths(self) -> Mapping[str, Paths]:
        """Ask what is attached."""
        try:
            answer = await self._stub.List(attach_pb2.ListRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _mapped(error, "list") from None
        return {attached.subsystem_nqn: _paths(attached) for attached in answer.attached}

    async def set_paths(self, target: Target) -> None:
        """Attach again: other endpoints replace those that it has (attach.proto)."""
        if await self.device_of(target.nqn) is not None:
            await self.attach(target)

    async def ready(self) -> bool:
        """Whether it answers List."""
        try:
            await self._stub.List(attach_pb2.ListRequest(), timeout=1.0)
        except grpc.aio.AioRpcError:
            return False
        return True


def _paths(attached: attach_pb2.Attached) -> Paths:
    found = {
        endpoint(path.endpoint.address, path.endpoint.port): path.optimized
        for path in attached.paths
    }
    return Paths.of(found)


def _mapped(error: grpc.aio.AioRpcError, what: str) -> CsiError:
    kind = _CODES.get(error.code(), Internal)
    return kind(f"tercet-attach cannot {what}: {error.details()}")


def choose(endpoint: str | None, fabrics: Path = FABRICS) -> Attacher:
    """The kernel's host where there is one, else tercet-attach at the endpoint.

    Raises FailedPrecondition when there is neither.
    """
    if fabrics.exists():
        return KernelAttacher(fabrics)
    if endpoint is None:
        raise FailedPrecondition(
            "this kernel has no NVMe/TCP host (modprobe nvme-tcp) and no --attacher is given"
        )
    return UserSpaceAttacher(endpoint)
