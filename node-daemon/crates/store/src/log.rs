//! The log ring: what is waiting, what is on its way, what is durable.
//!
//! Changes collect in a batch; a batch becomes one record and goes to the device in one write (rule
//! W3: with FUA; extents of its entries beside it, with FUA too, or, where they are many, all
//! without and a flush behind). While records are on their way the next batch collects: one flush
//! for all that are waiting. Records may complete in any order; they take effect in the ring's.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use tercet_proto::disk::{Item, NAMES_MAX, Name, RecordHeader, Run};
use tercet_proto::storage::Incomplete;
use tercet_proto::{BLOCK_BYTES, Place, Promise, Token, VolumeId};

use crate::arena::Buf;
use crate::batch::{Batch, Small};
use crate::disk::{Data, DiskOp};
use crate::map::Map;
use crate::replica::{LogEntry, Payload, QUEUED, Replica};
use crate::store::{OpKind, Store};

/// Payload of one record.
pub(crate) const RECORD_PAYLOAD_BLOCKS_MAX: u32 = 128;
/// Header area of one record.
pub(crate) const RECORD_HEADER_BLOCKS_MAX: u32 = 16;
/// Ring blocks that no append may use: for promises, deletions, marks, and the rest of a lap.
pub(crate) const RING_MARGIN_BLOCKS: u64 =
    3 * (RECORD_PAYLOAD_BLOCKS_MAX + RECORD_HEADER_BLOCKS_MAX) as u64;
/// Bytes of items after which a batch is closed.
const ITEM_BYTES_MAX: usize = 48 << 10;
/// Largest write of one extent.
pub(crate) const IO_BLOCKS_MAX: u32 = 128;
/// Blocks of extents after which a batch is closed: two writes of 128 KiB, so that what comes in
/// together goes out as several records, and one is on its way while the next is copied.
const BATCH_EXTENT_BLOCKS: u64 = 64;
/// Entries after which a batch may be closed though more have come: where many come in together they
/// go out as two records, so that the device has one while the other is made.
const SHARE_ENTRIES_MIN: u32 = 8;
/// Blocks of small payloads in a record from which on they go to the data area at once, if they find
/// room there in runs that are long enough.
const PLACED_BLOCKS_MIN: u32 = 8;
/// Blocks of a run of the data area that is worth a write of its own.
pub(crate) const RUN_BLOCKS_MIN: u32 = 4;
/// So many extents of a record have FUA each; with more of them one flush behind all is cheaper. A
/// flush is a second way to the device and back, and in `io_uring` a thread of its own.
const FUA_EXTENTS_MAX: usize = 8;

/// What happens when a record is durable.
#[derive(Debug)]
pub(crate) enum Effect {
    Entry {
        volume: VolumeId,
        number: u64,
        place: Place,
    },
    Dropped {
        entries: Vec<LogEntry>,
    },
    Create {
        volume: VolumeId,
        replica: Box<Replica>,
        token: Token,
    },
    Delete {
        volume: VolumeId,
        number: u64,
        token: Token,
    },
    Promise {
        volume: VolumeId,
        number: u64,
        promise: Box<Promise>,
        token: Token,
    },
    Incomplete {
        volume: VolumeId,
        number: u64,
        incomplete: Option<Incomplete>,
        token: Option<Token>,
    },
    Fill {
        volume: VolumeId,
        number: u64,
        map: Map,
    },
    Finish {
        volume: VolumeId,
        number: u64,
        place: Place,
        token: Token,
    },
}

/// How many entries are under way at busy times: the most of the last records, a hundred or so.
#[derive(Debug, Default)]
struct Busy {
    most: u32,
    most_before: u32,
    seen: u32,
}

impl Busy {
    fn saw(&mut self, entries: u32) {
        self.seen = self.seen.wrapping_add(1);
        if self.seen.is_multiple_of(64) {
            self.most_before = std::mem::take(&mut self.most);
        }
        self.most = self.most.max(entries);
    }

    fn entries(&self) -> u32 {
        self.most.max(self.most_before)
    }
}

/// A record on its way.
#[derive(Debug)]
pub(crate) struct Flight {
    id: u64,
    end: u64,
    checkpoint: u64,
    writes_left: usize,
    flush: bool,
    done: bool,
    entries: u32,
    effects: Vec<Effect>,
}

