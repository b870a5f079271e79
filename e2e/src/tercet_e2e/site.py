"""What a scenario needs of a cluster, whoever provides it.

A scenario speaks to the cluster through kubectl and helm alone. What differs between providers
stands here: how a pod runs the database, which folder pods and this machine both see (what must
outlive a node lies there), how images come onto the nodes, and who switches a node's power.

Providers: `kindcluster.KindSite` makes a cluster with real kubelets and ends it, `ExistingSite`
takes one that is there, `LocalSite` (in `localsite`) has processes of this machine for nodes.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from tercet_e2e.binaries import Binaries, Progress
from tercet_e2e.errors import E2eError, ProcessError
from tercet_e2e.kubectl import Kubectl

NODES_READY_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 120.0
POWER_TIMEOUT_S = 300.0
CONTROL_PLANE = "node-role.kubernetes.io/control-plane"
SHARED = Path("/var/lib/tercet-e2e")
"""The shared folder as nodes of provider `kind` see it; the usual one of `existing`."""

Json = dict[str, Any]
Power = Literal["off", "stop", "on"]
"""What is done to a node: it loses power, it is stopped in order, it is started again."""


class SiteError(E2eError):
    """A cluster lacks what a scenario needs; the message says what to give."""


@dataclass(frozen=True, slots=True)
class Step:
    """Something that took a while."""

    name: str
    seconds: float


class Site(abc.ABC):
    """A cluster for scenarios. An async context manager: leaving it ends what it has made."""

    kubectl: Kubectl
    shared: Path
    """The shared folder on this machine."""
    shared_on_nodes: Path = SHARED
    """The same folder, as pods find it on their nodes."""
    python: str = "python3"
    """Python inside a pod of the database's image."""
    workload: Sequence[str] = ("python3", "/workload.py")
    """The database's command inside a pod of that image."""
    workload_image: str = "localhost/tercet/workload:1"

    def __init__(self, root: Path, progress: Progress = print) -> None:
        self.root = root
        self.kubeconfig = root / "kubeconfig"
        self.steps: list[Step] = []
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

    @abc.abstractmethod
    async def _start(self) -> None:
        """Have the cluster, with every node Ready."""

    @abc.abstractmethod
    async def power(self, node: str, act: Power) -> None:
        """Do something to a node's power."""

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times something and says so, also when it fails."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            taken = Step(name, time.monotonic() - started_s)
            self.steps.append(taken)
            self._progress(f"{taken.seconds:6.1f} s  {name}")

    async def _find_tools(self, *names: str) -> None:
        with self.step("tools of the cluster, found or built"):
            binaries = Binaries.default(self._progress)
            self.tools = await asyncio.to_thread(binaries.ensure, names)

    def _connect(self) -> None:
        self.kubectl = Kubectl([str(self.tools["kubectl"]), f"--kubeconfig={self.kubeconfig}"])

    async def nodes(self, selector: str) -> list[str]:
        """The names of the nodes that a selector of labels means."""
        listed = await self.kubectl.run("get", "nodes", "-l", selector, "-o", "name")
        return sorted(name.removeprefix("node/") for name in listed.split())

    async def workers(self) -> list[str]:
        """The nodes that are no control plane."""
        return await self.nodes(f"!{CONTROL_PLANE}")

    async def control_plane(self) -> str:
        """A node of the control plane."""
        found = await self.nodes(CONTROL_PLANE)
        if not found:
            raise SiteError(f"no node has the label {CONTROL_PLANE}: is its API server elsewhere?")
        return found[0]

    async def wait_nodes(self, timeout_s: float = NODES_READY_TIMEOUT_S) -> None:
        """Wait until every node is Ready."""
        wait = ["wait", "node", "--all", "--for=condition=Ready", f"--timeout={timeout_s:.0f}s"]
        await self.kubectl.run(*wait, timeout_s=timeout_s + 10)

    async def helm(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run helm on the cluster; returns its output."""
        command = [str(self.tools["helm"]), f"--kubeconfig={self.kubeconfig}", *arguments]
        return await run(command, dict(os.environ), timeout_s)


class ExistingSite(Site):
    """A cluster that is there already, by its kubeconfig; it is left as it was found.

    shared: `HERE:THERE`, a folder of this machine, and where every worker has it (a network file
    system, or a mount of nodes that are containers here). power: a command that is called with
    `off`, `stop` or `on` and a node's name; without one, scenarios that need it say so.
    """

    def __init__(
        self,
        root: Path,
        kubeconfig: Path,
        *,
        shared: str,
        power: str = "",
        progress: Progress = print,
    ) -> None:
        super().__init__(root, progress)
        self.kubeconfig = kubeconfig.resolve()
        here, separator, there = shared.partition(":")
        if not separator or not Path(here).is_dir() or not there.startswith("/"):
            raise SiteError(
                f"shared folder {shared!r}: give HERE:THERE, a folder of this machine and the path "
                f"at which every worker has it (nodes in containers: HERE:{SHARED})"
            )
        self.shared, self.shared_on_nodes = Path(here).resolve(), Path(there)
        self._power = shlex.split(power)

    async def _start(self) -> None:
        await self._find_tools("kubectl", "helm")
        self._connect()
        with self.step("all nodes Ready"):
            await self.wait_nodes()

    async def power(self, node: str, act: Power) -> None:
        """Call the command that was given."""
        if not self._power:
            raise SiteError(
                f"node {node} cannot be switched {act}: give a command that is called with off, "
                "stop or on and a node's name (--node-power)"
            )
        await run([*self._power, act, node], dict(os.environ), POWER_TIMEOUT_S)


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
