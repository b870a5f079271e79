"""The stand-in with the real scheduler, attach-detach controller and sidecars."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time

import pytest

from tercet_e2e import faults
from tercet_e2e.cleanup import loops_below, mounts_below

pytestmark = [pytest.mark.local, pytest.mark.asyncio(loop_scope="session")]

WAIT_S = 150.0
PATIENCE = f"--timeout={WAIT_S:.0f}s"
"""For what kubectl waits for: a busy machine takes many times what an idle one does."""


async def eventually(what, check, timeout_s=WAIT_S):
    """Waits until a check gives something true; gives that."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if found := await asyncio.to_thread(check):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"not in {timeout_s:.0f} s: {what}")


def pod(name, script, *, claim="", node="", policy="Never"):
    mount = "volumeMounts: [{name: data, mountPath: /data}]" if claim else ""
    volumes = f"volumes: [{{name: data, persistentVolumeClaim: {{claimName: {claim}}}}}]"
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: {policy}
  terminationGracePeriodSeconds: 2
  {f"nodeSelector: {{kubernetes.io/hostname: {node}}}" if node else ""}
  containers:
  - name: c
    image: none
    command: [sh, -c, {json.dumps(script)}]
    {mount}
  {volumes if claim else ""}
"""


def claim(name, size="64Mi", extra=""):
    return f"""
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {name}}}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: images
  resources: {{requests: {{storage: {size}}}}}
  {extra}
