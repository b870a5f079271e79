//! The leaves of a store: where each is on the device, how many name it, and what changed since.
//!
//! A leaf is *clean*, on the device and read when it is wanted; or *dirty*: a base, which is a hole or
//! another leaf, and the few blocks that were changed since (its patch). A change never reads: it puts
//! blocks into a patch that nobody else sees, or makes a new dirty leaf over the one that others see
//! as well (rule S2). What a patch replaces stays held until a checkpoint writes the leaf (`merge`);
//! then the leaf is clean, everywhere at once, for whoever names it names a row of the table here.
//! So memory is a row for each leaf, the patches since the last checkpoint, and a fixed cache.
//!
//! A leaf that nobody names any more is *dead*: which blocks it held is known only when it has been
//! read again, so it waits in a queue for that (`load`).

use std::collections::{BTreeMap, VecDeque};

use tercet_proto::Place;
use tercet_proto::disk::{CHUNK_BLOCKS, LeafBlock, Run};

use crate::alloc::Alloc;
use crate::cache::{Cache, LeafData};
use crate::hash::NumberMap;

/// Dirty leaves over each other at most; then a new one takes all their patches.
const DEPTH_MAX: u8 = 4;
/// Rows that are allocated at a time.
const PAGE_ROWS: usize = 1024;

/// Names a row of the table of leaves. Used again when the leaf is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LeafNo(pub(crate) u32);

/// One chunk of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chunk {
    /// Zeroes, changed last by this entry.
    Hole(Place),
    /// Anything else.
    Leaf {
        no: LeafNo,
        /// The stamps are another volume's.
        inherited: bool,
    },
}

impl Chunk {
    pub(crate) fn leaf(self) -> Option<LeafNo> {
        match self {
            Self::Hole(_) => None,
            Self::Leaf { no, .. } => Some(no),
        }
    }

