//! A store in memory: what was appended is durable only when the test flushes it, and a power loss
//! keeps a prefix of what was on its way.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use tercet_proto::storage::{Incomplete, NewReplica, SnapshotState, Storage, StorageEvent};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, BlockVersion, ChunkPage, Config, Copies, Entry, EntryHeader,
    EntryKind, Lsn, Piece, Place, Promise, Repairs, ReplicaId, ReplicaState, SnapshotId, StampRun,
    Stamps, StorageError, Token, View, ViewId, VolumeId,
};

/// What is on its way to the device.
enum Op {
    Append { volume: VolumeId, drop_after: Option<Lsn>, entries: Vec<Entry> },
    Promise { volume: VolumeId, promise: Promise, token: Token },
    Incomplete { volume: VolumeId, incomplete: Option<Incomplete>, token: Token },
    Pieces { volume: VolumeId, pieces: Vec<Piece>, token: Token },
    Finish { volume: VolumeId, place: Place, token: Token },
}

#[derive(Clone)]
struct Image {
    promise: Option<Promise>,
    log: Vec<Entry>,
    incomplete: Option<Incomplete>,
    /// What the log is applied to after a start: nothing, or what a copy left.
    base: Content,
}

type Blocks = BTreeMap<u64, Bytes>;
type StampMap = BTreeMap<u64, Place>;

/// What is applied.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Content {
    applied: Place,
    size_blocks: u64,
    blocks: Blocks,
    /// Of every block that was ever changed, holes included.
    stamps: StampMap,
    snapshots: Vec<(SnapshotState, Blocks, StampMap)>,
}

struct Replica {
    state: ReplicaState,
    log: Vec<Entry>,
    /// The log is cut up to here: what is below cannot be read any more.
    cut: u64,
    now: Content,
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
    views: BTreeMap<ViewId, Content>,
    next_view: u64,
    /// Versions whose bytes are not what was written (C4).
    bad: BTreeSet<BlockVersion>,
    /// The payload of this entry cannot be read from the log (C4).
    pub bad_entry: Option<Lsn>,
}

fn place_of(log: &[Entry]) -> Place {
    log.last().map_or(Place::EMPTY, |entry| entry.header.place)
}

