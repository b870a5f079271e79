"""NVMe past the block layer, in a virtual machine: reactor and store beside fio's io_uring_cmd.

The machine is emulated in software and has Debian's kernel and two emulated drives (`vm`). On the
first, fio and the reactor (the reactor's benchmark `store`, command `raw`) take turns with the same
load on the same namespace; on the second is a store, whose writes are durable, as fio's are not: it
has no passthrough that is. Emulation makes every instruction dear, so the ratios say how much
processor time each takes far more than how fast a drive is; figures of other machines are not
comparable with these.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tercet_e2e.bench import book
from tercet_e2e.bench.cases import KIB, Access
from tercet_e2e.bench.floor import BenchError
from tercet_e2e.bench.store import build
from tercet_e2e.vm import parts
from tercet_e2e.vm.machine import Drive, Hardware, Machine, Software

SUITE = "passthrough, virtual machine"
DRIVE_MIB = 256
VOLUME_MIB = 96
ROUNDS = 5
SECONDS = 2
TIMEOUT_S = 900.0
RUN = "TERCET-RUN "
GENERIC = "/dev/ng0n1"
"""The first drive's namespace, as the guest's kernel names it."""


@dataclass(frozen=True)
class Load:
    """One kind of load: random blocks of 4 KiB."""

    access: Access
    depth: int

    @property
    def name(self) -> str:
        """Its part of a row's case."""
        return f"4 KiB random {self.access}, depth {self.depth}"


LOADS = (Load("write", 1), Load("write", 32), Load("read", 1), Load("read", 32))
RUNNERS = ("fio", "reactor", "store")
GOALS = {"reactor": 0.9, "store": None}


def rows(root: Path) -> list[book.Row]:
    """Everything of the suite. Raises BenchError."""
    program = Path(build(root))
    machine, fio = parts.parts(print), parts.tools({"fio": ("fio",)}, print)["fio"]
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as name:
        folder = Path(name)
        drives = [_drive(folder / f"drive{number}") for number in range(2)]
        software = Software(_script(*drives), {"fio": fio, "store": program})
        with Machine(machine, folder, software, Hardware(drives=drives)) as running:
            return table(figures(_told(running)))


def _drive(file: Path) -> Drive:
    """A drive that was written once over."""
    with file.open("wb") as handle:
        for _ in range(DRIVE_MIB):
            handle.write(bytes(1 << 20))
    return Drive(file, uuid.uuid4())


def _script(plain: Drive, stored: Drive) -> str:
    """What the machine runs: rounds of all loads, each runner in turn."""
    lines = ["set -e", f"store format --device nguid:{stored.nguid} --mib {VOLUME_MIB}"]
    for _ in range(ROUNDS):
        for number, load in enumerate(LOADS):
            how = f"--access {load.access} --depth {load.depth} --seconds {SECONDS}"
            commands = {
                "fio": _fio(load),
                "reactor": f"store raw --device nguid:{plain.nguid} --mib {DRIVE_MIB} {how}",
                "store": f"store load --device nguid:{stored.nguid} --blocks 1 --random {how}",
            }
            for runner in RUNNERS:
                lines += [f'echo "{RUN}{number} {runner}"', commands[runner]]
    return "\n".join(lines) + "\n"


def _fio(load: Load) -> str:
    words = ["fio --name=floor --ioengine=io_uring_cmd --cmd_type=nvme", f"--filename={GENERIC}"]
    words += [f"--size={DRIVE_MIB}m --bs={4 * KIB} --rw=rand{load.access}"]
    words += [f"--iodepth={load.depth} --time_based --runtime={SECONDS} --output-format=json"]
    # As the reactor: registered file and buffers.
    return " ".join([*words, "--registerfiles=1 --fixedbufs=1"])


def _told(machine: Machine) -> list[str]:
    print("booting", flush=True)
    said = []
    for line in machine.lines(TIMEOUT_S):
        said.append(line)
        if line.startswith(RUN):
            print(".", end="", flush=True)
        if line.startswith("TERCET-EXIT "):
            print(flush=True)
            if line != "TERCET-EXIT 0":
                raise BenchError("\n".join(said[-40:]))
            return said
    raise BenchError("\n".join(["the machine ended before its command", *said[-40:]]))


def _runs(said: list[str]) -> Iterator[tuple[Load, str, dict]]:  # type: ignore[type-arg]
    """Each run: the load, who ran it, and the JSON that it said."""
    lines = iter(said)
    for line in lines:
        if not line.startswith(RUN):
            continue
        number, runner = line.removeprefix(RUN).split()
        text = ""
        for said_by_it in lines:
            text += said_by_it + "\n" if text or said_by_it.startswith("{") else ""
            if said_by_it.startswith("}") or (text and runner != "fio"):
                break
        try:
            yield LOADS[int(number)], runner, json.loads(text)
        except json.JSONDecodeError as error:
            raise BenchError(f"{runner} said no JSON: {text[:500]}") from error


def figures(said: list[str]) -> dict[tuple[Load, str], list[float]]:
    """Operations per second of each run."""
    found: dict[tuple[Load, str], list[float]] = {}
    for load, runner, answer in _runs(said):
        iops = answer["jobs"][0][load.access]["iops"] if runner == "fio" else answer["iops"]
        found.setdefault((load, runner), []).append(float(iops))
    return found


def table(runs: dict[tuple[Load, str], list[float]]) -> list[book.Row]:
    """The rows: medians, and their ratio to fio's."""
    found = []
    for runner in RUNNERS[1:]:
        for load in LOADS:
            floor = statistics.median(runs[load, "fio"])
            value = statistics.median(runs[load, runner])
            goal = GOALS[runner]
            ratio = value / floor
            found.append(
                {
                    "suite": SUITE,
                    "case": f"{runner}: {load.name}",
                    "value": round(value, 1),
                    "unit": "1/s",
                    "floor": round(floor, 1),
                    "ratio": round(ratio, 3),
                    "goal": goal,
                    "holds": None if goal is None else ratio >= goal,
                }
            )
    return found
