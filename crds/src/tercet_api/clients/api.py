"""The API server as plain HTTP: JSON in, JSON out, and streams of watch events.

Built on `kubernetes.aio` for kubeconfig, service accounts, TLS and credentials, but without its
generated models: half of what Tercet reads are kinds of its own, and a JSON Patch is a list that a
typed call would only hide. Nothing is tried again here: whether a request may be sent twice is
known to the caller alone.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import client, config

from tercet_api.clients.errors import BY_STATUS, ApiError, Unreachable

Json = dict[str, Any]

REQUEST_TIMEOUT_S = 30.0
WATCH_SERVER_TIMEOUT_S = 300
WATCH_CLIENT_TIMEOUT_S = WATCH_SERVER_TIMEOUT_S + 30.0
MESSAGE_CHARS_MAX = 2000

JSON = "application/json"
JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"


class Api:
    """One identity's connection to the API server. An async context manager."""

    def __init__(self, kubeconfig: Path | None = None, *, context: str | None = None) -> None:
        """kubeconfig: a file, or None for the service account of the pod that this runs in.

        context: the file's context to use, None for its current one.
        """
        self._kubeconfig = kubeconfig
        self._context = context
        self._client: Any = None  # client.ApiClient, whose methods have no types

    async def __aenter__(self) -> Self:
        configuration = client.Configuration()
        loader: Any = config
        if self._kubeconfig is None:
            loader.load_incluster_config(client_configuration=configuration)
        else:
            await loader.load_kube_config(
                config_file=str(self._kubeconfig),
                context=self._context,
                client_configuration=configuration,
            )
        # The API server is never behind a proxy of the environment.
        configuration.client_session_kwargs = {"trust_env": False}
        self._client = client.ApiClient(configuration)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._client is not None:
            await self._client.close()

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        content: str = JSON,
        query: Mapping[str, str] | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Json:
        """Send one request and return the answer's object. Raises ApiError."""
        what = f"{method} {path}"
        url = path + (f"?{urlencode(query)}" if query else "")
        response = await self._send(method, url, body, content=content, timeout_s=timeout_s)
        try:
            answer = json.loads(await response.text() or "{}")
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unreachable(f"{what}: the answer broke off: {error!r}") from error
        assert isinstance(answer, dict), f"{what}: no object: {answer!r}"
        return answer

    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncGenerator[Json, None]:
        """The events of a watch until the server ends it. Raises ApiError."""
        url = f"{path}?{urlencode(query)}"
        response = await self._send(
            "GET", url, None, content=JSON, timeout_s=WATCH_CLIENT_TIMEOUT_S
        )
        try:
            async for line in response.content:
                yield json.loads(line)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unreachable(f"watch {path} broke off: {error!r}") from error
        finally:
            response.close()

    async def _send(
        self, method: str, path: str, body: object, *, content: str, timeout_s: float
    ) -> aiohttp.ClientResponse:
        assert self._client is not None, "used outside of its context"
        headers = {"Content-Type": content, "Accept": JSON}
        await self._client.update_params_for_auth(
            headers, [], ["BearerToken"], path, method, body, request_auth=None
        )
        try:
            answer = await self._client.rest_client.request(
                method,
                self._client.configuration.host + path,
                headers,
                body,
                _request_timeout=aiohttp.ClientTimeout(total=timeout_s),
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"{method} {path}: no answer: {error!r}") from error
        response = getattr(answer, "response", answer)
        assert isinstance(response, aiohttp.ClientResponse)
        if response.status >= 300:
            raise await _error(response, f"{method} {path}")
        return response


async def _error(response: aiohttp.ClientResponse, what: str) -> ApiError:
    try:
        text = await response.text()
        message = json.loads(text).get("message", text)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, AttributeError):
        message = response.reason or ""
    said = f"{what}: {response.status}: {str(message)[:MESSAGE_CHARS_MAX]}"
    if response.status >= 500 or response.status == 429:
        # A 504 leaves open whether the write landed; so nobody may conclude anything from a 5xx.
        return Unreachable(said)
    return BY_STATUS.get(response.status, ApiError)(said)
