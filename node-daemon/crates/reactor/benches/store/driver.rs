//! A store on a device, driven as the engine drives it, and what it writes there, counted.
//!
//! What a write is for is seen from outside, at the seam to the device: the ring's place is known,
//! payloads carry a word of their own, roots their magic; what is left in the data area is leaves.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use tercet_proto::disk::{StoreId, crc32c};
use tercet_proto::storage::{Storage, StorageError, StorageEvent};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, Entry, EntryHeader, EntryKind, Epoch, InstanceId, Lsn, NewReplica,
    NodeName, Place, ReplicaId, Token, VolumeId, page_aligned,
};
use tercet_reactor::{
    Device, DeviceError, Discard, DiskId, Event, FileDisk, OpenDevice, Place as At, Reactor,
    Settings, now,
};
use tercet_store::arena::Arena;
use tercet_store::disk::{DiskDone, DiskOp, DiskToken};
use tercet_store::{FormatOptions, Options, Store};

/// As much as the engine has.
pub const ARENA_BYTES: usize = 64 << 20;
/// First block of the ring, and blocks of the checkpoint slots (docs/disk-format.md).
const RING_FIRST_BLOCK: u64 = 64;
const SLOT_BLOCKS: [u64; 2] = [32, 48];
/// Bytes 4 to 7 of each block of payload.
const PAYLOAD_MAGIC: [u8; 4] = *b"PAYL";
const ROOT_MAGIC: [u8; 4] = *b"TRT1";
/// Different payloads that writes take in turn.
const PAYLOADS: usize = 64;
/// Largest entry.
pub const ENTRY_BLOCKS_MAX: u32 = 1024;

/// What was given to the device, in bytes, by what it was for.
#[derive(Clone, Debug, Default)]
pub struct Written {
    pub log: u64,
    pub payload: u64,
    pub leaves: u64,
    pub root: u64,
    pub other: u64,
    pub records: u64,
    pub flushes: u64,
    pub checkpoints: u64,
}

impl Written {
    pub fn all(&self) -> u64 {
        self.log + self.payload + self.leaves + self.root + self.other
    }
}

/// How a store is made or opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup {
    pub format: bool,
    pub ring_blocks: Option<u32>,
    /// Payloads for the data area are answered and not written.
    pub swallow_payload: bool,
    /// Reads of the ring are not answered: no checkpoint comes to an end.
    pub hold_copies: bool,
}

impl Setup {
    pub fn format() -> Self {
        Self { format: true, ..Self::default() }
    }
}

/// A store that runs on a reactor of its own.
pub struct Driver {
    pub store: Store,
    pub written: Written,
    /// What has happened, for whoever drives.
    pub events: Vec<StorageEvent>,
    /// How long opening took.
    pub opened: Duration,
    /// Longest time that one call into the store took.
    pub longest_step: Duration,
    reactor: Reactor,
    disk: DiskId,
    setup: Setup,
    /// Flushes are answered at once: the volume that is being filled is not what is measured.
    filling: bool,
    in_flight: usize,
    ops: Vec<(DiskToken, DiskOp)>,
    swallowed: VecDeque<DiskDone>,
    payloads: Vec<(Bytes, u32)>,
    turns: usize,
}

pub fn volume(index: u8) -> VolumeId {
    VolumeId::from_bytes([index + 1; 16])
}

impl Driver {
    /// Opens the store on a device that is there already with its size.
    pub fn open(place: At, setup: Setup) -> Self {
        let device = open_device(&wanted(place));
        let arena = Arena::new(ARENA_BYTES);
        // Where cores are scarce the engine does not spin.
        let mut reactor = Reactor::new(Settings { spin: Duration::ZERO }).expect("a ring");
        reactor.register_arena(&arena);
        let disk = reactor.add_disk(device).expect("a device");
        let mut file = FileDisk::new(&mut reactor, disk);
        let options = Options::new(arena);
        if setup.format {
            let format = FormatOptions {
                store: StoreId([3; 16]),
                cluster: volume(0).0,
                node: NodeName::new("bench"),
                shard: 0,
                ring_blocks: setup.ring_blocks,
                overwrite: true,
            };
            Store::format(&mut file, &format, &options).expect("formats");
        }
        let begun = std::time::Instant::now();
        let instance = InstanceId::from_bytes([9; 16]);
        let (store, report) = Store::open(&mut file, options, instance).expect("opens");
        assert!(report.damaged.is_empty(), "{report:?}");
        let opened = begun.elapsed();
        drop(file);
        Self {
            store,
            written: Written::default(),
            events: Vec::new(),
            opened,
            longest_step: Duration::ZERO,
            reactor,
            disk,
            setup,
            filling: false,
            in_flight: 0,
            ops: Vec::new(),
            swallowed: VecDeque::new(),
            payloads: Vec::new(),
            turns: 0,
        }
    }

