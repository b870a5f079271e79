"""What nodes say to each other, and its bytes.

    offset  bytes
    0       2      "TM"
    2       1      version, 1
    3       1      kind
    4       2      length of the body, big endian
    6       ...    body

    kind  message  body
    1     Change   entry
    2     Prelim   digest (16)
    3     Part     digest (16), index (2), total entries (4), flags (1: bit 0 answer), count (1),
                   ENTRIES_PER_PART entries; those after `count` are 0xff throughout
    4     Probe    nonce (8), digest of the sender's judgements (16; zero if it makes none)
    5     Ack      nonce (8), entry of who answers
    6     Relay    nonce (8), nid (4)
    7     Verdict  nid (4), instance (16), sequence (8), alive (1: 0 or 1)
    8     Heard    nid (4), sequence (8)
    9     Hello    entry of who opened the connection; its first message, and no other

All messages of a kind have the same size: how long a list is cannot be told from a message. A
message has one form only: decode(encode(m)) is m and encode(decode(b)) is b. Anything else is a
WireError, found before anything is allocated for it but the entries themselves.

Who sent it is not in a message: the connection's certificate says it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from tercet_api.enrolment import NID_BYTES, NID_MAX
from tercet_node.membership.entries import (
    ENTRY_BYTES,
    FINGERPRINT_BYTES,
    INSTANCE_BYTES,
    Entry,
    Nid,
    decode,
    encode,
)
from tercet_node.membership.errors import WireError

MAGIC = b"TM"
VERSION = 1
HEADER_BYTES = 6
NONCE_BYTES = 8
ENTRIES_PER_PART = 10
PART_HEAD_BYTES = FINGERPRINT_BYTES + 2 + 4 + 1 + 1
PART_BYTES = PART_HEAD_BYTES + ENTRIES_PER_PART * ENTRY_BYTES
PADDING = b"\xff" * ENTRY_BYTES
INDEX_MAX = (1 << 16) - 1

KIND_CHANGE, KIND_PRELIM, KIND_PART, KIND_PROBE, KIND_ACK = 1, 2, 3, 4, 5
KIND_RELAY, KIND_VERDICT, KIND_HEARD, KIND_HELLO = 6, 7, 8, 9
SEQUENCE_BYTES = 8
SEQUENCE_MAX = 2**32
"""A judgement's; one a second comes so far in a century. The next one has room in the bytes."""

BODY_BYTES = {
    KIND_CHANGE: ENTRY_BYTES,
    KIND_PRELIM: FINGERPRINT_BYTES,
    KIND_PART: PART_BYTES,
    KIND_PROBE: NONCE_BYTES + FINGERPRINT_BYTES,
    KIND_ACK: NONCE_BYTES + ENTRY_BYTES,
    KIND_RELAY: NONCE_BYTES + NID_BYTES,
    KIND_VERDICT: NID_BYTES + INSTANCE_BYTES + SEQUENCE_BYTES + 1,
    KIND_HEARD: NID_BYTES + SEQUENCE_BYTES,
    KIND_HELLO: ENTRY_BYTES,
}
MESSAGE_BYTES_MAX = HEADER_BYTES + max(BODY_BYTES.values())


@dataclass(frozen=True, slots=True)
class Change:
    """A node was added or removed (its entry says which); goes down the tree."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Prelim:
    """The preliminary check: my digest; answer if yours is another."""

    digest: int


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the full check: some of my entries, the most recently changed first."""

    digest: int
    index: int
    total: int
    """Entries in all parts together."""
    entries: tuple[Entry, ...]
    answer: bool
    """Answers another part; `popcorn`: nothing is sent in return."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A question: are you alive."""

    nonce: int
    digest: int = 0


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer: yes, and this is my entry."""

    nonce: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Relay:
    """A request: probe that node, and pass its answer on."""

    nonce: int
    nid: Nid


@dataclass(frozen=True, slots=True)
class Verdict:
    """A node's instance was judged dead, or it contradicts; goes down the tree of the living."""

    nid: Nid
    instance: bytes
    sequence: int
    alive: bool


@dataclass(frozen=True, slots=True)
class Heard:
    """A Verdict has arrived."""

    nid: Nid
    sequence: int


@dataclass(frozen=True, slots=True)
class Hello:
    """Who opened the connection: its certificate must have the entry's address."""

    entry: Entry


Message = Change | Prelim | Part | Probe | Ack | Relay | Verdict | Heard | Hello


