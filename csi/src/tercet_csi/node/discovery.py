"""Discovery over NVMe/TCP: which members a volume has, asked of any of them, told when it changes.

A host of the discovery subsystem (NVMe Base 2.0, 3.1.3.3; TCP Transport 1.0, 3.6): it connects an
admin queue, reads the log (page 70h), and is told by an asynchronous event when to read it again.
Only what that takes is here: no digests, no I/O queue, data comes from the controller alone. One
connection serves all volumes of an endpoint. What is made of the answers is left to `paths`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import struct
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from tercet_csi.errors import Unavailable

Endpoint = tuple[str, int]
Log = Mapping[str, frozenset[Endpoint]]
"""Of each subsystem's NQN the endpoints."""

DISCOVERY_NQN = "nqn.2014-08.org.nvmexpress.discovery"
KEEP_ALIVE_S = 10.0
SETUP_TIMEOUT_S = 3.0
READ_BYTES_MAX = 64 << 10
READ_PAUSE_S = 0.1
"""Between an event and the next reading: a node whose volumes all change tells each of them."""
READS_MAX = 8
"""A log that changes while it is read is read again so often."""
RECORDS_MAX = 16_384

_IC_BYTES, _HEADER_BYTES, _COMMAND_BYTES, _RECORD_BYTES = 128, 24, 72, 1024
_IC_REQ, _IC_RESP, _COMMAND, _RESPONSE, _DATA = 0x00, 0x01, 0x04, 0x05, 0x07
_SUCCESS = 1 << 3
_FABRICS, _GET_LOG, _EVENT, _KEEP_ALIVE = 0x7F, 0x02, 0x0C, 0x18
_CONNECT, _PROPERTY_SET, _PROPERTY_GET = 0x01, 0x00, 0x04
_CC, _CSTS = 0x14, 0x1C
_DISCOVERY_PAGE = 0x70
_RETAIN_EVENT = 1 << 15
_TCP = 3


class DiscoveryError(Unavailable):
    """An endpoint's discovery subsystem does not answer as the specification has it."""


@dataclass(frozen=True)
class Identity:
    """Who asks; the log has only what that host may use."""

    host_nqn: str
    host_id: str


@dataclass
class _Pending:
    """A command under way."""

    done: asyncio.Future[int]
    data: bytearray = field(default_factory=bytearray)


def entry(opcode: int, command: int, *, kind: int = 0, dwords: Mapping[int, int]) -> bytes:
    """A submission queue entry whose data, if any, the transport moves; `kind`: of Fabrics."""
    out = bytearray(64)
    struct.pack_into("<BBHB", out, 0, opcode, 0x40, command, kind)
    out[39] = 0x5A  # SGL: transport data block
    for number, value in dwords.items():
        struct.pack_into("<I", out, number * 4, value)
    return bytes(out)


def connect_capsule(identity: Identity, command: int) -> bytes:
    """Connect of the admin queue: 32 entries, dynamic controller, its data in the capsule."""
    kato_ms = round(KEEP_ALIVE_S * 1000)
    made = bytearray(entry(_FABRICS, command, kind=_CONNECT, dwords={11: 31, 12: kato_ms}))
    struct.pack_into("<I", made, 32, _RECORD_BYTES)
    made[39] = 0x01  # SGL: offset within the capsule
    data = bytearray(_RECORD_BYTES)
    data[:16] = uuid.UUID(identity.host_id).bytes
    struct.pack_into("<H", data, 16, 0xFFFF)
    for offset, name in ((256, DISCOVERY_NQN), (512, identity.host_nqn)):
        data[offset : offset + len(name)] = name.encode()
    return capsule(bytes(made), bytes(data))


def capsule(made: bytes, data: bytes = b"") -> bytes:
    """A command capsule."""
    size = _COMMAND_BYTES + len(data)
    offset = _COMMAND_BYTES if data else 0
    return struct.pack("<BBBBI", _COMMAND, 0, _COMMAND_BYTES, offset, size) + made + data


def parse_log(log: bytes) -> Log:
    """The records over TCP; others, and what cannot be an address, are passed over."""
    (count,) = struct.unpack_from("<Q", log, 8)
    found: dict[str, set[Endpoint]] = {}
    for number in range(1, count + 1):
        record = log[number * _RECORD_BYTES : (number + 1) * _RECORD_BYTES]
        if len(record) < _RECORD_BYTES or record[0] != _TCP:
            continue
        texts = [_text(record[a:b]) for a, b in ((256, 512), (512, 768), (32, 64))]
        with suppress(ValueError):
            address = str(ipaddress.ip_address(texts[1]))
            found.setdefault(texts[0], set()).add((address, int(texts[2])))
    return {nqn: frozenset(endpoints) for nqn, endpoints in found.items()}


def _text(raw: bytes) -> str:
    return raw.rstrip(b" \0").decode("ascii", "replace")


