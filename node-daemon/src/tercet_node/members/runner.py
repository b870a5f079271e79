"""One node's machine at work: gives it messages and time, does what it says.

Owned by the event loop: a step is atomic, and nothing in it waits. Time is the loop's monotonic
clock; there is one timer, set for when the machine wants to be woken. Waking up is what a daemon
costs: so what is to be done now and then (connections, load, figures) is done when the node is
awake anyway, and has no timers of its own.

A step that fails has broken an invariant: the node ends, and with it its agent, which starts
afresh. Going on would be a node that answers, and whose timer is gone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from tercet_node.members.figures import Figures
from tercet_node.members.mesh import Mesh
from tercet_node.members.roster import Keys, host_port
from tercet_node.members.tls import Address, Contexts
from tercet_node.membership import (
    Busy,
    Changed,
    CommandError,
    Entry,
    Event,
    Introduce,
    Judged,
    Message,
    Nid,
    Node,
    NodeList,
    Reason,
    Received,
    Refused,
    Send,
    Settings,
    Suspected,
    Tick,
    VersionedMachine,
    newer,
)
from tercet_node.membership.node import Outcome

AFTER_CHANGE_S = 1.75
"""What is wrong is noticed within 2 s; the rest is for the message's way and a busy loop."""
HOUSE_EVERY_S = 2.0
"""Connections, load and figures are looked after this often, somewhat spread, so that not all nodes
of a cluster call at one time."""
HOUSE_LATE_S = 1.0
"""How long that waits for the node to be awake anyway."""
PROCESSORS = os.cpu_count() or 1
RUNNING = Settings(after_change_s=AFTER_CHANGE_S)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who is told of what happens. Called within a step: must not step."""

    changed: Callable[[], None] = lambda: None
    """The list, or who of it is alive."""
    unsealed: Callable[[], None] = lambda: None
    """An entry came whose signature does not hold: there may be another key by now."""


class Runner:
    """Drives one node."""

    def __init__(
        self,
        me: Entry,
        keys: Keys,
        contexts: Callable[[], Contexts | None],
        figures: Figures,
        known: NodeList | None = None,
        listeners: Listeners | None = None,
        settings: Settings = RUNNING,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.keys = keys
        self._figures = figures
        self._to = listeners or Listeners()
        machine = VersionedMachine(me, keys, known, settings, self._loop.time())
        self.node = Node(machine, self._loop.time(), first_nonce=secrets.randbits(48))
        self.mesh = Mesh(self, contexts, figures)
        self._timer: asyncio.TimerHandle | None = None
        self._house_s = self._loop.time() + HOUSE_EVERY_S
        self._end: asyncio.Future[None] = self._loop.create_future()
        """Only ever an error."""
        self._stopped = False

    @property
    def own(self) -> Entry:
        """The entry of this node."""
        return self.node.machine.own

    @property
    def members(self) -> NodeList:
        """The list as it is now."""
        return self.node.machine.list

    async def run(self) -> None:
        """Until cancelled. Raises what a step has raised."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.mesh.run(), name="members-mesh")
            self._show()
            self._arm()
            try:
                await self._end
            finally:
                # Before the others have ended: a message may come meanwhile.
                self._stopped = True
                self.mesh.close()
                if self._timer is not None:
                    self._timer.cancel()

    # ------------------------------------------------------------------ the step

    def step(self, event: Event) -> list[Outcome]:
        """Take an event and do what follows. Raises CommandError for commands only."""
        if self._stopped:
            return []
        now_s = self._loop.time()
        try:
            outcomes = self.node.step(event, now_s)
            for outcome in outcomes:
                self._do(outcome)
        except CommandError:
            raise
        except Exception as error:
            if not self._end.done():
                self._end.set_exception(error)
            raise
        if now_s >= self._house_s:
            self._keep_house(now_s)
        self._arm()
        return outcomes

    def take(self, peer: Nid, message: Message) -> None:
        """A message of a peer."""
        self.step(Received(peer, message))

    def _do(self, outcome: Outcome) -> None:
        match outcome:
            case Send(to, message, at):
                entry = self.members.get(to) if at is None else at
                if entry is not None and entry.present:
                    self.mesh.send(entry, message)
            case Changed():
                self._changed(outcome)
            case Refused(peer, reason, about):
                self._figures.refused.labels(reason.value).inc()
                log.warning("message refused", nid=peer, reason=reason.value, about=about)
                if reason is Reason.BAD_SIGNATURE:
                    self.mesh.charge(peer)
                    self._to.unsealed()
            case Judged(nid, alive):
                self._figures.verdicts.labels("alive" if alive else "dead").inc()
                log.warning("node judged", nid=nid, alive=alive)
                if not alive:
                    self.mesh.drop(nid)
                self._to.changed()
            case Suspected(nid, tries, cleared):
                if not cleared:
                    self._figures.suspicions.inc()
                log.info("node suspected", nid=nid, tries=tries, cleared=cleared)
                self._to.changed()

    def _changed(self, change: Changed) -> None:
        self._figures.changes.labels(change.cause.value).inc()
        before, after = change.before, change.after
        moved = before is not None and (
            after is None or not after.present or after.address != before.address
        )
        if moved or (before is not None and after is not None and before.node != after.node):
            self.mesh.drop(change.nid)
        log.info(
            "list changed",
            nid=change.nid,
            cause=change.cause.value,
            present=after is not None and after.present,
            address=None if after is None else after.address,
            size=len(self.members),
        )
        self._to.changed()

    # ------------------------------------------------------------------ who may connect

    def wanted(self) -> list[Entry]:
        """The living to whom this node passes news on."""
        living = self.node.detector.living
        nobody = Nid(living.highest() + 1) if living.present else Nid(0)
        found = [living.get(nid) for nid in living.targets(self.own.nid, nobody)]
        return [entry for entry in found if entry is not None]

    def admit(self, shown: Entry, addresses: frozenset[Address]) -> str | None:
        """Why who shows this entry and such a certificate is refused; None: come in."""
        known = self.members.get(shown.nid)
        if shown.nid == self.own.nid:
            return "own-nid"
        if known != shown and not self.keys.holds(shown):
            self._to.unsealed()
            return Reason.BAD_SIGNATURE.value
        news = known is None or newer(known, shown) != known
        if not shown.present or not (news or _same_node(known, shown)):
            return "gone"
        if not _is_at(shown.address, addresses):
            return "other-address"
        if news:
            # Verified already: it counts as if its authority had said it here.
            self._loop.call_soon(self._introduce, shown)
        return None

    def _introduce(self, shown: Entry) -> None:
        if not self.node.machine.locked:
            self.step(Introduce(shown))

    # ------------------------------------------------------------------ time

    def _arm(self) -> None:
        wake_s = min(self.node.wake_s, self._house_s + HOUSE_LATE_S)
        if self._timer is not None:
            if self._timer.when() == wake_s:
                return
            self._timer.cancel()  # a later one too: waking up for nothing costs more than a timer
            self._timer = None
        self._timer = self._loop.call_at(wake_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.step(Tick())

    def _keep_house(self, now_s: float) -> None:
        spread = random.uniform(0.75, 1.25)  # noqa: S311 - spreads load, no more
        self._house_s = now_s + HOUSE_EVERY_S * spread
        self.mesh.sweep()
        self._show()
        # A busy node's checks move away from it.
        self.step(Busy(min(1.0, os.getloadavg()[0] / PROCESSORS)))

    def _show(self) -> None:
        members, detector = self.members, self.node.detector
        dead = detector.dead.bit_count()
        suspected = len(detector.suspected)
        for state, count in (
            ("alive", len(members) - dead - suspected),
            ("suspected", suspected),
            ("dead", dead),
        ):
            self._figures.nodes.labels(state).set(count)
        self._figures.locked.set(self.node.machine.locked)


def _same_node(known: Entry | None, shown: Entry) -> bool:
    """Whether who shows an old entry is the node that has the newest one."""
    return known is not None and known.present and known.node == shown.node


def _is_at(address: str, addresses: frozenset[Address]) -> bool:
    try:
        return ipaddress.ip_address(host_port(address)[0]) in addresses
    except ValueError:
        return False
