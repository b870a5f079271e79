"""What Linux writes to a volume is what it reads: file systems, digests, every data command."""

from __future__ import annotations

import pytest

from tercet_e2e.linux.nvme import FIO_S as LONG_S
from tercet_e2e.linux.nvme import OPTIONS, Host, fio, until

pytestmark = [pytest.mark.linux, pytest.mark.asyncio(loop_scope="session")]

MAKE = {"ext4": "mkfs.ext4 -q", "xfs": "mkfs.xfs -q"}
CHECK = {"ext4": "e2fsck -fn", "xfs": "xfs_repair -n"}
FILE_MIB = 16


def fill(device: str, file: str, block: str, count: int, more: str = "") -> str:
    """Make a file of random bytes and write it to the device."""
    random = f"dd if=/dev/urandom of={file} bs={block} count={count}"
    return f"{random} && dd if={file} of={device} bs={block} oflag=direct {more}"


async def connected(host: Host, engines, options: str = OPTIONS) -> str:
    """All three paths; the head's device."""
    await host.connect_all(engines.nodes[0].address, options)
    await host.wait_live(len(engines.nodes))
    return await host.device()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_a_file_system_holds_what_fio_verifies(kind, host, engines):
    device = await connected(host, engines)
    run = host.guest.run
    await run(f"{MAKE[kind]} {device} && mount -t {kind} {device} /mnt", LONG_S)
    await run(fio("/mnt/direct", FILE_MIB), LONG_S)
    await run(fio("/mnt/large", FILE_MIB, mix="write", block="1m", depth=4), LONG_S)
    await run("cp /mnt/large /mnt/copy && sync && cmp /mnt/large /mnt/copy", LONG_S)
    await run(f"umount /mnt && {CHECK[kind]} {device}", LONG_S)
    assert await engines.equal_sums(host.volume) > 0


async def test_digests_hold_for_every_size(host, engines):
    device = await connected(host, engines, f"{OPTIONS} -g -G")
    for block, mix in (("4k", "randwrite"), ("16k", "randrw"), ("20k", "write"), ("1m", "write")):
        await host.guest.run(fio(device, 16, mix=mix, block=block), LONG_S)


async def test_reads_and_writes_hold_without_flow_control(host, engines):
    """A read then ends in its last data, with no completion behind it."""
    device = await connected(host, engines, f"{OPTIONS} --disable-sqflow")
    for mix in ("randwrite", "write"):
        await host.guest.run(fio(device, 8, mix=mix, block="16k"), LONG_S)


async def test_a_deep_queue_of_large_requests_holds(host, engines):
    """More data under way than a queue's share: what has no room waits its turn."""
    device = await connected(host, engines)
    await host.guest.run(fio(device, 64, mix="write", block="1m", depth=64), LONG_S)
    await host.guest.run(fio(device, 32, mix="randwrite", block="4k", depth=128), LONG_S)


async def test_a_mounted_file_system_grows(host, engines):
    device = await connected(host, engines)
    run = host.guest.run
    await run(f"mkfs.ext4 -q {device} && mount -t ext4 {device} /mnt", LONG_S)
    await run(fio("/mnt/before", FILE_MIB), LONG_S)
    await run("sha256sum /mnt/before > /tmp/before")
    grown = host.volume.size_bytes * 2
    await engines.grow(host.volume, grown)

    async def seen() -> bool:
        return int(await run(f"blockdev --getsize64 {device}")) == grown

    await until(seen, "the namespace has grown")
    await run(f"resize2fs {device}", LONG_S)
    blocks = int((await run("df -k /mnt | tail -n 1")).split()[1])
    assert blocks * 1024 > grown * 0.9
    await run(fio("/mnt/after", FILE_MIB), LONG_S)
    await run("sha256sum -c /tmp/before")
    await run(f"umount /mnt && e2fsck -fn {device}", LONG_S)
    said = "\n".join(await host.kernel_said())
    assert "rescanning namespaces" in said, "it was told"


async def test_trimmed_and_zeroed_blocks_read_as_zeroes(host, engines):
    device = await connected(host, engines)
    run = host.guest.run
    await run(fill(device, "/tmp/data", "1M", 8))
    await run(f"blkdiscard -o {1 << 20} -l {1 << 20} {device}")
    await run(f"nvme write-zeroes {device} -s 512 -c 255")  # the third MiB
    await run(f"nvme dsm {device} -d -s 768 -b 256")  # the fourth
    await run("cp /tmp/data /tmp/wanted")
    await run("dd if=/dev/zero of=/tmp/wanted bs=1M seek=1 count=3 conv=notrunc")
    await run(
        f"dd if={device} of=/tmp/found bs=1M count=8 iflag=direct; cmp /tmp/wanted /tmp/found"
    )
    await run("rm /tmp/data /tmp/wanted /tmp/found")


async def test_compare_tells_equal_from_different(host, engines):
    device = await connected(host, engines)
    run = host.guest.run
    await run(fill(device, "/tmp/one", "4k", 2, "seek=8"))
    compare = f"nvme compare {device} -s 8 -c 1 -z 8192 -d"
    await run(f"{compare} /tmp/one")
    await run("cp /tmp/one /tmp/two; printf x | dd of=/tmp/two bs=1 seek=5000 conv=notrunc")
    done = await host.guest.attempt(f"{compare} /tmp/two")
    assert done.code != 0
    assert "COMPARE_FAILED" in done.text or "Compare Failure" in done.text, done.text


async def test_flush_verify_and_copy_do_what_they_say(host, engines):
    device = await connected(host, engines)
    run = host.guest.run
    await run(fill(device, "/tmp/one", "4k", 8))
    await run(f"nvme flush {device} -n 1")
    await run(f"nvme verify {device} -s 0 -c 7")
    await run(f"nvme copy {device} --sdlba=100 --slbs=0,4 --blocks=3,3 --format=0")
    await run(
        f"dd if={device} of=/tmp/two bs=4k skip=100 count=8 iflag=direct; cmp /tmp/one /tmp/two"
    )
    done = await host.guest.attempt(
        f"nvme verify {device} -s {host.volume.size_bytes // 4096} -c 0"
    )
    assert done.code != 0, "behind the end"
