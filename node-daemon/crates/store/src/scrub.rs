//! Scrub (rule C4): every block that a map names is read and compared with its checksum, in the
//! background, again and again.
//!
//! A pass walks the volumes in the order of their ids, of each the newest state and then its
//! snapshots, newest first; what a map shares with one that was walked before is not read again. It
//! goes in steps of at most 256 KiB, one at a time, and waits between them so that it keeps to its
//! pace, which is lower while hosts do I/O. Where it is is kept in memory: a start begins a pass
//! anew. What is found bad, here or by any other read, is told to the owner; a log record or a leaf
//! is none of it: those are read at the start, which has its own answer to damage (rule R1). A step
//! that lacks a leaf waits for it (`task`); what cannot be told for a bad leaf is passed over.
//!
//! The walk touches maps in two places only: [`Store::next_chunk`] and [`Store::scrub_parts`].

use std::collections::BTreeSet;
use std::time::Duration;

use tercet_proto::disk::CHUNK_BLOCKS;
use tercet_proto::storage::StorageEvent;
use tercet_proto::{BLOCK_BYTES, BlockVersion, Instant, Lsn, VolumeId};

use crate::leaf::LeafNo;
use crate::map::{Map, split};
use crate::read::{Part, Parts};
use crate::replica::Replica;
use crate::store::Store;
use crate::task::Task;

/// Blocks of one step.
const STEP_BLOCKS_MAX: usize = 64;
/// Chunks that one step looks at, so that a walk over holes does not hold up anything.
const STEP_CHUNKS_MAX: usize = 1024;
/// Pause when the buffers are in use.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// A start is left alone for so long, unless passes follow each other more closely.
const START_PAUSE: Duration = Duration::from_secs(10);
/// Bad blocks that are remembered by name; more are found again.
const BAD_MAX: usize = 1 << 16;

/// How quickly a store is scrubbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubPace {
    /// Bytes in a second while no host does I/O.
    pub idle_bytes_per_s: u64,
    /// Bytes in a second otherwise.
    pub busy_bytes_per_s: u64,
    /// From the begin of one pass to the begin of the next, if it is done by then.
    pub every: Duration,
}

impl Default for ScrubPace {
    /// A TiB in 18 hours, once a week.
    fn default() -> Self {
        Self {
            idle_bytes_per_s: 16 << 20,
            busy_bytes_per_s: 2 << 20,
            every: Duration::from_hours(168),
        }
    }
}

/// How far scrubbing is, and what was found; counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// Passes that went over everything.
    pub passes: u64,
    /// When the last of them ended.
    pub last_pass: Option<Instant>,
    /// When the pass that is going on began.
    pub pass_began: Option<Instant>,
    /// Blocks that it has read.
    pub pass_blocks: u64,
    /// Blocks that all passes have read.
    pub checked_blocks: u64,
    /// Bad blocks found, by scrub or any other read; each once until it is repaired or given up.
    pub bad_blocks: u64,
    /// Bad blocks that are repaired.
    pub repaired_blocks: u64,
    /// Bad blocks that are still there.
    pub bad_blocks_now: u64,
    /// Bad blocks that the last whole pass met.
    pub last_pass_bad_blocks: u64,
}

/// A map of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Head,
    /// The snapshot of this entry.
    Snapshot(Lsn),
}

/// What is read next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    volume: VolumeId,
    which: Which,
    block: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Scrub {
    /// Where the pass is; none between two.
    position: Option<Position>,
    /// A step is being read: so many blocks.
    reading: Option<u64>,
    next_at: Option<Instant>,
    /// A host did I/O since the last step.
    pub(crate) host_io: bool,
    /// Bad blocks that the pass has met.
    pass_bad: u64,
    status: ScrubStatus,
    /// Blocks of the data area that are known to be bad.
    bad: BTreeSet<u32>,
}

impl Scrub {
    pub(crate) fn knows_bad_blocks(&self) -> bool {
        !self.bad.is_empty()
    }

    pub(crate) fn repaired(&mut self, device: u32) {
        self.bad.remove(&device);
        self.status.repaired_blocks += 1;
    }
}

/// The map that a position is in, the next newer one, and where the next part begins.
struct Place<'a> {
    map: &'a Map,
    newer: Option<&'a Map>,
    next: Option<Which>,
}

