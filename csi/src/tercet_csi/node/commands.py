"""Runs the system's own tools (mount, mkfs, blkid, resize2fs), each with a time limit.

A tool that hangs in the kernel must not hang the service: after the limit it is killed and the
call fails with what to look at. What to run is decided in `filesystem`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from tercet_csi.errors import DeadlineExceeded, Internal

TOOL_TIMEOUT_S = 60.0
OUTPUT_CHARS_MAX = 400


@dataclass(frozen=True)
class Done:
    """How a tool ended."""

    code: int
    output: str


class Runner(Protocol):
    """Runs a command; a fake records instead."""

    async def __call__(self, *command: str, ok: tuple[int, ...] = (0,)) -> Done:
        """Run it; raises Internal when its exit code is not among `ok`."""
        ...


async def run(*command: str, ok: tuple[int, ...] = (0,)) -> Done:
    """Run a command. Raises Internal with its output, DeadlineExceeded when it takes too long."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        raw, _ = await asyncio.wait_for(process.communicate(), TOOL_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        raise DeadlineExceeded(
            f"{' '.join(command)} did not end within {TOOL_TIMEOUT_S:.0f} s: "
            "is the volume served by a primary?"
        ) from None
    code = process.returncode if process.returncode is not None else -1
    output = raw.decode(errors="replace").strip()
    if code not in ok:
        raise Internal(f"{' '.join(command)} ended with {code}: {output[-OUTPUT_CHARS_MAX:]}")
    return Done(code, output)
