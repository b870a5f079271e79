"""What the scenarios share: images, the installation, a database under load, its check."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet_e2e import images
from tercet_e2e.kindcluster import KindSite
from tercet_e2e.objects import snapshot_crds
from tercet_e2e.site import Site
from tercet_e2e.workload import Ack, longest_stall_s, read_acks

Json = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[3]
CHART = REPOSITORY / "charts" / "tercet"
RELEASE, NAMESPACE = "tercet", "tercet-system"
STORAGE_CLASS = SNAPSHOT_CLASS = "tercet"
DATABASE = "/data/database.sqlite"
WRITERS = 2
DERIVED = frozenset({"events", "apiservices"})
"""Kinds whose objects tell of others, and come and go after them."""
CLUSTERS_OWN = frozenset({"kube-system", "kube-public", "kube-node-lease", "local-path-storage"})
INSTALL_TIMEOUT_S = 600.0
STEP_TIMEOUT_S = 180.0
PAUSE_S = 0.1
VALUES: Json = {
    "nodeGroups": [
        {
            "name": "default",
            "devices": [
                {
                    "id": "d0",
                    "file": {"path": "/var/lib/tercet/devices/d0", "capacity": "4Gi"},
                }
            ],
        }
    ],
    "snapshotController": {"enabled": True},
    "uninstall": {"crds": True},
}


@dataclass(slots=True)
class Installed:
    """The release on the cluster; where it comes with the cluster there is no more than that."""

    site: Site
    values: Sequence[str] = ()
    """Helm's words for the values."""
    upgrade_tag: str | None = None
    """Another tag under which the images are; None: to upgrade is to say the same again."""
    before: frozenset[str] | None = None
    """Every object that was there before it; None: it was there when we came."""
    install_s: float = 0.0


async def prepare(
    site: Site, workload_image: str | None, values: str | None, upgrade_tag: str | None
) -> Installed:
    """Have images on the nodes and values for the chart.

    Where nodes are ours the images are made here; elsewhere they are where `values` says.
    """
    ours = site.root / "values.json"
    ours.write_text(json.dumps(VALUES))
    words = ["--values", str(ours)]
    if values is not None:
        words += ["--values", values]
    if workload_image is not None:
        site.workload_image = workload_image
    if isinstance(site, KindSite):
        with site.step("images, built or found"):
            names = await images.build(REPOSITORY, site.engine)
            names.append(await images.build_workload(REPOSITORY, site.engine))
            upgrade_tag = f"rebuilt-{time.time():.0f}"
            rebuilt = await images.rebuild(REPOSITORY, site.engine, upgrade_tag)
        with site.step("images onto all nodes"):  # together: they differ in nothing but a label
            await site.load(*names, *rebuilt)
    return Installed(site, words, upgrade_tag)


async def install(wanted: Installed) -> None:
    """Kinds of snapshots, then the chart as a user installs it; at once when it is there."""
    site = wanted.site
    await site.kubectl.apply(*snapshot_crds())
    kept = site.root / "before.json"
    releases = json.loads(await site.helm("list", "-n", NAMESPACE, "-o", "json"))
    if RELEASE not in {release["name"] for release in releases}:
        kept.write_text(json.dumps(sorted(await objects(site))))
    wanted.before = frozenset(json.loads(kept.read_text())) if kept.exists() else None
    started_s = time.monotonic()
    with site.step("helm install --wait, to the last StorageNode Ready"):
        words = ["upgrade", "--install", RELEASE, str(CHART), "--namespace", NAMESPACE]
        words += ["--create-namespace", *wanted.values, "--wait"]
        words += [f"--timeout={INSTALL_TIMEOUT_S:.0f}s"]
        await site.helm(*words, timeout_s=INSTALL_TIMEOUT_S + 10)
        await wait_storage_nodes(site)
    wanted.install_s = time.monotonic() - started_s


