"""What can go wrong between the agent and its engine, as one tree.

    EngineError
    |- EngineAway       no engine answers at the socket, or it is not configured yet: try again
    |- OutcomeUnknown   the answer was lost, or the epoch ended meanwhile: ask again
    |- NotHere          no such volume, replica or snapshot in this engine
    |- NoSpace          the devices are full
    `- Rejected         what was asked cannot be in this state, or never can be

Failures at the API server are `tercet_api.clients.ApiError`.
"""

from __future__ import annotations

import grpc


class EngineError(Exception):
    """A call to the engine failed. Says the call and the engine's message."""


class EngineAway(EngineError):
    """No engine answers, or it does not serve yet."""


class OutcomeUnknown(EngineError):
    """Whether it was carried out is not known; calls are idempotent, so ask again."""


class NotHere(EngineError):
    """The engine has no such volume, replica or snapshot."""


class NoSpace(EngineError):
    """The node's devices cannot hold it."""


class Rejected(EngineError):
    """The engine refuses."""


_BY_CODE: dict[grpc.StatusCode, type[EngineError]] = {
    grpc.StatusCode.UNAVAILABLE: EngineAway,
    grpc.StatusCode.CANCELLED: EngineAway,
    grpc.StatusCode.ABORTED: OutcomeUnknown,
    grpc.StatusCode.DEADLINE_EXCEEDED: OutcomeUnknown,
    grpc.StatusCode.NOT_FOUND: NotHere,
    grpc.StatusCode.RESOURCE_EXHAUSTED: NoSpace,
    grpc.StatusCode.INVALID_ARGUMENT: Rejected,
    grpc.StatusCode.FAILED_PRECONDITION: Rejected,
    grpc.StatusCode.ALREADY_EXISTS: Rejected,
    grpc.StatusCode.UNIMPLEMENTED: Rejected,
}


def engine_error(call: str, error: grpc.RpcError) -> EngineError:
    """The typed form of a failed call."""
    assert isinstance(error, grpc.aio.AioRpcError)
    kind = _BY_CODE.get(error.code(), EngineError)
    return kind(f"{call}: {error.code().name}: {error.details() or 'no message'}")
