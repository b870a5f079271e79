//! One node's disk, as small as the rules allow: the headers of a log, a promise, and what is on
//! its way to the device in the order in which it was queued.
//!
//! What is queued becomes durable one operation at a time, when the checker says so; a crash keeps
//! any first part of it. A start finds what is durable, with `applied` as of the last checkpoint
//! (the earlier it is, the less a replica knows: W5, T5). Changes carry no bytes: a write is known
//! by the block that it zeroes, and a read gives the changes that are applied, in order.
//!
//! Left to `tercet-store` and the simulator: torn and lost writes, marks (R1), extents, snapshots.

use std::collections::VecDeque;

use bytes::Bytes;
use tercet_proto::storage::{Incomplete, NewReplica, SnapshotState, Storage, StorageEvent};
use tercet_proto::{
    BlockRange, BlockVersion, Config, Copies, Entry, EntryHeader, EntryKind, Lsn, Piece, Place,
    Promise, Repairs, ReplicaId, ReplicaState, Stamps, StorageError, Token, View, ViewId, VolumeId,
};

use crate::SIZE_BLOCKS;

const NO_COPIES: &str = "no log of the model is cut";

/// What is on its way to the device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Op {
    Append { drop_after: Option<Lsn>, headers: Vec<EntryHeader> },
    Promise { promise: Promise, token: Token },
}

/// What survives a loss of power.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Disk {
    promise: Option<Promise>,
    log: Vec<EntryHeader>,
    /// Applied as of the last checkpoint.
    checkpoint: Place,
}

/// The store of one node: one volume, or none when the disk was replaced.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Store {
    volume: VolumeId,
    /// None: the disk is empty.
    replica: Option<ReplicaId>,
    promise: Option<Promise>,
    log: Vec<EntryHeader>,
    durable: Place,
    applied: Place,
    ops: VecDeque<Op>,
    disk: Disk,
    events: VecDeque<Event>,
}

/// What storage will say when the call that caused it has returned.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Event {
    Durable(Place),
    Done(Token),
    Read(Token, Bytes),
    Log(Token, Vec<EntryHeader>),
}

fn place_of(log: &[EntryHeader]) -> Place {
    log.last().map_or(Place::EMPTY, |header| header.place)
}

fn bare(header: EntryHeader) -> Entry {
    Entry { header, payload: Bytes::new() }
}

impl Store {
    /// An empty replica, as creation leaves it.
    pub fn new(volume: VolumeId, replica: ReplicaId) -> Self {
        Self {
            volume,
            replica: Some(replica),
            promise: None,
            log: Vec::new(),
            durable: Place::EMPTY,
            applied: Place::EMPTY,
            ops: VecDeque::new(),
            disk: Disk::default(),
            events: VecDeque::new(),
        }
    }

    /// Operations on their way to the device.
    pub fn ops(&self) -> usize {
        self.ops.len()
    }

    /// The oldest operation becomes durable.
    pub fn flush_one(&mut self) {
        match self.ops.pop_front().expect("asked for only with one on its way") {
            Op::Append { drop_after, headers } => {
                if let Some(after) = drop_after {
                    self.disk.log.truncate(after.0 as usize);
                }
                self.disk.log.extend(headers);
                let place = place_of(&self.disk.log);
                if self.log.get(place.lsn.0 as usize - 1).map(|own| own.place) == Some(place) {
                    self.durable = self.durable.max(place);
                }
                self.events.push_back(Event::Durable(place));
            }
            Op::Promise { promise, token } => {
                assert!(
                    self.disk.promise.as_ref().is_none_or(|old| old.epoch() <= promise.epoch()),
                    "a promise never falls"
                );
                self.disk.promise = Some(promise.clone());
                self.promise = Some(promise);
                self.events.push_back(Event::Done(token));
            }
        }
    }

    /// The engine ends; the first `kept` operations on their way still land.
    pub fn crash(&mut self, kept: usize) {
        for _ in 0..kept {
            self.flush_one();
        }
        self.ops.clear();
        self.events.clear();
        self.log.clone_from(&self.disk.log);
        self.promise.clone_from(&self.disk.promise);
        self.durable = place_of(&self.log);
        self.applied = self.disk.checkpoint;
    }

    /// The disk is replaced by an empty one; the engine has ended before.
    pub fn wipe(&mut self) {
        let replica = ReplicaId::from_bytes([0; 16]);
        *self = Self { replica: None, ..Self::new(self.volume, replica) };
    }

    /// What is applied now is what a start will find applied.
    pub fn checkpoint(&mut self) {
        self.disk.checkpoint = self.applied;
    }

    /// Next thing that storage has to say.
    pub fn event(&mut self) -> Option<StorageEvent> {
        Some(match self.events.pop_front()? {
            Event::Durable(place) => StorageEvent::Durable { volume: self.volume, place },
            Event::Done(token) => StorageEvent::Done { token, result: Ok(()) },
            Event::Read(token, data) => StorageEvent::Read { token, result: Ok(vec![data]) },
            Event::Log(token, headers) => {
                let entries = headers.into_iter().map(bare).collect();
                StorageEvent::Log { token, result: Ok(entries) }
            }
        })
    }

    /// The whole log.
    pub fn log(&self) -> &[EntryHeader] {
        &self.log
    }

    /// Applied up to here.
    pub fn applied(&self) -> Place {
        self.applied
    }
}

/// The writes among the first `upto` entries, each by its number.
pub fn writes(log: &[EntryHeader], upto: Lsn) -> Vec<u8> {
    let within = log.iter().take_while(|header| header.place.lsn <= upto);
    within.filter_map(|header| write_of(&header.kind)).collect()
}

