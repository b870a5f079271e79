"""What the agent knows: the objects as its watches show them, and its engine as it last answered.

Owned by the event loop; nothing here survives a restart, and nothing needs to: all of it is read
again from the API server and the engine (crash-only).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tercet_api.objects import Fence, Snapshot, StorageNode, Volume
from tercet_node.members.sight import Sight
from tercet_node.primary import Serving
from tercet_node.protos import engine_pb2 as pb
from tercet_node.rates import Rate
from tercet_node.views import Shown


@dataclass(slots=True)
class EngineState:
    """One start of the engine, as far as this agent is connected to it."""

    instance: str
    status: pb.StatusResponse | None = None
    shown: dict[str, Shown] = field(default_factory=dict)
    """By volume name: the newest sight that this engine has been shown."""
    told: dict[str, pb.ReplicaStatus] = field(default_factory=dict)
    """By volume UUID: the replicas of the last Status."""
    rates: dict[str, Rate] = field(default_factory=dict)
    """By replica id: how fast this engine copies to it."""
    fenced: dict[str, Fence] = field(default_factory=dict)
    """By volume UUID: the newest fence that the engine has confirmed (H5)."""


@dataclass(slots=True)
class World:
    """Objects by name, and the engine."""

    node: str
    nodes: dict[str, StorageNode] = field(default_factory=dict)
    volumes: dict[str, Volume] = field(default_factory=dict)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    nodes_known: asyncio.Event = field(default_factory=asyncio.Event)
    volumes_known: asyncio.Event = field(default_factory=asyncio.Event)
    snapshots_known: asyncio.Event = field(default_factory=asyncio.Event)
    engine: EngineState | None = None
    membership: Sight | None = None
    """The list of nodes as this node has it, while it has one."""

    @property
    def own(self) -> StorageNode | None:
        """The object of this very node."""
        return self.nodes.get(self.node)

    def volume_of(self, uuid: str) -> Volume | None:
        """The object of a volume that the engine names by UUID.

        Where several objects claim a UUID, it is the one whose name the engine's replica was made
        for.
        """
        held = self.held(uuid)
        if held is not None:
            named = self.volumes.get(held.name)
            return named if named is not None and named.spec.uuid == uuid else None
        return next((v for v in self.volumes.values() if v.spec.uuid == uuid), None)

    def held(self, uuid: str | None) -> pb.ReplicaStatus | None:
        """The engine's replica of a volume."""
        if self.engine is None or self.engine.status is None or uuid is None:
            return None
        return self.engine.told.get(uuid)

    def held_as(self, volume: Volume) -> pb.ReplicaStatus | None:
        """The engine's replica that was made for this object's (uuid, name)."""
        held = self.held(volume.spec.uuid)
        return held if held is not None and held.name == volume.name else None

    def serving(self, volume: Volume) -> Serving | None:
        """The engine as serving primary of a volume, or None."""
        held = self.held_as(volume)
        if self.engine is None or self.engine.status is None or held is None or not held.serving:
            return None
        return serving(self.node, self.engine.status, held, self.engine.rates)


def serving(
    node: str,
    status: pb.StatusResponse,
    held: pb.ReplicaStatus,
    rates: Mapping[str, Rate] = MappingProxyType({}),
) -> Serving:
    """How the primary rules see an engine's answer."""
    links = {link.node: link.up for link in status.links}
    return Serving(node, status.instance, held, links, rates)