async def objects(site: Site) -> set[str]:
    """`KIND NAMESPACE/NAME` of every object, but for what the cluster's own pieces make."""
    listed = await site.kubectl.run("api-resources", "--verbs=list", "-o", "name")
    kinds = [name for name in listed.split() if name.partition(".")[0] not in DERIVED]
    line = r'{range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name}{"\n"}{end}'
    found = await site.kubectl.run("get", ",".join(kinds), "-A", "-o", f"jsonpath={line}")
    return {
        line
        for line in found.splitlines()
        if line.split()[1].partition("/")[0] not in CLUSTERS_OWN
        and not line.startswith("CertificateSigningRequest /csr-")  # a kubelet's
    }


async def wait_storage_nodes(site: Site, timeout_s: float = STEP_TIMEOUT_S) -> None:
    """Wait until every worker's StorageNode is Ready."""
    wanted = sorted(await site.workers())

    async def ready() -> bool:
        found = await site.kubectl.list("storagenodes")
        return sorted(o["metadata"]["name"] for o in found if is_ready(o)) == wanted

    await until(ready, timeout_s, f"StorageNodes {', '.join(wanted)} are Ready")


def is_ready(item: Json) -> bool:
    """Whether an object has the condition Ready."""
    conditions = item.get("status", {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


async def until(check: Callable[[], Awaitable[bool]], timeout_s: float, what: str) -> float:
    """Wait for a condition; returns how long it took."""
    started_s = time.monotonic()
    while not await check():
        if time.monotonic() - started_s > timeout_s:
            raise AssertionError(f"not after {timeout_s:.0f} s: {what}")
        await asyncio.sleep(PAUSE_S)
    return time.monotonic() - started_s


def claim(
    name: str,
    size: str = "256Mi",
    *,
    block: bool = False,
    source: Json | None = None,
    storage_class: str = STORAGE_CLASS,
) -> Json:
    """A PersistentVolumeClaim."""
    spec: Json = {
        "storageClassName": storage_class,
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": size}},
    }
    if block:
        spec["volumeMode"] = "Block"
    if source is not None:
        spec["dataSource"] = source
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": spec,
    }


def pod_spec(site: Site, claim_name: str, arguments: Sequence[str]) -> Json:
    """A pod's spec: the database on a claim; the shared folder is for what outlives it."""
    return {
        "terminationGracePeriodSeconds": 20,
        "containers": [
            {
                "name": "workload",
                "image": site.workload_image,
                "imagePullPolicy": "IfNotPresent",
                "command": [*site.workload, *arguments],
                "volumeMounts": [
                    {"name": "data", "mountPath": "/data"},
                    {"name": "acks", "mountPath": "/acks"},
                ],
            }
        ],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": claim_name}},
            {"name": "acks", "hostPath": {"path": str(site.shared_on_nodes)}},
        ],
    }


