"""A node is given another device while its volumes are written: the next replica goes there.

What was there stays where it is, and the new replica is found again by an engine that starts anew.
Comes after the tests that expect one device for each node.
"""

import json

import pytest
from volumeharness import (
    all_space_back,
    chunk_map,
    claim,
    commits,
    in_sync,
    placed,
    replicas_equal,
    running,
    volume_of,
)

from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster
from tercet_e2e.story import objects

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

NODE = "node-3"
DEVICE_BYTES = 1 << 30
OPENED_WITHIN_S = 60.0


async def test_a_device_that_is_added_takes_the_next_replica(
    cluster: LocalCluster, kubectl: Kubectl
):
    folders = [cluster.state.root / name for name in ("first-acks", "second-acks")]
    for folder in folders:
        folder.mkdir()
    # A fifth of the old device is promised to it, an eighth of the new one to what comes next.
    await kubectl.apply(claim("first", "896Mi"), objects.writer("first-db", "first", folders[0]))
    await running(kubectl, "first-db")
    await commits(folders[0] / "acks.log", 20)
    first = await volume_of(kubectl, "first")
    old = await kubectl.get("tsn", NODE)
    device = cluster.nodes[NODE].folder / "devices" / "d1"
    more = {"id": "d1", "file": {"path": str(device), "capacityBytes": DEVICE_BYTES}}
    patch = [{"op": "add", "path": "/spec/devices/-", "value": more}]
    await kubectl.run("patch", "tsn", NODE, "--type=json", f"--patch={json.dumps(patch)}")

    def both_ready(found: objects.Json) -> bool:
        states = {device["id"]: device["state"] for device in found["status"]["devices"]}
        return states == {"d0": "Ready", "d1": "Ready"}

    new = await kubectl.until("tsn", NODE, both_ready, OPENED_WITHIN_S, "has both devices")
    assert new["status"]["capacityBytes"] > old["status"]["capacityBytes"]
    await commits(folders[0] / "acks.log", 20)
    writer = placed(objects.writer("second-db", "second", folders[1]), NODE)
    await kubectl.apply(claim("second", "128Mi"), writer)
    await running(kubectl, "second-db")
    await commits(folders[1] / "acks.log", 20)
    second = await volume_of(kubectl, "second")
    homes = [(await chunk_map(cluster, volume, NODE))["device"] for volume in (first, second)]
    assert homes == ["d0", "d1"]
    cluster.kill("engine", NODE)
    for folder in folders:
        await commits(folder / "acks.log", 50)
    for volume in (first, second):
        await in_sync(kubectl, volume)
    assert (await chunk_map(cluster, second, NODE))["device"] == "d1"
    chunks = (await chunk_map(cluster, first, NODE))["chunks"]
    assert sum(chunk["mappedBytes"] for chunk in chunks) > 0
    await kubectl.delete("pod", "first-db", "second-db")
    for volume in (first, second):
        await replicas_equal(cluster, volume)
    await kubectl.delete("pvc", "first", "second")
    await all_space_back(kubectl)
