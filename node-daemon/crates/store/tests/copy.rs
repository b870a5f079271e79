//! Copies by stamps (rules C2, C3) between two stores: random histories, crashes at every step, what
//! is shared, what a view costs.

mod common;

use common::copying::{
    Copying, Frozen, adopt, assert_is_view, follow, freeze, mark_incomplete, part_stamps,
};
use common::{World, evidence, id, volume_id};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tercet_proto::storage::{Incomplete, Source, Storage};
use tercet_proto::{BlockRange, Copies, EntryKind, Lsn, SnapshotId, Stamps, Token, VolumeId};
use tercet_store::simdisk::SimDisk;

const CAPACITY: u64 = 48 << 20;
const SIZE_BLOCKS: u64 = 2500;

fn volume() -> VolumeId {
    volume_id(1)
}

fn write(start: u64, count: u32) -> EntryKind {
    EntryKind::Write { range: BlockRange { start, count }, payload_crc: 0 }
}

fn zero(start: u64, count: u32) -> EntryKind {
    EntryKind::Zero { range: BlockRange { start, count }, discard: true }
}

fn snapshot(number: u64) -> EntryKind {
    EntryKind::Snapshot { id: SnapshotId::from_bytes(id(number)) }
}

fn do_all(world: &mut World, kinds: &[EntryKind]) {
    for kind in kinds {
        world.append(volume(), None, &[*kind]).expect("room");
        world.settle();
    }
    world.apply(volume(), u64::MAX / 2);
    world.settle();
}

fn pair(seed: u64) -> (World, World) {
    let mut source = World::new(seed, CAPACITY, Some(1024));
    let mut target = World::new(seed + 1000, CAPACITY, Some(1024));
    for world in [&mut source, &mut target] {
        world.create(volume(), SIZE_BLOCKS, None);
        world.settle();
    }
    (source, target)
}

fn copy_to(source: &mut World, target: &mut World, frozen: &Frozen) -> (u64, u64) {
    let (meanwhile, hook) = (&mut |_: &mut World| {}, &mut |_: &mut World| {});
    let mut copying = Copying { source, target, volume: volume(), meanwhile, hook };
    let passed = copying.whole(frozen);
    (passed.data_blocks, passed.hole_blocks)
}

/// A target that has applied the first entries of the source, or lacks them all.
fn catch_up_to(source: &World, target: &mut World, lsn: u64) {
    let from = target.model[&volume()].tail().lsn.0;
    let entries = source.model[&volume()].log[from as usize..lsn as usize].to_vec();
    follow(target, volume(), &entries);
    target.apply(volume(), u64::MAX / 2);
}

fn some_kind(world: &mut World) -> EntryKind {
    let size = world.model[&volume()].size_at_tail();
    let range = |world: &mut World, most: u32| {
        let count = world.rng.random_range(1..=most);
        let last = size - u64::from(count);
        let last = if world.rng.random_bool(0.5) { last.min(64) } else { last };
        BlockRange { start: world.rng.random_range(0..=last), count }
    };
    match world.rng.random_range(0..100) {
        0..55 => EntryKind::Write { range: range(world, 4), payload_crc: 0 },
        55..70 => EntryKind::Write { range: range(world, 40), payload_crc: 0 },
        70..84 => EntryKind::Zero { range: range(world, 1500), discard: true },
        84..88 => EntryKind::Grow { size_blocks: size + world.rng.random_range(0..300) },
        88..95 if world.model[&volume()].snapshots.len() < 4 => snapshot(world.fresh()),
        _ => {
            let all = &world.model[&volume()].snapshots;
            let index = world.rng.random_range(0..all.len().max(1));
            let id = all.get(index).map_or(SnapshotId::from_bytes(id(1)), |found| found.id);
            EntryKind::SnapshotDelete { id }
        }
    }
}

