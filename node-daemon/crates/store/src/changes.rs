//! What changes the state: who may append and whether there is room, entries and replicas as they
//! come and go. The rules on what may be appended when are the protocol's; what is asserted here is
//! what storage itself relies on (W2, W5).

use tercet_proto::disk::{CHUNK_BLOCKS, EntryItem, Item, Location, Run, crc32c};
use tercet_proto::storage::{Incomplete, SnapshotState, StorageError};
use tercet_proto::{BLOCK_BYTES, Entry, EntryKind, Lsn, Token, VolumeId};

use crate::alloc::Alloc;
use crate::log::{Effect, IO_BLOCKS_MAX, RING_MARGIN_BLOCKS, RUN_BLOCKS_MIN};
use crate::map::Space;
use crate::replica::{LogEntry, Payload, QUEUED, Replica, Snapshot, touched_leaves};
use crate::store::{
    ENTRY_BLOCKS_MAX, EXTENT_BLOCKS_MIN, QUEUED_BLOCKS_MAX, Store, TOMBSTONES_MAX, Tombstone,
};

/// Changed blocks in memory at which nothing more is appended until a checkpoint has written them.
const PATCHED_BLOCKS_MAX: u64 = 1 << 21;

impl Store {
    /// Blocks kept back so that a checkpoint, and so deleting, always has room.
    pub(crate) fn metadata_reserve(&self) -> u64 {
        let dirty = self.leaves.dirty() + self.potential_leaves;
        let need = dirty * 8 + 2 * self.root_blocks + 64;
        need.max(u64::from(self.superblock.data.1) / 32)
    }

    /// Whether so many more blocks and leaves may be used. Asks for a checkpoint where that helps.
    pub(crate) fn check_space(&mut self, blocks: u64, leaves: u64) -> Result<(), StorageError> {
        // Writes stop a little earlier than discards, which make room.
        let margin = if blocks > 0 { u64::from(self.superblock.data.1) / 64 } else { 0 };
        let kept = self.metadata_reserve() + leaves * 8 + self.alloc.reserved + margin;
        let free = self.alloc.free().saturating_sub(kept);
        if blocks <= free && (leaves == 0 || self.alloc.free() >= kept) {
            return Ok(());
        }
        let pinned: u64 = self.log.records.iter().map(|record| record.extent_blocks).sum();
        // What a checkpoint replaces, and what the dead give up, is free after the next ones.
        let replaced = self.leaves.patched + self.leaves.dead_blocks;
        let coming = self.alloc.pending().saturating_sub(2 * self.root_blocks) + pinned + replaced;
        if coming > 0 || self.checkpoint.is_some() || blocks == 0 {
            self.cut_all = true;
            self.checkpoint_wanted = true;
            if self.alloc.free() + coming >= kept + blocks {
                return Err(StorageError::Busy);
            }
        }
        let block = BLOCK_BYTES as u64;
        Err(StorageError::NoSpace { needed_bytes: blocks * block, free_bytes: free * block })
    }

    pub(crate) fn live_replica(&self, volume: VolumeId) -> Result<&Replica, StorageError> {
        self.alive()?;
        let replica = self.replicas.get(&volume).filter(|replica| !replica.deleting);
        replica.ok_or(StorageError::NoReplica(volume))
    }

    /// Everything that may refuse an append, before anything changes.
    pub(crate) fn admit(
        &mut self,
        volume: VolumeId,
        entries: &[Entry],
    ) -> Result<(), StorageError> {
        self.live_replica(volume)?;
        let (mut blocks, mut ring, mut leaves) = (0, 2, 0);
        for entry in entries {
            let payload = (entry.payload.len() / BLOCK_BYTES) as u64;
            blocks += payload;
            leaves += touched_leaves(entry.header.kind);
            ring +=
                1 + if payload < u64::from(EXTENT_BLOCKS_MIN) { payload } else { payload / 512 };
        }
        if !self.log.has_room(ring) {
            // What a checkpoint leaves for others to catch up from may be in the way (C1), and
            // where nothing has changed there would be none: a long append would wait for ever.
            let left = u64::from(self.log.ring.1) / 4 + RING_MARGIN_BLOCKS;
            self.cut_all |= !self.changed || ring + left > u64::from(self.log.ring.1);
            self.checkpoint_wanted = true;
            return Err(StorageError::Busy);
        }
        if self.leaves.patched > PATCHED_BLOCKS_MAX {
            self.checkpoint_wanted = true;
            return Err(StorageError::Busy);
        }
        if self.log.queued_blocks + self.log.queued_extent_blocks > QUEUED_BLOCKS_MAX {
            return Err(StorageError::Busy);
        }
        if blocks == 0 && leaves == 0 {
            return Ok(());
        }
        self.check_space(blocks, leaves)
    }

