"""A database that commits without pause, and the check that it has lost nothing.

Several writer processes insert rows into one SQLite database with full synchronisation (WAL, one
fsync a commit). Each commit that SQLite has acknowledged is written to a log outside the volume,
one line `WRITER SEQUENCE ID MONOTONIC_NS`, and only then does the writer go on. Rows carry a digest
that chains each to the one before it in commit order, so a row that is lost, changed or out of
order is found by `verify` without knowing what was written.

What is started where, and killed when, is left to the caller.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

BUSY_TIMEOUT_S = 120.0
PAYLOAD_BYTES = 1500
SCHEMA = """
CREATE TABLE IF NOT EXISTS commits (
  id INTEGER PRIMARY KEY,
  writer INTEGER NOT NULL,
  sequence INTEGER NOT NULL,
  payload BLOB NOT NULL,
  digest BLOB NOT NULL,
  UNIQUE (writer, sequence)
)
"""


@dataclass(frozen=True)
class Ack:
    """A commit that SQLite has acknowledged."""

    writer: int
    sequence: int
    id: int
    at_ns: int


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    commits: int
    """Rows in the database."""
    acknowledged: int
    """Commits that must be there."""
    digest: str
    """Chain digest of the commit that was asked about: equal digests mean equal prefixes."""
    problems: tuple[str, ...]
    """Each says which commit and what is wrong with it; empty when all is well."""

    @property
    def well(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def chained(before: bytes, row_id: int, writer: int, sequence: int, payload: bytes) -> bytes:
    """Digest of a row: of the row before it and of its own fields."""
    head = f"{row_id}:{writer}:{sequence}:".encode()
    return hashlib.sha256(before + head + payload).digest()


def connect(database: Path) -> sqlite3.Connection:
    """Open with full synchronisation. The volume may be failing over: wait rather than give up."""
    connection = sqlite3.connect(database, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def commit_one(connection: sqlite3.Connection, writer: int, sequence: int) -> int:
    """Insert one row and commit it durably; returns its id."""
    payload = os.urandom(PAYLOAD_BYTES)
    connection.execute("BEGIN IMMEDIATE")
    last = connection.execute("SELECT id, digest FROM commits ORDER BY id DESC LIMIT 1").fetchone()
    before_id, before = last if last is not None else (0, b"")
    row_id = int(before_id) + 1
    digest = chained(before, row_id, writer, sequence, payload)
    connection.execute(
        "INSERT INTO commits VALUES (?, ?, ?, ?, ?)", (row_id, writer, sequence, payload, digest)
    )
    connection.execute("COMMIT")
    return row_id


def write_commits(database: Path, acks: Path, writer: int, pause_ms: int) -> None:
    """Commit and log until told to stop (SIGTERM); continues where this writer's rows end."""
    stop = False

    def ask_to_stop(_number: int, _frame: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    connection = connect(database)
    row = connection.execute(
        "SELECT COALESCE(MAX(sequence), 0) FROM commits WHERE writer = ?", (writer,)
    ).fetchone()
    sequence = int(row[0])
    with acks.open("a", buffering=1) as log:
        while not stop:
            sequence += 1
            row_id = commit_one(connection, writer, sequence)
            log.write(f"{writer} {sequence} {row_id} {time.monotonic_ns()}\n")
            if pause_ms:
                time.sleep(pause_ms / 1000)
    connection.close()


def run_writers(database: Path, acks: Path, writers: int, pause_ms: int = 0) -> int:
    """Run writers until SIGTERM; 0 when each ended well, 1 when one met an error."""
    connection = connect(database)
    connection.execute(SCHEMA)
    connection.close()
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=write_commits, args=(database, acks, number, pause_ms))
        for number in range(writers)
    ]
    for child in children:
        child.start()

    def pass_on(_number: int, _frame: object) -> None:
        for child in children:
            child.terminate()

    signal.signal(signal.SIGTERM, pass_on)
    for child in children:
        child.join()
    return 0 if all(child.exitcode == 0 for child in children) else 1


def read_acks(log: Path) -> list[Ack]:
    """The acknowledged commits in order. A last line that is not whole yet is left out."""
    if not log.exists():
        return []
    whole, _, _ = log.read_text().rpartition("\n")
    return [Ack(*(int(field) for field in line.split(" "))) for line in whole.splitlines()]


def verify(database: Path, must_have: list[Ack], at_id: int | None = None) -> Verdict:
    """Check integrity, that ids are 1..n chained without a gap, and that every ack is there.

    Opens the database read-write, as recovery of its log needs. `at_id`: whose digest to report;
    the last one's without it.
    """
    problems: list[str] = []
    connection = connect(database)
    try:
        answer = connection.execute("PRAGMA integrity_check").fetchall()
        if answer != [("ok",)]:
            problems.append(f"integrity_check says {answer[:3]}")
        present: dict[int, tuple[int, int]] = {}
        before, digest_at = b"", ""
        rows = connection.execute(
            "SELECT id, writer, sequence, payload, digest FROM commits ORDER BY id"
        )
        for expected, (row_id, writer, sequence, payload, digest) in enumerate(rows, start=1):
            present[row_id] = (writer, sequence)
            if not problems and row_id != expected:
                problems.append(f"commit {expected} is missing: {row_id} follows {expected - 1}")
            if not problems and chained(before, row_id, writer, sequence, payload) != digest:
                problems.append(f"commit {row_id} (writer {writer}, {sequence}) is not what it was")
            before = digest
            if at_id in (None, row_id):
                digest_at = digest.hex()
    except sqlite3.DatabaseError as error:
        problems.append(f"{database}: {error}")
        present, digest_at = {}, ""
    finally:
        connection.close()
    problems.extend(
        f"acknowledged commit {ack.id} (writer {ack.writer}, number {ack.sequence}) is lost"
        for ack in must_have
        if present.get(ack.id) != (ack.writer, ack.sequence)
    )
    return Verdict(len(present), len(must_have), digest_at, tuple(problems))


def longest_stall_s(acks: list[Ack], from_ns: int, until_ns: int) -> float:
    """The longest time without any commit that touches the window, in seconds."""
    times = sorted(ack.at_ns for ack in acks)
    gaps = [
        later - earlier
        for earlier, later in itertools.pairwise(times)
        if later >= from_ns and earlier <= until_ns
    ]
    return max(gaps, default=0) / 1e9


def lose_commit(database: Path, row_id: int) -> None:
    """Take a commit away on purpose, to see that `verify` notices."""
    connection = connect(database)
    connection.execute("DELETE FROM commits WHERE id = ?", (row_id,))
    connection.close()


def main() -> int:
    """`python -m tercet_e2e.workload write|verify`; runs inside pods."""
    parser = argparse.ArgumentParser(prog="workload")
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="commit until SIGTERM")
    check = commands.add_parser("verify", help="print a verdict as JSON; 0 when all is well")
    for command in (write, check):
        command.add_argument("--database", type=Path, required=True)
        command.add_argument("--acks", type=Path, required=True)
    write.add_argument("--writers", type=int, default=4)
    write.add_argument("--pause-ms", type=int, default=0, help="after each commit of a writer")
    check.add_argument("--at", type=int, help="report the chain digest of this commit")
    arguments = parser.parse_args()
    if arguments.command == "write":
        return run_writers(
            arguments.database, arguments.acks, arguments.writers, arguments.pause_ms
        )
    verdict = verify(arguments.database, read_acks(arguments.acks), arguments.at)
    print(json.dumps(asdict(verdict)))
    return 0 if verdict.well else 1


if __name__ == "__main__":
    sys.exit(main())
