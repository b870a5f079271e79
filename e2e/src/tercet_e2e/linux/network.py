"""A network of its own: a namespace without a name, with a bridge.

The bridge has the nodes' addresses, so nodes use the usual ports, and packets between nodes and
machines go nowhere else. The namespace is held by a process that dies with whoever made it, so
nothing is left behind however a test ends.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Self

from tercet_e2e.errors import ProcessError

BRIDGE = "br0"
PREFIX = "10.231.77"
MASK_BITS = 24
START_S = 10.0
PAUSE_S = 0.01


def node_address(number: int) -> str:
    """Of node 1, 2, ..."""
    return f"{PREFIX}.{number}"


def guest_address(number: int) -> str:
    """Of machine 1, 2, ..."""
    return f"{PREFIX}.{100 + number}"


class Network:
    """A context manager: the namespace is there inside of it."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._taps = 0
        self._holder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
        self._holder = subprocess.Popen(words)
        try:
            self._wait_apart()
            lines = ["link set lo up", f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up"]
            addresses = map(node_address, range(1, self._nodes + 1))
            lines += [f"addr add {address}/{MASK_BITS} dev {BRIDGE}" for address in addresses]
            self.ip(lines)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._holder is not None
        self._holder.kill()
        self._holder.wait()

    def _wait_apart(self) -> None:
        """Until the holder is in a namespace of its own."""
        assert self._holder is not None
        own = Path("/proc/self/ns/net").readlink()
        deadline_s = time.monotonic() + START_S
        while Path(f"/proc/{self._holder.pid}/ns/net").readlink() == own:
            if self._holder.poll() is not None or time.monotonic() > deadline_s:
                raise ProcessError("no network namespace could be made; this needs root")
            time.sleep(PAUSE_S)

    @property
    def enter(self) -> list[str]:
        """Words in front of a command that shall run in it."""
        assert self._holder is not None, "used outside of its context"
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]

    def ip(self, lines: list[str]) -> None:
        """Commands of `ip`, in the namespace. Raises ProcessError."""
        done = subprocess.run(
            [*self.enter, "ip", "-batch", "-"],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise ProcessError(f"ip does not do {lines}: {done.stderr.strip()}")

    def tap(self) -> str:
        """One more interface on the bridge, for a machine's network card."""
        name = f"tap{self._taps}"
        self._taps += 1
        self.ip([f"tuntap add {name} mode tap", f"link set {name} master {BRIDGE} up"])
        return name