    pub(crate) fn drop_behind(&mut self, volume: VolumeId, after: Lsn) -> Vec<LogEntry> {
        let replica = self.replicas.get_mut(&volume).expect("admitted");
        let dropped = replica.truncate(after);
        for entry in &dropped {
            self.potential_leaves -= touched_leaves(entry.header.kind);
        }
        self.log.entries -= dropped.len() as u64;
        dropped
    }

    pub(crate) fn append_entry(&mut self, volume: VolumeId, drop_after: Option<Lsn>, entry: Entry) {
        self.scrub.host_io = true;
        let number = self.replicas[&volume].number;
        let header = entry.header;
        assert_eq!(entry.payload.len(), header.payload_bytes(), "a payload is as long as it says");
        let blocks = (entry.payload.len() / BLOCK_BYTES) as u32;
        assert!(blocks <= ENTRY_BLOCKS_MAX, "an entry has at most {ENTRY_BLOCKS_MAX} blocks");
        let crcs: Vec<u32> = entry.payload.chunks(BLOCK_BYTES).map(crc32c).collect();
        let small = blocks < EXTENT_BLOCKS_MIN;
        self.log.make_room(if small { blocks } else { 0 }, 256 + crcs.len() * 12);
        let location = if blocks == 0 {
            Location::None
        } else if small {
            self.alloc.reserved += u64::from(blocks);
            Location::Record(0) // settled when the record is sent
        } else {
            let runs = self.alloc.take_long(blocks, RUN_BLOCKS_MIN);
            let runs = runs.or_else(|| self.alloc.take(blocks)).expect("admitted");
            self.log.push_extents(&runs, &entry.payload);
            Location::Extents(runs)
        };
        let dropped = drop_after.map(|after| self.drop_behind(volume, after));
        let drop_after = if self.forgets_drop() { None } else { drop_after };
        let item =
            Item::Entry { volume, number, drop_after, entry: EntryItem { header, location, crcs } };
        self.log.push_entry(&item, (small && blocks > 0).then(|| entry.payload.clone()));
        let Item::Entry { entry: EntryItem { location, crcs, .. }, .. } = item else {
            unreachable!("made above");
        };
        let payload = match location {
            Location::Extents(runs) => Payload::Extents(runs),
            Location::None | Location::Record(_) => Payload::None,
        };
        let memory = (blocks > 0).then_some(entry.payload);
        let crcs = crcs.into_boxed_slice();
        let replica = self.replicas.get_mut(&volume).expect("admitted");
        assert_eq!(header.prev(), replica.tail, "W2: directly after the tail");
        replica.entries.push_back(LogEntry { header, payload, crcs, memory, position: QUEUED });
        replica.tail = header.place;
        replica.in_flight += 1;
        self.potential_leaves += touched_leaves(header.kind);
        self.log.entries += 1;
        if let Some(entries) = dropped {
            self.log.unsettled += 1;
            self.log.push_effect(Effect::Dropped { entries });
        }
        self.changed = true;
    }

    /// Gives up what entries hold that the log does not retain any more.
    pub(crate) fn release_entries(&mut self, entries: &[LogEntry]) {
        for entry in entries {
            self.alloc.reserved -= entry.reserve_blocks();
            if let Payload::Extents(runs) = &entry.payload {
                self.alloc.release_runs(runs);
            }
        }
    }