/// Newest first, behind the volume itself.
fn place_of(replica: &Replica, which: Which) -> Option<Place<'_>> {
    let snapshots = &replica.snapshots;
    let lsn = |index: usize| snapshots[index].state.place.lsn;
    let index = match which {
        Which::Head => None,
        Which::Snapshot(at) => Some(snapshots.iter().position(|one| one.state.place.lsn == at)?),
    };
    let older = index.unwrap_or(snapshots.len()).checked_sub(1);
    let newer = index.map(|index| match snapshots.get(index + 1) {
        Some(snapshot) => &snapshot.map,
        None => &replica.head,
    });
    let map = index.map_or(&replica.head, |index| &snapshots[index].map);
    Some(Place { map, newer, next: older.map(|older| Which::Snapshot(lsn(older))) })
}

impl Store {
    /// How far scrubbing is, and what was found.
    pub fn scrub_status(&self) -> ScrubStatus {
        let held = |device: &&u32| self.alloc.holders(**device) > 0;
        let bad_blocks_now = self.scrub.bad.iter().filter(held).count() as u64;
        ScrubStatus { bad_blocks_now, ..self.scrub.status }
    }

    /// Where on the device the bytes of a block of a volume are, in 4 KiB from its start. None where
    /// it is a hole, its bytes are still in the log, or its leaf is not at hand.
    pub fn place_of(&self, volume: VolumeId, block: u64) -> Option<u64> {
        let device = self.look_up(&self.replicas.get(&volume)?.head, block).ok()?.device;
        (device != 0 && self.alloc.location(device) == device).then_some(u64::from(device))
    }

    /// The entry that changed a block of a volume last, where that is at hand.
    pub fn stamp_of(&self, volume: VolumeId, block: u64) -> Option<tercet_proto::Place> {
        Some(self.look_up(&self.replicas.get(&volume)?.head, block).ok()?.stamp)
    }

    /// When the next step is due.
    pub(crate) fn scrub_deadline(&self) -> Option<Instant> {
        self.options.scrub?;
        let idle = self.scrub.reading.is_none();
        idle.then(|| self.scrub.next_at.unwrap_or_default())
    }

    /// The next step, if it is due.
    pub(crate) fn tick_scrub(&mut self, now: Instant) {
        let (Some(pace), Some(at)) = (self.options.scrub, self.scrub_deadline()) else { return };
        if self.scrub.next_at.is_none() {
            self.scrub.next_at = Some(now + START_PAUSE.min(pace.every));
            return;
        }
        if at > now || self.failed.is_some() {
            return;
        }
        if self.scrub.position.is_none() {
            self.scrub.status.pass_began = Some(now);
            self.scrub.status.pass_blocks = 0;
            self.scrub.pass_bad = 0;
            let first = self.replicas.keys().next();
            let position =
                first.map(|first| Position { volume: *first, which: Which::Head, block: 0 });
            self.scrub.position = position;
        }
        let blocks = self.scrub_step(now);
        let busy = std::mem::take(&mut self.scrub.host_io);
        let bytes_per_s = if busy { pace.busy_bytes_per_s } else { pace.idle_bytes_per_s };
        let bytes = blocks * BLOCK_BYTES as u64;
        let pause = Duration::from_micros(bytes * 1_000_000 / bytes_per_s.max(1));
        let next = now + pause.max(Duration::from_millis(1));
        if self.scrub.position.is_some() {
            self.scrub.next_at = Some(self.scrub.next_at.unwrap_or_default().max(next));
        } else {
            self.end_pass(next, pace);
        }
    }

    fn end_pass(&mut self, now: Instant, pace: ScrubPace) {
        let status = &mut self.scrub.status;
        let began = status.pass_began.take().unwrap_or(now);
        self.scrub.next_at = Some(now.max(began + pace.every));
        // The last step is still being read: its end is the pass's.
        if self.scrub.reading.is_none() {
            self.pass_ended(now);
        }
    }

    fn pass_ended(&mut self, now: Instant) {
        self.scrub.status.passes += 1;
        self.scrub.status.last_pass_bad_blocks = self.scrub.pass_bad;
        self.scrub.status.last_pass = Some(now);
    }

