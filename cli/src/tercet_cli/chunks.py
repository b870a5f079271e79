"""`volume get --show-chunks`: what of a volume lies where on one node's device.

Asked of the agent of one member, page by page; each page is of the place that its replica has
applied then, so under load later rows may be younger than the first. Nothing is compared here:
that is `verify`, and a device that no engine has open is for `tercet-engine inspect`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from tercet_api.clients import Api, storage_nodes
from tercet_api.objects import StorageNode, Volume
from tercet_api.protos import agent_pb2
from tercet_cli.access import Credentials, agent, credentials
from tercet_cli.errors import AgentRefuses, NotFound
from tercet_cli.output import print_table, progress, size

PAGE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whose chunks are to be shown."""

    node: str | None
    """None: the primary's."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk that has a written block."""

    chunk: int
    mapped_bytes: int
    shared_bytes: int
    """Unchanged since the newest snapshot, or since the source of the clone."""
    extents: int
    device_offset_bytes: int
    """Of the first extent, within the device's region."""
    changed: tuple[int, int]
    """The entry (epoch, lsn) that changed it last."""


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """Of one replica."""

    node: str
    replica: str
    device: str
    region: tuple[int, int]
    """Which of how many."""
    place: tuple[int, int]
    chunk_bytes: int
    chunks: tuple[Chunk, ...]


async def chunk_map(api: Api, volume: Volume, name: str | None) -> ChunkMap:
    """The chunk map of the replica on this node; by default the primary's.

    Raises NotFound (no replica there), AgentRefuses.
    """
    member = _member(volume, name)
    async with progress(f"asking {member} for its chunks of {volume.name}"):
        node = await storage_nodes(api).get(member)
        held = await credentials(api)
        pages = await _pages(volume, node, held)
    first = pages[0]
    rows = (row for page in pages for row in page.rows)
    return ChunkMap(
        node=first.node,
        replica=first.replica,
        device=first.device,
        region=(first.region, first.regions),
        place=(first.epoch, first.lsn),
        chunk_bytes=first.chunk_bytes,
        chunks=tuple(_chunk(row) for row in rows),
    )


def _member(volume: Volume, name: str | None) -> str:
    config = volume.status.config
    if config is None or volume.spec.uuid is None:
        raise NotFound(
            f"volume {volume.name} has no configuration yet: nothing was ever written",
            f"see what it waits for: tercet volume get {volume.name}",
        )
    if name is None:
        return config.primary.node
    nodes = sorted(member.node for member in (*config.members, *(config.learners or ())))
    if name not in nodes:
        raise NotFound(
            f"volume {volume.name} has no replica on node {name}",
            f"name one of {', '.join(nodes)} (--node)",
        )
    return name


async def _pages(
    volume: Volume, node: StorageNode, held: Credentials
) -> list[agent_pb2.ChunkMapResponse]:
    pages: list[agent_pb2.ChunkMapResponse] = []
    going_on = agent_pb2.ChunkMapRequest(volume=volume.spec.uuid or "")
    try:
        async with agent(node, held) as stub:
            while True:
                page = await stub.ChunkMap(going_on, timeout=PAGE_TIMEOUT_S)
                pages.append(page)
                if not page.HasField("next_chunk"):
                    return pages
                going_on.from_chunk = page.next_chunk
    except grpc.aio.AioRpcError as error:
        raise AgentRefuses(
            f"node {node.name} ({node.spec.address}:{node.spec.ports.agent}):"
            f" {error.code().name}: {error.details()}",
            f"see whether it is Ready: tercet node get {node.name}, or ask another (--node)",
        ) from error


def _chunk(row: agent_pb2.ChunkRow) -> Chunk:
    return Chunk(
        chunk=row.chunk,
        mapped_bytes=row.mapped_bytes,
        shared_bytes=row.shared_bytes,
        extents=row.extents,
        device_offset_bytes=row.device_offset_bytes,
        changed=(row.changed_epoch, row.changed_lsn),
    )


def as_json(found: ChunkMap) -> dict[str, Any]:
    """For `-o json`."""
    return {
        "node": found.node,
        "replica": found.replica,
        "device": found.device,
        "region": found.region[0],
        "regions": found.region[1],
        "epoch": found.place[0],
        "lsn": found.place[1],
        "chunkBytes": found.chunk_bytes,
        "chunks": [
            {
                "chunk": chunk.chunk,
                "mappedBytes": chunk.mapped_bytes,
                "sharedBytes": chunk.shared_bytes,
                "extents": chunk.extents,
                "deviceOffsetBytes": chunk.device_offset_bytes,
                "changedEpoch": chunk.changed[0],
                "changedLsn": chunk.changed[1],
            }
            for chunk in found.chunks
        ],
    }


def show(found: ChunkMap) -> None:
    """As a table, with a line of sums."""
    rows = [
        [
            str(chunk.chunk),
            size(chunk.chunk * found.chunk_bytes),
            size(chunk.mapped_bytes),
            size(chunk.shared_bytes),
            str(chunk.extents),
            size(chunk.device_offset_bytes),
            f"({chunk.changed[0]}, {chunk.changed[1]})",
        ]
        for chunk in found.chunks
    ]
    columns = ["CHUNK", "OFFSET", "MAPPED", "SHARED", "EXTENTS", "ON DEVICE AT", "CHANGED"]
    print_table(columns, rows)
    mapped = size(sum(chunk.mapped_bytes for chunk in found.chunks))
    shared = size(sum(chunk.shared_bytes for chunk in found.chunks))
    region, regions = found.region
    where = found.device if regions == 1 else f"{found.device}, region {region} of {regions}"
    print()
    print(
        f"{found.node}, device {where}, applied {found.place}: {len(found.chunks)} chunks,"
        f" {mapped} mapped, {shared} of it shared"
    )
