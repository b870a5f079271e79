//! Metadata checkpoints, in bounded steps beside everything else.
//!
//! 1. *Freeze*: what every record below `frozen` (the mark) did is what the checkpoint holds. Maps
//!    are frozen by one more holder of each leaf. Entries not applied yet below the cut are carried.
//! 2. *Copy*: small payloads that the frozen maps name go from the ring to their blocks, in the
//!    ring's order.
//! 3. *Leaves* that changed, and the *root* that names all, go to fresh blocks.
//! 4. *Flush*, then the *slot* with FUA: now the checkpoint is durable.
//! 5. *Confirm*: a record that names it. Only when that is durable the log is cut and freed space
//!    used again (rule W8): so nobody can ever take an older checkpoint for the newest, because a
//!    record that knows better is there before anything of the older one is overwritten.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tercet_proto::disk::{
    CHUNK_BLOCKS, EntryItem, LeafImage, Put, ROOT_PAYLOAD_BYTES, RootBlock, Run, Slot, crc32c,
};
use tercet_proto::storage::{Incomplete, SnapshotState};
use tercet_proto::{BLOCK_BYTES, Place, Promise, ReplicaId, VolumeId};

use crate::arena::Buf;
use crate::changes::take_reserved;
use crate::disk::DiskOp;
use crate::layout::SLOT_BLOCKS;
use crate::map::{Chunk, Leaf, LeafPlace, Map, Space};
use crate::replica::{Payload, Snapshot};
use crate::store::{OpKind, Store, Tombstone};

/// Entries that the log retains after a checkpoint at most: what is replayed in half a second.
const RETAINED_ENTRIES_MAX: u64 = 50_000;
/// Entries in the log that bring about a checkpoint.
const ENTRIES_MAX: u64 = 80_000;
/// Blocks of the ring read at once to be copied home.
const COPY_SPAN_BLOCKS: u32 = 64;
/// Blocks of others in between that are read along.
const COPY_GAP_BLOCKS: u32 = 4;
const COPIES_IN_FLIGHT_MAX: usize = 4;
const WRITES_IN_FLIGHT_MAX: usize = 16;
const LEAVES_PER_STEP_MAX: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Copy,
    Leaves,
    Root,
    Flush,
    Slot,
    Confirm,
}

/// What is written of one replica.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) number: u64,
    pub(crate) volume: VolumeId,
    pub(crate) replica: ReplicaId,
    pub(crate) name: String,
    pub(crate) size_blocks: u64,
    pub(crate) promise: Option<Promise>,
    pub(crate) incomplete: Option<Incomplete>,
    pub(crate) applied: Place,
    pub(crate) durable: Place,
    pub(crate) carried: Vec<EntryItem>,
    pub(crate) head: Map,
    pub(crate) snapshots: Vec<Snapshot>,
}

#[derive(Debug)]
struct Unit {
    /// (ring, block), in the ring's order.
    pairs: Vec<(u32, u32)>,
    writes_left: usize,
}

/// A checkpoint being made.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    sequence: u64,
    frozen: u64,
    cut: u64,
    previous: (u64, u32),
    phase: Phase,
    copies: VecDeque<(u32, u32)>,
    units: BTreeMap<u64, Unit>,
    next_unit: u64,
    ready: Vec<(u64, Buf)>,
    leaves: VecDeque<(Arc<Leaf>, u32)>,
    head_bytes: Vec<u8>,
    replicas: Vec<Frozen>,
    writes: VecDeque<(u32, Vec<u8>)>,
    writes_in_flight: usize,
    root: Option<(Vec<Run>, u64, Slot)>,
}

impl Checkpoint {
    pub(crate) fn maps(&self) -> impl Iterator<Item = &Map> {
        self.replicas.iter().flat_map(Frozen::maps)
    }

    /// Leaves that are still to be written.
    pub(crate) fn leaves(&self) -> impl Iterator<Item = &Arc<Leaf>> {
        self.leaves.iter().map(|(leaf, _)| leaf)
    }

    /// The block of the ring at which a span that is being copied begins.
    pub(crate) fn copy_first(&self, unit: u64) -> u32 {
        self.units[&unit].pairs[0].0
    }

    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    pub(crate) fn root_runs(&self) -> &[Run] {
        self.root.as_ref().map_or(&[], |root| &root.0)
    }
}

impl Frozen {
    fn maps(&self) -> impl Iterator<Item = &Map> {
        std::iter::once(&self.head).chain(self.snapshots.iter().rev().map(|snap| &snap.map))
    }

