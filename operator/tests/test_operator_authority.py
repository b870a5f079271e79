"""Who gets which certificate, and what stands in it."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from operator_world import node

from tercet_operator.authority import (
    CSI_CONTROLLER_ACCOUNT,
    LIFE_DAYS_MAX,
    NODE_ACCOUNT,
    NODE_CLAIM,
    Authority,
    Denied,
    Grant,
    NeedsReview,
    Request,
    judge,
    undecided,
)

NODES = {"n1": node("n1"), "n2": node("n2")}
BOTH = ("digital signature", "client auth", "server auth")
CLIENT = ("digital signature", "client auth")
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def names(dns: str, address: str) -> list[x509.GeneralName]:
    """A node's names."""
    return [x509.DNSName(dns), x509.IPAddress(ipaddress.ip_address(address))]


def pem(
    subject: Sequence[tuple[x509.ObjectIdentifier, str]],
    alternatives: Sequence[x509.GeneralName] = (),
    key: Any = None,
) -> bytes:
    """A request as an agent makes it."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(kind, text) for kind, text in subject])
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    key = key or ec.generate_private_key(ec.SECP256R1())
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def common(text: str) -> list[tuple[x509.ObjectIdentifier, str]]:
    """A subject of one common name."""
    return [(NameOID.COMMON_NAME, text)]


def request(body: bytes, **changes: Any) -> Request:
    """As the API server stores it for the agent of n1."""
    spec: dict[str, Any] = {
        "username": NODE_ACCOUNT,
        "groups": ["system:serviceaccounts"],
        "extra": {NODE_CLAIM: ["machine-n1"]},
        "request": base64.b64encode(body).decode(),
        "usages": list(BOTH),
        **changes,
    }
    return Request.of({"metadata": {"name": "csr-1", "uid": "u"}, "spec": spec})


OWN = pem(common("storagenode:n1"), names("n1", "127.0.1.1"))


def test_an_agent_gets_its_own_nodes_certificate() -> None:
    """The subject, both names, both usages, no longer than asked for."""
    grant = judge(request(OWN), NODES)
    assert isinstance(grant, Grant)
    authority = Authority(*Authority.draw(NOW))
    signed = x509.load_pem_x509_certificate(authority.sign(grant, NOW, 3600))
    ca = x509.load_pem_x509_certificate(authority.certificate_pem)
    signed.verify_directly_issued_by(ca)
    assert signed.subject.rfc4514_string() == "CN=storagenode:n1"
    found = signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(found) == names("n1", "127.0.1.1")
    usages = signed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    assert not signed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert signed.not_valid_after_utc == NOW + timedelta(seconds=3600)
    longest = x509.load_pem_x509_certificate(authority.sign(grant, NOW, 10**9))
    assert longest.not_valid_after_utc == NOW + timedelta(days=LIFE_DAYS_MAX)


@pytest.mark.parametrize(
    ("body", "changes", "why"),
    [
        (OWN, {"extra": {NODE_CLAIM: ["machine-n2"]}}, "bound to node machine-n2"),
        (OWN, {"extra": {}}, "bound to no node"),
        (OWN, {"extra": {NODE_CLAIM: ["machine-n1", "machine-n2"]}}, "bound to no node"),
        (OWN, {"username": CSI_CONTROLLER_ACCOUNT}, "for the agents"),
        (OWN, {"username": "system:serviceaccount:default:tercet-node"}, "for the agents"),
        (OWN, {"usages": list(CLIENT)}, "usages must be"),
        (OWN, {"usages": [*BOTH, "cert sign"]}, "usages must be"),
        (
            pem(common("storagenode:n3"), names("n3", "127.0.1.3")),
            {},
            "there is no StorageNode n3",
        ),
        (
            pem(common("storagenode:n1"), names("n1", "127.0.1.2")),
            {},
            "names must be",
        ),
        (
            pem(common("storagenode:n1"), [*names("n1", "127.0.1.1"), x509.DNSName("n2")]),
            {},
            "names must be",
        ),
        (pem(common("storagenode:n1")), {}, "names must be"),
        (
            pem([*common("storagenode:n1"), (NameOID.ORGANIZATION_NAME, "system:masters")]),
            {},
            "nothing else",
        ),
        (pem([*common("storagenode:n1"), *common("admin")]), {}, "nothing else"),
        (pem(common("system:masters")), {}, "expected storagenode"),
        (pem(common("csi-controller")), {"usages": list(CLIENT)}, "csi-controller"),
        (
            pem(common("csi-controller")),
            {"username": CSI_CONTROLLER_ACCOUNT},
            "for client auth",
        ),
        (
            pem(common("admin"), [x509.DNSName("n1")]),
            {"usages": list(CLIENT)},
            "without other names",
        ),
        (b"-----BEGIN CERTIFICATE REQUEST-----\ngarbage\n", {}, "cannot be read"),
        (b"", {}, "cannot be read"),
        (b"x" * 20_000, {}, "more than"),
        (
            pem(
                common("storagenode:n1"),
                names("n1", "127.0.1.1"),
                rsa.generate_private_key(65537, 2048),
            ),
            {},
            "elliptic curve",
        ),
    ],
)
def test_everybody_else_is_denied(body: bytes, changes: dict[str, Any], why: str) -> None:
    """With the reason."""
    with pytest.raises(Denied, match=why):
        judge(request(body, **changes), NODES)


def test_a_request_that_was_tampered_with() -> None:
    """Its signature must be that of its key."""
    body = bytearray(x509.load_pem_x509_csr(OWN).public_bytes(serialization.Encoding.DER))
    body[-1] ^= 1
    forged = base64.encodebytes(bytes(body)).decode()
    text = f"-----BEGIN CERTIFICATE REQUEST-----\n{forged}-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(Denied):
        judge(request(text.encode()), NODES)


def test_clients() -> None:
    """The csi controller by its account; an admin by what the API server says of the user."""
    mine = judge(
        request(
            pem(common("csi-controller")),
            username=CSI_CONTROLLER_ACCOUNT,
            usages=list(CLIENT),
        ),
        NODES,
    )
    assert isinstance(mine, Grant)
    assert not mine.server
    asked = judge(request(pem(common("admin")), username="jo", usages=list(CLIENT)), NODES)
    assert isinstance(asked, NeedsReview)
    spec = asked.review["spec"]
    assert spec["user"] == "jo"
    assert spec["extra"] == {NODE_CLAIM: ["machine-n1"]}
    assert spec["resourceAttributes"]["verb"] == "use"


def test_decided_requests_are_left_alone() -> None:
    """Approved and not signed is undecided: the operator died in between."""
    assert undecided({})
    assert undecided({"status": {"conditions": [{"type": "Approved"}]}})
    assert not undecided({"status": {"conditions": [{"type": "Denied"}]}})
    assert not undecided({"status": {"certificate": "x"}})
