"""What the operator has signed, as the machines take it."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tercet_api.objects import Enrolment, Register
from tercet_node.membership import Ed25519Seal, Entry, Incarnation, Nid, State
from tercet_node.membership.entries import SIGNATURE_BYTES

KEY_BYTES = 32


def entry_of(enrolment: Enrolment) -> Entry:
    """An entry, not verified. Raises ValueError."""
    token = base64.b64decode(enrolment.signature, validate=True)
    if len(token) != SIGNATURE_BYTES:
        raise ValueError(f"node {enrolment.nid}: a signature of {len(token)} bytes")
    return Entry(
        Nid(enrolment.nid),
        uuid.UUID(enrolment.node).bytes,
        uuid.UUID(enrolment.instance).bytes,
        enrolment.address,
        Incarnation(enrolment.incarnation),
        State.GONE if enrolment.gone else State.PRESENT,
        token,
    )


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose word counts: the cluster, and the keys that sign for it."""

    cluster: bytes
    keys: tuple[bytes, ...]

    @staticmethod
    def of(register: Register) -> Trust:
        """As the register has it. Raises ValueError."""
        keys = tuple(base64.b64decode(key, validate=True) for key in register.keys)
        if any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"register: a key that has not {KEY_BYTES} bytes")
        return Trust(uuid.UUID(register.cluster).bytes, keys)


class Keys:
    """A seal whose keys can be exchanged while it is used: rotation without a restart."""

    def __init__(self, trust: Trust) -> None:
        self.take(trust)

    def take(self, trust: Trust) -> None:
        """From now on these hold, and no others."""
        self.trust = trust
        keys: Sequence[Ed25519PublicKey] = [
            Ed25519PublicKey.from_public_bytes(key) for key in trust.keys
        ]
        self._seal = Ed25519Seal(trust.cluster, keys)

    def holds(self, entry: Entry) -> bool:
        """Whether the cluster's authority has signed it."""
        return self._seal.holds(entry)


def host_port(address: str) -> tuple[str, int]:
    """The two parts of an entry's address. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{address!r} is no HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)
