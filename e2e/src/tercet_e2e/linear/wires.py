"""The wires between the nodes and hosts of one machine, and what may be wrong with them.

    python -m tercet_e2e.linear.wires SEED NAME...

Each name gets a network namespace with one device besides loopback, a TUN, and on it the address
10.91.0.N. Whatever leaves a namespace comes out of its TUN as a packet in this process, which puts
it into the namespace that it is for: late, twice or not at all, as the link from the one to the
other is just now. So a direction that is cut is cut for whatever speaks over it, and TCP meets what
it meets on a network: nothing here knows of connections. (netem would do the same, but not every
kernel has it; a proxy for TCP could hold bytes back, but neither lose nor reorder packets.)

What processes of a namespace ask of 127.0.0.1:PORT, the API server's, is passed on by `relay` as a
byte stream: link NAME>api, and back.

The namespaces live as long as a process in them does; others enter by `nsenter --net=` and the path
that is printed. Commands come as JSON lines and are answered by one each; this process ends with
its input. `network` is the other side.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import os
import random
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

API = "api"
PREFIX = "10.91.0."
MTU_BYTES = 9000
PACKETS_MAX = 64  # of one namespace in a row, so that none starves the others
PACKET_BYTES_MAX = 65536
RELAY_BYTES = 65536

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Link:
    """How one direction between two ends is."""

    cut: bool = False
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    """A packet takes up to so much longer: later ones overtake it."""
    loss: float = 0.0
    """Of one packet, the probability."""
    twice: float = 0.0
    """Of a second copy of it."""


GOOD = Link()
LinkName = str


def link_name(source: str, target: str) -> LinkName:
    """How the link from one end to another is called."""
    return f"{source}>{target}"


def address(number: int) -> str:
    """Of the end with this number; the first is 0."""
    return f"{PREFIX}{number + 1}"


def fate(link: Link, draw: random.Random) -> list[float]:
    """When each copy of a packet arrives, in seconds from now; none: it is lost."""
    if link.cut or draw.random() < link.loss:
        return []
    copies = 2 if draw.random() < link.twice else 1
    return [(link.delay_ms + draw.random() * link.jitter_ms) / 1000 for _ in range(copies)]


def target_number(packet: bytes) -> int | None:
    """Which end an IPv4 packet is for; None when it is for none."""
    if (
        len(packet) < 20
        or packet[0] >> 4 != 4
        or packet[16:19] != socket.inet_aton(PREFIX + "0")[:3]
    ):
        return None
    return packet[19] - 1


class Wires:
    """Passes packets on between the ends."""

    def __init__(self, names: list[str], put: Callable[[int, bytes], None], seed: int) -> None:
        self.names = names
        self.counts: Counter[str] = Counter()
        self.changed = asyncio.Event()
        self._put = put
        self._draw = random.Random(seed)
        self._links: dict[LinkName, Link] = {}

    def set(self, links: Mapping[LinkName, Link]) -> None:
        """From now on links are like this; those that are not named are good."""
        self._links = dict(links)
        self.changed.set()
        self.changed = asyncio.Event()

    def link(self, source: str, target: str) -> Link:
        """How a direction is just now."""
        return self._links.get(link_name(source, target), GOOD)

    def take(self, source: int, packet: bytes) -> None:
        """A packet has left an end."""
        target = target_number(packet)
        if target is None or not 0 <= target < len(self.names):
            return
        link = self.link(self.names[source], self.names[target])
        arrivals = fate(link, self._draw)
        self._count(link, arrivals)
        for after_s in arrivals:
            if after_s == 0:
                self._put(target, packet)
            else:
                asyncio.get_running_loop().call_later(after_s, self._put, target, packet)

    def _count(self, link: Link, arrivals: list[float]) -> None:
        self.counts["packets"] += 1
        if not arrivals:
            self.counts["cut" if link.cut else "lost"] += 1
        self.counts["twice"] += len(arrivals) > 1
        self.counts["late"] += any(after_s > 0 for after_s in arrivals)


class Namespaces:
    """A network namespace for each name, with its TUN."""

    def __init__(self, names: list[str]) -> None:
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.handles: list[int] = []
        self.tuns: list[int] = []
        try:
            for number in range(len(names)):
                self._make(number)
        finally:
            self._enter(self._home)

    def _make(self, number: int) -> None:
        _check(_libc.unshare(CLONE_NEWNET), "unshare")
        self.handles.append(os.open("/proc/self/ns/net", os.O_RDONLY))
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"wire", IFF_TUN | IFF_NO_PI))
        self.tuns.append(tun)
        for words in (
            "link set lo up",
            f"address add {address(number)}/24 dev wire",
            f"link set wire mtu {MTU_BYTES} up",
        ):
            subprocess.run(["ip", *words.split()], check=True)

    def listener(self, number: int, port: int) -> socket.socket:
        """A socket that listens on 127.0.0.1 of a namespace."""
        self._enter(self.handles[number])
        try:
            return socket.create_server(("127.0.0.1", port))
        finally:
            self._enter(self._home)

    @staticmethod
    def _enter(handle: int) -> None:
        _check(_libc.setns(handle, CLONE_NEWNET), "setns")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


class Process:
    """Everything of this process: namespaces, wires, relays, commands."""

    def __init__(self, names: list[str], seed: int) -> None:
        self._spaces = Namespaces(names)
        self._wires = Wires(names, self._put, seed)
        self._servers: list[asyncio.Server] = []

    def hello(self) -> dict[str, Any]:
        """Where each namespace is, and its address."""
        spaces = {
            name: {"path": f"/proc/{os.getpid()}/fd/{handle}", "address": address(number)}
            for number, (name, handle) in enumerate(
                zip(self._wires.names, self._spaces.handles, strict=True)
            )
        }
        return {"namespaces": spaces}

    def _put(self, target: int, packet: bytes) -> None:
        try:
            os.write(self._spaces.tuns[target], packet)
        except OSError:  # its queue is full: lost, as with any switch
            self._wires.counts["overflows"] += 1

    def _readable(self, source: int) -> None:
        for _ in range(PACKETS_MAX):
            try:
                packet = os.read(self._spaces.tuns[source], PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            self._wires.take(source, packet)

    async def run(self) -> None:
        """Passes packets on until the input ends."""
        loop = asyncio.get_running_loop()
        for number, tun in enumerate(self._spaces.tuns):
            loop.add_reader(tun, self._readable, number)
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        print(json.dumps(self.hello()), flush=True)
        async for line in reader:
            command = json.loads(line)
            if "relay" in command:
                await self._relay(command["relay"])
            if "links" in command:
                links = command["links"]
                self._wires.set({name: Link(**found) for name, found in links.items()})
            print(json.dumps(self._wires.counts), flush=True)

    async def _relay(self, port: int) -> None:
        for number, name in enumerate(self._wires.names):
            listener = self._spaces.listener(number, port)
            serve = self._serve(name, port)
            self._servers.append(await asyncio.start_server(serve, sock=listener))

    def _serve(self, name: str, port: int) -> Callable[..., Any]:
        async def serve(inner: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
            try:
                outer, ask = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                answer.close()
                return
            there = asyncio.create_task(self._pass(inner, ask, name, API))
            back = asyncio.create_task(self._pass(outer, answer, API, name))
            try:
                # A direction that ends ends the connection: HTTP over TLS asks for no more.
                await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (there, back):
                    task.cancel()
                await asyncio.gather(there, back, return_exceptions=True)
                ask.close()
                answer.close()

        return serve

    async def _pass(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *ends: str
    ) -> None:
        """Bytes of one direction: held back while it is cut, as a network's would be."""
        while data := await source.read(RELAY_BYTES):
            while (link := self._wires.link(*ends)).cut:
                await self._wires.changed.wait()
            if link.delay_ms:
                await asyncio.sleep(link.delay_ms / 1000)
            target.write(data)
            await target.drain()


def as_json(links: Mapping[LinkName, Link]) -> dict[str, Any]:
    """Links as a command has them."""
    return {name: asdict(link) for name, link in links.items()}


if __name__ == "__main__":
    asyncio.run(Process(sys.argv[2:], int(sys.argv[1])).run())
