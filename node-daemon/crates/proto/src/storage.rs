//! The seam between replication and storage.
//!
//! `tercet-replication` calls these methods, `tercet-store` implements them, and the model check and
//! unit tests implement them in a few lines of memory. A method changes what is in memory at once
//! and queues device operations; what has become durable comes back later as a [`StorageEvent`].
//! No method blocks. An event is delivered after the call that caused it has returned.

use bytes::Bytes;
use thiserror::Error;

use crate::chunks::ChunkPage;
use crate::config::Config;
use crate::copy::{Copies, StampRun};
use crate::entry::{BlockRange, Entry, EntryHeader, Place, Promise};
use crate::ids::{Lsn, ReplicaId, SnapshotId, Token, VolumeId};
use crate::repair::{BlockVersion, Repairs};

/// What a replica is, as far as storage knows. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ReplicaState {
    /// The volume.
    pub volume: VolumeId,
    /// The replica's id.
    pub replica: ReplicaId,
    /// The Volume object's name when the replica was made (shown for orphans, rule M2).
    pub name: String,
    /// Size in blocks, as of `applied`.
    pub size_blocks: u64,
    /// The newest durable promise; none before the first.
    pub promise: Option<Promise>,
    /// The last entry of the log, durable or not.
    pub tail: Place,
    /// Everything up to here is durable: completed with FUA or flushed, by this instance or before
    /// its first flush (rules W3, R2).
    pub durable: Place,
    /// Everything up to here has been applied (rule W5).
    pub applied: Place,
    /// The first entry that the log still has (C1), or `tail.lsn + 1` where it has none.
    pub log_start: Lsn,
    /// Damaged or not filled yet: does not stand, does not serve, acknowledges nothing for W4
    /// (rules R1, C2, S3).
    pub incomplete: Option<Incomplete>,
}

/// How much an incomplete replica may have acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Incomplete {
    /// At most up to here.
    AcknowledgedUpTo(Place),
    /// Nobody knows: rule T5 waits for all others (rule R1).
    Unknown,
    /// A clone's replica that was made before the source's snapshot was applied here: it has no
    /// entry and has acknowledged nothing; complete once it shares the snapshot's chunks (rule S3).
    Awaits(Source),
}

impl Incomplete {
    /// The largest place that it may have acknowledged; `None`: nobody knows (rule T5).
    pub fn acknowledged(self) -> Option<Place> {
        match self {
            Self::AcknowledgedUpTo(place) => Some(place),
            Self::Awaits(_) => Some(Place::EMPTY),
            Self::Unknown => None,
        }
    }
}

/// What a clone starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The volume that the snapshot is of.
    pub volume: VolumeId,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The place of its entry (rule S1): whoever has applied less does not have it yet, whoever
    /// has applied more and does not have it has deleted it.
    pub place: Place,
}

/// A snapshot that a replica has.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SnapshotState {
    /// Which.
    pub id: SnapshotId,
    /// The place of its entry (rule S1).
    pub place: Place,
    /// Size of the volume then, in blocks.
    pub size_blocks: u64,
}

/// A replica to be made (rule T9: at creation or as a learner only).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NewReplica {
    /// The volume.
    pub volume: VolumeId,
    /// A fresh id, drawn by the executor.
    pub replica: ReplicaId,
    /// Name of the Volume object.
    pub name: String,
    /// Size in blocks. At least the source's for a clone.
    pub size_blocks: u64,
    /// Whose chunks it shares at first (rule S3).
    pub source: Option<Source>,
    /// Whether it may start incomplete where the source's replica here has not applied the snapshot
    /// yet. It becomes complete by itself once that is applied, told by `StorageEvent::Filled`.
    pub incomplete: bool,
}

/// Why storage refuses or fails.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Error)]
pub enum StorageError {
    /// No replica of that volume here.
    #[error("no replica of volume {0} is here")]
    NoReplica(VolumeId),
    /// A replica of that volume is here already.
    #[error("a replica of volume {0} is here already")]
    Exists(VolumeId),
    /// No such snapshot of that volume here: deleted, or not applied yet and `incomplete` not set.
    #[error("no snapshot {1} of volume {0} is here")]
    NoSnapshot(VolumeId, SnapshotId),
    /// The device is full; nothing was changed.
    #[error("no space: {needed_bytes} bytes needed, {free_bytes} free")]
    NoSpace {
        /// Bytes asked for.
        needed_bytes: u64,
        /// Bytes that are free for it.
        free_bytes: u64,
    },
    /// The log or the buffers are full for now; try again after the next event.
    #[error("busy: the log or the buffers are full for now")]
    Busy,
    /// Bytes read back do not have their checksum, or cannot be read back (rule C4).
    #[error("bad bytes in volume {volume} at block {block}: they are not what was written")]
    Checksum {
        /// The volume.
        volume: VolumeId,
        /// The first bad block.
        block: u64,
    },
    /// That version of a block is not here (rule C4).
    #[error("volume {0} has another version of that block here")]
    OtherVersion(VolumeId),
    /// The device failed; the store stops taking writes.
    #[error("device failed: {0}")]
    Device(String),
}