/// The number of the write that an entry is.
pub fn write_of(kind: &EntryKind) -> Option<u8> {
    match kind {
        EntryKind::Zero { range, .. } => Some(range.start as u8),
        _ => None,
    }
}

/// No log of the model is cut and no replica becomes incomplete: nobody needs a copy (C2).
impl Copies for Store {
    fn freeze(&mut self, _: VolumeId) -> Option<View> {
        unreachable!("{NO_COPIES}")
    }

    fn thaw(&mut self, _: ViewId) {
        unreachable!("{NO_COPIES}")
    }

    fn view_stamps(&mut self, _: ViewId, _: usize, _: u64, _: Token) -> Stamps {
        unreachable!("{NO_COPIES}")
    }

    fn read_view(&mut self, _: ViewId, _: usize, _: &[BlockRange], _: Token) {
        unreachable!("{NO_COPIES}")
    }

    fn stamps(&mut self, _: VolumeId, _: BlockRange, _: Token) -> Stamps {
        unreachable!("{NO_COPIES}")
    }

    fn copy_begin(&mut self, _: VolumeId, _: &[SnapshotState]) {
        unreachable!("{NO_COPIES}")
    }

    fn copy_resize(&mut self, _: VolumeId, _: u64) {
        unreachable!("{NO_COPIES}")
    }

    fn copy_write(&mut self, _: VolumeId, _: Vec<Piece>, _: Token) {
        unreachable!("{NO_COPIES}")
    }

    fn copy_snapshot(&mut self, _: VolumeId, _: SnapshotState) {
        unreachable!("{NO_COPIES}")
    }

    fn copy_settle(&mut self, _: VolumeId, _: Token) {
        unreachable!("{NO_COPIES}")
    }

    fn copy_finish(&mut self, _: VolumeId, _: Place, _: Token) {
        unreachable!("{NO_COPIES}")
    }
}

/// No block of the model is bad (C4).
impl Repairs for Store {
    fn read_version(&mut self, _: VolumeId, _: BlockVersion, _: Token) {
        unreachable!("no block of the model is bad")
    }

    fn repair(&mut self, _: VolumeId, _: BlockVersion, _: Bytes, _: Token) {
        unreachable!("no block of the model is bad")
    }
}

impl Storage for Store {
    fn replicas(&self) -> Vec<ReplicaState> {
        self.replica(self.volume).into_iter().collect()
    }

    fn replica(&self, volume: VolumeId) -> Option<ReplicaState> {
        let replica = self.replica.filter(|_| volume == self.volume)?;
        Some(ReplicaState {
            volume,
            replica,
            name: String::new(),
            size_blocks: SIZE_BLOCKS,
            promise: self.promise.clone(),
            tail: place_of(&self.log),
            durable: self.durable,
            applied: self.applied,
            log_start: Lsn(1),
            incomplete: None,
        })
    }

    fn snapshots(&self, _: VolumeId) -> Vec<SnapshotState> {
        Vec::new()
    }

    fn create_replica(&mut self, _: NewReplica, _: Token) {
        unreachable!("the model makes no replica")
    }

    fn delete_replica(&mut self, _: VolumeId, _: ReplicaId, _: Token) {
        unreachable!("the model deletes no replica")
    }

    fn tombstone(&self, _: VolumeId) -> Option<Config> {
        None
    }

    fn set_promise(&mut self, _: VolumeId, promise: Promise, token: Token) {
        self.ops.push_back(Op::Promise { promise, token });
    }

    fn set_incomplete(&mut self, _: VolumeId, _: Option<Incomplete>, _: Token) {
        unreachable!("no replica of the model becomes incomplete")
    }

    fn append(
        &mut self,
        _: VolumeId,
        drop_after: Option<Lsn>,
        entries: Vec<Entry>,
    ) -> Result<(), StorageError> {
        if let Some(after) = drop_after {
            assert!(after >= self.applied.lsn, "nothing applied is dropped (W2)");
            self.log.truncate(after.0 as usize);
            if self.durable.lsn > after {
                self.durable = place_of(&self.log);
            }
        }
        let headers: Vec<_> = entries.iter().map(|entry| entry.header).collect();
        for header in &headers {
            assert_eq!(header.prev(), place_of(&self.log), "no gap (W2)");
            self.log.push(*header);
        }
        self.ops.push_back(Op::Append { drop_after, headers });
        Ok(())
    }

    fn header(&self, _: VolumeId, lsn: Lsn) -> Option<EntryHeader> {
        self.log.get((lsn.0 as usize).checked_sub(1)?).copied()
    }

    fn in_flight(&self, _: VolumeId) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::Append { .. }))
    }

    fn read_log(&mut self, _: VolumeId, from: Lsn, _: usize, token: Token) {
        let headers = self.log[from.0 as usize - 1..].to_vec();
        assert!(!headers.is_empty(), "only retained entries are read");
        self.events.push_back(Event::Log(token, headers));
    }

    fn apply(&mut self, _: VolumeId, lsn: Lsn) {
        assert!(lsn <= self.durable.lsn, "only what is durable is applied (W5)");
        self.applied = self.log[lsn.0 as usize - 1].place;
    }

    fn read(&mut self, _: VolumeId, _: BlockRange, token: Token) {
        let data = Bytes::from(writes(&self.log, self.applied.lsn));
        self.events.push_back(Event::Read(token, data));
    }

    fn chunk_sums(&mut self, _: VolumeId, _: Token) {
        unreachable!("the model compares replicas by itself")
    }

    fn chunk_map(&mut self, _: VolumeId, _: u64, _: Token) {
        unreachable!("nobody looks at the model's chunks")
    }
}
