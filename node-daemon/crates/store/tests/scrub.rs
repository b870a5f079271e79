//! Scrub and repair (rule C4): what a pass reads, what it finds, how quickly it goes; who sees a
//! repair, what one refuses, and that a crash at any moment of one gives back the bad block or the
//! good one and never other bytes. And reads that the device refuses.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use common::{World, block_bytes, evidence, id, volume_id};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tercet_proto::storage::{Storage, StorageError};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, BlockVersion, EntryKind, Repairs, SnapshotId, Token, VolumeId,
};
use tercet_store::disk::DiskOp;
use tercet_store::simdisk::SimDisk;
use tercet_store::{Options, ScrubPace};

const CAPACITY: u64 = 32 << 20;
const RING_BLOCKS: u32 = 1024;
/// Behind superblocks, slots and the ring.
const DATA_START: u64 = 64 + RING_BLOCKS as u64;
const PACE: ScrubPace = ScrubPace {
    idle_bytes_per_s: 8 << 20,
    busy_bytes_per_s: 1 << 20,
    every: Duration::from_secs(20),
};

fn write(start: u64, count: u32) -> EntryKind {
    EntryKind::Write { range: BlockRange { start, count }, payload_crc: 0 }
}

fn snapshot(number: u64) -> EntryKind {
    EntryKind::Snapshot { id: SnapshotId::from_bytes(id(number)) }
}

fn world(seed: u64) -> World {
    world_with(seed, common::options())
}

fn world_with(seed: u64, options: Options) -> World {
    #[cfg(feature = "canary")]
    let options = Options { canary: common::canary(), ..options };
    let options = Options { scrub: Some(PACE), ..options };
    World::with_options(seed, CAPACITY, Some(RING_BLOCKS), options)
}

fn checkpoint(world: &mut World) {
    world.store.request_checkpoint();
    world.settle();
}

/// A volume with two snapshots that share most of it, and a clone of the first one.
fn of_shared(seed: u64) -> World {
    let (a, b) = (volume_id(1), volume_id(2));
    let mut world = world(seed);
    world.create(a, 4000, None);
    world.settle();
    let put = |world: &mut World, kinds: &[EntryKind]| {
        world.append(a, None, kinds).expect("room");
        world.settle();
        world.apply(a, 100);
    };
    put(&mut world, &[write(0, 3), write(7, 1), write(1100, 40), snapshot(71)]);
    put(&mut world, &[write(1, 1), write(1110, 2), write(3000, 1), snapshot(72)]);
    put(&mut world, &[write(2, 1), write(2047, 2)]);
    world.create(b, 4000, Some((a, 0)));
    world.settle();
    checkpoint(&mut world);
    world
}

/// Blocks that differ, of all maps: what one pass has to read.
fn distinct(world: &World) -> u64 {
    let mut blocks = BTreeSet::new();
    for model in world.model.values() {
        let snapshots = model.snapshots.iter().map(|snapshot| &snapshot.content);
        for content in snapshots.chain([&model.content]) {
            blocks.extend(content.iter().map(|(block, tag)| (*block, *tag)));
        }
    }
    blocks.len() as u64
}

/// Lets time pass until another pass is over; how long it took.
fn pass(world: &mut World) -> Duration {
    let passes = world.store.scrub_status().passes;
    let mut began = None;
    for _ in 0..100_000 {
        let at = world.store.next_deadline().expect("there is always a next step");
        world.now = world.now.max(at);
        world.store.tick(world.now);
        world.settle();
        let status = world.store.scrub_status();
        began = began.or(status.pass_began);
        if status.passes > passes {
            return world.now.since(began.unwrap_or(world.now));
        }
    }
    panic!("a pass comes to its end: {:?}", world.store.scrub_status());
}

/// Where in the data area the bytes with this tag are.
fn sector_of(world: &World, tag: u64) -> u64 {
    let wanted = block_bytes(tag);
    let mut all = DATA_START..CAPACITY / BLOCK_BYTES as u64;
    all.find(|sector| world.disk.sector(*sector)[..] == wanted[..]).expect("it was copied home")
}