/// What storage has to say later. Tokens are the caller's.
#[derive(Clone, Debug)]
pub enum StorageEvent {
    /// The log of the volume is durable up to here (rule W3).
    Durable {
        /// The volume.
        volume: VolumeId,
        /// Everything up to this place.
        place: Place,
    },
    /// `create_replica`, `delete_replica`, `set_promise` or `set_incomplete` is durable, or failed;
    /// or a step of a copy is done (`Copies`).
    Done {
        /// The caller's token.
        token: Token,
        /// Whether it was done.
        result: Result<(), StorageError>,
    },
    /// A clone that awaited its snapshot shares the snapshot's chunks now, durably: it is complete
    /// (rule S3).
    Filled {
        /// The clone.
        volume: VolumeId,
    },
    /// `read` has the bytes.
    Read {
        /// The caller's token.
        token: Token,
        /// The blocks' bytes in order, in one or more pieces; zeroes where nothing was written.
        result: Result<Vec<Bytes>, StorageError>,
    },
    /// A block was found bad: it does not have its checksum, or cannot be read (rule C4). Comes
    /// before the answer to the read that found it, and again each time it is found.
    Bad {
        /// The volume.
        volume: VolumeId,
        /// The block, by the first of the volume's maps that has it: the volume's, then snapshots'.
        version: BlockVersion,
    },
    /// `view_stamps` or `stamps` has what it did not have at once.
    Stamps {
        /// The caller's token.
        token: Token,
        /// The runs, as if they had been given at once; or why not.
        result: Result<Vec<StampRun>, StorageError>,
    },
    /// `chunk_map` has the rows.
    Chunks {
        /// The caller's token.
        token: Token,
        /// Rows in order, or why not.
        result: Result<ChunkPage, StorageError>,
    },
    /// `read_log` has the entries.
    Log {
        /// The caller's token.
        token: Token,
        /// Entries in order, without a gap, at least one; or why not.
        result: Result<Vec<Entry>, StorageError>,
    },
    /// The device is lost: every replica here is (rule T2 reports it).
    Failed(StorageError),
}

/// A store of replicas. See the module's text for when things take effect.
pub trait Storage: Copies + Repairs {
    /// Every replica here.
    fn replicas(&self) -> Vec<ReplicaState>;

    /// One replica.
    fn replica(&self, volume: VolumeId) -> Option<ReplicaState>;

    /// The snapshots of a volume, oldest first.
    fn snapshots(&self, volume: VolumeId) -> Vec<SnapshotState>;

    /// Makes an empty replica, or a clone of a snapshot, in one durable step; see `NewReplica`.
    /// Answered by `Done`.
    fn create_replica(&mut self, new: NewReplica, token: Token);

    /// Deletes the replica with this id and leaves a tombstone (rule M2). Answered by `Done`, also
    /// when it was deleted before. Its space is free again some time after.
    fn delete_replica(&mut self, volume: VolumeId, replica: ReplicaId, token: Token);

    /// The configuration of a deleted replica's last promise, where one is still kept (rule M2).
    fn tombstone(&self, volume: VolumeId) -> Option<Config>;

    /// Makes a promise durable; never an older one than before. Answered by `Done`. `replica()`
    /// shows it only then.
    fn set_promise(&mut self, volume: VolumeId, promise: Promise, token: Token);

    /// Marks or unmarks the replica durably. Answered by `Done`.
    fn set_incomplete(&mut self, volume: VolumeId, incomplete: Option<Incomplete>, token: Token);

    /// Appends entries, without a gap, after `drop_after` (or the tail). In one durable step with
    /// it, entries after `drop_after` are dropped; never at or below `applied` (W2: asserted).
    ///
    /// # Errors
    /// `NoSpace` and `Busy`: nothing was changed. `Device`: the store has failed.
    fn append(
        &mut self,
        volume: VolumeId,
        drop_after: Option<Lsn>,
        entries: Vec<Entry>,
    ) -> Result<(), StorageError>;

    /// The header of a retained entry.
    fn header(&self, volume: VolumeId, lsn: Lsn) -> Option<EntryHeader>;

    /// Whether appended entries of the volume are still on their way to the device (rule T4).
    fn in_flight(&self, volume: VolumeId) -> bool;

    /// Reads retained entries from `from` on, at most `bytes_max` of payload but at least one
    /// entry. Answered by `Log`.
    fn read_log(&mut self, volume: VolumeId, from: Lsn, bytes_max: usize, token: Token);

    /// Applies everything up to `lsn` (rule W5); from now on reads see it. It is durable here.
    fn apply(&mut self, volume: VolumeId, lsn: Lsn);

    /// Reads applied state. Answered by `Read`.
    fn read(&mut self, volume: VolumeId, range: BlockRange, token: Token);

    /// Asks for a CRC32C of every written chunk as of `applied`, to compare replicas. Index of
    /// chunk and checksum, in order. Answered by `Read` with 12-byte little-endian (u64, u32) rows.
    fn chunk_sums(&mut self, volume: VolumeId, token: Token);

    /// Asks for rows of the chunk map as of `applied`, from chunk `from` on: a page, of a size that
    /// holds up nobody. Answered by `Chunks`.
    fn chunk_map(&mut self, volume: VolumeId, from: u64, token: Token);
}
