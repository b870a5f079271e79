"""A node is lost for good under a database: its replica is rebuilt on the fourth node (M1, M2).

A member's node dies with everything on it, and nobody brings it back. The writers go on; within
the replacement time and a copy the volume has three InSync replicas on three living nodes, equal
byte for byte, and nothing that was acknowledged is lost. The host has been attached all the time
and learns the newcomer's path: when the two old members lose their engines it goes on through it.
Deleting the lost node's StorageNode forgets it.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import pytest_asyncio
from volumeharness import (
    Json,
    claim,
    commits,
    eventually,
    halted,
    placed,
    replicas_equal,
    running,
    verdict_of,
    volume_of,
)

from tercet_e2e.evidence import record
from tercet_e2e.kubectl import Kubectl, KubectlError
from tercet_e2e.local import LocalCluster
from tercet_e2e.story import objects
from tercet_e2e.story.leftovers import leftovers

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

REPLACE_AFTER_S = 20.0
REBUILT_WITHIN_S = 180.0
SERVES_WITHIN_S = 10.0
KILLS_MAX = 10


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    """Four storage nodes, and an operator that is not patient."""
    root = Path(tempfile.mkdtemp(prefix="tercet-rebuild-"))
    found = LocalCluster(
        root,
        nodes=4,
        device_bytes=1 << 30,
        replace_after_s=REPLACE_AFTER_S,
        progress=lambda text: print(text, flush=True),
    )
    async with found:
        await found.wait_ready()
        await Kubectl(found.kubectl).apply(*objects.classes())
        yield found
    assert leftovers(root) == []
    if "TERCET_KEEP" not in os.environ:  # to look at logs after a failure
        shutil.rmtree(root)


def members(volume: Json) -> set[str]:
    """The nodes of a volume's members."""
    return {member["node"] for member in volume["status"]["config"]["members"]}


def states(volume: Json, node: str) -> list[str]:
    """What the volume's list of replicas says of a node's."""
    return [e["state"] for e in volume["status"]["replicas"] if e["node"] == node]


def whole_without(lost: str, volume: Json) -> bool:
    """Three members, in sync, none of them on the lost node."""
    status = volume["status"]
    config = status["config"]
    nodes = members(volume)
    settled = config["state"] == "Active" and not config.get("learners")
    return (
        settled
        and len(nodes) == 3
        and lost not in nodes
        and all("InSync" in states(volume, node) for node in nodes)
    )


async def goes_on_through(
    cluster: LocalCluster, kubectl: Kubectl, volume: str, newcomer: str, log: Path
) -> None:
    """The engines of the two other members die, one after the other: one stays away, one is back.

    So the newcomer has to serve, and a host without a path to it would stand still.
    """
    old = members(await kubectl.get("tvol", volume)) - {newcomer}
    away, back = sorted(old)

    def leads(found: Json) -> bool:
        config = found["status"]["config"]
        return bool(config["state"] == "Active" and config["primary"]["node"] == newcomer)

    async with halted(cluster, away):
        await commits(log, 5)
        for left in reversed(range(KILLS_MAX)):
            cluster.kill("engine", back)  # an engine that is back at once may be first again
            try:
                await kubectl.until("tvol", volume, leads, SERVES_WITHIN_S, f"is led by {newcomer}")
                break
            except KubectlError:
                if left == 0:
                    raise
                await commits(log, 5)
        await commits(log, 50)


async def test_a_lost_nodes_replica_is_rebuilt_on_another(cluster: LocalCluster):
    kubectl = Kubectl(cluster.kubectl)
    acks = cluster.state.root / "rebuild"
    acks.mkdir()
    await kubectl.apply(claim("kept", "256Mi"))
    names = sorted(cluster.nodes)
    await kubectl.apply(placed(objects.writer("kept-writer", "kept", acks, 5), names[0]))
    await running(kubectl, "kept-writer")
    log = acks / "acks.log"
    await commits(log, 50)
    volume = await volume_of(kubectl, "kept")

    async def settled() -> Json | None:
        found = await kubectl.get("tvol", volume)
        return found if whole_without("nobody", found) else None

    before = await eventually("three replicas in sync", settled)
    # The pod's own node stays: what is lost is storage, not the host.
    lost = next(node for node in sorted(members(before)) if node != names[0])
    spare = next(node for node in names if node not in members(before))
    await cluster.lose(lost)
    lost_s = time.monotonic()
    await commits(log, 50)
    after = await kubectl.until(
        "tvol",
        volume,
        lambda found: whole_without(lost, found),
        REBUILT_WITHIN_S,
        f"is whole on three living nodes, without {lost}",
    )
    print(f"rebuilt on {spare} {time.monotonic() - lost_s:.1f} s after the loss of {lost}")
    assert members(after) == (members(before) - {lost}) | {spare}
    assert after["status"]["config"].get("previousMembers") is None
    await commits(log, 50)
    await goes_on_through(cluster, kubectl, volume, spare, log)
    # The members are changed by the primary; the operator puts the list right a moment later.
    await kubectl.until(
        "tvol",
        volume,
        lambda found: states(found, lost) == ["Former"],
        SERVES_WITHIN_S,
        f"keeps the replica of {lost} in sight until it is deleted",
    )
    await kubectl.delete("pod", "kept-writer")
    await kubectl.apply(placed(objects.checker("kept-checker", "kept", acks, "acks.log"), names[0]))
    verdict = await verdict_of(kubectl, "kept-checker")
    assert verdict["problems"] == [], verdict
    record("commits over a rebuild", verdict["acknowledged"], 0, time.monotonic() - lost_s)
    await replicas_equal(cluster, volume)
    # The node is given up for good: nothing is waited for any more.
    await kubectl.run("delete", "tsn", lost, "--wait=false")

    async def forgotten() -> bool:
        nodes = {node["metadata"]["name"] for node in await kubectl.list("tsn")}
        entries = (await kubectl.get("tvol", volume))["status"]["replicas"]
        return lost not in nodes and lost not in {entry["node"] for entry in entries}

    await eventually(f"{lost} is forgotten", forgotten)
    await kubectl.delete("pvc", "kept")
