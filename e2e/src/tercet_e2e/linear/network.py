"""The network of a local cluster whose nodes and hosts are parted by `wires`.

An async context manager: inside it the wires' process runs; when it ends, or its holder dies, so
does the process, and the namespaces with those that live in them.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

from tercet_e2e.errors import ProcessError
from tercet_e2e.linear.wires import Link, LinkName, as_json

ANSWER_TIMEOUT_S = 20.0


class Network:
    """Ends with names, each in a network namespace."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        self._names = names
        self._seed = seed
        self._spaces: dict[str, dict[str, str]] = {}
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *(sys.executable, "-m", "tercet_e2e.linear.wires", str(self._seed), *self._names),
            stdin=pipe,
            stdout=pipe,
            start_new_session=True,
        )
        self._spaces = (await self._answer())["namespaces"]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    def address(self, name: str) -> str:
        """Of an end, on the wires."""
        return self._spaces[name]["address"]

    def enter(self, name: str) -> list[str]:
        """The start of a command line whose process lives at an end."""
        return ["nsenter", f"--net={self._spaces[name]['path']}", "--"]

    async def relay(self, port: int) -> None:
        """Let 127.0.0.1:port of every end lead to that of this machine."""
        await self._ask({"relay": port})

    async def set(self, links: Mapping[LinkName, Link]) -> dict[str, int]:
        """Links are like this from now on, those that are not named good; packets so far."""
        return await self._ask({"links": as_json(links)})

    async def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        async with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            await self._process.stdin.drain()
            return await self._answer()

    async def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise ProcessError(f"the wires do not answer within {ANSWER_TIMEOUT_S:.0f} s") from None
        if not line:
            raise ProcessError("the wires' process has ended; what it said last stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer
