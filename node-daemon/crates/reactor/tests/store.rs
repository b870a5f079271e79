//! The store over real devices: what was told durable is there after a kill or a power cut, and
//! reads agree with a naive model.
//!
//! The log of the one volume is a function of each entry's number and of the round (the life of the
//! writer) that appended it; so whoever knows where the rounds before ended knows every byte that
//! must be there, and a process that dies needs to leave nothing but the number of the last entry
//! that it was told durable. `store_round` is that process; the virtual machine's test runs it and
//! cuts the power, the test here kills it.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Backend, Bench, MIB, backends};
use tercet_proto::disk::{StoreId, crc32c};
use tercet_proto::storage::{Storage, StorageError, StorageEvent};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, Entry, EntryHeader, EntryKind, Epoch, InstanceId, Lsn, NewReplica,
    NodeName, Place, ReplicaId, Token, VolumeId,
};
use tercet_reactor::{Event, now};
use tercet_store::{FormatOptions, Options, Store};

const SIZE_BLOCKS: u64 = 8192;
const DEVICE_BYTES: u64 = 256 * MIB;
const ARENA_BYTES: usize = 32 << 20;
/// Entries that are on their way at a time.
const DEPTH: u64 = 32;
/// How long anything may take, on a slow machine too.
const PATIENCE: Duration = Duration::from_mins(2);

fn volume() -> VolumeId {
    VolumeId::from_bytes([7; 16])
}

/// A well-mixed number for each number (splitmix64).
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// Entry `lsn` as `round` writes it: mostly small writes, some that go to extents (up to 2 MiB,
/// more than a drive takes at once), zeroes, nothing.
fn kind(lsn: u64, round: u64) -> EntryKind {
    let drawn = mix(lsn << 8 | round);
    let most = match drawn % 100 {
        0..75 => 4,
        75..90 => 512,
        90..97 => 64,
        _ => return EntryKind::Noop,
    };
    let count = (drawn >> 8) % most + 1;
    let start = (drawn >> 24) % (SIZE_BLOCKS - count);
    let range = BlockRange { start, count: count as u32 };
    match drawn % 100 {
        0..90 => EntryKind::Write { range, payload_crc: 0 },
        _ => EntryKind::Zero { range, discard: drawn.is_multiple_of(2) },
    }
}

/// What block `block`, written by entry `lsn` of `round`, holds in each of its 8-byte words.
fn tag(lsn: u64, round: u64, block: u64) -> u64 {
    lsn << 32 | round << 24 | block
}

fn entry(lsn: u64, round: u64) -> Entry {
    let mut kind = kind(lsn, round);
    let mut payload = Bytes::new();
    if let EntryKind::Write { range, payload_crc } = &mut kind {
        let blocks = range.start..range.end();
        let bytes: Vec<u8> = blocks
            .flat_map(|block| tag(lsn, round, block).to_le_bytes().repeat(BLOCK_BYTES / 8))
            .collect();
        payload = bytes.into();
        *payload_crc = crc32c(&payload);
    }
    let place = Place { epoch: Epoch(1), lsn: Lsn(lsn) };
    let prev_epoch = Epoch(u64::from(lsn > 1));
    Entry { header: EntryHeader { place, prev_epoch, kind }, payload }
}

/// Where each round ended: round 0 wrote up to `ends[0]`, round 1 up to `ends[1]`, and so on.
#[derive(Clone, Default)]
struct History {
    ends: Vec<u64>,
}

impl History {
    fn round_of(&self, lsn: u64) -> u64 {
        self.ends.iter().take_while(|&&end| end < lsn).count() as u64
    }

    /// The tags of the volume's blocks when everything up to `tail` is applied.
    fn content(&self, tail: u64) -> BTreeMap<u64, u64> {
        let mut content = BTreeMap::new();
        for lsn in 1..=tail {
            let round = self.round_of(lsn);
            match kind(lsn, round) {
                EntryKind::Write { range, .. } => {
                    content.extend((range.start..range.end()).map(|b| (b, tag(lsn, round, b))));
                }
                EntryKind::Zero { range, .. } => {
                    content.retain(|block, _| !(range.start..range.end()).contains(block));
                }
                _ => {}
            }
        }
        content
    }
}

/// A store on a device, driven as the engine drives it.
struct Life {
    bench: Bench,
    store: Store,
    events: Vec<StorageEvent>,
    durable: u64,
    next: u64,
}

