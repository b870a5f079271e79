"""Carries out what concerns Volumes: shows them to the engine, swaps, makes and deletes replicas.

Thin: what is to be done is decided in `views`, `replicas` and `primary`. For each volume there is
one lock, held while the engine is shown a sight of it, so that sights arrive in the order in which
they were judged.

The way of a fail-over runs through `swap`: event of the engine -> one PATCH on a connection that is
already open -> ReportSwap. Nothing on it sleeps or waits for another volume.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable

import structlog

from tercet_api.clients import ApiError, NotFound, Objects
from tercet_api.coordination import Lost, Refusal, Swapped, Unknown, swap_config
from tercet_api.coordination.swap import Swap
from tercet_api.objects import Config, Volume
from tercet_node import convert, replicas
from tercet_node.engine import Engine
from tercet_node.errors import NoSpace, NotHere, Rejected
from tercet_node.keyed import pause_s
from tercet_node.metrics import Metrics
from tercet_node.notices import About, Notices, Said
from tercet_node.protos import engine_pb2 as pb
from tercet_node.views import (
    Origin,
    Shown,
    Verdict,
    answered_view,
    concerns,
    judge,
    needs_telling,
    version,
)
from tercet_node.world import EngineState, World

SWAP_TIMEOUT_S = 5.0
"""After this the outcome is unknown (T3): a read settles it sooner than a longer wait."""
REFUSAL_PAUSE_S = 1.0
"""A step that the API server's rules refuse is not asked for again more often than this."""

GONE = pb.VolumeView(consistent=True)
"""The view of an object that is no more: no configuration, nobody may connect."""

log = structlog.get_logger(__name__)
Mark = Callable[[str], None]