/// A record that the log retains.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordInfo {
    pub(crate) position: u64,
    pub(crate) crc: u32,
    pub(crate) items: u32,
    pub(crate) entries: u32,
    pub(crate) extent_blocks: u64,
}

/// The ring.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) ring: Run,
    /// Nothing below is needed.
    pub(crate) start: u64,
    /// The next record goes here, or to the next lap.
    pub(crate) head: u64,
    /// Everything below is durable: the mark (rule R1).
    pub(crate) durable: u64,
    pub(crate) previous: (u64, u32),
    pub(crate) names: Option<Vec<Name>>,
    pub(crate) collecting: Batch,
    pub(crate) queue: VecDeque<Batch>,
    pub(crate) flying: VecDeque<Flight>,
    pub(crate) records: VecDeque<RecordInfo>,
    /// Retained entries of all volumes.
    pub(crate) entries: u64,
    /// Blocks and bytes of memory of batches that are not on their way yet.
    pub(crate) queued_blocks: u64,
    pub(crate) queued_extent_blocks: u64,
    /// Entries that are appended and not durable.
    waiting_entries: u32,
    busy: Busy,
    next_flight: u64,
    /// The mark in the newest record.
    pub(crate) mark_written: u64,
    /// A record must follow even without changes.
    pub(crate) record_wanted: bool,
    /// Drops and clones that are not durable: no checkpoint may begin.
    pub(crate) unsettled: u32,
    /// Positions that reads in flight need.
    pub(crate) pins: BTreeMap<u64, u32>,
}

impl Log {
    pub(crate) fn new(ring: Run, start: u64, head: u64) -> Self {
        Self {
            ring,
            start,
            head,
            durable: head,
            previous: (u64::MAX, 0),
            names: Some(Vec::new()),
            collecting: Batch::default(),
            queue: VecDeque::new(),
            flying: VecDeque::new(),
            records: VecDeque::new(),
            entries: 0,
            queued_blocks: 0,
            queued_extent_blocks: 0,
            waiting_entries: 0,
            busy: Busy::default(),
            next_flight: 0,
            mark_written: head,
            record_wanted: false,
            unsettled: 0,
            pins: BTreeMap::new(),
        }
    }

    /// Block of the device at a position.
    pub(crate) fn block(&self, position: u64) -> u32 {
        self.ring.0 + (position % u64::from(self.ring.1)) as u32
    }

    pub(crate) fn is_ring(&self, block: u32) -> bool {
        block >= self.ring.0 && block - self.ring.0 < self.ring.1
    }

    /// The newest position below `head` at a block of the ring.
    pub(crate) fn position_of(&self, block: u32) -> u64 {
        let ring = u64::from(self.ring.1);
        let position = self.head / ring * ring + u64::from(block - self.ring.0);
        if position < self.head { position } else { position - ring }
    }

    /// Where a record of so many blocks goes: here, or at the start of the next lap.
    pub(crate) fn place_record(&self, head: u64, blocks: u32) -> u64 {
        let ring = u64::from(self.ring.1);
        let left = ring - head % ring;
        if left >= u64::from(blocks) { head } else { head + left }
    }

    fn floor(&self) -> u64 {
        self.pins.keys().next().map_or(self.start, |pin| self.start.min(*pin))
    }

    pub(crate) fn used(&self) -> u64 {
        self.head - self.start
    }

    /// Blocks in use that bring about a checkpoint: late, so that it finds much that it has not to
    /// write twice; early enough for what is appended while it is made.
    pub(crate) fn due_blocks(&self) -> u64 {
        let ring = u64::from(self.ring.1);
        (ring / 8 * 5).min(ring.saturating_sub(3 * RING_MARGIN_BLOCKS)).max(ring / 2)
    }

    /// Whether an append of so many blocks may queue.
    pub(crate) fn has_room(&self, blocks: u64) -> bool {
        let used = self.head - self.floor() + self.queued_blocks;
        used + blocks + RING_MARGIN_BLOCKS <= u64::from(self.ring.1)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.flying.is_empty() && self.queue.is_empty() && self.collecting.is_empty()
    }

