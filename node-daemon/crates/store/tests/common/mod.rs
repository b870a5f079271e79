//! A store on a simulated disk beside a model that is naive on purpose: maps of blocks, a list of
//! all entries ever made.

#![allow(dead_code)] // each test uses its part

#[cfg(feature = "canary")]
mod canaries;
mod chunks;
pub mod copying;
mod model;

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, Bytes};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tercet_proto::disk::{StoreId, crc32c};
use tercet_proto::storage::{Incomplete, Source, Storage, StorageError, StorageEvent};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, BlockVersion, ChunkPage, Config, ConfigState, Entry, EntryHeader,
    EntryKind, Epoch, InstanceId, Instant, Lsn, Member, NewReplica, NodeName, Place, Primary,
    Promise, ReplicaId, StampRun, Token, VolumeId, page_aligned,
};
use tercet_store::arena::Arena;
use tercet_store::disk::Disk;
use tercet_store::simdisk::SimDisk;
use tercet_store::{FormatOptions, OpenReport, Options, Store};
use uuid::Uuid;

#[cfg(feature = "canary")]
#[allow(unused_imports)] // each test uses its part
pub use canaries::{assert_caught, canary};
pub use model::{Awaits, Content, ModelEntry, ModelVolume};

pub const ARENA_BYTES: usize = 16 << 20;

pub fn id(number: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    bytes
}

pub fn volume_id(number: u64) -> VolumeId {
    VolumeId::from_bytes(id(number))
}

pub fn format_options() -> FormatOptions {
    FormatOptions {
        store: StoreId(id(0x5704e)),
        cluster: Uuid::from_bytes(id(0xc1)),
        node: NodeName::new("node-a"),
        shard: 0,
        ring_blocks: None,
        overwrite: false,
    }
}

pub fn config(epoch: u64) -> Config {
    let node = NodeName::new("node-a");
    Config {
        epoch: Epoch(epoch),
        state: ConfigState::Recovering,
        primary: Primary { node: node.clone(), instance: InstanceId::from_bytes(id(epoch)) },
        members: vec![Member { node, replica: ReplicaId::from_bytes(id(1)) }],
        previous_members: None,
        learners: Vec::new(),
        single_copy: None,
        restored: None,
    }
}

/// The usual ones but for a cache of two leaves, so that leaves are read all the time.
pub fn options() -> Options {
    Options { leaf_cache_bytes: 48 << 10, ..Options::new(Arena::new(ARENA_BYTES)) }
}

/// Blocks of a disk as they are now.
pub fn read_run(disk: &SimDisk, (first, count): (u32, u32)) -> Vec<u8> {
    (first..first + count).flat_map(|block| *disk.sector(u64::from(block))).collect()
}

/// A payload in which each block says its tag and number; every second one begins at a page.
pub fn payload(tag: u64, blocks: u32) -> Bytes {
    let mut bytes = page_aligned(blocks as usize * BLOCK_BYTES + 1);
    bytes.put_bytes(0, (tag % 2) as usize);
    for index in 0..blocks {
        bytes.extend_from_slice(&block_bytes(tag + (u64::from(index) << 40)));
    }
    bytes.freeze().slice((tag % 2) as usize..)
}

pub fn block_bytes(tag: u64) -> Vec<u8> {
    tag.to_le_bytes().repeat(BLOCK_BYTES / 8)
}

