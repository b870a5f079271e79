"""`bench noderep`: the node's table as replicas beside locks, arc-swap and a concurrent map.

The runs are `node-daemon/crates/noderep/benches/noderep.rs`, round after round with every structure
in each; here they become medians, rows of build/bench.json with std's RwLock as the floor, a table
of ratios and a figure. The goal is the design's: reads with one change in a hundred at least twice
as fast as RwLock. Where a case has more threads than the machine has cores, the figures tell of
the scheduler as well.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tercet_e2e.bench import book
from tercet_e2e.bench.floor import BenchError

SUITE = "node replication"
OURS = "noderep"
FLOOR = "std RwLock"
GOAL_READ_PERCENT = 99
GOAL_RATIO = 2.0
ROUNDS = 5
MILLIS = 100
STALLED_READS_PER_S_MIN = 1.0
TIMEOUT_S = 1800.0
FIGURE = "bench-noderep.svg"


@dataclass(frozen=True, order=True)
class Case:
    """One kind of load."""

    read_percent: int
    threads: int

    @property
    def name(self) -> str:
        """As the table has it."""
        plural = "" if self.threads == 1 else "s"
        return f"{self.read_percent} % reads, {self.threads} thread{plural}"


@dataclass(frozen=True)
class Medians:
    """Operations per second by structure."""

    cases: Mapping[Case, Mapping[str, float]]
    stalled: Mapping[str, float]
    """Reads of one thread while another stands still in the middle of a look and a third writes."""


def medians(lines: Iterable[str]) -> Medians:
    """Of the benchmark's output."""
    runs: defaultdict[tuple[Case | None, str], list[float]] = defaultdict(list)
    for line in lines:
        run = json.loads(line)
        case = None if run.get("stalled") else Case(run["read_percent"], run["threads"])
        runs[case, run["structure"]].append(float(run["ops_per_s"]))
    cases: defaultdict[Case, dict[str, float]] = defaultdict(dict)
    stalled = {}
    for (case, structure), values in runs.items():
        median = statistics.median(values)
        if case is None:
            stalled[structure] = median
        else:
            cases[case][structure] = median
    return Medians({case: cases[case] for case in sorted(cases, key=_order)}, stalled)


def _order(case: Case) -> tuple[int, int]:
    return (-case.read_percent, case.threads)


def rows(found: Medians) -> list[book.Row]:
    """Rows of build/bench.json."""
    made = []
    for case, by_structure in found.cases.items():
        for structure, value in by_structure.items():
            ratio = value / by_structure[FLOOR]
            has_goal = structure == OURS and case.read_percent == GOAL_READ_PERCENT
            goal = GOAL_RATIO if has_goal else None
            made.append(_row(f"{case.name}: {structure}", value, by_structure[FLOOR], ratio, goal))
    for structure, value in found.stalled.items():
        goal = STALLED_READS_PER_S_MIN if structure == OURS else None
        row = _row(f"reads beside a stalled reader: {structure}", value, None, None, goal)
        made.append(row | {"holds": None if goal is None else value >= goal})
    return made


def _row(
    case: str, value: float, floor: float | None, ratio: float | None, goal: float | None
) -> book.Row:
    return {
        "suite": SUITE,
        "case": case,
        "value": round(value),
        "unit": "1/s",
        "floor": None if floor is None else round(floor),
        "ratio": None if ratio is None else round(ratio, 3),
        "goal": goal,
        "holds": None if goal is None or ratio is None else ratio >= goal,
    }


def table(found: Medians) -> Table:
    """Millions of operations per second; the best of each line is marked."""
    structures = list(next(iter(found.cases.values())))
    shown = Table(title="millions of operations per second, * the most")
    shown.add_column("case")
    for structure in structures:
        shown.add_column(structure, justify="right")
    lines = [(case.name, by_structure) for case, by_structure in found.cases.items()]
    for name, by_structure in [*lines, ("reads beside a stalled reader", found.stalled)]:
        most = max(by_structure.values())
        cells = [
            f"{by_structure[one] / 1e6:.2f}{'*' if by_structure[one] == most else ' '}"
            for one in structures
        ]
        shown.add_row(name, *cells)
    return shown


def figure(found: Medians, path: Path) -> None:
    """A panel for each proportion of reads, a line for each structure."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "tercet"
    mpl.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    mixes = list(dict.fromkeys(case.read_percent for case in found.cases))
    drawn, panels = plt.subplots(1, len(mixes), figsize=(3.1 * len(mixes), 3.6), squeeze=False)
    for panel, mix in zip(panels[0], mixes, strict=True):
        cases = [case for case in found.cases if case.read_percent == mix]
        for structure in found.cases[cases[0]]:
            values = [found.cases[case][structure] / 1e6 for case in cases]
            width = 2.2 if structure == OURS else 1.1
            threads = [str(case.threads) for case in cases]
            panel.plot(threads, values, marker="o", markersize=3, linewidth=width, label=structure)
        panel.set_title(f"{mix} % reads", fontsize=10)
        panel.set_xlabel("threads")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("millions of operations per second")
    panels[0][-1].legend(fontsize=7)
    drawn.tight_layout()
    drawn.savefig(path, metadata={"Date": None})
    plt.close(drawn)


def measure(root: Path, rounds: int, millis: int) -> list[str]:
    """Run the benchmark. Raises BenchError."""
    manifest = root / "node-daemon" / "Cargo.toml"
    command = ["cargo", "bench", "-q", f"--manifest-path={manifest}", "--locked"]
    command += ["-p", "tercet-noderep", "--bench", "noderep", "--"]
    command += ["--rounds", str(rounds), "--millis", str(millis)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)} ended with {done.returncode}")
    return [line for line in done.stdout.splitlines() if line.startswith("{")]


def run(root: Path, rounds: int = ROUNDS, millis: int = MILLIS) -> None:
    """Measure, print, write build/bench.json and the figure."""
    console = Console()
    cores = len(os.sched_getaffinity(0))
    console.print(f"{rounds} rounds of {millis} ms for each case, on {cores} cores")
    found = medians(measure(root, rounds, millis))
    made: list[dict[str, Any]] = rows(found)
    book.write(root, made)
    figure(found, root / "build" / FIGURE)
    console.print(table(found))
    for row in made:
        if row["holds"] is not None:
            text = "holds" if row["holds"] else "DOES NOT HOLD"
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x {FLOOR}, "
            console.print(f"{row['case']}: {ratio}goal {row['goal']}: {text}")
    console.print(f"rows in {book.path(root)}, figure in build/{FIGURE}")
