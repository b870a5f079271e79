"""NVMe past the block layer, on Debian's kernel and an emulated drive: the reactor's suites over a
namespace found by its NGUID, and the power cut while a store is written to."""

from __future__ import annotations

import random
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from tercet_e2e.evidence import record
from tercet_e2e.vm import powercut
from tercet_e2e.vm.machine import Drive, Hardware, Machine, Software
from tercet_e2e.vm.parts import Parts

pytestmark = pytest.mark.vm

# Files of the machine are in memory, which takes no O_DIRECT.
OF_FILES = "--skip does_not_fit --skip shrunk_file --skip fresh_nodes_folder"
DRIVE_BYTES = 512 << 20
SUITE_S = 1800.0
ROUND_S = 600.0
ROUNDS = 4


def drive(folder: Path, name: str) -> Drive:
    """An empty drive."""
    file = folder / name
    with file.open("wb") as handle:
        handle.truncate(DRIVE_BYTES)
    return Drive(file, uuid.uuid4())


def passed(lines: list[str]) -> int:
    """How many tests the machine's lines say have passed."""
    return sum(
        int(line.split(" passed")[0].split()[-1]) for line in lines if "test result: ok." in line
    )


@pytest.mark.parametrize("suite", ["devices", "store"])
def test_the_suite_holds_over_a_namespace(suite, parts: Parts, programs, tmp_path):
    started = time.monotonic()
    by_nguid, by_block = drive(tmp_path, "nguid"), drive(tmp_path, "block")
    command = (
        f"export RUST_BACKTRACE=1\n"
        f"TERCET_TEST_DEVICES=nguid:{by_nguid.nguid},path:/dev/nvme1n1 "
        f"{suite} --test-threads 1 --nocapture {OF_FILES}\n"
    )
    hardware = Hardware(drives=[by_nguid, by_block])
    with Machine(parts, tmp_path, Software(command, programs), hardware) as machine:
        count = passed(machine.finish(SUITE_S))
    assert count > 2
    record(f"nvme_{suite}_tests_in_vm", count, 0, time.monotonic() - started)


def one_life(machine: Machine, acked: int, seconds: float) -> tuple[int, int]:
    """Where the log ended at the start, and the last entry that the writer said it was told."""
    tail = None
    until_s = None
    for line in machine.lines(ROUND_S):
        if line.startswith("tail "):
            tail = int(line.split()[1])
            until_s = time.monotonic() + seconds
        elif line.startswith("acked ") and tail is not None and line[6:].isdigit():
            acked = int(line[6:])
            if until_s is not None and time.monotonic() > until_s and acked > tail:
                machine.cut_power()
                return tail, acked
    raise AssertionError("\n".join(["the writer ended by itself", *machine.seen[-40:]]))


def test_nothing_acknowledged_is_lost_when_the_power_is_cut(parts: Parts, programs, tmp_path):
    """Each round: a store is written to, the power is cut, the drive loses some of what it was not
    told to keep; then what is there is held against what was acknowledged."""
    started = time.monotonic()
    chance = random.Random(5)
    image = drive(tmp_path, "cut")
    log = tmp_path / "log"
    acked, lost, undoable = 0, 0, 0
    ends: list[int] = []
    for number in range(ROUNDS):
        log.unlink(missing_ok=True)
        log.touch()
        before = tmp_path / "before"
        subprocess.run(["cp", "--sparse=always", image.file, before], check=True)
        told = f"nguid:{image.nguid} {acked} {','.join(map(str, ends))}"
        command = (
            f"TERCET_TEST_ROUND='{told}' store --exact store_round --nocapture --test-threads 1\n"
        )
        logged = Drive(image.file, image.id, log)
        hardware = Hardware(drives=[logged])
        with Machine(parts, tmp_path, Software(command, programs), hardware) as machine:
            tail, acked = one_life(machine, acked, 5.0 + number)
        if ends:
            ends[-1] = tail
        ends.append(0)
        writes = list(powercut.read(log))
        unsure = powercut.volatile(writes)
        gone = {which for which in sorted(unsure) if chance.random() < 0.5}
        powercut.apply(log, writes, gone, before)
        before.replace(image.file)
        undoable, lost = undoable + len(unsure), lost + len(gone)
        print(f"round {number}: {acked} acknowledged, {len(gone)} of {len(unsure)} undone")
    assert acked > 0
    record("nvme_power_cuts_in_vm", ROUNDS, 0, time.monotonic() - started)