impl MemStore {
    /// At once or, every other time, later.
    fn answer_stamps(&mut self, runs: Vec<StampRun>, token: Token) -> Stamps {
        if token.0.is_multiple_of(2) {
            return Stamps::Here(runs);
        }
        self.events.push_back(StorageEvent::Stamps { token, result: Ok(runs) });
        Stamps::Later
    }

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
                Op::Pieces { volume, pieces, token } => {
                    if let Some(replica) = self.replicas.get_mut(&volume) {
                        for piece in pieces {
                            replica.now.put(piece.range, piece.stamp, piece.data.as_ref());
                        }
                    }
                    self.events.push_back(StorageEvent::Done { token, result: Ok(()) });
                }
                Op::Finish { volume, place, token } => {
                    if let Some(replica) = self.replicas.get_mut(&volume) {
                        replica.finish(place);
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
        self.views.clear();
        for replica in self.replicas.values_mut() {
            replica.log = replica.disk.log.clone();
            let tail = place_of(&replica.log);
            let base = replica.disk.base.applied.lsn;
            let applied = if forget_applied { base } else { replica.state.applied.lsn };
            assert!(applied <= tail.lsn, "what is applied is durable");
            replica.state.promise = replica.disk.promise.clone();
            replica.state.incomplete = replica.disk.incomplete;
            replica.state.tail = tail;
            replica.state.durable = tail;
            replica.start(applied);
        }
    }

    /// The disk is replaced.
    pub fn wipe(&mut self) {
        *self = Self::default();
    }

    /// A block goes bad as it is now; its version.
    pub fn go_bad(&mut self, volume: VolumeId, block: u64) -> BlockVersion {
        let stamp = self.replicas[&volume].now.stamps[&block];
        let version = BlockVersion { snapshot: None, block, stamp };
        self.bad.insert(version);
        version
    }

    /// Whether any block is bad.
    pub fn has_bad(&self) -> bool {
        !self.bad.is_empty()
    }

    /// The bad blocks of a range, told.
    fn tell_bad(&mut self, volume: VolumeId, range: BlockRange) -> Option<StorageError> {
        let stamps = &self.replicas[&volume].now.stamps;
        let version = |block| {
            let stamp = stamps.get(&block).copied().unwrap_or(Place::EMPTY);
            BlockVersion { snapshot: None, block, stamp }
        };
        let all = (range.start..range.end()).map(version);
        let bad: Vec<BlockVersion> = all.filter(|version| self.bad.contains(version)).collect();
        for version in &bad {
            self.events.push_back(StorageEvent::Bad { volume, version: *version });
        }
        let first = bad.first()?;
        Some(StorageError::Checksum { volume, block: first.block })
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

    /// Everything that is applied, snapshots included, to compare replicas.
    pub fn content(&self, volume: VolumeId) -> &Content {
        &self.replicas[&volume].now
    }

    /// Views that are frozen.
    pub fn views(&self) -> usize {
        self.views.len()
    }

    pub fn blocks(&self, volume: VolumeId) -> &BTreeMap<u64, Bytes> {
        &self.replicas[&volume].now.blocks
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
        let now = Content { size_blocks, ..Content::default() };
        let disk = Image { promise: None, log: Vec::new(), incomplete: None, base: now.clone() };
        self.replicas.insert(volume, Replica { state, log: Vec::new(), cut: 0, now, disk });
    }

    /// A replica is gone.
    pub fn forget(&mut self, volume: VolumeId) {
        self.replicas.remove(&volume);
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

impl Content {
    fn states(&self) -> Vec<SnapshotState> {
        self.snapshots.iter().map(|(state, ..)| state.clone()).collect()
    }

    fn put(&mut self, range: BlockRange, stamp: Place, data: Option<&Bytes>) {
        for i in 0..range.count {
            let block = range.start + u64::from(i);
            self.stamps.insert(block, stamp);
            match data {
                Some(data) => {
                    let at = i as usize * BLOCK_BYTES;
                    self.blocks.insert(block, data.slice(at..at + BLOCK_BYTES));
                }
                None => drop(self.blocks.remove(&block)),
            }
        }
    }

    fn apply(&mut self, entry: &Entry) {
        let place = entry.header.place;
        match entry.header.kind {
            EntryKind::Write { range, .. } => self.put(range, place, Some(&entry.payload)),
            EntryKind::Zero { range, .. } => self.put(range, place, None),
            EntryKind::Grow { size_blocks } => self.size_blocks = size_blocks,
            EntryKind::Snapshot { id } => {
                self.snapshot(SnapshotState { id, place, size_blocks: self.size_blocks });
            }
            EntryKind::SnapshotDelete { id } => self.snapshots.retain(|(s, ..)| s.id != id),
            EntryKind::Noop => {}
        }
        self.applied = place;
    }

    fn snapshot(&mut self, state: SnapshotState) {
        self.snapshots.push((state, self.blocks.clone(), self.stamps.clone()));
        self.snapshots.sort_by_key(|(state, ..)| state.place);
    }

    /// Blocks, stamps and size of a part of a view.
    fn part(&self, part: usize) -> (&Blocks, &StampMap, u64) {
        let own = (&self.blocks, &self.stamps, self.size_blocks);
        self.snapshots
            .get(part)
            .map_or(own, |(state, blocks, stamps)| (blocks, stamps, state.size_blocks))
    }

    fn runs(&self, part: usize, range: BlockRange) -> Vec<StampRun> {
        let (blocks, stamps, _) = self.part(part);
        let run = |block| StampRun {
            count: 1,
            stamp: stamps.get(&block).copied().unwrap_or(Place::EMPTY),
            hole: !blocks.contains_key(&block),
        };
        (range.start..range.end()).map(run).collect()
    }
}

impl Replica {
    /// As a start finds it, with the log applied up to here.
    fn start(&mut self, applied: Lsn) {
        self.now = self.disk.base.clone();
        self.state.applied = self.now.applied;
        self.state.size_blocks = self.now.size_blocks;
        self.apply(applied);
    }

    fn apply(&mut self, upto: Lsn) {
        for lsn in self.state.applied.lsn.0 + 1..=upto.0 {
            self.now.apply(&self.log[lsn as usize - 1]);
        }
        self.state.applied = self.now.applied;
        self.state.size_blocks = self.now.size_blocks;
    }

    /// A copy has ended: the log is empty behind its place.
    fn finish(&mut self, place: Place) {
        self.now.applied = place;
        let filler = |lsn| {
            let place = Place { lsn: Lsn(lsn), ..place };
            let prev_epoch = if lsn == 1 { Place::EMPTY.epoch } else { place.epoch };
            let header = EntryHeader { place, prev_epoch, kind: EntryKind::Noop };
            Entry { header, payload: Bytes::new() }
        };
        self.log = (1..=place.lsn.0).map(filler).collect(); // never read: it is cut
        self.cut = place.lsn.0;
        self.disk.log.clone_from(&self.log);
        self.disk.base = self.now.clone();
        self.disk.incomplete = None;
        let state = &mut self.state;
        (state.tail, state.durable, state.applied) = (place, place, place);
        (state.log_start, state.incomplete) = (place.lsn.next(), None);
        state.size_blocks = self.now.size_blocks;
    }
}

impl Copies for MemStore {
    fn freeze(&mut self, volume: VolumeId) -> Option<View> {
        let whole = self.replicas.get(&volume).filter(|one| one.state.incomplete.is_none())?;
        let content = whole.now.clone();
        self.next_view += 1;
        let id = ViewId(self.next_view);
        let (place, size_blocks) = (content.applied, content.size_blocks);
        let snapshots = content.states();
        self.views.insert(id, content);
        Some(View { id, place, size_blocks, snapshots })
    }

    fn thaw(&mut self, view: ViewId) {
        self.views.remove(&view);
    }

    fn view_stamps(&mut self, view: ViewId, part: usize, from: u64, token: Token) -> Stamps {
        let Some(view) = self.views.get(&view) else { return Stamps::Gone };
        let end = view.part(part).2.min(from + 7); // short answers: more of them
        let count = end.saturating_sub(from) as u32;
        let runs = view.runs(part, BlockRange { start: from, count });
        self.answer_stamps(runs, token)
    }

    fn read_view(&mut self, view: ViewId, part: usize, ranges: &[BlockRange], token: Token) {
        let gone = || StorageError::Device("no such view".into());
        let result = self.views.get(&view).ok_or_else(gone).map(|view| {
            let blocks = view.part(part).0;
            let all = ranges.iter().flat_map(|range| range.start..range.end());
            all.map(|block| blocks[&block].clone()).collect()
        });
        self.events.push_back(StorageEvent::Read { token, result });
    }

    fn stamps(&mut self, volume: VolumeId, range: BlockRange, token: Token) -> Stamps {
        let runs = self.replicas[&volume].now.runs(usize::MAX, range);
        self.answer_stamps(runs, token)
    }

    fn copy_begin(&mut self, volume: VolumeId, keep: &[SnapshotState]) {
        let replica = self.replicas.get_mut(&volume).expect("a replica");
        assert!(replica.disk.incomplete.is_some(), "C2: marked durably");
        replica.now.snapshots.retain(|(state, ..)| keep.contains(state));
    }

    fn copy_resize(&mut self, volume: VolumeId, size_blocks: u64) {
        let replica = self.replicas.get_mut(&volume).expect("a replica");
        replica.now.size_blocks = size_blocks;
        replica.now.blocks.retain(|block, _| *block < size_blocks);
        replica.now.stamps.retain(|block, _| *block < size_blocks);
    }

    fn copy_write(&mut self, volume: VolumeId, pieces: Vec<Piece>, token: Token) {
        self.ops.push_back(Op::Pieces { volume, pieces, token });
    }

    fn copy_snapshot(&mut self, volume: VolumeId, snapshot: SnapshotState) {
        self.replicas.get_mut(&volume).expect("a replica").now.snapshot(snapshot);
    }

    fn copy_settle(&mut self, _: VolumeId, token: Token) {
        self.events.push_back(StorageEvent::Done { token, result: Ok(()) });
    }

    fn copy_finish(&mut self, volume: VolumeId, place: Place, token: Token) {
        self.ops.push_back(Op::Finish { volume, place, token });
    }
}

impl Repairs for MemStore {
    fn read_version(&mut self, volume: VolumeId, version: BlockVersion, token: Token) {
        let now = &self.replicas[&volume].now;
        let same = now.stamps.get(&version.block) == Some(&version.stamp);
        let found = now.blocks.get(&version.block).filter(|_| same && version.snapshot.is_none());
        let result = match found.cloned() {
            None => Err(StorageError::OtherVersion(volume)),
            Some(data) => {
                let bad = self.tell_bad(volume, BlockRange { start: version.block, count: 1 });
                bad.map_or(Ok(vec![data]), Err)
            }
        };
        self.events.push_back(StorageEvent::Read { token, result });
    }

    fn repair(&mut self, volume: VolumeId, version: BlockVersion, data: Bytes, token: Token) {
        let now = &self.replicas[&volume].now;
        let same = now.stamps.get(&version.block) == Some(&version.stamp);
        let result = if !same {
            Err(StorageError::OtherVersion(volume))
        } else if now.blocks.get(&version.block) == Some(&data) {
            self.bad.remove(&version);
            Ok(())
        } else {
            Err(StorageError::Checksum { volume, block: version.block })
        };
        self.events.push_back(StorageEvent::Done { token, result });
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
        let found = self.replicas.get(&volume).map(|replica| replica.now.states());
        found.unwrap_or_default()
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
        let bad = |entry: &Entry| self.bad_entry == Some(entry.header.place.lsn);
        if entries.iter().any(bad) {
            let result = Err(StorageError::Checksum { volume, block: 0 });
            return self.events.push_back(StorageEvent::Log { token, result });
        }
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
        let blocks = &self.replicas[&volume].now.blocks;
        let data = (range.start..range.end()).map(|b| blocks.get(&b).cloned().unwrap_or_else(zero));
        let data = data.collect();
        let result = self.tell_bad(volume, range).map_or(Ok(data), Err);
        self.events.push_back(StorageEvent::Read { token, result });
    }

    fn chunk_sums(&mut self, _: VolumeId, token: Token) {
        self.events.push_back(StorageEvent::Read { token, result: Ok(Vec::new()) });
    }

    fn chunk_map(&mut self, _: VolumeId, _: u64, token: Token) {
        self.events.push_back(StorageEvent::Chunks { token, result: Ok(ChunkPage::default()) });
    }
}

/// The id of a snapshot in tests.
pub fn snapshot_id(n: u8) -> SnapshotId {
    SnapshotId::from_bytes([n; 16])
}