def size_bytes(message: Message) -> int:
    """How many bytes it is on the wire. A Part of more than a message holds counts as several."""
    kind = _kind(message)
    if isinstance(message, Part):
        messages = max(1, -(-len(message.entries) // ENTRIES_PER_PART))
        return messages * (HEADER_BYTES + PART_BYTES)
    return HEADER_BYTES + BODY_BYTES[kind]


def _kind(message: Message) -> int:
    return KINDS[type(message)]


KINDS: dict[type[Message], int] = {
    Change: KIND_CHANGE,
    Prelim: KIND_PRELIM,
    Part: KIND_PART,
    Probe: KIND_PROBE,
    Ack: KIND_ACK,
    Relay: KIND_RELAY,
    Verdict: KIND_VERDICT,
    Heard: KIND_HEARD,
    Hello: KIND_HELLO,
}


def encode_message(message: Message) -> bytes:
    """Its bytes."""
    kind, body = _kind(message), _body(message)
    assert len(body) == BODY_BYTES[kind]
    return MAGIC + bytes((VERSION, kind)) + len(body).to_bytes(2, "big") + body


def _body(message: Message) -> bytes:
    match message:
        case Change(entry) | Hello(entry):
            return encode(entry)
        case Prelim(digest):
            body = digest.to_bytes(FINGERPRINT_BYTES, "big")
        case Part(digest, index, total, entries, answer):
            assert len(entries) <= ENTRIES_PER_PART
            body = b"".join(
                (
                    digest.to_bytes(FINGERPRINT_BYTES, "big"),
                    index.to_bytes(2, "big"),
                    total.to_bytes(4, "big"),
                    bytes((int(answer), len(entries))),
                    *(encode(entry) for entry in entries),
                    PADDING * (ENTRIES_PER_PART - len(entries)),
                )
            )
        case Probe(nonce, digest):
            body = nonce.to_bytes(NONCE_BYTES, "big") + digest.to_bytes(FINGERPRINT_BYTES, "big")
        case Ack(nonce, entry):
            body = nonce.to_bytes(NONCE_BYTES, "big") + encode(entry)
        case Relay(nonce, nid):
            body = nonce.to_bytes(NONCE_BYTES, "big") + nid.to_bytes(NID_BYTES, "big")
        case Verdict(nid, instance, sequence, alive):
            body = nid.to_bytes(NID_BYTES, "big") + instance
            body += sequence.to_bytes(SEQUENCE_BYTES, "big") + bytes((alive,))
        case Heard(nid, sequence):
            body = nid.to_bytes(NID_BYTES, "big") + sequence.to_bytes(SEQUENCE_BYTES, "big")
        case _:
            assert_never(message)
    return body


def body_bytes(header: bytes) -> int:
    """How many bytes follow this header. Raises WireError."""
    if len(header) != HEADER_BYTES:
        raise WireError(f"header: {len(header)} bytes, not {HEADER_BYTES}")
    if header[:2] != MAGIC or header[2] != VERSION:
        raise WireError("header: not this protocol, or another version of it")
    wanted = BODY_BYTES.get(header[3])
    if wanted is None:
        raise WireError(f"header: kind {header[3]}")
    if int.from_bytes(header[4:6], "big") != wanted:
        raise WireError(f"header: kind {header[3]} has {wanted} bytes")
    return wanted


def decode_message(raw: bytes) -> Message:
    """A message of exactly its bytes. Raises WireError."""
    wanted = body_bytes(raw[:HEADER_BYTES])
    kind, body = raw[3], raw[HEADER_BYTES:]
    if len(body) != wanted:
        raise WireError(f"body: {len(body)} bytes, not {wanted}")
    return DECODERS[kind](body)


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "big")


def _nid(raw: bytes) -> Nid:
    nid = _number(raw)
    if nid > NID_MAX:
        raise WireError(f"nid {nid} is more than {NID_MAX}")
    return Nid(nid)


def _verdict(body: bytes) -> Verdict:
    if body[28] > 1:
        raise WireError(f"verdict: alive {body[28]}")
    sequence = _number(body[20:28])
    if sequence > SEQUENCE_MAX:
        raise WireError(f"verdict: sequence {sequence} is more than {SEQUENCE_MAX}")
    return Verdict(_nid(body[:4]), body[4:20], sequence, body[28] == 1)


def _part(body: bytes) -> Part:
    digest = int.from_bytes(body[:16], "big")
    index = int.from_bytes(body[16:18], "big")
    total = int.from_bytes(body[18:22], "big")
    flags, count = body[22], body[23]
    if flags > 1:
        raise WireError(f"part: flags {flags}")
    if count > ENTRIES_PER_PART or index * ENTRIES_PER_PART + count > total:
        raise WireError(f"part {index}: {count} entries of {total}")
    places = range(PART_HEAD_BYTES, PART_BYTES, ENTRY_BYTES)
    raw = [body[at : at + ENTRY_BYTES] for at in places]
    if any(each != PADDING for each in raw[count:]):
        raise WireError(f"part {index}: what follows the entries is not padding")
    return Part(digest, index, total, tuple(decode(each) for each in raw[:count]), flags == 1)


DECODERS: dict[int, Callable[[bytes], Message]] = {
    KIND_CHANGE: lambda body: Change(decode(body)),
    KIND_PRELIM: lambda body: Prelim(_number(body)),
    KIND_PART: _part,
    KIND_PROBE: lambda body: Probe(_number(body[:8]), _number(body[8:])),
    KIND_ACK: lambda body: Ack(_number(body[:8]), decode(body[8:])),
    KIND_RELAY: lambda body: Relay(_number(body[:8]), _nid(body[8:])),
    KIND_VERDICT: _verdict,
    KIND_HEARD: lambda body: Heard(_nid(body[:4]), _number(body[4:])),
    KIND_HELLO: lambda body: Hello(decode(body)),
}
