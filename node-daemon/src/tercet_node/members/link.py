"""One connection: bytes to messages and back, with limits.

Messages may be lost: what cannot be sent at once is dropped, and the machines live with it. Bytes
that are no message close the connection. A peer that sends faster than MESSAGES_PER_S is read more
slowly, which TCP passes on to it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from tercet_node.membership import Message, Nid, WireError, decode_message, encode_message
from tercet_node.membership.messages import HEADER_BYTES, body_bytes

MESSAGES_PER_S = 2000.0
BURST_MESSAGES = 4000.0
WRITE_BYTES_MAX = 256 * 1024
"""Of what the peer has not taken yet; a list of NODES_MAX entries goes part by part."""
FORGERY_MESSAGES = 20.0
"""What a bad signature counts as: verifying is the dearest thing that a message can ask for, and a
member that has gone bad could ask for ten in each. An honest one whose whole list is signed with a
key that is not known here yet is not slowed down by it, up to two hundred entries."""
USER_TIMEOUT_MS = 5000
"""What a peer does not acknowledge for this long ends the connection."""


class Owner(Protocol):
    """Who has links: the mesh."""

    def opened(self, link: Link) -> None:
        """The connection is up, both certificates are verified."""

    def received(self, link: Link, message: Message, size_bytes: int) -> None:
        """A well-formed message."""

    def garbled(self, link: Link, error: WireError) -> None:
        """No message: the connection is being closed."""

    def closed(self, link: Link) -> None:
        """It is gone."""


class Link(asyncio.Protocol):
    """One connection. `peer` is None until it is known who is there."""

    def __init__(self, owner: Owner, clock: Callable[[], float], peer: Nid | None = None) -> None:
        self._owner = owner
        self._clock = clock
        self.peer = peer
        self.called = peer is not None
        """Whether this side has opened it."""
        self.transport: asyncio.Transport | None = None
        self.last_s = clock()
        """When the last whole message came or went."""
        self.begun_s: float | None = None
        """Since when part of a message is here."""
        self._buffer = bytearray()
        self._allowance = BURST_MESSAGES
        self._refilled_s = self.last_s
        self._resume: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------ asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is done."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.last_s = self._clock()
        found = transport.get_extra_info("socket")
        if found is not None:
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        self._owner.opened(self)

    def data_received(self, data: bytes) -> None:
        """Some bytes."""
        self._buffer += data
        self._parse()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        del exc
        if self._resume is not None:
            self._resume.cancel()
        self.transport = None
        self._owner.closed(self)

    # ------------------------------------------------------------------ ours

    @property
    def open(self) -> bool:
        """Whether something can be sent."""
        return self.transport is not None and not self.transport.is_closing()

    def send(self, message: Message) -> int:
        """Send it; how many bytes, 0: dropped."""
        if self.transport is None or self.transport.is_closing():
            return 0
        if self.transport.get_write_buffer_size() > WRITE_BYTES_MAX:
            return 0
        raw = encode_message(message)
        self.transport.write(raw)
        self.last_s = self._clock()
        return len(raw)

    def charge(self) -> None:
        """It has brought a bad signature: it is read the more slowly."""
        self._allowance -= FORGERY_MESSAGES

    def close(self) -> None:
        """End it when all is sent."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """End it at once."""
        self._buffer.clear()
        if self.transport is not None:
            self.transport.abort()

    def _parse(self) -> None:
        now_s = self._clock()
        grown = self._allowance + (now_s - self._refilled_s) * MESSAGES_PER_S
        self._allowance, self._refilled_s = min(grown, BURST_MESSAGES), now_s
        try:
            while len(self._buffer) >= HEADER_BYTES:
                size = HEADER_BYTES + body_bytes(bytes(self._buffer[:HEADER_BYTES]))
                if len(self._buffer) < size:
                    break
                if self._allowance < 1.0:
                    self._slow_down()
                    return
                message = decode_message(bytes(self._buffer[:size]))
                del self._buffer[:size]
                self.begun_s = None
                self._allowance -= 1.0
                self.last_s = now_s
                self._owner.received(self, message, size)
        except WireError as error:
            self._owner.garbled(self, error)
            self.abort()
        if self._buffer and self.begun_s is None:
            self.begun_s = now_s

    def _slow_down(self) -> None:
        if self.transport is None or self._resume is not None:
            return
        self.transport.pause_reading()
        # Until it may say something again: each look in vain would let more of it in here.
        pause_s = max(BURST_MESSAGES / 8, 1.0 - self._allowance) / MESSAGES_PER_S
        self._resume = asyncio.get_running_loop().call_later(pause_s, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
            self._parse()
