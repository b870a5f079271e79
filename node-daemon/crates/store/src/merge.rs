//! The leaves of a checkpoint: each changed one becomes its base with the patch over it, in a place of
//! its own.
//!
//! Bases are read some ahead of time and pinned until they are used, so that a cache as small as may
//! be does not stop a checkpoint. A leaf comes behind the one that it is based on: that one was
//! written before, is clean, and its bytes are at hand until the device has them. What a leaf
//! replaces of a base that nobody else names is in no map of this checkpoint, so it may be used again
//! when this one is durable (rule W8); what others name stays theirs.

use tercet_proto::BLOCK_BYTES;
use tercet_proto::disk::{CHUNK_BLOCKS, LeafBlock, LeafImage};

use crate::cache::LeafData;
use crate::checkpoint::{Checkpoint, WRITES_IN_FLIGHT_MAX, Write};
use crate::leaf::LeafNo;
use crate::load::Waiter;
use crate::store::Store;

const LEAVES_PER_STEP_MAX: usize = 8;
/// Bases that are at hand or on their way ahead of time.
const BASES_AHEAD_MAX: usize = 8;

impl Store {
    pub(crate) fn pump_leaves(&mut self, now: &mut Checkpoint) {
        self.read_ahead(now);
        for _ in 0..LEAVES_PER_STEP_MAX {
            if now.writes.len() >= WRITES_IN_FLIGHT_MAX {
                return;
            }
            let Some(no) = now.leaves.front().copied() else {
                for base in std::mem::take(&mut now.bases) {
                    self.leaves.unpin(base, &mut self.alloc); // whoever needed it is gone
                }
                return;
            };
            if self.leaves.refs(no) > 1 && !self.merge(now, no) {
                return; // its base is on its way
            }
            now.leaves.pop_front();
            self.leaves.release(no, &mut self.alloc);
        }
    }

    /// Asks for the bases of the next leaves.
    fn read_ahead(&mut self, now: &Checkpoint) {
        for no in now.leaves.iter().take(BASES_AHEAD_MAX) {
            let base = self.leaves.dirty_of(*no).and_then(|dirty| dirty.base.leaf());
            let Some(base) = base.filter(|base| self.leaves.dirty_of(*base).is_none()) else {
                continue;
            };
            if self.leaves.data(base).is_none() && !self.load(base, Waiter::Merge) {
                return;
            }
        }
    }

    /// A base that the checkpoint asked for has been read.
    pub(crate) fn base_is_here(&mut self, no: LeafNo, data: &LeafData) {
        let Some(now) = &mut self.checkpoint else { return };
        if !now.leaves.is_empty() && now.bases.insert(no) {
            self.leaves.pin(no, LeafData::clone(data));
        }
    }

    /// Gives a dirty leaf its place; false: its base is not at hand.
    fn merge(&mut self, now: &mut Checkpoint, no: LeafNo) -> bool {
        let dirty = self.leaves.dirty_of(no).expect("who is to be written is dirty");
        let base = dirty.base;
        let mut below: Vec<LeafBlock> = Vec::with_capacity(CHUNK_BLOCKS);
        if self.leaves.fill(base, (0, CHUNK_BLOCKS), &mut below).is_err() {
            return false;
        }
        let mut blocks: Box<[LeafBlock]> = below.clone().into();
        let patch = &dirty.patch[..dirty.patch.len() - self.loses_patch()];
        for (index, block) in patch {
            blocks[usize::from(*index)] = *block;
        }
        let (store, place) = (self.superblock.store, self.leaves.name_of(no));
        let image = LeafImage { store, id: place.0, chunk: place.1, blocks };
        let bytes = image.encode();
        let count = (bytes.len() / BLOCK_BYTES) as u32;
        let runs = self.alloc.take(count).expect("kept back for metadata");
        let mut from = 0;
        for run in &runs {
            let to = from + run.1 as usize * BLOCK_BYTES;
            let bytes = bytes[from..to].to_vec();
            now.writes.push_back(Write { first: run.0, bytes, leaf: Some(no) });
            from = to;
        }
        if let Some(base) = base.leaf().filter(|base| now.bases.remove(base)) {
            self.leaves.unpin(base, &mut self.alloc);
        }
        let crc = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
        let blocks: LeafData = image.blocks.into();
        self.leaves.merged(no, (crc, runs), (&below, blocks), &mut self.alloc);
        true
    }

    #[cfg(not(feature = "canary"))]
    #[allow(clippy::unused_self)] // the other build looks at the options
    fn loses_patch(&self) -> usize {
        0
    }

    #[cfg(feature = "canary")]
    fn loses_patch(&self) -> usize {
        usize::from(self.options.canary == Some(crate::options::Canary::LosePatch))
    }
}
