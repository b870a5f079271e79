//! What waits to become one record: items, payloads, and what happens when they are durable.
//!
//! Where a small payload goes is settled when its record is sent, for only then it is known how many
//! go together. A few lie in the record itself: one write for all of it, copied to their blocks
//! later. Many go to blocks of their own at once, side by side with the record, as the payload of a
//! large write does: then they are written once. Both are the same format and the same rules
//! (W3, R1, W8); which of them is dearer is all that differs.

use std::collections::BTreeMap;

use bytes::Bytes;
use tercet_proto::disk::{Item, NAMES_MAX, Put, RecordHeader, Run};
use tercet_proto::{BLOCK_BYTES, Place, VolumeId};

use crate::log::{Effect, IO_BLOCKS_MAX};

/// Bytes that a run adds to an item.
const RUN_BYTES: usize = 8;

/// A payload that is smaller than an extent.
#[derive(Debug)]
pub(crate) struct Small {
    pub(crate) volume: VolumeId,
    pub(crate) number: u64,
    pub(crate) place: Place,
    pub(crate) payload: Bytes,
    /// Where its location stands among the items' bytes.
    location_at: usize,
    /// Its blocks in the data area, once it has them.
    pub(crate) runs: Vec<Run>,
    /// Its offset in the record's payload, where it has no such blocks.
    pub(crate) offset: u32,
}

/// What one write of an extent is made of.
pub(crate) type Extent = (Run, Vec<Bytes>);

/// Changes that become one record.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    items: Put,
    pub(crate) count: u32,
    pub(crate) smalls: Vec<Small>,
    /// Blocks of payload that the record takes along.
    pub(crate) payload_blocks: u32,
    pub(crate) extents: Vec<Extent>,
    pub(crate) extent_blocks: u64,
    pub(crate) names: BTreeMap<VolumeId, Place>,
    pub(crate) effects: Vec<Effect>,
    pub(crate) entries: u32,
}

impl Small {
    pub(crate) fn blocks(&self) -> u32 {
        (self.payload.len() / BLOCK_BYTES) as u32
    }
}

impl Batch {
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Blocks of the ring that it needs at most.
    pub(crate) fn blocks_max(&self) -> u64 {
        u64::from(RecordHeader::header_blocks(NAMES_MAX, self.item_bytes_max()))
            + u64::from(self.payload_blocks)
    }

    /// Bytes of its items at most, wherever its payloads will lie: in a run each, and as many more
    /// runs as the place of their blocks is cut into.
    pub(crate) fn item_bytes_max(&self) -> usize {
        let own = self.smalls.len() * (2 * RUN_BYTES);
        self.items.0.len() + own + self.payload_blocks as usize / 4 * RUN_BYTES
    }

    /// Adds a change.
    pub(crate) fn push(&mut self, item: &Item, effect: Option<Effect>) {
        item.encode(&mut self.items);
        self.count += 1;
        let name = self.names.entry(item.volume()).or_insert(Place::EMPTY);
        if let Item::Entry { entry, .. } = item {
            *name = entry.header.place;
            self.entries += 1;
        }
        self.effects.extend(effect);
    }

    /// Adds an entry's small payload, right behind the entry.
    pub(crate) fn push_small(
        &mut self,
        (volume, number, place): (VolumeId, u64, Place),
        payload: Bytes,
    ) {
        // A location in the record is a byte and four, and a checksum for each block follows.
        let blocks = payload.len() / BLOCK_BYTES;
        let location_at = self.items.0.len() - 4 * blocks - 5;
        assert_eq!(self.items.0[location_at], 1, "the location of a payload in the record");
        self.payload_blocks += blocks as u32;
        let runs = Vec::new();
        self.smalls.push(Small { volume, number, place, payload, location_at, runs, offset: 0 });
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
                self.extents.push(((run.0 + done, count), vec![piece]));
                from += bytes;
                done += count;
            }
            self.extent_blocks += u64::from(run.1);
        }
    }

    /// Gives the small payloads at these indices, in order, the blocks of `runs`.
    pub(crate) fn place_smalls(&mut self, indices: &[usize], runs: &[Run]) {
        let first = self.extents.len();
        self.extents.extend(runs.iter().map(|run| (*run, Vec::new())));
        let (mut extent, mut used) = (first, 0);
        for index in indices {
            let small = &mut self.smalls[*index];
            let mut done = 0;
            while done < small.blocks() {
                let ((start, count), pieces) = &mut self.extents[extent];
                let now = (*count - used).min(small.blocks() - done);
                let [from, to] = [done, done + now].map(|blocks| blocks as usize * BLOCK_BYTES);
                pieces.push(small.payload.slice(from..to));
                small.runs.push((*start + used, now));
                (done, used) = (done + now, used + now);
                if used == *count {
                    (extent, used) = (extent + 1, 0);
                }
            }
            self.payload_blocks -= small.blocks();
            self.extent_blocks += u64::from(small.blocks());
        }
        assert_eq!((extent, used), (self.extents.len(), 0), "every block has its payload");
    }

    /// The items' bytes, now that it is settled where the payloads lie.
    pub(crate) fn items(&mut self) -> Put {
        let mut put = Put(Vec::with_capacity(self.item_bytes_max()));
        let (mut from, mut offset) = (0, 0);
        for small in &mut self.smalls {
            put.bytes(&self.items.0[from..small.location_at]);
            if small.runs.is_empty() {
                put.u8(1);
                put.u32(offset);
                small.offset = offset;
                offset += small.blocks();
            } else {
                put.u8(2);
                put.u16(u16::try_from(small.runs.len()).expect("fewer than its blocks"));
                for (start, count) in &small.runs {
                    put.u32(*start);
                    put.u32(*count);
                }
            }
            from = small.location_at + 5;
        }
        put.bytes(&self.items.0[from..]);
        assert_eq!(offset, self.payload_blocks, "every payload has its place");
        put
    }
}
