"""An agent makes the StorageNode of its own node, and of no other."""

from __future__ import annotations

import asyncio
import json
import uuid

import pytest
import yaml
from node_bench import until

from tercet_api.clients import Api, Forbidden, NotFound, storage_nodes
from tercet_api.generate import MANIFESTS
from tercet_api.names import NAMESPACE
from tercet_api.objects import StorageNode
from tercet_node.registration import GROUP_LABEL, Create, Group, Leave, Registration, Update, decide

LABELS = {"topology.kubernetes.io/zone": "z1", "other": "x"}
FILE = {
    "group": "nvme",
    "topologyLabels": ["topology.kubernetes.io/zone", "topology.kubernetes.io/region"],
    "devices": [
        {"id": "d0", "file": {"path": "/var/lib/tercet/d0", "capacityBytes": 1 << 30}},
        {"id": "d1", "path": "/dev/disk/by-id/a"},
    ],
}


def group(tmp_path, **change) -> Group:
    path = tmp_path / "node.json"
    path.write_text(json.dumps(FILE | change))
    return Group.read(path)


def stored(node: StorageNode, **change) -> StorageNode:
    spec = node.spec.model_copy(update=change)
    metadata = node.metadata.model_copy(update={"uid": "u1"})
    return node.model_copy(update={"spec": spec, "metadata": metadata})


def test_where_there_is_none_it_is_made_of_the_group(tmp_path):
    wanted = group(tmp_path).node("n1", "10.0.0.1", LABELS)
    assert decide(None, wanted) == (Create(wanted),)
    assert wanted.spec.topology == {"topology.kubernetes.io/zone": "z1"}
    assert [device.id for device in wanted.spec.devices] == ["d0", "d1"]
    assert (wanted.spec.node_name, wanted.spec.address) == ("n1", "10.0.0.1")


def test_what_is_as_it_should_be_is_left_alone(tmp_path):
    wanted = group(tmp_path).node("n1", "10.0.0.1", LABELS)
    assert decide(stored(wanted), wanted) == (Leave(),)


def test_a_node_that_moved_tells_its_new_address_and_zone(tmp_path):
    wanted = group(tmp_path).node("n1", "10.0.0.1", LABELS)
    (update,) = decide(stored(wanted, address="10.0.0.9", topology={}), wanted)
    assert isinstance(update, Update)
    assert {step["path"]: step["value"] for step in update.patch} == {
        "/metadata/uid": "u1",
        "/spec/address": "10.0.0.1",
        "/spec/topology": {"topology.kubernetes.io/zone": "z1"},
    }


def test_devices_are_never_changed_under_an_engine(tmp_path):
    old = stored(group(tmp_path).node("n1", "10.0.0.1", LABELS))
    wanted = group(tmp_path, devices=FILE["devices"][:1]).node("n1", "10.0.0.1", LABELS)
    (leave,) = decide(old, wanted)
    assert isinstance(leave, Leave)
    assert "it keeps d0, d1" in leave.why


def test_devices_that_a_group_has_more_are_added_behind(tmp_path):
    whole = group(tmp_path)
    old = stored(group(tmp_path, devices=FILE["devices"][1:]).node("n1", "10.0.0.1", LABELS))
    (update,) = decide(old, whole.node("n1", "10.0.0.1", LABELS))
    assert isinstance(update, Update)
    steps = [(step["op"], step["path"]) for step in update.patch]
    assert steps == [("test", "/metadata/uid"), ("test", "/spec/devices"), ("add", "/spec/devices")]
    assert [device["id"] for device in update.patch[1]["value"]] == ["d1"]
    assert [device["id"] for device in update.patch[2]["value"]] == ["d1", "d0"]


def test_one_device_more_and_one_less_is_no_growth(tmp_path):
    old = stored(group(tmp_path, devices=FILE["devices"][1:]).node("n1", "10.0.0.1", LABELS))
    wanted = group(tmp_path, devices=FILE["devices"][:1]).node("n1", "10.0.0.1", LABELS)
    (leave,) = decide(old, wanted)
    assert isinstance(leave, Leave)


