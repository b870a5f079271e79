"""Rows of benchmarks: medians, goals, and who replaces whose."""

import json

from tercet_e2e.bench import book, noderep


def _run(structure, threads, read_percent, ops_per_s):
    run = {"structure": structure, "threads": threads, "read_percent": read_percent}
    return json.dumps(run | {"ops_per_s": ops_per_s})


def _stalled(structure, ops_per_s):
    return json.dumps({"structure": structure, "stalled": True, "ops_per_s": ops_per_s})


LINES = [
    *(_run("noderep", 2, 99, ops) for ops in (90, 50, 10)),
    *(_run("std RwLock", 2, 99, ops) for ops in (20, 30, 20)),
    *(_run("noderep", 2, 50, ops) for ops in (5, 5, 5)),
    *(_run("std RwLock", 2, 50, ops) for ops in (10, 10, 10)),
    _stalled("noderep", 7),
    _stalled("std RwLock", 0),
]


def test_a_row_has_the_median_and_the_goal_only_where_there_is_one():
    rows = {row["case"]: row for row in noderep.rows(noderep.medians(LINES))}
    mostly_reads = rows["99 % reads, 2 threads: noderep"]
    assert (mostly_reads["value"], mostly_reads["floor"], mostly_reads["ratio"]) == (50, 20, 2.5)
    assert (mostly_reads["goal"], mostly_reads["holds"]) == (2.0, True)
    loses = rows["50 % reads, 2 threads: noderep"]
    assert (loses["ratio"], loses["goal"], loses["holds"]) == (0.5, None, None)
    assert rows["reads beside a stalled reader: noderep"]["holds"] is True
    assert rows["reads beside a stalled reader: std RwLock"]["holds"] is None


def test_a_stalled_reader_that_stops_others_breaks_the_goal():
    found = noderep.medians([*LINES[:-2], _stalled("noderep", 0)])
    assert [row["holds"] for row in noderep.rows(found) if "stalled" in row["case"]] == [False]


def test_the_figure_and_the_table_have_every_structure(tmp_path):
    found = noderep.medians(LINES)
    noderep.figure(found, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "std RwLock" in drawn
    assert "50 % reads" in drawn
    assert [column.header for column in noderep.table(found).columns] == [
        "case",
        "noderep",
        "std RwLock",
    ]


def test_a_benchmark_replaces_its_own_suites_only(tmp_path):
    volume, table = {"suite": "volume", "value": 1}, {"suite": "table", "value": 1}
    book.write(tmp_path, [volume, table])
    book.write(tmp_path, [table | {"value": 2}])
    assert json.loads(book.path(tmp_path).read_text()) == [volume, table | {"value": 2}]
