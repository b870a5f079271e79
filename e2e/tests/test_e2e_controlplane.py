"""The control plane: comes up, keeps order, and leaves nothing however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusterharness import Kubectl

from tercet_e2e.cleanup import clean, loops_below, marked_processes, mounts_below
from tercet_e2e.cluster import Cluster
from tercet_e2e.controlplane import API_SERVER
from tercet_e2e.errors import StateError
from tercet_e2e.kube import Conflict, Forbidden, Kube, core
from tercet_e2e.objects import account_kubeconfig, bindings
from tercet_e2e.state import StateFolder

pytestmark = pytest.mark.local

HOLDER = """
import asyncio, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
sys.path.insert(0, {tests!r})
from clusterharness import add_driver
from tercet_e2e.cluster import Cluster

async def main():
    async with Cluster(pathlib.Path({root!r}), sidecars={sidecars}) as cluster:
        if {sidecars}:
            await add_driver(cluster, ("n1",))
        print("UP", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
GONE_TIMEOUT_S = 120.0
HOLDERS: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_holder_stays(root):
    """A tool that a failed test left is killed, while its folder tells the reaper what to end."""
    yield
    while HOLDERS:
        with HOLDERS.pop() as holder:
            holder.kill()


def hold(root, *, sidecars=False):
    """A tool in a process of its own that holds a cluster."""
    program = HOLDER.format(root=str(root), tests=str(Path(__file__).parent), sidecars=sidecars)
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    HOLDERS.append(holder)
    heard = []
    for line in holder.stdout:
        heard.append(line)
        if line == "UP\n":
            return holder
    raise AssertionError(f"the tool ended: {''.join(heard)}")


def leftovers(state):
    """Everything of a cluster that is still on the machine."""
    cluster = state.cluster_id()
    assert cluster is not None
    return [*marked_processes(cluster), *mounts_below(state.root), *loops_below(state.root)]


def gone(state, timeout_s=GONE_TIMEOUT_S):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if not leftovers(state):
            return True
        time.sleep(0.1)
    return False


async def test_two_clusters_run_side_by_side_and_start_quickly(root):
    started_s = time.monotonic()
    folders = [root / "a", root / "b"]
    async with Cluster(folders[0], sidecars=False) as one:
        print(f"\none control plane: {time.monotonic() - started_s:.1f} s")
        async with Cluster(folders[1], sidecars=False) as two:
            await asyncio.gather(one.add_node("n1"), two.add_node("n1"))
            assert one.nodes["n1"].address != two.nodes["n1"].address
            await one.kube.create(core("namespaces"), namespace("only-one"))
            names = [n["metadata"]["name"] for n in await two.kube.list(core("namespaces"))]
            assert "only-one" not in names
            assert "ok" in await two.kube.text("/readyz")
        # One ends; the other does not notice.
        assert gone(StateFolder(folders[1].resolve()))
        assert len(await one.kube.list(core("nodes"))) == 1
    assert gone(StateFolder(folders[0].resolve()))


def namespace(name):
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


async def test_rights_are_really_asked_for(root):
    async with Cluster(root, sidecars=False) as cluster:
        role = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "tercet:reader"},
            "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}],
        }
        account = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "reader", "namespace": "tercet-system"},
        }
        objects = [namespace("tercet-system"), account, role, *bindings([role])]
        await cluster.applier.apply(objects)
        await cluster.add_node("n1")
        await cluster.add_node("n2")
        path = await account_kubeconfig(cluster.kube, cluster.control_plane, "reader", node="n1")
        async with Kube(path) as reader:
            assert len(await reader.list(core("nodes"))) == 2
            with pytest.raises(Forbidden, match="system:serviceaccount:tercet-system:reader"):
                await reader.list(core("secrets", namespace="tercet-system"))
            review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
            who = await reader.create("/apis/authentication.k8s.io/v1/selfsubjectreviews", review)
            extra = who["status"]["userInfo"]["extra"]
            assert extra["authentication.kubernetes.io/node-name"] == ["n1"]
        async with Kube(cluster.control_plane.node_kubeconfig("n1")) as kubelet:
            with pytest.raises(Forbidden, match="n2"):  # NodeRestriction
                await kubelet.patch(core("nodes", "n2"), {"metadata": {"labels": {"a": "b"}}})
        nobody = root / "nobody.yaml"
        text = path.read_text()
        nobody.write_text(text.replace("token: ", "token: x"))
        async with Kube(nobody) as stranger:
            with pytest.raises(Forbidden, match="401"):
                await stranger.list(core("nodes"))