    /// The same as another volume's.
    pub(crate) fn inherit(self) -> Self {
        match self {
            Self::Hole(_) => Self::Hole(Place::EMPTY),
            Self::Leaf { no, .. } => Self::Leaf { no, inherited: true },
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Dirty,
    /// On the device, in one run.
    Whole,
    /// On the device, in several.
    Scattered,
}

/// What is known of a leaf without reading it: 32 bytes.
#[derive(Clone, Copy, Debug)]
struct Row {
    id: u64,
    crc: u32,
    /// Chunks of maps (those that segments share once), and whoever else needs it.
    refs: u32,
    chunk: u32,
    first: u32,
    blocks: u8,
    state: State,
    /// Blocks that are no holes, once it is on the device.
    written: u16,
}

const FREE: Row =
    Row { id: 0, crc: 0, refs: 0, chunk: 0, first: 0, blocks: 0, state: State::Free, written: 0 };

/// A leaf that differs from the device's.
#[derive(Debug)]
pub(crate) struct Dirty {
    pub(crate) base: Chunk,
    /// What changed, by block.
    pub(crate) patch: Vec<(u16, LeafBlock)>,
    /// Dirty leaves below.
    depth: u8,
}

impl Dirty {
    /// The part of the patch that lies within `first..last`.
    fn within(&self, first: usize, last: usize) -> &[(u16, LeafBlock)] {
        let at = |index: usize| self.patch.partition_point(|(own, _)| usize::from(*own) < index);
        &self.patch[at(first)..at(last)]
    }
}

/// Where a leaf is on the device, and what must be there.
#[derive(Clone, Debug)]
pub(crate) struct LeafPlace {
    pub(crate) id: u64,
    pub(crate) crc: u32,
    pub(crate) chunk: u32,
    pub(crate) runs: Vec<Run>,
}

/// All leaves of a store.
#[derive(Debug)]
pub(crate) struct Leaves {
    pub(crate) next_id: u64,
    rows: Vec<Box<[Row]>>,
    free: Vec<LeafNo>,
    dirty: NumberMap<LeafNo, Dirty>,
    scattered: NumberMap<LeafNo, Vec<Run>>,
    /// Blocks in patches.
    pub(crate) patched: u64,
    pub(crate) live: u64,
    /// Nobody names these; their blocks are still to be given up.
    pub(crate) dead: VecDeque<LeafNo>,
    /// Blocks that dead leaves may give back, at most.
    pub(crate) dead_blocks: u64,
    pub(crate) cache: Cache,
    /// Leaves that must be at hand, and for how many: not written yet, or about to be merged.
    pinned: NumberMap<LeafNo, (LeafData, u32)>,
    #[cfg(feature = "canary")]
    pub(crate) canary: Option<crate::options::Canary>,
}

impl Leaves {
    pub(crate) fn new(cache_bytes_max: usize) -> Self {
        Self {
            next_id: 1,
            rows: Vec::new(),
            free: Vec::new(),
            dirty: NumberMap::default(),
            scattered: NumberMap::default(),
            patched: 0,
            live: 0,
            dead: VecDeque::new(),
            dead_blocks: 0,
            cache: Cache::new(cache_bytes_max),
            pinned: NumberMap::default(),
            #[cfg(feature = "canary")]
            canary: None,
        }
    }

    fn row(&self, no: LeafNo) -> &Row {
        &self.rows[no.0 as usize / PAGE_ROWS][no.0 as usize % PAGE_ROWS]
    }

    fn row_mut(&mut self, no: LeafNo) -> &mut Row {
        &mut self.rows[no.0 as usize / PAGE_ROWS][no.0 as usize % PAGE_ROWS]
    }

    fn new_row(&mut self, row: Row) -> LeafNo {
        if self.free.is_empty() {
            let first = (self.rows.len() * PAGE_ROWS) as u32;
            self.rows.push(vec![FREE; PAGE_ROWS].into());
            self.free.extend((first..first + PAGE_ROWS as u32).rev().map(LeafNo));
        }
        let no = self.free.pop().expect("rows were added");
        *self.row_mut(no) = row;
        self.live += 1;
        no
    }

    fn free_row(&mut self, no: LeafNo) {
        assert!(!self.pinned.contains_key(&no), "who pins a leaf holds it");
        *self.row_mut(no) = FREE;
        self.cache.remove(no);
        self.scattered.remove(&no);
        self.free.push(no);
    }

    /// Leaves that the next checkpoint has to write.
    pub(crate) fn dirty(&self) -> u64 {
        self.dirty.len() as u64
    }

    /// Those leaves, each behind the one that it is based on.
    pub(crate) fn dirty_in_order(&self) -> Vec<LeafNo> {
        let mut all: Vec<_> =
            self.dirty.iter().map(|(no, dirty)| (dirty.depth, self.row(*no).id, *no)).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, _, no)| no).collect()
    }

    pub(crate) fn dirty_of(&self, no: LeafNo) -> Option<&Dirty> {
        self.dirty.get(&no)
    }

    pub(crate) fn hold(&mut self, no: LeafNo) {
        let row = self.row_mut(no);
        row.refs = row.refs.checked_add(1).expect("fewer than 2^32 holders");
    }

    pub(crate) fn refs(&self, no: LeafNo) -> u32 {
        self.row(no).refs
    }

    /// Gives up a reference. With the last one a dirty leaf is gone; a clean one is dead.
    pub(crate) fn release(&mut self, no: LeafNo, alloc: &mut Alloc) {
        let mut next = Some(no);
        while let Some(no) = next.take() {
            let row = self.row_mut(no);
            row.refs = row.refs.checked_sub(1).expect("a held leaf");
            if row.refs > 0 {
                return;
            }
            self.live -= 1;
            let Some(dirty) = self.dirty.remove(&no) else {
                self.dead_blocks += self.held_blocks(no);
                self.dead.push_back(no);
                return;
            };
            self.patched -= dirty.patch.len() as u64;
            for (_, block) in dirty.patch.iter().filter(|(_, block)| block.device != 0) {
                alloc.release(block.device);
            }
            self.free_row(no);
            next = dirty.base.leaf();
        }
    }

