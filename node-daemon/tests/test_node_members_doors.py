"""Who is let in, and what becomes of bytes that no honest node sends: a listener under attack."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_members_house import WAIT_S, Caller, call, house_of, refused

from tercet_e2e.evidence import record
from tercet_e2e.swarm import PORT, Authority, until
from tercet_node.members import link, mesh
from tercet_node.members.figures import Figures
from tercet_node.members.link import Link
from tercet_node.members.tls import contexts
from tercet_node.membership import (
    Change,
    Hello,
    Nid,
    Prelim,
    Probe,
    State,
    Verdict,
    WireError,
    encode_message,
    sign,
)
from tercet_node.membership.messages import HEADER_BYTES, MESSAGE_BYTES_MAX


@pytest.fixture
async def house(tmp_path, monkeypatch):
    async with house_of(tmp_path, monkeypatch) as site:
        yield site


async def test_who_has_certificate_and_entry_is_let_in_and_answered(house):
    async with call(house) as caller:
        await caller.say(Hello(house.entries[2]), Probe(7, 0))
        assert (await caller.answer(7)).entry == house.entries[0]


async def test_a_step_that_fails_ends_the_node_and_leaves_no_half_of_it(house):
    """Its timer was not set again: it answered, and watched nobody any more."""

    def broken(event, now_s):
        raise AssertionError("an invariant")

    house.member.runner.node.step = broken
    await until(house.member.task.done, WAIT_S)
    assert house.member.task.exception().subgroup(AssertionError) is not None


async def test_another_clusters_certificate_is_refused(house):
    """Same names, same entry: but another CA has signed it."""
    stranger = Authority().pair("storagenode:n2", house.host(2))
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        async with call(house, stranger) as caller:
            await caller.say(Hello(house.entries[2]), Probe(7, 0))
            assert await caller.is_hung_up_on()
    await until(lambda: refused(house, "handshake") == 1, WAIT_S)
    assert house.member.count("messages_total", direction="received", kind="hello") == 0


async def test_a_caller_does_not_believe_another_clusters_listener(house, tmp_path_factory):
    """Node 0 calls where node 1 should be, and somebody else answers."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    foreign = Authority()
    (elsewhere / "1.pem").write_bytes(foreign.pair("storagenode:n1", house.host(1)))
    server = contexts(elsewhere / "1.pem", foreign.pem).server
    heard = []

    async def answer(reader, writer):
        heard.append(await reader.read(10))

    async with await asyncio.start_server(answer, house.host(1), PORT, ssl=server):
        before = house.member.count("calls_failed_total")
        await until(lambda: house.member.count("calls_failed_total") > before + 1, WAIT_S)
    assert not heard


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2])
async def test_older_tls_and_no_certificate_are_refused(house, version):
    plain = ssl.create_default_context(cadata=house.authority.pem.decode())
    older = contexts(house.folder / "2.pem", house.authority.pem).client
    older.minimum_version = older.maximum_version = version
    for client in (plain, older):
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            reader, writer = await asyncio.open_connection(
                house.host(0), PORT, ssl=client, server_hostname=house.host(0)
            )
            writer.write(encode_message(Hello(house.entries[2])))
            assert await reader.read(1) == b""
    await until(lambda: refused(house, "handshake") == 2, WAIT_S)


async def test_a_certificate_that_is_not_a_nodes_is_refused(house):
    """The csi controller has one of the same CA."""
    async with call(house, house.authority.pair("csi-controller")) as caller:
        await caller.say(Hello(house.entries[2]))
        assert await caller.is_hung_up_on()
    assert refused(house, "no-node") == 1


async def test_nobody_passes_for_another_node(house):
    """Node 2's certificate, node 3's perfectly signed entry."""
    async with call(house) as caller:
        await caller.say(Hello(house.entries[3]), Probe(7, 0))
        assert await caller.is_hung_up_on()
    assert refused(house, "other-address") == 1


async def test_an_entry_that_the_operator_did_not_sign_is_refused_at_the_door(house):
    forged = house.authority.entry(9, house.host(2), incarnation=5)
    forged = sign(forged, house.authority.trust.cluster, Authority().signing)
    async with call(house) as caller:
        await caller.say(Hello(forged))
        assert await caller.is_hung_up_on()
    assert refused(house, "bad-signature") == 1
    assert 9 not in house.member.runner.members


async def test_a_newcomer_is_learnt_of_by_its_hello(house):
    comer = house.authority.entry(9, house.host(2))
    async with call(house) as caller:
        await caller.say(Hello(comer))
        await until(lambda: 9 in house.member.runner.members, WAIT_S)


async def test_a_removed_node_is_refused_although_its_certificate_is_good(house):
    async with call(house) as inside:
        await inside.say(Hello(house.entries[2]), Probe(1, 0))
        await inside.answer(1)
        stone = house.authority.entry(2, house.host(2), 2, State.GONE)
        async with call(house, (house.folder / "3.pem").read_bytes()) as other:
            await other.say(Hello(house.entries[3]), Change(stone))
            assert await inside.is_hung_up_on(), "its connections end with its entry"
    async with call(house) as caller:
        await caller.say(Hello(house.entries[2]), Probe(7, 0))
        assert await caller.is_hung_up_on()
    assert refused(house, "gone") == 1


