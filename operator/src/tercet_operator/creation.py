"""A volume until it has a configuration: is it new, where shall it be, is it made (pure).

One step a pass: place -> wait for the agents' reports -> swap in {1, Recovering} (T9). Between any
two steps the operator may die: the next pass finds in status what was done.

**No config never means new.** A volume without a placement is placed only when its creator has said
that this very object is new (status.newUid), or when the current instance of every StorageNode's
engine has reported its orphans and none of them is of this UUID or name. An orphan that is known
stands against newUid as well: an API server that was restored to the moment after the creation says
newUid of a volume that has data.
"""

from __future__ import annotations

from dataclasses import dataclass

from tercet_api.clients import Json, expect, put, remove
from tercet_api.coordination.lease import parse_time
from tercet_api.names import clone_snapshot
from tercet_api.objects import (
    Config,
    ConfigState,
    Endpoint,
    Member,
    Primary,
    ReplicaPhase,
    Snapshot,
    Volume,
    VolumePhase,
    VolumeReplica,
)
from tercet_operator import placement
from tercet_operator.actions import (
    Action,
    LookAgain,
    MakeCloneSnapshot,
    Notice,
    SwapFirst,
    WriteStatus,
)
from tercet_operator.conditions import PLACED, READY, Verdict, find, status_actions
from tercet_operator.world import Moment, World

