//! Reading: of applied state, of retained entries, of whole chunks for their checksums.
//!
//! A read is a job of parts: zeroes, bytes in memory, or a range of the device. Until a part's bytes
//! are there its blocks are kept (or, in the ring, its position is pinned), so that they cannot be
//! given to anybody else meanwhile. Every block is compared with its checksum every time. A read that
//! lacks a leaf is put off until it is there (`parked`).

use bytes::Bytes;
use tercet_proto::disk::{CHUNK_BLOCKS, LeafBlock, crc32c};
use tercet_proto::storage::{StorageError, StorageEvent};
use tercet_proto::{BLOCK_BYTES, BlockRange, Entry, EntryHeader, Lsn, Token, VolumeId};

use crate::disk::{DiskDone, DiskOp};
use crate::log::IO_BLOCKS_MAX;
use crate::map::{Map, Space};
use crate::parked::Parked;
use crate::replica::Payload;
use crate::store::{OpKind, Store};
use crate::task::Task;

/// Part of the arena that reads leave to writing.
const ARENA_SHARE_KEPT: usize = 4;
const ZEROES_BLOCKS: usize = 16;
static ZEROES: [u8; ZEROES_BLOCKS * BLOCK_BYTES] = [0; ZEROES_BLOCKS * BLOCK_BYTES];

/// What a job is for.
#[derive(Debug)]
pub(crate) enum For {
    Read(Token),
    /// Entries, each with its number of parts.
    Log(Token, Vec<(EntryHeader, usize)>),
    /// The chunk of a run over all chunks.
    Sums(Box<Sums>),
    /// Only to see whether the blocks are what they should be (C4).
    Scrub,
}

/// Checksums of chunks, as far as they are known.
#[derive(Debug)]
pub(crate) struct Sums {
    token: Token,
    pub(crate) map: Map,
    chunk: usize,
    rows: Vec<u8>,
}

#[derive(Debug)]
pub(crate) enum Part {
    Zero(usize),
    Ready(Bytes),
    Device(DevicePart),
}

/// A range of the device, and what was expected there.
#[derive(Debug)]
pub(crate) struct DevicePart {
    /// Where the bytes are.
    first: u32,
    /// The volume's block, to name it in an error.
    block: u64,
    crcs: Vec<u32>,
    /// The blocks of the data area that a map names; of the ring's payloads of entries: 0.
    devices: Vec<u32>,
    /// The bytes are still in the ring: its position is pinned. Else the blocks are kept.
    in_ring: bool,
    /// Positions of the ring that are pinned meanwhile.
    pinned: Option<u64>,
}

impl DevicePart {
    /// Blocks of the data area that nobody may get meanwhile.
    fn read_blocks(&self) -> &[u32] {
        if self.in_ring { &[] } else { &self.devices }
    }
}

/// A read in progress.
#[derive(Debug)]
pub(crate) struct Job {
    volume: VolumeId,
    what: For,
    parts: Vec<Part>,
    left: usize,
    error: Option<StorageError>,
}

/// Builds parts; neighbours become one.
#[derive(Default)]
pub(crate) struct Parts {
    parts: Vec<Part>,
}

impl Parts {
    pub(crate) fn parts(self) -> Vec<Part> {
        self.parts
    }

    fn zero(&mut self) {
        match self.parts.last_mut() {
            Some(Part::Zero(count)) => *count += 1,
            _ => self.parts.push(Part::Zero(1)),
        }
    }

    /// A block of the volume whose bytes are at `at`.
    pub(crate) fn device(&mut self, at: u32, in_ring: bool, device: u32, block: u64, crc: u32) {
        if let Some(Part::Device(part)) = self.parts.last_mut() {
            let count = part.crcs.len();
            let next = part.first + count as u32 == at && part.block + count as u64 == block;
            if next && part.in_ring == in_ring && count < IO_BLOCKS_MAX as usize {
                part.crcs.push(crc);
                part.devices.push(device);
                return;
            }
        }
        let (crcs, devices) = (vec![crc], vec![device]);
        let part = DevicePart { first: at, block, crcs, devices, in_ring, pinned: None };
        self.parts.push(Part::Device(part));
    }
}

