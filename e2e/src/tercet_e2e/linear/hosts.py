"""Hosts: each a process of `tercet-attach record` at an end of the wires, one life after the other.

A host that is killed comes again under its name with a new history and a writer's number of its
own, so that no two writes of a run have the same value.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tercet_api.names import host_id, host_nqn
from tercet_e2e.errors import ProcessError
from tercet_e2e.linear.network import Network

DONE = b'"is":"done"'
END_TIMEOUT_S = 90.0
"""Longer than a recorder waits for what is in flight."""


@dataclass(frozen=True, slots=True)
class Habit:
    """How busy a host is."""

    clients: int
    pace_us: int


HABITS = {
    "host-1": Habit(4, 10_000),
    "host-2": Habit(4, 10_000),
    # So many slow clients that one begins something at every moment, also while others wait.
    "host-3": Habit(32, 500_000),
}


class Host:
    """One host."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, ids: Iterator[int], seed: int
    ) -> None:
        self.name = name
        self.histories: list[Path] = []
        self.done = 0
        self._command = command
        self._folder = folder
        self._ids = ids
        self._seed = seed
        self._process: asyncio.subprocess.Process | None = None
        self._seen_bytes = 0

    async def begin(self) -> None:
        """A life begins."""
        number = next(self._ids)
        history = self._folder / f"{self.name}.{len(self.histories) + 1}.jsonl"
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL", "--"),
                *(*self._command, "--out", str(history)),
                *("--writer", str(number), "--seed", str(self._seed + number)),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.histories.append(history)
        self._seen_bytes = 0

    async def kill(self) -> None:
        """A life ends at once: of what is in flight nobody knows the outcome."""
        assert self._process is not None
        self.check()
        self.look()
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()
        self._process = None

    def check(self) -> None:
        """Raises ProcessError when the host has ended by itself."""
        if self._process is not None and self._process.returncode is not None:
            raise ProcessError(
                f"{self.name} has ended with {self._process.returncode}; what it said is in "
                f"{self._folder / f'{self.name}.log'}"
            )

    def look(self) -> int:
        """How many operations have ended well so far."""
        if self.histories and self.histories[-1].exists():
            with self.histories[-1].open("rb") as history:
                history.seek(self._seen_bytes)
                new = history.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._seen_bytes += len(whole)
            self.done += whole.count(DONE)
        return self.done

    async def end(self) -> None:
        """The last life ends in order: what is in flight is waited for. Raises ProcessError."""
        assert self._process is not None
        assert self._process.stdin is not None
        self.check()
        self._process.stdin.close()
        try:
            code = await asyncio.wait_for(self._process.wait(), END_TIMEOUT_S)
        except TimeoutError:
            raise ProcessError(f"{self.name} does not end within {END_TIMEOUT_S:.0f} s") from None
        if code != 0:
            raise ProcessError(f"{self.name}: not everything it asked for was answered ({code})")
        self.look()

    async def drop(self) -> None:
        """Whatever it does, it ends now."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


def make(
    common: Sequence[str], network: Network, program: str, folder: Path, seed: int
) -> list[Host]:
    """All hosts, none of them begun. `common`: what every recorder is told."""
    ids = itertools.count(1)
    found = []
    for name, habit in HABITS.items():
        command = [*network.enter(name), program, "record", *common]
        command += ["--host-nqn", host_nqn(name), "--host-id", host_id(name)]
        command += ["--clients", str(habit.clients), "--pace-us", str(habit.pace_us)]
        found.append(Host(name, command, folder, ids, seed))
    return found


def longest_gap_s(histories: Iterable[Path]) -> float:
    """The longest time in which no host got an answer."""
    times = sorted(
        int(json.loads(line)["at"])
        for history in histories
        for line in history.read_bytes().splitlines()
        if DONE in line
    )
    return max((later - sooner for sooner, later in itertools.pairwise(times)), default=0) / 1e9
