"""The control plane is away, our own pods die and are upgraded: the pod's I/O goes on."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable

import pytest
from kindharness import (
    CHART,
    NAMESPACE,
    RELEASE,
    Database,
    Installed,
    objects,
    run_pod,
    tell,
    until,
    wait_storage_nodes,
)

from tercet_e2e.errors import ProcessError
from tercet_e2e.kubectl import KubectlError
from tercet_e2e.site import Site

pytestmark = [pytest.mark.kind, pytest.mark.kubelet, pytest.mark.asyncio(loop_scope="session")]
AWAY_S = 60.0
API_TIMEOUT_S = 180.0
KILLING_S = 120.0
KILL_PAUSE_S = 5.0
UPGRADE_TIMEOUT_S = 600.0
UNINSTALL_TIMEOUT_S = 300.0
COMPONENTS = ("operator", "csi-controller", "csi-node", "node")
# Runs on the control plane: its kubelet ends the API server when the manifest has gone, and starts
# it again with it.
HIDE = f"""
import os, time
shown, hidden = "/host/manifests/kube-apiserver.yaml", "/host/kube-apiserver.yaml"
os.rename(shown, hidden)
try:
    time.sleep({AWAY_S})
finally:
    os.rename(hidden, shown)
"""
# Runs on a worker: whatever there is of us in its folders, mounts, devices and processes.
LEFT = """
import json, os, pathlib
found = []
for top in ("/host/var/lib/tercet", "/host/var/lib/kubelet", "/host/run"):
    for folder, folders, files in os.walk(top):
        if folder == "/host/run":
            folders.remove("containerd")  # the root file systems of all containers
        paths = [f"{folder}/{name}" for name in (*folders, *files)]
        found += [path for path in paths if "tercet" in path]
if os.path.exists("/host/var/lib/tercet"):
    found.append("/var/lib/tercet")
for line in pathlib.Path("/proc/1/mounts").read_text().splitlines():
    where = line.split()[1]
    found += [f"mount {where}"] * ("tercet" in where and "/tercet-e2e" not in where)
for name in pathlib.Path("/sys/block").glob("loop*/loop/backing_file"):
    backing = name.read_text().strip()
    found += [f"loop device over {backing}"] * (f"/{os.environ['NODE']}/" in backing)
for name in pathlib.Path("/proc").glob("[0-9]*/comm"):
    try:
        found += [f"process {name.read_text().strip()}"] * name.read_text().startswith("tercet")
    except OSError:
        pass
print(json.dumps({"found": found}))
"""


def host_pod(site: Site, node: str, path: str, code: str) -> dict:
    """A pod on a node, with a folder of that node at /host and its processes in sight."""
    return {
        "nodeName": node,
        "hostPID": True,
        "restartPolicy": "Never",
        "tolerations": [{"operator": "Exists"}],
        "containers": [
            {
                "name": "look",
                "image": site.workload_image,
                "imagePullPolicy": "IfNotPresent",
                "command": [site.python, "-c", code],
                "env": [{"name": "NODE", "value": node}],
                "securityContext": {"privileged": True},
                "volumeMounts": [{"name": "host", "mountPath": "/host"}],
            }
        ],
        "volumes": [{"name": "host", "hostPath": {"path": path}}],
    }


async def api_answers(site: Site) -> bool:
    try:
        return await site.kubectl.run("get", "--raw", "/readyz", timeout_s=10) == "ok"
    except KubectlError:
        return False


async def test_api_server_is_away_for_a_minute(database: Database):
    """Nothing of a volume's I/O needs the API server."""
    site = database.site

    async def silent() -> bool:
        return not await api_answers(site)

    spec = host_pod(site, await site.control_plane(), "/etc/kubernetes", HIDE)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "hide"}, "spec": spec}
    started_ns = time.monotonic_ns()
    await site.kubectl.apply(pod)
    await until(silent, API_TIMEOUT_S, "the API server is gone")
    gone_s = time.monotonic()
    while not await api_answers(site):
        assert time.monotonic() - gone_s < AWAY_S + API_TIMEOUT_S, "the API server stays away"
        await database.commits(1)  # raises when they come to a halt
        await asyncio.sleep(1.0)
    tell(f"away for {time.monotonic() - gone_s:.0f} s")
    tell(f"longest stall {database.stall_s(started_ns):.2f} s")
    await database.commits(20)
    assert await database.restarts() == 0
    await site.kubectl.delete("pod", "hide")
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


