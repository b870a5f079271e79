"""Runs the benchmark: floor and volume in turns, round after round, the idle processes; membership.

Medians of interleaved runs, so that a disk that slows down slows both. Writes build/bench.json.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Any

from tercet_e2e import report
from tercet_e2e.bench import (
    book,
    failover,
    idle,
    membership,
    noderep,
    passthrough,
    store,
    volume,
)
from tercet_e2e.bench.cases import CASES, Case, row
from tercet_e2e.bench.floor import fio, prewrite, round_trip_us
from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster, Programs

ROUNDS = 3
SECONDS = 3
FILL_SECONDS = 12
IDLE_SECONDS = 10.0
SETTLE_SECONDS = 5.0
FILL = Case("fill", "write", 128 * 1024, 8, False, "mib_per_s", 0, 0.0)


class Suite(StrEnum):
    """What can be measured alone."""

    STORE = "store"
    VOLUME = "volume"
    MEMBERSHIP = "membership"
    NODEREP = "noderep"
    FAILOVER = "failover"
    PASSTHROUGH = "passthrough"


ALONE = (Suite.PASSTHROUGH,)
"""Only when asked for: what a virtual machine in software emulation says has no other use."""


async def run(root: Path, only: Suite | None, trials: int = failover.TRIALS) -> int:
    """Measure and print; 0 also when a goal does not hold: the table says so."""
    everything = (suite for suite in Suite if suite not in ALONE)
    for suite in everything if only is None else (only,):
        match suite:
            case Suite.STORE:
                book.write(root, await asyncio.to_thread(store.rows, root))
            case Suite.VOLUME:
                book.write(root, await _volume())
            case Suite.MEMBERSHIP:
                book.write(root, await membership.rows())
            case Suite.NODEREP:
                await asyncio.to_thread(noderep.run, root)
            case Suite.FAILOVER:
                book.write(root, await failover.run(root, trials))
            case Suite.PASSTHROUGH:
                book.write(root, await asyncio.to_thread(passthrough.rows, root))
    return report.report(root)


async def _volume() -> list[dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(prefix="tercet-bench-"))
    try:
        async with LocalCluster(folder) as cluster:
            await cluster.wait_ready()
            return await _measure(cluster, folder / "floor")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _measure(cluster: LocalCluster, file: Path) -> list[dict[str, Any]]:
    kubectl = Kubectl(cluster.kubectl)
    attach = str(Programs.find().attach)
    made = await volume.make(kubectl)
    print("writing the floor's file and the volume once over", flush=True)
    await asyncio.to_thread(prewrite, file)
    await volume.load(attach, made, FILL, FILL_SECONDS)
    values: dict[str, list[float]] = {case.name: [] for case in CASES}
    floors: dict[str, list[float]] = {case.name: [] for case in CASES}
    trips = []
    for number in range(1, ROUNDS + 1):
        trips.append(await asyncio.to_thread(round_trip_us))
        for case in CASES:
            floor = await asyncio.to_thread(fio, file, case, SECONDS)
            floors[case.name].append(floor.value)
            values[case.name].append(await volume.load(attach, made, case, SECONDS))
            said = f"floor {floors[case.name][-1]:.1f}, volume {values[case.name][-1]:.1f}"
            print(f"round {number} of {ROUNDS}: {case.name}: {said}", flush=True)
    trip_us = sorted(trips)[len(trips) // 2]
    rows = [row(case, values[case.name], floors[case.name], trip_us) for case in CASES]
    print(f"idle for {SETTLE_SECONDS + IDLE_SECONDS:.0f} s", flush=True)
    await asyncio.sleep(SETTLE_SECONDS)
    rows += await asyncio.to_thread(idle.rows, _pids(cluster), IDLE_SECONDS)
    await volume.remove(kubectl)
    return rows


def _pids(cluster: LocalCluster) -> dict[str, int]:
    wanted = [(part, "") for part in ("operator", "csi-controller")]
    wanted += [
        (part, node)
        for part in ("engine", "agent", "csi-node", "attach")
        for node in sorted(cluster.nodes)
    ]
    found = {f"{part} {node}".strip(): cluster.pid(part, node) for part, node in wanted}
    return {name: pid for name, pid in found.items() if pid is not None}
