//! A simulated disk with a volatile cache: what a real one may do at a power cut, this one does.
//!
//! Operations complete when the driver says so, in any order. A completed write is readable at once
//! and durable only with FUA or after a flush that was submitted later. At a power cut each sector
//! of 4 KiB becomes any of: what is durable, any version written since and not flushed, or what an
//! operation in flight would have written; the driver chooses, sector by sector. Faults are switched
//! on by token or place: errors, flipped bits, misdirected and lost writes. Stalling is not
//! completing. There is no clock and no randomness in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tercet_proto::BLOCK_BYTES;

use crate::disk::{Disk, DiskDone, DiskError, DiskOp, DiskToken};

/// One sector.
pub type Sector = Arc<[u8; BLOCK_BYTES]>;

/// What becomes of a sector at a power cut.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Which sector.
    pub sector: u64,
    /// How many newer versions than the durable one there are. The choice is 0 (the durable one) to
    /// this (the newest).
    pub versions: usize,
}

#[derive(Clone, Debug)]
struct Written {
    sector: u64,
    data: Sector,
}

#[derive(Debug)]
struct InFlight {
    op: DiskOp,
    /// A flush covers what had completed when it was submitted.
    completed_before: u64,
}

/// The simulated disk.
#[derive(Debug)]
pub struct SimDisk {
    capacity_bytes: u64,
    durable: BTreeMap<u64, Sector>,
    /// Versions that are not durable, oldest first, each with the number of its completion.
    volatile: BTreeMap<u64, Vec<(u64, Sector)>>,
    in_flight: BTreeMap<DiskToken, InFlight>,
    done: Vec<DiskDone>,
    completions: u64,
    failing: BTreeSet<DiskToken>,
    unreadable: BTreeSet<u64>,
    broken: Option<DiskError>,
    misdirect: Option<u64>,
    lose: bool,
    /// Operations completed so far.
    pub operations: u64,
    /// Bytes written so far.
    pub written_bytes: u64,
}

/// Everything on a disk that survives: to begin again from the same state many times.
#[derive(Clone, Debug, Default)]
pub struct Image(BTreeMap<u64, Sector>);

