"""What a virtual machine is made of, and what its power cut may undo; no machine needed."""

from __future__ import annotations

import lzma
import struct

import pytest

from tercet_e2e.errors import BinaryError
from tercet_e2e.vm import initramfs, powercut

SECTOR_BYTES = 512


def module(folder, name: str, depends: str):
    """A file with what a kernel module says of itself."""
    path = folder / f"{name}.ko"
    path.write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0")
    return path


def test_modules_are_loaded_behind_what_they_need(tmp_path):
    names = {"nvme": "nvme-core", "nvme_core": "t10-pi,built_in", "t10_pi": ""}
    files = {name: module(tmp_path, name, depends) for name, depends in names.items()}
    assert initramfs.in_order(["nvme"], files) == ["t10_pi", "nvme_core", "nvme"]
    with pytest.raises(BinaryError, match="no module zfs"):
        initramfs.in_order(["zfs"], files)


def test_a_compressed_module_is_unpacked(tmp_path):
    plain = module(tmp_path, "nvme_tcp", "nvme-core")
    packed = tmp_path / "nvme-tcp.ko.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert initramfs.contents(packed) == initramfs.contents(plain)
    assert initramfs.in_order(["nvme_tcp"], {"nvme_tcp": packed}) == ["nvme_tcp"]


def test_a_module_within_the_kernel_is_not_loaded(tmp_path):
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio-pci.ko\n")
    within = initramfs.built_in(tmp_path)
    files = {"nvme": module(tmp_path, "nvme", "")}
    assert initramfs.in_order(["virtio_pci", "nvme"], files, within) == ["nvme"]
    with pytest.raises(BinaryError, match="no module zfs"):
        initramfs.in_order(["zfs"], files, within)


def log_of(path, operations) -> None:
    """A log as QEMU writes it: (sector, flags, data) each."""
    head = powercut.SUPER.pack(powercut.MAGIC, 1, len(operations), SECTOR_BYTES)
    blocks = [head]
    for sector, flags, data in operations:
        count = len(data) // SECTOR_BYTES
        blocks.append(powercut.ENTRY.pack(sector, count, flags, 0))
        blocks.append(b"" if flags & powercut.DISCARD else data)
    path.write_bytes(b"".join(block + bytes(-len(block) % SECTOR_BYTES) for block in blocks))


def test_only_what_no_flush_and_no_fua_made_sure_is_undone(tmp_path):
    log, image = tmp_path / "log", tmp_path / "image"
    data = [bytes([value]) * SECTOR_BYTES for value in range(1, 6)]
    log_of(
        log,
        [
            (0, 0, data[0]),
            (0, powercut.FLUSH, b""),
            (1, 0, data[1]),
            (2, powercut.FUA, data[2]),
            (3, 0, data[3]),
            (0, powercut.DISCARD, data[4]),
        ],
    )
    writes = list(powercut.read(log))
    assert [write.offset_bytes for write in writes] == [0, 0, 512, 1024, 1536, 0]
    assert powercut.volatile(writes) == {2, 4, 5}
    image.write_bytes(bytes([9]) * 4 * SECTOR_BYTES)
    powercut.apply(log, writes, {2}, image)
    nine = bytes([9]) * SECTOR_BYTES
    assert image.read_bytes() == bytes(SECTOR_BYTES) + nine + data[2] + data[3]


def test_a_log_that_was_cut_off_ends_there(tmp_path):
    log = tmp_path / "log"
    log_of(log, [(0, 0, bytes(SECTOR_BYTES)), (1, 0, bytes(SECTOR_BYTES))])
    whole = log.read_bytes()
    log.write_bytes(whole[:-1])
    assert len(list(powercut.read(log))) == 1
    log.write_bytes(struct.pack("<QQQI", 1, 1, 0, SECTOR_BYTES))
    with pytest.raises(ValueError, match="no log"):
        list(powercut.read(log))
