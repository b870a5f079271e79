//! A store in memory: what was appended is durable only when the test flushes it, and a power loss
//! keeps a prefix of what was on its way.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use tercet_proto::storage::{Incomplete, NewReplica, SnapshotState, Storage, StorageEvent};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, Config, Entry, EntryHeader, EntryKind, Lsn, Place, Promise, ReplicaId,
    ReplicaState, SnapshotId, StorageError, Token, VolumeId,
};

/// What is on its way to the device.
enum Op {
    Append { volume: VolumeId, drop_after: Option<Lsn>, entries: Vec<Entry> },
    Promise { volume: VolumeId, promise: Promise, token: Token },
    Incomplete { volume: VolumeId, incomplete: Option<Incomplete>, token: Token },
}

#[derive(Clone)]
struct Image {
    promise: Option<Promise>,
    log: Vec<Entry>,
    incomplete: Option<Incomplete>,
}

struct Replica {
    state: ReplicaState,
    log: Vec<Entry>,
    /// The log is cut up to here: what is below cannot be read any more.
    cut: u64,
    blocks: BTreeMap<u64, Bytes>,
    snapshots: Vec<SnapshotState>,
    disk: Image,
}

/// The store of one node.
#[derive(Default)]
pub struct MemStore {
    replicas: BTreeMap<VolumeId, Replica>,
    ops: VecDeque<Op>,
    pub events: VecDeque<StorageEvent>,
    /// Appends are refused with this while it is set.
    pub refuse: Option<StorageError>,
    pub log_reads: usize,
}

fn place_of(log: &[Entry]) -> Place {
    log.last().map_or(Place::EMPTY, |entry| entry.header.place)
}

impl MemStore {
    pub fn has_ops(&self) -> bool {
        !self.ops.is_empty()
    }

    /// Everything that is on its way becomes durable.
    pub fn flush(&mut self) {
        self.flush_some(usize::MAX);
    }

    /// The first `count` operations become durable.
    pub fn flush_some(&mut self, count: usize) {
        for _ in 0..count.min(self.ops.len()) {
            match self.ops.pop_front().expect("counted") {
                Op::Append { volume, drop_after, entries } => {
                    let Some(replica) = self.replicas.get_mut(&volume) else { continue };
                    if let Some(after) = drop_after {
                        replica.disk.log.truncate(after.0 as usize);
                    }
                    replica.disk.log.extend(entries);
                    let place = place_of(&replica.disk.log);
                    let same = replica.log.get(place.lsn.0 as usize - 1).map(|e| e.header.place);
                    if same == Some(place) {
                        replica.state.durable = replica.state.durable.max(place);
                    }
                    self.events.push_back(StorageEvent::Durable { volume, place });
                }
                Op::Promise { volume, promise, token } => {
                    if let Some(replica) = self.replicas.get_mut(&volume) {
                        replica.disk.promise = Some(promise.clone());
                        replica.state.promise = Some(promise);
                    }
                    self.events.push_back(StorageEvent::Done { token, result: Ok(()) });
                }
                Op::Incomplete { volume, incomplete, token } => {
                    if let Some(replica) = self.replicas.get_mut(&volume) {
                        replica.disk.incomplete = incomplete;
                        replica.state.incomplete = incomplete;
                    }
                    self.events.push_back(StorageEvent::Done { token, result: Ok(()) });
                }
            }
        }
    }

    /// Power fails after `kept` of the operations on their way; what was applied since the last
    /// checkpoint is applied again from the log.
    pub fn power_loss(&mut self, kept: usize, forget_applied: bool) {
        self.flush_some(kept);
        self.ops.clear();
        self.events.clear();
        for replica in self.replicas.values_mut() {
            replica.log = replica.disk.log.clone();
            let tail = place_of(&replica.log);
            let applied = if forget_applied { Lsn(0) } else { replica.state.applied.lsn };
            assert!(applied <= tail.lsn, "what is applied is durable");
            replica.state.promise = replica.disk.promise.clone();
            replica.state.incomplete = replica.disk.incomplete;
            replica.state.tail = tail;
            replica.state.durable = tail;
            replica.state.applied = Place::EMPTY;
            replica.blocks.clear();
            replica.snapshots.clear();
            replica.apply(applied);
        }
    }

