"""What the commands do, apart from parsing the command line: ask, compare, show."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from tercet_api.clients import Api, snapshots, storage_nodes, volumes
from tercet_api.objects import (
    Condition,
    Member,
    Object,
    Snapshot,
    StorageNode,
    Volume,
    VolumeReplica,
)
from tercet_api.protos import agent_pb2
from tercet_cli import chunks
from tercet_cli.access import Credentials, agent, credentials
from tercet_cli.errors import EXIT_NO, EXIT_OK, NotComparable
from tercet_cli.output import Form, print_json, print_table, progress, size
from tercet_cli.verify import Judgement, Sums, Verdict, judge

CALL_TIMEOUT_S = 300.0
AGAIN_S_MIN = 0.1
AGAIN_S_MAX = 1.0
NONE = "-"


def document(found: Object) -> dict[str, Any]:
    """An object as kubectl -o json shows it, of the fields that Tercet reads."""
    body = found.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"apiVersion": found.API_VERSION, "kind": found.KIND, **body}


def ready(conditions: Sequence[Condition]) -> str:
    """The Ready condition in a word or two."""
    found = next((c for c in conditions if c.type == "Ready"), None)
    if found is None:
        return "Unknown"
    return found.status.value if found.status.value == "True" else f"{found.status}: {found.reason}"


# ------------------------------------------------------------------ volumes


def _replicas(volume: Volume) -> str:
    in_sync = sum(entry.state.value == "InSync" for entry in volume.status.replicas)
    return f"{in_sync}/{volume.spec.replicas}"


async def volume_list(api: Api, form: Form) -> int:
    """All volumes."""
    found = sorted(await volumes(api).list(), key=lambda volume: volume.name)
    if form is Form.JSON:
        print_json({"items": [document(volume) for volume in found]})
        return EXIT_OK
    rows = [
        [
            volume.name,
            volume.status.phase.value if volume.status.phase else NONE,
            size(volume.status.size_bytes or volume.spec.size_bytes),
            size(volume.status.allocated_bytes),
            volume.status.config.primary.node if volume.status.config else NONE,
            _replicas(volume),
            ",".join(sorted(at.node_name for at in volume.spec.attachments)) or NONE,
        ]
        for volume in found
    ]
    print_table(["NAME", "PHASE", "SIZE", "USED", "PRIMARY", "IN SYNC", "ATTACHED"], rows)
    return EXIT_OK


def _rebuilt(entry: VolumeReplica) -> str:
    """How far a rebuild is: `42 %, 61 MiB/s, 3 min left`."""
    if entry.rebuild_percent is None:
        return NONE
    words = [f"{entry.rebuild_percent} %"]
    if entry.rebuild_bytes_per_second is not None:
        words.append(f"{size(entry.rebuild_bytes_per_second)}/s")
    left_s = entry.rebuild_seconds_left
    if left_s is not None:
        words.append(f"{left_s} s left" if left_s < 120 else f"{left_s // 60} min left")
    return ", ".join(words)


async def volume_get(api: Api, name: str, form: Form, chunks_of: chunks.Wanted | None) -> int:
    """One volume; with the chunk map of one of its replicas, if that is wanted."""
    volume = await volumes(api).get(name)
    found = None
    if chunks_of is not None:
        found = await chunks.chunk_map(api, volume, chunks_of.node)
    if form is Form.JSON:
        more = {} if found is None else {"chunkMap": chunks.as_json(found)}
        print_json(document(volume) | more)
        return EXIT_OK
    config = volume.status.config
    rows = [
        ["name", volume.name],
        ["uuid", volume.spec.uuid or NONE],
        ["phase", volume.status.phase.value if volume.status.phase else NONE],
        ["ready", ready(volume.status.conditions)],
        ["size", size(volume.status.size_bytes or volume.spec.size_bytes)],
        ["used", size(volume.status.allocated_bytes)],
        ["epoch", f"{config.epoch} ({config.state})" if config else NONE],
        ["primary", config.primary.node if config else NONE],
        ["attached", ", ".join(at.node_name for at in volume.spec.attachments) or NONE],
    ]
    print_table(["FIELD", "VALUE"], rows)
    print()
    entries = [
        [
            e.node,
            e.state.value,
            size(e.lag_bytes),
            _rebuilt(e),
            e.replica or NONE,
            e.message or NONE,
        ]
        for e in volume.status.replicas
    ]
    print_table(["NODE", "STATE", "LAG", "REBUILT", "REPLICA", "MESSAGE"], entries)
    if found is not None:
        print()
        chunks.show(found)
    return EXIT_OK


# ------------------------------------------------------------------ nodes and snapshots


async def node_list(api: Api, form: Form) -> int:
    """All storage nodes."""
    found = sorted(await storage_nodes(api).list(), key=lambda node: node.name)
    if form is Form.JSON:
        print_json({"items": [document(node) for node in found]})
        return EXIT_OK
    rows = [
        [
            node.name,
            node.status.phase or NONE,
            ready(node.status.conditions),
            size(node.status.capacity_bytes),
            size(node.status.allocated_bytes),
            str(len(node.status.orphans)),
            node.spec.address,
            node.status.version or NONE,
        ]
        for node in found
    ]
    columns = ["NAME", "PHASE", "READY", "CAPACITY", "USED", "ORPHANS", "ADDRESS", "VERSION"]
    print_table(columns, rows)
    return EXIT_OK


async def node_get(api: Api, name: str, form: Form) -> int:
    """One storage node."""
    node = await storage_nodes(api).get(name)
    if form is Form.JSON:
        print_json(document(node))
        return EXIT_OK
    rows = [
        ["name", node.name],
        ["phase", node.status.phase or NONE],
        ["ready", ready(node.status.conditions)],
        ["address", node.spec.address],
        ["instance", node.status.instance or NONE],
        ["capacity", size(node.status.capacity_bytes)],
        ["used", size(node.status.allocated_bytes)],
        ["cordoned", str(node.spec.cordoned).lower()],
    ]
    print_table(["FIELD", "VALUE"], rows)
    print()
    devices = [
        [d.id, d.state.value, size(d.capacity_bytes), size(d.allocated_bytes), d.message or NONE]
        for d in node.status.devices
    ]
    print_table(["DEVICE", "STATE", "CAPACITY", "USED", "MESSAGE"], devices)
    if node.status.orphans:
        print()
        orphans = [[o.name, o.volume, o.replica] for o in node.status.orphans]
        print_table(["ORPHAN OF", "VOLUME", "REPLICA"], orphans)
    return EXIT_OK


async def snapshot_list(api: Api, form: Form) -> int:
    """All snapshots."""
    found: list[Snapshot] = sorted(await snapshots(api).list(), key=lambda snapshot: snapshot.name)
    if form is Form.JSON:
        print_json({"items": [document(snapshot) for snapshot in found]})
        return EXIT_OK
    rows = [
        [
            snapshot.name,
            snapshot.spec.volume,
            "true" if snapshot.status.ready_to_use else "false",
            size(snapshot.status.size_bytes),
            snapshot.status.creation_time or NONE,
        ]
        for snapshot in found
    ]
    print_table(["NAME", "VOLUME", "READY", "SIZE", "TAKEN"], rows)
    return EXIT_OK


# ------------------------------------------------------------------ verify


async def volume_verify(api: Api, name: str, form: Form, timeout_s: float) -> int:
    """Compare a volume's replicas; exit status 0 equal, 1 differ. Raises NotComparable."""
    volume = await volumes(api).get(name)
    config = volume.status.config
    if config is None or volume.spec.uuid is None:
        raise NotComparable(
            f"volume {name} has no configuration yet: nothing was ever written",
            f"see what it waits for: tercet volume get {name}",
        )
    nodes = {node.name: node for node in await storage_nodes(api).list()}
    lost = [member.node for member in config.members if member.node not in nodes]
    if lost:
        raise NotComparable(
            f"volume {name}: no StorageNode {', '.join(lost)}", "see them: tercet node list"
        )
    async with progress(f"comparing the replicas of {name}"):
        held = await credentials(api)
        found, judgement = await _settled(volume, config.members, nodes, held, timeout_s)
    if form is Form.JSON:
        print_json(_as_json(name, found, judgement))
    else:
        _show(name, found, judgement)
    return EXIT_OK if judgement.verdict is Verdict.EQUAL else EXIT_NO


