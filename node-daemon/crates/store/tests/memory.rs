//! What a large volume costs: memory for each TiB mapped, snapshots, and reads behind many of them.
//!
//! The device has no data: its leaves are made when they are read, every block of the volume is
//! zeroes with the checksum of zeroes, and what a store writes is kept in memory. So the volume is
//! 1 TiB (`TERCET_MEMORY_GIB` says otherwise), and opening, checkpoint and map are the real ones.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant as Clock};

use common::{evidence, format_options, id, volume_id};
use tercet_proto::disk::{
    CHUNK_BLOCKS, LeafBlock, LeafImage, Put, ROOT_PAYLOAD_BYTES, RootBlock, Slot, Superblock,
    crc32c,
};
use tercet_proto::storage::{Storage, StorageError, StorageEvent};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, Entry, EntryHeader, EntryKind, Epoch, InstanceId, Instant, Lsn, Place,
    SnapshotId, Token,
};
use tercet_store::arena::Arena;
use tercet_store::disk::{Disk, DiskDone, DiskOp, DiskToken};
use tercet_store::{FormatOptions, Options, Store};

/// Bytes allocated now, by whomever.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's with the same arguments; counting changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise about `at` and `layout`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const MEMORY_BYTES_PER_TIB_MAX: usize = 16 << 20;
const SNAPSHOT_MAX: Duration = Duration::from_millis(50);
const LEAF_BLOCKS: u64 = 2;
/// Of reads that are timed.
const ROUNDS: u32 = 5;
const ZERO_BLOCK: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// A device without data.
struct Made {
    chunks: u64,
    data: u64,
    sectors: HashMap<u64, Box<[u8; BLOCK_BYTES]>>,
    done: Vec<DiskDone>,
    zero_crc: u32,
}

impl Made {
    fn new(chunks: u64) -> Self {
        let zero_crc = crc32c(&ZERO_BLOCK);
        Self { chunks, data: 0, sectors: HashMap::new(), done: Vec::new(), zero_crc }
    }

    fn leaves_at(&self) -> u64 {
        self.data + 10_000
    }

    fn leaf(&self, chunk: u64) -> Vec<u8> {
        let first = self.leaves_at() + self.chunks * LEAF_BLOCKS + chunk * CHUNK_BLOCKS as u64;
        let stamp = Place { epoch: Epoch(1), lsn: Lsn(1) };
        let block = |device: u64| LeafBlock { device: device as u32, crc: self.zero_crc, stamp };
        let blocks = (first..first + CHUNK_BLOCKS as u64).map(block).collect();
        let store = format_options().store;
        LeafImage { store, id: chunk + 1, chunk: chunk as u32, blocks }.encode()
    }

    fn read(&self, sector: u64, into: &mut [u8]) {
        let leaves = self.leaves_at()..self.leaves_at() + self.chunks * LEAF_BLOCKS;
        if let Some(found) = self.sectors.get(&sector) {
            into.copy_from_slice(&**found);
        } else if self.data > 0 && leaves.contains(&sector) {
            let at = sector - leaves.start;
            let from = (at % LEAF_BLOCKS) as usize * BLOCK_BYTES;
            into.copy_from_slice(&self.leaf(at / LEAF_BLOCKS)[from..from + BLOCK_BYTES]);
        } else {
            into.fill(0);
        }
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) {
        for (sector, block) in (sector..).zip(bytes.chunks(BLOCK_BYTES)) {
            self.sectors.insert(sector, Box::new(block.try_into().expect("whole blocks")));
        }
    }