impl Life {
    fn begin(backend: &Backend, fresh: bool) -> Self {
        let mut bench = Bench::new(backend.open(), ARENA_BYTES, true);
        let options = Options::new(bench.arena.clone());
        let mut disk = bench.file_disk();
        if fresh {
            let format = FormatOptions {
                store: StoreId([3; 16]),
                cluster: volume().0,
                node: NodeName::new("node-a"),
                shard: 0,
                ring_blocks: Some(2048),
                overwrite: true,
            };
            Store::format(&mut disk, &format, &options).expect("formats");
        }
        let instance = InstanceId::from_bytes([9; 16]);
        let (store, report) = Store::open(&mut disk, options, instance).expect("opens");
        assert!(report.damaged.is_empty(), "{report:?}");
        drop(disk);
        let mut life = Self { bench, store, events: Vec::new(), durable: 0, next: 1 };
        if fresh {
            let new = NewReplica {
                volume: volume(),
                replica: ReplicaId::from_bytes([5; 16]),
                name: "pvc-test".into(),
                size_blocks: SIZE_BLOCKS,
                source: None,
                incomplete: false,
            };
            life.store.create_replica(new, Token(1));
            life.answer(|event| matches!(event, StorageEvent::Done { result: Ok(()), .. }));
        }
        let state = life.store.replica(volume()).expect("a replica");
        assert_eq!(state.incomplete, None);
        assert_eq!(state.durable, state.tail, "what is read at the start is durable");
        life.durable = state.durable.lsn.0;
        life.next = life.durable + 1;
        life
    }

    /// Hands the device what the store wants of it.
    fn submit(&mut self) {
        let mut ops = Vec::new();
        self.store.take(&mut ops, &mut self.events);
        for (token, op) in ops {
            self.bench.reactor.submit(self.bench.disk, token, op);
        }
    }

    /// Hands operations to the device and completions to the store; waits a little for them.
    fn turn(&mut self) {
        self.submit();
        let mut events = Vec::new();
        let deadline = now() + Duration::from_millis(10);
        self.bench.reactor.poll(Some(deadline), &mut events).expect("a ring");
        for event in events {
            if let Event::Disk { done, .. } = event {
                self.store.on_disk(done, now());
            }
        }
        self.store.tick(now());
        self.submit();
        for event in &self.events {
            match event {
                StorageEvent::Durable { place, .. } => self.durable = place.lsn.0,
                StorageEvent::Failed(error) => panic!("the store failed: {error}"),
                _ => {}
            }
        }
    }

    /// Waits for an event of one kind; all others are dropped.
    fn answer(&mut self, wanted: impl Fn(&StorageEvent) -> bool) -> StorageEvent {
        let started = Instant::now();
        loop {
            self.turn();
            let found = self.events.iter().position(&wanted);
            let found = found.map(|index| self.events.swap_remove(index));
            self.events.clear();
            if let Some(event) = found {
                return event;
            }
            assert!(started.elapsed() < PATIENCE, "an answer in time");
        }
    }

