"""The list against a naive one; the tree reaches everybody once; the pace keeps its bounds."""

from __future__ import annotations

from functools import reduce
from operator import xor

from hypothesis import given
from hypothesis import strategies as st
from node_membership_net import entry, gone

from tercet_node.membership import Nid, NodeList
from tercet_node.membership.pace import INTERVAL_S_MAX, INTERVAL_S_MIN, interval_s

nids = st.integers(0, 200)
sets = st.sets(nids, min_size=1, max_size=60)


@given(st.lists(st.tuples(st.sampled_from(["put", "gone", "drop"]), nids), max_size=80))
def test_list_is_a_map(actions):
    made, naive = NodeList(), {}
    for action, nid in actions:
        if action == "drop":
            made = made.drop(Nid(nid))
            naive.pop(nid, None)
        else:
            naive[nid] = entry(nid) if action == "put" else gone(nid)
            made = made.put(naive[nid])
    present = sorted(nid for nid, each in naive.items() if each.present)
    assert list(made) == [naive[nid] for nid in sorted(naive)]
    assert list(made.descending()) == [naive[nid] for nid in sorted(naive, reverse=True)]
    assert (made.nids(), len(made), made.entries) == (present, len(present), len(naive))
    assert made.digest == reduce(xor, (e.fingerprint for e in naive.values()), 0)
    assert made.first_gap() == next(n for n in range(202) if n not in present)


@given(sets, sets)
def test_differing_is_what_differs(one, other):
    left = NodeList.of(entry(nid) for nid in one)
    right = NodeList.of(entry(nid) for nid in other)
    assert left.differing(right) == sorted(one ^ other)


@given(sets, nids)
def test_ring_closes(members, nid):
    made = NodeList.of(entry(each) for each in members)
    others = sorted(members - {nid})
    if not others:
        assert made.neighbours(Nid(nid)) == ()
        return
    lower = max((n for n in others if n < nid), default=others[-1])
    higher = min((n for n in others if n > nid), default=others[0])
    assert made.neighbours(Nid(nid)) == ((lower,) if lower == higher else (lower, higher))


@given(sets, sets, nids)
def test_dead_count_as_missing_in_ring_and_tree(members, dead, nid):
    bits = sum(1 << each for each in dead - {nid})
    whole = NodeList.of(entry(each) for each in members)
    rest = NodeList.of(entry(each) for each in members - (dead - {nid}))
    assert whole.neighbours(Nid(nid), bits) == rest.neighbours(Nid(nid))
    assert whole.targets(Nid(nid), Nid(500), bits) == rest.targets(Nid(nid), Nid(500))
    assert whole.top(bits) == (rest.instigator() if len(rest) else None)


@given(sets, nids)
def test_tree_reaches_all_but_who_it_is_about_and_nobody_twice(members, about):
    made = NodeList.of(entry(nid) for nid in members)
    others = members - {about}
    if not others:
        assert made.targets(Nid(min(members)), Nid(about)) == []
        return
    reached = [min(others)]
    for nid in reached:
        reached += made.targets(nid, Nid(about))
    assert sorted(reached) == sorted(others)


def test_tree_of_the_sources_figure():
    """Without node 2, node 0 forwards to 1 and, in its place, to 5 and 6."""
    made = NodeList.of(entry(nid) for nid in (0, 1, 3, 4, 5, 6))
    assert made.targets(Nid(0), Nid(99)) == [1, 5, 6]


def test_pace_is_the_sources():
    seen = [interval_s(seconds) for seconds in (0, 1, 2, 3, 5, 8, 9, 1e9)]
    assert [round(s, 6) for s in seen] == [2, 2, 4, 8, 32, 256, 300, 300]


@given(st.floats(0, 1e9), st.floats(0, 1))
def test_pace_of_a_busy_node_is_slower_and_within_the_same_bounds(since_s, busy):
    slow, quick = interval_s(since_s, busy), interval_s(since_s)
    assert INTERVAL_S_MIN <= quick <= slow <= INTERVAL_S_MAX
