//! A device that lies, fills up, refuses or stands still, at every place and at every moment of
//! short workloads: what a store may answer then, counted.
//!
//! A start after damage may refuse the device, find replicas incomplete, or find nothing wrong; a
//! read may say `Checksum`. What it may never do is lose what was acknowledged and call the replica
//! whole, or hand out other bytes than were written. Damage of several structures at once is left
//! to `damage.rs`, where each case says what exactly is found.

mod common;

use std::collections::BTreeMap;

use common::{ModelVolume, World, block_bytes, evidence, id, volume_id};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tercet_proto::storage::{Storage, StorageError, StorageEvent};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, Copies, EntryKind, InstanceId, Instant, Lsn, SnapshotId, Token,
    VolumeId,
};
use tercet_store::arena::Arena;
use tercet_store::disk::{Disk, DiskDone, DiskOp, DiskToken};
use tercet_store::simdisk::{Image, SimDisk};
use tercet_store::{OpenError, Store};

const CAPACITY: u64 = 16 << 20;
const READ_BLOCKS: u64 = 256;
/// Bits flipped in each block of metadata, beside those of its first bytes.
const BITS: usize = 6;
/// Of so many blocks of data one is damaged.
const DATA_EVERY: usize = 5;

fn write(start: u64, count: u32) -> EntryKind {
    EntryKind::Write { range: BlockRange { start, count }, payload_crc: 0 }
}

fn zero(start: u64, count: u32) -> EntryKind {
    EntryKind::Zero { range: BlockRange { start, count }, discard: true }
}

fn snapshot(number: u64) -> EntryKind {
    EntryKind::Snapshot { id: SnapshotId::from_bytes(id(number)) }
}

fn append_settled(world: &mut World, volume: VolumeId, kinds: &[EntryKind]) {
    world.append(volume, None, kinds).expect("room");
    world.settle();
}

/// Every structure on the device: both superblocks and slots, roots, leaves, a snapshot's and a
/// head's blocks, small ones and extents, and a log with records of both behind a checkpoint. All
/// is acknowledged, and a mark says so.
fn of_everything() -> World {
    let (a, b) = (volume_id(1), volume_id(2));
    let mut world = World::new(1, CAPACITY, None);
    world.create(a, 3000, None);
    world.create(b, 1500, None);
    world.settle();
    append_settled(&mut world, a, &[write(0, 2), write(5, 1)]);
    append_settled(&mut world, a, &[write(1020, 20), snapshot(7)]);
    append_settled(&mut world, b, &[write(3, 3)]);
    // So many stamps that a leaf does not fit one block, nor, once it is known how many come in
    // together, a record's header.
    let many: Vec<EntryKind> = (0..180).map(|index| write(300 + index, 1)).collect();
    for _ in 0..2 {
        append_settled(&mut world, b, &many);
        world.apply(b, 200);
    }
    world.apply(a, 10);
    for start in [1, 1022] {
        append_settled(&mut world, a, &[write(start, 1), zero(start + 2, 3)]);
        world.apply(a, 10);
        world.store.request_checkpoint();
        world.settle();
    }
    append_settled(&mut world, a, &[write(30, 3)]);
    append_settled(&mut world, b, &[write(200, 17)]);
    append_settled(&mut world, a, &[zero(5, 1)]);
    append_settled(&mut world, b, &[write(4, 1)]);
    world.tick(1);
    world.tick(60);
    world.settle();
    world
}

const DATA: &str = "data or payload";
const REST: &str = "rest of a record or leaf";

/// What a block of the device is, by its magic number.
fn structure(sector: u64, bytes: &[u8; BLOCK_BYTES]) -> &'static str {
    match &bytes[4..8] {
        b"TLG1" => "log record",
        b"TRT1" => "root",
        b"TLF1" => "leaf",
        b"TCK1" => "slot",
        _ if sector == 0 || sector == 16 => "superblock",
        _ if bytes.chunks(8).all(|word| word == &bytes[..8]) => DATA, // as `block_bytes` does
        _ => REST,
    }
}

/// What became of a start and of reading everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Found {
    /// The device is refused.
    Refused,
    /// A replica is incomplete: it does not serve, it is filled again (R1).
    Incomplete,
    /// A read says which block is bad (C4).
    Checksum,
    /// Nothing that anybody needs was hit.
    Nothing,
}

