"""Membership of the group of storage nodes: a Lease for each, renewed by its agent.

Ephemeral in effect: the Lease stays, its renewal expires. Expiry is judged by the observer's own
clock from the moment at which it *saw* the renewal change, never by comparing two machines' clocks;
only at the first sight, when nothing has been seen to change yet, the age written in the Lease
decides. (So a node whose clock is wrong is late once, not for ever.)

Nothing in the data path depends on this: who may write is settled by the configuration alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tercet_api.clients import Conflict, NotFound, Objects
from tercet_api.coordination.lease import Lease, LeaseSpec, micro_time, parse_time
from tercet_api.names import node_lease
from tercet_api.objects import Metadata

NODE_LEASE_DURATION_S = 10
NODE_LEASE_RENEW_S = 2.0
"""How often an agent renews; its renewals may be late four times before the node is not Ready."""


async def renew_node_lease(leases: Objects[Lease], node: str, holder: str, now: datetime) -> Lease:
    """Write a StorageNode's renewal, making its Lease where there is none. Raises ApiError.

    holder names who renews (the agent's instance), for people who look at the Lease.
    """
    spec = LeaseSpec(
        holder_identity=holder,
        lease_duration_seconds=NODE_LEASE_DURATION_S,
        renew_time=micro_time(now),
    )
    name = node_lease(node)
    try:
        return await leases.patch(name, {"spec": spec.to_json()})
    except NotFound:
        pass
    try:
        return await leases.create(Lease(metadata=Metadata(name=name), spec=spec))
    except Conflict:  # another start of this agent was first
        return await leases.patch(name, {"spec": spec.to_json()})


@dataclass(frozen=True, slots=True)
class Sighting:
    """What an observer knows of one Lease's renewals."""

    renew_time: str | None
    expires_at_s: float
    """On the observer's monotonic clock."""

    def expired(self, now_s: float) -> bool:
        """Whether the renewal no longer counts."""
        return now_s >= self.expires_at_s


def sight(before: Sighting | None, lease: Lease, now_s: float, wall: datetime) -> Sighting:
    """What is known after `lease` was seen at now_s (monotonic), wall (this machine's clock)."""
    renewed = lease.spec.renew_time
    if renewed is None:
        return Sighting(None, now_s)
    if before is not None and before.renew_time == renewed:
        return before
    duration_s = float(lease.spec.lease_duration_seconds or NODE_LEASE_DURATION_S)
    if before is None:
        age = max(wall.astimezone(UTC) - parse_time(renewed), timedelta())
        return Sighting(renewed, now_s + max(0.0, duration_s - age.total_seconds()))
    return Sighting(renewed, now_s + duration_s)