@dataclass(slots=True)
class Database:
    """A StatefulSet of one pod whose writers commit without pause, and what was acknowledged."""

    site: Site
    name: str
    size: str = "256Mi"
    storage_class: str = STORAGE_CLASS

    @property
    def pod(self) -> str:
        """The name of its pod."""
        return f"{self.name}-0"

    @property
    def claim(self) -> str:
        """The name of its claim."""
        return f"data-{self.name}-0"

    @property
    def acks_file(self) -> Path:
        """The log of acknowledged commits, on this machine."""
        return self.site.shared / f"{self.name}.log"

    def acks(self) -> list[Ack]:
        """What SQLite has acknowledged so far."""
        return read_acks(self.acks_file)

    def manifest(self) -> Json:
        """The StatefulSet."""
        arguments = ["write", "--database", DATABASE, "--acks", f"/acks/{self.name}.log"]
        spec = pod_spec(self.site, "unused", [*arguments, "--writers", str(WRITERS)])
        spec["volumes"] = [v for v in spec["volumes"] if v["name"] != "data"]
        template = claim("data", self.size, storage_class=self.storage_class)
        return {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": self.name},
            "spec": {
                "replicas": 1,
                "serviceName": self.name,
                "selector": {"matchLabels": {"app": self.name}},
                "template": {"metadata": {"labels": {"app": self.name}}, "spec": spec},
                "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": template["spec"]}],
            },
        }

    async def start(self) -> None:
        """Create it; returns when it commits."""
        self.acks_file.unlink(missing_ok=True)
        await self.site.kubectl.apply(self.manifest())
        await self.commits(10)

    async def commits(self, more: int, timeout_s: float = STEP_TIMEOUT_S) -> float:
        """Wait for so many further commits; returns how long it took."""
        wanted = len(self.acks()) + more

        async def enough() -> bool:
            return len(self.acks()) >= wanted

        return await until(enough, timeout_s, f"{more} further commits of {self.name}")

    async def where(self) -> str:
        """The node of its pod."""
        return str((await self.site.kubectl.get("pod", self.pod))["spec"]["nodeName"])

    async def volume(self) -> str:
        """The name of its Volume."""
        return str((await self.site.kubectl.get("pvc", self.claim))["spec"]["volumeName"])

    async def config(self) -> Json:
        """The configuration of its volume."""
        found: Json = (await self.site.kubectl.get("tvol", await self.volume()))["status"]["config"]
        return found

    async def in_sync(self, timeout_s: float = STEP_TIMEOUT_S) -> None:
        """Wait until every replica is in sync."""
        name = await self.volume()

        async def synced() -> bool:
            replicas = (await self.site.kubectl.get("tvol", name))["status"].get("replicas", [])
            return bool(replicas) and all(r["state"] == "InSync" for r in replicas)

        await until(synced, timeout_s, f"all replicas of {name} are in sync")

    async def replicas(self) -> str:
        """The states of its volume's replicas, in words."""
        found = (await self.site.kubectl.get("tvol", await self.volume()))["status"]["replicas"]
        return ", ".join(f"{each['node']} {each['state']}" for each in found)

    def stall_s(self, from_ns: int) -> float:
        """The longest time without a commit since a moment."""
        return longest_stall_s(self.acks(), from_ns, time.monotonic_ns())

    async def restarts(self) -> int:
        """How often its container was started again: an I/O error ends it."""
        pod = await self.site.kubectl.get("pod", self.pod)
        return sum(c["restartCount"] for c in pod["status"].get("containerStatuses", []))

    async def verify(self) -> Json:
        """End the writers; every acknowledged commit must be there. Returns the verdict."""
        kubectl = self.site.kubectl
        await kubectl.delete("statefulset", self.name)
        await kubectl.run("wait", "pod", self.pod, "--for=delete", "--timeout=120s")
        arguments = ["verify", "--database", DATABASE, "--acks", f"/acks/{self.name}.log"]
        verdict = await run_once(self.site, f"{self.name}-check", self.claim, arguments)
        assert not verdict["problems"], verdict["problems"][:3]
        assert verdict["acknowledged"] == len(self.acks()) > 0
        return verdict

    async def remove(self) -> None:
        """Delete all of it."""
        kubectl = self.site.kubectl
        await kubectl.run(
            "delete", "statefulset", self.name, "--ignore-not-found", "--timeout=120s"
        )
        await kubectl.run("delete", "pvc", self.claim, "--ignore-not-found", "--timeout=120s")


@contextlib.asynccontextmanager
async def running_database(site: Site, test: str) -> AsyncIterator[Database]:
    """A database of a test's name that commits, all of whose replicas are in sync."""
    found = Database(site, test.removeprefix("test_").replace("_", "-")[:40].strip("-"))
    await found.start()
    await found.in_sync()
    yield found
    await found.remove()


async def run_once(site: Site, name: str, claim_name: str, arguments: list[str]) -> Json:
    """Run a pod of the database's image to its end; returns the JSON of its last line."""
    spec = pod_spec(site, claim_name, arguments) | {"restartPolicy": "Never"}
    return await run_pod(site, name, spec)


async def run_pod(site: Site, name: str, spec: Json) -> Json:
    """Run a pod to its end; returns the JSON of its last line."""
    await site.kubectl.apply(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
    )

    def ended(found: Json) -> bool:
        return found["status"].get("phase") in {"Succeeded", "Failed"}

    await site.kubectl.until("pod", name, ended, STEP_TIMEOUT_S, "has ended")
    log = await site.kubectl.run("logs", name)
    await site.kubectl.delete("pod", name)
    verdict: Json = json.loads(log.splitlines()[-1])
    return verdict


def tell(text: str) -> None:
    """A line of the story."""
    print(f"  {text}", flush=True)
