"""Rows of benchmarks: medians, goals, and who replaces whose."""

import asyncio
import json

import pytest

from tercet_e2e.bench import book, distribution, fleet, noderep, passthrough, writer
from tercet_e2e.bench.floor import BenchError


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


# ------------------------------------------------------------------ failover


def test_a_distribution_has_its_goal_at_p99_alone():
    found = distribution.rows(
        "failover", distribution.Distribution("stall", "ms", [*range(1, 101)], 99.0)
    )
    assert [row["value"] for row in found] == [50, 99, 100]
    assert [row["goal"] for row in found] == [None, 99.0, None]
    assert [row["holds"] for row in found] == [None, True, None]


def test_of_fifty_trials_the_longest_is_what_99_percent_kept():
    values = [1.0] * 49 + [900.0]
    assert distribution.at_percent(values, 99) == 900.0
    assert distribution.at_percent(values, 50) == 1.0


def test_every_trial_is_in_the_figure(tmp_path):
    cases = [
        distribution.Distribution("killed", "ms", [210.0, 190.0], 500.0),
        distribution.Distribution("lost", "ms", [900.0], None),
    ]
    distribution.figure(cases, tmp_path / "build" / "figure.svg")
    drawn = (tmp_path / "build" / "figure.svg").read_text()
    assert ">killed<" in drawn
    assert ">lost<" in drawn


async def test_a_host_tells_its_longest_write_since_a_moment(tmp_path):
    """A program in place of tercet-attach: one long write among short ones, then silence."""
    script = tmp_path / "attach"
    lines = [(10, 3, 0, 500.0), (20, 1, 0, 250_000.0), (30, 0, 0, 0.0), (40, 5, 0, 400.0)]
    keys = ("at_ns", "operations", "errors", "max_us")
    told = "\n".join(json.dumps(dict(zip(keys, line, strict=True))) for line in lines)
    script.write_text(f"#!/bin/sh\ncat <<END\n{told}\nEND\nsleep 60\n")
    script.chmod(0o755)
    async with writer.Writer(str(script), [], every_ms=10) as host:
        assert await host.writes(30, windows=1) == 40
        assert host.longest_ms(10) == 250.0
        assert host.longest_ms(20) == 0.4
        assert host.first(20) == 40
        with pytest.raises(BenchError, match="stand still"):
            await host.writes(0, windows=2, timeout_s=0.0)
        host.windows.append(writer.Window(50, 1, 1, 9.0))
        with pytest.raises(BenchError, match="has failed"):
            host.longest_ms(40)


async def test_a_host_that_has_ended_is_no_host_that_waits():
    async with writer.Writer("true", [], every_ms=10) as host:
        with pytest.raises(BenchError, match="has ended"):
            await host.writes(0, windows=1)


def test_a_volume_is_whole_when_every_member_is_in_sync():
    members = [{"node": f"n{i}"} for i in (1, 2, 3)]
    replicas = [{"node": f"n{i}", "state": "InSync"} for i in (1, 2, 3)]
    config = {"state": "Active", "members": members}
    ready = [{"type": "Ready", "status": "True"}]

    def whole(**changed):
        status = {"config": config, "replicas": replicas, "conditions": ready} | changed
        return fleet.is_whole({"status": status})

    assert whole()
    assert not whole(config=config | {"state": "Recovering"})
    assert not whole(config=config | {"previousMembers": members})
    assert not whole(replicas=[*replicas[:2], {"node": "n3", "state": "Lagging"}])
    assert whole(replicas=[*replicas, {"node": "n4", "state": "Former"}])
    assert not fleet.is_whole({})


async def test_a_trial_begins_when_every_agent_is_there():
    """Every second trial of "node lost" took 5 to 7 s, for the fault of the one before.

    Replicas were in sync again, and the next node was lost, while the agents of the two others were
    still starting: both engines asked for the swap, and nobody was there to carry it out.
    """
    starts, asked = [503, 503, 200], []

    async def answer(reader, writer):
        status = starts[min(len(asked), 2)]
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        body = b"" if status == 200 else b"engine not configured\n"
        head = f"HTTP/1.1 {status} x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/readyz"
        await fleet.agents_ready([url], timeout_s=30.0)
        assert len(asked) == 3
        starts[2] = 503
        with pytest.raises(BenchError, match="engine not configured"):
            await fleet.agents_ready([url], timeout_s=0.0)
    with pytest.raises(BenchError, match="not after 0 s"):
        await fleet.agents_ready([url], timeout_s=0.0)


def machine_says(iops: dict[tuple[int, str], float]) -> list[str]:
    """The lines of a machine that ran each load once."""
    lines = ["TERCET-UP"]
    for (number, runner), value in iops.items():
        lines.append(f"{passthrough.RUN}{number} {runner}")
        if runner == "fio":
            access = passthrough.LOADS[number].access
            job = {"jobs": [{access: {"iops": value}}]}
            lines += ["fio: a note", *json.dumps(job, indent=1).splitlines()]
        else:
            lines.append(json.dumps({"iops": value}))
    return [*lines, "TERCET-EXIT 0"]


def test_passthrough_is_told_beside_fio_of_the_same_load():
    speeds = {"fio": 1000.0, "reactor": 950.0, "store": 400.0}
    loads = range(len(passthrough.LOADS))
    said = machine_says({(n, name): v + n for n in loads for name, v in speeds.items()})
    rows = {row["case"]: row for row in passthrough.table(passthrough.figures(said))}
    assert len(rows) == 2 * len(passthrough.LOADS)
    deep = rows["reactor: 4 KiB random read, depth 32"]
    assert (deep["value"], deep["floor"], deep["holds"]) == (953.0, 1003.0, True)
    assert rows["store: 4 KiB random write, depth 1"]["holds"] is None
    with pytest.raises(BenchError, match="said no JSON"):
        passthrough.figures([f"{passthrough.RUN}0 store", "killed"])
