"""A real control plane for tests: one for a whole run, in a thread with an event loop of its own.

Tests of every distribution take it from here; what it is made of is `tercet_e2e.controlplane`.
"""

from __future__ import annotations

import asyncio
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tercet_api.generate import MANIFESTS
from tercet_api.manifests import crds
from tercet_api.names import GROUP
from tercet_e2e.binaries import Binaries
from tercet_e2e.controlplane import TOOLS, ControlPlane
from tercet_e2e.ports import Ports
from tercet_e2e.processes import Processes
from tercet_e2e.state import StateFolder

START_TIMEOUT_S = 3600.0  # from nothing the tools are built first
CRD_TIMEOUT_S = 120
KUBECTL_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Cluster:
    """What a test needs of a running control plane."""

    kubeconfig: Path
    kubectl: Path
    plane: ControlPlane

    def kubectl_run(self, *arguments: str, stdin: str = "") -> str:
        """Run kubectl as administrator. Raises AssertionError with its message."""
        done = subprocess.run(
            [self.kubectl, "--kubeconfig", self.kubeconfig, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=KUBECTL_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"kubectl {arguments}: {done.stderr}"
        return done.stdout


async def _run(
    root: Path, ready: queue.Queue[Cluster | BaseException], stop: asyncio.Event
) -> None:
    state = StateFolder.at(root)
    claim = state.claim()
    identity = state.prepare()
    tools = await asyncio.to_thread(Binaries.default().ensure, TOOLS)
    with Ports() as ports:
        async with Processes(state, identity, remove=True) as processes:
            plane = ControlPlane(state, processes, tools, ports)
            await plane.start()
            ready.put(Cluster(plane.admin, tools["kubectl"], plane))
            await stop.wait()
    claim.close()


@contextmanager
def running() -> Iterator[Cluster]:
    """A control plane with the CRDs installed; everything of it is ended at exit."""
    ready: queue.Queue[Cluster | BaseException] = queue.Queue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def work(root: Path) -> None:
        try:
            loop.run_until_complete(_run(root, ready, stop))
        except BaseException as error:
            ready.put(error)
            raise

    with tempfile.TemporaryDirectory(prefix="tcp-", ignore_cleanup_errors=True) as folder:
        thread = threading.Thread(target=work, args=(Path(folder),), name="control-plane")
        thread.start()
        try:
            started = ready.get(timeout=START_TIMEOUT_S)
            if isinstance(started, BaseException):
                raise started
            for name in crds():
                started.kubectl_run("apply", "-f", str(MANIFESTS / name))
            started.kubectl_run(
                *("wait", "--for=condition=Established", f"--timeout={CRD_TIMEOUT_S}s"),
                *(f"crd/{manifest['metadata']['name']}" for manifest in crds().values()),
            )
            _wait_served(
                started, [manifest["spec"]["names"]["plural"] for manifest in crds().values()]
            )
            yield started
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()


def _wait_served(started: Cluster, plurals: list[str]) -> None:
    """Until objects of these kinds can be asked for.

    What handles requests, and discovery, learn by watches of their own that a kind is established.
    """
    deadline_s = time.monotonic() + CRD_TIMEOUT_S
    while True:
        try:
            for plural in plurals:
                started.kubectl_run("get", f"{plural}.{GROUP}", "--all-namespaces")
        except AssertionError:
            if time.monotonic() > deadline_s:
                raise
            continue
        return


@pytest.fixture
def free_port() -> Iterator[Callable[[], int]]:
    """Gives out ports on 127.0.0.1 that nobody else takes before they are listened on."""
    with Ports() as ports:
        yield ports.take


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One control plane for the whole run."""
    with running() as started:
        yield started
