"""Nodes are stopped, killed and drained under a database: data stays, I/O goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from kindharness import Database, tell, wait_storage_nodes

from tercet_e2e.site import Power, Site

pytestmark = [pytest.mark.kind, pytest.mark.asyncio(loop_scope="session")]
STALL_S_MAX = 3.0
ELSEWHERE_S_MAX = 60.0
NOT_READY_S_MAX = 180.0
DRAIN_S_MAX = 120.0
TAINT = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"


@contextlib.asynccontextmanager
async def powerless(site: Site, node: str, how: Power) -> AsyncIterator[None]:
    """While this lasts a node has no power; then it is back, and its StorageNode Ready."""
    await site.power(node, how)
    try:
        yield
    finally:
        await site.power(node, "on")
        await site.wait_nodes()
        await wait_storage_nodes(site)


async def move(database: Database) -> tuple[str, str]:
    """Have the pod go to another node; returns where it was and where it is."""
    kubectl = database.site.kubectl
    old = await database.where()
    await kubectl.run("cordon", old)
    try:
        await kubectl.delete("pod", database.pod)
        await database.commits(1)
    finally:
        await kubectl.run("uncordon", old)
    new = await database.where()
    assert new != old
    return old, new


@pytest.mark.kubelet
async def test_node_loss(database: Database):
    """The worker with the pod on it loses power: the pod goes on elsewhere with every commit."""
    site = database.site
    node = await database.where()
    await database.commits(50)
    tell(f"{len(database.acks())} commits acknowledged; {node} loses power")
    async with powerless(site, node, "off"):
        killed_s = time.monotonic()
        wait = ["wait", f"node/{node}", "--for=condition=Ready=Unknown"]
        wait += [f"--timeout={NOT_READY_S_MAX:.0f}s"]
        await site.kubectl.run(*wait, timeout_s=NOT_READY_S_MAX + 10)
        tell(f"Kubernetes says it is not ready after {time.monotonic() - killed_s:.1f} s")
        tainted_s = time.monotonic()
        await site.kubectl.run("taint", "node", node, TAINT)
        try:
            await database.commits(1, timeout_s=ELSEWHERE_S_MAX)
            elsewhere_s = time.monotonic() - tainted_s
        finally:
            await site.kubectl.run("taint", "node", node, f"{TAINT}-")
        there = await database.where()
        tell(f"taint to the first commit on {there}: {elsewhere_s:.1f} s")
        assert there != node
    verdict = await database.verify()
    tell(f"{verdict['acknowledged']} acknowledged commits, every one there")
    # Who was away for longer than the log is kept is copied (C2): that may still be under way.
    tell(f"replicas: {await database.replicas()}")


async def test_moved_pod_finds_its_data(database: Database):
    """A pod that is started on another node goes on where it was."""
    await database.commits(20)
    started_s = time.monotonic()
    old, new = await move(database)
    tell(f"{old} -> {new}: {time.monotonic() - started_s:.1f} s until it commits again")
    verdict = await database.verify()
    tell(f"{verdict['acknowledged']} acknowledged commits, every one there")


@pytest.mark.kubelet
async def test_primary_stops(database: Database):
    """The worker that holds the primary is stopped; the pod elsewhere sees no more than a pause."""
    site = database.site
    await move(database)
    await database.in_sync()
    node = await database.where()
    before = await database.config()
    primary = str(before["primary"]["node"])
    assert primary != node, "the primary has gone with the pod: nothing to show"
    await database.commits(20)
    started_ns = time.monotonic_ns()
    async with powerless(site, primary, "stop"):
        await database.commits(20)
        stall_s = database.stall_s(started_ns)
        after = await database.config()
        tell(f"{primary} stopped, {after['primary']['node']} serves; longest stall {stall_s:.2f} s")
        assert after["epoch"] > before["epoch"]
        assert await database.restarts() == 0
        assert stall_s <= STALL_S_MAX
    verdict = await database.verify()
    tell(f"{verdict['acknowledged']} acknowledged commits, every one there")
    # Who was away for longer than the log is kept is copied (C2): that may still be under way.
    tell(f"replicas: {await database.replicas()}")


async def test_drain(database: Database):
    """A worker is drained: nothing of ours blocks it, and the database sees no error."""
    site = database.site
    node = await database.where()
    words = ["drain", node, "--ignore-daemonsets", "--delete-emptydir-data"]
    started_s = time.monotonic()
    try:
        await site.kubectl.run(*words, f"--timeout={DRAIN_S_MAX:.0f}s", timeout_s=DRAIN_S_MAX + 10)
        tell(f"{node} drained in {time.monotonic() - started_s:.1f} s")
        await database.commits(20)
        assert await database.where() != node
        assert await database.restarts() == 0
    finally:
        await site.kubectl.run("uncordon", node)
    verdict = await database.verify()
    tell(f"{verdict['acknowledged']} acknowledged commits, every one there")
