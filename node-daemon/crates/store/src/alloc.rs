//! Which blocks of the data area are used, by how many leaves and entries, and where the bytes of a
//! block are while they are still on their way from the log to it.
//!
//! A block is *free*, *held* (count of holders > 0) or *pending*: nobody holds it any more, but the
//! newest durable checkpoint may, so it is not given out again before a checkpoint taken later is
//! durable (rule W8). Counts are not stored: opening the store counts the holders again, so nothing
//! can leak over a restart.
//!
//! A small write gets its block when it is applied; its bytes stay in the log ring until they are
//! copied home. `home` says for which blocks that is so: the maps never name a place in the ring.

use std::collections::HashMap;

use tercet_proto::disk::{CHUNK_BLOCKS, Run};

/// Blocks of the data area.
#[derive(Debug)]
pub(crate) struct Alloc {
    data: Run,
    /// A bit for each block of the data area: set = held or pending.
    busy: Vec<u64>,
    /// Holders, for groups of 1,024 blocks that have any.
    holders: Vec<Option<Box<[u32]>>>,
    held_in_group: Vec<u32>,
    free: u64,
    cursor: u32,
    /// Freed since the last checkpoint began.
    pending: Vec<u32>,
    /// Freed before the checkpoint that is being made.
    aging: Vec<u32>,
    /// Block of the data area -> block of the ring where its bytes are for now.
    home: HashMap<u32, u32>,
    /// Blocks promised to entries that will need them when they are applied.
    pub(crate) reserved: u64,
    /// Breaks the count once.
    #[cfg(feature = "canary")]
    pub(crate) forget_release: bool,
}

impl Alloc {
    pub(crate) fn new(data: Run) -> Self {
        let groups = (data.1 as usize).div_ceil(CHUNK_BLOCKS);
        let mut busy = vec![0; (data.1 as usize).div_ceil(64)];
        if !data.1.is_multiple_of(64) {
            *busy.last_mut().expect("a data area has blocks") = u64::MAX << (data.1 % 64);
        }
        Self {
            data,
            busy,
            holders: vec![None; groups],
            held_in_group: vec![0; groups],
            free: u64::from(data.1),
            cursor: 0,
            pending: Vec::new(),
            aging: Vec::new(),
            home: HashMap::new(),
            reserved: 0,
            #[cfg(feature = "canary")]
            forget_release: false,
        }
    }

    pub(crate) fn free(&self) -> u64 {
        self.free
    }

    /// Freed, but not to be used yet.
    pub(crate) fn pending(&self) -> u64 {
        (self.pending.len() + self.aging.len()) as u64
    }

    /// Held blocks.
    pub(crate) fn held(&self) -> u64 {
        u64::from(self.data.1) - self.free - self.pending()
    }

    pub(crate) fn contains(&self, run: Run) -> bool {
        run.1 > 0
            && run.0 >= self.data.0
            && u64::from(run.0) + u64::from(run.1)
                <= u64::from(self.data.0) + u64::from(self.data.1)
    }

    fn index(&self, block: u32) -> usize {
        assert!(self.contains((block, 1)), "block {block} is in the data area");
        (block - self.data.0) as usize
    }

    pub(crate) fn holders(&self, block: u32) -> u32 {
        let index = self.index(block);
        self.holders[index / CHUNK_BLOCKS].as_ref().map_or(0, |group| group[index % CHUNK_BLOCKS])
    }

    /// Adds a holder of a block that is held, or (while opening) of any.
    pub(crate) fn hold(&mut self, block: u32) {
        let index = self.index(block);
        let (word, bit) = (index / 64, 1_u64 << (index % 64));
        if self.busy[word] & bit == 0 {
            self.busy[word] |= bit;
            self.free -= 1;
        }
        let group = index / CHUNK_BLOCKS;
        let counts = self.holders[group].get_or_insert_with(|| vec![0; CHUNK_BLOCKS].into());
        let count = &mut counts[index % CHUNK_BLOCKS];
        if *count == 0 {
            self.held_in_group[group] += 1;
        }
        *count = count.checked_add(1).expect("fewer than 2^32 holders");
    }

    /// Takes a holder away; without any the block becomes pending.
    pub(crate) fn release(&mut self, block: u32) {
        #[cfg(feature = "canary")]
        if std::mem::take(&mut self.forget_release) {
            return;
        }
        let index = self.index(block);
        let group = index / CHUNK_BLOCKS;
        let counts = self.holders[group].as_mut().expect("a held block");
        let count = &mut counts[index % CHUNK_BLOCKS];
        *count = count.checked_sub(1).expect("a held block");
        if *count > 0 {
            return;
        }
        self.held_in_group[group] -= 1;
        if self.held_in_group[group] == 0 {
            self.holders[group] = None;
        }
        self.home.remove(&block);
        self.pending.push(block);
    }

    pub(crate) fn release_runs(&mut self, runs: &[Run]) {
        for block in runs.iter().flat_map(|run| run.0..run.0 + run.1) {
            self.release(block);
        }
    }

    pub(crate) fn hold_runs(&mut self, runs: &[Run]) {
        for block in runs.iter().flat_map(|run| run.0..run.0 + run.1) {
            self.hold(block);
        }
    }

