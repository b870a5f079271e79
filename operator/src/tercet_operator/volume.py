"""What a Volume needs next (pure): its finalizer, its creation, its deletion, or to be described.

Once a volume has a configuration the operator says how it is, and which replica shall be rebuilt on
another node (`replacement`). Who is primary is settled by the members and the API server (T2, T3);
nothing here can change it.
"""

from __future__ import annotations

from tercet_api.clients import Json
from tercet_api.names import FINALIZER, clone_snapshot
from tercet_api.objects import (
    Config,
    ConfigState,
    ReplicaPhase,
    Volume,
    VolumePhase,
    VolumeReplica,
)
from tercet_operator import creation, replacement
from tercet_operator.actions import (
    Action,
    Adopt,
    DropCloneSnapshot,
    Release,
    WriteStatus,
)
from tercet_operator.conditions import (
    DEGRADED,
    DELETING,
    PLACED,
    READY,
    Verdict,
    status_actions,
)
from tercet_operator.world import Moment, World, config_members

PRIMARY_LOST = "PrimaryLost"


def decide(volume: Volume, world: World, now: Moment) -> list[Action]:
    """What to do about one volume."""
    if volume.deleting:
        return _deletion(volume, world, now)
    if FINALIZER not in volume.metadata.finalizers or volume.spec.uuid is None:
        return [Adopt()]
    if volume.status.config is None:
        return creation.decide(volume, world, now)
    return _describe(volume, volume.status.config, world, now)


# ------------------------------------------------------------------ how it is


