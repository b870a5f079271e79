//! Random work against the model: appends with and without drops, applies, reads, snapshots,
//! clones, discards, deletions, checkpoints, kills and power cuts at any moment.

mod common;

use common::{World, evidence, id, volume_id};
use rand::Rng;
use tercet_proto::storage::{Storage, StorageError};
use tercet_proto::{BlockRange, EntryKind, SnapshotId, VolumeId};

const SIZE_BLOCKS: u64 = 2500;

fn some_volume(world: &mut World) -> Option<VolumeId> {
    let all: Vec<VolumeId> = world
        .model
        .keys()
        .filter(|volume| world.deleting.values().all(|other| other != *volume))
        .filter(|volume| world.model[*volume].awaits.is_none())
        .copied()
        .collect();
    (!all.is_empty()).then(|| all[world.rng.random_range(0..all.len())])
}

fn some_range(world: &mut World, size: u64, count_max: u32) -> BlockRange {
    let count = world.rng.random_range(1..=count_max.min(size as u32));
    // A hot area half of the time, so that blocks are written again.
    let last = size - u64::from(count);
    let last = if world.rng.random_bool(0.5) { last.min(64) } else { last };
    BlockRange { start: world.rng.random_range(0..=last), count }
}

fn some_kind(world: &mut World, volume: VolumeId) -> EntryKind {
    let size = world.model[&volume].size_at_tail();
    match world.rng.random_range(0..100) {
        0..60 => EntryKind::Write { range: some_range(world, size, 4), payload_crc: 0 },
        60..75 => {
            let range = some_range(world, size, 40);
            EntryKind::Write { range, payload_crc: 0 }
        }
        75..83 => EntryKind::Zero { range: some_range(world, size, 1500), discard: true },
        83..86 => EntryKind::Noop,
        86..88 => EntryKind::Grow { size_blocks: size + world.rng.random_range(0..200) },
        88..96 if world.model[&volume].snapshots.len() < 3 => {
            EntryKind::Snapshot { id: SnapshotId::from_bytes(id(world.fresh())) }
        }
        _ => {
            let snapshots = &world.model[&volume].snapshots;
            let id = snapshots.first().map_or(SnapshotId::from_bytes(id(1)), |snap| snap.id);
            EntryKind::SnapshotDelete { id }
        }
    }
}