fn rot(world: &mut World, tag: u64) {
    let sector = sector_of(world, tag);
    let bit = world.rng.random_range(0..BLOCK_BYTES * 8);
    world.disk.flip(sector, bit);
}

/// Tag of a block, of the volume or of one of its snapshots, and its version's name.
fn version(
    world: &mut World,
    volume: VolumeId,
    index: Option<usize>,
    block: u64,
) -> (u64, BlockVersion) {
    let model = &world.model[&volume];
    let (content, snapshot) = match index {
        None => (&model.content, None),
        Some(index) => (&model.snapshots[index].content, Some(model.snapshots[index].id)),
    };
    let tag = content[&block];
    let range = BlockRange { start: block, count: 1 };
    let written = |entry: &&common::ModelEntry| match entry.header.kind {
        EntryKind::Write { range, .. } => {
            range.start <= block
                && block < range.end()
                && entry.tag + ((block - range.start) << 40) == tag
        }
        _ => false,
    };
    let stamp = if index.is_none() {
        common::copying::own_stamps(world, volume, range)[0].0
    } else {
        model.log.iter().find(written).expect("somebody wrote it").header.place
    };
    (tag, BlockVersion { snapshot, block, stamp })
}

fn repair(
    world: &mut World,
    volume: VolumeId,
    version: BlockVersion,
    tag: u64,
) -> Result<(), StorageError> {
    let token = Token(world.fresh() + (1 << 52));
    world.store.repair(volume, version, Bytes::from(block_bytes(tag)), token);
    world.settle();
    world.dones.remove(&token).expect("answered")
}

#[test]
fn a_pass_reads_what_is_shared_once_and_finds_nothing_bad() {
    let mut world = of_shared(1);
    let expected = distinct(&world);
    assert!(expected > 40, "{expected} blocks");
    for number in 1..=3 {
        pass(&mut world);
        let status = world.store.scrub_status();
        assert_eq!((status.passes, status.pass_blocks), (number, expected), "each block once");
        assert_eq!((status.bad_blocks, status.bad_blocks_now), (0, 0));
        assert_eq!(status.checked_blocks, number * expected);
        assert!(status.last_pass.is_some());
    }
    assert_eq!(world.check(), Vec::<String>::new());
    assert_eq!(world.bad, []);
}

#[test]
fn a_pass_finds_exactly_what_is_bad_and_says_where() {
    let (a, mut world) = (volume_id(1), of_shared(2));
    // Of the newest state only, of the older snapshot only, of all four maps; unreadable: of two.
    let bad = [(None, 2), (Some(0), 1), (None, 7), (None, 1110)]
        .map(|(index, block)| version(&mut world, a, index, block));
    for (tag, _) in &bad[..3] {
        rot(&mut world, *tag);
    }
    let sector = sector_of(&world, bad[3].0);
    world.disk.set_unreadable(sector);
    pass(&mut world);
    let mut expected: Vec<_> = bad.iter().map(|(_, version)| (a, *version)).collect();
    let mut found = std::mem::take(&mut world.bad);
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, expected);
    let status = world.store.scrub_status();
    assert_eq!((status.bad_blocks, status.bad_blocks_now), (4, 4));
    // Found again, but not counted again.
    pass(&mut world);
    assert_eq!(world.bad.len(), 4);
    assert_eq!(world.store.scrub_status().bad_blocks, 4);
    // Written over and given up: bad no more.
    world.write(a, 2, 1).expect("room");
    world.settle();
    world.apply(a, 100);
    checkpoint(&mut world);
    assert_eq!(world.store.scrub_status().bad_blocks_now, 3);
    assert!(!world.failed, "a bad block is no failed device");
}

