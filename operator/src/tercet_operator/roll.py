"""The roll of the cluster's nodes: which index each has, and the signature that vouches for it.

Pure: signing is a function of key and entry. A StorageNode gets the first gap when its engine has
reported an instance, and keeps it for ever; whenever instance or address change, or another key
signs, its entry is signed anew with a higher incarnation. When the object goes, a tombstone is
signed and kept in the register: one for each index at most.

Incarnations are milliseconds of this machine's clock, and more than every one that is known for the
index: so none is given twice although neither the operator nor a restored API server may remember
all of them. Of two nodes with one index (a write whose outcome was unknown came late) the one with
the higher incarnation keeps it, the other one gets another.
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterable
from datetime import datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tercet_api.enrolment import (
    GONE,
    KEY_CONTEXT,
    KEYS_MAX,
    PRESENT,
    entry_bytes,
    membership_address,
    signed_bytes,
)
from tercet_api.objects import Enrolment, Register, StorageNode

SEED_BYTES = 32


def signing_key(secret: bytes) -> Ed25519PrivateKey:
    """The key that signs entries, derived of the certificate authority's (32 bytes)."""
    assert len(secret) >= SEED_BYTES, "an elliptic curve's private number"
    derived = HKDF(hashes.SHA256(), SEED_BYTES, salt=None, info=KEY_CONTEXT).derive(secret)
    return Ed25519PrivateKey.from_private_bytes(derived)


class Roll:
    """Signs for one cluster."""

    def __init__(self, key: Ed25519PrivateKey, cluster: uuid.UUID) -> None:
        self._key = key
        self._cluster = cluster
        raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
        self._public = base64.b64encode(key.public_key().public_bytes(*raw)).decode()
        self._older: list[str] = []
        self._gone: dict[int, Enrolment] = {}

    def take_up(self, register: Register | None) -> None:
        """What an earlier start wrote: tombstones, and keys that go on holding."""
        if register is None or uuid.UUID(register.cluster) != self._cluster:
            return
        self._older = [key for key in register.keys if key != self._public][: KEYS_MAX - 1]
        self._gone = {tombstone.nid: tombstone for tombstone in register.gone}

    def register(self) -> Register:
        """What agents are told."""
        gone = [self._gone[nid] for nid in sorted(self._gone)]
        keys = [self._public, *self._older]
        return Register(cluster=str(self._cluster), keys=keys, gone=gone)

    # ------------------------------------------------------------------ decisions

    def enrolled(
        self, node: StorageNode, nodes: Iterable[StorageNode], wall: datetime
    ) -> Enrolment:
        """The entry that the node shall have: its present one while that is right."""
        assert node.status.instance is not None
        others = [held for other in nodes if (held := self._held_by(other, node)) is not None]
        held = node.status.enrolment
        address = membership_address(node.spec.address, node.spec.ports.membership)
        if held is None or held.node != node.uid or _older(held, others):
            taken = {other.nid for other in others}
            nid = next(number for number in range(len(taken) + 1) if number not in taken)
        else:
            nid = held.nid
            same = (held.instance, held.address) == (node.status.instance, address)
            if same and not held.gone and self._vouches(held):
                return held
        return self._signed(
            Enrolment(
                nid=nid,
                node=node.uid,
                instance=node.status.instance,
                address=address,
                incarnation=self._next(nid, held, wall),
            )
        )

    def tombstone(self, node: StorageNode, wall: datetime) -> Enrolment | None:
        """The entry of a node that goes; None for one that never was enrolled."""
        held = node.status.enrolment
        if held is None or not self._vouches(held):
            return None
        buried = self._gone.get(held.nid)
        if buried is not None and buried.incarnation > held.incarnation:
            return buried
        incarnation = self._next(held.nid, held, wall)
        return self._signed(held.model_copy(update={"incarnation": incarnation, "gone": True}))

    def bury(self, tombstone: Enrolment) -> None:
        """Keep it."""
        self._gone[tombstone.nid] = tombstone

    def _held_by(self, other: StorageNode, node: StorageNode) -> Enrolment | None:
        held = other.status.enrolment
        if other.name == node.name or held is None or held.node != other.uid:
            return None
        # Agents may write their own object: what we did not sign takes no index.
        return held if self._vouches(held) else None

    def _next(self, nid: int, held: Enrolment | None, wall: datetime) -> int:
        known = [held.incarnation] if held is not None and held.nid == nid else []
        known += [self._gone[nid].incarnation] if nid in self._gone else []
        return max(int(wall.timestamp() * 1000), *(number + 1 for number in known), 1)

    # ------------------------------------------------------------------ signatures

    def _vouches(self, held: Enrolment) -> bool:
        try:
            token = base64.b64decode(held.signature, validate=True)
            self._key.public_key().verify(token, self._bytes(held))
        except (InvalidSignature, ValueError):
            return False
        return True

    def _signed(self, enrolment: Enrolment) -> Enrolment:
        signature = base64.b64encode(self._key.sign(self._bytes(enrolment))).decode()
        return enrolment.model_copy(update={"signature": signature})

    def _bytes(self, enrolment: Enrolment) -> bytes:
        entry = entry_bytes(
            enrolment.nid,
            uuid.UUID(enrolment.node).bytes,
            uuid.UUID(enrolment.instance).bytes,
            enrolment.incarnation,
            GONE if enrolment.gone else PRESENT,
            enrolment.address,
        )
        return signed_bytes(self._cluster.bytes, entry)


def _older(held: Enrolment, others: Iterable[Enrolment]) -> bool:
    """Whether somebody else has the same index by a newer entry."""
    return any(other.nid == held.nid and other.incarnation >= held.incarnation for other in others)
