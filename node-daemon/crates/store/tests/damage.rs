//! Damage on the device: what rule R1 tells from a power cut, and what each structure says of a
//! flipped bit.

mod common;

use common::{World, id, volume_id};
use tercet_proto::storage::{Incomplete, Storage, StorageError, StorageEvent};
use tercet_proto::{
    BlockRange, EntryKind, Epoch, InstanceId, Lsn, NodeName, Place, Token, VolumeId,
};
use tercet_store::simdisk::SimDisk;
use tercet_store::{FormatOptions, OpenError, Store};

const CAPACITY: u64 = 16 << 20;
const A: u64 = 1;
const B: u64 = 2;

fn write(start: u64, count: u32) -> EntryKind {
    EntryKind::Write { range: BlockRange { start, count }, payload_crc: 0 }
}

fn place(lsn: u64) -> Place {
    Place { epoch: Epoch(1), lsn: Lsn(lsn) }
}

/// Sectors whose magic number is this, in order.
fn find(disk: &SimDisk, magic: [u8; 4]) -> Vec<u64> {
    (0..CAPACITY / 4096).filter(|sector| disk.sector(*sector)[4..8] == magic).collect()
}

fn append_settled(world: &mut World, volume: VolumeId, kinds: &[EntryKind]) {
    world.append(volume, None, kinds).expect("room");
    world.settle();
}

/// Two volumes; records: make A, make B, A1, B1, A2, B2, each durable before the next.
fn two_volumes() -> World {
    let mut world = World::new(1, CAPACITY, None);
    for volume in [A, B] {
        world.create(volume_id(volume), 3000, None);
        world.settle();
    }
    for start in [0, 10] {
        for volume in [A, B] {
            append_settled(&mut world, volume_id(volume), &[write(start, 1)]);
        }
    }
    world
}

fn reopen(world: &mut World) -> Result<Store, OpenError> {
    let instance = InstanceId::from_bytes(id(9));
    Store::open(&mut world.disk, world.options.clone(), instance).map(|(store, _)| store)
}

fn incomplete(store: &Store, volume: u64) -> Option<Incomplete> {
    store.replica(volume_id(volume)).expect("there").incomplete
}

fn tail(store: &Store, volume: u64) -> u64 {
    store.replica(volume_id(volume)).expect("there").tail.lsn.0
}

#[test]
fn a_bad_last_record_ends_the_log() {
    for bit in [9 * 8, 200 * 8] {
        let mut world = two_volumes();
        let records = find(&world.disk, *b"TLG1");
        world.disk.flip(*records.last().expect("records"), bit);
        let store = reopen(&mut world).expect("opens");
        assert_eq!((tail(&store, A), tail(&store, B)), (2, 1));
        assert_eq!((incomplete(&store, A), incomplete(&store, B)), (None, None));
    }
}

#[test]
fn a_bad_header_below_a_mark_makes_the_volume_that_its_successor_names_incomplete() {
    let mut world = two_volumes();
    let records = find(&world.disk, *b"TLG1");
    assert_eq!(records.len(), 6);
    world.disk.flip(records[2], 50 * 8);
    let mut store = reopen(&mut world).expect("opens");
    assert_eq!((tail(&store, A), tail(&store, B)), (0, 2));
    let expected = Some(Incomplete::AcknowledgedUpTo(place(2)));
    assert_eq!((incomplete(&store, A), incomplete(&store, B)), (expected, None));
    // It is written down: the next start finds it in the log, damaged or not.
    let (mut ops, mut events) = (Vec::new(), Vec::new());
    store.take(&mut ops, &mut events);
    assert!(!ops.is_empty());
    drop(ops);
    let again = reopen(&mut world).expect("opens again");
    assert_eq!((incomplete(&again, A), incomplete(&again, B)), (expected, None));
}

#[test]
fn a_bad_payload_below_a_mark_makes_its_volume_incomplete() {
    let mut world = two_volumes();
    let records = find(&world.disk, *b"TLG1");
    world.disk.flip(records[3] + 1, 77);
    let store = reopen(&mut world).expect("opens");
    assert_eq!((tail(&store, A), tail(&store, B)), (2, 0));
    let expected = Some(Incomplete::AcknowledgedUpTo(place(2)));
    assert_eq!((incomplete(&store, A), incomplete(&store, B)), (None, expected));
}

