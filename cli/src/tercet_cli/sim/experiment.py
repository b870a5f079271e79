"""The source's experiment: which algorithm, at which drop rate, takes how many rounds.

A step is a function of (algorithm, policy, order, rate, trial, step): the walk's seed is made of
algorithm and trial, as in the source, the messages' seed of the step as well. So any step can be
run alone, in any process, and is the same as in the whole trial.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tercet_cli.sim.acknowledge import Acknowledged
from tercet_cli.sim.rounds import ROUNDS_MAX, Loss, Network, Order, Policy, Sure
from tercet_cli.sim.walk import LENGTH_MAX, Step, walk

DROP_RATES = (0.4, 0.2, 0.1, 0.05, 0.0)


class Algorithm(StrEnum):
    """The source's three."""

    ACKNOWLEDGEMENT = "acknowledgement"
    RANDOM = "check-random"
    NEIGHBOURS = "check-neighbours"


@dataclass(frozen=True, slots=True)
class Case:
    """What is simulated."""

    algorithm: Algorithm
    policy: Policy = Policy.PROBE
    order: Order = Order.NID
    loss: Loss = Loss.SUBTREE
    sure: Sure = Sure.NOTHING


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one step: a line of the CSV."""

    algorithm: str
    policy: str
    order: str
    loss: str
    sure: str
    drop_rate: float
    trial: int
    step: int
    command: str
    nid: int
    length: int
    inconsistent: int
    """Nodes with a wrong list after the command, before any check."""
    rounds: int
    """Rounds, or attempts of the acknowledgement algorithm."""
    flooded: int
    messages: int
    bytes: int
    lost: int
    right_repairs: int
    wrong_repairs: int
    failed: int
    """The command was given up, or the lists were still different after ROUNDS_MAX rounds."""


def run_step(case: Case, drop: float, trial: int, step: Step) -> Row:
    """Simulate one step."""
    seed = f"{case.algorithm} {drop} {trial} {step.number}"
    rng = random.Random(seed)  # noqa: S311 - a simulation
    if case.algorithm is Algorithm.ACKNOWLEDGEMENT:
        sent = Acknowledged(step, drop, rng)
        inconsistent, rounds, counts = sent.inconsistent(), sent.attempts, sent.counts
        failed = sent.failed
    else:
        network = Network(case.policy, step, drop, rng, case.loss, case.sure)
        inconsistent = network.inconsistent()
        rounds = 0
        while network.inconsistent() and rounds < ROUNDS_MAX:
            rounds += 1
            if case.algorithm is Algorithm.NEIGHBOURS:
                network.neighbours_round(case.order, rounds)
            else:
                network.random_round(case.order, rounds)
        counts = network.counts
        failed = bool(network.inconsistent())
    return Row(
        case.algorithm,
        case.policy if case.algorithm is not Algorithm.ACKNOWLEDGEMENT else "-",
        case.order if case.algorithm is not Algorithm.ACKNOWLEDGEMENT else "-",
        case.loss,
        case.sure,
        drop,
        trial,
        step.number,
        "add" if step.entry.present else "remove",
        step.entry.nid,
        step.length,
        inconsistent,
        rounds,
        counts.flooded,
        counts.messages,
        counts.bytes,
        counts.lost,
        counts.right,
        counts.wrong,
        int(failed),
    )


def run_trial(
    case: Case,
    drop: float,
    trial: int,
    length: int | None = None,
    length_max: int = LENGTH_MAX,
    every: int = 1,
) -> list[Row]:
    """All steps of a trial, or each so manieth, or only those that lead to one length."""
    steps = walk(f"{case.algorithm} {trial}", length_max)
    return [
        run_step(case, drop, trial, step)
        for step in steps
        if step.number % every == 0 and length in {None, step.length}
    ]


Job = tuple[Case, float, int, int | None, int, int]


def _job(job: Job) -> list[Row]:
    return run_trial(*job)


def run_jobs(jobs: Iterable[Job], processes: int) -> Iterator[list[Row]]:
    """Run trials, in order, in so many processes."""
    if processes <= 1:
        yield from map(_job, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(_job, jobs, chunksize=1)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """The rows as CSV."""
    names = list(Row.__slots__)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)
