"""All nodes are restarted one after the other under a database, as an upgrade of the chart does it.

A node's pod is told to end: SIGTERM for engine and agent at the same moment. What the node leads is
handed over (T10) before its engine ends, so the writers see no error and no takeover's pause. The
next node follows when this one is Ready and every replica is in sync, twice round: the
primary's node is among them each time.
"""

import signal
import time

import pytest
from volumeharness import (
    claim,
    commits,
    engine_pid,
    eventually,
    in_sync,
    node_ready,
    replicas_equal,
    running,
    verdict_of,
    volume_of,
)

from tercet_e2e.evidence import record
from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster
from tercet_e2e.story import objects
from tercet_e2e.workload import longest_stall_s, read_acks

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

ROUNDS = 2
STALL_MAX_S = (
    3.0  # a takeover of a dead node takes longer than a second; a busy core takes its time
)


async def restart(cluster: LocalCluster, kubectl: Kubectl, node: str) -> None:
    """The node's pod ends and is there again."""
    before = await engine_pid(cluster, node)
    for component in ("engine-supervisor", "agent"):
        cluster.kill(component, node, signal.SIGTERM)

    async def another() -> bool:
        now = cluster.pid("engine", node)
        return now is not None and now != before

    await eventually(f"{node} has a new engine", another)
    await node_ready(kubectl, node)


async def test_a_rolling_restart_is_hardly_noticed(cluster: LocalCluster, kubectl: Kubectl):
    acks = cluster.state.root / "rolling"
    acks.mkdir()
    log = acks / "acks.log"
    await kubectl.apply(claim("rolled", "256Mi"), objects.writer("rolled-db", "rolled", acks))
    await running(kubectl, "rolled-db")
    await commits(log, 50)
    volume = await volume_of(kubectl, "rolled")
    started_s, handed_over, longest_s = time.monotonic(), 0, 0.0
    for node in sorted(cluster.nodes) * ROUNDS:
        await in_sync(kubectl, volume)
        led = (await kubectl.get("tvol", volume))["status"]["config"]["primary"]["node"]
        began_ns = time.monotonic_ns()
        await restart(cluster, kubectl, node)
        await commits(log, 20)
        stall_s = longest_stall_s(read_acks(log), began_ns, time.monotonic_ns())
        print(f"{node} restarted{', which led' if led == node else ''}: stall {stall_s:.3f} s")
        handed_over += led == node
        longest_s = max(longest_s, stall_s)
    assert handed_over >= ROUNDS, "a volume was led by the nodes that were restarted"
    assert longest_s < STALL_MAX_S
    await kubectl.delete("pod", "rolled-db")
    await kubectl.apply(objects.checker("rolled-check", "rolled", acks, "acks.log"))
    verdict = await verdict_of(kubectl, "rolled-check")
    assert verdict["problems"] == [], verdict
    record(
        "commits over a rolling restart", verdict["acknowledged"], 0, time.monotonic() - started_s
    )
    await replicas_equal(cluster, volume)
    await kubectl.delete("pvc", "rolled")
