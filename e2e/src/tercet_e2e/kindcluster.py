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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_kind import KindCluster as PytestKind

from tercet_e2e.binaries import KIND, Progress, module_file
from tercet_e2e.docker.engine import Engine, engine
from tercet_e2e.errors import ProcessError
from tercet_e2e.kindimage import build
from tercet_e2e.site import SHARED, Power, Site, run

NAME = "tercet-e2e"
WORKERS = 3
TOOLS = ("kind", "kubectl", "helm")
PULL_TIMEOUT_S = 300.0
LOAD_TIMEOUT_S = 600.0
CREATE_TIMEOUT_S = 600.0
STOP_S = "30"
COMMAND_TIMEOUT_S = 120.0
DEFAULT_IMAGE_FILE = "pkg/apis/config/defaults/image.go"
CGROUP_V2 = Path("/sys/fs/cgroup/cgroup.controllers")

Json = dict[str, Any]


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


class KindSite(Site):
    """A cluster in containers; ends with the context, unless it is to be kept."""

    def __init__(
        self,
        root: Path,
        *,
        image: str | None = None,
        keep: bool = False,
        progress: Progress = print,
    ) -> None:
        super().__init__(root, progress)
        self.shared = root / "shared"
        self._image = image
        self._keep = keep

    async def _start(self) -> None:
        self.shared.mkdir(parents=True, exist_ok=True)
        await self._find_tools(*TOOLS)
        with self.step("Docker Engine"):
            self.engine = await self._stack.enter_async_context(engine(self._progress))
        image = await self._node_image()
        await self._create(image)
        self._connect()
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

    async def load(self, *images: str) -> None:
        """Put images of the engine onto every node."""
        command = [str(self.tools["kind"]), "load", "docker-image", "--name", NAME, *images]
        await run(command, dict(self.engine.environment), LOAD_TIMEOUT_S)

    async def power(self, node: str, act: Power) -> None:
        """What is done to a node is done to its container."""
        if act == "on":
            await self.engine.run("start", node)
            return
        # A machine that loses power takes its loop devices with it; a container leaves them to the
        # kernel, over files of a process that is gone and that have lost their path with it.
        loops = loops_of(node)
        await self.engine.run(*(("kill",) if act == "off" else ("stop", "--time", STOP_S)), node)
        for device in loops:
            await free(device)


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
