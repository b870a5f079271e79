//! Every crash point of a short workload: between any two completions, with many subsets of what
//! was not flushed. After each the store opens, holds what was acknowledged, and counts right.

mod common;

use common::{World, evidence, id, volume_id};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tercet_proto::{BlockRange, EntryKind, InstanceId, SnapshotId};
use tercet_store::simdisk::SimDisk;

const CAPACITY: u64 = 16 << 20;
/// Up to so many unsettled sectors every subset of "durable or newest" is tried.
const ALL_SUBSETS_UP_TO: usize = 5;
const SAMPLES: u64 = 10;

fn write(start: u64, count: u32) -> EntryKind {
    EntryKind::Write { range: BlockRange { start, count }, payload_crc: 0 }
}

/// One step of a workload; nothing is waited for.
fn step(world: &mut World, number: u32) -> bool {
    let (a, b) = (volume_id(1), volume_id(2));
    match number {
        0 => world.create(a, 1500, None),
        1 | 6 | 9 | 13 | 15 | 19 | 23 => world.settle(),
        2 => drop(world.append(a, None, &[write(0, 2), write(5, 1)])),
        3 => drop(world.append(a, None, &[write(1020, 20), EntryKind::Noop])),
        4 => world.promise(a, 3),
        5 => drop(world.append(a, None, &[write(1, 1)])),
        7 => world.apply(a, 3),
        8 => {
            let _ = world.append(a, Some(4), &[write(3, 1), write(2, 17)]);
        }
        10 => world.apply(a, 10),
        11 => world.store.request_checkpoint(),
        12 => {
            let kind = EntryKind::Snapshot { id: SnapshotId::from_bytes(id(77)) };
            drop(world.append(a, None, &[kind, write(0, 3)]));
            assert!(world.create_early(volume_id(3), a), "S3: its snapshot is not applied yet");
        }
        14 => {
            world.apply(a, 10);
            world.create(b, 1, Some((a, 0)));
        }
        16 => {
            drop(world.append(b, None, &[write(0, 1), write(100, 16)]));
            drop(world.append(
                a,
                None,
                &[EntryKind::Zero { range: BlockRange { start: 0, count: 1100 }, discard: true }],
            ));
        }
        17 => world.tick(6000),
        18 => world.delete(a),
        20 => {
            world.apply(b, 5);
            world.store.request_checkpoint();
        }
        21 => {
            // Three records in flight at once, whose payloads have places of their own.
            let many: Vec<EntryKind> = (0..20).map(|at| write(300 + 7 * at, 1)).collect();
            drop(world.append(b, None, &many));
        }
        22 => {
            let after = world.model[&b].tail().lsn.0 - 6;
            let _ = world.append(b, Some(after), &[write(9, 2)]);
        }
        24 => {
            drop(world.append(b, None, &[write(7, 2), write(200, 18)]));
            world.settle();
        }
        _ => return false,
    }
    world.pump();
    true
}

/// What may be on the disk after a power cut now, opened and compared.
fn crash_here(world: &mut World, rng: &mut SmallRng, states: &mut u64) {
    let unsettled = world.disk.unsettled();
    let all = unsettled.len() <= ALL_SUBSETS_UP_TO;
    let count = if all { 1 << unsettled.len() } else { SAMPLES };
    for sample in 0..count {
        let mut index = 0;
        let image = world.disk.image_after(&mut |choice| {
            let bit = index;
            index += 1;
            match (all, sample) {
                (true, _) => (sample >> bit & 1) as usize * choice.versions,
                (false, 0) => 0,
                (false, 1) => choice.versions,
                _ => rng.random_range(0..=choice.versions),
            }
        });
        let mut after = world.fork(SimDisk::from_image(CAPACITY, &image));
        after.restart();
        after.assert_well(&format!("{} unsettled, sample {sample}", unsettled.len()));
        after.compare_all();
        after.assert_well(&format!("{} unsettled, sample {sample}, compared", unsettled.len()));
        *states += 1;
    }
}