async def _settled(
    volume: Volume,
    members: Sequence[Member],
    nodes: dict[str, StorageNode],
    held: Credentials,
    timeout_s: float,
) -> tuple[list[Sums], Judgement]:
    """Ask all until they are at the same place."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + timeout_s
    pause_s = AGAIN_S_MIN
    while True:
        found = await _ask_all(volume, members, nodes, held)
        judgement = judge(found)
        if judgement.verdict is not Verdict.APART:
            return found, judgement
        if loop.time() + pause_s > give_up_s:
            places = ", ".join(f"{s.node} at ({s.epoch}, {s.lsn})" for s in found)
            raise NotComparable(
                f"volume {volume.name}: within {timeout_s:.0f} s the replicas were never at the"
                f" same place: {places}",
                "stop the writers for a moment, or wait longer (--timeout); if one stays behind:"
                f" tercet volume get {volume.name}",
            )
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, AGAIN_S_MAX)


async def _ask_all(
    volume: Volume, members: Sequence[Member], nodes: dict[str, StorageNode], held: Credentials
) -> list[Sums]:
    answers = await asyncio.gather(
        *(_ask(volume, member, nodes[member.node], held) for member in members),
        return_exceptions=True,
    )
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if isinstance(answer, Sums)]


async def _ask(volume: Volume, member: Member, node: StorageNode, held: Credentials) -> Sums:
    request = agent_pb2.ChunkSumsRequest(volume=volume.spec.uuid or "")
    try:
        async with agent(node, held) as stub:
            answer = await stub.ChunkSums(request, timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise NotComparable(
            f"node {node.name} ({node.spec.address}:{node.spec.ports.agent}):"
            f" {error.code().name}: {error.details()}",
            f"see whether it is Ready: tercet node get {node.name}",
        ) from error
    if answer.replica != member.replica:
        raise NotComparable(
            f"node {node.name} has replica {answer.replica or 'none'}, the configuration names"
            f" {member.replica}",
            "a replaced replica comes back as a learner: wait, and try again",
        )
    chunks = {entry.index: entry.crc32c for entry in answer.sums}
    return Sums(node.name, answer.replica, answer.epoch, answer.lsn, answer.chunk_bytes, chunks)


def _as_json(name: str, found: Sequence[Sums], judgement: Judgement) -> dict[str, Any]:
    body: dict[str, Any] = {
        "volume": name,
        "equal": judgement.verdict is Verdict.EQUAL,
        "epoch": found[0].epoch,
        "lsn": found[0].lsn,
        "differingChunks": judgement.differing,
        "replicas": [
            {
                "node": sums.node,
                "replica": sums.replica,
                "chunks": len(sums.chunks),
                "digest": sums.digest,
            }
            for sums in found
        ],
    }
    if judgement.first is not None:
        body["firstDifference"] = {
            "chunk": judgement.first.index,
            "offsetBytes": judgement.first.offset_bytes,
            "lengthBytes": judgement.first.length_bytes,
            "crc32c": dict(judgement.first.crc32c),
        }
    return body


def _show(name: str, found: Sequence[Sums], judgement: Judgement) -> None:
    rows = [
        [s.node, s.replica, f"({s.epoch}, {s.lsn})", str(len(s.chunks)), s.digest] for s in found
    ]
    print_table(["NODE", "REPLICA", "APPLIED", "CHUNKS", "DIGEST"], rows)
    print()
    first = judgement.first
    if first is None:
        print(f"volume {name}: {len(found)} replicas are equal")
        return
    print(f"volume {name}: the replicas DIFFER in {judgement.differing} chunks")
    end = first.offset_bytes + first.length_bytes
    print(f"first: chunk {first.index}, bytes {first.offset_bytes} to {end}")
    crcs = [
        [node, NONE if crc is None else f"{crc:08x}"] for node, crc in sorted(first.crc32c.items())
    ]
    print_table(["NODE", "CRC32C"], crcs)
