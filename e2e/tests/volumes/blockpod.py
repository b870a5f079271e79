"""What runs inside pods that use a raw volume: blocks written past the page cache, and the check.

`stream` writes 4 KiB blocks with O_DIRECT and O_DSYNC to random places of the whole device, as
large as the device is at that moment, and logs each after it was acknowledged: `SEQUENCE BLOCK`.
The log begins with `SIZE bytes` and says so again when the device has grown. `verify` reads every
block that the log names and prints a verdict as JSON: of each the last acknowledged write must be
there, or a later one.

Standard library only; stops at the first error with exit code 1, so that an I/O error in the pod
is a pod that failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import signal
import stat
import struct
import sys
from pathlib import Path

BLOCK_BYTES = 4096
HEAD = struct.Struct("<8sQQ")  # magic, sequence, block
MAGIC = b"tercetbk"


def content(sequence: int, block: int) -> bytes:
    """A block that says what it is, and whose every byte depends on that."""
    head = HEAD.pack(MAGIC, sequence, block)
    digest = hashlib.sha256(head).digest()
    return (head + digest * (BLOCK_BYTES // len(digest)))[:BLOCK_BYTES]


def open_device(path: str, flags: int) -> int:
    """Opens past the page cache. Raises OSError when it is no block device."""
    descriptor = os.open(path, flags | os.O_DIRECT)
    if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
        raise OSError(f"{path} is no block device")
    return descriptor


def stream(device: str, log: Path) -> int:
    """Write until SIGTERM."""
    stop = False

    def ask_to_stop(_number: int, _frame: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    descriptor = open_device(device, os.O_RDWR | os.O_DSYNC)
    buffer = mmap.mmap(-1, BLOCK_BYTES)  # page-aligned, as O_DIRECT wants it
    size_bytes = sequence = 0
    with log.open("a", buffering=1) as said:
        while not stop:
            now_bytes = os.lseek(descriptor, 0, os.SEEK_END)
            if now_bytes != size_bytes:
                size_bytes = now_bytes
                said.write(f"SIZE {size_bytes}\n")
            sequence += 1
            # The last block now and then: an end that is cut shows at once.
            last = size_bytes // BLOCK_BYTES - 1
            block = last if sequence % 16 == 0 else random.randint(0, last)
            buffer[:] = content(sequence, block)
            if os.pwrite(descriptor, buffer, block * BLOCK_BYTES) != BLOCK_BYTES:
                raise OSError(f"block {block} was written in part")
            said.write(f"{sequence} {block}\n")
    return 0


def read_log(log: Path) -> tuple[list[int], dict[int, int]]:
    """Sizes that were seen, and of each block the last acknowledged sequence."""
    sizes: list[int] = []
    last: dict[int, int] = {}
    whole, _, _ = log.read_text().rpartition("\n")
    for line in whole.splitlines():
        first, second = line.split(" ")
        if first == "SIZE":
            sizes.append(int(second))
        else:
            last[int(second)] = int(first)
    return sizes, last


def verify(device: str, log: Path) -> int:
    """Print what is wrong."""
    _, last = read_log(log)
    descriptor = open_device(device, os.O_RDONLY)
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    problems = []
    for block, acknowledged in sorted(last.items()):
        os.preadv(descriptor, [buffer], block * BLOCK_BYTES)
        found = bytes(buffer)
        _, sequence, _ = HEAD.unpack_from(found)
        if found != content(sequence, block):
            problems.append(f"block {block} holds no block of ours; {acknowledged} was written")
        elif sequence < acknowledged:
            problems.append(f"block {block} holds write {sequence}, {acknowledged} is lost")
    size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    verdict = {"blocks": len(last), "size_bytes": size_bytes, "problems": problems[:10]}
    print(json.dumps(verdict))
    return 1 if problems else 0


def main() -> int:
    """`blockpod.py stream|verify DEVICE LOG`."""
    parser = argparse.ArgumentParser(prog="blockpod")
    parser.add_argument("act", choices=["stream", "verify"])
    parser.add_argument("device")
    parser.add_argument("log", type=Path)
    arguments = parser.parse_args()
    act = stream if arguments.act == "stream" else verify
    return act(arguments.device, arguments.log)


if __name__ == "__main__":
    sys.exit(main())
