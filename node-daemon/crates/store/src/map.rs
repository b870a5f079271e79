//! The map of a volume or snapshot: for each block where it lies, its checksum and its stamp.
//!
//! A map is a list of chunks; a chunk is a hole with one stamp, or a leaf. Leaves are shared by
//! counted references: a snapshot clones the list and no block is touched (rule S1), the first
//! change of a shared leaf copies the leaf and only the changed block gets a new place (rule S2). A
//! checkpoint that is being written is one more holder, so what it writes cannot change under it.
//! In a clone, stamps that came from the source read as (0, 0) (rule C2).

use std::collections::HashMap;
use std::sync::Arc;

use tercet_proto::disk::{CHUNK_BLOCKS, LeafBlock, Run};
use tercet_proto::{BlockRange, Place};

use crate::alloc::Alloc;

/// The blocks of one chunk.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) id: u64,
    pub(crate) blocks: Box<[LeafBlock]>,
}

/// One chunk of a map.
#[derive(Clone, Debug)]
pub(crate) enum Chunk {
    /// Zeroes, changed last by this entry.
    Hole(Place),
    /// Anything else.
    Leaf {
        leaf: Arc<Leaf>,
        /// The stamps are another volume's.
        inherited: bool,
    },
}

impl Chunk {
    pub(crate) fn block(&self, index: usize) -> LeafBlock {
        match self {
            Self::Hole(stamp) => LeafBlock { stamp: *stamp, ..LeafBlock::NEVER },
            Self::Leaf { leaf, inherited: false } => leaf.blocks[index],
            Self::Leaf { leaf, inherited: true } => {
                LeafBlock { stamp: Place::EMPTY, ..leaf.blocks[index] }
            }
        }
    }

    /// Whether both are one and the same leaf, or the same hole.
    pub(crate) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Hole(a), Self::Hole(b)) => a == b,
            (
                Self::Leaf { leaf: a, inherited: a_inherited },
                Self::Leaf { leaf: b, inherited: b_inherited },
            ) => Arc::ptr_eq(a, b) && a_inherited == b_inherited,
            _ => false,
        }
    }
}

/// Where a leaf is on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeafPlace {
    pub(crate) runs: Vec<Run>,
    pub(crate) crc: u32,
}

/// All leaves of a store: their ids, and where the clean ones are.
#[derive(Debug, Default)]
pub(crate) struct Leaves {
    pub(crate) next_id: u64,
    pub(crate) live: u64,
    pub(crate) places: HashMap<u64, LeafPlace>,
}

impl Leaves {
    /// Leaves that the next checkpoint has to write.
    pub(crate) fn dirty(&self) -> u64 {
        self.live - self.places.len() as u64
    }

    pub(crate) fn new_leaf(&mut self, blocks: Box<[LeafBlock]>) -> Leaf {
        let id = self.next_id;
        self.next_id += 1;
        self.live += 1;
        Leaf { id, blocks }
    }

    fn forget(&mut self, id: u64, alloc: &mut Alloc) {
        if let Some(place) = self.places.remove(&id) {
            alloc.release_runs(&place.runs);
        }
    }

    /// Gives up one reference; the last one gives up the leaf and its blocks.
    pub(crate) fn release(&mut self, leaf: Arc<Leaf>, alloc: &mut Alloc) {
        let Ok(leaf) = Arc::try_unwrap(leaf) else {
            return;
        };
        for block in leaf.blocks.iter().filter(|block| block.device != 0) {
            alloc.release(block.device);
        }
        self.forget(leaf.id, alloc);
        self.live -= 1;
    }
}

/// What a map needs to change.
pub(crate) struct Space<'a> {
    pub(crate) alloc: &'a mut Alloc,
    pub(crate) leaves: &'a mut Leaves,
}

/// A volume's or snapshot's map.
#[derive(Clone, Debug, Default)]
pub(crate) struct Map {
    pub(crate) chunks: Vec<Chunk>,
}

/// Chunk and block within it.
pub(crate) fn split(block: u64) -> (usize, usize) {
    ((block / CHUNK_BLOCKS as u64) as usize, (block % CHUNK_BLOCKS as u64) as usize)
}

impl Map {
    pub(crate) fn new(size_blocks: u64) -> Self {
        let mut map = Self::default();
        map.grow(size_blocks);
        map
    }

    pub(crate) fn grow(&mut self, size_blocks: u64) {
        let chunks = size_blocks.div_ceil(CHUNK_BLOCKS as u64) as usize;
        if chunks > self.chunks.len() {
            self.chunks.resize(chunks, Chunk::Hole(Place::EMPTY));
        }
    }

    /// Exactly this size, larger or smaller: what is behind the end was never written.
    pub(crate) fn resize(&mut self, size_blocks: u64, space: &mut Space<'_>) {
        let chunks = size_blocks.div_ceil(CHUNK_BLOCKS as u64) as usize;
        for chunk in self.chunks.drain(chunks.min(self.chunks.len())..) {
            if let Chunk::Leaf { leaf, .. } = chunk {
                space.leaves.release(leaf, space.alloc);
            }
        }
        self.grow(size_blocks);
        let end = (chunks * CHUNK_BLOCKS) as u64;
        if (size_blocks..end).any(|block| self.block(block) != LeafBlock::NEVER) {
            let range = BlockRange { start: size_blocks, count: (end - size_blocks) as u32 };
            self.zero(range, Place::EMPTY, space);
        }
    }

