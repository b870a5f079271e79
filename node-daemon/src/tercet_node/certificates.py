"""The node's certificate: asked for through the CertificateSigningRequest API, kept, renewed.

Key and certificate stand in one file of mode 0600 below the state directory, replaced as a whole,
so that a crash never leaves a key beside another key's certificate. Two thirds into its life, or
when the node's address changes or the cluster has another CA, a new key is certified and takes over
without a restart: whoever serves TLS asks `Certificates.current` at each handshake.

What is checked before signing is the operator's part: that the requester's token is bound to the
agent of this very node.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tercet_api.clients import Api, ApiError, Json
from tercet_api.names import CA_CONFIG_MAP, NAMESPACE, SIGNER

REQUESTS_PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
CA_PATH = f"/api/v1/namespaces/{NAMESPACE}/configmaps/{CA_CONFIG_MAP}"
CA_KEY = "ca.crt"
PAIR_FILE = "node.pem"
CA_FILE = "ca.crt"
SIGNED_TIMEOUT_S = 60.0
LOOK_AGAIN_S = 600.0
"""How often the CA is read again while the certificate is good."""
PAUSE_S_MIN = 0.5
PAUSE_S_MAX = 30.0

log = structlog.get_logger(__name__)


class Denied(Exception):
    """The request was denied or failed; the message is the approver's."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What TLS needs, all PEM."""

    key: bytes
    certificate: bytes
    ca: bytes


def common_name(node: str) -> str:
    """The subject of a node's certificate."""
    return f"storagenode:{node}"


def renew_at(certificate: x509.Certificate) -> datetime:
    """Two thirds into its life."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begin + (end - begin) * 2 / 3


def still_good(held: Credentials, node: str, address: str, ca: bytes, now: datetime) -> bool:
    """Whether the held certificate needs no renewal yet."""
    if held.ca != ca:
        return False
    certificate = x509.load_pem_x509_certificate(held.certificate)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if [name.value for name in names] != [common_name(node)]:
        return False
    try:
        alternatives = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        ).value
    except x509.ExtensionNotFound:
        return False
    addresses = alternatives.get_values_for_type(x509.IPAddress)
    return ipaddress.ip_address(address) in addresses and now < renew_at(certificate)


def new_request(node: str, address: str) -> tuple[bytes, bytes]:
    """A fresh key and its certificate request, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name(node))])
    names = [x509.DNSName(node), x509.IPAddress(ipaddress.ip_address(address))]
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return secret, request.public_bytes(serialization.Encoding.PEM)


def request_object(node: str, request: bytes) -> Json:
    """The CertificateSigningRequest object."""
    return {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"generateName": f"tercet-node-{node}-"},
        "spec": {
            "signerName": SIGNER,
            "request": base64.b64encode(request).decode(),
            "usages": ["digital signature", "client auth", "server auth"],
        },
    }


def signed(answer: Json) -> bytes | None:
    """The certificate in a request's status, None while it is waiting. Raises Denied."""
    status = answer.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition.get("type") in ("Denied", "Failed"):
            raise Denied(f"{condition.get('type')}: {condition.get('message', 'no message')}")
    certificate = status.get("certificate")
    return base64.b64decode(certificate) if certificate else None


class Certificates:
    """Holds this node's credentials, and the task that keeps them good."""

    def __init__(self, api: Api, node: str, folder: Path, expires: Callable[[float], None]) -> None:
        self._api = api
        self._node = node
        self._folder = folder
        self._expires = expires
        self.current: Credentials | None = None
        self.ready = asyncio.Event()

    async def run(self, address: Callable[[], str | None]) -> None:
        """Keep credentials for the node's address until cancelled."""
        self._load()
        pause_s = PAUSE_S_MIN
        while True:
            now_address = address()
            try:
                if now_address is not None:
                    await self._keep(now_address)
                    pause_s = LOOK_AGAIN_S
            except (ApiError, Denied, TimeoutError) as error:
                log.warning("no certificate yet", node=self._node, error=str(error) or repr(error))
                pause_s = PAUSE_S_MIN if pause_s >= LOOK_AGAIN_S else min(pause_s * 2, PAUSE_S_MAX)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311

    async def _keep(self, address: str) -> None:
        answer = await self._api.request("GET", CA_PATH)
        ca = str(answer["data"][CA_KEY]).encode()
        if self.current is not None and still_good(
            self.current, self._node, address, ca, datetime.now(UTC)
        ):
            self._take(self.current)
            return
        key, request = new_request(self._node, address)
        certificate = await self._signed(request)
        self._save(Credentials(key, certificate, ca))
        log.info("certificate renewed", node=self._node, address=address)

    async def _signed(self, request: bytes) -> bytes:
        made = await self._api.request("POST", REQUESTS_PATH, request_object(self._node, request))
        name, version = made["metadata"]["name"], made["metadata"]["resourceVersion"]
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": version,
            "timeoutSeconds": str(int(SIGNED_TIMEOUT_S)),
        }
        async with asyncio.timeout(SIGNED_TIMEOUT_S):
            async with aclosing(self._api.lines(REQUESTS_PATH, query)) as lines:
                async for line in lines:
                    certificate = signed(line["object"])
                    if certificate is not None:
                        return certificate
        raise Denied(f"CertificateSigningRequest {quote(name)} was not signed: is the operator up?")

    def _take(self, credentials: Credentials) -> None:
        self.current = credentials
        certificate = x509.load_pem_x509_certificate(credentials.certificate)
        self._expires((certificate.not_valid_after_utc - _EPOCH) / timedelta(seconds=1))
        self.ready.set()

    def _save(self, credentials: Credentials) -> None:
        _write(self._folder / CA_FILE, credentials.ca)
        _write(self._folder / PAIR_FILE, credentials.key + credentials.certificate)
        self._take(credentials)

    def _load(self) -> None:
        """Take up what an earlier start left; whatever cannot be read is asked for anew."""
        try:
            pair = (self._folder / PAIR_FILE).read_bytes()
            ca = (self._folder / CA_FILE).read_bytes()
            begin = pair.index(b"-----BEGIN CERTIFICATE-----")
            held = Credentials(pair[:begin], pair[begin:], ca)
            if x509.load_pem_x509_certificate(held.certificate).not_valid_after_utc < datetime.now(
                UTC
            ):
                return
            self._take(held)
        except FileNotFoundError:
            return
        except ValueError as error:
            log.warning("held certificate cannot be read", node=self._node, error=str(error))


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _write(path: Path, data: bytes) -> None:
    """Replace a file as a whole, readable by its owner only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
