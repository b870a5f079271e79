"""A copy of a claim that is being written: a prefix of its commits, on its own from then on."""

import pytest
from volumeharness import (
    all_space_back,
    claim,
    commits,
    eventually,
    placed,
    replicas_equal,
    running,
    verdict_of,
    volume_of,
)

from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster
from tercet_e2e.story import objects
from tercet_e2e.workload import read_acks

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]


async def test_a_clone_is_a_prefix_of_its_source_and_outlives_it(
    cluster: LocalCluster, kubectl: Kubectl
):
    source, copy = (cluster.state.root / name for name in ("clone-source", "clone-copy"))
    source.mkdir()
    copy.mkdir()
    await kubectl.apply(claim("origin", "128Mi"), objects.writer("origin-db", "origin", source))
    await running(kubectl, "origin-db")
    await commits(source / "acks.log", 100)
    asked = read_acks(source / "acks.log")
    lines = [f"{a.writer} {a.sequence} {a.id} {a.at_ns}\n" for a in asked]
    (copy / "before.log").write_text("".join(lines))
    # The provisioner clones while the source's writers go on.
    await kubectl.apply(
        claim("copy", "128Mi", clone_of="origin"),
        objects.checker("copy-check", "copy", copy, "before.log"),
    )
    head = await verdict_of(kubectl, "copy-check")
    assert head["problems"] == []
    assert head["commits"] >= len(asked)
    await commits(source / "acks.log", 50)
    # Both are written from here on, each on its own.
    await kubectl.apply(objects.writer("copy-db", "copy", copy))
    await running(kubectl, "copy-db")
    await commits(copy / "acks.log", 50)
    await commits(source / "acks.log", 50)
    await kubectl.delete("pod", "origin-db", "copy-db")
    own = min(ack.id for ack in read_acks(copy / "acks.log"))
    assert own == head["commits"] + 1, "the copy goes on where it was cut"
    await kubectl.apply(
        objects.checker("origin-check", "origin", source, "acks.log", head["commits"]),
        objects.checker("copy-check", "copy", copy, "acks.log", head["commits"]),
    )
    of_source = await verdict_of(kubectl, "origin-check")
    of_copy = await verdict_of(kubectl, "copy-check")
    assert (of_source["problems"], of_copy["problems"]) == ([], [])
    assert of_source["digest"] == of_copy["digest"] == head["digest"], "one prefix in both"
    original, volume = await volume_of(kubectl, "origin"), await volume_of(kubectl, "copy")
    await kubectl.delete("pvc", "origin")

    async def without_its_source() -> bool:
        left = {v["metadata"]["name"] for v in await kubectl.list("tvol")}
        return original not in left and volume in left

    await eventually("the source's volume is gone", without_its_source)
    await kubectl.apply(placed(objects.checker("copy-check", "copy", copy, "acks.log"), "node-3"))
    assert (await verdict_of(kubectl, "copy-check"))["problems"] == []
    await replicas_equal(cluster, volume)
    await kubectl.delete("pvc", "copy")
    await all_space_back(kubectl)
