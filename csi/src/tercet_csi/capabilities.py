"""What a request's volume capabilities ask for, checked once at the edge.

A volume is written by one node at a time: multi-node access modes are refused, but for reading
only. Which node may write is decided in the controller.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tercet_csi.errors import InvalidArgument
from tercet_csi.v1 import csi_pb2 as csi

Mode = csi.VolumeCapability.AccessMode

FILE_SYSTEMS = ("ext4", "xfs")
DEFAULT_FILE_SYSTEM = "ext4"
_WRITERS = {
    Mode.SINGLE_NODE_WRITER,
    Mode.SINGLE_NODE_SINGLE_WRITER,
    Mode.SINGLE_NODE_MULTI_WRITER,
}
_READERS = {Mode.SINGLE_NODE_READER_ONLY, Mode.MULTI_NODE_READER_ONLY}


@dataclass(frozen=True)
class Access:
    """How a volume is used."""

    block: bool
    file_system: str
    mount_flags: tuple[str, ...]
    read_only: bool
    single_writer: bool


def read_access(capability: csi.VolumeCapability) -> Access:
    """The access that one capability asks for. Raises InvalidArgument when it cannot be given."""
    kind = capability.WhichOneof("access_type")
    if kind is None:
        raise InvalidArgument("volume_capability needs either mount or block")
    mode = capability.access_mode.mode
    if mode not in _WRITERS | _READERS:
        name = Mode.Mode.Name(mode)
        raise InvalidArgument(
            f"access mode {name} is not supported: a volume is written by one node at a time; "
            "use ReadWriteOnce, ReadWriteOncePod or ReadOnlyMany"
        )
    file_system = capability.mount.fs_type or DEFAULT_FILE_SYSTEM
    if kind == "mount" and file_system not in FILE_SYSTEMS:
        raise InvalidArgument(
            f"file system {file_system!r}: choose one of {', '.join(FILE_SYSTEMS)}"
        )
    return Access(
        block=kind == "block",
        file_system=file_system,
        mount_flags=tuple(capability.mount.mount_flags),
        read_only=mode in _READERS,
        single_writer=mode == Mode.SINGLE_NODE_SINGLE_WRITER,
    )


def check_all(capabilities: Iterable[csi.VolumeCapability]) -> list[Access]:
    """Every capability's access; at least one. Raises InvalidArgument."""
    found = [read_access(capability) for capability in capabilities]
    if not found:
        raise InvalidArgument("volume_capabilities is empty")
    return found
