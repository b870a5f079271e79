"""Placement: room, spread, wishes; by example, and for whatever cluster hypothesis thinks of."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from operator_world import GIB, NOW, entry, node, nodes, serving, volume, world

from tercet_api.objects import Placement, ReplicaPhase, StorageNode
from tercet_operator.placement import Unplaceable, choose, room_bytes

ZONES = ("a", "b", "c")


def test_three_distinct_nodes() -> None:
    """Each replica has a node of its own."""
    chosen = choose(volume(), world(*nodes(5)), NOW, 3)
    assert isinstance(chosen, list)
    assert len(set(chosen)) == 3


def test_what_is_placed_and_not_reported_counts() -> None:
    """A node's own figures lag behind: promises count at once, with their whole size."""
    promised = volume(
        "other", size_bytes=60 * GIB, status={"replicas": [entry("n1", ReplicaPhase.PLACED)]}
    )
    there = world(node("n1", gib=100), promised)
    assert room_bytes(there.nodes["n1"], there.volumes.values()) == 40 * GIB
    refused = choose(volume(size_bytes=41 * GIB), there, NOW, 1)
    assert isinstance(refused, Unplaceable)
    assert f"n1 has room for {40 * GIB} bytes" in refused.message
    assert choose(volume(size_bytes=40 * GIB), there, NOW, 1) == ["n1"]


def test_a_failed_try_takes_no_room() -> None:
    """What could not be made is not there."""
    failed = volume("other", status={"replicas": [entry("n1", ReplicaPhase.FAILED)]})
    there = world(node("n1"), failed)
    assert room_bytes(there.nodes["n1"], there.volumes.values()) == 100 * GIB


def test_spread_over_the_topology_key() -> None:
    """Zones first, room second."""
    there = world(
        node("n1", gib=900, topology={"zone": "a"}),
        node("n2", gib=800, topology={"zone": "a"}),
        node("n3", gib=100, topology={"zone": "b"}),
        node("n4", gib=50, topology={"zone": "c"}),
    )
    wanted = volume(placement=Placement(topology_key="zone"))
    assert choose(wanted, there, NOW, 3) == ["n1", "n3", "n4"]
    assert choose(volume(), there, NOW, 3) == ["n1", "n2", "n3"]


def test_more_replicas_than_zones() -> None:
    """Spread where that is possible; a volume is not refused for it."""
    there = world(*(node(f"n{n}", topology={"zone": "a"}) for n in (1, 2, 3)))
    chosen = choose(volume(placement=Placement(topology_key="zone")), there, NOW, 3)
    assert chosen == ["n1", "n2", "n3"]


def test_wishes() -> None:
    """Preferred node first, selector always."""
    there = world(*nodes(4))
    assert choose(volume(placement=Placement(preferred_node="n4")), there, NOW, 1) == ["n4"]
    selected = volume(placement=Placement(node_selector={"zone": "z2"}))
    assert choose(selected, there, NOW, 1) == ["n2"]
    assert isinstance(choose(selected, there, NOW, 2), Unplaceable)


def test_says_why_for_each_node() -> None:
    """Whoever reads the condition learns what to do."""
    there = world(
        node("n1", cordoned=True),
        node("n2", drained=True),
        node("n3"),
        node("n4", status={"instance": None}),
        node("n5", metadata={"deletion_timestamp": "2026-11-20T12:00:00Z"}),
        dead=("n3",),
    )
    refused = choose(volume(), there, NOW, 1)
    assert isinstance(refused, Unplaceable)
    for words in ("n1 is cordoned", "n2 is drained", "n3 is not ready", "n4 is not ready", "n5 is"):
        assert words in refused.message


def test_a_clone_stays_with_its_snapshot() -> None:
    """S3: of the holders only, however much room others have."""
    there = world(*nodes(3), node("n4", gib=10_000))
    assert choose(volume(), there, NOW, 3, only=["n1", "n2", "n3"]) == ["n1", "n2", "n3"]
    assert isinstance(choose(volume(), there, NOW, 3, only=["n1", "n2"]), Unplaceable)


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from(ZONES), st.booleans(), st.booleans()),
        max_size=8,
    ),
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 12)), max_size=6),
    st.integers(1, 3),
)
def test_never_more_than_fits(
    cluster: list[tuple[int, str, bool, bool]], taken: list[tuple[int, int]], count: int
) -> None:
    """Chosen nodes are distinct, alive, open, and have room; refused means that too few are."""
    made: list[StorageNode] = []
    dead = []
    for number, (gib, zone, cordoned, lost) in enumerate(cluster, start=1):
        name = f"n{number}"
        made.append(node(name, gib=gib, topology={"zone": zone}, cordoned=cordoned))
        dead += [name] if lost else []
    others = [
        serving(f"o{number}", f"n{on}", size_bytes=gib * GIB)
        for number, (on, gib) in enumerate(taken)
    ]
    there = world(*made, *others, dead=tuple(dead))
    wanted = volume(size_bytes=2 * GIB, placement=Placement(topology_key="zone"))
    fits = {
        n.name
        for n in made
        if n.name not in dead
        and not n.spec.cordoned
        and room_bytes(n, there.volumes.values()) >= 2 * GIB
    }
    chosen = choose(wanted, there, NOW, count)
    if isinstance(chosen, Unplaceable):
        assert len(fits) < count
        return
    assert len(set(chosen)) == count
    assert set(chosen) <= fits
    zones = {name: there.nodes[name].spec.topology["zone"] for name in fits}
    used = Counter(zones[name] for name in chosen)
    spare = {zones[name] for name in fits - set(chosen)}
    assert all(used[zone] >= max(used.values()) - 1 for zone in spare), "a zone was passed over"
    assert choose(wanted, there, NOW, count) == chosen, "the same again for the same world"
