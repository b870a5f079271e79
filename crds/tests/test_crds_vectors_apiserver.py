"""The vectors of configuration steps against the CEL rules in a real API server.

Each vector has a Volume of its own. Its old configuration is put there while the CRD stands without
rules (most are no legal first configuration), then the real CRD comes back and the step is tried.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from crds_control_plane import Cluster

from tercet_api.clients import Api, ApiError, Json, Refused, Unreachable, volumes
from tercet_api.manifests import KINDS, crd
from tercet_api.names import GROUP, VOLUMES
from tercet_api.objects import Metadata, Volume, VolumeSpec

pytestmark = pytest.mark.local
VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "config_steps.json").read_text()
)
CRD_PATH = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{VOLUMES}.{GROUP}"
SETTLE_TIMEOUT_S = 30.0
SETTLE_PAUSE_S = 0.02


def _without_rules(schema: Json) -> Json:
    """The schema with types only: no CEL, no limits on lists and numbers."""
    gone = ("x-kubernetes-validations", "minItems", "maxItems", "minimum")
    bare = copy.deepcopy(schema)

    def strip(node: object) -> None:
        if isinstance(node, dict):
            for key in gone:
                node.pop(key, None)
            for each in node.values():
                strip(each)

    strip(bare)
    return bare


async def _install(api: Api, *, rules: bool) -> None:
    """Put the Volume CRD there, and wait until this API server judges by it."""
    wanted = crd(next(kind for kind in KINDS if kind.plural == VOLUMES))
    version = wanted["spec"]["versions"][0]
    if not rules:
        version["schema"]["openAPIV3Schema"] = _without_rules(version["schema"]["openAPIV3Schema"])
    now = await api.request("GET", CRD_PATH)
    wanted["metadata"]["resourceVersion"] = now["metadata"]["resourceVersion"]
    await api.request("PUT", CRD_PATH, wanted)
    probe = {"apiVersion": Volume.API_VERSION, "kind": "Volume", "metadata": {"name": "probe"}}
    probe["spec"] = {"sizeBytes": 4096}  # below the minimum
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            await api.request("POST", volumes(api).path, probe, query={"dryRun": "All"})
            refused = False
        except Refused:
            refused = True
        except Unreachable:
            refused = not rules  # the storage of the former CRD is just being taken down
        if refused == rules:
            return
        await asyncio.sleep(SETTLE_PAUSE_S)
    raise AssertionError("the API server does not take the CRD up")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(cluster: Cluster) -> AsyncIterator[Api]:
    """A connection, with a Volume vector-N in its old configuration for each vector."""
    async with Api(cluster.kubeconfig) as connection:
        objects = volumes(connection)
        await _install(connection, rules=False)
        for number, vector in enumerate(VECTORS):
            spec = VolumeSpec(size_bytes=1 << 30)
            await objects.create(Volume(metadata=Metadata(name=f"vector-{number}"), spec=spec))
            status = {"status": {"config": vector["old"]} if vector["old"] else {"copies": "0/3"}}
            await objects.patch_status(f"vector-{number}", status)
        await _install(connection, rules=True)
        yield connection
        for number in range(len(VECTORS)):
            await connection.request("DELETE", f"{objects.path}/vector-{number}")


async def _step(api: Api, number: int, new: Json | None) -> str | None:
    """Try the step; the server's message when it refuses."""
    path = f"{volumes(api).path}/vector-{number}/status"
    now = await api.request("GET", path)
    if new is None:
        now["status"].pop("config", None)
    else:
        now["status"]["config"] = new
    try:
        await api.request("PUT", path, now)
    except Refused as error:
        return str(error)
    return None


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("number", range(len(VECTORS)), ids=[v["name"] for v in VECTORS])
async def test_step(api: Api, number: int) -> None:
    """The API server says of each step what the vector says."""
    refused = await _step(api, number, VECTORS[number]["new"])
    assert (refused is None) == VECTORS[number]["legal"], f"refused: {refused}"


@pytest.mark.asyncio(loop_scope="module")
async def test_status_is_not_taken_away(api: Api) -> None:
    """The configuration does not vanish with the whole status."""
    number = next(i for i, vector in enumerate(VECTORS) if vector["old"] is not None)
    path = f"{volumes(api).path}/vector-{number}/status"
    now = await api.request("GET", path)
    now.pop("status")
    with pytest.raises(ApiError, match="never taken away"):
        await api.request("PUT", path, now)
