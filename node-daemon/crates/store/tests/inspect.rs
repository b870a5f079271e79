//! Looking at a device: it finds what the store has, it names whose a damaged block is, and it
//! writes nothing.

mod common;

use common::{World, volume_id};
use tercet_proto::{BlockRange, EntryKind};
use tercet_store::Store;
use tercet_store::inspect::{Depth, Inspection, Problem};
use tercet_store::simdisk::SimDisk;

const CAPACITY: u64 = 16 << 20;
/// Behind superblocks, slots and the smallest ring.
const DATA_START: u64 = 64 + 1024;
const A: u64 = 1;
const B: u64 = 2;

fn write(start: u64, count: u32) -> EntryKind {
    EntryKind::Write { range: BlockRange { start, count }, payload_crc: 0 }
}

/// A volume with small and large writes, a snapshot, a checkpoint and a log behind it; and another.
fn lived_in() -> World {
    let mut world = World::new(1, CAPACITY, None);
    for volume in [A, B] {
        world.create(volume_id(volume), 3000, None);
        world.settle();
    }
    let snapshot = EntryKind::Snapshot { id: tercet_proto::SnapshotId::from_bytes(common::id(7)) };
    for kinds in [vec![write(0, 3), write(1500, 40)], vec![snapshot, write(1, 1)]] {
        world.append(volume_id(A), None, &kinds).expect("room");
        world.settle();
        world.apply(volume_id(A), 10);
    }
    world.append(volume_id(B), None, &[write(7, 2)]).expect("room");
    world.settle();
    world.apply(volume_id(B), 10);
    world.store.request_checkpoint();
    world.settle();
    world.append(volume_id(A), None, &[write(2000, 32), write(9, 1)]).expect("room");
    world.settle();
    world
}

fn inspect(world: &mut World, depth: Depth) -> Inspection {
    let before = world.disk.operations;
    let image = sectors(&world.disk);
    let options = world.options.clone();
    let found = Store::inspect(&mut world.disk, options, depth, &mut |_, _| {}).expect("reads");
    assert!(world.disk.operations > before, "it looked");
    assert!(sectors(&world.disk) == image, "it changed nothing");
    found
}

fn sectors(disk: &SimDisk) -> Vec<[u8; 4096]> {
    (0..CAPACITY / 4096).map(|sector| disk.sector(sector)[..].try_into().expect("4 KiB")).collect()
}

fn sectors_of(world: &World, tag: u64) -> Vec<u64> {
    let wanted = common::block_bytes(tag);
    (0..CAPACITY / 4096).filter(|s| world.disk.sector(*s)[..] == wanted[..]).collect()
}

#[test]
fn a_whole_store_has_no_problem_and_is_told_as_it_is() {
    let mut world = lived_in();
    let found = inspect(&mut world, Depth::Blocks);
    assert_eq!(found.problems, []);
    // Leaves: two of A's newest state, one that its snapshot has alone, one of B's; and the extents
    // of two entries that the log retains.
    assert_eq!(found.blocks_checked, 3 + 40 + 3 + 2 + 40 + 32);
    let contents = found.contents.expect("opens");
    let a = &contents.replicas[0];
    assert_eq!((a.volume, a.complete, a.tail.1, a.applied.1), (volume_id(A), true, 6, 4));
    assert_eq!(a.snapshots.len(), 1);
    assert_eq!(a.snapshots[0].mapped_bytes, 43 * 4096);
    assert_eq!(contents.replicas[1].mapped_bytes, 2 * 4096);
    assert_eq!(contents.allocated_bytes, world.store.usage().allocated_bytes);
    let quick = inspect(&mut world, Depth::Metadata);
    assert_eq!((quick.blocks_checked, quick.problems), (0, vec![]));
}

