"""The API server, as far as this package needs it: JSON objects in, JSON objects out.

Built on the official client for configuration, TLS and credentials, but without its generated
models: manifests come from files as plain mappings, and half of the kinds are custom ones.

`Watcher` keeps a copy of a collection: list, watch from there, list again when the server says that
the version is gone. Who reads it is told of each change; nobody polls.

    KubeError
    |- NotFound         404
    |- Conflict         409 (also: exists already)
    |- Forbidden        401, 403
    `- Unreachable      no answer
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlencode

import aiohttp
import structlog
from kubernetes.aio import client, config

from tercet_e2e.errors import E2eError

Json = dict[str, Any]
PatchKind = Literal["merge", "json", "strategic"]

REQUEST_TIMEOUT_S = 30.0
WATCH_TIMEOUT_S = 300
RETRY_PAUSE_MIN_S = 0.1
RETRY_PAUSE_MAX_S = 5.0

_PATCH_TYPES: Mapping[PatchKind, str] = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
}

log = structlog.get_logger(__name__)


class KubeError(E2eError):
    """The API server refused, or was not there."""


class NotFound(KubeError):
    """There is no such object."""


class Conflict(KubeError):
    """The object exists, or is not as the request assumed."""


class Forbidden(KubeError):
    """These credentials may not do that."""


class Unreachable(KubeError):
    """No answer from the API server."""


_BY_STATUS: Mapping[int, type[KubeError]] = {
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
}


def core(plural: str, name: str = "", *, namespace: str = "", sub: str = "") -> str:
    """The path of a resource of the core group."""
    return _path("/api/v1", plural, name, namespace, sub)


def group(
    group_version: str, plural: str, name: str = "", *, namespace: str = "", sub: str = ""
) -> str:
    """The path of a resource of a named group, such as `storage.k8s.io/v1`."""
    return _path(f"/apis/{group_version}", plural, name, namespace, sub)


def _path(base: str, plural: str, name: str, namespace: str, sub: str) -> str:
    parts = [base]
    parts += ["namespaces", namespace] if namespace else []
    parts += [part for part in (plural, name, sub) if part]
    return "/".join(parts)


class Kube:
    """One identity's connection. An async context manager."""

    def __init__(self, kubeconfig: Path) -> None:
        self._kubeconfig = kubeconfig
        self._api: Any = None  # the official client carries no types here

    async def __aenter__(self) -> Self:
        configuration = client.Configuration()
        # The control plane is on this machine: a proxy of the environment is none of its business.
        configuration.client_session_kwargs = {"trust_env": False}
        load: Any = config.load_kube_config
        await load(config_file=str(self._kubeconfig), client_configuration=configuration)
        self._api = client.ApiClient(configuration)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._api is not None:
            await self._api.close()

    async def _send(
        self, method: str, path: str, *, body: object = None, content: str, timeout_s: float
    ) -> aiohttp.ClientResponse:
        assert self._api is not None, "used outside of its context"
        configuration = self._api.configuration
        headers = {"Content-Type": content, "Accept": "application/json"}
        await self._api.update_params_for_auth(
            headers, [], ["BearerToken"], path, method, body, request_auth=None
        )
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            answer = await self._api.rest_client.request(
                method, configuration.host + path, headers, body, _request_timeout=timeout
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(
                f"{method} {path}: no answer from the API server: {error!r}"
            ) from error
        response = answer.response if hasattr(answer, "response") else answer
        if response.status >= 300:
            raise await _refusal(response, method, path)
        assert isinstance(response, aiohttp.ClientResponse)
        return response

    async def _json(self, method: str, path: str, body: object = None, **options: Any) -> Json:
        content = options.get("content", "application/json")
        response = await self._send(
            method, path, body=body, content=content, timeout_s=REQUEST_TIMEOUT_S
        )
        answer = json.loads(await response.text() or "{}")
        assert isinstance(answer, dict)
        return answer

    async def get(self, path: str) -> Json:
        """Reads an object."""
        return await self._json("GET", path)

    async def text(self, path: str) -> str:
        """For what is no object, such as /readyz."""
        response = await self._send(
            "GET", path, content="application/json", timeout_s=REQUEST_TIMEOUT_S
        )
        return await response.text()

    async def list(self, path: str, **query: str) -> list[Json]:
        """Reads a collection."""
        answer = await self.get(f"{path}?{urlencode(query)}" if query else path)
        items = answer.get("items") or []
        assert isinstance(items, list)
        return items

    async def create(self, path: str, body: Json) -> Json:
        """Creates an object."""
        return await self._json("POST", path, body)

    async def replace(self, path: str, body: Json) -> Json:
        """Replaces an object: refused when it has changed meanwhile."""
        return await self._json("PUT", path, body)

    async def patch(self, path: str, body: object, kind: PatchKind = "merge") -> Json:
        """Changes a part of an object."""
        return await self._json("PATCH", path, body, content=_PATCH_TYPES[kind])

    async def delete(self, path: str, body: Json | None = None) -> None:
        """Deletes an object."""
        await self._json("DELETE", path, body)

    async def apply(self, path: str, body: Json, manager: str = "tercet-e2e") -> Json:
        """Server-side apply of a whole manifest: creates or brings up to date."""
        query = urlencode({"fieldManager": manager, "force": "true"})
        return await self._json(
            "PATCH", f"{path}?{query}", body, content="application/apply-patch+yaml"
        )

    async def watch(self, path: str, version: str, **query: str) -> AsyncIterator[Json]:
        """The events after a version, until the server ends the watch."""
        query |= {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_TIMEOUT_S),
        }
        response = await self._send(
            "GET",
            f"{path}?{urlencode(query)}",
            content="application/json",
            timeout_s=WATCH_TIMEOUT_S + REQUEST_TIMEOUT_S,
        )
        try:
            async for line in response.content:
                yield json.loads(line)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unreachable(f"watch {path} broke off: {error!r}") from error
        finally:
            response.close()