    /// Adds a change.
    pub(crate) fn push(&mut self, item: &Item, effect: Option<Effect>) {
        let before = self.collecting_blocks();
        self.collecting.push(item, effect);
        self.queued_blocks += self.collecting_blocks() - before;
    }

    /// Adds an entry, with its payload where that is a small one.
    pub(crate) fn push_entry(&mut self, item: &Item, payload: Option<Bytes>) {
        let Item::Entry { volume, number, entry, .. } = item else { panic!("an entry") };
        let (volume, number, place) = (*volume, *number, entry.header.place);
        let before = self.collecting_blocks();
        self.collecting.push(item, Some(Effect::Entry { volume, number, place }));
        if let Some(payload) = payload {
            self.collecting.push_small((volume, number, place), payload);
        }
        self.queued_blocks += self.collecting_blocks() - before;
        self.waiting_entries += 1;
    }

    fn collecting_blocks(&self) -> u64 {
        if self.collecting.is_empty() { 0 } else { self.collecting.blocks_max() }
    }

    /// Adds what a large entry writes to the data area.
    pub(crate) fn push_extents(&mut self, runs: &[Run], payload: &Bytes) {
        let before = self.collecting.extent_blocks;
        self.collecting.push_extents(runs, payload);
        self.queued_extent_blocks += self.collecting.extent_blocks - before;
    }

    /// Closes a batch that cannot take so much more, or has its share of what comes in together.
    pub(crate) fn make_room(&mut self, payload_blocks: u32, item_bytes: usize) {
        let batch = &self.collecting;
        if !batch.is_empty()
            && (batch.payload_blocks + payload_blocks > RECORD_PAYLOAD_BLOCKS_MAX
                || batch.item_bytes_max() + item_bytes > ITEM_BYTES_MAX
                || batch.extent_blocks >= BATCH_EXTENT_BLOCKS
                || batch.entries >= self.busy.entries().div_ceil(2).max(SHARE_ENTRIES_MIN))
        {
            self.close();
        }
    }

    fn effects(&self) -> impl Iterator<Item = &Effect> {
        let flying = self.flying.iter().flat_map(|flight| &flight.effects);
        let queued = self.queue.iter().chain([&self.collecting]).flat_map(|batch| &batch.effects);
        flying.chain(queued)
    }

    /// Entries whose drop is not durable yet.
    pub(crate) fn dropped_entries(&self) -> impl Iterator<Item = &LogEntry> {
        self.effects().flat_map(|effect| match effect {
            Effect::Dropped { entries } => entries.as_slice(),
            _ => &[],
        })
    }

    /// Maps that replicas will have once a record is durable.
    pub(crate) fn created_maps(&self) -> impl Iterator<Item = &Map> {
        self.effects().filter_map(|effect| match effect {
            Effect::Create { replica, .. } => Some(&replica.head),
            Effect::Fill { map, .. } => Some(map),
            _ => None,
        })
    }

    /// Adds a change that happens to the batch when it is durable.
    pub(crate) fn push_effect(&mut self, effect: Effect) {
        self.collecting.effects.push(effect);
    }

    fn close(&mut self) {
        let batch = std::mem::take(&mut self.collecting);
        self.queue.push_back(batch);
        self.recount();
    }

    /// The exact need of the queued batches, now that they will not change.
    fn recount(&mut self) {
        let queued = self.queue.iter().map(Batch::blocks_max).sum::<u64>();
        self.queued_blocks = queued + self.collecting_blocks();
    }
}

impl Store {
    /// Sends what is waiting as far as limits allow.
    pub(crate) fn pump_log(&mut self) {
        while self.failed.is_none() && self.log.flying.len() < self.options.records_in_flight_max {
            if self.log.queue.is_empty() {
                if self.log.collecting.is_empty() && !self.log.record_wanted {
                    return;
                }
                self.log.close();
            }
            self.log.busy.saw(self.log.waiting_entries);
            let batch = self.log.queue.pop_front().expect("one was put there");
            if let Err(batch) = self.send(batch) {
                self.log.queue.push_front(*batch);
                return;
            }
            self.log.recount();
        }
    }

