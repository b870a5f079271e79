"""Objects to messages of engine.proto and back: field by field, nothing decided.

A config that goes through both ways is the same config: the engine's swaps `test` the whole old
value (T3), so nothing may be lost, added or reordered on the way.
"""

from __future__ import annotations

from collections.abc import Iterable

from tercet_api.objects import (
    Attachment,
    Config,
    ConfigState,
    Fence,
    Member,
    Primary,
    ReplicaPhase,
    Volume,
)
from tercet_node.protos import engine_pb2 as pb

_STATES = {ConfigState.RECOVERING: pb.Config.RECOVERING, ConfigState.ACTIVE: pb.Config.ACTIVE}
_STATES_BACK = {number: state for state, number in _STATES.items()}


def config_to_proto(config: Config) -> pb.Config:
    """status.config as the engine reads it."""
    return pb.Config(
        epoch=config.epoch,
        state=_STATES[config.state],
        primary=pb.Primary(node=config.primary.node, instance=config.primary.instance),
        members=_members_to_proto(config.members),
        previous_members=_members_to_proto(config.previous_members or ()),
        learners=_members_to_proto(config.learners or ()),
        single_copy=config.single_copy,
        restored=config.restored,
    )


def config_from_proto(config: pb.Config) -> Config:
    """The engine's config as it stands in the object. Raises ValueError when it cannot stand."""
    if config.state not in _STATES_BACK:
        raise ValueError(f"config of epoch {config.epoch} has no state")
    return Config(
        epoch=config.epoch,
        state=_STATES_BACK[config.state],
        primary=Primary(node=config.primary.node, instance=config.primary.instance),
        members=_members_from_proto(config.members),
        previous_members=_members_from_proto(config.previous_members) or None,
        learners=_members_from_proto(config.learners) or None,
        single_copy=config.single_copy if config.HasField("single_copy") else None,
        restored=config.restored if config.HasField("restored") else None,
    )


def view(
    config: Config | None,
    attachments: Iterable[Attachment],
    size_bytes: int,
    fence: Fence | None,
    *,
    generation: int,
    consistent: bool,
    replacement: pb.Replacement | None = None,
) -> pb.VolumeView:
    """What the engine is to know of a Volume object."""
    return pb.VolumeView(
        config=config_to_proto(config) if config else None,
        attachments=[
            pb.Attachment(node=at.node_name, host_nqn=at.host_nqn, read_only=at.read_only)
            for at in attachments
        ],
        size_bytes=size_bytes,
        fence=pb.Fence(epoch=fence.epoch, generation=fence.generation) if fence else None,
        consistent=consistent,
        generation=generation,
        replacement=replacement,
    )


def replacement(volume: Volume) -> pb.Replacement | None:
    """The change of members that the operator asks for, once the newcomer has its id (M1).

    One at a time: the first, in the order of the list. Whether it fits the configuration, and when
    it is due, the engine decides.
    """
    waits = {ReplicaPhase.FORMER, ReplicaPhase.FAILED, ReplicaPhase.DELETED}
    for entry in volume.status.replicas:
        if entry.replaces and entry.replica and entry.state not in waits:
            learner = pb.Member(node=entry.node, replica=entry.replica)
            return pb.Replacement(old=entry.replaces, learner=learner)
    return None


def volume_view(volume: Volume, *, consistent: bool) -> pb.VolumeView:
    """A Volume object as ObserveVolume carries it."""
    return view(
        volume.status.config,
        volume.spec.attachments,
        volume.spec.size_bytes,
        volume.status.fence,
        generation=volume.metadata.generation,
        consistent=consistent,
        replacement=replacement(volume),
    )


def _members_to_proto(members: Iterable[Member]) -> list[pb.Member]:
    return [pb.Member(node=member.node, replica=member.replica) for member in members]


def _members_from_proto(members: Iterable[pb.Member]) -> list[Member]:
    return [Member(node=member.node, replica=member.replica) for member in members]
