"""The agent: ties watches, the engine's session and the executors together in one TaskGroup.

Level-triggered throughout: a watch's event or a change in the engine's Status only marks names; a
handler then looks at everything that is known and takes the step that is due. Every task has this
TaskGroup as its owner; one that fails in a way nobody foresaw ends the process, and the next start
rebuilds all of it from the API server and the engine.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from tercet_api.clients import (
    Api,
    ApiError,
    Changed,
    Event,
    Listed,
    Removed,
    snapshots,
    storage_nodes,
    volumes,
)
from tercet_api.objects import Fence, Object, Snapshot, StorageNode, Volume
from tercet_node import http, replicas, server
from tercet_node.certificates import Certificates
from tercet_node.engine import Engine
from tercet_node.keyed import Keyed, pause_s
from tercet_node.members.register import read_register
from tercet_node.members.service import Membership
from tercet_node.metrics import Metrics
from tercet_node.node_work import NodeWork
from tercet_node.notices import About, Notices, Said
from tercet_node.primary_work import PrimaryWork
from tercet_node.protos import engine_pb2 as pb
from tercet_node.registration import Group, Registration
from tercet_node.session import Listeners, Session
from tercet_node.views import Origin
from tercet_node.volume_work import VolumeWork
from tercet_node.world import EngineState, World

SHOW_PARALLEL = 32
REPLICA_PARALLEL = 16
PRIMARY_PARALLEL = 32
SNAPSHOT_PARALLEL = 16

log = structlog.get_logger(__name__)
O = TypeVar("O", bound=Object)  # noqa: E741


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    node: str
    kubeconfig: Path | None
    engine_socket: Path
    state_dir: Path
    listen: str
    http: str
    group: Group | None = None
    """Of what this node's StorageNode is made, where there is none."""
    address: str = ""
    """The node's own, for that object."""