#[test]
fn damage_that_nobody_names_makes_every_volume_incomplete_and_unknown() {
    let mut world = two_volumes();
    let records = find(&world.disk, *b"TLG1");
    world.disk.flip(records[2], 50 * 8);
    world.disk.flip(records[3], 50 * 8);
    let store = reopen(&mut world).expect("opens");
    let unknown = Some(Incomplete::Unknown);
    assert_eq!((incomplete(&store, A), incomplete(&store, B)), (unknown, unknown));
}

#[test]
fn a_mark_alone_turns_the_last_entry_into_one_that_cannot_vanish() {
    let mut world = two_volumes();
    world.tick(1);
    world.tick(60);
    world.settle();
    let records = find(&world.disk, *b"TLG1");
    assert_eq!(records.len(), 7, "the mark's record followed");
    world.disk.flip(records[5], 50 * 8);
    let store = reopen(&mut world).expect("opens");
    let expected = Some(Incomplete::AcknowledgedUpTo(place(2)));
    assert_eq!((incomplete(&store, A), incomplete(&store, B)), (None, expected));
}

#[test]
fn what_a_start_found_without_a_mark_gets_one() {
    let mut world = two_volumes();
    world.restart();
    world.tick(1);
    world.tick(60);
    world.settle();
    let records = find(&world.disk, *b"TLG1");
    assert_eq!(records.len(), 7, "the mark's record followed");
    world.disk.flip(records[5], 50 * 8);
    let store = reopen(&mut world).expect("opens");
    let expected = Some(Incomplete::AcknowledgedUpTo(place(2)));
    assert_eq!((incomplete(&store, A), incomplete(&store, B)), (None, expected));
}

#[test]
fn a_record_left_behind_by_a_torn_tail_is_not_where_the_log_goes_on_after_damage() {
    let mut world = two_volumes();
    let torn = find(&world.disk, *b"TLG1").last().expect("records") + 2;
    for start in [20, 30, 40] {
        world.append(volume_id(A), None, &[write(start, 1)]).expect("room");
    }
    assert_eq!(world.disk.in_flight().len(), 3, "three records at once");
    let lost = |sector| (torn..torn + 2).contains(&sector);
    world.disk.power_cut(&mut |choice| if lost(choice.sector) { 0 } else { choice.versions });
    world.restart();
    append_settled(&mut world, volume_id(B), &[write(20, 1)]);
    world.tick(1);
    world.tick(60);
    world.settle();
    let records = find(&world.disk, *b"TLG1");
    assert_eq!(records.len(), 9, "six, the new one, its mark, and one left behind");
    world.disk.flip(records[2], 50 * 8);
    let store = reopen(&mut world).expect("opens");
    let expected = Some(Incomplete::AcknowledgedUpTo(place(2)));
    assert_eq!((incomplete(&store, A), incomplete(&store, B)), (expected, None));
    assert_eq!(tail(&store, B), 3);
}