/// Store, disk and model.
pub struct World {
    pub rng: SmallRng,
    pub arena: Arena,
    pub disk: SimDisk,
    pub store: Store,
    pub model: BTreeMap<VolumeId, ModelVolume>,
    /// Asked to be made or deleted, not answered yet.
    pub making: BTreeMap<Token, (VolumeId, ModelVolume)>,
    pub deleting: BTreeMap<Token, VolumeId>,
    pub promising: BTreeMap<Token, (VolumeId, u64)>,
    pub reads: BTreeMap<Token, (VolumeId, BlockRange, Content)>,
    pub log_reads: BTreeMap<Token, (VolumeId, ReplicaId, u64)>,
    /// What was answered, for who looks at it himself.
    pub dones: BTreeMap<Token, Result<(), StorageError>>,
    pub other_reads: BTreeMap<Token, Result<Vec<Bytes>, StorageError>>,
    /// Blocks that were said to be bad.
    pub bad: Vec<(VolumeId, BlockVersion)>,
    pub stamps: BTreeMap<Token, Result<Vec<StampRun>, StorageError>>,
    pub chunks: BTreeMap<Token, Result<ChunkPage, StorageError>>,
    pub deleted: BTreeSet<VolumeId>,
    pub next: u64,
    pub now: Instant,
    pub failed: bool,
    pub reads_checked: u64,
    pub reads_busy: u64,
    pub violations: Vec<String>,
    pub options: Options,
    pub instances: u64,
}

impl World {
    pub fn new(seed: u64, capacity_bytes: u64, ring_blocks: Option<u32>) -> Self {
        let options = options();
        #[cfg(feature = "canary")]
        let options = Options { canary: canary(), ..options };
        Self::with_options(seed, capacity_bytes, ring_blocks, options)
    }

    pub fn with_options(
        seed: u64,
        capacity_bytes: u64,
        ring_blocks: Option<u32>,
        options: Options,
    ) -> Self {
        let mut disk = SimDisk::new(capacity_bytes);
        let format = FormatOptions { ring_blocks, ..format_options() };
        Store::format(&mut disk, &format, &options).expect("formats");
        let instance = InstanceId::from_bytes(id(1));
        let (store, report) = Store::open(&mut disk, options.clone(), instance).expect("opens");
        assert_eq!(report, OpenReport::default());
        Self {
            rng: SmallRng::seed_from_u64(seed),
            arena: options.arena.clone(),
            disk,
            store,
            model: BTreeMap::new(),
            making: BTreeMap::new(),
            deleting: BTreeMap::new(),
            promising: BTreeMap::new(),
            reads: BTreeMap::new(),
            log_reads: BTreeMap::new(),
            dones: BTreeMap::new(),
            other_reads: BTreeMap::new(),
            bad: Vec::new(),
            stamps: BTreeMap::new(),
            chunks: BTreeMap::new(),
            deleted: BTreeSet::new(),
            next: 1,
            now: Instant(1),
            failed: false,
            reads_checked: 0,
            reads_busy: 0,
            violations: Vec::new(),
            options,
            instances: 1,
        }
    }

    /// What the store counts wrong.
    pub fn check(&self) -> Vec<String> {
        self.store.check(&mut |run| read_run(&self.disk, run))
    }

    pub fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Submits what the store wants.
    pub fn pump(&mut self) {
        let (mut ops, mut events) = (Vec::new(), Vec::new());
        self.store.take(&mut ops, &mut events);
        for (token, op) in ops {
            self.disk.submit(token, op);
        }
        for event in events {
            self.event(event);
        }
    }

    /// Completes one operation in flight, any; false when there is none.
    pub fn complete_one(&mut self) -> bool {
        let in_flight = self.disk.in_flight();
        if in_flight.is_empty() {
            return false;
        }
        let token = in_flight[self.rng.random_range(0..in_flight.len())];
        self.disk.complete(token);
        self.deliver();
        true
    }

    pub fn deliver(&mut self) {
        let mut done = Vec::new();
        tercet_store::disk::Disk::poll(&mut self.disk, &mut done);
        for one in done {
            self.store.on_disk(one, self.now);
            self.pump();
        }
    }

    /// Runs until nothing is in flight and time alone would change anything.
    pub fn settle(&mut self) {
        self.pump();
        while self.complete_one() {
            if self.disk.in_flight().is_empty() {
                self.pump();
            }
        }
        assert!(self.disk.in_flight().is_empty(), "settled");
    }

