"""The paths of an attached volume follow its members: whom to believe, and what becomes of it.

Members' discovery services are real sockets here that speak the wire (`Member`); the attacher is a
fake that says which paths it has, and the kernel's host a copy of what sysfs looks like.
"""

import asyncio
import contextlib
import struct
from pathlib import Path

import pytest

from tercet_api.names import host_id, host_nqn, volume_nqn
from tercet_csi.errors import Unavailable
from tercet_csi.locks import ObjectLocks
from tercet_csi.node import paths as node_paths
from tercet_csi.node.discovery import Discovery, DiscoveryError, Identity, parse_log
from tercet_csi.node.kernel import KernelAttacher
from tercet_csi.node.paths import PathFollower, Wanted, current, decide
from tercet_csi.node.records import Records, Staged
from tercet_csi.node.targets import Paths, Target

VOLUME = "0b0c0d0e-0000-4000-8000-000000000001"
NQN = volume_nqn(VOLUME)
ME = Identity(host_nqn("n1"), host_id("n1"))
A, B, C, D = (("127.0.1.1", 4420), ("127.0.1.2", 4420), ("127.0.1.3", 4420), ("127.0.1.4", 4420))
SOON_S = 5.0


def told(*endpoints):
    return {NQN: frozenset(endpoints)}


def has(*endpoints, optimized=None):
    return Paths(frozenset(endpoints), optimized)


# ------------------------------------------------------------------ whom to believe


def test_what_the_serving_member_names_is_what_there_shall_be():
    logs = {A: told(A, B, D), B: told(A, B, D), D: told(A, B, D)}
    found = decide(NQN, has(A, B, C, optimized=A), logs)
    assert found == Wanted(frozenset({A, B, D}), settled=True)


def test_a_member_that_was_away_does_not_bring_a_former_one_back():
    logs = {A: told(A, B, D), B: told(A, B, C), C: told(A, B, C), D: told(A, B, D)}
    assert decide(NQN, has(A, B, D, optimized=A), logs).endpoints == {A, B, D}


def test_without_a_serving_member_paths_are_added_and_none_is_dropped():
    logs = {A: told(A, B, D), B: told(A, B, C), D: told(A, B, D)}
    found = decide(NQN, has(A, B, C), logs)
    assert found == Wanted(frozenset({A, B, C, D}), settled=False)


def test_a_newcomer_is_connected_when_it_answers():
    logs = {A: told(A, B, D)}
    assert decide(NQN, has(A, B, C, optimized=A), logs) == Wanted(frozenset({A, B}), settled=False)


def test_a_dead_member_keeps_its_path_while_it_is_a_member():
    logs = {A: told(A, B, C)}
    assert decide(NQN, has(A, B, C, optimized=A), logs) == Wanted(frozenset({A, B, C}), True)


@pytest.mark.parametrize("logs", [{}, {A: {}}, {D: told(D)}])
def test_what_nobody_asked_says_changes_nothing(logs):
    assert decide(NQN, has(A, B, C, optimized=A), logs) == Wanted(frozenset({A, B, C}), False)


def test_no_path_is_optimized_when_two_claim_it():
    assert Paths.of({A: True, B: True, C: False}).optimized is None
    assert Paths.of({A: True, B: False}).optimized == A


# ------------------------------------------------------------------ the wire


def log_page(generation, records):
    head = struct.pack("<QQ", generation, len(records)).ljust(1024, b"\0")
    out = [head]
    for nqn, (address, port) in records:
        record = bytearray(1024)
        record[0], record[1], record[2] = 3, 1, 2
        record[32:64] = str(port).encode().ljust(32)
        record[256 : 256 + len(nqn)] = nqn.encode()
        record[512:768] = address.encode().ljust(256)
        out.append(bytes(record))
    return b"".join(out)


