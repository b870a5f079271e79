//! What comes in together: how it is cut into records, where its payloads go, how often they are
//! written, and that nothing is told durable before all that lies before it.

mod common;

use common::{World, volume_id};
use tercet_proto::storage::Storage;
use tercet_proto::{BLOCK_BYTES, BlockRange, EntryKind, VolumeId};
use tercet_store::disk::{DiskOp, DiskToken};

const CAPACITY: u64 = 64 << 20;
const RING_BLOCKS: u32 = 1024;
/// First block of the ring (docs/disk-format.md).
const RING_FIRST_BLOCK: u64 = 64;
const SIZE_BLOCKS: u64 = 4096;

fn volume() -> VolumeId {
    volume_id(1)
}

fn world() -> World {
    let mut world = World::new(1, CAPACITY, Some(RING_BLOCKS));
    world.create(volume(), SIZE_BLOCKS, None);
    world.settle();
    world
}

/// Writes of one block each, at places that have nothing to do with each other.
fn scattered(count: u64, round: u64) -> Vec<EntryKind> {
    let start = |number: u64| (round * 977 + number * 389) % SIZE_BLOCKS;
    (0..count)
        .map(|number| EntryKind::Write {
            range: BlockRange { start: start(number), count: 1 },
            payload_crc: 0,
        })
        .collect()
}

type Writes = Vec<(DiskToken, usize)>;

/// Writes in flight: blocks of those to the ring, and of those to the data area.
fn in_flight(world: &World) -> (Writes, Writes) {
    let ring = RING_FIRST_BLOCK..RING_FIRST_BLOCK + u64::from(RING_BLOCKS);
    let writes = world.disk.in_flight().into_iter().filter_map(|token| {
        let Some(DiskOp::Write { offset, data, .. }) = world.disk.operation(token) else {
            return None;
        };
        let block = offset / BLOCK_BYTES as u64;
        Some((ring.contains(&block), (token, data.len() / BLOCK_BYTES)))
    });
    let (records, others): (Vec<_>, Vec<_>) = writes.partition(|(in_ring, _)| *in_ring);
    let plain = |all: Vec<(bool, _)>| all.into_iter().map(|(_, write)| write).collect();
    (plain(records), plain(others))
}

fn blocks(writes: &[(DiskToken, usize)]) -> Vec<usize> {
    writes.iter().map(|(_, blocks)| *blocks).collect()
}

/// Everything is durable and applied, and a checkpoint has given back what was given up.
fn all_done(world: &mut World, volume: VolumeId) {
    world.settle();
    world.apply(volume, 10_000);
    world.store.request_checkpoint();
    world.settle();
}

fn durable(world: &World) -> u64 {
    world.store.replica(volume()).expect("there").durable.lsn.0
}

#[test]
fn a_few_go_along_with_their_record_and_many_to_places_of_their_own() {
    let mut world = world();
    world.append(volume(), None, &scattered(1, 0)).expect("room");
    let (records, others) = in_flight(&world);
    assert_eq!((blocks(&records), blocks(&others)), (vec![2], vec![]), "one write for one");
    world.settle();
    world.append(volume(), None, &scattered(16, 1)).expect("room");
    let (records, others) = in_flight(&world);
    assert_eq!((blocks(&records), blocks(&others)), (vec![1, 1], vec![8, 8]));
    world.settle();
    world.apply(volume(), 100);
    world.compare_all();
    world.assert_well("at the end");
}

/// Rule W3: what completes first is told only with all that lies before it.
#[test]
fn of_two_records_in_flight_the_second_waits_for_the_first() {
    let mut world = world();
    world.append(volume(), None, &scattered(16, 0)).expect("room");
    let (records, others) = in_flight(&world);
    let before = durable(&world);
    for token in [records[1].0, others[1].0, records[0].0] {
        world.disk.complete(token);
        world.deliver();
        assert_eq!(durable(&world), before, "the first record lacks its payload");
    }
    world.disk.complete(others[0].0);
    world.deliver();
    assert_eq!(durable(&world), before + 16);
}

/// Where much is under way it goes out in halves: one is on its way while the other is made.
#[test]
fn what_comes_in_together_goes_out_as_two_records() {
    let mut world = world();
    for round in 0..4 {
        world.append(volume(), None, &scattered(32, round)).expect("room");
        let (records, _) = in_flight(&world);
        if round > 0 {
            assert_eq!(records.len(), 2, "round {round}");
        }
        world.settle();
    }
    world.append(volume(), None, &scattered(5, 9)).expect("room");
    assert_eq!(in_flight(&world).0.len(), 1, "a few are not cut up");
}

/// At depth 32 a payload is written once; with the headers and leaves of this small volume.
#[test]
fn many_small_writes_cost_their_bytes_once() {
    let mut world = world();
    let before = world.disk.written_bytes;
    let (rounds, depth) = (100, 32);
    for round in 0..rounds {
        world.append(volume(), None, &scattered(depth, round)).expect("room");
        world.settle();
        world.apply(volume(), depth);
    }
    world.store.request_checkpoint();
    world.settle();
    let payload = rounds * depth * BLOCK_BYTES as u64;
    let share = (world.disk.written_bytes - before) as f64 / payload as f64;
    assert!((1.0..1.25).contains(&share), "{share} bytes for each");
    world.restart();
    world.compare_all();
    world.assert_well("at the end");
}

/// Where only single blocks are free, a place of their own would be as many writes as payloads:
/// they go along with their record, and are copied later.
#[test]
fn where_free_blocks_are_scattered_payloads_stay_with_their_record() {
    let mut world = world();
    let size = CAPACITY / BLOCK_BYTES as u64;
    let other = volume_id(2);
    world.create(other, size, None);
    world.settle();
    // The device is filled, then every second block of it is given up.
    let mut start = 0;
    while world.write(other, start, 512).is_ok() {
        all_done(&mut world, other);
        start += 512;
    }
    for at in 0..start / 2 {
        let kind = EntryKind::Zero { range: BlockRange { start: 2 * at, count: 1 }, discard: true };
        if at % 256 == 0 || world.append(other, None, &[kind]).is_err() {
            all_done(&mut world, other);
            world.append(other, None, &[kind]).expect("room again");
        }
    }
    for _ in 0..3 {
        all_done(&mut world, other);
    }
    let (mut stayed, mut placed) = (0, 0);
    for round in 0..300 {
        if world.append(volume(), None, &scattered(8, round)).is_ok() {
            let (records, others) = in_flight(&world);
            stayed += usize::from(blocks(&records) == [9] && others.is_empty());
            placed += usize::from(blocks(&records) == [1] && !others.is_empty());
        }
        all_done(&mut world, volume());
    }
    assert!(stayed > 100, "{stayed} stayed, {placed} went to what was free in one piece");
    world.restart();
    world.compare_all();
    world.assert_well("at the end");
}
