"""Watches by kopf: they keep the world up to date and wake whatever a change may concern.

Only kopf's raw event handlers are used, because they are level-triggered by nature: kopf lists,
watches, reconnects and lists again; nothing is stored in the objects by kopf. What vanished while a
watch was away is found by `Resync`, which lists everything now and then.

That watches move is proven by the operator's own Lease: it stands in the collection that is watched
here, and is renewed every second by whoever leads.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kopf
import structlog
from pydantic import ValidationError

from tercet_api.clients import Api, ApiError, Json, Objects, snapshots, storage_nodes, volumes
from tercet_api.coordination import Lease, leases, sight
from tercet_api.names import (
    GROUP,
    NAMESPACE,
    NODE_LEASE_PREFIX,
    OPERATOR_LEASE,
    SIGNER,
    SNAPSHOTS,
    STORAGENODES,
    VERSION,
    VOLUMES,
)
from tercet_api.objects import Object, Snapshot, StorageNode, Volume
from tercet_operator.authority import undecided
from tercet_operator.executor import NODE, SNAPSHOT, VOLUME, Key, Kind, key_of
from tercet_operator.world import Moment, World, newer, nodes_of, same

SERVER_TIMEOUT_S = 60
"""The server ends a watch after this time, and kopf goes on from there: a dead one is not kept."""
INACTIVITY_S = 70.0
CONNECT_S = 10.0
RESYNC_S = 60.0
STILL_S = 30.0
"""A leader that has not seen its own Lease change for this long has watches that stand still."""

Wake = Callable[[Key, float], None]
Requested = Callable[[Json], None]

log = structlog.get_logger(__name__)


class Watching:
    """Takes events into the world."""

    def __init__(self, world: World, wake: Wake, requested: Requested) -> None:
        self._world = world
        self._wake = wake
        self._requested = requested
        self.moved_s = time.monotonic()
        """When the operator's own Lease was last seen to change."""

    def registry(self) -> kopf.OperatorRegistry:
        """The handlers, for kopf.operator."""
        registry = kopf.OperatorRegistry()
        models: Mapping[str, type[Object]] = {
            STORAGENODES: StorageNode,
            VOLUMES: Volume,
            SNAPSHOTS: Snapshot,
        }
        for plural, model in models.items():

            async def take(
                event: Mapping[str, Any], model: type[Object] = model, **_: object
            ) -> None:
                self.take(model, event.get("type"), dict(event["object"]))

            kopf.on.event(GROUP, VERSION, plural, registry=registry, id=plural)(take)

        async def lease(event: Mapping[str, Any], **_: object) -> None:
            self.take_lease(event.get("type"), dict(event["object"]))

        async def request(event: Mapping[str, Any], **_: object) -> None:
            item = dict(event["object"])
            mine = item["spec"].get("signerName") == SIGNER
            if event.get("type") != "DELETED" and mine and undecided(item):
                self._requested(item)

        kopf.on.event("coordination.k8s.io", "v1", "leases", registry=registry, id="leases")(lease)
        kopf.on.event(
            "certificates.k8s.io",
            "v1",
            "certificatesigningrequests",
            registry=registry,
            id="requests",
        )(request)
        return registry

    def take(self, model: type[Object], kind: str | None, item: Json) -> None:
        """One event of one of Tercet's kinds."""
        try:
            seen = model.model_validate(item)
        except ValidationError:
            log.exception("object left out", kind=model.KIND, name=item["metadata"].get("name"))
            return
        known = self.known(Kind(model.KIND))
        before = known.get(seen.name)
        if kind == "DELETED":
            if before is not None and before.uid == seen.uid:
                del known[seen.name]
        elif newer(before, seen) and not same(before, seen):
            known[seen.name] = seen
        self.concern(seen, before)

    def known(self, kind: Kind) -> dict[str, Object]:
        """The world's objects of a kind."""
        sides: dict[Kind, Any] = {
            NODE: self._world.nodes,
            VOLUME: self._world.volumes,
            SNAPSHOT: self._world.snapshots,
        }
        found: dict[str, Object] = sides[kind]
        return found

    def take_lease(self, kind: str | None, item: Json) -> None:
        """One event of a Lease of Tercet's namespace."""
        lease = Lease.model_validate(item)
        if lease.name == OPERATOR_LEASE:
            self.moved_s = time.monotonic()
            return
        if not lease.name.startswith(NODE_LEASE_PREFIX):
            return
        node = lease.name.removeprefix(NODE_LEASE_PREFIX)
        if kind == "DELETED":
            self._world.sightings.pop(node, None)
            self._wake(Key(NODE, node), 0.0)
            return
        now = Moment(time.monotonic(), datetime.now(UTC))
        was_alive = self._world.alive(node, now)
        before = self._world.sightings.get(node)
        self._world.sightings[node] = sight(before, lease, now.s, now.wall)
        if not was_alive:
            self._wake(Key(NODE, node), 0.0)

    def concern(self, seen: Object, before: Object | None) -> None:
        """Wake the object and whatever is decided with a look at it."""
        self._wake(key_of(seen), 0.0)
        if isinstance(seen, StorageNode):
            self._concern_node(seen)
        elif isinstance(seen, Volume):
            self._concern_volume(seen, before)
        elif isinstance(seen, Snapshot):
            for volume in self._world.volumes.values():
                if volume.name == seen.spec.volume or volume.spec.source is not None:
                    self._wake(key_of(volume), 0.0)

    def _concern_node(self, seen: StorageNode) -> None:
        for volume in self._world.volumes.values():
            if volume.status.config is None or seen.name in nodes_of(volume):
                self._wake(key_of(volume), 0.0)

    def _concern_volume(self, seen: Volume, before: Object | None) -> None:
        world = self._world
        was = nodes_of(before) if isinstance(before, Volume) else set()
        for name in was:
            if name in world.nodes and world.nodes[name].deleting:
                self._wake(Key(NODE, name), 0.0)
        for snapshot in world.snapshots.values():
            if snapshot.spec.volume == seen.name or snapshot.deleting:
                self._wake(key_of(snapshot), 0.0)
        for volume in world.volumes.values():
            if volume.status.config is None and volume.name != seen.name:
                self._concern_waiting(volume, seen)

    def _concern_waiting(self, volume: Volume, seen: Volume) -> None:
        """A volume that waits for room, for its name to be free, or for its source."""
        source = volume.spec.source
        waits_for = source is not None and source.volume == seen.name
        if waits_for or seen.deleting or seen.spec.uuid == volume.spec.uuid:
            self._wake(key_of(volume), 0.0)


