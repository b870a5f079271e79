# ruff: noqa: N802  (the method names of the protocol)
"""A small engine with state behind the real protocol: engine.proto over a real Unix socket.

It keeps replicas, serves what it is told to serve, and sends what a test asks it to send. It has no
log: places are counted up. What it does not check: the rules of replication (crates/replication).
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from tercet_node.protos import engine_pb2 as pb
from tercet_node.protos import engine_pb2_grpc

DEVICE_BYTES = 1 << 30


@dataclass
class Disk:
    """What survives a restart of the fake engine."""

    replicas: dict[str, pb.ReplicaStatus] = field(default_factory=dict)
    tombstones: set[str] = field(default_factory=set)


class FakeEngine(engine_pb2_grpc.EngineServicer):
    """One start of an engine. An async context manager."""

    def __init__(self, socket: Path, node: str, disk: Disk | None = None) -> None:
        self.socket = socket
        self.node = node
        self.disk = disk or Disk()
        self.instance = str(uuid.uuid4())
        self.configured: list[pb.ConfigureRequest] = []
        self.observed: list[pb.ObserveVolumeRequest] = []
        self.reports: asyncio.Queue[pb.ReportSwapRequest] = asyncio.Queue()
        self.refuse_configure: str | None = None
        self.refuse_create: tuple[grpc.StatusCode, str] | None = None
        self.links: dict[str, bool] = {}
        self.standings: dict[str, str] = {}
        self._events: asyncio.Queue[pb.EngineEvent] = asyncio.Queue()
        self._tokens = 0
        self._lsn = 0

    async def __aenter__(self):
        self.socket.unlink(missing_ok=True)
        self._server = grpc.aio.server()
        engine_pb2_grpc.add_EngineServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self.socket}")
        await self._server.start()
        return self

    async def __aexit__(self, *_):
        await self._server.stop(None)

    # ---------------------------------------------------------------- what a test does

    def send(self, **event):
        self._events.put_nowait(pb.EngineEvent(**event))

    def ask_swap(self, volume: str, old: pb.Config, new: pb.Config) -> int:
        self._tokens += 1
        self.send(swap=pb.SwapRequested(token=self._tokens, volume=volume, old=old, new=new))
        return self._tokens

    def lead(self, volume: str, epoch: int) -> pb.ReplicaStatus:
        replica = self.disk.replicas[volume]
        replica.epoch = epoch
        replica.serving = True
        self.send(changed=pb.Changed())
        return replica

    def last_view(self, volume: str) -> pb.VolumeView | None:
        views = [seen.view for seen in self.observed if seen.volume == volume]
        return views[-1] if views else None

    # ---------------------------------------------------------------- engine.proto

    async def Configure(self, request, context):
        if self.refuse_configure is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refuse_configure)
        assert request.node == self.node
        self.configured.append(request)
        return pb.ConfigureResponse(instance=self.instance)

    async def ObserveVolume(self, request, context):
        self.observed.append(request)
        replica = self.disk.replicas.get(request.volume)
        if replica is not None and replica.serving and request.view.consistent:
            allowed = {at.host_nqn for at in request.view.attachments}
            kept = [host for host in replica.hosts if host in allowed]
            del replica.hosts[:]
            replica.hosts.extend(kept)
            fence = pb.Fence(epoch=replica.epoch, generation=request.view.generation)
            if request.view.fence != fence:
                self.send(
                    fenced=pb.Fenced(
                        volume=request.volume, epoch=fence.epoch, generation=fence.generation
                    )
                )
        return pb.ObserveVolumeResponse()

    async def CreateReplica(self, request, context):
        if self.refuse_create is not None:
            await context.abort(*self.refuse_create)
        if request.volume not in self.disk.replicas:
            self.disk.replicas[request.volume] = pb.ReplicaStatus(
                volume=request.volume,
                name=request.name,
                replica=str(uuid.uuid4()),
                size_bytes=request.size_bytes,
            )
        held = self.disk.replicas[request.volume]
        return pb.CreateReplicaResponse(replica=held.replica, incomplete=held.incomplete)

    async def DeleteReplica(self, request, context):
        held = self.disk.replicas.get(request.volume)
        if held is not None and held.replica == request.replica:
            del self.disk.replicas[request.volume]
            self.disk.tombstones.add(request.replica)
        return pb.DeleteReplicaResponse()

    async def _served(self, volume, context):
        held = self.disk.replicas.get(volume)
        if held is None or not held.serving:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not the serving primary")
        self._lsn += 1
        return held

    async def CreateSnapshot(self, request, context):
        held = await self._served(request.volume, context)
        found = next((s for s in held.snapshots if s.snapshot == request.snapshot), None)
        if found is None:
            found = held.snapshots.add(
                snapshot=request.snapshot,
                epoch=held.epoch,
                lsn=self._lsn,
                size_bytes=held.size_bytes,
            )
        return pb.PlaceResponse(epoch=found.epoch, lsn=found.lsn)

    async def DeleteSnapshot(self, request, context):
        held = await self._served(request.volume, context)
        kept = [s for s in held.snapshots if s.snapshot != request.snapshot]
        if len(kept) == len(held.snapshots):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such snapshot")
        del held.snapshots[:]
        held.snapshots.extend(kept)
        return pb.PlaceResponse(epoch=held.epoch, lsn=self._lsn)

    async def Grow(self, request, context):
        held = await self._served(request.volume, context)
        held.size_bytes = request.size_bytes
        return pb.PlaceResponse(epoch=held.epoch, lsn=self._lsn)

    async def ChunkSums(self, request, context):
        held = self.disk.replicas.get(request.volume)
        if held is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such replica")
        return pb.ChunkSumsResponse(
            epoch=held.epoch,
            lsn=self._lsn,
            chunk_bytes=4 << 20,
            sums=[pb.ChunkSum(index=0, crc32c=0xE3069283)],
        )

    async def ChunkMap(self, request, context):
        held = self.disk.replicas.get(request.volume)
        if held is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such replica")
        row = pb.ChunkRow(
            chunk=request.from_chunk,
            mapped_bytes=8192,
            shared_bytes=4096,
            extents=2,
            device_offset_bytes=1 << 30,
            changed_epoch=held.epoch,
            changed_lsn=self._lsn,
        )
        return pb.ChunkMapResponse(
            epoch=held.epoch,
            lsn=self._lsn,
            chunk_bytes=4 << 20,
            rows=[row],
            next_chunk=7 if request.from_chunk == 0 else None,
            device="d0",
            region=1,
            regions=2,
        )

    async def Events(self, request, context):
        while True:
            yield await self._events.get()

    async def ReportSwap(self, request, context):
        self.reports.put_nowait(request)
        return pb.ReportSwapResponse()

    async def ObservePeers(self, request, context):
        self.standings = {peer.node: peer.standing for peer in request.peers}
        return pb.ObservePeersResponse()

    async def Status(self, request, context):
        device = pb.DeviceStatus(id="d0", state="Ready", capacity_bytes=DEVICE_BYTES)
        return pb.StatusResponse(
            node=self.node,
            instance=self.instance,
            version="0.1.0",
            devices=[device],
            replicas=self.disk.replicas.values(),
            links=[pb.LinkStatus(node=node, up=up, instance="") for node, up in self.links.items()],
            counters=[pb.Counter(name="host_write_bytes_total", value=7.0)],
        )