    /// Like `settle`, but the operation with this number fails.
    pub fn settle_failing(&mut self, number: u64) {
        self.pump();
        while !self.failed {
            let Some(token) = self.disk.in_flight().first().copied() else {
                break;
            };
            if self.disk.operations == number {
                self.disk.fail(token);
            }
            self.disk.complete(token);
            self.deliver();
        }
    }

    /// A poisoned store does nothing any more.
    pub fn expect_refusals(&mut self, volume: VolumeId) {
        let device = |error: &StorageError| matches!(error, StorageError::Device(_));
        let refused = self.store.append(volume, None, Vec::new()).expect_err("refused");
        assert!(device(&refused), "{refused}");
        let (mut ops, mut events) = (Vec::new(), Vec::new());
        let range = BlockRange { start: 0, count: 1 };
        self.store.read(volume, range, Token(1 << 40));
        self.store.set_promise(volume, Promise { config: config(99) }, Token(2 << 40));
        self.store.take(&mut ops, &mut events);
        assert!(ops.is_empty(), "nothing more goes to the device");
        let errors = events.iter().filter(|event| match event {
            StorageEvent::Read { result: Err(error), .. }
            | StorageEvent::Done { result: Err(error), .. } => device(error),
            _ => false,
        });
        assert_eq!(errors.count(), 2, "{events:?}");
    }

    /// The same model with another disk and no store on it yet: for `restart`.
    pub fn fork(&self, mut disk: SimDisk) -> Self {
        let options = self.options.clone();
        let instance = InstanceId::from_bytes(id(self.instances));
        // Opening twice shows that an opening changes nothing that the next one needs.
        let (store, _) = Store::open(&mut disk, options, instance).expect("opens");
        Self {
            rng: self.rng.clone(),
            arena: self.arena.clone(),
            disk,
            store,
            model: self.model.clone(),
            making: self.making.clone(),
            deleting: self.deleting.clone(),
            promising: self.promising.clone(),
            reads: BTreeMap::new(),
            log_reads: BTreeMap::new(),
            dones: BTreeMap::new(),
            other_reads: BTreeMap::new(),
            bad: Vec::new(),
            stamps: BTreeMap::new(),
            chunks: BTreeMap::new(),
            deleted: self.deleted.clone(),
            next: self.next,
            now: self.now,
            failed: false,
            reads_checked: 0,
            reads_busy: 0,
            violations: Vec::new(),
            options: self.options.clone(),
            instances: self.instances,
        }
    }

    pub fn tick(&mut self, millis: u64) {
        self.now = Instant(self.now.0 + millis * 1_000_000);
        self.store.tick(self.now);
        self.pump();
    }

    fn event(&mut self, event: StorageEvent) {
        match event {
            StorageEvent::Durable { volume, place } => {
                let Some(model) = self.model.get_mut(&volume) else {
                    return;
                };
                if model.log.iter().any(|entry| entry.header.place == place) {
                    model.acked = model.acked.max(place);
                } else if place != Place::EMPTY {
                    self.violations.push(format!("{volume}: durable {place:?} never appended"));
                }
            }
            StorageEvent::Done { token, result } => {
                self.done(token, &result);
                self.dones.insert(token, result);
            }
            StorageEvent::Read { token, result } if self.reads.contains_key(&token) => {
                self.read_done(token, result);
            }
            StorageEvent::Read { token, result } => drop(self.other_reads.insert(token, result)),
            StorageEvent::Stamps { token, result } => drop(self.stamps.insert(token, result)),
            StorageEvent::Chunks { token, result } => drop(self.chunks.insert(token, result)),
            StorageEvent::Log { token, result } => {
                let (volume, replica, from) = self.log_reads.remove(&token).expect("asked for");
                let same = self.model.get(&volume).is_some_and(|found| found.replica == replica);
                if let Ok(entries) = result
                    && same
                {
                    self.log_done(volume, from, &entries);
                }
            }
            StorageEvent::Bad { volume, version } => self.bad.push((volume, version)),
            StorageEvent::Filled { volume } => self.filled(volume),
            StorageEvent::Failed(_) => self.failed = true,
        }
    }

