"""`tercet sim membership`: the source's experiment, its table, and ours at ten thousand nodes.

figures   all steps, all rates: CSV and figures 2 to 7
table     one length and one rate, many trials: Table 1 beside ours, for every reading
wrong     wrong repairs of each policy, by the same seeds
scale     up to 10,000 nodes, asynchronous, with delays and losses
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from itertools import product
from math import ceil
from pathlib import Path

from rich.progress import track

from tercet_cli.output import errors, print_table
from tercet_cli.sim import plots
from tercet_cli.sim.experiment import (
    DROP_RATES,
    Algorithm,
    Case,
    Job,
    Row,
    run_jobs,
    write_csv,
)
from tercet_cli.sim.failures import Peace, cpu_share, run_death, run_peace
from tercet_cli.sim.rounds import Loss, Order, Policy, Sure
from tercet_cli.sim.scale import VARIANTS, Scale, Variant, run_scale
from tercet_cli.sim.statistics import by_trial, estimate, five_trials
from tercet_cli.sim.walk import LENGTH_MAX
from tercet_node.membership.detector import TRIES_MAX

TABLE_LENGTH = 85
TABLE_RATE = 0.05
CPU_S = 30.0
SOURCE = {Algorithm.RANDOM: ("1.11", "3"), Algorithm.NEIGHBOURS: ("1.08", "2")}
CHECKS = (Algorithm.RANDOM, Algorithm.NEIGHBOURS)
HOURS_COLUMNS = ["seed", "seconds", "messages", "bytes", "alarms"]
HOURS_COLUMNS += [f"after_{tries}" for tries in range(2, TRIES_MAX + 1)]


def _collect(jobs: Sequence[Job], processes: int, what: str) -> list[Row]:
    shown = track(
        run_jobs(jobs, processes), what, len(jobs), console=errors, disable=not errors.is_terminal
    )
    return [row for rows in shown for row in rows]


def figures(out: Path, trials: int, every: int, processes: int, policy: Policy) -> list[Path]:
    """Figures 2 to 7 and the CSV that they are of."""
    out.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = [
        (Case(algorithm, policy, sure=Sure.PROBES), rate, trial, None, LENGTH_MAX, every)
        for trial, rate, algorithm in product(range(trials), DROP_RATES, Algorithm)
    ]
    rows = _collect(jobs, processes, "figures")
    rows.sort(key=lambda row: (row.algorithm, -row.drop_rate, row.trial, row.step))
    write_csv(out / "rounds.csv", rows)
    return [out / "rounds.csv", *plots.source_figures(out, rows, f"{policy}, probes are sure")]


def table_cases() -> list[Case]:
    """Every way to understand what the source leaves open, as far as it tells apart."""
    cases = [
        Case(algorithm, policy, Order.NID, loss)
        for loss, algorithm, policy in product(Loss, CHECKS, Policy)
    ]
    for loss in Loss:
        cases += [
            Case(Algorithm.RANDOM, Policy.ACTIVE, Order.NID, loss, Sure.PROBES),
            Case(Algorithm.RANDOM, Policy.ACTIVE, Order.NID, loss, Sure.OFFSETS),
            Case(Algorithm.NEIGHBOURS, Policy.PROBE, Order.NID, loss, Sure.PROBES),
            Case(Algorithm.NEIGHBOURS, Policy.ACTIVE, Order.NID, loss, Sure.PROBES),
        ]
    cases += [
        Case(algorithm, Policy.ACTIVE, order)
        for algorithm, order in product(CHECKS, (Order.TREE, Order.TOGETHER))
    ]
    return cases


def table(out: Path, trials: int, processes: int) -> list[Path]:
    """Table 1 beside ours, for every way to understand what the source leaves open."""
    out.mkdir(parents=True, exist_ok=True)
    cases = table_cases()
    columns = ["ALGORITHM", "POLICY", "ORDER", "LOSS", "SURE", "STEPS", "AVERAGE", "MAXIMUM"]
    columns += ["FIVE TRIALS", "THEIR MAXIMUM", "SOURCE", "ITS MAXIMUM", "WRONG", "GIVEN UP"]
    shown = []
    for case in cases:
        jobs: list[Job] = [
            (case, TABLE_RATE, trial, TABLE_LENGTH, LENGTH_MAX, 1) for trial in range(trials)
        ]
        rows = _collect(jobs, processes, " ".join(map(str, astuple(case))))
        found = by_trial(rows)
        all_of_them, five = estimate(found), five_trials(found, str(case))
        wrong = sum(row.wrong_repairs for row in rows) / len(rows)
        shown.append(
            [
                *map(str, (case.algorithm, case.policy, case.order, case.loss, case.sure)),
                str(all_of_them.steps),
                str(all_of_them),
                str(all_of_them.highest),
                f"{five.mean_low:.2f} to {five.mean_high:.2f}",
                f"{five.highest_low} to {five.highest_high}",
                *SOURCE[case.algorithm],
                f"{wrong:.3f}",
                str(sum(row.failed for row in rows)),
            ]
        )
    path = out / "table-1.csv"
    _write(path, columns, shown)
    print_table(columns, shown)
    return [path]


def wrong(out: Path, trials: int, processes: int) -> list[Path]:
    """Wrong repairs of each policy, by the same seeds."""
    out.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = [
        (Case(Algorithm.NEIGHBOURS, policy), rate, trial, TABLE_LENGTH, LENGTH_MAX, 1)
        for policy, rate, trial in product(Policy, DROP_RATES, range(trials))
    ]
    rows = _collect(jobs, processes, "wrong repairs")
    columns = ["POLICY", "DROP RATE", "COMMANDS", "RIGHT REPAIRS", "WRONG REPAIRS", "ROUNDS"]
    shown = []
    for policy, rate in product(Policy, DROP_RATES):
        some = [row for row in rows if (row.policy, row.drop_rate) == (policy, rate)]
        right, wrongs, rounds = (
            sum(getattr(row, name) for row in some)
            for name in ("right_repairs", "wrong_repairs", "rounds")
        )
        mean = f"{rounds / len(some):.2f}"
        shown.append([policy, str(rate), str(len(some)), str(right), str(wrongs), mean])
    path = out / "wrong-repairs.csv"
    _write(path, columns, shown)
    print_table(columns, shown)
    return [path, plots.wrong_figure(out, rows)]


def _scale_job(job: tuple[Variant, int, float, int]) -> Scale:
    return run_scale(*job)


def scale(
    out: Path, sizes: Sequence[int], rates: Sequence[float], seeds: int, processes: int
) -> list[Path]:
    """Our policy by number of nodes."""
    out.mkdir(parents=True, exist_ok=True)
    jobs = [
        (variant, nodes, rate, seed)
        for nodes, variant, rate, seed in product(sizes, VARIANTS, rates, range(seeds))
        if variant is VARIANTS[0] or rate == rates[0]
    ]
    with ProcessPoolExecutor(processes) as pool:
        shown = track(
            pool.map(_scale_job, jobs),
            "scale",
            len(jobs),
            console=errors,
            disable=not errors.is_terminal,
        )
        rows = list(shown)
    path = out / "scale.csv"
    names = list(Scale.__slots__)
    _write(path, names, [[str(getattr(row, name)) for name in names] for row in rows])
    return [path, *plots.scale_figures(out, rows)]


def _death_job(job: tuple[int, float, int]) -> float:
    return run_death(*job)


def _peace_job(job: tuple[int, float, int, float]) -> Peace:
    return run_peace(*job)


def peace_parts(nodes: int, drop: float, hours: float) -> list[tuple[int, float, int, float]]:
    """An hour is a part, with a seed of its own: the same ones however many work on them."""
    return [(nodes, drop, seed, min(1.0, hours - seed)) for seed in range(ceil(hours))]


def failures(
    out: Path, nodes: int, rates: Sequence[float], deaths: int, hours: float, processes: int
) -> list[Path]:
    """The failure detector: deaths, and hours without one at the highest rate."""
    out.mkdir(parents=True, exist_ok=True)
    columns = ["NODES", "DROP RATE", "DEATHS", "KNOWN TO ALL: MEDIAN", "99 %", "LONGEST"]
    shown = []
    with ProcessPoolExecutor(processes) as pool:
        for rate in rates:
            jobs = [(nodes, rate, seed) for seed in range(deaths)]
            times = sorted(pool.map(_death_job, jobs, chunksize=4))
            at = (times[deaths // 2], times[deaths * 99 // 100], times[-1])
            shown.append([str(nodes), str(rate), str(deaths), *(f"{s:.2f} s" for s in at)])
        parts = peace_parts(nodes, max(rates), hours)
        quiet = list(pool.map(_peace_job, parts))
    print_table(columns, shown)
    peace = Peace(0.0)
    for each in quiet:
        peace.add(each)
    per_node_s = peace.seconds * nodes
    facts = [
        ["hours without a death", f"{peace.seconds / 3600:.2f}"],
        ["drop rate", str(max(rates))],
        ["false alarms", str(peace.alarms)],
        ["false alarms a day, by the ladder", f"{peace.alarms_a_day():.4f}"],
        *([f"answered after {k} in vain", str(peace.tries[k])] for k in sorted(peace.tries)),
        ["messages per node and second", f"{peace.messages / per_node_s:.2f}"],
        ["bytes per node and second", f"{peace.bytes / per_node_s:.0f}"],
        ["a node's part of a core, without sockets", f"{100 * cpu_share(nodes, CPU_S):.3f} %"],
    ]
    print_table(["FACT", "VALUE"], facts)
    _write(out / "failures.csv", columns, shown)
    _write(out / "peace.csv", ["fact", "value"], facts)
    _write(out / "peace-hours.csv", HOURS_COLUMNS, map(_hour, range(len(quiet)), quiet))
    return [out / "failures.csv", out / "peace.csv", out / "peace-hours.csv"]


def _hour(seed: int, part: Peace) -> list[str]:
    tries = [part.tries[k] for k in range(2, TRIES_MAX + 1)]
    facts = (seed, part.seconds, part.messages, part.bytes, part.alarms, *tries)
    return [str(fact) for fact in facts]


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
