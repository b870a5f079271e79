"""ANA failover by the kernel's multipath while fio writes and verifies: no I/O error reaches it.

Every write that fio was told is done is read back by it (crc32c), so a completion that was lost,
done twice or given too early shows as a difference; an error ends fio at once.
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Self

import pytest

from tercet_e2e.evidence import record
from tercet_e2e.linux.engines import Engines, Node
from tercet_e2e.linux.nvme import FIO_S, Host, fio, until

pytestmark = [pytest.mark.linux, pytest.mark.asyncio(loop_scope="session")]

SPAN_MIB = 24
RUN_S = 30
KEEP_ALIVE_S = 5


async def connected(host: Host, engines: Engines) -> str:
    """All three paths; the head's device."""
    await host.connect_all(engines.nodes[0].address)
    await host.wait_live(len(engines.nodes))
    return await host.device()


class Load:
    """fio on a device, beside what is done to its paths."""

    def __init__(self, host: Host, file: str, seconds: int = RUN_S) -> None:
        words = fio(file, SPAN_MIB, depth=8, seconds=seconds)
        self._task = asyncio.create_task(host.guest.run(words, FIO_S))

    async def __aenter__(self) -> Self:
        await asyncio.sleep(3)
        assert not self._task.done(), await self._task
        return self

    async def __aexit__(self, kind, *_) -> None:
        if kind is not None:
            self._task.cancel()
            return
        assert not self._task.done(), "the load ended before the faults did: make it longer"
        await self._task


async def test_fio_notices_a_block_that_is_not_what_it_wrote(host, engines):
    """What all tests here rest on."""
    device = await connected(host, engines)
    load = fio(device, 4, depth=8, seconds=RUN_S)
    spoil = f"dd if=/dev/urandom of={device} bs=4k count=1 seek=$((n % 1024)) oflag=direct"
    done = await host.guest.attempt(
        f"{load} & fio=$!; n=0\n"
        f"while kill -0 $fio; do {spoil} 2>/dev/null; n=$((n + 7)); done\n"
        f"wait $fio",
        FIO_S,
    )
    assert done.code != 0
    assert "verify: bad" in done.text, done.text


async def test_killed_primaries_cost_no_io_error(host, engines):
    """kill -9 of the engine that serves, one after the other, three times."""
    started_s = time.monotonic()
    device = await connected(host, engines)
    async with Load(host, device):
        for _ in range(3):
            primary = await engines.wait_whole(host.volume)
            engines.signal(primary)
            successor = await engines.wait_serving(host.volume, primary)
            await host.wait_optimized(successor.address)
            await asyncio.sleep(1)
    await host.wait_live(len(engines.nodes))
    assert await engines.equal_sums(host.volume) > 0
    record("linux_failovers_under_fio", 3, 0, time.monotonic() - started_s)


async def test_the_three_paths_fail_one_after_the_other(host, engines):
    """Each node is lost for longer than the reconnect delay, and comes back before the next."""
    device = await connected(host, engines)

    async def connecting(node: Node) -> bool:
        return (await host.paths())[node.address].state == "connecting"

    async with Load(host, device, seconds=60):
        for node in engines.nodes:
            await engines.wait_whole(host.volume)
            engines.lose(node)
            await until(lambda node=node: connecting(node), f"the path to {node.name} is lost")
            left = await engines.wait_serving(host.volume, node)
            await host.wait_optimized(left.address)
            engines.revive(node)
            await host.wait_live(len(engines.nodes))
    assert await engines.equal_sums(host.volume) > 0


async def test_io_waits_while_no_path_is_left_and_goes_on(host, engines):
    """W6: nothing errors. All nodes are away for longer than the Keep Alive."""
    device = await connected(host, engines)
    async with Load(host, device):
        for node in engines.nodes:
            engines.lose(node)
        await asyncio.sleep(KEEP_ALIVE_S * 2)
        assert not any(path.state == "live" for path in (await host.paths()).values())
        for node in engines.nodes:
            engines.revive(node)
        await host.wait_live(len(engines.nodes))
    assert await engines.equal_sums(host.volume) > 0


