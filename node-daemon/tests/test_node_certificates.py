"""The node's certificate: asked for, kept, renewed; nobody is heard without one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import uuid

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from node_bench import TIMEOUT_S, Bench, until, value_of

from tercet_api.clients import NotFound
from tercet_api.names import NAMESPACE
from tercet_node.agent import Agent, Settings
from tercet_node.certificates import (
    Certificates,
    Credentials,
    Denied,
    new_request,
    signed,
    still_good,
)
from tercet_node.engine import Engine


class Authority:
    """A CA that signs as the operator does."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tercet-ca")])
        now = dt.datetime.now(dt.UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def sign(self, csr: x509.CertificateSigningRequest) -> bytes:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(csr.subject)
            .issuer_name(self.certificate.subject)
            .public_key(csr.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=1))
            .not_valid_after(now + dt.timedelta(hours=1))
        )
        for extension in csr.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


async def sign_requests(api, authority, node):
    """Approve and sign the pending requests of a node, as the operator does."""
    path = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
    for item in (await api.request("GET", path))["items"]:
        name = item["metadata"]["name"]
        if not name.startswith(f"tercet-node-{node}-") or item["status"].get("certificate"):
            continue
        condition = {"type": "Approved", "status": "True", "reason": "T", "message": "test"}
        item["status"]["conditions"] = [condition]
        approved = await api.request("PUT", f"{path}/{name}/approval", item)
        csr = x509.load_pem_x509_csr(base64.b64decode(approved["spec"]["request"]))
        approved["status"]["certificate"] = base64.b64encode(authority.sign(csr)).decode()
        await api.request("PUT", f"{path}/{name}/status", approved)
        return True
    return False


async def publish_ca(api, authority):
    path = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
    data = {"ca.crt": authority.pem.decode()}
    try:
        await api.request(
            "PATCH",
            f"{path}/tercet-ca",
            {"data": data},
            content="application/merge-patch+json",
        )
    except NotFound:
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "tercet-ca"}}
        await api.request("POST", path, body | {"data": data})


@pytest.mark.local
async def test_certificate_is_asked_for_kept_and_serves_mutual_tls(api, tmp_path, free_port):
    import grpc

    from tercet_api.protos import agent_pb2, agent_pb2_grpc

    authority = Authority()
    await publish_ca(api, authority)
    bench = Bench(api, tmp_path, f"n-{uuid.uuid4().hex[:8]}")
    await bench.make_node()
    await bench.start_engine()
    address = f"127.0.0.1:{free_port()}"
    settings = Settings(bench.node, None, bench.socket, bench.state_dir, address, "127.0.0.1:0")
    async with Engine(bench.socket) as engine:
        agent = Agent(settings, api, engine)
        task = asyncio.create_task(agent.run())
        try:
            await until(lambda: sign_requests(api, authority, bench.node), "request signed")
            pair = bench.state_dir / "node.pem"
            await until(lambda: value_of(pair.exists()), "pair kept")
            assert pair.stat().st_mode & 0o777 == 0o600
            held = agent._certificates.current
            volume = await bench.created((await bench.make_volume()).name)
            request = agent_pb2.ChunkSumsRequest(volume=volume.spec.uuid)
            trusted = grpc.ssl_channel_credentials(authority.pem, held.key, held.certificate)
            options = [("grpc.ssl_target_name_override", bench.node)]
            async with grpc.aio.secure_channel(address, trusted, options) as channel:
                stub = agent_pb2_grpc.AgentStub(channel)
                sums = await stub.ChunkSums(request, timeout=TIMEOUT_S, wait_for_ready=True)
                assert (sums.node, [s.index for s in sums.sums]) == (bench.node, [0])
                where = agent_pb2.ChunkMapRequest(volume=volume.spec.uuid)
                chunks = await stub.ChunkMap(where, timeout=TIMEOUT_S)
                assert (chunks.node, chunks.replica) == (bench.node, sums.replica)
                assert (chunks.device, chunks.region, chunks.regions) == ("d0", 1, 2)
                assert (chunks.next_chunk, chunks.rows[0].extents) == (7, 2)
                where.from_chunk = chunks.next_chunk
                chunks = await stub.ChunkMap(where, timeout=TIMEOUT_S)
                assert (chunks.rows[0].chunk, chunks.HasField("next_chunk")) == (7, False)
                status = await stub.NodeStatus(agent_pb2.NodeStatusRequest(), timeout=TIMEOUT_S)
                assert [r.name for r in status.replicas] == [volume.name]
                missing = agent_pb2.ChunkSumsRequest(volume=str(uuid.uuid4()))
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.ChunkSums(missing, timeout=TIMEOUT_S)
                assert refused.value.code() is grpc.StatusCode.NOT_FOUND
                nowhere = agent_pb2.ChunkMapRequest(volume=missing.volume)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.ChunkMap(nowhere, timeout=TIMEOUT_S)
                assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            # Nobody is heard without a certificate of this CA.
            for stranger in (
                grpc.ssl_channel_credentials(authority.pem),
                _stranger(authority, bench.node),
            ):
                async with grpc.aio.secure_channel(address, stranger, options) as channel:
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await agent_pb2_grpc.AgentStub(channel).ChunkSums(
                            request, timeout=TIMEOUT_S
                        )
                    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await bench.close()


def _stranger(authority, node):
    import grpc

    from tercet_node.certificates import new_request

    key, request = new_request(node, "127.0.0.1")
    foreign = Authority().sign(x509.load_pem_x509_csr(request))
    return grpc.ssl_channel_credentials(authority.pem, key, foreign)


# ------------------------------------------------------------------ when to renew


def held(authority, node="n", address="127.0.0.1"):
    key, request = new_request(node, address)
    signed = authority.sign(x509.load_pem_x509_csr(request))
    return Credentials(key, signed, authority.pem)


def test_certificate_is_renewed_after_two_thirds_of_its_life():
    authority = Authority()
    found = held(authority)
    certificate = x509.load_pem_x509_certificate(found.certificate)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    due = begin + (end - begin) * 2 / 3
    second = dt.timedelta(seconds=1)
    assert still_good(found, "n", "127.0.0.1", authority.pem, due - second)
    assert not still_good(found, "n", "127.0.0.1", authority.pem, due + second)


def test_certificate_of_another_ca_node_or_address_is_renewed():
    authority = Authority()
    found, now = held(authority), dt.datetime.now(dt.UTC)
    assert still_good(found, "n", "127.0.0.1", authority.pem, now)
    assert not still_good(found, "n", "127.0.0.1", Authority().pem, now)
    assert not still_good(found, "other", "127.0.0.1", authority.pem, now)
    assert not still_good(found, "n", "127.0.0.2", authority.pem, now)


def test_answer_of_the_approver():
    assert signed({"status": {}}) is None
    assert signed({}) is None
    body = base64.b64encode(b"PEM").decode()
    assert signed({"status": {"certificate": body}}) == b"PEM"
    denied = {"status": {"conditions": [{"type": "Denied", "message": "not your node"}]}}
    with pytest.raises(Denied, match="not your node"):
        signed(denied)


async def test_broken_files_are_asked_for_anew(tmp_path):
    held_before = held(Authority())
    first = Certificates(None, "n", tmp_path, lambda _: None)
    first._save(held_before)
    again = Certificates(None, "n", tmp_path, lambda _: None)
    again._load()
    assert again.current == held_before
    (tmp_path / "node.pem").write_bytes(b"torn")
    torn = Certificates(None, "n", tmp_path, lambda _: None)
    torn._load()
    assert torn.current is None
