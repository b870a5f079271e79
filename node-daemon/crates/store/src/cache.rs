//! Leaves that were read lately, within a fixed number: the only part of the maps whose size does
//! not follow what is mapped.
//!
//! Second chance: a leaf that was used since the hand last came by stays for another round. Who must
//! have a leaf for longer pins it (`leaf`); this forgets whatever it likes, except that the newest
//! one stays.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tercet_proto::disk::{CHUNK_BLOCKS, LeafBlock};

use crate::hash::NumberMap;
use crate::leaf::LeafNo;

/// The blocks of one chunk.
pub(crate) type LeafData = Arc<[LeafBlock]>;

/// Memory of a leaf.
pub(crate) const LEAF_BYTES: usize = CHUNK_BLOCKS * size_of::<LeafBlock>();

#[derive(Debug)]
struct Kept {
    data: LeafData,
    used: AtomicBool,
}

/// The leaves, and the order in which the hand passes them.
#[derive(Debug)]
pub(crate) struct Cache {
    leaves_max: usize,
    kept: NumberMap<LeafNo, Kept>,
    order: VecDeque<LeafNo>,
}

impl Cache {
    pub(crate) fn new(bytes_max: usize) -> Self {
        let leaves_max = (bytes_max / LEAF_BYTES).max(1);
        Self { leaves_max, kept: NumberMap::default(), order: VecDeque::new() }
    }

    pub(crate) fn get(&self, no: LeafNo) -> Option<&LeafData> {
        let kept = self.kept.get(&no)?;
        kept.used.store(true, Ordering::Relaxed);
        Some(&kept.data)
    }

    pub(crate) fn insert(&mut self, no: LeafNo, data: LeafData) {
        let used = AtomicBool::new(false);
        if self.kept.insert(no, Kept { data, used }).is_some() {
            return;
        }
        while self.kept.len() > self.leaves_max {
            let oldest = self.order.pop_front().expect("every leaf is in the order");
            if self.kept[&oldest].used.swap(false, Ordering::Relaxed) {
                self.order.push_back(oldest);
            } else {
                self.kept.remove(&oldest);
            }
        }
        self.order.push_back(no);
    }

    pub(crate) fn remove(&mut self, no: LeafNo) {
        if self.kept.remove(&no).is_some() {
            self.order.retain(|other| *other != no);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(device: u32) -> LeafData {
        vec![LeafBlock { device, ..LeafBlock::NEVER }; CHUNK_BLOCKS].into()
    }

    #[test]
    fn it_keeps_what_is_used_and_never_more_than_it_may() {
        let mut cache = Cache::new(3 * LEAF_BYTES);
        for no in 0..3 {
            cache.insert(LeafNo(no), data(no));
        }
        assert!(cache.get(LeafNo(0)).is_some());
        cache.insert(LeafNo(3), data(3));
        assert_eq!(cache.get(LeafNo(0)).expect("it was used")[5].device, 0);
        assert!(cache.get(LeafNo(1)).is_none());
        cache.remove(LeafNo(2));
        cache.insert(LeafNo(4), data(4));
        assert_eq!((cache.kept.len(), cache.order.len()), (3, 3));
    }

    #[test]
    fn the_newest_stays_even_where_there_is_room_for_one_only() {
        let mut cache = Cache::new(0);
        for no in 0..9 {
            cache.insert(LeafNo(no), data(no));
            assert!(cache.get(LeafNo(no)).is_some());
        }
        assert_eq!(cache.order.len(), 1);
    }
}