    /// A clone is complete: it has what its snapshot has.
    fn filled(&mut self, volume: VolumeId) {
        let Some(model) = self.model.get_mut(&volume) else {
            return;
        };
        match model.awaits.take().and_then(|awaits| awaits.content) {
            Some(content) => model.content = content,
            None => self.violations.push(format!("{volume}: filled out of nothing")),
        }
    }

    /// The model has applied snapshots: clones that await them know what they will have.
    fn captured(&mut self, of: VolumeId) {
        let Self { model, making, .. } = self;
        let snapshots = model[&of].snapshots.clone();
        let clones = model.values_mut().chain(making.values_mut().map(|(_, clone)| clone));
        for awaits in clones.filter_map(|clone| clone.awaits.as_mut()) {
            let found = snapshots.iter().find(|snap| snap.id == awaits.source.snapshot);
            if awaits.source.volume == of
                && let Some(snapshot) = found
            {
                awaits.content = Some(snapshot.content.clone());
            }
        }
    }

    fn done(&mut self, token: Token, result: &Result<(), StorageError>) {
        if let Some((volume, model)) = self.making.remove(&token)
            && result.is_ok()
        {
            self.deleted.remove(&volume);
            self.model.insert(volume, model);
        }
        if let Some(volume) = self.deleting.remove(&token)
            && result.is_ok()
        {
            self.model.remove(&volume);
            self.deleted.insert(volume);
        }
        if let Some((volume, epoch)) = self.promising.remove(&token)
            && result.is_ok()
            && let Some(model) = self.model.get_mut(&volume)
        {
            model.promise_acked = epoch;
        }
    }

    fn read_done(&mut self, token: Token, result: Result<Vec<Bytes>, StorageError>) {
        let (volume, range, content) = self.reads.remove(&token).expect("asked for");
        match result {
            Ok(pieces) => {
                self.reads_checked += 1;
                let bytes = pieces.concat();
                assert_eq!(bytes.len(), range.bytes());
                for (index, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
                    let number = range.start + index as u64;
                    let expected = content.get(&number).copied();
                    let wanted = expected.map_or_else(|| vec![0; BLOCK_BYTES], block_bytes);
                    if block != wanted {
                        let text = format!("{volume}: block {number} is not {expected:x?}");
                        self.violations.push(text);
                    }
                }
            }
            Err(StorageError::Busy) => self.reads_busy += 1,
            Err(error) if self.failed => drop(error),
            Err(error) => self.violations.push(format!("{volume}: read {range:?}: {error}")),
        }
    }

    fn log_done(&mut self, volume: VolumeId, from: u64, entries: &[Entry]) {
        assert!(!entries.is_empty());
        let Some(model) = self.model.get(&volume) else {
            return;
        };
        for (index, entry) in entries.iter().enumerate() {
            let place = entry.header.place;
            let known = model.ever.get(&place);
            let same = known.is_some_and(|known| {
                known.header == entry.header
                    && entry.payload == payload(known.tag, (entry.payload.len() / 4096) as u32)
            });
            if !same || place.lsn.0 != from + index as u64 {
                self.violations.push(format!("{volume}: read log {place:?} is not what was put"));
            }
        }
    }

    // What tests do.

    pub fn create(&mut self, volume: VolumeId, size: u64, source: Option<(VolumeId, usize)>) {
        let number = self.fresh();
        let token = Token(number);
        let replica = ReplicaId::from_bytes(id(number));
        let mut model = ModelVolume {
            replica,
            log: Vec::new(),
            ever: BTreeMap::new(),
            acked: Place::EMPTY,
            applied: 0,
            content: Content::new(),
            size,
            snapshots: Vec::new(),
            promise_acked: 0,
            promise_asked: 0,
            epoch: 1,
            awaits: None,
        };
        let source = source.map(|(from, index)| {
            let snapshot = &self.model[&from].snapshots[index];
            model.content = snapshot.content.clone();
            model.size = size.max(snapshot.size);
            Source { volume: from, snapshot: snapshot.id, place: snapshot.place }
        });
        self.make(volume, token, model, source, false);
    }

