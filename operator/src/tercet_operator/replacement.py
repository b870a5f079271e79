"""A replica that is lost, or whose node is given up, is rebuilt on another node (M1, M2; pure).

The operator says only *which* member shall go and *where* its successor shall be: one entry of
status.replicas with `replaces`. That node's agent makes the replica as a learner; the primary's
engine copies to it and changes the members when it keeps up; who leads is never decided here.

A member is lost when its node has not been ready for `replace_after_s`, and given up, at once, when
its StorageNode is being deleted or gone. One change at a time for each volume, `rebuilds_max` at
once in all. A member that is well again before the change has begun stays, and the newcomer goes.

What is no member any more stays in status.replicas as Former until its agent has deleted it (M2),
or until its StorageNode is gone: no agent is left to do so then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tercet_api.coordination.lease import parse_time
from tercet_api.objects import (
    REPLICAS_MAX,
    ConditionStatus,
    Config,
    ConfigState,
    Member,
    ReplicaPhase,
    Volume,
    VolumeReplica,
)
from tercet_operator import placement
from tercet_operator.actions import Action, LookAgain, Notice
from tercet_operator.conditions import READY, REBUILDING, Verdict, find, status_actions
from tercet_operator.world import Moment, World, config_members

PLACED_TIMEOUT_S = 30.0
"""How long a node that is not ready may keep a placement that it has not answered."""
RETRY_S = 30.0
"""When no node is left, those that failed are asked again after this time."""
QUEUE_S = 5.0
"""Between two looks whether a volume's turn has come."""
_OVER = {ReplicaPhase.FORMER, ReplicaPhase.FAILED, ReplicaPhase.DELETED}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a look at a volume's members gave."""

    writes: list[Action] = field(default_factory=list)
    """If there are any, nothing else is written in this pass."""
    verdicts: list[Verdict] = field(default_factory=list)
    looks: list[Action] = field(default_factory=list)


def going(volume: Volume) -> VolumeReplica | None:
    """The entry of the newcomer whose change goes on."""
    return next((e for e in volume.status.replicas if e.replaces and e.state not in _OVER), None)


def decide(volume: Volume, config: Config, world: World, now: Moment) -> Outcome:
    """What the volume's members need."""
    looked_at = (_tidied(entry, config, world, now) for entry in volume.status.replicas)
    tidy = [entry for entry in looked_at if entry is not None]
    if tidy != volume.status.replicas:
        done = [e for e in volume.status.replicas if e.replaces and _is_in_place(e, config)]
        notices = [Notice("Replaced", f"{e.node} has taken the place of a member") for e in done]
        return Outcome([*_write(volume, now, tidy, []), *notices])
    newcomer = going(volume)
    if newcomer is not None:
        return _go_on(volume, config, newcomer, world, now)
    if config.state is not ConfigState.ACTIVE or config.single_copy is not None:
        return _quiet(volume)
    lost, looks = _lost(volume, config, world, now)
    if lost is None:
        return _quiet(volume, looks)
    return _begin(volume, config, lost, world, now)


# ------------------------------------------------------------------ what is over


def _is_in_place(entry: VolumeReplica, config: Config) -> bool:
    """The newcomer is a member, and what it replaces counts no more."""
    members = {member.replica for member in config.members}
    return config.state is ConfigState.ACTIVE and entry.replica in members


def _tidied(
    entry: VolumeReplica, config: Config, world: World, now: Moment
) -> VolumeReplica | None:
    """An entry as it shall be; None: it goes."""
    if config.state is not ConfigState.ACTIVE:
        return entry
    if entry.replaces and _is_in_place(entry, config):
        return entry.model_copy(update={"replaces": None})
    if entry.replica in {member.replica for member in config_members(config)}:
        return entry
    members = {member.replica for member in config.members}
    if entry.replaces in members and entry.state not in {ReplicaPhase.FORMER, ReplicaPhase.DELETED}:
        return entry  # a newcomer on its way, or one that could not be made
    node = world.nodes.get(entry.node)
    silent = node is None or (node.deleting and not world.alive(entry.node, now))
    if silent or entry.replica is None or entry.state is ReplicaPhase.DELETED:
        return None
    return entry if entry.state is ReplicaPhase.FORMER else _former(entry)


