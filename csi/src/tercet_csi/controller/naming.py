"""Names and ids between CSI and the objects.

volume_id is the Volume's spec.uuid; snapshot_id is the Snapshot's metadata.name. A CSI name (up to
128 bytes of nearly anything) becomes an object's name: itself where Kubernetes takes it, else a
digest, so that the same call made twice meets the same object. An id that no object can have is
found out here, before it becomes part of a request's path.
"""

from __future__ import annotations

import hashlib
import re

from tercet_csi.errors import InvalidArgument

NAME_BYTES_MAX = 128
_OWN_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_ANY_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_ANY_NAME_CHARS_MAX = 253
_BANNED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_RESERVED = ("csi-", "clone-")
"""What names begin with that are made here, and by the operator (tercet_api.names)."""


def object_name(csi_name: str) -> str:
    """The object's name for a CSI name, 1 to 63 characters long.

    Raises InvalidArgument when it is empty, longer than 128 bytes, or has a character that the
    specification bans (CSI 1.12, CreateVolumeRequest.name).
    """
    if not csi_name:
        raise InvalidArgument("name is missing")
    size_bytes = len(csi_name.encode())
    if size_bytes > NAME_BYTES_MAX:
        raise InvalidArgument(f"name has {size_bytes} bytes, at most {NAME_BYTES_MAX}")
    if banned := _BANNED.search(csi_name):
        raise InvalidArgument(f"name has the control character U+{ord(banned[0]):04X}")
    if _OWN_NAME.fullmatch(csi_name) and not csi_name.startswith(_RESERVED):
        return csi_name
    return "csi-" + hashlib.sha256(csi_name.encode()).hexdigest()[:40]


def is_object_name(text: str) -> bool:
    """Whether an object of a cluster can have this name (a DNS subdomain, RFC 1123)."""
    return len(text) <= _ANY_NAME_CHARS_MAX and _ANY_NAME.fullmatch(text) is not None