#[test]
fn a_read_of_a_bad_block_names_it_before_its_answer() {
    let (a, mut world) = (volume_id(1), of_shared(3));
    let (tag, version) = version(&mut world, a, None, 1120);
    rot(&mut world, tag);
    let token = Token(1 << 52);
    world.store.read(a, BlockRange { start: 1100, count: 40 }, token);
    world.settle();
    let answer = world.other_reads.remove(&token).expect("answered");
    assert_eq!(answer, Err(StorageError::Checksum { volume: a, block: 1120 }));
    assert_eq!(world.bad, [(a, version)]);
    // A peer that asks for that version is not given it.
    world.store.read_version(a, version, token);
    world.settle();
    assert!(world.other_reads.remove(&token).expect("answered").is_err());
}

#[test]
fn scrub_keeps_to_its_pace_and_gives_way_to_hosts() {
    let a = volume_id(1);
    let mut world = world(4);
    world.create(a, 2000, None);
    world.settle();
    for start in (0..1600).step_by(160) {
        world.write(a, start, 160).expect("room");
        world.settle();
    }
    world.apply(a, 100);
    checkpoint(&mut world);
    let bytes = 1600 * BLOCK_BYTES as u64;
    let took = pass(&mut world);
    let least = Duration::from_secs_f64(bytes as f64 / PACE.idle_bytes_per_s as f64);
    assert!(took >= least * 9 / 10 && took < least * 2, "idle: {took:?}, not {least:?}");
    let (began, mut busy) = (world.now, 0);
    // Between two passes nothing is read.
    let next = world.store.next_deadline().expect("the next pass");
    assert!(next >= began + PACE.every / 2, "passes follow each other in time");
    world.now = next;
    let passes = world.store.scrub_status().passes;
    let began = world.now;
    while world.store.scrub_status().passes == passes {
        world.read(a, busy % 1600, 1);
        busy += 1;
        world.settle();
        let at = world.store.next_deadline().expect("the next step");
        world.now = world.now.max(at);
        world.store.tick(world.now);
        world.settle();
    }
    let took = world.now.since(began);
    let least = Duration::from_secs_f64(bytes as f64 / PACE.busy_bytes_per_s as f64);
    assert!(took >= least * 9 / 10 && took < least * 2, "busy: {took:?}, not {least:?}");
    world.assert_well("read meanwhile");
}

#[test]
fn a_pass_goes_on_over_what_changes_under_it() {
    let started = std::time::Instant::now();
    let mut passes = 0;
    for seed in 0..20 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (a, mut world) = (volume_id(1), of_shared(seed));
        let mut number = 100;
        for _ in 0..400 {
            number += 1;
            // None: a step is being read.
            if let Some(at) = world.store.next_deadline() {
                world.now = world.now.max(at);
                world.store.tick(world.now);
            }
            world.pump();
            for _ in 0..rng.random_range(0..3) {
                world.complete_one();
            }
            let snapshots: Vec<_> = world.model[&a].snapshots.iter().map(|s| s.id).collect();
            let one = snapshots.get(rng.random_range(0..snapshots.len().max(1))).copied();
            let _ = match (rng.random_range(0..12), one) {
                (0, _) => world.append(a, None, &[snapshot(number)]),
                (1, Some(id)) => world.append(a, None, &[EntryKind::SnapshotDelete { id }]),
                (2 | 3, _) => world.write(a, rng.random_range(0..3900), 2),
                (4, _) => {
                    world.apply(a, 5);
                    Ok(())
                }
                (5, _) if world.model.contains_key(&volume_id(2)) && number > 300 => {
                    world.delete(volume_id(2));
                    Ok(())
                }
                _ => Ok(()),
            };
        }
        world.settle();
        pass(&mut world);
        passes += world.store.scrub_status().passes;
        assert_eq!(world.bad, []);
        assert_eq!(world.check(), Vec::<String>::new());
        world.assert_well("scrubbed");
    }
    assert!(passes > 40, "{passes} passes");
    evidence("store_scrub_passes_under_changes", passes, 0, started);
}

