"""All connections of a node: who may connect, whom it calls, and how often it tries.

A node has connections with its neighbours on the ring and with those to whom it passes news on, and
for a while with whoever else it has spoken to; one that is idle is closed, and opened again at
need. Either side may open one, both sides send on it. Who calls says first whose it is (Hello);
whom a message is from is thereafter the connection's word.

Calls fail quickly and are tried again after a pause that grows and has jitter; what is to be sent
meanwhile is dropped, but for the first messages that wait for a call in progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from tercet_node.members.figures import Figures
from tercet_node.members.link import Link
from tercet_node.members.roster import host_port
from tercet_node.members.tls import Address, Contexts, NotANode, peer_addresses
from tercet_node.membership import Entry, Hello, Message, Nid, WireError

LINKS_MAX = 512
HANDSHAKES_MAX = 64
"""Connections accepted whose handshake is not done, and calls under way: each as many."""
HANDSHAKES_OF_ONE_MAX = 16
"""Of those accepted, from one address: who has no certificate and opens connections to say nothing
on them keeps no others out."""
HANDSHAKE_S = 3.0
CALL_S = 3.0
HELLO_S = 3.0
MESSAGE_S = 5.0
"""Within which a message that has begun must be whole."""
IDLE_S = 300.0
WAITING_MAX = 64
"""Messages that wait for one call in progress."""
PAUSE_S_MIN = 0.05
PAUSE_S_MAX = 2.0
LISTEN_AGAIN_S = 1.0
BACKLOG = 64

log = structlog.get_logger(__name__)


class Gate(Protocol):
    """What the mesh asks and tells its node."""

    @property
    def own(self) -> Entry:
        """The entry of this node."""

    def admit(self, shown: Entry, addresses: frozenset[Address]) -> str | None:
        """Why who shows this entry and such a certificate is refused; None: come in."""

    def take(self, peer: Nid, message: Message) -> None:
        """A message of a peer."""

    def wanted(self) -> list[Entry]:
        """To whom connections shall be there before they are needed."""


@dataclass(slots=True)
class _Peer:
    """One other node."""

    link: Link | None = None
    waiting: deque[Message] = field(default_factory=lambda: deque(maxlen=WAITING_MAX))
    calling: bool = False
    failures: int = 0
    not_before_s: float = 0.0


class Mesh:
    """The connections of one node."""

    def __init__(
        self, gate: Gate, contexts: Callable[[], Contexts | None], figures: Figures
    ) -> None:
        self._gate = gate
        self._contexts = contexts
        self._figures = figures
        self._clock = asyncio.get_running_loop().time
        self._peers: dict[Nid, _Peer] = {}
        self._links: set[Link] = set()
        self._group: asyncio.TaskGroup | None = None
        self._closed = False
        self._handshakes: Counter[str] = Counter()
        """Accepted, by the caller's address."""
        self._calls = 0
        self._counted: dict[tuple[str, type[Message]], Callable[[], None]] = {}
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Listen and keep the connections until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            self._group.create_task(self._listen(), name="members-listen")

    def close(self) -> None:
        """End all connections; nothing is sent any more."""
        self._closed = True
        for link in tuple(self._links):
            link.abort()

    # ------------------------------------------------------------------ sending

    def send(self, to: Entry, message: Message) -> None:
        """Send, or drop, and call whoever is not connected."""
        peer = self._peers.get(to.nid)
        if peer is None:
            peer = self._peers[to.nid] = _Peer()
        if peer.link is not None and peer.link.open:
            self._put(peer.link, message)
        elif peer.calling:
            peer.waiting.append(message)
        elif self._may_call(peer):
            peer.waiting.append(message)
            self._begin(to, peer)
        else:
            self._figures.dropped.inc()

    def drop(self, nid: Nid) -> None:
        """End all connections with that node."""
        peer = self._peers.pop(nid, None)
        if peer is not None and peer.link is not None:
            peer.link.abort()

    def charge(self, nid: Nid) -> None:
        """That node has sent a bad signature."""
        peer = self._peers.get(nid)
        if peer is not None and peer.link is not None:
            peer.link.charge()

    def _begin(self, to: Entry, peer: _Peer) -> None:
        assert self._group is not None
        peer.calling = True
        self._calls += 1
        self._group.create_task(self._call(to, peer), name=f"members-call-{to.nid}")

    def _may_call(self, peer: _Peer) -> bool:
        if self._group is None or self._closed or self._calls >= HANDSHAKES_MAX:
            return False
        return self._clock() >= peer.not_before_s and len(self._links) < LINKS_MAX

    def _put(self, link: Link, message: Message) -> None:
        size_bytes = link.send(message)
        if size_bytes == 0:
            self._figures.dropped.inc()
            return
        self._count("sent", message)
        self._figures.bytes.labels("sent").inc(size_bytes)

    def _count(self, direction: str, message: Message) -> None:
        key = (direction, type(message))
        found = self._counted.get(key)
        if found is None:
            kind = key[1].__name__.lower()
            found = self._counted[key] = self._figures.messages.labels(direction, kind).inc
        found()

    # ------------------------------------------------------------------ calling

    async def _call(self, to: Entry, peer: _Peer) -> None:
        try:
            await self._connect(to)
            peer.failures = 0
        except (OSError, TimeoutError, ssl.SSLError, ValueError, NotANode) as error:
            peer.failures += 1
            longest = min(PAUSE_S_MAX, PAUSE_S_MIN * 2.0 ** min(peer.failures - 1, 16))
            # The random number spreads load; nothing depends on who draws it.
            pause_s = longest * random.uniform(0.5, 1.0)  # noqa: S311
            peer.not_before_s = self._clock() + pause_s
            self._figures.calls_failed.inc()
            if peer.failures == 1:
                log.info("peer cannot be called", nid=to.nid, address=to.address, error=str(error))
        finally:
            self._calls -= 1
            peer.calling = False
        waiting, peer.waiting = tuple(peer.waiting), deque(maxlen=WAITING_MAX)
        for message in waiting:
            if peer.link is not None and peer.link.open:
                self._put(peer.link, message)
            else:
                self._figures.dropped.inc()

    async def _connect(self, to: Entry) -> None:
        contexts = self._contexts()
        if contexts is None:
            raise TimeoutError("no certificate yet")
        host, port = host_port(to.address)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CALL_S):
            await loop.create_connection(
                lambda: Link(self, self._clock, to.nid),
                host,
                port,
                ssl=contexts.client,
                server_hostname=host,
                ssl_handshake_timeout=CALL_S,
                ssl_shutdown_timeout=1.0,
            )

    # ------------------------------------------------------------------ being called

    async def _listen(self) -> None:
        assert self._group is not None
        while True:
            try:
                found = self._bound()
            except (OSError, ValueError) as error:
                address = self._gate.own.address
                log.warning("cannot listen yet", address=address, error=str(error))
                await asyncio.sleep(LISTEN_AGAIN_S)
                continue
            self.listening.set()
            with found:
                await self._accept(found)

    def _bound(self) -> socket.socket:
        host, port = host_port(self._gate.own.address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        found = socket.create_server((host, port), family=family, backlog=BACKLOG)
        found.setblocking(False)
        return found

    async def _accept(self, server: socket.socket) -> None:
        assert self._group is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, (host, *_) = await loop.sock_accept(server)
            except OSError as error:  # of one connection, or of too many files
                log.warning("connection not accepted", error=str(error))
                await asyncio.sleep(PAUSE_S_MIN)
                continue
            contexts = self._contexts()
            if self._is_full(host) or contexts is None:
                self._figures.refused.labels("too-many").inc()
                accepted.close()
                continue
            self._handshakes[host] += 1
            self._group.create_task(self._shake(accepted, host, contexts), name="members-handshake")

    def _is_full(self, host: str) -> bool:
        if len(self._links) >= LINKS_MAX or self._handshakes.total() >= HANDSHAKES_MAX:
            return True
        return self._handshakes[host] >= HANDSHAKES_OF_ONE_MAX

    async def _shake(self, accepted: socket.socket, host: str, contexts: Contexts) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Link(self, self._clock),
                accepted,
                ssl=contexts.server,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=1.0,
            )
        except (OSError, TimeoutError, ssl.SSLError) as error:
            self._figures.refused.labels("handshake").inc()
            log.info("handshake failed", error=str(error))
            accepted.close()
        finally:
            self._handshakes[host] -= 1
            if not self._handshakes[host]:
                del self._handshakes[host]

    # ------------------------------------------------------------------ what links say

    def opened(self, link: Link) -> None:
        """A handshake is done."""
        self._links.add(link)
        if self._closed:
            link.abort()
            return
        self._figures.connections.set(len(self._links))
        if link.peer is not None:
            self._put(link, Hello(self._gate.own))
            self._attach(link.peer, link)

    def received(self, link: Link, message: Message, size_bytes: int) -> None:
        """A well-formed message."""
        self._count("received", message)
        self._figures.bytes.labels("received").inc(size_bytes)
        if link.peer is not None:
            self._gate.take(link.peer, message)
        elif isinstance(message, Hello):
            self._hello(link, message.entry)
        else:
            self._refuse(link, "no-hello")

    def garbled(self, link: Link, error: WireError) -> None:
        """Bytes that are no message."""
        self._figures.refused.labels("garbled").inc()
        log.warning("no message, connection closed", nid=link.peer, error=str(error))

    def closed(self, link: Link) -> None:
        """A connection is gone."""
        self._links.discard(link)
        self._figures.connections.set(len(self._links))
        peer = None if link.peer is None else self._peers.get(link.peer)
        if peer is not None and peer.link is link:
            peer.link = None

    def _hello(self, link: Link, shown: Entry) -> None:
        assert link.transport is not None
        try:
            reason = self._gate.admit(shown, peer_addresses(link.transport))
        except NotANode as error:
            log.warning("connection refused", error=str(error))
            reason = "no-node"
        if reason is not None:
            self._refuse(link, reason, shown.nid)
            return
        link.peer = shown.nid
        self._attach(shown.nid, link)

    def _refuse(self, link: Link, reason: str, nid: Nid | None = None) -> None:
        self._figures.refused.labels(reason).inc()
        log.warning("connection refused", reason=reason, nid=nid)
        link.abort()

    def _attach(self, nid: Nid, link: Link) -> None:
        """One more connection with that node; of two one stays, the same one for both sides.

        That is the newer of those that the lower nid has opened, if it has opened any.
        """
        peer = self._peers.setdefault(nid, _Peer())
        peer.failures, peer.not_before_s = 0, 0.0
        there = peer.link if peer.link is not None and peer.link.open else None
        lower_calls = self._gate.own.nid < nid
        if there is not None and there.called == lower_calls != link.called:
            link.close()
            return
        peer.link = link
        if there is not None:
            there.close()

    # ------------------------------------------------------------------ keeping house

    def _prepare(self) -> None:
        """Call whom there shall be a connection with: a handshake costs when news is to go out."""
        for to in self._gate.wanted():
            peer = self._peers.setdefault(to.nid, _Peer())
            if not (peer.link or peer.calling) and self._may_call(peer):
                self._begin(to, peer)

    def sweep(self) -> None:
        """Call whom there shall be a connection with; end those that are slow or idle."""
        self._prepare()
        now_s = self._clock()
        for link in tuple(self._links):
            mute = link.peer is None and now_s - link.last_s > HELLO_S
            stuck = link.begun_s is not None and now_s - link.begun_s > MESSAGE_S
            if mute or stuck:
                self._refuse(link, "too-slow", link.peer)
            elif now_s - link.last_s > IDLE_S:
                with contextlib.suppress(OSError):
                    link.abort()