#[test]
fn a_flipped_bit_in_any_block_is_named_with_volume_and_block() {
    let world = lived_in();
    let model = &world.model[&volume_id(A)];
    // Entry, block of its payload, block of the volume; whether the newest state's leaf names it, and
    // whether a leaf that only the snapshot has does.
    let cases = [
        (0, 1, 1, (false, true)),
        (0, 0, 0, (true, true)),
        (1, 39, 1539, (true, false)),
        (3, 0, 1, (true, false)),
    ];
    let tags: Vec<u64> = cases.iter().map(|case| model.log[case.0].tag + (case.1 << 40)).collect();
    for ((_, _, block, named), tag) in cases.into_iter().zip(tags) {
        let mut world = lived_in();
        let sector = *sectors_of(&world, tag).last().expect("at home, behind the ring");
        assert!(sector >= DATA_START);
        world.disk.flip(sector, 12345);
        let mut told = (false, false);
        for problem in inspect(&mut world, Depth::Blocks).problems {
            let Problem::Block { volume, snapshot, block: at, lsn, device_block, why } = problem
            else {
                panic!("{problem:?}");
            };
            assert_eq!((volume, why.as_str()), (volume_id(A), "wrong checksum"));
            assert_eq!(u64::from(device_block), sector);
            if lsn.is_some() {
                continue; // an extent that the log retains as well
            }
            assert_eq!(at, Some(block));
            told = (told.0 || snapshot.is_none(), told.1 || snapshot.is_some());
        }
        assert_eq!(told, named, "block {block}");
    }
}

#[test]
fn a_flipped_bit_in_an_extent_that_only_the_log_names_is_named_with_its_entry() {
    let mut world = lived_in();
    world.append(volume_id(B), None, &[write(0, 1)]).expect("room"); // a mark above it (R1)
    world.settle();
    let tag = world.model[&volume_id(A)].log[4].tag + (31 << 40);
    let sector = sectors_of(&world, tag)[0];
    world.disk.flip(sector, 1);
    let found = inspect(&mut world, Depth::Blocks).problems;
    assert!(matches!(found[..], [Problem::Block { lsn: Some(5), block: None, .. }]), "{found:?}");
}

#[test]
fn a_copy_that_rotted_is_told_though_the_store_opens() {
    // Block 32 has the newest of the two checkpoints, 48 the one before.
    let slot = "checkpoint slot";
    for (block, what) in [(0, "superblock"), (16, "superblock"), (48, slot), (32, slot)] {
        let mut world = lived_in();
        world.disk.flip(block, 999);
        let found = inspect(&mut world, Depth::Blocks);
        let told = found.problems.iter().any(
            |one| matches!(one, Problem::Copy { what: name, block: at, .. } if *name == what && u64::from(*at) == block),
        );
        assert!(told, "{:?}", found.problems);
        assert_eq!(found.contents.is_some(), block != 32);
    }
}

#[test]
fn metadata_that_rotted_says_why_the_store_does_not_open() {
    for magic in [*b"TRT1", *b"TLF1"] {
        let mut world = lived_in();
        let at = (0..CAPACITY / 4096).rfind(|s| world.disk.sector(*s)[4..8] == magic);
        world.disk.flip(at.expect("there"), 800);
        let found = inspect(&mut world, Depth::Blocks).problems;
        assert!(matches!(&found[..], [Problem::Closed { why }] if why.contains("damaged")));
    }
}

#[test]
fn damage_of_the_log_below_a_mark_names_the_volume() {
    let mut world = lived_in();
    world.append(volume_id(B), None, &[write(0, 1)]).expect("room");
    world.settle();
    let records = (0..CAPACITY / 4096).filter(|s| world.disk.sector(*s)[4..8] == *b"TLG1");
    let records: Vec<u64> = records.collect();
    world.disk.flip(records[records.len() - 2], 50 * 8);
    let found = inspect(&mut world, Depth::Metadata).problems;
    assert!(found.contains(&Problem::Log { volume: volume_id(A) }), "{found:?}");
}
