//! The store: what its owner drives.
//!
//! At run time nothing here blocks, reads a clock or draws a number: methods and completions change
//! memory and queue device operations, which the owner takes with [`Store::take`], submits, and
//! answers with [`Store::on_disk`]. Opening is straight blocking code (`open`). What the device
//! holds at any moment is a durable checkpoint and the log behind it (docs/disk-format.md).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tercet_proto::ViewId;
use tercet_proto::disk::{Run, Superblock};
use tercet_proto::storage::{StorageError, StorageEvent};
use tercet_proto::{BLOCK_BYTES, Config, Instant, Place, ReplicaId, Token, VolumeId};

use crate::alloc::Alloc;
use crate::checkpoint::Checkpoint;
use crate::clone::Awaiting;
use crate::disk::{DiskDone, DiskOp, DiskToken};
use crate::hash::NumberMap;
use crate::incoming::Writing;
use crate::leaf::{LeafNo, Leaves};
use crate::load::Loads;
use crate::log::Log;
use crate::options::{Options, Usage};
use crate::parked::Parked;
use crate::read::Job;
use crate::repair::Mending;
use crate::replica::Replica;
use crate::reread::Reread;
use crate::scrub::Scrub;
use crate::view::Frozen;

/// Writes of at least this many blocks (64 KiB) go straight to the data area.
pub const EXTENT_BLOCKS_MIN: u32 = 16;
/// Largest write of one entry: 4 MiB.
pub const ENTRY_BLOCKS_MAX: u32 = 1024;
/// Most tombstones that are kept; the oldest goes first.
pub const TOMBSTONES_MAX: usize = 4096;
/// Bytes of payload that wait for the device at most.
pub(crate) const QUEUED_BLOCKS_MAX: u64 = 8192;
/// A record with the mark alone follows this long after the last one (rule R1 allows 100 ms).
const MARK_DELAY: Duration = Duration::from_millis(50);
/// A checkpoint is taken this long after the first change that only the log has.
const CHECKPOINT_DELAY: Duration = Duration::from_secs(5);
/// ... and this long after space was freed.
const FREE_DELAY: Duration = Duration::from_secs(1);

/// What a device operation was for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OpKind {
    Record(u64),
    Read { job: u64, part: usize },
    Reread { id: u64 },
    CopyRead { unit: u64 },
    CopyWrite { unit: u64 },
    Piece { id: u64 },
    Mend { id: u64 },
    Leaf { no: LeafNo, part: usize },
    LeafWrite { no: LeafNo },
    Checkpoint,
}

/// What is left of a deleted replica (rule M2).
#[derive(Clone, Debug)]
pub(crate) struct Tombstone {
    pub(crate) volume: VolumeId,
    pub(crate) replica: ReplicaId,
    pub(crate) config: Option<Config>,
}

/// One shard's store.
#[derive(Debug)]
pub struct Store {
    pub(crate) options: Options,
    pub(crate) superblock: Superblock,
    pub(crate) replicas: BTreeMap<VolumeId, Replica>,
    pub(crate) creating: BTreeSet<VolumeId>,
    /// Clones whose snapshot is not applied here yet, those that are being made among them.
    pub(crate) awaiting: BTreeMap<VolumeId, Awaiting>,
    /// Frozen for copies (C2).
    pub(crate) views: BTreeMap<ViewId, Frozen>,
    pub(crate) next_view: u64,
    /// Pieces of copies on their way to the device.
    pub(crate) writing: BTreeMap<u64, Writing>,
    pub(crate) next_writing: u64,
    /// Who waits for which checkpoint.
    pub(crate) settling: Vec<(u64, Token)>,
    pub(crate) tombstones: Vec<Tombstone>,
    pub(crate) next_number: u64,
    pub(crate) alloc: Alloc,
    pub(crate) leaves: Leaves,
    pub(crate) log: Log,
    /// Leaves that are being read.
    pub(crate) loads: Loads,
    /// Reads that wait for one.
    pub(crate) parked: BTreeMap<u64, Parked>,
    pub(crate) jobs: BTreeMap<u64, Job>,
    pub(crate) next_job: u64,
    /// Reads that the device refused, done again (C4).
    pub(crate) rereads: BTreeMap<u64, Reread>,
    pub(crate) next_reread: u64,
    pub(crate) unreadable_in_row: u64,
    pub(crate) scrub: Scrub,
    /// Repairs on their way to the device (C4).
    pub(crate) mending: BTreeMap<u64, Mending>,
    pub(crate) next_mending: u64,
    ops: NumberMap<u64, OpKind>,
    next_op: u64,
    ops_out: Vec<(DiskToken, DiskOp)>,
    pub(crate) events: Vec<StorageEvent>,
    pub(crate) failed: Option<StorageError>,
    /// Leaves that entries not applied yet will make dirty, at most.
    pub(crate) potential_leaves: u64,
    pub(crate) checkpoint: Option<Checkpoint>,
    pub(crate) checkpoint_durable: u64,
    pub(crate) checkpoint_wanted: bool,
    /// The next checkpoint cuts the log as far as it can: space is short.
    pub(crate) cut_all: bool,
    /// The blocks of the durable checkpoint's root.
    pub(crate) root_runs: Vec<Run>,
    pub(crate) root_blocks: u64,
    /// Position and CRC of the record before `log.start`.
    pub(crate) log_before_start: (u64, u32),
    /// Who was told `Busy`: they hear of the next checkpoint by a `Durable` that they know already.
    pub(crate) turned_away: BTreeSet<VolumeId>,
    /// Something changed since the last checkpoint began.
    pub(crate) changed: bool,
    now: Instant,
    mark_owed_since: Option<Instant>,
    changed_since: Option<Instant>,
}