    /// The same blocks as another volume's: stamps read as (0, 0) from now on.
    pub(crate) fn inherit(&self) -> Self {
        let chunks = self.chunks.iter().map(|chunk| match chunk {
            Chunk::Hole(_) => Chunk::Hole(Place::EMPTY),
            Chunk::Leaf { leaf, .. } => Chunk::Leaf { leaf: Arc::clone(leaf), inherited: true },
        });
        Self { chunks: chunks.collect() }
    }

    pub(crate) fn block(&self, block: u64) -> LeafBlock {
        let (chunk, index) = split(block);
        self.chunks.get(chunk).map_or(LeafBlock::NEVER, |chunk| chunk.block(index))
    }

    /// The leaf of a chunk, for changing: made, copied or made dirty as needed.
    fn leaf_mut(&mut self, chunk: usize, space: &mut Space<'_>) -> &mut Leaf {
        let old = std::mem::replace(&mut self.chunks[chunk], Chunk::Hole(Place::EMPTY));
        let mut fresh = match old {
            Chunk::Hole(stamp) => {
                let hole = LeafBlock { stamp, ..LeafBlock::NEVER };
                Arc::new(space.leaves.new_leaf(vec![hole; CHUNK_BLOCKS].into()))
            }
            Chunk::Leaf { leaf, inherited } => Self::own(leaf, inherited, space),
        };
        let leaf = Arc::get_mut(&mut fresh).expect("own leaves have one holder");
        if space.leaves.places.contains_key(&leaf.id) {
            space.leaves.forget(leaf.id, space.alloc);
            leaf.id = space.leaves.next_id;
            space.leaves.next_id += 1;
        }
        self.chunks[chunk] = Chunk::Leaf { leaf: fresh, inherited: false };
        let Chunk::Leaf { leaf, .. } = &mut self.chunks[chunk] else { unreachable!("just put") };
        Arc::get_mut(leaf).expect("own leaves have one holder")
    }

    /// The leaf itself where nobody shares it, else a copy.
    fn own(mut leaf: Arc<Leaf>, inherited: bool, space: &mut Space<'_>) -> Arc<Leaf> {
        if Arc::get_mut(&mut leaf).is_some() && !inherited {
            return leaf;
        }
        let mut blocks = leaf.blocks.clone();
        for block in &mut blocks {
            if block.device != 0 {
                space.alloc.hold(block.device);
            }
            if inherited {
                block.stamp = Place::EMPTY;
            }
        }
        space.leaves.release(leaf, space.alloc);
        Arc::new(space.leaves.new_leaf(blocks))
    }

    /// Puts blocks of the device, which the map holds from now on, at `start`.
    pub(crate) fn write(
        &mut self,
        start: u64,
        devices: impl Iterator<Item = u32>,
        crcs: &[u32],
        stamp: Place,
        space: &mut Space<'_>,
    ) {
        let mut block = start;
        let mut pairs = devices.zip(crcs.iter().copied()).peekable();
        while pairs.peek().is_some() {
            let (chunk, first) = split(block);
            let leaf = self.leaf_mut(chunk, space);
            for index in first..CHUNK_BLOCKS {
                let Some((device, crc)) = pairs.next() else {
                    break;
                };
                let old =
                    std::mem::replace(&mut leaf.blocks[index], LeafBlock { device, crc, stamp });
                if old.device != 0 {
                    space.alloc.release(old.device);
                }
                block += 1;
            }
        }
    }

    /// Makes holes.
    pub(crate) fn zero(&mut self, range: BlockRange, stamp: Place, space: &mut Space<'_>) {
        let mut block = range.start;
        while block < range.end() {
            let (chunk, first) = split(block);
            let last = (CHUNK_BLOCKS as u64).min(range.end() - block + first as u64) as usize;
            if first == 0 && last == CHUNK_BLOCKS {
                let hole = Chunk::Hole(stamp);
                if let Chunk::Leaf { leaf, .. } = std::mem::replace(&mut self.chunks[chunk], hole) {
                    space.leaves.release(leaf, space.alloc);
                }
            } else {
                let leaf = self.leaf_mut(chunk, space);
                for entry in &mut leaf.blocks[first..last] {
                    if entry.device != 0 {
                        space.alloc.release(entry.device);
                    }
                    *entry = LeafBlock { stamp, ..LeafBlock::NEVER };
                }
            }
            block += (last - first) as u64;
        }
    }

    /// Gives everything up.
    pub(crate) fn release(self, space: &mut Space<'_>) {
        for chunk in self.chunks {
            if let Chunk::Leaf { leaf, .. } = chunk {
                space.leaves.release(leaf, space.alloc);
            }
        }
    }

    /// Blocks that are no holes.
    pub(crate) fn written_blocks(&self) -> u64 {
        let leaves = self.chunks.iter().filter_map(|chunk| match chunk {
            Chunk::Leaf { leaf, .. } => Some(leaf),
            Chunk::Hole(_) => None,
        });
        leaves.map(|leaf| leaf.blocks.iter().filter(|block| block.device != 0).count() as u64).sum()
    }
}
