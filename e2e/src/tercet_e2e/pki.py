"""The certificates of a local control plane: two authorities and what they sign.

One authority for the cluster, one for the front proxy (aggregation), as kubeadm has them. Keys are
P-256: made in a millisecond. Certificates outlive any test, and none leaves its state folder.
A key that exists is kept, so that a cluster that starts again in its folder is the same cluster.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tercet_e2e.state import write_atomically

LIFETIME = dt.timedelta(days=365)
CLOCK_SKEW = dt.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Pair:
    """The files of a certificate and its key."""

    cert: Path
    key: Path


def _pair(folder: Path, name: str) -> Pair:
    return Pair(folder / f"{name}.crt", folder / f"{name}.key")


def _write_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    encoded = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    write_atomically(path, encoded.decode())
    return key


def _name(common_name: str, organisations: Sequence[str] = ()) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, o) for o in organisations]
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def signing_key(folder: Path, name: str) -> Path:
    """The private key that signs service account tokens."""
    path = folder / f"{name}.key"
    if not path.exists():
        _write_key(path)
    return path


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority in a folder."""

    folder: Path
    files: Pair

    @classmethod
    def open(cls, folder: Path, name: str) -> Authority:
        """Opens an authority, or makes it."""
        files = _pair(folder, name)
        if not files.cert.exists():
            key = _write_key(files.key)
            subject = _name(f"tercet-local-{name}")
            usage = x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            )
            certificate = (
                _builder(subject, subject, key.public_key())
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(usage, critical=True)
                .sign(key, hashes.SHA256())
            )
            pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
            write_atomically(files.cert, pem)
        return cls(folder, files)

    def issue(
        self,
        name: str,
        common_name: str,
        *,
        organisations: Sequence[str] = (),
        addresses: Sequence[str] = (),
        dns_names: Sequence[str] = (),
    ) -> Pair:
        """A certificate for clients; with addresses or names, for servers as well."""
        files = _pair(self.folder, name)
        if files.cert.exists():
            return files
        issuer = x509.load_pem_x509_certificate(self.files.cert.read_bytes())
        issuer_key = serialization.load_pem_private_key(self.files.key.read_bytes(), None)
        assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
        key = _write_key(files.key)
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = _builder(_name(common_name, organisations), issuer.subject, key.public_key())
        if addresses or dns_names:
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
            names: list[x509.GeneralName] = [x509.DNSName(dns) for dns in dns_names]
            names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in addresses]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        certificate = (
            builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(authority_id, critical=False)
            .sign(issuer_key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        write_atomically(files.cert, pem)
        return files