@pytest.mark.parametrize("labels", [{}, {GROUP_LABEL: "other"}])
def test_what_somebody_else_made_is_left_alone(tmp_path, labels):
    wanted = group(tmp_path).node("n1", "10.0.0.1", LABELS)
    there = stored(wanted, address="10.0.0.9")
    there.metadata.labels = labels
    (leave,) = decide(there, wanted)
    assert isinstance(leave, Leave)
    assert leave.why


def test_one_that_is_being_deleted_is_left_alone(tmp_path):
    wanted = group(tmp_path).node("n1", "10.0.0.1", LABELS)
    there = stored(wanted, address="10.0.0.9")
    there.metadata.deletion_timestamp = "2026-11-21T00:00:00Z"
    assert isinstance(decide(there, wanted)[0], Leave)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"node\.json"):
        group(tmp_path, devices=[{"id": "d0", "file": {"path": "relative"}}])


class Nodes:
    """Two Kubernetes nodes, and agents whose tokens are bound to them."""

    def __init__(self, cluster, folder):
        self._cluster = cluster
        self._folder = folder
        self.names = [f"n-{uuid.uuid4().hex[:6]}" for _ in range(2)]
        for name in self.names:
            labels = {"topology.kubernetes.io/zone": f"zone-{name}"}
            manifest = {"apiVersion": "v1", "kind": "Node"}
            manifest["metadata"] = {"name": name, "labels": labels}
            cluster.kubectl_run("apply", "-f", "-", stdin=json.dumps(manifest))

    def agent(self, name: str):
        """A kubeconfig of the agents' account, with a token that is bound to the node."""
        token = self._cluster.kubectl_run(
            *("-n", NAMESPACE, "create", "token", "tercet-node"),
            *("--bound-object-kind", "Node", "--bound-object-name", name),
        )
        config = yaml.safe_load(self._cluster.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": token.strip()}
        path = self._folder / f"{name}.kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return path


@pytest.fixture
def nodes(cluster, tmp_path):
    """Nodes and agents on a real API server, with the roles and the policy of `make generate`."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    cluster.kubectl_run("apply", "-f", "-", stdin=json.dumps(namespace))
    cluster.kubectl_run("apply", "-f", str(MANIFESTS / "rbac" / "tercet.yaml"))
    made = Nodes(cluster, tmp_path)
    yield made
    cluster.kubectl_run("delete", "storagenode", "--ignore-not-found", *made.names)
    cluster.kubectl_run("delete", "node", *made.names)


async def settled(objects, name: str) -> None:
    """Until the policy is in force: the API server takes a moment after it has been made."""

    async def refused():
        try:
            await objects.patch(name, {"metadata": {"annotations": {"test": uuid.uuid4().hex}}})
        except Forbidden as error:  # for want of the role, until that is known as well
            return "its own node only" in str(error)
        except NotFound:
            return False
        return False

    await until(refused, "the policy refuses a stranger")


@pytest.mark.local
async def test_an_agent_writes_the_storagenode_of_its_own_node_only(cluster, nodes, tmp_path):
    own, other = nodes.names
    wanted = group(tmp_path)
    async with Api(cluster.kubeconfig) as admin, Api(nodes.agent(own)) as agent:
        there = storage_nodes(admin)
        mine = storage_nodes(agent)
        await there.create(wanted.node(other, "10.0.0.2", {}))
        await settled(mine, other)
        async with asyncio.timeout(30):
            await Registration(agent, mine, own, "10.0.0.1").run(wanted)
        made = await there.get(own)
        assert made.spec.topology == {"topology.kubernetes.io/zone": f"zone-{own}"}
        await Registration(agent, mine, own, "10.0.0.7").run(wanted)
        assert (await there.get(own)).spec.address == "10.0.0.7"
        await mine.patch_status(own, {"status": {"version": "x"}})
        for refused in (
            mine.patch(other, {"spec": {"address": "10.0.0.66"}}),
            mine.patch_status(other, {"status": {"version": "x"}}),
            mine.create(wanted.node(f"{own}-x", "10.0.0.1", {})),
        ):
            with pytest.raises(Forbidden, match="its own node only"):
                await refused