async def _refusal(response: aiohttp.ClientResponse, method: str, path: str) -> KubeError:
    text = await response.text()
    try:
        message = json.loads(text).get("message", text)
    except (ValueError, AttributeError):
        message = text
    kind = _BY_STATUS.get(response.status, KubeError)
    return kind(f"{method} {path}: {response.status}: {message}")


class Watcher:
    """A live copy of a collection, by uid."""

    def __init__(self, kube: Kube, path: str, on_change: Callable[[], None], **query: str) -> None:
        self._kube = kube
        self._path = path
        self._query = query
        self._on_change = on_change
        self.synced = asyncio.Event()
        self.objects: dict[str, Json] = {}

    async def run(self) -> None:
        """Follows the collection until it is cancelled."""
        pause_s = RETRY_PAUSE_MIN_S
        while True:
            try:
                await self._follow()
                pause_s = RETRY_PAUSE_MIN_S
            except KubeError as error:
                log.warning("watch broke", path=self._path, error=str(error))
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, RETRY_PAUSE_MAX_S)

    async def _follow(self) -> None:
        query = f"?{urlencode(self._query)}" if self._query else ""
        answer = await self._kube.get(self._path + query)
        self.objects = {item["metadata"]["uid"]: item for item in answer.get("items") or []}
        self.synced.set()
        self._on_change()
        version = answer["metadata"]["resourceVersion"]
        while True:
            async for event in self._kube.watch(self._path, version, **self._query):
                item = event["object"]
                if event["type"] == "ERROR":
                    return  # most often 410: the version is too old; list again
                version = item["metadata"]["resourceVersion"]
                self._take(event["type"], item)

    def _take(self, kind: str, item: Json) -> None:
        if kind == "BOOKMARK":
            return
        uid = item["metadata"]["uid"]
        if kind == "DELETED":
            self.objects.pop(uid, None)
        else:
            self.objects[uid] = item
        self._on_change()
