"""An API server in memory at the seam of `tercet_api.clients.Api`: request and lines.

Keeps objects by path, draws uids, counts resourceVersions and generations, applies JSON Patch and
merge patch, honours preconditions, finalizers and the status subresource. Knows no schema.
"""

import asyncio
import copy
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from tercet_api.clients import Conflict, NotFound, Refused

Json = dict[str, Any]


class FakeApi:
    """`objects` maps an object's path to it."""

    def __init__(self) -> None:
        self.objects: dict[str, Json] = {}
        self.version = 0
        self.watchers: list[tuple[str, asyncio.Queue[Json]]] = []

    async def request(
        self, method: str, path: str, body: Any = None, *, content: str = "", **_: Any
    ) -> Json:
        await asyncio.sleep(0)
        if method == "POST":
            return self._create(path, body)
        if method == "GET":
            return self._get(path)
        if method == "DELETE":
            return self._delete(path, body)
        return self._patch(path, body)

    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Json]:
        queue: asyncio.Queue[Json] = asyncio.Queue()
        self.watchers.append((path, queue))
        while True:
            yield await queue.get()

    def _get(self, path: str) -> Json:
        if path in self.objects:
            return copy.deepcopy(self.objects[path])
        if path.rsplit("/", 1)[-1].endswith("s"):
            items = [o for p, o in self.objects.items() if p.rsplit("/", 1)[0] == path]
            return {
                "metadata": {"resourceVersion": str(self.version)},
                "items": copy.deepcopy(items),
            }
        raise NotFound(path)

    def _create(self, path: str, body: Json) -> Json:
        made = copy.deepcopy(body)
        name = made["metadata"]["name"]
        if f"{path}/{name}" in self.objects:
            raise Conflict(f"{path}/{name}")
        made["metadata"] |= {"uid": str(uuid.uuid4()), "generation": 1}
        made.pop("status", None)
        self.objects[f"{path}/{name}"] = made
        return self._changed(f"{path}/{name}", "ADDED")

    def _delete(self, path: str, body: Json) -> Json:
        if path not in self.objects:
            raise NotFound(path)
        found = self.objects[path]
        wanted = (body or {}).get("preconditions", {}).get("uid")
        if wanted is not None and wanted != found["metadata"]["uid"]:
            raise Conflict(path)
        if found["metadata"].get("finalizers"):
            found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            return self._changed(path, "MODIFIED")
        answer = self._changed(path, "DELETED")
        del self.objects[path]
        return answer

    def _patch(self, path: str, body: Any) -> Json:
        status = path.endswith("/status")
        path = path.removesuffix("/status")
        if path not in self.objects:
            raise NotFound(path)
        before = self.objects[path]
        after = copy.deepcopy(before)
        if isinstance(body, dict):
            _merge(after, body)
        else:
            for step in body:
                _json_patch(after, step)
        kept = "spec" if status else "status"
        if kept in before:
            after[kept] = before[kept]
        elif kept in after:
            del after[kept]
        if after.get("spec") != before.get("spec"):
            after["metadata"]["generation"] += 1
        self.objects[path] = after
        return self._changed(path, "MODIFIED")

    def _changed(self, path: str, kind: str) -> Json:
        self.version += 1
        found = self.objects[path]
        found["metadata"]["resourceVersion"] = str(self.version)
        for watched, queue in self.watchers:
            if path.rsplit("/", 1)[0] == watched:
                queue.put_nowait({"type": kind, "object": copy.deepcopy(found)})
        return copy.deepcopy(found)


def _merge(target: Json, patch: Json) -> None:
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            _merge(target.setdefault(key, {}), value)
        else:
            target[key] = value


def _json_patch(target: Json, step: Json) -> None:
    *parents, last = step["path"].removeprefix("/").split("/")
    place: Any = target
    for key in parents:
        if key not in place:
            raise Refused(f"{step['path']}: no {key}")
        place = place[key]
    if step["op"] == "test":
        if place.get(last) != step["value"]:
            raise Refused(f"test of {step['path']} failed")
    elif step["op"] == "remove":
        place.pop(last)
    else:
        place[last] = step["value"]