/// Some of a primary's work.
fn work(world: &mut World, steps: u32) {
    for _ in 0..steps {
        match world.rng.random_range(0..10) {
            0..6 => {
                let kind = some_kind(world);
                if world.append(volume(), None, &[kind]).is_err() {
                    world.store.request_checkpoint();
                    world.settle();
                }
            }
            6..8 => {
                let count = world.rng.random_range(1..8);
                world.apply(volume(), count);
            }
            8 => drop(world.complete_one()),
            _ => world.store.request_checkpoint(),
        }
    }
    world.settle();
    world.apply(volume(), 5);
}

fn no_doubt(world: &World, what: &str) {
    let wrong = world.check();
    assert!(wrong.is_empty(), "{what}: {wrong:#?}");
}

/// What a checkpoint leaves held: the log's extents are given up with it.
fn held_bytes(world: &mut World) -> u64 {
    for _ in 0..3 {
        world.tick(20_000);
        world.settle();
        world.store.request_checkpoint();
        world.settle();
    }
    world.store.usage().allocated_bytes
}

/// The stamps of a part are the same at both.
fn assert_same_parts(source: &mut World, target: &mut World, frozen: &Frozen, what: &str) {
    let theirs = target.store.freeze(volume()).expect("complete");
    for part in 0..=frozen.view.snapshots.len() {
        let same =
            part_stamps(source, frozen.view.id, part) == part_stamps(target, theirs.id, part);
        assert!(same, "{what}: part {part} has other stamps");
    }
    target.store.thaw(theirs.id);
}

fn sums(world: &mut World) -> Vec<u8> {
    let token = Token(world.fresh());
    world.store.chunk_sums(volume(), token);
    world.settle();
    let rows = world.other_reads.remove(&token).expect("answered").expect("read");
    rows.concat()
}

fn random_copy(seed: u64) -> u64 {
    let (mut source, mut target) = pair(seed);
    work(&mut source, 200);
    let applied = source.model[&volume()].applied;
    let prefix = if source.rng.random_bool(0.3) { 0 } else { source.rng.random_range(0..=applied) };
    catch_up_to(&source, &mut target, prefix);
    let behind = source.rng.random_range(prefix..=applied);
    let entries = source.model[&volume()].log[prefix as usize..behind as usize].to_vec();
    follow(&mut target, volume(), &entries); // durable there, never applied
    work(&mut source, 60);
    let mut frozen = freeze(&mut source, volume());
    let what = format!("seed {seed}");
    mark_incomplete(&mut target, volume());
    let mut copied = 0;
    for pass in 0..3 {
        let busy = &mut |world: &mut World| work(world, 6);
        let hook = &mut |world: &mut World| no_doubt(world, "on the way");
        let (source, target) = (&mut source, &mut target);
        let mut copying = Copying { source, target, volume: volume(), meanwhile: busy, hook };
        let passed = copying.pass(&frozen.view);
        copying.settle();
        copied += passed.data_blocks;
        if pass == 2 {
            copying.finish(&frozen);
            break;
        }
        copying.source.store.thaw(frozen.view.id);
        work(copying.source, 20);
        let next = freeze(copying.source, volume());
        let (from, to) = (frozen.view.place.lsn.0, next.view.place.lsn.0);
        if pass == 1 {
            assert_little(copying, &next, (from, to), &what);
        }
        frozen = next;
    }
    no_doubt(&source, &what);
    assert_is_view(&mut target, volume(), &frozen, &what);
    assert_same_parts(&mut source, &mut target, &frozen, &what);
    // The target's log is empty now, so what it holds is what its maps do; the source still holds the
    // view, beside all else.
    let (theirs, ours) = (held_bytes(&mut source), held_bytes(&mut target));
    assert!(ours <= theirs + (64 << 10), "{what}: {ours} bytes, {theirs} at the source");
    source.store.thaw(frozen.view.id);
    follow_on(&mut source, &mut target, &what);
    copied
}