    fn send(&mut self, mut batch: Batch) -> Result<(), Box<Batch>> {
        self.place_smalls(&mut batch);
        let items = batch.items();
        let names = self.log.names.as_ref().map_or(0, Vec::len);
        let header_blocks = RecordHeader::header_blocks(names, items.0.len());
        let blocks = header_blocks + batch.payload_blocks;
        let position = self.log.place_record(self.log.head, blocks);
        let end = position + u64::from(blocks);
        if end - self.log.floor() > u64::from(self.log.ring.1) {
            return Err(Box::new(batch));
        }
        let Some((mut record, extents)) = self.buffers(blocks, &batch) else {
            return Err(Box::new(batch));
        };
        let header = RecordHeader {
            store: self.superblock.store,
            instance: self.superblock.instance,
            position,
            mark: self.log.durable,
            checkpoint: self.checkpoint_durable,
            previous: self.log.previous.0,
            previous_crc: self.log.previous.1,
            header_blocks,
            payload_blocks: batch.payload_blocks,
            items: batch.count,
            names: self.log.names.take(),
        };
        let (area, payload) = record.split_at_mut(header_blocks as usize * BLOCK_BYTES);
        let crc = header.encode(&items.0, area);
        for small in batch.smalls.iter().filter(|small| small.runs.is_empty()) {
            let at = small.offset as usize * BLOCK_BYTES;
            payload[at..at + small.payload.len()].copy_from_slice(&small.payload);
        }
        self.settle_positions(&batch, position, header_blocks);
        self.log.records.push_back(RecordInfo {
            position,
            crc,
            items: batch.count,
            entries: batch.entries,
            extent_blocks: batch.extent_blocks,
        });
        let id = self.log.next_flight;
        self.log.next_flight += 1;
        self.log.queued_extent_blocks -= batch.extent_blocks;
        let flush = extents.len() > FUA_EXTENTS_MAX;
        let fua = !flush && !self.skips_flush();
        let writes_left = extents.len() + 1;
        for (block, data) in extents {
            let offset = u64::from(block) * BLOCK_BYTES as u64;
            self.submit(OpKind::Record(id), DiskOp::Write { offset, data, fua });
        }
        let offset = u64::from(self.log.block(position)) * BLOCK_BYTES as u64;
        self.submit(OpKind::Record(id), DiskOp::Write { offset, data: record.into(), fua });
        self.log.flying.push_back(Flight {
            id,
            end,
            checkpoint: self.checkpoint_durable,
            writes_left,
            flush: flush && !self.skips_flush(),
            done: false,
            entries: batch.entries,
            effects: batch.effects,
        });
        self.log.head = end;
        self.log.mark_written = self.log.durable;
        self.log.record_wanted = false;
        self.log.previous = (position, crc);
        self.log.names = name_list(batch.names);
        Ok(())
    }

    /// Small payloads that are many go to blocks of their own in the data area at once, where those
    /// are free in a few runs. What was dropped meanwhile stays in the record.
    fn place_smalls(&mut self, batch: &mut Batch) {
        if batch.payload_blocks < PLACED_BLOCKS_MIN {
            return;
        }
        let (mut indices, mut blocks) = (Vec::with_capacity(batch.smalls.len()), 0);
        for (index, small) in batch.smalls.iter().enumerate() {
            let Small { volume, number, place, .. } = *small;
            if small.runs.is_empty() && self.current_entry(volume, number, place).is_some() {
                indices.push(index);
                blocks += small.blocks();
            }
        }
        if blocks < PLACED_BLOCKS_MIN {
            return;
        }
        let Some(runs) = self.alloc.take_long(blocks, RUN_BLOCKS_MIN) else { return };
        self.alloc.reserved -= u64::from(blocks);
        self.log.queued_extent_blocks += u64::from(blocks);
        batch.place_smalls(&indices, &runs);
        for index in indices {
            let Small { volume, number, place, .. } = batch.smalls[index];
            let entry = self.current_entry(volume, number, place).expect("looked at");
            entry.payload = Payload::Extents(batch.smalls[index].runs.clone());
        }
    }