async def test_the_truth_survives_the_control_plane(root):
    async with Cluster(root, sidecars=False) as cluster:
        await cluster.kube.create(core("namespaces"), namespace("kept"))
        killed = cluster.processes.kill(API_SERVER)
        async with asyncio.timeout(GONE_TIMEOUT_S):
            while cluster.processes.pid(API_SERVER) in (None, killed):
                await asyncio.sleep(0.05)
        await cluster.control_plane.wait_ready(
            cluster.control_plane.addresses.api, "/readyz", API_SERVER
        )
        assert await cluster.kube.get(core("namespaces", "kept"))
    async with Cluster(root, sidecars=False) as again:
        with pytest.raises(Conflict):
            await again.kube.create(core("namespaces"), namespace("kept"))


def test_a_folder_is_held_by_one_tool_and_its_path_is_short(root):
    state = StateFolder.at(root)
    with state.claim():
        assert state.holder() == os.getpid()
        with pytest.raises(StateError, match=f"held by process {os.getpid()}"):
            state.claim()
    assert state.holder() is None
    with pytest.raises(StateError, match="shorter"):
        StateFolder.at(Path("/tmp") / ("x" * 60))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_tool_that_is_ended_leaves_nothing(root, number):
    state = StateFolder.at(root)
    holder = hold(root)
    assert len(leftovers(state)) >= 4
    holder.send_signal(number)
    holder.wait(timeout=GONE_TIMEOUT_S)
    assert gone(state), leftovers(state)


async def test_a_killed_tool_with_a_mounted_volume_leaves_nothing(root):
    state = StateFolder.at(root)
    holder = hold(root, sidecars=True)
    kubectl = Admin(state)
    kubectl.apply(POD_WITH_VOLUME)
    kubectl("wait", "--for=condition=Ready", "pod/p", "--timeout=150s")
    assert mounts_below(state.root)
    assert loops_below(state.root)
    holder.kill()
    holder.wait(timeout=GONE_TIMEOUT_S)
    assert gone(state), leftovers(state)


def test_down_cleans_what_a_crash_of_tool_and_reaper_left(root):
    state = StateFolder.at(root)
    holder = hold(root)
    reapers = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and is_reaper_of(entry, state)
    ]
    assert len(reapers) == 1
    # Something that no signal of the kernel reaches: neither a child of the tool nor marked first.
    scratch = root / "mounted"
    scratch.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "left", scratch], check=True)
    os.kill(reapers[0], signal.SIGKILL)
    holder.kill()
    holder.wait(timeout=GONE_TIMEOUT_S)
    assert mounts_below(state.root)
    command = [sys.executable, "-m", "tercet_e2e", "down", "--state", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not root.exists()
    assert mounts_below(state.root) == []


def is_reaper_of(entry, state):
    try:
        command = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"tercet_e2e.reaper" in command and str(state.root).encode() in command


def test_cleaning_spares_a_reused_pid(root):
    state = StateFolder.at(root)
    state.prepare()
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        record = f'{{"pid": {bystander.pid}, "start_ticks": 1, "role": ""}}'
        (state.processes / "old.json").write_text(record)
        clean(state)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


class Admin(Kubectl):
    """kubectl for a cluster that another process holds."""

    def __init__(self, state):
        from tercet_e2e.binaries import Binaries

        program = Binaries.default().ensure(["kubectl"])["kubectl"]
        self._argv = [str(program), f"--kubeconfig={state.kubeconfig('admin')}"]


POD_WITH_VOLUME = """
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: c}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: images
  resources: {requests: {storage: 64Mi}}
---
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  containers:
  - name: c
    image: none
    command: [sh, -c, "while :; do date >> /data/f; sync; sleep 0.05; done"]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: c}}]
"""
