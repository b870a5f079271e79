"""Members that have gone bad, or mad: what one with a good certificate can do to another's node."""

from __future__ import annotations

import asyncio
import socket

import pytest
from node_members_house import WAIT_S, Caller, call, house_of, refused
from node_members_world import World

from tercet_e2e.swarm import PORT, Authority, Site, Swarm, until
from tercet_node.members import keep, link, mesh
from tercet_node.members.keep import Kept
from tercet_node.members.tls import contexts
from tercet_node.membership import (
    Change,
    Hello,
    Nid,
    NodeList,
    Part,
    Probe,
    State,
    Verdict,
    encode_message,
    sign,
)
from tercet_node.membership.messages import HEADER_BYTES, KIND_PART, MAGIC, SEQUENCE_MAX, VERSION

MIB = 1 << 20


@pytest.fixture
async def house(tmp_path, monkeypatch):
    async with house_of(tmp_path, monkeypatch) as site:
        yield site


def third(site):
    return (site.folder / "3.pem").read_bytes()


async def test_forged_entries_cost_who_sends_them_and_nobody_else(house, monkeypatch):
    """To verify is dear, and a message can ask for ten: it is paid with messages."""
    monkeypatch.setattr(link, "BURST_MESSAGES", 500.0)
    monkeypatch.setattr(link, "MESSAGES_PER_S", 400.0)
    loop, stranger = asyncio.get_running_loop(), Authority().signing
    cluster = house.authority.trust.cluster
    forged = tuple(
        sign(house.authority.entry(3, house.host(3), 10 + number), cluster, stranger)
        for number in range(10)
    )
    async with call(house) as lying, call(house, third(house)) as calm:
        began_s = loop.time()
        lie = encode_message(Part(7, 0, 10, forged, answer=True))
        await lying.say(Hello(house.entries[2]), lie * 200)
        await calm.say(Hello(house.entries[3]), Probe(2, 0))
        await calm.answer(2)
        calm_s = loop.time() - began_s
        await asyncio.sleep(1.0)
        verified, took_s = refused(house, "bad-signature"), loop.time() - began_s
    paid = (link.BURST_MESSAGES + link.MESSAGES_PER_S * took_s) / link.FORGERY_MESSAGES
    assert len(forged) <= verified <= paid + 2 * len(forged), "of two thousand"
    assert calm_s < 1.0
    assert house.member.runner.members.get(3) == house.entries[3]


@pytest.mark.parametrize("length", [0xFFFF, 0, 1])
async def test_a_message_of_a_mebibyte_is_none(house, length):
    head = MAGIC + bytes((VERSION, KIND_PART)) + length.to_bytes(2, "big")
    assert len(head) == HEADER_BYTES
    async with call(house) as caller:
        await caller.say(Hello(house.entries[2]), head + bytes(MIB))
        assert await caller.is_hung_up_on()
    assert refused(house, "garbled") == 1


async def test_who_asks_and_does_not_read_is_not_answered_without_end(house, monkeypatch):
    """What it does not take is dropped, and not kept for it; others are served."""
    monkeypatch.setattr(link, "BURST_MESSAGES", 1e9)
    monkeypatch.setattr(link, "WRITE_BYTES_MAX", 4096)
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(made, (house.host(0), PORT))
    client = contexts(house.folder / "2.pem", house.authority.pem).client
    reader, writer = await asyncio.open_connection(
        sock=made, ssl=client, server_hostname=house.host(0), limit=1
    )
    deaf = Caller(reader, writer)
    await deaf.say(Hello(house.entries[2]))
    before, question = house.member.count("dropped_total"), encode_message(Probe(1, 0))
    async with asyncio.timeout(WAIT_S):
        while house.member.count("dropped_total") < before + 500:
            await deaf.say(question * 500)
            await asyncio.sleep(0)
    kept = [each.transport.get_write_buffer_size() for each in house.member.runner.mesh._links]
    assert max(kept) < 4096 + 65536, "what one message and one record have beyond the bound"
    async with call(house, third(house)) as other:
        await other.say(Hello(house.entries[3]), Probe(2, 0))
        await other.answer(2)
    writer.transport.abort()


