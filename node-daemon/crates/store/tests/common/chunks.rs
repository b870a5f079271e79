//! The chunk map beside the model's.

use tercet_proto::storage::Storage;
use tercet_proto::{ChunkRow, Place, Token, VolumeId};

use super::World;

impl World {
    /// The whole chunk map, page by page.
    pub fn chunk_map(&mut self, volume: VolumeId) -> Vec<ChunkRow> {
        let (mut rows, mut from) = (Vec::new(), Some(0));
        while let Some(first) = from {
            let token = Token(self.fresh());
            self.store.chunk_map(volume, first, token);
            self.settle();
            let page = self.chunks.remove(&token).expect("answered").expect("its leaves are read");
            assert!(page.next.is_none_or(|next| next > first), "pages go on");
            rows.extend(page.rows);
            from = page.next;
        }
        rows
    }

    /// The chunk map says what the entries that were applied made of the volume.
    pub fn compare_chunks(&mut self, volume: VolumeId) {
        let Some(model) = self.model.get(&volume).filter(|model| model.awaits.is_none()) else {
            return;
        };
        let expected = model.chunk_map();
        let found: Vec<_> = self.chunk_map(volume).iter().map(told).collect();
        if found != expected {
            self.violations.push(format!("{volume}: chunks {found:?}, the model: {expected:?}"));
        }
    }
}

/// What the model knows of a row: chunk, blocks, shared ones, last change.
fn told(row: &ChunkRow) -> (u64, u32, u32, Place) {
    assert!(row.extents > 0 && row.extents <= row.mapped_blocks && row.device_block > 0, "{row:?}");
    (row.chunk, row.mapped_blocks, row.shared_blocks, row.changed)
}
