"""Takes away what a Docker daemon leaves in the kernel: bridges, packet rules, a switch, devices.

`before` notes how things were; `python -m tercet_e2e.docker.traces STATE` makes them so again when
every process of the engine has ended (`cleanup.clean` runs it, also for the reaper). Rules are
found by Docker's own names and by the engine's bridges, so that what others added meanwhile stays.
A container that used loop devices leaves them over files that have gone with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

BEFORE = "traces.json"
TABLES = ("nat", "filter", "raw", "mangle")
BLOCKS = Path("/sys/block")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
COMMAND_TIMEOUT_S = 30.0

Before = Mapping[str, object]


def bridges() -> list[str]:
    """The bridges of this machine."""
    return sorted(entry.parent.name for entry in Path("/sys/class/net").glob("*/bridge"))


def before(environment: Mapping[str, str]) -> Before:
    """What to make again at the end, and with which programs."""
    kept = ("PATH", "LD_LIBRARY_PATH", "XTABLES_LIBDIR")
    return {
        "bridges": bridges(),
        "forwarding": FORWARDING.read_text().strip(),
        "policy": forward_policy(_saved("iptables", "filter", environment)),
        "environment": {name: environment[name] for name in kept if name in environment},
    }


def forward_policy(saved: str) -> str:
    """What happens to a forwarded packet that no rule knows, by `iptables-save`."""
    lines = [line.split() for line in saved.splitlines() if line.startswith(":FORWARD ")]
    return lines[0][1] if lines else "ACCEPT"


def removals(saved: str, ours: Iterable[str]) -> list[list[str]]:
    """Arguments for iptables that take out Docker's rules and chains from one table's save."""
    names = set(ours)
    rules: list[list[str]] = []
    chains: list[str] = []
    for line in saved.splitlines():
        if line.startswith(":DOCKER"):
            chains.append(line[1:].split()[0])
        if line.startswith("-A "):
            words = shlex.split(line)
            jumps = any(word.startswith("DOCKER") for word in words)
            if jumps or names.intersection(words):
                rules.append(["-D", *words[1:]])
    return rules + [["-X", chain] for chain in chains]


def dead_loops(blocks: Path = BLOCKS) -> list[Path]:
    """Loop devices over files that have lost their path: the mount that they were on is gone.

    Of such a file the kernel knows only the name within its file system; one that has a path here
    is left alone, and so is one that was deleted, which whoever has it open may still use.
    """
    found = []
    for entry in sorted(blocks.glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):
            path = Path(entry.read_text().rstrip("\n"))
            if path.parent == Path("/") and not path.exists():
                found.append(Path("/dev") / entry.parts[-3])
    return found


def _run(command: list[str], environment: Mapping[str, str]) -> str:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        return done.stdout
    return ""


def _saved(program: str, table: str, environment: Mapping[str, str]) -> str:
    return _run([f"{program}-save", "-t", table], environment)


def remove(found: Before) -> None:
    """Make everything as it was. Idempotent; what is not there needs no removal."""
    environment = found["environment"]
    assert isinstance(environment, dict)
    known = found["bridges"]
    assert isinstance(known, list)
    fresh = [name for name in bridges() if name.startswith(("docker", "br-")) and name not in known]
    for table in TABLES:
        for arguments in removals(_saved("iptables", table, environment), fresh):
            _run(["iptables", "-t", table, *arguments], environment)
    _run(["iptables", "-P", "FORWARD", str(found["policy"])], environment)
    for name in fresh:
        _run(["ip", "link", "delete", name], environment)
    for device in dead_loops():
        _run(["losetup", "--detach", str(device)], environment)
    FORWARDING.write_text(str(found["forwarding"]))


def main(arguments: list[str]) -> int:
    """Runs; returns the exit code."""
    state = Path(arguments[0])
    with contextlib.suppress(FileNotFoundError):
        remove(json.loads((state / BEFORE).read_text()))
        (state / BEFORE).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