SETTLE_S = 5.0
"""Age of an object that nobody calls new before reports of orphans are believed: an agent may just
be about to report a replica whose object was deleted by force a moment ago."""
NEWS_S = 1.0
"""Age of an object before it is worth a word that it waits."""
PLACED_TIMEOUT_S = 30.0
"""How long a node that is not ready may keep a placement that it has not answered."""
RETRY_S = 30.0
"""When no node is left, those that failed are asked again after this time."""
CREATING = ("Creating", "its replicas are being made")
"""Said once, until it is served for the first time: a new volume shall not wait for words."""
_WHOLE = {ReplicaPhase.CREATED, ReplicaPhase.IN_SYNC}
_MADE = {
    *_WHOLE,
    ReplicaPhase.LAGGING,
    ReplicaPhase.REBUILDING,
    ReplicaPhase.UNREACHABLE,
}


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a volume is not placed now."""

    reason: str
    message: str
    waits: bool = False
    """Whether it goes away by itself."""


def decide(volume: Volume, world: World, now: Moment) -> list[Action]:
    """The next step of a volume that has no configuration."""
    source = _source(volume, world)
    if isinstance(source, MakeCloneSnapshot):
        return [source, *_waiting(volume, now, Obstacle("Cloning", "snapshot of source", True))]
    if isinstance(source, Obstacle):
        return _waiting(volume, now, source)
    if not volume.status.replicas and (why := newness(volume, world, now)) is not None:
        # The CSI controller says that it is new in a second request: no news until then.
        young = why.waits and _age_s(volume, now) < NEWS_S
        again: list[Action] = []
        if why.waits:
            again.append(LookAgain(NEWS_S if young else SETTLE_S))
        return again if young else [*_waiting(volume, now, why), *again]
    only = None if source is None else _holders(source, world)
    standing = [e for e in volume.status.replicas if e.state is not ReplicaPhase.FAILED]
    if len(standing) < volume.spec.replicas:
        return _place(volume, world, now, only, volume.spec.replicas - len(standing))
    return _late(volume, world, now) or _configure(volume, world, now)


# ------------------------------------------------------------------ is it new


def newness(volume: Volume, world: World, now: Moment) -> Obstacle | None:
    """Why a volume without a placement must not be taken for new; None: it is new."""
    uuid, name = volume.spec.uuid, volume.name
    twins = sorted(v.name for v in world.volumes.values() if v.spec.uuid == uuid and v.name != name)
    if twins:
        return Obstacle(
            "DuplicateUuid",
            f"spec.uuid {uuid} is that of Volume {twins[0]} too: leave uuid out to get a fresh one",
        )
    orphaned = sorted(
        node.name
        for node in world.nodes.values()
        if any(o.volume == uuid or o.name == name for o in node.status.orphans)
    )
    if orphaned:
        return Obstacle(
            "OrphansFound",
            f"replicas of this UUID or name are on {', '.join(orphaned)}: this volume is not new; "
            f"`tercet volume adopt {name}` puts them back under it",
        )
    if volume.status.new_uid == volume.uid:
        return None
    silent = sorted(
        node.name
        for node in world.nodes.values()
        if node.status.instance is None
        or node.status.orphans_instance != node.status.instance
        or not world.alive(node.name, now)
    )
    if silent or not world.nodes:
        who = ", ".join(silent) or "no StorageNode"
        return Obstacle(
            "OrphansUnknown",
            f"whether this volume is new is not known before every node has said that it holds no "
            f"replica of it; waiting for {who}",
            waits=True,
        )
    if _age_s(volume, now) < SETTLE_S:
        return Obstacle("OrphansUnknown", "waiting for the nodes' reports of orphans", waits=True)
    return None


def _age_s(volume: Volume, now: Moment) -> float:
    created = volume.metadata.creation_timestamp
    return 0.0 if created is None else (now.wall - parse_time(created)).total_seconds()


# ------------------------------------------------------------------ what it starts from


def _source(volume: Volume, world: World) -> Snapshot | MakeCloneSnapshot | Obstacle | None:
    """The Snapshot that a volume starts from (None: from nothing), or why not yet."""
    source = volume.spec.source
    if source is None:
        return None
    if source.snapshot is not None:
        name = source.snapshot
    else:
        assert source.volume is not None, "the CRD lets exactly one source pass"
        name = clone_snapshot(volume.uid)
        if name not in world.snapshots:
            parent = world.volumes.get(source.volume)
            if parent is None or parent.deleting:
                return Obstacle("NoSource", f"there is no Volume {source.volume} to clone")
            return MakeCloneSnapshot(name, source.volume)
    return _usable_snapshot(volume, name, world)


def _usable_snapshot(volume: Volume, name: str, world: World) -> Snapshot | Obstacle:
    snapshot = world.snapshots.get(name)
    if snapshot is None or snapshot.deleting:
        return Obstacle("NoSource", f"there is no Snapshot {name} to start from")
    if not snapshot.status.ready_to_use:
        return Obstacle("SourceNotReady", f"Snapshot {name} is not ready yet", waits=True)
    if volume.spec.size_bytes < snapshot.status.size_bytes:
        return Obstacle(
            "TooSmall",
            f"sizeBytes {volume.spec.size_bytes} is less than the {snapshot.status.size_bytes} "
            f"bytes of Snapshot {name}",
        )
    parent = world.volumes.get(snapshot.spec.volume)
    if parent is None or parent.status.config is None:
        return Obstacle("NoSource", f"Volume {snapshot.spec.volume} of Snapshot {name} is gone")
    return snapshot


def _holders(snapshot: Snapshot, world: World) -> list[str]:
    """The nodes whose replicas hold a snapshot (S3)."""
    config = world.volumes[snapshot.spec.volume].status.config
    assert config is not None, "checked with the source"
    return [member.node for member in config.members]


# ------------------------------------------------------------------ place


def _place(
    volume: Volume, world: World, now: Moment, only: list[str] | None, count: int
) -> list[Action]:
    chosen = placement.choose(volume, world, now, count, only)
    if isinstance(chosen, placement.Unplaceable):
        return _unplaceable(volume, now, chosen.message)
    entries = [
        *volume.status.replicas,
        *(VolumeReplica(node=node, state=ReplicaPhase.PLACED) for node in chosen),
    ]
    nodes = ", ".join(e.node for e in entries if e.state is not ReplicaPhase.FAILED)
    verdicts = [
        Verdict(PLACED, True, "Placed", f"on {nodes}", True),
        Verdict(READY, False, *CREATING, True),
    ]
    members: Json = {
        "phase": VolumePhase.CREATING.value,
        "replicas": [entry.to_json() for entry in entries],
    }
    # Crash window: placed and not told. The agents work from status alone; nothing is lost.
    return _status(volume, verdicts, now, members, exact=True)


def _unplaceable(volume: Volume, now: Moment, message: str) -> list[Action]:
    placed = find(volume.status.conditions, PLACED)
    failed = [e for e in volume.status.replicas if e.state is ReplicaPhase.FAILED]
    waited_s = (
        0.0
        if placed is None or placed.reason != "Unplaceable"
        else (now.wall - parse_time(placed.last_transition_time)).total_seconds()
    )
    if failed and waited_s >= RETRY_S:
        kept = [e.to_json() for e in volume.status.replicas if e not in failed]
        nodes = ", ".join(entry.node for entry in failed)
        return [
            WriteStatus({"replicas": kept}, exact=True),
            Notice("Retry", f"asking again: {nodes}"),
        ]
    verdicts = [
        Verdict(PLACED, False, "Unplaceable", message, False),
        Verdict(READY, False, "Unplaceable", message, False),
    ]
    actions = _status(volume, verdicts, now, {"phase": VolumePhase.PENDING.value})
    return [*actions, LookAgain(RETRY_S)] if failed else actions


def _late(volume: Volume, world: World, now: Moment) -> list[Action]:
    """Give up placements on nodes that went away before they answered."""
    late = {
        entry.node
        for entry in volume.status.replicas
        if entry.state is ReplicaPhase.PLACED and not world.usable(entry.node, now)
    }
    if not late:
        return []
    placed = find(volume.status.conditions, PLACED)
    since = parse_time(placed.last_transition_time) if placed is not None else now.wall
    waited_s = (now.wall - since).total_seconds()
    if waited_s < PLACED_TIMEOUT_S:
        return [LookAgain(PLACED_TIMEOUT_S - waited_s)]
    entries = [
        entry.model_copy(
            update={
                "state": ReplicaPhase.FAILED,
                "message": "its node went away before it was made",
            }
        )
        if entry.node in late
        else entry
        for entry in volume.status.replicas
    ]
    return [
        WriteStatus({"replicas": [entry.to_json() for entry in entries]}, exact=True),
        Notice("ReplicaFailed", f"no answer from {', '.join(sorted(late))}: placed elsewhere"),
    ]


# ------------------------------------------------------------------ configure


def _configure(volume: Volume, world: World, now: Moment) -> list[Action]:
    entries = [e for e in volume.status.replicas if e.state is not ReplicaPhase.FAILED]
    missing = any(e.replica is None or e.state not in _MADE for e in entries)
    whole = [e for e in entries if e.state in _WHOLE]
    if missing or len(whole) * 2 <= len(entries):  # S3: a clone's majority is complete first
        return _creating(volume, now)
    primary = _first_primary(volume, world, now)
    if primary is None:
        return [*_creating(volume, now), LookAgain(1.0)]
    members = [Member(node=e.node, replica=e.replica) for e in entries if e.replica is not None]
    assert len(members) == volume.spec.replicas
    config = Config(epoch=1, state=ConfigState.RECOVERING, primary=primary, members=members)
    places = endpoints(config, world)
    also: list[Json] = [put("/status/endpoints", [place.to_json() for place in places])]
    for index in reversed(range(len(volume.status.replicas))):
        entry, path = volume.status.replicas[index], f"/status/replicas/{index}"
        also += [expect(f"{path}/node", entry.node), expect(f"{path}/replica", entry.replica)]
        if entry.state is ReplicaPhase.FAILED:
            also.append(remove(path))
    nodes = ", ".join(member.node for member in members)
    message = f"first configuration: primary {primary.node}, members {nodes}"
    return [SwapFirst(config, tuple(also)), Notice("Configured", message)]


def _first_primary(volume: Volume, world: World, now: Moment) -> Primary | None:
    """The member that leads first: where the volume is wanted, else the first one placed."""
    attached = [attachment.node_name for attachment in volume.spec.attachments]
    wanted = [volume.spec.placement.preferred_node, *attached]
    whole = [e.node for e in volume.status.replicas if e.state in _WHOLE]  # S3: else it never leads
    for node in [*(w for w in wanted if w in whole), *whole]:
        if node is not None and world.usable(node, now):
            instance = world.nodes[node].status.instance
            assert instance is not None, "usable means that it has one"
            return Primary(node=node, instance=instance)
    return None


def endpoints(config: Config, world: World) -> list[Endpoint]:
    """Where hosts connect: every member whose StorageNode exists, in the order of members."""
    nodes = [world.nodes.get(member.node) for member in config.members]
    return [
        Endpoint(node=node.name, address=node.spec.address, port=node.spec.ports.nvme_tcp)
        for node in nodes
        if node is not None
    ]


# ------------------------------------------------------------------ saying so


def _creating(volume: Volume, now: Moment) -> list[Action]:
    verdicts = [Verdict(READY, False, *CREATING, True)]
    return _status(volume, verdicts, now, {"phase": VolumePhase.CREATING.value})


def _waiting(volume: Volume, now: Moment, why: Obstacle) -> list[Action]:
    verdicts = [
        Verdict(PLACED, False, why.reason, why.message, why.waits),
        Verdict(READY, False, why.reason, why.message, why.waits),
    ]
    return _status(volume, verdicts, now, {"phase": VolumePhase.PENDING.value})


def _status(
    volume: Volume, verdicts: list[Verdict], now: Moment, members: Json, *, exact: bool = False
) -> list[Action]:
    return status_actions(
        volume.status, verdicts, now, volume.metadata.generation, members, exact=exact
    )
