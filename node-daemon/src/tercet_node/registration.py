"""Makes this node's StorageNode where there is none: `--register FILE --address ADDRESS`.

The chart describes groups of nodes and their devices, but only an agent knows on which node it is.
So each agent makes the object of its own node, and keeps address and topology as they are now; an
admission policy of the API server lets it write no other (tercet_api.rbac). Devices that the group
has more are added; an engine keeps those that it has, so any other difference is only said.

An object that a person made, or that is of another group, is left as it is. Who deletes a
StorageNode does not see it come back before the agent's next start: that is done once for each.

FILE is JSON: {"group": NAME, "topologyLabels": [KEY...], "devices": [as in StorageNode.spec]}.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import Field, ValidationError

from tercet_api.clients import Api, ApiError, Conflict, Json, NotFound, Objects, expect, put
from tercet_api.names import GROUP
from tercet_api.objects import Device, Metadata, Model, StorageNode, StorageNodeSpec
from tercet_node.keyed import pause_s

GROUP_LABEL = f"{GROUP}/node-group"

log = structlog.get_logger(__name__)


class Group(Model):
    """What all nodes of a group have in common."""

    group: str
    topology_labels: list[str] = Field(default_factory=list)
    devices: list[Device]

    @classmethod
    def read(cls, path: Path) -> Group:
        """From the file. Raises ValueError that says what is wrong with it."""
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            raise ValueError(f"{path}: {error}") from error

    def node(self, name: str, address: str, labels: Mapping[str, str]) -> StorageNode:
        """The StorageNode of a node with these labels."""
        topology = {key: labels[key] for key in self.topology_labels if key in labels}
        return StorageNode(
            metadata=Metadata(name=name, labels={GROUP_LABEL: self.group}),
            spec=StorageNodeSpec(
                node_name=name, address=address, devices=self.devices, topology=topology
            ),
        )


@dataclass(frozen=True, slots=True)
class Create:
    """There is none."""

    node: StorageNode


@dataclass(frozen=True, slots=True)
class Update:
    """Its address or topology is another by now, or its group has more devices: a JSON Patch.

    It tests the uid and, for devices, those that there are.
    """

    patch: Sequence[Json]


@dataclass(frozen=True, slots=True)
class Leave:
    """Nothing to do; `why` is for people, empty when all is as it should be."""

    why: str = ""


Action = Create | Update | Leave


def decide(there: StorageNode | None, wanted: StorageNode) -> tuple[Action, ...]:
    """What to do about this node's object."""
    if there is None:
        return (Create(wanted),)
    if there.deleting:
        return (Leave("it is being deleted"),)
    group, own = there.metadata.labels.get(GROUP_LABEL), wanted.metadata.labels[GROUP_LABEL]
    if group != own:
        whose = f"it is of group {group}" if group else "it was not made by an agent"
        return (Leave(f"{whose}, this agent is of group {own}"),)
    actions: list[Action] = []
    patch = [expect("/metadata/uid", there.uid)]
    now, then = wanted.spec, there.spec
    if now.address != then.address:
        patch.append(put("/spec/address", now.address))
    if now.topology != then.topology:
        patch.append(put("/spec/topology", now.topology))
    old, new = _by_id(then), _by_id(now)
    more = [device for device in now.devices if device.id not in old]
    grows = old.items() <= new.items()
    if grows and more:
        patch += [
            expect("/spec/devices", [device.to_json() for device in then.devices]),
            put("/spec/devices", [device.to_json() for device in (*then.devices, *more)]),
        ]
    if len(patch) > 1:
        actions.append(Update(patch))
    if not grows:
        actions.append(
            Leave(
                f"its group has other devices by now ({_ids(now)}); it keeps {_ids(then)}: "
                "see docs/operations.md, Devices"
            )
        )
    return tuple(actions) or (Leave(),)


def _by_id(spec: StorageNodeSpec) -> dict[str, Json]:
    return {device.id: device.to_json() for device in spec.devices}


def _ids(spec: StorageNodeSpec) -> str:
    return ", ".join(sorted(device.id for device in spec.devices))


class Registration:
    """The executor."""

    def __init__(self, api: Api, nodes: Objects[StorageNode], name: str, address: str) -> None:
        self._api = api
        self._nodes = nodes
        self._name = name
        self._address = address

    async def run(self, group: Group) -> None:
        """Until it has been done once. Nothing else of the agent waits for it."""
        failures = 0
        while True:
            try:
                await self._once(group)
                return
            except ApiError as error:
                # Also somebody's change between our read and our write: look again.
                failures += 1
                if not isinstance(error, Conflict):
                    log.warning("not registered yet", node=self._name, error=str(error))
                await asyncio.sleep(pause_s(failures, random.random()))  # noqa: S311

    async def _once(self, group: Group) -> None:
        found = await self._api.request("GET", f"/api/v1/nodes/{self._name}")
        labels = found["metadata"].get("labels") or {}
        try:
            there = await self._nodes.get(self._name)
        except NotFound:
            there = None
        for action in decide(there, group.node(self._name, self._address, labels)):
            match action:
                case Create(node):
                    await self._nodes.create(node)
                    log.info("registered", node=self._name, group=group.group)
                case Update(patch):
                    await self._nodes.patch(self._name, patch)
                    log.info("address, topology or devices changed", node=self._name)
                case Leave(why):
                    if why:
                        log.warning("StorageNode is left as it is", node=self._name, why=why)
