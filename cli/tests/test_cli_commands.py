"""The commands as a person runs them: the real program, API server and TLS; agents of the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import uuid

import pytest
from cli_agents import Authority, FakeAgent, publish, sign_next

from tercet_api.clients import Api, snapshots, storage_nodes, volumes
from tercet_api.names import FINALIZER
from tercet_api.objects import (
    Metadata,
    Ports,
    Snapshot,
    SnapshotSpec,
    StorageNode,
    StorageNodeSpec,
    Volume,
    VolumeSpec,
)
from tercet_api.protos import agent_pb2

pytestmark = pytest.mark.local

GIB = 1 << 30
TIMEOUT_S = 120.0


class Bench:
    """A volume with three replicas, each behind an agent of the test."""

    def __init__(self, api, cluster, authority, agents, volume) -> None:
        self.api = api
        self.cluster = cluster
        self.authority = authority
        self.agents = agents
        self.volume = volume

    async def tercet(self, *arguments, env=None):
        """Run the program; returns (exit status, stdout, stderr)."""
        given = {"KUBECONFIG": str(self.cluster.kubeconfig), "PATH": os.environ["PATH"]}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tercet_cli", *arguments),
            env=given if env is None else env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
        return process.returncode, out.decode(), err.decode()

    async def verify(self, *arguments, deny=""):
        """Run `volume verify` while the test signs its certificate."""
        return await self.signed("volume", "verify", self.volume.name, *arguments, deny=deny)

    async def signed(self, *arguments, deny=""):
        """Run the program while the test signs its certificate."""

        async def sign():
            while not await sign_next(self.api, self.authority, deny=deny):
                await asyncio.sleep(0.02)

        signing = asyncio.create_task(sign())
        try:
            return await self.tercet(*arguments)
        finally:
            signing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await signing


async def _make_volume(api, agents):
    suffix = uuid.uuid4().hex[:6]
    spec = VolumeSpec(uuid=str(uuid.uuid4()), size_bytes=GIB)
    metadata = Metadata(name=f"v-{suffix}")
    volume = await volumes(api).create(Volume(metadata=metadata, spec=spec))
    members = [{"node": agent.node, "replica": agent.replica} for agent in agents]
    primary = {"node": agents[0].node, "instance": str(uuid.uuid4())}
    status = {
        "phase": "Ready",
        "sizeBytes": GIB,
        "allocatedBytes": 8 << 20,
        "config": {"epoch": 1, "state": "Recovering", "primary": primary, "members": members},
        "replicas": [{**member, "state": "InSync"} for member in members],
    }
    return await volumes(api).patch_status(volume.name, {"status": status})


@pytest.fixture
async def bench(cluster):
    authority = Authority()
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(Api(cluster.kubeconfig))
        await publish(api, authority)
        agents = []
        for _ in range(3):
            node = f"n-{uuid.uuid4().hex[:6]}"
            agent = FakeAgent(authority, node, str(uuid.uuid4()))
            agents.append(await stack.enter_async_context(agent))
            spec = StorageNodeSpec(
                node_name=node, address="127.0.0.1", ports=Ports(agent=agent.port)
            )
            await storage_nodes(api).create(StorageNode(metadata=Metadata(name=node), spec=spec))
        yield Bench(api, cluster, authority, agents, await _make_volume(api, agents))


async def test_equal_replicas(bench):
    status, out, err = await bench.verify()
    assert (status, err) == (0, "")
    assert "3 replicas are equal" in out
    assert all(agent.node in out and agent.replica in out for agent in bench.agents)


async def test_different_replicas_and_the_first_chunk(bench):
    bench.agents[1].sums[3] = 0xCCCC
    status, out, _ = await bench.verify("-o", "json")
    said = json.loads(out)
    assert (status, said["equal"], said["differingChunks"]) == (1, False, 1)
    assert said["firstDifference"]["chunk"] == 3
    assert said["firstDifference"]["crc32c"][bench.agents[1].node] == 0xCCCC
    status, out, _ = await bench.verify()
    assert status == 1
    assert "DIFFER in 1 chunks" in out
    assert "0000cccc" in out


async def test_asks_again_until_all_are_at_one_place(bench):
    bench.agents[2].catches_up_after = 2
    status, out, _ = await bench.verify()
    assert status == 0, out
    assert bench.agents[2].asked == 3


async def test_says_nothing_of_replicas_that_never_meet(bench):
    bench.agents[2].lsn = 11
    status, out, err = await bench.verify("--timeout", "1")
    assert (status, out) == (2, "")
    assert "never at the same place" in err
    assert "next:" in err


async def test_agent_that_is_away_makes_it_impossible(bench):
    await bench.agents[0].__aexit__()
    status, out, err = await bench.verify()
    assert (status, out) == (2, "")
    assert bench.agents[0].node in err
    assert f"tercet node get {bench.agents[0].node}" in err


async def test_agent_with_another_nodes_certificate_is_not_believed(bench):
    second = bench.agents[1]
    patch = {"spec": {"ports": {"agent": bench.agents[0].port}}}
    await storage_nodes(bench.api).patch(second.node, patch)
    status, _, err = await bench.verify()
    assert status == 2
    assert second.node in err


async def test_other_replica_than_the_configuration_names(bench):
    bench.agents[0].replica = str(uuid.uuid4())
    status, _, err = await bench.verify()
    assert status == 2
    assert "the configuration names" in err


async def test_refused_certificate_says_why(bench):
    status, _, err = await bench.verify(deny="not an administrator")
    assert status == 2
    assert "not an administrator" in err


async def test_volume_list_and_get(bench):
    status, out, err = await bench.tercet("volume", "list")
    assert (status, err) == (0, "")
    row = next(line for line in out.splitlines() if line.startswith(bench.volume.name))
    assert row.split()[1:5] == ["Ready", "1", "GiB", "8"]
    assert "3/3" in row
    status, out, _ = await bench.tercet("volume", "get", bench.volume.name)
    assert status == 0
    assert all(agent.replica in out for agent in bench.agents)
    status, out, _ = await bench.tercet("volume", "get", bench.volume.name, "-o", "json")
    assert json.loads(out)["status"]["config"]["epoch"] == 1
    status, out, _ = await bench.tercet("volume", "list", "-o", "json")
    assert bench.volume.name in [item["metadata"]["name"] for item in json.loads(out)["items"]]


async def test_chunks_are_asked_of_the_primary_page_by_page(bench):
    primary = bench.volume.status.config.primary.node
    asked = next(agent for agent in bench.agents if agent.node == primary)
    asked.sums = {0: 1, 3: 1, 7: 1, 8: 1, 200: 1}
    status, out, err = await bench.signed("volume", "get", bench.volume.name, "--show-chunks")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["7", "28", "MiB", "3", "MiB", "1", "MiB", "8", "7", "GiB"] in [row[:10] for row in rows]
    said = "5 chunks, 15 MiB mapped, 5 MiB of it shared"
    assert out.splitlines()[-1].startswith(f"{primary}, device d0, applied (1, ")
    assert out.splitlines()[-1].endswith(said)
    command = ("volume", "get", bench.volume.name, "--show-chunks", "-o", "json")
    other = next(agent for agent in bench.agents if agent.node != primary)
    status, out, _ = await bench.signed(*command, "--node", other.node)
    found = json.loads(out)
    assert (status, found["metadata"]["name"]) == (0, bench.volume.name)
    assert found["chunkMap"]["node"] == other.node
    assert [row["chunk"] for row in found["chunkMap"]["chunks"]] == sorted(other.sums)


async def test_chunks_of_a_node_that_has_no_replica(bench):
    command = ("volume", "get", bench.volume.name)
    status, out, err = await bench.tercet(*command, "--show-chunks", "--node", "elsewhere")
    assert (status, out) == (2, "")
    assert all(agent.node in err for agent in bench.agents)
    status, out, err = await bench.tercet(*command, "--node", bench.agents[0].node)
    assert (status, out, "--show-chunks" in err) == (2, "", True)
    await bench.agents[0].__aexit__()
    name = bench.agents[0].node
    status, out, err = await bench.signed(*command, "--show-chunks", "--node", name)
    assert (status, out, f"tercet node get {name}" in err) == (2, "", True)


async def test_nodes_and_snapshots(bench):
    name = f"s-{uuid.uuid4().hex[:6]}"
    snapshot = Snapshot(
        metadata=Metadata(name=name, finalizers=[FINALIZER]),
        spec=SnapshotSpec(volume=bench.volume.name),
    )
    await snapshots(bench.api).create(snapshot)
    status, out, _ = await bench.tercet("node", "list")
    assert status == 0
    assert all(agent.node in out for agent in bench.agents)
    status, out, _ = await bench.tercet("node", "get", bench.agents[0].node)
    assert (status, "127.0.0.1" in out) == (0, True)
    status, out, _ = await bench.tercet("snapshot", "list", "-o", "json")
    assert name in [item["metadata"]["name"] for item in json.loads(out)["items"]]
    status, out, _ = await bench.tercet("snapshot", "list")
    assert (status, name in out) == (0, True)


async def test_what_is_missing_is_named_with_the_next_step(bench, tmp_path):
    status, out, err = await bench.tercet("volume", "get", "nothing-here")
    assert (status, out) == (2, "")
    assert "nothing-here" in err
    assert "next:" in err
    status, _, err = await bench.tercet("volume", "list", "--context", "nowhere")
    assert status == 2
    assert "--context" in err
    nowhere = tmp_path / "none"
    status, _, err = await bench.tercet("volume", "list", "--kubeconfig", str(nowhere))
    assert (status, str(nowhere) in err) == (2, True)
    status, _, err = await bench.tercet("volume", "list", env={"HOME": str(tmp_path)})
    assert (status, "KUBECONFIG" in err) == (2, True)
    dead = tmp_path / "dead"
    text = bench.cluster.kubeconfig.read_text()
    port = bench.cluster.plane.addresses.api
    dead.write_text(text.replace(f":{port}", ":1"))
    status, _, err = await bench.tercet("volume", "list", "--kubeconfig", str(dead))
    assert (status, "no answer" in err) == (2, True)


async def test_context_is_the_one_that_was_named(bench, tmp_path):
    import yaml

    document = yaml.safe_load(bench.cluster.kubeconfig.read_text())
    name = document["current-context"]
    document["current-context"] = "elsewhere"
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(document))
    arguments = ("volume", "list", "--kubeconfig", str(path))
    status, _, _ = await bench.tercet(*arguments)
    assert status == 2
    status, out, _ = await bench.tercet(*arguments, "--context", name)
    assert (status, bench.volume.name in out) == (0, True)


async def test_members_as_one_agent_has_them(bench):
    states = ("Self", "Suspected", "Gone")
    first = bench.agents[0]
    first.others = [
        agent_pb2.Member(
            nid=nid, name=f"m{nid}", address=f"10.0.0.{nid}:4422", incarnation=7, state=state
        )
        for nid, state in enumerate(states)
    ]
    status, out, err = await bench.signed("node", "members", first.node)
    assert (status, err) == (0, "")
    assert out.splitlines()[2].split()[:4] == ["1", "m1", "Suspected", "10.0.0.1:4422"]
    assert out.splitlines()[-1] == f"as {first.node} has it: 3 nodes, digest {first.digest}"
    status, out, _ = await bench.signed("node", "members", first.node, "-o", "json")
    said = json.loads(out)
    assert (status, said["digest"]) == (0, first.digest)
    assert [member["state"] for member in said["members"]] == list(states)


async def test_lists_are_checked_and_compared(bench):
    names = [agent.node for agent in bench.agents]
    bench.agents[2].agrees_after = 1
    status, out, _ = await bench.signed("node", "check", *names)
    assert status == 0, out
    assert out.splitlines()[-1] == "the lists of 3 nodes agree"
    bench.agents[1].digest = "ef" * 16
    status, out, _ = await bench.signed("node", "check", *names, "-o", "json")
    said = json.loads(out)
    assert (status, said["agree"]) == (1, False)
    assert [row["repaired"] for row in said["nodes"]] == [2, 2, 2]


async def test_a_locked_list_says_how_to_unlock_it(bench):
    names = [agent.node for agent in bench.agents[:2]]
    status, out, _ = await bench.signed("node", "lock", *names)
    assert (status, [agent.locked for agent in bench.agents]) == (0, [True, True, False])
    assert out.count("true") == 2
    status, _, err = await bench.signed("node", "check", names[0])
    assert status == 2
    assert f"next:  tercet node unlock {names[0]}" in err
    status, out, _ = await bench.signed("node", "unlock", *names, "-o", "json")
    assert (status, [row["locked"] for row in json.loads(out)["nodes"]]) == (0, [False, False])


async def test_node_commands_say_which_node_is_wrong(bench):
    status, _, err = await bench.tercet("node", "lock")
    assert (status, "--all" in err) == (2, True)
    status, _, err = await bench.tercet("node", "members", "nobody")
    assert (status, "no StorageNode nobody" in err) == (2, True)
    away = bench.agents[0]
    await away.__aexit__()
    status, _, err = await bench.signed("node", "members", away.node)
    assert (status, f"tercet node get {away.node}" in err) == (2, True)