#[test]
fn a_lost_deletion_before_the_volume_was_made_again_leaves_a_store_that_opens() {
    let mut world = two_volumes();
    world.delete(volume_id(A));
    world.settle();
    world.create(volume_id(A), 3000, None);
    world.settle();
    append_settled(&mut world, volume_id(A), &[write(0, 1)]);
    append_settled(&mut world, volume_id(A), &[write(1, 1)]);
    let records = find(&world.disk, *b"TLG1");
    world.disk.flip(records[6], 50 * 8);
    let store = reopen(&mut world).expect("opens");
    assert_eq!((tail(&store, A), tail(&store, B)), (2, 2));
    let wrong = store.check(&mut |run| common::read_run(&world.disk, run));
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn an_extent_that_does_not_read_back_ends_the_log_unless_a_mark_is_above() {
    for marked in [false, true] {
        let mut world = two_volumes();
        append_settled(&mut world, volume_id(A), &[write(100, 32)]);
        if marked {
            append_settled(&mut world, volume_id(B), &[write(0, 1)]);
        }
        let tag = world.model[&volume_id(A)].log[2].tag;
        let wanted = common::block_bytes(tag + (3 << 40));
        let sector = (0..CAPACITY / 4096)
            .find(|sector| world.disk.sector(*sector)[..] == wanted[..])
            .expect("the extent");
        world.disk.flip(sector, 5);
        let store = reopen(&mut world).expect("opens");
        assert_eq!(tail(&store, A), if marked { 3 } else { 2 });
        assert_eq!(incomplete(&store, A), None);
    }
}

#[test]
fn a_flipped_bit_in_data_is_noticed_by_the_read() {
    for large in [false, true] {
        let mut world = two_volumes();
        let count = if large { 20 } else { 3 };
        append_settled(&mut world, volume_id(A), &[write(500, count)]);
        world.apply(volume_id(A), 10);
        world.store.request_checkpoint();
        world.settle();
        let tag = world.model[&volume_id(A)].log[2].tag;
        let wanted = common::block_bytes(tag + (2 << 40));
        for sector in 0..CAPACITY / 4096 {
            if world.disk.sector(sector)[..] == wanted[..] {
                world.disk.flip(sector, 4000);
            }
        }
        let range = BlockRange { start: 500, count };
        world.store.read(volume_id(A), range, Token(5));
        let (mut ops, mut events) = (Vec::new(), Vec::new());
        world.store.take(&mut ops, &mut events);
        for (token, op) in ops {
            tercet_store::disk::Disk::submit(&mut world.disk, token, op);
            world.disk.complete(token);
        }
        let mut done = Vec::new();
        tercet_store::disk::Disk::poll(&mut world.disk, &mut done);
        for one in done {
            world.store.on_disk(one, world.now);
        }
        world.store.take(&mut Vec::new(), &mut events);
        let expected = StorageError::Checksum { volume: volume_id(A), block: 502 };
        let found = events.iter().any(|event| {
            matches!(event, StorageEvent::Read { result: Err(error), .. } if *error == expected)
        });
        assert!(found, "{events:?}");
    }
}

/// A store with a checkpoint that has leaves, confirmed, and something in the log behind it.
fn checkpointed() -> World {
    let mut world = two_volumes();
    world.apply(volume_id(A), 2);
    world.store.request_checkpoint();
    world.settle();
    append_settled(&mut world, volume_id(A), &[write(20, 1)]);
    world
}

#[test]
fn flipped_bits_in_metadata_are_errors_that_say_what_to_do() {
    let world = checkpointed();
    for magic in [*b"TRT1", *b"TLF1", *b"TCK1"] {
        let newest = *find(&world.disk, magic).last().expect("there");
        let newest = if magic == *b"TCK1" { 32 } else { newest };
        for bit in [0, 13 * 8, 60 * 8, 4090 * 8] {
            let mut world = checkpointed();
            world.disk.flip(newest, bit);
            let error = reopen(&mut world).expect_err("noticed");
            assert!(matches!(error, OpenError::Damaged(_)), "{error}");
            assert!(error.to_string().contains("replace the device"), "{error}");
        }
    }
}

#[test]
fn one_superblock_is_enough() {
    for block in [0, 16] {
        let mut world = two_volumes();
        world.disk.flip(block, 300);
        let store = reopen(&mut world).expect("opens");
        assert_eq!((tail(&store, A), tail(&store, B)), (2, 2));
    }
    let mut world = two_volumes();
    world.disk.flip(0, 300);
    world.disk.flip(16, 300);
    let error = reopen(&mut world).expect_err("neither is valid");
    assert!(matches!(error, OpenError::Superblock(_)), "{error}");
}

#[test]
fn bad_devices_are_refused_by_name() {
    let options = common::options();
    let format = common::format_options();
    let mut small = SimDisk::new(4 << 20);
    let error = Store::format(&mut small, &format, &options).expect_err("too small");
    assert!(matches!(error, OpenError::Capacity { capacity_bytes: 4_194_304, .. }), "{error}");
    let mut empty = SimDisk::new(CAPACITY);
    let instance = InstanceId::from_bytes(id(1));
    let error = Store::open(&mut empty, options.clone(), instance).expect_err("not formatted");
    assert!(matches!(error, OpenError::Superblock(_)), "{error}");
    let mut world = two_volumes();
    let error = Store::format(&mut world.disk, &format, &world.options).expect_err("in use");
    assert_eq!(error, OpenError::Formatted(NodeName::new("node-a")));
    let over = FormatOptions { overwrite: true, ..format };
    Store::format(&mut world.disk, &over, &world.options).expect("told to");
    assert!(reopen(&mut world).expect("opens").replicas().is_empty());
    let expect = Some((uuid::Uuid::nil(), NodeName::new("node-b"), 0));
    world.options.expect = expect;
    let error = reopen(&mut world).expect_err("another's");
    assert!(matches!(error, OpenError::WrongStore { .. }), "{error}");
}

#[cfg(feature = "canary")]
#[test]
fn canary_damage_taken_for_a_torn_tail_is_caught() {
    common::assert_caught(
        tercet_store::Canary::TornTailForDamage,
        a_bad_header_below_a_mark_makes_the_volume_that_its_successor_names_incomplete,
    );
}
