"""The objects of `tercet.io/v1alpha1` as typed models: the source of the CRDs.

Each model is one object's spec or status with the JSON names that kubectl shows (camelCase).
`tercet_api.manifests` generates the CRDs from these models, `make generate` writes them to
`crds/manifests/`. Rules that the API server enforces stand beside the models as CEL in
`tercet_api.cel`. What a step between two configurations may be is left to `tercet_api.config`.

Sizes are bytes, times are RFC 3339 strings in UTC as Kubernetes writes them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from tercet_api.enrolment import ADDRESS_BYTES, KEYS_MAX, NID_MAX
from tercet_api.names import API_VERSION, UUID_PATTERN

MEMBERS_MAX = 3
REPLICAS_MAX = 8
"""Entries of status.replicas: members, learners and those that are still to be deleted."""
SECONDS_LEFT_MAX = 10_000_000
"""Longest rest of a rebuild that is shown."""
BLOCK_BYTES = 4096
VOLUME_BYTES_MIN = 4 * 1024 * 1024
VOLUME_BYTES_MAX = 64 * 1024**4
DEVICES_MAX = 16
ATTACHMENTS_MAX = 64
CONDITIONS_MAX = 16
LABELS_MAX = 32
ORPHANS_MAX = 1024

Uuid = Annotated[str, Field(pattern=UUID_PATTERN, max_length=36)]
Address = Annotated[str, Field(min_length=2, max_length=45)]
"""IPv4 or IPv6."""
Name = Annotated[str, Field(min_length=1, max_length=253)]
"""metadata.name of an object."""
NodeName = Annotated[str, Field(min_length=1, max_length=253)]
Nqn = Annotated[str, Field(pattern=r"^nqn\.", max_length=223)]
Percent = Annotated[int, Field(ge=0, le=100)]
Port = Annotated[int, Field(ge=1, le=65535)]
DeviceId = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Bytes = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=1024)]
"""What a person reads."""
Label = Annotated[str, Field(max_length=317)]
"""A label's key or value."""
Time = Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]
"""RFC 3339, UTC."""
Labels = Annotated[dict[Label, Label], Field(max_length=LABELS_MAX)]


def keyed(*keys: str) -> dict[str, Any]:
    """What makes a list one that the API server merges and keeps unique by these keys."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


class Model(BaseModel):
    """Base of all models: camelCase outside, snake_case inside, unknown fields kept out."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="ignore",
        use_attribute_docstrings=True,
    )

    def to_json(self) -> dict[str, Any]:
        """As the API server stores it: camelCase, absent fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


# ------------------------------------------------------------------ shared parts


class ConditionStatus(StrEnum):
    """`status` of a condition."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Model):
    """A Kubernetes condition (metav1.Condition)."""

    type: Annotated[str, Field(max_length=316)]
    status: ConditionStatus
    reason: Annotated[str, Field(min_length=1, max_length=1024)]
    message: Annotated[str, Field(max_length=32768)] = ""
    last_transition_time: Time
    observed_generation: int | None = None


Conditions = Annotated[
    list[Condition], Field(max_length=CONDITIONS_MAX, json_schema_extra=keyed("type"))
]


class Metadata(Model):
    """What Tercet reads of an object's metadata."""

    name: str
    namespace: str | None = None
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    finalizers: list[str] = Field(default_factory=list)
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class Object(Model):
    """An object with its metadata. Concrete ones have `spec`, most have `status`.

    An absent status reads as an empty one: nobody may conclude anything from the difference.
    """

    API_VERSION: ClassVar[str] = API_VERSION
    KIND: ClassVar[str]

    metadata: Metadata

    @property
    def name(self) -> str:
        """metadata.name."""
        return self.metadata.name

    @property
    def uid(self) -> str:
        """metadata.uid: this very object, and not another that had its name."""
        return self.metadata.uid

    @property
    def deleting(self) -> bool:
        """Whether somebody has asked for its deletion."""
        return self.metadata.deletion_timestamp is not None

    def manifest(self) -> dict[str, Any]:
        """The whole object as it is sent to create it; status stays out, as the server drops it."""
        body = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"status"})
        body["metadata"] = self.metadata.model_dump(
            mode="json", by_alias=True, exclude_defaults=True
        )
        return {"apiVersion": self.API_VERSION, "kind": self.KIND, **body}


