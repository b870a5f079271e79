"""The agent's session with its engine: from the socket's connection to its end, again and again.

Each start of either side begins a session: Configure, then the stream of events and a Status at
each change (and every two seconds, which is what says that the engine is alive). What the engine
asks for is done by tasks of the session, so that its end ends them: an answer must not reach the
next instance of the engine.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import structlog

from tercet_node import configure, rates
from tercet_node.engine import Engine
from tercet_node.errors import EngineAway, EngineError, NoSpace, OutcomeUnknown, Rejected
from tercet_node.keyed import pause_s
from tercet_node.protos import engine_pb2 as pb
from tercet_node.world import EngineState, World

STATUS_EVERY_S = 2.0
STATUS_PAUSE_S = 0.02
"""Changes that come within this time are one Status call."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who is told of what happens in a session."""

    swap: Callable[[EngineState, pb.SwapRequested], Coroutine[None, None, None]]
    read: Callable[[str], Coroutine[None, None, None]]
    notice: Callable[[pb.Notice], None]
    fenced: Callable[[EngineState, pb.Fenced], None]
    begun: Callable[[EngineState], None]
    status: Callable[[pb.StatusResponse | None, pb.StatusResponse], None]
    """The one before and the new one."""
    refused: Callable[[str | None], None]
    """The engine does not take its configuration, because (None: it does)."""


class Session:
    """Keeps the engine configured and listened to. Owns `world.engine`."""

    def __init__(self, engine: Engine, world: World, listeners: Listeners) -> None:
        self._engine = engine
        self._world = world
        self._to = listeners
        self._cluster_id = ""
        self._changed = asyncio.Event()
        self._nodes_changed = asyncio.Event()
        self._standings_changed = asyncio.Event()
        self.answered_s = float("-inf")
        """When the engine answered last, on the loop's clock."""

    def nodes_changed(self) -> None:
        """A StorageNode is new, changed or gone."""
        self._nodes_changed.set()

    def standings_changed(self) -> None:
        """The membership holds something else of somebody."""
        self._standings_changed.set()

    async def refresh(self) -> pb.StatusResponse:
        """Ask the engine for its Status now. Raises EngineError."""
        status = await self._engine.status()
        self.answered_s = asyncio.get_running_loop().time()
        state = self._world.engine
        if state is None or state.instance != status.instance:
            raise EngineAway("Status: another instance answers than the one configured")
        before = state.status
        state.status = status
        state.told = {replica.volume: replica for replica in status.replicas}
        state.rates = rates.follow_all(state.rates, status, self.answered_s)
        self._to.status(before, status)
        return status

    async def run(self, cluster_id: str) -> None:
        """Hold sessions until cancelled."""
        self._cluster_id = cluster_id
        failures = 0
        while True:
            await self._engine.wait_ready()
            began_s = asyncio.get_running_loop().time()
            try:
                await self._once()
            except* EngineError as errors:
                error: BaseException = errors
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                log.warning("engine session ended", error=str(error))
                if isinstance(error, Rejected | NoSpace):
                    self._to.refused(str(error))
            finally:
                self._world.engine = None
            lasted_s = asyncio.get_running_loop().time() - began_s
            failures = 1 if lasted_s > STATUS_EVERY_S else failures + 1
            await asyncio.sleep(pause_s(failures, random.random()))  # noqa: S311

    async def _request(self) -> pb.ConfigureRequest:
        """What the engine shall be told; waits for this node's object to exist."""
        while True:
            self._nodes_changed.clear()
            own = self._world.own
            if own is not None and own.spec.devices:
                world = self._world
                return configure.request(
                    own, world.nodes.values(), self._cluster_id, world.membership
                )
            log.info("waiting for the StorageNode object with devices", node=self._world.node)
            await self._nodes_changed.wait()

    async def _once(self) -> None:
        await self._world.nodes_known.wait()
        request = await self._request()
        instance = await self._engine.configure(request)
        self._to.refused(None)
        state = EngineState(instance)
        self._world.engine = state
        log.info("engine configured", instance=instance, peers=len(request.peers))
        self._to.begun(state)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._events(state, group), name="events")
            group.create_task(self._statuses(), name="statuses")
            group.create_task(self._reconfigure(request), name="reconfigure")
            group.create_task(self._hint(), name="hint")

    async def _events(self, state: EngineState, group: asyncio.TaskGroup) -> None:
        async for event in self._engine.events():
            match event.WhichOneof("event"):
                case "swap":
                    group.create_task(self._swap(state, event.swap))
                case "read":
                    group.create_task(self._to.read(event.read.volume))
                case "notice":
                    self._to.notice(event.notice)
                case "fenced":
                    self._to.fenced(state, event.fenced)
                case "changed":
                    self._changed.set()
                case other:
                    log.warning("unknown event of the engine", event=other)

    async def _swap(self, state: EngineState, event: pb.SwapRequested) -> None:
        try:
            await self._to.swap(state, event)
        except OutcomeUnknown as error:
            # The engine asks again for what it has not heard the answer of.
            log.warning("swap's report not taken", volume=event.volume, error=str(error))
        except Rejected as error:
            log.warning("swap's report refused", volume=event.volume, error=str(error))

    async def _statuses(self) -> None:
        while True:
            self._changed.clear()
            await self.refresh()
            try:
                async with asyncio.timeout(STATUS_EVERY_S):
                    await self._changed.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(STATUS_PAUSE_S)

    async def _hint(self) -> None:
        """Tell the engine what the membership holds of its peers."""
        told: dict[str, str] = {}
        while True:
            self._standings_changed.clear()
            sight, names = self._world.membership, self._world.nodes
            standings = {} if sight is None else sight.standings(names.values())
            if standings != told:
                try:
                    await self._engine.observe_peers(standings)
                except Rejected as error:
                    # An engine of an older version, until it is updated as well: it needs no hint.
                    log.info("the engine takes no hints", error=str(error))
                    return
                told = standings
            await self._standings_changed.wait()
            await asyncio.sleep(STATUS_PAUSE_S)

    async def _reconfigure(self, told: pb.ConfigureRequest) -> None:
        while True:
            await self._nodes_changed.wait()
            request = await self._request()
            if request == told:
                continue
            try:
                await self._engine.configure(request)
                self._to.refused(None)
            except Rejected as error:
                # It goes on as it was; the object says what the engine will not do.
                log.warning("change of configuration refused", error=str(error))
                self._to.refused(str(error))
            told = request
