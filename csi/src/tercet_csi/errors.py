"""Every way in which a CSI call is refused, as one tree.

CsiError
├── InvalidArgument     INVALID_ARGUMENT      the request can never be served
├── NotFound            NOT_FOUND             no such volume, snapshot, node or path
├── AlreadyExists       ALREADY_EXISTS        the name is taken by something else
├── OutOfRange          OUT_OF_RANGE          a size that no volume can have
├── Exhausted           RESOURCE_EXHAUSTED    no room now
├── FailedPrecondition  FAILED_PRECONDITION   not in this state; the message says what to do first
├── Aborted             ABORTED               another call on the same object is under way
├── Unavailable         UNAVAILABLE           something that is needed is away; try again
├── DeadlineExceeded    DEADLINE_EXCEEDED     it takes longer; try again
└── Internal            INTERNAL              a tool failed; its output is in the message

Each message says what, which object, and what to do. `server.ErrorInterceptor` turns them into
gRPC statuses; nothing else does.
"""

from __future__ import annotations

import grpc


class CsiError(Exception):
    """Base: a refusal with its gRPC status code."""

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL


class InvalidArgument(CsiError):
    """The request can never be served."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(CsiError):
    """No such volume, snapshot, node or path."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(CsiError):
    """The name is taken by something that differs."""

    code = grpc.StatusCode.ALREADY_EXISTS


class OutOfRange(CsiError):
    """A size that no volume can have, or a bad list position."""

    code = grpc.StatusCode.OUT_OF_RANGE


class Exhausted(CsiError):
    """No room now."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(CsiError):
    """Not in this state."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(CsiError):
    """Another call on the same object is under way."""

    code = grpc.StatusCode.ABORTED


class Unavailable(CsiError):
    """Something that is needed is away."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(CsiError):
    """It takes longer than the call may."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Internal(CsiError):
    """A tool failed."""

    code = grpc.StatusCode.INTERNAL
