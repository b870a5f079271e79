"""What people ask an agent about the list: gRPC with mutual TLS, real nodes behind it."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from node_fake_engine import FakeEngine
from node_members_world import WAIT_S, World, node_object

from tercet_api.objects import Metadata, StorageNode, StorageNodeSpec, StorageNodeStatus
from tercet_api.protos import agent_pb2, agent_pb2_grpc
from tercet_e2e.swarm import Site, Swarm, until
from tercet_node import configure, nodestatus, server
from tercet_node.engine import Engine
from tercet_node.errors import EngineAway
from tercet_node.members import service
from tercet_node.members.sight import Sight, Standing
from tercet_node.membership import CommandError, State
from tercet_node.session import Session
from tercet_node.world import World as Known


class NoEngine:
    async def status(self):
        raise EngineAway("none here")


@pytest.fixture
async def agent(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "CHECK_S", 0.3)
    site = Site(tmp_path, 3)
    made = World(site, tmp_path / "agent")
    await made.start()
    known = Known("n0")
    node = StorageNode(
        metadata=Metadata(name="n1", uid=str(uuid.UUID(bytes=site.entries[1].node))),
        spec=StorageNodeSpec(node_name="n1", address=site.host(1)),
    )
    known.nodes["n1"] = node
    listen = f"{site.host(0)}:4423"
    answering = server.AgentService(NoEngine(), known, made.membership)
    task = asyncio.create_task(server.serve(listen, answering, made.held))
    made.listen = listen
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await made.stop()


def stub(made, common_name="admin"):
    pair = made.site.authority.pair(common_name)
    begin = pair.index(b"-----BEGIN CERTIFICATE-----")
    secure = grpc.ssl_channel_credentials(made.site.authority.pem, pair[:begin], pair[begin:])
    # The certificate of `Site` has the address only, which is what is called.
    return grpc.aio.secure_channel(made.listen, secure, [("grpc.enable_http_proxy", 0)])


async def test_members_lock_and_check(agent):
    async with stub(agent) as channel:
        asked = agent_pb2_grpc.AgentStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="not enrolled it yet") as none_yet:
            await asked.Members(agent_pb2.MembersRequest(), wait_for_ready=True)
        assert none_yet.value.code() is grpc.StatusCode.UNAVAILABLE
        agent.show(0, 1)
        await until(lambda: len(agent.members) == 2, WAIT_S)
        async with Swarm(agent.site.folder) as swarm:
            await swarm.start(1)
            checked = await asked.CheckMembers(agent_pb2.CheckMembersRequest())
            assert checked.digest == f"{swarm.known.digest:032x}"
            said = await asked.Members(agent_pb2.MembersRequest())
            assert (said.nid, said.size, said.locked) == (0, 3, False)
            assert said.digest == checked.digest
            standing = {member.nid: member.state for member in said.members}
            assert (standing[0], standing[1]) == ("Self", "Alive")
            assert [member.name for member in said.members] == ["", "n1", ""]
            assert said.members[1].address == agent.site.entries[1].address
            locked = await asked.LockMembers(agent_pb2.LockMembersRequest(locked=True))
            assert locked.locked
            with pytest.raises(grpc.aio.AioRpcError, match="unlock it first") as refused:
                await asked.CheckMembers(agent_pb2.CheckMembersRequest())
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            unlocked = await asked.LockMembers(agent_pb2.LockMembersRequest(locked=False))
            assert not unlocked.locked


async def test_others_than_people_may_look_and_not_touch(agent):
    agent.show(0)
    await until(lambda: agent.membership.runner is not None, WAIT_S)
    async with stub(agent, "storagenode:n1") as channel:
        asked = agent_pb2_grpc.AgentStub(channel)
        assert (await asked.Members(agent_pb2.MembersRequest(), wait_for_ready=True)).size == 1
        for call in (
            asked.LockMembers(agent_pb2.LockMembersRequest(locked=True)),
            asked.CheckMembers(agent_pb2.CheckMembersRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="not for storagenode:n1") as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert not agent.membership.runner.node.machine.locked


async def test_what_is_seen_of_a_list(agent):
    agent.show(0, 1, 2)
    await until(lambda: len(agent.members) == 3, WAIT_S)
    runner = agent.membership.runner
    await until(lambda: runner.node.detector.dead == 0b110, WAIT_S)
    sight = Sight.of(runner.node)
    entries = agent.site.entries
    assert [sight.standing(entry) for entry in entries] == ["Self", "Dead", "Dead"]
    gone = agent.site.authority.entry(2, agent.site.host(2), 2, State.GONE)
    assert sight.standing(gone) is Standing.GONE
    assert nodestatus.membership(sight) == {
        "membership": {"nid": 0, "size": 3, "digest": f"{agent.members.digest:032x}"}
    }
    assert nodestatus.membership(None) == {}
    nodes = [node_object(f"n{nid}", entry) for nid, entry in enumerate(entries)]
    assert sight.standings(nodes) == {"n1": "Dead", "n2": "Dead"}


async def test_the_engine_hears_what_is_held_of_its_peers(agent, tmp_path):
    """A hint for its status: over the real socket, and nothing when nothing changes."""
    entries = agent.site.entries
    known = Known("n0")
    known.nodes = {f"n{nid}": node_object(f"n{nid}", entry) for nid, entry in enumerate(entries)}
    agent.show(0, 1)
    await until(lambda: len(agent.members) == 2, WAIT_S)
    known.membership = agent.membership.sight()
    async with FakeEngine(tmp_path / "e.sock", "n0") as engine, Engine(tmp_path / "e.sock") as to:
        session = Session(to, known, None)
        hinting = asyncio.create_task(session._hint())
        try:
            await until(lambda: engine.standings == {"n1": "Alive"}, WAIT_S)
            known.membership = replace(known.membership, dead=0b10)
            session.standings_changed()
            await until(lambda: engine.standings == {"n1": "Dead"}, WAIT_S)
        finally:
            hinting.cancel()
            await asyncio.gather(hinting, return_exceptions=True)


async def test_the_engine_is_told_the_newest_address_that_the_operator_has_signed(agent):
    """This node's watch stands still; a neighbour has brought the peer's new entry."""
    agent.show(0, 1)
    await until(lambda: len(agent.members) == 2, WAIT_S)
    uid = str(uuid.UUID(bytes=agent.site.entries[1].node))
    enrolment = agent.membership._said["n1"]

    def peer_address():
        sight = agent.membership.sight()
        peer = StorageNode(
            metadata=Metadata(name="n1", uid=uid),
            spec=StorageNodeSpec(node_name="n1", address="10.0.0.1"),
            status=StorageNodeStatus(enrolment=enrolment),
        )
        own = peer.model_copy(update={"metadata": Metadata(name="n0", uid=str(uuid.uuid4()))})
        return configure.request(own, [own, peer], "c", sight).peers[0].address

    assert peer_address() == "10.0.0.1", "of one age: the object's word"
    moved = agent.site.authority.entry(1, "10.0.0.2", incarnation=2)
    agent.membership.runner._introduce(moved)
    assert peer_address() == "10.0.0.2"
    forged = replace(agent.site.authority.entry(1, "10.6.6.6", incarnation=3), token=bytes(64))
    with pytest.raises(CommandError, match="signature does not hold"):
        agent.membership.runner._introduce(forged)
    assert peer_address() == "10.0.0.2"
