"""One store on one file, beside fio on another of the same size on the same file system.

Both files are written once over before, so no run makes a file system allocate. The load is the
reactor's benchmark `store` (node-daemon/crates/reactor/benches/store): the engine's reactor and
store in one thread, no replication, no network. A run ends with a checkpoint outside its time;
what that writes counts for the write amplification.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tercet_e2e.bench import book
from tercet_e2e.bench.cases import KIB, Case, row
from tercet_e2e.bench.floor import BenchError, Floor, fio, prewrite

SUITE = "store"
BLOCK_BYTES = 4096
FILE_BYTES = 2 << 30
VOLUME_MIB = 1024
"""More than what is written between two checkpoints: the ring has 128 MiB."""
SPARSE_BYTES = (1 << 40) + (1 << 38)
ROUNDS = 5
SECONDS = 2.0
BUILD_TIMEOUT_S = 1800.0
RUN_TIMEOUT_S = 240.0
LOG_ENTRIES = 1_000_000
SNAPSHOTS = 1000

CASES = (
    Case("4 KiB random write, depth 1, p50", "write", 4 * KIB, 1, True, "p50_us", 0, 1.15),
    Case("4 KiB random write, depth 32", "write", 4 * KIB, 32, True, "iops", 0, 0.9),
    Case("4 KiB random read, depth 1, p50", "read", 4 * KIB, 1, True, "p50_us", 0, None),
    Case("4 KiB random read, depth 32", "read", 4 * KIB, 32, True, "iops", 0, 0.9),
    Case("128 KiB sequential write, depth 8", "write", 128 * KIB, 8, False, "mib_per_s", 0, 0.9),
    Case("128 KiB sequential read, depth 8", "read", 128 * KIB, 8, False, "mib_per_s", 0, 0.9),
)


@dataclass(frozen=True)
class Amplified:
    """Random writes whose bytes on the device are counted."""

    block_bytes: int
    depth: int
    operations: int
    goal: float | None

    @property
    def name(self) -> str:
        """Its row's case."""
        return f"bytes written for each, {self.block_bytes // KIB} KiB random, depth {self.depth}"


AMPLIFIED = (
    Amplified(4 * KIB, 32, 200_000, 2.2),
    Amplified(64 * KIB, 32, 12_000, 1.1),
    Amplified(4 * KIB, 1, 10_000, None),
)


