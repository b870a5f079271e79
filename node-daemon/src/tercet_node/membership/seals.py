"""What vouches for an entry: the seam between the list and the cluster's keys.

`Seal.holds` says whether an entry comes from who may add and remove nodes. Behind it:

- `Ed25519Seal`: public keys of the cluster's authority. A token is a signature over the cluster's
  UUID and all other fields of the entry. Several keys may hold at once: a key is rotated by
  letting the new one hold everywhere, then signing with it, then dropping the old one; no restart.
- `OpenSeal`: everything holds: the source's protocol has nothing to check, and a simulation that
  asks about convergence need not spend its time on signatures.

Verifying is the expensive step (about 0.1 ms), so it comes after the comparison of versions: an
entry that would change nothing is never verified.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tercet_api.enrolment import KEYS_MAX, UUID_BYTES, signed_bytes
from tercet_node.membership.entries import SIGNATURE_BYTES, Entry, unsigned

CLUSTER_BYTES = UUID_BYTES

UNSIGNED = bytes(SIGNATURE_BYTES)


class Seal(Protocol):
    """Says whether an entry was made by who may."""

    def holds(self, entry: Entry) -> bool:
        """Whether the entry's token vouches for it."""
        ...


class OpenSeal:
    """Everything holds."""

    def holds(self, entry: Entry) -> bool:
        """True."""
        del entry
        return True


class Ed25519Seal:
    """Signatures of the cluster's authority."""

    def __init__(self, cluster: bytes, keys: Iterable[Ed25519PublicKey]) -> None:
        assert len(cluster) == CLUSTER_BYTES
        self._cluster = cluster
        self._keys = tuple(keys)
        assert 1 <= len(self._keys) <= KEYS_MAX

    def holds(self, entry: Entry) -> bool:
        """Whether one of the keys has signed it for this cluster."""
        if len(entry.token) != SIGNATURE_BYTES:
            return False
        message = signed_bytes(self._cluster, unsigned(entry))
        for key in self._keys:
            try:
                key.verify(entry.token, message)
            except InvalidSignature:
                continue
            return True
        return False


def sign(entry: Entry, cluster: bytes, key: Ed25519PrivateKey) -> Entry:
    """The entry with a token that vouches for it."""
    assert len(cluster) == CLUSTER_BYTES
    return replace(entry, token=key.sign(signed_bytes(cluster, unsigned(entry))))