def _former(entry: VolumeReplica) -> VolumeReplica:
    update = {
        "state": ReplicaPhase.FORMER,
        "replaces": None,
        "lag_bytes": 0,
        "rebuild_percent": None,
        "rebuild_bytes_per_second": None,
        "rebuild_seconds_left": None,
        "message": "no member any more",
    }
    return entry.model_copy(update=update)


# ------------------------------------------------------------------ what goes on


def _go_on(
    volume: Volume, config: Config, newcomer: VolumeReplica, world: World, now: Moment
) -> Outcome:
    old = next((m for m in config.members if m.replica == newcomer.replaces), None)
    if old is None or config.state is not ConfigState.ACTIVE:
        message = f"{newcomer.node} takes a member's place"
        return Outcome(verdicts=[Verdict(REBUILDING, True, "MembersChange", message, True)])
    why = _well_again(volume, old, world, now) or _hopeless(volume, newcomer, world, now)
    if why is not None:
        kept = [e for e in volume.status.replicas if e is not newcomer]
        if newcomer.replica is not None:
            kept.append(_former(newcomer))
        return Outcome(
            [
                *_write(volume, now, kept, []),
                Notice("RebuildStopped", f"the replica on {newcomer.node} is given up: {why}"),
            ]
        )
    message = f"the replica of {old.node} is rebuilt on {newcomer.node}"
    return Outcome(
        verdicts=[Verdict(REBUILDING, True, "Rebuilding", message, True)],
        looks=[LookAgain(QUEUE_S)] if not world.usable(newcomer.node, now) else [],
    )


def _well_again(volume: Volume, old: Member, world: World, now: Moment) -> str | None:
    """Why the member whose place is wanted can stay."""
    if _given_up(old.node, world) is not None or not _is_whole(volume, old, world, now):
        return None
    return f"{old.node} is back and in sync"


def _is_whole(volume: Volume, member: Member, world: World, now: Moment) -> bool:
    """Its node lives and its replica is in sync, whatever else is wrong there (a failed device)."""
    entry = next((e for e in volume.status.replicas if e.replica == member.replica), None)
    in_sync = entry is not None and entry.state is ReplicaPhase.IN_SYNC
    return in_sync and world.usable(member.node, now)


def _hopeless(volume: Volume, newcomer: VolumeReplica, world: World, now: Moment) -> str | None:
    """Why the newcomer cannot become a member."""
    if (gone := _given_up(newcomer.node, world)) is not None:
        return gone
    if world.usable(newcomer.node, now):
        return None
    missing_s = _missing_s(newcomer.node, world, now)
    said = find(volume.status.conditions, REBUILDING)
    asked_s = 0.0 if said is None else _since_s(said.last_transition_time, now)
    placed = newcomer.replica is None
    patience_s = PLACED_TIMEOUT_S if placed else world.replace_after_s
    late = missing_s >= patience_s or (placed and asked_s >= patience_s)
    return f"{newcomer.node} has not been ready for {missing_s:.0f} s" if late else None


# ------------------------------------------------------------------ who is lost


def _since_s(text: str, now: Moment) -> float:
    return max(0.0, (now.wall - parse_time(text)).total_seconds())


def _missing_s(name: str, world: World, now: Moment) -> float:
    """For how long a node has not been ready; 0: it is."""
    node, sighting = world.nodes.get(name), world.sightings.get(name)
    said = find(node.status.conditions, READY) if node is not None else None
    unready = said is not None and said.status is ConditionStatus.FALSE
    if world.usable(name, now) and not unready:
        return 0.0
    # The condition survives the operator; the sighting is not hurt by a clock that was set.
    seen_s = 0.0 if sighting is None else max(0.0, now.s - sighting.expires_at_s)
    said_s = _since_s(said.last_transition_time, now) if said is not None and unready else 0.0
    return max(seen_s, said_s)


def _given_up(name: str, world: World) -> str | None:
    node = world.nodes.get(name)
    if node is None:
        return f"there is no StorageNode {name}"
    return f"StorageNode {name} is being deleted" if node.deleting else None


@dataclass(frozen=True, slots=True)
class _Lost:
    member: Member
    why: str