class Agent:
    """One node's agent."""

    def __init__(self, settings: Settings, api: Api, engine: Engine) -> None:
        self._settings = settings
        self._api = api
        self.world = World(settings.node)
        self.metrics = Metrics(lambda: self.world.engine.status if self.world.engine else None)
        self._notices = Notices(api, settings.node, self.metrics.notices_dropped.inc)
        self._certificates = Certificates(
            api, settings.node, settings.state_dir, self.metrics.certificate_expires.set
        )
        self._membership = Membership(
            settings.node,
            settings.state_dir,
            self._certificates,
            lambda: read_register(api),
            self.metrics.membership,
            self._members_changed,
        )
        self._engine = engine
        listeners = Listeners(
            swap=self._swap,
            read=self._read_requested,
            notice=self._notice,
            fenced=self._fenced,
            begun=self._begun,
            status=self._status,
            refused=self._refused,
        )
        self.session = Session(engine, self.world, listeners)
        self._work = VolumeWork(
            self.world, volumes(api), engine, self.metrics, self._notices, self.session.refresh
        )
        self._primary = PrimaryWork(
            self.world, volumes(api), snapshots(api), engine, self._work, self.session.refresh
        )
        self._node = NodeWork(self.world, api, storage_nodes(api))
        self._show = Keyed("show", self._work.observe, parallel=SHOW_PARALLEL)
        self._read = Keyed("read", self._work.read, parallel=SHOW_PARALLEL)
        self._replicas = Keyed("replica", self._work.replicas, parallel=REPLICA_PARALLEL)
        self._lead = Keyed("primary", self._primary.volume, parallel=PRIMARY_PARALLEL)
        self._snap = Keyed("snapshot", self._primary.snapshot, parallel=SNAPSHOT_PARALLEL)
        self._own = Keyed("node", self._node.status, parallel=1)
        self._work.want_read = self._read.mark

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            follow = group.create_task
            follow(_follow(storage_nodes(self._api).watch(), self._nodes), name="watch-nodes")
            follow(_follow(volumes(self._api).watch(), self._volumes), name="watch-volumes")
            follow(_follow(snapshots(self._api).watch(), self._snapshots), name="watch-snapshots")
            for keyed in self._keyed:
                group.create_task(keyed.run(), name=keyed.name)
            group.create_task(self._hold_session(), name="session")
            group.create_task(self._node.renew(lambda: self.session.answered_s), name="lease")
            group.create_task(self._notices.run(), name="notices")
            group.create_task(self._certify(), name="certificates")
            group.create_task(self._register(), name="register")
            group.create_task(self._membership.run(), name="membership")
            service = server.AgentService(self._engine, self.world, self._membership)
            group.create_task(server.serve(self._settings.listen, service, self._certificates))
            group.create_task(http.serve(self._settings.http, self.metrics.registry, self.missing))

    @property
    def _keyed(self) -> tuple[Keyed, ...]:
        return (self._show, self._read, self._replicas, self._lead, self._snap, self._own)

    def missing(self) -> str | None:
        """What is still missing to be ready."""
        for event, what in (
            (self.world.nodes_known, "StorageNodes not listed"),
            (self.world.volumes_known, "Volumes not listed"),
            (self.world.snapshots_known, "Snapshots not listed"),
        ):
            if not event.is_set():
                return what
        if self.world.own is None:
            return f"no StorageNode {self.world.node}"
        if self.world.engine is None or self.world.engine.status is None:
            return "engine not configured"
        return None

    async def _hold_session(self) -> None:
        await self.session.run(await self._cluster_id())

    async def _register(self) -> None:
        given = self._settings
        if given.group is not None:
            nodes = storage_nodes(self._api)
            registration = Registration(self._api, nodes, given.node, given.address)
            await registration.run(given.group)

    async def _certify(self) -> None:
        await self.world.nodes_known.wait()
        own = self.world
        await self._certificates.run(lambda: own.own.spec.address if own.own else None)

    async def _cluster_id(self) -> str:
        """kube-system's uid names the cluster, as is the custom."""
        failures = 0
        while True:
            try:
                answer = await self._api.request("GET", "/api/v1/namespaces/kube-system")
                return str(answer["metadata"]["uid"])
            except ApiError as error:
                failures += 1
                log.warning("cluster not known yet", error=str(error))
                await asyncio.sleep(pause_s(failures, random.random()))  # noqa: S311

    # -------------------------------------------------------------- what the watches show

    def _nodes(self, event: Event[StorageNode]) -> None:
        names = _apply(self.world.nodes, event)
        seen = [self.world.nodes[name] for name in names if name in self.world.nodes]
        # Whose object is gone has left a tombstone.
        self._membership.observe(seen, gone=not isinstance(event, Changed))
        self.world.nodes_known.set()
        self.session.nodes_changed()
        self._own.mark(self.world.node)

    def _volumes(self, event: Event[Volume]) -> None:
        changed = event.object.name if isinstance(event, Changed) else ""
        before = self.world.volumes.get(changed)
        for name in _apply(self.world.volumes, event):
            now = self.world.volumes.get(name)
            if before is None or now is None or before.status.config != now.status.config:
                # Who may take snapshots may be another by now.
                self._mark_snapshots(name)
            listed = isinstance(event, Listed)
            self._work.origins[name] = Origin.LIST if listed else Origin.WATCH
            if name not in self.world.volumes:
                self._work.forget(name)
                self._primary.forget(name)
            self._volume_changed(name)
        self.world.volumes_known.set()
        # Which replicas here are orphans may have changed with any of them.
        self._own.mark(self.world.node)

    def _snapshots(self, event: Event[Snapshot]) -> None:
        for name in _apply(self.world.snapshots, event):
            self._snap.mark(name)
            for volume in self.world.volumes.values():
                if replicas.origin(volume) == name:
                    self._replicas.mark(volume.name)
        self.world.snapshots_known.set()

    def _mark_snapshots(self, volume: str) -> None:
        self._snap.mark_all(
            s.name for s in self.world.snapshots.values() if s.spec.volume == volume
        )

    def _volume_changed(self, name: str) -> None:
        for keyed in (self._show, self._replicas, self._lead):
            keyed.mark(name)

    def _members_changed(self) -> None:
        before, now = self.world.membership, self._membership.sight()
        self.world.membership = now
        if (before and before.digest) != (now and now.digest):
            self.session.nodes_changed()
            self._own.mark(self.world.node)
        self.session.standings_changed()

    # -------------------------------------------------------------- what the engine says

    def _begun(self, state: EngineState) -> None:
        log.info("session with the engine", instance=state.instance)
        for name in self.world.volumes:
            self._volume_changed(name)

    def _status(self, before: pb.StatusResponse | None, now: pb.StatusResponse) -> None:
        if before is None:  # what the engine lacks is known from now on
            self._replicas.mark_all(self.world.volumes)
        known = {} if before is None else {replica.volume: replica for replica in before.replicas}
        for replica in now.replicas:
            was = known.get(replica.volume)
            if was == replica and before is not None and before.links == now.links:
                continue
            self._lead.mark(replica.name)
            if was is None:
                self._volume_changed(replica.name)
            if replica.serving and (was is None or not was.serving or was.epoch != replica.epoch):
                self._mark_snapshots(replica.name)
        self._own.mark(self.world.node)

    async def _swap(self, state: EngineState, event: pb.SwapRequested) -> None:
        await self._work.swap(state, event)

    async def _read_requested(self, uuid: str) -> None:
        await self._work.read_requested(uuid)

    def _fenced(self, state: EngineState, event: pb.Fenced) -> None:
        state.fenced[event.volume] = Fence(epoch=event.epoch, generation=event.generation)
        volume = self.world.volume_of(event.volume)
        if volume is not None:
            self._lead.mark(volume.name)

    def _notice(self, notice: pb.Notice) -> None:
        log.info("notice", volume=notice.volume, reason=notice.reason, message=notice.message)
        target: Object | None = self.world.own
        if notice.volume:
            target = self.world.volume_of(notice.volume)
        if target is None:
            self.metrics.notices_dropped.inc()
            return
        about = About(type(target).KIND, target.name, target.uid)
        self._notices.say(Said(about, notice.reason, notice.message, notice.warning))

    def _refused(self, message: str | None) -> None:
        self._node.refusal = message
        own = self.world.own
        if message is not None and own is not None:
            about = About(StorageNode.KIND, own.name, own.uid)
            self._notices.say(Said(about, "ConfigurationRefused", message, warning=True))
        self._own.mark(self.world.node)


async def _follow(events: AsyncIterator[Event[O]], take: Callable[[Event[O]], None]) -> None:
    async for event in events:
        take(event)


def _apply(cache: dict[str, O], event: Event[O]) -> list[str]:
    """Bring a cache up to date; returns the names that may differ now."""
    match event:
        case Listed(objects):
            gone = set(cache) - {found.name for found in objects}
            for name in gone:
                del cache[name]
            cache.update({found.name: found for found in objects})
            return [*cache, *gone]
        case Changed(found):
            cache[found.name] = found
            return [found.name]
        case Removed(found):
            cache.pop(found.name, None)
            return [found.name]


async def run(settings: Settings) -> None:
    """Run an agent until cancelled."""
    async with Api(settings.kubeconfig) as api, Engine(settings.engine_socket) as engine:
        await Agent(settings, api, engine).run()
