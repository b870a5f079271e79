"""What tests of volumes on a whole cluster share: claims and pods, and what to wait for.

Everything is said through kubectl and observed through it, as a person would; nodes and processes
are reached by the cluster's fault tools only.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import blockpod

from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster, is_ready
from tercet_e2e.story import objects
from tercet_e2e.workload import read_acks

Json = dict[str, Any]
T = TypeVar("T")

SOON_S = 180.0
SPACE_BACK_S = 90.0
PAUSE_S = 0.1
DEVICE = "/dev/vol"
MIB = 1 << 20
OWN_BYTES_MAX = 64 << 10
"""What a store may have allocated for itself, without any volume (its checkpoint's root)."""


async def eventually(
    what: str, check: Callable[[], Awaitable[T | None]], timeout_s: float = SOON_S
) -> T:
    """Wait until `check` gives something that counts; gives that."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        if found := await check():
            return found
        assert time.monotonic() < deadline_s, f"not after {timeout_s:.0f} s: {what}"
        await asyncio.sleep(PAUSE_S)


# ---------------------------------------------------------------- objects


def immediate(parameters: dict[str, str], name: str) -> Json:
    """A StorageClass that makes volumes at once."""
    made = objects.classes()[0]
    return made | {
        "metadata": {"name": name},
        "parameters": parameters,
        "volumeBindingMode": "Immediate",
    }


def claim(
    name: str,
    size: str,
    *,
    storage_class: str = objects.STORAGE_CLASS,
    block: bool = False,
    clone_of: str = "",
) -> Json:
    """A claim: a file system or a raw device, empty or a copy of another claim's volume."""
    made = objects.claim(name, size)
    made["spec"]["storageClassName"] = storage_class
    if block:
        made["spec"]["volumeMode"] = "Block"
    if clone_of:
        made["spec"]["dataSource"] = {"kind": "PersistentVolumeClaim", "name": clone_of}
    return made


def block_pod(name: str, claim_name: str, folder: Path, act: str, log: str, node: str) -> Json:
    """A pod that streams to a raw volume, or verifies it, on a node."""
    made = objects.pod(name, claim_name, folder, [])
    script = str(Path(blockpod.__file__).resolve())
    container = made["spec"]["containers"][0]
    container["command"] = [sys.executable, script, act, DEVICE, f"{objects.ACKS_FOLDER}/{log}"]
    container["volumeMounts"] = [m for m in container["volumeMounts"] if m["name"] == "acks"]
    container["volumeDevices"] = [{"name": "data", "devicePath": DEVICE}]
    return placed(made, node)


def script_pod(name: str, claim_name: str, folder: Path, code: str) -> Json:
    """A pod that runs Python code with the volume at /data."""
    made = objects.pod(name, claim_name, folder, [])
    made["spec"]["containers"][0]["command"] = [sys.executable, "-c", code]
    return made


def placed(pod: Json, node: str) -> Json:
    """The pod, for a node."""
    pod["spec"]["nodeSelector"] = {"kubernetes.io/hostname": node}
    return pod


# ---------------------------------------------------------------- what is


async def events_of(kubectl: Kubectl, name: str, word: str) -> str:
    """Wait until an event of the object says `word`; returns its message."""

    async def said() -> str | None:
        for event in await kubectl.list("events"):
            if event["involvedObject"]["name"] == name and word in event.get("message", ""):
                return str(event["message"])
        return None

    return await eventually(f"an event of {name} says {word!r}", said)


async def running(kubectl: Kubectl, pod: str) -> None:
    """Wait until a pod runs."""

    def is_running(found: Json) -> bool:
        phase = found["status"].get("phase")
        assert phase not in {"Failed", "Succeeded"}, f"pod {pod} has ended: {found['status']}"
        return bool(phase == "Running")

    await kubectl.until("pod", pod, is_running, SOON_S, "runs")


async def verdict_of(kubectl: Kubectl, pod: str) -> Json:
    """Wait until a pod has ended; gives the verdict that it printed last, and takes it away."""

    def has_ended(found: Json) -> bool:
        return found["status"].get("phase") in {"Succeeded", "Failed"}

    await kubectl.until("pod", pod, has_ended, 2 * SOON_S, "has ended")
    log = await kubectl.run("logs", pod)
    await kubectl.delete("pod", pod)
    try:
        verdict: Json = json.loads(log.splitlines()[-1])
    except (IndexError, ValueError):
        raise AssertionError(f"pod {pod} printed no verdict: {log[-1000:]}") from None
    return verdict


async def volume_of(kubectl: Kubectl, claim_name: str) -> str:
    """The Volume behind a bound claim."""
    bound = await kubectl.until(
        "pvc", claim_name, lambda o: o["status"].get("phase") == "Bound", SOON_S, "is bound"
    )
    return str(bound["spec"]["volumeName"])


async def refused_for_good(kubectl: Kubectl, claim_name: str) -> None:
    """Take a claim away that got no volume; nothing of one may be left."""
    found = await kubectl.get("pvc", claim_name)
    assert found["status"]["phase"] == "Pending"
    await kubectl.delete("pvc", claim_name)
    volume = f"pvc-{found['metadata']['uid']}"

    async def is_gone() -> bool:
        return volume not in {v["metadata"]["name"] for v in await kubectl.list("tvol")}

    await eventually(f"no volume {volume}", is_gone)


async def commits(log: Path, count: int) -> None:
    """Wait until so many more commits are acknowledged than now."""
    wanted = len(read_acks(log)) + count

    async def there() -> bool:
        return len(read_acks(log)) >= wanted

    await eventually(f"{count} more commits in {log.name}: writers stall", there)


async def blocks(log: Path, count: int) -> None:
    """Wait until so many more blocks are acknowledged than now."""

    def lines() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    wanted = lines() + count

    async def there() -> bool:
        return lines() >= wanted

    await eventually(f"{count} more blocks in {log.name}: the writer stalls", there)


async def in_sync(kubectl: Kubectl, volume: str) -> None:
    """Wait until every replica is in sync in an Active configuration."""

    def good(found: Json) -> bool:
        status = found["status"]
        states = [replica["state"] for replica in status.get("replicas", [])]
        return status["config"]["state"] == "Active" and set(states) == {"InSync"}

    await kubectl.until("tvol", volume, good, SOON_S, "every replica is in sync")


async def node_ready(kubectl: Kubectl, node: str) -> None:
    """Wait until a StorageNode is Ready."""
    await kubectl.until("tsn", node, is_ready, SOON_S, "is Ready")


async def tercet(cluster: LocalCluster, *arguments: str) -> str:
    """What a command of `tercet` prints; it ends with exit status 0."""
    program = Path(sys.executable).parent / "tercet"
    done = await asyncio.to_thread(
        subprocess.run,
        [program, *arguments, f"--kubeconfig={cluster.kubeconfig}"],
        capture_output=True,
        text=True,
        timeout=2 * SOON_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def replicas_equal(cluster: LocalCluster, volume: str) -> None:
    """`tercet volume verify` says that the replicas are equal."""
    await tercet(cluster, "volume", "verify", volume)


async def chunk_map(cluster: LocalCluster, volume: str, node: str) -> Json:
    """`tercet volume get --show-chunks` of the replica on a node."""
    said = await tercet(
        cluster, "volume", "get", volume, "--show-chunks", f"--node={node}", "-o", "json"
    )
    found: Json = json.loads(said)["chunkMap"]
    return found


async def allocated_bytes(kubectl: Kubectl) -> dict[str, int]:
    """What is allocated on each node, as the objects say."""
    nodes = await kubectl.list("tsn")
    return {n["metadata"]["name"]: int(n["status"].get("allocatedBytes", 0)) for n in nodes}


async def all_space_back(kubectl: Kubectl) -> None:
    """Wait until no Volume is left and no node has anything of one allocated."""

    async def is_back() -> bool:
        if await kubectl.list("tvol"):
            return False
        left = await allocated_bytes(kubectl)
        print(f"allocated: {left}")
        return all(count <= OWN_BYTES_MAX for count in left.values())

    await eventually("no Volume left and all space back", is_back, SPACE_BACK_S)


# ---------------------------------------------------------------- faults


async def kill_primary(cluster: LocalCluster, kubectl: Kubectl, volume: str) -> str:
    """kill -9 of the engine that leads a volume; says on which node."""
    node = str((await kubectl.get("tvol", volume))["status"]["config"]["primary"]["node"])

    async def its_pid() -> int | None:
        return cluster.pid("engine", node)

    await eventually(f"the engine of {node} runs", its_pid)
    cluster.kill("engine", node)
    return node


@contextlib.asynccontextmanager
async def halted(cluster: LocalCluster, node: str) -> AsyncIterator[Path]:
    """While this lasts a node has no engine; gives the path of its device.

    The supervisor stands still, so that the engine that is killed does not come back before its
    device is as the test wants it.
    """
    device = cluster.nodes[node].folder / "devices" / "d0"
    cluster.kill("engine-supervisor", node, signal.SIGSTOP)
    try:
        cluster.kill("engine", node)

        async def is_free() -> bool:
            return lock_is_free(device)

        await eventually(f"nothing of the engine of {node} is in flight any more", is_free)
        yield device
    finally:
        cluster.kill("engine-supervisor", node, signal.SIGCONT)


def lock_is_free(device: Path) -> bool:
    """Whether nobody has the device's lock (R3): no engine, and no write of a dead one."""
    descriptor = os.open(device, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


async def engine_pid(cluster: LocalCluster, node: str) -> int:
    """Wait until a node's engine runs; its process."""

    async def its_pid() -> int | None:
        return cluster.pid("engine", node)

    return await eventually(f"the engine of {node} runs", its_pid)