/// A pass over a target that was settled at the view before copies what was written since.
fn assert_little(mut copying: Copying<'_>, next: &Frozen, (from, to): (u64, u64), what: &str) {
    let since = &next.model.log[from as usize..to as usize];
    let blocks = |kind: &EntryKind| match kind {
        EntryKind::Write { range, .. } => (u64::from(range.count), 0),
        EntryKind::Zero { range, .. } => (0, u64::from(range.count)),
        _ => (0, 0),
    };
    let (mut data, mut holes) = (0, 0);
    for entry in since {
        let more = blocks(&entry.header.kind);
        data += more.0;
        holes += more.1;
    }
    let passed = copying.pass(&next.view);
    assert!(passed.data_blocks <= data, "{what}: {passed:?}, written {data}");
    assert!(passed.hole_blocks <= holes, "{what}: {passed:?}, zeroed {holes}");
}

/// The log goes on from the view, over a restart of the target.
fn follow_on(source: &mut World, target: &mut World, what: &str) {
    work(source, 40);
    source.apply(volume(), u64::MAX / 2);
    let applied = source.model[&volume()].applied;
    catch_up_to(source, target, applied);
    let all = freeze(source, volume());
    for round in 0..2 {
        let state = target.store.replica(volume()).expect("there");
        assert_eq!(state.applied, all.view.place, "{what}");
        assert_is_view(target, volume(), &all, &format!("{what}, followed, round {round}"));
        assert_same_parts(source, target, &all, what);
        assert!(sums(source) == sums(target), "{what}: other sums");
        target.disk.power_cut(&mut |choice| choice.versions);
        target.restart();
        target.settle();
        target.assert_well(&format!("{what}, after a restart"));
    }
    source.store.thaw(all.view.id);
    // Nothing is left of the passes. Bytes differ by the extents that either log still has.
    held_bytes(source);
    held_bytes(target);
    let leaves = |world: &World| world.store.usage().leaves;
    assert_eq!(leaves(target), leaves(source), "{what}: maps share what they share there");
    no_doubt(source, what);
    no_doubt(target, what);
}

#[test]
fn a_target_of_any_history_becomes_the_view() {
    let started = std::time::Instant::now();
    let seeds: u64 = std::env::var("TERCET_SEEDS").map_or(30, |text| text.parse().expect("seeds"));
    let copied: u64 = (0..seeds).map(random_copy).sum();
    println!("{copied} blocks copied");
    evidence("store_copies", seeds, 0, started);
}

/// Holes have stamps of their own, and they differ in either direction: data where the source has a
/// hole, a hole where it has data, and holes of other entries, some of them never written there.
#[test]
fn holes_differ_in_either_direction() {
    let (mut source, mut target) = pair(7);
    do_all(&mut target, &[write(0, 20), zero(4, 8), write(1100, 5), zero(2048, 400), zero(30, 10)]);
    source.append(volume(), None, &[EntryKind::Noop]).expect("room");
    source.append(volume(), Some(0), &[EntryKind::Noop]).expect("room"); // another epoch
    do_all(&mut source, &[write(4, 4), zero(0, 2), zero(1024, 1024), zero(33, 30), write(2100, 3)]);
    let frozen = freeze(&mut source, volume());
    mark_incomplete(&mut target, volume());
    let (data, holes) = copy_to(&mut source, &mut target, &frozen);
    // Data: 4..8 and 2100..2103. Holes: what else either of them has touched.
    assert_eq!(data, 7);
    assert_eq!(holes, 4 + 12 + 1024 + 397 + 33, "every hole whose stamp differs");
    assert_is_view(&mut target, volume(), &frozen, "holes");
}

/// What snapshots share at the source they share at the target.
#[test]
fn what_is_shared_stays_shared() {
    let (mut source, mut target) = pair(3);
    let mut kinds = vec![write(0, 1000), write(1000, 1000)];
    for number in 0..8 {
        kinds.extend([snapshot(100 + number), write(number * 90, 10)]);
    }
    do_all(&mut source, &kinds);
    let frozen = freeze(&mut source, volume());
    assert_eq!(frozen.view.snapshots.len(), 8);
    mark_incomplete(&mut target, volume());
    assert_eq!(copy_to(&mut source, &mut target, &frozen).0, 2080, "each block once");
    assert_is_view(&mut target, volume(), &frozen, "shared");
    let blocks = held_bytes(&mut target) / 4096;
    assert!((2080..2080 + 120).contains(&blocks), "{blocks} blocks held");
}