type Content = BTreeMap<u64, u64>;

/// Completes whatever the store wants, and returns what it says.
fn drive(store: &mut Store, disk: &mut SimDisk) -> Vec<StorageEvent> {
    let mut events = Vec::new();
    loop {
        let mut ops = Vec::new();
        store.take(&mut ops, &mut events);
        let mut done = Vec::new();
        for (token, op) in ops {
            disk.submit(token, op);
            disk.complete(token);
        }
        disk.poll(&mut done);
        if done.is_empty() {
            return events;
        }
        for one in done {
            store.on_disk(one, Instant(1));
        }
    }
}

/// Reads a part of a frozen view in pieces. The number of pieces that say `Checksum`, or what is
/// wrong.
fn read_part(
    store: &mut Store,
    disk: &mut SimDisk,
    (volume, part): (VolumeId, usize),
    (size, content): (u64, &Content),
) -> Result<u64, String> {
    let view = store.freeze(volume).ok_or("a complete replica has a view")?;
    let mut noticed = 0;
    for start in (0..size).step_by(READ_BLOCKS as usize) {
        let range = BlockRange { start, count: READ_BLOCKS.min(size - start) as u32 };
        store.read_view(view.id, part, &[range], Token(1 << 50));
        let events = drive(store, disk);
        let result = events.into_iter().find_map(|event| match event {
            StorageEvent::Read { result, .. } => Some(result),
            _ => None,
        });
        match result.ok_or("a read is answered")? {
            Ok(pieces) => {
                let bytes = pieces.concat();
                for (number, block) in (start..).zip(bytes.chunks(BLOCK_BYTES)) {
                    let tag = content.get(&number);
                    let wanted = tag.map_or_else(|| vec![0; BLOCK_BYTES], |tag| block_bytes(*tag));
                    if block != wanted {
                        return Err(format!("{volume} part {part}: block {number} is wrong"));
                    }
                }
            }
            Err(StorageError::Checksum { volume: named, block }) => {
                let within = block >= range.start && block < range.end();
                if named != volume || !within {
                    return Err(format!("{volume}: {named} block {block} is named"));
                }
                noticed += 1;
            }
            Err(error) => return Err(format!("{volume} part {part}: {error}")),
        }
    }
    store.thaw(view.id);
    Ok(noticed)
}

/// One replica after a start: what is acknowledged is there, or it says that it is not whole.
fn look_at(
    store: &mut Store,
    disk: &mut SimDisk,
    volume: VolumeId,
    model: &ModelVolume,
) -> Result<Found, String> {
    let state = store.replica(volume).ok_or(format!("{volume}: is not there"))?;
    if state.incomplete.is_some() {
        return Ok(Found::Incomplete);
    }
    if state.tail != model.acked {
        return Err(format!("{volume}: ends at {:?}, not at {:?}", state.tail, model.acked));
    }
    store.apply(volume, Lsn(model.log.len() as u64));
    drive(store, disk);
    let mut all = model.clone();
    while all.applied < all.log.len() as u64 {
        all.apply_next();
    }
    let mut noticed = 0;
    for (part, snapshot) in all.snapshots.iter().enumerate() {
        noticed += read_part(store, disk, (volume, part), (snapshot.size, &snapshot.content))?;
    }
    let head = (volume, all.snapshots.len());
    noticed += read_part(store, disk, head, (all.size, &all.content))?;
    Ok(if noticed > 0 { Found::Checksum } else { Found::Nothing })
}

/// Opens what is there and holds it against the model.
fn start(world: &World, mut disk: SimDisk) -> Result<Found, String> {
    let instance = InstanceId::from_bytes(id(9));
    let mut store = match Store::open(&mut disk, world.options.clone(), instance) {
        Ok((store, _)) => store,
        Err(OpenError::Damaged(_) | OpenError::Superblock(_)) => return Ok(Found::Refused),
        Err(error) => return Err(format!("refused for another reason: {error}")),
    };
    drive(&mut store, &mut disk);
    let mut worst = Found::Nothing;
    for (volume, model) in &world.model {
        worst = worst.min(look_at(&mut store, &mut disk, *volume, model)?);
    }
    drive(&mut store, &mut disk);
    let wrong = store.check(&mut |run| common::read_run(&disk, run));
    if wrong.is_empty() { Ok(worst) } else { Err(format!("{wrong:#?}")) }
}