def _lost(
    volume: Volume, config: Config, world: World, now: Moment
) -> tuple[_Lost | None, list[Action]]:
    """The member to be replaced first: rather one that is dead. And when to look again."""
    found: list[_Lost] = []
    waits_s: list[float] = []
    for member in config.members:
        missing_s = _missing_s(member.node, world, now)
        if (why := _given_up(member.node, world)) is not None:
            found.append(_Lost(member, why))
        elif _is_whole(volume, member, world, now):
            continue
        elif missing_s >= world.replace_after_s:
            found.append(_Lost(member, f"{member.node} has not been ready for {missing_s:.0f} s"))
        elif missing_s > 0:
            waits_s.append(world.replace_after_s - missing_s)
    dead = [lost for lost in found if not world.usable(lost.member.node, now)]
    first = next(iter([*dead, *found]), None)
    return first, [LookAgain(min(waits_s) + 0.1)] if waits_s else []


def _begin(volume: Volume, config: Config, lost: _Lost, world: World, now: Moment) -> Outcome:
    living = sum(world.usable(member.node, now) for member in config.members)
    if living * 2 <= len(config.members):
        return _cannot("NoMajority", f"{lost.why}; of its members too few are left to replace it")
    busy = sum(going(other) is not None for other in world.volumes.values())
    if busy >= world.rebuilds_max:
        waits = f"{lost.why}; {busy} other volumes are being rebuilt"
        outcome = _cannot("RebuildQueued", waits, good=True)
        return Outcome(verdicts=outcome.verdicts, looks=[LookAgain(QUEUE_S)])
    chosen = placement.choose(volume, world, now, 1, leaving=lost.member.node)
    if len(volume.status.replicas) >= REPLICAS_MAX:
        full = f"status.replicas has {REPLICAS_MAX} entries: delete StorageNodes that are no more"
        chosen = placement.Unplaceable(full)
    if isinstance(chosen, placement.Unplaceable):
        return _unplaceable(volume, lost, chosen.message, now)
    place = VolumeReplica(node=chosen[0], state=ReplicaPhase.PLACED, replaces=lost.member.replica)
    message = f"the replica of {lost.member.node} is rebuilt on {place.node}: {lost.why}"
    verdict = Verdict(REBUILDING, True, "Rebuilding", message, True)
    # Crash window: placed and not told. The agents work from status alone; nothing is lost.
    return Outcome(_write(volume, now, [*volume.status.replicas, place], [verdict]))


def _unplaceable(volume: Volume, lost: _Lost, message: str, now: Moment) -> Outcome:
    failed = [e for e in volume.status.replicas if e.replaces and e.state is ReplicaPhase.FAILED]
    said = find(volume.status.conditions, REBUILDING)
    waited_s = _since_s(said.last_transition_time, now) if said is not None else 0.0
    if failed and waited_s >= RETRY_S:
        kept = [e for e in volume.status.replicas if e not in failed]
        nodes = ", ".join(entry.node for entry in failed)
        return Outcome([*_write(volume, now, kept, []), Notice("Retry", f"asking again: {nodes}")])
    outcome = _cannot("Unplaceable", f"{lost.why}; {message}")
    return Outcome(verdicts=outcome.verdicts, looks=[LookAgain(RETRY_S)])


# ------------------------------------------------------------------ saying so


def _cannot(reason: str, message: str, *, good: bool = False) -> Outcome:
    return Outcome(verdicts=[Verdict(REBUILDING, False, reason, message, good)])


def _quiet(volume: Volume, looks: list[Action] | None = None) -> Outcome:
    """Nothing is rebuilt. A volume that never had to be says nothing of it."""
    verdicts: list[Verdict] = []
    if find(volume.status.conditions, REBUILDING) is not None:
        verdicts.append(Verdict(REBUILDING, False, "NoneLost", "no replica is rebuilt", True))
    return Outcome(verdicts=verdicts, looks=looks or [])


def _write(
    volume: Volume, now: Moment, entries: list[VolumeReplica], verdicts: list[Verdict]
) -> list[Action]:
    members = {"replicas": [entry.to_json() for entry in entries]}
    generation = volume.metadata.generation
    return status_actions(volume.status, verdicts, now, generation, members, exact=True)
