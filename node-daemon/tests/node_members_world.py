"""An agent's membership without an API server: what it would be told, in the test's hands."""

from __future__ import annotations

import asyncio
import base64
import uuid

from prometheus_client import CollectorRegistry

from tercet_api.clients import Unreachable
from tercet_api.objects import (
    Enrolment,
    Metadata,
    Register,
    StorageNode,
    StorageNodeSpec,
    StorageNodeStatus,
)
from tercet_node.certificates import PAIR_FILE, Credentials
from tercet_node.members.figures import Figures
from tercet_node.members.roster import host_port
from tercet_node.members.service import Membership
from tercet_node.membership import NodeList, State

WAIT_S = 20.0


def enrolment(entry):
    """As the operator writes it."""
    return Enrolment(
        nid=entry.nid,
        node=str(uuid.UUID(bytes=entry.node)),
        instance=str(uuid.UUID(bytes=entry.instance)),
        address=entry.address,
        incarnation=entry.incarnation,
        gone=entry.state is State.GONE,
        signature=base64.b64encode(entry.token).decode(),
    )


def node_object(name, entry):
    host, _ = host_port(entry.address)
    return StorageNode(
        metadata=Metadata(name=name, uid=str(uuid.UUID(bytes=entry.node))),
        spec=StorageNodeSpec(node_name=name, address=host),
        status=StorageNodeStatus(enrolment=enrolment(entry)),
    )


class Held:
    """The agent's certificates, as the membership sees them."""

    def __init__(self, folder, pem, ca):
        self.folder, self.ca = folder, ca
        self.ready = asyncio.Event()
        self.renew(pem)

    def renew(self, pem):
        (self.folder / PAIR_FILE).write_bytes(pem)
        begin = pem.index(b"-----BEGIN CERTIFICATE-----")
        self.current = Credentials(pem[:begin], pem[begin:], self.ca)
        self.ready.set()


class World:
    """An API server of words, and node n0's membership."""

    def __init__(self, site, folder):
        self.site, self.folder = site, folder
        folder.mkdir(exist_ok=True)
        trust = site.authority.trust
        keys = [base64.b64encode(key).decode() for key in trust.keys]
        self.register = Register(cluster=str(uuid.UUID(bytes=trust.cluster)), keys=keys)
        self.away = False
        self.reads = self.changes = 0
        self.held = Held(folder, (site.folder / "0.pem").read_bytes(), site.authority.pem)
        self.task = None

    async def read(self):
        self.reads += 1
        if self.away:
            raise Unreachable("no API server")
        return self.register

    def changed(self):
        self.changes += 1

    async def start(self):
        self.registry = CollectorRegistry()
        figures = Figures(self.registry)
        self.membership = Membership("n0", self.folder, self.held, self.read, figures, self.changed)
        self.task = asyncio.create_task(self.membership.run())

    async def stop(self):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def show(self, *nids, gone=False):
        entries = self.site.entries
        self.membership.observe([node_object(f"n{nid}", entries[nid]) for nid in nids], gone)

    @property
    def members(self):
        runner = self.membership.runner
        return NodeList() if runner is None else runner.members