#[test]
fn a_repair_is_seen_by_all_who_share_the_block_and_lasts() {
    let (a, mut world) = (volume_id(1), of_shared(5));
    let leaves = world.store.usage().leaves;
    // One that four maps share, one that two leaves share, one of a snapshot alone.
    // The log retains the entry of the second, so that it keeps the bad block until it is cut.
    for (index, block, kept) in [(None, 7, 0), (None, 1100, 1), (Some(0), 1, 0)] {
        let (tag, version) = version(&mut world, a, index, block);
        let bad = sector_of(&world, tag);
        rot(&mut world, tag);
        let before = world.store.usage();
        repair(&mut world, a, version, tag).expect("repaired");
        assert_ne!(sector_of(&world, tag), bad, "never in place");
        checkpoint(&mut world);
        let after = world.store.usage();
        assert_eq!(after.leaves, leaves, "what was shared is shared");
        let kept_bytes = kept * BLOCK_BYTES as u64;
        assert_eq!(after.allocated_bytes, before.allocated_bytes + kept_bytes, "given back");
    }
    assert_eq!(world.check(), Vec::<String>::new());
    let status = world.store.scrub_status();
    assert_eq!((status.repaired_blocks, status.bad_blocks_now), (3, 0));
    world.disk.power_cut(&mut |_| 0);
    world.restart();
    world.compare_all();
    world.assert_well("repaired, and the power went");
    pass(&mut world);
    assert_eq!(world.bad, [], "nothing is bad");
}

#[test]
fn a_repair_takes_nothing_but_the_bytes_of_that_version() {
    let (a, mut world) = (volume_id(1), of_shared(6));
    let (tag, version) = version(&mut world, a, None, 7);
    rot(&mut world, tag);
    let other = Err(StorageError::OtherVersion(a));
    let mut wrong = version;
    wrong.stamp.lsn = wrong.stamp.lsn.next();
    assert_eq!(repair(&mut world, a, wrong, tag), other, "another stamp");
    let hole = BlockVersion { block: 50, ..version };
    assert_eq!(repair(&mut world, a, hole, tag), other, "a hole");
    let snapshot = Some(SnapshotId::from_bytes(id(99)));
    assert_eq!(repair(&mut world, a, BlockVersion { snapshot, ..version }, tag), other);
    let checksum = Err(StorageError::Checksum { volume: a, block: 7 });
    assert_eq!(repair(&mut world, a, version, tag + 1), checksum, "other bytes");
    // It is written over while the bytes are on their way: they come too late.
    let token = Token(1 << 52);
    world.store.repair(a, version, Bytes::from(block_bytes(tag)), token);
    world.pump();
    let [mend] = world.disk.in_flight()[..] else { panic!("one write") };
    world.write(a, 7, 1).expect("room");
    while let Some(next) = world.disk.in_flight().into_iter().find(|next| *next != mend) {
        world.disk.complete(next);
        world.deliver();
    }
    world.apply(a, 100);
    for snapshot in [71, 72] {
        let id = SnapshotId::from_bytes(id(snapshot));
        world.append(a, None, &[EntryKind::SnapshotDelete { id }]).expect("room");
    }
    while let Some(next) = world.disk.in_flight().into_iter().find(|next| *next != mend) {
        world.disk.complete(next);
        world.deliver();
    }
    world.apply(a, 100);
    world.delete(volume_id(2));
    while let Some(next) = world.disk.in_flight().into_iter().find(|next| *next != mend) {
        world.disk.complete(next);
        world.deliver();
    }
    world.settle();
    assert_eq!(world.dones.remove(&token), Some(other), "nobody names it any more");
    checkpoint(&mut world);
    assert_eq!(world.check(), Vec::<String>::new());
    world.compare_all();
    world.assert_well("nothing was changed");
}

