"""The agent's membership over its whole life: objects and register come, go and stay away."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_members_world import WAIT_S, World, enrolment, node_object

from tercet_e2e.swarm import Authority, Site, Swarm, until
from tercet_node.certificates import PAIR_FILE
from tercet_node.members import keep, service
from tercet_node.members.keep import Kept, Spoilt
from tercet_node.members.roster import Trust, entry_of, host_port
from tercet_node.members.service import NoMembers
from tercet_node.membership import CommandError, Nid, NodeList, State


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "SAVE_AFTER_S", 0.05)
    monkeypatch.setattr(service, "REGISTER_PAUSE_S", 0.05)
    site = Site(tmp_path, 4)
    made = World(site, tmp_path / "agent")
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def test_a_node_runs_when_it_is_enrolled_and_knows_all_that_are(world):
    with pytest.raises(NoMembers, match="not enrolled it yet"):
        world.membership.lock()
    world.show(1, 2)
    await asyncio.sleep(0.1)
    assert world.membership.runner is None, "it is not enrolled itself"
    world.show(0)
    await until(lambda: len(world.members) == 3, WAIT_S)
    assert world.changes
    world.show(3)
    await until(lambda: len(world.members) == 4, WAIT_S)


async def test_an_agent_that_starts_while_the_api_server_is_away_goes_on(world):
    world.show(0, 1, 2)
    await until(lambda: len(world.members) == 3, WAIT_S)
    await until((world.folder / keep.FILE).exists, WAIT_S)
    await until(lambda: len(keep.load(world.folder).members) == 3, WAIT_S)
    await world.stop()
    world.away = True
    await world.start()
    await until(lambda: len(world.members) == 3, WAIT_S)
    # It takes part: a neighbour connects, and brings what happened meanwhile.
    async with Swarm(world.site.folder) as swarm:
        await swarm.start(1)
        await until(lambda: len(world.members) == 4, WAIT_S)


async def test_a_removed_node_that_starts_while_the_api_server_is_away_knows_that_it_is_none(world):
    """The file was not written once the node's machine had ended: it came back as a member."""
    world.show(0, 1, 2)
    await until(lambda: len(world.members) == 3, WAIT_S)
    await until((world.folder / keep.FILE).exists, WAIT_S)
    await until(lambda: len(keep.load(world.folder).members) == 3, WAIT_S)
    stone = world.site.authority.entry(0, world.site.host(0), 2, State.GONE)
    world.register = world.register.model_copy(update={"gone": [enrolment(stone)]})
    world.show(gone=True)
    await until(lambda: world.membership.runner is None, WAIT_S)
    await until(lambda: 0 not in keep.load(world.folder).members, WAIT_S)
    await world.stop()
    world.away = True
    await world.start()
    await asyncio.sleep(0.2)
    assert world.membership.runner is None


async def test_a_certificate_file_that_cannot_be_read_ends_nothing(world):
    """A node goes on with the certificate it has; one that has none yet waits. Neither dies."""
    pem = (world.folder / PAIR_FILE).read_bytes()
    (world.folder / PAIR_FILE).unlink()
    world.show(0, 1)
    await until(lambda: len(world.members) == 2, WAIT_S)
    async with Swarm(world.site.folder) as swarm:
        await swarm.start(1)
        await until(lambda: refused(world, "too-many") > 0, WAIT_S)
        world.held.renew(pem)
        await until(lambda: connections(world) == 1, WAIT_S)
        world.held.current = replace(world.held.current)  # another one, as it seems
        (world.folder / PAIR_FILE).write_bytes(pem[:100])
        await swarm.kill(1)
        await until(lambda: connections(world) == 0, WAIT_S)
        await swarm.start(1)
        await until(lambda: connections(world) == 1, WAIT_S)
    assert not world.task.done()


def refused(world, reason):
    return (
        world.registry.get_sample_value("tercet_membership_refused_total", {"reason": reason})
        or 0.0
    )


def connections(world):
    return world.registry.get_sample_value("tercet_membership_connections")


async def test_a_spoilt_file_is_as_good_as_none(world):
    world.show(0, 1)
    await until((world.folder / keep.FILE).exists, WAIT_S)
    await world.stop()
    raw = bytearray((world.folder / keep.FILE).read_bytes())
    raw[40] ^= 1
    (world.folder / keep.FILE).write_bytes(raw)
    await world.start()
    await asyncio.sleep(0.1)
    assert world.membership.runner is None
    world.show(0, 1)
    await until(lambda: len(world.members) == 2, WAIT_S)


async def test_a_removed_node_is_learnt_from_the_register_when_its_object_vanishes(world):
    world.show(0, 1, 2)
    await until(lambda: len(world.members) == 3, WAIT_S)
    stone = world.site.authority.entry(2, world.site.host(2), 2, State.GONE)
    world.register = world.register.model_copy(update={"gone": [enrolment(stone)]})
    world.membership.observe([], gone=True)
    await until(lambda: 2 not in world.members, WAIT_S)
    world.show(2)  # a stale sight of it brings nothing back
    await asyncio.sleep(0.1)
    assert 2 not in world.members


async def test_a_node_that_was_removed_itself_ends_and_comes_again_under_another_index(world):
    world.show(0, 1)
    await until(lambda: len(world.members) == 2, WAIT_S)
    authority = world.site.authority
    stone = authority.entry(0, world.site.host(0), 2, State.GONE)
    world.register = world.register.model_copy(update={"gone": [enrolment(stone)]})
    world.membership.observe([], gone=True)
    await until(lambda: world.membership.runner is None, WAIT_S)
    again = authority.entry(7, world.site.host(0), 3)
    world.membership.observe([node_object("n0", again)])
    await until(lambda: 7 in world.members, WAIT_S)
    assert 0 not in world.members
    assert world.membership.runner.own == again


