"""The simulations: the same seed gives the same numbers, and what they show of both policies."""

from __future__ import annotations

import csv
import itertools
import random
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from tercet_cli.sim import plots
from tercet_cli.sim.command import app
from tercet_cli.sim.experiment import Algorithm, Case, run_jobs, run_step, run_trial, write_csv
from tercet_cli.sim.failures import Failing, Peace, run_death, run_peace
from tercet_cli.sim.membership import peace_parts, table_cases
from tercet_cli.sim.rounds import Loss, Network, Order, Policy, Sure
from tercet_cli.sim.scale import VARIANTS, Asynchronous, rounds_until, run_scale
from tercet_cli.sim.statistics import estimate, five_trials
from tercet_cli.sim.walk import walk
from tercet_node.membership import Nid

SMALL = 16
POPCORN = (Policy.PROBE, Policy.ACTIVE, Policy.LOWER)


def small(case, drop=0.1, trial=0, **more):
    return run_trial(case, drop, trial, length_max=SMALL, **more)


# ------------------------------------------------------------------ the walk


def test_walk_takes_the_first_gap_and_ends_at_its_length():
    steps = list(walk("seed", SMALL))
    assert steps[-1].length == SMALL
    for one, two in itertools.pairwise(steps):
        assert two.length == one.length + (1 if two.entry.present else -1)
        if two.entry.present:
            assert two.entry.nid == two.before.first_gap()
        else:
            assert two.entry.nid in two.before
        assert two.stones.present == two.before.present
        assert len({entry.incarnation for entry in two.stones if entry.nid == 0}) == 1
    assert [s.entry for s in walk("seed", SMALL)] == [s.entry for s in steps]
    assert [s.entry for s in walk("other", SMALL)] != [s.entry for s in steps]


# ------------------------------------------------------------------ the experiment


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_same_seed_same_rows(algorithm):
    case = Case(algorithm)
    assert small(case) == small(case)
    assert small(case) != small(case, trial=1)


def test_step_alone_is_the_very_step_of_the_whole_trial():
    case = Case(Algorithm.NEIGHBOURS)
    whole = small(case)
    assert small(case, length=9) == [row for row in whole if row.length == 9] != []
    assert small(case, every=3) == [row for row in whole if row.step % 3 == 0]
    jobs = [(case, 0.1, trial, 9, SMALL, 1) for trial in (0, 1)]
    assert list(run_jobs(jobs, 2)) == list(run_jobs(jobs, 1)), "in other processes too"


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_nothing_lost_nothing_to_repair(algorithm):
    for row in small(Case(algorithm), drop=0.0):
        assert (row.inconsistent, row.wrong_repairs, row.lost) == (0, 0, 0)
        assert row.rounds == (algorithm is Algorithm.ACKNOWLEDGEMENT)


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("order", list(Order))
def test_checks_between_neighbours_settle_every_error(policy, order):
    rows = small(Case(Algorithm.NEIGHBOURS, policy, order), drop=0.2)
    assert not any(row.failed for row in rows)
    assert any(row.inconsistent for row in rows)
    assert all((row.rounds > 0) == (row.inconsistent > 0) for row in rows)


def test_wrong_repairs_popcorn_many_versioned_none_by_the_same_seeds():
    wrong, hurt = {}, {}
    for policy in Policy:
        rows = small(Case(Algorithm.NEIGHBOURS, policy), drop=0.2)
        wrong[policy] = sum(row.wrong_repairs for row in rows)
        hurt[policy] = [row.inconsistent for row in rows]
    assert wrong.pop(Policy.VERSIONED) == 0
    assert all(wrong.values()), wrong
    assert len(set(map(str, hurt.values()))) == 1, "the same messages were lost for all"


def test_lost_command_costs_a_subtree_or_one_node():
    rows = {loss: small(Case(Algorithm.NEIGHBOURS, loss=loss), drop=0.2) for loss in Loss}
    hurt = {loss: sum(row.inconsistent for row in some) for loss, some in rows.items()}
    assert hurt[Loss.NODE] < hurt[Loss.SUBTREE]