    /// Makes an empty volume.
    pub fn make_volume(&mut self, index: u8, size_blocks: u64) {
        let new = NewReplica {
            volume: volume(index),
            replica: ReplicaId::from_bytes([index + 101; 16]),
            name: format!("bench-{index}"),
            size_blocks,
            source: None,
            incomplete: false,
        };
        self.store.create_replica(new, Token(0));
        self.until(|driver| {
            driver
                .events
                .iter()
                .any(|event| matches!(event, StorageEvent::Done { result: Ok(()), .. }))
        });
    }

    /// Appends an entry; none: later.
    pub fn append(&mut self, index: u8, kind: EntryKind, payload: Bytes) -> Option<Lsn> {
        let tail = self.store.tail(volume(index)).expect("a volume");
        let place = Place { epoch: Epoch(1), lsn: tail.lsn.next() };
        let header = EntryHeader { place, prev_epoch: tail.epoch, kind };
        match self.store.append(volume(index), None, vec![Entry { header, payload }]) {
            Ok(()) => Some(place.lsn),
            Err(StorageError::Busy) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Appends a write of some payload.
    pub fn write(&mut self, index: u8, range: BlockRange) -> Option<Lsn> {
        if self.payloads.first().is_none_or(|one| one.0.len() != range.count as usize * BLOCK_BYTES)
        {
            self.payloads = (0..PAYLOADS as u64).map(|seed| payload(range.count, seed)).collect();
        }
        self.turns += 1;
        let (bytes, payload_crc) = self.payloads[self.turns % PAYLOADS].clone();
        self.append(index, EntryKind::Write { range, payload_crc }, bytes)
    }

    /// Everything durable of a volume is applied.
    pub fn apply(&mut self, index: u8, lsn: Lsn) {
        let begun = std::time::Instant::now();
        self.store.apply(volume(index), lsn);
        self.longest_step = self.longest_step.max(begun.elapsed());
    }

    /// Writes a volume once over, in order.
    pub fn fill(&mut self, index: u8, blocks: u64) {
        self.filling = self.setup.swallow_payload;
        for start in (0..blocks).step_by(ENTRY_BLOCKS_MAX as usize) {
            let range = BlockRange { start, count: ENTRY_BLOCKS_MAX.min((blocks - start) as u32) };
            while self.write(index, range).is_none() {
                self.turn();
                self.apply_durable(index);
            }
        }
        self.finish(index);
        self.filling = false;
    }

    /// Waits until all of a volume's log is durable and applied.
    pub fn finish(&mut self, index: u8) {
        let tail = self.store.tail(volume(index)).expect("a volume");
        while self.store.applied(volume(index)).expect("a volume") != tail {
            self.turn();
            self.apply_durable(index);
        }
    }

    /// What has become durable is applied; other events are dropped.
    pub fn apply_durable(&mut self, index: u8) {
        for event in std::mem::take(&mut self.events) {
            if let StorageEvent::Durable { volume: of, place } = event
                && of == volume(index)
            {
                self.apply(index, place.lsn);
            }
        }
    }

    /// Turns until it is so.
    pub fn until(&mut self, so: impl Fn(&Self) -> bool) {
        while !so(self) {
            self.turn();
        }
        self.events.clear();
    }

    /// Turns until a checkpoint holds everything and nothing is under way.
    pub fn settle(&mut self) {
        loop {
            self.store.request_checkpoint();
            self.turn();
            self.events.clear();
            if self.in_flight == 0 && self.store.next_deadline().is_none() {
                return;
            }
        }
    }

    /// Hands the device what the store wants of it, waits for something to happen.
    pub fn turn(&mut self) {
        self.submit();
        let mut happened = Vec::new();
        let wait = if self.events.is_empty() && self.swallowed.is_empty() { 10 } else { 0 };
        let latest = now() + Duration::from_millis(wait);
        let deadline = self.store.next_deadline().map_or(latest, |wanted| wanted.min(latest));
        self.reactor.poll(Some(deadline), &mut happened).expect("a ring");
        let now = now();
        let done = happened.into_iter().filter_map(|event| match event {
            Event::Disk { done, .. } => Some(done),
            _ => None,
        });
        let begun = std::time::Instant::now();
        for done in done.chain(self.swallowed.drain(..)) {
            self.in_flight -= 1;
            self.store.on_disk(done, now);
        }
        if self.store.next_deadline().is_some_and(|at| at <= now) {
            self.store.tick(now);
        }
        self.longest_step = self.longest_step.max(begun.elapsed());
        self.submit();
        for event in &self.events {
            assert!(!matches!(event, StorageEvent::Failed(_)), "{event:?}");
        }
    }

    fn submit(&mut self) {
        let begun = std::time::Instant::now();
        let mut ops = std::mem::take(&mut self.ops);
        self.store.take(&mut ops, &mut self.events);
        self.longest_step = self.longest_step.max(begun.elapsed());
        for (token, op) in ops.drain(..) {
            self.in_flight += 1;
            let payload = self.count(&op);
            match op {
                DiskOp::Write { data, .. } if payload && self.setup.swallow_payload => {
                    let buf = data.into_buf();
                    self.swallowed.push_back(DiskDone { token, buf, result: Ok(()) });
                }
                DiskOp::Flush if self.filling => {
                    self.swallowed.push_back(DiskDone { token, buf: None, result: Ok(()) });
                }
                DiskOp::Read { offset, .. } if self.setup.hold_copies && self.is_ring(offset) => {}
                DiskOp::Write { offset, data, .. } if self.filling => {
                    let op = DiskOp::Write { offset, data, fua: false };
                    self.reactor.submit(self.disk, token, op);
                }
                op => self.reactor.submit(self.disk, token, op),
            }
        }
        self.ops = ops;
    }

    fn is_ring(&self, offset: u64) -> bool {
        let first = RING_FIRST_BLOCK * BLOCK_BYTES as u64;
        (first..first + self.store.usage().log_bytes).contains(&offset)
    }

    /// Counts what is written. Whether it is payload in the data area.
    fn count(&mut self, op: &DiskOp) -> bool {
        let (offset, data) = match op {
            DiskOp::Write { offset, data, .. } => (*offset, data),
            DiskOp::Flush => {
                self.written.flushes += 1;
                return false;
            }
            _ => return false,
        };
        let bytes = data.len() as u64;
        let block = offset / BLOCK_BYTES as u64;
        if self.is_ring(offset) {
            self.written.log += bytes;
            self.written.records += 1;
        } else if SLOT_BLOCKS.contains(&block) {
            self.written.other += bytes;
            self.written.checkpoints += 1;
        } else if data[4..8] == PAYLOAD_MAGIC {
            self.written.payload += bytes;
            return true;
        } else if data[4..8] == ROOT_MAGIC {
            self.written.root += bytes;
        } else {
            self.written.leaves += bytes;
        }
        false
    }
}

/// A device that is there already.
pub fn wanted(place: At) -> OpenDevice {
    OpenDevice { place, create_bytes: None, discard: Discard::Keep }
}

/// Waits for the last run's ring to be gone: it has the lock until then (R3).
pub fn open_device(wanted: &OpenDevice) -> Device {
    loop {
        match Device::open(wanted) {
            Err(DeviceError::Locked { .. }) => std::thread::sleep(Duration::from_millis(1)),
            opened => return opened.unwrap_or_else(|error| panic!("{error}")),
        }
    }
}

/// Bytes that nothing can compress, with their word in each block, and their checksum. They begin at a
/// page, as the target gathers what hosts write.
fn payload(blocks: u32, seed: u64) -> (Bytes, u32) {
    let mut words = page_aligned(blocks as usize * BLOCK_BYTES);
    for number in 0..u64::from(blocks) * (BLOCK_BYTES as u64 / 8) {
        words.extend_from_slice(&mix(seed << 32 | number).to_le_bytes());
    }
    for block in words.chunks_mut(BLOCK_BYTES) {
        block[4..8].copy_from_slice(&PAYLOAD_MAGIC);
    }
    let crc = crc32c(&words);
    (words.freeze(), crc)
}

/// A well-mixed number for each number (splitmix64).
pub fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}
