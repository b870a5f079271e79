//! Which blocks of the data area are used, by how many leaves and entries, and where the bytes of a
//! block are while they are still on their way from the log to it.
//!
//! A block is *free*, *held* (count of holders > 0) or *pending*: nobody holds it any more, but the
//! newest durable checkpoint may, so it is not given out again before a checkpoint taken later is
//! durable (rule W8). Counts are not stored: opening the store counts the holders again, so nothing
//! can leak over a restart. Most blocks have one holder: for those a bit is enough, and counts are
//! kept for groups of blocks in which one is shared.
//!
//! A small write gets its block when it is applied; its bytes stay in the log ring until they are
//! copied home. `home` says for which blocks that is so: the maps never name a place in the ring.

use std::collections::HashMap;

use tercet_proto::disk::{CHUNK_BLOCKS, Run};

use crate::hash::NumberMap;

/// So many runs of free blocks are passed over for each block at most in looking for longer ones.
const SKIPPED_RUNS_MAX: u32 = 16;

/// Blocks of the data area.
#[derive(Debug)]
pub(crate) struct Alloc {
    data: Run,
    /// A bit for each block of the data area: set = held or pending.
    busy: Vec<u64>,
    /// A bit for each block of the data area: set = held.
    held: Vec<u64>,
    /// Holders, for groups of 1,024 blocks in which one has more than one.
    shared: Vec<Option<Box<Group>>>,
    free: u64,
    /// Where the next blocks are looked for, and where the next long runs.
    cursor: u32,
    long: u32,
    /// Freed since the last checkpoint began.
    pending: Vec<u32>,
    /// Freed before the checkpoint that is being made.
    aging: Vec<u32>,
    /// Block of the data area -> block of the ring where its bytes are for now.
    home: NumberMap<u32, u32>,
    /// Blocks that are being read, and how often: they are not given out meanwhile.
    reading: NumberMap<u32, u32>,
    /// Blocks promised to entries that will need them when they are applied.
    pub(crate) reserved: u64,
    /// Breaks the count once.
    #[cfg(feature = "canary")]
    pub(crate) forget_release: bool,
}

/// Holders of 1,024 blocks.
#[derive(Debug)]
struct Group {
    counts: [u32; CHUNK_BLOCKS],
    /// How many blocks have more than one.
    many: u32,
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
            held: vec![0; busy.len()],
            busy,
            shared: (0..groups).map(|_| None).collect(),
            free: u64::from(data.1),
            cursor: 0,
            long: 0,
            pending: Vec::new(),
            aging: Vec::new(),
            home: NumberMap::default(),
            reading: NumberMap::default(),
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

    fn is_held(&self, index: usize) -> bool {
        self.held[index / 64] >> (index % 64) & 1 == 1
    }

    pub(crate) fn holders(&self, block: u32) -> u32 {
        let index = self.index(block);
        match &self.shared[index / CHUNK_BLOCKS] {
            Some(group) => group.counts[index % CHUNK_BLOCKS],
            None => u32::from(self.is_held(index)),
        }
    }

    /// Counts for the group of a block, made of the bits where there are none.
    fn group(&mut self, index: usize) -> &mut Group {
        let number = index / CHUNK_BLOCKS;
        let (first, end) = (number * CHUNK_BLOCKS, self.data.1 as usize);
        let held = &self.held;
        self.shared[number].get_or_insert_with(|| {
            let mut counts = [0; CHUNK_BLOCKS];
            for (count, index) in counts.iter_mut().zip(first..end) {
                *count = (held[index / 64] >> (index % 64) & 1) as u32;
            }
            Box::new(Group { counts, many: 0 })
        })
    }

    /// Adds a holder of a block that is held, or (while opening) of any.
    pub(crate) fn hold(&mut self, block: u32) {
        let index = self.index(block);
        let (word, bit) = (index / 64, 1_u64 << (index % 64));
        if self.busy[word] & bit == 0 {
            self.busy[word] |= bit;
            self.free -= 1;
        }
        if self.held[word] & bit == 0 {
            self.held[word] |= bit;
            if let Some(group) = &mut self.shared[index / CHUNK_BLOCKS] {
                group.counts[index % CHUNK_BLOCKS] = 1;
            }
            return;
        }
        let group = self.group(index);
        let count = &mut group.counts[index % CHUNK_BLOCKS];
        group.many += u32::from(*count == 1);
        *count = count.checked_add(1).expect("fewer than 2^32 holders");
    }

    /// Takes a holder away; without any the block becomes pending.
    pub(crate) fn release(&mut self, block: u32) {
        if self.give_up(block) {
            self.pending.push(block);
        }
    }

    /// As `release`, of a block that the checkpoint being made does not name: it may be used again
    /// when that one is durable, not only after the next one (rule W8).
    pub(crate) fn release_replaced(&mut self, block: u32) {
        if self.give_up(block) {
            self.aging.push(block);
        }
    }

