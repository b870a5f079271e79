"""What a drive with a volatile cache may hold after a power cut, out of the log of its writes.

QEMU's `blklogwrites` writes down every write, flush and discard of a machine in the order of their
completion, in the format of Linux's dm-log-writes: one sector for the log, then for each operation
a sector that says what it was, then its data. A write is sure when it had FUA or a flush follows
it; of the others a power cut may keep any. `volatile` are those, and `apply` makes the drive that
lost some of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
SUPER = struct.Struct("<QQQI")
ENTRY = struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Write:
    """One operation of a log."""

    offset_bytes: int
    flags: int
    size_bytes: int
    data_at: int  # in the log; data of a discard is not there: zeroes


def read(log: Path) -> Iterator[Write]:
    """The operations of a log, up to where it was cut off."""
    with log.open("rb") as file:
        magic, _, _, sector_bytes = SUPER.unpack(file.read(SUPER.size))
        if magic != MAGIC:
            raise ValueError(f"{log} is no log of writes")
        end = log.stat().st_size
        at = sector_bytes
        while at + ENTRY.size <= end:
            file.seek(at)
            sector, sectors, flags, _ = ENTRY.unpack(file.read(ENTRY.size))
            if (sectors, flags) == (0, 0):
                return
            data_at = at + sector_bytes
            size_bytes = sectors * sector_bytes
            stored_bytes = 0 if flags & DISCARD else size_bytes
            if data_at + stored_bytes > end:
                return
            yield Write(sector * sector_bytes, flags, size_bytes, data_at)
            at = data_at + stored_bytes


def volatile(writes: list[Write]) -> set[int]:
    """The numbers of the operations that a power cut at the end may undo."""
    last_flush = max((n for n, write in enumerate(writes) if write.flags & FLUSH), default=-1)
    return {
        number
        for number, write in enumerate(writes)
        if number > last_flush and write.size_bytes and not write.flags & FUA
    }


def apply(log: Path, writes: list[Write], lost: set[int], image: Path) -> None:
    """Do the operations to an image as it was before them, but for the lost ones."""
    with log.open("rb") as source, image.open("r+b") as target:
        for number, write in enumerate(writes):
            if number in lost or not write.size_bytes:
                continue
            target.seek(write.offset_bytes)
            if write.flags & DISCARD:
                target.write(bytes(write.size_bytes))
            else:
                source.seek(write.data_at)
                target.write(source.read(write.size_bytes))