def _describe(volume: Volume, config: Config, world: World, now: Moment) -> list[Action]:
    nodes = ", ".join(member.node for member in config.members)
    placed = Verdict(PLACED, True, "Placed", f"on {nodes}", True)
    ready = _ready(volume, config, world, now)
    generation, size = volume.metadata.generation, volume.status.size_bytes
    if size == 0:
        # Its primary's agent writes the size when it serves. Until then only bad news are news.
        lost = ready.reason == PRIMARY_LOST
        ready = ready if lost else Verdict(READY, False, *creation.CREATING, True)
        members: Json = {"phase": VolumePhase.CREATING.value}
        return status_actions(volume.status, [ready, placed], now, generation, members)
    change = replacement.decide(volume, config, world, now)
    if change.writes:
        return change.writes
    degraded = _degraded(volume, config)
    phase = VolumePhase.DEGRADED if degraded.holds else VolumePhase.READY
    members = {
        "phase": (phase if ready.holds else VolumePhase.UNAVAILABLE).value,
        "copies": f"{len(_in_sync(volume, config))}/{len(config.members)}",
        "usedPercent": min(100, volume.status.allocated_bytes * 100 // size),
        "endpoints": [place.to_json() for place in creation.endpoints(config, world)],
    }
    verdicts = [ready, degraded, placed, *change.verdicts]
    actions = status_actions(volume.status, verdicts, now, generation, members)
    dropped = _drop_clone_snapshot(volume, world) if ready.holds else []
    return [*actions, *dropped, *change.looks]


def _in_sync(volume: Volume, config: Config) -> list[VolumeReplica]:
    counted = {member.replica for member in config.members}
    return [
        entry
        for entry in volume.status.replicas
        if entry.replica in counted and entry.state is ReplicaPhase.IN_SYNC
    ]


def _ready(volume: Volume, config: Config, world: World, now: Moment) -> Verdict:
    """Whether hosts are served, as far as can be seen from outside the data path."""
    primary = config.primary
    node = world.nodes.get(primary.node)
    said = f"epoch {config.epoch}, primary {primary.node}"
    if node is None or not world.alive(primary.node, now):
        return Verdict(READY, False, PRIMARY_LOST, f"{said}: its node is not ready", False)
    if node.status.instance != primary.instance:
        return Verdict(READY, False, PRIMARY_LOST, f"{said}: its engine has restarted", False)
    if config.state is ConfigState.RECOVERING:
        return Verdict(READY, False, "Recovering", f"{said}: recovering the log's end", True)
    in_sync = _in_sync(volume, config)
    if config.single_copy is None and len(in_sync) * 2 <= len(config.members):
        return Verdict(
            READY,
            False,
            "NoMajority",
            f"{said}: {len(in_sync)} of {len(config.members)} replicas in sync, writes wait",
            False,
        )
    return Verdict(READY, True, "Serving", said, True)


def _degraded(volume: Volume, config: Config) -> Verdict:
    in_sync = {entry.node for entry in _in_sync(volume, config)}
    states = {entry.node: entry.state.value for entry in volume.status.replicas}
    behind = [
        f"{m.node} {states.get(m.node, 'unknown')}" for m in config.members if m.node not in in_sync
    ]
    if behind:
        return Verdict(DEGRADED, True, "ReplicasBehind", ", ".join(behind), False)
    message = f"all {len(config.members)} replicas are in sync"
    return Verdict(DEGRADED, False, "InSync", message, True)


def _drop_clone_snapshot(volume: Volume, world: World) -> list[Action]:
    """The Snapshot that a clone started from has done its service."""
    if volume.spec.source is None or volume.spec.source.volume is None:
        return []
    snapshot = world.snapshots.get(clone_snapshot(volume.uid))
    if snapshot is None or snapshot.deleting:
        return []
    return [DropCloneSnapshot(snapshot.name, snapshot.uid)]


# ------------------------------------------------------------------ deletion


def _deletion(volume: Volume, world: World, now: Moment) -> list[Action]:
    """Allow it, wait for every replica that the object names, let go.

    Allowed means: status.phase is Deleting. From then on agents delete, and nothing that depends on
    the volume may be allowed any more; so the phase never goes back.
    """
    if FINALIZER not in volume.metadata.finalizers:
        return []
    dropped = _drop_clone_snapshot(volume, world)
    if not volume.deletion_allowed:
        why = _held(volume, world)
        if why is not None:
            verdict = Verdict(DELETING, False, *why, False)
            generation = volume.metadata.generation
            return [*status_actions(volume.status, [verdict], now, generation, {}), *dropped]
    waiting = _undeleted(volume, world)
    if not waiting:
        return [Release(), *dropped]
    unnamed = _unnamed(volume)
    if unnamed:
        entries = [entry.to_json() for entry in [*volume.status.replicas, *unnamed]]
        return [WriteStatus({"replicas": entries}, exact=True)]
    message = f"waiting for the replicas on {', '.join(waiting)}"
    verdicts = [
        Verdict(DELETING, True, "DeletingReplicas", message, True),
        Verdict(READY, False, "Deleting", "it is being deleted", True),
    ]
    members: Json = {"phase": VolumePhase.DELETING.value}
    return [
        *status_actions(volume.status, verdicts, now, volume.metadata.generation, members),
        *dropped,
    ]


def _held(volume: Volume, world: World) -> tuple[str, str] | None:
    """What still depends on a volume that somebody wants to delete."""
    hosts = [attachment.node_name for attachment in volume.spec.attachments]
    if hosts:
        return "Attached", f"it is attached to {', '.join(hosts)}: detach it first"
    snapshots = [snapshot.name for snapshot in world.snapshots_of(volume)]
    if snapshots:
        names = ", ".join(snapshots[:10])
        return "HasSnapshots", f"{len(snapshots)} snapshot(s) depend on it: {names}"
    return None


def _unnamed(volume: Volume) -> list[VolumeReplica]:
    """Replicas of the configuration that status.replicas does not name: agents report there."""
    named = {entry.node for entry in volume.status.replicas}
    return [
        VolumeReplica(node=member.node, replica=member.replica, state=ReplicaPhase.CREATED)
        for member in config_members(volume.status.config)
        if member.node not in named
    ]


def _undeleted(volume: Volume, world: World) -> list[str]:
    """Nodes that have not reported their replica deleted and still exist.

    An entry without a replica id counts as well: its agent may have made the replica and died
    before it could say so.
    """
    entries = [*volume.status.replicas, *_unnamed(volume)]
    return [
        entry.node
        for entry in entries
        if entry.state is not ReplicaPhase.DELETED and entry.node in world.nodes
    ]
