"""Averages of steps that come in trials, with intervals that know of the trials.

Steps of one trial share its walk, so what is independent is the trial: the interval is that of a
ratio (sum of rounds by number of steps) with whole trials as its sample. `five_trials` answers what
the source's own sample size would have shown: averages and maxima of five trials drawn from ours.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tercet_cli.sim.experiment import Row

CONFIDENCE_95 = 1.96
DRAWS = 4_000
SOURCE_TRIALS = 5


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval, and what goes with it."""

    mean: float
    half: float
    highest: int
    steps: int
    trials: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


@dataclass(frozen=True, slots=True)
class Five:
    """What five trials would have shown, 95 times of 100."""

    mean_low: float
    mean_high: float
    highest_low: int
    highest_high: int


def by_trial(rows: Iterable[Row]) -> list[list[int]]:
    """Rounds of each trial's steps."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for row in rows:
        found[row.trial].append(row.rounds)
    return [found[trial] for trial in sorted(found)]


def estimate(trials: Sequence[Sequence[int]]) -> Estimate:
    """The mean over all steps."""
    assert len(trials) >= 2, "an interval needs two trials"
    steps = sum(map(len, trials))
    mean = sum(map(sum, trials)) / steps
    spread = sum((sum(trial) - mean * len(trial)) ** 2 for trial in trials)
    error = math.sqrt(spread * len(trials) / (len(trials) - 1)) / steps
    highest = max(max(trial) for trial in trials)
    return Estimate(mean, CONFIDENCE_95 * error, highest, steps, len(trials))


def five_trials(trials: Sequence[Sequence[int]], seed: str) -> Five:
    """The range of what the source's number of trials shows."""
    rng = random.Random(seed)  # noqa: S311 - a simulation
    means, highest = [], []
    for _ in range(DRAWS):
        drawn = [step for trial in rng.choices(trials, k=SOURCE_TRIALS) for step in trial]
        means.append(sum(drawn) / len(drawn))
        highest.append(max(drawn))
    means.sort()
    highest.sort()
    low, high = DRAWS * 25 // 1000, DRAWS * 975 // 1000
    return Five(means[low], means[high], highest[low], highest[high])
