//! The map of a volume or snapshot: for each block where it lies, its checksum and its stamp.
//!
//! A map is a list of chunks; a chunk is a hole with one stamp, or a leaf (`leaf`). Chunks stand in
//! segments that maps share, and the list of segments is shared as well: a snapshot takes one more
//! holder of that list and no block is touched (rule S1), however large the volume. The first change
//! copies the list and one segment, whose leaves get one more holder each; then a leaf that others
//! name gets a dirty one over it, and only the changed block a new place (rule S2). A checkpoint that
//! is being written is one more holder, so what it writes cannot change under it. In a clone, stamps
//! that came from the source read as (0, 0) (rule C2).

use std::sync::Arc;

use tercet_proto::disk::{CHUNK_BLOCKS, LeafBlock};
use tercet_proto::{BlockRange, Place};

use crate::alloc::Alloc;
use crate::leaf::{Chunk, LeafNo, Leaves};

/// Chunks that are copied together: 512 MiB of a volume.
pub(crate) const SEGMENT_CHUNKS: usize = 128;

pub(crate) type Segment = Arc<[Chunk]>;

const NEVER: Chunk = Chunk::Hole(Place::EMPTY);

/// What a map needs to change.
pub(crate) struct Space<'a> {
    pub(crate) alloc: &'a mut Alloc,
    pub(crate) leaves: &'a mut Leaves,
}

/// A volume's or snapshot's map.
#[derive(Clone, Debug, Default)]
pub(crate) struct Map {
    /// Each of `SEGMENT_CHUNKS`; the last one goes on with chunks that were never written.
    segments: Arc<Vec<Segment>>,
    chunks: usize,
}

/// Chunk and block within it.
pub(crate) fn split(block: u64) -> (usize, usize) {
    ((block / CHUNK_BLOCKS as u64) as usize, (block % CHUNK_BLOCKS as u64) as usize)
}

/// The parts of a range that lie in one chunk each: the chunk, and which of its blocks.
pub(crate) fn by_chunk(range: BlockRange) -> impl Iterator<Item = (usize, (usize, usize))> {
    let mut block = range.start;
    std::iter::from_fn(move || {
        let (chunk, first) = split(block);
        let last = (CHUNK_BLOCKS as u64).min(range.end().checked_sub(block)? + first as u64);
        block += last - first as u64;
        (last > first as u64).then_some((chunk, (first, last as usize)))
    })
}

/// Gives up a segment; its last holder gives up the leaves.
fn release_segment(mut segment: Segment, space: &mut Space<'_>) {
    let Some(chunks) = Arc::get_mut(&mut segment) else { return };
    for no in chunks.iter().filter_map(|chunk| chunk.leaf()) {
        space.leaves.release(no, space.alloc);
    }
}

impl Map {
    pub(crate) fn new(size_blocks: u64) -> Self {
        let mut map = Self::default();
        map.grow(size_blocks);
        map
    }

    /// A map of these chunks, which shares segments with another where they are alike.
    pub(crate) fn of(chunks: &[Chunk], like: Option<&Self>, leaves: &mut Leaves) -> Self {
        let segments = chunks.chunks(SEGMENT_CHUNKS).enumerate().map(|(index, part)| {
            let mut part = part.to_vec();
            part.resize(SEGMENT_CHUNKS, NEVER);
            if let Some(other) = like.and_then(|map| map.segments.get(index))
                && other[..] == part[..]
            {
                return Arc::clone(other);
            }
            part.iter().filter_map(|chunk| chunk.leaf()).for_each(|no| leaves.hold(no));
            part.into()
        });
        Self { segments: Arc::new(segments.collect()), chunks: chunks.len() }
    }

    pub(crate) fn len(&self) -> usize {
        self.chunks
    }

    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// A chunk; behind the end it was never written.
    pub(crate) fn chunk(&self, index: usize) -> Chunk {
        let segment = self.segments.get(index / SEGMENT_CHUNKS);
        segment.map_or(NEVER, |segment| segment[index % SEGMENT_CHUNKS])
    }

