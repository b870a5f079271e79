"""The vectors of configuration steps against the Python rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tercet_api.config import check_step
from tercet_api.objects import Config

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "config_steps.json").read_text()
)


def _config(value: dict[str, Any] | None) -> Config | None:
    return None if value is None else Config.model_validate(value)


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_step(vector: dict[str, Any]) -> None:
    """Python says of each step what the vector says; what no model takes is no legal step."""
    try:
        old, new = _config(vector["old"]), _config(vector["new"])
    except ValidationError:
        assert not vector["legal"], "the model refuses a legal configuration"
        return
    refused = check_step(old, new)
    assert (refused is None) == vector["legal"], f"refused: {refused}"


def test_both_verdicts_are_there() -> None:
    """A file that holds only legal or only illegal steps would prove nothing."""
    assert {vector["legal"] for vector in VECTORS} == {True, False}
    assert len({vector["name"] for vector in VECTORS}) == len(VECTORS)
