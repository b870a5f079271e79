"""The check that decides whether a commit was lost must itself notice every kind of loss."""

import multiprocessing
import sqlite3
import sys
import time
from pathlib import Path

import pytest

from tercet_e2e.workload import (
    SCHEMA,
    Ack,
    commit_one,
    connect,
    longest_stall_s,
    lose_commit,
    read_acks,
    run_writers,
    verify,
)


@pytest.fixture
def database(tmp_path: Path) -> tuple[Path, list[Ack]]:
    path = tmp_path / "db"
    connection = connect(path)
    connection.execute(SCHEMA)
    acks = []
    for number in range(1, 21):
        writer, sequence = number % 2, (number + 1) // 2
        acks.append(Ack(writer, sequence, commit_one(connection, writer, sequence), number))
    connection.close()
    return path, acks


def test_all_is_well_when_nothing_is_lost(database):
    path, acks = database
    assert verify(path, acks).well


@pytest.mark.parametrize("lost", [1, 7, 20])
def test_a_lost_commit_is_named_wherever_it_was(database, lost: int):
    path, acks = database
    lose_commit(path, lost)
    verdict = verify(path, acks)
    assert any(f"acknowledged commit {lost} " in problem for problem in verdict.problems)


def test_a_changed_row_is_noticed(database):
    path, acks = database
    connection = sqlite3.connect(path)
    connection.execute("UPDATE commits SET payload = x'00' WHERE id = 9")
    connection.commit()
    connection.close()
    assert "commit 9 " in verify(path, acks).problems[0]


def test_commits_swapped_between_writers_are_noticed(database):
    path, acks = database
    acks[3] = Ack(1 - acks[3].writer, 99, acks[3].id, 0)
    assert not verify(path, acks).well


def test_a_damaged_file_is_a_problem_and_not_a_crash(database):
    path, acks = database
    raw = bytearray(path.read_bytes())
    raw[4096 : 4096 * 3] = bytes(4096 * 2)
    path.write_bytes(raw)
    assert not verify(path, acks).well


def test_writers_log_what_they_committed_and_stop_when_asked(tmp_path: Path):
    writers = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(run_writers(tmp_path / "db", tmp_path / "acks", 3))
    )
    writers.start()
    deadline = time.monotonic() + 120
    seen: list[Ack] = []
    # Each writer, too: one may have all the processor's time at first.
    while len(seen) < 30 or {ack.writer for ack in seen} != {0, 1, 2}:
        assert time.monotonic() < deadline, f"only {len(seen)} commits"
        time.sleep(0.05)
        seen = read_acks(tmp_path / "acks")
    writers.terminate()
    writers.join(120)
    assert writers.exitcode == 0
    acks = read_acks(tmp_path / "acks")
    assert {ack.writer for ack in acks} == {0, 1, 2}
    verdict = verify(tmp_path / "db", acks)
    assert verdict.well, verdict
    assert verdict.commits >= 30


def test_the_stall_is_the_longest_gap_that_touches_the_window():
    acks = [Ack(0, n, n, t * 10**9) for n, t in enumerate([0, 1, 2, 5, 6, 16])]
    assert longest_stall_s(acks, 3 * 10**9, 4 * 10**9) == 3
    assert longest_stall_s(acks, 0, 6 * 10**9) == 10
    assert longest_stall_s([], 0, 1) == 0
