"""The agent's end of engine.proto: typed calls with deadlines over the Unix socket.

Every call has a time limit and is idempotent on the engine's side, so a caller may always ask
again. Nothing is retried here: each caller knows for how long its question makes sense.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import grpc
import grpc.aio

from tercet_node.errors import EngineAway, engine_error
from tercet_node.protos import engine_pb2 as pb
from tercet_node.protos.engine_pb2_grpc import EngineStub

CALL_TIMEOUT_S = 5.0
CONFIGURE_TIMEOUT_S = 120.0
"""The first one opens the devices, and makes (writes) the files of new ones."""
COMMIT_TIMEOUT_S = 30.0
"""Calls that return when an entry is committed, which may take a change of primary."""
SUMS_TIMEOUT_S = 300.0
RECONNECT_MS_MIN = 20
RECONNECT_MS_MAX = 250
MESSAGE_BYTES_MAX = 64 * 1024 * 1024

_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS_MIN),
    ("grpc.min_reconnect_backoff_ms", RECONNECT_MS_MIN),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),
    # The default, the socket's path, is no authority of RFC 3986: the engine's HTTP/2 refuses it.
    ("grpc.default_authority", "localhost"),
]

Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Place:
    """A committed place in a volume's log."""

    epoch: int
    lsn: int


class Engine:
    """A connection to this node's engine. An async context manager."""

    def __init__(self, socket: Path) -> None:
        self._target = f"unix:{socket}"
        self._channel: grpc.aio.Channel | None = None
        self._stub: EngineStub | None = None

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._target, options=_OPTIONS)
        self._stub = EngineStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._channel is not None:
            await self._channel.close(grace=None)

    async def wait_ready(self) -> None:
        """Return when the socket is connected."""
        assert self._channel is not None, "used outside of its context"
        await self._channel.channel_ready()

    @property
    def _calls(self) -> EngineStub:
        assert self._stub is not None, "used outside of its context"
        return self._stub

    async def configure(self, request: pb.ConfigureRequest) -> str:
        """Open the devices and listen; returns the engine's instance. Raises EngineError."""
        call = self._calls.Configure
        answer: pb.ConfigureResponse = await _ask("Configure", call, request, CONFIGURE_TIMEOUT_S)
        return answer.instance

    async def observe(self, volume: str, name: str, view: pb.VolumeView) -> None:
        """Hand over a Volume object. Raises EngineError."""
        request = pb.ObserveVolumeRequest(volume=volume, name=name, view=view)
        await _ask("ObserveVolume", self._calls.ObserveVolume, request)

    async def create_replica(self, request: pb.CreateReplicaRequest) -> pb.CreateReplicaResponse:
        """Make a replica, or find the one that is there. Raises EngineError."""
        call = self._calls.CreateReplica
        answer: pb.CreateReplicaResponse = await _ask(
            "CreateReplica", call, request, COMMIT_TIMEOUT_S
        )
        return answer

    async def delete_replica(self, volume: str, replica: str) -> None:
        """Delete the replica with this id; well when it is not there. Raises EngineError."""
        request = pb.DeleteReplicaRequest(volume=volume, replica=replica)
        await _ask("DeleteReplica", self._calls.DeleteReplica, request, COMMIT_TIMEOUT_S)

    async def create_snapshot(self, volume: str, snapshot: str) -> Place:
        """Append a snapshot (S1); returns when it is committed. Raises EngineError."""
        request = pb.SnapshotRequest(volume=volume, snapshot=snapshot)
        call = self._calls.CreateSnapshot
        answer: pb.PlaceResponse = await _ask("CreateSnapshot", call, request, COMMIT_TIMEOUT_S)
        return Place(answer.epoch, answer.lsn)

    async def delete_snapshot(self, volume: str, snapshot: str) -> Place:
        """Append a snapshot's deletion; returns when it is committed. Raises EngineError."""
        request = pb.SnapshotRequest(volume=volume, snapshot=snapshot)
        call = self._calls.DeleteSnapshot
        answer: pb.PlaceResponse = await _ask("DeleteSnapshot", call, request, COMMIT_TIMEOUT_S)
        return Place(answer.epoch, answer.lsn)

    async def grow(self, volume: str, size_bytes: int) -> Place:
        """Append a growth; returns when it is committed. Raises EngineError."""
        request = pb.GrowRequest(volume=volume, size_bytes=size_bytes)
        answer: pb.PlaceResponse = await _ask("Grow", self._calls.Grow, request, COMMIT_TIMEOUT_S)
        return Place(answer.epoch, answer.lsn)

    async def chunk_sums(self, volume: str) -> pb.ChunkSumsResponse:
        """Checksums of the applied chunks. Raises EngineError."""
        request = pb.ChunkSumsRequest(volume=volume)
        answer: pb.ChunkSumsResponse = await _ask(
            "ChunkSums", self._calls.ChunkSums, request, SUMS_TIMEOUT_S
        )
        return answer

    async def chunk_map(self, volume: str, from_chunk: int) -> pb.ChunkMapResponse:
        """Some rows of the chunk map, from a chunk on. Raises EngineError."""
        request = pb.ChunkMapRequest(volume=volume, from_chunk=from_chunk)
        answer: pb.ChunkMapResponse = await _ask(
            "ChunkMap", self._calls.ChunkMap, request, SUMS_TIMEOUT_S
        )
        return answer

    async def report_swap(
        self, token: int, outcome: pb.ReportSwapRequest.Outcome, view: pb.VolumeView | None
    ) -> None:
        """Answer a SwapRequested. Raises EngineError."""
        request = pb.ReportSwapRequest(token=token, outcome=outcome, view=view)
        await _ask("ReportSwap", self._calls.ReportSwap, request)

    async def observe_peers(self, standings: Mapping[str, str]) -> None:
        """Say what the membership holds of each peer: a hint, for Status. Raises EngineError."""
        peers = [pb.PeerSight(node=node, standing=said) for node, said in standings.items()]
        request = pb.ObservePeersRequest(peers=peers)
        await _ask("ObservePeers", self._calls.ObservePeers, request)

    async def status(self) -> pb.StatusResponse:
        """Devices, replicas, links and counters as they are now. Raises EngineError."""
        answer: pb.StatusResponse = await _ask("Status", self._calls.Status, pb.StatusRequest())
        return answer

    async def events(self) -> AsyncIterator[pb.EngineEvent]:
        """Everything the engine wants done or known. Ends by raising EngineError, always."""
        stream = self._calls.Events(pb.EventsRequest())
        try:
            async for event in stream:
                yield event
        except grpc.aio.AioRpcError as error:
            raise engine_error("Events", error) from error
        finally:
            stream.cancel()
        raise EngineAway("Events: the engine ended the stream")


async def _ask(
    name: str, call: Callable[..., Awaitable[A]], request: Q, timeout_s: float = CALL_TIMEOUT_S
) -> A:
    try:
        return await call(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise engine_error(name, error) from error
    except asyncio.CancelledError:
        raise
    except grpc.aio.UsageError as error:
        # The channel was closed under a call at shutdown.
        raise EngineAway(f"{name}: the channel is closed") from error
