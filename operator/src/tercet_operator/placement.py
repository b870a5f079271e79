"""Placement: which nodes shall keep a volume's replicas (pure, and the same for the same input).

A node is a candidate when it is alive, has reported an engine, is neither cordoned nor drained nor
being deleted, has the labels that the volume asks for, keeps no replica of the volume yet, and has
room. Room is what is left of its capacity after every volume that is placed there has been counted
with its whole size: what is placed and not yet reported counts at once, and a volume that fits
today still fits when it is full.

Of the candidates the preferred node comes first; then, one after the other, the one whose value of
the topology key is used least by this volume, then the one with the most room, then by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tercet_api.objects import ReplicaPhase, StorageNode, Volume
from tercet_operator.world import Moment, World, nodes_of


@dataclass(frozen=True, slots=True)
class Unplaceable:
    """No set of nodes will do; says for each node why."""

    message: str


def room_bytes(node: StorageNode, volumes: Iterable[Volume]) -> int:
    """What could still be promised on a node."""
    promised = 0
    for volume in volumes:
        gone = {e.node for e in volume.status.replicas if e.state is ReplicaPhase.DELETED}
        failed = {e.node for e in volume.status.replicas if e.state is ReplicaPhase.FAILED}
        if node.name in nodes_of(volume) - gone - (failed if not volume.status.config else set()):
            promised += max(volume.spec.size_bytes, volume.status.size_bytes)
    return node.status.capacity_bytes - promised


def obstacle(node: StorageNode, volume: Volume, world: World, now: Moment) -> str | None:
    """Why a node cannot keep a replica of this volume; None: it can."""
    wanted = volume.spec.placement.node_selector
    missing = {key: value for key, value in wanted.items() if node.spec.topology.get(key) != value}
    room = room_bytes(node, world.volumes.values())
    failed = next(
        (e for e in volume.status.replicas if e.node == node.name), None
    )  # an entry that stays: failed, or placed there already
    reasons = (
        (node.deleting, "is being deleted"),
        (node.spec.cordoned, "is cordoned"),
        (node.spec.drained, "is drained"),
        (bool(missing), f"has not the labels {missing}"),
        (failed is not None, failed.message or "has a replica" if failed else ""),
        (not world.usable(node.name, now), "is not ready"),
        (room < volume.spec.size_bytes, f"has room for {max(room, 0)} bytes"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def choose(
    volume: Volume,
    world: World,
    now: Moment,
    count: int,
    only: Sequence[str] | None = None,
    leaving: str | None = None,
) -> list[str] | Unplaceable:
    """`count` further nodes for a volume, of `only` where that is given (S3: a clone).

    leaving: the node whose replica goes: what it is spread from is what stays.
    """
    names = sorted(world.nodes if only is None else set(only))
    obstacles: dict[str, str] = {}
    candidates: list[StorageNode] = []
    for name in names:
        node = world.nodes.get(name)
        why = "does not exist" if node is None else obstacle(node, volume, world, now)
        if why is not None:
            obstacles[name] = why
        elif node is not None:
            candidates.append(node)
    if len(candidates) < count:
        why_not = "; ".join(f"{name} {why}" for name, why in obstacles.items())
        return Unplaceable(
            f"{count} more node(s) wanted for {volume.spec.size_bytes} bytes each, "
            f"{len(candidates)} of {len(names)} will do" + (f": {why_not}" if why_not else "")
        )
    return _spread(volume, world, candidates, count, leaving)


def _spread(
    volume: Volume,
    world: World,
    candidates: Sequence[StorageNode],
    count: int,
    leaving: str | None,
) -> list[str]:
    key, preferred = volume.spec.placement.topology_key, volume.spec.placement.preferred_node

    def domain(node: StorageNode | None) -> str | None:
        return node.spec.topology.get(key) if node is not None and key is not None else None

    rooms = {node.name: room_bytes(node, world.volumes.values()) for node in candidates}
    gone = {ReplicaPhase.FAILED, ReplicaPhase.FORMER, ReplicaPhase.DELETED}
    standing = [e for e in volume.status.replicas if e.state not in gone]
    kept = [e.node for e in standing if e.node != leaving]
    used = Counter(domain(world.nodes.get(name)) for name in kept)
    chosen: list[str] = []
    left = list(candidates)
    while len(chosen) < count:
        best = min(
            left,
            key=lambda node: (
                node.name != preferred,
                used[domain(node)] if key is not None else 0,
                -rooms[node.name],
                node.name,
            ),
        )
        left.remove(best)
        chosen.append(best.name)
        used[domain(best)] += 1
    return chosen