    /// A checkpoint with a volume of which every block is written.
    fn map_all(&mut self) {
        let superblock = Superblock::decode(&*self.sectors[&0]).expect("formatted");
        self.data = u64::from(superblock.data.0);
        let place = Place { epoch: Epoch(1), lsn: Lsn(1) };
        let mut put = Put::default();
        put.u64(2);
        put.u64(self.chunks + 1);
        put.u32(0);
        put.u32(1);
        put.u64(1);
        put.bytes(volume_id(1).as_bytes());
        put.bytes(&id(9));
        put.text("large");
        put.u64(self.chunks * CHUNK_BLOCKS as u64);
        put.incomplete(None);
        put.u8(0);
        put.place(place);
        put.place(place);
        put.u32(0);
        put.u32(0);
        put.u32(self.chunks as u32);
        for chunk in 0..self.chunks {
            let leaf = self.leaf(chunk);
            put.u8(2);
            put.u64(chunk + 1);
            put.u32(u32::from_le_bytes(leaf[..4].try_into().expect("four")));
            put.u8(1);
            put.u32((self.leaves_at() + chunk * LEAF_BLOCKS) as u32);
            put.u32(LEAF_BLOCKS as u32);
        }
        let (store, stream) = (superblock.store, put.0);
        let root = superblock.data.0 + 10;
        let blocks: Vec<_> = stream.chunks(ROOT_PAYLOAD_BYTES).collect();
        for (index, payload) in (0..).zip(&blocks) {
            let last = index as usize + 1 == blocks.len();
            let next = if last { 0 } else { root + index + 1 };
            let payload = payload.to_vec();
            let block = RootBlock { store, sequence: 2, index, next, payload }.encode();
            self.write(u64::from(root + index), &*block);
        }
        let slot = Slot {
            store,
            sequence: 2,
            log_start: 0,
            previous: u64::MAX,
            previous_crc: 0,
            frozen: 0,
            root,
            root_blocks: blocks.len() as u32,
            root_bytes: stream.len() as u64,
            root_crc: crc32c(&stream),
        };
        self.write(32, &*slot.encode());
    }
}

impl Disk for Made {
    fn capacity_bytes(&self) -> u64 {
        (self.chunks * (CHUNK_BLOCKS as u64 + LEAF_BLOCKS) * 17 / 16 + 40_000) * BLOCK_BYTES as u64
    }

    fn submit(&mut self, token: DiskToken, op: DiskOp) {
        let buf = match op {
            DiskOp::Read { offset, mut into } => {
                for (sector, block) in
                    (offset / BLOCK_BYTES as u64..).zip(into.chunks_mut(BLOCK_BYTES))
                {
                    self.read(sector, block);
                }
                Some(into)
            }
            DiskOp::Write { offset, data, .. } => {
                self.write(offset / BLOCK_BYTES as u64, &data);
                data.into_buf()
            }
            _ => None,
        };
        self.done.push(DiskDone { token, buf, result: Ok(()) });
    }

    fn poll(&mut self, done: &mut Vec<DiskDone>) {
        done.append(&mut self.done);
    }

    fn wait(&mut self, done: &mut Vec<DiskDone>) {
        done.append(&mut self.done);
    }
}

/// A store on it, driven until nothing is on its way.
struct Bench {
    store: Store,
    disk: Made,
    lsn: u64,
}

impl Bench {
    fn settle(&mut self) -> Vec<StorageEvent> {
        let (mut ops, mut events, mut done) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            self.store.take(&mut ops, &mut events);
            if ops.is_empty() {
                return events;
            }
            for (token, op) in ops.drain(..) {
                self.disk.submit(token, op);
            }
            self.disk.poll(&mut done);
            for one in done.drain(..) {
                self.store.on_disk(one, Instant(1));
            }
        }
    }

    /// Appends, and says how long it takes to apply.
    fn entry(&mut self, kind: EntryKind) -> Duration {
        let payload = match kind {
            EntryKind::Write { range, .. } => vec![0; range.bytes()],
            _ => Vec::new(),
        };
        let place = Place { epoch: Epoch(1), lsn: Lsn(self.lsn + 1) };
        let header = EntryHeader { place, prev_epoch: Epoch(1), kind };
        let entry = || vec![Entry { header, payload: payload.clone().into() }];
        while let Err(error) = self.store.append(volume_id(1), None, entry()) {
            assert_eq!(error, StorageError::Busy);
            self.settle();
        }
        self.lsn += 1;
        self.settle();
        let started = Clock::now();
        self.store.apply(volume_id(1), Lsn(self.lsn));
        started.elapsed()
    }

    fn write(&mut self, block: u64) -> Duration {
        let range = BlockRange { start: block, count: 1 };
        self.entry(EntryKind::Write { range, payload_crc: crc32c(&ZERO_BLOCK) })
    }

    fn snapshot(&mut self, number: u64) -> Duration {
        self.entry(EntryKind::Snapshot { id: SnapshotId::from_bytes(id(number)) })
    }

    /// What this thread works for the quickest of some rounds: what else the machine does makes none of
    /// them quicker.
    fn read_rounds(&mut self, count: u64) -> Duration {
        (0..ROUNDS).map(|_| self.read(count)).min().expect("some rounds")
    }

    /// Reads single blocks here and there; each must be good.
    fn read(&mut self, count: u64) -> Duration {
        let size = self.disk.chunks * CHUNK_BLOCKS as u64;
        let started = worked();
        for number in 0..count {
            let start = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % size;
            self.store.read(volume_id(1), BlockRange { start, count: 1 }, Token(number));
            for event in self.settle() {
                let StorageEvent::Read { result, .. } = event else { continue };
                assert_eq!(result.expect("good").concat(), ZERO_BLOCK);
            }
        }
        worked().saturating_sub(started)
    }

    fn checkpoint(&mut self) -> Duration {
        let started = Clock::now();
        self.store.request_checkpoint();
        self.settle();
        started.elapsed()
    }
}

