"""The node as the control plane sees it: Node, its Lease, CSINode, the attached volumes."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import platform
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import structlog

from tercet_e2e.kube import Conflict, Kube, KubeError, NotFound, core, group
from tercet_e2e.kubelet.csi import NodeInfo
from tercet_e2e.kubelet.status import timestamp

Json = dict[str, Any]

LEASE_DURATION_S = 40
LEASE_RENEW_S = 10.0
LEASE_RETRY_S = 1.0
STATUS_PERIOD_S = 60.0
PODS_MAX = 110
LEASE_NAMESPACE = "kube-node-lease"
VERSION = "v1.34.4"

log = structlog.get_logger(__name__)


def node_object(name: str, labels: Mapping[str, str]) -> Json:
    """The Node to create."""
    own = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
    }
    metadata = {
        "name": name,
        "labels": own | dict(labels),
        # Without it the attach-detach controller leaves attaching to the node itself.
        "annotations": {"volumes.kubernetes.io/controller-managed-attach-detach": "true"},
    }
    return {"apiVersion": "v1", "kind": "Node", "metadata": metadata}


def node_status(name: str, address: str, log_port: int, now_s: float) -> Json:
    """The status of a healthy node."""
    stamp = timestamp(now_s)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    resources = {
        "cpu": str(os.cpu_count() or 1),
        "memory": str(pages),
        "ephemeral-storage": "10Gi",
        "pods": str(PODS_MAX),
    }
    healthy = [("MemoryPressure", "False"), ("DiskPressure", "False"), ("PIDPressure", "False")]
    conditions = [
        {
            "type": kind,
            "status": value,
            "lastHeartbeatTime": stamp,
            "reason": "KubeletReady" if kind == "Ready" else "KubeletHasSufficientResources",
            "message": "the kubelet stand-in is ready" if kind == "Ready" else "",
        }
        for kind, value in [*healthy, ("Ready", "True")]
    ]
    system = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    return {
        "addresses": [
            {"type": "InternalIP", "address": address},
            {"type": "Hostname", "address": name},
        ],
        "capacity": resources,
        "allocatable": resources,
        "conditions": conditions,
        "daemonEndpoints": {"kubeletEndpoint": {"Port": log_port}},
        "nodeInfo": {
            "machineID": name,
            "systemUUID": name,
            "bootID": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "kernelVersion": platform.release(),
            "osImage": system.get("PRETTY_NAME", "Linux"),
            "containerRuntimeVersion": "process://1",
            "kubeletVersion": VERSION,
            "kubeProxyVersion": "",
            "operatingSystem": "linux",
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        },
    }


class NodeObjects:
    """Keeps the objects that stand for this node up to date."""

    def __init__(self, kube: Kube, name: str, address: str, log_port: int) -> None:
        self._kube = kube
        self._name = name
        self._address = address
        self._log_port = log_port
        self._uid = ""

    async def register(self, labels: Mapping[str, str]) -> Json:
        """Creates the Node, or finds it, and says that it is ready."""
        body = node_object(self._name, labels)
        try:
            node = await self._kube.create(core("nodes"), body)
        except Conflict:
            patch = {"metadata": {key: body["metadata"][key] for key in ("labels", "annotations")}}
            node = await self._kube.patch(core("nodes", self._name), patch)
        self._uid = node["metadata"]["uid"]
        await self.heartbeat()
        return node

    async def heartbeat(self) -> None:
        """Writes the Node's status."""
        now_s = dt.datetime.now(dt.UTC).timestamp()
        status = node_status(self._name, self._address, self._log_port, now_s)
        path = core("nodes", self._name, sub="status")
        await self._kube.patch(path, {"status": status}, "strategic")

    async def report_in_use(self, unique_names: Iterable[str]) -> None:
        """Writes `volumesInUse`."""
        path = core("nodes", self._name, sub="status")
        await self._kube.patch(path, {"status": {"volumesInUse": sorted(unique_names)}})

    async def label(self, labels: Mapping[str, str]) -> None:
        """Adds labels to the Node."""
        await self._kube.patch(core("nodes", self._name), {"metadata": {"labels": dict(labels)}})

    async def register_driver(self, info: NodeInfo) -> None:
        """Puts a driver into CSINode and its topology onto the Node, as the kubelet does."""
        await self.label(info.topology)
        driver: Json = {
            "name": info.driver,
            "nodeID": info.node_id,
            "topologyKeys": sorted(info.topology),
        }
        if info.volumes_max > 0:
            driver["allocatable"] = {"count": info.volumes_max}
        path = group("storage.k8s.io/v1", "csinodes", self._name)
        try:
            found = await self._kube.get(path)
        except NotFound:
            body = {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "CSINode",
                "metadata": {"name": self._name, "ownerReferences": [self._owner()]},
                "spec": {"drivers": [driver]},
            }
            await self._kube.create(group("storage.k8s.io/v1", "csinodes"), body)
            return
        others = [d for d in found["spec"].get("drivers") or [] if d["name"] != info.driver]
        if driver not in found["spec"].get("drivers", []):
            found["spec"]["drivers"] = [*others, driver]
            await self._kube.replace(path, found)

    def _owner(self) -> Json:
        return {"apiVersion": "v1", "kind": "Node", "name": self._name, "uid": self._uid}

    async def keep_status(self) -> None:
        """Refreshes the Node's status now and then; the Lease says that the node lives."""
        while True:
            await asyncio.sleep(STATUS_PERIOD_S * random.uniform(0.9, 1.1))
            try:
                await self.heartbeat()
            except KubeError as error:
                log.warning("node status not written", node=self._name, error=str(error))

    async def keep_lease(self) -> None:
        """Renews the node's Lease for as long as this runs."""
        while True:
            pause_s = LEASE_RENEW_S
            try:
                await self._renew()
            except KubeError as error:
                log.warning("lease not renewed", node=self._name, error=str(error))
                pause_s = LEASE_RETRY_S
            await asyncio.sleep(pause_s)

    async def _renew(self) -> None:
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {
            "holderIdentity": self._name,
            "leaseDurationSeconds": LEASE_DURATION_S,
            "renewTime": now,
        }
        leases = "coordination.k8s.io/v1"
        path = group(leases, "leases", self._name, namespace=LEASE_NAMESPACE)
        try:
            await self._kube.patch(path, {"spec": spec})
        except NotFound:
            body = {
                "apiVersion": leases,
                "kind": "Lease",
                "metadata": {
                    "name": self._name,
                    "namespace": LEASE_NAMESPACE,
                    "ownerReferences": [self._owner()],
                },
                "spec": spec,
            }
            await self._kube.create(group(leases, "leases", namespace=LEASE_NAMESPACE), body)