    /// Its part of the root stream.
    fn encode(&self, put: &mut Put, places: &std::collections::HashMap<u64, LeafPlace>) {
        put.u64(self.number);
        put.bytes(self.volume.as_bytes());
        put.bytes(self.replica.as_bytes());
        put.text(&self.name);
        put.u64(self.size_blocks);
        put.incomplete(self.incomplete);
        put.u8(u8::from(self.promise.is_some()));
        if let Some(promise) = &self.promise {
            put.config(&promise.config);
        }
        put.place(self.applied);
        put.place(self.durable);
        put.u32(self.carried.len() as u32);
        for entry in &self.carried {
            entry.encode(put);
        }
        put.u32(self.snapshots.len() as u32);
        for snapshot in &self.snapshots {
            let SnapshotState { id, place, size_blocks } = &snapshot.state;
            put.bytes(id.as_bytes());
            put.place(*place);
            put.u64(*size_blocks);
        }
        let mut newer: Option<&Map> = None;
        for map in self.maps() {
            encode_map(put, map, newer, places);
            newer = Some(map);
        }
    }
}

/// A map as what differs from the next newer one of the same volume.
fn encode_map(
    put: &mut Put,
    map: &Map,
    newer: Option<&Map>,
    places: &std::collections::HashMap<u64, LeafPlace>,
) {
    put.u32(map.chunks.len() as u32);
    let same = |index: usize| {
        let other = newer.and_then(|newer| newer.chunks.get(index));
        other.is_some_and(|other| other.same(&map.chunks[index]))
    };
    let mut index = 0;
    while index < map.chunks.len() {
        let start = index;
        if same(index) {
            while index < map.chunks.len() && same(index) {
                index += 1;
            }
            put.u8(0);
            put.u32((index - start) as u32);
            continue;
        }
        match &map.chunks[index] {
            Chunk::Hole(stamp) => {
                let alike = |chunk: &Chunk| matches!(chunk, Chunk::Hole(other) if other == stamp);
                while index < map.chunks.len() && !same(index) && alike(&map.chunks[index]) {
                    index += 1;
                }
                put.u8(1);
                put.u32((index - start) as u32);
                put.place(*stamp);
            }
            Chunk::Leaf { leaf, inherited } => {
                let place = &places[&leaf.id];
                put.u8(if *inherited { 3 } else { 2 });
                put.u64(leaf.id);
                put.u32(place.crc);
                put.u8(u8::try_from(place.runs.len()).expect("at most 8 runs"));
                for (start, count) in &place.runs {
                    put.u32(*start);
                    put.u32(*count);
                }
                index += 1;
            }
        }
    }
}

fn encode_tombstones(put: &mut Put, tombstones: &[Tombstone]) {
    put.u32(tombstones.len() as u32);
    for stone in tombstones {
        put.bytes(stone.volume.as_bytes());
        put.bytes(stone.replica.as_bytes());
        put.u8(u8::from(stone.config.is_some()));
        if let Some(config) = &stone.config {
            put.config(config);
        }
    }
}

impl Store {
    fn checkpoint_due(&self) -> bool {
        let reserve = u64::from(self.superblock.data.1) / 32;
        self.checkpoint_wanted
            || self.log.used() > u64::from(self.log.ring.1) / 2
            || self.log.entries > ENTRIES_MAX
            || self.leaves.dirty() * 8 > reserve / 2
            || self.alloc.pending() > u64::from(self.superblock.data.1) / 8
    }

    /// One bounded step of whatever is to be done.
    pub(crate) fn pump_checkpoint(&mut self) {
        if self.checkpoint.is_none() && self.checkpoint_due() && self.log.unsettled == 0 {
            self.checkpoint_wanted = false;
            if self.changed || (self.cut_all && self.log.start < self.log.durable) {
                self.freeze();
            }
        }
        let Some(mut checkpoint) = self.checkpoint.take() else {
            return;
        };
        self.step_checkpoint(&mut checkpoint);
        self.checkpoint = Some(checkpoint);
    }

    fn step_checkpoint(&mut self, now: &mut Checkpoint) {
        self.pump_writes(now);
        if now.phase == Phase::Copy {
            self.pump_copies(now);
            if now.copies.is_empty() && now.units.is_empty() {
                now.phase = Phase::Leaves;
            }
        }
        if now.phase == Phase::Leaves {
            self.pump_leaves(now);
            if now.leaves.is_empty() && now.writes.is_empty() {
                self.write_root(now);
                now.phase = Phase::Root;
            }
        }
        self.pump_writes(now);
        if now.phase == Phase::Root && now.writes.is_empty() && now.writes_in_flight == 0 {
            now.phase = Phase::Flush;
            now.writes_in_flight = 1;
            self.submit(OpKind::Checkpoint, DiskOp::Flush);
        }
    }

