"""The membership's register as an object: ConfigMap `tercet-membership`, readable by every agent.

Only the operator that leads writes it: at its start, and for each tombstone.
"""

from __future__ import annotations

import json

import structlog
from pydantic import ValidationError

from tercet_api.clients import Api, Conflict, Json, NotFound
from tercet_api.names import MEMBERSHIP_CONFIG_MAP, MEMBERSHIP_KEY, NAMESPACE
from tercet_api.objects import Register

CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
PATH = f"{CONFIG_MAPS}/{MEMBERSHIP_CONFIG_MAP}"

log = structlog.get_logger(__name__)


class RegisterFile:
    """Reads and writes it."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def read(self) -> Register | None:
        """What is there, if anything. Raises ApiError."""
        try:
            found = await self._api.request("GET", PATH)
        except NotFound:
            return None
        try:
            return Register.model_validate_json((found.get("data") or {})[MEMBERSHIP_KEY])
        except (KeyError, ValidationError) as error:
            log.warning("register cannot be read, made anew", object=PATH, error=str(error))
            return None

    async def write(self, register: Register) -> None:
        """Put it there. Raises ApiError."""
        data = {MEMBERSHIP_KEY: json.dumps(register.to_json(), sort_keys=True)}
        body: Json = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": MEMBERSHIP_CONFIG_MAP},
            "data": data,
        }
        try:
            there = await self._api.request("GET", PATH)
        except NotFound:
            try:
                await self._api.request("POST", CONFIG_MAPS, body)
            except Conflict:
                await self._api.request("PUT", PATH, body)
            return
        if there.get("data") != data:
            await self._api.request("PUT", PATH, body)
