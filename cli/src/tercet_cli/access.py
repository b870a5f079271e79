"""How a command reaches the cluster: kubeconfig as kubectl finds it, agents with mutual TLS.

The way to an agent needs a certificate of the cluster's CA. It is asked for anew by each command
that needs one (a CertificateSigningRequest with the subject CN=admin, which the operator signs for
who may create one), lives a short time, and its key never leaves this process.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tercet_api.clients import Api, ApiError, Json
from tercet_api.names import CA_CONFIG_MAP, NAMESPACE, SIGNER
from tercet_api.objects import StorageNode
from tercet_api.protos import agent_pb2_grpc
from tercet_cli.errors import ClusterAway, Denied, of_api

COMMON_NAME = "admin"
CERTIFICATE_S = 3600
SIGNED_TIMEOUT_S = 30.0
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
REQUESTS_PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
CA_PATH = f"/api/v1/namespaces/{NAMESPACE}/configmaps/{CA_CONFIG_MAP}"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A client's end of mutual TLS, all PEM."""

    key: bytes
    certificate: bytes
    ca: bytes


def kubeconfig_path(option: Path | None, environment: dict[str, str]) -> Path | None:
    """As kubectl: the option, else KUBECONFIG, else ~/.kube/config; None: inside a pod.

    Raises ClusterAway when there is none.
    """
    if option is not None:
        if not option.is_file():
            raise ClusterAway(f"--kubeconfig: there is no file {option}", "name an existing one")
        return option
    listed = [Path(part) for part in environment.get("KUBECONFIG", "").split(os.pathsep) if part]
    if listed:
        there = [path for path in listed if path.is_file()]
        if not there:
            names = ", ".join(map(str, listed))
            raise ClusterAway(f"KUBECONFIG: there is no file {names}", "name an existing one")
        # The client library merges a list of files, as kubectl does.
        return Path(os.pathsep.join(map(str, there)))
    home = Path(environment.get("HOME", "/")) / ".kube" / "config"
    if home.is_file():
        return home
    if SERVICE_ACCOUNT.is_file():
        return None
    raise ClusterAway(f"no kubeconfig: {home} is not there", "set KUBECONFIG or --kubeconfig FILE")


@asynccontextmanager
async def cluster(option: Path | None, context: str | None) -> AsyncGenerator[Api, None]:
    """A connection to the API server; its errors come out as CliError."""
    path = kubeconfig_path(option, dict(os.environ))
    api = Api(path, context=context)
    try:
        await api.__aenter__()
    except Exception as error:  # the library raises whatever a broken file makes it raise
        raise ClusterAway(
            f"kubeconfig {path}: {error}", "check the file and the name given by --context"
        ) from error
    try:
        yield api
    except ApiError as error:
        raise of_api(error) from error
    finally:
        await api.__aexit__(None, None, None)


def new_request() -> tuple[bytes, bytes]:
    """A fresh key and its certificate request, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, COMMON_NAME)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    signed = request.sign(key, hashes.SHA256())
    return secret, signed.public_bytes(serialization.Encoding.PEM)


async def credentials(api: Api) -> Credentials:
    """Have a client certificate signed. Raises Denied, ApiError."""
    answer = await api.request("GET", CA_PATH)
    key, request = new_request()
    body = {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"generateName": "tercet-admin-"},
        "spec": {
            "signerName": SIGNER,
            "request": base64.b64encode(request).decode(),
            "expirationSeconds": CERTIFICATE_S,
            "usages": ["digital signature", "client auth"],
        },
    }
    made = await api.request("POST", REQUESTS_PATH, body)
    certificate = await _signed(api, made["metadata"]["name"], made["metadata"]["resourceVersion"])
    return Credentials(key, certificate, str(answer["data"]["ca.crt"]).encode())


async def _signed(api: Api, name: str, version: str) -> bytes:
    query = {
        "watch": "true",
        "fieldSelector": f"metadata.name={name}",
        "resourceVersion": version,
        "timeoutSeconds": str(int(SIGNED_TIMEOUT_S)),
    }
    try:
        async with (
            asyncio.timeout(SIGNED_TIMEOUT_S),
            aclosing(api.lines(REQUESTS_PATH, query)) as lines,
        ):
            async for line in lines:
                found = _certificate(name, line["object"])
                if found is not None:
                    return found
    except TimeoutError:
        pass
    raise Denied(
        f"CertificateSigningRequest {name} was not signed within {SIGNED_TIMEOUT_S:.0f} s",
        f"check that the operator runs: kubectl -n {NAMESPACE} get pods",
    )


def _certificate(name: str, request: Json) -> bytes | None:
    status = request.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition.get("type") in ("Denied", "Failed"):
            said = condition.get("message") or condition.get("reason")
            raise Denied(
                f"CertificateSigningRequest {name}: {condition['type']}: {said}",
                "use credentials of an administrator (--context)",
            )
    certificate = status.get("certificate")
    return base64.b64decode(certificate) if certificate else None


@asynccontextmanager
async def agent(
    node: StorageNode, held: Credentials
) -> AsyncGenerator[agent_pb2_grpc.AgentStub, None]:
    """A connection to a node's agent: it must show that very node's certificate."""
    address = node.spec.address
    host = f"[{address}]" if ":" in address else address
    secure = grpc.ssl_channel_credentials(held.ca, held.key, held.certificate)
    options: list[tuple[str, str | int]] = [
        ("grpc.ssl_target_name_override", node.name),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.enable_http_proxy", 0),
    ]
    target = f"{host}:{node.spec.ports.agent}"
    async with grpc.aio.secure_channel(target, secure, options) as channel:
        yield agent_pb2_grpc.AgentStub(channel)
