//! Metadata checkpoints, in bounded steps beside everything else.
//!
//! 1. *Freeze*: what every record below `frozen` (the mark) did is what the checkpoint holds. Maps
//!    are frozen by one more holder of each. Entries not applied yet below the cut are carried.
//! 2. *Copy*: small payloads that the frozen maps name go from the ring to their blocks, in the
//!    ring's order.
//! 3. *Leaves* that changed (`merge`), and the *root* that names all (`root`), go to fresh blocks.
//! 4. *Flush*, then the *slot* with FUA: now the checkpoint is durable.
//! 5. *Confirm*: a record that names it. Only when that is durable the log is cut and freed space
//!    used again (rule W8): so nobody can ever take an older checkpoint for the newest, because a
//!    record that knows better is there before anything of the older one is overwritten.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tercet_proto::disk::{CHUNK_BLOCKS, Put, Run, Slot};
use tercet_proto::{BLOCK_BYTES, VolumeId};

use crate::arena::Buf;
use crate::changes::take_reserved;
use crate::disk::DiskOp;
use crate::layout::SLOT_BLOCKS;
use crate::leaf::LeafNo;
use crate::map::{Map, Space};
use crate::replica::Payload;
use crate::root::{Frozen, encode_tombstones};
use crate::store::{OpKind, Store};

/// Entries that the log retains after a checkpoint at most: what is replayed in half a second.
const RETAINED_ENTRIES_MAX: u64 = 50_000;
/// Entries in the log that bring about a checkpoint.
const ENTRIES_MAX: u64 = 80_000;
/// Blocks of the ring read at once to be copied home.
const COPY_SPAN_BLOCKS: u32 = 64;
/// Blocks of others in between that are read along.
const COPY_GAP_BLOCKS: u32 = 4;
const COPIES_IN_FLIGHT_MAX: usize = 4;
pub(crate) const WRITES_IN_FLIGHT_MAX: usize = 16;
/// Changed blocks in memory that bring about a checkpoint: 16 MiB of patches.
const PATCHED_BLOCKS_MAX: u64 = 1 << 19;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Copy,
    Leaves,
    Root,
    Flush,
    Slot,
    Confirm,
}

#[derive(Debug)]
struct Unit {
    /// (ring, block), in the ring's order.
    pairs: Vec<(u32, u32)>,
    writes_left: usize,
}

/// A write of leaves or root that is to be sent.
#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) first: u32,
    pub(crate) bytes: Vec<u8>,
    /// The leaf that is pinned until it is done.
    pub(crate) leaf: Option<LeafNo>,
}

/// A checkpoint being made.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) sequence: u64,
    pub(crate) frozen: u64,
    pub(crate) cut: u64,
    pub(crate) previous: (u64, u32),
    phase: Phase,
    copies: VecDeque<(u32, u32)>,
    units: BTreeMap<u64, Unit>,
    next_unit: u64,
    ready: Vec<(u64, Buf)>,
    /// Leaves that are still to be written, held; each behind its base.
    pub(crate) leaves: VecDeque<LeafNo>,
    /// Bases that were read for them, pinned.
    pub(crate) bases: BTreeSet<LeafNo>,
    pub(crate) head_bytes: Vec<u8>,
    pub(crate) replicas: Vec<Frozen>,
    pub(crate) writes: VecDeque<Write>,
    writes_in_flight: usize,
    pub(crate) root: Option<(Vec<Run>, u64, Slot)>,
}

impl Checkpoint {
    pub(crate) fn maps(&self) -> impl Iterator<Item = &Map> {
        self.replicas.iter().flat_map(Frozen::maps)
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

impl Store {
    fn checkpoint_due(&self) -> bool {
        let reserve = u64::from(self.superblock.data.1) / 32;
        self.checkpoint_wanted
            || self.log.used() > self.log.due_blocks()
            || self.log.entries > ENTRIES_MAX
            || self.leaves.dirty() * 8 > reserve / 2
            || self.leaves.patched > PATCHED_BLOCKS_MAX
            || self.alloc.pending() + self.leaves.patched > u64::from(self.superblock.data.1) / 8
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
        let checkpoint = Checkpoint {
            sequence: self.checkpoint_durable + 1,
            frozen: self.log.durable,
            cut,
            previous,
            phase: Phase::Copy,
            copies,
            units: BTreeMap::new(),
            next_unit: 0,
            ready: Vec::new(),
            leaves: self.leaves.dirty_in_order().into(),
            bases: BTreeSet::new(),
            head_bytes: put.0,
            replicas,
            writes: VecDeque::new(),
            writes_in_flight: 0,
            root: None,
        };
        checkpoint.leaves.iter().for_each(|no| self.leaves.hold(*no));
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

    /// A write of a leaf has completed: it can be read from the device.
    pub(crate) fn on_leaf_written(&mut self, no: LeafNo) {
        self.leaves.unpin(no, &mut self.alloc);
        self.on_checkpoint_io();
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
            let op = DiskOp::Write { offset, data: data.into(), fua: false };
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

    fn pump_writes(&mut self, now: &mut Checkpoint) {
        while now.writes_in_flight < WRITES_IN_FLIGHT_MAX {
            let Some(Write { first, bytes, leaf }) = now.writes.front() else {
                return;
            };
            let Some(mut data) = self.options.arena.take(bytes.len() / BLOCK_BYTES) else {
                return;
            };
            data.copy_from_slice(bytes);
            let offset = u64::from(*first) * BLOCK_BYTES as u64;
            let kind = leaf.map_or(OpKind::Checkpoint, |no| OpKind::LeafWrite { no });
            now.writes.pop_front();
            now.writes_in_flight += 1;
            self.submit(kind, DiskOp::Write { offset, data: data.into(), fua: false });
        }
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
                    self.submit(
                        OpKind::Checkpoint,
                        DiskOp::Write { offset, data: data.into(), fua: true },
                    );
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