class Member:
    """A discovery service: whose log it has, and who asked."""

    def __init__(self):
        self.generation = 1
        self.records = []
        self.events = []
        self.hosts = []
        self.writers = []
        self.change_while_read = 0

    async def start(self, address="127.0.0.1", port=0):
        self.server = await asyncio.start_server(self.serve, address, port)
        self.endpoint = self.server.sockets[0].getsockname()[:2]
        return self

    async def stop(self):
        self.server.close()
        for writer in self.writers:
            writer.close()

    def tell(self, *endpoints):
        self.records = [(NQN, endpoint) for endpoint in endpoints]
        self.generation += 1
        for writer, command in self.events:
            self.answer(writer, command, result=2 | 0xF0 << 8 | 0x70 << 16)
        self.events.clear()

    def answer(self, writer, command, result=0, status=0):
        writer.write(struct.pack("<BBBBIQHHHH", 5, 0, 24, 0, 24, result, 0, 0, command, status))

    async def serve(self, reader, writer):
        self.writers.append(writer)
        with contextlib.suppress(EOFError, ConnectionError):
            request = await reader.readexactly(128)
            assert request[:8] == struct.pack("<BBBBI", 0, 0, 128, 0, 128)
            writer.write(struct.pack("<BBBBI", 1, 0, 128, 0, 128).ljust(128, b"\0"))
            while True:
                head = await reader.readexactly(8)
                (size,) = struct.unpack_from("<I", head, 4)
                body = await reader.readexactly(size - 8)
                self.command(writer, body[:64], body[64:])

    def command(self, writer, entry, data):
        opcode, command, kind = entry[0], struct.unpack_from("<H", entry, 2)[0], entry[4]
        if opcode == 0x7F and kind == 1:
            assert len(data) == struct.unpack_from("<I", entry, 32)[0] == 1024
            self.hosts.append(data[512:768].rstrip(b"\0").decode())
            self.answer(writer, command, result=1)
        elif opcode == 0x7F:
            self.answer(writer, command, result=1 if kind == 4 else 0)
        elif opcode == 0x0C:
            self.events.append((writer, command))
        elif opcode == 0x02:
            self.page(writer, command, struct.unpack("<16I", entry))
        else:
            assert opcode == 0x18, opcode
            self.answer(writer, command)

    def page(self, writer, command, words):
        size = ((words[10] >> 16) + 1 + ((words[11] & 0xFFFF) << 16)) * 4
        assert size == words[8]
        if self.change_while_read and words[12]:
            self.change_while_read -= 1
            self.generation += 1
        data = log_page(self.generation, self.records)[words[12] :][:size].ljust(size, b"\0")
        head = struct.pack("<BBBBIHHIII", 7, 4, 24, 24, 24 + size, command, 0, 0, size, 0)
        writer.write(head + data)
        self.answer(writer, command)


@pytest.fixture
async def member():
    found = await Member().start()
    yield found
    await found.stop()


@contextlib.asynccontextmanager
async def following(endpoint):
    logs = asyncio.Queue()
    task = asyncio.create_task(Discovery(ME, logs.put_nowait).follow(endpoint))
    try:
        yield logs, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_log_is_told_at_once_and_after_each_change(member):
    member.tell(A, B)
    async with asyncio.timeout(SOON_S), following(member.endpoint) as (logs, _):
        assert await logs.get() == told(A, B)
        member.tell(A, B, D)
        assert await logs.get() == told(A, B, D)
        member.tell()
        assert await logs.get() == {}
    assert member.hosts == [ME.host_nqn]


async def test_a_log_that_changes_while_it_is_read_is_read_again(member):
    member.tell(A, B)
    member.change_while_read = 2
    async with asyncio.timeout(SOON_S), following(member.endpoint) as (logs, _):
        assert await logs.get() == told(A, B)
    assert member.change_while_read == 0


async def test_a_log_of_many_volumes_comes_in_pieces(member):
    member.records = [(volume_nqn(VOLUME[:-3] + f"{n:03}"), A) for n in range(300)]
    async with asyncio.timeout(SOON_S), following(member.endpoint) as (logs, _):
        assert len(await logs.get()) == 300


async def test_who_refuses_is_no_member():
    async def refuse(_, writer):
        writer.write(bytes(128))

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with asyncio.timeout(SOON_S), server:
        with pytest.raises(DiscoveryError, match="no ICResp"):
            await Discovery(ME, print).follow(server.sockets[0].getsockname()[:2])


def test_records_of_other_transports_and_names_of_hosts_are_passed_over():
    page = bytearray(log_page(1, [(NQN, A), (NQN, ("example", 4420)), (NQN, B)]))
    page[3 * 1024] = 1  # RDMA
    assert parse_log(bytes(page)) == told(A)


# ------------------------------------------------------------------ the executor


class Attached:
    """An attacher with one volume attached."""

    def __init__(self, *endpoints):
        self.found = has(*endpoints)
        self.asked = []
        self.wait = None

    async def paths(self):
        return {NQN: self.found} if self.found.endpoints else {}

    async def set_paths(self, target):
        self.asked.append(target)
        self.found = has(*target.endpoints, optimized=self.found.optimized)


@contextlib.asynccontextmanager
async def follower(tmp_path, attacher, locks=None):
    records = Records(tmp_path)
    records.put(Staged(VOLUME, NQN, "/staging", block=False, read_only=False))
    found = PathFollower(ME, attacher, records, locks or ObjectLocks())
    task = asyncio.create_task(found.run())
    try:
        yield found, records
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(look):
    async with asyncio.timeout(SOON_S):
        while not look():
            await asyncio.sleep(0.01)


@pytest.fixture
async def members(monkeypatch):
    """Four of them; the third is about to be replaced by the fourth."""
    monkeypatch.setattr(node_paths, "LOOK_AGAIN_S", 0.05)
    found = [await Member().start() for _ in range(4)]
    ends = [member.endpoint for member in found]
    for member in found[:3]:
        member.tell(*ends[:3])
    yield found, ends
    for member in found:
        await member.stop()


