"""What the cluster's authority says of one storage node, and the bytes that it signs.

The operator gives each StorageNode a node index (nid), signs that with the node's UUID, instance
and address, and writes it to `status.enrolment`; agents pass it on to each other while the API
server is away (docs/membership.md). Who signs and who verifies share this one form of the bytes.

    offset  bytes
    0       4      nid
    4       16     UUID of the StorageNode object
    20      16     instance of its engine
    36      8      incarnation: grows with each entry that is signed for one nid
    44      1      state: 1 present, 2 gone
    45      1      length of the address
    46      64     address (HOST:PORT of its membership), padded with zeroes

Numbers are big endian. Signed (Ed25519) is CONTEXT, the cluster's UUID, then these bytes.
"""

from __future__ import annotations

NID_MAX = (1 << 20) - 1
NID_BYTES = 4
UUID_BYTES = 16
INCARNATION_BYTES = 8
ADDRESS_BYTES = 64
ENTRY_BYTES = NID_BYTES + 2 * UUID_BYTES + INCARNATION_BYTES + 1 + 1 + ADDRESS_BYTES
"""Without the signature."""
PRESENT, GONE = 1, 2

CONTEXT = b"tercet membership entry 1\0"
"""Keeps these signatures apart from all others that the key may make."""
KEY_CONTEXT = b"tercet membership key 1"
"""HKDF's info: the signing key is derived of the certificate authority's."""
KEYS_MAX = 4
"""Keys that hold at once: an entry that nobody signed costs one verification for each."""


def entry_bytes(
    nid: int, node: bytes, instance: bytes, incarnation: int, state: int, address: str
) -> bytes:
    """An entry without its signature."""
    assert 0 <= nid <= NID_MAX, nid
    assert len(node) == len(instance) == UUID_BYTES
    text = address.encode()
    assert len(text) <= ADDRESS_BYTES, f"node {nid}: its address is too long"
    return b"".join(
        (
            nid.to_bytes(NID_BYTES, "big"),
            node,
            instance,
            incarnation.to_bytes(INCARNATION_BYTES, "big"),
            bytes((state, len(text))),
            text.ljust(ADDRESS_BYTES, b"\0"),
        )
    )


def signed_bytes(cluster: bytes, entry: bytes) -> bytes:
    """What a signature is over."""
    assert len(cluster) == UUID_BYTES
    assert len(entry) == ENTRY_BYTES
    return CONTEXT + cluster + entry


def membership_address(address: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
