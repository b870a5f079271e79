"""One machine: booted, told one command, read line by line, ended or cut off.

Emulation is in software always (`-accel tcg`): a nested KVM that is there may not work. Drives are
files without the machine's page cache, so what the guest was told is flushed is in the file, and a
machine that is killed has lost its power. A drive has a UUID by which the guest's kernel knows it.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tercet_e2e.errors import BinaryError
from tercet_e2e.vm import initramfs
from tercet_e2e.vm.parts import Parts, Tool

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


@dataclass(frozen=True)
class Hardware:
    """What a machine has."""

    drives: Sequence[Drive] = ()
    cpus: int = 2
    memory_mib: int = 1024
    within: Sequence[str] = ()  # words in front of the emulator's, e.g. of nsenter
    tap: str | None = None  # a network card at this interface
    address: str = ""  # the card's, six bytes with colons
    channel: Path | None = None  # a socket: the machine's only virtio port


@dataclass(frozen=True)
class Software:
    """What a machine runs: the command, and what that finds."""

    command: str
    programs: Mapping[str, Path | Tool]
    modules: Sequence[str] = ("nvme",)
    texts: Mapping[str, str] = field(default_factory=dict)  # more files


class MachineError(Exception):
    """The machine did not do what it was to do; the text has its last lines."""


class Machine:
    """A running machine; a context manager. Ends with whoever started it."""

    def __init__(
        self,
        parts: Parts,
        folder: Path,
        software: Software,
        hardware: Hardware,
    ) -> None:
        self.seen: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        folder.mkdir(parents=True, exist_ok=True)
        image = folder / "initramfs"
        image.write_bytes(
            initramfs.build(
                parts.busybox,
                parts.modules,
                software.modules,
                software.programs,
                software.command,
                software.texts,
            )
        )
        words = _command(parts, image, hardware)
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

    def freeze(self) -> None:
        """Stop it as a hypervisor may: it does nothing, and its clock tells it nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def cut_power(self) -> None:
        """Kill the machine; what it was told is flushed is in its drives' files."""
        self._process.kill()
        self._process.wait()

    def said(self) -> list[str]:
        """What the machine has said; waits for nothing."""
        while not self._lines.empty():
            line = self._lines.get()
            if line is None:
                self._lines.put(None)
                break
            self.seen.append(line)
        return self.seen

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


def _command(parts: Parts, image: Path, hardware: Hardware) -> list[str]:
    if not parts.emulator.exists():
        raise BinaryError(f"{parts.emulator} is not there")
    # The machine dies with the test.
    words = ["setpriv", "--pdeathsig", "KILL", *hardware.within, str(parts.emulator)]
    for firmware in parts.firmware:
        words += ["-L", str(firmware)]
    words += ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(hardware.cpus)]
    words += ["-m", str(hardware.memory_mib), "-nographic", "-no-reboot", "-nodefaults"]
    words += ["-serial", "stdio", "-kernel", str(parts.kernel), "-initrd", str(image)]
    words += ["-append", "console=ttyS0 quiet panic=1"]
    for number, drive in enumerate(hardware.drives):
        words += _drive(number, drive)
    if hardware.tap is not None:
        words += ["-netdev", f"tap,id=t0,ifname={hardware.tap},script=no,downscript=no"]
        words += ["-device", f"virtio-net-pci,netdev=t0,mac={hardware.address}"]
    if hardware.channel is not None:
        words += ["-device", "virtio-serial-pci"]
        words += ["-chardev", f"socket,id=s0,path={hardware.channel},server=on,wait=off"]
        words += ["-device", "virtserialport,chardev=s0,name=tercet"]
    return words


def _drive(number: int, drive: Drive) -> list[str]:
    file = f"driver=file,filename={drive.file},cache.direct=on,aio=threads"
    words = ["-blockdev", f"node-name=f{number},{file}"]
    if drive.log is None:
        words += ["-blockdev", f"node-name=d{number},driver=raw,file=f{number}"]
    else:
        words += ["-blockdev", f"node-name=l{number},driver=file,filename={drive.log}"]
        logged = f"driver=blklogwrites,file=f{number},log=l{number}"
        words += ["-blockdev", f"node-name=d{number},{logged}"]
    words += ["-device", f"nvme,id=c{number},serial=tercet{number}"]
    return [*words, "-device", f"nvme-ns,bus=c{number},drive=d{number},uuid={drive.id}"]
