"""In which order the engine is shown what: an older attachment list never follows a newer one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_objects import config, entry, volume

from tercet_api.objects import Config, ConfigState, Member, Primary
from tercet_node import convert
from tercet_node.views import (
    Origin,
    Shown,
    Verdict,
    answered_view,
    concerns,
    judge,
    needs_telling,
)


def shown(found, *, consistent=False):
    return Shown(found, convert.volume_view(found, consistent=consistent))


@pytest.mark.parametrize(
    ("version", "origin", "verdict"),
    [
        (11, Origin.WATCH, Verdict.SHOW),
        (11, Origin.LIST, Verdict.SHOW),
        (10, Origin.WATCH, Verdict.SKIP),
        (9, Origin.WATCH, Verdict.SKIP),  # the watch lags behind a read
        (9, Origin.LIST, Verdict.READ),  # a restored API server, or an overtaken list
        (9, Origin.READ, Verdict.SHOW),  # a consistent read is always right (M3)
    ],
)
def test_versions_of_one_object(version, origin, verdict):
    assert judge(shown(volume(version=10)), volume(version=version), origin) is verdict


@pytest.mark.parametrize("origin", [Origin.WATCH, Origin.LIST])
def test_other_object_of_the_same_name_is_settled_by_a_read(origin):
    known = shown(volume(version=10, uid="u1"))
    assert judge(known, volume(version=11, uid="u2"), origin) is Verdict.READ


def test_first_sight_is_shown():
    assert judge(None, volume(version=1), Origin.WATCH) is Verdict.SHOW


def test_only_news_are_told():
    before = shown(volume(version=10, allocated_bytes=1))
    figures = convert.volume_view(volume(version=11, allocated_bytes=2), consistent=False)
    assert not needs_telling(before, figures)
    fresh = convert.volume_view(volume(version=11, hosts=("nqn.x",)), consistent=False)
    assert needs_telling(before, fresh)
    again = convert.volume_view(volume(version=10), consistent=True)
    assert needs_telling(before, again), "T7 and H5 wait for consistent views"


def test_answer_of_a_swap_never_brings_back_a_refused_host():
    # The swap's answer was made before the host was taken out, and arrives after.
    newer = shown(volume(version=12, generation=2, hosts=()))
    answer = volume(version=11, generation=1, hosts=("nqn.refused",), config=config(epoch=2))
    view = answered_view(newer, answer)
    assert list(view.attachments) == []
    assert (view.generation, view.config.epoch, view.consistent) == (2, 2, True)


def test_answer_of_a_swap_brings_the_newest_attachments():
    older = shown(volume(version=10, generation=1))
    answer = volume(version=11, generation=2, hosts=("nqn.new",), config=config(epoch=2))
    assert [at.host_nqn for at in answered_view(older, answer).attachments] == ["nqn.new"]


def test_whom_a_volume_concerns():
    placed = volume(entry("a", "Placed", named=False))
    assert concerns(placed, "a", held=False)
    assert not concerns(placed, "b", held=False)
    assert concerns(placed, "b", held=True)
    learner = Member(node="d", replica="44444444-4444-4444-8444-444444444444")
    assert concerns(volume(config=config("a", "b", learners=[learner])), "d", held=False)


uuids = st.uuids().map(str)
names = st.sampled_from(["a", "b", "c", "node-1"])
members = st.lists(st.builds(Member, node=names, replica=uuids), min_size=1, max_size=3)
configs = st.builds(
    Config,
    epoch=st.integers(1, 2**63 - 1),
    state=st.sampled_from(ConfigState),
    primary=st.builds(Primary, node=names, instance=uuids),
    members=members,
    previous_members=st.none() | members,
    learners=st.none() | members,
    single_copy=st.none() | uuids,
    restored=st.none() | st.integers(1, 2**63 - 1),
)


@given(configs)
def test_config_comes_back_as_it_was(value):
    assert convert.config_from_proto(convert.config_to_proto(value)) == value