    fn held_blocks(&self, no: LeafNo) -> u64 {
        u64::from(self.row(no).written) + 8
    }

    /// The next dead leaf; whoever takes it owns it until `bury`.
    pub(crate) fn take_dead(&mut self) -> Option<LeafNo> {
        let no = self.dead.pop_front()?;
        self.hold(no);
        Some(no)
    }

    /// It could not be buried now.
    pub(crate) fn put_back_dead(&mut self, no: LeafNo) {
        self.row_mut(no).refs = 0;
        self.dead.push_front(no);
    }

    /// A dead leaf that was taken gives up all that it holds.
    pub(crate) fn bury(&mut self, no: LeafNo, data: &LeafData, alloc: &mut Alloc) {
        assert_eq!(self.refs(no), 1, "nobody names a dead leaf");
        if !self.forgets_dead_leaves() {
            for block in data.iter().filter(|block| block.device != 0) {
                alloc.release(block.device);
            }
        }
        alloc.release_runs(&self.runs(no));
        self.dead_blocks -= self.held_blocks(no);
        self.free_row(no);
    }

    /// A leaf that is on the device; nobody names it yet.
    pub(crate) fn found(&mut self, place: LeafPlace) -> LeafNo {
        let no = self.new_row(Row { id: place.id, chunk: place.chunk, ..FREE });
        self.place(no, place.crc, place.runs);
        no
    }

    fn place(&mut self, no: LeafNo, crc: u32, runs: Vec<Run>) {
        let row = self.row_mut(no);
        row.crc = crc;
        if let [(first, count)] = runs[..] {
            (row.state, row.first) = (State::Whole, first);
            row.blocks = u8::try_from(count).expect("a leaf has at most 8 blocks");
        } else {
            row.state = State::Scattered;
            self.scattered.insert(no, runs);
        }
    }

    pub(crate) fn set_written(&mut self, no: LeafNo, blocks: &[LeafBlock]) {
        let written = blocks.iter().filter(|block| block.device != 0).count();
        self.row_mut(no).written = u16::try_from(written).expect("at most 1,024");
    }

    /// Where a clean leaf is.
    pub(crate) fn place_of(&self, no: LeafNo) -> LeafPlace {
        let row = self.row(no);
        LeafPlace { id: row.id, crc: row.crc, chunk: row.chunk, runs: self.runs(no) }
    }

    /// Id and chunk of a leaf.
    pub(crate) fn name_of(&self, no: LeafNo) -> (u64, u32) {
        (self.row(no).id, self.row(no).chunk)
    }

    pub(crate) fn runs(&self, no: LeafNo) -> Vec<Run> {
        let row = self.row(no);
        match row.state {
            State::Whole => vec![(row.first, u32::from(row.blocks))],
            State::Scattered => self.scattered[&no].clone(),
            State::Dirty | State::Free => panic!("a leaf that is on the device"),
        }
    }

    /// The leaf of a chunk for changing, in place of `chunk`, whose reference it takes over.
    pub(crate) fn change(&mut self, chunk: Chunk, number: u32, alloc: &mut Alloc) -> LeafNo {
        if let Chunk::Leaf { no, inherited: false } = chunk
            && self.refs(no) == 1
            && self.dirty.contains_key(&no)
        {
            return no;
        }
        let below = chunk.leaf().and_then(|no| self.dirty.get(&no)).map_or(0, |one| one.depth + 1);
        let dirty = if below > DEPTH_MAX {
            self.flatten(chunk, alloc)
        } else {
            Dirty { base: chunk, patch: Vec::new(), depth: below }
        };
        let id = self.next_id;
        self.next_id += 1;
        let no = self.new_row(Row { id, chunk: number, refs: 1, state: State::Dirty, ..FREE });
        self.patched += dirty.patch.len() as u64;
        self.dirty.insert(no, dirty);
        no
    }