    /// Sends a step on its way, and moves on. Blocks that it reads.
    fn scrub_step(&mut self, now: Instant) -> u64 {
        let Some(position) = self.scrub.position else { return 0 };
        let (found, looked_to) = self.next_chunk(position);
        let Some(found) = found else {
            self.scrub.position = looked_to;
            return 0;
        };
        self.scrub.position = Some(found);
        self.scrub.reading = Some(0);
        self.scrub.next_at = Some(now);
        self.run_task(Task::Scrub);
        match self.scrub.reading {
            Some(0) => STEP_BLOCKS_MAX as u64, // not known yet
            reading => reading.unwrap_or_default(),
        }
    }

    /// Reads the next blocks, or lacks a leaf for it.
    pub(crate) fn scrub_now(&mut self) -> Result<(), LeafNo> {
        let gone = |position: &Position| {
            let replica = self.replicas.get(&position.volume);
            replica.and_then(|replica| place_of(replica, position.which)).is_none()
        };
        let Some(found) = self.scrub.position.filter(|position| !gone(position)) else {
            self.scrub.reading = None; // the next step finds what there is
            return Ok(());
        };
        let (parts, blocks, next) = self.scrub_parts(found)?;
        self.scrub.reading = None;
        if blocks == 0 {
            self.scrub.position = Some(next);
        } else if self.start_scrub(found.volume, parts) {
            self.scrub.position = Some(next);
            self.scrub.reading = Some(blocks);
        } else {
            self.scrub.next_at = Some(self.time() + BUSY_PAUSE);
        }
        Ok(())
    }

    /// A step cannot be done: later, or never.
    pub(crate) fn skip_scrub(&mut self, busy: bool) {
        self.scrub.reading = None;
        self.scrub.next_at = Some(self.time() + BUSY_PAUSE);
        if let Some(position) = &mut self.scrub.position
            && !busy
        {
            let chunk = position.block / CHUNK_BLOCKS as u64;
            position.block = (chunk + 1) * CHUNK_BLOCKS as u64;
        }
    }

    /// A step has been read.
    pub(crate) fn on_scrubbed(&mut self) {
        let blocks = self.scrub.reading.take().expect("a step was under way");
        self.scrub.status.checked_blocks += blocks;
        self.scrub.status.pass_blocks += blocks;
        if self.scrub.position.is_none() {
            self.pass_ended(self.time());
        }
    }

    /// The first chunk from here on that is to be read, or where to look on; neither: the pass is
    /// over.
    fn next_chunk(&self, from: Position) -> (Option<Position>, Option<Position>) {
        let mut at = from;
        let mut looked_at = 0;
        loop {
            let replica = self.replicas.get(&at.volume);
            let Some(place) = replica.and_then(|replica| place_of(replica, at.which)) else {
                match self.skip(at) {
                    Some(next) => at = next,
                    None => return (None, None),
                }
                continue;
            };
            let first = (at.block / CHUNK_BLOCKS as u64) as usize;
            for chunk in first..place.map.len() {
                let block = (chunk * CHUNK_BLOCKS) as u64;
                let here = Position { block: block.max(at.block), ..at };
                if self.is_to_be_read(at.volume, &place, chunk) {
                    return (Some(here), None);
                }
                looked_at += 1;
                if looked_at == STEP_CHUNKS_MAX {
                    return (None, Some(Position { block: block + CHUNK_BLOCKS as u64, ..at }));
                }
            }
            let next = match place.next {
                Some(which) => Some(Position { which, block: 0, ..at }),
                None => self.next_volume(at.volume),
            };
            match next {
                Some(next) => at = next,
                None => return (None, None),
            }
        }
    }

    /// What was to be read is gone: a volume, or a snapshot; the next older one is begun.
    fn skip(&self, gone: Position) -> Option<Position> {
        let Which::Snapshot(lsn) = gone.which else { return self.next_volume(gone.volume) };
        let snapshots = self.replicas.get(&gone.volume).map(|replica| &replica.snapshots);
        let older = snapshots.and_then(|all| all.iter().rev().find(|s| s.state.place.lsn < lsn));
        match older {
            Some(older) => {
                let which = Which::Snapshot(older.state.place.lsn);
                Some(Position { which, block: 0, ..gone })
            }
            None => self.next_volume(gone.volume),
        }
    }