# ------------------------------------------------------------------ StorageNode


class FileSource(Model):
    """A device that is a file on the node."""

    path: Annotated[str, Field(pattern=r"^/", max_length=4096)]
    capacity_bytes: Annotated[int, Field(ge=256 * 1024 * 1024)]


class Device(Model):
    """A device of a StorageNode: exactly one of file, path and nguid."""

    id: DeviceId
    file: FileSource | None = None
    path: Annotated[str, Field(pattern=r"^/dev/", max_length=4096)] | None = None
    nguid: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", max_length=32)] | None = None


class Ports(Model):
    """Ports of a node's services; nodes on one machine differ by address instead."""

    nvme_tcp: Port = 4420
    discovery: Port = 8009
    replication: Port = 4421
    membership: Port = 4422
    agent: Port = 4423


class StorageNodeSpec(Model):
    """What a StorageNode shall be."""

    node_name: NodeName
    address: Address
    ports: Ports = Field(default_factory=Ports)
    devices: Annotated[
        list[Device], Field(max_length=DEVICES_MAX, json_schema_extra=keyed("id"))
    ] = Field(default_factory=list)
    topology: Labels = Field(default_factory=dict)
    cordoned: bool = False
    drained: bool = False


class DeviceState(StrEnum):
    """State of a device."""

    READY = "Ready"
    FAILED = "Failed"


class DeviceStatus(Model):
    """A device as its engine sees it."""

    id: DeviceId
    state: DeviceState
    message: Text = ""
    capacity_bytes: Bytes = 0
    allocated_bytes: Bytes = 0


class Orphan(Model):
    """A replica here whose Volume object is gone (replication.md M2)."""

    volume: Uuid
    name: Name
    replica: Uuid


Nid = Annotated[int, Field(ge=0, le=NID_MAX)]


class Enrolment(Model):
    """The operator's word, signed, that a node belongs to the cluster (docs/membership.md)."""

    nid: Nid
    """Node index: the first gap when the node came; it never changes."""
    node: Uuid
    """metadata.uid of the StorageNode."""
    instance: Uuid
    address: Annotated[str, Field(max_length=ADDRESS_BYTES)]
    """HOST:PORT of its membership."""
    incarnation: Annotated[int, Field(ge=1)]
    """Grows with each entry that is signed for one nid."""
    gone: bool = False
    """A tombstone: the node was removed."""
    signature: Annotated[str, Field(max_length=88)] = ""
    """Ed25519, base64."""


class Register(Model):
    """What enrolments are verified with, and who was removed (ConfigMap MEMBERSHIP_CONFIG_MAP)."""

    cluster: Uuid
    """metadata.uid of the namespace kube-system."""
    keys: Annotated[list[str], Field(min_length=1, max_length=KEYS_MAX)]
    """Ed25519 public keys that hold, base64; the first one signs."""
    gone: list[Enrolment] = Field(default_factory=list)
    """The tombstone of each nid that was given back and not taken again."""


