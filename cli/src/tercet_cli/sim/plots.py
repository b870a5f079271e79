"""The figures: 2 to 7 in the manner of the source, and those that it has not.

Figures are SVG with fixed ids, so that the same numbers give the same file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl

from tercet_cli.sim.experiment import Algorithm, Row
from tercet_cli.sim.scale import Scale

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "tercet"
mpl.rcParams["svg.fonttype"] = "none"
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

SIZE_INCHES = (6.4, 3.9)


def _finish(path: Path, title: str, x: str, y: str, legend: str) -> Path:
    plt.title(title, fontsize=10)
    plt.xlabel(x)
    plt.ylabel(y)
    plt.grid(alpha=0.3)
    plt.legend(title=legend, fontsize=8, title_fontsize=8)
    plt.tight_layout()
    plt.savefig(path, metadata={"Date": None})
    plt.close()
    return path


def by_length(
    rows: Iterable[Row], of: Callable[[Sequence[int]], float]
) -> dict[float, list[tuple[int, float]]]:
    """For each drop rate: (length, what `of` makes of the rounds there)."""
    found: defaultdict[float, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row.drop_rate][row.length].append(row.rounds)
    return {
        rate: [(length, of(found[rate][length])) for length in sorted(found[rate])]
        for rate in sorted(found, reverse=True)
    }


def highest(
    rows: Sequence[Row], algorithms: Iterable[Algorithm], of: Callable[[Sequence[int]], float]
) -> float:
    """The highest point of any of these algorithms' lines."""
    return max(
        y
        for algorithm in algorithms
        for points in by_length((r for r in rows if r.algorithm == algorithm), of).values()
        for _, y in points
    )


FIGURES = (
    (2, Algorithm.ACKNOWLEDGEMENT, fmean, "average attempts"),
    (3, Algorithm.ACKNOWLEDGEMENT, max, "maximum attempts"),
    (4, Algorithm.RANDOM, fmean, "average rounds"),
    (5, Algorithm.NEIGHBOURS, fmean, "average rounds"),
    (6, Algorithm.RANDOM, max, "maximum rounds"),
    (7, Algorithm.NEIGHBOURS, max, "maximum rounds"),
)


def source_figures(folder: Path, rows: Sequence[Row], note: str) -> list[Path]:
    """Figures 2 to 7; 4 and 5, and 6 and 7, have the same axes, as in the source."""
    made = []
    for number, algorithm, of, what in FIGURES:
        pair = [a for _, a, o, _ in FIGURES if o is of and any(row.algorithm == a for row in rows)]
        pair = [a for a in pair if a is not Algorithm.ACKNOWLEDGEMENT]
        rounds = algorithm is not Algorithm.ACKNOWLEDGEMENT
        shown = by_length((row for row in rows if row.algorithm == algorithm), of)
        if not shown:
            continue
        plt.figure(figsize=SIZE_INCHES)
        for rate, points in shown.items():
            plt.plot(*zip(*points, strict=True), label=str(rate), linewidth=1)
        if rounds:
            plt.ylim(0, 1.05 * highest(rows, pair, of))
        else:
            plt.yscale("log")
        title = f"Figure {number}: {what}, {algorithm}{f' ({note})' if rounds else ''}"
        name = f"figure-{number}-{what.replace(' ', '-')}-{algorithm}.svg"
        made.append(_finish(folder / name, title, "list length", what, "drop rate"))
    return made


def wrong_figure(folder: Path, rows: Sequence[Row]) -> Path:
    """Wrong repairs by drop rate, for each policy by the same seeds."""
    found: defaultdict[str, defaultdict[float, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row.policy][row.drop_rate].append(row.wrong_repairs)
    plt.figure(figsize=SIZE_INCHES)
    for policy, rates in found.items():
        points = [(rate, fmean(rates[rate])) for rate in sorted(rates)]
        plt.plot(*zip(*points, strict=True), label=policy, marker="o")
    plt.yscale("symlog", linthresh=0.01)
    title = "Wrong repairs for each command, check-neighbours, 85 nodes"
    return _finish(folder / "wrong-repairs.svg", title, "drop rate", "wrong repairs", "policy")


SCALE_FIGURES = (
    ("seconds", "seconds until the last node has heard", True),
    ("rounds", "rounds of checks until the last node has heard", False),
    ("hops", "longest chain of messages", False),
    ("messages_per_node_minute", "messages sent by a node in the minute of a change", False),
    ("bytes_per_node_minute", "bytes sent by a node in the minute of a change", False),
)


def scale_figures(folder: Path, rows: Sequence[Scale]) -> list[Path]:
    """Convergence and cost by number of nodes; lines are averages, bars the whole range."""
    made = []
    for name, what, log in SCALE_FIGURES:
        found: defaultdict[tuple[str, float], defaultdict[int, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for row in rows:
            found[row.variant, row.drop_rate][row.nodes].append(getattr(row, name))
        plt.figure(figsize=SIZE_INCHES)
        for (variant, rate), sizes in found.items():
            x = sorted(sizes)
            y = [fmean(sizes[n]) for n in x]
            low = [m - min(sizes[n]) for m, n in zip(y, x, strict=True)]
            high = [max(sizes[n]) - m for m, n in zip(y, x, strict=True)]
            plt.errorbar(x, y, (low, high), label=f"{variant}, {rate}", marker="o", capsize=3)
        plt.xscale("log")
        if log:
            plt.yscale("log")
        else:
            plt.ylim(bottom=0)
        path = folder / f"scale-{name.replace('_', '-')}.svg"
        made.append(_finish(path, what.capitalize(), "nodes", what, "variant, drop rate"))
    return made
