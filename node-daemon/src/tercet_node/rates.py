"""How fast replicas are copied to, from one Status of the engine to the next (pure).

The engine counts bytes; people want to know when it will be done. A rate is smoothed over about ten
seconds, so that the pace changing with the hosts' work does not make the figure jump.
"""

from __future__ import annotations

from dataclasses import dataclass

from tercet_node.protos import engine_pb2 as pb

SMOOTHED_S = 10.0
"""Time over which a rate is smoothed."""
LEAST_S = 0.5
"""Two looks closer together than this say nothing of a rate."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Of a copy to one replica."""

    at_s: float
    done_bytes: int
    sent_bytes: int
    done_per_s: float | None = None
    """Bytes that became equal in a second, holes included: how fast the end comes nearer."""
    sent_per_s: float | None = None
    """Bytes that went over."""

    def seconds_left(self, total_bytes: int) -> int | None:
        """Until all is equal, at this rate."""
        if not self.done_per_s:
            return None
        return round(max(0, total_bytes - self.done_bytes) / self.done_per_s)


def follow(before: Rate | None, copy: pb.CopyStatus, now_s: float) -> Rate:
    """The rate after one more look; from nothing where a pass, or an epoch, begins anew."""
    fresh = Rate(now_s, copy.done_bytes, copy.sent_bytes)
    if before is None or copy.sent_bytes < before.sent_bytes or copy.done_bytes < before.done_bytes:
        return fresh
    passed_s = now_s - before.at_s
    if passed_s < LEAST_S:
        return before
    weight = min(1.0, passed_s / SMOOTHED_S)

    def smooth(old: float | None, change: int) -> float:
        new = change / passed_s
        return new if old is None else old + (new - old) * weight

    return Rate(
        now_s,
        copy.done_bytes,
        copy.sent_bytes,
        smooth(before.done_per_s, copy.done_bytes - before.done_bytes),
        smooth(before.sent_per_s, copy.sent_bytes - before.sent_bytes),
    )


def follow_all(before: dict[str, Rate], status: pb.StatusResponse, now_s: float) -> dict[str, Rate]:
    """The rates of every copy from this engine, by the target's replica id."""
    return {
        member.replica: follow(before.get(member.replica), member.copy, now_s)
        for replica in status.replicas
        for member in replica.members
        if member.HasField("copy")
    }
