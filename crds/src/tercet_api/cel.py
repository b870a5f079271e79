"""The rules that the API server itself enforces, as CEL (`x-kubernetes-validations`).

Rules about one configuration stand at `status.config`. Rules about a *step* stand at the object's
root, so that a status or a configuration that is taken away is caught: below a removed field no
rule runs. `config_steps.json` holds these rules, `tercet_api.config` and the
engine's `proto::config` together.

What these rules cost is estimated by the API server from maxItems and maxLength of the schema,
which is why every list and string has one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tercet_api.config import IllegalStep
from tercet_api.objects import MEMBERS_MAX


@dataclass(frozen=True, slots=True)
class Rule:
    """One CEL expression that must hold, and what is said when it does not."""

    rule: str
    message: str


_OLD_PATH = "oldSelf.status.config"
_NEW_PATH = "self.status.config"
_OLD = f"has(oldSelf.status) && has({_OLD_PATH})"
_NEW = f"has(self.status) && has({_NEW_PATH})"


def _spelled(expression: str) -> str:
    """`old.` and `new.` as paths: the cost estimate follows paths only, not bound variables."""
    return re.sub(r"\bnew\.", f"{_NEW_PATH}.", re.sub(r"\bold\.", f"{_OLD_PATH}.", expression))


def _step(expression: str, message: IllegalStep) -> Rule:
    """A rule over two configurations that both exist."""
    return Rule(f"!({_OLD} && {_NEW}) || ({_spelled(expression)})", message.value)


def _kept(field: str) -> str:
    """That an optional field of both configurations is the same."""
    both = f"has(new.{field}) == has(old.{field})"
    return f"({both} && (!has(new.{field}) || new.{field} == old.{field}))"


def _equal(one: str, other: str) -> str:
    """That two lists of members are the same, in order.

    CEL has a type for the elements of each list, and compares only lists of one type.
    """
    alike = f"{one}[i].node == {other}[i].node && {one}[i].replica == {other}[i].replica"
    slots = list(range(MEMBERS_MAX))
    same_size = f"{one}.size() == {other}.size()"
    return f"({same_size} && {slots}.all(i, i >= {one}.size() || ({alike})))"


def _has(members: str, member: str) -> str:
    """That a list of members has this one."""
    return f"{members}.exists(o, o.node == {member}.node && o.replica == {member}.replica)"


_SAME_EPOCH = "new.epoch == old.epoch"
_SAME_MEMBERS = _equal("new.members", "old.members")
# M3: a restored step brings any sets. W6: leaving a single copy has a rule of its own.
_FREE = "has(new.restored)"
_LEAVES_SINGLE = "(has(old.singleCopy) && !has(new.singleCopy))"
_TAKEOVER = f"({_SAME_EPOCH} || {_FREE} || {_LEAVES_SINGLE})"

CONFIG_STEP_RULES = (
    Rule(f"!({_OLD}) || ({_NEW})", IllegalStep.TAKEN_AWAY.value),
    Rule(
        f"({_OLD}) || !({_NEW}) || "
        + _spelled(
            "(new.epoch == 1 && new.state == 'Recovering' && !has(new.previousMembers) && "
            "!has(new.singleCopy) && !has(new.restored) && "
            "(!has(new.learners) || new.learners.size() == 0))"
        ),
        IllegalStep.FIRST.value,
    ),
    _step("new.epoch >= old.epoch", IllegalStep.EPOCH_FELL),
    # -------------------------------------------------- edits within the epoch
    _step(
        f"!({_SAME_EPOCH}) || (new.primary.node == old.primary.node && "
        f"new.primary.instance == old.primary.instance && {_SAME_MEMBERS})",
        IllegalStep.EDITED_EPOCH,
    ),
    _step(
        f"{_SAME_EPOCH} ? !(old.state == 'Active' && new.state == 'Recovering')"
        " : new.state == 'Recovering'",
        IllegalStep.STATE,
    ),
    _step(
        f"!({_SAME_EPOCH}) || new.state != old.state || {_kept('previousMembers')}",
        IllegalStep.PREVIOUS_MEMBERS,
    ),
    _step(f"!({_SAME_EPOCH}) || {_kept('singleCopy')}", IllegalStep.SINGLE_COPY),
    _step(
        f"!({_SAME_EPOCH}) || !has(new.restored) || {_kept('restored')}",
        IllegalStep.RESTORED,
    ),
    # -------------------------------------------------- a new epoch
    _step(
        # W6, M4: entered by its own primary, or carried on; not passed to another.
        f"{_SAME_EPOCH} || {_FREE} || !has(new.singleCopy) || (has(old.singleCopy) ? "
        f"new.singleCopy == old.singleCopy : ({_SAME_MEMBERS} && old.members.exists(m, "
        "m.replica == new.singleCopy && m.node == new.primary.node)))",
        IllegalStep.SINGLE_COPY,
    ),
    _step(
        # W6: left with the single copy as previous set.
        f"{_SAME_EPOCH} || {_FREE} || !{_LEAVES_SINGLE} || ({_SAME_MEMBERS} && "
        "!has(old.previousMembers) && has(new.previousMembers) && "
        "new.previousMembers.size() == 1 && "
        "new.previousMembers[0].replica == old.singleCopy && "
        f"{_has('old.members', 'new.previousMembers[0]')})",
        IllegalStep.SINGLE_COPY,
    ),
    _step(
        f"{_TAKEOVER} || ("
        f"new.members.filter(m, !{_has('old.members', 'm')}).size() <= 1 && "
        f"old.members.filter(m, !{_has('new.members', 'm')}).size() <= 1)",
        IllegalStep.TWO_MEMBERS,
    ),
    _step(
        f"{_TAKEOVER} || !{_SAME_MEMBERS} || {_kept('previousMembers')}",
        IllegalStep.PREVIOUS_MEMBERS,
    ),
    _step(
        # M1: while both sets exist, members change only back to the old set.
        f"{_TAKEOVER} || {_SAME_MEMBERS} || !has(old.previousMembers) || "
        f"({_equal('new.members', 'old.previousMembers')} && !has(new.previousMembers))",
        IllegalStep.PREVIOUS_MEMBERS,
    ),
    _step(
        f"{_TAKEOVER} || {_SAME_MEMBERS} || has(old.previousMembers) || old.state == 'Active'",
        IllegalStep.STATE,
    ),
    _step(
        f"{_TAKEOVER} || {_SAME_MEMBERS} || has(old.previousMembers) || "
        f"(has(new.previousMembers) && {_equal('new.previousMembers', 'old.members')})",
        IllegalStep.PREVIOUS_MEMBERS,
    ),
    _step(
        f"{_TAKEOVER} || {_SAME_MEMBERS} || has(old.previousMembers) || "
        f"new.members.all(m, {_has('old.members', 'm')} || "
        f"(has(old.learners) && {_has('old.learners', 'm')}))",
        IllegalStep.NEWCOMER,
    ),
)


def _apart(members: str) -> str:
    """That no two of a list of members share a node or are one replica."""
    return (
        f"{members}.all(m, {members}.filter(o, o.node == m.node || o.replica == m.replica)"
        ".size() == 1)"
    )


CONFIG_RULES = (
    Rule(
        f"{_apart('self.members')} && "
        f"(!has(self.previousMembers) || {_apart('self.previousMembers')})",
        IllegalStep.MEMBERS.value,
    ),
    Rule(
        "self.members.exists(m, m.node == self.primary.node)",
        IllegalStep.PRIMARY_NO_MEMBER.value,
    ),
    Rule(
        f"!has(self.learners) || ({_apart('self.learners')} && self.learners.all(l, "
        "!self.members.exists(m, m.node == l.node || m.replica == l.replica)))",
        IllegalStep.LEARNERS.value,
    ),
    Rule(
        "self.state != 'Active' || !has(self.previousMembers)",
        IllegalStep.PREVIOUS_MEMBERS.value,
    ),
    Rule(
        "!has(self.singleCopy) || (self.members.exists(m, m.replica == self.singleCopy) && "
        "(!has(self.previousMembers) || "
        "self.previousMembers.exists(m, m.replica == self.singleCopy)))",
        IllegalStep.SINGLE_COPY.value,
    ),
    Rule("!has(self.restored) || self.restored == self.epoch", IllegalStep.RESTORED.value),
)

VOLUME_RULES = (
    *CONFIG_STEP_RULES,
    Rule(
        "has(self.spec.uuid) || !has(self.status) || !has(self.status.replicas) || "
        "self.status.replicas.size() == 0",
        "a volume has its uuid before it is placed",
    ),
)

VOLUME_SPEC_RULES = (
    Rule(
        "!has(oldSelf.uuid) || (has(self.uuid) && self.uuid == oldSelf.uuid)",
        "uuid never changes once it is set",
    ),
    Rule("self.sizeBytes >= oldSelf.sizeBytes", "a volume never shrinks"),
    Rule(
        "has(self.source) == has(oldSelf.source) && "
        "(!has(self.source) || self.source == oldSelf.source)",
        "source never changes",
    ),
    Rule("self.replicas == oldSelf.replicas", "replicas cannot be changed"),
    Rule("self.blockSizeBytes == oldSelf.blockSizeBytes", "blockSizeBytes never changes"),
)

SOURCE_RULES = (
    Rule("has(self.snapshot) != has(self.volume)", "a source is either a snapshot or a volume"),
)

SNAPSHOT_SPEC_RULES = (Rule("self == oldSelf", "what a snapshot is of never changes"),)

STORAGE_NODE_SPEC_RULES = (Rule("self.nodeName == oldSelf.nodeName", "nodeName never changes"),)

DEVICE_RULES = (
    Rule(
        "[has(self.file), has(self.path), has(self.nguid)].filter(given, given).size() == 1",
        "a device is named by exactly one of file, path and nguid",
    ),
)