async def test_who_opens_connections_and_says_nothing_keeps_no_others_out(house, monkeypatch):
    """No certificate is needed for that; half-open ones from one address are few enough."""
    monkeypatch.setattr(mesh, "HANDSHAKE_S", 3 * WAIT_S)
    before = refused(house, "too-many")
    mute = [socket.create_connection((house.host(0), PORT)) for _ in range(mesh.HANDSHAKES_MAX)]
    try:
        await until(lambda: refused(house, "too-many") > before, WAIT_S)
        async with call(house, local_addr=(house.host(2), 0)) as caller:
            await caller.say(Hello(house.entries[2]), Probe(7, 0))
            await caller.answer(7)
        assert len(house.member.runner.mesh._handshakes) == 1, "of the mute ones' address"
    finally:
        for each in mute:
            each.close()
    await until(lambda: not house.member.runner.mesh._handshakes, WAIT_S)


async def test_two_nodes_of_one_name_disturb_no_list_and_nobody_is_held_dead(tmp_path):
    """A machine was copied, certificate and all: both call; only one can have the address."""
    Site(tmp_path, 4)
    async with Swarm(tmp_path) as swarm, Swarm(tmp_path) as copy:
        await swarm.start_all()
        copied = asyncio.create_task(copy.start(2))  # it never comes to listen
        await asyncio.sleep(0.5)
        digests = swarm.digests()
        calls = [
            member.count("messages_total", direction="received", kind="hello")
            for member in swarm.members.values()
        ]
        await asyncio.sleep(3.0)
        more = [
            member.count("messages_total", direction="received", kind="hello")
            for member in swarm.members.values()
        ]
        dead = [member.runner.node.detector.dead for member in swarm.members.values()]
        assert dead == [0] * 4
        assert swarm.digests() == digests
        assert len(digests) == 1
        assert sum(more) - sum(calls) < 60, "each throws the other out, but not without a pause"
        copied.cancel()
        await asyncio.gather(copied, return_exceptions=True)


async def test_a_death_that_nobody_could_contradict_is_believed_by_nobody(house):
    """Of a node that is not the one that is told: it could never come back."""
    slander = Verdict(Nid(3), house.entries[3].instance, SEQUENCE_MAX, alive=False)
    async with call(house) as liar:
        await liar.say(Hello(house.entries[2]), slander, Probe(1, 0))
        await liar.answer(1)
    assert house.member.runner.node.detector.alive(Nid(3))


async def test_an_older_list_on_disk_is_brought_up_to_date_by_the_others(tmp_path):
    """Restored from a backup, while the API server is away.

    A node was removed since, one has moved, and the node itself was signed anew.
    """
    site = Site(tmp_path, 4)
    authority = site.authority
    older = Kept(Nid(0), authority.trust, NodeList.of(site.entries))
    world = World(site, tmp_path / "agent")
    keep.save(world.folder, older)
    site.entries[0] = authority.entry(0, site.host(0), 5)
    site.entries[1] = authority.entry(1, site.host(9), 2)
    site.entries[3] = authority.entry(3, site.host(3), 3, State.GONE)
    site.write()
    world.away = True
    async with Swarm(tmp_path) as swarm:
        await swarm.start(2)
        await world.start()
        try:
            await until(lambda: world.members.digest == swarm.known.digest, WAIT_S)
            assert world.membership.runner.own == site.entries[0]
            # And it brings nobody back: what it says is older than what they have.
            assert swarm.members[2].runner.members.digest == swarm.known.digest
            # The other way round: tombstone and first entry once more, by whoever kept them.
            moved = authority.pair("storagenode:n1", site.host(9))
            async with call(site, moved) as caller:
                stale = [Change(entry) for entry in older.members]
                await caller.say(Hello(site.entries[1]), *stale, Probe(1, 0))
                await caller.answer(1)
            assert world.members.digest == swarm.known.digest
        finally:
            await world.stop()


async def test_all_start_again_at_one_time_and_agree(tmp_path):
    """Power came back: thirty nodes, none of which knows of a connection, a death, a number."""
    Site(tmp_path, 30)
    async with Swarm(tmp_path) as swarm:
        await swarm.start_all()
        await asyncio.sleep(1.0)
        for nid in swarm.known.nids():
            await swarm.kill(nid)
        await swarm.start_all()

        def calm():
            detectors = [member.runner.node.detector for member in swarm.members.values()]
            connected = all(member.count("connections") >= 2 for member in swarm.members.values())
            return connected and not any(each.dead or each.suspected for each in detectors)

        await until(calm, 3 * WAIT_S)
        assert swarm.digests() == {swarm.known.digest}
