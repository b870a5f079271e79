"""What the membership takes and how quickly it is: `bench membership`, and the tests' figures.

Real sockets, TLS and signatures over loopback (tercet_e2e.swarm). The last figure is the source's
experiment: a piece of work on one core, with and without the daemon beside it, in turns, so that
what else the machine does falls on both; the difference has a confidence interval. What a piece
takes is its own processor time (which says what caches and interrupts cost it) and what the daemon
took of the core meanwhile: the time it would take on a core that those two have for themselves.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from tercet_e2e.swarm import Member, Site, Swarm, process, until
from tercet_node.membership import AddNoProp, CheckNow, NodeList

NOTICED_S_MAX = 2.0
FULL_CHECK_S_MAX = 0.11
DEAD_S_MAX = 2.0
CPU_PERCENT_MAX = 0.32
CLUSTER_NODES = 100
CHECKED_ENTRIES = 85
PATIENCE_S = 60.0
CALM_PERCENT = 0.6

ROUNDS = 100
"""Pairs of pieces of work, with and without."""
WORK_HASHES = 200
BLOCK = bytes(1 << 20)
SETTLE_S = 0.4
RESAMPLES = 10_000


async def quiet(swarm: Swarm) -> None:
    """Everybody is connected, and nobody is in doubt of anybody."""

    def look() -> bool:
        detectors = [member.runner.node.detector for member in swarm.members.values()]
        return not any(each.suspected or each.dead for each in detectors)

    await asyncio.sleep(2.0)
    await until(look, PATIENCE_S)


async def noticed_s(site: Site, swarm: Swarm, runs: int) -> list[float]:
    """Entries injected into one node, which tells nobody: until another has heard of it."""
    found = []
    count = len(swarm.known)
    others = [member.runner for nid, member in swarm.members.items() if nid != count // 2]
    for number in range(runs):
        extra = site.authority.entry(count + number, site.host(count - 1))
        swarm.members[count // 2].runner.step(AddNoProp(extra))

        def heard(nid: int = extra.nid) -> bool:
            return any(nid in one.members for one in others)

        found.append(await until(heard, PATIENCE_S))
        await until(lambda: len(swarm.digests()) == 1, PATIENCE_S)
    return found


@dataclass(frozen=True, slots=True)
class Took:
    """How long something took whose nodes, both sides of it, are in this process."""

    wall_s: float
    processor_s: float
    coreless_s: float
    """Of it, how long there was something to do and no core to do it on."""

    @property
    def own_s(self) -> float:
        """What it would have taken with a core of its own: all that waits for is its own doing."""
        return max(self.wall_s - self.coreless_s, self.processor_s)


async def full_check_s(folder: Path, runs: int) -> list[Took]:
    """All entries but two are new to the one that asks: sent, verified, taken over."""
    site = Site(folder, CHECKED_ENTRIES + 1)
    few = NodeList.of([site.entries[0], site.entries[CHECKED_ENTRIES]])
    found = []
    async with Swarm(folder) as swarm:
        await swarm.start(0)
        for _ in range(runs):
            asking = await swarm.start(CHECKED_ENTRIES, few)
            found.append(await _full_check(asking, swarm.known.digest))
            await swarm.kill(CHECKED_ENTRIES)
    return found


async def _full_check(asking: Member, digest: int) -> Took:
    await until(lambda: asking.count("connections") > 0, PATIENCE_S)
    ran_s, waited_s = scheduled_s("thread-self")
    asking.runner.step(CheckNow(full=True))
    took_s = await until(lambda: asking.runner.members.digest == digest, PATIENCE_S)
    ran_after_s, waited_after_s = scheduled_s("thread-self")
    assert asking.count("changes_total", cause="repaired") == CHECKED_ENTRIES - 1
    return Took(took_s, ran_after_s - ran_s, waited_after_s - waited_s)


async def death_s(swarm: Swarm, victims: Sequence[int]) -> list[float]:
    """One after the other ends without a word: until all others have judged it dead."""
    found = []
    for victim in victims:
        await swarm.kill(victim)
        everybody = [member.runner.node.detector for member in swarm.members.values()]

        def known(who: int = victim, seen: Sequence[Any] = tuple(everybody)) -> bool:
            return all(each.dead >> who & 1 for each in seen)

        found.append(await until(known, PATIENCE_S))
    return found


def scheduled_s(who: int | str) -> tuple[float, float]:
    """Of a process's first thread: time on a processor so far, and time it was ready for none."""
    ran_ns, waited_ns, _ = Path(f"/proc/{who}/schedstat").read_text().split()
    return int(ran_ns) / 1e9, int(waited_ns) / 1e9


def processor_s(pid: int) -> float:
    """Time on a processor so far."""
    return scheduled_s(pid)[0]


async def cpu_percent(pid: int, seconds: float) -> float:
    """Of a core."""
    before_s = processor_s(pid)
    await asyncio.sleep(seconds)
    return (processor_s(pid) - before_s) / seconds * 100