async def test_forged_news_of_a_member_is_refused_and_changes_nothing(house):
    digest = house.member.runner.members.digest
    honest = house.authority.entry(3, house.host(2), incarnation=8)
    forged = sign(honest, house.authority.trust.cluster, Authority().signing)
    elsewhere = sign(honest, bytes(16), house.authority.signing)
    async with call(house) as caller:
        await caller.say(Hello(house.entries[2]), Change(forged), Change(elsewhere), Probe(7, 0))
        await caller.answer(7)
    assert refused(house, "bad-signature") == 2
    assert house.member.runner.members.digest == digest


async def test_replayed_news_changes_nothing(house):
    """What was true once, word for word, after it was overtaken; by a member in good standing."""
    newer = house.authority.entry(3, house.host(3), incarnation=2)
    async with call(house) as caller:
        await caller.say(Hello(house.entries[2]), Change(newer), Probe(1, 0))
        await caller.answer(1)
        digest = house.member.runner.members.digest
        assert house.member.runner.members.get(3) == newer
        await caller.say(Change(house.entries[3]), Change(newer), Probe(2, 0))
        await caller.answer(2)
    assert house.member.runner.members.digest == digest


async def test_a_recorded_connection_cannot_be_played_again(house):
    """Byte for byte what a node said over TLS, on a new connection: no handshake comes of it."""
    recorded = bytearray()

    async def relay(reader, writer):
        there, onward = await asyncio.open_connection(house.host(0), PORT)

        async def pump(source, sink, keep):
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    if keep:
                        recorded.extend(data)
                    sink.write(data)

        await asyncio.gather(pump(reader, onward, True), pump(there, writer, False))

    async with await asyncio.start_server(relay, house.host(3), PORT):
        client = contexts(house.folder / "2.pem", house.authority.pem).client
        reader, writer = await asyncio.open_connection(
            house.host(3), PORT, ssl=client, server_hostname=house.host(0)
        )
        caller = Caller(reader, writer)
        await caller.say(Hello(house.entries[2]), Probe(7, 0))
        await caller.answer(7)
        writer.transport.abort()
    assert len(recorded) > 500
    before = house.member.count("messages_total", direction="received", kind="hello")
    again, onward = await asyncio.open_connection(house.host(0), PORT)
    onward.write(bytes(recorded))
    with contextlib.suppress(ConnectionError):
        while await asyncio.wait_for(again.read(65536), WAIT_S):
            pass
    assert house.member.count("messages_total", direction="received", kind="hello") == before
    await until(lambda: refused(house, "handshake") == 1, WAIT_S)


async def test_whoever_does_not_say_who_it_is_first_is_hung_up_on(house):
    async with call(house) as caller:
        await caller.say(Probe(7, 0), Hello(house.entries[2]))
        assert await caller.is_hung_up_on()
    assert refused(house, "no-hello") == 1


async def test_a_second_hello_makes_nobody_else(house):
    async with call(house) as caller:
        await caller.say(Hello(house.entries[2]), Hello(house.entries[3]), Probe(7, 0))
        await caller.answer(7)
    assert refused(house, "unasked") == 1


async def test_truncated_messages_and_silence_end_after_a_while(house, monkeypatch):
    monkeypatch.setattr(mesh, "HELLO_S", 0.2)
    monkeypatch.setattr(mesh, "MESSAGE_S", 0.2)
    third = (house.folder / "3.pem").read_bytes()
    async with call(house) as mute, call(house, third) as stuck, call(house) as dripping:
        await stuck.say(Hello(house.entries[3]), encode_message(Probe(1, 0))[:20])
        await dripping.say(Hello(house.entries[2]))
        for byte in encode_message(Probe(1, 0))[:25]:
            await dripping.say(bytes([byte]))
            await asyncio.sleep(0.1)
        assert await mute.is_hung_up_on()
        assert await stuck.is_hung_up_on()
        assert await dripping.is_hung_up_on()
    assert refused(house, "too-slow") == 3


async def test_of_two_connections_with_one_node_one_stays(house):
    """Node 2 calls twice; node 0, whose nid is lower, would keep one that it has opened itself."""
    async with call(house) as first, call(house) as second:
        await first.say(Hello(house.entries[2]), Probe(1, 0))
        await first.answer(1)
        await second.say(Hello(house.entries[2]), Probe(2, 0))
        await second.answer(2)
        assert await first.is_hung_up_on()
        await second.say(Probe(3, 0))
        await second.answer(3)


