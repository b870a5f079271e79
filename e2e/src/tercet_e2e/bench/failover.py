"""`bench failover`: how long a host stands still when its primary dies or leaves, trial by trial.

One volume of three replicas on this machine, a host that writes at depth 1 without pause, and one
fault a trial; between two trials the volume is whole again, and so is each node, its agent
included, and has been for a lease's time. A trial's figure is the longest write from the fault
until then, so a second pause on the way back counts too. Then two hundred volumes whose primary is
one node, which dies; then rebuilds (`rebuilding`). What a fault is:

- *engine killed*: kill -9 of the primary's engine; its supervisor starts another at once;
- *node lost*: kill -9 of supervisor, engine and agent at one time; they stay away for the trial.
  Their connections end with them, as with a kernel that panics no connection does:
- *node silent*: SIGSTOP of the three. Connections stand and nobody answers, as with a node whose
  power or network is gone; nothing but time tells;
- *hand-over asked*: the engine's control API is asked to hand the volume over (T10), as a drain is;
- *engine stopped*: SIGTERM of the engine, as an upgrade of its pod does.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tercet_e2e import faults
from tercet_e2e.bench import book, rebuilding
from tercet_e2e.bench.distribution import Distribution, figure, rows
from tercet_e2e.bench.fleet import Fleet, epoch, primary
from tercet_e2e.bench.floor import BenchError
from tercet_e2e.bench.writer import Writer, now_ns
from tercet_e2e.local import LocalCluster

SUITE = "failover"
FIGURE = "bench-failover.svg"
TRIALS = 50
VOLUME = "bench-failover"
VOLUME_BYTES = 256 << 20
WINDOW_MS = 20
SERVED_WINDOWS = 5
DEVICE_BYTES = 6 << 30
SERVED_TIMEOUT_S = 30.0
LEASE_S = 1.0
"""D (L2): for so long an engine that has come back is no help against a second fault (L4)."""

MANY = 200
MANY_BYTES = 16 << 20
MANY_TRIALS = 3
MANY_WINDOW_MS = 200
MANY_PAUSE_MS = 200
MANY_GOAL_MS = 5000.0
MANY_TIMEOUT_S = 90.0
MANY_HAND_OVERS = 10
"""At one time."""

HOST_PIECES = (faults.SUPERVISOR, "agent")

Fault = Callable[[Fleet, str], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def engine_killed(fleet: Fleet, node: str) -> AsyncIterator[None]:
    """It comes back by itself."""
    fleet.cluster.kill(faults.ENGINE, node)
    yield


@asynccontextmanager
async def engine_stopped(fleet: Fleet, node: str) -> AsyncIterator[None]:
    """It hands over, ends, and is started again."""
    fleet.cluster.kill(faults.ENGINE, node, signal.SIGTERM)
    yield


@asynccontextmanager
async def node_lost(fleet: Fleet, node: str) -> AsyncIterator[None]:
    """Engine and agent are dead until the host is served elsewhere."""
    await fleet.cluster.lose(node, HOST_PIECES)
    yield
    await fleet.cluster.revive(node, HOST_PIECES)


@asynccontextmanager
async def node_silent(fleet: Fleet, node: str) -> AsyncIterator[None]:
    """Engine and agent stand still until the host is served elsewhere."""
    pieces = (faults.ENGINE, "agent")
    for piece in pieces:
        fleet.cluster.kill(piece, node, signal.SIGSTOP)
    try:
        yield
    finally:
        for piece in pieces:
            fleet.cluster.kill(piece, node, signal.SIGCONT)


@asynccontextmanager
async def hand_over_asked(fleet: Fleet, node: str) -> AsyncIterator[None]:
    """Everything lives on."""
    assert node == primary(fleet.volume(VOLUME))
    await fleet.hand_over(VOLUME)
    yield


@dataclass(frozen=True)
class Case:
    """A fault and what it may cost."""

    name: str
    fault: Fault
    goal_ms: float


CASES = (
    Case("hand-over asked", hand_over_asked, 100.0),
    Case("engine stopped (upgrade)", engine_stopped, 100.0),
    Case("engine killed", engine_killed, 500.0),
    Case("node silent", node_silent, 1500.0),
    Case("node lost", node_lost, 1500.0),
)


async def run(root: Path, trials: int = TRIALS) -> list[book.Row]:
    """Everything of the suite, printed as it comes."""
    folder = Path(tempfile.mkdtemp(prefix="tercet-bench-"))
    try:
        cluster = LocalCluster(folder, device_bytes=DEVICE_BYTES)
        async with cluster, AsyncExitStack() as stack:
            await cluster.wait_ready()
            fleet = await stack.enter_async_context(Fleet(cluster))
            found = await _one_volume(fleet, trials)
            made = [row for each in found for row in rows(SUITE, each)]
            async with _part("200 volumes", made):
                found.append(await _many(fleet, min(trials, MANY_TRIALS)))
                made += rows(SUITE, found[-1])
            async with _part("rebuild", made):
                made += await rebuilding.rows(fleet, folder / "floor", SUITE)
    finally:
        if "TERCET_KEEP" not in os.environ:  # to look at logs
            shutil.rmtree(folder, ignore_errors=True)
    figure(found, root / "build" / FIGURE)
    return made


@asynccontextmanager
async def _part(what: str, made: list[book.Row]) -> AsyncIterator[None]:
    """What cannot be measured is a row that says so, and takes nothing else with it."""
    try:
        yield
    except BenchError as error:
        print(f"{what}: not measured: {error}", flush=True)
        nothing = dict.fromkeys(("value", "unit", "floor", "ratio", "goal"))
        made.append({"suite": SUITE, "case": f"{what}: {error}", **nothing, "holds": False})


async def _one_volume(fleet: Fleet, trials: int) -> list[Distribution]:
    await fleet.make([VOLUME], VOLUME_BYTES)
    found = []
    async with fleet.writer(VOLUME, VOLUME_BYTES, WINDOW_MS) as writer:
        for case in CASES:
            stalls_ms = []
            for number in range(1, trials + 1):
                stalls_ms.append(await _trial(fleet, writer, case))
                print(
                    f"{case.name}: trial {number} of {trials}: {stalls_ms[-1]:.0f} ms", flush=True
                )
            found.append(Distribution(f"stall, {case.name}", "ms", stalls_ms, case.goal_ms))
    await fleet.remove([VOLUME])
    return found


async def _trial(fleet: Fleet, writer: Writer, case: Case) -> float:
    """The longest write from the fault until all is as before. Raises BenchError."""
    writer.forget()
    await writer.writes(now_ns(), SERVED_WINDOWS)
    before = fleet.volume(VOLUME)
    began_ns = now_ns()
    async with case.fault(fleet, primary(before)):
        await fleet.until(
            f"another epoch after: {case.name}",
            lambda: epoch(fleet.volume(VOLUME)) > epoch(before),
            SERVED_TIMEOUT_S,
        )
        await writer.writes(now_ns(), SERVED_WINDOWS, SERVED_TIMEOUT_S)
    await fleet.whole([VOLUME])
    await fleet.agents()
    await asyncio.sleep(LEASE_S)
    await writer.writes(now_ns(), SERVED_WINDOWS)
    return writer.longest_ms(began_ns)


# ------------------------------------------------------------------ many volumes


async def _many(fleet: Fleet, trials: int) -> Distribution:
    """Of each trial how long it took until the last of two hundred volumes took a write again."""
    names = [f"bench-{number:03}" for number in range(MANY)]
    print(f"{MANY} volumes are made", flush=True)
    await fleet.make(names, MANY_BYTES)
    found = []
    async with AsyncExitStack() as stack:
        hosts = [fleet.writer(name, MANY_BYTES, MANY_WINDOW_MS, MANY_PAUSE_MS) for name in names]
        for host in hosts:
            await stack.enter_async_context(host)
        for number in range(1, trials + 1):
            node = await _gathered(fleet, names)
            served_ms = await _lost_with_many(fleet, hosts, node, names)
            found.append(max(served_ms))
            middle = sorted(served_ms)[len(served_ms) // 2]
            said = f"half of them after {middle:.0f} ms, the last after {found[-1]:.0f} ms"
            print(f"{MANY} volumes of {node}: trial {number} of {trials}: {said}", flush=True)
    await fleet.remove(names)
    case = f"{MANY} volumes of a lost node, all serving again"
    return Distribution(case, "ms", found, MANY_GOAL_MS)


async def _lost_with_many(
    fleet: Fleet, hosts: Sequence[Writer], node: str, names: Sequence[str]
) -> list[float]:
    for host in hosts:
        host.forget()
    await asyncio.gather(*(host.writes(now_ns(), 2) for host in hosts))
    began_ns = now_ns()
    async with node_lost(fleet, node):
        # A whole window behind the fault, so that no write from before it counts.
        after_ns = began_ns + MANY_WINDOW_MS * 1_000_000
        waits = (host.writes(after_ns, 2, MANY_TIMEOUT_S) for host in hosts)
        served_ns = await asyncio.gather(*waits)
    await fleet.whole(names)
    await fleet.agents()
    return [(at_ns - began_ns) / 1e6 for at_ns in served_ns]


async def _gathered(fleet: Fleet, names: Sequence[str]) -> str:
    """All of the volumes are led by one node, which is told to take them; which."""
    nodes = sorted(fleet.cluster.nodes)
    leads = Counter(primary(fleet.volume(name)) for name in names)
    chosen = max(nodes, key=lambda node: leads[node])
    slots = asyncio.Semaphore(MANY_HAND_OVERS)

    async def give(name: str) -> None:
        async with slots:
            if primary(fleet.volume(name)) != chosen:
                await fleet.hand_over(name, chosen)

    await asyncio.gather(*(give(name) for name in names))
    await fleet.whole(names)
    elsewhere = [name for name in names if primary(fleet.volume(name)) != chosen]
    if elsewhere:
        raise BenchError(f"{len(elsewhere)} volumes are not led by {chosen}, as they were told")
    return chosen
