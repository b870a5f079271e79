"""The list on the node's disk, so that a start while the API server is away knows its cluster.

    offset      bytes
    0           2           "TL"
    2           1           version, 1
    3           1           keys (n), 1..4
    4           4           nid of this node
    8           4           entries (m)
    12          16          UUID of the cluster
    28          32 n        public keys, Ed25519
    28 + 32 n   175 m       entries as messages have them, by nid
    end         32          SHA-256 of all before

Numbers are big endian. The file is replaced as a whole. What was verified when it came is not
verified again: who can write this file can as well take the node's key beside it. A file that is
not whole is as good as none: the API server has all of it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from tercet_api.enrolment import KEYS_MAX
from tercet_node.members.roster import KEY_BYTES, Trust
from tercet_node.membership import Entry, Nid, NodeList, WireError
from tercet_node.membership.entries import ENTRY_BYTES, decode, encode
from tercet_node.membership.machine import NODES_MAX

FILE = "members"
MAGIC = b"TL\x01"
HEAD_BYTES = 28
SUM_BYTES = 32


class Spoilt(Exception):
    """The file is not what it should be: says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a node knows of its cluster."""

    nid: Nid
    trust: Trust
    members: NodeList

    @property
    def me(self) -> Entry | None:
        """The node's own entry."""
        return self.members.get(self.nid)


def encoded(kept: Kept) -> bytes:
    """The file's bytes."""
    assert 1 <= len(kept.trust.keys) <= KEYS_MAX
    head = b"".join(
        (
            MAGIC,
            bytes((len(kept.trust.keys),)),
            kept.nid.to_bytes(4, "big"),
            kept.members.entries.to_bytes(4, "big"),
            kept.trust.cluster,
        )
    )
    whole = head + b"".join(kept.trust.keys) + b"".join(map(encode, kept.members))
    return whole + hashlib.sha256(whole).digest()


def decoded(raw: bytes) -> Kept:
    """What the bytes say. Raises Spoilt."""
    if len(raw) < HEAD_BYTES + SUM_BYTES or raw[:3] != MAGIC:
        raise Spoilt("no list of members, or of another version")
    if hashlib.sha256(raw[:-SUM_BYTES]).digest() != raw[-SUM_BYTES:]:
        raise Spoilt("its sum does not fit")
    keys, entries = raw[3], int.from_bytes(raw[8:12], "big")
    begin = HEAD_BYTES + keys * KEY_BYTES
    if not 1 <= keys <= KEYS_MAX or entries > NODES_MAX:
        raise Spoilt(f"{keys} keys, {entries} entries")
    if len(raw) != begin + entries * ENTRY_BYTES + SUM_BYTES:
        raise Spoilt(f"{len(raw)} bytes are not those of {keys} keys and {entries} entries")
    trusted = tuple(raw[at : at + KEY_BYTES] for at in range(HEAD_BYTES, begin, KEY_BYTES))
    places = range(begin, len(raw) - SUM_BYTES, ENTRY_BYTES)
    try:
        found = NodeList.of(decode(raw[at : at + ENTRY_BYTES]) for at in places)
    except WireError as error:
        raise Spoilt(str(error)) from error
    return Kept(Nid(int.from_bytes(raw[4:8], "big")), Trust(raw[12:28], trusted), found)


def load(folder: Path) -> Kept | None:
    """What an earlier start has left. Raises Spoilt."""
    try:
        return decoded((folder / FILE).read_bytes())
    except FileNotFoundError:
        return None


def save(folder: Path, kept: Kept) -> None:
    """Replace the file as a whole."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = folder / f"{FILE}.new"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(encoded(kept))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / FILE)