/// A view costs nothing once it is given up, whatever came between, at any moment of a checkpoint.
#[test]
fn a_view_gives_everything_back() {
    let bytes = [0, 1, 2, 3].map(|mode: u32| {
        let (mut source, _) = pair(5);
        do_all(&mut source, &[write(0, 600), snapshot(9), zero(50, 20), write(1500, 300)]);
        let view = (mode > 0).then(|| source.store.freeze(volume()).expect("complete"));
        let delete = EntryKind::SnapshotDelete { id: SnapshotId::from_bytes(id(9)) };
        do_all(&mut source, &[write(0, 600), delete, write(1500, 300), write(7, 3)]);
        if let Some(view) = view {
            if mode == 2 {
                source.store.request_checkpoint();
                source.pump();
                source.complete_one(); // in the midst of it
            }
            no_doubt(&source, "frozen");
            if mode < 3 {
                source.store.thaw(view.id);
                source.store.thaw(view.id); // twice is once
            } else {
                source.disk.power_cut(&mut |choice| choice.versions);
                source.restart();
                let gone = source.store.view_stamps(view.id, 0, 0, Token(1));
                assert_eq!(gone, Stamps::Gone, "a restart ends views");
            }
            no_doubt(&source, "given up");
        }
        source.compare_all();
        source.assert_well("given up");
        let bytes = held_bytes(&mut source);
        (bytes, source.store.usage().leaves)
    });
    assert!(bytes.iter().all(|all| *all == bytes[0]), "{bytes:?}");
}

/// Leaves that only a view holds are written by the next checkpoint: they do not count as changed for
/// as long as it is kept, or all the room that is kept back for them would be.
#[test]
fn what_only_a_view_holds_is_written_once() {
    let mut source = World::new(21, CAPACITY, Some(1024));
    source.create(volume(), 100 * 1024, None);
    source.settle();
    for chunk in 0..80 {
        source.append(volume(), None, &[write(chunk * 1024, 1)]).expect("room");
        source.settle();
    }
    source.append(volume(), None, &[zero(0, 100 * 1024)]).expect("room");
    source.settle();
    // No checkpoint comes between: what the view has was never written.
    source.store.apply(volume(), Lsn(80));
    let view = source.store.freeze(volume()).expect("complete");
    source.store.apply(volume(), Lsn(81));
    source.apply(volume(), u64::MAX / 2);
    held_bytes(&mut source);
    let kept = source.store.usage().reserved_bytes;
    source.store.thaw(view.id);
    held_bytes(&mut source);
    assert_eq!(kept, source.store.usage().reserved_bytes);
    no_doubt(&source, "given up");
}

/// A target that is larger than the view: what is behind the new end was never written, as it shows
/// when the volume grows again.
#[test]
fn a_target_that_is_larger_forgets_what_is_behind_the_end() {
    let (mut source, mut target) = pair(23);
    let grow = EntryKind::Grow { size_blocks: 3500 };
    do_all(&mut target, &[grow, write(2490, 30), zero(2540, 4), write(3400, 5)]);
    source.append(volume(), None, &[EntryKind::Noop]).expect("room");
    source.append(volume(), Some(0), &[EntryKind::Noop]).expect("room"); // another epoch
    do_all(&mut source, &[write(2495, 2)]);
    let frozen = freeze(&mut source, volume());
    mark_incomplete(&mut target, volume());
    copy_to(&mut source, &mut target, &frozen);
    assert_is_view(&mut target, volume(), &frozen, "smaller");
    do_all(&mut source, &[grow]);
    let applied = source.model[&volume()].applied;
    catch_up_to(&source, &mut target, applied);
    let frozen = freeze(&mut source, volume());
    assert_is_view(&mut target, volume(), &frozen, "grown again");
}

