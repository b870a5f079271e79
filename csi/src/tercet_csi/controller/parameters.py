"""What a StorageClass and a CreateVolume request ask for, checked at the edge.

An unknown parameter is refused by name: a misspelt one that is ignored would be found out when a
node is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from tercet_api.objects import (
    MEMBERS_MAX,
    VOLUME_BYTES_MAX,
    VOLUME_BYTES_MIN,
    Placement,
    Qos,
)
from tercet_csi.errors import InvalidArgument, OutOfRange
from tercet_csi.v1 import csi_pb2 as csi

SIZE_DEFAULT_BYTES = 1024**3
SIZE_STEP_BYTES = VOLUME_BYTES_MIN
_SIDECAR_PREFIX = "csi.storage.k8s.io/"
KNOWN = ("replicas", "topologyKey", "iops", "bytesPerSecond")


@dataclass(frozen=True)
class Parameters:
    """StorageClass parameters of Tercet."""

    replicas: int = MEMBERS_MAX
    topology_key: str | None = None
    qos: Qos | None = None


def read_parameters(raw: dict[str, str]) -> Parameters:
    """Read StorageClass parameters. Raises InvalidArgument naming the bad one."""
    own = {key: value for key, value in raw.items() if not key.startswith(_SIDECAR_PREFIX)}
    unknown = sorted(set(own) - set(KNOWN))
    if unknown:
        raise InvalidArgument(
            f"StorageClass parameter {unknown[0]!r} is unknown; known are {', '.join(KNOWN)}"
        )
    iops = _number(own, "iops", 1, 10_000_000)
    bytes_per_second = _number(own, "bytesPerSecond", 4096, 2**50)
    qos = None
    if iops is not None or bytes_per_second is not None:
        qos = Qos(iops=iops, bytes_per_second=bytes_per_second)
    return Parameters(
        replicas=_number(own, "replicas", 1, MEMBERS_MAX) or MEMBERS_MAX,
        topology_key=own.get("topologyKey"),
        qos=qos,
    )


def _number(raw: dict[str, str], key: str, least: int, most: int) -> int | None:
    if key not in raw:
        return None
    try:
        value = int(raw[key])
    except ValueError:
        raise InvalidArgument(f"StorageClass parameter {key}={raw[key]!r} is no number") from None
    if not least <= value <= most:
        raise InvalidArgument(f"StorageClass parameter {key}={value}: from {least} to {most}")
    return value


def size_bytes(capacity: csi.CapacityRange) -> int:
    """The size to make: required, rounded up to 4 MiB. Raises OutOfRange when none fits."""
    required, limit = capacity.required_bytes, capacity.limit_bytes
    if required < 0 or limit < 0:
        raise OutOfRange("capacity_range is negative")
    wanted = required or min(SIZE_DEFAULT_BYTES, limit or SIZE_DEFAULT_BYTES)
    size = max(VOLUME_BYTES_MIN, -(-wanted // SIZE_STEP_BYTES) * SIZE_STEP_BYTES)
    if size > VOLUME_BYTES_MAX:
        raise OutOfRange(f"{required} bytes are wanted; a volume has at most {VOLUME_BYTES_MAX}")
    if limit and size > limit:
        raise OutOfRange(
            f"sizes are multiples of {SIZE_STEP_BYTES} bytes: none between {required} and {limit}"
        )
    return size


def placement(parameters: Parameters, preferred_node: str | None) -> Placement:
    """Where the replicas shall be."""
    return Placement(topology_key=parameters.topology_key, preferred_node=preferred_node)