class VolumeWork:
    """The executor for Volume objects."""

    def __init__(
        self,
        world: World,
        volumes: Objects[Volume],
        engine: Engine,
        metrics: Metrics,
        notices: Notices,
        refresh: Callable[[], Awaitable[pb.StatusResponse]],
    ) -> None:
        self._world = world
        self._volumes = volumes
        self._engine = engine
        self._metrics = metrics
        self._notices = notices
        self._refresh = refresh
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.origins: dict[str, Origin] = {}
        self.want_read: Mark = lambda _name: None

    def forget(self, name: str) -> None:
        """The object is gone."""
        self.origins.pop(name, None)
        lock = self._locks.get(name)
        if lock is not None and not lock.locked():
            del self._locks[name]

    async def observe(self, name: str) -> float | None:
        """Show the engine what the watch shows."""
        volume = self._world.volumes.get(name)
        if volume is not None and self._concerns(volume):
            await self.show(volume, self.origins.get(name, Origin.WATCH))
        return None

    async def read(self, name: str) -> float | None:
        """Read the object consistently and show it to the engine."""
        try:
            volume = await self._volumes.get(name)
        except NotFound:
            return None
        if self._concerns(volume):
            await self.show(volume, Origin.READ)
        return None

    def _concerns(self, volume: Volume) -> bool:
        held = self._world.held_as(volume) is not None
        return volume.spec.uuid is not None and concerns(volume, self._world.node, held=held)

    async def show(self, volume: Volume, origin: Origin) -> None:
        """Hand a sight to the engine, unless a newer one has been shown. Raises EngineError."""
        assert volume.spec.uuid is not None
        async with self._locks[volume.name]:
            state = self._world.engine
            if state is None:
                return
            shown = state.shown.get(volume.name)
            verdict = judge(shown, volume, origin)
            if verdict is Verdict.READ:
                self.want_read(volume.name)
            if verdict is not Verdict.SHOW:
                return
            view = convert.volume_view(volume, consistent=origin is Origin.READ)
            if needs_telling(shown, view):
                await self._engine.observe(volume.spec.uuid, volume.name, view)
            elif shown is not None:
                view = shown.view
            state.shown[volume.name] = Shown(volume, view)

    # -------------------------------------------------------------- configuration

    async def read_requested(self, uuid: str) -> None:
        """The engine asks for a consistent read."""
        volume = await self._find(uuid)
        if volume is not None:
            self.want_read(volume.name)

    async def swap(self, state: EngineState, event: pb.SwapRequested) -> None:
        """Execute one compare-and-swap and report how it ended (T3). Raises EngineError."""
        began = time.monotonic()
        volume = await self._find(event.volume)
        if volume is None:
            log.warning("swap for a volume without an object", volume=event.volume)
            await self._engine.report_swap(event.token, pb.ReportSwapRequest.LOST, GONE)
            return
        old = convert.config_from_proto(event.old)
        new = convert.config_from_proto(event.new)
        outcome = await self._swap(volume, old, new)
        self._metrics.swap_seconds.observe(time.monotonic() - began)
        self._metrics.swaps.labels(type(outcome).__name__.lower()).inc()
        log.info(
            "swap",
            volume=volume.name,
            epoch=new.epoch,
            state=new.state.value,
            outcome=type(outcome).__name__,
            message=getattr(outcome, "message", ""),
            ms=round((time.monotonic() - began) * 1000, 1),
        )
        await self._report(state, event.token, volume, outcome)

    async def _swap(self, volume: Volume, old: Config, new: Config) -> Swap:
        try:
            async with asyncio.timeout(SWAP_TIMEOUT_S):
                return await swap_config(self._volumes, volume.name, volume.uid, old, new)
        except TimeoutError:
            return Unknown(f"no answer within {SWAP_TIMEOUT_S} s")
        except ApiError as error:
            return Unknown(str(error))

    async def _report(self, state: EngineState, token: int, volume: Volume, outcome: Swap) -> None:
        match outcome:
            case Swapped(answer):
                await self._answer(state, token, pb.ReportSwapRequest.SWAPPED, answer)
            case Lost(None):
                await self._engine.report_swap(token, pb.ReportSwapRequest.LOST, GONE)
            case Lost(answer):
                assert answer is not None
                await self._answer(state, token, pb.ReportSwapRequest.LOST, answer)
            case Refusal(answer, message):
                about = About("Volume", volume.name, volume.uid)
                self._notices.say(Said(about, "ConfigRefused", message, warning=True))
                await asyncio.sleep(REFUSAL_PAUSE_S)
                await self._answer(state, token, pb.ReportSwapRequest.LOST, answer)
            case Unknown():
                await self._engine.report_swap(token, pb.ReportSwapRequest.UNKNOWN, None)
                self.want_read(volume.name)

    async def _answer(
        self,
        state: EngineState,
        token: int,
        outcome: pb.ReportSwapRequest.Outcome,
        answer: Volume,
    ) -> None:
        async with self._locks[answer.name]:
            shown = state.shown.get(answer.name)
            view = answered_view(shown, answer)
            await self._engine.report_swap(token, outcome, view)
            if (
                shown is None
                or shown.volume.uid != answer.uid
                or version(shown.volume) < version(answer)
            ):
                state.shown[answer.name] = Shown(answer, view)

    async def _find(self, uuid: str) -> Volume | None:
        """The object of a UUID: from the watch, else from a consistent list.

        While the API server is away it tries on: a swap that was never sent has no outcome yet.
        The session's end cancels it.
        """
        failures = 0
        while True:
            found = self._world.volume_of(uuid)
            if found is not None:
                return found
            try:
                listed = await self._volumes.list()
                return next((volume for volume in listed if volume.spec.uuid == uuid), None)
            except ApiError as error:
                failures += 1
                log.warning("volume not found for now", volume=uuid, error=str(error))
                await asyncio.sleep(pause_s(failures, random.random()))  # noqa: S311

    # -------------------------------------------------------------- replicas

    async def replicas(self, name: str) -> float | None:
        """Make, report or delete this node's replica: one step, then look again."""
        volume, state = self._world.volumes.get(name), self._world.engine
        if volume is None or state is None or state.status is None or not self._due(volume):
            return None
        try:
            volume = await self._volumes.get(name)
        except NotFound:
            return None
        if volume.deletion_allowed or volume.status.config is not None:
            # What was made just before an agent's crash must be known before it is denied; and what
            # a replica has promised is read after the configuration that does not name it (M2).
            await self._refresh()
        held = self._world.held_as(volume)
        step = replicas.decide(volume, self._world.node, held, self._world.snapshots)
        match step:
            case replicas.Create(index, request):
                await self._create(volume, index, request)
            case replicas.Report(index, entry):
                await self._volumes.patch_status(name, replicas.patch(volume, index, entry))
            case replicas.Delete(replica, index, entry):
                assert volume.deletion_allowed or replicas.is_stray(volume, replica), name
                assert volume.spec.uuid is not None
                log.info("deleting replica", volume=name, replica=replica)
                await self._engine.delete_replica(volume.spec.uuid, replica)
                if entry is not None:
                    await self._volumes.patch_status(name, replicas.patch(volume, index, entry))
                await self._refresh()
            case replicas.Wait(reason):
                log.info("replica waits", volume=name, reason=reason)
            case None:
                pass
        return None

    def _due(self, volume: Volume) -> bool:
        held = self._world.held_as(volume)
        step = replicas.decide(volume, self._world.node, held, self._world.snapshots)
        return step is not None and not isinstance(step, replicas.Wait)

    async def _create(self, volume: Volume, index: int, request: pb.CreateReplicaRequest) -> None:
        try:
            made = await self._engine.create_replica(request)
        except (NoSpace, NotHere, Rejected) as error:
            log.warning("replica cannot be made", volume=volume.name, error=str(error))
            step = replicas.failure(volume, index, str(error))
            await self._volumes.patch_status(volume.name, replicas.patch(volume, index, step.entry))
            return
        log.info(
            "replica made", volume=volume.name, replica=made.replica, incomplete=made.incomplete
        )
        # Crash window: made and not reported. Asked again, the engine names the same replica.
        entry = replicas.created(
            volume.status.replicas[index], made.replica, incomplete=made.incomplete
        )
        await self._volumes.patch_status(volume.name, replicas.patch(volume, index, entry))
        await self._refresh()