    /// Where the log is cut: behind what the checkpoint holds, but not more than needed (C1).
    fn choose_cut(&self) -> u64 {
        let mut cut = self.log.durable;
        if self.cut_all {
            return cut;
        }
        let blocks_max = u64::from(self.log.ring.1) / 4;
        let extents_max = (u64::from(self.superblock.data.1) / 64).max(1024);
        let (mut entries, mut extents) = (0, 0);
        for record in self.log.records.iter().rev() {
            if record.position >= self.log.durable {
                continue;
            }
            entries += u64::from(record.entries);
            extents += record.extent_blocks;
            let blocks = self.log.durable - record.position;
            if blocks > blocks_max || entries > RETAINED_ENTRIES_MAX || extents > extents_max {
                break;
            }
            cut = record.position;
        }
        cut.max(self.log.start)
    }

    fn freeze(&mut self) {
        let cut = self.choose_cut();
        self.cut_all = false;
        self.changed = false;
        let below = self.log.records.iter().rev().find(|record| record.position < cut);
        let previous = below.map_or(self.log_before_start, |record| (record.position, record.crc));
        let volumes: Vec<VolumeId> = self.replicas.keys().copied().collect();
        let replicas = volumes.into_iter().map(|volume| self.freeze_replica(volume, cut)).collect();
        let mut put = Put::default();
        put.u64(self.next_number);
        put.u64(self.leaves.next_id);
        encode_tombstones(&mut put, &self.tombstones);
        let copies = self.alloc.away().into();
        self.alloc.age();
        let mut checkpoint = Checkpoint {
            sequence: self.checkpoint_durable + 1,
            frozen: self.log.durable,
            cut,
            previous,
            phase: Phase::Copy,
            copies,
            units: BTreeMap::new(),
            next_unit: 0,
            ready: Vec::new(),
            leaves: VecDeque::new(),
            head_bytes: put.0,
            replicas,
            writes: VecDeque::new(),
            writes_in_flight: 0,
            root: None,
        };
        let mut seen = BTreeSet::new();
        let mut leaves = VecDeque::new();
        // Views are not in the root, but what they alone hold would be counted as dirty for ever.
        let views = self.views.values().flat_map(crate::view::Frozen::maps);
        for map in checkpoint.maps().chain(views) {
            for (index, chunk) in map.chunks.iter().enumerate() {
                if let Chunk::Leaf { leaf, .. } = chunk
                    && !self.leaves.places.contains_key(&leaf.id)
                    && seen.insert(leaf.id)
                {
                    leaves.push_back((Arc::clone(leaf), index as u32));
                }
            }
        }
        checkpoint.leaves = leaves;
        self.checkpoint = Some(checkpoint);
        #[cfg(feature = "canary")]
        self.break_freeze(cut);
    }

    #[cfg(feature = "canary")]
    fn break_freeze(&mut self, cut: u64) {
        match self.options.canary {
            Some(crate::options::Canary::ReuseFreedEarly) => self.alloc.free_early(),
            Some(crate::options::Canary::CutEarly) => self.cut_log(cut),
            _ => {}
        }
    }

    fn freeze_replica(&mut self, volume: VolumeId, cut: u64) -> Frozen {
        let replica = self.replicas.get_mut(&volume).expect("one of the keys");
        let applied = replica.applied.lsn;
        let mut carried = Vec::new();
        for entry in &mut replica.entries {
            if entry.header.place.lsn <= applied || entry.position >= cut {
                continue;
            }
            if let Payload::Ring(ring) = entry.payload {
                let count = entry.crcs.len() as u32;
                entry.payload = Payload::Extents(take_reserved(&mut self.alloc, count, ring));
            }
            carried.push(entry.carried());
        }
        Frozen {
            number: replica.number,
            volume,
            replica: replica.replica,
            name: replica.name.clone(),
            size_blocks: replica.size_blocks,
            promise: replica.promise.clone(),
            incomplete: replica.incomplete,
            applied: replica.applied,
            durable: replica.durable,
            carried,
            head: replica.head.clone(),
            snapshots: replica.snapshots.clone(),
        }
    }

