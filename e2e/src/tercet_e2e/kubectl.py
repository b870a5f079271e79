"""kubectl as a person uses it: apply, get, delete, logs, each with a time limit.

The demo and the end-to-end tests say everything to the cluster through it, so that what they show
is what a person will see; only watching is left to others.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from tercet_e2e.errors import E2eError

Json = dict[str, Any]

COMMAND_TIMEOUT_S = 120.0
PAUSE_S = 0.1


class KubectlError(E2eError):
    """kubectl ended with an error; its words are in the message."""


class Kubectl:
    """One cluster's kubectl."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)

    async def run(
        self, *arguments: str, stdin: str = "", timeout_s: float = COMMAND_TIMEOUT_S
    ) -> str:
        """Run it and return what it prints. Raises KubectlError."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, error = await asyncio.wait_for(process.communicate(stdin.encode()), timeout_s)
        except TimeoutError:
            process.kill()
            raise KubectlError(
                f"kubectl {' '.join(arguments)}: no end after {timeout_s:.0f} s"
            ) from None
        if process.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {error.decode().strip()}")
        return out.decode()

    async def apply(self, *objects: Json) -> None:
        """Apply objects."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        await self.run("apply", "-f", "-", stdin=text)

    async def get(self, kind: str, name: str) -> Json:
        """One object. Raises KubectlError when it is not there."""
        found: Json = json.loads(await self.run("get", kind, name, "-o", "json"))
        return found

    async def list(self, kind: str) -> list[Json]:
        """All objects of a kind."""
        found = json.loads(await self.run("get", kind, "-o", "json"))
        return list(found["items"])

    async def delete(self, kind: str, *names: str) -> None:
        """Delete objects and wait until they are gone."""
        await self.run("delete", kind, *names, f"--timeout={COMMAND_TIMEOUT_S:.0f}s")

    async def until(
        self,
        kind: str,
        name: str,
        check: Callable[[Json], bool],
        timeout_s: float,
        what: str,
    ) -> Json:
        """Wait until an object is as `check` wants it. Raises KubectlError: what is not."""
        deadline_s = time.monotonic() + timeout_s
        last: Json = {}
        while time.monotonic() < deadline_s:
            last = await self.get(kind, name)
            if check(last):
                return last
            await asyncio.sleep(PAUSE_S)
        raise KubectlError(
            f"{kind} {name}: {what}: not after {timeout_s:.0f} s; status is "
            f"{json.dumps(last.get('status', {}))[:2000]}"
        )