    /// The disk is replaced.
    pub fn wipe(&mut self) {
        *self = Self::default();
    }

    /// Marks a replica as damaged, durably and at once.
    pub fn damage(&mut self, volume: VolumeId, incomplete: Incomplete) {
        let replica = self.replicas.get_mut(&volume).expect("a replica");
        replica.disk.incomplete = Some(incomplete);
        replica.state.incomplete = Some(incomplete);
    }

    pub fn log(&self, volume: VolumeId) -> &[Entry] {
        &self.replicas[&volume].log
    }

    pub fn blocks(&self, volume: VolumeId) -> &BTreeMap<u64, Bytes> {
        &self.replicas[&volume].blocks
    }

    /// Makes a replica at once, as creation left it.
    pub fn make(&mut self, volume: VolumeId, replica: ReplicaId, size_blocks: u64) {
        let state = ReplicaState {
            volume,
            replica,
            name: "v".into(),
            size_blocks,
            promise: None,
            tail: Place::EMPTY,
            durable: Place::EMPTY,
            applied: Place::EMPTY,
            log_start: Lsn(1),
            incomplete: None,
        };
        let disk = Image { promise: None, log: Vec::new(), incomplete: None };
        let (log, blocks, snapshots) = (Vec::new(), BTreeMap::new(), Vec::new());
        self.replicas.insert(volume, Replica { state, log, cut: 0, blocks, snapshots, disk });
    }

    /// What a clone awaits is applied: durable at once (S3).
    pub fn fill(&mut self, volume: VolumeId) {
        let replica = self.replicas.get_mut(&volume).expect("a replica");
        assert!(matches!(replica.state.incomplete.take(), Some(Incomplete::Awaits(_))));
        replica.disk.incomplete = None;
        self.events.push_back(StorageEvent::Filled { volume });
    }

    /// Cuts the log up to what is applied.
    pub fn cut(&mut self, volume: VolumeId) {
        let replica = self.replicas.get_mut(&volume).expect("a replica");
        replica.cut = replica.state.applied.lsn.0;
        replica.state.log_start = Lsn(replica.cut + 1);
    }
}

impl Replica {
    fn apply(&mut self, upto: Lsn) {
        for lsn in self.state.applied.lsn.0 + 1..=upto.0 {
            let entry = self.log[lsn as usize - 1].clone();
            match entry.header.kind {
                EntryKind::Write { range, .. } => {
                    for i in 0..range.count {
                        let at = i as usize * BLOCK_BYTES;
                        let block = entry.payload.slice(at..at + BLOCK_BYTES);
                        self.blocks.insert(range.start + u64::from(i), block);
                    }
                }
                EntryKind::Zero { range, .. } => {
                    (range.start..range.end()).for_each(|block| {
                        self.blocks.remove(&block);
                    });
                }
                EntryKind::Grow { size_blocks } => self.state.size_blocks = size_blocks,
                EntryKind::Snapshot { id } => {
                    let (place, size_blocks) = (entry.header.place, self.state.size_blocks);
                    self.snapshots.push(SnapshotState { id, place, size_blocks });
                }
                EntryKind::SnapshotDelete { id } => self.snapshots.retain(|s| s.id != id),
                EntryKind::Noop => {}
            }
            self.state.applied = entry.header.place;
        }
    }
}

impl Storage for MemStore {
    fn replicas(&self) -> Vec<ReplicaState> {
        self.replicas.values().map(|replica| replica.state.clone()).collect()
    }

    fn replica(&self, volume: VolumeId) -> Option<ReplicaState> {
        self.replicas.get(&volume).map(|replica| replica.state.clone())
    }

    fn snapshots(&self, volume: VolumeId) -> Vec<SnapshotState> {
        self.replicas.get(&volume).map(|replica| replica.snapshots.clone()).unwrap_or_default()
    }

    fn create_replica(&mut self, new: NewReplica, token: Token) {
        self.make(new.volume, new.replica, new.size_blocks);
        self.events.push_back(StorageEvent::Done { token, result: Ok(()) });
    }

