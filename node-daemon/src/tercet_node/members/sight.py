"""The list and who of it is alive, at one moment: what the rest of the agent and people see."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from tercet_api.objects import StorageNode
from tercet_node.members.roster import host_port
from tercet_node.membership import Entry, Nid, Node, NodeList


class Standing(StrEnum):
    """What a node holds of another. A hint: nothing that replication decides depends on it."""

    SELF = "Self"
    ALIVE = "Alive"
    SUSPECTED = "Suspected"
    """It did not answer in time; not judged yet. Only its neighbours know."""
    DEAD = "Dead"
    """It did not answer six times, nor others that asked it. It is a member still."""
    GONE = "Gone"
    """Its StorageNode was removed: no member any more."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Costs nothing to make: the list is persistent."""

    nid: Nid
    members: NodeList
    dead: int
    """Bits by nid."""
    suspected: frozenset[Nid]
    locked: bool

    @staticmethod
    def of(node: Node) -> Sight:
        """As it is now."""
        return Sight(
            node.machine.me,
            node.machine.list,
            node.detector.dead,
            frozenset(node.detector.suspected),
            node.machine.locked,
        )

    @property
    def size(self) -> int:
        """Members."""
        return len(self.members)

    @property
    def digest(self) -> str:
        """Nodes with the same one have the same list."""
        return f"{self.members.digest:032x}"

    def standing(self, entry: Entry) -> Standing:
        """Of one entry."""
        if not entry.present:
            return Standing.GONE
        if entry.nid == self.nid:
            return Standing.SELF
        if self.dead >> entry.nid & 1:
            return Standing.DEAD
        return Standing.SUSPECTED if entry.nid in self.suspected else Standing.ALIVE

    def standings(self, nodes: Iterable[StorageNode]) -> dict[str, str]:
        """Of the other members, by name."""
        by_uid = {node.uid: node.name for node in nodes}
        found = {}
        for entry in self.members:
            name = by_uid.get(str(uuid.UUID(bytes=entry.node)))
            if name is not None and entry.present and entry.nid != self.nid:
                found[name] = self.standing(entry).value
        return found

    def find(self, uid: str) -> Entry | None:
        """The newest entry of a StorageNode."""
        node = uuid.UUID(uid).bytes
        found = [entry for entry in self.members if entry.node == node]
        return max(found, key=lambda entry: entry.incarnation, default=None)

    def address(self, uid: str) -> tuple[str, int] | None:
        """A member's IP address, and the incarnation of the entry that says so."""
        entry = self.find(uid)
        if entry is None or not entry.present:
            return None
        return host_port(entry.address)[0], entry.incarnation
