"""Which steps a volume's configuration may take.

The same rules as CEL makes the API server enforce (`tercet_api.cel`) and as the engine's
`proto::config` has in Rust: `vectors/config_steps.json` holds the three together. Who may take a
step, and when, is left to the replication state machine (replication.md T2, T3, M1).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import combinations

from tercet_api.objects import Config, ConfigState, Member


class IllegalStep(StrEnum):
    """Why a step is refused. Where several rules are broken, the first one checked is named."""

    TAKEN_AWAY = "a configuration is never taken away"
    FIRST = "the first configuration has epoch 1 and is Recovering"
    EPOCH_FELL = "an epoch never falls"
    EDITED_EPOCH = "primary and members change only with a new epoch"
    STATE = "a new epoch starts Recovering and becomes Active once"
    PRIMARY_NO_MEMBER = "the primary is a member"
    MEMBERS = "there are 1 to 3 members on distinct nodes"
    TWO_MEMBERS = "one member changes at a time"
    PREVIOUS_MEMBERS = "while members change both sets count until Active"
    SINGLE_COPY = "singleCopy names the new primary's member, and is left with it as previous set"
    LEARNERS = "there are at most 3 learners, none of them a member"
    NEWCOMER = "a new member was a learner before"
    RESTORED = "restored equals the new epoch"


def check_step(old: Config | None, new: Config | None) -> IllegalStep | None:
    """Why the object may not go from old to new; None: it may."""
    if new is None:
        return None if old is None else IllegalStep.TAKEN_AWAY
    if old is None:
        return _check_first(new)
    if new.epoch < old.epoch:
        return IllegalStep.EPOCH_FELL
    if (wrong := _check_shape(new)) is not None:
        return wrong
    return _check_edit(old, new) if new.epoch == old.epoch else _check_new_epoch(old, new)


def _check_first(new: Config) -> IllegalStep | None:
    bare = not (new.previous_members or new.learners or new.single_copy or new.restored)
    if new.epoch != 1 or new.state is not ConfigState.RECOVERING or not bare:
        return IllegalStep.FIRST
    return _check_shape(new)


def _check_shape(new: Config) -> IllegalStep | None:  # noqa: PLR0911 - one return a rule
    """What holds for a configuration by itself."""
    previous = new.previous_members
    if not _apart(new.members) or not _apart(previous or []):
        return IllegalStep.MEMBERS
    if all(member.node != new.primary.node for member in new.members):
        return IllegalStep.PRIMARY_NO_MEMBER
    learners = new.learners or []
    clashes = any(_clash(member, learner) for member in new.members for learner in learners)
    if clashes or not _apart(learners):
        return IllegalStep.LEARNERS
    if new.state is ConfigState.ACTIVE and previous is not None:
        return IllegalStep.PREVIOUS_MEMBERS
    single = new.single_copy
    if single is not None:
        sets = [new.members] if previous is None else [new.members, previous]
        if not all(any(member.replica == single for member in each) for each in sets):
            return IllegalStep.SINGLE_COPY
    if new.restored not in {None, new.epoch}:
        return IllegalStep.RESTORED
    return None


def _check_edit(old: Config, new: Config) -> IllegalStep | None:
    """An edit within the epoch: Active, learners; nothing else."""
    if new.primary != old.primary or new.members != old.members:
        return IllegalStep.EDITED_EPOCH
    if old.state is ConfigState.ACTIVE and new.state is ConfigState.RECOVERING:
        return IllegalStep.STATE
    if new.previous_members != old.previous_members and new.state == old.state:
        return IllegalStep.PREVIOUS_MEMBERS
    if new.single_copy != old.single_copy:
        return IllegalStep.SINGLE_COPY
    if new.restored not in {None, old.restored}:
        return IllegalStep.RESTORED
    return None


def _check_new_epoch(old: Config, new: Config) -> IllegalStep | None:
    if new.state is not ConfigState.RECOVERING:
        return IllegalStep.STATE
    if new.restored is not None:
        return None  # M3: the one step that may bring any sets
    if not _single_copy_legal(old, new):
        return IllegalStep.SINGLE_COPY
    if old.single_copy is not None and new.single_copy is None:
        return None  # W6's leaving, checked above
    return _check_members(old, new)


def _single_copy_legal(old: Config, new: Config) -> bool:
    """W6, M4: entered by its own primary, carried on (T3), left with it as previous set."""
    before, after = old.single_copy, new.single_copy
    if before == after:
        return True
    if before is not None and after is not None:
        return False
    if new.members != old.members:
        return False
    if after is not None:
        return any(m.replica == after and m.node == new.primary.node for m in old.members)
    only = [member for member in old.members if member.replica == before]
    return old.previous_members is None and new.previous_members == only


def _check_members(  # noqa: PLR0911 - one return a rule
    old: Config, new: Config
) -> IllegalStep | None:
    """M1: a takeover carries both sets on; a change keeps the old set; an abort returns to it."""
    added = [member for member in new.members if member not in old.members]
    removed = [member for member in old.members if member not in new.members]
    if len(added) > 1 or len(removed) > 1:
        return IllegalStep.TWO_MEMBERS
    if new.members == old.members:
        carried = new.previous_members == old.previous_members
        return None if carried else IllegalStep.PREVIOUS_MEMBERS
    if old.previous_members is not None:
        aborted = new.members == old.previous_members and new.previous_members is None
        return None if aborted else IllegalStep.PREVIOUS_MEMBERS
    if old.state is not ConfigState.ACTIVE:
        return IllegalStep.STATE
    if new.previous_members != old.members:
        return IllegalStep.PREVIOUS_MEMBERS
    if any(member not in (old.learners or []) for member in added):
        return IllegalStep.NEWCOMER
    return None


def _clash(one: Member, other: Member) -> bool:
    """Whether two members could not stand in one set."""
    return one.node == other.node or one.replica == other.replica


def _apart(members: Sequence[Member]) -> bool:
    return not any(_clash(one, other) for one, other in combinations(members, 2))
