"""Provider `local`: a cluster on this machine with Tercet in it.

Each piece runs with the command line of docs/processes.md, as a process of its own, with a service
account of its own; the pieces of a node have a token that is bound to their Node. Nodes differ by a
loopback address, so all of them use the usual ports. Devices are files.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import tercet_api
from tercet_api.names import API_VERSION, CSI_DRIVER, NAMESPACE, STORAGENODES
from tercet_e2e import faults
from tercet_e2e.binaries import Binaries
from tercet_e2e.cluster import Cluster, Node, Progress
from tercet_e2e.controlplane import LOCALHOST
from tercet_e2e.errors import BinaryError, ProcessError
from tercet_e2e.faults import process_name
from tercet_e2e.kube import Json, group
from tercet_e2e.objects import account_kubeconfig, documents, packaged, snapshot_crds
from tercet_e2e.processes import ProcessName, Program
from tercet_e2e.state import StateFolder, write_atomically

NODES = 3
DEVICE_BYTES = 4 << 30
READY_TIMEOUT_S = 300.0
READY_PAUSE_S = 0.1
AGENT_PORT, AGENT_HTTP, CSI_NODE_HTTP, ATTACH_HTTP = 4423, 9808, 9809, 9810
STATUS_FILE = "status.json"
PIECES = (faults.SUPERVISOR, "agent", "attach", "csi-node")
"""Of a node; the first has the engine."""
ENGINE_PIECES = PIECES[:2]
"""Those that serve volumes."""


class Wiring(Protocol):
    """A network that parts nodes from each other (`linear.network`)."""

    def address(self, name: str) -> str:
        """Of a node."""

    def enter(self, name: str) -> list[str]:
        """The start of a command line whose process lives on that node."""

    async def relay(self, port: int) -> None:
        """Let 127.0.0.1:port of every node lead to that of this machine."""


@dataclass(frozen=True, slots=True)
class Programs:
    """Where Tercet's own programs are: beside this Python, else on PATH."""

    operator: Path
    csi: Path
    agent: Path
    engine: Path
    attach: Path

    @classmethod
    def find(cls) -> Programs:
        """Raises BinaryError with the names of all that are missing."""
        names = ("tercet-operator", "tercet-csi", "tercet-agent", "tercet-engine", "tercet-attach")
        beside = Path(sys.executable).parent
        found = {name: shutil.which(name, path=str(beside)) or shutil.which(name) for name in names}
        missing = [name for name, path in found.items() if path is None]
        if missing:
            raise BinaryError(f"not installed: {', '.join(missing)}; `make install` installs them")
        return cls(*(Path(path) for path in found.values() if path is not None))


def tercet_manifests() -> tuple[list[Json], list[Json]]:
    """Tercet's kinds, and its service accounts with their roles, as generated from the models."""
    package = Path(tercet_api.__file__).resolve().parent
    for folder in (package / "manifests", package.parents[1] / "manifests"):
        kinds = documents(sorted(folder.glob("*.yaml")))
        roles = documents(sorted(folder.glob("rbac/*.yaml")))
        if kinds and roles:
            return kinds, roles
    raise BinaryError(f"no manifests beside {package}; `make generate` writes them")


def storage_node(node: Node, device_bytes: int) -> Json:
    """The StorageNode of a node with one file as its device."""
    file = {"path": str(node.folder / "devices" / "d0"), "capacityBytes": device_bytes}
    return {
        "apiVersion": API_VERSION,
        "kind": "StorageNode",
        "metadata": {"name": node.name},
        "spec": {
            "nodeName": node.name,
            "address": node.address,
            "devices": [{"id": "d0", "file": file}],
            "topology": dict(node.labels),
        },
    }