    /// A dirty leaf with the patches of all below: on the first of them that is clean.
    fn flatten(&mut self, chunk: Chunk, alloc: &mut Alloc) -> Dirty {
        let mut patch: BTreeMap<u16, LeafBlock> = BTreeMap::new();
        let (mut base, mut inherits) = (chunk, false);
        while let Chunk::Leaf { no, inherited } = base
            && let Some(dirty) = self.dirty.get(&no)
        {
            inherits |= inherited;
            for (index, block) in &dirty.patch {
                let stamp = if inherits { Place::EMPTY } else { block.stamp };
                patch.entry(*index).or_insert(LeafBlock { stamp, ..*block });
            }
            base = dirty.base;
        }
        if inherits {
            base = base.inherit();
        }
        base.leaf().into_iter().for_each(|no| self.hold(no));
        for block in patch.values().filter(|block| block.device != 0) {
            alloc.hold(block.device);
        }
        chunk.leaf().into_iter().for_each(|no| self.release(no, alloc));
        Dirty { base, patch: patch.into_iter().collect(), depth: 0 }
    }

    /// Changes a block of a leaf that `change` gave.
    pub(crate) fn put(&mut self, no: LeafNo, index: usize, block: LeafBlock, alloc: &mut Alloc) {
        let dirty = self.dirty.get_mut(&no).expect("a leaf for changing");
        let index = u16::try_from(index).expect("below 1,024");
        let at = dirty.patch.partition_point(|(own, _)| *own < index);
        if let Some((_, old)) = dirty.patch.get_mut(at).filter(|(own, _)| *own == index) {
            if old.device != 0 {
                alloc.release(old.device);
            }
            *old = block;
        } else {
            dirty.patch.insert(at, (index, block));
            self.patched += 1;
        }
    }

    /// A leaf that is at hand.
    pub(crate) fn data(&self, no: LeafNo) -> Option<&LeafData> {
        let pinned = self.pinned.get(&no).filter(|_| !self.reads_unwritten_leaves());
        pinned.map(|(data, _)| data).or_else(|| self.cache.get(no))
    }

    pub(crate) fn pin(&mut self, no: LeafNo, data: LeafData) {
        self.pinned.entry(no).or_insert((data, 0)).1 += 1;
        self.hold(no);
    }

    pub(crate) fn unpin(&mut self, no: LeafNo, alloc: &mut Alloc) {
        let (_, pins) = self.pinned.get_mut(&no).expect("pinned before");
        *pins -= 1;
        if *pins == 0 {
            self.pinned.remove(&no);
        }
        self.release(no, alloc);
    }

    /// Appends blocks `first..last` of a chunk, or says which leaf has to be read for that.
    pub(crate) fn fill(
        &self,
        chunk: Chunk,
        (first, last): (usize, usize),
        into: &mut Vec<LeafBlock>,
    ) -> Result<(), LeafNo> {
        self.fill_by(chunk, (first, last), into, &mut |no| self.data(no).cloned().ok_or(no))
    }

    /// As `fill`, with another way to the leaves.
    pub(crate) fn fill_by<E>(
        &self,
        chunk: Chunk,
        (first, last): (usize, usize),
        into: &mut Vec<LeafBlock>,
        get: &mut dyn FnMut(LeafNo) -> Result<LeafData, E>,
    ) -> Result<(), E> {
        let (no, inherited) = match chunk {
            Chunk::Hole(stamp) => {
                let hole = LeafBlock { stamp, ..LeafBlock::NEVER };
                into.resize(into.len() + last - first, hole);
                return Ok(());
            }
            Chunk::Leaf { no, inherited } => (no, inherited),
        };
        let start = into.len();
        if let Some(dirty) = self.dirty.get(&no) {
            let patch = dirty.within(first, last);
            if patch.len() == last - first {
                into.extend(patch.iter().map(|(_, block)| *block));
            } else {
                self.fill_by(dirty.base, (first, last), into, get)?;
                for (index, block) in patch {
                    into[start + usize::from(*index) - first] = *block;
                }
            }
        } else {
            into.extend_from_slice(&get(no)?[first..last]);
        }
        if inherited {
            into[start..].iter_mut().for_each(|block| block.stamp = Place::EMPTY);
        }
        Ok(())
    }

