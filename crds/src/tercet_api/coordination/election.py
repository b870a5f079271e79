"""Election: of several candidates at most one leads, by a Lease.

As client-go does it: the leader writes renewTime; a candidate takes over once it has seen no change
for the Lease's duration *on its own clock*, by a patch that names the resourceVersion it has seen,
so that one of several wins. A leader that cannot renew for RENEW_DEADLINE_S stops leading before
anyone else can start, because RENEW_DEADLINE_S < duration, both counted from the last renewal (the
leader from before it sent it). A leader that stops in order gives the Lease back at once.

What a former leader has sent may still arrive after its successor's first write: whatever a leader
writes must therefore be safe by itself (preconditions, compare-and-swap).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import structlog

from tercet_api.clients import ApiError, Conflict, NotFound, Objects, Unreachable
from tercet_api.coordination.lease import Lease, LeaseSpec, micro_time
from tercet_api.coordination.membership import Sighting, sight
from tercet_api.objects import Metadata

DURATION_S = 15
RENEW_DEADLINE_S = 10.0
RETRY_S = 1.0
GIVE_BACK_S = 5.0

log = structlog.get_logger(__name__)


class Election:
    """One candidate for one Lease."""

    def __init__(self, leases: Objects[Lease], name: str, identity: str) -> None:
        self._leases = leases
        self._name = name
        self._identity = identity
        self._seen: Sighting | None = None
        self._held: Lease | None = None
        self._renewed_s = 0.0
        """When the last renewal that took place was *sent*, on the monotonic clock."""

    @property
    def leading(self) -> bool:
        """Whether this candidate has the Lease, as far as it knows."""
        return self._held is not None

    @asynccontextmanager
    async def lead(self) -> AsyncIterator[asyncio.Event]:
        """Wait until elected; the event is set when leadership is lost. Gives it back at exit."""
        while not await self._elected():  # noqa: ASYNC110 - a Lease cannot be waited for
            await asyncio.sleep(RETRY_S * random.uniform(0.8, 1.2))  # noqa: S311
        lost = asyncio.Event()
        log.info("leading", lease=self._name, identity=self._identity)
        keeper = asyncio.create_task(self._keep(lost), name="election-keep")
        try:
            yield lost
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            await self._give_back()

    async def _elected(self) -> bool:
        self._renewed_s = time.monotonic()
        try:
            async with asyncio.timeout(RENEW_DEADLINE_S):
                await self._try()
        except TimeoutError:
            # It may have been written: the next read says so (holder: this candidate).
            log.warning("election: no answer in time", lease=self._name)
            self._held = None
        return self._held is not None

    async def _try(self) -> None:
        """Take the Lease if it is free, expired or ours."""
        try:
            lease = await self._leases.get(self._name)
        except NotFound:
            await self._create()
            return
        except ApiError as error:
            log.warning("election: cannot read the Lease", lease=self._name, error=str(error))
            return
        now_s = time.monotonic()
        self._seen = sight(self._seen, lease, now_s, datetime.now(UTC))
        holder = lease.spec.holder_identity
        if holder and holder != self._identity and not self._seen.expired(now_s):
            return
        transitions = (lease.spec.lease_transitions or 0) + (holder != self._identity)
        await self._write(lease, transitions)

    async def _create(self) -> None:
        lease = Lease(metadata=Metadata(name=self._name), spec=self._spec(0))
        try:
            self._held = await self._leases.create(lease)
        except ApiError as error:
            log.info("election: not created", lease=self._name, error=str(error))

    def _spec(self, transitions: int) -> LeaseSpec:
        now = micro_time(datetime.now(UTC))
        return LeaseSpec(
            holder_identity=self._identity,
            lease_duration_seconds=DURATION_S,
            acquire_time=now,
            renew_time=now,
            lease_transitions=transitions,
        )

    async def _write(self, seen: Lease, transitions: int) -> None:
        patch = {
            "metadata": {"resourceVersion": seen.metadata.resource_version},
            "spec": self._spec(transitions).to_json(),
        }
        try:
            self._held = await self._leases.patch(self._name, patch)
        except Conflict:
            log.info("election: another was first", lease=self._name)
        except ApiError as error:
            log.warning("election: cannot write the Lease", lease=self._name, error=str(error))

    async def _keep(self, lost: asyncio.Event) -> None:
        """Renew until a renewal is refused or RENEW_DEADLINE_S has passed since the last."""
        while True:
            await asyncio.sleep(RETRY_S)
            sent_s = time.monotonic()
            left_s = self._renewed_s + RENEW_DEADLINE_S - sent_s
            if await self._renew(left_s):
                self._renewed_s = sent_s
            elif self._held is None or time.monotonic() >= self._renewed_s + RENEW_DEADLINE_S:
                log.error("leadership lost", lease=self._name, identity=self._identity)
                self._held = None
                lost.set()
                return

    async def _renew(self, left_s: float) -> bool:
        """One renewal; `_held` becomes None when somebody else has the Lease."""
        assert self._held is not None
        patch = {
            "metadata": {"resourceVersion": self._held.metadata.resource_version},
            "spec": {"renewTime": micro_time(datetime.now(UTC))},
        }
        try:
            async with asyncio.timeout(max(left_s, 0.0)):
                self._held = await self._leases.patch(self._name, patch)
                return True
        except (Conflict, NotFound):
            return await self._reread()
        except (ApiError, TimeoutError) as error:
            log.warning("election: not renewed", lease=self._name, error=repr(error))
            return False

    async def _reread(self) -> bool:
        """After a conflict: a lost answer of our own, or another holder."""
        try:
            lease = await self._leases.get(self._name)
        except ApiError:
            return False
        self._held = lease if lease.spec.holder_identity == self._identity else None
        return False

    async def _give_back(self) -> None:
        """Let another lead at once, if the Lease is still ours."""
        held, self._held = self._held, None
        try:
            async with asyncio.timeout(GIVE_BACK_S):
                while held is not None:
                    held = await self._vacate(held)
        except (ApiError, TimeoutError) as error:
            log.info("election: not given back", lease=self._name, error=repr(error))

    async def _vacate(self, held: Lease) -> Lease | None:
        """Write that nobody leads. Returns the Lease when it is ours still: try again."""
        patch = {
            "metadata": {"resourceVersion": held.metadata.resource_version},
            "spec": {"holderIdentity": "", "leaseDurationSeconds": 1},
        }
        try:
            await self._leases.patch(self._name, patch)
        except (Conflict, Unreachable):
            # A renewal that was under way when we stopped took place, or nobody knows what did.
            lease = await self._leases.get(self._name)
            return lease if lease.spec.holder_identity == self._identity else None
        return None
