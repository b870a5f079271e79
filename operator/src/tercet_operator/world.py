"""What the operator has observed of the cluster: the input of every decision.

A plain holder, kept up to date by `watching` and by the answers to the operator's own writes, so
that a decision sees what the one before it did. Between two looks it may be stale: whatever is
decided on it is written with a precondition, or is harmless when it comes twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tercet_api.coordination import Sighting
from tercet_api.objects import Config, Member, Object, Snapshot, StorageNode, Volume
from tercet_operator.roll import Roll


@dataclass(frozen=True, slots=True)
class Moment:
    """When a decision is made: the monotonic clock for durations, the wall clock for people."""

    s: float
    wall: datetime

    @property
    def text(self) -> str:
        """RFC 3339, as conditions have it."""
        return self.wall.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(slots=True)
class World:
    """Objects by name, and when each StorageNode's Lease expires."""

    nodes: dict[str, StorageNode] = field(default_factory=dict)
    volumes: dict[str, Volume] = field(default_factory=dict)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    sightings: dict[str, Sighting] = field(default_factory=dict)
    roll: Roll | None = None
    """What enrols nodes; there from the moment at which this operator leads."""
    replace_after_s: float = 600.0
    """How long a node may be away before its replicas are rebuilt elsewhere."""
    rebuilds_max: int = 4
    """Volumes that are rebuilt at the same time, at most."""

    def alive(self, node: str, now: Moment) -> bool:
        """Whether a node's agent renews its Lease."""
        sighting = self.sightings.get(node)
        return sighting is not None and not sighting.expired(now.s)

    def usable(self, node: str, now: Moment) -> bool:
        """Whether a node's engine and agent are there: it could make or serve a replica."""
        found = self.nodes.get(node)
        return found is not None and found.status.instance is not None and self.alive(node, now)

    def snapshots_of(self, volume: Volume) -> list[Snapshot]:
        """The Snapshots of just this volume (not of an earlier one of its name), by name."""
        return sorted(
            (
                snapshot
                for snapshot in self.snapshots.values()
                if snapshot.spec.volume == volume.name
                and snapshot.status.volume_uuid in {None, volume.spec.uuid}
            ),
            key=lambda snapshot: snapshot.name,
        )


def config_members(config: Config | None) -> list[Member]:
    """Every replica that a configuration names, each once."""
    if config is None:
        return []
    everyone = [*config.members, *(config.previous_members or []), *(config.learners or [])]
    return list({member.replica: member for member in everyone}.values())


def nodes_of(volume: Volume) -> set[str]:
    """The nodes on which a volume has, or may have, a replica."""
    entries: Iterable[str] = (entry.node for entry in volume.status.replicas)
    return {*entries, *(member.node for member in config_members(volume.status.config))}


def newer(there: Object | None, seen: Object) -> bool:
    """Whether `seen` replaces what is known: watches may tell of a write after its answer did.

    A version that is no number, or another object of the same name, always replaces.
    """
    if there is None or there.uid != seen.uid:
        return True
    try:
        return int(seen.metadata.resource_version) >= int(there.metadata.resource_version)
    except ValueError:
        return True


def same(there: Object | None, seen: Object) -> bool:
    """Whether `seen` is the version that is known: what is assumed of it stays.

    The event of a version that an answer has brought before comes while its placement is being
    written; the room that this promises must not look free meanwhile.
    """
    if there is None or there.uid != seen.uid:
        return False
    return there.metadata.resource_version == seen.metadata.resource_version
