"""A whole node: the list, and who of it is alive. What the agent drives.

The two do not know each other. Here messages are given to whom they are for; the detector hears of
changes of the list, and the list of who is held dead, so that news and checks go round the dead.
"""

from __future__ import annotations

from tercet_node.membership.detector import Detector
from tercet_node.membership.events import (
    Changed,
    Dead,
    Effect,
    Event,
    Judged,
    Received,
    Suspected,
    Tick,
)
from tercet_node.membership.messages import Ack, Heard, Probe, Relay, Verdict
from tercet_node.membership.versioned import VersionedMachine

Outcome = Effect | Judged | Suspected


class Node:
    """One node of a cluster."""

    def __init__(self, machine: VersionedMachine, now_s: float = 0.0, first_nonce: int = 0) -> None:
        self.machine = machine
        self.detector = Detector(machine.own, machine.list, now_s, first_nonce)

    @property
    def wake_s(self) -> float:
        """When it wants a Tick."""
        return min(self.machine.wake_s, self.detector.wake_s)

    def step(self, event: Event, now_s: float) -> list[Outcome]:
        """Take an event; says what is to be done. Raises CommandError for commands only."""
        effects: list[Outcome] = []
        detectors = isinstance(event, Received) and isinstance(
            event.message, Probe | Ack | Relay | Verdict | Heard
        )
        if not detectors:
            effects += self.machine.step(event, now_s)
            if any(isinstance(effect, Changed) for effect in effects):
                self.detector.members(self.machine.list, now_s)
        if detectors or isinstance(event, Tick):
            assert isinstance(event, Received | Tick)
            effects += self.detector.step(event, now_s)
        dead = self.detector.dead
        if dead != self.machine.dead:
            self.machine.step(Dead(dead), now_s)
        return effects
