"""Which process a component is, and signals to it: from inside the tool or from beside it.

Works on the state folder's records, so that a test, the demo and a person at a terminal use the
same thing. A killed process comes back by itself (`processes`, or the engine's own supervisor).

    component            node  process
    engine               yes   `tercet-engine run`, the child of its supervisor
    engine-supervisor    yes   `tercet-engine supervise`
    agent csi-node attach kubelet  yes
    operator csi-controller        no
    etcd kube-... csi-... snapshot-controller  no
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

from tercet_e2e.cleanup import start_time_ticks
from tercet_e2e.errors import ProcessError
from tercet_e2e.processes import ProcessName
from tercet_e2e.state import StateFolder

ENGINE = "engine"
SUPERVISOR = "engine-supervisor"


def process_name(component: str, node: str = "") -> ProcessName:
    """The name under which a component's process runs."""
    own = SUPERVISOR if component == ENGINE else component
    return ProcessName(f"{own}-{node}" if node else own)


def recorded_pid(state: StateFolder, name: ProcessName) -> int | None:
    """The pid of a process of the cluster, when it lives."""
    path = state.processes / f"{name}.json"
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        known = sorted(entry.stem for entry in state.processes.glob("*.json"))
        raise ProcessError(f"there is no process {name}; there are: {', '.join(known)}") from None
    found = int(record["pid"])
    return found if start_time_ticks(found) == int(record["start_ticks"]) else None


def pid(state: StateFolder, component: str, node: str = "") -> int | None:
    """The pid of a component; None while it is between two lives."""
    found = recorded_pid(state, process_name(component, node))
    if component != ENGINE or found is None:
        return found
    children = [child for child in _children(found) if b"run" in _command(child)]
    return children[0] if children else None


def kill(
    state: StateFolder,
    component: str,
    node: str = "",
    number: signal.Signals = signal.SIGKILL,
) -> int:
    """Sends a signal to a component; says which pid got it."""
    found = pid(state, component, node)
    if found is None:
        raise ProcessError(f"{component} of {node or 'the cluster'} does not run at the moment")
    try:
        os.kill(found, number)
    except ProcessLookupError:
        raise ProcessError(f"{component} (process {found}) has just ended") from None
    return found


def _children(parent: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += [int(number) for number in task.read_text().split()]
    return children


def _command(found: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{found}/cmdline").read_bytes().split(b"\0")
    return []
