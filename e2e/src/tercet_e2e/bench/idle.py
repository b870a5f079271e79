"""CPU and memory of every process of a cluster while nothing happens."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
GOALS: Mapping[str, tuple[float, float]] = {
    # component: CPU in % of a core, resident MiB (docs/performance.md)
    "engine": (1.0, 256.0),
    "agent": (5.0, 96.0),
    "csi-node": (1.0, 64.0),
}


@dataclass(frozen=True)
class Sample:
    """Of one process."""

    cpu_s: float
    resident_mib: float


def sample(pid: int) -> Sample:
    """CPU time so far and resident memory of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    cpu_s = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return Sample(cpu_s, pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20))


def rows(pids: Mapping[str, int], seconds: float) -> list[dict[str, Any]]:
    """Rows of build/bench.json for processes by name (`COMPONENT` or `COMPONENT NODE`)."""
    before = {name: sample(pid) for name, pid in pids.items()}
    time.sleep(seconds)
    found = []
    for name, pid in pids.items():
        after = sample(pid)
        percent = (after.cpu_s - before[name].cpu_s) / seconds * 100
        goals = GOALS.get(name.split(" ")[0], (None, None))
        found.append(_row(f"{name}: CPU", percent, "% of a core", goals[0]))
        found.append(_row(f"{name}: memory", after.resident_mib, "MiB", goals[1]))
    return found


def _row(case: str, value: float, unit: str, goal: float | None) -> dict[str, Any]:
    return {
        "suite": "idle",
        "case": case,
        "value": round(value, 2),
        "unit": unit,
        "floor": None,
        "ratio": None,
        "goal": goal,
        "holds": None if goal is None else value <= goal,
    }
