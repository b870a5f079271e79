"""A host that writes to a volume at depth 1 as long as it is there, and what each moment cost it.

tercet-attach's own host in a process of its own (`bench --every-ms`): of each window of time it
tells how many writes ended and how long the longest took. A write that meets a fault ends when the
volume is served again, so the longest latency around the fault is what the host has felt.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from tercet_e2e.bench.floor import BenchError

LIFE_S = 3600
LINE_TIMEOUT_S = 30.0
ERROR_BYTES = 500


def now_ns() -> int:
    """On the clock of the windows."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Window:
    """What ended until `at_ns`, since the window before."""

    at_ns: int
    operations: int
    errors: int
    max_us: float


class Writer:
    """One host. An async context manager; inside it the host writes."""

    def __init__(
        self, program: str, arguments: Sequence[str], every_ms: int, pause_ms: int = 0
    ) -> None:
        self._command = [program, *arguments, "--seconds", str(LIFE_S)]
        self._command += ["--every-ms", str(every_ms), "--pause-ms", str(pause_ms)]
        self.windows: list[Window] = []
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
        )
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        with suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._process.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            async for line in self._process.stdout:
                self._take(json.loads(line))
        finally:
            self._news.set()

    def _take(self, found: dict[str, Any]) -> None:
        if "at_ns" in found:  # the last line is of the whole run
            numbers = (found["at_ns"], found["operations"], found["errors"], found["max_us"])
            self.windows.append(Window(*numbers))
            self._news.set()

    async def _more(self, timeout_s: float) -> None:
        self._news.clear()
        if self._reader.done():
            raise BenchError("a host has ended: its volume had no path, or its I/O failed")
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            raise BenchError(f"a host has said nothing for {timeout_s:.0f} s") from None

    async def writes(self, since_ns: int, windows: int, timeout_s: float = LINE_TIMEOUT_S) -> int:
        """Wait until so many windows in a row, all after `since_ns`, have writes that ended.

        Gives the end of the first of these. Raises BenchError when it takes too long.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            last = self.windows[-windows:]
            if len(last) == windows and all(w.operations and w.at_ns > since_ns for w in last):
                return self.first(since_ns)
            if time.monotonic() > deadline_s:
                raise BenchError(f"a host's writes stand still for {timeout_s:.0f} s")
            await self._more(LINE_TIMEOUT_S)

    async def until(self, what: str, look: Callable[[Window], bool], timeout_s: float) -> None:
        """Wait for a window that looks so. Raises BenchError."""
        deadline_s = time.monotonic() + timeout_s
        seen = 0
        while not any(look(window) for window in self.windows[seen:]):
            seen = len(self.windows)
            if time.monotonic() > deadline_s:
                raise BenchError(f"not after {timeout_s:.0f} s: {what}")
            await self._more(timeout_s)

    def first(self, since_ns: int) -> int:
        """The end of the first window after `since_ns` with writes that ended."""
        return next(w.at_ns for w in self.windows if w.at_ns > since_ns and w.operations)

    def longest_ms(self, since_ns: int) -> float:
        """Of all writes that have ended since. Raises BenchError when one has failed."""
        found = [w for w in self.windows if w.at_ns > since_ns]
        if any(w.errors for w in found):
            raise BenchError("a write has failed: a host was to see nothing but a pause")
        return max(w.max_us for w in found) / 1000

    def forget(self) -> None:
        """Drop the windows so far."""
        self.windows.clear()
