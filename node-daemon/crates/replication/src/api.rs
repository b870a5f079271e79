//! What goes into the state machine and what comes out: the seam to the executor (`tercet-shard`,
//! and through it the engine and the simulator).
//!
//! [`Input`]s carry everything from outside: links, hosts, the agent, time. [`Output`]s are carried
//! out in order. Storage is called directly (`tercet_proto::storage::Storage`), its events come in
//! as [`Input::Storage`].

use bytes::Bytes;
use tercet_proto::message::Message;
use tercet_proto::{
    BlockRange, BlockVersion, ChunkPage, Config, Epoch, InstanceId, Lsn, Member, NewReplica,
    NodeName, Place, ReplicaId, SnapshotId, StorageError, StorageEvent, Token, VolumeId,
};

/// The shard of an engine at the other end of a link. A pair of rule L3 is two of these with
/// their instances.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId {
    /// The node.
    pub node: NodeName,
    /// The shard of its engine.
    pub shard: u16,
}

/// An association of a host at this shard (rule H3): one admin queue and its I/O queues. Drawn by
/// the target, unique per engine instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AssociationId(pub u64);

/// Who a host is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostIdentity {
    /// Host NQN.
    pub nqn: String,
    /// The 128-bit host identifier.
    pub id: [u8; 16],
}

/// A host's command on a volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostCommand {
    /// Read blocks.
    Read(BlockRange),
    /// Write blocks; always durable when it is answered, FUA or not.
    Write(BlockRange, Bytes),
    /// Write zeroes, or deallocate when the flag says so.
    Zero(BlockRange, bool),
    /// Answered when everything answered before is committed, which it is: a barrier only.
    Flush,
    /// Compare blocks with these bytes (rule L1).
    Compare(BlockRange, Bytes),
    /// Compare blocks with the first bytes and write the second only if they are equal, with no
    /// other change in between (rule L1).
    CompareWrite(BlockRange, Bytes, Bytes),
}

/// How a command ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostDone {
    /// Done.
    Ok,
    /// A read's bytes in order, in one or more pieces.
    Data(Vec<Bytes>),
    /// A compare found the first difference in this block; nothing was written.
    Differs(u64),
}

/// How a command ended otherwise; the target makes a status of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostError {
    /// Not (any more) the serving primary: ANA inaccessible, the host tries another path (H2).
    Inaccessible,
    /// Outside the volume.
    OutOfRange,
    /// The host may only read.
    ReadOnly,
    /// The device is full; nothing was changed.
    NoSpace,
    /// The block cannot be read (C4).
    Media,
}

/// ANA state of this node's path to a volume (rule H1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ana {
    /// Serving primary with its lease.
    Optimized,
    /// Everything else.
    Inaccessible,
    /// On the way to optimized here, for at most ANATT.
    Change,
}

/// The Volume object as the agent saw it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VolumeView {
    /// `status.config`.
    pub config: Option<Config>,
    /// `spec.attachments`: who may connect.
    pub attachments: Vec<Attachment>,
    /// `spec.sizeBytes` in blocks: what the volume shall grow to.
    pub size_blocks: u64,
    /// `status.fence`.
    pub fence: Option<(Epoch, u64)>,
    /// `metadata.generation`: which spec the attachments are from (rule H5).
    pub generation: u64,
    /// Which change of members `status.replicas` asks for (rule M1).
    pub replacement: Option<Replacement>,
    /// From a consistent read or a swap's answer (rule T7), not from a watch's cache.
    pub consistent: bool,
}

/// A change of members that the operator asks for, once the newcomer's replica is made (rule M1).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replacement {
    /// The member that shall go.
    pub old: ReplicaId,
    /// Who takes its place, a learner first.
    pub learner: Member,
}

/// One of `spec.attachments`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Attachment {
    /// The host's NQN.
    pub host_nqn: String,
    /// Whether it may only read.
    pub read_only: bool,
}

/// How a compare-and-swap ended (rule T3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SwapOutcome {
    /// It took place; the object as the API server returned it.
    Swapped(VolumeView),
    /// It did not, and never will; the object as it is now.
    Lost(VolumeView),
    /// The answer was lost: both outcomes count until a consistent read says which.
    Unknown,
}

