"""File systems on attached devices: made when the device is blank, checked, mounted, grown.

A device is formatted only when nothing at all is recognised on it: a device with an unknown or
damaged content is refused, never overwritten. Mounts are read from /proc/self/mountinfo, which is
the kernel's own word; nothing is remembered.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tercet_csi.errors import FailedPrecondition, Internal
from tercet_csi.node.commands import Runner

MOUNTINFO = Path("/proc/self/mountinfo")
_BLKID_NOTHING = 2
_FSCK_OK = (0, 1)  # clean, corrected


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    target: str
    root: str
    device: str
    file_system: str
    options: tuple[str, ...]


def mounts(text: str) -> list[Mount]:
    """Parse mountinfo (proc_pid_mountinfo(5)). Fields before ` - ` vary in number."""
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        found.append(
            Mount(_unescape(before[4]), before[3], before[2], after[0], tuple(before[5].split(",")))
        )
    return found


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def mounted_at(target: str) -> Mount | None:
    """The topmost mount whose mount point is `target`, or none."""
    real = os.path.realpath(target)
    found = [m for m in mounts(MOUNTINFO.read_text()) if m.target == real]
    return found[-1] if found else None


class FileSystems:
    """File systems by way of the system's tools."""

    def __init__(self, runner: Runner) -> None:
        self._run = runner

    async def kind_of(self, device: str) -> str | None:
        """What is on the device; none when it is blank.

        Raises FailedPrecondition when there is something that blkid cannot name.
        """
        done = await self._run(
            "blkid",
            "-p",
            "-o",
            "export",
            "-u",
            "filesystem,raid,crypto,other",
            device,
            ok=(0, _BLKID_NOTHING),
        )
        fields = dict(line.split("=", 1) for line in done.output.splitlines() if "=" in line)
        kind = fields.get("TYPE") or fields.get("PTTYPE")
        if kind is None and done.code == 0 and fields:
            raise FailedPrecondition(
                f"{device} has an unknown content ({done.output}): not touched"
            )
        return kind

    async def prepare(self, device: str, file_system: str, *, read_only: bool) -> None:
        """Make the file system on a blank device, or check the one that is there.

        Raises FailedPrecondition when another kind of content is there.
        """
        found = await self.kind_of(device)
        if found is None:
            if read_only:
                raise FailedPrecondition(
                    f"{device} is blank and asked for read-only: no file system"
                )
            await self._make(device, file_system)
        elif found != file_system:
            raise FailedPrecondition(
                f"{device} holds {found}, the volume asks for {file_system}: not formatted; "
                "set csi.storage.k8s.io/fstype to what is there"
            )
        elif file_system == "ext4" and not read_only:
            await self._run("e2fsck", "-p", device, ok=_FSCK_OK)
            if await self._ext4_can_grow(device):
                # Offline it can always grow (and wants a full check); online it may not.
                await self._run("e2fsck", "-f", "-p", device, ok=_FSCK_OK)
                await self._run("resize2fs", device)

    async def _ext4_can_grow(self, device: str) -> bool:
        done = await self._run("dumpe2fs", "-h", device)
        fields = dict(line.split(":", 1) for line in done.output.splitlines() if ":" in line)
        block_bytes, blocks = int(fields["Block size"]), int(fields["Block count"])
        size = int((await self._run("blockdev", "--getsize64", device)).output)
        return size // block_bytes > blocks

    async def _make(self, device: str, file_system: str) -> None:
        if file_system == "ext4":
            # No reserve for root, and nothing written that need not be: volumes are thin.
            await self._run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1", device)
        else:
            await self._run("mkfs.xfs", "-q", device)

    async def mount(
        self, source: str, target: str, file_system: str, options: tuple[str, ...]
    ) -> None:
        """Mount a file system."""
        flags = ("-o", ",".join(options)) if options else ()
        await self._run("mount", "-t", file_system, *flags, source, target)

    async def bind(self, source: str, target: str, *, read_only: bool) -> None:
        """Bind-mount a folder or a device's node."""
        await self._run("mount", "--bind", source, target)
        if read_only:
            await self._run("mount", "-o", "remount,bind,ro", target)

    async def unmount(self, target: str) -> None:
        """Unmount all that is mounted at the target. Raises Internal when it is busy."""
        for _ in range(16):
            if mounted_at(target) is None:
                return
            await self._run("umount", target)
        raise Internal(f"{target} is still mounted after 16 unmounts: look at /proc/self/mountinfo")

    async def grow(self, device: str, mount_point: str) -> None:
        """Grow the mounted file system to the device's size; nothing when it fits already.

        Raises FailedPrecondition where the kernel does not let this process grow it while mounted.
        """
        mount = mounted_at(mount_point)
        if mount is None:
            raise FailedPrecondition(f"nothing is mounted at {mount_point}")
        if mount.file_system == "xfs":
            await self._run("xfs_growfs", mount_point)
            return
        done = await self._run("resize2fs", device, ok=(0, 1))
        if done.code == 0:
            return
        if "Permission denied to resize" in done.output:
            raise FailedPrecondition(
                f"{device}: growing a mounted ext4 needs CAP_SYS_RESOURCE, which is absent here; "
                "it grows when the volume is staged next (restart the pod), or use xfs"
            )
        raise Internal(f"resize2fs {device} ended with {done.code}: {done.output}")