@dataclass(frozen=True)
class Program:
    """The benchmark's binary and the device that it works on."""

    path: str
    device: Path

    def run(self, command: str, *arguments: str, device: Path | None = None) -> dict[str, float]:
        """What it says. Raises BenchError."""
        words = [self.path, command, "--device", str(device or self.device), *arguments]
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            raise BenchError(f"{' '.join(words)}: {done.stderr.strip()[-500:]}")
        figures = json.loads(done.stdout)
        assert isinstance(figures, dict)
        return figures

    def load(self, case: Case) -> dict[str, float]:
        """One run of a case."""
        how = ["--access", case.access, "--blocks", str(case.block_bytes // BLOCK_BYTES)]
        how += ["--depth", str(case.depth), "--seconds", str(SECONDS)]
        return self.run("load", *how, *(["--random"] if case.random else []))

    def amplify(self, writes: Amplified) -> dict[str, float]:
        """One run that counts bytes."""
        how = ["--access", "write", "--blocks", str(writes.block_bytes // BLOCK_BYTES), "--random"]
        how += ["--depth", str(writes.depth), "--operations", str(writes.operations)]
        return self.run("load", *how)


def build(root: Path) -> str:
    """Builds the benchmark and says where it is. Raises BenchError."""
    words = ["cargo", "build", "--release", "--locked", "--message-format=json", "--manifest-path"]
    words += [str(root / "node-daemon/Cargo.toml"), "-p", "tercet-reactor", "--bench", "store"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise BenchError(f"{' '.join(words)}: {done.stderr.strip()[-2000:]}")
    messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    made = [m["executable"] for m in messages if m.get("target", {}).get("name") == "store"]
    found = [path for path in made if path]
    if not found:
        raise BenchError(f"{' '.join(words)}: no executable was made")
    return str(found[-1])


def rows(root: Path) -> list[book.Row]:
    """Everything of the suite."""
    path = build(root)
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as folder:
        return _measure(Program(path, Path(folder) / "device"), Path(folder))


def _measure(program: Program, folder: Path) -> list[book.Row]:
    print("writing the floor's file and the store's once over", flush=True)
    for file in (folder / "floor", program.device):
        prewrite(file, FILE_BYTES)
    program.run("format", "--mib", str(VOLUME_MIB))
    found = _speed(program, folder / "floor")
    for writes in AMPLIFIED:
        figures = program.amplify(writes)
        parts = " ".join(f"{part} {figures[part]:.3f}" for part in ("log", "payload", "leaves"))
        print(f"{writes.name}: {figures['amplification']:.3f}: {parts}", flush=True)
        found.append(_plain(writes.name, figures["amplification"], "bytes", writes.goal))
    (folder / "floor").unlink()
    return found + _recovery(program) + _chain(program) + _snapshot(program, folder / "sparse")


def _speed(program: Program, floor_file: Path) -> list[book.Row]:
    floors: dict[str, list[Floor]] = {case.name: [] for case in CASES}
    values: dict[str, list[dict[str, float]]] = {case.name: [] for case in CASES}
    for number in range(1, ROUNDS + 1):
        for case in CASES:
            floors[case.name].append(fio(floor_file, case, SECONDS, FILE_BYTES))
            values[case.name].append(program.load(case))
            floor, value = floors[case.name][-1], values[case.name][-1]
            said = f"floor {floor.value:.1f}, store {value[case.measure]:.1f}"
            print(f"round {number} of {ROUNDS}: {case.name}: {said}", flush=True)
    found = []
    for case in CASES:
        measured = [value[case.measure] for value in values[case.name]]
        found.append(row(case, measured, [floor.value for floor in floors[case.name]], 0.0, SUITE))
    for case in CASES:
        cpu_us = statistics.median(value["cpu_us"] for value in values[case.name])
        floor_us = statistics.median(floor.cpu_us for floor in floors[case.name])
        name = case.name.removesuffix(", p50") + ": CPU for each"
        found.append(_plain(name, cpu_us, "us", None, floor_us))
    return found


def _recovery(program: Program) -> list[book.Row]:
    figures = program.run("recovery", "--entries", str(LOG_ENTRIES))
    return [_plain("opening, 1,000,000 log entries", figures["seconds"], "s", 10.0)]


def _chain(program: Program) -> list[book.Row]:
    """Reads with a chain of snapshots; the floor is reads without."""
    figures = program.run("chain", "--snapshots", str(SNAPSHOTS))
    name = f"{SNAPSHOTS:,} snapshots: 4 KiB random read, depth"
    ratio = figures["read_us"] / figures["read_none_us"]
    one = _plain(f"{name} 1, p50", figures["read_us"], "us", 1.1, figures["read_none_us"])
    one |= {"holds": ratio <= 1.1}
    ratio = figures["read_iops"] / figures["read_none_iops"]
    many = _plain(f"{name} 32", figures["read_iops"], "1/s", 0.9, figures["read_none_iops"])
    return [one, many | {"holds": ratio >= 0.9}]


def _snapshot(program: Program, file: Path) -> list[book.Row]:
    """A large volume on a sparse file."""
    with file.open("wb") as sparse:
        sparse.truncate(SPARSE_BYTES)
    figures = program.run("snapshot", device=file)
    before, after = figures["write_before_us"], figures["write_after_us"]
    name = "1 TiB, 100 GiB mapped"
    write = _plain(f"{name}: write after a snapshot, p50", after, "us", 1.5, before)
    memory = figures["memory_bytes_per_tib"] / (1 << 20)
    return [
        _plain(f"{name}: snapshot", figures["snapshot_ms"], "ms", 50.0),
        write | {"holds": after / before <= 1.5},
        _plain(f"{name}: longest step at work", figures["longest_step_ms"], "ms", None),
        _plain(f"{name}: checkpoint", figures["checkpoint_ms"], "ms", None),
        _plain(f"{name}: its longest step", figures["checkpoint_step_ms"], "ms", None),
        _plain("memory for each TiB mapped", memory, "MiB", 16.0),
    ]


def _plain(
    case: str, value: float, unit: str, goal: float | None, floor: float | None = None
) -> book.Row:
    """A row whose goal is a bound on the value itself."""
    return {
        "suite": SUITE,
        "case": case,
        "value": round(value, 3),
        "unit": unit,
        "floor": None if floor is None else round(floor, 3),
        "ratio": None if floor is None else round(value / floor, 3),
        "goal": goal,
        "holds": None if goal is None else value <= goal,
    }