/// What the agent asks of this shard.
#[derive(Clone, Debug)]
pub enum Control {
    /// Make a replica (rule T9). Answered by `Output::ControlDone`, also when it is there already
    /// under this volume: then with that one as it is now.
    CreateReplica(NewReplica),
    /// Make a replica that takes another's place (rules T9, M1): durably incomplete before this is
    /// answered, as `CreateReplica` is. It promises nothing before a configuration names it.
    CreateLearner(NewReplica),
    /// Delete the replica with this id.
    DeleteReplica(VolumeId, ReplicaId),
    /// Append a snapshot (S1). Answered when committed, with its place.
    Snapshot(VolumeId, SnapshotId),
    /// Append a snapshot's deletion. Answered when committed, with its place; with the applied
    /// place where there is no such snapshot.
    SnapshotDelete(VolumeId, SnapshotId),
    /// Append a growth to that many blocks. Answered when committed, with its place; with the
    /// applied place where the volume has that size.
    Grow(VolumeId, u64),
    /// Hand the volume over to another member that is in sync, to the named one where one is named;
    /// answered when it serves there.
    HandOver(VolumeId, Option<NodeName>),
    /// Checksums of the applied chunks.
    ChunkSums(VolumeId),
    /// A page of the applied chunk map, from this chunk on.
    ChunkMap(VolumeId, u64),
    /// The engine is about to stop in good order: hand over every volume that this shard leads and
    /// give the leases back (rule L5). Answered when none is left, or after the time for it.
    Stop,
}

/// What a [`Control`] gave.
#[derive(Clone, Debug)]
pub enum ControlDone {
    /// Done.
    Ok,
    /// The replica that is there now.
    Replica {
        /// Its id.
        replica: ReplicaId,
        /// It is no complete copy yet (rule S3).
        incomplete: bool,
    },
    /// The committed place of the entry.
    Place(Place),
    /// Rows of `Storage::chunk_sums` as of the place.
    ChunkSums(Place, Vec<Bytes>),
    /// A page of the chunk map as of the place.
    ChunkMap(Place, ChunkPage),
}

/// Why a [`Control`] was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// This replica does not serve as the primary: ask the primary's node.
    #[error("not the serving primary of volume {0}")]
    NotPrimary(VolumeId),
    /// Storage refuses.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// It would shrink the volume.
    #[error("volume {volume} has {size_blocks} blocks and cannot shrink")]
    Shrink {
        /// The volume.
        volume: VolumeId,
        /// Its size now.
        size_blocks: u64,
    },
    /// The epoch ended before it was committed: its outcome is unknown, ask again.
    #[error("volume {0} changed its primary meanwhile: ask again")]
    Interrupted(VolumeId),
    /// Nobody followed in time, or another than the one named. In the first case this node serves on.
    #[error("volume {volume} is not handed over{}: {why}", to_node(.to.as_ref()))]
    NotHandedOver {
        /// The volume.
        volume: VolumeId,
        /// Who was named.
        to: Option<NodeName>,
        /// What stood in the way last.
        why: &'static str,
    },
}

fn to_node(to: Option<&NodeName>) -> String {
    to.map(|node| format!(" to {node}")).unwrap_or_default()
}

/// Everything that happens to the state machine.
#[derive(Clone, Debug)]
pub enum Input {
    /// A link to a peer is up; its engine's instance and number of shards.
    PeerUp {
        /// Who.
        peer: PeerId,
        /// The instance at the other end.
        instance: InstanceId,
        /// How many shards that engine has: where its replica of a volume is (`VolumeId::shard`).
        shards: u16,
        /// The version of the protocol that both speak: what is newer is not sent over this link.
        version: u16,
    },
    /// The link is down; proves nothing (rule L5).
    PeerDown(PeerId),
    /// A message over a link that is up.
    Message(PeerId, Message),
    /// The agent's view of a Volume object.
    Observe(VolumeId, VolumeView),
    /// The agent's answer to `Output::Swap`.
    Swapped(Token, SwapOutcome),
    /// A request of the agent's.
    Control(Token, Control),
    /// That instance on that node has ended, proven (rule L5).
    ProvenExit(NodeName, InstanceId),
    /// A host connected an admin queue; it does I/O only after `Output::HostAccepted`.
    HostConnect(VolumeId, AssociationId, HostIdentity),
    /// The association is gone, whatever the reason.
    HostGone(AssociationId),
    /// The host has been sent the ANA log page as it is now (rule H4).
    HostReadAna(AssociationId),
    /// A command; the token is unique within the association.
    HostCommand(AssociationId, Token, HostCommand),
    /// From storage.
    Storage(StorageEvent),
    /// Time has come to at least what `next_deadline` said.
    Tick,
}

