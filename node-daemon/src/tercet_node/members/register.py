"""Reads the operator's register: ConfigMap `tercet-membership`."""

from __future__ import annotations

from pydantic import ValidationError

from tercet_api.clients import Api, NotFound
from tercet_api.names import MEMBERSHIP_CONFIG_MAP, MEMBERSHIP_KEY, NAMESPACE
from tercet_api.objects import Register

PATH = f"/api/v1/namespaces/{NAMESPACE}/configmaps/{MEMBERSHIP_CONFIG_MAP}"


async def read_register(api: Api) -> Register | None:
    """What is there; None: no operator has led yet. Raises ApiError, ValueError."""
    try:
        found = await api.request("GET", PATH)
    except NotFound:
        return None
    text = (found.get("data") or {}).get(MEMBERSHIP_KEY, "")
    try:
        return Register.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{PATH}: {error}") from error
