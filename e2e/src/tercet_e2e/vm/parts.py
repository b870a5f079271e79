"""The parts of a virtual machine, out of Debian's packages and kept in the cache by version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Tool:
    """A program of a Debian package, for use inside a machine."""

    program: Path
    environment: Mapping[str, str]  # in which it finds its libraries


def parts(progress: Progress, suite: str | None = None) -> Parts:
    """Find or unpack all of it; the kernel from another suite when one is named.

    Raises BinaryError.
    """
    kernel = debian.unpacked(KERNEL, progress, suite=suite)
    emulator, shell = (debian.unpacked(package, progress) for package in (EMULATOR, SHELL))
    return Parts(
        kernel=_one(kernel / "boot", "vmlinuz-*"),
        modules=_one(kernel, "lib/modules/*"),
        emulator=emulator / "usr/bin/qemu-system-x86_64",
        firmware=(emulator / "usr/share/qemu", emulator / "usr/share/seabios"),
        environment=debian.environment(emulator),
        busybox=shell / "bin/busybox",
    )


def tools(wanted: Mapping[str, Sequence[str]], progress: Progress) -> dict[str, Tool]:
    """Programs by name, out of the packages that have them. Raises BinaryError."""
    found: dict[str, Tool] = {}
    for package, names in wanted.items():
        root = debian.unpacked(package, progress)
        environment = debian.environment(root)
        for name in names:
            places = [root / folder / name for folder in ("usr/sbin", "usr/bin", "sbin", "bin")]
            program = next((place for place in places if place.exists()), None)
            if program is None:
                raise BinaryError(f"Debian's {package} has no program {name} in {root}")
            found[name] = Tool(program.resolve(), environment)
    return found


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise BinaryError(f"{folder} has {len(found)} files like {pattern}, not one")
    return found[0]