async def test_a_flood_is_read_slowly_and_starves_nobody(house, monkeypatch):
    monkeypatch.setattr(link, "BURST_MESSAGES", 40.0)
    monkeypatch.setattr(link, "MESSAGES_PER_S", 400.0)
    loop = asyncio.get_running_loop()
    agreeing = encode_message(Prelim(house.member.runner.members.digest))
    async with call(house) as flooding, call(house, (house.folder / "3.pem").read_bytes()) as calm:
        began_s = loop.time()
        await flooding.say(Hello(house.entries[2]), agreeing * 400, Probe(1, 0))
        await calm.say(Hello(house.entries[3]), Probe(2, 0))
        await calm.answer(2)
        calm_s = loop.time() - began_s
        await flooding.answer(1)
        assert loop.time() - began_s > 0.8, "400 messages at 400 a second, but for the burst"
    assert calm_s < 0.8


async def test_connections_are_counted_and_those_too_many_closed(house, monkeypatch):
    monkeypatch.setattr(mesh, "HANDSHAKES_MAX", 3)
    before = refused(house, "too-many")
    holders = [socket.create_connection((house.host(0), PORT)) for _ in range(8)]
    try:
        await until(lambda: refused(house, "too-many") >= before + 5, WAIT_S)
    finally:
        for each in holders:
            each.close()
    async with call(house) as caller:  # the three go with their handshakes
        await caller.say(Hello(house.entries[2]), Probe(7, 0))
        await caller.answer(7)


async def test_a_fuzzed_listener_lives_and_its_list_is_right(house):
    """Real TLS, a member's certificate: garbage, cut and changed messages, 300 connections."""
    loop = asyncio.get_running_loop()
    rng, began_s = random.Random(42), loop.time()
    digest = house.member.runner.members.digest
    entries = house.entries
    sound = [
        encode_message(each)
        for each in (
            Probe(1, 2),
            Prelim(3),
            Change(entries[3]),
            Verdict(Nid(3), entries[3].instance, 0, alive=True),
            Hello(entries[2]),
        )
    ]
    hello = encode_message(Hello(entries[2]))

    def spoilt():
        raw = bytearray(rng.choice(sound))
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(raw)

    def attack():
        kind = rng.randrange(4)
        if kind == 0:
            return rng.randbytes(rng.randint(1, 3000))
        if kind == 1:
            return hello + rng.randbytes(rng.randint(1, 3000))
        if kind == 2:
            return hello + b"".join(spoilt() for _ in range(rng.randint(1, 20)))
        return hello + rng.choice(sound)[: rng.randint(1, 30)]

    async def one():
        async with call(house) as caller:
            await caller.say(attack())
            caller.writer.close()
            await caller.is_hung_up_on()

    for _ in range(30):
        await asyncio.gather(*(one() for _ in range(10)))
    assert house.member.runner.members.digest == digest
    assert refused(house, "garbled") > 50
    record("membership: connections of a fuzzed listener", 300, 0, loop.time() - began_s)
    async with call(house) as caller:
        await caller.say(Hello(entries[2]), Probe(7, 0))
        await caller.answer(7)


# ---------------------------------------------------------------- the framing alone


class Ear:
    """An owner of links that remembers what it is told."""

    def __init__(self):
        self.heard, self.errors = [], []

    def opened(self, made):
        pass

    def received(self, made, message, size_bytes):
        assert size_bytes == len(encode_message(message))
        self.heard.append(message)

    def garbled(self, made, error):
        assert isinstance(error, WireError)
        self.errors.append(error)

    def closed(self, made):
        pass


def cut(raw, sizes):
    at = 0
    for size in sizes:
        yield raw[at : at + size]
        at += size
    yield raw[at:]


@given(st.lists(st.integers(0, 1 << 64), max_size=20), st.lists(st.integers(1, 40), max_size=30))
def test_messages_come_out_as_they_went_in_however_they_are_cut(numbers, sizes):
    said = [Probe(number % (1 << 64), number) for number in numbers]
    ear = Ear()
    made = Link(ear, lambda: 0.0)
    for piece in cut(b"".join(map(encode_message, said)), sizes):
        made.data_received(piece)
    assert ear.heard == said
    assert not ear.errors


@given(st.binary(max_size=4 * MESSAGE_BYTES_MAX), st.lists(st.integers(1, 200), max_size=30))
@settings(max_examples=300)
def test_garbage_costs_a_buffer_of_one_message_at_most(raw, sizes):
    ear = Ear()
    made = Link(ear, lambda: 0.0)
    for piece in cut(raw, sizes):
        made.data_received(piece)
        if ear.errors:
            break
        assert len(made._buffer) < MESSAGE_BYTES_MAX
    if raw[:HEADER_BYTES] != b"" and len(raw) >= HEADER_BYTES and raw[:2] != b"TM":
        assert ear.errors


def test_figures_have_their_names():
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    Figures(registry)
    names = {metric.name for metric in registry.collect()}
    assert {"tercet_membership_nodes", "tercet_membership_refused"} <= names
    assert all(name.startswith("tercet_membership_") for name in names)
