"""Free ports on 127.0.0.1 for a cluster, without two clusters taking the same one.

A port that the kernel calls free is free only until someone takes it. A cluster therefore holds a
lock for each port it was given, from the choice until it ends; the range lies below the one from
which the kernel gives out ports for outgoing connections.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tercet_e2e.errors import StateError

RANGE = range(20000, 32000)
ADDRESSES = range(1, 255)
TRIES_MAX = 500
LOCKS = Path(f"/tmp/tercet-ports.{os.geteuid()}")


class Ports:
    """Gives out ports until it is closed."""

    def __init__(self, locks: Path = LOCKS) -> None:
        self._locks = locks
        self._held: list[IO[str]] = []

    def __enter__(self) -> Self:
        self._locks.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._held:
            handle.close()
        self._held.clear()

    def take(self) -> int:
        """A port on 127.0.0.1."""
        for _ in range(TRIES_MAX):
            port = random.choice(RANGE)
            handle = (self._locks / str(port)).open("w")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
            except OSError:
                handle.close()
                continue
            self._held.append(handle)
            return port
        raise StateError(f"no free port on 127.0.0.1 in {TRIES_MAX} tries")

    def take_address(self) -> str:
        """A loopback address that no other cluster has: a node's, with the usual ports on it."""
        for number in ADDRESSES:
            address = f"127.0.1.{number}"
            handle = (self._locks / address).open("w")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.close()
                continue
            self._held.append(handle)
            return address
        raise StateError("no free loopback address in 127.0.1.0/24: too many nodes on this machine")
