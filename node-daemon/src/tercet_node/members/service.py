"""The agent's membership: when there is a node to run, and what the objects tell it.

The operator's word comes by two ways: entries in the status of the StorageNode objects, and the
register (keys, tombstones), which is read at the start, when an object has vanished, when a
signature did not hold, and every REGISTER_EVERY_S. Each entry that is newer than the list's is
given to the machine; so news spreads by whatever way is open, and the API server may be away.

The list is kept in a file, by which a node starts while the API server is away. A node that has
been removed, or given another index, ends its machine and waits for an entry of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from tercet_api.clients import ApiError
from tercet_api.objects import Enrolment, Register, StorageNode
from tercet_node.certificates import PAIR_FILE, Certificates, Credentials
from tercet_node.keyed import pause_s
from tercet_node.members import keep
from tercet_node.members.figures import Figures
from tercet_node.members.keep import Kept
from tercet_node.members.roster import Keys, Trust, entry_of
from tercet_node.members.runner import Listeners, Runner
from tercet_node.members.sight import Sight
from tercet_node.members.tls import Contexts, contexts
from tercet_node.membership import (
    CheckNow,
    CommandError,
    Entry,
    Introduce,
    Lock,
    MembershipError,
    Nid,
    NodeList,
    Unlock,
    newer,
)

SAVE_AFTER_S = 1.0
REGISTER_EVERY_S = 600.0
REGISTER_PAUSE_S = 5.0
"""Least time between two reads that a bad signature asks for."""
CHECK_S = 1.0
"""How long a check's answers are waited for."""

log = structlog.get_logger(__name__)


class NoMembers(MembershipError):
    """The node is not in a list: says what it waits for."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check that was asked for has done."""

    after: NodeList
    changed: int
    """Entries that are others than before it."""


