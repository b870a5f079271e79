"""What people get wrong, on a whole cluster: a clear error where they look, and nothing changed."""

import asyncio
import json
import os
import socket

import pytest

from tercet_e2e.kubectl import Kubectl, KubectlError
from tercet_e2e.local import LocalCluster
from tercet_e2e.story import objects

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]
SOON_S = 30.0


async def events_of(kubectl: Kubectl, name: str, word: str) -> str:
    """Wait until an event of the object says `word`; returns its message."""
    deadline = asyncio.get_running_loop().time() + SOON_S
    while asyncio.get_running_loop().time() < deadline:
        for event in await kubectl.list("events"):
            if event["involvedObject"]["name"] == name and word in event["message"]:
                return str(event["message"])
        await asyncio.sleep(0.2)
    raise AssertionError(f"no event of {name} says {word!r}")


@pytest.fixture
def kubectl(cluster: LocalCluster) -> Kubectl:
    return Kubectl(cluster.kubectl)


def immediate(parameters: dict[str, str], name: str) -> dict:
    made = objects.classes()[0]
    return made | {
        "metadata": {"name": name},
        "parameters": parameters,
        "volumeBindingMode": "Immediate",
    }


def claim(name: str, size: str, storage_class: str) -> dict:
    made = objects.claim(name, size)
    made["spec"]["storageClassName"] = storage_class
    return made


async def test_an_unknown_parameter_is_named_in_the_claims_events(kubectl: Kubectl):
    await kubectl.apply(immediate({"replica": "2"}, "typo"), claim("typo", "1Gi", "typo"))
    assert "'replica' is unknown" in await events_of(kubectl, "typo", "unknown")
    await kubectl.delete("pvc", "typo")
    assert await kubectl.list("tvol") == []


async def test_a_volume_larger_than_the_cluster_says_how_much_there_is(kubectl: Kubectl):
    await kubectl.apply(immediate({"replicas": "3"}, "now"), claim("huge", "1Ti", "now"))
    message = await events_of(kubectl, "huge", "ResourceExhausted")
    assert "bytes" in message
    await kubectl.delete("pvc", "huge")
    deadline = asyncio.get_running_loop().time() + SOON_S
    while await kubectl.list("tvol"):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.2)


async def test_an_impossible_size_is_refused(kubectl: Kubectl):
    await kubectl.apply(immediate({"replicas": "3"}, "now"), claim("absurd", "4Ei", "now"))
    await events_of(kubectl, "absurd", "a volume has at most")
    await kubectl.delete("pvc", "absurd")
    assert await kubectl.list("tvol") == []


async def test_a_snapshot_that_is_not_there_is_no_source(kubectl: Kubectl):
    made = objects.claim("orphan", "1Gi", snapshot="never-made")
    made["spec"]["storageClassName"] = "now"
    await kubectl.apply(immediate({"replicas": "3"}, "now"), made)
    await events_of(kubectl, "orphan", "never-made")
    await kubectl.delete("pvc", "orphan")
    assert await kubectl.list("tvol") == []


async def test_a_second_writer_waits_and_is_told_why(cluster: LocalCluster, kubectl: Kubectl):
    folder = cluster.state.root / "second"
    folder.mkdir()
    first, second = (objects.writer(name, "shared", folder) for name in ("first", "second"))
    first["spec"]["nodeName"], second["spec"]["nodeName"] = "node-1", "node-2"
    made = claim("shared", "64Mi", "now")
    await kubectl.apply(immediate({"replicas": "3"}, "now"), made, first)
    await kubectl.until("pod", "first", lambda o: o["status"].get("phase") == "Running", 60, "runs")
    await kubectl.apply(second)
    await events_of(kubectl, "second", "Multi-Attach")
    attachments = await kubectl.list("volumeattachments")
    assert [a["spec"]["nodeName"] for a in attachments] == ["node-1"]
    await kubectl.delete("pod", "second", "first")
    await kubectl.delete("pvc", "shared")


async def test_an_illegal_step_of_a_configuration_is_refused_by_the_api_server(kubectl: Kubectl):
    await kubectl.apply(immediate({"replicas": "3"}, "now"), claim("victim", "64Mi", "now"))
    bound = await kubectl.until(
        "pvc", "victim", lambda o: o["status"].get("phase") == "Bound", SOON_S, "is bound"
    )
    volume = bound["spec"]["volumeName"]
    before = (await kubectl.get("tvol", volume))["status"]["config"]
    steps = {
        "an epoch that falls": before | {"epoch": 0},
        "a primary that is no member": before
        | {"epoch": before["epoch"] + 1, "primary": before["primary"] | {"node": "nobody"}},
        "another primary within the epoch": before
        | {"primary": before["primary"] | {"instance": "0b0c0d0e-0000-4000-8000-000000000001"}},
        "taken away": None,
    }
    for what, after in steps.items():
        patch = json.dumps({"status": {"config": after}})
        with pytest.raises(KubectlError) as refused:
            await kubectl.run(
                "patch", "tvol", volume, "--subresource=status", "--type=merge", "-p", patch
            )
        assert "nvalid" in str(refused.value), what
    assert (await kubectl.get("tvol", volume))["status"]["config"] == before
    await kubectl.delete("pvc", "victim")


async def test_garbage_on_every_port_harms_nobody(cluster: LocalCluster):
    node = cluster.nodes["node-1"]
    before = cluster.pid("engine", "node-1")
    for port in (4420, 8009, 4421, 4423):
        for garbage in (os.urandom(64), os.urandom(4096), bytes(8192), b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection((node.address, port), timeout=5) as connection:
                connection.sendall(garbage)
                connection.settimeout(10)
                try:
                    while connection.recv(4096):
                        pass
                except ConnectionResetError:
                    pass
    assert cluster.pid("engine", "node-1") == before
    await cluster.wait_ready()


async def test_a_device_that_is_too_small_is_said_on_its_node(
    cluster: LocalCluster,
    kubectl: Kubectl,
):
    small = {
        "apiVersion": "tercet.io/v1alpha1",
        "kind": "StorageNode",
        "metadata": {"name": "small"},
        "spec": {
            "nodeName": "small",
            "address": "127.0.9.9",
            "devices": [{"id": "d0", "file": {"path": "/nowhere/d0", "capacityBytes": 4096}}],
        },
    }
    with pytest.raises(KubectlError, match="capacityBytes"):
        await kubectl.apply(small)
    assert "small" not in [n["metadata"]["name"] for n in await kubectl.list("tsn")]
