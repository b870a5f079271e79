"""A user installs the chart, claims a volume and runs a database on it."""

from __future__ import annotations

import pytest
from kindharness import NAMESPACE, RELEASE, Database, Installed, is_ready, tell

pytestmark = [pytest.mark.kind, pytest.mark.asyncio(loop_scope="session")]
TEST_TIMEOUT_S = 300.0


async def test_after_helm_install_everything_is_ready(installed: Installed):
    kubectl = installed.site.kubectl
    tell(f"helm install to the last StorageNode Ready: {installed.install_s:.1f} s")
    nodes = await kubectl.list("storagenodes")
    assert len(nodes) == 3
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
