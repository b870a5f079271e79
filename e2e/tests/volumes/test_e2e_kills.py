"""Two minutes of a database on a volume while engines and agents are killed: nothing is lost.

Every five seconds one process dies by kill -9, in turn a primary's engine, an agent, a primary's
engine, a secondary's engine: at least eight times a primary's engine. The writers must see no
error and no stall beyond the limit; afterwards every acknowledged commit is there, the file is
whole, and the replicas are equal.
"""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tercet_e2e.evidence import record
from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster
from tercet_e2e.story import objects
from tercet_e2e.workload import longest_stall_s, read_acks

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

ROUNDS = 24
PAUSE_S = 5.0
PRIMARIES_MIN = 8
TURNS = ("primary", "agent", "primary", "secondary")


async def test_no_acknowledged_commit_is_lost_while_processes_die(
    cluster: LocalCluster,
):
    kubectl = Kubectl(cluster.kubectl)
    acks = cluster.state.root / "kills"
    acks.mkdir()
    await kubectl.apply(
        objects.claim("killed", "1Gi"), objects.writer("killed-writer", "killed", acks)
    )
    await kubectl.until(
        "pod", "killed-writer", lambda o: o["status"].get("phase") == "Running", 60, "runs"
    )
    volume = (await kubectl.get("pvc", "killed"))["spec"]["volumeName"]
    started_s, started_ns = time.monotonic(), time.monotonic_ns()
    primaries = 0
    for number in range(ROUNDS):
        round_s = time.monotonic()
        primaries += await kill_one(cluster, kubectl, volume, TURNS[number % len(TURNS)])
        await asyncio.sleep(max(0.0, PAUSE_S - (time.monotonic() - round_s)))
    assert primaries >= PRIMARIES_MIN
    found = read_acks(acks / "acks.log")
    stall_s = longest_stall_s(found, started_ns, time.monotonic_ns())
    print(f"{len(found)} commits, {primaries} primaries killed, longest stall {stall_s:.2f} s")
    assert found[-1].at_ns > time.monotonic_ns() - 10 * 10**9, "the writers have come to a halt"
    await kubectl.delete("pod", "killed-writer")
    await kubectl.apply(objects.checker("killed-checker", "killed", acks, "acks.log"))
    done = await kubectl.until(
        "pod",
        "killed-checker",
        lambda o: o["status"].get("phase") in {"Succeeded", "Failed"},
        120,
        "has ended",
    )
    log = await kubectl.run("logs", "killed-checker")
    record("commits under kill -9", len(found), log.count("is lost"), time.monotonic() - started_s)
    assert done["status"]["phase"] == "Succeeded", log
    await kubectl.delete("pod", "killed-checker")
    tercet = Path(sys.executable).parent / "tercet"
    verified = await asyncio.to_thread(
        subprocess.run,
        [tercet, "volume", "verify", volume, f"--kubeconfig={cluster.kubeconfig}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    await kubectl.delete("pvc", "killed")


async def kill_one(cluster: LocalCluster, kubectl: Kubectl, volume: str, whose: str) -> int:
    """Kill a process; 1 when it was the primary's engine."""
    config = (await kubectl.get("tvol", volume))["status"]["config"]
    primary = config["primary"]["node"]
    others = [m["node"] for m in config["members"] if m["node"] != primary]
    if whose == "agent":
        cluster.kill("agent", primary)
        return 0
    node = primary if whose == "primary" else others[config["epoch"] % len(others)]
    deadline_s = time.monotonic() + 60
    while cluster.pid("engine", node) is None:
        assert time.monotonic() < deadline_s, f"the engine of {node} does not come back"
        await asyncio.sleep(0.05)
    cluster.kill("engine", node)
    return 1 if node == primary else 0
