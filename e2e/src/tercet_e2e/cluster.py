"""A cluster of nodes on this machine: control plane, kubelet stand-ins, CSI sidecars.

Knows nothing of Tercet: any CSI driver can be served, which is how its own tests look at it alone.
`local` puts Tercet in.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from tercet_e2e.binaries import Binaries
from tercet_e2e.cleanup import clean
from tercet_e2e.controlplane import TOOLS, ControlPlane
from tercet_e2e.errors import ProcessError
from tercet_e2e.kube import Kube, NotFound, core, group
from tercet_e2e.objects import Applier, account_kubeconfig, bindings, packaged, snapshot_crds
from tercet_e2e.ports import Ports
from tercet_e2e.processes import Processes, ProcessName, Program
from tercet_e2e.state import StateFolder

SIDECARS = (
    "csi-provisioner",
    "csi-attacher",
    "csi-resizer",
    "csi-snapshotter",
    "snapshot-controller",
)
NODE_TIMEOUT_S = 240.0
NODE_PAUSE_S = 0.05
KUBELET_PORT = 10250

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster."""

    name: str
    address: str
    folder: Path
    labels: Mapping[str, str]

    @property
    def driver_socket(self) -> Path:
        """Where the node's CSI service listens."""
        return self.folder / "csi.sock"

    @property
    def kubelet(self) -> ProcessName:
        """The process that stands in for this node's kubelet."""
        return ProcessName(f"kubelet-{self.name}")


class Cluster:
    """A running cluster below a state folder. An async context manager: leaving it ends all."""

    def __init__(
        self,
        root: Path,
        *,
        binaries: Binaries | None = None,
        progress: Progress = print,
        remove: bool = False,
        sidecars: bool = True,
    ) -> None:
        self.state = StateFolder.at(root)
        self.nodes: dict[str, Node] = {}
        self._binaries = binaries or Binaries.default(progress)
        self._progress = progress
        self._remove = remove
        self._with_sidecars = sidecars
        self._stack = contextlib.AsyncExitStack()
        self._claim: IO[str] | None = None

    async def __aenter__(self) -> Self:
        names = [*TOOLS, *(SIDECARS if self._with_sidecars else ())]
        self.tools = await asyncio.to_thread(self._binaries.ensure, names)
        self._claim = self.state.claim()
        started_s = time.monotonic()
        try:
            await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        self._progress(f"control plane ready in {time.monotonic() - started_s:.1f} s")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        if self._remove:
            await asyncio.to_thread(shutil.rmtree, self.state.root, ignore_errors=True)
        if self._claim is not None:
            self._claim.close()

    async def _start(self) -> None:
        cluster = self.state.prepare()
        # What a killed run left here goes first: the reaper may have been killed, too.
        await asyncio.to_thread(clean, self.state)
        self.ports = self._stack.enter_context(Ports())
        processes = Processes(self.state, cluster, remove=self._remove)
        self.processes = await self._stack.enter_async_context(processes)
        self.control_plane = ControlPlane(self.state, self.processes, self.tools, self.ports)
        await self.control_plane.start()
        self.kube = await self._stack.enter_async_context(Kube(self.control_plane.admin))
        self.applier = Applier.on(self.kube)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.control_plane.admin

    async def add_node(self, name: str, zone: str = "", drivers: bool = True) -> Node:
        """Starts a node; returns when it is registered."""
        labels = {"topology.kubernetes.io/zone": zone} if zone else {}
        node = Node(name, self.ports.take_address(), self.state.node(name), labels)
        node.folder.mkdir(parents=True, exist_ok=True)
        certificates = self.control_plane.certificates.cluster
        serving = certificates.issue(
            f"kubelet-serving-{name}", f"system:node:{name}", addresses=[node.address]
        )
        argv: list[str | Path] = [sys.executable, "-m", "tercet_e2e.kubelet"]
        argv += ["--node", name, "--address", node.address]
        argv += ["--kubeconfig", self.control_plane.node_kubeconfig(name)]
        argv += ["--root", node.folder / "kubelet", "--log-port", str(KUBELET_PORT)]
        argv += ["--cert", serving.cert, "--key", serving.key]
        argv += ["--authority", certificates.files.cert]
        for key, value in labels.items():
            argv += ["--label", f"{key}={value}"]
        if drivers:
            argv += ["--driver", node.driver_socket]
        await self.processes.start(Program(node.kubelet, argv, role="kubelet"))
        self.nodes[name] = node
        await self._wait_node(node)
        return node

    async def _wait_node(self, node: Node) -> None:
        deadline_s = time.monotonic() + NODE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(NotFound):
                found = await self.kube.get(core("nodes", node.name))
                conditions = found.get("status", {}).get("conditions", [])
                if any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
                    return
            await asyncio.sleep(NODE_PAUSE_S)
        raise ProcessError(
            f"node {node.name} is not Ready after {NODE_TIMEOUT_S:.0f} s; the end of "
            f"{self.processes.log_path(node.kubelet)}:\n{self.processes.log_tail(node.kubelet)}"
        )

    async def wait_driver(self, node: str, driver: str) -> None:
        """Waits until a driver is registered on a node."""
        deadline_s = time.monotonic() + NODE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(NotFound):
                found = await self.kube.get(group("storage.k8s.io/v1", "csinodes", node))
                if any(entry["name"] == driver for entry in found["spec"].get("drivers") or []):
                    return
            await asyncio.sleep(NODE_PAUSE_S)
        kubelet = self.nodes[node].kubelet
        raise ProcessError(
            f"driver {driver} is not registered on {node} after {NODE_TIMEOUT_S:.0f} s; the end of "
            f"{self.processes.log_path(kubelet)}:\n{self.processes.log_tail(kubelet)}"
        )

    async def add_sidecars(self, driver_socket: Path) -> None:
        """Starts the upstream sidecars beside a driver's controller service."""
        assert self._with_sidecars, "this cluster was made without sidecars"
        manifests = packaged("sidecars.yaml")
        crds = await asyncio.to_thread(snapshot_crds)
        await self.applier.apply([*crds, *manifests, *bindings(manifests)])
        for name in SIDECARS:
            kubeconfig = await account_kubeconfig(self.kube, self.control_plane, name)
            argv: list[str | Path] = [
                self.tools[name],
                f"--kubeconfig={kubeconfig}",
                *sidecar_flags(name),
            ]
            if name != "snapshot-controller":
                argv.append(f"--csi-address={driver_socket}")
            await self.processes.start(Program(ProcessName(name), argv))


def sidecar_flags(name: str) -> Sequence[str]:
    """What a sidecar is told besides where things are: one instance each, quick retries."""
    common = ["--leader-election=false", "--kube-api-qps=100", "--kube-api-burst=200"]
    retries = ["--retry-interval-start=250ms", "--retry-interval-max=5s"]
    by_name = {
        "csi-provisioner": ["--timeout=60s", "--extra-create-metadata", "--default-fstype=ext4"],
        "csi-attacher": ["--timeout=60s"],
        "csi-resizer": ["--timeout=60s", "--handle-volume-inuse-error=false"],
        "csi-snapshotter": ["--timeout=60s", "--extra-create-metadata"],
        "snapshot-controller": [],
    }
    return [*common, *retries, *by_name[name]]
