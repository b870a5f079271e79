//! A replica in memory: what it is, its map and snapshots, and the entries that its log retains.

use std::collections::VecDeque;

use bytes::Bytes;
use tercet_proto::disk::{EntryItem, Location, Run};
use tercet_proto::storage::{Incomplete, ReplicaState, SnapshotState};
use tercet_proto::{EntryHeader, EntryKind, Lsn, Place, Promise, ReplicaId, VolumeId};

use crate::map::{Map, split};

/// Position of an entry whose record is not written yet.
pub(crate) const QUEUED: u64 = u64::MAX;

/// Where the payload of a retained entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Payload {
    /// There is none, or its record is not written yet (then it is in memory).
    None,
    /// In the ring, from this block of the device on.
    Ring(u32),
    /// In the data area, held by the entry.
    Extents(Vec<Run>),
}

/// A retained entry.
#[derive(Clone, Debug)]
pub(crate) struct LogEntry {
    pub(crate) header: EntryHeader,
    pub(crate) payload: Payload,
    pub(crate) crcs: Box<[u32]>,
    /// Until it is durable.
    pub(crate) memory: Option<Bytes>,
    /// Position of its record.
    pub(crate) position: u64,
}

impl LogEntry {
    /// Blocks that applying it will need.
    pub(crate) fn reserve_blocks(&self) -> u64 {
        match self.payload {
            Payload::Extents(_) => 0,
            _ => self.crcs.len() as u64,
        }
    }

    /// Its form in a checkpoint. It must not be in the ring.
    pub(crate) fn carried(&self) -> EntryItem {
        let location = match &self.payload {
            Payload::None => Location::None,
            Payload::Extents(runs) => Location::Extents(runs.clone()),
            Payload::Ring(_) => panic!("a carried entry's payload is in the data area"),
        };
        EntryItem { header: self.header, location, crcs: self.crcs.to_vec() }
    }
}

/// Leaves that an entry makes dirty, at most.
pub(crate) fn touched_leaves(kind: EntryKind) -> u64 {
    match kind {
        EntryKind::Write { range, .. } => {
            (split(range.end() - 1).0 - split(range.start).0) as u64 + 1
        }
        EntryKind::Zero { .. } => 2,
        _ => 0,
    }
}

/// A snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) state: SnapshotState,
    pub(crate) map: Map,
}

/// A replica.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) number: u64,
    #[allow(clippy::struct_field_names)] // the word of the seam
    pub(crate) replica: ReplicaId,
    pub(crate) name: String,
    pub(crate) size_blocks: u64,
    pub(crate) promise: Option<Promise>,
    pub(crate) incomplete: Option<Incomplete>,
    pub(crate) head: Map,
    pub(crate) snapshots: Vec<Snapshot>,
    pub(crate) applied: Place,
    pub(crate) durable: Place,
    pub(crate) tail: Place,
    /// Retained entries, without a gap, up to `tail`.
    pub(crate) entries: VecDeque<LogEntry>,
    /// Appended and not durable, dropped ones included.
    pub(crate) in_flight: u64,
    pub(crate) deleting: bool,
}

impl Replica {
    pub(crate) fn new(number: u64, replica: ReplicaId, name: String, head: Map, size: u64) -> Self {
        Self {
            number,
            replica,
            name,
            size_blocks: size,
            promise: None,
            incomplete: None,
            head,
            snapshots: Vec::new(),
            applied: Place::EMPTY,
            durable: Place::EMPTY,
            tail: Place::EMPTY,
            entries: VecDeque::new(),
            in_flight: 0,
            deleting: false,
        }
    }

    pub(crate) fn state(&self, volume: VolumeId) -> ReplicaState {
        ReplicaState {
            volume,
            replica: self.replica,
            name: self.name.clone(),
            size_blocks: self.size_blocks,
            promise: self.promise.clone(),
            tail: self.tail,
            durable: self.durable,
            applied: self.applied,
            log_start: self.log_start(),
            incomplete: self.incomplete,
        }
    }

    /// Whether it is a clone whose snapshot is not applied here yet (S3).
    pub(crate) fn awaits(&self) -> bool {
        matches!(self.incomplete, Some(Incomplete::Awaits(_)))
    }

    pub(crate) fn log_start(&self) -> Lsn {
        Lsn(self.tail.lsn.0 + 1 - self.entries.len() as u64)
    }

    fn index(&self, lsn: Lsn) -> Option<usize> {
        let index = lsn.0.checked_sub(self.log_start().0)? as usize;
        (index < self.entries.len()).then_some(index)
    }

    pub(crate) fn entry(&self, lsn: Lsn) -> Option<&LogEntry> {
        self.index(lsn).map(|index| &self.entries[index])
    }

    pub(crate) fn entry_mut(&mut self, lsn: Lsn) -> Option<&mut LogEntry> {
        self.index(lsn).map(|index| &mut self.entries[index])
    }

    /// The place of the entry with this lsn, if it is retained or just the one before.
    pub(crate) fn place_of(&self, lsn: Lsn) -> Option<Place> {
        if let Some(entry) = self.entry(lsn) {
            return Some(entry.header.place);
        }
        let known = [self.applied, self.tail];
        let before = self.entries.front().map(|entry| entry.header.prev());
        known.into_iter().chain(before).find(|place| place.lsn == lsn)
    }

    /// Takes away everything behind `after`.
    pub(crate) fn truncate(&mut self, after: Lsn) -> Vec<LogEntry> {
        assert!(after >= self.applied.lsn, "W2: nothing applied is dropped");
        assert!(after <= self.tail.lsn, "W2: only what is there is dropped");
        let tail = self.place_of(after).expect("entries behind `applied` are retained");
        let keep = self.entries.len() - (self.tail.lsn.0 - after.0) as usize;
        let dropped = self.entries.split_off(keep).into();
        self.tail = tail;
        if self.durable.lsn > after {
            self.durable = tail;
        }
        dropped
    }
}