fn enumerate(seed: u64, states: &mut u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut world = World::new(seed, CAPACITY, None);
    let mut number = 0;
    loop {
        // A few completions between steps, a crash at each gap.
        for _ in 0..rng.random_range(0..4) {
            crash_here(&mut world, &mut rng, states);
            world.complete_one();
        }
        if matches!(number, 1 | 6 | 9 | 13 | 15 | 19 | 23) {
            world.pump();
            while world.complete_one() {
                crash_here(&mut world, &mut rng, states);
            }
        }
        if !step(&mut world, number) {
            break;
        }
        number += 1;
    }
    world.settle();
    crash_here(&mut world, &mut rng, states);
    world.compare_all();
    world.assert_well("at the end");
}

#[test]
fn every_crash_point_of_short_workloads_is_recovered() {
    let started = std::time::Instant::now();
    let mut states = 0;
    let seeds: u64 = std::env::var("TERCET_SEEDS").map_or(4, |text| text.parse().expect("seeds"));
    for seed in 0..seeds {
        enumerate(seed, &mut states);
    }
    evidence("store_crash_states", states, 0, started);
}

/// Each operation fails once with EIO. A read is done again (C4); of all else the store says so,
/// refuses everything, and opens again.
#[test]
fn an_error_of_each_operation_but_a_read_poisons_the_store() {
    let started = std::time::Instant::now();
    let mut failing = 0;
    let (mut count, mut reads) = (0, 0);
    loop {
        let mut world = World::new(failing, CAPACITY, None);
        let first = world.disk.operations;
        let mut number = 0;
        while !world.failed && step_or_fail(&mut world, number, first + failing) {
            number += 1;
        }
        if world.disk.operations <= first + failing {
            break;
        }
        if world.failed {
            count += 1;
            world.expect_refusals(volume_id(1));
        } else {
            reads += 1;
            world.settle();
            world.compare_all();
            assert_eq!(world.bad, [], "a second try was enough");
        }
        world.disk.kill(&mut |_| true);
        world.restart();
        world.assert_well(&format!("operation {failing} failed"));
        failing += 1;
    }
    assert!(count > 30 && reads > 3, "{count} operations failed, and {reads} reads");
    evidence("store_failed_operations", count, 0, started);
}

/// A step in which the operation with this number fails.
fn step_or_fail(world: &mut World, number: u32, failing: u64) -> bool {
    if matches!(number, 1 | 6 | 9 | 13 | 15 | 19 | 23 | 24) {
        world.settle_failing(failing);
    }
    if world.failed {
        return true;
    }
    let more = step(world, number);
    if !world.failed {
        world.settle_failing(failing);
    }
    more
}

#[test]
fn the_instance_of_the_last_opening_is_known() {
    let mut world = World::new(1, CAPACITY, None);
    // As often as one asks, for it writes nothing; who asks is not the one who opened it.
    for _ in 0..2 {
        assert_eq!(world.last_instance(), Some(InstanceId::from_bytes(id(1))));
    }
    let report = world.restart();
    assert_eq!(report.previous_instance, Some(InstanceId::from_bytes(id(1))));
    assert_eq!(world.last_instance(), Some(InstanceId::from_bytes(id(2))));
    let report = world.restart();
    assert_eq!(report.previous_instance, Some(InstanceId::from_bytes(id(2))));
}

/// Rules broken on purpose: the enumeration notices each.
#[cfg(feature = "canary")]
mod canaries {
    use super::enumerate;
    use crate::common::assert_caught;
    use tercet_store::Canary;

    fn caught(canary: Canary) {
        assert_caught(canary, || enumerate(0, &mut 0));
    }

    #[test]
    fn canary_skipped_flushes_are_caught() {
        caught(Canary::SkipFlush);
    }

    #[test]
    fn canary_a_forgotten_drop_is_caught() {
        caught(Canary::ForgetDrop);
    }

    #[test]
    fn canary_an_empty_clone_is_caught() {
        caught(Canary::EmptyClone);
    }
}