async def test_a_new_address_is_listened_on(world):
    world.show(0)
    await until(lambda: world.membership.runner is not None, WAIT_S)
    before = world.membership.runner
    moved = world.site.authority.entry(0, world.site.host(3), 2)
    world.membership.observe([node_object("n0", moved)])
    await until(
        lambda: (
            world.membership.runner not in (None, before)
            and world.membership.runner.own == moved
            and world.membership.runner.mesh.listening.is_set()
        ),
        WAIT_S,
    )
    _, writer = await asyncio.open_connection(*host_port(moved.address))
    writer.close()


async def test_keys_are_rotated_without_a_restart(world):
    world.show(0, 1)
    await until(lambda: len(world.members) == 2, WAIT_S)
    runner = world.membership.runner
    new = Authority()
    both = Trust(world.site.authority.trust.cluster, (new.trust.keys[0],))
    new.trust = both
    resigned = new.entry(2, world.site.host(2))
    world.membership.observe([node_object("n2", resigned)])
    await asyncio.sleep(0.2)
    assert 2 not in world.members, "nobody knows this key"
    keys = [*new.trust.keys, *world.site.authority.trust.keys]
    world.register = world.register.model_copy(
        update={"keys": [base64.b64encode(key).decode() for key in keys]}
    )
    world.membership.observe([], gone=True)
    await until(lambda: 2 in world.members, WAIT_S)
    world.show(3)
    await until(lambda: 3 in world.members, WAIT_S)
    assert world.membership.runner is runner


async def test_a_bad_signature_makes_it_ask_for_other_keys(world):
    world.show(0)
    await until(lambda: world.membership.runner is not None, WAIT_S)
    reads = world.reads
    forged = Authority().entry(1, world.site.host(1))
    world.membership.observe([node_object("n1", forged)])
    await until(lambda: world.reads > reads, WAIT_S)
    assert 1 not in world.members


async def test_a_renewed_certificate_is_used_without_a_restart(world):
    world.show(0, 1)
    await until(lambda: len(world.members) == 2, WAIT_S)
    runner = world.membership.runner
    first = world.membership._tls()
    world.held.renew(world.site.authority.pair("storagenode:n0", world.site.host(0)))
    async with Swarm(world.site.folder) as swarm:
        member = await swarm.start(1)
        await until(
            lambda: member.count("messages_total", direction="sent", kind="ack") > 1, WAIT_S
        )
    assert world.membership._tls() is not first
    assert world.membership.runner is runner


async def test_locked_takes_no_change_and_catches_up_when_unlocked(world):
    world.show(0)  # alone: nothing but the unlocking makes it look again
    await until(lambda: len(world.members) == 1, WAIT_S)
    world.membership.lock()
    world.show(2)
    await asyncio.sleep(0.2)
    assert len(world.members) == 1
    with pytest.raises(CommandError, match="unlock it first"):
        await world.membership.check()
    world.membership.unlock()
    await until(lambda: len(world.members) == 2, WAIT_S)


async def test_a_check_says_what_it_has_mended(world, monkeypatch):
    monkeypatch.setattr(service, "CHECK_S", 0.5)
    world.show(0, 1)
    await until(lambda: len(world.members) == 2, WAIT_S)
    async with Swarm(world.site.folder) as swarm:
        await swarm.start(1)
        checked = await world.membership.check()
        assert checked.after.digest == swarm.known.digest
        assert (await world.membership.check()).changed == 0


# ---------------------------------------------------------------- the file


def kept():
    site = Authority()
    entries = [site.entry(nid, f"10.0.0.{nid}") for nid in (0, 2, 5)]
    return Kept(Nid(2), site.trust, NodeList.of(entries))


def test_the_file_is_what_the_page_says():
    made = kept()
    raw = keep.encoded(made)
    assert raw[:4] == b"TL\x01\x01"
    assert len(raw) == 28 + 32 + 3 * 175 + 32
    assert int.from_bytes(raw[4:8], "big") == 2
    assert raw[12:28] == made.trust.cluster
    back = keep.decoded(raw)
    assert (back.nid, back.trust) == (made.nid, made.trust)
    assert list(back.members) == list(made.members)


RAW = keep.encoded(kept())


@given(st.integers(0, len(RAW) - 1), st.integers(0, 7))
def test_a_changed_file_is_refused(place, bit):
    raw = bytearray(RAW)
    raw[place] ^= 1 << bit
    with pytest.raises(Spoilt):
        keep.decoded(bytes(raw))


@given(st.integers(0, len(RAW) - 1))
def test_a_cut_file_is_refused(length):
    with pytest.raises(Spoilt):
        keep.decoded(RAW[:length])


def test_what_the_operator_signs_is_what_an_agent_reads():
    entry = Authority().entry(3, "fd00::1")
    assert entry_of(enrolment(entry)) == entry
    with pytest.raises(ValueError, match="signature of 3 bytes"):
        entry_of(enrolment(entry).model_copy(update={"signature": "AAAA"}))
    for bad in ("", "host", "host:", "host:x", "host:0", "host:70000", ":1"):
        with pytest.raises(ValueError, match="is no HOST:PORT"):
            host_port(bad)
    assert host_port("[fd00::1]:4422") == ("fd00::1", 4422)