async def test_paths_follow_a_change_of_members_and_lose_the_dead_one(tmp_path, members):
    found, ends = members
    attacher = Attached(*ends[:3])
    async with follower(tmp_path, attacher):
        await until(lambda: all(member.hosts for member in found[:3]))
        await found[2].stop()
        # First nobody serves: the newcomer is added and nothing is dropped.
        found[3].tell(ends[0], ends[1], ends[3])
        found[1].tell(ends[0], ends[1], ends[3])
        await until(lambda: attacher.found.endpoints == set(ends))
        # It serves, and says who the members are.
        attacher.found = has(*ends, optimized=ends[3])
        await until(lambda: attacher.found.endpoints == {ends[0], ends[1], ends[3]})
    target = attacher.asked[-1]
    assert (target.host_nqn, target.host_id) == (ME.host_nqn, ME.host_id)


async def test_a_volume_that_a_call_works_on_waits(tmp_path, members):
    found, ends = members
    attacher, locks = Attached(*ends[:3]), ObjectLocks()
    async with follower(tmp_path, attacher, locks):
        with locks.hold(VOLUME):
            found[0].tell(ends[0], ends[1], ends[3])
            found[3].tell(ends[0], ends[1], ends[3])
            await until(lambda: found[3].hosts)
            await asyncio.sleep(0.2)
            assert attacher.asked == []
        await until(lambda: attacher.asked)


async def test_an_old_publish_context_leads_to_the_members_of_today(members):
    """Its VolumeAttachment is of before the change; the newcomer serves, none of those in it."""
    found, (a, b, c, d) = members
    for member in found:
        member.tell(a, b, d)
    await found[2].stop()
    assert (await current(target(a, b, c))).endpoints == (a, b, c, d)


async def test_what_the_context_says_is_kept_where_nobody_answers(members):
    found, (a, b, *_) = members
    for member in found:
        await member.stop()
    async with asyncio.timeout(SOON_S):
        assert (await current(target(a, b))).endpoints == (a, b)


async def test_what_is_not_staged_is_not_followed(tmp_path, members):
    found, ends = members
    attacher = Attached(*ends[:3])
    async with follower(tmp_path, attacher) as (follows, records):
        await until(lambda: all(member.hosts for member in found[:3]))
        records.remove(VOLUME)
        follows.changed()
        await until(lambda: not follows._followers)
        found[0].tell(ends[0], ends[1], ends[3])
        await asyncio.sleep(0.2)
    assert attacher.asked == []


# ------------------------------------------------------------------ the kernel's host


class Kernel(KernelAttacher):
    """Says in order what is written to which file; sysfs is a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "fabrics", folder)
        self.folder = folder
        self.said: list[str] = []
        self.code = 0

    def _connect(self, options: str) -> int:
        said = dict(part.split("=", 1) for part in options.split(","))
        deleted = [c.name for c in (self.folder / "nvme").iterdir() if self.is_deleted(c)]
        self.said.append(f"connect {said['traddr']} after {deleted}")
        return self.code

    def add(self, name: str, endpoint, state: str) -> None:
        controller = self.folder / "nvme" / name
        (controller / f"nvme9c{name[-1]}n1").mkdir(parents=True)
        address = f"traddr={endpoint[0]},trsvcid={endpoint[1]},src_addr=127.0.0.1\n"
        (controller / "address").write_text(address)
        (controller / "subsysnqn").write_text(NQN + "\n")
        (controller / f"nvme9c{name[-1]}n1" / "ana_state").write_text(state + "\n")

    @staticmethod
    def is_deleted(controller: Path) -> bool:
        return (controller / "delete_controller").exists()


@pytest.fixture
def kernel(tmp_path):
    found = Kernel(tmp_path)
    found.add("nvme1", A, "optimized")
    found.add("nvme2", B, "inaccessible")
    found.add("nvme3", C, "inaccessible")
    return found


def target(*endpoints):
    return Target(NQN, ME.host_nqn, ME.host_id, endpoints)


async def test_the_kernels_paths_are_read_out_of_sysfs(kernel):
    assert await kernel.paths() == {NQN: has(A, B, C, optimized=A)}


async def test_the_kernel_lets_the_former_member_go_before_it_connects_the_newcomer(kernel):
    await kernel.set_paths(target(A, B, D))
    assert kernel.said == ["connect 127.0.1.4 after ['nvme3']"]


async def test_the_kernels_last_path_stays(kernel):
    with pytest.raises(Unavailable, match="no path"):
        await kernel.set_paths(target(D))
    assert kernel.said == []
    assert not any(kernel.is_deleted(c) for c in (kernel.folder / "nvme").iterdir())


async def test_a_newcomer_that_the_kernel_does_not_reach_is_said(kernel):
    kernel.code = 111
    with pytest.raises(Unavailable, match=r"127\.0\.1\.4:4420 Connection refused"):
        await kernel.set_paths(target(A, B, D))