/// A clone that waits for a snapshot of a volume that is copied is filled when the copy ends, and not
/// before: until then a crash may leave another map.
#[test]
fn clones_of_a_copied_source_wait_for_its_end() {
    let (mut source, mut target) = pair(11);
    do_all(&mut source, &[write(0, 30), snapshot(9), write(5, 3)]);
    let frozen = freeze(&mut source, volume());
    mark_incomplete(&mut target, volume());
    let place = frozen.view.snapshots[0].place;
    let from = Source { volume: volume(), snapshot: SnapshotId::from_bytes(id(9)), place };
    let clone = volume_id(2);
    let new = tercet_proto::NewReplica {
        volume: clone,
        replica: tercet_proto::ReplicaId::from_bytes(id(77)),
        name: "clone".to_owned(),
        size_blocks: SIZE_BLOCKS,
        source: Some(from),
        incomplete: true,
    };
    target.store.create_replica(new, Token(1 << 50));
    target.settle();
    let mut waited = 0;
    let mut hook = |world: &mut World| {
        let state = world.store.replica(clone).expect("there");
        let source = world.store.replica(volume()).expect("there");
        assert!(state.incomplete == Some(Incomplete::Awaits(from)) || source.incomplete.is_none());
        waited += 1;
    };
    let (source, target) = (&mut source, &mut target);
    Copying { source, target, volume: volume(), meanwhile: &mut |_| {}, hook: &mut hook }
        .whole(&frozen);
    assert!(waited > 5);
    // Filling is beside the model here: the clone is read against the view's snapshot.
    target.settle();
    assert_eq!(target.store.replica(clone).expect("there").incomplete, None);
    let model = target.model[&volume()].clone();
    let content = frozen.model.snapshots[0].content.clone();
    let replica = tercet_proto::ReplicaId::from_bytes(id(77));
    let fresh = |world: &World| common::ModelVolume {
        replica,
        log: Vec::new(),
        applied: 0,
        acked: tercet_proto::Place::EMPTY,
        snapshots: Vec::new(),
        content: content.clone(),
        ..world.model[&volume()].clone()
    };
    let clone_model = fresh(target);
    target.model.insert(clone, clone_model);
    target.violations.clear(); // `filled` of a clone that the model did not know
    target.model.insert(volume(), model);
    target.compare_all();
    target.disk.power_cut(&mut |_| 0);
    target.restart();
    target.compare_all();
    target.assert_well("filled");
}

/// A source that becomes whole without a copy fills the clones that waited for that.
#[test]
fn clones_of_a_source_that_was_damaged_wait_until_it_is_whole() {
    let (mut world, _) = pair(17);
    do_all(&mut world, &[write(0, 30), snapshot(9), write(5, 3)]);
    mark_incomplete(&mut world, volume());
    let place = world.store.snapshots(volume())[0].place;
    let from = Source { volume: volume(), snapshot: SnapshotId::from_bytes(id(9)), place };
    let clone = volume_id(2);
    let new = tercet_proto::NewReplica {
        volume: clone,
        replica: tercet_proto::ReplicaId::from_bytes(id(77)),
        name: "clone".to_owned(),
        size_blocks: SIZE_BLOCKS,
        source: Some(from),
        incomplete: true,
    };
    world.store.create_replica(new, Token(1 << 50));
    world.settle();
    let state = |world: &World| world.store.replica(clone).expect("there").incomplete;
    assert_eq!(state(&world), Some(Incomplete::Awaits(from)));
    world.store.set_incomplete(volume(), None, Token(2 << 50));
    world.settle();
    assert_eq!(state(&world), None, "filled");
    no_doubt(&world, "filled");
}