fn open(chunks: u64, mapped: bool, options: &Options) -> (Bench, usize, Duration) {
    let mut disk = Made::new(chunks);
    let format = FormatOptions { ring_blocks: Some(8192), ..format_options() };
    Store::format(&mut disk, &format, options).expect("formats");
    if mapped {
        disk.map_all();
    }
    let before = ALLOCATED.load(Ordering::Relaxed);
    let started = Clock::now();
    let instance = InstanceId::from_bytes(id(2));
    let (store, _) = Store::open(&mut disk, options.clone(), instance).expect("opens");
    let bytes = ALLOCATED.load(Ordering::Relaxed) - before;
    (Bench { store, disk, lsn: 1 }, bytes, started.elapsed())
}

/// What this thread has had of the processor.
fn worked() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("not negative")
}

#[test]
fn a_large_volume_costs_what_it_may() {
    let all = Clock::now();
    let gib: u64 =
        std::env::var("TERCET_MEMORY_GIB").map_or(64, |text| text.parse().expect("a number"));
    let chunks = gib * 256;
    let cache = 64 * (24 << 10);
    let options = Options { leaf_cache_bytes: cache, ..Options::new(Arena::new(16 << 20)) };
    let fixed = open(chunks, false, &options).1;
    let (mut bench, bytes, opening) = open(chunks, true, &options);
    let per_tib = |bytes: usize| bytes * 1024 / gib as usize;
    let mapped = per_tib(bytes.saturating_sub(fixed));
    println!("{gib} GiB mapped: {} KiB for each TiB, {fixed} fixed", mapped >> 10);
    println!("opened in {opening:?}");
    assert!(mapped <= MEMORY_BYTES_PER_TIB_MAX, "{mapped} bytes for each TiB mapped");

    let before = ALLOCATED.load(Ordering::Relaxed);
    let plain = bench.read_rounds(2000);
    let grown = ALLOCATED.load(Ordering::Relaxed).saturating_sub(before);
    println!("2,000 reads in {plain:?}, {grown} bytes more");
    assert!(grown <= cache + (1 << 20), "reading grows by the cache alone: {grown}");

    let first = bench.snapshot(1);
    println!("a snapshot: {first:?}; a write behind it: {:?}", bench.write(77));
    println!("a checkpoint: {:?}", bench.checkpoint());
    assert!(first <= SNAPSHOT_MAX, "{first:?}");
    for number in 2..=1000 {
        assert!(bench.snapshot(number) <= SNAPSHOT_MAX);
        bench.write(number * 131);
    }
    let chain = bench.read_rounds(2000);
    println!("1,000 snapshots: 2,000 reads in {chain:?}; a checkpoint: {:?}", bench.checkpoint());
    assert!(chain < plain * 3 / 2, "{chain:?} with 1,000 snapshots, {plain:?} without");
    evidence("store_memory_kib_per_tib", (mapped >> 10) as u64, 0, all);
}
