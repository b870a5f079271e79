"""Which index a node gets, when its entry is signed anew, and what is left of one that goes."""

from __future__ import annotations

import base64
import uuid

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from operator_world import NOW, WALL, entry, later, node, only, some_id, volume, world, written

from tercet_api.enrolment import entry_bytes, signed_bytes
from tercet_api.names import FINALIZER
from tercet_api.objects import Enrolment, Register, ReplicaPhase
from tercet_operator import storagenode
from tercet_operator.actions import Bury, Release
from tercet_operator.executor import _enrolled
from tercet_operator.roll import Roll, signing_key

CLUSTER = uuid.UUID(int=7)
MILLISECONDS = int(WALL.timestamp() * 1000)


@pytest.fixture
def roll():
    return Roll(signing_key(bytes(range(32))), CLUSTER)


def enrol(made, name, now=NOW):
    """Decide on a node, and keep what is decided as the executor does."""
    found = written(storagenode.decide(made.nodes[name], made, now)).get("enrolment")
    if found is not None:
        made.nodes[name] = _enrolled(made.nodes[name], found)
    return made.nodes[name].status.enrolment


def cluster(roll, *names):
    made = world(*(node(name) for name in names))
    made.roll = roll
    for name in names:
        enrol(made, name)
    return made


def indexes(made):
    return {name: found.status.enrolment.nid for name, found in made.nodes.items()}


def holds(roll, held):
    """Whether an agent that has the register's keys would believe it."""
    raw = entry_bytes(
        held.nid,
        uuid.UUID(held.node).bytes,
        uuid.UUID(held.instance).bytes,
        held.incarnation,
        2 if held.gone else 1,
        held.address,
    )
    for key in roll.register().keys:
        try:
            public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key))
            public.verify(base64.b64decode(held.signature), signed_bytes(CLUSTER.bytes, raw))
        except InvalidSignature:
            continue
        return True
    return False


def test_newcomers_take_the_first_gap(roll):
    made = cluster(roll, "n1", "n2", "n3")
    assert indexes(made) == {"n1": 0, "n2": 1, "n3": 2}
    del made.nodes["n2"]
    made.nodes["n4"] = node("n4")
    made.sightings["n4"] = made.sightings["n1"]
    assert enrol(made, "n4").nid == 1
    assert all(holds(roll, found.status.enrolment) for found in made.nodes.values())


def test_what_is_right_is_not_signed_again(roll):
    made = cluster(roll, "n1")
    before = made.nodes["n1"].status.enrolment
    assert before.address == "127.0.1.1:4422"
    assert before.incarnation == MILLISECONDS
    assert enrol(made, "n1", later(60)) == before


def test_new_instance_address_or_key_is_signed_with_a_higher_incarnation(roll):
    made = cluster(roll, "n1")
    first = made.nodes["n1"].status.enrolment
    status = made.nodes["n1"].status.model_copy(update={"instance": some_id("second start")})
    made.nodes["n1"] = made.nodes["n1"].model_copy(update={"status": status})
    second = enrol(made, "n1")
    assert (second.nid, second.instance) == (0, some_id("second start"))
    assert second.incarnation > first.incarnation, "of one millisecond too"
    spec = made.nodes["n1"].spec.model_copy(update={"address": "fd00::1"})
    made.nodes["n1"] = made.nodes["n1"].model_copy(update={"spec": spec})
    assert enrol(made, "n1").address == "[fd00::1]:4422"
    made.roll = Roll(Ed25519PrivateKey.generate(), CLUSTER)
    made.roll.take_up(roll.register())
    third = enrol(made, "n1", later(1))
    assert third.nid == 0
    assert holds(made.roll, third)
    assert not holds(roll, third)
    assert len(made.roll.register().keys) == 2, "the former key holds on until all are signed"


def test_a_node_without_an_engine_is_not_enrolled_yet(roll):
    made = world(node("n1", status={"instance": None}))
    made.roll = roll
    assert "enrolment" not in written(storagenode.decide(made.nodes["n1"], made, NOW))


def test_an_entry_that_an_agent_wrote_itself_counts_for_nothing(roll):
    made = cluster(roll, "n1", "n2")
    forged = made.nodes["n1"].status.enrolment.model_copy(update={"nid": 1, "incarnation": 1 << 60})
    made.nodes["n1"] = _enrolled(made.nodes["n1"], forged.to_json())
    assert enrol(made, "n2").nid == 1, "the honest one keeps its index"
    mended = enrol(made, "n1")
    assert holds(roll, mended)


def test_of_two_with_one_index_the_newer_entry_keeps_it(roll):
    made = cluster(roll, "n1")
    other = world(node("n2"))
    other.roll = roll
    enrol(other, "n2", later(5))
    made.nodes["n2"], made.sightings["n2"] = other.nodes["n2"], other.sightings["n2"]
    assert indexes(made) == {"n1": 0, "n2": 0}
    assert enrol(made, "n2").nid == 0
    assert enrol(made, "n1").nid == 1


def going(made, name):
    meta = made.nodes[name].metadata.model_copy(
        update={"deletion_timestamp": NOW.text, "finalizers": [FINALIZER]}
    )
    made.nodes[name] = made.nodes[name].model_copy(update={"metadata": meta})
    return made.nodes[name]


def test_a_node_that_goes_leaves_a_tombstone_before_its_object_goes(roll):
    made = cluster(roll, "n1", "n2")
    actions = storagenode.decide(going(made, "n2"), made, NOW)
    assert [type(action) for action in actions] == [Bury, Release]
    stone = only(Bury, actions).tombstone
    assert (stone.nid, stone.gone) == (1, True)
    assert stone.incarnation > made.nodes["n2"].status.enrolment.incarnation
    assert holds(roll, stone)
    roll.bury(stone)
    # The operator dies after writing it: the next one says the same.
    assert only(Bury, storagenode.decide(made.nodes["n2"], made, later(9))).tombstone == stone
    del made.nodes["n2"]
    made.nodes["n3"] = node("n3")
    made.sightings["n3"] = made.sightings["n1"]
    taken = enrol(made, "n3")
    assert taken.nid == 1
    assert taken.incarnation > stone.incarnation


def test_a_clock_that_goes_back_gives_no_older_entries(roll):
    made = cluster(roll, "n1")
    stone = roll.tombstone(made.nodes["n1"], later(100).wall)
    roll.bury(stone)
    made.nodes = {"n2": node("n2")}
    made.sightings["n2"] = made.sightings["n1"]
    assert enrol(made, "n2").incarnation > stone.incarnation


def test_no_tombstone_while_a_volume_names_a_replica_there(roll):
    made = cluster(roll, "n1")
    kept = volume(status={"replicas": [entry("n1", ReplicaPhase.IN_SYNC)]})
    made.volumes[kept.name] = kept
    actions = storagenode.decide(going(made, "n1"), made, NOW)
    assert not [action for action in actions if isinstance(action, Bury | Release)]


def test_another_clusters_register_is_not_taken_up(roll):
    roll.take_up(Register(cluster=str(uuid.UUID(int=8)), keys=["AAAA"], gone=[]))
    assert len(roll.register().keys) == 1
    stone = Enrolment(
        nid=3, node=str(CLUSTER), instance=str(CLUSTER), address="a:1", incarnation=1, gone=True
    )
    roll.take_up(Register(cluster=str(CLUSTER), keys=["AAAA"], gone=[stone]))
    assert roll.register().gone == [stone]
    assert roll.register().keys[1:] == ["AAAA"]