type Counts = BTreeMap<(&'static str, Found), u64>;

fn report(name: &str, counts: &Counts, started: std::time::Instant) {
    for ((structure, found), count) in counts {
        println!("  {structure}: {found:?} {count}");
    }
    evidence(name, counts.values().sum(), 0, started);
}

/// The blocks that are not zero, each with what it is; of data only some.
fn blocks(disk: &SimDisk) -> Vec<(u64, &'static str)> {
    let mut data = 0;
    (0..CAPACITY / BLOCK_BYTES as u64)
        .filter(|sector| disk.sector(*sector).iter().any(|byte| *byte != 0))
        .map(|sector| (sector, structure(sector, &disk.sector(sector))))
        .filter(|(_, structure)| {
            data += usize::from(*structure == DATA);
            *structure != DATA || data % DATA_EVERY == 0
        })
        .collect()
}

/// Bits of one block: its first fields one by one, and some of the rest.
fn bits(structure: &str, rng: &mut SmallRng) -> Vec<usize> {
    let fields = if matches!(structure, DATA | REST) { 0 } else { 64 };
    let mut bits: Vec<usize> = (0..fields).map(|byte| byte * 8 + byte % 8).collect();
    bits.extend((0..BITS).map(|_| rng.random_range(0..BLOCK_BYTES * 8)));
    bits
}

fn flip_each(rng: &mut SmallRng) -> Counts {
    let world = of_everything();
    let image = world.disk.image();
    let mut counts = Counts::new();
    for (sector, structure) in blocks(&world.disk) {
        for bit in bits(structure, rng) {
            let mut disk = SimDisk::from_image(CAPACITY, &image);
            disk.flip(sector, bit);
            let found = start(&world, disk)
                .unwrap_or_else(|wrong| panic!("{structure} {sector}, bit {bit}: {wrong}"));
            *counts.entry((structure, found)).or_insert(0) += 1;
        }
    }
    counts
}

#[test]
fn a_flipped_bit_anywhere_is_noticed_or_hurts_nobody() {
    let started = std::time::Instant::now();
    let counts = flip_each(&mut SmallRng::seed_from_u64(1));
    report("store_flipped_bits", &counts, started);
    let of = |structure, found| counts.get(&(structure, found)).copied().unwrap_or(0);
    assert_eq!(of("superblock", Found::Refused), 0, "there are two");
    for (structure, found) in [
        ("slot", Found::Refused),
        ("root", Found::Refused),
        ("leaf", Found::Refused),
        ("log record", Found::Incomplete),
        (DATA, Found::Checksum),
        (DATA, Found::Incomplete),
        (REST, Found::Incomplete),
        (REST, Found::Refused),
    ] {
        assert!(of(structure, found) > 0, "{structure}: {found:?} never");
    }
}

/// Writes one block's bytes over another's.
fn misdirect(disk: &mut SimDisk, arena: &Arena, from: u64, to: u64) {
    let bytes = disk.sector(from);
    let mut data = arena.take(1).expect("room");
    data.copy_from_slice(&*bytes);
    let token = DiskToken(1 << 62);
    disk.submit(
        token,
        DiskOp::Write { offset: to * BLOCK_BYTES as u64, data: data.into(), fua: true },
    );
    disk.complete(token);
    disk.poll(&mut Vec::new());
}

/// A write that went elsewhere, and one that never arrived: valid bytes at the wrong place.
#[test]
fn a_valid_block_at_a_wrong_place_is_noticed_or_hurts_nobody() {
    let started = std::time::Instant::now();
    let world = of_everything();
    let image = world.disk.image();
    let all = blocks(&world.disk);
    let mut counts = Counts::new();
    let mut rng = SmallRng::seed_from_u64(2);
    for (to, structure) in &all {
        let same: Vec<u64> =
            all.iter().filter(|one| one.1 == *structure && one.0 != *to).map(|one| one.0).collect();
        let mut froms = vec![CAPACITY / BLOCK_BYTES as u64 - 1]; // zeroes: it never arrived
        froms.extend((0..4).map(|_| same[rng.random_range(0..same.len())]));
        for from in froms {
            let mut disk = SimDisk::from_image(CAPACITY, &image);
            misdirect(&mut disk, &world.arena, from, *to);
            let found = start(&world, disk)
                .unwrap_or_else(|wrong| panic!("{structure} {from} at {to}: {wrong}"));
            *counts.entry((structure, found)).or_insert(0) += 1;
        }
    }
    report("store_misdirected_blocks", &counts, started);
}

/// The operation with this number fails, counted from the first.
struct Failing {
    disk: SimDisk,
    left: u64,
}

impl Disk for Failing {
    fn capacity_bytes(&self) -> u64 {
        self.disk.capacity_bytes()
    }

    fn submit(&mut self, token: DiskToken, op: DiskOp) {
        self.disk.submit(token, op);
        if self.left == 1 {
            self.disk.fail(token);
        }
        self.left = self.left.saturating_sub(1);
    }

    fn poll(&mut self, done: &mut Vec<DiskDone>) {
        self.disk.poll(done);
    }

    fn wait(&mut self, done: &mut Vec<DiskDone>) {
        self.disk.wait(done);
    }
}

#[test]
fn an_error_of_each_operation_of_a_start_refuses_the_device_and_changes_nothing() {
    let started = std::time::Instant::now();
    let world = of_everything();
    let mut disk = Failing { disk: SimDisk::from_image(CAPACITY, &world.disk.image()), left: 0 };
    let instance = InstanceId::from_bytes(id(9));
    let mut count = 0;
    loop {
        disk.left = count + 1;
        match Store::open(&mut disk, world.options.clone(), instance) {
            Ok(_) => break,
            Err(OpenError::Device(_)) => count += 1,
            Err(error) => panic!("operation {count}: {error}"),
        }
        let image = disk.disk.image();
        let found = start(&world, SimDisk::from_image(CAPACITY, &image)).expect("opens");
        assert_eq!(found, Found::Nothing, "operation {count}");
    }
    assert!(count > 20, "{count} operations failed");
    evidence("store_failed_operations_of_a_start", count, 0, started);
}

#[test]
fn a_format_that_fails_at_any_operation_leaves_no_store() {
    let started = std::time::Instant::now();
    let options = common::options();
    let format = common::format_options();
    let mut count = 0;
    loop {
        let mut disk = Failing { disk: SimDisk::new(CAPACITY), left: count + 1 };
        match Store::format(&mut disk, &format, &options) {
            Ok(()) => break,
            Err(OpenError::Device(_)) => count += 1,
            Err(error) => panic!("operation {count}: {error}"),
        }
        disk.disk.power_cut(&mut |_| 0);
        disk.left = 0;
        // Between the two superblocks there is a store, and a format is refused: both are right.
        match Store::format(&mut disk, &format, &options) {
            Ok(()) | Err(OpenError::Formatted(_)) => {}
            Err(error) => panic!("operation {count}, formatted again: {error}"),
        }
        let instance = InstanceId::from_bytes(id(1));
        Store::open(&mut disk, options.clone(), instance).expect("an empty store");
    }
    assert!(count > 5, "{count} operations failed");
    evidence("store_failed_operations_of_a_format", count, 0, started);
}

/// Appends until there is no room, in both ways of writing; how many writes fitted.
fn fill(world: &mut World, volume: VolumeId, size: u64) -> u64 {
    let mut fitted = 0;
    let mut busy = 0;
    loop {
        let count = if world.rng.random_bool(0.5) { 3 } else { 40 };
        let start = world.rng.random_range(0..size - u64::from(count));
        match world.write(volume, start, count) {
            Ok(()) => (fitted, busy) = (fitted + 1, 0),
            Err(StorageError::Busy) => busy += 1,
            Err(StorageError::NoSpace { needed_bytes, free_bytes }) => {
                assert!(free_bytes < needed_bytes, "{free_bytes} free, {needed_bytes} needed");
                world.settle();
                world.apply(volume, 1000); // a snapshot may be the last that fitted
                return fitted;
            }
            Err(error) => panic!("{error}"),
        }
        assert!(busy < 200, "busy is not for ever");
        world.settle();
        world.apply(volume, 1000);
        if fitted % 40 == 0 {
            // What is shared with a snapshot does not come back by writing again.
            let number = world.fresh();
            let _ = world.append(volume, None, &[snapshot(number)]);
        }
        world.tick(20);
        world.settle();
    }
}

/// Gives everything back: deletions are never refused, and the space is there again.
fn empty(world: &mut World, volume: VolumeId, size: u64) {
    let snapshots: Vec<SnapshotId> =
        world.model[&volume].snapshots.iter().map(|snapshot| snapshot.id).collect();
    let mut kinds: Vec<EntryKind> =
        snapshots.iter().map(|id| EntryKind::SnapshotDelete { id: *id }).collect();
    kinds.push(zero(0, size as u32));
    for kind in kinds {
        let mut tries = 0;
        while let Err(error) = world.append(volume, None, &[kind]) {
            assert!(matches!(error, StorageError::Busy), "{kind:?} on a full device: {error}");
            tries += 1;
            assert!(tries < 200, "{kind:?}: busy is not for ever");
            world.tick(20);
            world.settle();
        }
        world.settle();
        world.apply(volume, 1000);
    }
    for _ in 0..3 {
        world.store.request_checkpoint();
        world.settle();
    }
}

#[test]
fn a_full_device_refuses_before_it_acknowledges_and_comes_back() {
    let started = std::time::Instant::now();
    let (volume, size) = (volume_id(1), 4000);
    let mut fitted = 0;
    for seed in 0..4 {
        let mut world = World::new(seed, CAPACITY, None);
        world.create(volume, size, None);
        world.settle();
        for round in 0..3 {
            let now = fill(&mut world, volume, size);
            assert!(now > 50, "seed {seed}, round {round}: only {now} writes fitted");
            fitted += now;
            let before = world.model[&volume].tail();
            assert_eq!(world.store.replica(volume).expect("there").tail, before);
            if round == 1 {
                let rng = &mut world.rng;
                world.disk.power_cut(&mut |choice| rng.random_range(0..=choice.versions));
                world.restart();
            }
            world.compare_all();
            world.assert_well(&format!("seed {seed}, round {round}, full"));
            empty(&mut world, volume, size);
            assert_eq!(world.store.allocated_bytes(volume), Some(0));
            world.compare_all();
            world.assert_well(&format!("seed {seed}, round {round}, empty again"));
        }
    }
    evidence("store_writes_until_full", fitted, 0, started);
}

/// Completes everything but one operation, until nothing else is on its way.
fn settle_but(world: &mut World, stuck: DiskToken) {
    world.pump();
    while let Some(token) = world.disk.in_flight().into_iter().find(|token| *token != stuck) {
        world.disk.complete(token);
        world.deliver();
    }
    world.pump();
}

/// Work of all kinds that nobody waits for. Refusals are what a slow device leads to.
fn work(world: &mut World, number: u64) {
    let (a, b) = (volume_id(1), volume_id(2));
    match number % 8 {
        0 | 3 => drop(world.append(a, None, &[write(number % 50, 2)])),
        1 => drop(world.append(b, None, &[write(100 + number, 17)])),
        2 | 6 => {
            world.apply(a, 10);
            world.apply(b, 10);
        }
        4 => drop(world.append(a, None, &[snapshot(100 + number), write(1, 1)])),
        5 => world.store.request_checkpoint(),
        _ => world.tick(60),
    }
    world.pump();
}

/// What the device may hold while an operation stands still, opened and compared.
fn cut_while_stuck(world: &World, image: &Image, what: &str) {
    let mut after = world.fork(SimDisk::from_image(world.disk.capacity_bytes(), image));
    after.restart();
    after.compare_all();
    after.assert_well(what);
}

/// Each operation in turn stands still while all others complete: nothing is acknowledged that a
/// power cut could take, what waits is bounded, and when it moves again all goes on.
#[test]
fn an_operation_that_stands_still_acknowledges_nothing_too_early() {
    let started = std::time::Instant::now();
    let (mut stuck_at, mut cuts) = (0, 0);
    loop {
        let mut world = World::new(3, CAPACITY, None);
        for volume in [1, 2] {
            world.create(volume_id(volume), 3000, None);
        }
        world.settle();
        let (first, mut number) = (world.disk.operations, 0);
        let stuck = loop {
            match world.disk.in_flight().first().copied() {
                Some(token) if world.disk.operations - first == stuck_at => break Some(token),
                Some(token) => {
                    world.disk.complete(token);
                    world.deliver();
                }
                None if number == 24 => break None,
                None => {
                    work(&mut world, number);
                    number += 1;
                }
            }
        };
        let Some(stuck) = stuck else { break };
        settle_but(&mut world, stuck);
        for more in 0..16 {
            work(&mut world, number + more);
            settle_but(&mut world, stuck);
        }
        assert_eq!(world.disk.in_flight(), [stuck], "everything else has completed");
        world.assert_well(&format!("operation {stuck_at} stuck"));
        for all in [false, true] {
            let image = world.disk.image_after(&mut |choice| usize::from(all) * choice.versions);
            cut_while_stuck(&world, &image, &format!("operation {stuck_at}, {all}"));
            cuts += 1;
        }
        world.settle();
        world.compare_all();
        world.assert_well(&format!("operation {stuck_at} moves again"));
        stuck_at += 1;
    }
    assert!(stuck_at > 30, "{stuck_at} operations were stuck");
    println!("  {stuck_at} operations, {cuts} power cuts meanwhile");
    evidence("store_stuck_operations", stuck_at, 0, started);
}

/// A checkpoint that does not come to its end, while the log goes on until it is full: what the
/// older checkpoint needs of the ring is there after a power cut (W8).
#[test]
fn a_log_is_not_cut_before_the_checkpoint_is_durable() {
    // A ring of which the margin is a small part, so that a cut lets the head come round; payloads
    // that are few enough to lie in it.
    let mut world = World::new(5, 4 * CAPACITY, Some(4096));
    let volume = volume_id(1);
    world.create(volume, 8000, None);
    world.settle();
    for number in 0..190 {
        world.write(volume, number * 8, 7).expect("room");
        world.settle();
    }
    world.apply(volume, 1000);
    world.store.request_checkpoint();
    world.pump();
    let stuck = *world.disk.in_flight().first().expect("the checkpoint's first operation");
    let mut number = 0;
    let refused = loop {
        settle_but(&mut world, stuck);
        match world.write(volume, 2000 + number * 8, 7) {
            Ok(()) => number += 1,
            Err(error) => break error,
        }
        assert!(number < 400, "the ring is full before it is written over");
    };
    assert_eq!(refused, StorageError::Busy);
    let image = world.disk.image_after(&mut |_| 0);
    cut_while_stuck(&world, &image, "cut before the checkpoint was durable");
    world.settle();
    world.compare_all();
    world.assert_well("it moves again");
}

/// A device that stands still altogether: appends are refused at a bound, not queued without end.
#[test]
fn a_device_that_stands_still_bounds_what_waits() {
    let mut world = World::new(4, CAPACITY, None);
    let volume = volume_id(1);
    world.create(volume, 3000, None);
    world.settle();
    let mut taken = 0_u64;
    let refused = loop {
        match world.write(volume, taken % 2000, 8) {
            Ok(()) => taken += 8,
            Err(error) => break error,
        }
        assert!(taken < 16384, "{taken} blocks wait");
    };
    assert_eq!(refused, StorageError::Busy);
    assert_eq!(world.model[&volume].acked.lsn.0, 0, "nothing is durable");
    world.tick(60_000);
    world.settle();
    world.apply(volume, 10_000);
    world.compare_all();
    world.assert_well("it moves again");
    assert_eq!(world.model[&volume].acked.lsn.0, taken / 8);
}

#[cfg(feature = "canary")]
#[test]
fn canary_ignored_checksums_are_caught() {
    common::assert_caught(tercet_store::Canary::IgnoreChecksums, || {
        flip_each(&mut SmallRng::seed_from_u64(1));
    });
}

#[cfg(feature = "canary")]
#[test]
fn canary_a_log_cut_early_is_caught() {
    common::assert_caught(
        tercet_store::Canary::CutEarly,
        a_log_is_not_cut_before_the_checkpoint_is_durable,
    );
}
