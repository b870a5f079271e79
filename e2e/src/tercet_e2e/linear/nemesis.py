"""Carries out a plan of faults on a running cluster, and takes every one of them back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from tercet_e2e import faults
from tercet_e2e.bench.fleet import Fleet, primary
from tercet_e2e.bench.floor import BenchError
from tercet_e2e.errors import E2eError, ProcessError
from tercet_e2e.linear.filler import Filler
from tercet_e2e.linear.hosts import Host
from tercet_e2e.linear.network import Network
from tercet_e2e.linear.plan import MEMBERS, Fault, Kind
from tercet_e2e.linear.wires import Link, LinkName, link_name

PIECES: Mapping[Kind, tuple[str, ...]] = {
    Kind.ENGINE_KILLED: (faults.ENGINE,),
    Kind.ENGINE_STOPPED: (faults.ENGINE,),
    Kind.NODE_STOPPED: (faults.ENGINE, "agent"),
    Kind.ENGINE_ENDED: (faults.ENGINE,),
    Kind.AGENT_KILLED: ("agent",),
    Kind.API_STOPPED: ("kube-apiserver",),
}
SIGNALS: Mapping[Kind, signal.Signals] = {
    Kind.ENGINE_KILLED: signal.SIGKILL,
    Kind.AGENT_KILLED: signal.SIGKILL,
    Kind.ENGINE_ENDED: signal.SIGTERM,
}
"""Of the others: SIGSTOP, and SIGCONT at the end."""

UNANSWERED_S = 0.05
"""Before a host is killed: longer than most operations take, shorter than it waits."""


def resolved(
    links: Sequence[tuple[LinkName, Link]], members: Mapping[str, str]
) -> dict[LinkName, Link]:
    """Links between what members are, as links between nodes."""
    found = {}
    for name, link in links:
        source, _, target = name.partition(">")
        found[link_name(members.get(source, source), members.get(target, target))] = link
    return found


class Nemesis:
    """Everything that goes wrong in a run."""

    def __init__(
        self, fleet: Fleet, volume: str, network: Network, hosts: Sequence[Host], filler: Filler
    ) -> None:
        self.done: Counter[Kind] = Counter()
        self.missed: list[str] = []
        self.going_on: list[str] = []
        self.packets: dict[str, int] = {}
        self._fleet = fleet
        self._volume = volume
        self._network = network
        self._hosts = {host.name: host for host in hosts}
        self._filler = filler
        self._weather: dict[int, dict[LinkName, Link]] = {}
        self._began_s = time.monotonic()
        self.story: list[str] = []

    async def run(self, plan: Sequence[Fault]) -> None:
        """All faults, each at its time; when this returns none is there any more."""
        self._began_s = time.monotonic()
        tasks = [asyncio.create_task(self._one(number, f)) for number, f in enumerate(plan)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._weather.clear()
            self.packets = await self._network.set({})

    async def _one(self, number: int, fault: Fault) -> None:
        await asyncio.sleep(self._began_s + fault.at_s - time.monotonic())
        members = self.members()
        who = members.get(fault.who, fault.who)
        words = f"{fault.kind} {fault.who and f'({who}, {fault.who})'}".strip()
        self.going_on.append(words)
        self._tell(
            f"{words} {[f'{n}: {link}' for n, link in resolved(fault.links, members).items()]}"
        )
        try:
            await self._do(number, fault, who, members)
            self.done[fault.kind] += 1
        except ProcessError as error:  # it is between two lives, by another fault
            self.missed.append(f"{words}: {error}")
        except (BenchError, E2eError) as error:
            self.missed.append(f"{words}: {error}")
        finally:
            self.going_on.remove(words)
            self._tell(f"over: {words}")

    def _tell(self, words: str) -> None:
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self.story.append(f"{time.monotonic() - self._began_s:8.3f} s ({now_ns}): {words}")

    def members(self) -> dict[str, str]:
        """Which node is what just now, as far as the tool has heard."""
        volume = self._fleet.volume(self._volume)
        nodes = [member["node"] for member in volume["status"]["config"]["members"]]
        leads = primary(volume)
        rest = sorted(node for node in nodes if node != leads)
        return dict(zip(MEMBERS, (leads, *rest), strict=True))

    async def _do(self, number: int, fault: Fault, who: str, members: Mapping[str, str]) -> None:
        if fault.kind in PIECES:
            await self._signal(fault, who)
        elif fault.kind is Kind.HOST_KILLED:
            async with self._links(number, resolved(fault.links, members)):
                await asyncio.sleep(UNANSWERED_S)
                await self._hosts[who].kill()
            await asyncio.sleep(fault.lasts_s)
            await self._hosts[who].begin()
        elif fault.kind is Kind.DISK_FULL:
            await self._filler.fill(fault.lasts_s)
        else:
            async with self._links(number, resolved(fault.links, members)):
                await asyncio.sleep(fault.lasts_s)

    async def _signal(self, fault: Fault, who: str) -> None:
        number = SIGNALS.get(fault.kind, signal.SIGSTOP)
        pids = []
        try:
            for piece in PIECES[fault.kind]:
                pids.append(self._fleet.cluster.kill(piece, who, number))  # noqa: PERF401
            await asyncio.sleep(fault.lasts_s)
        finally:
            if number is signal.SIGSTOP:
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)

    @asynccontextmanager
    async def _links(self, number: int, links: dict[LinkName, Link]) -> AsyncIterator[None]:
        self._weather[number] = links
        await self._set_weather()
        try:
            yield
        finally:
            self._weather.pop(number, None)
            await self._set_weather()

    async def _set_weather(self) -> None:
        links: dict[LinkName, Link] = {}
        for each in self._weather.values():
            links |= each
        self.packets = await self._network.set(links)
