"""Volumes: create, delete, publish, unpublish, expand, list, capacity.

Every method is idempotent and looks at the object afresh before it changes it. A change of spec is
a JSON Patch that tests what it was decided on, so two controllers cannot undo each other's work.
"""

from __future__ import annotations

import uuid as uuids
from dataclasses import dataclass

from tercet_api.clients import Conflict, Refused, expect, put
from tercet_api.clients import NotFound as NoObject
from tercet_api.names import host_id, host_nqn, volume_nqn
from tercet_api.objects import (
    Attachment,
    Condition,
    ConditionStatus,
    Metadata,
    Source,
    StorageNode,
    Volume,
    VolumeSpec,
)
from tercet_csi.controller.cluster import Cluster, internal
from tercet_csi.controller.parameters import Parameters, placement
from tercet_csi.errors import (
    Aborted,
    AlreadyExists,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
)

READY_TIMEOUT_S = 50.0
GONE_TIMEOUT_S = 50.0
FENCE_TIMEOUT_S = 25.0
GROWN_TIMEOUT_S = 50.0
EDIT_TRIES_MAX = 8
UNPLACEABLE = "Unplaceable"
"""Reason of a Ready condition: no set of nodes can take the volume (tercet_operator)."""


@dataclass(frozen=True)
class Wanted:
    """A volume to be made."""

    name: str
    size_bytes: int
    limit_bytes: int
    parameters: Parameters
    source: Source | None
    preferred_node: str | None


