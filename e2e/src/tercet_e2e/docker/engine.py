"""Runs a Docker Engine below the cache, for as long as somebody needs it.

An engine that answers already (DOCKER_HOST, the machine's own, ours held by another process) is
used and left as it is. Else Debian's docker.io is unpacked and its daemon started with a state
folder of its own, `<cache>/docker`: images stay there from run to run, containers and networks do
not. Where the machine itself lacks a capability, every container would fail that is given all of
them; then runc gets a wrapper that asks for no more than there is.

How it ends: containers first, through the daemon; the daemon; then `cleanup.clean`, which also ends
what is in the daemon's cgroup, unmounts, and has `traces` take bridges and rules away. The reaper
does the same without the daemon when this process was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tercet_e2e.binaries import Progress, cache_dir
from tercet_e2e.cleanup import AT_END, CGROUP, clean
from tercet_e2e.docker import debian, traces
from tercet_e2e.errors import ProcessError, StateError
from tercet_e2e.processes import Processes, ProcessName, Program
from tercet_e2e.state import StateFolder, write_atomically

PACKAGE = "docker.io"
DAEMON = ProcessName("dockerd")
MACHINES_OWN = "unix:///var/run/docker.sock"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 120.0
PING_TIMEOUT_S = 5.0
PAUSE_S = 0.1
CAPABILITIES = 41  # the kernel's, 0 to 40, since 5.9


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that answers: `environment` makes `docker` and `kind` talk to it."""

    host: str
    environment: Mapping[str, str]
    ours: bool

    @property
    def docker(self) -> str:
        """The docker program for this engine. Raises ProcessError when there is none."""
        found = shutil.which("docker", path=self.environment.get("PATH"))
        if found is None:
            raise ProcessError(f"an engine answers at {self.host}, but `docker` is not on PATH")
        return found

    async def run(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run docker; returns its output. Raises ProcessError with its words."""
        process = await asyncio.create_subprocess_exec(
            self.docker,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(self.environment),
        )
        shown = f"docker {' '.join(arguments)}"
        try:
            out, error = await asyncio.wait_for(process.communicate(), timeout_s)
        except BaseException as reason:
            process.kill()
            await process.wait()
            if isinstance(reason, TimeoutError):
                raise ProcessError(f"{shown}: no end after {timeout_s:.0f} s") from None
            raise
        if process.returncode != 0:
            raise ProcessError(f"{shown}: {error.decode(errors='replace').strip()[-2000:]}")
        return out.decode()


def answers(host: str) -> bool:
    """Whether an engine answers at an address (`unix://` or `tcp://`)."""
    kind, _, where = host.partition("://")
    try:
        if kind == "unix":
            connection = http.client.HTTPConnection("localhost", timeout=PING_TIMEOUT_S)
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(PING_TIMEOUT_S)
            connection.sock.connect(where)
        else:
            connection = http.client.HTTPConnection(where.rstrip("/"), timeout=PING_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request("GET", "/_ping")
            return connection.getresponse().read() == b"OK"
    except (OSError, http.client.HTTPException):
        return False


def folder(env: Mapping[str, str] = os.environ) -> StateFolder:
    """The state folder of our own engine."""
    return StateFolder.at(cache_dir(env) / "docker")


def host_of(state: StateFolder) -> str:
    """Where our own engine listens."""
    return f"unix://{state.root / 'docker.sock'}"


def running(env: Mapping[str, str] = os.environ) -> Engine | None:
    """An engine that answers now: the one that was asked for, ours, or the machine's own."""
    if asked := env.get("DOCKER_HOST"):
        if not answers(asked):
            raise ProcessError(f"DOCKER_HOST is {asked}, where no Docker Engine answers: unset it")
        return Engine(asked, dict(env), ours=False)
    own = host_of(folder(env))
    if answers(own):
        return Engine(own, _own_environment(env, own), ours=False)
    if answers(MACHINES_OWN):
        return Engine(MACHINES_OWN, dict(env), ours=False)
    return None


def _own_environment(env: Mapping[str, str], host: str) -> dict[str, str]:
    root = debian.unpacked(PACKAGE, lambda _: None)
    return debian.environment(root, env) | {"DOCKER_HOST": host}


@contextlib.asynccontextmanager
async def engine(progress: Progress = print) -> AsyncIterator[Engine]:
    """An engine: the one that answers, else our own until the context is left."""
    found = await asyncio.to_thread(running)
    if found is None:
        state = folder()
        try:
            claim = state.claim()
        except StateError:
            found = await _of_another(state)
        else:
            with claim:
                async with _own(state, progress) as started:
                    yield started
            return
    yield found


async def _of_another(state: StateFolder) -> Engine:
    """The engine that another process is about to start, or to end."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        found = await asyncio.to_thread(running)
        if found is not None:
            return found
        await asyncio.sleep(PAUSE_S)
    raise ProcessError(
        f"process {state.holder()} holds {state.root}, but no Docker Engine answers there after "
        f"{START_TIMEOUT_S:.0f} s: look into {state.logs}, then end that process"
    )


@contextlib.asynccontextmanager
async def _own(state: StateFolder, progress: Progress) -> AsyncIterator[Engine]:
    started_s = time.monotonic()
    root = await asyncio.to_thread(debian.unpacked, PACKAGE, progress)
    cluster = state.prepare()
    # What a killed run left here goes first: the reaper may have been killed, too.
    await asyncio.to_thread(clean, state)
    host = host_of(state)
    environment = debian.environment(root) | {"DOCKER_HOST": host}
    link_alternatives(root)
    group = f"tercet-docker-{cluster[:8]}"
    write_atomically(state.root / CGROUP, group)
    before = traces.before(environment)
    write_atomically(state.root / traces.BEFORE, json.dumps(before))
    ending = [sys.executable, "-m", "tercet_e2e.docker.traces", str(state.root)]
    write_atomically(state.root / AT_END, json.dumps([ending]))
    write_atomically(state.root / "daemon.json", json.dumps(configuration(state, root, group)))
    argv: list[str | Path] = [root / "usr/sbin/dockerd"]
    argv += ["--config-file", state.root / "daemon.json"]
    async with Processes(state, cluster) as processes:
        await processes.start(Program(DAEMON, argv, env=environment))
        found = Engine(host, environment, ours=True)
        await _wait_answer(found, processes)
        await _empty(found)  # a run that was killed has left containers in the daemon's books
        progress(f"Docker Engine runs after {time.monotonic() - started_s:.1f} s")
        try:
            yield found
        finally:
            # A daemon that does not answer any more is ended by force, just below.
            with contextlib.suppress(ProcessError):
                await _empty(found)
            await processes.end(DAEMON, STOP_TIMEOUT_S)


def link_alternatives(root: Path) -> None:
    """What the maintainer script of iptables would have done: the names that dockerd calls."""
    for name in ("iptables", "iptables-save", "ip6tables"):
        link = root / "usr/sbin" / name
        if (root / "usr/sbin/xtables-nft-multi").exists() and not link.is_symlink():
            link.symlink_to("xtables-nft-multi")


def missing_capabilities(status: str) -> int:
    """How many of the kernel's capabilities this machine withholds, by /proc/self/status."""
    bounding = next(line for line in status.splitlines() if line.startswith("CapBnd:"))
    return CAPABILITIES - (int(bounding.split()[1], 16) & ((1 << CAPABILITIES) - 1)).bit_count()


def configuration(state: StateFolder, root: Path, group: str) -> dict[str, object]:
    """The daemon's configuration file."""
    made: dict[str, object] = {
        "hosts": [host_of(state)],
        "data-root": str(state.root / "data"),
        "exec-root": str(state.root / "run"),
        "pidfile": str(state.root / "dockerd.pid"),
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "cgroup-parent": f"/{group}",
        "oom-score-adjust": 0,  # less takes a capability that containers of machines lack
        "log-driver": "json-file",
        "log-opts": {"max-size": "50m"},
        "storage-driver": "overlay2",
    }
    if missing_capabilities(Path("/proc/self/status").read_text()):
        wrapper = state.root / "runc-bounded"
        text = resources.files("tercet_e2e.docker").joinpath("runc-bounded").read_text()
        write_atomically(wrapper, text.replace("@RUNC@", str(root / "usr/sbin/runc")), mode=0o755)
        made |= {"runtimes": {"bounded": {"path": str(wrapper)}}, "default-runtime": "bounded"}
    return made


async def _wait_answer(found: Engine, processes: Processes) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not await asyncio.to_thread(answers, found.host):
        if time.monotonic() > deadline_s:
            raise ProcessError(
                f"the Docker Engine does not answer after {START_TIMEOUT_S:.0f} s; the end of "
                f"{processes.log_path(DAEMON)}:\n{processes.log_tail(DAEMON)}"
            )
        await asyncio.sleep(PAUSE_S)


async def _empty(found: Engine) -> None:
    """Take away all containers and networks; images stay."""
    containers = (await found.run("ps", "--all", "--quiet")).split()
    if containers:
        await found.run("rm", "--force", "--volumes", *containers)
    networks = (await found.run("network", "ls", "--quiet", "--filter", "type=custom")).split()
    if networks:
        await found.run("network", "rm", *networks)