    pub(crate) fn chunks(&self) -> impl Iterator<Item = Chunk> + '_ {
        self.segments.iter().flat_map(|segment| segment.iter().copied()).take(self.chunks)
    }

    /// Whether both have one and the same segment there.
    pub(crate) fn shares(&self, other: &Self, segment: usize) -> bool {
        let both = self.segments.get(segment).zip(other.segments.get(segment));
        both.is_some_and(|(own, other)| Arc::ptr_eq(own, other))
    }

    pub(crate) fn grow(&mut self, size_blocks: u64) {
        let chunks = size_blocks.div_ceil(CHUNK_BLOCKS as u64) as usize;
        let segments = chunks.div_ceil(SEGMENT_CHUNKS);
        if segments > self.segments.len() {
            let never: Segment = vec![NEVER; SEGMENT_CHUNKS].into();
            Arc::make_mut(&mut self.segments).resize(segments, never);
        }
        self.chunks = self.chunks.max(chunks);
    }

    /// Exactly this size, larger or smaller than `before`: what is behind the end was never written.
    pub(crate) fn resize(&mut self, before: u64, size_blocks: u64, space: &mut Space<'_>) {
        let chunks = size_blocks.div_ceil(CHUNK_BLOCKS as u64) as usize;
        let segments = chunks.div_ceil(SEGMENT_CHUNKS);
        for index in chunks..self.chunks.min(segments * SEGMENT_CHUNKS) {
            self.put(index, NEVER, space);
        }
        if segments < self.segments.len() {
            let mut list = std::mem::take(Arc::make_mut(&mut self.segments));
            list.drain(segments..).for_each(|segment| release_segment(segment, space));
            self.segments = Arc::new(list);
        }
        self.chunks = chunks.min(self.chunks);
        self.grow(size_blocks);
        let end = (chunks * CHUNK_BLOCKS) as u64;
        if size_blocks < end.min(before) && self.chunk(chunks - 1) != NEVER {
            let range = BlockRange { start: size_blocks, count: (end - size_blocks) as u32 };
            self.zero(range, Place::EMPTY, space);
        }
    }

    /// The same blocks as another volume's: stamps read as (0, 0) from now on.
    pub(crate) fn inherit(&self, leaves: &mut Leaves) -> Self {
        let segments = self.segments.iter().map(|segment| {
            let chunks: Segment = segment.iter().map(|chunk| chunk.inherit()).collect();
            chunks.iter().filter_map(|chunk| chunk.leaf()).for_each(|no| leaves.hold(no));
            chunks
        });
        Self { segments: Arc::new(segments.collect()), chunks: self.chunks }
    }

    /// A chunk for changing, in a segment that nobody shares.
    fn chunk_mut(&mut self, index: usize, leaves: &mut Leaves) -> &mut Chunk {
        assert!(index < self.chunks, "a chunk of the volume");
        let segment = &mut Arc::make_mut(&mut self.segments)[index / SEGMENT_CHUNKS];
        if Arc::get_mut(segment).is_none() {
            *segment = Arc::from(&segment[..]);
            segment.iter().filter_map(|chunk| chunk.leaf()).for_each(|no| leaves.hold(no));
        }
        let own = Arc::get_mut(segment).expect("an own segment has one holder");
        &mut own[index % SEGMENT_CHUNKS]
    }

    /// Another chunk in place of one.
    fn put(&mut self, index: usize, chunk: Chunk, space: &mut Space<'_>) {
        if self.chunk(index) == chunk {
            return;
        }
        let old = std::mem::replace(self.chunk_mut(index, space.leaves), chunk);
        if let Some(no) = old.leaf() {
            space.leaves.release(no, space.alloc);
        }
    }

    /// Another leaf in place of one, if the chunk is that.
    pub(crate) fn replace_leaf(
        &mut self,
        index: usize,
        old: LeafNo,
        new: LeafNo,
        space: &mut Space<'_>,
    ) {
        if let Chunk::Leaf { no, inherited } = self.chunk(index)
            && no == old
            && index < self.chunks
        {
            space.leaves.hold(new);
            self.put(index, Chunk::Leaf { no: new, inherited }, space);
        }
    }

    /// The leaf of a chunk, for changing.
    fn leaf_mut(&mut self, index: usize, space: &mut Space<'_>) -> LeafNo {
        let chunk = self.chunk_mut(index, space.leaves);
        let no = space.leaves.change(*chunk, index as u32, space.alloc);
        *chunk = Chunk::Leaf { no, inherited: false };
        no
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
        let range = BlockRange { start, count: crcs.len() as u32 };
        let mut pairs = devices.zip(crcs.iter().copied());
        for (chunk, (first, last)) in by_chunk(range) {
            let no = self.leaf_mut(chunk, space);
            for index in first..last {
                let (device, crc) = pairs.next().expect("a place for each block");
                space.leaves.put(no, index, LeafBlock { device, crc, stamp }, space.alloc);
            }
        }
    }

    /// Makes holes.
    pub(crate) fn zero(&mut self, range: BlockRange, stamp: Place, space: &mut Space<'_>) {
        for (chunk, (first, last)) in by_chunk(range) {
            if last - first == CHUNK_BLOCKS {
                self.put(chunk, Chunk::Hole(stamp), space);
                continue;
            }
            let no = self.leaf_mut(chunk, space);
            for index in first..last {
                space.leaves.put(no, index, LeafBlock { stamp, ..LeafBlock::NEVER }, space.alloc);
            }
        }
    }

    /// Gives everything up.
    pub(crate) fn release(self, space: &mut Space<'_>) {
        let Some(segments) = Arc::into_inner(self.segments) else { return };
        for segment in segments {
            release_segment(segment, space);
        }
    }

    /// Blocks that are no holes; where chunks were changed since the last checkpoint at most so many.
    pub(crate) fn written_blocks(&self, leaves: &Leaves) -> u64 {
        self.chunks().map(|chunk| leaves.written(chunk)).sum()
    }
}