class Membership(Model):
    """A node's list of nodes, as its agent has it."""

    nid: Nid
    size: Annotated[int, Field(ge=0)]
    """Nodes in the list."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", max_length=32)]
    """Nodes with the same digest have the same list."""


class NodePhase(StrEnum):
    """One word for people; programs read conditions."""

    PENDING = "Pending"
    """Its agent has not reported yet."""
    READY = "Ready"
    NOT_READY = "NotReady"
    """Its Lease has expired, or a device has failed."""
    CORDONED = "Cordoned"
    DELETING = "Deleting"


class StorageNodeStatus(Model):
    """What a StorageNode is. `instance` and below are its agent's, the rest the operator's."""

    phase: NodePhase | None = None
    conditions: Conditions = Field(default_factory=list)
    observed_generation: int | None = None
    used_percent: Percent | None = None
    enrolment: Enrolment | None = None
    instance: Uuid | None = None
    """Of the engine: a new one at each of its starts."""
    devices: Annotated[
        list[DeviceStatus], Field(max_length=DEVICES_MAX, json_schema_extra=keyed("id"))
    ] = Field(default_factory=list)
    capacity_bytes: Bytes = 0
    allocated_bytes: Bytes = 0
    reserved_bytes: Bytes = 0
    orphans: Annotated[list[Orphan], Field(max_length=ORPHANS_MAX)] = Field(default_factory=list)
    """Replicas without an object; said for `orphansInstance` only."""
    orphans_instance: Uuid | None = None
    version: Annotated[str, Field(max_length=64)] = ""
    membership: Membership | None = None


class StorageNode(Object):
    """A node that keeps replicas."""

    KIND: ClassVar[str] = "StorageNode"
    spec: StorageNodeSpec
    status: StorageNodeStatus = Field(default_factory=StorageNodeStatus)


# ------------------------------------------------------------------ Volume


class ConfigState(StrEnum):
    """State of a configuration (replication.md T4-T7)."""

    RECOVERING = "Recovering"
    ACTIVE = "Active"


class Primary(Model):
    """Who leads an epoch: one start of one engine (T1)."""

    node: NodeName
    instance: Uuid


class Member(Model):
    """A replica that counts in a majority."""

    node: NodeName
    replica: Uuid


Members = Annotated[list[Member], Field(min_length=1, max_length=MEMBERS_MAX)]


class Config(Model):
    """`status.config`: the one thing agreed on through the API server. Changed by swap only."""

    epoch: Annotated[int, Field(ge=1)]
    state: ConfigState
    primary: Primary
    members: Members
    previous_members: Members | None = None
    learners: Annotated[list[Member], Field(max_length=MEMBERS_MAX)] | None = None
    single_copy: Uuid | None = None
    restored: Annotated[int, Field(ge=1)] | None = None


class Attachment(Model):
    """A host that may connect."""

    node_name: NodeName
    host_nqn: Annotated[str, Field(pattern=r"^nqn\.", max_length=223), Field(alias="hostNQN")]
    read_only: bool = False


class Source(Model):
    """What a volume starts as: exactly one of the two names."""

    snapshot: Name | None = None
    volume: Name | None = None


class Placement(Model):
    """Where replicas may be."""

    topology_key: Label | None = None
    """Replicas are spread over this key of StorageNode.spec.topology where that is possible."""
    node_selector: Labels = Field(default_factory=dict)
    """Labels of StorageNode.spec.topology that a replica's node must have."""
    preferred_node: NodeName | None = None
    """Data locality: one replica here if it fits."""


class Qos(Model):
    """Limits of a volume; none where absent."""

    iops: Annotated[int, Field(ge=1)] | None = None
    bytes_per_second: Annotated[int, Field(ge=4096)] | None = None


class VolumeSpec(Model):
    """What a Volume shall be."""

    uuid: Uuid | None = None
    """For ever. Drawn by the creator, else set once by the operator; then immutable."""
    size_bytes: Annotated[
        int, Field(ge=VOLUME_BYTES_MIN, le=VOLUME_BYTES_MAX, multiple_of=BLOCK_BYTES)
    ]
    replicas: Annotated[int, Field(ge=1, le=MEMBERS_MAX)] = 3
    block_size_bytes: Annotated[int, Field(ge=BLOCK_BYTES, le=BLOCK_BYTES)] = BLOCK_BYTES
    source: Source | None = None
    placement: Placement = Field(default_factory=Placement)
    qos: Qos | None = None
    attachments: Annotated[
        list[Attachment], Field(max_length=ATTACHMENTS_MAX, json_schema_extra=keyed("hostNQN"))
    ] = Field(default_factory=list)


class VolumePhase(StrEnum):
    """One word for people; programs read conditions."""

    PENDING = "Pending"
    CREATING = "Creating"
    READY = "Ready"
    DEGRADED = "Degraded"
    UNAVAILABLE = "Unavailable"
    DELETING = "Deleting"
    """The operator's word that nothing depends on the volume any more: agents delete replicas."""


class ReplicaPhase(StrEnum):
    """State of a replica in status.replicas."""

    PLACED = "Placed"
    """The operator chose the node; its agent has not reported yet."""
    CREATED = "Created"
    """The agent has reported the replica's id."""
    IN_SYNC = "InSync"
    LAGGING = "Lagging"
    REBUILDING = "Rebuilding"
    UNREACHABLE = "Unreachable"
    FAILED = "Failed"
    """It could not be made; `message` says why."""
    FORMER = "Former"
    """No member any more, or never became one: its agent deletes it when it can (M2)."""
    DELETED = "Deleted"
    """The agent has deleted it: the object is being deleted, or it was a former one."""


