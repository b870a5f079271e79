"""What a StorageNode needs next (pure): its finalizer, its readiness, its release.

Ready comes from the node's Lease (tercet_api.coordination.membership) and from what its agent has
reported. The finalizer stays while a Volume names a replica there: the object's disappearance is
what lets the deletion of such a volume go on without that node.
"""

from __future__ import annotations

from tercet_api.clients import Json
from tercet_api.names import FINALIZER
from tercet_api.objects import DeviceState, NodePhase, ReplicaPhase, StorageNode
from tercet_operator.actions import Action, Adopt, Bury, LookAgain, Release
from tercet_operator.conditions import DELETING, READY, Verdict, status_actions
from tercet_operator.world import Moment, World, nodes_of

EXPIRY_SLACK_S = 0.05


def decide(node: StorageNode, world: World, now: Moment) -> list[Action]:
    """What to do about one StorageNode."""
    kept = sorted(volume for volume in _volumes_on(node, world))
    if node.deleting and not kept:
        if FINALIZER not in node.metadata.finalizers:
            return []
        # The object goes last: whoever sees it vanish finds the tombstone.
        return [*_buried(node, world, now), Release()]
    if not node.deleting and FINALIZER not in node.metadata.finalizers:
        return [Adopt()]
    ready = _ready(node, world, now)
    verdicts = [ready]
    if node.deleting:
        message = f"{len(kept)} volume(s) have a replica here: {', '.join(kept[:10])}"
        verdicts.append(Verdict(DELETING, False, "HasReplicas", message, False))
    capacity = node.status.capacity_bytes
    used = min(100, node.status.allocated_bytes * 100 // capacity) if capacity else 0
    members: Json = {"phase": _phase(node, ready).value, "usedPercent": used}
    if world.roll is not None and node.status.instance is not None:
        enrolled = world.roll.enrolled(node, world.nodes.values(), now.wall)
        members["enrolment"] = enrolled.to_json()
    actions = status_actions(node.status, verdicts, now, node.metadata.generation, members)
    sighting = world.sightings.get(node.name)
    if sighting is not None and not sighting.expired(now.s):
        # Nothing happens when a Lease expires: look again just then.
        actions.append(LookAgain(sighting.expires_at_s - now.s + EXPIRY_SLACK_S))
    return actions


def _buried(node: StorageNode, world: World, now: Moment) -> list[Action]:
    if world.roll is None:
        return []
    tombstone = world.roll.tombstone(node, now.wall)
    return [] if tombstone is None else [Bury(tombstone)]


def _volumes_on(node: StorageNode, world: World) -> list[str]:
    names = []
    for volume in world.volumes.values():
        deleted = {e.node for e in volume.status.replicas if e.state is ReplicaPhase.DELETED}
        if node.name in nodes_of(volume) - deleted:
            names.append(volume.name)
    return names


def _ready(node: StorageNode, world: World, now: Moment) -> Verdict:
    if node.name not in world.sightings:
        return Verdict(READY, False, "NoLease", "its agent has never been heard of", False)
    if not world.alive(node.name, now):
        return Verdict(READY, False, "LeaseExpired", "its agent does not renew its Lease", False)
    if node.status.instance is None:
        return Verdict(READY, False, "NoEngine", "its engine has not reported yet", False)
    failed = [d for d in node.status.devices if d.state is DeviceState.FAILED]
    if failed:
        said = "; ".join(f"device {d.id}: {d.message}" for d in failed)
        return Verdict(READY, False, "DeviceFailed", said, False)
    return Verdict(READY, True, "Ready", f"instance {node.status.instance}", True)


def _phase(node: StorageNode, ready: Verdict) -> NodePhase:
    if node.deleting:
        return NodePhase.DELETING
    if not ready.holds:
        never = node.status.instance is None
        return NodePhase.PENDING if never else NodePhase.NOT_READY
    return NodePhase.CORDONED if node.spec.cordoned or node.spec.drained else NodePhase.READY