impl Store {
    /// A store around what opening found. Recovery fills it.
    pub(crate) fn with(options: Options, superblock: Superblock, start: u64) -> Self {
        #[allow(unused_mut)] // a canary breaks it
        let mut alloc = Alloc::new(superblock.data);
        #[cfg(feature = "canary")]
        {
            alloc.forget_release = options.canary == Some(crate::options::Canary::ForgetRelease);
        }
        #[allow(unused_mut)] // a canary breaks it
        let mut leaves = Leaves::new(options.leaf_cache_bytes);
        #[cfg(feature = "canary")]
        {
            leaves.canary = options.canary;
        }
        Self {
            alloc,
            log: Log::new(superblock.ring, start, start),
            leaves,
            options,
            superblock,
            replicas: BTreeMap::new(),
            creating: BTreeSet::new(),
            awaiting: BTreeMap::new(),
            views: BTreeMap::new(),
            next_view: 0,
            writing: BTreeMap::new(),
            next_writing: 0,
            settling: Vec::new(),
            tombstones: Vec::new(),
            next_number: 1,
            loads: Loads::default(),
            parked: BTreeMap::new(),
            jobs: BTreeMap::new(),
            next_job: 0,
            rereads: BTreeMap::new(),
            next_reread: 0,
            unreadable_in_row: 0,
            scrub: Scrub::default(),
            mending: BTreeMap::new(),
            next_mending: 0,
            ops: NumberMap::default(),
            next_op: 0,
            ops_out: Vec::new(),
            events: Vec::new(),
            failed: None,
            potential_leaves: 0,
            checkpoint: None,
            checkpoint_durable: 0,
            checkpoint_wanted: false,
            cut_all: false,
            root_runs: Vec::new(),
            root_blocks: 1,
            log_before_start: (u64::MAX, 0),
            turned_away: BTreeSet::new(),
            changed: false,
            now: Instant::default(),
            mark_owed_since: None,
            changed_since: None,
        }
    }

    /// An operation has completed.
    pub fn on_disk(&mut self, done: DiskDone, now: Instant) {
        self.now = self.now.max(now);
        let kind = self.ops.remove(&done.token.0).expect("a completion of an operation in flight");
        match kind {
            OpKind::Reread { id } => self.on_reread(id, done),
            _ => {
                if let Some(done) = self.read_again(kind, done) {
                    self.completed(kind, done);
                }
            }
        }
    }

    /// An operation is over: done, or failed for good.
    pub(crate) fn completed(&mut self, kind: OpKind, done: DiskDone) {
        if let Err(error) = done.result {
            self.fail(&format!("{error} in {kind:?}"));
        }
        match kind {
            OpKind::Reread { .. } => unreachable!("over when what it is for is"),
            OpKind::Read { job, part } => self.on_read_done(job, part, done),
            OpKind::Leaf { no, part } => self.on_leaf_read(no, part, done),
            _ if self.failed.is_some() => {}
            OpKind::Record(id) => self.on_record_done(id),
            OpKind::CopyRead { unit } => {
                self.on_copy_read(unit, done.buf.expect("a read's buffer comes back"));
            }
            OpKind::CopyWrite { unit } => self.on_copy_written(unit),
            OpKind::Piece { id } => self.on_piece_written(id),
            OpKind::Mend { id } => self.on_mended(id),
            OpKind::LeafWrite { no } => self.on_leaf_written(no),
            OpKind::Checkpoint => self.on_checkpoint_io(),
        }
    }

    /// Time has come: the mark record of rule R1, a checkpoint and a step of scrub when one is due.
    pub fn tick(&mut self, now: Instant) {
        self.now = self.now.max(now);
        self.look_at_clock();
        if self.mark_owed_since.is_some_and(|since| now >= since + MARK_DELAY) {
            self.log.record_wanted = true;
        }
        if self.changed_since.is_some_and(|since| now >= since + self.checkpoint_delay()) {
            self.checkpoint_wanted = true;
        }
        self.tick_scrub(now);
    }

