"""The list of nodes of a whole cluster: enrolled by the operator, kept by the agents, shown."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from volumeharness import eventually

from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

SOON_S = 60.0


async def tercet(cluster: LocalCluster, *arguments: str) -> tuple[int, str, str]:
    """Run the command line; exit status, stdout, stderr."""
    done = await asyncio.to_thread(
        subprocess.run,
        [Path(sys.executable).parent / "tercet", *arguments, f"--kubeconfig={cluster.kubeconfig}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


async def members(cluster: LocalCluster, node: str) -> dict:
    """The list as a node has it: state by name."""
    status, out, err = await tercet(cluster, "node", "members", node, "-o", "json")
    if status != 0:
        print(err)
        return {}
    return {each["name"]: each["state"] for each in json.loads(out)["members"]}


async def test_all_nodes_are_members_and_their_lists_agree(cluster: LocalCluster):
    nodes = sorted(cluster.nodes)

    async def whole():
        seen = await members(cluster, nodes[0])
        return seen == {nodes[0]: "Self", nodes[1]: "Alive", nodes[2]: "Alive"}

    await eventually("three members, all alive", whole, SOON_S)
    status, out, err = await tercet(cluster, "node", "check")
    assert status == 0, out + err
    assert out.splitlines()[-1] == "the lists of 3 nodes agree"
    kubectl = Kubectl(cluster.kubectl)

    async def said():
        found = [(await kubectl.get("tsn", node))["status"] for node in nodes]
        said = [status.get("membership") for status in found]
        if None in said or len({each["digest"] for each in said}) != 1:
            return None
        assert sorted(each["nid"] for each in said) == [0, 1, 2]
        assert {each["size"] for each in said} == {3}
        return [status["enrolment"]["instance"] == status["instance"] for status in found]

    assert all(await eventually("every StorageNode says the same list", said, SOON_S))


async def test_an_agent_that_stands_still_is_held_dead_and_then_alive(cluster: LocalCluster):
    first, still, _ = sorted(cluster.nodes)
    cluster.kill("agent", still, signal.SIGSTOP)
    try:

        async def dead():
            return (await members(cluster, first)).get(still) == "Dead"

        await eventually("judged dead", dead, SOON_S)
    finally:
        cluster.kill("agent", still, signal.SIGCONT)

    async def alive():
        return (await members(cluster, first)).get(still) == "Alive"

    await eventually("alive after all", alive, SOON_S)


async def test_a_killed_agent_is_a_member_again_and_a_new_engine_a_new_entry(
    cluster: LocalCluster,
):
    first, other, _ = sorted(cluster.nodes)
    kubectl = Kubectl(cluster.kubectl)
    before = (await kubectl.get("tsn", other))["status"]["enrolment"]
    cluster.kill("agent", other)
    cluster.kill("engine", other)

    async def renewed():
        status, out, _ = await tercet(cluster, "node", "members", first, "-o", "json")
        found = json.loads(out)["members"] if status == 0 else []
        return next(
            (
                each
                for each in found
                if each["name"] == other
                and each["instance"] != before["instance"]
                and each["state"] == "Alive"
            ),
            None,
        )

    entry = await eventually("its new instance is in the list", renewed, SOON_S)
    assert entry["nid"] == before["nid"]
    assert entry["incarnation"] > before["incarnation"]


async def test_locked_lists_say_so_and_go_on_when_unlocked(cluster: LocalCluster):
    first = min(cluster.nodes)
    status, _, err = await tercet(cluster, "node", "lock", "--all")
    assert status == 0, err
    status, out, _ = await tercet(cluster, "node", "members", first)
    assert (status, out.splitlines()[-1].endswith(", LOCKED")) == (0, True)
    status, _, err = await tercet(cluster, "node", "check", first)
    assert (status, f"next:  tercet node unlock {first}" in err) == (2, True)
    status, _, err = await tercet(cluster, "node", "unlock", "--all")
    assert status == 0, err
    status, out, err = await tercet(cluster, "node", "check")
    assert status == 0, out + err