    /// Takes a holder away, and says whether it was the last.
    fn give_up(&mut self, block: u32) -> bool {
        #[cfg(feature = "canary")]
        if std::mem::take(&mut self.forget_release) {
            return false;
        }
        let index = self.index(block);
        assert!(self.is_held(index), "a held block");
        let number = index / CHUNK_BLOCKS;
        if let Some(group) = &mut self.shared[number] {
            let count = &mut group.counts[index % CHUNK_BLOCKS];
            *count -= 1;
            if *count > 0 {
                group.many -= u32::from(*count == 1);
                if group.many == 0 {
                    self.shared[number] = None;
                }
                return false;
            }
        }
        self.held[index / 64] &= !(1 << (index % 64));
        self.home.remove(&block);
        true
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

    /// `count` blocks with one holder each, the first that are free behind the last ones; none, and
    /// nothing changed, when fewer are free.
    pub(crate) fn take(&mut self, count: u32) -> Option<Vec<Run>> {
        let (runs, at) = self.find(self.cursor, count, (1, u32::MAX)).ok()?;
        self.cursor = at;
        self.hold_runs(&runs);
        Some(runs)
    }

    /// As `take`, in runs as long as are near, and not shorter than so many blocks; none otherwise.
    /// Shorter pieces are passed over, for `take` to use or until they have grown together.
    pub(crate) fn take_long(&mut self, count: u32, length_min: u32) -> Option<Vec<Run>> {
        let mut length = count;
        loop {
            match self.find(self.long, count, (length, count * SKIPPED_RUNS_MAX)) {
                Ok((runs, at)) => {
                    self.long = at;
                    self.hold_runs(&runs);
                    return Some(runs);
                }
                Err(reached) if length <= length_min => {
                    self.long = reached; // the next one goes on from there
                    return None;
                }
                Err(_) => length = (length / 2).max(length_min),
            }
        }
    }

    /// The first free blocks from a place on, cyclically, in runs of at least so many (the last may
    /// be shorter), and the place behind them; or how far it was looked.
    fn find(
        &self,
        from: u32,
        count: u32,
        (length_min, skipped_max): (u32, u32),
    ) -> Result<(Vec<Run>, u32), u32> {
        let mut runs: Vec<Run> = Vec::new();
        let (mut left, mut at) = (count, from);
        let (mut passed, mut skipped) = (0, 0);
        if u64::from(count) > self.free {
            return Err(from);
        }
        while left > 0 {
            let (index, length) = self.next_run(at, left);
            passed += u64::from((index + self.data.1 - at) % self.data.1 + length);
            at = (index + length) % self.data.1;
            if passed > u64::from(self.data.1) {
                return Err(from);
            }
            if length < length_min.min(left) {
                skipped += 1;
                if skipped == skipped_max {
                    return Err(at);
                }
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.0 + run.1 == self.data.0 + index => run.1 += length,
                _ => runs.push((self.data.0 + index, length)),
            }
            left -= length;
        }
        Ok((runs, at))
    }

    /// Long runs are looked for from the longest one on: where a store that was opened goes on.
    pub(crate) fn seek_longest(&mut self) {
        let (mut longest, mut at) = (0, 0);
        while self.free > 0 && at < self.data.1 {
            let (index, length) = self.next_run(at, u32::MAX);
            if index < at {
                return; // round the end
            }
            if length > longest {
                (longest, self.long) = (length, index);
            }
            at = index + length;
        }
    }

    /// The first free run at or behind a place, cyclically, and how long it is, at most `most`. There
    /// is one.
    fn next_run(&self, at: u32, most: u32) -> (u32, u32) {
        let words = self.busy.len();
        let mut word = at as usize / 64;
        let mut free = !self.busy[word] & (u64::MAX << (at % 64));
        for _ in 0..=words {
            if free != 0 {
                break;
            }
            word = (word + 1) % words;
            free = !self.busy[word];
        }
        assert_ne!(free, 0, "a free block was counted and is not there");
        let first = free.trailing_zeros();
        let index = (word * 64) as u32 + first;
        let mut length = (!(free >> first)).trailing_zeros();
        while length < most && (index + length).is_multiple_of(64) && word + 1 < words {
            word += 1;
            let more = self.busy[word].trailing_zeros();
            length += more;
            if more == 0 {
                break;
            }
        }
        (index, length.min(most))
    }

    /// A checkpoint begins: what is pending now may be used again when it is durable.
    pub(crate) fn age(&mut self) {
        assert!(self.aging.is_empty(), "one checkpoint at a time");
        self.aging = std::mem::take(&mut self.pending);
    }

    /// The checkpoint is durable.
    pub(crate) fn free_aged(&mut self) {
        for block in std::mem::take(&mut self.aging) {
            if self.reading.contains_key(&block) {
                self.pending.push(block); // until the next one
                continue;
            }
            let index = self.index(block);
            assert_eq!(self.holders(block), 0, "a pending block has no holder");
            self.busy[index / 64] &= !(1 << (index % 64));
            self.free += 1;
        }
    }

    /// A read of a block begins: whoever gives the block up, it stays what it is until the read ends.
    pub(crate) fn begin_read(&mut self, block: u32) {
        *self.reading.entry(block).or_insert(0) += 1;
    }

    pub(crate) fn end_read(&mut self, block: u32) {
        let count = self.reading.get_mut(&block).expect("begun before");
        *count -= 1;
        if *count == 0 {
            self.reading.remove(&block);
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
    /// Breaks rule W8: what was freed is the first to be used again.
    pub(crate) fn free_early(&mut self) {
        self.aging.append(&mut self.pending);
        if let Some(block) = self.aging.first() {
            (self.cursor, self.long) = (block - self.data.0, block - self.data.0);
        }
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

    /// Counts are there while a block of the group is shared, and right before, then and after.
    #[test]
    fn counts_come_and_go_with_what_is_shared() {
        let mut alloc = Alloc::new((64, 1500));
        let runs = alloc.take(1100).expect("free");
        assert_eq!(runs, [(64, 1100)]);
        assert!(alloc.shared.iter().all(Option::is_none));
        alloc.hold(70);
        alloc.hold(70);
        alloc.hold(71);
        alloc.release(80);
        let counted = [70, 71, 72, 80, 64 + 1099, 64 + 1100].map(|block| alloc.holders(block));
        assert_eq!(counted, [3, 2, 1, 0, 1, 0]);
        assert!(alloc.shared[0].is_some() && alloc.shared[1].is_none());
        for block in [70, 71, 70] {
            alloc.release(block);
        }
        assert!(alloc.shared[0].is_none(), "no block has more than one holder");
        let mut fresh: HashMap<u32, u32> = (64..64 + 1100).map(|block| (block, 1)).collect();
        fresh.remove(&80);
        assert!(alloc.compare(&fresh).is_empty());
        alloc.release(70);
        assert_eq!((alloc.holders(70), alloc.pending()), (0, 2));
    }

    #[test]
    fn a_block_that_is_being_read_is_not_given_out_however_many_checkpoints_come() {
        let mut alloc = Alloc::new((64, 64));
        alloc.take(64).expect("all of them");
        for _ in 0..2 {
            alloc.begin_read(70);
        }
        alloc.release(70);
        for _ in 0..2 {
            alloc.age();
            alloc.free_aged();
            assert!(alloc.take(1).is_none());
            alloc.end_read(70);
        }
        alloc.age();
        alloc.free_aged();
        assert_eq!(alloc.take(1), Some(vec![(70, 1)]));
        assert!(alloc.reading.is_empty());
    }

    /// In long runs or not at all, and then nothing has changed; over the end of the device as well.
    #[test]
    fn long_runs_or_none() {
        let mut alloc = Alloc::new((64, 200));
        alloc.take(200).expect("all of them");
        for block in (64..264).filter(|block| block % 4 != 0 || *block >= 244) {
            alloc.release(block);
        }
        alloc.age();
        alloc.free_aged();
        assert_eq!(alloc.take_long(8, 4), Some(vec![(241, 8)]), "runs of 3 are passed over");
        assert_eq!(alloc.take_long(8, 4), Some(vec![(249, 8)]));
        assert_eq!(alloc.take_long(8, 4), Some(vec![(257, 7), (65, 1)]));
        assert_eq!(alloc.take(3), Some(vec![(66, 2), (69, 1)]));
        let free = alloc.free();
        assert_eq!((alloc.take_long(8, 4), alloc.free()), (None, free), "no runs of 4");
        let rest = alloc.take(alloc.free() as u32).expect("free");
        assert_eq!((rest[0], rest.len(), alloc.free()), ((70, 2), 43, 0));
        assert_eq!(alloc.take_long(1, 1), None);
    }

    /// The longest runs that are near come first; short ones are not worth a write of their own.
    #[test]
    fn long_runs_come_first() {
        let mut alloc = Alloc::new((64, 200));
        alloc.take(200).expect("all of them");
        for block in (70..72).chain(80..84).chain(100..104).chain(130..138).chain(150..152) {
            alloc.release(block);
        }
        alloc.age();
        alloc.free_aged();
        assert_eq!(alloc.take_long(8, 4), Some(vec![(130, 8)]));
        assert_eq!(alloc.take_long(8, 4), Some(vec![(80, 4), (100, 4)]));
        assert_eq!(alloc.take_long(4, 4), None);
        assert_eq!(alloc.take(4), Some(vec![(70, 2), (150, 2)]));
    }

    /// Runs are found whole over the ends of the bits' words.
    #[test]
    fn a_run_goes_over_words() {
        let mut alloc = Alloc::new((64, 1000));
        assert_eq!(alloc.take_long(1000, 1), Some(vec![(64, 1000)]));
        for block in 100..400 {
            alloc.release(block);
        }
        alloc.age();
        alloc.free_aged();
        for block in 500..600 {
            alloc.release(block);
        }
        alloc.age();
        alloc.free_aged();
        assert_eq!(alloc.take_long(301, 301), None);
        alloc.seek_longest();
        assert_eq!(alloc.take_long(50, 50), Some(vec![(100, 50)]));
        assert_eq!(alloc.take_long(250, 250), Some(vec![(150, 250)]));
        alloc.seek_longest();
        assert_eq!(alloc.take_long(1, 1), Some(vec![(500, 1)]));
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
