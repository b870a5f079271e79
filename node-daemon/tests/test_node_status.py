"""What a node says of itself: devices, orphans, metrics, and what its engine is told."""

from __future__ import annotations

from node_objects import INSTANCE, VOLUME, config, entry, held, replica_id, volume
from prometheus_client.exposition import generate_latest

from tercet_api.objects import Device, FileSource, Metadata, Ports, StorageNode, StorageNodeSpec
from tercet_node import configure, nodestatus
from tercet_node.metrics import Metrics
from tercet_node.protos import engine_pb2 as pb


def status(**more):
    devices = [
        pb.DeviceStatus(id="d0", state="Ready", capacity_bytes=100, allocated_bytes=40),
        pb.DeviceStatus(id="d1", state="Failed", message="EIO", capacity_bytes=100),
    ]
    return pb.StatusResponse(node="a", instance=INSTANCE, version="0.1.0", devices=devices, **more)


def test_replica_that_no_object_names_is_an_orphan():
    assert nodestatus.orphans([held("a")], [], "a")[0].replica == replica_id("a")
    # The same UUID and name in an object that does not name the replica: still an orphan, so that
    # "no config never means new" holds (a restored or re-applied object).
    assert nodestatus.orphans([held("a")], [volume()], "a") != []


def test_named_and_coming_replicas_are_no_orphans():
    for named in (
        volume(entry("a", "InSync")),
        volume(config=config("a")),
        volume(entry("a", "Placed", named=False)),
    ):
        assert nodestatus.orphans([held("a")], [named], "a") == []
    elsewhere = volume(entry("b", "Placed", named=False))
    assert nodestatus.orphans([held("a")], [elsewhere], "a") != []


def test_failed_device_counts_for_nothing_and_is_said():
    said = nodestatus.observed(status(), [])
    assert (said["capacityBytes"], said["allocatedBytes"]) == (100, 40)
    assert said["devices"][1]["message"] == "EIO"
    assert said["instance"] == INSTANCE


def test_orphans_are_not_denied_before_every_device_could_be_read():
    assert "orphansInstance" not in nodestatus.observed(status(), [])
    whole = status()
    del whole.devices[1]
    assert nodestatus.observed(whole, [])["orphansInstance"] == INSTANCE
    whole.devices.add(id="d1", state="Failed", message="opening")
    assert set(nodestatus.observed(whole, [])) == {"instance", "version"}
    assert "orphansInstance" not in nodestatus.observed(pb.StatusResponse(instance=INSTANCE), [])


def test_only_states_are_urgent():
    before = nodestatus.observed(status(), [])
    moved = status()
    moved.devices[0].allocated_bytes = 41
    changed, urgent = nodestatus.difference(before, nodestatus.observed(moved, []))
    assert set(changed) == {"devices", "allocatedBytes"}
    assert not urgent
    moved.devices[0].state = "Failed"
    assert nodestatus.difference(before, nodestatus.observed(moved, []))[1]
    assert nodestatus.difference(before, before) == ({}, False)


def node(name: str, **spec) -> StorageNode:
    number = ord(name)
    return StorageNode(
        metadata=Metadata(name=name),
        spec=StorageNodeSpec(node_name=name, address=f"127.0.1.{number}", **spec),
    )


def test_engine_is_told_of_itself_and_all_others():
    devices = [
        Device(id="f", file=FileSource(path="/x", capacity_bytes=1 << 28)),
        Device(id="p", path="/dev/sdb"),
        Device(id="n", nguid="0" * 32),
    ]
    own = node("a", devices=devices, ports=Ports(nvme_tcp=1, discovery=2, replication=3))
    told = configure.request(own, [node("c"), own, node("b")], "cluster")
    assert [peer.node for peer in told.peers] == ["b", "c"]
    assert (told.ports.nvme_tcp, told.ports.discovery, told.ports.replication) == (1, 2, 3)
    assert [d.WhichOneof("source") for d in told.devices] == ["file", "path", "nguid"]
    assert told.link_security == pb.LINK_SECURITY_PLAIN
    assert told == configure.request(own, [own, node("b"), node("c")], "cluster")


def test_metrics_pass_the_engines_counters_on():
    counters = [
        pb.Counter(name="host_reads_total", labels={"volume": "v"}, value=3),
        pb.Counter(name="host_reads_total", labels={"volume": "w"}, value=4),
        pb.Counter(name="queue_depth", value=2),
        pb.Counter(name="bad name", value=1),
    ]
    replica = held("a", serving=True, epoch=5)
    text = generate_latest(
        Metrics(lambda: status(counters=counters, replicas=[replica])).registry
    ).decode()
    assert 'tercet_host_reads_total{volume="v"} 3.0' in text
    assert 'tercet_host_reads_total{volume="w"} 4.0' in text
    assert "tercet_queue_depth 2.0" in text
    assert "bad name" not in text
    assert 'tercet_replica_epoch{volume="v"} 5.0' in text
    gone = generate_latest(Metrics(lambda: None).registry).decode()
    assert "tercet_engine_up 0.0" in gone
    assert VOLUME not in gone
