"""What a volume can do, with the real kubelet: grow in use, be a device, be copied."""

from __future__ import annotations

import shutil
import time

import pytest
from kindharness import (
    DATABASE,
    SNAPSHOT_CLASS,
    STEP_TIMEOUT_S,
    STORAGE_CLASS,
    Database,
    Installed,
    claim,
    run_once,
    run_pod,
    tell,
    until,
)

pytestmark = [pytest.mark.kind, pytest.mark.asyncio(loop_scope="session")]
# A mounted ext4 grows only with a capability that containers of some machines lack; XFS needs none.
GROWING_CLASS = f"{STORAGE_CLASS}-xfs"
BLOCK_DEVICE = "/dev/tercet"
FREE = "import os; s = os.statvfs('/data'); print(s.f_blocks * s.f_frsize)"
WRITE = (
    "import hashlib, json, os; d = os.open('{device}', os.O_RDWR | os.O_SYNC); "
    "b = os.urandom(1 << 20); os.pwrite(d, b, 3 << 20); "
    "print(json.dumps({{'digest': hashlib.sha256(b).hexdigest()}}))"
)
READ = (
    "import hashlib, json, os; d = os.open('{device}', os.O_RDONLY); "
    "b = os.pread(d, 1 << 20, 3 << 20); "
    "print(json.dumps({{'digest': hashlib.sha256(b).hexdigest()}}))"
)


@pytest.mark.kubelet  # its pod is asked by `kubectl exec`
async def test_grows_in_use(installed: Installed):
    """A claim is made larger while the database commits on it."""
    site = installed.site
    made = await site.kubectl.get("storageclass", STORAGE_CLASS)
    fields = ("allowVolumeExpansion", "apiVersion", "kind", "provisioner", "volumeBindingMode")
    parameters = made["parameters"] | {"csi.storage.k8s.io/fstype": "xfs"}
    wanted = {name: made[name] for name in fields} | {"parameters": parameters}
    await site.kubectl.apply(wanted | {"metadata": {"name": GROWING_CLASS}})
    database = Database(site, "grows", "400Mi", storage_class=GROWING_CLASS)
    await database.start()
    before = int(await site.kubectl.run("exec", database.pod, "--", "python3", "-c", FREE))
    patch = '{"spec": {"resources": {"requests": {"storage": "800Mi"}}}}'
    started_ns, started_s = time.monotonic_ns(), time.monotonic()
    await site.kubectl.run("patch", "pvc", database.claim, "-p", patch)

    async def grown() -> bool:
        now = int(await site.kubectl.run("exec", database.pod, "--", "python3", "-c", FREE))
        return now > before + (350 << 20)

    await until(grown, STEP_TIMEOUT_S, "the file system has grown")
    tell(f"400 -> 800 MiB in the pod after {time.monotonic() - started_s:.1f} s")
    await database.commits(20)
    tell(f"longest stall meanwhile {database.stall_s(started_ns):.2f} s")
    assert await database.restarts() == 0
    await database.verify()
    await database.remove()
    await site.kubectl.delete("storageclass", GROWING_CLASS)


async def test_snapshot_restore_and_clone(installed: Installed):
    """A snapshot under load is restored, the claim is cloned: both have every earlier commit."""
    site = installed.site
    database = Database(site, "copied")
    await database.start()
    await database.commits(50)
    shutil.copy(database.acks_file, site.shared / "before.log")
    snapshot = {
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshot",
        "metadata": {"name": "copied"},
        "spec": {
            "volumeSnapshotClassName": SNAPSHOT_CLASS,
            "source": {"persistentVolumeClaimName": database.claim},
        },
    }
    started_s = time.monotonic()
    await site.kubectl.apply(snapshot)
    await site.kubectl.until(
        "volumesnapshot",
        "copied",
        lambda o: bool(o.get("status", {}).get("readyToUse")),
        STEP_TIMEOUT_S,
        "readyToUse",
    )
    tell(f"snapshot ready to use after {time.monotonic() - started_s:.1f} s")
    group = "snapshot.storage.k8s.io"
    sources = {
        "restored": {"apiGroup": group, "kind": "VolumeSnapshot", "name": "copied"},
        "cloned": {"kind": "PersistentVolumeClaim", "name": database.claim},
    }
    arguments = ["verify", "--database", DATABASE, "--acks", "/acks/before.log"]
    for name, source in sources.items():
        started_s = time.monotonic()
        await site.kubectl.apply(claim(name, source=source))
        verdict = await run_once(site, f"{name}-check", name, arguments)
        assert not verdict["problems"], (name, verdict["problems"][:3])
        assert verdict["acknowledged"] >= 50
        tell(f"{name}: {verdict['commits']} commits, {time.monotonic() - started_s:.1f} s")
    await database.verify()
    await site.kubectl.delete("pvc", *sources)
    await site.kubectl.delete("volumesnapshot", "copied")
    await database.remove()


async def test_raw_block(installed: Installed):
    """A claim without a file system: what one pod writes to the device, a pod elsewhere reads."""
    site = installed.site
    await site.kubectl.apply(claim("raw", block=True))
    nodes = (await site.workers())[:2]
    digests = []
    for node, code in zip(nodes, (WRITE, READ), strict=True):
        spec = {
            "restartPolicy": "Never",
            "nodeSelector": {"kubernetes.io/hostname": node},
            "containers": [
                {
                    "name": "workload",
                    "image": site.workload_image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": [site.python, "-c", code.format(device=BLOCK_DEVICE)],
                    "volumeDevices": [{"name": "data", "devicePath": BLOCK_DEVICE}],
                }
            ],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "raw"}}],
        }
        started_s = time.monotonic()
        digests.append(await run_pod(site, f"raw-{node[-1]}", spec))
        tell(f"{node}: {time.monotonic() - started_s:.1f} s")
    assert digests[0] == digests[1]
    await site.kubectl.delete("pvc", "raw")
