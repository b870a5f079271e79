"""The root file system of a machine: busybox, modules, programs with their libraries, one command.

The archive is written here (cpio, "newc"): it needs no more than a header for each file. It is not
compressed: an emulated processor unpacks more slowly than the emulator copies. Modules go in the
order in which they are loaded; each names what it depends on in its own `.modinfo`, so nothing has
to be generated for the kernel first.
"""

from __future__ import annotations

import lzma
import re
import subprocess
import tempfile
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from tercet_e2e.errors import BinaryError
from tercet_e2e.vm.parts import Tool

PROGRAM_BYTES_MAX = 256 << 20
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=80% tmp /tmp
for module in $(cat /modules/order); do insmod /modules/$module; done
export PATH=/bin LD_LIBRARY_PATH=/lib
echo "TERCET-UP"
sh /command </dev/null 2>&1
echo "TERCET-EXIT $?"
poweroff -f
"""
UP = "TERCET-UP"
EXIT = "TERCET-EXIT "


def dependencies(module: bytes) -> list[str]:
    """The modules that a module needs, as it says itself."""
    found = re.search(rb"(?:^|\0)depends=([^\0]*)\0", module)
    text = found.group(1).decode() if found else ""
    return [name for name in text.split(",") if name]


def contents(module: Path) -> bytes:
    """A module as the kernel takes it, whether its package compresses it or not."""
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def built_in(modules: Path) -> set[str]:
    """The modules that the kernel has in itself, as its package says."""
    lines = (modules / "modules.builtin").read_text().splitlines()
    return {Path(line).stem.replace("-", "_") for line in lines}


def in_order(
    names: Iterable[str], files: Mapping[str, Path], within: Container[str] = ()
) -> list[str]:
    """Modules and what they need, each behind what it needs, but for those `within` the kernel."""
    ordered: list[str] = []

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return
        for needed in dependencies(contents(files[name])):
            add(needed.replace("-", "_"))
        ordered.append(name)

    for name in names:
        if name not in files and name not in within:
            raise BinaryError(f"the kernel has no module {name}")
        add(name)
    return ordered


def libraries(program: Path, environment: Mapping[str, str] | None = None) -> list[Path]:
    """The shared libraries of a program, its loader included. Raises BinaryError if one lacks."""
    done = subprocess.run(
        ["ldd", program], capture_output=True, text=True, check=True, env=environment
    )
    lacking = re.findall(r"(\S+) => not found", done.stdout)
    if lacking:
        raise BinaryError(f"{program} lacks {', '.join(lacking)}")
    paths = re.findall(r"(/\S+) \(0x", done.stdout)
    return [Path(path) for path in paths]


class Archive:
    """A cpio archive in the making."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._folders: set[str] = set()

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        fields = [self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0]
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        for part in (header + path, data):
            self._parts.append(part + b"\0" * (-len(part) % 4))

    def folder(self, name: str) -> None:
        """Add a folder and those above it, once."""
        for parent in reversed([Path(name), *Path(name).parents][:-1]):
            if str(parent) not in self._folders:
                self._folders.add(str(parent))
                self._add(str(parent), 0o040755, b"")

    def file(self, name: str, data: bytes) -> None:
        """Add a file that may be executed."""
        self.folder(str(Path(name).parent))
        self._add(name, 0o100755, data)

    def finished(self) -> bytes:
        """The whole of it."""
        self._add("TRAILER!!!", 0, b"")
        return b"".join(self._parts)


def build(
    busybox: Path,
    modules: Path,
    wanted: Iterable[str],
    programs: Mapping[str, Path | Tool],
    command: str,
    texts: Mapping[str, str] | None = None,
) -> bytes:
    """The initramfs: `programs` are in /bin by these names; `command` is run by a shell.

    `texts` are more files, by their names without the first slash.
    """
    archive = Archive()
    for folder in ("proc", "sys", "dev", "tmp", "bin", "lib64"):
        archive.folder(folder)
    archive.file("bin/busybox", busybox.read_bytes())
    archive.file("init", INIT.encode())
    archive.file("command", command.encode())
    for name, text in (texts or {}).items():
        archive.file(name, text.encode())
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in modules.rglob("*.ko*")}
    order = in_order(wanted, files, built_in(modules))
    for name in order:
        archive.file(f"modules/{name}", contents(files[name]))
    archive.file("modules/order", "\n".join(order).encode())
    shared: dict[str, Path] = {}
    for name, given in programs.items():
        program, environment = (
            (given.program, given.environment) if isinstance(given, Tool) else (given, None)
        )
        archive.file(f"bin/{name}", _stripped(program))
        shared.update({path.name: path for path in libraries(program, environment)})
    for name, path in shared.items():
        loader = name.startswith("ld-linux")
        archive.file(f"lib64/{name}" if loader else f"lib/{name}", path.read_bytes())
    return archive.finished()


def _stripped(program: Path) -> bytes:
    """A program without what only a debugger reads."""
    if program.stat().st_size > PROGRAM_BYTES_MAX:
        raise BinaryError(f"{program} is too large for a machine's memory")
    with tempfile.TemporaryDirectory() as folder:
        stripped = Path(folder) / program.name
        subprocess.run(["strip", "-s", "-o", stripped, program], check=True)
        return stripped.read_bytes()