/// Opens what may be on the disk: the block is bad or good, everything else is what it was.
fn after_crash(world: &World, image: &tercet_store::simdisk::Image, bad: u64) -> (u64, u64) {
    let mut after = world.fork(SimDisk::from_image(CAPACITY, image));
    after.restart();
    assert_eq!(after.check(), Vec::<String>::new());
    let (mut found, mut whole) = (0, 0);
    let volumes: Vec<VolumeId> = after.model.keys().copied().collect();
    for volume in volumes {
        for block in after.model[&volume].content.clone().into_keys() {
            let tag = after.model[&volume].content[&block];
            let token = Token(1 << 52);
            after.store.read(volume, BlockRange { start: block, count: 1 }, token);
            after.settle();
            match after.other_reads.remove(&token).expect("answered") {
                Ok(pieces) => {
                    assert_eq!(pieces.concat(), block_bytes(tag), "{volume} {block}");
                    whole += u64::from(block == bad);
                }
                Err(StorageError::Checksum { .. }) if block == bad => found += 1,
                Err(error) => panic!("{volume} {block}: {error}"),
            }
        }
    }
    assert!(found == 0 || whole == 0, "all who share it see the same");
    (found, whole)
}

#[test]
fn a_crash_at_any_moment_of_a_repair_gives_back_the_bad_block_or_the_good_one() {
    let started = std::time::Instant::now();
    let (a, block) = (volume_id(1), 7);
    let mut rng = SmallRng::seed_from_u64(7);
    let (mut states, mut bad, mut good) = (0, 0, 0);
    for seed in 0..3 {
        let mut world = of_shared(seed);
        let (tag, version) = version(&mut world, a, None, block);
        rot(&mut world, tag);
        world.store.repair(a, version, Bytes::from(block_bytes(tag)), Token(1 << 52));
        world.pump();
        let mut asked = false;
        loop {
            for sample in 0..6 {
                let image = world.disk.image_after(&mut |choice| match sample {
                    0 => 0,
                    1 => choice.versions,
                    _ => rng.random_range(0..=choice.versions),
                });
                let (found, whole) = after_crash(&world, &image, block);
                states += 1;
                bad += u64::from(found > 0);
                good += u64::from(whole > 0);
            }
            if world.complete_one() {
                continue;
            }
            if asked {
                break;
            }
            asked = true;
            world.store.request_checkpoint();
            world.pump();
        }
        let image = world.disk.image();
        assert_eq!(after_crash(&world, &image, block), (0, 2), "durable with the checkpoint");
    }
    assert!(bad > 10 && good > 3, "{bad} bad, {good} good");
    evidence("store_crash_states_of_repairs", states, 0, started);
}

#[test]
fn a_read_that_the_device_refuses_once_is_done_again() {
    let (a, mut world) = (volume_id(1), of_shared(8));
    for (start, count) in [(0, 3), (1100, 40), (2047, 2)] {
        world.read(a, start, count);
        for token in world.disk.in_flight() {
            world.disk.fail(token);
        }
        world.settle();
    }
    world.assert_well("read");
    assert_eq!((world.reads_checked, world.bad.len()), (3, 0));
    assert!(!world.failed);
}

#[test]
fn a_place_that_cannot_be_read_is_one_bad_block_of_a_store_that_goes_on() {
    let (a, mut world) = (volume_id(1), of_shared(9));
    let (tag, version) = version(&mut world, a, None, 1120);
    let sector = sector_of(&world, tag);
    world.disk.set_unreadable(sector);
    let token = Token(1 << 52);
    world.store.read(a, BlockRange { start: 1100, count: 40 }, token);
    world.settle();
    let answer = world.other_reads.remove(&token).expect("answered");
    assert_eq!(answer, Err(StorageError::Checksum { volume: a, block: 1120 }));
    assert_eq!(world.bad, [(a, version)], "its neighbours were read one by one");
    world.write(a, 0, 1).expect("writes go on");
    world.settle();
    world.apply(a, 100);
    repair(&mut world, a, version, tag).expect("repaired");
    world.compare_all();
    world.assert_well("repaired");
    assert!(!world.failed);
}

