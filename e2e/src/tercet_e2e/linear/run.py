"""`python -m tercet_e2e linear`: what hosts are told while everything goes wrong, judged.

A cluster of real processes whose three nodes and three hosts are parted by wires (`wires`); the
hosts read and write the same few blocks (`hosts`) while a plan of faults, drawn from a seed, is
carried out (`plan`, `nemesis`). Then all is healed, the hosts must get on, the volume must become
whole with equal replicas, and Porcupine judges whether there is an order of all operations that
explains what every host was told (`judge`). The seed gives the faults and their times; what the
processes make of them differs from run to run.

Whatever does not hold leaves histories, logs and the story of the faults in build/linear-SEED.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tercet_e2e import evidence
from tercet_e2e.bench.fleet import Fleet, epoch
from tercet_e2e.errors import E2eError
from tercet_e2e.linear import filler as filling
from tercet_e2e.linear import hosts as hosting
from tercet_e2e.linear import judge as judging
from tercet_e2e.linear.hosts import HABITS, Host
from tercet_e2e.linear.nemesis import Nemesis
from tercet_e2e.linear.network import Network
from tercet_e2e.linear.plan import plan
from tercet_e2e.local import LocalCluster

SECONDS = 120
VOLUME = "linear"
VOLUME_BYTES = 4 << 20
BLOCKS = 512
"""Few at a time (the recorder has hot ones); the judge's work grows with what one has seen."""
NODES = ("node-1", "node-2", "node-3")
DEVICE_BYTES = 256 << 20
TELL_EVERY_S = 5.0
HEAL_TIMEOUT_S = 60.0
HEALED_OPERATIONS = 20
"""Of each host, after everything is healed."""
VERIFY_TIMEOUT_S = 120.0

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What a run gave."""

    seed: int
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    judged: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    packets: dict[str, int] = field(default_factory=dict)
    takeovers: int = 0
    longest_gap_s: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {**vars(self), "holds": self.holds}


async def run(
    root: Path, seconds: int = SECONDS, seed: int | None = None, engine: Path | None = None
) -> Outcome:
    """One run, told as it goes on; rows of evidence where they are asked for."""
    chosen = random.SystemRandom().randrange(1 << 48) if seed is None else seed
    print(f"linear: seed {chosen}, {seconds} s", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="te-"))
    outcome = Outcome(chosen)
    try:
        program = await asyncio.to_thread(judging.program)
        try:
            await Run(folder, outcome, seconds, program, engine).run()
        except E2eError as error:
            outcome.problems.append(f"not finished: {error}")
        if not outcome.holds or "TERCET_KEEP" in os.environ:
            _keep(folder, root / "build" / f"linear-{chosen}", outcome)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _record(outcome)
    return outcome


class Run:
    """One run in a folder."""

    def __init__(
        self, folder: Path, outcome: Outcome, seconds: int, program: Path, engine: Path | None
    ) -> None:
        self._folder = folder
        self._outcome = outcome
        self._seconds = seconds
        self._program = program
        self._engine = engine
        self._histories = folder / "histories"
        self._histories.mkdir()

    async def run(self) -> None:
        """From the start of the cluster to the verdict."""
        out = self._outcome
        async with AsyncExitStack() as stack:
            ends = [*NODES, *HABITS, filling.HOST]
            network = await stack.enter_async_context(Network(ends, out.seed))
            cluster = LocalCluster(
                self._folder / "c",
                device_bytes=DEVICE_BYTES,
                network=network,
                csi=False,
                engine=self._engine,
            )
            await stack.enter_async_context(cluster)
            await cluster.wait_ready()
            fleet = await stack.enter_async_context(Fleet(cluster))
            filler = filling.Filler(fleet, network)
            await fleet.make([VOLUME], VOLUME_BYTES, list(HABITS))
            await filler.make()
            common = ["--nqn", fleet.nqn(VOLUME), "--blocks", str(BLOCKS), "--log-format", "json"]
            for endpoint in fleet.endpoints():
                common += ["--endpoint", endpoint]
            hosts = hosting.make(common, network, fleet.program, self._histories, out.seed)
            for host in hosts:
                stack.push_async_callback(host.drop)
                await host.begin()
            nemesis = Nemesis(fleet, VOLUME, network, hosts, filler)
            await self._trouble(fleet, nemesis, hosts)
            if await self._healed(fleet, hosts):
                await self._equal(cluster, network)
        await self._judge(hosts)

    async def _trouble(self, fleet: Fleet, nemesis: Nemesis, hosts: Sequence[Host]) -> None:
        out, began_s, first = self._outcome, time.monotonic(), epoch(fleet.volume(VOLUME))
        telling = asyncio.create_task(self._tell(fleet, nemesis, hosts))
        try:
            await nemesis.run(plan(out.seed, self._seconds, list(HABITS)))
            left_s = began_s + self._seconds - time.monotonic()
            await asyncio.sleep(max(0.0, left_s))
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            (self._histories / "story.txt").write_text("\n".join(nemesis.story) + "\n")
        out.seconds = time.monotonic() - began_s
        out.faults = {kind.value: count for kind, count in sorted(nemesis.done.items())}
        out.missed, out.packets = nemesis.missed, nemesis.packets
        out.takeovers = epoch(fleet.volume(VOLUME)) - first

    async def _tell(self, fleet: Fleet, nemesis: Nemesis, hosts: Sequence[Host]) -> None:
        began_s, before = time.monotonic(), 0
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            for host in hosts:
                host.check()
            done = sum(host.look() for host in hosts)
            print(
                f"{time.monotonic() - began_s:4.0f} s: {done} operations (+{done - before}), epoch "
                f"{epoch(fleet.volume(VOLUME))}, {', '.join(nemesis.going_on) or 'all is well'}",
                flush=True,
            )
            before = done

    async def _healed(self, fleet: Fleet, hosts: Sequence[Host]) -> bool:
        """Whether everything gets on again in time; the hosts end in order."""
        problems, began_s = self._outcome.problems, time.monotonic()
        before = {host.name: host.look() for host in hosts}
        waiting = list(hosts)
        while waiting and time.monotonic() - began_s < HEAL_TIMEOUT_S:
            await asyncio.sleep(0.2)
            waiting = [h for h in waiting if h.look() - before[h.name] < HEALED_OPERATIONS]
        problems += [f"{h.name} does not get on {HEAL_TIMEOUT_S:.0f} s after" for h in waiting]
        ended = await asyncio.gather(*(host.end() for host in hosts), return_exceptions=True)
        problems += [str(error) for error in ended if error is not None]
        try:
            await fleet.whole([VOLUME, filling.VOLUME])
        except E2eError as error:
            problems.append(str(error))
        if not problems:
            print(
                f"all is well {time.monotonic() - began_s:.1f} s after the last fault", flush=True
            )
        return not problems

    async def _equal(self, cluster: LocalCluster, network: Network) -> None:
        """The replicas are equal, byte for byte."""
        command = [*network.enter(NODES[0]), str(Path(sys.executable).parent / "tercet")]
        command += ["volume", "verify", VOLUME, f"--kubeconfig={cluster.kubeconfig}"]
        verifying = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        told, _ = await asyncio.wait_for(verifying.communicate(), VERIFY_TIMEOUT_S)
        if verifying.returncode != 0:
            self._outcome.problems.append(f"volume verify: {told.decode(errors='replace')}")

    async def _judge(self, hosts: Sequence[Host]) -> None:
        out = self._outcome
        histories = {host.name: host.histories for host in hosts}
        out.longest_gap_s = hosting.longest_gap_s(p for all_ in histories.values() for p in all_)
        picture = self._histories / "bad.html"
        out.judged = await judging.judge(self._program, histories, picture)
        if out.judged["verdict"] != "linearizable":
            blocks = ", ".join(str(block) for block in out.judged["bad"])
            out.problems.append(f"{out.judged['verdict']}: blocks {blocks}")


def _keep(folder: Path, target: Path, outcome: Outcome) -> None:
    """Histories, logs and the outcome stay."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for part in (folder / "histories", folder / "c" / "logs"):
        if part.exists():
            shutil.copytree(part, target / part.name)
    (target / "outcome.json").write_text(json.dumps(outcome.as_json(), indent=1) + "\n")
    print(f"histories and logs are in {target}", flush=True)