    /// A clone of the first snapshot in a log that is not applied yet (S3); whether there is one.
    pub fn create_early(&mut self, volume: VolumeId, from: VolumeId) -> bool {
        let of = &self.model[&from];
        let found =
            of.log[of.applied as usize..].iter().find_map(|entry| match entry.header.kind {
                EntryKind::Snapshot { id } => Some((id, entry.header.place)),
                _ => None,
            });
        let Some((snapshot, place)) = found else {
            return false;
        };
        let size = of.size_at_tail();
        let source = Source { volume: from, snapshot, place };
        let number = self.fresh();
        let model = ModelVolume {
            replica: ReplicaId::from_bytes(id(number)),
            log: Vec::new(),
            ever: BTreeMap::new(),
            acked: Place::EMPTY,
            applied: 0,
            content: Content::new(),
            size,
            snapshots: Vec::new(),
            promise_acked: 0,
            promise_asked: 0,
            epoch: 1,
            awaits: Some(Awaits { source, content: None }),
        };
        self.make(volume, Token(number), model, Some(source), true);
        true
    }

    fn make(
        &mut self,
        volume: VolumeId,
        token: Token,
        model: ModelVolume,
        source: Option<Source>,
        incomplete: bool,
    ) {
        let (replica, size_blocks) = (model.replica, model.size);
        let name = format!("vol-{}", token.0);
        let new = NewReplica { volume, replica, name, size_blocks, source, incomplete };
        self.making.insert(token, (volume, model));
        self.store.create_replica(new, token);
        self.pump();
    }

    pub fn delete(&mut self, volume: VolumeId) {
        let token = Token(self.fresh());
        let replica = self.model[&volume].replica;
        self.deleting.insert(token, volume);
        self.store.delete_replica(volume, replica, token);
        self.pump();
    }

    pub fn promise(&mut self, volume: VolumeId, epoch: u64) {
        let token = Token(self.fresh());
        self.promising.insert(token, (volume, epoch));
        self.model.get_mut(&volume).expect("there").promise_asked = epoch;
        self.store.set_promise(volume, Promise { config: config(epoch) }, token);
        self.pump();
    }

    /// Appends; with `drop_after` in a new epoch.
    pub fn append(
        &mut self,
        volume: VolumeId,
        drop_after: Option<u64>,
        kinds: &[EntryKind],
    ) -> Result<(), StorageError> {
        let model = self.model.get_mut(&volume).expect("there");
        let epoch = if drop_after.is_some() { model.epoch + 1 } else { model.epoch };
        let mut tail = drop_after.map_or(model.tail(), |after| model.place_at(after));
        let mut entries = Vec::new();
        let mut made = Vec::new();
        for kind in kinds {
            self.next += 1;
            let tag = self.next;
            let mut kind = *kind;
            let mut bytes = Bytes::new();
            if let EntryKind::Write { range, payload_crc } = &mut kind {
                bytes = payload(tag, range.count);
                *payload_crc = crc32c(&bytes);
            }
            let place = Place { epoch: Epoch(epoch), lsn: tail.lsn.next() };
            let header = EntryHeader { place, prev_epoch: tail.epoch, kind };
            entries.push(Entry { header, payload: bytes });
            made.push(ModelEntry { header, tag });
            tail = place;
        }
        self.store.append(volume, drop_after.map(Lsn), entries)?;
        model.epoch = epoch;
        if let Some(after) = drop_after {
            model.acked = model.acked.min(model.place_at(after));
            model.log.truncate(after as usize);
        }
        for entry in made {
            model.ever.insert(entry.header.place, entry.clone());
            model.log.push(entry);
        }
        self.pump();
        Ok(())
    }

    pub fn write(&mut self, volume: VolumeId, start: u64, count: u32) -> Result<(), StorageError> {
        let range = BlockRange { start, count };
        self.append(volume, None, &[EntryKind::Write { range, payload_crc: 0 }])
    }