    /// Reads the next spans of the ring.
    fn pump_copies(&mut self, now: &mut Checkpoint) {
        for (unit, buf) in std::mem::take(&mut now.ready) {
            self.write_copies(now, unit, buf);
        }
        while now.units.len() < COPIES_IN_FLIGHT_MAX {
            let Some((first, _)) = now.copies.front().copied() else {
                return;
            };
            let mut end = first;
            let mut count = 0;
            for (ring, _) in &now.copies {
                if *ring > end + COPY_GAP_BLOCKS || *ring >= first + COPY_SPAN_BLOCKS {
                    break;
                }
                end = ring + 1;
                count += 1;
            }
            let Some(into) = self.options.arena.take((end - first) as usize) else {
                return;
            };
            let pairs = now.copies.drain(..count).collect();
            let unit = now.next_unit;
            now.next_unit += 1;
            now.units.insert(unit, Unit { pairs, writes_left: 0 });
            let offset = u64::from(first) * BLOCK_BYTES as u64;
            self.submit(OpKind::CopyRead { unit }, DiskOp::Read { offset, into });
        }
    }

    pub(crate) fn on_copy_read(&mut self, unit: u64, buf: Buf) {
        let now = self.checkpoint.as_mut().expect("a checkpoint in progress");
        now.ready.push((unit, buf));
    }

    /// Writes what is still wanted of a span, neighbours together.
    fn write_copies(&mut self, now: &mut Checkpoint, id: u64, span: Buf) {
        let unit = now.units.get_mut(&id).expect("a unit in progress");
        let first = unit.pairs[0].0;
        let mut wanted: Vec<(u32, u32)> = Vec::with_capacity(unit.pairs.len());
        for (ring, block) in &unit.pairs {
            if self.alloc.location(*block) == *ring {
                wanted.push((*block, *ring));
            }
        }
        wanted.sort_unstable();
        let mut bufs = Vec::new();
        for group in wanted.chunk_by(|a, b| a.0 + 1 == b.0) {
            let Some(mut buf) = self.options.arena.take(group.len()) else {
                now.ready.push((id, span));
                return;
            };
            for ((_, ring), into) in group.iter().zip(buf.chunks_mut(BLOCK_BYTES)) {
                let at = (ring - first) as usize * BLOCK_BYTES;
                into.copy_from_slice(&span[at..at + BLOCK_BYTES]);
            }
            bufs.push((group[0].0, buf));
        }
        unit.writes_left = bufs.len();
        if bufs.is_empty() {
            now.units.remove(&id);
        }
        for (block, data) in bufs {
            let offset = u64::from(block) * BLOCK_BYTES as u64;
            let op = DiskOp::Write { offset, data, fua: false };
            self.submit(OpKind::CopyWrite { unit: id }, op);
        }
    }

    pub(crate) fn on_copy_written(&mut self, id: u64) {
        let now = self.checkpoint.as_mut().expect("a checkpoint in progress");
        let unit = now.units.get_mut(&id).expect("a unit in progress");
        unit.writes_left -= 1;
        if unit.writes_left == 0 {
            let unit = now.units.remove(&id).expect("looked at");
            for (ring, block) in unit.pairs {
                self.alloc.set_home(block, ring);
            }
        }
    }

    fn pump_leaves(&mut self, now: &mut Checkpoint) {
        for _ in 0..LEAVES_PER_STEP_MAX {
            if now.writes.len() >= WRITES_IN_FLIGHT_MAX {
                return;
            }
            let Some((leaf, chunk)) = now.leaves.pop_front() else {
                return;
            };
            let store = self.superblock.store;
            let bytes =
                LeafImage { store, id: leaf.id, chunk, blocks: leaf.blocks.clone() }.encode();
            let count = (bytes.len() / BLOCK_BYTES) as u32;
            let runs = self.alloc.take(count).expect("kept back for metadata");
            let mut from = 0;
            for run in &runs {
                let to = from + run.1 as usize * BLOCK_BYTES;
                now.writes.push_back((run.0, bytes[from..to].to_vec()));
                from = to;
            }
            let crc = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
            self.leaves.places.insert(leaf.id, LeafPlace { runs, crc });
            self.leaves.release(leaf, &mut self.alloc);
        }
    }

    fn pump_writes(&mut self, now: &mut Checkpoint) {
        while now.writes_in_flight < WRITES_IN_FLIGHT_MAX {
            let Some((block, bytes)) = now.writes.front() else {
                return;
            };
            let Some(mut data) = self.options.arena.take(bytes.len() / BLOCK_BYTES) else {
                return;
            };
            data.copy_from_slice(bytes);
            let offset = u64::from(*block) * BLOCK_BYTES as u64;
            now.writes.pop_front();
            now.writes_in_flight += 1;
            self.submit(OpKind::Checkpoint, DiskOp::Write { offset, data, fua: false });
        }
    }