class VolumeReplica(Model):
    """One replica, as status shows it."""

    node: NodeName
    replica: Uuid | None = None
    state: ReplicaPhase
    replaces: Uuid | None = None
    """The member whose place it shall take, until it has (M1)."""
    lag_bytes: Bytes = 0
    rebuild_percent: Percent | None = None
    """While it is copied to: how much of the volume and its snapshots is equal already."""
    rebuild_bytes_per_second: Bytes | None = None
    rebuild_seconds_left: Annotated[int, Field(ge=0, le=SECONDS_LEFT_MAX)] | None = None
    message: Text = ""


class Endpoint(Model):
    """Where a host connects."""

    node: NodeName
    address: Address
    port: Port


class Fence(Model):
    """A host's refusal, confirmed by the primary (replication.md H5)."""

    epoch: Annotated[int, Field(ge=1)]
    generation: Annotated[int, Field(ge=0)]


class VolumeStatus(Model):
    """What a Volume is, written by three pieces.

    operator: phase, conditions, observedGeneration, replicas[] (added), endpoints and the first
    config; agents: their own replicas[i] entry's id and state; the primary's agent: config (by
    swap), sizeBytes, allocatedBytes, every replica's state, fence; csi controller: newUid.
    """

    phase: VolumePhase | None = None
    conditions: Conditions = Field(default_factory=list)
    observed_generation: int | None = None
    new_uid: Annotated[str, Field(max_length=64)] | None = None
    """metadata.uid, set by the CSI controller after its own create: nothing older exists."""
    config: Config | None = None
    size_bytes: Bytes = 0
    allocated_bytes: Bytes = 0
    used_percent: Percent | None = None
    copies: Annotated[str, Field(max_length=16)] | None = None
    """Replicas in sync of those wanted, for people: 3/3."""
    replicas: Annotated[
        list[VolumeReplica], Field(max_length=REPLICAS_MAX, json_schema_extra=keyed("node"))
    ] = Field(default_factory=list)
    endpoints: Annotated[
        list[Endpoint], Field(max_length=MEMBERS_MAX, json_schema_extra=keyed("node"))
    ] = Field(default_factory=list)
    fence: Fence | None = None


class Volume(Object):
    """A replicated block volume."""

    KIND: ClassVar[str] = "Volume"
    spec: VolumeSpec
    status: VolumeStatus = Field(default_factory=VolumeStatus)

    @property
    def deletion_allowed(self) -> bool:
        """Whether replicas may be deleted: the object is, and nothing depends on it any more."""
        return self.deleting and self.status.phase is VolumePhase.DELETING


# ------------------------------------------------------------------ Snapshot


class SnapshotSpec(Model):
    """What a Snapshot shall be of. Immutable."""

    volume: Name
    """metadata.name of the Volume."""
    group: Name | None = None


class SnapshotPhase(StrEnum):
    """One word for people; programs read `readyToUse` and conditions."""

    PENDING = "Pending"
    READY = "Ready"
    DELETING = "Deleting"
    """The operator's word that no clone is being made of it: the primary's agent deletes it."""


class SnapshotStatus(Model):
    """What a Snapshot is. Written by the agent of the volume's primary; phase by the operator."""

    phase: SnapshotPhase | None = None
    conditions: Conditions = Field(default_factory=list)
    observed_generation: int | None = None
    ready_to_use: bool = False
    creation_time: Time | None = None
    size_bytes: Bytes = 0
    epoch: Annotated[int, Field(ge=1)] | None = None
    lsn: Annotated[int, Field(ge=0)] | None = None
    volume_uuid: Uuid | None = None
    deleted: bool = False
    """The deletion is committed in the volume's log; the finalizer may go."""


class Snapshot(Object):
    """A volume's blocks at one point in the order of its writes."""

    KIND: ClassVar[str] = "Snapshot"
    spec: SnapshotSpec
    status: SnapshotStatus = Field(default_factory=SnapshotStatus)

    @property
    def deletion_allowed(self) -> bool:
        """Whether its deletion may be appended: it is asked for, and no clone needs it."""
        return self.deleting and self.status.phase is SnapshotPhase.DELETING