    /// Applies what is retained behind `applied`, up to `last`, in order.
    pub(crate) fn apply_up_to(&mut self, volume: VolumeId, last: Lsn) {
        self.changed = true;
        loop {
            let replica = self.replicas.get_mut(&volume).expect("looked at before");
            if replica.applied.lsn >= last {
                return;
            }
            let from = (replica.applied.lsn.next().0 - replica.log_start().0) as usize;
            // Lent to the loop: what is applied changes the replica and not its entries.
            let entries = std::mem::take(&mut replica.entries);
            assert!(from < entries.len(), "entries behind `applied` are retained");
            let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
            let mut kind = EntryKind::Noop;
            for entry in entries.range(from..) {
                apply_entry(replica, entry, &mut space);
                self.potential_leaves -= touched_leaves(entry.header.kind);
                kind = entry.header.kind;
                if replica.applied.lsn == last || matches!(kind, EntryKind::Snapshot { .. }) {
                    break;
                }
            }
            replica.entries = entries;
            self.fill_clones(volume, kind);
        }
    }

    /// As `apply_up_to`, of one entry of a replica that is not in its place.
    pub(crate) fn apply_to(&mut self, replica: &mut Replica, entry: &LogEntry) {
        self.changed = true;
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        apply_entry(replica, entry, &mut space);
        self.potential_leaves -= touched_leaves(entry.header.kind);
    }

    /// A change of a replica is durable.
    pub(crate) fn change_replica(&mut self, effect: Effect) {
        self.changed = true;
        match effect {
            Effect::Create { volume, replica, token } => {
                self.creating.remove(&volume);
                self.log.unsettled -= 1;
                self.replicas.insert(volume, *replica);
                self.done(token, Ok(()));
            }
            Effect::Delete { volume, number, token } => {
                if self.replicas.get(&volume).is_some_and(|found| found.number == number) {
                    self.remove_replica(volume);
                }
                self.done(token, Ok(()));
            }
            Effect::Promise { volume, number, promise, token } => {
                if let Some(replica) = self.replicas.get_mut(&volume)
                    && replica.number == number
                {
                    replica.promise = Some(*promise);
                }
                self.done(token, Ok(()));
            }
            Effect::Incomplete { volume, number, incomplete, token } => {
                if let Some(replica) = self.replicas.get_mut(&volume)
                    && replica.number == number
                {
                    replica.incomplete = incomplete;
                    if !replica.awaits() {
                        self.awaiting.remove(&volume); // a copy fills it (C2)
                    }
                    if incomplete.is_none() {
                        self.fill_clones_of(volume); // they waited for a whole source
                    }
                }
                if let Some(token) = token {
                    self.done(token, Ok(()));
                }
            }
            Effect::Fill { volume, number, map } => self.filled(volume, number, map),
            Effect::Finish { volume, number, place, token } => {
                self.copy_finished((volume, number), place);
                self.done(token, Ok(()));
            }
            Effect::Entry { .. } | Effect::Dropped { .. } => unreachable!("handled by the log"),
        }
    }

    /// Takes a replica away; its tombstone stays (rule M2).
    pub(crate) fn remove_replica(&mut self, volume: VolumeId) {
        let replica = self.replicas.remove(&volume).expect("looked at before");
        self.awaiting.remove(&volume);
        let unapplied =
            replica.entries.iter().filter(|entry| entry.header.place.lsn > replica.applied.lsn);
        for entry in unapplied {
            self.potential_leaves -= touched_leaves(entry.header.kind);
            self.alloc.reserved -= entry.reserve_blocks();
        }
        self.log.entries -= replica.entries.len() as u64;
        for entry in &replica.entries {
            if let Payload::Extents(runs) = &entry.payload {
                self.alloc.release_runs(runs);
            }
        }
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        replica.head.release(&mut space);
        for snapshot in replica.snapshots {
            snapshot.map.release(&mut space);
        }
        let config = replica.promise.map(|promise| promise.config);
        self.bury(Tombstone { volume, replica: replica.replica, config });
    }

