"""The processes of a cluster: started, restarted, watched and ended by the tool.

Each gets a log file, a record (pid and start time) for a later clean-up, the cluster's mark in its
environment, a session of its own (a Ctrl-C is the tool's matter) and SIGKILL when the tool dies
(`setpriv --pdeathsig`). What those do not reach, the reaper does.

A process that dies is started again after a short, growing pause: so fault tests need only kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NewType, Self

import structlog

from tercet_e2e.cleanup import clean, start_time_ticks
from tercet_e2e.errors import ProcessError
from tercet_e2e.reaper import ORDERLY_END
from tercet_e2e.state import MARKER, ROLE, ClusterId, StateFolder, write_atomically

ProcessName = NewType("ProcessName", str)

RESTART_PAUSE_MIN_S = 0.1
RESTART_PAUSE_MAX_S = 5.0
STABLE_AFTER_S = 10.0  # a process that lived this long starts again with the shortest pause
LOG_TAIL_BYTES = 2000

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Program:
    """What to run, and under which name."""

    name: ProcessName
    argv: Sequence[str | Path]
    env: Mapping[str, str] = field(default_factory=dict)
    role: str = ""


def restart_pause_s(previous_s: float, lived_s: float) -> float:
    """How long to wait before the next start."""
    if lived_s >= STABLE_AFTER_S:
        return RESTART_PAUSE_MIN_S
    return min(max(previous_s * 2, RESTART_PAUSE_MIN_S), RESTART_PAUSE_MAX_S)


class Processes:
    """All processes of one cluster. Use as an async context manager: leaving it ends them all."""

    def __init__(self, state: StateFolder, cluster: ClusterId, *, remove: bool = False) -> None:
        self._state = state
        self._cluster = cluster
        self._remove = remove
        self._running: dict[ProcessName, asyncio.subprocess.Process] = {}
        self._keepers: dict[ProcessName, asyncio.Task[None]] = {}
        self._reaper: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        command = [sys.executable, "-m", "tercet_e2e.reaper", str(self._state.root)]
        command += ["--remove"] if self._remove else []
        with self._open_log(ProcessName("reaper")) as output:
            self._reaper = subprocess.Popen(  # noqa: ASYNC220 - it outlives the event loop
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        for keeper in self._keepers.values():
            keeper.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
        # From here on a crash is the reaper's: its pipe closes only after the cleaning.
        await asyncio.to_thread(clean, self._state)
        await asyncio.gather(*(p.wait() for p in self._running.values()))
        assert self._reaper is not None
        assert self._reaper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._reaper.stdin.write(ORDERLY_END)
            self._reaper.stdin.close()
        await asyncio.to_thread(self._reaper.wait)

    def log_path(self, name: ProcessName) -> Path:
        """Where the output goes."""
        return self._state.logs / f"{name}.log"

    def log_tail(self, name: ProcessName) -> str:
        """The end of a process's log, for messages."""
        try:
            content = self.log_path(name).read_bytes()
        except FileNotFoundError:
            return ""
        return content[-LOG_TAIL_BYTES:].decode(errors="replace")

    def pid(self, name: ProcessName) -> int | None:
        """The pid of the running instance; None between two."""
        process = self._running.get(name)
        return process.pid if process is not None and process.returncode is None else None

    async def start(self, program: Program) -> None:
        """Starts a program; returns as soon as it runs, not when it is ready."""
        assert program.name not in self._keepers, f"{program.name} runs already"
        process = await self._spawn(program)
        keeper = self._keep(program, process)
        self._keepers[program.name] = asyncio.create_task(keeper, name=f"keep {program.name}")

    def kill(self, name: ProcessName, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to the running instance; says which pid got it."""
        pid = self.pid(name)
        if pid is None:
            raise ProcessError(f"{name} does not run at the moment")
        self._running[name].send_signal(number)
        return pid

    async def lose(self, *names: ProcessName, also: Sequence[int] = ()) -> None:
        """Kills programs, all at one time, and leaves them dead; `also`: children of the first."""
        keepers = [self._keepers.pop(name) for name in names]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        processes = [self._running[name] for name in names]
        for number, process in enumerate(processes):
            if process.returncode is None:
                process.kill()
            for child in also if number == 0 else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        await asyncio.gather(*(process.wait() for process in processes))

    async def end(self, name: ProcessName, timeout_s: float) -> None:
        """Ends a program with SIGTERM and leaves it ended; one that does not end is killed."""
        keeper = self._keepers.pop(name)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        process = self._running[name]
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), timeout_s)
            except TimeoutError:
                log.warning("process does not end", process=name, timeout_s=timeout_s)
                process.kill()
                await process.wait()

    async def _spawn(self, program: Program) -> asyncio.subprocess.Process:
        environment = {**os.environ, **program.env, MARKER: self._cluster, ROLE: program.role}
        with self._open_log(program.name) as output:
            process = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL", "--"),
                *(str(argument) for argument in program.argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=self._state.root,
                start_new_session=True,
            )
        self._running[program.name] = process
        record = {
            "name": program.name,
            "pid": process.pid,
            "start_ticks": start_time_ticks(process.pid) or 0,
            "role": program.role,
            "argv": [str(argument) for argument in program.argv],
        }
        path = self._state.processes / f"{program.name}.json"
        write_atomically(path, json.dumps(record))
        return process

    def _open_log(self, name: ProcessName) -> IO[bytes]:
        return self.log_path(name).open("ab")

    async def _keep(self, program: Program, process: asyncio.subprocess.Process) -> None:
        pause_s = 0.0
        while True:
            started_s = time.monotonic()
            code = await process.wait()
            pause_s = restart_pause_s(pause_s, time.monotonic() - started_s)
            log.info("process restarts", process=program.name, code=code, pause_s=pause_s)
            await asyncio.sleep(pause_s)
            process = await self._spawn(program)
