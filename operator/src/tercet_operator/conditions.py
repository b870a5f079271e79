"""Conditions: what an object is, in words that programs and people read.

A `Verdict` says one condition; `status_actions` compares what is said with what shall be said and
gives the one write that is needed, with an Event for each condition that changed its status or its
reason. So Events follow from transitions and cannot storm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tercet_api.objects import Condition, ConditionStatus
from tercet_operator.actions import Action, Notice, Severity, WriteStatus
from tercet_operator.world import Moment

MESSAGE_CHARS_MAX = 1024
READY = "Ready"
PLACED = "Placed"
DEGRADED = "Degraded"
REBUILDING = "Rebuilding"
DELETING = "Deleting"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one condition shall say; good: whether a person can lean back."""

    type: str
    holds: bool | None
    reason: str
    message: str
    good: bool

    @property
    def status(self) -> ConditionStatus:
        """True, False, or Unknown for None."""
        if self.holds is None:
            return ConditionStatus.UNKNOWN
        return ConditionStatus.TRUE if self.holds else ConditionStatus.FALSE


def find(conditions: Sequence[Condition], kind: str) -> Condition | None:
    """The condition of this type."""
    return next((condition for condition in conditions if condition.type == kind), None)


def merged(
    before: Sequence[Condition], verdicts: Sequence[Verdict], now: Moment, generation: int
) -> list[Condition]:
    """The conditions with these verdicts in; transition times move only with the status."""
    said = {verdict.type: verdict for verdict in verdicts}
    order = [*(c.type for c in before), *(k for k in said if find(before, k) is None)]
    result = []
    for kind in order:
        old, verdict = find(before, kind), said.get(kind)
        if verdict is None:
            assert old is not None
            result.append(old)
            continue
        moved = old is None or old.status is not verdict.status
        result.append(
            Condition(
                type=kind,
                status=verdict.status,
                reason=verdict.reason,
                message=verdict.message[:MESSAGE_CHARS_MAX],
                last_transition_time=now.text if moved or old is None else old.last_transition_time,
                observed_generation=generation,
            )
        )
    return result


def notices(before: Sequence[Condition], verdicts: Sequence[Verdict]) -> list[Notice]:
    """An Event for each condition whose status or reason changes."""
    result: list[Notice] = []
    for verdict in verdicts:
        old = find(before, verdict.type)
        if old is not None and (old.status, old.reason) == (verdict.status, verdict.reason):
            continue
        if old is None and verdict.type == DEGRADED and not verdict.holds:
            continue  # a new volume that is not degraded is no news
        severity = Severity.NORMAL if verdict.good else Severity.WARNING
        notice = Notice(verdict.reason, verdict.message, severity)
        if notice not in result:  # two conditions may turn for one cause
            result.append(notice)
    return result


def status_actions(
    status: Any,
    verdicts: Sequence[Verdict],
    now: Moment,
    generation: int,
    members: dict[str, Any],
    *,
    exact: bool = False,
) -> list[Action]:
    """The write that makes status say this, and its Events; nothing when it says so already.

    members: further members of status by their JSON names.
    """
    before = status.to_json()
    conditions = merged(status.conditions, verdicts, now, generation)
    wanted = {
        **members,
        "conditions": [condition.to_json() for condition in conditions],
        "observedGeneration": generation,
    }
    changed = {key: value for key, value in wanted.items() if before.get(key) != value}
    if not changed:
        return []
    return [WriteStatus(changed, exact), *notices(status.conditions, verdicts)]
