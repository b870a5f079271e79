"""Ends and unmounts whatever a cluster left: processes, mounts, loop devices below its folder.

Used at an orderly end, by the reaper when the tool was killed, and by `down` after a crash of both;
so it trusts nothing but the machine itself: processes are found by the mark in their environment
(and by the recorded pid, when its start time still agrees, so that a reused pid is left alone;
containers of an engine by the cgroup that the folder names), mounts by mountinfo, loop devices by
their backing file. Standard library only: the reaper imports
this and nothing else.

Order: kubelets and containers (they use volumes and would mount again), then mounts and loop
devices while the data path is still there to take the last writes, then every other process, then
by force what is left; at last the commands that the folder names for the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tercet_e2e.errors import CleanupError
from tercet_e2e.state import MARKER, ROLE, ClusterId, StateFolder

GENTLE_UNMOUNT_S = 5.0
KILL_ROUNDS_MAX = 100
KILL_ROUND_S = 0.05
UNMOUNT_ROUNDS_MAX = 5
AT_END_TIMEOUT_S = 120.0
VERIFY_TIMEOUT_S = 60.0  # a killed process ends when its last I/O does, which a busy disk delays
FIRST_ROLES = frozenset({"kubelet", "container"})
CGROUP = "cgroup"  # file of the folder: the cgroup whose processes belong to it, if any
AT_END = "at-end.json"  # file of the folder: commands that run when all processes have ended

CGROUPS = Path("/sys/fs/cgroup")
MNT_FORCE = 1
MNT_DETACH = 2
START_TIME_FIELD = 19  # of /proc/<pid>/stat, counted after the command's closing parenthesis

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Found:
    """A process of the cluster."""

    pid: int
    role: str


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount point and the type of its file system."""

    path: Path
    kind: str


def start_time_ticks(pid: int) -> int | None:
    """When a process started, in ticks since boot; None when it is gone or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[START_TIME_FIELD])


def marked_processes(cluster: ClusterId) -> list[Found]:
    """Every living process that has the cluster's mark in its environment, but for the caller."""
    wanted = f"{MARKER}={cluster}".encode()
    role_key = f"{ROLE}=".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            environ = (entry / "environ").read_bytes().split(b"\0")
            if wanted in environ and start_time_ticks(int(entry.name)) is not None:
                roles = [item[len(role_key) :] for item in environ if item.startswith(role_key)]
                found.append(Found(int(entry.name), roles[0].decode() if roles else ""))
    return found