def node_programs(
    node: Node, programs: Programs, agent_kubeconfig: Path, volumes_max: int | None = None
) -> Sequence[tuple[str, Sequence[str | Path]]]:
    """Component and command line of each piece of a node."""
    engine, attach = node.folder / "engine.sock", node.folder / "attach.sock"
    state = {name: node.folder / name for name in ("engine", "agent", "attach", "csi")}
    csi: list[str | Path] = [
        programs.csi,
        "node",
        "--node",
        node.name,
        "--endpoint",
        f"unix://{node.driver_socket}",
    ]
    csi += ["--attacher", f"unix://{attach}", "--state-dir", state["csi"]]
    csi += ["--http", f"{node.address}:{CSI_NODE_HTTP}"]
    for key, value in node.labels.items():
        csi += ["--topology", f"{key}={value}"]
    if volumes_max is not None:
        csi += ["--volumes-max", str(volumes_max)]
    agent: list[str | Path] = [
        programs.agent,
        "--node",
        node.name,
        "--kubeconfig",
        agent_kubeconfig,
    ]
    agent += ["--engine-socket", engine, "--state-dir", state["agent"]]
    agent += ["--listen", f"{node.address}:{AGENT_PORT}", "--http", f"{node.address}:{AGENT_HTTP}"]
    engine_argv: list[str | Path] = [programs.engine, "supervise", "--node", node.name]
    engine_argv += ["--socket", engine, "--state-dir", state["engine"]]
    attach_argv: list[str | Path] = [
        programs.attach,
        "serve",
        "--socket",
        attach,
        "--state-dir",
        state["attach"],
    ]
    attach_argv += ["--http", f"{node.address}:{ATTACH_HTTP}"]
    return (
        (faults.SUPERVISOR, engine_argv),
        ("agent", agent),
        ("attach", attach_argv),
        ("csi-node", csi),
    )


