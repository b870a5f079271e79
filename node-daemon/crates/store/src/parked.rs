//! Reads of maps that lack a leaf: put off, and gone on with when it has been read.
//!
//! What a read saw when it began is what it gives, whatever is applied meanwhile: it holds the chunks
//! that it is about (or, where it goes through a whole map, that map). It asks for one leaf after the
//! other and keeps of each only what it wants, so its memory does not grow with what it waits for.

use std::collections::VecDeque;

use tercet_proto::copy::{StampRun, Stamps};
use tercet_proto::disk::{CHUNK_BLOCKS, LeafBlock};
use tercet_proto::storage::{StorageError, StorageEvent};
use tercet_proto::{BlockRange, Token, VolumeId};

use crate::chunks::ChunkWalk;
use crate::leaf::{Chunk, LeafNo};
use crate::load::{LeafError, Waiter};
use crate::map::{Map, Space, by_chunk, split};
use crate::read::{For, Sums};
use crate::store::Store;
use crate::task::Task;

/// Reads that wait for a leaf at a time.
const PARKED_MAX: usize = 1024;

/// What is put off.
#[derive(Debug)]
pub(crate) enum Parked {
    Blocks(Box<Blocks>),
    Sums(VolumeId, Box<Sums>),
    Stamps(Box<Walk>),
    Chunks(Box<ChunkWalk>),
    /// With the leaves that are pinned for it.
    Task(Task, Vec<LeafNo>),
}

/// Blocks of ranges, as far as they are known.
#[derive(Debug)]
pub(crate) struct Blocks {
    volume: VolumeId,
    ranges: Vec<BlockRange>,
    token: Token,
    /// What is not looked at yet: chunk, and which of its blocks.
    left: VecDeque<(usize, Chunk, (usize, usize))>,
    found: Vec<LeafBlock>,
    /// Keep those blocks as they are.
    held: Vec<LeafNo>,
}

/// Stamps of neighbouring blocks, as far as they are known.
#[derive(Debug)]
pub(crate) struct Walk {
    volume: VolumeId,
    map: Map,
    at: u64,
    end: u64,
    runs: Vec<StampRun>,
    runs_max: usize,
    token: Token,
}

impl Parked {
    /// The map that it keeps.
    pub(crate) fn map(&self) -> Option<&Map> {
        match self {
            Self::Blocks(_) | Self::Task(..) => None,
            Self::Sums(_, sums) => Some(&sums.map),
            Self::Stamps(walk) => Some(&walk.map),
            Self::Chunks(walk) => Some(&walk.map),
        }
    }

    /// The leaves that it keeps besides.
    pub(crate) fn leaves(&self) -> &[LeafNo] {
        match self {
            Self::Blocks(blocks) => &blocks.held,
            _ => &[],
        }
    }
}

impl Walk {
    /// Adds a run; false: there is no room for it.
    fn push(&mut self, run: StampRun) -> bool {
        let full = self.runs.len() == self.runs_max;
        let alike = |last: &&mut StampRun| (last.stamp, last.hole) == (run.stamp, run.hole);
        match self.runs.last_mut().filter(alike) {
            Some(last) => last.count += run.count,
            None if full => return false,
            None => self.runs.push(run),
        }
        self.at += u64::from(run.count);
        true
    }

    /// Adds blocks of a chunk; false: there is no room for them.
    fn add(&mut self, chunk: Chunk, blocks: &[LeafBlock]) -> bool {
        if let Chunk::Hole(stamp) = chunk {
            return self.push(StampRun { count: blocks.len() as u32, stamp, hole: true });
        }
        let one =
            |block: &LeafBlock| StampRun { count: 1, stamp: block.stamp, hole: block.device == 0 };
        blocks.iter().map(one).all(|run| self.push(run))
    }
}

