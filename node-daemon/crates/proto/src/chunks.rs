//! The chunk map of a volume, as people look at it: what lies where on this node's device.
//!
//! Rows are made from the map alone, no block of the volume is read; a page at a time, so that a
//! large volume holds up nobody. What a map is on the device is told by `disk` and
//! `docs/disk-format.md`.

use crate::entry::Place;

/// A chunk that has a written block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkRow {
    /// Number of the chunk within the volume.
    pub chunk: u64,
    /// Blocks that are no holes: 1 to 1,024.
    pub mapped_blocks: u32,
    /// Of these, blocks that have not changed since the newest snapshot, which names them too, or
    /// that came with the clone: what deleting the volume alone would not give back.
    pub shared_blocks: u32,
    /// Pieces in which they lie: neighbours in the volume and on the device.
    pub extents: u32,
    /// Block of the device at which the first piece begins.
    pub device_block: u32,
    /// The entry that changed the chunk last, holes included; (0, 0) where all came with a clone.
    pub changed: Place,
}

/// Some rows, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ChunkPage {
    /// The rows.
    pub rows: Vec<ChunkRow>,
    /// The chunk to go on from; none: that was all.
    pub next: Option<u64>,
}