"""


def as_device(manifest):
    return manifest.replace(
        "volumeMounts: [{name: data, mountPath: /data}]",
        "volumeDevices: [{name: data, devicePath: /dev/vol}]",
    )


def phase(kubectl, name):
    return kubectl("get", "pod", name, "-o", "jsonpath={.status.phase}")


def clear(kubectl, *what):
    kubectl("delete", *what, PATIENCE, "--ignore-not-found")


async def detached(kubectl):
    """Nothing of a volume is left."""
    await eventually(
        "volumes and attachments gone",
        lambda: not kubectl("get", "pv,volumeattachments", "-o", "name"),
    )


async def test_a_pod_runs_a_command_and_its_exit_is_reported(kubectl):
    kubectl.apply(pod("exits", "echo from $(hostname); exit 3"))
    await eventually("pod failed", lambda: phase(kubectl, "exits") == "Failed")
    status = json.loads(kubectl("get", "pod", "exits", "-o", "json"))["status"]
    ended = status["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (3, "Error")
    assert kubectl("logs", "exits").startswith("from ")
    clear(kubectl, "pod/exits")


async def test_a_container_that_fails_is_started_again(kubectl):
    script = "echo run; sleep 0.2; exit 1"
    kubectl.apply(pod("again", script, policy="Always"))

    def restarts():
        path = "jsonpath={.status.containerStatuses[0].restartCount}"
        return int(kubectl("get", "pod", "again", "-o", path) or 0) >= 2

    await eventually("two restarts", restarts)
    # It is told as running before it has said its word.
    await eventually("three runs", lambda: kubectl("logs", "again").count("run") >= 3)
    clear(kubectl, "pod/again")


async def test_a_container_sees_its_own_root_and_leaves_nothing_on_the_machine(kubectl, tmp_path):
    witness = tmp_path / "witness"
    script = f"touch {witness}; mkdir /only-here; touch /dev/only-here; ls /only-here && sleep 600"
    kubectl.apply(pod("own", script))
    await eventually("pod running", lambda: phase(kubectl, "own") == "Running")
    clear(kubectl, "pod/own")
    for path in (witness, witness.root + "only-here", "/dev/only-here"):
        assert not subprocess.run(["ls", path], capture_output=True, check=False).stdout


async def test_what_cannot_run_here_says_so(kubectl):
    manifest = pod("imaged", "true").replace("    command:", "    args:")
    kubectl.apply(manifest)
    await eventually("pod failed", lambda: phase(kubectl, "imaged") == "Failed")
    assert "has no command" in kubectl("get", "pod", "imaged", "-o", "jsonpath={.status.message}")
    clear(kubectl, "pod/imaged")


async def test_a_program_that_is_not_there_is_a_start_error(kubectl):
    kubectl.apply(pod("absent", "x").replace("[sh, -c", "[/no/such/program, -c"))
    await eventually("pod failed", lambda: phase(kubectl, "absent") == "Failed")
    path = "jsonpath={.status.containerStatuses[0].state.terminated}"
    ended = json.loads(kubectl("get", "pod", "absent", "-o", path))
    assert ended["exitCode"] == 128
    assert "cannot start '/no/such/program'" in ended["message"]
    clear(kubectl, "pod/absent")


async def test_a_volume_follows_its_pod_from_node_to_node(cluster, kubectl):
    started_s = time.monotonic()
    kubectl.apply(claim("moves"))
    hold = "; sleep 600"
    kubectl.apply(pod("first", "echo kept > /data/f; sync; echo ok" + hold, claim="moves"))
    kubectl("wait", "--for=condition=Ready", "pod/first", PATIENCE)
    print(f"\nclaim to running pod: {time.monotonic() - started_s:.1f} s")
    here = kubectl("get", "pod", "first", "-o", "jsonpath={.spec.nodeName}")
    other = {"n1": "n2", "n2": "n1"}[here]
    in_use = kubectl("get", "node", here, "-o", "jsonpath={.status.volumesInUse}")
    assert "kubernetes.io/csi/images.example.test^" in in_use
    await eventually("written", lambda: "ok" in kubectl("logs", "first"))
    # The image driver refuses to detach below a mounted volume: the order is checked there.
    clear(kubectl, "pod/first")
    await eventually("not attached", lambda: not kubectl("get", "volumeattachments", "-o", "name"))
    kubectl.apply(pod("second", "cat /data/f; df /data", claim="moves", node=other))
    await eventually("pod succeeded", lambda: phase(kubectl, "second") == "Succeeded")
    assert kubectl("logs", "second").startswith("kept")
    clear(kubectl, "pod/second", "pvc/moves")
    await detached(kubectl)
    assert mounts_below(cluster.state.root) == []
    assert loops_below(cluster.state.root) == []


async def test_a_block_volume_is_a_device_of_the_container(kubectl):
    kubectl.apply(claim("raw", extra="volumeMode: Block"))
    script = "printf raw > /dev/vol && head -c 3 /dev/vol && blockdev --getsize64 /dev/vol"
    kubectl.apply(as_device(pod("block", script, claim="raw")))
    await eventually("pod succeeded", lambda: phase(kubectl, "block") == "Succeeded")
    assert kubectl("logs", "block").strip() == f"raw{64 << 20}"
    clear(kubectl, "pod/block", "pvc/raw")
    await detached(kubectl)


async def test_a_volume_grows_below_a_running_pod(kubectl):
    # A block volume: growing a mounted ext4 takes CAP_SYS_RESOURCE, which not every machine gives.
    kubectl.apply(claim("grows", extra="volumeMode: Block"))
    script = "while :; do blockdev --getsize64 /dev/vol; sleep 0.2; done"
    kubectl.apply(as_device(pod("grower", script, claim="grows")))
    kubectl("wait", "--for=condition=Ready", "pod/grower", PATIENCE)
    await eventually("the first size is told", lambda: kubectl("logs", "grower"))
    patch = '{"spec":{"resources":{"requests":{"storage":"256Mi"}}}}'
    kubectl("patch", "pvc", "grows", "-p", patch)

    def capacity():
        return kubectl("get", "pvc", "grows", "-o", "jsonpath={.status.capacity.storage}")

    await eventually("claim says 256Mi", lambda: capacity() == "256Mi")
    await eventually(
        "container sees it", lambda: str(256 << 20) in kubectl("logs", "--tail=1", "grower")
    )
    assert kubectl("logs", "grower").split()[0] == str(64 << 20)
    assert kubectl("get", "pvc", "grows", "-o", "jsonpath={.status.conditions}") in ("", "[]")
    clear(kubectl, "pod/grower", "pvc/grows")
    await detached(kubectl)


async def test_a_snapshot_becomes_a_volume(kubectl):
    kubectl.apply(claim("source"))
    script = "echo before > /data/f; sync; echo written; sleep 600"
    kubectl.apply(pod("writer", script, claim="source"))
    kubectl("wait", "--for=condition=Ready", "pod/writer", PATIENCE)
    await eventually("written", lambda: "written" in kubectl("logs", "writer"))
    kubectl.apply("""
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: snap}
spec: {volumeSnapshotClassName: images, source: {persistentVolumeClaimName: source}}
""")
    kubectl("wait", "--for=jsonpath={.status.readyToUse}=true", "volumesnapshot/snap", PATIENCE)
    source = "{name: snap, kind: VolumeSnapshot, apiGroup: snapshot.storage.k8s.io}"
    kubectl.apply(claim("restored", extra=f"dataSource: {source}"))
    kubectl.apply(pod("reader", "cat /data/f", claim="restored"))
    await eventually("pod succeeded", lambda: phase(kubectl, "reader") == "Succeeded")
    assert kubectl("logs", "reader") == "before\n"
    clear(kubectl, "pod/writer", "pod/reader", "volumesnapshot/snap", "pvc/source", "pvc/restored")
    await detached(kubectl)


async def test_a_killed_kubelet_finds_its_pods_again(cluster, kubectl):
    kubectl.apply(claim("stays"))
    script = "i=0; while :; do i=$((i+1)); echo $i; echo $i > /data/i; sleep 0.05; done"
    kubectl.apply(pod("lives", script, claim="stays"))
    kubectl("wait", "--for=condition=Ready", "pod/lives", PATIENCE)
    node = kubectl("get", "pod", "lives", "-o", "jsonpath={.spec.nodeName}")
    before = faults.kill(cluster.state, "kubelet", node)
    again = lambda: faults.pid(cluster.state, "kubelet", node) not in (None, before)  # noqa: E731
    await eventually("kubelet again", again)
    await eventually("logs served again", lambda: _logs_or_nothing(kubectl, "lives"))
    lines = [int(line) for line in kubectl("logs", "lives").split()]
    assert lines == list(range(1, len(lines) + 1)), "the container did not go on undisturbed"
    assert kubectl("get", "pod", "lives", "-o", RESTARTS) == "0"
    # It can still end and clean what its predecessor set up.
    clear(kubectl, "pod/lives", "pvc/stays")
    await detached(kubectl)
    assert mounts_below(cluster.state.node(node)) == []


RESTARTS = "jsonpath={.status.containerStatuses[0].restartCount}"


def _logs_or_nothing(kubectl, name):
    try:
        return kubectl("logs", name)
    except AssertionError:
        return ""


async def test_a_pod_removed_by_force_is_killed_and_its_volume_released(cluster, kubectl):
    kubectl.apply(claim("forced"))
    kubectl.apply(pod("gone", "trap '' TERM; while :; do sleep 0.1; done", claim="forced"))
    kubectl("wait", "--for=condition=Ready", "pod/gone", PATIENCE)
    kubectl("delete", "pod", "gone", "--force", "--grace-period=0")
    clear(kubectl, "pvc/forced")
    await detached(kubectl)
    assert mounts_below(cluster.state.root) == []


async def test_a_container_that_ignores_sigterm_is_killed_after_its_grace(kubectl):
    kubectl.apply(pod("deaf", "trap '' TERM; echo deaf; while :; do sleep 0.1; done"))
    await eventually("it is deaf", lambda: "deaf" in _logs_or_nothing(kubectl, "deaf"))
    started_s = time.monotonic()
    clear(kubectl, "pod/deaf")
    # Its own grace of 2 s and not the usual one of 30 s.
    assert 1.5 <= time.monotonic() - started_s < 25
