"""What nvme-cli and the kernel say inside a machine, as types; and what a host does there.

States come from sysfs: it has the ANA state of each path as the multipath code sees it, which
nvme-cli 2.3 prints for some commands only.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tercet_api.names import volume_nqn
from tercet_e2e.linux.engines import DISCOVERY, NVME_TCP, Volume
from tercet_e2e.linux.guest import Guest

KEEP_ALIVE_S = 5
RECONNECT_S = 1
WAIT_S = 120.0
PAUSE_S = 0.1
FIO_S = 400.0
# As the node side does it (H1): a lost path is tried again for ever.
OPTIONS = f"-l -1 -c {RECONNECT_S} -k {KEEP_ALIVE_S}"
# What no kernel may ever say: an error that reached whoever asked, a fault, a task that hangs.
NEVER = (
    "I/O error",
    "I/O Error",
    "Call Trace",
    "BUG:",
    "WARNING:",
    "hung_task",
    "blocked for more than",
)

# One line a path: controller, subsystem's NQN, address, controller's state, path's ANA state.
PATHS = """\
for one in /sys/class/nvme/nvme*; do
  [ -e $one/subsysnqn ] || continue
  ana=$(cat $one/nvme*c*n*/ana_state 2>/dev/null || true)
  address=$(sed 's/.*traddr=\\([^,]*\\).*/\\1/' $one/address)
  echo "$(basename $one) $(cat $one/subsysnqn) $address $(cat $one/state) ${ana:--}"
done
"""
# One line a head: NQN, device.
HEADS = """\
for one in /sys/class/nvme-subsystem/nvme-subsys*; do
  [ -e $one/subsysnqn ] || continue
  for head in $one/nvme*n*; do
    case ${head##*/} in *c*n*) continue;; esac
    [ -e $head/size ] && echo "$(cat $one/subsysnqn) $(basename $head)"
  done
done
true
"""


T = TypeVar("T")


@dataclass(frozen=True)
class Path:
    """A controller of a volume's subsystem, seen from a host."""

    controller: str
    nqn: str
    address: str
    state: str
    ana: str


def parse_paths(text: str) -> list[Path]:
    """Out of what `PATHS` prints."""
    return [Path(*line.split()) for line in text.splitlines()]


def parse_head(text: str, nqn: str) -> str | None:
    """The device of a subsystem, out of what `HEADS` prints."""
    heads = [line.split()[1] for line in text.splitlines() if line.split()[0] == nqn]
    assert len(heads) <= 1, f"{nqn} has more than one head: {heads}"
    return heads[0] if heads else None


class Host:
    """Linux in a machine as a host of one volume."""

    def __init__(self, guest: Guest, volume: Volume) -> None:
        self.guest = guest
        self.volume = volume
        self.nqn = volume_nqn(volume.id)

    async def json(self, command: str) -> Any:
        """What an nvme command prints as JSON."""
        return json.loads(await self.guest.run(f"nvme {command} -o json"))

    async def discover(self, address: str) -> list[dict[str, str]]:
        """The records of a node's discovery log."""
        log = await self.json(f"discover -t tcp -a {address} -s {DISCOVERY}")
        records: list[dict[str, str]] = log["records"]
        return records

    async def connect_all(self, address: str, options: str = OPTIONS) -> None:
        """Connect to all that a node's discovery log has."""
        await self.guest.run(f"nvme connect-all -t tcp -a {address} -s {DISCOVERY} {options}")

    async def connect(self, address: str, options: str = OPTIONS) -> None:
        """Connect one path."""
        await self.guest.run(self.connect_words(address, options))

    def connect_words(self, address: str, options: str = OPTIONS) -> str:
        """The command that connects one path."""
        return f"nvme connect -t tcp -a {address} -s {NVME_TCP} -n {self.nqn} {options}"

    async def disconnect(self) -> None:
        """All paths."""
        await self.guest.run(f"nvme disconnect -n {self.nqn}")

    async def paths(self) -> dict[str, Path]:
        """All paths, by address."""
        paths = parse_paths(await self.guest.run(PATHS))
        return {path.address: path for path in paths if path.nqn == self.nqn}

    async def device(self) -> str:
        """The head's device, once it is there."""

        async def head() -> str | None:
            return parse_head(await self.guest.run(HEADS), self.nqn)

        name = await until(head, f"{self.nqn} has a head")
        return f"/dev/{name}"

    async def optimized(self) -> str | None:
        """The address of the only path that is live and optimized."""
        paths = (await self.paths()).values()
        found = [path.address for path in paths if path.state == "live" and path.ana == "optimized"]
        return found[0] if len(found) == 1 else None

    async def wait_optimized(self, address: str) -> None:
        """Until this path, and no other, is optimized."""

        async def turned() -> bool:
            return await self.optimized() == address

        await until(turned, f"the path to {address} turns optimized")

    async def wait_live(self, count: int) -> dict[str, Path]:
        """Until so many paths are live, each with an ANA state."""

        async def live() -> dict[str, Path] | None:
            paths = await self.paths()
            good = [p for p in paths.values() if p.state == "live" and p.ana != "-"]
            return paths if len(good) == len(paths) == count else None

        return await until(live, f"{count} paths of {self.nqn} are live")

    async def kernel_said(self) -> list[str]:
        """The kernel's lines since the last call."""
        return (await self.guest.run("dmesg -c")).splitlines()


async def until(look: Callable[[], Awaitable[T | None]], what: str, timeout_s: float = WAIT_S) -> T:
    """Until `look` returns something true; that."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        if found := await look():
            return found
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        await asyncio.sleep(PAUSE_S)


def complaints(lines: list[str]) -> list[str]:
    """Those lines of the kernel's that tell of harm."""
    return [line for line in lines if any(word in line for word in NEVER)]


def fio(
    file: str,
    size_mib: int,
    *,
    mix: str = "randwrite",
    block: str = "4k",
    depth: int = 16,
    seconds: int | None = None,
) -> str:
    """Fio writes and verifies what it has written (crc32c); it fails at the first difference."""
    words = f"fio --name=t --filename={file} --size={size_mib}m --rw={mix} --bs={block}"
    words += f" --iodepth={depth} --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1"
    words += " --verify_backlog=256 --thread --output-format=terse --randrepeat=0"
    if seconds is not None:
        words += f" --time_based --runtime={seconds}"
    return words