class Volumes:
    """What the controller does with Volume objects."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._objects = cluster.volumes.objects

    async def create(self, wanted: Wanted) -> Volume:
        """Make the volume, or find it made; returns it once it is Ready.

        Raises AlreadyExists (same name, other wishes), Exhausted (nothing was kept),
        DeadlineExceeded.
        """
        spec = VolumeSpec(
            uuid=str(uuids.uuid4()),
            size_bytes=wanted.size_bytes,
            replicas=wanted.parameters.replicas,
            source=wanted.source,
            placement=placement(wanted.parameters, wanted.preferred_node),
            qos=wanted.parameters.qos,
        )
        new = Volume(metadata=Metadata(name=wanted.name), spec=spec)
        try:
            made = await self._objects.create(new)
        except Conflict:
            made = await self._existing(wanted)
        except Refused as error:
            raise InvalidArgument(f"volume {wanted.name}: {error}") from None
        else:
            # Crash window: without this mark the operator places it once every node has reported
            # that it holds no orphan of it (architecture.md: no config never means new).
            await self._objects.patch_status(made.name, {"status": {"newUid": made.uid}})
        return await self._ready(made)

    async def _existing(self, wanted: Wanted) -> Volume:
        try:
            found = await self._objects.get(wanted.name)
        except NoObject:
            raise Aborted(f"volume {wanted.name} was deleted meanwhile: try again") from None
        if found.deleting:
            raise Aborted(f"volume {wanted.name} is being deleted: try again when it is gone")
        spec = found.spec
        fits = spec.size_bytes >= wanted.size_bytes and (
            not wanted.limit_bytes or spec.size_bytes <= wanted.limit_bytes
        )
        same = (spec.replicas, spec.source, spec.qos, spec.placement.topology_key) == (
            wanted.parameters.replicas,
            wanted.source,
            wanted.parameters.qos,
            wanted.parameters.topology_key,
        )
        if not (fits and same):
            raise AlreadyExists(
                f"volume {wanted.name} exists with {spec.size_bytes} bytes, {spec.replicas} "
                f"replicas and source {spec.source}: choose another name"
            )
        return found

    async def _ready(self, volume: Volume) -> Volume:
        def settled() -> Volume | None:
            known = self._cluster.volumes.known.get(volume.name)
            if known is None or known.uid != volume.uid:
                return None
            ready = condition(known, "Ready")
            if ready is None:
                return None
            done = ready.status is ConditionStatus.TRUE or ready.reason == UNPLACEABLE
            return known if done else None

        what = f"volume {volume.name} is not Ready (kubectl describe tvol {volume.name})"
        known = await self._cluster.volumes.until(settled, READY_TIMEOUT_S, what)
        ready = condition(known, "Ready")
        assert ready is not None
        if ready.status is not ConditionStatus.TRUE:
            # Exhausted tells the caller that nothing is left behind: so nothing may be.
            await self._delete(volume)
            raise Exhausted(f"volume {volume.name}: {ready.message}")
        return known

    async def delete(self, volume_id: str) -> None:
        """Delete it and wait until its replicas are gone; nothing when there is none.

        Raises FailedPrecondition while it is attached or has snapshots. A snapshot that is being
        deleted, or of which a clone is being made, goes by itself: the operator waits for that.
        """
        try:
            volume = await self._cluster.find_volume(volume_id)
        except NotFound:
            return
        if volume.spec.attachments:
            nodes = ", ".join(a.node_name for a in volume.spec.attachments)
            raise FailedPrecondition(
                f"volume {volume.name} is attached to {nodes}: detach it first"
            )
        found = await self._cluster.snapshots_of(volume.name)
        dependants = [s for s in found if not (s.deleting or internal(s))]
        if dependants:
            names = ", ".join(s.name for s in dependants)
            raise FailedPrecondition(
                f"volume {volume.name} has snapshots ({names}): delete them first"
            )
        await self._delete(volume)

    async def _delete(self, volume: Volume) -> None:
        try:
            await self._objects.delete(volume.name, uid=volume.uid)
        except (NoObject, Conflict):
            return

        def gone() -> bool | None:
            known = self._cluster.volumes.known.get(volume.name)
            return True if known is None or known.uid != volume.uid else None

        what = f"volume {volume.name} is being deleted (kubectl describe tvol {volume.name})"
        await self._cluster.volumes.until(gone, GONE_TIMEOUT_S, what)

    async def publish(self, volume_id: str, node: str, *, read_only: bool) -> dict[str, str]:
        """Let the node's host connect; returns the publish context.

        Raises NotFound (volume or node), AlreadyExists (attached here in another way),
        FailedPrecondition (written elsewhere; names the node), Exhausted (the node is full).
        """
        for _ in range(EDIT_TRIES_MAX):
            volume = await self._cluster.find_volume(volume_id)
            if not await self._cluster.node_exists(node):
                raise NotFound(f"there is no node {node}")
            if volume.deleting:
                raise FailedPrecondition(f"volume {volume.name} is being deleted")
            mine = [a for a in volume.spec.attachments if a.node_name == node]
            others = [a for a in volume.spec.attachments if a.node_name != node]
            if mine and mine[0].read_only != read_only:
                raise AlreadyExists(
                    f"volume {volume.name} is attached to {node} with readOnly={mine[0].read_only}"
                )
            writers = [a.node_name for a in others if not (a.read_only and read_only)]
            if writers:
                raise FailedPrecondition(
                    f"volume {volume.name} is attached to {writers[0]}: one node at a time writes; "
                    "it can be attached here when it is detached there"
                )
            if not mine:
                await self._check_place(volume, node)
            entry = Attachment(node_name=node, host_nqn=host_nqn(node), read_only=read_only)
            if mine or await self._edit_attachments(volume, [*others, entry]):
                return await self._context(volume, node)
        raise Aborted(f"volume {volume_id} changes too often: try again")

    async def _check_place(self, volume: Volume, node: str) -> None:
        """Raises Exhausted when the node has as many volumes as it takes.

        Two calls at the same time may both find the last place: the limit is of resources on the
        node, not of anybody's safety.
        """
        most = await self._cluster.volumes_max(node)
        attached = self._cluster.attached_to(node)
        if most is not None and len(attached) >= most:
            raise Exhausted(
                f"volume {volume.name}: node {node} has {len(attached)} volumes and takes {most}: "
                "detach one first"
            )

    async def _context(self, volume: Volume, node: str) -> dict[str, str]:
        def reachable() -> Volume | None:
            known = self._cluster.volumes.known.get(volume.name)
            if known is None or not any(a.node_name == node for a in known.spec.attachments):
                return None  # the next call counts what is known: it must count this one
            return known if known.status.endpoints else None

        what = f"volume {volume.name} has no endpoints (kubectl describe tvol {volume.name})"
        known = await self._cluster.volumes.until(reachable, READY_TIMEOUT_S, what)
        assert volume.spec.uuid is not None
        endpoints = ",".join(f"{e.address}:{e.port}" for e in known.status.endpoints)
        return {
            "nqn": volume_nqn(volume.spec.uuid),
            "hostNqn": host_nqn(node),
            "hostId": host_id(node),
            "endpoints": endpoints,
        }

    async def unpublish(self, volume_id: str, node: str) -> None:
        """Take the node's right to connect and wait until its host is fenced (H5).

        An empty node means all. Nothing when volume or attachment is not there.
        """
        for _ in range(EDIT_TRIES_MAX):
            try:
                volume = await self._cluster.find_volume(volume_id)
            except NotFound:
                return None
            kept = [a for a in volume.spec.attachments if node and a.node_name != node]
            if len(kept) == len(volume.spec.attachments) or await self._edit_attachments(
                volume, kept
            ):
                fresh = await self._cluster.find_volume(volume_id)
                return await self._fenced(fresh)
        raise Aborted(f"volume {volume_id} changes too often: try again")

    async def _fenced(self, volume: Volume) -> None:
        """Wait until the current epoch's primary has confirmed this generation of spec (H5)."""
        generation = volume.metadata.generation

        def confirmed() -> bool | None:
            known = self._cluster.volumes.known.get(volume.name)
            if known is None or known.uid != volume.uid or known.status.config is None:
                return True if known is None or known.metadata.generation >= generation else None
            fence = known.status.fence
            current = fence is not None and fence.epoch == known.status.config.epoch
            return True if current and fence and fence.generation >= generation else None

        what = (
            f"volume {volume.name}: its primary has not confirmed yet that the host is shut out "
            f"(kubectl describe tvol {volume.name})"
        )
        await self._cluster.volumes.until(confirmed, FENCE_TIMEOUT_S, what)

    async def _edit_attachments(self, volume: Volume, wanted: list[Attachment]) -> bool:
        """Replace the list if it still is what it was; False when it is not."""
        before = [a.to_json() for a in volume.spec.attachments]
        after = [a.to_json() for a in wanted]
        patch = [
            expect("/metadata/uid", volume.uid),
            expect("/metadata/resourceVersion", volume.metadata.resource_version),
            put("/spec/attachments", after),
        ]
        if before == after:
            return True
        try:
            await self._objects.patch(volume.name, patch)
        except (Refused, Conflict):
            return False
        return True

    async def expand(self, volume_id: str, size_bytes: int, limit_bytes: int) -> Volume:
        """Grow it and wait until it has grown; a smaller size changes nothing.

        Raises OutOfRange (names the nodes without room; nothing was changed: a volume never shrinks
        again), DeadlineExceeded.
        """
        volume = await self._cluster.find_volume(volume_id)
        if limit_bytes and volume.spec.size_bytes > limit_bytes:
            raise OutOfRange(f"volume {volume.name} has {volume.spec.size_bytes} bytes already")
        if size_bytes > volume.spec.size_bytes:
            self._check_room(volume, size_bytes)
            patch = {"spec": {"sizeBytes": size_bytes}}
            try:
                volume = await self._objects.patch(volume.name, patch)
            except Refused as error:
                raise OutOfRange(f"volume {volume.name}: {error}") from None
        wanted = volume.spec.size_bytes

        def grown() -> Volume | None:
            known = self._cluster.volumes.known.get(volume.name)
            return known if known is not None and known.status.size_bytes >= wanted else None

        what = f"volume {volume.name} has not grown to {wanted} bytes"
        return await self._cluster.volumes.until(grown, GROWN_TIMEOUT_S, what)

    async def capacity_bytes(self, replicas: int, segments: dict[str, str]) -> int:
        """The largest volume that could be placed now."""
        placed = self._promised(besides="")
        free = sorted(
            (
                max(0, node.status.capacity_bytes - placed.get(node.name, 0))
                for node in self._cluster.nodes.known.values()
                if _usable(node) and segments.items() <= _segments(node).items()
            ),
            reverse=True,
        )
        return free[replicas - 1] if len(free) >= replicas else 0

    def _promised(self, *, besides: str) -> dict[str, int]:
        """Bytes promised on each node to all volumes but one, each counted with its whole size."""
        placed: dict[str, int] = {}
        for volume in self._cluster.volumes.known.values():
            if volume.name == besides:
                continue
            for replica in volume.status.replicas:
                placed[replica.node] = placed.get(replica.node, 0) + volume.spec.size_bytes
        return placed

    def _check_room(self, volume: Volume, size_bytes: int) -> None:
        """Whether every node that keeps a replica has room for this size.

        Raises OutOfRange, not Exhausted: external-resizer takes the latter for "still under way"
        and would not let the user ask for less.
        """
        promised = self._promised(besides=volume.name)
        short = []
        for replica in volume.status.replicas:
            node = self._cluster.nodes.known.get(replica.node)
            if node is None:
                continue  # it has left the cluster: its replica holds up nothing
            room = node.status.capacity_bytes - promised.get(replica.node, 0)
            if room < size_bytes:
                short.append(f"{replica.node} has room for {max(room, 0)} bytes of it")
        if short:
            raise OutOfRange(
                f"volume {volume.name} cannot grow to {size_bytes} bytes: {'; '.join(short)}; "
                "ask for less, or delete other volumes"
            )


def condition(volume: Volume, kind: str) -> Condition | None:
    """The condition of this type, or none."""
    return next((c for c in volume.status.conditions if c.type == kind), None)


def _usable(node: StorageNode) -> bool:
    ready = next((c for c in node.status.conditions if c.type == "Ready"), None)
    is_ready = ready is not None and ready.status is ConditionStatus.TRUE
    return is_ready and not node.spec.cordoned and not node.spec.drained


def _segments(node: StorageNode) -> dict[str, str]:
    return dict(node.spec.topology)
