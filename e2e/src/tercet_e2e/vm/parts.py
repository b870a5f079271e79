"""The parts of a virtual machine, out of Debian's packages and kept in the cache by version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tercet_e2e.binaries import Progress
from tercet_e2e.docker import debian
from tercet_e2e.errors import BinaryError

KERNEL = "linux-image-amd64"  # brings the kernel that it stands for
EMULATOR = "qemu-system-x86"
SHELL = "busybox-static"


@dataclass(frozen=True)
class Parts:
    """Where everything is."""

    kernel: Path
    modules: Path  # the folder with the kernel's modules
    emulator: Path
    firmware: tuple[Path, ...]
    environment: Mapping[str, str]  # in which the emulator finds its libraries
    busybox: Path


def parts(progress: Progress) -> Parts:
    """Find or unpack all of it. Raises BinaryError."""
    kernel, emulator, shell = (debian.unpacked(p, progress) for p in (KERNEL, EMULATOR, SHELL))
    return Parts(
        kernel=_one(kernel / "boot", "vmlinuz-*"),
        modules=_one(kernel, "lib/modules/*"),
        emulator=emulator / "usr/bin/qemu-system-x86_64",
        firmware=(emulator / "usr/share/qemu", emulator / "usr/share/seabios"),
        environment=debian.environment(emulator),
        busybox=shell / "bin/busybox",
    )


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise BinaryError(f"{folder} has {len(found)} files like {pattern}, not one")
    return found[0]
