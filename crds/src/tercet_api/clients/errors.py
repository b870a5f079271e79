"""What can go wrong between a piece and the API server, as one tree.

ApiError
|- NotFound       404: there is no such object
|- Conflict       409: it exists already, or is not at the resourceVersion that was named
|- Refused        422: a validation rule, a CEL rule or a JSON Patch `test` says no
|- Forbidden      401, 403: these credentials may not do that
|- Expired        410: the resourceVersion to watch from is gone; list again
`- Unreachable    no answer, or one that leaves open whether the request was carried out
"""

from __future__ import annotations


class ApiError(Exception):
    """The API server refused, or was not there. Says the request and the server's message."""


class NotFound(ApiError):
    """There is no such object."""


class Conflict(ApiError):
    """The object exists already, or is not as the request assumed."""


class Refused(ApiError):
    """The object would be invalid, or a `test` of a JSON Patch failed."""


class Forbidden(ApiError):
    """These credentials may not do that."""


class Expired(ApiError):
    """The version to watch from is no longer known to the server."""


class Unreachable(ApiError):
    """No answer: whether the request was carried out is not known."""


BY_STATUS: dict[int, type[ApiError]] = {
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Expired,
    422: Refused,
}