class LocalCluster:
    """A cluster on this machine with Tercet in it. An async context manager.

    volumes_max: how many volumes each node takes at a time; none for the driver's own default.
    replace_after_s: how long a node may be away before its replicas are rebuilt on others; none
    for the operator's own default.
    network: parts what is Tercet's on the nodes; none: all of it shares the machine's loopback.
    csi: with the CSI services, sidecars and attachers; without, volumes are for hosts of one's own.
    engine: another build of tercet-engine than the installed one.
    """

    def __init__(
        self,
        root: Path,
        *,
        nodes: int = NODES,
        device_bytes: int = DEVICE_BYTES,
        volumes_max: int | None = None,
        replace_after_s: float | None = None,
        network: Wiring | None = None,
        csi: bool = True,
        engine: Path | None = None,
        binaries: Binaries | None = None,
        progress: Progress = print,
        remove: bool = False,
    ) -> None:
        self.base = Cluster(root, binaries=binaries, progress=progress, remove=remove, sidecars=csi)
        self._network = network
        self._with_csi = csi
        self._engine = engine
        self._node_count = nodes
        self._device_bytes = device_bytes
        self._volumes_max = volumes_max
        self._replace_after_s = replace_after_s
        self._progress = progress
        self._pieces: dict[str, dict[str, Program]] = {}

    async def __aenter__(self) -> Self:
        self._programs = Programs.find()
        if self._engine is not None:
            self._programs = replace(self._programs, engine=self._engine)
        await self.base.__aenter__()
        try:
            await self._start()
        except BaseException:
            await self.base.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.base.__aexit__()

    @property
    def controller_socket(self) -> Path:
        """Where the CSI controller service listens."""
        return self.state.root / "csi.sock"

    @property
    def state(self) -> StateFolder:
        """The state folder."""
        return self.base.state

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.base.kubeconfig

    @property
    def kubectl(self) -> list[str]:
        """The start of a kubectl command line for this cluster."""
        return [str(self.base.tools["kubectl"]), f"--kubeconfig={self.kubeconfig}"]

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The nodes by name."""
        return self.base.nodes

    def pid(self, component: str, node: str = "") -> int | None:
        """The pid of a component (see `faults`)."""
        return faults.pid(self.state, component, node)

    def kill(self, component: str, node: str = "", number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to a component (see `faults`); it comes back by itself."""
        return faults.kill(self.state, component, node, number)

    async def _start(self) -> None:
        kinds, roles = tercet_manifests()
        crds = await asyncio.to_thread(snapshot_crds)
        # Kinds and the namespace before what is of that kind or in it.
        await self.base.applier.apply([*kinds, *crds, *packaged("tercet.yaml"), *roles])
        names = [f"node-{number}" for number in range(1, self._node_count + 1)]
        if self._network is not None:
            await self._network.relay(self.base.control_plane.addresses.api)
        await asyncio.gather(
            self._start_cluster_pieces(),
            *(self._start_node(name, f"zone-{name[-1]}") for name in names),
        )
        self._write_status()

    async def _start_cluster_pieces(self) -> None:
        base = self.base
        operator = await account_kubeconfig(base.kube, base.control_plane, "tercet-operator")
        argv: list[str | Path] = [self._programs.operator, "--kubeconfig", operator]
        argv += ["--namespace", NAMESPACE, "--http", f"{LOCALHOST}:{base.ports.take()}"]
        if self._replace_after_s is not None:
            argv += ["--replace-after", str(self._replace_after_s)]
        await base.processes.start(Program(process_name("operator"), argv))
        if self._with_csi:
            await self._start_controller()

    async def _start_controller(self) -> None:
        base, socket = self.base, self.controller_socket
        controller = await account_kubeconfig(
            base.kube, base.control_plane, "tercet-csi-controller"
        )
        argv: list[str | Path] = [self._programs.csi, "controller", "--kubeconfig", controller]
        argv += ["--endpoint", f"unix://{socket}", "--http", f"{LOCALHOST}:{base.ports.take()}"]
        await base.processes.start(Program(process_name("csi-controller"), argv))
        await base.add_sidecars(socket)

    async def _start_node(self, name: str, zone: str) -> None:
        base = self.base
        node = await base.add_node(name, zone, drivers=self._with_csi)
        enter: list[str] = []
        if self._network is not None:
            enter = self._network.enter(name)
            # The kubelet's stays where it is: it is no part of what the network parts.
            node = base.nodes[name] = replace(node, address=self._network.address(name))
        for folder in ("devices", "engine", "agent", "attach", "csi"):
            (node.folder / folder).mkdir(exist_ok=True)
        await self.register(name)
        kubeconfig = await account_kubeconfig(
            base.kube, base.control_plane, "tercet-node", node=name
        )
        pieces = node_programs(node, self._programs, kubeconfig, self._volumes_max)
        self._pieces[name] = {
            part: Program(process_name(part, name), [*enter, *argv])
            for part, argv in pieces
            if self._with_csi or part in ENGINE_PIECES
        }
        await self.revive(name, tuple(self._pieces[name]))

    async def add_node(self) -> str:
        """One more storage node; its name. It is Ready later."""
        name = f"node-{len(self.nodes) + 1}"
        await self._start_node(name, f"zone-{name[-1]}")
        return name

    async def register(self, name: str) -> None:
        """Make the StorageNode of a node."""
        await self.base.applier.apply([storage_node(self.nodes[name], self._device_bytes)])

    async def lose(self, name: str, pieces: Sequence[str] = PIECES) -> None:
        """Everything of Tercet's on a node dies at one time and does not come back."""
        engine = self.pid(faults.ENGINE, name)
        names = [process_name(component, name) for component in pieces]
        await self.base.processes.lose(*names, also=() if engine is None else (engine,))

    async def revive(self, name: str, pieces: Sequence[str] = PIECES) -> None:
        """Starts what was lost."""
        for component in pieces:
            await self.base.processes.start(self._pieces[name][component])

    def _write_status(self) -> None:
        status = {
            "state": str(self.state.root),
            "kubeconfig": str(self.kubeconfig),
            "kubectl": str(self.base.tools["kubectl"]),
            "api": self.base.control_plane.addresses.api_url,
            "nodes": [{"name": n.name, "address": n.address} for n in self.nodes.values()],
        }
        write_atomically(self.state.root / STATUS_FILE, json.dumps(status))

    async def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Waits until every StorageNode is Ready and the CSI driver, if any, is on every node."""
        started_s = time.monotonic()
        if self._with_csi:
            await asyncio.gather(*(self.base.wait_driver(name, CSI_DRIVER) for name in self.nodes))
        waiting: list[str] = []
        while time.monotonic() - started_s < timeout_s:
            found = await self.base.kube.list(group(API_VERSION, STORAGENODES))
            waiting = [item["metadata"]["name"] for item in found if not is_ready(item)]
            if found and not waiting:
                self._progress(f"storage nodes ready after {time.monotonic() - started_s:.1f} s")
                return
            await asyncio.sleep(READY_PAUSE_S)
        raise ProcessError(
            f"StorageNodes not Ready after {timeout_s:.0f} s: {', '.join(waiting)}; "
            f"`kubectl describe tsn` says why, and the logs are in {self.state.logs}"
        )


def is_ready(item: Mapping[str, Any]) -> bool:
    """Whether an object has the condition Ready."""
    conditions = item.get("status", {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def read_status(state: StateFolder) -> Json:
    """What `status` shows: from the folder alone, so that it works beside the running tool."""
    try:
        status: Json = json.loads((state.root / STATUS_FILE).read_text())
    except FileNotFoundError:
        status = {"state": str(state.root), "nodes": []}
    processes = {}
    for record in sorted(state.processes.glob("*.json")):
        name = ProcessName(record.stem)
        processes[record.stem] = faults.recorded_pid(state, name)
    return status | {"holder": state.holder(), "processes": processes}