class Discovery:
    """One association with an endpoint's discovery subsystem. `follow` is its life."""

    def __init__(self, identity: Identity, told: Callable[[Log], None]) -> None:
        self._identity = identity
        self._told = told
        self._pending: dict[int, _Pending] = {}
        self._numbers = itertools.count(1)
        self._writer: asyncio.StreamWriter

    async def follow(self, endpoint: Endpoint) -> None:
        """Tell the log now and after each change, until the association ends.

        Raises DiscoveryError, OSError, EOFError or TimeoutError: each is an end.
        """
        async with asyncio.timeout(SETUP_TIMEOUT_S):
            reader, self._writer = await asyncio.open_connection(*endpoint)
        try:
            async with asyncio.timeout(SETUP_TIMEOUT_S):
                self._writer.write(struct.pack("<BBBBI", _IC_REQ, 0, 128, 0, 128) + bytes(120))
                answer = await reader.readexactly(_IC_BYTES)
            if answer[0] != _IC_RESP:
                raise DiscoveryError(f"{endpoint}: no ICResp but PDU {answer[0]:#x}")
            await self._run(reader)
        finally:
            self._writer.close()
            for pending in self._pending.values():
                pending.done.cancel()

    async def _run(self, reader: asyncio.StreamReader) -> None:
        """The first of the three to end takes the others with it."""
        parts = [self._receive(reader), self._keep_alive(), self._tell()]
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in ended:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self) -> None:
        """Set up, then: ask for the next event, read, tell, wait for it.

        In this order no change falls between: what comes while the log is read ends the wait.
        """
        number = self._number()
        await self._command(number, connect_capsule(self._identity, number))
        await self._fabrics(_PROPERTY_SET, {11: _CC, 12: 1})
        if not (await self._fabrics(_PROPERTY_GET, {11: _CSTS}))[0] & 1:
            raise DiscoveryError("the controller is not ready when it is enabled")
        while True:
            event = asyncio.ensure_future(self._ask(_EVENT, {}, timeout_s=None))
            try:
                self._told(await self._read())
                await event
            finally:
                event.cancel()
            await asyncio.sleep(READ_PAUSE_S)

    async def _read(self) -> Log:
        for _ in range(READS_MAX):
            head, _ = await self._page(0, _RECORD_BYTES)
            generation, count = struct.unpack_from("<QQ", head)
            if count > RECORDS_MAX:
                raise DiscoveryError(f"a log of {count} records; {RECORDS_MAX} are the most")
            log = bytearray(head)
            while len(log) < (count + 1) * _RECORD_BYTES:
                rest = (count + 1) * _RECORD_BYTES - len(log)
                data, _ = await self._page(len(log), min(rest, READ_BYTES_MAX))
                log += data
            # Read last and not retained: a later change is told by the event.
            head, _ = await self._page(0, _RECORD_BYTES, retain=False)
            if struct.unpack_from("<Q", head)[0] == generation:
                return parse_log(bytes(log))
        raise DiscoveryError(f"the log has changed {READS_MAX} times while it was read")

    async def _page(self, offset: int, size: int, *, retain: bool = True) -> tuple[bytes, int]:
        dwords = size // 4 - 1
        first = _DISCOVERY_PAGE | (_RETAIN_EVENT if retain else 0) | (dwords & 0xFFFF) << 16
        result, data = await self._ask(_GET_LOG, {8: size, 10: first, 11: dwords >> 16, 12: offset})
        if len(data) != size:
            raise DiscoveryError(f"{len(data)} bytes of the log came, {size} were asked for")
        return data, result

    async def _fabrics(self, kind: int, dwords: Mapping[int, int]) -> tuple[int, bytes]:
        number = self._number()
        made = entry(_FABRICS, number, kind=kind, dwords=dwords)
        return await self._command(number, capsule(made))

    async def _ask(
        self, opcode: int, dwords: Mapping[int, int], timeout_s: float | None = SETUP_TIMEOUT_S
    ) -> tuple[int, bytes]:
        number = self._number()
        made = entry(opcode, number, dwords=dwords)
        return await self._command(number, capsule(made), timeout_s)

    def _number(self) -> int:
        return next(n & 0xFFFF for n in self._numbers if n & 0xFFFF not in self._pending)

    async def _command(
        self, number: int, sent: bytes, timeout_s: float | None = SETUP_TIMEOUT_S
    ) -> tuple[int, bytes]:
        pending = _Pending(asyncio.get_running_loop().create_future())
        self._pending[number] = pending
        try:
            self._writer.write(sent)
            async with asyncio.timeout(timeout_s):
                result = await pending.done
        finally:
            del self._pending[number]
        return result, bytes(pending.data)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_S / 3)
            await self._ask(_KEEP_ALIVE, {})

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        while True:
            header = await reader.readexactly(_HEADER_BYTES)
            kind, flags, _, offset, size = struct.unpack_from("<BBBBI", header)
            if kind == _RESPONSE and size == _HEADER_BYTES:
                result, command, status = struct.unpack_from("<Q4xHH", header, 8)
                self._completed(command, status >> 1, result)
            elif kind == _DATA and _HEADER_BYTES <= offset <= size <= offset + READ_BYTES_MAX:
                command, _, at, count = struct.unpack_from("<HHII", header, 8)
                body = await reader.readexactly(size - _HEADER_BYTES)
                self._data(command, at, body[offset - _HEADER_BYTES :], count)
                if flags & _SUCCESS:
                    self._completed(command, 0, 0)
            else:
                raise DiscoveryError(f"PDU {kind:#x} of {size} bytes is not expected")

    def _data(self, command: int, at: int, data: bytes, count: int) -> None:
        pending = self._pending.get(command)
        if pending is None or len(pending.data) != at or len(data) != count:
            raise DiscoveryError(f"data that nobody asked for (command {command})")
        pending.data += data

    def _completed(self, command: int, status: int, result: int) -> None:
        pending = self._pending.get(command)
        if pending is None:
            raise DiscoveryError(f"an answer that nobody asked for (command {command})")
        if pending.done.done():
            return
        if status:
            pending.done.set_exception(DiscoveryError(f"refused with status {status:#x}"))
        else:
            pending.done.set_result(result)