class Resync:
    """Lists everything now and then: what is gone goes, what was missed comes."""

    def __init__(self, api: Api, watching: Watching) -> None:
        self._watching = watching
        self._leases = leases(api)
        self._sides: tuple[tuple[Kind, Any], ...] = (
            (NODE, storage_nodes(api)),
            (VOLUME, volumes(api)),
            (SNAPSHOT, snapshots(api)),
        )

    async def once(self) -> None:
        """One round. Raises ApiError."""
        for kind, objects in self._sides:
            await self._kind(kind, objects)
        for lease in await self._leases.list():
            self._watching.take_lease(None, {**lease.manifest(), "metadata": _metadata(lease)})

    async def _kind(self, kind: Kind, objects: Objects[Object]) -> None:
        known = self._watching.known(kind)
        before = {name: item.uid for name, item in known.items()}
        listed = {item.name: item for item in await objects.list()}
        for name, uid in before.items():
            gone = known.get(name)
            if gone is not None and gone.uid == uid and name not in listed:
                del known[name]
                self._watching.concern(gone, gone)
        for item in listed.values():
            there = known.get(item.name)
            if newer(there, item):
                known[item.name] = item
                self._watching.concern(item, there)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(RESYNC_S)
            try:
                await self.once()
            except ApiError as error:
                log.warning("resync failed", error=str(error))


def _metadata(item: Object) -> Json:
    return item.metadata.to_json()


def settings() -> kopf.OperatorSettings:
    """Kopf's settings: time-outs on every watch, and nothing of kopf's own in the objects."""
    made = kopf.OperatorSettings()
    made.watching.server_timeout = SERVER_TIMEOUT_S
    made.watching.client_timeout = SERVER_TIMEOUT_S + INACTIVITY_S
    made.watching.inactivity_timeout = INACTIVITY_S
    made.watching.connect_timeout = CONNECT_S
    made.networking.request_timeout = 30.0
    made.posting.enabled = False
    made.scanning.disabled = True
    made.process.ultimate_exiting_timeout = None
    return made


async def run_kopf(watching: Watching, kubeconfig: Path | None) -> None:
    """Kopf's watches, until cancelled or until the process is told to end."""
    registry = watching.registry()
    if kubeconfig is not None:
        os.environ["KUBECONFIG"] = str(kubeconfig)  # where kopf's own login looks
        kopf.on.login(registry=registry, id="kubeconfig")(kopf.login_with_kubeconfig)
    else:
        kopf.on.login(registry=registry, id="pod")(kopf.login_with_service_account)
    # Kopf's own name for itself has the user's in it, and the user of a pod has none.
    identity: Any = socket.gethostname()
    await kopf.operator(
        registry=registry,
        settings=settings(),
        identity=identity,
        standalone=True,
        namespaces=[NAMESPACE],
    )