#[test]
fn a_payload_that_cannot_be_read_from_the_ring_becomes_a_bad_block() {
    let a = volume_id(1);
    let mut world = world(10);
    world.create(a, 2000, None);
    world.settle();
    for start in [3, 10, 11] {
        world.write(a, start, 1).expect("room");
        world.settle();
    }
    world.apply(a, 100);
    let (tag, version) = version(&mut world, a, None, 10);
    let wanted = block_bytes(tag);
    let mut ring = 64..DATA_START;
    let sector = ring.find(|s| world.disk.sector(*s)[..] == wanted[..]).expect("in the ring");
    world.disk.set_unreadable(sector);
    checkpoint(&mut world);
    assert!(!world.failed, "the checkpoint came to its end");
    pass(&mut world);
    assert_eq!(world.bad, [(a, version)]);
    repair(&mut world, a, version, tag).expect("repaired");
    world.compare_all();
    world.assert_well("repaired");
}

/// A leaf that cannot be read, or rots, is an error of the blocks that it is for, and of no others.
#[test]
fn a_bad_leaf_is_an_error_of_its_own_blocks() {
    for rots in [false, true] {
        let a = volume_id(1);
        let mut world = world(13);
        world.create(a, 3000, None);
        world.settle();
        for block in [5, 1030, 2060] {
            world.write(a, block, 20).expect("room");
        }
        world.settle();
        world.apply(a, 3);
        checkpoint(&mut world);
        world.disk.power_cut(&mut |choice| choice.versions);
        world.restart();
        let leaves = (DATA_START..CAPACITY / BLOCK_BYTES as u64).filter(|sector| {
            let bytes = world.disk.sector(*sector);
            bytes[4..8] == *b"TLF1" && bytes[32..36] == 1_u32.to_le_bytes()
        });
        for sector in leaves.collect::<Vec<_>>() {
            if rots {
                world.disk.flip(sector, 999);
            } else {
                world.disk.set_unreadable(sector);
            }
        }
        let bad = StorageError::Checksum { volume: a, block: 1032 };
        for (block, wanted) in [(7, Ok(())), (1032, Err(bad)), (2062, Ok(()))] {
            let token = Token((1 << 52) + block);
            world.store.read(a, BlockRange { start: block, count: 3 }, token);
            world.settle();
            let found = world.other_reads.remove(&token).expect("answered");
            assert_eq!(found.map(|_| ()), wanted, "rots: {rots}");
        }
        assert!(!world.failed, "the store goes on");
    }
}

#[test]
fn write_errors_and_a_device_that_reads_nothing_any_more_still_end_the_store() {
    let a = volume_id(1);
    let mut first = of_shared(11);
    let (tag, version) = version(&mut first, a, None, 7);
    rot(&mut first, tag);
    first.store.repair(a, version, Bytes::from(block_bytes(tag)), Token(1 << 52));
    first.pump();
    let [mend] = first.disk.in_flight()[..] else { panic!("one write") };
    assert!(matches!(first.disk.operation(mend), Some(DiskOp::Write { .. })));
    first.disk.fail(mend);
    first.settle();
    assert!(first.failed, "a write that fails ends the store");
    // Its leaves are at hand: it is data that cannot be read.
    let mut second = world_with(12, Options { leaf_cache_bytes: 1 << 20, ..common::options() });
    second.create(a, 5000, None);
    second.settle();
    for start in (0..4800).step_by(400) {
        second.write(a, start, 400).expect("room");
        second.settle();
    }
    second.apply(a, 100);
    checkpoint(&mut second);
    for sector in DATA_START..CAPACITY / BLOCK_BYTES as u64 {
        second.disk.set_unreadable(sector);
    }
    for start in (0..4800).step_by(400) {
        second.store.read(a, BlockRange { start, count: 400 }, Token((1 << 52) + start));
        second.settle();
    }
    assert!(second.failed, "nothing at all can be read");
}

#[cfg(feature = "canary")]
#[test]
fn canary_a_repair_from_another_version_is_caught() {
    common::assert_caught(
        tercet_store::Canary::RepairOtherVersion,
        a_repair_takes_nothing_but_the_bytes_of_that_version,
    );
}