def recorded_processes(state: StateFolder) -> list[Found]:
    """Recorded processes that still are the ones that were recorded."""
    found = []
    for record in sorted(state.processes.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            entry = json.loads(record.read_text())
            if start_time_ticks(int(entry["pid"])) == int(entry["start_ticks"]):
                found.append(Found(int(entry["pid"]), str(entry.get("role", ""))))
    return found


def grouped_processes(state: StateFolder) -> list[Found]:
    """Processes in the cgroup that the folder names, in whatever hierarchy, and below it."""
    found: set[int] = set()
    for group in cgroup_folders(state):
        for listing in group.glob("**/cgroup.procs"):
            with contextlib.suppress(OSError):  # the group has just gone
                found |= {int(pid) for pid in listing.read_text().split()}
    living = (pid for pid in found if pid != 0 and start_time_ticks(pid) is not None)
    return [Found(pid, "container") for pid in sorted(living)]


def cgroup_folders(state: StateFolder) -> list[Path]:
    """Where the cgroup that the folder names is: one of v2, or one in each hierarchy of v1."""
    try:
        name = (state.root / CGROUP).read_text().strip()
    except FileNotFoundError:
        return []
    assert name, f"{state.root / CGROUP} is empty"
    return [*CGROUPS.glob(name), *CGROUPS.glob(f"*/{name}")]


def mounts_below(root: Path) -> list[Mount]:
    """Mounts at or below the folder, the latest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        path = Path(_unescape(before.split()[4]))
        if path == root or root in path.parents:
            found.append(Mount(path, after.split()[0]))
    return found[::-1]


def loops_below(root: Path) -> list[Path]:
    """Loop devices whose backing file lies below the folder, also when that file is deleted."""
    found = []
    for entry in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):
            backing = Path(_unescape(entry.read_text().rstrip("\n").removesuffix(" (deleted)")))
            if root in backing.parents:
                found.append(Path("/dev") / entry.parts[3])
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def clean(state: StateFolder, *, spare: Iterable[int] = ()) -> None:
    """Ends everything of the cluster in this folder. Idempotent; raises with what would not go."""
    cluster = state.cluster_id()
    if cluster is None:
        return
    spared = frozenset(spare)
    _kill(state, cluster, spared, only=FIRST_ROLES)
    _unmount_gently(state.root)
    _kill(state, cluster, spared, only=None)
    _unmount_by_force(state.root)
    for record in state.processes.glob("*.json"):
        record.unlink(missing_ok=True)
    _run_at_end(state)
    _verify(state, cluster, spared)


def _living(state: StateFolder, cluster: ClusterId) -> dict[int, Found]:
    every = recorded_processes(state) + marked_processes(cluster) + grouped_processes(state)
    return {found.pid: found for found in every if found.pid != os.getpid()}


def _kill(
    state: StateFolder, cluster: ClusterId, spared: frozenset[int], only: frozenset[str] | None
) -> None:
    # In rounds: a process may have forked between the look and the kill.
    for _ in range(KILL_ROUNDS_MAX):
        living = [
            found
            for found in _living(state, cluster).values()
            if found.pid not in spared and (only is None or found.role in only)
        ]
        if not living:
            return
        for found in living:
            _kill_one(found.pid)
        time.sleep(KILL_ROUND_S)


def _kill_one(pid: int) -> None:
    # A pidfd names this very process: should it end now, its number is not signalled again.
    before = start_time_ticks(pid)
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if before is not None and start_time_ticks(pid) == before:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _unmount_gently(root: Path) -> None:
    for _ in range(UNMOUNT_ROUNDS_MAX):
        mounts, loops = mounts_below(root), loops_below(root)
        if not mounts and not loops:
            return
        done = [_run_quietly(["umount", "--no-canonicalize", str(m.path)]) for m in mounts]
        done += [_run_quietly(["losetup", "--detach", str(loop)]) for loop in loops]
        if not any(done):
            return


def _run_quietly(command: list[str]) -> bool:
    try:
        finished = subprocess.run(
            command, capture_output=True, timeout=GENTLE_UNMOUNT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False  # its data path is gone or stopped; force comes after the processes
    return finished.returncode == 0


def _unmount_by_force(root: Path) -> None:
    for _ in range(UNMOUNT_ROUNDS_MAX):
        mounts, loops = mounts_below(root), loops_below(root)
        if not mounts and not loops:
            return
        for mount in mounts:
            # Only FUSE: forcing aborts its connection, which frees whoever waits for it.
            flags = MNT_DETACH | (MNT_FORCE if mount.kind.startswith("fuse") else 0)
            _libc.umount2(os.fsencode(mount.path), flags)
        for loop in loops:
            _run_quietly(["losetup", "--detach", str(loop)])
        time.sleep(KILL_ROUND_S)


def _run_at_end(state: StateFolder) -> None:
    for group in cgroup_folders(state):
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):  # an empty group that stays does no harm
                Path(folder).rmdir()
    with contextlib.suppress(FileNotFoundError):
        for command in json.loads((state.root / AT_END).read_text()):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=AT_END_TIMEOUT_S, check=False
            )
            if done.returncode != 0:
                raise CleanupError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-1000:]}")


def _verify(state: StateFolder, cluster: ClusterId, spared: frozenset[int]) -> None:
    deadline_s = time.monotonic() + VERIFY_TIMEOUT_S
    while left := _left(state, cluster, spared):
        if time.monotonic() > deadline_s:
            raise CleanupError(f"still there after cleaning {state.root}: {', '.join(left)}")
        for pid in _living(state, cluster).keys() - spared:
            _kill_one(pid)
        _unmount_by_force(state.root)
        time.sleep(KILL_ROUND_S)


def _left(state: StateFolder, cluster: ClusterId, spared: frozenset[int]) -> list[str]:
    left = [f"process {pid}" for pid in _living(state, cluster) if pid not in spared]
    left += [f"mount {mount.path}" for mount in mounts_below(state.root)]
    left += [f"loop device {loop}" for loop in loops_below(state.root)]
    return left
