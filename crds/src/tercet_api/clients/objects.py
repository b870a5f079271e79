"""A kind of objects as typed models: list, get, create, delete, patch, and watch without end.

`Objects.watch` is how every piece follows the cluster: it lists, watches from there, and lists
again when the server says that the version is gone or the connection breaks, with a pause that
grows and has jitter. After each list it yields `Listed` with *all* objects, so that a follower can
drop what vanished while nobody looked; then one `Changed` or `Removed` for each event.

A stored object that this version's models cannot read is logged and left out of lists and watches:
one bad object must not take the others' watch down with it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog
from pydantic import ValidationError

from tercet_api.clients.api import (
    JSON_PATCH,
    MERGE_PATCH,
    WATCH_SERVER_TIMEOUT_S,
    Api,
    Json,
)
from tercet_api.clients.errors import ApiError, Expired
from tercet_api.names import SNAPSHOTS, STORAGENODES, VOLUMES
from tercet_api.objects import Object, Snapshot, StorageNode, Volume

PAUSE_MIN_S = 0.1
PAUSE_MAX_S = 5.0

log = structlog.get_logger(__name__)
O = TypeVar("O", bound=Object)  # noqa: E741


@dataclass(frozen=True, slots=True)
class Listed(Generic[O]):
    """Everything there is, after a list: what is not in it is gone."""

    objects: tuple[O, ...]


@dataclass(frozen=True, slots=True)
class Changed(Generic[O]):
    """An object is new or has changed."""

    object: O


@dataclass(frozen=True, slots=True)
class Removed(Generic[O]):
    """An object is gone; this is its last state."""

    object: O


Event = Listed[O] | Changed[O] | Removed[O]


def expect(path: str, value: object) -> Json:
    """JSON Patch: go on only if path has exactly this value (None: null or absent)."""
    return {"op": "test", "path": path, "value": value}


def put(path: str, value: object) -> Json:
    """JSON Patch: set a member, or insert into a list (`/-` appends)."""
    return {"op": "add", "path": path, "value": value}


def remove(path: str) -> Json:
    """JSON Patch: take a member or element away."""
    return {"op": "remove", "path": path}


class Objects(Generic[O]):
    """All objects of one kind (in one namespace, where the kind has namespaces)."""

    def __init__(self, api: Api, model: type[O], plural: str, *, namespace: str = "") -> None:
        self.api = api
        self.model = model
        scope = f"/namespaces/{namespace}" if namespace else ""
        self.path = f"/apis/{model.API_VERSION}{scope}/{plural}"

    async def list(self) -> tuple[O, ...]:
        """All readable objects. Raises ApiError."""
        return self._readable(await self.api.request("GET", self.path))

    async def get(self, name: str) -> O:
        """One object, from a consistent read. Raises NotFound, ApiError."""
        return self._parse(await self.api.request("GET", f"{self.path}/{name}"))

    async def create(self, new: O) -> O:
        """Create an object; its status is dropped by the server. Raises Conflict, Refused."""
        return self._parse(await self.api.request("POST", self.path, new.manifest()))

    async def delete(self, name: str, *, uid: str) -> None:
        """Ask for the deletion of just this object. Raises NotFound, Conflict (other uid)."""
        options = {"preconditions": {"uid": uid}}
        await self.api.request("DELETE", f"{self.path}/{name}", options)

    async def patch(self, name: str, patch: Json | Sequence[Json]) -> O:
        """Patch metadata and spec: a mapping is a merge patch, a sequence a JSON Patch."""
        return await self._patch(f"{self.path}/{name}", patch)

    async def patch_status(self, name: str, patch: Json | Sequence[Json]) -> O:
        """Patch status; the body has `status` (merge) or paths below `/status` (JSON Patch)."""
        return await self._patch(f"{self.path}/{name}/status", patch)

    async def watch(self, name: str | None = None) -> AsyncGenerator[Event[O], None]:
        """Follow all objects, or the one of this name, until the caller stops. Never raises."""
        pause_s = PAUSE_MIN_S
        while True:
            try:
                async with aclosing(self._follow(name)) as events:
                    async for event in events:
                        if not isinstance(event, Listed):
                            pause_s = PAUSE_MIN_S
                        yield event
            except Expired:
                log.info("watch expired, listing again", path=self.path)
            except ApiError as error:
                log.warning("watch broke, listing again", path=self.path, error=str(error))
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
            pause_s = min(pause_s * 2, PAUSE_MAX_S)

    async def _follow(self, name: str | None) -> AsyncGenerator[Event[O], None]:
        selector = {"fieldSelector": f"metadata.name={name}"} if name else {}
        answer = await self.api.request("GET", self.path, query=selector)
        version = str(answer["metadata"]["resourceVersion"])
        yield Listed(self._readable(answer))
        while True:
            query = selector | {
                "watch": "true",
                "resourceVersion": version,
                "allowWatchBookmarks": "true",
                "timeoutSeconds": str(WATCH_SERVER_TIMEOUT_S),
            }
            async with aclosing(self.api.lines(self.path, query)) as lines:
                async for line in lines:
                    kind, item = line["type"], line["object"]
                    if kind == "ERROR":
                        raise Expired(f"watch {self.path}: {item.get('message', item)}")
                    version = str(item["metadata"]["resourceVersion"])
                    if kind == "BOOKMARK":
                        continue
                    for found in self._readable({"items": [item]}):
                        yield Removed(found) if kind == "DELETED" else Changed(found)
            await asyncio.sleep(PAUSE_MIN_S)  # a server that ends watches at once is not hammered

    async def _patch(self, path: str, patch: Json | Sequence[Json]) -> O:
        if isinstance(patch, dict):
            answer = await self.api.request("PATCH", path, patch, content=MERGE_PATCH)
        else:
            answer = await self.api.request("PATCH", path, list(patch), content=JSON_PATCH)
        return self._parse(answer)

    def _parse(self, item: Json) -> O:
        try:
            return self.model.model_validate(item)
        except ValidationError as error:
            name = item.get("metadata", {}).get("name")
            raise ApiError(f"{self.path}/{name} cannot be read: {error}") from error

    def _readable(self, answer: Json) -> tuple[O, ...]:
        found = []
        for item in answer.get("items") or []:
            try:
                found.append(self._parse(item))
            except ApiError:
                log.exception("object left out", path=self.path)
        return tuple(found)


def storage_nodes(api: Api) -> Objects[StorageNode]:
    """The StorageNodes."""
    return Objects(api, StorageNode, STORAGENODES)


def volumes(api: Api) -> Objects[Volume]:
    """The Volumes."""
    return Objects(api, Volume, VOLUMES)


def snapshots(api: Api) -> Objects[Snapshot]:
    """The Snapshots."""
    return Objects(api, Snapshot, SNAPSHOTS)
