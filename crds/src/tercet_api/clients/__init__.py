"""Typed access to Tercet's objects through the API server. Importing this imports a client.

async with Api(kubeconfig) as api:
    async for event in volumes(api).watch():
        match event:
            case Listed(objects): ...
            case Changed(volume): ...
            case Removed(volume): ...
"""

from tercet_api.clients.api import Api, Json
from tercet_api.clients.errors import (
    ApiError,
    Conflict,
    Expired,
    Forbidden,
    NotFound,
    Refused,
    Unreachable,
)
from tercet_api.clients.objects import (
    Changed,
    Event,
    Listed,
    Objects,
    Removed,
    expect,
    put,
    remove,
    snapshots,
    storage_nodes,
    volumes,
)

__all__ = [
    "Api",
    "ApiError",
    "Changed",
    "Conflict",
    "Event",
    "Expired",
    "Forbidden",
    "Json",
    "Listed",
    "NotFound",
    "Objects",
    "Refused",
    "Removed",
    "Unreachable",
    "expect",
    "put",
    "remove",
    "snapshots",
    "storage_nodes",
    "volumes",
]
