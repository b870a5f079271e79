"""Membership machines on a network of the tests: real bytes, a clock, losses, doubles."""

from __future__ import annotations

import random
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tercet_node.membership import (
    Entry,
    Incarnation,
    Nid,
    Received,
    Send,
    Settings,
    State,
    Tick,
    decode_message,
    encode_message,
    sign,
)

CLUSTER = bytes(range(16))
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
FAULTS = Settings(faults=True)


def entry(nid: int, incarnation: int = 1, state: State = State.PRESENT) -> Entry:
    """As popcorn has them: 16 random bytes, drawn once for (nid, incarnation)."""
    token = random.Random(f"{nid} {incarnation}").randbytes(16)
    node = nid.to_bytes(16, "big")
    address = f"10.0.0.{nid % 256}:4424"
    return Entry(Nid(nid), node, node, address, Incarnation(incarnation), state, token)


def gone(nid: int, incarnation: int = 1) -> Entry:
    """A removal."""
    return entry(nid, incarnation, State.GONE)


def signed(nid: int, incarnation: int = 1, state: State = State.PRESENT, key=KEY) -> Entry:
    """As versioned has them."""
    return sign(entry(nid, incarnation, state), CLUSTER, key)


def unsigned(nid: int, incarnation: int = 1, state: State = State.PRESENT) -> Entry:
    """Shaped as versioned has them, for lists behind an open seal."""
    whole = entry(nid, incarnation, state)
    return replace(whole, token=(whole.token * 4)[:63] + bytes([state]))


class Net:
    """Nodes, and the messages between them in the order in which they were sent."""

    def __init__(self, machines, seed=0, drop=0.0, double=0.0):
        self.machines = {machine.me: machine for machine in machines}
        self.rng = random.Random(seed)
        self.drop, self.double = drop, double
        self.cut: set[tuple[int, int]] = set()
        self.effects = []
        self.waiting = []
        self.now_s = 0.0

    def tell(self, nid, event):
        """An event for one node, and all that follows."""
        self._take(nid, self.machines[nid].step(event, self.now_s))
        self.settle()

    def settle(self):
        while self.waiting:
            sender, send = self.waiting.pop(0)
            lost = self.rng.random() < self.drop or (sender, send.to) in self.cut
            if lost or send.to not in self.machines:
                continue
            for _ in range(1 + (self.rng.random() < self.double)):
                message = decode_message(encode_message(send.message))
                step = self.machines[send.to].step(Received(sender, message), self.now_s)
                self._take(send.to, step)

    def _take(self, nid, effects):
        for effect in effects:
            if isinstance(effect, Send):
                self.waiting.append((nid, effect))
            else:
                self.effects.append((nid, effect))

    def run(self, until_s):
        """Let time pass: ticks when machines want them."""
        while True:
            wake_s, nid = min((m.wake_s, m.me) for m in self.machines.values())
            if wake_s > until_s:
                break
            self.now_s = max(self.now_s, wake_s)
            self.tell(nid, Tick())
        self.now_s = until_s

    def digests(self):
        return {machine.list.digest for machine in self.machines.values()}