def test_sure_probes_make_no_newcomer_go_and_the_lower_nid_still_brings_the_removed_back():
    for policy in (Policy.PROBE, Policy.ACTIVE):
        rows = small(Case(Algorithm.NEIGHBOURS, policy, sure=Sure.PROBES), drop=0.2)
        wrong = {row.command for row in rows if row.wrong_repairs}
        assert wrong == ({"remove"} if policy is Policy.PROBE else set())


def test_sure_offset_reaches_everybody():
    """All but commands and lists are sure: who misses the command has two checks a round."""
    rounds = {}
    for sure in (Sure.PROBES, Sure.OFFSETS):
        case = Case(Algorithm.RANDOM, Policy.ACTIVE, loss=Loss.NODE, sure=sure)
        rounds[sure] = sum(row.rounds for row in small(case, drop=0.2))
    assert rounds[Sure.OFFSETS] < rounds[Sure.PROBES]


def test_table_has_each_case_once():
    cases = table_cases()
    assert len(set(cases)) == len(cases) == 28


def test_acknowledgements_try_again_and_reach_all_or_give_up():
    rows = small(Case(Algorithm.ACKNOWLEDGEMENT), drop=0.2)
    assert max(row.rounds for row in rows) > 2
    assert all(row.failed or row.inconsistent == 0 for row in rows)
    assert any(row.failed for row in small(Case(Algorithm.ACKNOWLEDGEMENT), drop=0.6))


def test_newcomers_first_contact_is_never_lost():
    for step in walk("seed", SMALL):
        if step.entry.present:
            network = Network(Policy.PROBE, step, 1.0, random.Random(0))
            assert len(network.machines[step.entry.nid].list) == step.length
            assert network.inconsistent() == max(0, step.length - 2)


