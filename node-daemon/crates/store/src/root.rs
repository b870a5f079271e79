//! The root of a checkpoint: what is written of each replica, and the stream that names every leaf.
//!
//! A map is written as what differs from the next newer one of its volume: segments that both share
//! are skipped without a look.

use tercet_proto::disk::{EntryItem, Put, ROOT_PAYLOAD_BYTES, RootBlock, Slot, crc32c};
use tercet_proto::storage::{Incomplete, SnapshotState};
use tercet_proto::{BLOCK_BYTES, Place, Promise, ReplicaId, VolumeId};

use crate::checkpoint::{Checkpoint, Write};
use crate::leaf::{Chunk, Leaves};
use crate::map::{Map, SEGMENT_CHUNKS};
use crate::replica::Snapshot;
use crate::store::{Store, Tombstone};

/// Blocks of the root written at once.
const WRITE_BLOCKS_MAX: usize = 64;

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

impl Frozen {
    pub(crate) fn maps(&self) -> impl Iterator<Item = &Map> {
        std::iter::once(&self.head).chain(self.snapshots.iter().rev().map(|snap| &snap.map))
    }

    /// Its part of the root stream.
    fn encode(&self, put: &mut Put, leaves: &Leaves) {
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
            encode_map(put, map, newer, leaves);
            newer = Some(map);
        }
    }
}

/// A map as what differs from the next newer one of the same volume.
fn encode_map(put: &mut Put, map: &Map, newer: Option<&Map>, leaves: &Leaves) {
    put.u32(map.len() as u32);
    let mut index = 0;
    while index < map.len() {
        let start = index;
        index = skip_same(map, newer, index);
        if index > start {
            put.u8(0);
            put.u32((index - start) as u32);
            continue;
        }
        match map.chunk(index) {
            Chunk::Hole(stamp) => {
                while index < map.len()
                    && map.chunk(index) == Chunk::Hole(stamp)
                    && !same(map, newer, index)
                {
                    index += 1;
                }
                put.u8(1);
                put.u32((index - start) as u32);
                put.place(stamp);
            }
            Chunk::Leaf { no, inherited } => {
                let place = leaves.place_of(no);
                put.u8(if inherited { 3 } else { 2 });
                put.u64(place.id);
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

fn same(map: &Map, newer: Option<&Map>, index: usize) -> bool {
    newer.is_some_and(|other| index < other.len() && other.chunk(index) == map.chunk(index))
}

/// The first chunk from here on in which a map differs from the newer one.
fn skip_same(map: &Map, newer: Option<&Map>, from: usize) -> usize {
    let Some(other) = newer else { return from };
    let end = map.len().min(other.len());
    let mut index = from;
    while index < end {
        if index.is_multiple_of(SEGMENT_CHUNKS) && map.shares(other, index / SEGMENT_CHUNKS) {
            index = end.min(index + SEGMENT_CHUNKS);
        } else if map.chunk(index) == other.chunk(index) {
            index += 1;
        } else {
            break;
        }
    }
    index
}

pub(crate) fn encode_tombstones(put: &mut Put, tombstones: &[Tombstone]) {
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
    pub(crate) fn write_root(&mut self, now: &mut Checkpoint) {
        let mut put = Put(std::mem::take(&mut now.head_bytes));
        put.u32(now.replicas.len() as u32);
        for replica in &now.replicas {
            replica.encode(&mut put, &self.leaves);
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
                Some(Write { first, bytes, .. })
                    if *first as usize + bytes.len() / BLOCK_BYTES == blocks[index] as usize
                        && bytes.len() < WRITE_BLOCKS_MAX * BLOCK_BYTES =>
                {
                    bytes.extend_from_slice(&*block);
                }
                _ => {
                    let (first, bytes) = (blocks[index], block.to_vec());
                    now.writes.push_back(Write { first, bytes, leaf: None });
                }
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
}
