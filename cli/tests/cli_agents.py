"""Agents for the CLI's tests: real gRPC servers with mutual TLS, and a CA that signs requests."""

# ruff: noqa: N802  (the method names of the protocol)

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import ipaddress

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tercet_api.names import NAMESPACE
from tercet_api.protos import agent_pb2, agent_pb2_grpc

REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"


class Authority:
    """The cluster's CA, in the test's hands."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tercet-ca")])
        built = self._builder(self.name, self.key.public_key())
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        signed = built.add_extension(constraints, critical=True).sign(self.key, hashes.SHA256())
        self.pem = signed.public_bytes(serialization.Encoding.PEM)

    def _builder(self, subject, public_key):
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=1))
            .not_valid_after(now + dt.timedelta(hours=1))
        )

    def sign(self, request: x509.CertificateSigningRequest) -> bytes:
        built = self._builder(request.subject, request.public_key())
        signed = built.sign(self.key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    def server(self, node: str) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"storagenode:{node}")])
        names = [x509.DNSName(node), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        built = self._builder(subject, key.public_key())
        signed = built.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(
            self.key, hashes.SHA256()
        )
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return secret, signed.public_bytes(serialization.Encoding.PEM)


async def publish(api, authority: Authority) -> None:
    """The public half of the CA where every piece looks for it."""
    from tercet_api.clients import Conflict

    for path, body in (
        ("/api/v1/namespaces", {"kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        (
            f"/api/v1/namespaces/{NAMESPACE}/configmaps",
            {"kind": "ConfigMap", "metadata": {"name": "tercet-ca"}},
        ),
    ):
        with contextlib.suppress(Conflict):
            await api.request("POST", path, {"apiVersion": "v1", **body})
    await api.request(
        "PATCH",
        f"/api/v1/namespaces/{NAMESPACE}/configmaps/tercet-ca",
        {"data": {"ca.crt": authority.pem.decode()}},
        content="application/merge-patch+json",
    )


async def sign_next(api, authority: Authority, *, deny: str = "") -> bool:
    """Decide one pending request of an administrator, as the operator does."""
    for item in (await api.request("GET", REQUESTS))["items"]:
        name = item["metadata"]["name"]
        status = item.get("status") or {}
        if not name.startswith("tercet-admin-") or status.get("conditions"):
            continue
        kind = "Denied" if deny else "Approved"
        condition = {"type": kind, "status": "True", "reason": "Test", "message": deny or "test"}
        item["status"] = {"conditions": [condition]}
        approved = await api.request("PUT", f"{REQUESTS}/{name}/approval", item)
        if not deny:
            request = x509.load_pem_x509_csr(base64.b64decode(approved["spec"]["request"]))
            assert request.subject.rfc4514_string() == "CN=admin"
            signed = authority.sign(request)
            approved["status"]["certificate"] = base64.b64encode(signed).decode()
            await api.request("PUT", f"{REQUESTS}/{name}/status", approved)
        return True
    return False


class FakeAgent(agent_pb2_grpc.AgentServicer):
    """One node's agent: says what the test has put in. An async context manager."""

    def __init__(self, authority: Authority, node: str, replica: str) -> None:
        self.authority = authority
        self.node = node
        self.replica = replica
        self.epoch, self.lsn = 1, 10
        self.sums: dict[int, int] = {0: 0xAAAA, 3: 0xBBBB}
        self.asked = 0
        self.catches_up_after: int | None = None
        self.port = 0
        self.digest = "ab" * 16
        self.agrees_after: int | None = None
        self.locked = False
        self.others: list[agent_pb2.Member] = []

    async def __aenter__(self):
        self._server = grpc.aio.server()
        agent_pb2_grpc.add_AgentServicer_to_server(self, self._server)
        secure = grpc.ssl_server_credentials(
            [self.authority.server(self.node)], self.authority.pem, require_client_auth=True
        )
        self.port = self._server.add_secure_port("127.0.0.1:0", secure)
        await self._server.start()
        return self

    async def __aexit__(self, *_):
        await self._server.stop(None)

    async def ChunkSums(self, request, context):
        self.asked += 1
        lsn = self.lsn
        if self.catches_up_after is not None and self.asked <= self.catches_up_after:
            lsn -= 1
        return agent_pb2.ChunkSumsResponse(
            node=self.node,
            replica=self.replica,
            epoch=self.epoch,
            lsn=lsn,
            chunk_bytes=4 << 20,
            sums=[agent_pb2.ChunkSum(index=i, crc32c=c) for i, c in sorted(self.sums.items())],
        )

    async def ChunkMap(self, request, context):
        """A row for each chunk that has a sum, two in a page; a third of each is shared."""
        left = [chunk for chunk in sorted(self.sums) if chunk >= request.from_chunk]
        rows = [
            agent_pb2.ChunkRow(
                chunk=chunk,
                mapped_bytes=3 << 20,
                shared_bytes=1 << 20,
                extents=chunk + 1,
                device_offset_bytes=chunk << 30,
                changed_epoch=self.epoch,
                changed_lsn=self.lsn,
            )
            for chunk in left[:2]
        ]
        return agent_pb2.ChunkMapResponse(
            node=self.node,
            replica=self.replica,
            device="d0",
            regions=1,
            epoch=self.epoch,
            lsn=self.lsn,
            chunk_bytes=4 << 20,
            rows=rows,
            next_chunk=left[2] if len(left) > 2 else None,
        )

    # ---------------------------------------------------------------- the list of nodes

    def _members(self):
        digest = self.digest
        if self.agrees_after is not None and self.asked <= self.agrees_after:
            digest = "cd" * 16
        return agent_pb2.MembersResponse(
            node=self.node,
            nid=0,
            size=len(self.others),
            digest=digest,
            locked=self.locked,
            members=self.others,
        )

    async def Members(self, request, context):
        self.asked += 1
        return self._members()

    async def LockMembers(self, request, context):
        self.locked = request.locked
        return self._members()

    async def CheckMembers(self, request, context):
        if self.locked:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "node 0 is locked")
        return agent_pb2.CheckMembersResponse(node=self.node, digest=self.digest, repaired=2)
