//! The chunk map as people look at it: which chunks have written blocks, and where these lie.
//!
//! Made of leaves alone, a page at a time: a page is what its thread can look through in about a
//! millisecond. What is shared is told by stamps: a block that has not changed since the newest
//! snapshot is in that snapshot's map too. Looking at a device that nobody has open is `inspect`.

use tercet_proto::disk::{CHUNK_BLOCKS, LeafBlock};
use tercet_proto::storage::{StorageError, StorageEvent};
use tercet_proto::{ChunkPage, ChunkRow, Place, Token, VolumeId};

use crate::map::{Map, Space};
use crate::parked::Parked;
use crate::store::Store;

/// Rows of a page.
const ROWS_MAX: usize = 64;
/// Chunks that a page looks at; most may be holes.
const CHUNKS_MAX: usize = 16_384;

/// A page, as far as it is made.
#[derive(Debug)]
pub(crate) struct ChunkWalk {
    pub(crate) volume: VolumeId,
    pub(crate) map: Map,
    /// Of the newest snapshot.
    snapshot: Place,
    at: usize,
    /// The chunk at which the page ends.
    end: usize,
    rows: Vec<ChunkRow>,
    token: Token,
}

impl ChunkWalk {
    /// Block of the volume at which the chunk begins that is looked at.
    pub(crate) fn start(&self) -> u64 {
        (self.at * CHUNK_BLOCKS) as u64
    }

    fn done(&self) -> bool {
        self.at >= self.end || self.rows.len() == ROWS_MAX
    }
}

/// The row of a chunk; none: it has holes only.
fn row(chunk: usize, blocks: &[LeafBlock], snapshot: Place) -> Option<ChunkRow> {
    let written = || blocks.iter().enumerate().filter(|(_, block)| block.device != 0);
    let device_block = written().next()?.1.device;
    let shared = written().filter(|(_, block)| block.stamp <= snapshot).count();
    let begins = |index: usize, block: &LeafBlock| {
        let before = index.checked_sub(1).map(|before| blocks[before].device);
        before.is_none_or(|before| before == 0 || before + 1 != block.device)
    };
    let extents = written().filter(|(index, block)| begins(*index, block)).count();
    Some(ChunkRow {
        chunk: chunk as u64,
        mapped_blocks: written().count() as u32,
        shared_blocks: shared as u32,
        extents: extents as u32,
        device_block,
        changed: blocks.iter().map(|block| block.stamp).max().unwrap_or(Place::EMPTY),
    })
}

impl Store {
    pub(crate) fn start_chunks(
        &mut self,
        volume: VolumeId,
        from: u64,
        token: Token,
    ) -> Result<(), StorageError> {
        let replica = self.live_replica(volume)?;
        let map = replica.head.clone();
        let snapshot = replica.snapshots.last().map_or(Place::EMPTY, |last| last.state.place);
        let at = usize::try_from(from).unwrap_or(usize::MAX).min(map.len());
        let end = at.saturating_add(CHUNKS_MAX).min(map.len());
        let walk = ChunkWalk { volume, map, snapshot, at, end, rows: Vec::new(), token };
        self.go_on_with_chunks(Box::new(walk));
        Ok(())
    }

    pub(crate) fn go_on_with_chunks(&mut self, mut walk: Box<ChunkWalk>) {
        let mut blocks = Vec::new();
        while !walk.done() {
            let chunk = walk.map.chunk(walk.at);
            blocks.clear();
            if self.leaves.written(chunk) > 0 {
                if let Err(no) = self.leaves.fill(chunk, (0, CHUNK_BLOCKS), &mut blocks) {
                    return self.park(no, Parked::Chunks(walk));
                }
                walk.rows.extend(row(walk.at, &blocks, walk.snapshot));
            }
            walk.at += 1;
        }
        self.finish_chunks(*walk, Ok(()));
    }

    pub(crate) fn finish_chunks(&mut self, walk: ChunkWalk, result: Result<(), StorageError>) {
        let next = (walk.at < walk.map.len()).then_some(walk.at as u64);
        walk.map.release(&mut Space { alloc: &mut self.alloc, leaves: &mut self.leaves });
        let page = ChunkPage { rows: walk.rows, next };
        let event = StorageEvent::Chunks { token: walk.token, result: result.map(|()| page) };
        self.events.push(event);
    }
}
