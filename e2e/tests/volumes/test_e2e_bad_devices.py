"""Devices that cannot be used, on a node of a cluster that works.

Where one looks (`kubectl describe storagenode`) the node's condition and an event name the device
and say what to do; the device is left as it is, no process dies, a database on the other two nodes
goes on, and once the device is mended the node is Ready again and its replica in sync.
"""

import asyncio
import os
import shutil
import subprocess
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from volumeharness import (
    MIB,
    claim,
    commits,
    engine_pid,
    eventually,
    halted,
    in_sync,
    lock_is_free,
    node_ready,
    placed,
    replicas_equal,
    running,
    verdict_of,
    volume_of,
)

from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster, Programs
from tercet_e2e.story import objects

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

NODE = "node-3"
BLOCK_BYTES = 4096
SUPERBLOCKS = (0, 16)  # docs/disk-format.md
COMMITS = 25
PAUSE_MS = 500
SMALL = b"\x42" * MIB


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def database(cluster: LocalCluster):
    """A database that commits on node-1, checked at the end; gives its log.

    Its writers pause: what a node misses in these tests stays within what the log retains (a
    quarter of the ring), so it catches up from there (C1).
    """
    kubectl = Kubectl(cluster.kubectl)
    folder = cluster.state.root / "bad-devices"
    folder.mkdir()
    writer = objects.writer("device-db", "device-db", folder, PAUSE_MS)
    await kubectl.apply(claim("device-db", "128Mi"), placed(writer, "node-1"))
    await running(kubectl, "device-db")
    volume = await volume_of(kubectl, "device-db")
    await in_sync(kubectl, volume)
    yield folder / "acks.log"
    await in_sync(kubectl, volume)
    await kubectl.delete("pod", "device-db")
    await kubectl.apply(objects.checker("device-check", "device-db", folder, "acks.log"))
    assert (await verdict_of(kubectl, "device-check"))["problems"] == []
    await replicas_equal(cluster, volume)
    await kubectl.delete("pvc", "device-db")


async def told(cluster: LocalCluster, kubectl: Kubectl, *words: str) -> None:
    """Wait until the node is NotReady for its device, in these words; its processes live on."""
    before = {name: cluster.pid(name, NODE) for name in ("engine-supervisor", "agent")}
    engine = await engine_pid(cluster, NODE)

    async def condition() -> str | None:
        conditions = (await kubectl.get("tsn", NODE))["status"]["conditions"]
        ready = next(c for c in conditions if c["type"] == "Ready")
        if ready["status"] == "False" and ready["reason"] == "DeviceFailed":
            return str(ready["message"])
        return None

    message = await eventually(f"{NODE} is not Ready: DeviceFailed", condition)
    for word in ("device d0", *words):
        assert word in message, f"{word!r} is not in {message!r}"

    async def event() -> bool:
        described = await kubectl.run("describe", "storagenode", NODE)
        events = described.partition("Events:")[2]
        return "DeviceFailed" in events and all(word in events for word in words)

    await eventually(f"an event of {NODE} says {words}", event)
    assert (await kubectl.get("tsn", NODE))["status"]["phase"] == "NotReady"
    after = {name: cluster.pid(name, NODE) for name in before}
    assert (after, cluster.pid("engine", NODE)) == (before, engine), "a process has died"


def superblocks(device: Path) -> list[bytes]:
    """What stands where the superblocks are."""
    with device.open("rb") as file:
        return [os.pread(file.fileno(), BLOCK_BYTES, n * BLOCK_BYTES) for n in SUPERBLOCKS]


def put_superblocks(device: Path, blocks: list[bytes]) -> None:
    """Writes them."""
    with device.open("r+b") as file:
        for number, content in zip(SUPERBLOCKS, blocks, strict=True):
            os.pwrite(file.fileno(), content, number * BLOCK_BYTES)
        os.fsync(file.fileno())


async def test_a_corrupt_superblock_is_told_and_left_as_it_is(
    cluster: LocalCluster, kubectl: Kubectl, database: Path
):
    async with halted(cluster, NODE) as device:
        whole = superblocks(device)
        damaged = [bytes(byte ^ 0x5A for byte in block) for block in whole]
        put_superblocks(device, damaged)
    try:
        await told(cluster, kubectl, "no valid superblock", "wipe its first MiB", "engine starts")
        await commits(database, COMMITS)
    finally:
        async with halted(cluster, NODE) as device:
            left = superblocks(device)
            put_superblocks(device, whole)
    assert left == damaged, "a device that is refused is not written to"
    await node_ready(kubectl, NODE)


async def test_a_device_that_is_too_small_is_told_and_tried_again(
    cluster: LocalCluster, kubectl: Kubectl, database: Path
):
    async with halted(cluster, NODE) as device:
        right = device.with_name("right")
        device.rename(right)
        device.write_bytes(SMALL)
    try:
        await told(cluster, kubectl, str(device), f"has {len(SMALL)} bytes", "enlarge it")
        await commits(database, COMMITS)
    finally:
        left = device.read_bytes()
        right.replace(device)
    assert left == SMALL, "a device that is refused is not written to"
    await node_ready(kubectl, NODE)


@asynccontextmanager
async def another_engine(cluster: LocalCluster):
    """A second engine that is told to be the same node and has its device."""
    node = cluster.nodes[NODE]
    state = cluster.state.root / "another-engine"
    state.mkdir()
    shutil.copy(node.folder / "engine" / "engine.json", state)
    argv = [Programs.find().engine, "run", "--node", NODE]
    argv += ["--socket", state / "engine.sock", "--state-dir", state]
    with (state / "log").open("wb") as log:
        other = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        yield other
    finally:
        other.kill()
        await asyncio.to_thread(other.wait)


async def test_a_device_that_another_engine_has_is_told_and_waited_for(
    cluster: LocalCluster, kubectl: Kubectl, database: Path
):
    async with AsyncExitStack() as stack:
        async with halted(cluster, NODE) as device:
            other = await stack.enter_async_context(another_engine(cluster))

            async def has_it() -> bool:
                assert other.poll() is None, "the other engine has ended"
                return not lock_is_free(device)

            await eventually("the other engine has the device", has_it)
        await told(cluster, kubectl, str(device), "locked by another process", "fuser -v")
        await commits(database, COMMITS)
    await node_ready(kubectl, NODE)
