"""The control plane is away, our own pods die and are upgraded: the pod's I/O goes on."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
import pytest_asyncio
from kindharness import (
    CHART,
    NAMESPACE,
    RELEASE,
    REPOSITORY,
    Database,
    Installed,
    tell,
    until,
    wait_storage_nodes,
)

from tercet_e2e import images
from tercet_e2e.errors import ProcessError
from tercet_e2e.kubectl import KubectlError

pytestmark = [pytest.mark.kind, pytest.mark.asyncio(loop_scope="session")]
AWAY_S = 60.0
API_TIMEOUT_S = 180.0
KILLING_S = 120.0
KILL_PAUSE_S = 5.0
UPGRADE_TIMEOUT_S = 600.0
MANIFEST = "/etc/kubernetes/manifests/kube-apiserver.yaml"
HIDDEN = "/etc/kubernetes/kube-apiserver.yaml"
COMPONENTS = ("operator", "csi-controller", "csi-node", "node")


@pytest_asyncio.fixture(loop_scope="session")
async def database(installed: Installed, request):
    """A database that commits, all of whose replicas are in sync."""
    found = Database(installed.site, request.node.name.removeprefix("test_").replace("_", "-"))
    await found.start()
    await found.in_sync()
    yield found
    await found.remove()


async def test_api_server_is_away_for_a_minute(database: Database):
    """Nothing of a volume's I/O needs the API server."""
    site = database.site

    async def answers() -> bool:
        try:
            return await site.kubectl.run("get", "--raw", "/readyz", timeout_s=10) == "ok"
        except KubectlError:
            return False

    async def silent() -> bool:
        return not await answers()

    started_ns = time.monotonic_ns()
    await site.on(site.control_plane, "mv", MANIFEST, HIDDEN)
    try:
        await until(silent, API_TIMEOUT_S, "the API server is gone")
        gone_s = time.monotonic()
        while time.monotonic() - gone_s < AWAY_S:
            await database.commits(1)  # raises when they come to a halt
            await asyncio.sleep(1.0)
    finally:
        await site.on(site.control_plane, "mv", HIDDEN, MANIFEST)
    await until(answers, API_TIMEOUT_S, "the API server is back")
    tell(f"away for {time.monotonic() - gone_s:.0f} s")
    tell(f"longest stall {database.stall_s(started_ns):.2f} s")
    await database.commits(20)
    assert await database.restarts() == 0
    await wait_storage_nodes(site)
    await database.in_sync()
    await database.verify()


async def test_our_pods_die_at_random(database: Database):
    """Our pods are killed for two minutes, those of a node only when every replica is in sync."""
    site = database.site
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    tell(f"seed {seed}")
    killed: dict[str, int] = {}
    started_ns, started_s = time.monotonic_ns(), time.monotonic()
    while time.monotonic() - started_s < KILLING_S:
        component = chance.choice(COMPONENTS)
        if component == "node":
            await database.in_sync()
        pods = (
            await site.kubectl.run(
                *("get", "pods", "-n", NAMESPACE, "-o", "name"),
                *("-l", f"app.kubernetes.io/component={component}"),
            )
        ).split()
        victim = chance.choice(sorted(pods))
        await site.kubectl.run(
            "delete", victim, "-n", NAMESPACE, "--grace-period=0", "--force", "--wait=false"
        )
        killed[component] = killed.get(component, 0) + 1
        await asyncio.sleep(KILL_PAUSE_S)
        await database.commits(1)
    shown = ", ".join(f"{name} {count}" for name, count in sorted(killed.items()))
    tell(f"killed: {shown}; longest stall {database.stall_s(started_ns):.2f} s")
    assert await database.restarts() == 0
    await wait_storage_nodes(site)
    await database.in_sync()
    await database.verify()


async def test_upgrade(database: Database, installed: Installed):
    """The chart goes to rebuilt images, node by node, under load."""
    site = installed.site
    tag = "rebuilt"
    for name in images.own_names(REPOSITORY).values():
        rebuilt = f"{name.rpartition(':')[0]}:{tag}"
        folder = site.root / "rebuilt"
        folder.mkdir(exist_ok=True)
        (folder / "Dockerfile").write_text(f"FROM {name}\nLABEL tercet.io/rebuilt=yes\n")
        await site.engine.run("build", "-q", "--network", "none", "-t", rebuilt, str(folder))
        await site.load(rebuilt)
    started_ns = time.monotonic_ns()
    words = ["upgrade", RELEASE, str(CHART), "-n", NAMESPACE, "--values", str(installed.values)]
    words += ["--set", f"image.tag={tag}", "--wait", f"--timeout={UPGRADE_TIMEOUT_S:.0f}s"]
    with site.step("helm upgrade --wait under load"):
        await site.helm(*words, timeout_s=UPGRADE_TIMEOUT_S + 10)
        for kind in ("daemonset/tercet-node-default", "daemonset/tercet-csi-node"):
            await site.kubectl.run(
                *("rollout", "status", kind, "-n", NAMESPACE),
                f"--timeout={UPGRADE_TIMEOUT_S:.0f}s",
                timeout_s=UPGRADE_TIMEOUT_S + 10,
            )
    tell(f"longest stall {database.stall_s(started_ns):.2f} s")
    await database.commits(20)
    assert await database.restarts() == 0
    await wait_storage_nodes(site)
    await database.in_sync()
    await database.verify()


async def test_uninstall_leaves_nothing(installed: Installed):
    """The last: no object, no file, no mount and no loop device stays."""
    site = installed.site
    kubectl = site.kubectl

    async def no_volume() -> bool:  # while there is one, the uninstallation is refused
        return not await kubectl.list("volumes.tercet.io")

    await until(no_volume, API_TIMEOUT_S, "the volumes of the tests before are gone")
    words = ["uninstall", RELEASE, "-n", NAMESPACE, "--wait", "--timeout=300s"]
    with site.step("helm uninstall"):
        await site.helm(*words, timeout_s=310)
    kinds = (await kubectl.run("get", "crds", "-o", "name")).split()
    assert [kind for kind in kinds if "tercet.io" in kind] == []
    everything = (await kubectl.run("api-resources", "--verbs=list", "-o", "name")).split()
    for kind in ("clusterroles", "clusterrolebindings", "csidrivers", "storageclasses"):
        assert f"{kind}" in " ".join(everything)
        names = (await kubectl.run("get", kind, "-o", "name")).split()
        assert [name for name in names if "tercet" in name] == []

    async def gone() -> bool:
        return not (await kubectl.run("get", "all", "-n", NAMESPACE, "-o", "name")).split()

    await until(gone, API_TIMEOUT_S, f"nothing is left in {NAMESPACE}")
    for node in await site.workers():
        try:
            left = await site.on(node, "find", "/var/lib/tercet", "-mindepth", "1")
        except ProcessError:
            left = ""
        mounted = await site.on(node, "findmnt", "-rno", "TARGET")
        assert left == "", f"{node}: {left}"
        assert "tercet" not in mounted.replace("/var/lib/tercet-e2e", "")