    /// Applies up to what is durable, at most `count`.
    pub fn apply(&mut self, volume: VolumeId, count: u64) {
        let durable = self.store.replica(volume).expect("there").durable.lsn.0;
        let mut model = self.model.get_mut(&volume).expect("there");
        let target = durable.min(model.applied + count);
        while model.applied < target {
            model.apply_next();
            self.captured(volume);
            model = self.model.get_mut(&volume).expect("there");
        }
        self.store.apply(volume, Lsn(target));
        self.pump();
    }

    pub fn read(&mut self, volume: VolumeId, start: u64, count: u32) {
        let token = Token(self.fresh());
        let range = BlockRange { start, count };
        let model = &self.model[&volume];
        let content = model.content.range(start..range.end()).map(|(k, v)| (*k, *v)).collect();
        self.reads.insert(token, (volume, range, content));
        self.store.read(volume, range, token);
        self.pump();
    }

    pub fn read_log(&mut self, volume: VolumeId, from: u64) {
        let token = Token(self.fresh());
        let replica = self.model[&volume].replica;
        self.log_reads.insert(token, (volume, replica, from));
        self.store.read_log(volume, Lsn(from), 100_000, token);
        self.pump();
    }

    /// Opens again after a power cut or a kill, and holds what is there against the model.
    /// Who has opened the store, by its superblocks.
    pub fn last_instance(&mut self) -> Option<InstanceId> {
        Store::last_instance(&mut self.disk, &self.options).expect("superblocks")
    }

    pub fn restart(&mut self) -> OpenReport {
        self.instances += 1;
        let instance = InstanceId::from_bytes(id(self.instances));
        let options = self.options.clone();
        let (store, report) = Store::open(&mut self.disk, options, instance).expect("opens");
        self.store = store;
        self.reads.clear();
        self.log_reads.clear();
        self.failed = false;
        self.after_restart();
        report
    }

    fn after_restart(&mut self) {
        for (volume, model) in std::mem::take(&mut self.making).into_values() {
            if self.store.replica(volume).is_some_and(|found| found.replica == model.replica) {
                self.model.insert(volume, model);
                self.deleted.remove(&volume);
            }
        }
        for volume in std::mem::take(&mut self.deleting).into_values() {
            if self.store.replica(volume).is_none() && self.model.remove(&volume).is_some() {
                self.deleted.insert(volume);
            }
        }
        self.promising.clear();
        let volumes: Vec<VolumeId> = self.model.keys().copied().collect();
        let there: Vec<VolumeId> =
            self.store.replicas().iter().map(|replica| replica.volume).collect();
        if volumes != there {
            self.violations.push(format!("replicas {there:?}, not {volumes:?}"));
            return;
        }
        for volume in volumes {
            self.compare_log(volume);
        }
        let wrong = self.check();
        self.violations.extend(wrong);
    }

