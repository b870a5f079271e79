"""Carries actions out, one after the other, and tells the world what came back.

The only place that writes objects. Every write names what it was decided on: the resourceVersion
where lists are replaced, the uid where an object of the same name may have come in between, the
whole old value where the configuration is swapped.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NewType

import structlog

from tercet_api.clients import (
    Api,
    Conflict,
    Json,
    NotFound,
    Objects,
    Refused,
    expect,
    put,
    snapshots,
    storage_nodes,
    volumes,
)
from tercet_api.coordination import Lost, Refusal, Swapped, Unknown, swap_config
from tercet_api.names import FINALIZER, clone_labels
from tercet_api.objects import (
    Enrolment,
    Metadata,
    Object,
    Snapshot,
    SnapshotSpec,
    StorageNode,
    Volume,
    VolumeReplica,
)
from tercet_operator.actions import (
    Action,
    Adopt,
    Bury,
    DropCloneSnapshot,
    LookAgain,
    MakeCloneSnapshot,
    Notice,
    Release,
    SwapFirst,
    WriteStatus,
)
from tercet_operator.events import Events
from tercet_operator.metrics import Metrics
from tercet_operator.registerfile import RegisterFile
from tercet_operator.world import World, newer

Kind = NewType("Kind", str)
NODE = Kind("StorageNode")
VOLUME = Kind("Volume")
SNAPSHOT = Kind("Snapshot")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """One object that is looked at."""

    kind: Kind
    name: str


class Stale(Exception):
    """The object is no longer what was decided upon: look at it afresh."""


class Executor:
    """Writes to the cluster on behalf of decisions."""

    def __init__(
        self,
        api: Api,
        world: World,
        events: Events,
        metrics: Metrics,
        wake: Callable[[Key, float], None],
    ) -> None:
        self._world = world
        self._register = RegisterFile(api)
        self._events = events
        self._metrics = metrics
        self._wake = wake
        self._nodes = storage_nodes(api)
        self._volumes = volumes(api)
        self._snapshots = snapshots(api)

    async def run(self, target: Object, actions: Sequence[Action]) -> None:
        """Take the actions decided for `target`. Raises Stale, ApiError at the first that fails."""
        for action in actions:
            match action:
                case Adopt():
                    await self._adopt(target)
                case Release():
                    await self._release(target)
                case Bury():
                    await self._bury(action.tombstone)
                case WriteStatus():
                    await self._write_status(target, action)
                case SwapFirst():
                    assert isinstance(target, Volume)
                    await self._swap(target, action)
                case MakeCloneSnapshot():
                    await self._make_snapshot(target, action)
                case DropCloneSnapshot():
                    await self._drop_snapshot(action)
                case Notice():
                    self._events.post(target, action)
                case LookAgain():
                    self._wake(key_of(target), action.after_s)

    async def refresh(self, key: Key) -> None:
        """Read an object consistently into the world. Raises ApiError."""
        objects, _ = self._side(key.kind)
        try:
            self._take(await objects.get(key.name))
        except NotFound:
            self._forget(key)

    def _side(self, kind: Kind) -> tuple[Objects[Object], dict[str, Object]]:
        sides: dict[Kind, tuple[object, object]] = {
            NODE: (self._nodes, self._world.nodes),
            VOLUME: (self._volumes, self._world.volumes),
            SNAPSHOT: (self._snapshots, self._world.snapshots),
        }
        return sides[kind]  # type: ignore[return-value]

    def _take(self, seen: Object) -> None:
        """Keep what an answer has shown, so that the next decision builds on it."""
        _, known = self._side(Kind(seen.KIND))
        if newer(known.get(seen.name), seen):
            known[seen.name] = seen

    def _forget(self, key: Key) -> None:
        _, known = self._side(key.kind)
        known.pop(key.name, None)

    async def _patch(self, target: Object, patch: Sequence[Json]) -> None:
        """A JSON Patch of just this object. Its tests are of what counts, not of the version."""
        objects, _ = self._side(Kind(target.KIND))
        try:
            whole = [expect("/metadata/uid", target.uid), *patch]
            self._take(await objects.patch(target.name, whole))
        except (Conflict, NotFound, Refused) as error:
            raise Stale(str(error)) from error

    async def _adopt(self, target: Object) -> None:
        held = target.metadata.finalizers
        patch = [] if FINALIZER in held else _finalizers(target, [*held, FINALIZER])
        if isinstance(target, Volume) and target.spec.uuid is None:
            patch += [expect("/spec/uuid", None), put("/spec/uuid", str(uuid.uuid4()))]
        await self._patch(target, patch)

    async def _release(self, target: Object) -> None:
        kept = [name for name in target.metadata.finalizers if name != FINALIZER]
        await self._patch(target, _finalizers(target, kept))
        log.info("released", kind=target.KIND, name=target.name)
        if not kept:
            self._forget(key_of(target))

    async def _write_status(self, target: Object, action: WriteStatus) -> None:
        if isinstance(target, Volume) and "replicas" in action.members:
            # Assumed before it is sent: whoever is placed meanwhile sees this room as taken. When
            # it fails the object is read again, which puts the truth back.
            self._world.volumes[target.name] = _assumed(target, action.members["replicas"])
        if isinstance(target, StorageNode) and "enrolment" in action.members:
            # In the same way: no two nodes are given one index.
            self._world.nodes[target.name] = _enrolled(target, action.members["enrolment"])
        patch: Json = {"status": action.members}
        if action.exact:
            patch["metadata"] = {"resourceVersion": target.metadata.resource_version}
        objects, _ = self._side(Kind(target.KIND))
        try:
            self._take(await objects.patch_status(target.name, patch))
        except (Conflict, NotFound) as error:
            raise Stale(str(error)) from error

    async def _bury(self, tombstone: Enrolment) -> None:
        roll = self._world.roll
        assert roll is not None, "who decided on a tombstone had the roll"
        roll.bury(tombstone)
        await self._register.write(roll.register())
        log.info("left the cluster", nid=tombstone.nid, node=tombstone.node)

    async def _swap(self, volume: Volume, action: SwapFirst) -> None:
        answer = await swap_config(
            self._volumes, volume.name, volume.uid, None, action.config, also=action.also
        )
        match answer:
            case Swapped(now):
                self._take(now)
                primary = action.config.primary.node
                log.info("first configuration", volume=volume.name, primary=primary)
                self._metrics.configured.inc()
            case Lost(now):
                raise Stale(f"volume {volume.name}: another configuration was first: {now}")
            case Refusal(now, message):
                # A `test` of the replicas' ids fails in the same way as a rule: look again.
                self._take(now)
                raise Stale(f"volume {volume.name}: the first configuration is refused: {message}")
            case Unknown(message):
                raise Stale(f"volume {volume.name}: whether it was configured is open: {message}")

    async def _make_snapshot(self, target: Object, action: MakeCloneSnapshot) -> None:
        metadata = Metadata(
            name=action.name, finalizers=[FINALIZER], labels=clone_labels(action.volume)
        )
        new = Snapshot(metadata=metadata, spec=SnapshotSpec(volume=action.volume))
        try:
            self._take(await self._snapshots.create(new))
        except Conflict:
            await self.refresh(Key(SNAPSHOT, action.name))
        log.info("snapshot for a clone", volume=target.name, snapshot=action.name)

    async def _drop_snapshot(self, action: DropCloneSnapshot) -> None:
        try:
            await self._snapshots.delete(action.name, uid=action.uid)
        except (NotFound, Conflict):
            self._forget(Key(SNAPSHOT, action.name))
            return
        await self.refresh(Key(SNAPSHOT, action.name))


def _assumed(volume: Volume, replicas: Sequence[Json]) -> Volume:
    entries = [VolumeReplica.model_validate(entry) for entry in replicas]
    status = volume.status.model_copy(update={"replicas": entries})
    return volume.model_copy(update={"status": status})


def _enrolled(target: StorageNode, enrolment: Json) -> StorageNode:
    kept = {"enrolment": Enrolment.model_validate(enrolment)}
    return target.model_copy(update={"status": target.status.model_copy(update=kept)})


def key_of(target: Object) -> Key:
    """How an object is named in the queue."""
    return Key(Kind(target.KIND), target.name)


def _finalizers(target: Object, wanted: list[str]) -> list[Json]:
    path, held = "/metadata/finalizers", target.metadata.finalizers
    return [expect(path, held or None), put(path, wanted)]
