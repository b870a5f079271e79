"""What a real API server refuses of specs, in words for users; and who wins a swap there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from crds_control_plane import Cluster

from tercet_api.clients import Api, Json, NotFound, Refused, volumes
from tercet_api.coordination import Lost, Refusal, Swapped, swap_config
from tercet_api.objects import (
    Config,
    ConfigState,
    Member,
    Metadata,
    Primary,
    Volume,
    VolumeSpec,
)

pytestmark = [pytest.mark.local, pytest.mark.asyncio(loop_scope="module")]
GIB = 1 << 30
ID = "00000000-0000-4000-8000-00000000000{}"
BASE = "/apis/tercet.io/v1alpha1"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(cluster: Cluster) -> AsyncIterator[Api]:
    """An administrator's connection."""
    async with Api(cluster.kubeconfig) as connection:
        yield connection


def manifest(kind: str, spec: Json) -> Json:
    """An object named x."""
    return {
        "apiVersion": "tercet.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": "x"},
        "spec": spec,
    }


NODE = {"nodeName": "m", "address": "127.0.1.1"}
FILE = {"path": "/d", "capacityBytes": GIB}


@pytest.mark.parametrize(
    ("plural", "kind", "spec", "words"),
    [
        ("volumes", "Volume", {"sizeBytes": 4096}, "greater than or equal to 4194304"),
        ("volumes", "Volume", {"sizeBytes": GIB + 1}, "multiple of 4096"),
        ("volumes", "Volume", {"sizeBytes": 1 << 60}, "less than or equal to"),
        ("volumes", "Volume", {"sizeBytes": GIB, "replicas": 4}, "less than or equal to 3"),
        ("volumes", "Volume", {"sizeBytes": GIB, "uuid": "X"}, "should match"),
        (
            "volumes",
            "Volume",
            {"sizeBytes": GIB, "source": {"snapshot": "s", "volume": "v"}},
            "either a snapshot or a volume",
        ),
        ("volumes", "Volume", {"sizeBytes": GIB, "source": {}}, "either a snapshot or a volume"),
        (
            "storagenodes",
            "StorageNode",
            {**NODE, "devices": [{"id": "d", "path": "/dev/x", "file": FILE}]},
            "exactly one of file, path and nguid",
        ),
        (
            "storagenodes",
            "StorageNode",
            {**NODE, "devices": [{"id": "d", "file": {**FILE, "capacityBytes": 1 << 20}}]},
            "greater than or equal to 268435456",
        ),
        ("snapshots", "Snapshot", {"volume": ""}, "at least 1 chars long"),
    ],
)
async def test_impossible_specs(api: Api, plural: str, kind: str, spec: Json, words: str) -> None:
    """Refused at once, with a reason."""
    with pytest.raises(Refused, match=words):
        await api.request("POST", f"{BASE}/{plural}", manifest(kind, spec))


async def fresh(api: Api, **spec: Any) -> Volume:
    """A volume named v that has just been made."""
    objects = volumes(api)
    with contextlib.suppress(NotFound):
        await objects.delete("v", uid=(await objects.get("v")).uid)
    wanted = VolumeSpec(size_bytes=GIB, **spec)
    return await objects.create(Volume(metadata=Metadata(name="v"), spec=wanted))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uuid": ID.format(2)}, "uuid never changes"),
        ({"uuid": None}, "uuid never changes"),
        ({"sizeBytes": GIB - 4096}, "never shrinks"),
        ({"source": {"volume": "w"}}, "source never changes"),
        ({"replicas": 2}, "replicas cannot be changed"),
    ],
)
async def test_impossible_changes(api: Api, change: Json, words: str) -> None:
    """What is for ever stays; growing is fine."""
    await fresh(api, uuid=ID.format(1))
    with pytest.raises(Refused, match=words):
        await volumes(api).patch("v", {"spec": change})
    grown = await volumes(api).patch("v", {"spec": {"sizeBytes": 2 * GIB}})
    assert grown.spec.size_bytes == 2 * GIB


async def test_uuid_before_placement(api: Api) -> None:
    """A replica of a volume without identity could never be found again."""
    await fresh(api)
    placed = {"status": {"replicas": [{"node": "n1", "state": "Placed"}]}}
    with pytest.raises(Refused, match="has its uuid before it is placed"):
        await volumes(api).patch_status("v", placed)
    await volumes(api).patch("v", {"spec": {"uuid": ID.format(1)}})
    await volumes(api).patch_status("v", placed)


def config(epoch: int, node: str = "n1", state: ConfigState = ConfigState.RECOVERING) -> Config:
    """Of three members."""
    return Config(
        epoch=epoch,
        state=state,
        primary=Primary(node=node, instance=ID.format(9)),
        members=[Member(node=f"n{n}", replica=ID.format(n)) for n in (1, 2, 3)],
    )


async def test_of_racing_swaps_one_wins(api: Api) -> None:
    """T3 on a real API server: one Swapped, nine Lost; an illegal step is Refusal, not Lost."""
    made = await fresh(api, uuid=ID.format(1))
    objects = volumes(api)
    await objects.patch_status("v", {"status": {"newUid": made.uid}})
    first = config(1)
    assert isinstance(await swap_config(objects, "v", made.uid, None, first), Swapped)
    answers = await asyncio.gather(
        *(
            swap_config(objects, "v", made.uid, first, config(2 + number, f"n{number % 3 + 1}"))
            for number in range(10)
        )
    )
    assert sorted(type(answer).__name__ for answer in answers) == ["Lost"] * 9 + ["Swapped"]
    now = (await objects.get("v")).status.config
    assert now is not None
    back = await swap_config(objects, "v", made.uid, now, config(1))
    assert isinstance(back, Refusal)
    assert "an epoch never falls" in back.message
    other = await swap_config(objects, "v", ID.format(8), now, config(100))
    assert other == Lost(None)


async def test_nothing_is_swapped_into_an_absent_status(api: Api) -> None:
    """A volume that was never placed has no status: no agent can configure it by itself."""
    made = await fresh(api, uuid=ID.format(1))
    assert isinstance(await swap_config(volumes(api), "v", made.uid, None, config(1)), Refusal)
