"""Provider `kind`: a cluster of nodes in containers, with real kubelets, on this machine.

Four nodes: one control plane and three workers, each a container of the node image. The image is
the one that was asked for; else, where nodes can be of the public one (cgroup v2) and it can be
pulled, that; else one made here without a registry (`kindimage`). The engine is the one that
answers, or our own for as long as the cluster is there.

What a test does to a node is done to its container. One folder of this machine is seen by every
worker at the same place: there a pod leaves what must outlive its node.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pytest_kind import KindCluster as PytestKind

from tercet_e2e.binaries import KIND, Binaries, Progress, module_file
from tercet_e2e.docker.engine import Engine, engine
from tercet_e2e.errors import ProcessError
from tercet_e2e.kindimage import build
from tercet_e2e.kubectl import Kubectl

NAME = "tercet-e2e"
WORKERS = 3
SHARED = Path("/var/lib/tercet-e2e")  # on every worker: `Site.shared` of this machine
TOOLS = ("kind", "kubectl", "helm")
PULL_TIMEOUT_S = 300.0
LOAD_TIMEOUT_S = 600.0
CREATE_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 120.0
DEFAULT_IMAGE_FILE = "pkg/apis/config/defaults/image.go"
CGROUP_V2 = Path("/sys/fs/cgroup/cgroup.controllers")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """Something that took a while on the way to a cluster."""

    name: str
    seconds: float


def configuration(shared: Path, workers: int = WORKERS) -> Json:
    """What kind is told of the cluster."""
    mount = {"hostPath": str(shared), "containerPath": str(SHARED)}
    nodes: list[Json] = [{"role": "control-plane"}]
    nodes += [
        {
            "role": "worker",
            "labels": {"topology.kubernetes.io/zone": f"zone-{number}"},
            "extraMounts": [mount],
        }
        for number in range(1, workers + 1)
    ]
    return {"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "nodes": nodes}


def public_image(source: str) -> str:
    """The name of kind's own node image, out of the file of its module that says it."""
    found = re.search(r'^const Image = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise ProcessError(f"kind {KIND} says no default image in {DEFAULT_IMAGE_FILE}")
    return found.group(1)


class KindSite:
    """A cluster in containers. An async context manager: leaving it ends all."""

    def __init__(
        self,
        root: Path,
        *,
        image: str | None = None,
        keep: bool = False,
        progress: Progress = print,
    ) -> None:
        self.root = root
        self.shared = root / "shared"
        self.kubeconfig = root / "kubeconfig"
        self.steps: list[Step] = []
        self._image = image
        self._keep = keep
        self._progress = progress
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times something and says so."""
        started_s = time.monotonic()
        yield
        taken = Step(name, time.monotonic() - started_s)
        self.steps.append(taken)
        self._progress(f"{taken.seconds:6.1f} s  {name}")

    async def _start(self) -> None:
        self.shared.mkdir(parents=True, exist_ok=True)
        with self.step("tools of the cluster, found or built"):
            binaries = Binaries.default(self._progress)
            self.tools = await asyncio.to_thread(binaries.ensure, TOOLS)
        with self.step("Docker Engine"):
            self.engine = await self._stack.enter_async_context(engine(self._progress))
        image = await self._node_image()
        await self._create(image)
        self.kubectl = Kubectl([str(self.tools["kubectl"]), f"--kubeconfig={self.kubeconfig}"])
        with self.step("all nodes Ready"):
            await self.wait_nodes()

    async def _node_image(self) -> str:
        if self._image is not None:
            return self._image
        if CGROUP_V2.exists():  # the public one's kubelet refuses what came before
            source = await asyncio.to_thread(
                module_file, "sigs.k8s.io/kind", KIND, DEFAULT_IMAGE_FILE
            )
            name = public_image(source.read_text())
            with self.step("node image, pulled"), contextlib.suppress(ProcessError):
                await self.engine.run("pull", "--quiet", name, timeout_s=PULL_TIMEOUT_S)
                return name
        name = build.image_name()
        with self.step("node image, made or found in the cache"):
            archive = await asyncio.to_thread(build.ensure, self._progress)
            known = await self.engine.run("images", "--quiet", name)
            if not known.strip():
                await self.engine.run("load", "--input", str(archive), timeout_s=LOAD_TIMEOUT_S)
        return name

    async def _create(self, image: str) -> None:
        config = self.root / "kind.json"
        config.write_text(json.dumps(configuration(self.shared)))
        self._stack.enter_context(_environment(self.engine))
        with contextlib.chdir(self.root):  # it makes a folder where it is
            cluster = PytestKind(
                NAME, self.kubeconfig, image, self.tools["kind"], self.tools["kubectl"]
            )
        if not self._keep:  # one of that name is what a killed run has left
            await asyncio.to_thread(cluster.delete)
        with self.step("kind create cluster: one control plane, three workers"):
            if not self._keep:
                self._stack.push_async_callback(self._delete, cluster)
            await asyncio.to_thread(cluster.create, config)

    async def _delete(self, cluster: PytestKind) -> None:
        loops = [device for name in await self.containers() for device in loops_of(name)]
        await asyncio.to_thread(cluster.delete)
        for device in loops:
            await free(device)

    async def containers(self) -> list[str]:
        """The names of the nodes, which are those of their containers."""
        label = f"label=io.x-k8s.kind.cluster={NAME}"
        listed = await self.engine.run("ps", "--all", "--filter", label, "--format", "{{.Names}}")
        return sorted(listed.split())

    async def workers(self) -> list[str]:
        """The nodes that are no control plane."""
        return [name for name in await self.containers() if "control-plane" not in name]

    @property
    def control_plane(self) -> str:
        """The node of the control plane."""
        return f"{NAME}-control-plane"

    async def wait_nodes(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until every node is Ready."""
        wait = ["wait", "node", "--all", "--for=condition=Ready", f"--timeout={timeout_s:.0f}s"]
        await self.kubectl.run(*wait, timeout_s=timeout_s + 10)

    async def load(self, *images: str) -> None:
        """Put images of the engine onto every node."""
        command = [str(self.tools["kind"]), "load", "docker-image", "--name", NAME, *images]
        await run(command, dict(self.engine.environment), LOAD_TIMEOUT_S)

    async def helm(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run helm on the cluster; returns its output."""
        command = [str(self.tools["helm"]), f"--kubeconfig={self.kubeconfig}", *arguments]
        return await run(command, dict(os.environ), timeout_s)

    async def on(self, node: str, *command: str) -> str:
        """Run a program on a node; returns its output."""
        return await self.engine.run("exec", node, *command)

    async def kill_node(self, node: str) -> None:
        """Power off: everything on the node ends at once."""
        await self._power_off(node, "kill")

    async def stop_node(self, node: str) -> None:
        """Stop a node's container in order, as `docker stop` does."""
        await self._power_off(node, "stop", "--time", "30")

    async def _power_off(self, node: str, *command: str) -> None:
        # A machine that loses power takes its loop devices with it; a container leaves them to the
        # kernel, over files of a process that is gone and that have lost their path with it.
        loops = loops_of(node)
        await self.engine.run(*command, node)
        for device in loops:
            await free(device)

    async def start_node(self, node: str) -> None:
        """Power on again."""
        await self.engine.run("start", node)


def loops_of(node: str, blocks: Path = Path("/sys/block")) -> list[Path]:
    """The loop devices over files below a folder with the node's name (the attacher's)."""
    found = []
    for entry in sorted(blocks.glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):
            if f"/{node}/" in entry.read_text():
                found.append(Path("/dev") / entry.parts[-3])
    return found


async def free(device: Path) -> None:
    """Detach a loop device, unless it is gone by itself."""
    with contextlib.suppress(ProcessError):
        await run(["losetup", "--detach", str(device)], dict(os.environ), COMMAND_TIMEOUT_S)


@contextlib.contextmanager
def _environment(found: Engine) -> Iterator[None]:
    """Makes kind and docker find the engine by this process's environment alone."""
    names = ("DOCKER_HOST", "PATH")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(
        {name: found.environment[name] for name in names if name in found.environment}
    )
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


async def run(command: Sequence[str], env: dict[str, str], timeout_s: float) -> str:
    """Run a program; returns its output. Raises ProcessError with its words."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    shown = " ".join([Path(command[0]).name, *command[1:]])
    try:
        out, error = await asyncio.wait_for(process.communicate(), timeout_s)
    except BaseException as reason:
        process.kill()
        await process.wait()
        if isinstance(reason, TimeoutError):
            raise ProcessError(f"{shown}: no end after {timeout_s:.0f} s") from None
        raise
    if process.returncode != 0:
        words = (error or out).decode(errors="replace").strip()
        raise ProcessError(f"{shown}: {words[-3000:]}")
    return out.decode()
