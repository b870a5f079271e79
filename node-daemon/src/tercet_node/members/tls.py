"""Who is at the other end: TLS 1.3, a certificate of the cluster's CA on both sides.

A node's certificate names the address of its StorageNode, and the operator signs no other. Who
opens a connection to an entry's address asks for a certificate with that address; who is called
compares the address of the caller's certificate with that of the (signed) entry it shows.

Each connection has session keys of its own; there are neither resumption tickets nor early data,
so nothing that was recorded on one connection can be said again on another.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

NODE_PREFIX = "storagenode:"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class NotANode(Exception):
    """The certificate is not one of a node: says why."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """For calling, and for being called."""

    client: ssl.SSLContext
    server: ssl.SSLContext


def contexts(pair: Path, ca: bytes) -> Contexts:
    """Of a file that has key and certificate. Raises OSError (ssl.SSLError)."""
    found = []
    for side in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=ca.decode())
        context.load_cert_chain(pair)
        found.append(context)
    client, server = found
    assert client.check_hostname, "the called one must be who is called"
    server.num_tickets = 0
    return Contexts(client, server)


def peer_addresses(transport: asyncio.BaseTransport) -> frozenset[Address]:
    """The addresses that the peer's (verified) certificate names. Raises NotANode."""
    certificate = transport.get_extra_info("peercert") or {}
    subject = [value for part in certificate.get("subject", ()) for _, value in part]
    if len(subject) != 1 or not subject[0].startswith(NODE_PREFIX):
        raise NotANode(f"the certificate of {', '.join(subject) or 'nobody'} is not a node's")
    names = certificate.get("subjectAltName", ())
    return frozenset(ipaddress.ip_address(value) for kind, value in names if kind == "IP Address")