def test_csv_is_what_was_counted(tmp_path):
    rows = small(Case(Algorithm.RANDOM))
    write_csv(tmp_path / "rounds.csv", rows)
    with (tmp_path / "rounds.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [int(line["rounds"]) for line in found] == [row.rounds for row in rows]
    assert {"inconsistent", "flooded", "length", "wrong_repairs"} <= set(found[0])


def test_figures_are_the_same_for_the_same_rows(tmp_path):
    rows = small(Case(Algorithm.NEIGHBOURS))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made = [plots.source_figures(tmp_path / name, rows, "popcorn") for name in "ab"]
    assert [path.name.split("-")[1] for path in made[0]] == ["5", "7"]
    assert [number for number, *_ in plots.FIGURES] == [2, 3, 4, 5, 6, 7]
    for one, two in zip(*made, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_figures_that_are_compared_have_room_for_both():
    rows = [*small(Case(Algorithm.RANDOM)), *small(Case(Algorithm.NEIGHBOURS))]
    lines = plots.by_length((row for row in rows if row.algorithm == Algorithm.RANDOM), fmean)
    both = plots.highest(rows, (Algorithm.RANDOM, Algorithm.NEIGHBOURS), fmean)
    assert both >= max(y for points in lines.values() for _, y in points) > 0


# ------------------------------------------------------------------ numbers


def test_interval_is_that_of_whole_trials():
    same = [[1, 1, 2, 1]] * 10
    assert (estimate(same).mean, estimate(same).half) == (1.25, 0.0)
    split = [[1] * 8, [2] * 8] * 5
    assert estimate(split).mean == 1.5
    assert estimate(split).half == pytest.approx(1.96 * 0.5 / 9**0.5)


def test_five_trials_of_one_kind_show_what_all_show():
    five = five_trials([[1, 3]] * 20, "seed")
    assert (five.mean_low, five.mean_high, five.highest_low, five.highest_high) == (2, 2, 3, 3)


# ------------------------------------------------------------------ many nodes


def test_thousand_nodes_agree_within_a_few_checks_and_never_wrongly():
    for variant in VARIANTS[:2]:
        found = run_scale(variant, 1000, 0.05, 1)
        assert found.missed > 0
        assert found.rounds <= 3
        assert found.wrong_repairs == 0
        assert found == run_scale(variant, 1000, 0.05, 1)


def test_cost_does_not_grow_with_the_number_of_nodes():
    few, many = (run_scale(VARIANTS[0], nodes, 0.05, 1) for nodes in (100, 2000))
    assert many.messages_per_node_minute < 1.5 * few.messages_per_node_minute
    assert many.quiet_bytes_per_node_minute < 2 * few.quiet_bytes_per_node_minute


def test_news_that_a_check_brings_goes_down_the_tree():
    """Node 1 and all below it hear nothing: one check, and they know in O(log n) messages."""
    hops = {}
    for variant in VARIANTS[:2]:
        network = Asynchronous(variant, 1000, 0.0, 1)
        network.machines[1].locked = True
        network.add(0.0)
        network.run(1.0)
        network.machines[1].locked = False
        network.run(60.0)
        assert network.unaware == 0
        hops[variant.name] = network.hops
    assert hops["versioned"] <= 24 < hops["without the tree"]


def test_rounds_are_counted_by_the_pace_of_checks():
    assert [rounds_until(s) for s in (0.0, 1.9, 2.0, 5.9, 6.0, 69.9, 70.0)] == [0, 0, 1, 1, 2, 2, 3]


def test_run_step_needs_nothing_but_its_step():
    case = Case(Algorithm.RANDOM, Policy.VERSIONED)
    step = list(walk("check-random 0", SMALL))[20]
    assert run_step(case, 0.1, 0, step) == small(case)[20]


def test_death_is_known_in_time_and_the_same_by_seed():
    times = [run_death(30, 0.05, seed) for seed in range(3)]
    assert times == [run_death(30, 0.05, seed) for seed in range(3)]
    assert max(times) < 2.0


def test_peace_has_no_alarm_and_a_ladder_that_falls():
    peace = run_peace(20, 0.1, 1, 0.02)
    assert peace.alarms == 0
    assert peace.tries[2] > peace.tries[3]
    assert 0.0 < peace.alarms_a_day() < 1.0
    assert peace == run_peace(20, 0.1, 1, 0.02), "by seed"
    both = run_peace(20, 0.1, 2, 0.02)
    both.add(peace)
    assert both.seconds == pytest.approx(2 * peace.seconds)


def test_day_is_hours_of_their_own_seeds_however_many_work_on_them():
    day = peace_parts(100, 0.1, 24.0)
    assert [(seed, hours) for _, _, seed, hours in day] == [(seed, 1.0) for seed in range(24)]
    assert [part[3] for part in peace_parts(100, 0.1, 1.5)] == [1.0, 0.5]


def test_false_alarm_is_counted_once_however_many_are_told():
    """A node nobody hears for a while: it lives, so each judgement that is made of it is wrong."""
    network = Failing(20, 0.0, "alarm")
    network.run(3.0)
    network.cut = {Nid(7)}
    network.run(6.0)
    wrong = {who for (who, about), alive in network.judged.items() if about == 7 and not alive}
    assert len(wrong) == 19
    by_7 = sum(who == 7 and not alive for (who, _), alive in network.judged.items())
    assert 1 <= network.counts.alarms - by_7 <= 2, "its two neighbours at most"


def test_ladder_says_what_alarms_would_be():
    """Every second watch goes on at each step: so is the last one, the judgement."""
    tries = Counter({2: 3200, 3: 1600, 4: 800, 5: 400, 6: 400})
    peace = Peace(86_400.0, tries=tries)
    assert peace.alarms_a_day() == 6400 / 2**5


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figures", "--policy", "mine"], "--policy mine: there is none"),
        (["scale", "--nodes", "10,many"], "--nodes 10,many"),
        (["scale", "--drop", "1.5"], "not all within 0 to 1"),
    ],
)
def test_command_that_cannot_be_says_why_and_what_to_do(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        app(["membership", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "next:" in said


def test_command_writes_what_it_names(tmp_path, capsys):
    arguments = ["--nodes", "20,40", "--drop", "0.05", "--seeds", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        app(["membership", "scale", *arguments])
    assert ended.value.code == 0
    named = capsys.readouterr().out.split()
    assert {Path(each).name for each in named} == {path.name for path in tmp_path.iterdir()}
