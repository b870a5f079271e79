"""One machine: booted, told one command, read line by line, ended or cut off.

Emulation is in software always (`-accel tcg`): a nested KVM that is there may not work. Drives are
files without the machine's page cache, so what the guest was told is flushed is in the file, and a
machine that is killed has lost its power. A drive has a UUID by which the guest's kernel knows it.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tercet_e2e.errors import BinaryError
from tercet_e2e.vm import initramfs
from tercet_e2e.vm.parts import Parts

MEMORY_MIB = 1024
CPUS = 2
MODULES = ("nvme",)
TAIL_LINES = 40


@dataclass(frozen=True)
class Drive:
    """A namespace of an emulated NVMe drive, each on a controller of its own."""

    file: Path
    id: uuid.UUID
    log: Path | None = None  # every write and flush, as dm-log-writes has it

    @property
    def nguid(self) -> str:
        """By what the engine finds it."""
        return self.id.hex


class MachineError(Exception):
    """The machine did not do what it was to do; the text has its last lines."""


class Machine:
    """A running machine; a context manager. Ends with whoever started it."""

    def __init__(
        self,
        parts: Parts,
        folder: Path,
        command: str,
        programs: Mapping[str, Path],
        drives: Sequence[Drive],
    ) -> None:
        self.seen: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        folder.mkdir(parents=True, exist_ok=True)
        image = folder / "initramfs.gz"
        image.write_bytes(initramfs.build(parts.busybox, parts.modules, MODULES, programs, command))
        words = _command(parts, image, drives)
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **parts.environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\r\n"))
        self._lines.put(None)

    def lines(self, timeout_s: float) -> Iterator[str]:
        """What the machine says, until it ends. Raises MachineError after `timeout_s` in all."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                left_s = max(0.0, deadline_s - time.monotonic())
                line = self._lines.get(timeout=left_s)
            except queue.Empty:
                raise MachineError(self._told(f"not done after {timeout_s:.0f} s")) from None
            if line is None:
                return
            self.seen.append(line)
            yield line

    def finish(self, timeout_s: float) -> list[str]:
        """Wait for the command; returns what was said. Raises MachineError when it failed."""
        for line in self.lines(timeout_s):
            if line.startswith(initramfs.EXIT):
                if line.removeprefix(initramfs.EXIT) != "0":
                    raise MachineError(self._told(f"the command ended with {line}"))
                return self.seen
        raise MachineError(self._told("the machine ended before its command"))

    def cut_power(self) -> None:
        """Kill the machine; what it was told is flushed is in its drives' files."""
        self._process.kill()
        self._process.wait()

    def _told(self, why: str) -> str:
        return "\n".join([why, *self.seen[-TAIL_LINES:]])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut_power()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _command(parts: Parts, image: Path, drives: Sequence[Drive]) -> list[str]:
    if not parts.emulator.exists():
        raise BinaryError(f"{parts.emulator} is not there")
    # The machine dies with the test.
    words = ["setpriv", "--pdeathsig", "KILL", str(parts.emulator)]
    for firmware in parts.firmware:
        words += ["-L", str(firmware)]
    words += ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(CPUS)]
    words += ["-m", str(MEMORY_MIB), "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"]
    words += ["-kernel", str(parts.kernel), "-initrd", str(image)]
    words += ["-append", "console=ttyS0 quiet panic=1"]
    for number, drive in enumerate(drives):
        file = f"driver=file,filename={drive.file},cache.direct=on,aio=threads"
        words += ["-blockdev", f"node-name=f{number},{file}"]
        if drive.log is None:
            words += ["-blockdev", f"node-name=d{number},driver=raw,file=f{number}"]
        else:
            words += ["-blockdev", f"node-name=l{number},driver=file,filename={drive.log}"]
            logged = f"driver=blklogwrites,file=f{number},log=l{number}"
            words += ["-blockdev", f"node-name=d{number},{logged}"]
        words += ["-device", f"nvme,id=c{number},serial=tercet{number}"]
        words += ["-device", f"nvme-ns,bus=c{number},drive=d{number},uuid={drive.id}"]
    return words