impl Store {
    /// Blocks of a map, whose numbers within the volume are those of the ranges, as parts.
    pub(crate) fn map_parts(&self, ranges: &[BlockRange], blocks: &[LeafBlock]) -> Vec<Part> {
        let mut parts = Parts::default();
        let numbers = ranges.iter().flat_map(|range| range.start..range.end());
        for (block, leaf) in numbers.zip(blocks) {
            if leaf.device == 0 {
                parts.zero();
            } else {
                let at = self.alloc.location(leaf.device);
                parts.device(at, self.log.is_ring(at), leaf.device, block, leaf.crc);
            }
        }
        parts.parts
    }

    pub(crate) fn start_read(
        &mut self,
        volume: VolumeId,
        range: BlockRange,
        token: Token,
    ) -> Result<(), StorageError> {
        self.scrub.host_io = true;
        let map = self.replicas[&volume].head.clone();
        let result = self.start_map_read(volume, &map, &[range], token);
        map.release(&mut Space { alloc: &mut self.alloc, leaves: &mut self.leaves });
        result
    }

    pub(crate) fn start_log_read(
        &mut self,
        volume: VolumeId,
        from: Lsn,
        bytes_max: usize,
        token: Token,
    ) -> Result<(), StorageError> {
        let replica = &self.replicas[&volume];
        assert!(replica.entry(from).is_some(), "only retained entries are read");
        let mut parts = Parts::default();
        let (mut entries, mut bytes, mut lsn) = (Vec::new(), 0, from);
        while let Some(entry) = replica.entry(lsn) {
            bytes += entry.header.payload_bytes();
            if !entries.is_empty() && bytes > bytes_max {
                break;
            }
            let before = parts.parts.len();
            if let Some(memory) = &entry.memory {
                parts.parts.push(Part::Ready(memory.clone()));
            } else {
                self.entry_parts(&entry.payload, &entry.crcs, &mut parts);
            }
            entries.push((entry.header, parts.parts.len() - before));
            lsn = lsn.next();
        }
        self.start_job(volume, For::Log(token, entries), parts.parts).map_err(|(_, error)| error)
    }

    fn entry_parts(&self, payload: &Payload, crcs: &[u32], parts: &mut Parts) {
        // A part must not run on from the entry before.
        let mut own = Parts::default();
        match payload {
            Payload::None => {}
            Payload::Ring(first) => {
                for (index, (at, crc)) in (0..).zip((*first..).zip(crcs)) {
                    own.device(at, true, 0, index, *crc);
                }
            }
            Payload::Extents(runs) => {
                let blocks = runs.iter().flat_map(|run| run.0..run.0 + run.1);
                for (index, (block, crc)) in (0..).zip(blocks.zip(crcs)) {
                    let at = self.alloc.location(block);
                    own.device(at, self.log.is_ring(at), block, index, *crc);
                }
            }
        }
        parts.parts.append(&mut own.parts);
    }

    /// Starts a job, or gives its purpose back.
    pub(crate) fn start_job(
        &mut self,
        volume: VolumeId,
        what: For,
        mut parts: Vec<Part>,
    ) -> Result<(), (For, StorageError)> {
        let arena = self.options.arena.clone();
        let kept = arena.blocks() / ARENA_SHARE_KEPT;
        let needed: usize = parts.iter().map(Part::device_blocks).sum();
        if needed > 0 && arena.free_blocks() < kept + needed {
            return Err((what, StorageError::Busy));
        }
        let mut bufs = Vec::new();
        for part in parts.iter().filter(|part| part.device_blocks() > 0) {
            let Some(buf) = arena.take(part.device_blocks()) else {
                return Err((what, StorageError::Busy));
            };
            bufs.push(buf);
        }
        let id = self.next_job;
        self.next_job += 1;
        let mut bufs = bufs.into_iter();
        let mut left = 0;
        for (index, part) in parts.iter_mut().enumerate() {
            let Part::Device(part) = part else { continue };
            for block in part.read_blocks() {
                self.alloc.begin_read(*block);
            }
            if part.in_ring {
                let position = self.log.position_of(part.first);
                part.pinned = Some(position);
                *self.log.pins.entry(position).or_insert(0) += 1;
            }
            left += 1;
            let offset = u64::from(part.first) * BLOCK_BYTES as u64;
            let into = bufs.next().expect("one for each part");
            self.submit(OpKind::Read { job: id, part: index }, DiskOp::Read { offset, into });
        }
        self.jobs.insert(id, Job { volume, what, parts, left, error: None });
        if left == 0 {
            self.finish_job(id);
        }
        Ok(())
    }