impl Store {
    fn space(&mut self) -> Space<'_> {
        Space { alloc: &mut self.alloc, leaves: &mut self.leaves }
    }

    /// Waits for a leaf.
    pub(crate) fn park(&mut self, no: LeafNo, what: Parked) {
        let id = self.next_job;
        self.next_job += 1;
        if self.failed.is_some()
            || self.parked.len() >= PARKED_MAX
            || !self.load(no, Waiter::Read(id))
        {
            return self.give_up(what, StorageError::Busy);
        }
        self.parked.insert(id, what);
    }

    /// The leaf is there, or cannot be read.
    pub(crate) fn go_on(&mut self, id: u64, no: LeafNo, error: Option<&LeafError>) {
        let parked = self.parked.remove(&id).expect("a read that waits");
        if let Some(error) = error {
            let error = match &parked {
                Parked::Blocks(blocks) => Self::leaf_error(blocks.volume, blocks.at(), error),
                Parked::Sums(volume, sums) => Self::leaf_error(*volume, sums.start(), error),
                Parked::Stamps(walk) => Self::leaf_error(walk.volume, walk.at, error),
                Parked::Chunks(walk) => Self::leaf_error(walk.volume, walk.start(), error),
                Parked::Task(task, _) => Self::task_error(task, error),
            };
            return self.give_up(parked, error);
        }
        if let Some(failed) = self.failed.clone() {
            return self.give_up(parked, failed);
        }
        match parked {
            Parked::Blocks(blocks) => self.go_on_with_blocks(blocks),
            Parked::Sums(volume, sums) => self.go_on_with_sums(volume, sums),
            Parked::Stamps(walk) => {
                let token = walk.token;
                if let Some(runs) = self.go_on_with_stamps(walk) {
                    self.events.push(StorageEvent::Stamps { token, result: Ok(runs) });
                }
            }
            Parked::Chunks(walk) => self.go_on_with_chunks(walk),
            Parked::Task(task, pins) => self.go_on_with_task(task, pins, no),
        }
    }

    fn give_up(&mut self, what: Parked, error: StorageError) {
        match what {
            Parked::Blocks(blocks) => {
                self.release_leaves(&blocks.held);
                self.events.push(StorageEvent::Read { token: blocks.token, result: Err(error) });
            }
            Parked::Sums(_, sums) => self.finish_sums(*sums, Err(error)),
            Parked::Chunks(walk) => self.finish_chunks(*walk, Err(error)),
            Parked::Task(task, pins) => self.end_task(&task, &pins, error),
            Parked::Stamps(walk) => {
                walk.map.release(&mut self.space());
                let event = StorageEvent::Stamps { token: walk.token, result: Err(error) };
                self.events.push(event);
            }
        }
    }

    fn release_leaves(&mut self, held: &[LeafNo]) {
        for no in held {
            self.leaves.release(*no, &mut self.alloc);
        }
    }

    /// Reads ranges of a map, one after the other: at once where every leaf is at hand.
    pub(crate) fn start_map_read(
        &mut self,
        volume: VolumeId,
        map: &Map,
        ranges: &[BlockRange],
        token: Token,
    ) -> Result<(), StorageError> {
        let mut blocks = Vec::new();
        let parts = |range: &BlockRange| by_chunk(*range);
        let all = || ranges.iter().flat_map(parts).map(|(at, part)| (at, map.chunk(at), part));
        let missing =
            all().find_map(|(_, chunk, part)| self.leaves.fill(chunk, part, &mut blocks).err());
        if missing.is_none() {
            let parts = self.map_parts(ranges, &blocks);
            return self.start_job(volume, For::Read(token), parts).map_err(|(_, error)| error);
        }
        let held: Vec<LeafNo> = all().filter_map(|(_, chunk, _)| chunk.leaf()).collect();
        for no in &held {
            self.leaves.hold(*no);
        }
        let (ranges, left, found) = (ranges.to_vec(), all().collect(), Vec::new());
        let blocks = Blocks { volume, ranges, token, left, found, held };
        self.go_on_with_blocks(Box::new(blocks));
        Ok(())
    }

    fn go_on_with_blocks(&mut self, mut now: Box<Blocks>) {
        while let Some((_, chunk, part)) = now.left.front() {
            if let Err(no) = self.leaves.fill(*chunk, *part, &mut now.found) {
                return self.park(no, Parked::Blocks(now));
            }
            now.left.pop_front();
        }
        let parts = self.map_parts(&now.ranges, &now.found);
        let started = self.start_job(now.volume, For::Read(now.token), parts);
        self.release_leaves(&now.held);
        if let Err((_, error)) = started {
            self.events.push(StorageEvent::Read { token: now.token, result: Err(error) });
        }
    }

    /// The stamps of blocks `start` to `end` (excluded), as far as so many runs reach.
    pub(crate) fn start_stamps(
        &mut self,
        (volume, map): (VolumeId, Map),
        (at, end): (u64, u64),
        runs_max: usize,
        token: Token,
    ) -> Stamps {
        let runs = Vec::new();
        let walk = Walk { volume, map, at, end, runs, runs_max, token };
        self.go_on_with_stamps(Box::new(walk)).map_or(Stamps::Later, Stamps::Here)
    }

    /// The runs, or none when the walk is put off.
    fn go_on_with_stamps(&mut self, mut walk: Box<Walk>) -> Option<Vec<StampRun>> {
        let mut blocks = Vec::new();
        while walk.at < walk.end {
            let (number, first) = split(walk.at);
            let last = (CHUNK_BLOCKS as u64).min(walk.end - walk.at + first as u64) as usize;
            let chunk = walk.map.chunk(number);
            blocks.clear();
            if let Err(no) = self.leaves.fill(chunk, (first, last), &mut blocks) {
                self.park(no, Parked::Stamps(walk));
                return None;
            }
            if !walk.add(chunk, &blocks) {
                break;
            }
        }
        walk.map.release(&mut self.space());
        if self.forgets_hole_stamps() {
            let holes = walk.runs.iter_mut().filter(|run| run.hole);
            holes.for_each(|run| run.stamp = tercet_proto::Place::EMPTY);
        }
        Some(walk.runs)
    }
}

impl Blocks {
    /// The block of the volume that it has come to.
    fn at(&self) -> u64 {
        self.left.front().map_or(0, |(chunk, _, (first, _))| (chunk * CHUNK_BLOCKS + first) as u64)
    }
}
