"""What many trials of one thing gave: rows of build/bench.json and a figure of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tercet_e2e.bench import book


@dataclass(frozen=True)
class Distribution:
    """One case's trials."""

    case: str
    unit: str
    values: Sequence[float]
    goal: float | None
    """At most this at `goal_percent` of the trials."""
    goal_percent: int = 99


def at_percent(values: Sequence[float], percent: int) -> float:
    """What that share of the trials kept (nearest rank): of 50 trials 99 % is the longest."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]


def rows(suite: str, found: Distribution) -> list[book.Row]:
    """p50, p99 and the longest; the goal stands at its own."""
    made = []
    for percent, name in ((50, "p50"), (99, "p99"), (100, "max")):
        value = at_percent(found.values, percent)
        goal = found.goal if percent == found.goal_percent else None
        made.append(
            {
                "suite": suite,
                "case": f"{found.case}, {len(found.values)} trials, {name}",
                "value": round(value, 1),
                "unit": found.unit,
                "floor": None,
                "ratio": None,
                "goal": goal,
                "holds": None if goal is None else value <= goal,
            }
        )
    return made


def figure(found: Sequence[Distribution], path: Path) -> None:
    """Of each case which share of the trials kept how long; a goal is a dashed line."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "tercet"
    mpl.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    drawn, panel = plt.subplots(figsize=(7.2, 4.0))
    for each in found:
        ordered = sorted(each.values)
        shares = [(number + 1) / len(ordered) * 100 for number in range(len(ordered))]
        (line,) = panel.step(ordered, shares, where="post", linewidth=1.6, label=each.case)
        if each.goal is not None:
            panel.axvline(each.goal, color=line.get_color(), linestyle="--", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_xlabel(f"{found[0].unit} (dashed: the goal at p99)")
    panel.set_ylabel("% of trials")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    drawn.tight_layout()
    path.parent.mkdir(exist_ok=True)
    drawn.savefig(path, metadata={"Date": None})
    plt.close(drawn)