    fn compare_log(&mut self, volume: VolumeId) {
        let state = self.store.replica(volume).expect("there");
        let model = self.model.get_mut(&volume).expect("there");
        let epoch = state.promise.as_ref().map_or(0, |promise| promise.epoch().0);
        if epoch < model.promise_acked || epoch > model.promise_asked {
            self.violations.push(format!("{volume}: promise {epoch}"));
        }
        (model.promise_acked, model.promise_asked) = (epoch, epoch);
        match (state.incomplete, &model.awaits) {
            (None, None) => {}
            (Some(Incomplete::Awaits(source)), Some(awaits)) if source == awaits.source => {}
            (None, Some(Awaits { content: Some(content), .. })) => {
                model.content = content.clone(); // the record that fills it was durable
                model.awaits = None;
            }
            (found, awaits) => {
                self.violations.push(format!("{volume}: {found:?}, the model: {awaits:?}"));
            }
        }
        if state.tail != state.durable || state.applied.lsn.0 > model.applied {
            self.violations.push(format!("{volume}: {state:?}"));
        }
        if state.tail.lsn < model.acked.lsn || state.tail.lsn.0 < model.applied {
            self.violations
                .push(format!("{volume}: {:?} lost, acked {:?}", state.tail, model.acked));
            return;
        }
        // The log behind `applied` must be a chain of entries that were appended, and hold what
        // was acknowledged.
        let from = state.applied.lsn.0;
        let mut log = model.log[..(from as usize).min(model.log.len())].to_vec();
        for lsn in from + 1..=state.tail.lsn.0 {
            let header = self.store.header(volume, Lsn(lsn));
            let known = header.and_then(|header| model.ever.get(&header.place));
            let Some(known) = known.filter(|known| Some(known.header) == header) else {
                self.violations.push(format!("{volume}: entry {lsn} is {header:?}"));
                return;
            };
            let tail = log.last().map_or(Place::EMPTY, |entry: &ModelEntry| entry.header.place);
            if known.header.prev() != tail {
                self.violations.push(format!("{volume}: entry {lsn} does not follow"));
            }
            log.push(known.clone());
        }
        if model.acked.lsn.0 > 0 && log[model.acked.lsn.0 as usize - 1].header.place != model.acked
        {
            self.violations.push(format!("{volume}: acknowledged {:?} replaced", model.acked));
        }
        model.log = log;
        model.acked = state.tail;
        model.epoch = model.ever.keys().map(|place| place.epoch.0).max().unwrap_or(1);
        self.store.apply(volume, Lsn(model.applied));
    }

    /// Reads every volume and (by a clone each) every snapshot.
    pub fn compare_all(&mut self) {
        let volumes: Vec<VolumeId> = self.model.keys().copied().collect();
        for volume in volumes {
            self.compare_volume(volume);
            self.compare_chunks(volume);
            let state = self.store.snapshots(volume);
            let model = &self.model[&volume];
            let same = state
                .iter()
                .map(|snap| (snap.id, snap.place, snap.size_blocks))
                .eq(model.snapshots.iter().map(|snap| (snap.id, snap.place, snap.size)));
            if !same {
                self.violations.push(format!("{volume}: snapshots {state:?}"));
            }
            for index in 0..model.snapshots.len() {
                let clone = volume_id(0xc10e_0000 + self.fresh());
                self.create(clone, 1, Some((volume, index)));
                self.settle();
                self.compare_volume(clone);
                self.delete(clone);
                self.settle();
                self.deleted.remove(&clone);
            }
        }
        self.settle();
        let wrong = self.check();
        self.violations.extend(wrong);
    }

    pub fn compare_volume(&mut self, volume: VolumeId) {
        self.settle();
        let Some(model) = self.model.get(&volume) else {
            self.violations.push(format!("{volume}: is not there"));
            return;
        };
        let size = model.size;
        if let Some(awaits) = &model.awaits {
            // Only as long as its snapshot is not applied, or its source is gone.
            if awaits.content.is_some() && self.model.contains_key(&awaits.source.volume) {
                self.violations.push(format!("{volume}: not filled, {:?}", awaits.source));
            }
            return;
        }
        let mut block = 0;
        while block < size {
            let count = (size - block).min(512) as u32;
            self.read(volume, block, count);
            self.settle();
            block += u64::from(count);
        }
    }

    pub fn assert_well(&self, what: &str) {
        assert!(self.violations.is_empty(), "{what}: {:#?}", self.violations);
    }
}

/// A row of evidence, where somebody collects it.
pub fn evidence(name: &str, count: u64, violations: u64, started: std::time::Instant) {
    use std::io::Write as _;
    let seconds = started.elapsed().as_secs_f64();
    println!("{name}: {count} in {seconds:.1} s, {violations} violations");
    if let Ok(path) = std::env::var("TERCET_EVIDENCE") {
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .expect("the evidence file");
        writeln!(
            file,
            "{{\"evidence\": \"{name}\", \"count\": {count}, \"violations\": {violations}, \
             \"seconds\": {seconds:.3}}}"
        )
        .expect("a row of evidence");
    }
}
