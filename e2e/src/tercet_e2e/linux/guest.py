"""A virtual machine that does what it is told, command by command.

Scripts go in over a virtual serial port, one line each; each runs beside the others, and its exit
code and what it printed come back in one line. So a test can write with fio in one script and look
at the paths in another. The kernel is Debian's, the programs are Debian's; nothing is installed.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tercet_e2e.binaries import Progress
from tercet_e2e.linux.network import MASK_BITS, Network, guest_address
from tercet_e2e.vm import initramfs
from tercet_e2e.vm.machine import Hardware, Machine, MachineError, Software
from tercet_e2e.vm.parts import Parts, Tool, tools

MODULES = (
    *("virtio_pci", "virtio_net", "virtio_console", "crc32c_generic", "crc32c_intel"),
    *("nvme_tcp", "ext4", "xfs"),
)
PACKAGES = {
    "nvme-cli": ("nvme",),
    "fio": ("fio",),
    "e2fsprogs": ("mkfs.ext4", "e2fsck", "resize2fs"),
    "xfsprogs": ("mkfs.xfs", "xfs_repair", "xfs_growfs"),
}
MEMORY_MIB = 1024
BOOT_S = 180.0
SCRIPT_S = 120.0
PAUSE_S = 0.05
LINE_BYTES_MAX = 64 << 20
DMESG_LINES = 60

# Each script is a job of its own; a reply is one line, written by one job at a time.
COMMAND = """\
ip link set lo up
ip link set eth0 up
ip addr add {address}/{mask} dev eth0
mkdir -p /tmp/jobs /mnt
exec 3<>/dev/$(basename /sys/class/virtio-ports/vport*)
while true; do
  if read -r id script <&3; then
    (
      job=/tmp/jobs/$id
      echo "$script" | base64 -d >$job
      sh $job </dev/null >$job.out 2>&1 3>&-
      echo "$id $? $(base64 -w 0 $job.out)" >$job.reply
      until mkdir /tmp/replying 2>/dev/null; do sleep 0.02; done
      cat $job.reply >&3
      rmdir /tmp/replying
      rm -f $job $job.*
    ) &
  else
    sleep 0.05
  fi
done
"""


@dataclass(frozen=True)
class Done:
    """How a script ended."""

    code: int
    text: str


class ScriptFailed(Exception):
    """A script inside the machine failed: the text has it, what it printed, the kernel's words."""


class Guest:
    """A running machine; an async context manager. `host_nqn` is who it says it is."""

    def __init__(
        self,
        parts: Parts,
        folder: Path,
        network: Network,
        number: int,
        host: tuple[str, str],
        programs: Mapping[str, Tool],
        *,
        modules: tuple[str, ...] = MODULES,
    ) -> None:
        self.host_nqn, self.host_id = host
        self.address = guest_address(number)
        self._parts = parts
        self._folder = folder
        self._channel = folder / "channel"
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Done]] = {}
        self._software = Software(
            COMMAND.format(address=self.address, mask=MASK_BITS),
            programs,
            modules,
            {"etc/nvme/hostnqn": self.host_nqn + "\n", "etc/nvme/hostid": self.host_id + "\n"},
        )
        self._hardware = Hardware(
            cpus=1,
            memory_mib=MEMORY_MIB,
            within=network.enter,
            tap=network.tap(),
            address=f"52:54:00:00:00:{number:02x}",
            channel=self._channel,
        )

    async def __aenter__(self) -> Self:
        started_s = time.monotonic()
        self.machine = await asyncio.to_thread(
            Machine, self._parts, self._folder, self._software, self._hardware
        )
        try:
            await self._wait_up(started_s + BOOT_S)
            reader, self._writer = await asyncio.open_unix_connection(
                str(self._channel), limit=LINE_BYTES_MAX
            )
            self._listener = asyncio.create_task(self._listen(reader))
            await self.run("true", timeout_s=BOOT_S)
        except BaseException:
            await asyncio.to_thread(self.machine.__exit__, None, None, None)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.cancel()
        self._writer.close()
        await asyncio.to_thread(self.machine.__exit__, None, None, None)

    async def _wait_up(self, deadline_s: float) -> None:
        while not any(initramfs.UP in line for line in self.machine.said()):
            if time.monotonic() > deadline_s:
                said = "\n".join(self.machine.said()[-DMESG_LINES:])
                raise MachineError(f"not up after {BOOT_S:.0f} s\n{said}")
            await asyncio.sleep(PAUSE_S)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            number, code, *text = line.decode().split()
            future = self._waiting.pop(int(number), None)
            if future is not None and not future.done():
                words = base64.b64decode(text[0]) if text else b""
                future.set_result(Done(int(code), words.decode(errors="replace")))
        for future in self._waiting.values():
            if future.done():
                continue
            future.set_exception(MachineError("\n".join(["it ended", *self.machine.said()[-40:]])))

    async def attempt(self, script: str, timeout_s: float = SCRIPT_S) -> Done:
        """Run a script. Raises MachineError when it has no end in time."""
        number = next(self._numbers)
        future: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        words = base64.b64encode(script.encode()).decode()
        self._writer.write(f"{number} {words}\n".encode())
        await self._writer.drain()
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            said = "\n".join(self.machine.said()[-DMESG_LINES:])
            raise MachineError(f"`{script}` has no end after {timeout_s:.0f} s\n{said}") from None

    async def run(self, script: str, timeout_s: float = SCRIPT_S) -> str:
        """Run a script; what it printed. Raises ScriptFailed unless it succeeds."""
        done = await self.attempt(script, timeout_s)
        if done.code != 0:
            kernel = await self.attempt(f"dmesg | tail -n {DMESG_LINES}")
            raise ScriptFailed(f"`{script}` ended with {done.code}\n{done.text}\n{kernel.text}")
        return done.text


def programs(progress: Progress) -> dict[str, Tool]:
    """What every machine has besides busybox. Raises BinaryError."""
    return tools(PACKAGES, progress)
