"""Nodes of the membership without a cluster: the agents' own code over real sockets and TLS.

Each node has a loopback address, a certificate and an entry, signed by an authority of its own;
what runs is `tercet_node.members`, byte for byte as in an agent. For tests and benchmarks that ask
about the protocol, not about the way by which the API server introduces nodes.

`python -m tercet_e2e.swarm FOLDER FIRST LAST` runs the nodes FIRST..LAST of a folder that `Site`
has filled, until its standard input ends: so that one node can be a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import json
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from prometheus_client import CollectorRegistry

from tercet_node.members.figures import Figures
from tercet_node.members.roster import Keys, Trust
from tercet_node.members.runner import RUNNING, Listeners, Runner
from tercet_node.members.tls import Contexts, contexts
from tercet_node.membership import (
    Entry,
    Incarnation,
    Nid,
    NodeList,
    Settings,
    State,
    WireError,
    sign,
)
from tercet_node.membership.entries import SIGNATURE_BYTES, decode, encode

PORT = 4422
HOSTS_PER_NET = 250
FAULTS = Settings(after_change_s=RUNNING.after_change_s, faults=True)
PEM = serialization.Encoding.PEM
RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw
STEP_S = 0.005


class Authority:
    """A cluster's CA and the key that signs entries."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tercet-ca")])
        self.signing = Ed25519PrivateKey.generate()
        self.trust = Trust(secrets.token_bytes(16), (self.signing.public_key().public_bytes(*RAW),))
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        built = self._builder(self._name, self._key.public_key())
        whole = built.add_extension(constraints, critical=True).sign(self._key, hashes.SHA256())
        self.pem = whole.public_bytes(PEM)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=1))
            .not_valid_after(now + dt.timedelta(hours=1))
        )

    def pair(self, common_name: str, *addresses: str) -> bytes:
        """Key and certificate, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        names = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        built = self._builder(subject, key.public_key())
        if names:
            built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
        secret = key.private_bytes(
            PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return secret + built.sign(self._key, hashes.SHA256()).public_bytes(PEM)

    def entry(
        self, nid: int, host: str, incarnation: int = 1, state: State = State.PRESENT
    ) -> Entry:
        """Signed."""
        node = (nid + 1).to_bytes(16, "big")
        blank = bytes(SIGNATURE_BYTES)
        number = Incarnation(incarnation)
        unsigned = Entry(Nid(nid), node, node, f"{host}:{PORT}", number, state, blank)
        return sign(unsigned, self.trust.cluster, self.signing)


@dataclass(slots=True)
class Member:
    """One node that runs."""

    runner: Runner
    figures: Figures
    registry: CollectorRegistry
    task: asyncio.Task[None] | None = None

    def count(self, name: str, **labels: str) -> float:
        """One figure by its name behind tercet_membership_."""
        return self.registry.get_sample_value(f"tercet_membership_{name}", labels) or 0.0


class Site:
    """Keys, certificates and entries of so many nodes, in a folder."""

    def __init__(self, folder: Path, count: int, authority: Authority | None = None) -> None:
        self.folder = folder
        self.authority = authority or Authority()
        self.net = _free_net()
        self.entries = [self.authority.entry(nid, self.host(nid)) for nid in range(count)]
        (folder / "ca.crt").write_bytes(self.authority.pem)
        for nid in range(count):
            self.certify(nid)
        self.write()

    def host(self, nid: int) -> str:
        """The node's address."""
        return f"127.{self.net}.{nid // HOSTS_PER_NET}.{nid % HOSTS_PER_NET + 1}"

    def certify(self, nid: int) -> None:
        """A certificate for that node."""
        pair = self.authority.pair(f"storagenode:n{nid}", self.host(nid))
        (self.folder / f"{nid}.pem").write_bytes(pair)

    def write(self) -> None:
        """What another process needs to run some of the nodes."""
        trust = self.authority.trust
        body = {
            "cluster": trust.cluster.hex(),
            "keys": [key.hex() for key in trust.keys],
            "entries": [encode(entry).hex() for entry in self.entries],
        }
        (self.folder / "site.json").write_text(json.dumps(body))


def _free_net() -> int:
    """A second octet of loopback addresses that nobody listens on."""
    while True:
        net = 2 + secrets.randbelow(250)
        with contextlib.suppress(OSError), socket.create_server((f"127.{net}.0.1", PORT)):
            return net


class Swarm:
    """Nodes of one folder, in this process. `async with`."""

    def __init__(self, folder: Path, settings: Settings = FAULTS) -> None:
        self._folder = folder
        self._settings = settings
        self._ca = (folder / "ca.crt").read_bytes()
        body = json.loads((folder / "site.json").read_text())
        keys = tuple(bytes.fromhex(key) for key in body["keys"])
        self.trust = Trust(bytes.fromhex(body["cluster"]), keys)
        try:
            entries = [decode(bytes.fromhex(entry)) for entry in body["entries"]]
        except WireError as error:
            raise AssertionError(f"{folder}: {error}") from error
        self.known = NodeList.of(entries)
        self.members: dict[int, Member] = {}

    async def start(
        self, nid: int, known: NodeList | None = None, listeners: Listeners | None = None
    ) -> Member:
        """One node, which knows all of them (or those)."""
        known = self.known if known is None else known
        me = self.known.get(nid) or known.get(nid)
        assert me is not None, f"no entry for node {nid}"
        found: Contexts = contexts(self._folder / f"{nid}.pem", self._ca)
        registry = CollectorRegistry()
        figures = Figures(registry)
        keys = Keys(self.trust)
        runner = Runner(me, keys, lambda: found, figures, known, listeners, self._settings)
        member = self.members[nid] = Member(runner, figures, registry)
        member.task = asyncio.create_task(runner.run(), name=f"node-{nid}")
        await runner.mesh.listening.wait()
        return member

    async def start_all(self) -> None:
        """Everybody, at one time."""
        async with asyncio.TaskGroup() as group:
            for nid in self.known.nids():
                group.create_task(self.start(nid))

    async def kill(self, nid: int) -> None:
        """End a node without a word."""
        task = self.members.pop(nid).task
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for nid in tuple(self.members):
            await self.kill(nid)

    def digests(self) -> set[int]:
        """Of all lists."""
        return {member.runner.members.digest for member in self.members.values()}


async def until(look: Callable[[], bool], timeout_s: float) -> float:
    """Wait for it; how long it took. Raises TimeoutError."""
    clock = asyncio.get_running_loop().time
    began_s = clock()
    async with asyncio.timeout(timeout_s):
        # What is looked at tells nobody of its changes.
        while not look():  # noqa: ASYNC110
            await asyncio.sleep(STEP_S)
    return clock() - began_s


@contextlib.asynccontextmanager
async def process(folder: Path, first: int, last: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """The nodes first..last as a process of its own, which has begun to listen."""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tercet_e2e.swarm", str(folder), str(first), str(last)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert running.stdout is not None
    try:
        said = await running.stdout.readline()
        assert said == b"ready\n", f"nodes {first}..{last} did not start: {said!r}"
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


async def _main(arguments: Sequence[str]) -> None:
    folder, first, last = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    async with Swarm(folder, RUNNING) as swarm:
        async with asyncio.TaskGroup() as group:
            for nid in range(first, last + 1):
                group.create_task(swarm.start(nid))
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    import logging

    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    asyncio.run(_main(sys.argv[1:]))
