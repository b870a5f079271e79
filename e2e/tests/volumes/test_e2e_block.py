"""A raw volume: a block device in its pod, through detach, attach and the death of its primary."""

import json

import pytest
from blockpod import read_log
from volumeharness import (
    MIB,
    block_pod,
    blocks,
    claim,
    in_sync,
    kill_primary,
    replicas_equal,
    running,
    verdict_of,
    volume_of,
)

from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

BLOCKS_FIRST = 200


async def test_a_raw_volume_keeps_every_acknowledged_block_for_the_next_pod(
    cluster: LocalCluster, kubectl: Kubectl
):
    folder = cluster.state.root / "raw"
    folder.mkdir()
    await kubectl.apply(
        claim("raw", "64Mi", block=True),
        block_pod("raw-writer", "raw", folder, "stream", "blocks", "node-1"),
    )
    await running(kubectl, "raw-writer")
    await blocks(folder / "blocks", BLOCKS_FIRST)
    volume = await volume_of(kubectl, "raw")
    killed = await kill_primary(cluster, kubectl, volume)
    await blocks(folder / "blocks", BLOCKS_FIRST)
    await kubectl.delete("pod", "raw-writer")
    sizes, last = read_log(folder / "blocks")
    assert sizes == [64 * MIB]
    # Another node attaches it: what the first pod's host had in its memory is of no help.
    await kubectl.apply(block_pod("raw-reader", "raw", folder, "verify", "blocks", "node-2"))
    verdict = await verdict_of(kubectl, "raw-reader")
    assert verdict["problems"] == [], f"engine of {killed} killed: {json.dumps(verdict)}"
    assert (verdict["blocks"], verdict["size_bytes"]) == (len(last), 64 * MIB)
    await in_sync(kubectl, volume)
    await replicas_equal(cluster, volume)
    await kubectl.delete("pvc", "raw")