    /// Blocks of a chunk that are no holes; of one that was changed since the last checkpoint at
    /// most so many.
    pub(crate) fn written(&self, chunk: Chunk) -> u64 {
        let Some(no) = chunk.leaf() else { return 0 };
        let Some(dirty) = self.dirty.get(&no) else { return u64::from(self.row(no).written) };
        let patched = dirty.patch.iter().filter(|(_, block)| block.device != 0).count() as u64;
        (self.written(dirty.base) + patched).min(CHUNK_BLOCKS as u64)
    }

    /// A dirty leaf has its place on the device, with these blocks: it is clean from now on, pinned
    /// until each of its runs is written. `base` is what its base has. What the patch replaced is
    /// given up, and what the leaf has in common with a base that stays gets one more holder.
    pub(crate) fn merged(
        &mut self,
        no: LeafNo,
        (crc, runs): (u32, Vec<Run>),
        (base, blocks): (&[LeafBlock], LeafData),
        alloc: &mut Alloc,
    ) {
        let dirty = self.dirty.remove(&no).expect("a dirty leaf");
        self.patched -= dirty.patch.len() as u64;
        if let Some(below) = dirty.base.leaf() {
            let mut patched = dirty.patch.iter().map(|(index, _)| usize::from(*index)).peekable();
            let alone = self.refs(below) == 1;
            for (index, block) in base.iter().enumerate() {
                let replaced = patched.next_if_eq(&index).is_some();
                match (block.device, alone, replaced) {
                    (0, ..) | (_, true, false) | (_, false, true) => {}
                    (device, true, true) => alloc.release_replaced(device),
                    (device, false, false) => alloc.hold(device),
                }
            }
            if alone {
                let runs = self.runs(below);
                runs.iter().flat_map(|run| run.0..run.0 + run.1).for_each(|block| {
                    alloc.release_replaced(block);
                });
                self.live -= 1;
                self.free_row(below);
            } else {
                self.release(below, alloc);
            }
        }
        self.set_written(no, &blocks);
        for _ in &runs {
            self.pin(no, LeafData::clone(&blocks));
        }
        self.place(no, crc, runs);
        if !self.reads_unwritten_leaves() {
            self.cache.insert(no, blocks);
        }
    }

    /// Every leaf that there is: dirty, or where it lies.
    pub(crate) fn all(&self) -> impl Iterator<Item = LeafNo> + '_ {
        let rows = self.rows.iter().flatten().zip(0..);
        rows.filter(|(row, _)| row.state != State::Free).map(|(_, no)| LeafNo(no))
    }

    /// References that pins are.
    pub(crate) fn pins(&self) -> impl Iterator<Item = (LeafNo, u32)> + '_ {
        self.pinned.iter().map(|(no, (_, pins))| (*no, *pins))
    }

    #[cfg(not(feature = "canary"))]
    #[allow(clippy::unused_self)] // the other build looks at the options
    fn forgets_dead_leaves(&self) -> bool {
        false
    }

    #[cfg(feature = "canary")]
    fn forgets_dead_leaves(&self) -> bool {
        self.canary == Some(crate::options::Canary::ForgetDeadLeaf)
    }

    #[cfg(not(feature = "canary"))]
    #[allow(clippy::unused_self)] // the other build looks at the options
    fn reads_unwritten_leaves(&self) -> bool {
        false
    }

    #[cfg(feature = "canary")]
    fn reads_unwritten_leaves(&self) -> bool {
        self.canary == Some(crate::options::Canary::ReadUnwrittenLeaf)
    }
}

const _: () = assert!(size_of::<Row>() == 32 && size_of::<Chunk>() == 24);