class Membership:
    """One node's part in the cluster's list."""

    def __init__(
        self,
        node: str,
        folder: Path,
        certificates: Certificates,
        read_register: Callable[[], Awaitable[Register | None]],
        figures: Figures,
        changed: Callable[[], None],
    ) -> None:
        self._node = node
        self._folder = folder
        self._certificates = certificates
        self._read_register = read_register
        self._figures = figures
        self._changed = changed
        self._contexts: tuple[Credentials, Contexts] | None = None
        self._said: dict[str, Enrolment] = {}
        """By StorageNode's name: the newest enrolment that its object has shown."""
        self._register: Register | None = None
        self._kept: Kept | None = None
        self._refused: set[str] = set()
        """Signatures that did not hold with the present keys."""
        self._wake = asyncio.Event()
        self._read = asyncio.Event()
        self._unsaved = asyncio.Event()
        self.runner: Runner | None = None

    # ------------------------------------------------------------------ what the agent tells it

    def observe(self, nodes: Iterable[StorageNode], gone: bool = False) -> None:
        """These objects are new or may have changed; gone: some may have vanished."""
        for node in nodes:
            said = node.status.enrolment
            if said is not None and said != self._said.get(node.name):
                self._said[node.name] = said
                self._wake.set()
        if gone:
            self._read.set()

    # ------------------------------------------------------------------ what people ask

    def running(self) -> Runner:
        """The node at work. Raises NoMembers."""
        if self.runner is None:
            what = "the operator has not enrolled it yet"
            if self._said.get(self._node) is not None and self._register is None:
                what = "the membership's register has not been read yet"
            raise NoMembers(f"node {self._node} has no list of members: {what}")
        return self.runner

    def sight(self) -> Sight | None:
        """The list as it is now, while there is one."""
        return None if self.runner is None else Sight.of(self.runner.node)

    def lock(self) -> None:
        """No checks, no changes, until `unlock` or a restart of the agent. Raises NoMembers."""
        self.running().step(Lock())
        log.warning("membership locked")

    def unlock(self) -> None:
        """Go on, with a check at once. Raises NoMembers."""
        self.running().step(Unlock())
        self._wake.set()  # what the objects have said meanwhile
        log.info("membership unlocked")

    async def check(self) -> Checked:
        """Compare the whole list with both neighbours now. Raises NoMembers, CommandError."""
        runner = self.running()
        before = runner.members
        runner.step(CheckNow(full=True))
        await asyncio.sleep(CHECK_S)
        after = runner.members
        return Checked(after, len(before.differing(after)))

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        """Until cancelled."""
        await self._certificates.ready.wait()
        self._load()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._registers(), name="members-register")
            group.create_task(self._saves(), name="members-save")
            while True:
                found = self._identity()
                if found is None:
                    await self._wake.wait()
                    self._wake.clear()
                    continue
                await self._live(*found)

    def _load(self) -> None:
        try:
            self._kept = keep.load(self._folder)
        except (keep.Spoilt, OSError) as error:
            log.warning("list of members cannot be read", folder=self._folder, error=str(error))
        if self._kept is not None:
            log.info("list of members taken up", size=len(self._kept.members))

    def _identity(self) -> tuple[Entry, Keys, NodeList] | None:
        """Whose machine is to run, if any."""
        trust = self._trust()
        if trust is None:
            return None
        keys = Keys(trust)
        known = NodeList() if self._kept is None else self._kept.members
        me = None if self._kept is None else self._kept.me
        said = self._said.get(self._node)
        if said is not None:
            own = self._believed(said, keys)
            if own is not None and (me is None or own.incarnation > me.incarnation):
                me = own
        if me is None or not me.present:
            return None
        held = known.get(me.nid)
        if held is not None and held != me and newer(held, me) == held:
            return None  # somebody else's by now, or removed: wait for another entry
        return me, keys, known

    def _trust(self) -> Trust | None:
        if self._register is not None:
            return Trust.of(self._register)
        return None if self._kept is None else self._kept.trust

    def _believed(self, said: Enrolment, keys: Keys) -> Entry | None:
        """The entry, if the authority has signed it."""
        try:
            entry = entry_of(said)
        except ValueError as error:
            log.warning("enrolment cannot be read", nid=said.nid, error=str(error))
            return None
        if keys.holds(entry):
            return entry
        if said.signature not in self._refused:
            self._refused.add(said.signature)
            self._read.set()
            log.warning("enrolment is not signed by the operator", nid=said.nid)
        return None

    async def _live(self, me: Entry, keys: Keys, known: NodeList) -> None:
        """One machine, until this node is another or none."""
        listeners = Listeners(changed=self._on_change, unsealed=self._read.set)
        runner = Runner(me, keys, self._tls, self._figures, known, listeners)
        self.runner = runner
        log.info("member of the cluster", nid=me.nid, address=me.address, size=len(known) or 1)
        try:
            async with asyncio.TaskGroup() as group:
                running = group.create_task(runner.run(), name="members-runner")
                self._on_change()
                while self._still(runner, me):
                    self._wake.clear()
                    self._introduce(runner)
                    await self._wake.wait()
                running.cancel()
        finally:
            self.runner = None
            self._kept = Kept(me.nid, keys.trust, runner.members)
            # A node that was removed shall know it when it starts while the API server is away.
            self._unsaved.set()
        log.warning("no longer that member", nid=me.nid)
        self._changed()

    def _still(self, runner: Runner, me: Entry) -> bool:
        """Whether this machine is this node's."""
        own = runner.own
        if not own.present or own.node != me.node or own.address != me.address:
            return False
        said = self._said.get(self._node)
        if said is None or said.nid == own.nid:
            return True
        moved = self._believed(said, runner.keys)
        return moved is None or moved.incarnation <= own.incarnation

    def _introduce(self, runner: Runner) -> None:
        """Whatever the operator has said and the list does not have."""
        if self._register is not None:
            trust = Trust.of(self._register)
            if trust != runner.keys.trust:
                runner.keys.take(trust)
                self._unsaved.set()
        if runner.node.machine.locked:
            return
        gone = [] if self._register is None else self._register.gone
        for said in (*self._said.values(), *gone):
            held = runner.members.get(said.nid)
            if held is not None and held.incarnation >= said.incarnation:
                continue
            entry = self._believed(said, runner.keys)
            if entry is not None:
                with contextlib.suppress(CommandError):
                    runner.step(Introduce(entry))

    def _on_change(self) -> None:
        self._unsaved.set()
        self._wake.set()
        self._changed()

    def _tls(self) -> Contexts | None:
        """Contexts of the present certificate; of the last one whose file could be read."""
        now = self._certificates.current
        if now is not None and (self._contexts is None or self._contexts[0] is not now):
            try:
                self._contexts = (now, contexts(self._folder / PAIR_FILE, now.ca))
            except (OSError, ValueError) as error:
                log.warning("certificate cannot be read", folder=self._folder, error=str(error))
        return None if self._contexts is None else self._contexts[1]

    # ------------------------------------------------------------------ tasks

    async def _registers(self) -> None:
        failures = 0
        while True:
            self._read.clear()
            try:
                found = await self._read_register()
                failures = 0 if found is not None else failures + 1
                if found is not None and found != self._register:
                    Trust.of(found)
                    self._register = found
                    self._refused.clear()
                    self._wake.set()
            except (ApiError, ValueError) as error:
                failures += 1
                if failures == 1:
                    log.warning("register not read", error=str(error))
            jitter = random.random()  # noqa: S311
            if failures:
                await asyncio.sleep(pause_s(failures, jitter))
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REGISTER_EVERY_S * (0.5 + jitter / 2)):
                    await self._read.wait()
            await asyncio.sleep(REGISTER_PAUSE_S * jitter)

    async def _saves(self) -> None:
        while True:
            await self._unsaved.wait()
            await asyncio.sleep(SAVE_AFTER_S)
            self._unsaved.clear()
            runner, kept = self.runner, self._kept
            if runner is not None:
                kept = Kept(Nid(runner.own.nid), runner.keys.trust, runner.members)
            if kept is None:
                continue
            try:
                await asyncio.to_thread(keep.save, self._folder, kept)
            except OSError as error:
                log.warning("list of members not kept", folder=self._folder, error=str(error))
