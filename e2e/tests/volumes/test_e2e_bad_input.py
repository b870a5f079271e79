"""What people get wrong, on a whole cluster: a clear error where they look, and nothing changed."""

import asyncio
import json
import os
import socket
import urllib.request

import pytest
from volumeharness import claim, events_of, immediate, refused_for_good, running, volume_of

from tercet_e2e.kubectl import Kubectl, KubectlError
from tercet_e2e.local import LocalCluster
from tercet_e2e.story import objects

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]
GARBAGE = (
    os.urandom(64),
    os.urandom(4096),
    bytes(8192),
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16no request at all\r\n\r\n",
)
ENGINE_PORTS = (4420, 8009, 4421)
AGENT_PORT = 4423


async def test_an_unknown_parameter_is_named_in_the_claims_events(kubectl: Kubectl):
    await kubectl.apply(
        immediate({"replica": "2"}, "typo"), claim("typo", "1Gi", storage_class="typo")
    )
    assert "'replica' is unknown" in await events_of(kubectl, "typo", "unknown")
    await refused_for_good(kubectl, "typo")


async def test_a_volume_larger_than_the_cluster_says_how_much_there_is(kubectl: Kubectl):
    await kubectl.apply(
        immediate({"replicas": "3"}, "now"), claim("huge", "1Ti", storage_class="now")
    )
    message = await events_of(kubectl, "huge", "ResourceExhausted")
    assert "bytes" in message
    await refused_for_good(kubectl, "huge")


async def test_an_impossible_size_is_refused(kubectl: Kubectl):
    await kubectl.apply(
        immediate({"replicas": "3"}, "now"), claim("absurd", "4Ei", storage_class="now")
    )
    await events_of(kubectl, "absurd", "a volume has at most")
    await refused_for_good(kubectl, "absurd")


async def test_a_snapshot_that_is_not_there_is_no_source(kubectl: Kubectl):
    made = objects.claim("orphan", "1Gi", snapshot="never-made")
    made["spec"]["storageClassName"] = "now"
    await kubectl.apply(immediate({"replicas": "3"}, "now"), made)
    await events_of(kubectl, "orphan", "never-made")
    await refused_for_good(kubectl, "orphan")


async def test_a_deleted_snapshot_is_no_source(kubectl: Kubectl):
    """Once gone by its VolumeSnapshot, and once under a VolumeSnapshot that still stands."""
    await kubectl.apply(
        immediate({"replicas": "3"}, "now"), claim("cut", "64Mi", storage_class="now")
    )
    await volume_of(kubectl, "cut")
    for name in ("gone", "hollow"):
        await kubectl.apply(objects.volume_snapshot(name, "cut"))
        await kubectl.until(
            "volumesnapshot", name, lambda o: o.get("status", {}).get("readyToUse"), 60, "is ready"
        )
    content = (await kubectl.get("volumesnapshot", "hollow"))["status"][
        "boundVolumeSnapshotContentName"
    ]
    handle = (await kubectl.get("volumesnapshotcontent", content))["status"]["snapshotHandle"]
    await kubectl.delete("volumesnapshot", "gone")
    await kubectl.delete("tsnap", handle)
    for name, word in (("gone", "gone"), ("hollow", handle)):
        made = objects.claim(f"of-{name}", "64Mi", snapshot=name)
        made["spec"]["storageClassName"] = "now"
        await kubectl.apply(made)
        await events_of(kubectl, f"of-{name}", word)
        await refused_for_good(kubectl, f"of-{name}")
    await kubectl.delete("volumesnapshot", "hollow")
    await kubectl.delete("pvc", "cut")


async def test_a_second_writer_waits_and_is_told_why(cluster: LocalCluster, kubectl: Kubectl):
    folder = cluster.state.root / "second"
    folder.mkdir()
    first, second = (objects.writer(name, "shared", folder) for name in ("first", "second"))
    first["spec"]["nodeName"], second["spec"]["nodeName"] = "node-1", "node-2"
    made = claim("shared", "64Mi", storage_class="now")
    await kubectl.apply(immediate({"replicas": "3"}, "now"), made, first)
    await running(kubectl, "first")
    await kubectl.apply(second)
    await events_of(kubectl, "second", "Multi-Attach")
    attachments = await kubectl.list("volumeattachments")
    assert [a["spec"]["nodeName"] for a in attachments] == ["node-1"]
    await kubectl.delete("pod", "second", "first")
    await kubectl.delete("pvc", "shared")


async def test_an_illegal_step_of_a_configuration_is_refused_by_the_api_server(kubectl: Kubectl):
    await kubectl.apply(
        immediate({"replicas": "3"}, "now"), claim("victim", "64Mi", storage_class="now")
    )
    volume = await volume_of(kubectl, "victim")
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
    # Its own next steps (Active, a take-over on a slow machine) are legal and may have come.
    after = (await kubectl.get("tvol", volume))["status"]["config"]
    assert after["epoch"] >= before["epoch"]
    assert after["members"] == before["members"]
    assert after["primary"] == before["primary"] or after["epoch"] > before["epoch"]
    assert after["primary"]["node"] != "nobody"
    await kubectl.delete("pvc", "victim")


def http_addresses(cluster: LocalCluster) -> list[tuple[str, int]]:
    """Where processes serve health and metrics: what their command lines say."""
    found = []
    for record in sorted(cluster.state.processes.glob("*.json")):
        argv = json.loads(record.read_text())["argv"]
        if "--http" in argv:
            host, _, port = argv[argv.index("--http") + 1].rpartition(":")
            found.append((host, int(port)))
    return found


def pids(cluster: LocalCluster) -> dict[str, int]:
    """Every process of the cluster, engines included."""
    records = [json.loads(path.read_text()) for path in cluster.state.processes.glob("*.json")]
    engines = {f"engine-{node}": cluster.pid("engine", node) or 0 for node in cluster.nodes}
    return {record["name"]: record["pid"] for record in records} | engines


def make_noise(address: tuple[str, int], *, ends: bool) -> None:
    """Send garbage, one connection for each sort; each must be ended by the other side.

    `ends`: say that nothing follows, without which an HTTP server may wait for the rest.
    """
    for garbage in GARBAGE:
        with socket.create_connection(address, timeout=60) as connection:
            connection.settimeout(60)
            try:
                connection.sendall(garbage)
                if ends:
                    connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
            except TimeoutError:
                raise AssertionError(f"{address} keeps a connection of garbage") from None
            except OSError:
                pass  # it was closed before all was said, which is as good


async def test_garbage_on_every_port_harms_nobody(cluster: LocalCluster, kubectl: Kubectl):
    node = cluster.nodes["node-1"].address
    http = http_addresses(cluster)
    # Operator and csi controller; agent, csi node and attacher on each node.
    assert len(http) == 2 + 3 * len(cluster.nodes)
    before = pids(cluster)
    noises = [
        *(asyncio.to_thread(make_noise, (node, port), ends=False) for port in ENGINE_PORTS),
        asyncio.to_thread(make_noise, (node, AGENT_PORT), ends=False),
        *(asyncio.to_thread(make_noise, address, ends=True) for address in http),
    ]
    await asyncio.gather(*noises)
    for host, port in http:
        with urllib.request.urlopen(f"http://{host}:{port}/healthz", timeout=60) as answer:
            assert answer.status == 200, (host, port)
    assert pids(cluster) == before
    await kubectl.apply(claim("after-noise", "64Mi", storage_class="now"))
    await volume_of(kubectl, "after-noise")
    await kubectl.delete("pvc", "after-noise")


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
