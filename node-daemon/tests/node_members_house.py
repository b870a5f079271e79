"""One node with real connections, and whoever a test sends to its door."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

from tercet_e2e.swarm import PORT, Site, Swarm
from tercet_node.members import runner
from tercet_node.members.tls import contexts
from tercet_node.membership import Ack, decode_message, encode_message
from tercet_node.membership.messages import HEADER_BYTES, body_bytes

WAIT_S = 20.0


class Caller:
    """Somebody with a TLS client who says whatever bytes a test likes."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def say(self, *messages):
        for each in messages:
            self.writer.write(each if isinstance(each, bytes) else encode_message(each))
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def hear(self):
        head = await asyncio.wait_for(self.reader.readexactly(HEADER_BYTES), WAIT_S)
        return decode_message(head + await self.reader.readexactly(body_bytes(head)))

    async def answer(self, nonce):
        """To a probe; what else the node has to say (it probes and asks as well) is passed over."""
        while not isinstance(heard := await self.hear(), Ack) or heard.nonce != nonce:
            pass
        return heard

    async def is_hung_up_on(self):
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while await asyncio.wait_for(self.reader.read(65536), WAIT_S):
                pass
        return True


@contextlib.asynccontextmanager
async def house_of(folder, monkeypatch):
    """Node 0 of four. 2 and 3 are whoever a test makes of them; at 1 there is nobody."""
    monkeypatch.setattr(runner, "HOUSE_EVERY_S", 0.1)
    monkeypatch.setattr(runner, "HOUSE_LATE_S", 0.0)
    site = Site(folder, 4)
    async with Swarm(folder) as swarm:
        site.member = await swarm.start(0)
        site.swarm = swarm
        yield site


@contextlib.asynccontextmanager
async def call(site, pair=None, ca=None, local_addr=None):
    """A connection to node 0 with this key and certificate (None: node 2's)."""
    path = site.folder / "caller.pem"
    path.write_bytes(pair or (site.folder / "2.pem").read_bytes())
    client = contexts(path, ca or site.authority.pem).client
    reader, writer = await asyncio.wait_for(
        asyncio.open_connection(
            site.host(0),
            PORT,
            ssl=client,
            server_hostname=site.host(0),
            local_addr=local_addr,
        ),
        WAIT_S,
    )
    try:
        yield Caller(reader, writer)
    finally:
        writer.transport.abort()


def refused(site, reason):
    return site.member.count("refused_total", reason=reason)
