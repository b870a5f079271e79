"""The client over a real socket: what a watch makes of what an API server may send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from tercet_api.clients import (
    Api,
    ApiError,
    Changed,
    Conflict,
    Event,
    Forbidden,
    Json,
    Listed,
    NotFound,
    Refused,
    Removed,
    Unreachable,
    expect,
    volumes,
)
from tercet_api.objects import Metadata, Volume, VolumeSpec

PATH = "/apis/tercet.io/v1alpha1/volumes"


def item(name: str, version: int, **spec: Any) -> Json:
    """A Volume as JSON."""
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version)},
        "spec": {"sizeBytes": 1 << 30, **spec},
    }


class Server:
    """Answers as it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str], str]] = []
        self.status = 200
        self.lists: list[Json] = []
        self.streams: list[list[Json]] = []
        """What each watch gets; after the last one watches stay open and silent."""
        self.silence = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.text()
        self.asked.append((request.method, request.path, dict(request.query), body))
        if request.query.get("watch"):
            return await self._stream(request)
        if self.status != 200:
            return web.json_response({"message": "said so"}, status=self.status)
        if request.method == "GET" and request.path == PATH:
            listed = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
            return web.json_response(listed)
        return web.json_response(item("v", 1))

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        if not self.streams:
            await self.silence.wait()
            return response
        for event in self.streams.pop(0):
            await response.write(json.dumps(event).encode() + b"\n")
        return response


@asynccontextmanager
async def connected(folder: Path, server: Server) -> AsyncIterator[Api]:
    """The server on a port, and a client with a kubeconfig for it."""
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    try:
        async with Api(path) as api:
            yield api
    finally:
        server.silence.set()
        await runner.cleanup()


async def first(
    api: Api, enough: Callable[[list[Event[Volume]]], bool], name: str | None = None
) -> list[Event[Volume]]:
    """The events of a watch until there are enough."""
    found: list[Event[Volume]] = []
    async with asyncio.timeout(60), aclosing(volumes(api).watch(name)) as events:
        async for event in events:
            found.append(event)
            if enough(found):
                break
    return found


def listed(version: int, *items: Json) -> Json:
    """The answer to a list."""
    return {"metadata": {"resourceVersion": str(version)}, "items": list(items)}


async def test_list_then_watch_from_there(tmp_path: Path) -> None:
    """Bookmarks move the place to go on from; nothing is listed twice."""
    server = Server()
    server.lists = [listed(5, item("a", 3))]
    bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "40"}}}
    server.streams = [
        [{"type": "MODIFIED", "object": item("a", 7)}, bookmark],
        [{"type": "DELETED", "object": item("a", 41)}],
    ]
    async with connected(tmp_path, server) as api:
        found = await first(api, lambda events: len(events) == 3)
    assert [type(event) for event in found] == [Listed, Changed, Removed]
    watches = [query for _, _, query, _ in server.asked if query.get("watch")]
    assert [query["resourceVersion"] for query in watches] == ["5", "40"]
    assert all(query["allowWatchBookmarks"] == "true" for query in watches)
    assert all(int(query["timeoutSeconds"]) > 0 for query in watches)


async def test_an_expired_version_is_listed_again(tmp_path: Path) -> None:
    """Whatever vanished meanwhile is missing from the second list."""
    server = Server()
    gone = {"type": "ERROR", "object": {"code": 410, "message": "too old"}}
    server.lists = [listed(5, item("a", 3), item("b", 4)), listed(90, item("b", 4))]
    server.streams = [[gone]]
    async with connected(tmp_path, server) as api:
        found = await first(api, lambda events: len(events) == 2)
    names = [[v.name for v in event.objects] for event in found if isinstance(event, Listed)]
    assert names == [["a", "b"], ["b"]]


async def test_one_bad_object_does_not_take_the_others_down(tmp_path: Path) -> None:
    """It is left out, from lists and from watches."""
    server = Server()
    server.lists = [listed(5, item("bad", 3, replicas=9), item("good", 4))]
    server.streams = [
        [
            {"type": "ADDED", "object": item("worse", 6, sizeBytes="x")},
            {"type": "ADDED", "object": item("fine", 7)},
        ]
    ]
    async with connected(tmp_path, server) as api:
        found = await first(api, lambda events: len(events) == 2)
    assert isinstance(found[0], Listed)
    assert [v.name for v in found[0].objects] == ["good"]
    assert isinstance(found[1], Changed)
    assert found[1].object.name == "fine"


async def test_one_object(tmp_path: Path) -> None:
    """A watch of one name asks for no other."""
    server = Server()
    server.lists = [listed(5, item("a", 3))]
    async with connected(tmp_path, server) as api:
        await first(api, lambda events: len(events) == 1, name="a")
    assert server.asked[0][2] == {"fieldSelector": "metadata.name=a"}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, Forbidden),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (422, Refused),
        (429, Unreachable),
        (500, Unreachable),
        (504, Unreachable),
    ],
)
async def test_errors(tmp_path: Path, status: int, error: type[ApiError]) -> None:
    """Each has its type, and says what was asked and what the server said. None is retried."""
    server = Server()
    server.status = status
    async with connected(tmp_path, server) as api:
        with pytest.raises(error, match=f"PATCH {PATH}/v/status: {status}: said so"):
            await volumes(api).patch_status("v", [expect("/metadata/uid", "x")])
    assert len(server.asked) == 1


async def test_no_server(tmp_path: Path) -> None:
    """Nobody there is Unreachable, too."""
    server = Server()
    async with connected(tmp_path, server) as api:
        pass
    async with Api(tmp_path / "kubeconfig") as api:
        with pytest.raises(Unreachable, match="no answer"):
            await volumes(api).list()


async def test_requests(tmp_path: Path) -> None:
    """Merge or JSON patch by its type; deletion of just this object; no status on creation."""
    server = Server()
    async with connected(tmp_path, server) as api:
        objects = volumes(api)
        await objects.create(
            Volume(metadata=Metadata(name="v"), spec=VolumeSpec(size_bytes=1 << 30))
        )
        await objects.patch("v", {"spec": {"sizeBytes": 2 << 30}})
        await objects.delete("v", uid="u-1")
    bodies = [(method, path, json.loads(body)) for method, path, _, body in server.asked]
    assert "status" not in bodies[0][2]
    assert bodies[1] == ("PATCH", f"{PATH}/v", {"spec": {"sizeBytes": 2 << 30}})
    assert bodies[2] == ("DELETE", f"{PATH}/v", {"preconditions": {"uid": "u-1"}})