    /// The block of the device at which a part of a read begins.
    pub(crate) fn read_first(&self, id: u64, index: usize) -> u32 {
        let Part::Device(part) = &self.jobs[&id].parts[index] else { panic!("a part in progress") };
        part.first
    }

    pub(crate) fn on_read_done(&mut self, id: u64, index: usize, done: DiskDone) {
        let check = !self.ignores_checksums();
        let job = self.jobs.get_mut(&id).expect("a read in progress");
        let Part::Device(part) = &mut job.parts[index] else { panic!("a part in progress") };
        for block in part.read_blocks() {
            self.alloc.end_read(*block);
        }
        if let Some(position) = part.pinned {
            let pins = self.log.pins.get_mut(&position).expect("pinned when it was started");
            *pins -= 1;
            if *pins == 0 {
                self.log.pins.remove(&position);
            }
        }
        let buf = done.buf.expect("a read's buffer comes back");
        let (mut good, mut bad) = (Vec::new(), Vec::new()); // mostly both stay empty: no memory
        if let Err(error) = done.result {
            job.error = Some(StorageError::Device(error.to_string()));
        } else if check {
            let known = self.scrub.knows_bad_blocks();
            for (index, block) in buf.chunks(BLOCK_BYTES).enumerate() {
                if crc32c(block) != part.crcs[index] {
                    bad.push((part.block + index as u64, part.devices[index]));
                } else if known {
                    good.push(part.devices[index]);
                }
            }
        }
        let (volume, of_map) = (job.volume, !matches!(job.what, For::Log(..)));
        if let Some((block, _)) = bad.first() {
            job.error.get_or_insert(StorageError::Checksum { volume, block: *block });
        }
        job.parts[index] = Part::Ready(Bytes::from_owner(buf));
        job.left -= 1;
        if of_map && !(bad.is_empty() && good.is_empty()) {
            self.blocks_checked(&bad, &good);
        }
        let job = self.jobs.get_mut(&id).expect("a read in progress");
        if of_map && !bad.is_empty() {
            job.left += 1; // what is bad is told before the answer
            return self.run_task(Task::Tell { volume, bad, job: id });
        }
        if job.left == 0 {
            self.finish_job(id);
        }
    }

    /// One thing less that a read waits for.
    pub(crate) fn part_is_over(&mut self, id: u64) {
        let job = self.jobs.get_mut(&id).expect("a read in progress");
        job.left -= 1;
        if job.left == 0 {
            self.finish_job(id);
        }
    }

    fn finish_job(&mut self, id: u64) {
        let job = self.jobs.remove(&id).expect("a read in progress");
        let pieces = job.error.clone().map_or(Ok(()), Err);
        match job.what {
            For::Read(token) => {
                let result = pieces.map(|()| flatten(job.parts));
                self.events.push(StorageEvent::Read { token, result });
            }
            For::Log(token, entries) => {
                let mut parts = job.parts.into_iter();
                let result = pieces.map(|()| {
                    entries
                        .into_iter()
                        .map(|(header, count)| Entry {
                            header,
                            payload: join(flatten(parts.by_ref().take(count).collect())),
                        })
                        .collect()
                });
                self.events.push(StorageEvent::Log { token, result });
            }
            For::Sums(mut sums) => match pieces {
                Ok(()) => {
                    let pieces = flatten(job.parts);
                    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
                    for piece in &pieces {
                        digest.update(piece);
                    }
                    let crc = u32::try_from(digest.finalize()).expect("32 bits of CRC");
                    sums.rows.extend_from_slice(&(sums.chunk as u64).to_le_bytes());
                    sums.rows.extend_from_slice(&crc.to_le_bytes());
                    sums.chunk += 1;
                    self.go_on_with_sums(job.volume, sums);
                }
                Err(error) => self.finish_sums(*sums, Err(error)),
            },
            For::Scrub => self.on_scrubbed(),
        }
    }

