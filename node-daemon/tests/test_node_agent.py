"""The whole agent against the real API server and a fake engine behind the real socket.

The operator's part (placement, first configuration, finalizers) is played by the test, through the
API server as the operator does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import pytest
from node_bench import GIB, TIMEOUT_S, until, value_of
from node_fake_engine import Disk, FakeEngine

from tercet_api.clients import NotFound, snapshots, storage_nodes, volumes
from tercet_api.coordination import Swapped, leases, swap_config
from tercet_api.coordination.membership import NODE_LEASE_RENEW_S
from tercet_api.names import FINALIZER, host_nqn, node_lease
from tercet_api.objects import (
    Attachment,
    Metadata,
    Primary,
    ReplicaPhase,
    Snapshot,
    SnapshotSpec,
)
from tercet_node.protos import engine_pb2 as pb

pytestmark = pytest.mark.local


async def test_node_says_what_it_is_and_renews_its_lease(bench):
    async def look():
        found = await storage_nodes(bench.api).get(bench.node)
        return found if found.status.orphans_instance == bench.engine.instance else None

    node = await until(look, "status written")
    assert node.status.instance == bench.engine.instance
    assert node.status.capacity_bytes == GIB
    assert node.status.devices[0].id == "d0"
    cluster_id = bench.engine.configured[0].cluster_id
    system = await bench.api.request("GET", "/api/v1/namespaces/kube-system")
    assert cluster_id == system["metadata"]["uid"]

    async def renewed():
        with contextlib.suppress(NotFound):
            return await leases(bench.api).get(node_lease(bench.node))

    lease = await until(renewed, "lease")
    assert lease.spec.holder_identity == bench.engine.instance
    # The engine is gone: no more renewals, though the agent lives.
    await bench.kill_engine()

    async def quiet():
        before = (await leases(bench.api).get(node_lease(bench.node))).spec.renew_time
        await asyncio.sleep(2 * NODE_LEASE_RENEW_S)
        return (await leases(bench.api).get(node_lease(bench.node))).spec.renew_time == before

    await until(quiet, "no renewal for two periods")
    await until(lambda: value_of(bench.agent.missing() == "engine not configured"), "said so")


async def test_replica_is_made_reported_and_shown(bench):
    volume = await bench.make_volume()
    volume = await bench.created(volume.name)
    held = bench.disk.replicas[volume.spec.uuid]
    assert volume.status.replicas[0].replica == held.replica
    await until(lambda: value_of(bench.engine.last_view(volume.spec.uuid)), "shown")
    assert bench.engine.last_view(volume.spec.uuid).size_bytes == GIB


async def test_replica_that_was_placed_while_the_engine_was_away_is_made(bench):
    await until(lambda: value_of(bench.agent.missing() is None), "ready")
    await bench.kill_engine()
    await until(lambda: value_of(bench.agent.missing() is not None), "session ended")
    volume = await bench.make_volume()
    await until(lambda: value_of(volume.name in bench.agent.world.volumes), "seen")
    await bench.start_engine()
    await bench.created(volume.name)


async def test_replica_that_cannot_be_made_is_said_to_have_failed(bench):
    import grpc

    bench.engine.refuse_create = (grpc.StatusCode.RESOURCE_EXHAUSTED, "1 GiB asked, 0 free")
    volume = await bench.make_volume()

    async def look():
        found = await bench.volume(volume.name)
        return found if found.status.replicas[0].state is ReplicaPhase.FAILED else None

    failed = await until(look, "Failed")
    assert "0 free" in failed.status.replicas[0].message


async def test_read_requested_is_answered_consistently(bench):
    volume = await bench.created((await bench.make_volume()).name)
    bench.engine.observed.clear()
    bench.engine.send(read=pb.ReadRequested(volume=volume.spec.uuid))

    async def look():
        return any(seen.view.consistent for seen in bench.engine.observed)

    await until(look, "a consistent view")


async def test_primary_says_sizes_and_states_and_grows(bench):
    volume = await bench.served()
    assert volume.status.size_bytes == GIB
    await volumes(bench.api).patch(volume.name, {"spec": {"sizeBytes": 2 * GIB}})

    async def look():
        found = await bench.volume(volume.name)
        return found.status.size_bytes == 2 * GIB

    await until(look, "grown")
    assert bench.disk.replicas[volume.spec.uuid].size_bytes == 2 * GIB


async def test_detached_host_is_fenced_for_the_generation_that_refused_it(bench):
    volume = await bench.served()
    host = host_nqn("w1")
    attachment = Attachment(node_name="w1", host_nqn=host)
    attached = await volumes(bench.api).patch(
        volume.name, {"spec": {"attachments": [attachment.to_json()]}}
    )
    bench.disk.replicas[volume.spec.uuid].hosts.append(host)
    detached = await volumes(bench.api).patch(volume.name, {"spec": {"attachments": []}})
    assert detached.metadata.generation > attached.metadata.generation

    async def look():
        fence = (await bench.volume(volume.name)).status.fence
        return fence is not None and fence.generation >= detached.metadata.generation

    await until(look, "fenced")
    assert list(bench.disk.replicas[volume.spec.uuid].hosts) == []
    fence = (await bench.volume(volume.name)).status.fence
    assert fence.epoch == 1


async def test_nobody_fences_for_a_successor(bench):
    volume = await bench.served()

    async def fenced():
        found = (await bench.volume(volume.name)).status.fence
        return found if found is not None else None

    await until(fenced, "first fence")
    # Another instance takes over, while this engine still believes that it serves.
    config = (await bench.volume(volume.name)).status.config
    taken = config.model_copy(
        update={"epoch": 2, "primary": Primary(node=bench.node, instance=str(uuid.uuid4()))}
    )
    swapped = await swap_config(volumes(bench.api), volume.name, volume.uid, config, taken)
    assert isinstance(swapped, Swapped)
    bench.engine.send(fenced=pb.Fenced(volume=volume.spec.uuid, epoch=1, generation=99))
    await asyncio.sleep(0.5)
    assert (await bench.volume(volume.name)).status.fence.generation != 99


async def make_snapshot(bench, volume):
    return await snapshots(bench.api).create(
        Snapshot(
            metadata=Metadata(name=f"s-{uuid.uuid4().hex[:8]}", finalizers=[FINALIZER]),
            spec=SnapshotSpec(volume=volume.name),
        )
    )


async def test_snapshot_is_taken_and_dropped(bench):
    volume = await bench.served()
    snapshot = await make_snapshot(bench, volume)

    async def ready():
        found = await snapshots(bench.api).get(snapshot.name)
        return found if found.status.ready_to_use else None

    taken = await until(ready, "snapshot ready")
    assert (taken.status.volume_uuid, taken.status.size_bytes) == (volume.spec.uuid, GIB)
    assert taken.status.epoch == 1
    assert [c.reason for c in taken.status.conditions] == ["Committed"]
    await snapshots(bench.api).delete(snapshot.name, uid=snapshot.uid)
    await snapshots(bench.api).patch_status(snapshot.name, {"status": {"phase": "Deleting"}})

    async def dropped():
        return (await snapshots(bench.api).get(snapshot.name)).status.deleted

    await until(dropped, "snapshot deleted")
    assert not bench.disk.replicas[volume.spec.uuid].snapshots


async def test_deletion_goes_by_the_object_and_is_reported(bench):
    volume = await bench.created((await bench.make_volume()).name)
    replica = volume.status.replicas[0].replica
    await volumes(bench.api).delete(volume.name, uid=volume.uid)
    await asyncio.sleep(0.3)
    assert volume.spec.uuid in bench.disk.replicas, "the operator has not allowed it yet"
    await volumes(bench.api).patch_status(volume.name, {"status": {"phase": "Deleting"}})

    async def look():
        found = await bench.volume(volume.name)
        return found.status.replicas[0].state is ReplicaPhase.DELETED

    await until(look, "Deleted")
    assert bench.disk.tombstones == {replica}
    assert volume.spec.uuid not in bench.disk.replicas


async def test_replica_without_object_is_an_orphan_and_kept(bench):
    volume = await bench.created((await bench.make_volume()).name)
    # Somebody forces the object away.
    await volumes(bench.api).patch(volume.name, {"metadata": {"finalizers": None}})
    await volumes(bench.api).delete(volume.name, uid=volume.uid)

    async def look():
        node = await storage_nodes(bench.api).get(bench.node)
        return [o.replica for o in node.status.orphans]

    assert await until(look, "orphan") == [volume.status.replicas[0].replica]
    assert volume.spec.uuid in bench.disk.replicas


async def test_restart_of_engine_and_agent_rebuilds_all(bench):
    volume = await bench.served()
    await bench.kill_engine()
    second = await bench.start_engine()

    async def configured():
        return second.configured and second.last_view(volume.spec.uuid)

    view = await until(configured, "second engine configured and shown")
    assert view.config.epoch == 1
    node = await until(lambda: _node_of(bench, second.instance), "instance written")
    assert node.status.orphans == []
    await bench.kill_agent()
    second.configured.clear()
    second.observed.clear()
    await bench.start_agent()
    await until(configured, "second agent has shown")


async def _node_of(bench, instance):
    found = await storage_nodes(bench.api).get(bench.node)
    return found if found.status.instance == instance else None


async def test_refused_configuration_is_where_the_user_looks(bench):
    await bench.kill_engine()
    bench.disk = Disk()
    engine = FakeEngine(bench.socket, bench.node, bench.disk)
    engine.refuse_configure = "device d0: superblock of another cluster"
    async with engine:

        async def look():
            node = await storage_nodes(bench.api).get(bench.node)
            return node.status.devices and "another cluster" in node.status.devices[0].message

        await until(look, "message on the device")

        async def event():
            found = await bench.api.request(
                "GET",
                "/api/v1/namespaces/default/events",
                query={"fieldSelector": f"involvedObject.name={bench.node}"},
            )
            return [e for e in found["items"] if "another cluster" in e["message"]]

        events = await until(event, "event")
        assert events[0]["type"] == "Warning"


async def test_notice_becomes_an_event_at_the_volume(bench):
    volume = await bench.created((await bench.make_volume()).name)
    notice = pb.Notice(volume=volume.spec.uuid, reason="TakeOver", message="epoch 2 after 0.3 s")
    bench.engine.send(notice=notice)
    bench.engine.send(notice=notice)

    async def look():
        found = await bench.api.request(
            "GET",
            "/api/v1/namespaces/default/events",
            query={"fieldSelector": f"involvedObject.uid={volume.uid}"},
        )
        return found["items"]

    events = await until(look, "event")
    await asyncio.sleep(0.3)
    events = await look()
    assert [(e["reason"], e["involvedObject"]["kind"]) for e in events] == [("TakeOver", "Volume")]


async def test_http_says_what_is_missing_and_what_the_engine_counts(bench, free_port):
    import aiohttp

    from tercet_node import http

    await until(lambda: value_of(bench.agent.missing() is None), "ready")
    listen = f"127.0.0.1:{free_port()}"
    task = asyncio.create_task(
        http.serve(listen, bench.agent.metrics.registry, bench.agent.missing)
    )
    try:
        async with aiohttp.ClientSession() as client:

            async def get(path):
                with contextlib.suppress(aiohttp.ClientConnectorError):
                    async with client.get(f"http://{listen}{path}") as answer:
                        return answer.status, await answer.text()

            assert await until(lambda: get("/readyz"), "http") == (200, "ok\n")
            _, text = await get("/metrics")
            assert "tercet_host_write_bytes_total 7.0" in text
            assert "tercet_engine_up 1.0" in text
            assert (await get("/nothing"))[0] == 404
            for garbage in (b"\x00\xff\x16\x03\r\n\r\n", b"GET /metrics\r\n\r\n", b"x" * 20_000):
                reader, writer = await asyncio.open_connection(*listen.split(":"))
                with contextlib.suppress(ConnectionError):
                    writer.write(garbage)
                    said = await asyncio.wait_for(reader.read(), TIMEOUT_S)
                    assert said[:13] in (b"", b"HTTP/1.1 400 ")
                writer.close()
            assert (await get("/healthz"))[0] == 200
            await bench.kill_engine()

            async def unready():
                status, said = await get("/readyz")
                return said if status == 503 else None

            assert "engine" in await until(unready, "not ready")
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
