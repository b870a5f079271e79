"""Volumes that grow while they are in use; what may not be is refused where one looks."""

import json
from pathlib import Path

import pytest
from blockpod import read_log
from volumeharness import (
    MIB,
    Json,
    block_pod,
    blocks,
    claim,
    commits,
    events_of,
    eventually,
    immediate,
    in_sync,
    kill_primary,
    placed,
    replicas_equal,
    running,
    script_pod,
    verdict_of,
    volume_of,
)

from tercet_e2e.kubectl import Kubectl, KubectlError
from tercet_e2e.local import LocalCluster
from tercet_e2e.story import objects

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

CAP_SYS_RESOURCE = 24
BLOCKS_FIRST = 100
FILE_MIB = 80
"""A file that the old size cannot hold."""


async def ask_for(kubectl: Kubectl, name: str, size: str) -> None:
    """What a person types to grow a claim."""
    patch = {"spec": {"resources": {"requests": {"storage": size}}}}
    await kubectl.run("patch", "pvc", name, "-p", json.dumps(patch))


def has(size: str):
    """Whether a claim's status says this size, with nothing left to be done."""

    def check(found: Json) -> bool:
        status = found["status"]
        return status["capacity"]["storage"] == size and not status.get("conditions")

    return check


async def grown(kubectl: Kubectl, volume: str, size_bytes: int) -> None:
    """Wait until object and engine have the size."""

    def says(found: Json) -> bool:
        return found["spec"]["sizeBytes"] == found["status"]["sizeBytes"] == size_bytes

    await kubectl.until("tvol", volume, says, 60, f"has {size_bytes} bytes")


async def test_a_raw_volume_grows_below_its_pod_and_survives_a_kill_at_that_moment(
    cluster: LocalCluster, kubectl: Kubectl
):
    folder = cluster.state.root / "raw-grows"
    folder.mkdir()
    log = folder / "blocks"
    await kubectl.apply(
        claim("raw-grows", "64Mi", block=True),
        block_pod("grow-writer", "raw-grows", folder, "stream", "blocks", "node-3"),
    )
    await running(kubectl, "grow-writer")
    await blocks(log, BLOCKS_FIRST)
    volume = await volume_of(kubectl, "raw-grows")
    await ask_for(kubectl, "raw-grows", "160Mi")
    await grown(kubectl, volume, 160 * MIB)
    await kill_primary(cluster, kubectl, volume)

    async def new_part_written() -> bool:
        sizes, last = read_log(log)
        return sizes[-1] == 160 * MIB and max(last) == 160 * MIB // 4096 - 1

    await eventually("the pod writes to the end of the grown device", new_part_written)
    await kubectl.until("pvc", "raw-grows", has("160Mi"), 60, "says 160Mi")
    await blocks(log, BLOCKS_FIRST)
    await kubectl.delete("pod", "grow-writer")
    assert read_log(log)[0] == [64 * MIB, 160 * MIB], "one device, seen before and after"
    await kubectl.apply(block_pod("grow-reader", "raw-grows", folder, "verify", "blocks", "node-1"))
    verdict = await verdict_of(kubectl, "grow-reader")
    assert verdict["problems"] == []
    assert verdict["size_bytes"] == 160 * MIB
    await in_sync(kubectl, volume)
    await replicas_equal(cluster, volume)
    await kubectl.delete("pvc", "raw-grows")


def may_grow_mounted() -> bool:
    """Whether processes here may grow a mounted ext4."""
    status = Path("/proc/self/status").read_text()
    field = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(field.split()[1], 16) >> CAP_SYS_RESOURCE & 1)


FILL = f"""
import json, os, random
part = random.Random(1).randbytes(1 << 20)
with open("/data/filled", "wb") as file:
    for number in range({FILE_MIB}):
        file.write(number.to_bytes(8, "little") + part[8:])
    file.flush()
    os.fsync(file.fileno())
room = os.statvfs("/data")
print(json.dumps({{"size_bytes": room.f_blocks * room.f_frsize}}))
"""
READ = f"""
import json, random
part, wrong = random.Random(1).randbytes(1 << 20), []
with open("/data/filled", "rb") as file:
    for number in range({FILE_MIB}):
        if file.read(1 << 20) != number.to_bytes(8, "little") + part[8:]:
            wrong.append(number)
print(json.dumps({{"problems": wrong}}))
"""


async def test_a_file_system_grows_with_its_volume_and_keeps_old_and_new_through_kills(
    cluster: LocalCluster, kubectl: Kubectl
):
    folder = cluster.state.root / "grows"
    folder.mkdir()
    await kubectl.apply(claim("grows", "64Mi"), objects.writer("grows-db", "grows", folder))
    await running(kubectl, "grows-db")
    await commits(folder / "acks.log", 50)
    volume = await volume_of(kubectl, "grows")
    await ask_for(kubectl, "grows", "160Mi")
    await grown(kubectl, volume, 160 * MIB)
    await kill_primary(cluster, kubectl, volume)
    await commits(folder / "acks.log", 50)
    if may_grow_mounted():
        await kubectl.until("pvc", "grows", has("160Mi"), 60, "says 160Mi")
    else:
        message = await events_of(kubectl, "grows-db", "CAP_SYS_RESOURCE")
        assert "restart the pod" in message
        waiting = await kubectl.get("pvc", "grows")
        assert waiting["status"]["capacity"]["storage"] == "64Mi"
        pending = [c["type"] for c in waiting["status"]["conditions"] if c["status"] == "True"]
        assert "FileSystemResizePending" in pending
    await kubectl.delete("pod", "grows-db")
    await kubectl.apply(script_pod("grows-fill", "grows", folder, FILL))
    filled = await verdict_of(kubectl, "grows-fill")
    assert filled["size_bytes"] > 140 * MIB
    await kubectl.until("pvc", "grows", has("160Mi"), 60, "says 160Mi")
    await kill_primary(cluster, kubectl, volume)
    await kubectl.apply(placed(script_pod("grows-read", "grows", folder, READ), "node-2"))
    assert (await verdict_of(kubectl, "grows-read"))["problems"] == []
    await kubectl.apply(objects.checker("grows-check", "grows", folder, "acks.log"))
    assert (await verdict_of(kubectl, "grows-check"))["problems"] == []
    await in_sync(kubectl, volume)
    await replicas_equal(cluster, volume)
    await kubectl.delete("pvc", "grows")


async def test_what_a_volume_cannot_become_is_refused_and_changes_nothing(kubectl: Kubectl):
    await kubectl.apply(
        immediate({"replicas": "3"}, "now"), claim("fixed", "64Mi", storage_class="now")
    )
    volume = await volume_of(kubectl, "fixed")
    with pytest.raises(KubectlError, match="can not be less than status"):
        await ask_for(kubectl, "fixed", "32Mi")
    patch = json.dumps({"spec": {"sizeBytes": 32 * MIB}})
    with pytest.raises(KubectlError, match="a volume never shrinks"):
        await kubectl.run("patch", "tvol", volume, "--type=merge", "-p", patch)
    await ask_for(kubectl, "fixed", "1Ti")
    message = await events_of(kubectl, "fixed", "has room for")
    assert "cannot grow to" in message
    assert (await kubectl.get("tvol", volume))["spec"]["sizeBytes"] == 64 * MIB
    # Who asked for too much may ask for less.
    await ask_for(kubectl, "fixed", "128Mi")
    await grown(kubectl, volume, 128 * MIB)
    await kubectl.delete("pvc", "fixed")
