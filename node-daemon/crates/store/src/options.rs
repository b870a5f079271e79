//! What a store is told at format and at open, what it says of itself, and why it does not open.

use tercet_proto::disk::StoreId;
use tercet_proto::{InstanceId, NodeName, VolumeId};
use thiserror::Error;
use uuid::Uuid;

use crate::arena::Arena;
use crate::disk::DiskError;
use crate::scrub::ScrubPace;

/// Smallest device: superblocks, slots, the smallest ring, and as much data again.
pub const CAPACITY_BYTES_MIN: u64 = 8 << 20;
/// Largest device: 2^32 blocks, less one.
pub const CAPACITY_BYTES_MAX: u64 = (1 << 44) - 4096;
/// Smallest log ring.
pub const RING_BLOCKS_MIN: u32 = 1024;
/// Largest log ring: what is read in a second at start-up.
pub const RING_BLOCKS_MAX: u32 = 1 << 17;

/// Who a new store is.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// A fresh id.
    pub store: StoreId,
    /// The cluster.
    pub cluster: Uuid,
    /// The node.
    pub node: NodeName,
    /// Number of the store on that node.
    pub shard: u16,
    /// Blocks of the log ring; none: a sixteenth of the device, within the limits.
    pub ring_blocks: Option<u32>,
    /// Overwrite a store that is there.
    pub overwrite: bool,
}

/// How a store is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where its buffers come from. At least [`ARENA_BYTES_MIN`].
    pub arena: Arena,
    /// Which store must be here: cluster, node and shard. None: any.
    pub expect: Option<(Uuid, NodeName, u16)>,
    /// Memory for leaves that were read or written lately.
    pub leaf_cache_bytes: usize,
    /// Log records on their way to the device at a time; what comes meanwhile goes into the next.
    pub records_in_flight_max: usize,
    /// How quickly it is scrubbed; none: not at all.
    pub scrub: Option<ScrubPace>,
    /// The rule to break.
    #[cfg(feature = "canary")]
    pub canary: Option<Canary>,
}

impl Options {
    /// The usual ones.
    pub fn new(arena: Arena) -> Self {
        Self {
            arena,
            expect: None,
            leaf_cache_bytes: LEAF_CACHE_BYTES,
            records_in_flight_max: 4,
            scrub: None,
            #[cfg(feature = "canary")]
            canary: None,
        }
    }
}

/// Memory for leaves, where nothing else is said: those of 10 GiB.
pub const LEAF_CACHE_BYTES: usize = 64 << 20;

/// Smallest arena of a store.
pub const ARENA_BYTES_MIN: usize = 8 << 20;

/// A rule broken on purpose, to see whether the tests notice.
#[cfg(feature = "canary")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Canary {
    /// Records and extents are written without FUA and without a flush (W3).
    SkipFlush,
    /// Damage is taken for a torn tail (R1).
    TornTailForDamage,
    /// Freed space is used again before a checkpoint (W8).
    ReuseFreedEarly,
    /// The log is cut when a checkpoint begins, not when it is durable (W8).
    CutEarly,
    /// A drop is not written with the append that replaces what it drops (W2).
    ForgetDrop,
    /// A block is given to a peer, and repaired, from another version than was asked for (C4).
    RepairOtherVersion,
    /// Checksums of what is read are not looked at (C4).
    IgnoreChecksums,
    /// A copy ends before a checkpoint holds its pieces (C2).
    FinishUnsettled,
    /// The stamps of holes are not told (C2).
    NoHoleStamps,
    /// A clone whose snapshot is not applied here yet starts empty and complete (S3).
    EmptyClone,
    /// One holder of a block is not taken away: the block is never free again (W8).
    ForgetRelease,
    /// A leaf that nobody names any more is forgotten with what it held (W8).
    ForgetDeadLeaf,
    /// The last changed block of a leaf is not written with it (S2).
    LosePatch,
    /// A leaf is read before it is written.
    ReadUnwrittenLeaf,
}

/// How full a store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of the data area.
    pub capacity_bytes: u64,
    /// Bytes held by volumes, snapshots, the log's extents and metadata.
    pub allocated_bytes: u64,
    /// Bytes promised to entries not applied yet, and kept back so that deleting always works.
    pub reserved_bytes: u64,
    /// Bytes freed, usable again after the next checkpoint.
    pub pending_bytes: u64,
    /// Bytes of the log ring.
    pub log_bytes: u64,
    /// Bytes of it in use.
    pub log_used_bytes: u64,
    /// Leaves of maps.
    pub leaves: u64,
}

/// What opening found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// The instance that had opened the store before this one (rule L5); none after format.
    pub previous_instance: Option<InstanceId>,
    /// Entries read from the log.
    pub log_entries: u64,
    /// Records read from the log.
    pub log_records: u64,
    /// Volumes that were found damaged and are incomplete now (rule R1).
    pub damaged: Vec<VolumeId>,
}

/// Why a store is not formatted or opened.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OpenError {
    /// Too small or too large.
    #[error(
        "the device has {capacity_bytes} bytes; a store needs {min_bytes} to {max_bytes}: \
         give it a device of that size"
    )]
    Capacity {
        /// What it has.
        capacity_bytes: u64,
        /// At least.
        min_bytes: u64,
        /// At most.
        max_bytes: u64,
    },
    /// There is a store already.
    #[error("the device holds a store already (of node {0}): wipe its first MiB to give it up")]
    Formatted(NodeName),
    /// No superblock can be read.
    #[error(
        "no valid superblock ({0}): put the right device there, or wipe its first MiB to have it \
         formatted; what it held is lost then"
    )]
    Superblock(String),
    /// It is another store.
    #[error("the device belongs to {found}, not to {expected}: check the device's path")]
    WrongStore {
        /// Who it belongs to.
        found: String,
        /// Who it should belong to.
        expected: String,
    },
    /// The device is smaller than the store on it.
    #[error("the store uses {store_bytes} bytes, the device has {capacity_bytes}: was it cut?")]
    Shrunk {
        /// What the store uses.
        store_bytes: u64,
        /// What there is.
        capacity_bytes: u64,
    },
    /// The metadata cannot be read.
    #[error("the metadata is damaged ({0}): replace the device, its replicas are rebuilt")]
    Damaged(String),
    /// The device fails.
    #[error("the device fails ({0}): replace it, its replicas are rebuilt")]
    Device(#[from] DiskError),
    /// A size of the arena or of the ring is out of bounds.
    #[error("{0}")]
    Options(String),
}
