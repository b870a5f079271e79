"""Names and ids between CSI and the objects.

volume_id is the Volume's spec.uuid; snapshot_id is the Snapshot's metadata.name. A CSI name (up to
128 characters of anything) becomes an object's name: itself where Kubernetes takes it, else a
digest, so that the same call made twice meets the same object.
"""

from __future__ import annotations

import hashlib
import re

from tercet_csi.errors import InvalidArgument

NAME_CHARS_MAX = 128
_OBJECT_NAME = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")


def object_name(csi_name: str) -> str:
    """The object's name for a CSI name. Raises InvalidArgument when it is empty or too long."""
    if not csi_name:
        raise InvalidArgument("name is missing")
    if len(csi_name) > NAME_CHARS_MAX:
        raise InvalidArgument(f"name has {len(csi_name)} characters, at most {NAME_CHARS_MAX}")
    if _OBJECT_NAME.match(csi_name):
        return csi_name
    return "csi-" + hashlib.sha256(csi_name.encode()).hexdigest()[:40]
