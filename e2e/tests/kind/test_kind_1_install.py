"""A user installs the chart, claims a volume and runs a database on it."""

from __future__ import annotations

import json

import pytest
from kindharness import NAMESPACE, RELEASE, Database, Installed, is_ready, run_pod, tell

from tercet_e2e import images
from tercet_e2e.site import Site

pytestmark = [pytest.mark.kind, pytest.mark.asyncio(loop_scope="session")]
TEST_TIMEOUT_S = 300.0
COMPONENTS = {"operator": "operator", "csi": "csi-node", "node": "node"}
"""Of each image a component that runs it."""


@pytest.mark.kubelet
async def test_after_helm_install_everything_is_ready(installed: Installed):
    kubectl = installed.site.kubectl
    tell(f"helm install to the last StorageNode Ready: {installed.install_s:.1f} s")
    nodes = await kubectl.list("storagenodes")
    assert len(nodes) == len(await installed.site.workers()) >= 3
    assert all(is_ready(node) for node in nodes)
    pods = (await kubectl.run("get", "pods", "-n", NAMESPACE, "-o", "name")).split()
    assert pods
    listed = await kubectl.run(
        "get",
        "pods",
        "-n",
        NAMESPACE,
        "-o",
        "jsonpath={.items[*].status.containerStatuses[*].ready}",
    )
    assert set(listed.split()) == {"true"}


@pytest.mark.kubelet
@pytest.mark.parametrize("target", images.TARGETS)
async def test_an_image_starts_within_a_second(installed: Installed, target: str):
    """Each program of ours, in the image that a node really has."""
    site = installed.site
    container = await image_of(site, target)
    container |= {"name": "measure", "command": [site.python]}
    container["args"] = images.measuring(images.TARGETS[target])
    spec = {"restartPolicy": "Never", "containers": [container]}
    taken = await run_pod(site, f"measure-{target}", spec)
    tell(", ".join(f"{shown.split(',')[0]}: {taken_s:.2f} s" for shown, taken_s in taken.items()))
    images.check_starts(container["image"], taken)


async def image_of(site: Site, target: str) -> dict:
    """The image that the chart's pods have, with its pull policy."""
    selector = f"app.kubernetes.io/component={COMPONENTS[target]}"
    listed = await site.kubectl.run("get", "pods", "-n", NAMESPACE, "-l", selector, "-o", "json")
    container = json.loads(listed)["items"][0]["spec"]["containers"][0]
    return {name: container[name] for name in ("image", "imagePullPolicy")}


@pytest.mark.kubelet
async def test_helm_test_writes_and_reads_a_volume(installed: Installed):
    words = ["test", RELEASE, "-n", NAMESPACE, f"--timeout={TEST_TIMEOUT_S:.0f}s"]
    with installed.site.step("helm test"):
        said = await installed.site.helm(*words, timeout_s=TEST_TIMEOUT_S + 10)
    assert "Phase:          Succeeded" in said, said


async def test_a_database_commits_on_a_claimed_volume(installed: Installed):
    database = Database(installed.site, "first")
    with installed.site.step("StatefulSet created to its tenth commit"):
        await database.start()
    await database.in_sync()
    assert is_ready(await installed.site.kubectl.get("tvol", await database.volume()))
    verdict = await database.verify()
    tell(f"{verdict['commits']} commits, every acknowledged one there")
    await database.remove()