async def test_uninstallation_is_refused_while_there_is_a_volume(
    database: Database, installed: Installed
):
    """Nothing changes, and the command that the refusal names gives the release back."""
    site = installed.site
    words = ["uninstall", RELEASE, "-n", NAMESPACE, f"--timeout={UNINSTALL_TIMEOUT_S:.0f}s"]
    with pytest.raises(ProcessError) as refused:
        await site.helm(*words, timeout_s=UNINSTALL_TIMEOUT_S + 10)
    said = str(refused.value)
    refusal = re.search(r"refused: there are Volumes: ([^\n]*)", said)
    assert refusal, said
    # Those of tests before may still be on their way out.
    assert await database.volume() in refusal.group(1), said
    await wait_storage_nodes(site)
    await database.commits(20)
    with pytest.raises(ProcessError, match="has no deployed releases"):
        await upgrade(installed)  # Helm's own rule, which the refusal knows of
    named = re.search(r"helm (rollback \S+ \d+ -n \S+)", said)
    assert named, said
    await site.helm(*named.group(1).split(), timeout_s=UNINSTALL_TIMEOUT_S)
    assert "STATUS: deployed" in await site.helm("status", RELEASE, "-n", NAMESPACE)
    await database.commits(20)
    await wait_storage_nodes(site)
    assert await database.restarts() == 0
    await database.verify()


async def upgrade(installed: Installed, *more: str) -> None:
    words = ["upgrade", RELEASE, str(CHART), "-n", NAMESPACE, *installed.values, *more]
    words += ["--wait", f"--timeout={UPGRADE_TIMEOUT_S:.0f}s"]
    await installed.site.helm(*words, timeout_s=UPGRADE_TIMEOUT_S + 10)


def rebuilt(installed: Installed) -> list[str]:
    """Helm's words for taking other images of ours; where there are none, for new pods."""
    if installed.upgrade_tag is not None:
        return ["--set", f"image.tag={installed.upgrade_tag}"]
    annotation = f"example\\.org/upgraded={time.time():.0f}"
    parts = ("node", "operator", "csi.controller", "csi.node")
    return [
        word for part in parts for word in ("--set-string", f"{part}.podAnnotations.{annotation}")
    ]


async def test_upgrade(database: Database, installed: Installed):
    """The chart goes to rebuilt images, node by node, under load."""
    site = installed.site
    before = await our_pods(site)
    started_ns = time.monotonic_ns()
    with site.step("helm upgrade --wait under load"):
        await upgrade(installed, *rebuilt(installed))
        for kind in ("daemonset/tercet-node-default", "daemonset/tercet-csi-node"):
            await site.kubectl.run(
                *("rollout", "status", kind, "-n", NAMESPACE),
                f"--timeout={UPGRADE_TIMEOUT_S:.0f}s",
                timeout_s=UPGRADE_TIMEOUT_S + 10,
            )
    tell(f"longest stall {database.stall_s(started_ns):.2f} s")
    await database.commits(20)
    assert await database.restarts() == 0
    assert not before & await our_pods(site), "each of these pods is a new one"
    await wait_storage_nodes(site)
    await database.in_sync()
    await database.verify()


async def our_pods(site: Site) -> set[str]:
    """Our pods, but for attachers: those are a person's to replace."""
    selector = f"app.kubernetes.io/component in ({', '.join(COMPONENTS)})"
    listed = await site.kubectl.run("get", "pods", "-n", NAMESPACE, "-l", selector, "-o", "name")
    return set(listed.split())


async def test_uninstall_leaves_nothing(installed: Installed):
    """The last: no object, no file, no mount, no loop device and no process stays."""
    site = installed.site
    kubectl = site.kubectl

    async def no_volume() -> bool:  # while there is one, the uninstallation is refused
        return not await kubectl.list("volumes.tercet.io")

    await until(no_volume, API_TIMEOUT_S, "the volumes of the tests before are gone")
    words = ["uninstall", RELEASE, "-n", NAMESPACE, "--wait"]
    words += [f"--timeout={UNINSTALL_TIMEOUT_S:.0f}s"]
    with site.step("helm uninstall --wait"):
        await site.helm(*words, timeout_s=UNINSTALL_TIMEOUT_S + 10)
    assert installed.before is not None, "Tercet was there before: nobody knows what was not"
    # Helm makes the namespace and leaves it, with what Kubernetes puts into each.
    expected = installed.before | {
        f"Namespace /{NAMESPACE}",
        f"ServiceAccount {NAMESPACE}/default",
        f"ConfigMap {NAMESPACE}/kube-root-ca.crt",
    }

    async def left() -> list[str]:
        return sorted(await objects(site) - expected)

    await gone(left, "objects")
    for csi_node in await kubectl.list("csinodes"):
        drivers = [driver["name"] for driver in csi_node["spec"].get("drivers") or []]
        assert "csi.tercet.io" not in drivers, csi_node["metadata"]["name"]
    for node in await site.workers():

        async def on_node(node: str = node) -> list[str]:
            verdict = await run_pod(site, f"look-{node}", host_pod(site, node, "/", LEFT))
            return list(verdict["found"])

        await gone(on_node, f"traces on {node}")


async def gone(what_is_left: Callable[[], Awaitable[list[str]]], what: str) -> None:
    """Wait until nothing is left; what ends by itself has a minute for it."""
    deadline_s = time.monotonic() + 60
    while left := await what_is_left():
        assert time.monotonic() < deadline_s, f"{what} are left: {left}"
        await asyncio.sleep(1.0)
