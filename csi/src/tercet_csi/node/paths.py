"""Keeps the paths of what is staged here at the members that the volume has now.

A volume's members change while it is attached (a replica is rebuilt on another node, M1), and the
publish context says only who they were when the volume was published. Who they are now is asked of
the members themselves, by the discovery service of NVMe/TCP (`discovery`), one connection to each
endpoint: they tell each change at once, the kernel's host and tercet-attach are served alike, and
the node service still needs neither the API server nor rights there.

Whom to believe: the member that this host's path has as optimized serves the volume, so its own
configuration is the newest; while none is, whatever any member of now names is taken in addition,
and nothing is dropped (a member that was away names who were members then). A newcomer is connected
once its own discovery service answers: the kernel's connect waits minutes for a dead address.

Nothing is remembered: records say what is staged, the attacher which paths there are, so that a
service that starts anew goes on. What it takes to change a path is left to the attacher.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import structlog

from tercet_csi.errors import Aborted, CsiError
from tercet_csi.locks import ObjectLocks
from tercet_csi.node import targets
from tercet_csi.node.attach import Attacher
from tercet_csi.node.discovery import Discovery, Endpoint, Identity, Log
from tercet_csi.node.records import Records, Staged
from tercet_csi.node.targets import Paths, Target

LOOK_AGAIN_S = 1.0
"""While a volume's paths are not yet what its serving member says; else only changes are."""
ASK_TIMEOUT_S = 1.0
"""For a member's word before a volume is attached: a dead one costs no more."""
RETRY_MIN_S = 0.2
RETRY_MAX_S = 5.0

log = structlog.get_logger("paths")


@dataclass(frozen=True)
class Wanted:
    """What a volume's paths shall be, and whether that is the last word."""

    endpoints: frozenset[Endpoint]
    settled: bool


def decide(nqn: str, paths: Paths, logs: Mapping[Endpoint, Log]) -> Wanted:
    """Of the paths of a volume and the logs of the endpoints that answer now."""
    serving = logs.get(paths.optimized, {}).get(nqn) if paths.optimized else None
    if serving is not None:
        named = serving
        kept = paths.endpoints & named
    else:
        named = frozenset().union(*(logs.get(e, {}).get(nqn, ()) for e in paths.endpoints))
        kept = paths.endpoints
    wanted = kept | {endpoint for endpoint in named if endpoint in logs}
    if not wanted:  # a member that names none of those that are reached: better what there is
        return Wanted(paths.endpoints, settled=False)
    return Wanted(wanted, settled=serving is not None and wanted == named)


def heard(nqn: str, paths: Paths, logs: Mapping[Endpoint, Log]) -> frozenset[Endpoint]:
    """Whose discovery service concerns a volume: its paths', and those whom these name."""
    named = (logs.get(endpoint, {}).get(nqn, frozenset()) for endpoint in paths.endpoints)
    return paths.endpoints.union(*named)


async def current(target: Target) -> Target:
    """The target, and with it whoever the members that it names name now: each is asked once.

    A publish context is as old as its VolumeAttachment; of those in it perhaps none serves today.
    """
    identity = Identity(target.host_nqn, target.host_id)
    known = [targets.endpoint(*each) for each in target.endpoints]
    logs = await asyncio.gather(*(_ask(identity, each) for each in known))
    named = frozenset[Endpoint]().union(*(each.get(target.nqn, ()) for each in logs))
    return replace(target, endpoints=(*known, *sorted(named.difference(known))))


async def _ask(identity: Identity, member: Endpoint) -> Log:
    """What its discovery service says, or nothing within a second."""
    said: list[Log] = []
    heard = asyncio.Event()

    def told(found: Log) -> None:
        said.append(found)
        heard.set()

    ends = asyncio.ensure_future(Discovery(identity, told).follow(member))
    hears = asyncio.ensure_future(heard.wait())
    try:
        await asyncio.wait(
            (ends, hears), timeout=ASK_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        for task in (ends, hears):
            task.cancel()
        await asyncio.gather(ends, hears, return_exceptions=True)
    return said[0] if said else {}


class PathFollower:
    """The executor: one task for each endpoint's discovery, one that changes paths."""

    def __init__(
        self, identity: Identity, attacher: Attacher, records: Records, locks: ObjectLocks
    ) -> None:
        self._identity = identity
        self._attacher = attacher
        self._records = records
        self._locks = locks
        self._logs: dict[Endpoint, Log] = {}
        self._followers: dict[Endpoint, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Something was staged or unstaged."""
        self._changed.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                self._changed.clear()
                settled = await self._look()
                try:
                    async with asyncio.timeout(None if settled else LOOK_AGAIN_S):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            self._follow(())

    async def _look(self) -> bool:
        """Look at every staged volume; true when all have the paths that they shall have."""
        staged = self._records.all()
        if not staged:
            self._follow(())
            return True
        try:
            paths = await self._attacher.paths()
        except CsiError as error:
            log.warning("the attacher does not say its paths", error=str(error))
            return False
        settled = True
        wanted: set[Endpoint] = set()
        for record in staged:
            if (found := paths.get(record.nqn)) is not None and found.endpoints:
                settled &= await self._settle(record, found)
                wanted |= heard(record.nqn, found, self._logs)
        self._follow(wanted)
        return settled

    async def _settle(self, record: Staged, paths: Paths) -> bool:
        want = decide(record.nqn, paths, self._logs)
        if want.endpoints == paths.endpoints:
            return want.settled
        added = sorted(want.endpoints - paths.endpoints)
        dropped = sorted(paths.endpoints - want.endpoints)
        identity = self._identity
        endpoints = tuple(sorted(want.endpoints))
        target = Target(record.nqn, identity.host_nqn, identity.host_id, endpoints)
        try:
            with self._locks.hold(record.volume):
                # A call may have unstaged it since the attacher was asked.
                if self._records.get(record.volume) is None:
                    return True
                await self._attacher.set_paths(target)
        except Aborted:
            return False
        except CsiError as error:
            log.warning("paths are not changed", volume=record.volume, error=str(error))
            return False
        log.info("paths changed", volume=record.volume, added=added, dropped=dropped)
        return False  # looked at again: what was asked for is not what is, before it is seen

    def _follow(self, endpoints: Collection[Endpoint]) -> None:
        """Have one discovery connection to each of these, and no other."""
        for endpoint in set(self._followers) - set(endpoints):
            self._followers.pop(endpoint).cancel()
            self._logs.pop(endpoint, None)
        for endpoint in set(endpoints) - set(self._followers):
            self._followers[endpoint] = asyncio.create_task(self._hear(endpoint))

    async def _hear(self, endpoint: Endpoint) -> None:
        """Connect again whenever the connection ends, with growing pauses."""
        pause_s = RETRY_MIN_S

        def told(found: Log) -> None:
            nonlocal pause_s
            pause_s = RETRY_MIN_S
            if self._logs.get(endpoint) != found:
                self._logs[endpoint] = found
                self._changed.set()

        while True:
            try:
                await Discovery(self._identity, told).follow(endpoint)
            except (CsiError, OSError, EOFError, TimeoutError) as error:
                log.debug("no discovery", endpoint=endpoint, error=repr(error))
            # What it said last may be old by now, and it is not reached.
            if self._logs.pop(endpoint, None) is not None:
                self._changed.set()
            await asyncio.sleep(pause_s * random.uniform(0.75, 1.25))  # noqa: S311
            pause_s = min(RETRY_MAX_S, pause_s * 2)