    /// The newest time that was told.
    pub(crate) fn time(&self) -> Instant {
        self.now
    }

    fn checkpoint_delay(&self) -> Duration {
        if self.alloc.pending() > self.root_blocks + 64 { FREE_DELAY } else { CHECKPOINT_DELAY }
    }

    /// When `tick` is wanted at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        if self.failed.is_some() {
            return None;
        }
        // What is wanted already waits for the device, not for the clock: no tick would help.
        let mark = self
            .mark_owed_since
            .filter(|_| !self.log.record_wanted)
            .map(|since| since + MARK_DELAY);
        let checkpoint = self
            .changed_since
            .filter(|_| !self.checkpoint_wanted)
            .map(|since| since + self.checkpoint_delay());
        // Buffers may be what a queue waits for, and they come back without a word.
        let waiting = !self.log.is_idle()
            || self.checkpoint.is_some()
            || !self.rereads.is_empty()
            || !self.leaves.dead.is_empty();
        let stuck = waiting && self.ops.is_empty();
        let retry = stuck.then(|| self.now + Duration::from_millis(1));
        let scrub = self.scrub_deadline();
        mark.into_iter().chain(checkpoint).chain(retry).chain(scrub).min()
    }

    fn look_at_clock(&mut self) {
        let mark_owed = self.log.mark_written < self.log.durable && self.log.is_idle();
        let anything = self
            .log
            .records
            .iter()
            .rev()
            .take_while(|record| record.position >= self.log.mark_written)
            .any(|record| record.items > 0);
        match (mark_owed && anything, self.mark_owed_since) {
            (true, None) => self.mark_owed_since = Some(self.now),
            (false, Some(_)) => self.mark_owed_since = None,
            _ => {}
        }
        match (self.changed && self.checkpoint.is_none(), self.changed_since) {
            (true, None) => self.changed_since = Some(self.now),
            (false, Some(_)) => self.changed_since = None,
            _ => {}
        }
    }

    /// Moves out the operations to submit, in order, and the events, in order. To be called after
    /// anything else was: what is waiting is sent here.
    pub fn take(&mut self, ops: &mut Vec<(DiskToken, DiskOp)>, events: &mut Vec<StorageEvent>) {
        if self.failed.is_none() {
            self.pump_dead();
            self.pump_checkpoint();
            self.pump_log();
            self.pump_rereads();
            self.look_at_clock();
        }
        ops.append(&mut self.ops_out);
        events.append(&mut self.events);
    }

    /// How full it is.
    pub fn usage(&self) -> Usage {
        let bytes = |blocks: u64| blocks * BLOCK_BYTES as u64;
        Usage {
            capacity_bytes: bytes(u64::from(self.superblock.data.1)),
            allocated_bytes: bytes(self.alloc.held()),
            reserved_bytes: bytes(self.alloc.reserved + self.metadata_reserve()),
            pending_bytes: bytes(self.alloc.pending()),
            log_bytes: bytes(u64::from(self.log.ring.1)),
            log_used_bytes: bytes(self.log.used()),
            leaves: self.leaves.live,
        }
    }

    /// Bytes that a replica's newest state maps, shared ones included: as of the last checkpoint, and
    /// at most what was written since.
    pub fn allocated_bytes(&self, volume: VolumeId) -> Option<u64> {
        let replica = self.replicas.get(&volume)?;
        Some(replica.head.written_blocks(&self.leaves) * BLOCK_BYTES as u64)
    }

    /// Asks for a checkpoint soon.
    pub fn request_checkpoint(&mut self) {
        self.checkpoint_wanted = true;
    }

    /// The end of the log, without the strings of `replica()`.
    pub fn tail(&self, volume: VolumeId) -> Option<Place> {
        self.replicas.get(&volume).map(|replica| replica.tail)
    }

    /// What is applied, without the strings of `replica()`.
    pub fn applied(&self, volume: VolumeId) -> Option<Place> {
        self.replicas.get(&volume).map(|replica| replica.applied)
    }

    pub(crate) fn submit(&mut self, kind: OpKind, op: DiskOp) {
        self.next_op += 1;
        self.ops.insert(self.next_op, kind);
        self.ops_out.push((DiskToken(self.next_op), op));
    }

    /// Poisons the store: from now on everything is refused.
    pub(crate) fn fail(&mut self, why: &str) {
        if self.failed.is_none() {
            let error = StorageError::Device(why.to_owned());
            self.failed = Some(error.clone());
            self.events.push(StorageEvent::Failed(error));
        }
    }

    pub(crate) fn alive(&self) -> Result<(), StorageError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    pub(crate) fn done(&mut self, token: Token, result: Result<(), StorageError>) {
        self.events.push(StorageEvent::Done { token, result });
    }

    pub(crate) fn say_durable(&mut self, volume: VolumeId, place: Place) {
        self.events.push(StorageEvent::Durable { volume, place });
    }
}
