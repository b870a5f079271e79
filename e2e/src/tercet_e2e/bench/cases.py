"""What is measured, and against which floor (docs/performance.md).

A floor is fio's figure (io_uring, O_DIRECT, durable writes by O_DSYNC) on a prewritten file on the
disk that holds the devices, or a sum with the round trip of two processes over loopback TCP. Goals
are ratios to the floor; they may fail to hold, which the table says.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Access = Literal["read", "write"]


@dataclass(frozen=True)
class Case:
    """One kind of load."""

    name: str
    access: Access
    block_bytes: int
    depth: int
    random: bool
    measure: Literal["p50_us", "iops", "mib_per_s"]
    round_trips: int
    """How many network round trips the floor includes."""
    goal: float | None
    """Ratio to the floor: at most for a latency, at least otherwise."""


KIB = 1024
SUITE = "volume, 3 replicas"
CASES = (
    Case("4 KiB write, depth 1, p50", "write", 4 * KIB, 1, True, "p50_us", 2, 1.0),
    Case("4 KiB read, depth 1, p50", "read", 4 * KIB, 1, True, "p50_us", 1, 1.0),
    Case("4 KiB random write, depth 32", "write", 4 * KIB, 32, True, "iops", 0, 0.5),
    Case("4 KiB random read, depth 32", "read", 4 * KIB, 32, True, "iops", 0, 0.7),
    Case("128 KiB sequential write, depth 8", "write", 128 * KIB, 8, False, "mib_per_s", 0, 0.3),
    Case("128 KiB sequential read, depth 8", "read", 128 * KIB, 8, False, "mib_per_s", 0, 0.7),
)
UNITS = {"p50_us": "us", "iops": "1/s", "mib_per_s": "MiB/s"}


def row(
    case: Case,
    values: list[float],
    floors: list[float],
    round_trip_us: float = 0.0,
    suite: str = SUITE,
) -> dict[str, Any]:
    """A row of build/bench.json: medians of the interleaved runs."""
    value = statistics.median(values)
    floor = statistics.median(floors) + case.round_trips * round_trip_us
    ratio = value / floor
    holds: Callable[[float, float], bool] = (
        float.__le__ if case.measure == "p50_us" else float.__ge__
    )
    return {
        "suite": suite,
        "case": case.name,
        "value": round(value, 1),
        "unit": UNITS[case.measure],
        "floor": round(floor, 1),
        "ratio": round(ratio, 3),
        "goal": case.goal,
        "holds": None if case.goal is None else bool(holds(float(ratio), float(case.goal))),
    }