    /// `count` blocks with one holder each, in as few runs as the place next to the last ones
    /// allows; none, and nothing changed, when fewer are free.
    pub(crate) fn take(&mut self, count: u32) -> Option<Vec<Run>> {
        if u64::from(count) > self.free {
            return None;
        }
        let mut runs: Vec<Run> = Vec::new();
        let mut left = count;
        while left > 0 {
            let index = self.next_free();
            self.cursor = index + 1;
            let block = self.data.0 + index;
            self.hold(block);
            match runs.last_mut() {
                Some(run) if run.0 + run.1 == block => run.1 += 1,
                _ => runs.push((block, 1)),
            }
            left -= 1;
        }
        Some(runs)
    }

    /// The first free block at or behind the cursor, cyclically. There is one.
    fn next_free(&self) -> u32 {
        let words = self.busy.len();
        let start = self.cursor % self.data.1;
        let mut word = start as usize / 64;
        let mut free = !self.busy[word] & (u64::MAX << (start % 64));
        for _ in 0..=words {
            if free != 0 {
                return (word * 64) as u32 + free.trailing_zeros();
            }
            word = (word + 1) % words;
            free = !self.busy[word];
        }
        panic!("a free block was counted and is not there");
    }

    /// A checkpoint begins: what is pending now may be used again when it is durable.
    pub(crate) fn age(&mut self) {
        assert!(self.aging.is_empty(), "one checkpoint at a time");
        self.aging = std::mem::take(&mut self.pending);
    }

    /// The checkpoint is durable.
    pub(crate) fn free_aged(&mut self) {
        for block in std::mem::take(&mut self.aging) {
            let index = self.index(block);
            assert_eq!(self.holders(block), 0, "a pending block has no holder");
            self.busy[index / 64] &= !(1 << (index % 64));
            self.free += 1;
        }
    }

    /// Where the bytes of a block are.
    pub(crate) fn location(&self, block: u32) -> u32 {
        self.home.get(&block).copied().unwrap_or(block)
    }

    /// The bytes of `block` are in the ring at `ring`.
    pub(crate) fn set_away(&mut self, block: u32, ring: u32) {
        self.home.insert(block, ring);
    }

    /// The bytes are at home, if they came from `ring`.
    pub(crate) fn set_home(&mut self, block: u32, ring: u32) {
        if self.home.get(&block) == Some(&ring) {
            self.home.remove(&block);
        }
    }

    /// All (ring, block) whose bytes are away, in the ring's order.
    pub(crate) fn away(&self) -> Vec<(u32, u32)> {
        let mut away: Vec<_> = self.home.iter().map(|(block, ring)| (*ring, *block)).collect();
        away.sort_unstable();
        away
    }

    /// Compares with a fresh count of all holders; says what is wrong.
    pub(crate) fn compare(&self, fresh: &HashMap<u32, u32>) -> Vec<String> {
        let mut wrong = Vec::new();
        let pending: std::collections::HashSet<u32> =
            self.pending.iter().chain(&self.aging).copied().collect();
        let mut free = 0;
        for index in 0..self.data.1 {
            let block = self.data.0 + index;
            let (have, want) = (self.holders(block), fresh.get(&block).copied().unwrap_or(0));
            let busy = self.busy[index as usize / 64] >> (index % 64) & 1 == 1;
            free += u64::from(!busy);
            if have != want {
                wrong.push(format!("block {block}: {have} holders counted, {want} found"));
            }
            if busy != (want > 0 || pending.contains(&block)) {
                wrong.push(format!("block {block}: busy {busy}, {want} holders"));
            }
        }
        if free != self.free {
            wrong.push(format!("{} free blocks counted, {free} found", self.free));
        }
        for block in self.home.keys().filter(|block| self.holders(**block) == 0) {
            wrong.push(format!("block {block} is away and nobody holds it"));
        }
        wrong
    }

    #[cfg(feature = "canary")]
    /// Breaks rule W8.
    pub(crate) fn free_early(&mut self) {
        self.aging.append(&mut self.pending);
        self.free_aged();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_block_comes_back_only_after_the_next_checkpoint() {
        let mut alloc = Alloc::new((100, 70));
        let runs = alloc.take(70).expect("all of them");
        assert_eq!(runs, [(100, 70)]);
        assert!(alloc.take(1).is_none());
        alloc.release(110);
        alloc.age();
        alloc.release(111);
        assert!(alloc.take(1).is_none());
        alloc.free_aged();
        assert_eq!(alloc.take(1), Some(vec![(110, 1)]));
        assert!(alloc.take(1).is_none());
        let fresh = (100..170).filter(|block| *block != 111).map(|block| (block, 1)).collect();
        assert!(alloc.compare(&fresh).is_empty());
    }

    #[test]
    fn shared_blocks_stay_until_the_last_holder_goes() {
        let mut alloc = Alloc::new((64, 64));
        let block = alloc.take(1).expect("free")[0].0;
        alloc.hold(block);
        alloc.set_away(block, 7);
        alloc.release(block);
        assert_eq!((alloc.pending(), alloc.location(block)), (0, 7));
        alloc.release(block);
        assert_eq!((alloc.pending(), alloc.location(block)), (1, block));
    }
}
