"""Containers: starts shims, knows how each fares, signals them. See `shim` for what runs.

A container's files tell everything, so a kubelet that starts again goes on where it was:
`spec-<n>.json` (attempt n was begun), `run.json` (who runs), `exit.json` (how the last one ended).
Exits are noticed by pidfd, which also works for shims that an earlier kubelet started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tercet_e2e.cleanup import start_time_ticks
from tercet_e2e.kubelet import shim
from tercet_e2e.kubelet.model import Container, PodUid, Run
from tercet_e2e.state import MARKER, ROLE, write_atomically

BACKOFF_MIN_S = 0.5
BACKOFF_MAX_S = 10.0
STABLE_AFTER_S = 60.0
RUN_FILE_TIMEOUT_S = 20.0
RUN_FILE_PAUSE_S = 0.01
KILLED = 137  # 128 + SIGKILL: what is said of a container whose shim did not live to tell


@dataclass(frozen=True, slots=True)
class Bind:
    """A path of this machine at a path of the container."""

    source: Path
    target: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class Command:
    """What a container is to run."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    binds: Sequence[Bind]
    privileged: bool


@dataclass(frozen=True, slots=True)
class Report:
    """How a container fares, with the times for the pod's status."""

    container: Container
    started_s: float | None
    finished_s: float | None
    message: str


@dataclass(slots=True)
class _Watched:
    """A living shim."""

    descriptor: int
    pid: int
    child: subprocess.Popen[bytes] | None


class Containers:
    """The containers of one node, below the pods' folders."""

    def __init__(self, pods: Path, on_exit: Callable[[], None], cluster: str) -> None:
        self._pods = pods
        self._on_exit = on_exit
        self._cluster = cluster
        self._watched: dict[Path, _Watched] = {}

    def folder(self, uid: PodUid, name: str) -> Path:
        """Where the files of a container are."""
        return self._pods / uid / "containers" / name

    def log_path(self, uid: PodUid, name: str) -> Path:
        """Where the output goes."""
        return self.folder(uid, name) / "log"

    def report(self, uid: PodUid, name: str) -> Report:
        """What the files and the kernel say of a container."""
        folder = self.folder(uid, name)
        attempt = _attempts(folder)
        run, ended = _read(folder / "run.json"), _read(folder / "exit.json")
        if run.get("attempt") != attempt and folder not in self._watched:
            # No attempt, or the kubelet died before it had started the shim: it never ran. (A shim
            # that was started tells within 50 ms, long before another kubelet can look.)
            return Report(Container(name, restarts=max(attempt - 1, 0)), None, None, "")
        if run.get("attempt") != attempt:
            return Report(Container(name, Run.RUNNING, restarts=attempt - 1), None, None, "")
        started_s = float(run["started_s"])
        if folder not in self._watched and not self._adopt(folder, run):
            if ended.get("attempt") != attempt:
                ended = {"code": KILLED, "finished_s": started_s, "message": "its shim was killed"}
            finished_s = float(ended["finished_s"])
            pause_s = backoff_s(attempt, finished_s - started_s)
            container = Container(
                name, Run.EXITED, int(ended["code"]), attempt - 1, finished_s + pause_s
            )
            return Report(container, started_s, finished_s, str(ended["message"]))
        return Report(Container(name, Run.RUNNING, None, attempt - 1), started_s, None, "")

    def _adopt(self, folder: Path, run: Mapping[str, Any]) -> bool:
        """Watches a shim that an earlier kubelet started, when it still lives."""
        pid = int(run.get("shim_pid", 0))
        if pid == 0 or start_time_ticks(pid) != run.get("shim_start_ticks"):
            return False
        with contextlib.suppress(ProcessLookupError):
            self._watch(folder, pid, None)
            return True
        return False

    def _watch(self, folder: Path, pid: int, child: subprocess.Popen[bytes] | None) -> None:
        descriptor = os.pidfd_open(pid)
        self._watched[folder] = _Watched(descriptor, pid, child)
        asyncio.get_running_loop().add_reader(descriptor, self._ended, folder)

    def _ended(self, folder: Path) -> None:
        watched = self._watched.pop(folder)
        asyncio.get_running_loop().remove_reader(watched.descriptor)
        os.close(watched.descriptor)
        if watched.child is not None:
            watched.child.wait()  # it has ended: this only takes its exit status
        self._on_exit()

    async def start(self, uid: PodUid, name: str, command: Command) -> None:
        """Starts the next attempt; returns when the shim has said who runs."""
        folder = self.folder(uid, name)
        scratch = folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        attempt = _attempts(folder) + 1
        spec = {
            "attempt": attempt,
            "argv": list(command.argv),
            "env": {**command.env, MARKER: self._cluster, ROLE: "container"},
            "cwd": command.cwd,
            "privileged": command.privileged,
            "scratch": str(scratch),
            "run_file": str(folder / "run.json"),
            "exit_file": str(folder / "exit.json"),
            "binds": [
                {"source": str(b.source), "target": b.target, "read_only": b.read_only}
                for b in command.binds
            ],
        }
        path = folder / f"spec-{attempt}.json"
        write_atomically(path, json.dumps(spec))
        (folder / f"spec-{attempt - 1}.json").unlink(missing_ok=True)
        with (folder / "log").open("ab") as output:
            child = subprocess.Popen(  # noqa: ASYNC220 - not asyncio's: it may outlive us
                [sys.executable, "-I", "-S", str(Path(shim.__file__).resolve()), str(path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, MARKER: self._cluster, ROLE: "container"},
                start_new_session=True,
                cwd="/",
            )
        self._watch(folder, child.pid, child)
        deadline_s = time.monotonic() + RUN_FILE_TIMEOUT_S
        while folder in self._watched and _read(folder / "run.json").get("attempt") != attempt:
            if time.monotonic() > deadline_s:
                child.kill()
                return
            await asyncio.sleep(RUN_FILE_PAUSE_S)

    def signal(self, uid: PodUid, name: str, number: signal.Signals) -> None:
        """Sends a signal to a container.

        SIGTERM goes by way of the shim; SIGKILL to the container's first process, so that the shim
        sees all of it end and can tell.
        """
        folder = self.folder(uid, name)
        watched = self._watched.get(folder)
        if watched is None:
            return
        run = _read(folder / "run.json")
        init = int(run.get("init_pid", 0))
        with contextlib.suppress(ProcessLookupError):
            if number is not signal.SIGKILL:
                signal.pidfd_send_signal(watched.descriptor, number)
            elif init and start_time_ticks(init) == run["init_start_ticks"]:
                os.kill(init, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(watched.descriptor, signal.SIGKILL)


def backoff_s(attempt: int, lived_s: float) -> float:
    """The pause before the next attempt."""
    if lived_s >= STABLE_AFTER_S:
        return BACKOFF_MIN_S
    return float(min(BACKOFF_MIN_S * 2 ** min(attempt - 1, 10), BACKOFF_MAX_S))


def _attempts(folder: Path) -> int:
    numbers = [int(path.stem.removeprefix("spec-")) for path in folder.glob("spec-*.json")]
    return max(numbers, default=0)


def _read(path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    assert isinstance(entry, dict)
    return entry