/// What the log says from before a copy went with the old map, damage included: a start that finds
/// bad records there finds the view all the same.
#[test]
fn damage_of_before_does_not_outlive_a_copy() {
    let (mut source, mut target) = pair(19);
    do_all(&mut source, &[write(0, 3), write(9, 1), zero(2, 4), snapshot(9), write(40, 2)]);
    catch_up_to(&source, &mut target, 3);
    do_all(&mut source, &[write(1, 1), zero(9, 1)]);
    let frozen = freeze(&mut source, volume());
    mark_incomplete(&mut target, volume());
    let is_record = |world: &World, block: &u64| world.disk.sector(*block)[4..8] == *b"TLG1";
    let before: Vec<u64> =
        (64..64 + 1024).filter(|block| is_record(&target, block)).take(4).collect();
    copy_to(&mut source, &mut target, &frozen);
    target.tick(1000);
    target.settle();
    let image = target.disk.image();
    for record in before {
        for block in [record, record + 1] {
            let mut after = target.fork(SimDisk::from_image(CAPACITY, &image));
            after.disk.flip(block, 50 * 8);
            let report = after.restart();
            assert_eq!(report.damaged, [], "block {block}");
            assert_is_view(&mut after, volume(), &frozen, &format!("block {block} is bad"));
        }
    }
}

/// A replica that is deleted while pieces are on their way: they are given up.
#[test]
fn a_replica_deleted_meanwhile_leaves_nothing() {
    let (mut source, mut target) = pair(13);
    do_all(&mut source, &[write(0, 200)]);
    let frozen = freeze(&mut source, volume());
    mark_incomplete(&mut target, volume());
    let empty = held_bytes(&mut target);
    let replica = target.model[&volume()].replica;
    let data = Some(common::payload(4, 200));
    let range = BlockRange { start: 0, count: 200 };
    let stamp = frozen.view.place;
    target.store.copy_begin(volume(), &[]);
    let pieces = vec![tercet_proto::Piece { range, stamp, data }];
    target.store.copy_write(volume(), pieces, Token(1 << 50));
    target.store.delete_replica(volume(), replica, Token(2 << 50));
    target.store.copy_settle(volume(), Token(3 << 50));
    let mut ops = 0;
    while {
        target.pump();
        // What is newest completes first: the deletion before the pieces.
        let token = target.disk.in_flight().last().copied();
        token.is_some_and(|token| {
            target.disk.complete(token);
            target.deliver();
            true
        })
    } {
        ops += 1;
        no_doubt(&target, &format!("after {ops}"));
    }
    for token in [1_u64 << 50, 3 << 50] {
        assert!(target.dones[&Token(token)].is_err(), "no replica any more");
    }
    assert!(target.store.replica(volume()).is_none());
    target.model.remove(&volume());
    assert!(held_bytes(&mut target) <= empty, "all is given back");
}

/// Up to so many unsettled sectors every subset of "durable or newest" is tried.
const ALL_SUBSETS_UP_TO: usize = 4;
const SAMPLES: u64 = 6;

struct Crashes<'a> {
    frozen: &'a Frozen,
    rng: SmallRng,
    states: u64,
    complete: u64,
    images: Vec<tercet_store::simdisk::Image>,
}

impl Crashes<'_> {
    /// What may be on the disk after a power cut now.
    fn here(&mut self, world: &World) {
        let unsettled = world.disk.unsettled();
        let all = unsettled.len() <= ALL_SUBSETS_UP_TO;
        let count = if all { 1 << unsettled.len() } else { SAMPLES };
        for sample in 0..count {
            let mut index = 0;
            let rng = &mut self.rng;
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
            self.opened(world, image);
        }
    }

    /// Durably incomplete, or the view and nothing else.
    fn opened(&mut self, world: &World, image: tercet_store::simdisk::Image) {
        let mut after = world.fork(SimDisk::from_image(CAPACITY, &image));
        self.states += 1;
        let wrong = after.check();
        assert!(wrong.is_empty(), "{wrong:#?}");
        after.settle();
        let state = after.store.replica(volume()).expect("there");
        if state.incomplete.is_some() {
            self.images.push(image);
        } else {
            self.complete += 1;
            adopt(&mut after, volume(), self.frozen);
            assert_is_view(&mut after, volume(), self.frozen, "complete after a crash");
        }
    }
}