async def test_a_primary_that_hangs_is_left_and_found_again(host, engines):
    """SIGSTOP: connections stay, nothing answers. The others take over; Linux's Keep Alive ends
    the path; what it had sent there before must not be done after (L1, H2)."""
    device = await connected(host, engines)
    async with Load(host, device, seconds=45):
        primary = await engines.wait_whole(host.volume)
        engines.signal(primary, signal.SIGSTOP)
        try:
            successor = await engines.wait_serving(host.volume, primary)
            await host.wait_optimized(successor.address)
        finally:
            engines.signal(primary, signal.SIGCONT)
        await host.wait_live(len(engines.nodes))
    assert await engines.equal_sums(host.volume) > 0


async def test_a_volume_that_is_handed_over_keeps_its_paths(host, engines):
    """H4: orderly, after commands are answered; the path there turns optimized by an event."""
    device = await connected(host, engines)
    async with Load(host, device):
        for number in range(3):
            primary = await engines.wait_whole(host.volume)
            others = [node for node in engines.nodes if node is not primary]
            successor = await engines.hand_over(host.volume, others[number % 2])
            await host.wait_optimized(successor.address)
            await host.wait_live(len(engines.nodes))
    assert await engines.equal_sums(host.volume) > 0


async def test_a_mounted_file_system_does_not_notice_a_failover(host, engines):
    device = await connected(host, engines)
    await host.guest.run(f"mkfs.ext4 -q {device} && mount -t ext4 -o errors=panic {device} /mnt")
    async with Load(host, "/mnt/file"):
        primary = await engines.wait_whole(host.volume)
        engines.signal(primary)
        await engines.wait_serving(host.volume, primary)
    await host.guest.run(f"umount /mnt && e2fsck -fn {device}")


async def test_reset_controllers_come_back_under_load(host, engines):
    device = await connected(host, engines)
    async with Load(host, device):
        for path in (await host.paths()).values():
            await host.guest.run(f"nvme reset /dev/{path.controller}")
            await host.wait_live(len(engines.nodes))
    assert await engines.equal_sums(host.volume) > 0


async def test_a_host_that_stops_is_forgotten_after_its_keep_alive(host, engines):
    """KATO: the machine stands still, so its connections stay and say nothing."""
    await connected(host, engines)

    async def forgotten() -> bool:
        found = [await engines.replica(node, host.volume) for node in engines.nodes]
        return all(replica is not None and not replica.hosts for replica in found)

    began_s = time.monotonic()
    host.guest.machine.freeze()
    try:
        await until(forgotten, "its associations have ended")
        assert time.monotonic() - began_s > KEEP_ALIVE_S * 0.5
    finally:
        host.guest.machine.thaw()
    await host.wait_live(len(engines.nodes))
    await host.kernel_said()  # a machine that stood still for long says so itself


async def test_two_hosts_share_a_volume_over_a_failover(host, engines, machine):
    """Each writes its own half; both hear of the change and neither sees an error."""
    async with machine(2) as second_guest:
        second = Host(second_guest, host.volume)
        both = [*host.volume.attachments]
        both.append(type(both[0])(node="second", host_nqn=second_guest.host_nqn))
        engines.objects.attach(host.volume.id, both)
        device, other = await connected(host, engines), await connected(second, engines)
        half = host.volume.size_bytes // 2
        loads = [
            asyncio.create_task(
                one.guest.run(f"{fio(file, SPAN_MIB, depth=8, seconds=20)} {more}", FIO_S)
            )
            for one, file, more in ((host, device, ""), (second, other, f"--offset={half}"))
        ]
        await asyncio.sleep(3)
        primary = await engines.wait_whole(host.volume)
        engines.signal(primary)
        successor = await engines.wait_serving(host.volume, primary)
        await host.wait_optimized(successor.address)
        await second.wait_optimized(successor.address)
        assert not any(load.done() for load in loads)
        await asyncio.gather(*loads)
        await second.disconnect()
    assert await engines.equal_sums(host.volume) > 0