    fn delete_replica(&mut self, volume: VolumeId, replica: ReplicaId, token: Token) {
        if self.replicas.get(&volume).is_some_and(|there| there.state.replica == replica) {
            self.replicas.remove(&volume);
        }
        self.events.push_back(StorageEvent::Done { token, result: Ok(()) });
    }

    fn tombstone(&self, _: VolumeId) -> Option<Config> {
        None
    }

    fn set_promise(&mut self, volume: VolumeId, promise: Promise, token: Token) {
        self.ops.push_back(Op::Promise { volume, promise, token });
    }

    fn set_incomplete(&mut self, volume: VolumeId, incomplete: Option<Incomplete>, token: Token) {
        self.ops.push_back(Op::Incomplete { volume, incomplete, token });
    }

    fn append(
        &mut self,
        volume: VolumeId,
        drop_after: Option<Lsn>,
        entries: Vec<Entry>,
    ) -> Result<(), StorageError> {
        if let Some(error) = &self.refuse {
            return Err(error.clone());
        }
        let replica = self.replicas.get_mut(&volume).expect("a replica");
        if let Some(after) = drop_after {
            assert!(after >= replica.state.applied.lsn, "nothing applied is dropped (W2)");
            replica.log.truncate(after.0 as usize);
            if replica.state.durable.lsn > after {
                replica.state.durable = place_of(&replica.log);
            }
        }
        for entry in &entries {
            assert_eq!(entry.header.prev(), place_of(&replica.log), "no gap (W2)");
            replica.log.push(entry.clone());
        }
        replica.state.tail = place_of(&replica.log);
        self.ops.push_back(Op::Append { volume, drop_after, entries });
        Ok(())
    }

    fn header(&self, volume: VolumeId, lsn: Lsn) -> Option<EntryHeader> {
        let index = (lsn.0 as usize).checked_sub(1)?;
        let replica = self.replicas.get(&volume).filter(|replica| lsn.0 > replica.cut)?;
        replica.log.get(index).map(|entry| entry.header)
    }

    fn in_flight(&self, volume: VolumeId) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::Append { volume: of, .. } if *of == volume))
    }

    fn read_log(&mut self, volume: VolumeId, from: Lsn, bytes_max: usize, token: Token) {
        self.log_reads += 1;
        let Replica { log, cut, .. } = &self.replicas[&volume];
        assert!(from.0 > *cut && from.0 <= log.len() as u64, "only retained entries are read");
        let mut bytes = 0;
        let rest = log.iter().skip(from.0 as usize - 1).take(1024);
        let fits = |entry: &&Entry| {
            bytes += entry.payload.len();
            bytes <= bytes_max || bytes == entry.payload.len()
        };
        let entries: Vec<_> = rest.take_while(fits).cloned().collect();
        let none = StorageError::Device("no such entry".into());
        let result = if entries.is_empty() { Err(none) } else { Ok(entries) };
        self.events.push_back(StorageEvent::Log { token, result });
    }

    fn apply(&mut self, volume: VolumeId, lsn: Lsn) {
        let replica = self.replicas.get_mut(&volume).expect("a replica");
        assert!(lsn <= replica.state.durable.lsn, "only what is durable is applied (W5)");
        replica.apply(lsn);
    }

    fn read(&mut self, volume: VolumeId, range: BlockRange, token: Token) {
        let zero = || Bytes::from(vec![0; BLOCK_BYTES]);
        let blocks = &self.replicas[&volume].blocks;
        let data = (range.start..range.end()).map(|b| blocks.get(&b).cloned().unwrap_or_else(zero));
        let result = Ok(data.collect());
        self.events.push_back(StorageEvent::Read { token, result });
    }

    fn chunk_sums(&mut self, _: VolumeId, token: Token) {
        self.events.push_back(StorageEvent::Read { token, result: Ok(Vec::new()) });
    }
}

/// The id of a snapshot in tests.
pub fn snapshot_id(n: u8) -> SnapshotId {
    SnapshotId::from_bytes([n; 16])
}