    /// Reads parts only to see whether they are what they should be.
    pub(crate) fn start_scrub(&mut self, volume: VolumeId, parts: Vec<Part>) -> bool {
        self.start_job(volume, For::Scrub, parts).is_ok()
    }

    pub(crate) fn start_sums(&mut self, volume: VolumeId, map: Map, token: Token) {
        let sums = Box::new(Sums { token, map, chunk: 0, rows: Vec::new() });
        self.go_on_with_sums(volume, sums);
    }

    /// The next chunk that has a block, one at a time.
    pub(crate) fn go_on_with_sums(&mut self, volume: VolumeId, mut sums: Box<Sums>) {
        let mut blocks = Vec::new();
        while sums.chunk < sums.map.len() {
            let chunk = sums.map.chunk(sums.chunk);
            blocks.clear();
            if self.leaves.written(chunk) == 0 {
                sums.chunk += 1;
                continue;
            }
            if let Err(no) = self.leaves.fill(chunk, (0, CHUNK_BLOCKS), &mut blocks) {
                return self.park(no, Parked::Sums(volume, sums));
            }
            if blocks.iter().any(|block| block.device != 0) {
                break;
            }
            sums.chunk += 1;
        }
        if sums.chunk >= sums.map.len() {
            let rows = Bytes::from(std::mem::take(&mut sums.rows));
            return self.finish_sums(*sums, Ok(vec![rows]));
        }
        let range = BlockRange { start: sums.start(), count: CHUNK_BLOCKS as u32 };
        let parts = self.map_parts(&[range], &blocks);
        if let Err((For::Sums(sums), error)) = self.start_job(volume, For::Sums(sums), parts) {
            self.finish_sums(*sums, Err(error));
        }
    }

    pub(crate) fn finish_sums(&mut self, sums: Sums, result: Result<Vec<Bytes>, StorageError>) {
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        sums.map.release(&mut space);
        self.events.push(StorageEvent::Read { token: sums.token, result });
    }

    /// Maps that reads in progress keep, for `check`.
    pub(crate) fn read_maps(&self) -> impl Iterator<Item = &Map> {
        let jobs = self.jobs.values().filter_map(|job| match &job.what {
            For::Sums(sums) => Some(&sums.map),
            _ => None,
        });
        jobs.chain(self.parked.values().filter_map(Parked::map))
    }

    #[cfg(not(feature = "canary"))]
    #[allow(clippy::unused_self)] // the other build looks at the options
    fn ignores_checksums(&self) -> bool {
        false
    }

    #[cfg(feature = "canary")]
    fn ignores_checksums(&self) -> bool {
        self.options.canary == Some(crate::options::Canary::IgnoreChecksums)
    }
}

impl Sums {
    /// Block of the volume at which the chunk begins that is looked at.
    pub(crate) fn start(&self) -> u64 {
        (self.chunk * CHUNK_BLOCKS) as u64
    }
}

impl Part {
    fn device_blocks(&self) -> usize {
        match self {
            Self::Device(part) => part.crcs.len(),
            _ => 0,
        }
    }
}

fn flatten(parts: Vec<Part>) -> Vec<Bytes> {
    let mut pieces = Vec::with_capacity(parts.len());
    for part in parts {
        match part {
            Part::Ready(bytes) => pieces.push(bytes),
            Part::Zero(mut count) => {
                while count > 0 {
                    let now = count.min(ZEROES_BLOCKS);
                    pieces.push(Bytes::from_static(&ZEROES[..now * BLOCK_BYTES]));
                    count -= now;
                }
            }
            Part::Device(_) => panic!("every part has completed"),
        }
    }
    pieces
}

fn join(mut pieces: Vec<Bytes>) -> Bytes {
    match pieces.len() {
        0 => Bytes::new(),
        1 => pieces.remove(0),
        _ => pieces.concat().into(),
    }
}