/// Each state that a crash leaves incomplete: a copy that is begun anew ends well.
fn begin_anew(
    source: &mut World,
    target: &World,
    frozen: &Frozen,
    images: &[tercet_store::simdisk::Image],
) {
    for image in images {
        let mut after = target.fork(SimDisk::from_image(CAPACITY, image));
        copy_to(source, &mut after, frozen);
        assert_is_view(&mut after, volume(), frozen, "begun anew");
    }
}

fn enumerate(seed: u64) -> (u64, u64) {
    let (mut source, mut target) = pair(seed);
    work(&mut source, 12);
    do_all(&mut source, &[write(0, 3), snapshot(70)]);
    let prefix = source.model[&volume()].applied;
    if seed % 2 == 1 {
        catch_up_to(&source, &mut target, prefix);
    }
    if seed % 4 > 1 {
        // Entries of another epoch that were never applied, past the view's place: they go with it.
        let tail = target.model[&volume()].tail().lsn.0;
        let other =
            [write(30, 2), write(40, 20), zero(7, 3), write(2, 1), write(60, 3), write(8, 1)];
        target.append(volume(), Some(tail), &[EntryKind::Noop; 12]).expect("room");
        target.append(volume(), None, &other).expect("room");
        target.settle();
    }
    do_all(&mut source, &[write(1, 5), zero(1020, 10), write(1500, 20), snapshot(71), write(9, 2)]);
    let frozen = freeze(&mut source, volume());
    mark_incomplete(&mut target, volume());
    let rng = SmallRng::seed_from_u64(seed);
    let (states, images) = (0, Vec::new());
    let mut crashes = Crashes { frozen: &frozen, rng, states, complete: 0, images };
    let before = target.model.clone();
    let mut hook = |world: &mut World| {
        // A checkpoint of its own now and then, beside the pieces.
        if world.rng.random_bool(0.2) {
            world.store.request_checkpoint();
        }
        crashes.here(world);
    };
    {
        let (source, target) = (&mut source, &mut target);
        let meanwhile = &mut |_: &mut World| {};
        Copying { source, target, volume: volume(), meanwhile, hook: &mut hook }.whole(&frozen);
    }
    // What the end leaves to be done, and a checkpoint behind it.
    target.store.request_checkpoint();
    target.pump();
    crashes.here(&target);
    while target.complete_one() {
        crashes.here(&target);
    }
    let (states, complete, images) = (crashes.states, crashes.complete, crashes.images);
    assert!(complete > 0 && complete < states, "{complete} of {states} complete");
    assert_is_view(&mut target, volume(), &frozen, "at the end");
    target.model = before;
    begin_anew(&mut source, &target, &frozen, &images);
    no_doubt(&source, "at the end");
    (states, complete)
}

#[test]
fn every_crash_of_a_target_leaves_it_incomplete_or_the_view() {
    let started = std::time::Instant::now();
    let seeds: u64 = std::env::var("TERCET_SEEDS").map_or(4, |text| text.parse().expect("seeds"));
    let (mut states, mut complete) = (0, 0);
    for seed in 0..seeds {
        let counted = enumerate(seed);
        states += counted.0;
        complete += counted.1;
    }
    println!("{complete} of {states} complete");
    evidence("store_copy_crash_states", states, 0, started);
}

/// Each rule broken on purpose makes a test of this file fail.
#[cfg(feature = "canary")]
#[test]
fn a_broken_rule_is_caught() {
    let this = std::env::current_exe().expect("the program that runs");
    let catches = [
        ("finish-unsettled", "every_crash_of_a_target_leaves_it_incomplete_or_the_view"),
        ("no-hole-stamps", "holes_differ_in_either_direction"),
        ("no-hole-stamps", "a_target_of_any_history_becomes_the_view"),
    ];
    for (canary, test) in catches {
        let mut command = std::process::Command::new(&this);
        let command = command.args([test, "--exact"]).env("TERCET_CANARY", canary);
        let output = command.output().expect("runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success(), "{canary} is not noticed: {text}");
        assert!(text.contains("1 failed"), "{canary}: {text}");
    }
}