impl SimDisk {
    /// A disk full of zeroes.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            durable: BTreeMap::new(),
            volatile: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            done: Vec::new(),
            completions: 0,
            failing: BTreeSet::new(),
            unreadable: BTreeSet::new(),
            broken: None,
            misdirect: None,
            lose: false,
            operations: 0,
            written_bytes: 0,
        }
    }

    /// A disk that holds an image.
    pub fn from_image(capacity_bytes: u64, image: &Image) -> Self {
        Self { durable: image.0.clone(), ..Self::new(capacity_bytes) }
    }

    /// What is durable now.
    pub fn image(&self) -> Image {
        Image(self.durable.clone())
    }

    /// Operations submitted and not completed, in the order of their tokens.
    pub fn in_flight(&self) -> Vec<DiskToken> {
        self.in_flight.keys().copied().collect()
    }

    /// An operation in flight.
    pub fn operation(&self, token: DiskToken) -> Option<&DiskOp> {
        self.in_flight.get(&token).map(|found| &found.op)
    }

    /// Sectors whose newest version is not durable, operations in flight included.
    pub fn unsettled(&self) -> Vec<(u64, usize)> {
        self.versions().into_iter().map(|(sector, all)| (sector, all.len())).collect()
    }

    /// The operation will fail when it completes.
    pub fn fail(&mut self, token: DiskToken) {
        self.failing.insert(token);
    }

    /// Reads of this sector fail from now on, until it is written.
    pub fn set_unreadable(&mut self, sector: u64) {
        self.unreadable.insert(sector);
    }

    /// From now on everything fails (or, with none, works again).
    pub fn set_broken(&mut self, error: Option<DiskError>) {
        self.broken = error;
    }

    /// The next write that completes goes to this sector instead.
    pub fn misdirect_next(&mut self, sector: u64) {
        self.misdirect = Some(sector);
    }

    /// The next write that completes changes nothing.
    pub fn lose_next(&mut self) {
        self.lose = true;
    }

    /// Flips a bit of what is stored. Bit 0 is the lowest of the first byte.
    pub fn flip(&mut self, sector: u64, bit: usize) {
        let mut data = *self.sector(sector);
        data[bit / 8] ^= 1 << (bit % 8);
        self.volatile.remove(&sector);
        self.durable.insert(sector, Arc::new(data));
    }

    /// What a read of a sector returns now.
    pub fn sector(&self, sector: u64) -> Sector {
        let newest = self.volatile.get(&sector).and_then(|all| all.last());
        let found = newest.map(|(_, data)| data).or_else(|| self.durable.get(&sector));
        found.map_or_else(|| Arc::new([0; BLOCK_BYTES]), Arc::clone)
    }

    /// Completes an operation; `poll` has it then.
    pub fn complete(&mut self, token: DiskToken) {
        let found = self.in_flight.remove(&token).expect("an operation in flight");
        self.completions += 1;
        self.operations += 1;
        let refused = self.failing.remove(&token) || self.refuses(&found.op);
        let failing = refused.then_some(DiskError::Io(5)).or(self.broken);
        let result = failing.map_or(Ok(()), Err);
        let ok = result.is_ok();
        let buf = match found.op {
            DiskOp::Read { offset, mut into } => {
                let first = offset / BLOCK_BYTES as u64;
                if ok {
                    for (index, block) in into.chunks_mut(BLOCK_BYTES).enumerate() {
                        block.copy_from_slice(&*self.sector(first + index as u64));
                    }
                }
                Some(into)
            }
            DiskOp::Write { offset, data, fua } => {
                if ok {
                    self.store(offset, &data, fua);
                }
                data.into_buf()
            }
            DiskOp::Flush => {
                if ok {
                    self.flush(found.completed_before);
                }
                None
            }
            DiskOp::WriteZeroes { offset, len } => {
                if ok {
                    self.store(offset, &vec![0; len as usize], false);
                }
                None
            }
            DiskOp::Deallocate { .. } => None,
        };
        self.done.push(DiskDone { token, buf, result });
    }

    fn refuses(&self, op: &DiskOp) -> bool {
        let DiskOp::Read { offset, into } = op else { return false };
        let first = offset / BLOCK_BYTES as u64;
        let sectors = first..first + (into.len() / BLOCK_BYTES) as u64;
        self.unreadable.range(sectors).next().is_some()
    }

    fn store(&mut self, offset: u64, data: &[u8], fua: bool) {
        self.written_bytes += data.len() as u64;
        let first = self.misdirect.take().unwrap_or(offset / BLOCK_BYTES as u64);
        if std::mem::take(&mut self.lose) {
            return;
        }
        for written in sectors(first, data) {
            self.unreadable.remove(&written.sector);
            if fua {
                self.volatile.remove(&written.sector);
                self.durable.insert(written.sector, written.data);
            } else {
                let versions = self.volatile.entry(written.sector).or_default();
                versions.push((self.completions, written.data));
            }
        }
    }

    fn flush(&mut self, completed_before: u64) {
        let durable = &mut self.durable;
        self.volatile.retain(|sector, versions| {
            let covered = versions.iter().take_while(|(at, _)| *at <= completed_before).count();
            if let Some((_, data)) = versions.drain(..covered).next_back() {
                durable.insert(*sector, data);
            }
            !versions.is_empty()
        });
    }

    /// Versions newer than the durable one of each sector, oldest first.
    fn versions(&self) -> BTreeMap<u64, Vec<Sector>> {
        let mut all: BTreeMap<u64, Vec<Sector>> = BTreeMap::new();
        for (sector, versions) in &self.volatile {
            all.insert(*sector, versions.iter().map(|(_, data)| Arc::clone(data)).collect());
        }
        for found in self.in_flight.values() {
            if let DiskOp::Write { offset, data, .. } = &found.op {
                for written in sectors(offset / BLOCK_BYTES as u64, data) {
                    all.entry(written.sector).or_default().push(written.data);
                }
            }
            if let DiskOp::WriteZeroes { offset, len } = &found.op {
                for written in sectors(offset / BLOCK_BYTES as u64, &vec![0; *len as usize]) {
                    all.entry(written.sector).or_default().push(written.data);
                }
            }
        }
        all
    }

    /// What would be on the disk if the power went now.
    pub fn image_after(&self, choose: &mut dyn FnMut(&Choice) -> usize) -> Image {
        let mut image = self.durable.clone();
        for (sector, versions) in self.versions() {
            let choice = choose(&Choice { sector, versions: versions.len() });
            if let Some(index) = choice.checked_sub(1) {
                image.insert(sector, Arc::clone(&versions[index]));
            }
        }
        Image(image)
    }

    /// The power goes: each unsettled sector becomes the version that `choose` names.
    pub fn power_cut(&mut self, choose: &mut dyn FnMut(&Choice) -> usize) {
        self.durable = self.image_after(choose).0;
        self.volatile.clear();
        self.in_flight.clear();
        self.failing.clear();
        self.done.clear();
    }

    /// The process is killed and the power stays: operations in flight are done or not, what was
    /// written stays readable.
    pub fn kill(&mut self, choose: &mut dyn FnMut(DiskToken) -> bool) {
        for token in self.in_flight() {
            if choose(token) {
                self.complete(token);
            }
        }
        self.in_flight.clear();
        self.failing.clear();
        self.done.clear();
    }
}

fn sectors(first: u64, data: &[u8]) -> impl Iterator<Item = Written> + '_ {
    data.chunks(BLOCK_BYTES).enumerate().map(move |(index, block)| Written {
        sector: first + index as u64,
        data: Arc::new(block.try_into().expect("whole sectors")),
    })
}

impl Disk for SimDisk {
    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    fn submit(&mut self, token: DiskToken, op: DiskOp) {
        let (offset, len) = match &op {
            DiskOp::Read { offset, into } => (*offset, into.len() as u64),
            DiskOp::Write { offset, data, .. } => (*offset, data.len() as u64),
            DiskOp::Deallocate { offset, len } | DiskOp::WriteZeroes { offset, len } => {
                (*offset, *len)
            }
            DiskOp::Flush => (0, 0),
        };
        assert_eq!(offset % BLOCK_BYTES as u64, 0, "aligned");
        assert!(offset + len <= self.capacity_bytes, "within the device");
        let completed_before = self.completions;
        let before = self.in_flight.insert(token, InFlight { op, completed_before });
        assert!(before.is_none(), "a token names one operation");
    }

    fn poll(&mut self, done: &mut Vec<DiskDone>) {
        done.append(&mut self.done);
    }

    fn wait(&mut self, done: &mut Vec<DiskDone>) {
        for token in self.in_flight() {
            self.complete(token);
        }
        done.append(&mut self.done);
    }
}