    fn next_volume(&self, volume: VolumeId) -> Option<Position> {
        let behind = (std::ops::Bound::Excluded(volume), std::ops::Bound::Unbounded);
        let next = self.replicas.range(behind).next();
        next.map(|(volume, _)| Position { volume: *volume, which: Which::Head, block: 0 })
    }

    /// A leaf that no map shares which was walked before in this pass: the next newer one of the
    /// volume (history shares without a gap), or one of a volume with a smaller id (clones).
    fn is_to_be_read(&self, volume: VolumeId, place: &Place<'_>, chunk: usize) -> bool {
        let Some(no) = place.map.chunk(chunk).leaf() else { return false };
        let same = |map: &Map| map.chunk(chunk).leaf() == Some(no);
        let mut before = self.replicas.range(..volume).map(|(_, replica)| replica);
        !place.newer.is_some_and(same)
            && !before.any(|replica| {
                let snapshots = replica.snapshots.iter().map(|snapshot| &snapshot.map);
                snapshots.chain([&replica.head]).any(same)
            })
    }

    /// The next blocks of a chunk: their parts, how many they are, and where to go on.
    fn scrub_parts(&self, at: Position) -> Result<(Vec<Part>, u64, Position), LeafNo> {
        let place = place_of(&self.replicas[&at.volume], at.which).expect("found just now");
        let (chunk, first) = split(at.block);
        let rest = (first, CHUNK_BLOCKS);
        let (mut own, mut newer) = (Vec::new(), Vec::new());
        self.leaves.fill(place.map.chunk(chunk), rest, &mut own)?;
        if let Some(map) = place.newer {
            self.leaves.fill(map.chunk(chunk), rest, &mut newer)?;
        }
        let mut parts = Parts::default();
        let (mut block, mut blocks) = (at.block, 0);
        for (index, entry) in own.iter().enumerate() {
            if blocks == STEP_BLOCKS_MAX {
                break;
            }
            let shared = newer.get(index).is_some_and(|newer| newer.device == entry.device);
            if entry.device != 0 && !shared {
                let from = self.alloc.location(entry.device);
                parts.device(from, self.log.is_ring(from), entry.device, block, entry.crc);
                blocks += 1;
            }
            block += 1;
        }
        Ok((parts.parts(), blocks as u64, Position { block, ..at }))
    }

    /// Blocks of a volume were read and compared: what was bad and is not any more is forgotten (its
    /// place was used anew).
    pub(crate) fn blocks_checked(&mut self, bad: &[(u64, u32)], good: &[u32]) {
        self.scrub.pass_bad += bad.len() as u64;
        for device in good {
            self.scrub.bad.remove(device);
        }
        for (_, device) in bad {
            let fresh = self.scrub.bad.len() < BAD_MAX && self.scrub.bad.insert(*device);
            self.scrub.status.bad_blocks += u64::from(fresh);
        }
    }

    /// Tells the bad blocks of a read by their versions; then it may be answered.
    pub(crate) fn tell_bad(
        &mut self,
        volume: VolumeId,
        bad: &[(u64, u32)],
        job: u64,
    ) -> Result<(), LeafNo> {
        let mut versions = Vec::new();
        for (block, device) in bad {
            versions.extend(self.version_at(volume, *block, *device)?);
        }
        let events = versions.into_iter().map(|version| StorageEvent::Bad { volume, version });
        self.events.extend(events);
        self.part_is_over(job);
        Ok(())
    }

    /// The first map of a volume that names this block of the data area there.
    fn version_at(
        &self,
        volume: VolumeId,
        block: u64,
        device: u32,
    ) -> Result<Option<BlockVersion>, LeafNo> {
        let Some(replica) = self.replicas.get(&volume) else { return Ok(None) };
        let snapshots = replica.snapshots.iter().rev();
        let maps = snapshots.map(|snapshot| (Some(snapshot.state.id), &snapshot.map));
        let mut before = None;
        for (snapshot, map) in [(None, &replica.head)].into_iter().chain(maps) {
            let chunk = map.chunk(split(block).0);
            if before.replace(chunk) == Some(chunk) {
                continue; // the same as in the newer one
            }
            let entry = self.look_up(map, block)?;
            if entry.device == device {
                return Ok(Some(BlockVersion { snapshot, block, stamp: entry.stamp }));
            }
        }
        Ok(None)
    }
}