    /// A buffer for a record of so many blocks, and what goes to each extent: the payload from where
    /// it is if a device takes it from there, else a copy. None: there are no buffers now.
    fn buffers(&self, blocks: u32, batch: &Batch) -> Option<(Buf, Vec<(u32, Data)>)> {
        let arena = &self.options.arena;
        let record = arena.take(blocks as usize)?;
        let mut extents = Vec::with_capacity(batch.extents.len());
        for ((first, count), pieces) in &batch.extents {
            if let [piece] = &pieces[..]
                && let Some(data) = Data::shared(piece)
            {
                extents.push((*first, data));
                continue;
            }
            let mut buf = arena.take(*count as usize)?;
            let mut at = 0;
            for piece in pieces {
                buf[at..at + piece.len()].copy_from_slice(piece);
                at += piece.len();
            }
            extents.push((*first, Data::Own(buf)));
        }
        Some((record, extents))
    }

    /// Tells the entries of a batch where their record and their payload is.
    fn settle_positions(&mut self, batch: &Batch, position: u64, header_blocks: u32) {
        for effect in &batch.effects {
            let Effect::Entry { volume, number, place } = effect else {
                continue;
            };
            if let Some(entry) = self.current_entry(*volume, *number, *place) {
                entry.position = position;
            }
        }
        for small in batch.smalls.iter().filter(|small| small.runs.is_empty()) {
            let at = position + u64::from(header_blocks) + u64::from(small.offset);
            let block = self.log.block(at);
            if let Some(entry) = self.current_entry(small.volume, small.number, small.place) {
                entry.payload = Payload::Ring(block);
            }
        }
    }

    /// The entry at a place, unless it was dropped meanwhile.
    fn current_entry(
        &mut self,
        volume: VolumeId,
        number: u64,
        place: Place,
    ) -> Option<&mut LogEntry> {
        let replica = self.replicas.get_mut(&volume).filter(|found| found.number == number)?;
        replica.entry_mut(place.lsn).filter(|entry| entry.header.place == place)
    }

    /// A write or flush of a record has completed.
    pub(crate) fn on_record_done(&mut self, id: u64) {
        let first = self.log.flying.front().expect("a flight in progress").id;
        let flight = &mut self.log.flying[(id - first) as usize];
        flight.writes_left -= 1;
        if flight.writes_left > 0 {
            return;
        }
        if flight.flush {
            flight.flush = false;
            flight.writes_left = 1;
            self.submit(OpKind::Record(id), DiskOp::Flush);
            return;
        }
        flight.done = true;
        while self.log.flying.front().is_some_and(|flight| flight.done) {
            let flight = self.log.flying.pop_front().expect("looked at");
            self.log.durable = flight.end;
            self.take_effect(flight);
        }
    }

    fn take_effect(&mut self, flight: Flight) {
        self.log.waiting_entries -= flight.entries;
        let mut durable: Vec<VolumeId> = Vec::new();
        for effect in flight.effects {
            match effect {
                Effect::Entry { volume, number, place } => {
                    let Some(replica) = self.replicas.get_mut(&volume) else {
                        continue;
                    };
                    if replica.number != number {
                        continue;
                    }
                    replica.in_flight -= 1;
                    if let Some(entry) = replica.entry_mut(place.lsn)
                        && entry.header.place == place
                    {
                        assert_ne!(entry.position, QUEUED, "a durable entry was written");
                        entry.memory = None;
                        replica.durable = replica.durable.max(place);
                        if durable.last() != Some(&volume) && !durable.contains(&volume) {
                            durable.push(volume);
                        }
                    }
                }
                Effect::Dropped { entries } => {
                    self.log.unsettled -= 1;
                    self.release_entries(&entries);
                }
                other => self.change_replica(other),
            }
        }
        for volume in durable {
            if let Some(place) = self.replicas.get(&volume).map(|replica| replica.durable) {
                self.say_durable(volume, place);
            }
        }
        self.on_checkpoint_confirmed(flight.checkpoint);
    }
}

pub(crate) fn name_list(names: BTreeMap<VolumeId, Place>) -> Option<Vec<Name>> {
    if names.len() > NAMES_MAX {
        return None;
    }
    Some(names.into_iter().map(|(volume, place)| Name { volume, place }).collect())
}