    fn write_root(&mut self, now: &mut Checkpoint) {
        let mut put = Put(std::mem::take(&mut now.head_bytes));
        put.u32(now.replicas.len() as u32);
        for replica in &now.replicas {
            replica.encode(&mut put, &self.leaves.places);
        }
        let stream = put.0;
        let store = self.superblock.store;
        let sequence = now.sequence;
        let count = stream.len().div_ceil(ROOT_PAYLOAD_BYTES) as u32;
        let runs = self.alloc.take(count).expect("kept back for metadata");
        let blocks: Vec<u32> = runs.iter().flat_map(|run| run.0..run.0 + run.1).collect();
        for (index, payload) in stream.chunks(ROOT_PAYLOAD_BYTES).enumerate() {
            let next = blocks.get(index + 1).copied().unwrap_or(0);
            let (payload, position) = (payload.to_vec(), index as u32);
            let block = RootBlock { store, sequence, index: position, next, payload }.encode();
            match now.writes.back_mut() {
                Some((first, bytes))
                    if *first as usize + bytes.len() / BLOCK_BYTES == blocks[index] as usize
                        && bytes.len() < COPY_SPAN_BLOCKS as usize * BLOCK_BYTES =>
                {
                    bytes.extend_from_slice(&*block);
                }
                _ => now.writes.push_back((blocks[index], block.to_vec())),
            }
        }
        let slot = Slot {
            store,
            sequence,
            log_start: now.cut,
            previous: now.previous.0,
            previous_crc: now.previous.1,
            frozen: now.frozen,
            root: blocks[0],
            root_blocks: count,
            root_bytes: stream.len() as u64,
            root_crc: crc32c(&stream),
        };
        now.root = Some((runs, u64::from(count), slot));
    }

    /// A write, the flush or the slot of the checkpoint has completed.
    pub(crate) fn on_checkpoint_io(&mut self) {
        let mut now = self.checkpoint.take().expect("a checkpoint in progress");
        now.writes_in_flight -= 1;
        match now.phase {
            Phase::Flush => {
                let slot = now.root.as_ref().expect("written before").2;
                let index = (now.sequence % 2) as usize;
                if let Some(mut data) = self.options.arena.take(1) {
                    data.copy_from_slice(&*slot.encode());
                    now.phase = Phase::Slot;
                    now.writes_in_flight = 1;
                    let offset = u64::from(SLOT_BLOCKS[index]) * BLOCK_BYTES as u64;
                    self.submit(OpKind::Checkpoint, DiskOp::Write { offset, data, fua: true });
                } else {
                    // No buffer now: the step behind the flush is taken again.
                    now.phase = Phase::Root;
                }
            }
            Phase::Slot => {
                now.phase = Phase::Confirm;
                self.checkpoint_durable = now.sequence;
                self.log.record_wanted = true;
            }
            _ => {}
        }
        self.checkpoint = Some(now);
    }

    /// A record that names this checkpoint is durable.
    pub(crate) fn on_checkpoint_confirmed(&mut self, sequence: u64) {
        if self
            .checkpoint
            .as_ref()
            .is_none_or(|now| now.phase != Phase::Confirm || now.sequence > sequence)
        {
            return;
        }
        let now = self.checkpoint.take().expect("looked at");
        self.cut_log(now.cut);
        self.log_before_start = now.previous;
        self.alloc.free_aged();
        self.settled(now.sequence);
        let (runs, blocks, _) = now.root.expect("written before");
        let old = std::mem::replace(&mut self.root_runs, runs);
        self.root_blocks = blocks;
        self.alloc.release_runs(&old);
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        for replica in now.replicas {
            replica.head.release(&mut space);
            for snapshot in replica.snapshots {
                snapshot.map.release(&mut space);
            }
        }
        for volume in std::mem::take(&mut self.turned_away) {
            if let Some(place) = self.replicas.get(&volume).map(|replica| replica.durable) {
                self.say_durable(volume, place);
            }
        }
    }

    /// Forgets records below the cut, and entries of them that are applied.
    pub(crate) fn cut_log(&mut self, cut: u64) {
        self.log.start = cut;
        while self.log.records.front().is_some_and(|record| record.position < cut) {
            self.log.records.pop_front();
        }
        for replica in self.replicas.values_mut() {
            let applied = replica.applied.lsn;
            while let Some(entry) = replica.entries.front()
                && entry.position < cut
                && entry.header.place.lsn <= applied
            {
                let entry = replica.entries.pop_front().expect("looked at");
                self.log.entries -= 1;
                if let Payload::Extents(runs) = &entry.payload {
                    self.alloc.release_runs(runs);
                }
            }
        }
    }
}

const _: () = assert!(CHUNK_BLOCKS * 28 + 64 <= 8 * BLOCK_BYTES, "a leaf has at most 8 blocks");
