"""What the agent says of its node on the StorageNode object (pure).

An orphan (M2) is a replica here whose id no Volume object names. It is kept, and said, so that the
operator knows whether a Volume without a status may be new ("no config never means new"); the list
counts for `orphansInstance` only, so it is never written before this engine instance has told all
its replicas, all devices opened, and the list of Volumes has been read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tercet_api.clients import Json
from tercet_api.objects import (
    DeviceState,
    DeviceStatus,
    Membership,
    Orphan,
    ReplicaPhase,
    StorageNodeStatus,
    Volume,
)
from tercet_node.members.sight import Sight
from tercet_node.protos import engine_pb2 as pb
from tercet_node.views import config_members

ORPHANS_MAX = 1024
OPENING = "opening"
"""The engine's word for a device that is being opened: neither ready nor failed yet."""
OWN_FIELDS = (
    "instance",
    "devices",
    "capacityBytes",
    "allocatedBytes",
    "reservedBytes",
    "orphans",
    "orphansInstance",
    "version",
)
_FIGURES = ("allocatedBytes", "reservedBytes", "membership")
"""While a node joins, every list changes many times: nobody waits for this word."""


def orphans(
    replicas: Iterable[pb.ReplicaStatus], volumes: Iterable[Volume], node: str
) -> list[Orphan]:
    """Replicas here that no object names, in a fixed order."""
    named: set[str] = set()
    coming: set[tuple[str | None, str]] = set()
    for volume in volumes:
        named.update(member.replica for member in config_members(volume.status.config))
        for entry in volume.status.replicas:
            if entry.replica is not None:
                named.add(entry.replica)
            elif entry.node == node and entry.state is ReplicaPhase.PLACED:
                # Crash window of a creation: made, and about to be named.
                coming.add((volume.spec.uuid, volume.name))
    found = [
        Orphan(volume=replica.volume, name=replica.name, replica=replica.replica)
        for replica in replicas
        if replica.replica not in named and (replica.volume, replica.name) not in coming
    ]
    return sorted(found, key=lambda orphan: (orphan.volume, orphan.replica))


def membership(sight: Sight | None) -> Json:
    """What is said of the list of nodes; nothing while there is none."""
    if sight is None:
        return {}
    said = Membership(nid=sight.nid, size=sight.size, digest=sight.digest)
    return {"membership": said.to_json()}


def observed(status: pb.StatusResponse, found: list[Orphan]) -> Json:
    """The fields of StorageNode.status that are the agent's."""
    devices = [_device(device) for device in status.devices]
    ready = [d for d in status.devices if d.state == DeviceState.READY.value]
    whole = StorageNodeStatus(
        instance=status.instance,
        devices=devices,
        capacity_bytes=sum(device.capacity_bytes for device in ready),
        allocated_bytes=sum(device.allocated_bytes for device in ready),
        reserved_bytes=sum(device.reserved_bytes for device in ready),
        orphans=found[:ORPHANS_MAX],
        orphans_instance=status.instance,
        version=status.version,
    )
    fields: dict[str, Any] = whole.to_json()
    if any(device.message == OPENING for device in status.devices):
        return {name: fields[name] for name in ("instance", "version")}
    said = {name: fields[name] for name in OWN_FIELDS}
    if len(ready) < len(status.devices) or not status.devices:
        # Replicas on a device that cannot be read are not known: no word about orphans.
        del said["orphans"], said["orphansInstance"]
    return said


def _device(device: pb.DeviceStatus) -> DeviceStatus:
    state = DeviceState.READY if device.state == DeviceState.READY.value else DeviceState.FAILED
    return DeviceStatus(
        id=device.id,
        state=state,
        message=device.message,
        capacity_bytes=device.capacity_bytes,
        allocated_bytes=device.allocated_bytes,
    )


def difference(written: Mapping[str, Any], now: Json) -> tuple[Json, bool]:
    """The fields to write, and whether any is more than a figure that moves all the time."""
    changed = {name: value for name, value in now.items() if written.get(name) != value}
    urgent = any(name not in _FIGURES and name != "devices" for name in changed)
    if "devices" in changed:
        urgent = urgent or _states(written.get("devices")) != _states(changed["devices"])
    return changed, urgent


def _states(devices: Any) -> list[tuple[str, str, str]]:
    return [(d["id"], d["state"], d.get("message", "")) for d in devices or ()]