/// What the executor shall do, in order.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send to a peer whose link is up; dropped when it is not.
    Send(PeerId, Message),
    /// Execute a compare-and-swap of the whole old configuration (rule T3); answered by
    /// `Input::Swapped` with the token.
    Swap {
        /// For the answer.
        token: Token,
        /// The volume.
        volume: VolumeId,
        /// What must be there.
        old: Config,
        /// What shall be there.
        new: Config,
    },
    /// The outcome of a swap is unknown or the view is stale: read the object consistently and
    /// give it as `Input::Observe` with `consistent`.
    ReadConsistent(VolumeId),
    /// Connect's answer: whether the host may use the volume here.
    HostAccepted(AssociationId, Result<(), HostRefusal>),
    /// A command's answer.
    HostDone(AssociationId, Token, Result<HostDone, HostError>),
    /// End the association (rules H3, H4): close its connections, answer nothing any more.
    HostEnd(AssociationId),
    /// This path's state; hosts are told by an asynchronous event and read the ANA log.
    Ana(VolumeId, Ana),
    /// The volume has grown here (a namespace-changed event).
    Resized(VolumeId, u64),
    /// Every entry of a host that the attachments of this generation refuse is committed, and it
    /// can do nothing here any more: the agent writes `status.fence` (rule H5).
    Fenced {
        /// The volume.
        volume: VolumeId,
        /// The epoch for which it counts.
        epoch: Epoch,
        /// Of the spec.
        generation: u64,
    },
    /// Answer to `Input::Control`.
    ControlDone(Token, Result<ControlDone, ControlError>),
    /// Something worth an event or a log line at the Volume.
    Notice(VolumeId, Notice),
    /// W2's alarm and the like: stop this engine, keep the evidence.
    Fatal(String),
}

/// Why a host may not connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostRefusal {
    /// No replica of that volume here.
    NoVolume,
    /// The host NQN is not among the attachments.
    NotAllowed,
}

/// What happened to a volume here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// This node serves as the primary of this epoch now; how long the volume had none here.
    Serving(Epoch),
    /// It does not any more.
    Stopped(Epoch),
    /// This node asks for a takeover because it misses the primary (rule T2).
    TakingOver(Epoch),
    /// A member is in step again, or has fallen behind.
    MemberInSync(NodeName, bool),
    /// The object is older than this replica's promise (rule M3).
    RestoredObject(Epoch),
    /// This replica of a clone has its snapshot's blocks now: it is complete (rule S3).
    Filled,
    /// This replica has been copied from the primary's: it is complete again (rule C2).
    Copied,
    /// A block here does not have its checksum, or cannot be read (rule C4).
    BadBlock(BlockVersion),
    /// It is repaired from another member's version.
    Repaired(BlockVersion),
    /// No member could give it for now: it is asked for again, and reads of it fail meanwhile.
    NotRepaired(BlockVersion),
    /// A replica is being filled here, to take another's place (rule M1).
    Learning(NodeName),
    /// Members change: the node that goes, the node that comes (rule M1).
    Changing(NodeName, NodeName),
    /// A change of members is taken back: too few of the new ones answer (rule M1).
    AbortingChange(Epoch),
}

/// What a member looks like from the primary, for `status.replicas` and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// The node.
    pub node: NodeName,
    /// Its replica.
    pub replica: ReplicaId,
    /// Durable and matched up to here in this epoch (rule W3).
    pub matched: Lsn,
    /// Bytes of log entries that it lacks.
    pub lag_bytes: u64,
    /// Whether it counts as in sync.
    pub in_sync: bool,
    /// It has said that it is no complete copy (rules R1, C2, S3).
    pub incomplete: bool,
    /// It counts in no majority (rule M1).
    pub learner: bool,
    /// While it is copied to: how far that is (rule C3).
    pub copy: Option<CopyStatus>,
}

/// How far a copy to a member is (rule C3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyStatus {
    /// Blocks of the view that are known to be equal.
    pub done_blocks: u64,
    /// Blocks of the view, snapshots included.
    pub total_blocks: u64,
    /// Bytes that were sent in this epoch.
    pub sent_bytes: u64,
}

/// What a replica says of itself, for `status`, metrics and the CLI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// The volume.
    pub volume: VolumeId,
    /// The replica.
    pub replica: ReplicaId,
    /// The epoch that it has promised.
    pub epoch: Epoch,
    /// Whether this node serves as the primary, lease included.
    pub serving: bool,
    /// Log tail.
    pub tail: Place,
    /// Committed as far as known here.
    pub committed: Lsn,
    /// Applied.
    pub applied: Place,
    /// Not fit to stand.
    pub incomplete: bool,
    /// Blocks that are known to be bad here and not repaired yet (rule C4).
    pub bad_blocks: u64,
    /// At the serving primary: all members and learners.
    pub members: Vec<MemberStatus>,
}
