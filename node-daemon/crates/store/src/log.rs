//! The log ring: what is waiting, what is on its way, what is durable.
//!
//! Changes collect in a batch; a batch becomes one record and goes to the device in one write (rule
//! W3: with FUA; extents of its entries beside it, with FUA too, or, where they are many, all
//! without and a flush behind). While records are on their way the next batch collects: one flush
//! for all that are waiting. Records may complete in any order; they take effect in the ring's.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use tercet_proto::disk::{Item, NAMES_MAX, Name, Put, RecordHeader, Run};
use tercet_proto::storage::Incomplete;
use tercet_proto::{BLOCK_BYTES, Place, Promise, Token, VolumeId};

use crate::disk::DiskOp;
use crate::map::Map;
use crate::replica::{LogEntry, QUEUED, Replica};
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

/// A small payload's owner, so that the entry learns where it went.
#[derive(Clone, Copy, Debug)]
struct Slice {
    volume: VolumeId,
    number: u64,
    place: Place,
    offset: u32,
}

/// Changes that become one record.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    items: Put,
    count: u32,
    payload: Vec<Bytes>,
    payload_blocks: u32,
    slices: Vec<Slice>,
    extents: Vec<(Run, Bytes)>,
    extent_blocks: u64,
    names: BTreeMap<VolumeId, Place>,
    effects: Vec<Effect>,
    entries: u32,
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn blocks_max(&self) -> u64 {
        u64::from(RecordHeader::header_blocks(NAMES_MAX, self.items.0.len()))
            + u64::from(self.payload_blocks)
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

    /// Whether an append of so many blocks may queue.
    pub(crate) fn has_room(&self, blocks: u64) -> bool {
        let used = self.head - self.floor() + self.queued_blocks;
        used + blocks + RING_MARGIN_BLOCKS <= u64::from(self.ring.1)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.flying.is_empty() && self.queue.is_empty() && self.collecting.is_empty()
    }

    /// Adds a change, with the payload of a small write.
    pub(crate) fn push(&mut self, item: &Item, payload: Option<Bytes>, effect: Option<Effect>) {
        let at = self.collecting.items.0.len();
        item.encode(&mut self.collecting.items);
        self.collecting.count += 1;
        let name = self.collecting.names.entry(item.volume()).or_insert(Place::EMPTY);
        if let Item::Entry { volume, number, entry, .. } = item {
            *name = entry.header.place;
            self.collecting.entries += 1;
            if let Some(payload) = payload {
                self.collecting.slices.push(Slice {
                    volume: *volume,
                    number: *number,
                    place: entry.header.place,
                    offset: self.collecting.payload_blocks,
                });
                self.collecting.payload_blocks += (payload.len() / BLOCK_BYTES) as u32;
                self.queued_blocks += (payload.len() / BLOCK_BYTES) as u64;
                self.collecting.payload.push(payload);
            }
        }
        if at / BLOCK_BYTES != self.collecting.items.0.len() / BLOCK_BYTES || at == 0 {
            self.queued_blocks += 1 + (self.collecting.items.0.len() - at) as u64 / 4096;
        }
        self.collecting.effects.extend(effect);
    }

    /// Adds what a large entry writes to the data area.
    pub(crate) fn push_extents(&mut self, runs: &[Run], payload: &Bytes) {
        let mut from = 0;
        for run in runs {
            let mut done = 0;
            while done < run.1 {
                let count = (run.1 - done).min(IO_BLOCKS_MAX);
                let bytes = count as usize * BLOCK_BYTES;
                let piece = payload.slice(from..from + bytes);
                self.collecting.extents.push(((run.0 + done, count), piece));
                from += bytes;
                done += count;
            }
            self.collecting.extent_blocks += u64::from(run.1);
            self.queued_extent_blocks += u64::from(run.1);
        }
    }

    /// The offset that the next small payload gets, after closing a batch that cannot take it.
    pub(crate) fn next_offset(&mut self, payload_blocks: u32, item_bytes: usize) -> u32 {
        let batch = &self.collecting;
        if !batch.is_empty()
            && (batch.payload_blocks + payload_blocks > RECORD_PAYLOAD_BLOCKS_MAX
                || batch.items.0.len() + item_bytes > ITEM_BYTES_MAX
                || batch.extent_blocks >= BATCH_EXTENT_BLOCKS)
        {
            self.close();
        }
        self.collecting.payload_blocks
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
        self.queued_blocks = self.queue.iter().map(Batch::blocks_max).sum::<u64>();
        if !self.collecting.is_empty() {
            self.queued_blocks += self.collecting.blocks_max();
        }
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
            let batch = self.log.queue.pop_front().expect("one was put there");
            if let Err(batch) = self.send(batch) {
                self.log.queue.push_front(*batch);
                return;
            }
            self.log.recount();
        }
    }

    fn send(&mut self, batch: Batch) -> Result<(), Box<Batch>> {
        let names = self.log.names.as_ref().map_or(0, Vec::len);
        let header_blocks = RecordHeader::header_blocks(names, batch.items.0.len());
        let blocks = header_blocks + batch.payload_blocks;
        let position = self.log.place_record(self.log.head, blocks);
        let end = position + u64::from(blocks);
        if end - self.log.floor() > u64::from(self.log.ring.1) {
            return Err(Box::new(batch));
        }
        let arena = &self.options.arena;
        let Some(mut record) = arena.take(blocks as usize) else {
            return Err(Box::new(batch));
        };
        let mut bufs = Vec::with_capacity(batch.extents.len());
        for (run, _) in &batch.extents {
            let Some(buf) = arena.take(run.1 as usize) else {
                return Err(Box::new(batch));
            };
            bufs.push(buf);
        }
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
            names: self.log.names.clone(),
        };
        let (area, payload) = record.split_at_mut(header_blocks as usize * BLOCK_BYTES);
        let crc = header.encode(&batch.items.0, area);
        let mut at = 0;
        for piece in &batch.payload {
            payload[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        }
        self.settle_slices(&batch, position, header_blocks);
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
        let flush = batch.extents.len() > FUA_EXTENTS_MAX;
        let fua = !flush && !self.skips_flush();
        for ((run, bytes), mut buf) in batch.extents.iter().zip(bufs) {
            buf.copy_from_slice(bytes);
            let offset = u64::from(run.0) * BLOCK_BYTES as u64;
            self.submit(OpKind::Record(id), DiskOp::Write { offset, data: buf, fua });
        }
        let offset = u64::from(self.log.block(position)) * BLOCK_BYTES as u64;
        self.submit(OpKind::Record(id), DiskOp::Write { offset, data: record, fua });
        self.log.flying.push_back(Flight {
            id,
            end,
            checkpoint: self.checkpoint_durable,
            writes_left: batch.extents.len() + 1,
            flush: flush && !self.skips_flush(),
            done: false,
            effects: batch.effects,
        });
        self.log.head = end;
        self.log.mark_written = self.log.durable;
        self.log.record_wanted = false;
        self.log.previous = (position, crc);
        self.log.names = name_list(batch.names);
        Ok(())
    }

    /// Tells the entries of a batch where their payload is.
    fn settle_slices(&mut self, batch: &Batch, position: u64, header_blocks: u32) {
        for effect in &batch.effects {
            let Effect::Entry { volume, number, place } = effect else {
                continue;
            };
            if let Some(entry) = self.current_entry(*volume, *number, *place) {
                entry.position = position;
            }
        }
        for slice in &batch.slices {
            let at = position + u64::from(header_blocks) + u64::from(slice.offset);
            let block = self.log.block(at);
            if let Some(entry) = self.current_entry(slice.volume, slice.number, slice.place) {
                entry.payload = crate::replica::Payload::Ring(block);
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
