//! Reading leaves when they are wanted, and burying the dead.
//!
//! Whoever lacks a leaf asks for it and is woken when it is there; those who want the same one share
//! the read. A leaf has its checksum in whatever names it, and says which it is, so a wrong one is
//! noticed: then a reader gets an error, and where a checkpoint cannot go on without it the store has
//! failed. A dead leaf is read, in the background and a few at a time, to learn which blocks it held.

use std::collections::BTreeMap;

use tercet_proto::BLOCK_BYTES;
use tercet_proto::disk::{LeafImage, Run};
use tercet_proto::storage::StorageError;

use crate::arena::Buf;
use crate::cache::LeafData;
use crate::disk::{DiskDone, DiskError, DiskOp};
use crate::leaf::{LeafNo, LeafPlace};
use crate::store::{OpKind, Store};

/// Dead leaves that are being read at a time.
const BURIALS_IN_FLIGHT_MAX: usize = 8;
/// Dead leaves that are buried in one step.
const BURIALS_PER_STEP_MAX: usize = 16;

/// Who waits for a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiter {
    /// A read that is put off.
    Read(u64),
    /// The checkpoint.
    Merge,
    /// Nobody: it is dead.
    Burial,
}

/// Why a leaf is not there.
#[derive(Clone, Debug)]
pub(crate) enum LeafError {
    Device(DiskError),
    Damaged(String),
}

/// A leaf that is being read.
#[derive(Debug)]
pub(crate) struct Load {
    waiters: Vec<Waiter>,
    bufs: Vec<Option<Buf>>,
    left: usize,
    error: Option<DiskError>,
}

/// Loads by leaf, and how many are for the dead.
#[derive(Debug, Default)]
pub(crate) struct Loads {
    pub(crate) all: BTreeMap<LeafNo, Load>,
    pub(crate) burials: usize,
}

impl std::fmt::Display for LeafError {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Device(error) => write!(to, "{error}"),
            Self::Damaged(why) => write!(to, "{why}"),
        }
    }
}

impl Loads {
    /// Leaves that loads hold, and whether a dead one is held by who buries it.
    pub(crate) fn held(&self) -> impl Iterator<Item = (LeafNo, u32)> + '_ {
        let burial = |load: &Load| u32::from(load.waiters.contains(&Waiter::Burial));
        self.all.iter().map(move |(no, load)| (*no, 1 + burial(load)))
    }
}

impl Store {
    /// Reads a leaf and wakes the waiter then; false: there is no buffer for it now.
    pub(crate) fn load(&mut self, no: LeafNo, waiter: Waiter) -> bool {
        if let Some(load) = self.loads.all.get_mut(&no) {
            if !(waiter == Waiter::Merge && load.waiters.contains(&waiter)) {
                load.waiters.push(waiter);
            }
            return true;
        }
        let runs = self.leaves.runs(no);
        let mut bufs = Vec::with_capacity(runs.len());
        for run in &runs {
            let Some(buf) = self.options.arena.take(run.1 as usize) else { return false };
            bufs.push(buf);
        }
        self.leaves.hold(no);
        let left = runs.len();
        let waiters = vec![waiter];
        let load = Load { waiters, bufs: vec![], left, error: None };
        self.loads.all.insert(no, load);
        for (part, (run, into)) in runs.iter().zip(bufs).enumerate() {
            let offset = u64::from(run.0) * BLOCK_BYTES as u64;
            self.submit(OpKind::Leaf { no, part }, DiskOp::Read { offset, into });
        }
        true
    }

    /// A read of a part of a leaf has completed.
    pub(crate) fn on_leaf_read(&mut self, no: LeafNo, part: usize, done: DiskDone) {
        let load = self.loads.all.get_mut(&no).expect("a leaf being read");
        if load.bufs.len() <= part {
            load.bufs.resize_with(part + 1, || None);
        }
        load.bufs[part] = done.buf;
        load.error = load.error.or(done.result.err());
        load.left -= 1;
        if load.left > 0 {
            return;
        }
        let load = self.loads.all.remove(&no).expect("looked at");
        let bytes: Vec<u8> =
            load.bufs.iter().flatten().flat_map(|buf| buf.iter().copied()).collect();
        let found = match load.error {
            Some(error) => Err(LeafError::Device(error)),
            None => self.decode_leaf(&self.leaves.place_of(no), &bytes),
        };
        if let Ok(data) = &found {
            self.leaves.cache.insert(no, LeafData::clone(data));
        }
        if load.waiters == [Waiter::Burial] {
            self.leaves.release(no, &mut self.alloc); // who took it from the dead still holds it
            return self.wake(Waiter::Burial, no, &found);
        }
        for waiter in load.waiters {
            self.wake(waiter, no, &found);
        }
        self.leaves.release(no, &mut self.alloc);
    }

    fn wake(&mut self, waiter: Waiter, no: LeafNo, found: &Result<LeafData, LeafError>) {
        match (waiter, found) {
            (Waiter::Read(id), found) => self.go_on(id, no, found.as_ref().err()),
            (Waiter::Merge, Ok(data)) => self.base_is_here(no, data),
            (Waiter::Burial, Ok(data)) => {
                self.loads.burials -= 1;
                self.bury_leaf(no, data);
            }
            (_, Err(error)) => self.fail(&format!("a leaf cannot be read: {error}")),
        }
    }

    /// What a leaf must be, or what it is instead.
    pub(crate) fn decode_leaf(
        &self,
        place: &LeafPlace,
        bytes: &[u8],
    ) -> Result<LeafData, LeafError> {
        let damaged = |why: String| Err(LeafError::Damaged(why));
        let image = match LeafImage::decode(bytes) {
            Ok(image) => image,
            Err(error) => return damaged(format!("leaf {}: {error}", place.id)),
        };
        let crc = u32::from_le_bytes(bytes[..4].try_into().expect("decoded"));
        if (image.store, image.id, image.chunk, crc)
            != (self.superblock.store, place.id, place.chunk, place.crc)
        {
            return damaged(format!("leaf {} is another's", place.id));
        }
        let inside = |run: Run| self.alloc.contains(run);
        if !image.blocks.iter().all(|block| block.device == 0 || inside((block.device, 1))) {
            return damaged(format!("leaf {} points outside", place.id));
        }
        Ok(image.blocks.into())
    }

    /// A few dead leaves give up what they held.
    pub(crate) fn pump_dead(&mut self) {
        for _ in 0..BURIALS_PER_STEP_MAX {
            if self.loads.burials == BURIALS_IN_FLIGHT_MAX {
                return;
            }
            let Some(no) = self.leaves.take_dead() else { return };
            if let Some(data) = self.leaves.data(no).cloned() {
                self.bury_leaf(no, &data);
            } else if self.load(no, Waiter::Burial) {
                self.loads.burials += 1;
            } else {
                return self.leaves.put_back_dead(no); // no buffer now
            }
        }
    }

    fn bury_leaf(&mut self, no: LeafNo, data: &LeafData) {
        self.leaves.bury(no, data, &mut self.alloc);
        self.changed = true; // what it held is free when a checkpoint says so
        if self.leaves.dead_blocks == 0 && !self.turned_away.is_empty() {
            self.checkpoint_wanted = true;
        }
    }

    /// The error that a reader of these blocks gets.
    pub(crate) fn leaf_error(
        volume: tercet_proto::VolumeId,
        block: u64,
        error: &LeafError,
    ) -> StorageError {
        match error {
            LeafError::Device(error) => StorageError::Device(error.to_string()),
            LeafError::Damaged(_) => StorageError::Checksum { volume, block },
        }
    }
}
