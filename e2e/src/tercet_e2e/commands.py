"""The command line for clusters: up, down, status, kubectl, logs, kill.

`up` holds the cluster for as long as it runs; `--detach` leaves that to a process in the background
and returns when the cluster is up. `down` ends either, and cleans up what a crash left.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tercet_e2e import faults
from tercet_e2e.binaries import Binaries
from tercet_e2e.cleanup import clean
from tercet_e2e.cluster import SIDECARS
from tercet_e2e.controlplane import TOOLS
from tercet_e2e.errors import StateError
from tercet_e2e.local import DEVICE_BYTES, NODES, STATUS_FILE, LocalCluster, read_status
from tercet_e2e.state import StateFolder

DEFAULT_STATE = Path("/tmp/tercet")
DOWN_TIMEOUT_S = 60.0
DETACH_TIMEOUT_S = 3600.0  # the first time, tools are built
PAUSE_S = 0.1

State = Annotated[Path, typer.Option("--state", help="Folder of the cluster.")]

console = Console(highlight=False)


def up(
    state: State = DEFAULT_STATE,
    nodes: Annotated[int, typer.Option(min=1, max=16, help="How many nodes.")] = NODES,
    device_bytes: Annotated[int, typer.Option(help="Size of each device.")] = DEVICE_BYTES,
    wait: Annotated[bool, typer.Option("--wait", help="Until all StorageNodes are Ready.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Hold it in the background.")] = False,
) -> None:
    """Start a cluster with Tercet, and hold it until Ctrl-C."""
    if detach:
        _detach(StateFolder.at(state), sys.argv[1:])
        return
    asyncio.run(_up(state, nodes, device_bytes, wait))


async def _up(root: Path, nodes: int, device_bytes: int, wait: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    me = asyncio.current_task()
    assert me is not None

    def end() -> None:
        # While it starts, this breaks the start off; afterwards it ends the wait.
        if not stop.is_set():
            stop.set()
            if not started:
                me.cancel()

    started = False
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end)
    cluster = LocalCluster(
        root, nodes=nodes, device_bytes=device_bytes, progress=lambda text: print(text, flush=True)
    )
    try:
        async with cluster:
            if wait:
                await cluster.wait_ready()
            started = True
            print(f"export KUBECONFIG={cluster.kubeconfig}", flush=True)
            print("the cluster runs until Ctrl-C, SIGTERM or `down`", flush=True)
            await stop.wait()
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    print("ended", flush=True)


def _detach(state: StateFolder, arguments: list[str]) -> None:
    state.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    (state.root / STATUS_FILE).unlink(missing_ok=True)
    log = state.root / "up.log"
    rest = [argument for argument in arguments if argument != "--detach"]
    with log.open("wb") as output:
        holder = subprocess.Popen(
            [sys.executable, "-m", "tercet_e2e", *rest],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline_s = time.monotonic() + DETACH_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if holder.poll() is not None:
            console.print(log.read_text())
            raise typer.Exit(holder.returncode or 1)
        if b"the cluster runs" in log.read_bytes():
            console.print(log.read_text())
            return
        time.sleep(PAUSE_S)
    raise StateError(f"the cluster is not up after {DETACH_TIMEOUT_S:.0f} s; see {log}")


def down(
    state: State = DEFAULT_STATE,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder.")] = False,
) -> None:
    """End a cluster, also one whose tool crashed, and remove its folder."""
    folder = StateFolder.at(state)
    if not folder.root.exists():
        console.print(f"nothing in {folder.root}")
        return
    holder = folder.holder()
    if holder is not None:
        os.kill(holder, signal.SIGTERM)
        deadline_s = time.monotonic() + DOWN_TIMEOUT_S
        while folder.holder() is not None:
            if time.monotonic() > deadline_s:
                raise StateError(f"process {holder} did not end in {DOWN_TIMEOUT_S:.0f} s")
            time.sleep(PAUSE_S)
    known = folder.cluster_id() is not None
    clean(folder)
    if known and not keep:
        shutil.rmtree(folder.root)
    console.print(f"{folder.root}: nothing runs, nothing is mounted")


def status(
    state: State = DEFAULT_STATE,
    output: Annotated[str, typer.Option("-o", "--output", help="json or table.")] = "table",
) -> None:
    """Show what runs."""
    found = read_status(StateFolder.at(state))
    if output == "json":
        print(json.dumps(found, indent=2))
        return
    table = Table("process", "pid")
    for name, pid in found["processes"].items():
        table.add_row(name, str(pid or "restarts"))
    console.print(table)
    console.print(f"held by process {found['holder']}" if found["holder"] else "does not run")
    if "kubeconfig" in found:
        console.print(f"export KUBECONFIG={found['kubeconfig']}")


def kubectl(context: typer.Context, state: State = DEFAULT_STATE) -> None:
    """Run kubectl on the cluster: everything after the options goes to it."""
    found = read_status(StateFolder.at(state))
    if "kubeconfig" not in found:
        raise StateError(f"no cluster in {found['state']}: start one with `up`")
    argv = [found["kubectl"], f"--kubeconfig={found['kubeconfig']}", *context.args]
    os.execv(found["kubectl"], argv)


def kill(
    component: Annotated[str, typer.Argument(help="engine, agent, csi-node, operator, ...")],
    node: Annotated[str, typer.Argument(help="Name of the node.")] = "",
    number: Annotated[str, typer.Option("--signal", help="KILL, STOP, CONT, TERM.")] = "KILL",
    state: State = DEFAULT_STATE,
) -> None:
    """Send a signal to a piece of the cluster; a killed one comes back by itself."""
    chosen = signal.Signals[f"SIG{number.removeprefix('SIG')}"]
    pid = faults.kill(StateFolder.at(state), component, node, chosen)
    console.print(f"{component} {node}: SIG{number} to process {pid}")


def tools() -> None:
    """Find or build all tools that a local cluster needs."""
    for name, path in Binaries.default(console.print).ensure([*TOOLS, *SIDECARS]).items():
        console.print(f"{name:24} {path}")


def register(app: typer.Typer) -> None:
    """Adds these commands to an application."""
    for command in (up, down, status, kill, tools):
        app.command()(command)
    passing = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=passing, add_help_option=False)(kubectl)