def _record(outcome: Outcome) -> None:
    violations = len(outcome.problems)
    operations = int(outcome.judged.get("operations", 0))
    evidence.record("linear_operations", operations, violations, outcome.seconds)
    evidence.record("linear_faults", sum(outcome.faults.values()), 0, outcome.seconds)
    evidence.record("linear_takeovers", outcome.takeovers, 0, outcome.seconds)


def told(outcome: Outcome) -> list[str]:
    """The outcome in words."""
    judged = outcome.judged
    count = {name: judged.get(name, 0) for name in judging.COUNTS}
    faults = ", ".join(f"{kind} {number}" for kind, number in outcome.faults.items())
    asked = f"{count['reads']} reads, {count['writes']} writes, {count['zeroes']} of zeroes"
    unsure = f"{count['unknown']} of unknown outcome, {count['failed']} refused"
    waits = f"longest time without an answer {outcome.longest_gap_s:.1f} s, longest operation"
    verdict = judged.get("verdict", "none")
    return [
        f"{count['operations']} operations ({asked}), {unsure}, {count['sent_again']} sent again",
        f"{sum(outcome.faults.values())} faults in {outcome.seconds:.0f} s: {faults}",
        "packets: " + ", ".join(f"{name} {number}" for name, number in outcome.packets.items()),
        f"{outcome.takeovers} takeovers, {waits} {judged.get('longest_stall_s', 0):.1f} s",
        *(f"not done: {words}" for words in outcome.missed),
        *judged.get("story", []),
        *(f"VIOLATION: {problem}" for problem in outcome.problems),
        f"verdict: {verdict} (Porcupine, {judged.get('seconds', 0):.1f} s); seed {outcome.seed}",
    ]
