"""How fast a lost replica is rebuilt on another node, and what a host feels of it (C3).

A member's StorageNode is given up (deleted), so its replica is copied to the node that has none:
once while no host is at work, once beside a host that writes at depth 1. The floor is the disk's
own sequential write of 128 KiB at depth 8 on a prewritten file; source, target and the host share
that disk and the cores. A host's p99 is taken from runs of a few seconds before and during the
copy, medians.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

from tercet_api.names import API_VERSION, STORAGENODES
from tercet_e2e.bench import book
from tercet_e2e.bench.cases import Case
from tercet_e2e.bench.fleet import Fleet, is_whole, primary
from tercet_e2e.bench.floor import BenchError, fio, prewrite
from tercet_e2e.kube import group
from tercet_e2e.local import is_ready

VOLUME = "bench-rebuild"
VOLUME_BYTES = 1 << 30
SEQUENTIAL = Case("128 KiB sequential write", "write", 128 * 1024, 8, False, "mib_per_s", 0, None)
FLOOR_S = 3
LOAD_S = 3
LOADS = 3
"""Before the copy; during it as many as fit."""
GOAL_RATIO = 0.6
GOAL_LATENCY = 2.0
MIB = 1 << 20


async def rows(fleet: Fleet, floor_file: Path, suite: str) -> list[book.Row]:
    """Of build/bench.json. The cluster gets a fourth node."""
    await asyncio.to_thread(prewrite, floor_file)
    floors = [(await asyncio.to_thread(fio, floor_file, SEQUENTIAL, FLOOR_S)).value]
    floor_file.unlink()
    print(
        f"the disk writes {floors[0]:.0f} MiB/s; a fourth node, a volume written over", flush=True
    )
    spare = await fleet.cluster.add_node()
    await fleet.until(f"{spare} is Ready", lambda: is_ready(fleet.node(spare)))
    await fleet.make([VOLUME], VOLUME_BYTES)
    await _load(fleet, "--rw", "write", "--depth", "8", "--block-bytes", "131072", seconds=12)
    idle = await _rebuild(fleet)
    print(f"rebuilt at {idle:.0f} MiB/s while no host is at work", flush=True)
    before = [await _p99_us(fleet) for _ in range(LOADS)]
    during: list[float] = []
    copying = asyncio.create_task(_rebuild(fleet))
    while not copying.done():
        during.append(await _p99_us(fleet))
    busy = await copying
    if len(during) > 1:
        during.pop()  # the copy ended in it
    said = f"p99 {statistics.median(before):.0f} us before, {statistics.median(during):.0f} during"
    print(f"rebuilt at {busy:.0f} MiB/s beside a host: {said}", flush=True)
    await fleet.remove([VOLUME])
    return [
        _speed(suite, "rebuild, no host at work", idle, floors[0]),
        _speed(suite, "rebuild beside a host that writes at depth 1", busy, floors[0]),
        _latency(suite, statistics.median(during), statistics.median(before)),
    ]


async def _rebuild(fleet: Fleet) -> float:
    """Give up a member that does not lead; MiB/s from then until the newcomer is in sync."""
    volume = fleet.volume(VOLUME)
    members = {member["node"] for member in volume["status"]["config"]["members"]}
    lost = min(members - {primary(volume)})
    (newcomer,) = set(fleet.cluster.nodes) - members
    path = group(API_VERSION, STORAGENODES, lost)
    began_s = time.monotonic()
    await fleet.kube.delete(path)

    def is_there() -> bool:
        found = fleet.volume(VOLUME)
        now = {member["node"] for member in found["status"]["config"]["members"]}
        return newcomer in now and lost not in now and is_whole(found)

    await fleet.until(f"{newcomer} has the replica of {lost}", is_there)
    took_s = time.monotonic() - began_s
    await fleet.until(f"{lost} is forgotten", lambda: not fleet.node(lost))
    await fleet.cluster.register(lost)
    await fleet.until(f"{lost} is Ready", lambda: is_ready(fleet.node(lost)))
    return VOLUME_BYTES / MIB / took_s


async def _p99_us(fleet: Fleet) -> float:
    found = await _load(fleet, seconds=LOAD_S)
    return float(found["p99_us"])


async def _load(fleet: Fleet, *more: str, seconds: int) -> dict[str, Any]:
    """One run of the host; without more words it writes at random at depth 1."""
    process = await asyncio.create_subprocess_exec(
        fleet.program,
        *(word for word in fleet.arguments(VOLUME, VOLUME_BYTES) if not more or word != "--random"),
        *more,
        "--seconds",
        str(seconds),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    out, _ = await process.communicate()
    if process.returncode != 0:
        raise BenchError(f"the host's load ended with {process.returncode}")
    found: dict[str, Any] = json.loads(out)
    if found["errors"]:
        raise BenchError(f"{found['errors']} operations failed")
    return found


def _speed(suite: str, case: str, value: float, floor: float) -> book.Row:
    ratio = value / floor
    return {
        "suite": suite,
        "case": case,
        "value": round(value, 1),
        "unit": "MiB/s",
        "floor": round(floor, 1),
        "ratio": round(ratio, 3),
        "goal": GOAL_RATIO,
        "holds": ratio >= GOAL_RATIO,
    }


def _latency(suite: str, during_us: float, before_us: float) -> book.Row:
    ratio = during_us / before_us
    return {
        "suite": suite,
        "case": "4 KiB write, depth 1, p99 during a rebuild",
        "value": round(during_us, 1),
        "unit": "us",
        "floor": round(before_us, 1),
        "ratio": round(ratio, 3),
        "goal": GOAL_LATENCY,
        "holds": ratio <= GOAL_LATENCY,
    }