fn work(world: &mut World, refused: &mut u64) {
    let Some(volume) = some_volume(world) else {
        let volume = volume_id(world.rng.random_range(1..5));
        return world.create(volume, SIZE_BLOCKS, None);
    };
    match world.rng.random_range(0..100) {
        0..40 => {
            let count = world.rng.random_range(1..4);
            let kinds: Vec<EntryKind> = (0..count).map(|_| some_kind(world, volume)).collect();
            match world.append(volume, None, &kinds) {
                Ok(()) => {}
                Err(StorageError::Busy | StorageError::NoSpace { .. }) => *refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
        40..43 => {
            let model = &world.model[&volume];
            let after = world.rng.random_range(model.applied..=model.tail().lsn.0);
            // Growth that is dropped must not be written into.
            let _ = world.append(volume, Some(after), &[EntryKind::Noop]);
        }
        43..63 => {
            let count = world.rng.random_range(1..8);
            world.apply(volume, count);
        }
        63..73 => {
            let size = world.model[&volume].size;
            let range = some_range(world, size, 60);
            world.read(volume, range.start, range.count);
        }
        73..76 => {
            let state = world.store.replica(volume).expect("there");
            if state.log_start <= state.tail.lsn {
                let from = world.rng.random_range(state.log_start.0..=state.tail.lsn.0);
                world.read_log(volume, from);
            }
        }
        76..78 => {
            let epoch = world.model[&volume].promise_asked + 1;
            world.promise(volume, epoch);
        }
        78..80 => {
            let new = volume_id(world.rng.random_range(1..5));
            let free = !world.model.contains_key(&new)
                && world.making.values().all(|(other, _)| *other != new);
            if free && world.create_early(new, volume) {
                // A clone before its snapshot is applied (S3).
            } else if free && !world.model[&volume].snapshots.is_empty() {
                world.create(new, 1, Some((volume, 0)));
            } else if free {
                world.create(new, SIZE_BLOCKS, None);
            }
        }
        80 => world.delete(volume),
        81 if world.model.values().any(|model| model.awaits.is_some()) => {
            let mut all = world.model.iter();
            let clone = all.find(|(_, model)| model.awaits.is_some()).map(|(clone, _)| *clone);
            let clone = clone.expect("looked at");
            if world.deleting.values().all(|other| *other != clone) {
                world.delete(clone);
            }
        }
        81..83 => world.store.request_checkpoint(),
        83..86 => world.tick(60),
        _ => {
            for _ in 0..world.rng.random_range(1..10) {
                world.complete_one();
            }
        }
    }
}

fn power_cut(world: &mut World) {
    let mode = world.rng.random_range(0..4);
    let rng = &mut world.rng;
    if mode == 3 {
        world.disk.kill(&mut |_| rng.random_bool(0.5));
    } else {
        world.disk.power_cut(&mut |choice| match mode {
            0 => 0,
            1 => choice.versions,
            _ => rng.random_range(0..=choice.versions),
        });
    }
}

fn run(seed: u64, rounds: u32, steps: u32) -> (u64, u64, World) {
    let mut world = World::new(seed, 48 << 20, Some(1024));
    let (mut refused, mut done) = (0, 0);
    for round in 0..rounds {
        for _ in 0..steps {
            work(&mut world, &mut refused);
            done += 1;
        }
        world.assert_well(&format!("seed {seed}, round {round}, at work"));
        if world.rng.random_bool(0.3) {
            world.settle();
            let wrong = world.check();
            assert!(wrong.is_empty(), "seed {seed}, round {round}: {wrong:#?}");
        }
        power_cut(&mut world);
        world.restart();
        world.assert_well(&format!("seed {seed}, round {round}, after the restart"));
        if world.rng.random_bool(0.3) {
            world.compare_all();
            world.assert_well(&format!("seed {seed}, round {round}, compared"));
        }
    }
    world.compare_all();
    world.assert_well(&format!("seed {seed}, at the end"));
    (done, refused, world)
}

#[test]
fn random_work_agrees_with_the_model() {
    let started = std::time::Instant::now();
    let seeds: u64 = std::env::var("TERCET_SEEDS").map_or(24, |text| text.parse().expect("seeds"));
    let (mut operations, mut reads, mut refused) = (0, 0, 0);
    for seed in 0..seeds {
        let (done, turned_away, world) = run(seed, 12, 400);
        operations += done;
        refused += turned_away;
        reads += world.reads_checked;
    }
    println!("{operations} operations, {reads} reads compared, {refused} refused");
    evidence("store_model_operations", operations, 0, started);
}

/// Rules broken on purpose: random work notices each.
#[cfg(feature = "canary")]
mod canaries {
    use super::run;
    use crate::common::assert_caught;
    use tercet_store::Canary;

    fn caught(canary: Canary) {
        assert_caught(canary, || {
            for seed in 0..8 {
                run(seed, 12, 400);
            }
        });
    }

    #[test]
    fn canary_a_skipped_release_is_caught() {
        caught(Canary::ForgetRelease);
    }

    #[test]
    fn canary_a_forgotten_dead_leaf_is_caught() {
        caught(Canary::ForgetDeadLeaf);
    }

    #[test]
    fn canary_a_lost_block_of_a_patch_is_caught() {
        caught(Canary::LosePatch);
    }

    #[test]
    fn canary_a_leaf_read_before_it_is_written_is_caught() {
        caught(Canary::ReadUnwrittenLeaf);
    }

    #[test]
    fn canary_space_that_is_used_again_early_is_caught() {
        caught(Canary::ReuseFreedEarly);
    }
}