    pub(crate) fn bury(&mut self, tombstone: Tombstone) {
        self.tombstones.retain(|old| old.volume != tombstone.volume);
        self.tombstones.push(tombstone);
        if self.tombstones.len() > TOMBSTONES_MAX {
            self.tombstones.remove(0);
        }
    }

    /// A metadata change of a replica goes into the log.
    pub(crate) fn push_change(&mut self, item: &Item, effect: Effect) {
        self.log.make_room(0, 8192);
        self.log.push(item, Some(effect));
    }

    pub(crate) fn push_incomplete(
        &mut self,
        volume: VolumeId,
        incomplete: Option<Incomplete>,
        token: Option<Token>,
    ) {
        let number = self.replicas[&volume].number;
        let item = Item::Incomplete { volume, number, incomplete };
        self.push_change(&item, Effect::Incomplete { volume, number, incomplete, token });
    }

    #[cfg(not(feature = "canary"))]
    #[allow(clippy::unused_self)] // the other build looks at the options
    fn forgets_drop(&self) -> bool {
        false
    }

    #[cfg(feature = "canary")]
    fn forgets_drop(&self) -> bool {
        self.options.canary == Some(crate::options::Canary::ForgetDrop)
    }

    #[cfg(not(feature = "canary"))]
    #[allow(clippy::unused_self)] // the other build looks at the options
    pub(crate) fn skips_flush(&self) -> bool {
        false
    }

    #[cfg(feature = "canary")]
    pub(crate) fn skips_flush(&self) -> bool {
        self.options.canary == Some(crate::options::Canary::SkipFlush)
    }
}

/// The one place where an entry changes a volume (rule W5).
fn apply_entry(replica: &mut Replica, entry: &LogEntry, space: &mut Space<'_>) {
    let stamp = entry.header.place;
    assert_eq!(entry.header.prev(), replica.applied, "W5: in order");
    match entry.header.kind {
        EntryKind::Noop => {}
        EntryKind::Write { range, .. } => {
            assert!(range.end() <= replica.size_blocks, "a write within the volume");
            let taken;
            let runs = match &entry.payload {
                Payload::None => panic!("a durable write has a place"),
                Payload::Extents(runs) => {
                    space.alloc.hold_runs(runs);
                    runs
                }
                Payload::Ring(ring) => {
                    taken = take_reserved(space.alloc, range.count, *ring);
                    &taken
                }
            };
            let devices = runs.iter().flat_map(|run| run.0..run.0 + run.1);
            replica.head.write(range.start, devices, &entry.crcs, stamp, space);
        }
        EntryKind::Zero { range, .. } => {
            assert!(range.end() <= replica.size_blocks, "zeroes within the volume");
            replica.head.zero(range, stamp, space);
        }
        EntryKind::Grow { size_blocks } => {
            replica.size_blocks = replica.size_blocks.max(size_blocks);
            replica.head.grow(replica.size_blocks);
        }
        EntryKind::Snapshot { id } => {
            if replica.snapshots.iter().all(|snapshot| snapshot.state.id != id) {
                let size_blocks = replica.size_blocks;
                let state = SnapshotState { id, place: stamp, size_blocks };
                replica.snapshots.push(Snapshot { state, map: replica.head.clone() });
            }
        }
        EntryKind::SnapshotDelete { id } => {
            let found = replica.snapshots.iter().position(|snap| snap.state.id == id);
            if let Some(index) = found {
                replica.snapshots.remove(index).map.release(space);
            }
        }
    }
    replica.applied = stamp;
}

/// Blocks of the reserve for a payload that is in the ring, to be copied there later.
pub(crate) fn take_reserved(alloc: &mut Alloc, count: u32, ring: u32) -> Vec<Run> {
    alloc.reserved -= u64::from(count);
    let runs = alloc.take(count).expect("reserved when it was appended");
    for (offset, block) in runs.iter().flat_map(|run| run.0..run.0 + run.1).enumerate() {
        alloc.set_away(block, ring + offset as u32);
    }
    runs
}

const _: () = assert!(ENTRY_BLOCKS_MAX as usize <= CHUNK_BLOCKS && IO_BLOCKS_MAX >= 1);
