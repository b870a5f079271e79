"""Names that several pieces must agree on, and how they are made of each other.

One place for the API group, labels, finalizers, NQNs and the CSI driver's name, so that no piece
spells them by hand. Ports are defaults of `tercet_api.objects.Ports`.
"""

from __future__ import annotations

import os
import re
import uuid

GROUP = "tercet.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

STORAGENODES = "storagenodes"
VOLUMES = "volumes"
SNAPSHOTS = "snapshots"

NAMESPACE = os.environ.get("TERCET_NAMESPACE") or "tercet-system"
"""Where Leases, Secrets and the pieces themselves live: the chart tells each pod its own."""
FINALIZER = f"{GROUP}/protection"
CSI_DRIVER = "csi.tercet.io"
TOPOLOGY_NODE = f"topology.{CSI_DRIVER}/node"
SIGNER = f"{GROUP}/node"
NODE_LEASE_PREFIX = "storagenode-"
OPERATOR_LEASE = "tercet-operator"
CLONE_LABEL = f"{GROUP}/clone-of"
"""On a Snapshot that the operator made for a clone, and drops: the volume it is of."""
CA_SECRET = "tercet-ca"  # noqa: S105 - the name of an object
CA_CONFIG_MAP = "tercet-ca"
"""Public half of the CA, key `ca.crt`, readable by every piece."""
MEMBERSHIP_CONFIG_MAP = "tercet-membership"
"""What agents need to verify enrolments, key `register`: tercet_api.objects.Register as JSON."""
MEMBERSHIP_KEY = "register"

UUID_PATTERN = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
_UUID = re.compile(UUID_PATTERN)
_VOLUME_NQN = "nqn.2026-11.io.tercet:volume:"
_HOST_NQN = "nqn.2026-11.io.tercet:host:"


def is_uuid(text: str) -> bool:
    """Whether text is a UUID in lower-case canonical form."""
    return _UUID.fullmatch(text) is not None


def clone_snapshot(volume_uid: str) -> str:
    """Name of the Snapshot from which a volume with `spec.source.volume` starts.

    The operator makes it of the source volume, and deletes it when the clone is Ready.
    """
    return f"clone-{volume_uid}"


def clone_labels(volume: str) -> dict[str, str]:
    """Labels of that Snapshot, by the source volume's name; a label's value has 63 characters."""
    return {CLONE_LABEL: volume[:63].rstrip("-.")}


def volume_nqn(volume_uuid: str) -> str:
    """NQN of a volume's subsystem. Raises ValueError when volume_uuid is no canonical UUID."""
    if not is_uuid(volume_uuid):
        raise ValueError(f"{volume_uuid!r} is no canonical UUID")
    return _VOLUME_NQN + volume_uuid


def host_id(node_name: str) -> str:
    """Host identifier (UUID) of a node, the same at every start."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{node_name}.host.{GROUP}"))


def host_nqn(node_name: str) -> str:
    """Host NQN of a node, the same at every start."""
    return _HOST_NQN + host_id(node_name)


def node_lease(node_name: str) -> str:
    """Name of the Lease (in NAMESPACE) that a StorageNode's agent renews."""
    return NODE_LEASE_PREFIX + node_name