async def until_calm(pid: int) -> None:
    """A hundred nodes that start at one time have a thousand handshakes to do first.

    On a machine that is busy with something else it never is: what is measured then says so.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while await cpu_percent(pid, 2.0) > CALM_PERCENT:
                pass


# ------------------------------------------------------------------ the source's experiment


@dataclass(frozen=True, slots=True)
class Cost:
    """By how many percent a work is slower beside the daemon; 95 % confidence."""

    percent: float
    low: float
    high: float


def work_s(daemon: int) -> float:
    """A fixed piece of work on the processor; how long it takes beside just that daemon."""
    began_s, own_s, other_s = time.perf_counter(), time.thread_time(), processor_s(daemon)
    for _ in range(WORK_HASHES):
        hashlib.sha256(BLOCK).digest()
    other_s, own_s = processor_s(daemon) - other_s, time.thread_time() - own_s
    return own_s * (1 + other_s / (time.perf_counter() - began_s))


def cost(pairs: Sequence[tuple[float, float]]) -> Cost:
    """Of pairs (with, without): the mean of what is left without a tenth at either end.

    The interval is of resampled pairs; the trimmed tenths are where something else ran.
    """
    ratios = [(beside / alone - 1) * 100 for beside, alone in pairs]
    rng = random.Random(1)
    means = sorted(_trimmed(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    low, high = means[RESAMPLES * 25 // 1000], means[RESAMPLES * 975 // 1000]
    return Cost(_trimmed(ratios), low, high)


def _trimmed(values: Sequence[float]) -> float:
    cut = len(values) // 10
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


async def experiment(daemon: int, others: int, rounds: int = ROUNDS) -> Cost:
    """Work and daemon on one core, the simulated peers on the rest.

    Without: the daemon is stopped for that piece of work, too short for anybody to judge it dead.
    """
    cores = sorted(os.sched_getaffinity(0))
    pairs = []
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, set(cores))
        for pid, allowed in ((0, cores[:1]), (daemon, cores[:1]), (others, cores[1:] or cores)):
            os.sched_setaffinity(pid, allowed)
        for number in range(rounds):
            took: dict[bool, float] = {}
            for beside in (True, False) if number % 2 else (False, True):
                await asyncio.sleep(SETTLE_S)
                if not beside:
                    os.kill(daemon, signal.SIGSTOP)
                took[beside] = work_s(daemon)
                os.kill(daemon, signal.SIGCONT)
            pairs.append((took[True], took[False]))
    return cost(pairs)


# ------------------------------------------------------------------ rows


async def rows() -> list[dict[str, Any]]:
    """Of build/bench.json."""
    # A hundred nodes say a hundred times what one would say.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    found = []
    with tempfile.TemporaryDirectory(prefix="tercet-members-") as name:
        small, middle, large = (Path(name) / part for part in ("small", "middle", "large"))
        for folder in (small, middle, large):
            folder.mkdir()
        site = Site(small, 10)
        async with Swarm(small) as swarm:
            await swarm.start_all()
            await quiet(swarm)
            found += _times("wrong entry noticed", await noticed_s(site, swarm, 5), NOTICED_S_MAX)
        found += _full_checks(await full_check_s(middle, 11))
        Site(large, CLUSTER_NODES)
        async with Swarm(large) as swarm:
            await swarm.start_all()
            await quiet(swarm)
            deaths = await death_s(swarm, (50, 1, 99, 20, 0))
            found += _times(f"death known to all of {CLUSTER_NODES}", deaths, DEAD_S_MAX)
        found += await _beside(large)
    return found


async def _beside(folder: Path) -> list[dict[str, Any]]:
    async with process(folder, 1, CLUSTER_NODES - 1) as others, process(folder, 0, 0) as daemon:
        await until_calm(daemon.pid)
        share = statistics.median([await cpu_percent(daemon.pid, 5.0) for _ in range(5)])
        slower = await experiment(daemon.pid, others.pid)
    beside = "work beside the daemon is slower by"
    return [
        _row(f"daemon's CPU among {CLUSTER_NODES}", share, "% of a core", CPU_PERCENT_MAX),
        _row(beside, slower.percent, "%", CPU_PERCENT_MAX),
        _row(f"{beside}, 95 % confidence: from", slower.low, "%", None),
        _row(f"{beside}, 95 % confidence: to", slower.high, "%", None),
    ]


def _full_checks(took: Sequence[Took]) -> list[dict[str, Any]]:
    case = f"full check of {CHECKED_ENTRIES} entries"
    own_s = [each.own_s for each in took]
    processor_s = statistics.median([each.processor_s for each in took])
    return [
        *_times(case, [each.wall_s for each in took], FULL_CHECK_S_MAX),
        _row(f"{case}, without waiting for a core, longest", max(own_s), "s", FULL_CHECK_S_MAX),
        _row(f"{case}, processor time of both nodes, median", processor_s, "s", None),
    ]


def _times(case: str, values: Sequence[float], goal: float) -> list[dict[str, Any]]:
    return [
        _row(f"{case}, median of {len(values)}", statistics.median(values), "s", goal),
        _row(f"{case}, longest", max(values), "s", goal),
    ]


def _row(case: str, value: float, unit: str, goal: float | None) -> dict[str, Any]:
    return {
        "suite": "membership",
        "case": case,
        "value": round(value, 3),
        "unit": unit,
        "floor": None,
        "ratio": None,
        "goal": goal,
        "holds": None if goal is None else value <= goal,
    }
