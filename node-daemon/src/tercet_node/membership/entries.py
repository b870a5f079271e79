"""An entry of the membership list: who has a node index, where it is, and what vouches for it.

Both policies have the same entry. They differ in what its token is and how it enters the list's
digest, which is the XOR of the fingerprints of all entries:

- `popcorn`: 16 random bytes drawn when the node is added; the fingerprint is the token itself.
- `versioned`: a signature over everything else (seals.py), so that nobody can add or remove a
  node by speaking the protocol; the fingerprint is SHA-256 of the entry cut to 16 bytes. The state
  is among what is signed: whoever has heard of an entry could make a removal of it otherwise.

An entry is immutable and knows its fingerprint, so that one object serves every list it is in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NewType

from tercet_api import enrolment
from tercet_api.enrolment import (
    ADDRESS_BYTES,
    NID_MAX,
    UUID_BYTES,
    entry_bytes,
)
from tercet_api.enrolment import ENTRY_BYTES as UNSIGNED_BYTES
from tercet_node.membership.errors import WireError

Nid = NewType("Nid", int)
"""A node's index: its place in tree and ring. It never changes; gaps are taken by newcomers."""

Incarnation = NewType("Incarnation", int)
"""Grows with each entry that the authority signs for one nid."""

NODE_BYTES = INSTANCE_BYTES = UUID_BYTES
TOKEN_BYTES = 16
SIGNATURE_BYTES = 64
FINGERPRINT_BYTES = 16

ENTRY_BYTES = UNSIGNED_BYTES + 1 + SIGNATURE_BYTES
"""One entry on the wire; all have the same size."""


class State(IntEnum):
    """What an entry says of its node."""

    PRESENT = enrolment.PRESENT
    GONE = enrolment.GONE
    """A tombstone: removed; kept so that older news cannot bring the node back."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One node. Equal when every field is."""

    nid: Nid
    node: bytes
    """UUID of the StorageNode."""
    instance: bytes
    address: str
    incarnation: Incarnation
    state: State
    token: bytes
    fingerprint: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert 0 <= self.nid <= NID_MAX, self.nid
        assert len(self.node) == NODE_BYTES
        assert len(self.instance) == INSTANCE_BYTES
        assert len(self.token) in {TOKEN_BYTES, SIGNATURE_BYTES}
        if len(self.token) == TOKEN_BYTES:
            value = int.from_bytes(self.token, "big")
        else:
            whole = hashlib.sha256(encode(self)).digest()
            value = int.from_bytes(whole[:FINGERPRINT_BYTES], "big")
        object.__setattr__(self, "fingerprint", value)

    @property
    def present(self) -> bool:
        """Whether its node is a member."""
        return self.state is State.PRESENT


def unsigned(entry: Entry) -> bytes:
    """Everything but the token: what a signature is over."""
    return entry_bytes(
        entry.nid, entry.node, entry.instance, entry.incarnation, entry.state, entry.address
    )


def encode(entry: Entry) -> bytes:
    """The entry as ENTRY_BYTES bytes."""
    token = bytes((len(entry.token),)) + entry.token.ljust(SIGNATURE_BYTES, b"\0")
    return unsigned(entry) + token


def decode(raw: bytes) -> Entry:
    """An entry of its bytes, of which exactly one form is accepted. Raises WireError."""
    if len(raw) != ENTRY_BYTES:
        raise WireError(f"entry: {len(raw)} bytes, not {ENTRY_BYTES}")
    nid = int.from_bytes(raw[0:4], "big")
    if nid > NID_MAX:
        raise WireError(f"entry: nid {nid} is more than {NID_MAX}")
    if raw[44] not in (State.PRESENT, State.GONE):
        raise WireError(f"entry {nid}: state {raw[44]}")
    length = raw[45]
    if length > ADDRESS_BYTES or raw[46 + length : UNSIGNED_BYTES].strip(b"\0"):
        raise WireError(f"entry {nid}: its address is not padded with zeroes")
    try:
        address = raw[46 : 46 + length].decode()
    except UnicodeDecodeError as error:
        raise WireError(f"entry {nid}: its address is not UTF-8") from error
    token_length = raw[UNSIGNED_BYTES]
    token = raw[UNSIGNED_BYTES + 1 : UNSIGNED_BYTES + 1 + token_length]
    if token_length not in (TOKEN_BYTES, SIGNATURE_BYTES):
        raise WireError(f"entry {nid}: a token of {token_length} bytes")
    if raw[UNSIGNED_BYTES + 1 + token_length :].strip(b"\0"):
        raise WireError(f"entry {nid}: its token is not padded with zeroes")
    return Entry(
        Nid(nid),
        raw[4:20],
        raw[20:36],
        address,
        Incarnation(int.from_bytes(raw[36:44], "big")),
        State(raw[44]),
        token,
    )


def newer(one: Entry, other: Entry) -> Entry:
    """Which of two entries for one nid holds: a total order, the same on every node.

    The higher incarnation; of one incarnation the removal; then the higher fingerprint, which
    cannot happen while the authority signs each incarnation once. It does not depend on who holds
    which, so lists merge to the same whatever the order in which they meet.
    """
    assert one.nid == other.nid

    def rank(entry: Entry) -> tuple[int, int, int]:
        return (entry.incarnation, entry.state, entry.fingerprint)

    return max(one, other, key=rank)
