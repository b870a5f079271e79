"""The certificate authority of nodes and clients, and who gets what signed (pure but for keys).

A request is signed when the requester *is* what the certificate will say. The API server has
written into the request who asked; nothing in the request itself is believed:

- `storagenode:<name>`: the service account of the agents, with a token that is bound to the
  Kubernetes node of that very StorageNode. A pod's token carries its node
  (`authentication.kubernetes.io/node-name`); where agents run outside of pods (provider local), a
  token that was bound to the Node object carries the same claim. The names in the certificate are
  the node's name and the address of its StorageNode, and no others.
- `csi-controller`: the service account of the csi controller.
- `admin`: whoever may `use` `certificates.tercet.io/admin`, which the operator asks the API server
  (SubjectAccessReview). cluster-admin may; the ClusterRole `tercet-admin` gives it to others.

A refused request is denied with the reason, which `kubectl get csr -o yaml` shows.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tercet_api.names import NAMESPACE
from tercet_api.objects import StorageNode

NODE_PREFIX = "storagenode:"
CSI_CONTROLLER = "csi-controller"
ADMIN = "admin"
NODE_ACCOUNT = f"system:serviceaccount:{NAMESPACE}:tercet-node"
CSI_CONTROLLER_ACCOUNT = f"system:serviceaccount:{NAMESPACE}:tercet-csi-controller"
NODE_CLAIM = "authentication.kubernetes.io/node-name"

CA_DAYS = 3650
LIFE_DAYS_MAX = 30
"""A node goes on for this long while nobody signs; agents renew after two thirds of it."""
BACKDATE = timedelta(minutes=5)
"""Clocks of the cluster may differ by this much."""
REQUEST_BYTES_MAX = 16384


class Denied(Exception):
    """The request is not signed; the message is for the requester."""


@dataclass(frozen=True, slots=True)
class Request:
    """A CertificateSigningRequest object as the API server has stored it."""

    name: str
    uid: str
    username: str
    groups: Sequence[str]
    extra: Mapping[str, Sequence[str]]
    pem: bytes
    usages: frozenset[str]
    expiration_s: int | None

    @classmethod
    def of(cls, item: Mapping[str, Any]) -> Request:
        """Read it from JSON."""
        spec = item["spec"]
        return cls(
            name=item["metadata"]["name"],
            uid=item["metadata"]["uid"],
            username=spec.get("username", ""),
            groups=tuple(spec.get("groups") or ()),
            extra=dict(spec.get("extra") or {}),
            pem=base64.b64decode(spec["request"]),
            usages=frozenset(spec.get("usages") or ()),
            expiration_s=spec.get("expirationSeconds"),
        )


def undecided(item: Mapping[str, Any]) -> bool:
    """Whether a request still waits for its certificate or its refusal."""
    status = item.get("status") or {}
    kinds = {condition.get("type") for condition in status.get("conditions") or ()}
    return not status.get("certificate") and not kinds & {"Denied", "Failed"}


@dataclass(frozen=True, slots=True)
class Grant:
    """What a certificate will say."""

    common_name: str
    public_key: Any
    names: tuple[x509.GeneralName, ...] = ()
    server: bool = False


@dataclass(frozen=True, slots=True)
class NeedsReview:
    """Only the API server can say whether this user may have the admin certificate."""

    grant: Grant
    review: dict[str, Any] = field(hash=False)


def judge(request: Request, nodes: Mapping[str, StorageNode]) -> Grant | NeedsReview:
    """What this requester gets. Raises Denied."""
    parsed = _parsed(request)
    common_name = _common_name(parsed)
    if common_name.startswith(NODE_PREFIX):
        node = _own_node(request, common_name.removeprefix(NODE_PREFIX), nodes)
        return _node_grant(request, parsed, common_name, node)
    if common_name not in {CSI_CONTROLLER, ADMIN}:
        raise Denied(
            f"subject {common_name!r}: expected {NODE_PREFIX}<name>, {CSI_CONTROLLER} or {ADMIN}"
        )
    if _alternatives(parsed) or request.usages - {"digital signature", "client auth"}:
        raise Denied(f"a certificate for {common_name!r} is for client auth, without other names")
    grant = Grant(common_name, parsed.public_key())
    if common_name == CSI_CONTROLLER:
        if request.username != CSI_CONTROLLER_ACCOUNT:
            raise Denied(f"{CSI_CONTROLLER!r} is for {CSI_CONTROLLER_ACCOUNT} only")
        return grant
    return NeedsReview(grant, _review(request))


def _parsed(request: Request) -> x509.CertificateSigningRequest:
    try:
        if len(request.pem) > REQUEST_BYTES_MAX:
            raise Denied(f"the request has more than {REQUEST_BYTES_MAX} bytes")
        parsed = x509.load_pem_x509_csr(request.pem)
        sound = parsed.is_signature_valid
        key = parsed.public_key()
    except (ValueError, TypeError, InvalidSignature, x509.UnsupportedGeneralNameType) as error:
        raise Denied(f"the request cannot be read: {error}") from None
    if not sound:
        raise Denied("the request's signature does not fit its key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.key_size < 256:
        raise Denied("the key must be of an elliptic curve of 256 bits or more")
    return parsed


def _common_name(parsed: x509.CertificateSigningRequest) -> str:
    names = [str(attribute.value) for attribute in parsed.subject]
    common = [str(a.value) for a in parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or names != common:
        raise Denied("the subject must be a common name and nothing else")
    return common[0]


def _alternatives(parsed: x509.CertificateSigningRequest) -> list[x509.GeneralName]:
    try:
        found = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise Denied(f"the request's names cannot be read: {error}") from None
    return list(found.value)


def _own_node(request: Request, name: str, nodes: Mapping[str, StorageNode]) -> StorageNode:
    """The StorageNode whose agent the requester is."""
    if request.username != NODE_ACCOUNT:
        raise Denied(f"{NODE_PREFIX}{name} is for the agents ({NODE_ACCOUNT}) only")
    bound = list(request.extra.get(NODE_CLAIM) or ())
    if len(bound) != 1:
        raise Denied("the requester's token is bound to no node: ask with the agent's own token")
    node = nodes.get(name)
    if node is None or node.deleting:
        raise Denied(f"there is no StorageNode {name}")
    if node.spec.node_name != bound[0]:
        raise Denied(
            f"the requester's token is bound to node {bound[0]}, "
            f"StorageNode {name} is on node {node.spec.node_name}"
        )
    return node


def _node_grant(
    request: Request,
    parsed: x509.CertificateSigningRequest,
    common_name: str,
    node: StorageNode,
) -> Grant:
    allowed: set[x509.GeneralName] = {
        x509.DNSName(node.name),
        x509.IPAddress(ipaddress.ip_address(node.spec.address)),
    }
    asked = _alternatives(parsed)
    if set(asked) != allowed or len(asked) != len(allowed):
        raise Denied(
            f"the names must be DNS {node.name} and IP {node.spec.address}, "
            f"as StorageNode {node.name} has them"
        )
    wanted = {"digital signature", "client auth", "server auth"}
    if request.usages != wanted:
        raise Denied(f"the usages must be {', '.join(sorted(wanted))}")
    return Grant(common_name, parsed.public_key(), tuple(asked), server=True)


def _review(request: Request) -> dict[str, Any]:
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": request.username,
            "groups": list(request.groups),
            "extra": {key: list(values) for key, values in request.extra.items()},
            "resourceAttributes": {
                "group": "tercet.io",
                "resource": "certificates",
                "name": ADMIN,
                "verb": "use",
            },
        },
    }


class Authority:
    """The key that signs, and its certificate."""

    def __init__(self, key_pem: bytes, certificate_pem: bytes) -> None:
        key = serialization.load_pem_private_key(key_pem, password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey), "the CA's key is of an elliptic curve"
        self._key = key
        self._certificate = x509.load_pem_x509_certificate(certificate_pem)
        self.certificate_pem = certificate_pem
        assert self._certificate.public_key() == key.public_key(), "key and certificate belong"

    @staticmethod
    def draw(now: datetime) -> tuple[bytes, bytes]:
        """A new key and its self-signed certificate, both PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tercet-ca")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return secret, certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def secret(self) -> bytes:
        """The key's private number, of which other keys may be derived."""
        number = self._key.private_numbers().private_value
        return number.to_bytes(-(-self._key.curve.key_size // 8), "big")

    def sign(self, grant: Grant, now: datetime, expiration_s: int | None) -> bytes:
        """A certificate that says what was granted, PEM."""
        life = timedelta(days=LIFE_DAYS_MAX)
        if expiration_s is not None:
            life = min(life, timedelta(seconds=expiration_s))
        end = min(now + life, self._certificate.not_valid_after_utc)
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        usages += [ExtendedKeyUsageOID.SERVER_AUTH] if grant.server else []
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, grant.common_name)])
        public = self._key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject)
            .public_key(grant.public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False
            )
        )
        if grant.names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(grant.names), critical=False
            )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