    /// Appends as much as may be on its way, applies what is durable.
    fn append(&mut self, round: u64, last: u64) {
        while self.next <= last && self.next <= self.durable + DEPTH {
            match self.store.append(volume(), None, vec![entry(self.next, round)]) {
                Ok(()) => self.next += 1,
                Err(StorageError::Busy | StorageError::NoSpace { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
        self.store.apply(volume(), Lsn(self.durable));
        self.turn();
        self.events.clear();
    }

    /// Writes up to entry `last`, until all is durable.
    fn write(&mut self, round: u64, last: u64) {
        let started = Instant::now();
        while self.durable < last {
            self.append(round, last);
            assert!(started.elapsed() < PATIENCE, "entry {} of {last}", self.durable);
        }
        self.store.apply(volume(), Lsn(self.durable));
    }

    /// Reads the whole volume, and holds it against what the history says.
    fn compare(&mut self, history: &History) {
        let tail = self.store.replica(volume()).expect("a replica").tail.lsn.0;
        self.store.apply(volume(), Lsn(tail));
        let content = history.content(tail);
        let step = 256;
        for start in (0..SIZE_BLOCKS).step_by(step) {
            let range = BlockRange { start, count: step as u32 };
            let pieces = loop {
                self.store.read(volume(), range, Token(2));
                match self.answer(|event| matches!(event, StorageEvent::Read { .. })) {
                    StorageEvent::Read { result: Ok(pieces), .. } => break pieces,
                    StorageEvent::Read { result: Err(StorageError::Busy), .. } => self.turn(),
                    event => panic!("{event:?}"),
                }
            };
            for (block, bytes) in (start..).zip(pieces.concat().chunks(BLOCK_BYTES)) {
                let wanted = content.get(&block).copied().unwrap_or(0);
                let same = bytes.chunks(8).all(|word| word == wanted.to_le_bytes());
                assert!(same, "block {block} is not {wanted:x} but {:x?}", &bytes[..8]);
            }
        }
        // Every leaf was just read, and the cache is larger than they are.
        let wrong = self.store.check(&mut |run| panic!("the leaf at {run:?} is at hand"));
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

#[test]
fn a_store_reads_back_what_was_written_also_after_it_was_opened_again() {
    for backend in backends("store", DEVICE_BYTES) {
        let started = Instant::now();
        let mut history = History::default();
        for round in 0..4 {
            let mut life = Life::begin(&backend, round == 0);
            assert_eq!(life.durable, history.ends.last().copied().unwrap_or(0));
            life.compare(&history);
            let last = life.durable + 300;
            life.write(round, last);
            history.ends.push(last);
            life.compare(&history);
        }
        let entries = history.ends.last().expect("four rounds");
        println!("{}: {entries} entries in {:?}", backend.name, started.elapsed());
    }
}

const CHILD: &str = "TERCET_TEST_ROUND";

/// Not a test of its own: one life of a writer. Told `DEVICE ACKED END,END,...`: it holds what is
/// there against what must be there, says `tail N`, then writes without end and says `acked N`.
/// Without ends it formats the device.
#[test]
fn store_round() {
    let Ok(told) = std::env::var(CHILD) else {
        return;
    };
    let mut words = told.split(' ');
    let backend = Backend::named(words.next().expect("a device"));
    let acked: u64 = words.next().expect("acked").parse().expect("a number");
    let ends = words.next().unwrap_or_default().split(',').filter(|text| !text.is_empty());
    let mut history = History { ends: ends.map(|text| text.parse().expect("a number")).collect() };
    let opening = Instant::now();
    let mut life = Life::begin(&backend, history.ends.is_empty());
    let opened = opening.elapsed();
    let tail = life.durable;
    assert!(tail >= acked, "entry {acked} was acknowledged, the log ends at {tail}");
    // The last life's end is known only now; the ends before it are given.
    if let Some(end) = history.ends.last_mut() {
        *end = tail;
    }
    life.compare(&history);
    println!("\ntail {tail} opened {} ms", opened.as_millis());
    let round = history.ends.len() as u64;
    let mut said = Instant::now();
    loop {
        life.append(round, u64::MAX);
        if said.elapsed() > Duration::from_millis(20) {
            println!("acked {}", life.durable);
            said = Instant::now();
        }
    }
}

/// What a killed writer was told durable is there, and nothing that is not its own.
#[test]
fn nothing_acknowledged_is_lost_when_the_writer_is_killed() {
    for backend in backends("kill", DEVICE_BYTES) {
        drop(backend.open()); // a file is made with its size
        let (mut acked, mut ends) = (0_u64, Vec::<String>::new());
        for round in 0..4_u64 {
            let told = format!("{} {acked} {}", backend.spec(), ends.join(","));
            let mut child = Command::new(std::env::current_exe().expect("this test"))
                .args(["--exact", "store_round", "--nocapture"])
                .env(CHILD, &told)
                .stdout(Stdio::piped())
                .spawn()
                .expect("a writer");
            let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
            let mut tail = None;
            let from = acked;
            for line in lines.map_while(Result::ok) {
                if let Some(text) = line.strip_prefix("tail ") {
                    tail = text.split(' ').next().and_then(|text| text.parse::<u64>().ok());
                } else if let Some(text) = line.strip_prefix("acked ") {
                    acked = text.parse().expect("a number");
                }
                // Another moment in each round.
                if acked > from + 300 + 70 * round {
                    child.kill().expect("killed");
                    break;
                }
            }
            child.wait().expect("reaped");
            let tail = tail.unwrap_or_else(|| panic!("{}: round {round} of {told}", backend.name));
            // The end of the life before is known now; that of this one in the next.
            if let Some(last) = ends.last_mut() {
                *last = tail.to_string();
            }
            ends.push("0".to_owned());
        }
        println!("{}: {acked} entries acknowledged, 4 kills", backend.name);
    }
}
