//! What grows: the log that is replayed, maps, snapshots. Everything here is metadata, so a smaller
//! disk than the volumes pretend to have does.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tercet_proto::{BlockRange, EntryKind, SnapshotId};
use tercet_reactor::Place;

use crate::driver::{ARENA_BYTES, Driver, Setup, mix, volume};
use crate::load::{Access, Load, Until};
use crate::print;

const GIB_BLOCKS: u64 = 1 << 18;
/// Of the entries of `recovery`, one in so many is a write; the others take no place in the ring.
const WRITE_EVERY: u64 = 12;
/// Entries that wait for the device at a time.
const AHEAD: u64 = 256;
/// Snapshots of the large volume, and writes behind each.
const LARGE_SNAPSHOTS: u64 = 5;
const WRITES_BEHIND: u64 = 500;
/// Blocks of each volume of `chain`, writes between two snapshots, rounds of reading.
const CHAIN_BLOCKS: u64 = 1 << 16;
const CHAIN_WRITES: u64 = 4;
const CHAIN_ROUNDS: usize = 5;
const CHAIN_TIME: Duration = Duration::from_secs(1);

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn resident_bytes() -> f64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("a process has one");
    let pages = text.split(' ').nth(1).and_then(|word| word.parse::<f64>().ok());
    pages.expect("a number of pages") * 4096.0
}

/// Writes a log of so many entries while no checkpoint comes to an end, and opens it again.
pub fn recovery(device: Place, entries: u64) {
    let size = GIB_BLOCKS;
    let ring_blocks = Some(1 << 17);
    let setup = Setup { format: true, ring_blocks, hold_copies: true, ..Setup::default() };
    let mut driver = Driver::open(device.clone(), setup);
    driver.make_volume(0, size);
    for number in 0..entries {
        let range = BlockRange { start: mix(number) % size, count: 1 };
        loop {
            let taken = if number % WRITE_EVERY == 0 {
                driver.write(0, range)
            } else {
                driver.append(0, EntryKind::Zero { range, discard: false }, Bytes::new())
            };
            if taken.is_some() {
                break;
            }
            driver.turn();
            driver.apply_durable(0);
        }
        if number % AHEAD == 0 {
            driver.turn();
            driver.apply_durable(0);
        }
    }
    driver.finish(0);
    assert_eq!(driver.written.checkpoints, 0, "the whole log is to be replayed");
    let log_bytes = driver.store.usage().log_used_bytes;
    drop(driver);
    let driver = Driver::open(device, Setup::default());
    let tail = driver.store.tail(volume(0)).expect("a volume");
    assert_eq!(tail.lsn.0, entries, "everything is there");
    let seconds = driver.opened.as_secs_f64();
    print(&[("seconds", seconds), ("entries", entries as f64), ("log_bytes", log_bytes as f64)]);
}

/// Takes a snapshot; how long until it is applied.
fn take_snapshot(driver: &mut Driver, index: u8, number: u64) -> Duration {
    let id = SnapshotId::from_bytes(u128::from(number + 1).to_le_bytes());
    let begun = Instant::now();
    while driver.append(index, EntryKind::Snapshot { id }, Bytes::new()).is_none() {
        driver.turn();
    }
    driver.finish(index);
    begun.elapsed()
}

fn load(access: Access, index: u8, depth: usize, until: Until) -> Load {
    Load { access, volume: index, blocks: 1, depth, random: true, span: None, until }
}

/// Snapshots of a volume of 1 TiB with 100 GiB mapped, and writes before and after.
pub fn snapshot(device: Place) {
    let (size, mapped) = (1024 * GIB_BLOCKS, 100 * GIB_BLOCKS);
    let setup = Setup { format: true, swallow_payload: true, ..Setup::default() };
    let mut driver = Driver::open(device, setup);
    let before = resident_bytes();
    driver.make_volume(0, size);
    driver.fill(0, mapped);
    driver.settle();
    let memory = resident_bytes() - before - ARENA_BYTES as f64;
    let behind = Until::Operations(WRITES_BEHIND);
    let writes = Load { span: Some(mapped), ..load(Access::Write, 0, 1, behind) };
    driver.longest_step = Duration::ZERO;
    let plain = writes.run(&mut driver).at(50);
    let (mut times, mut after) = (Vec::new(), Vec::new());
    for number in 0..LARGE_SNAPSHOTS {
        times.push(take_snapshot(&mut driver, 0, number).as_secs_f64() * 1e3);
        after.push(writes.run(&mut driver).at(50));
    }
    let work_step = driver.longest_step.as_secs_f64() * 1e3;
    driver.longest_step = Duration::ZERO;
    let begun = Instant::now();
    driver.settle();
    print(&[
        ("snapshot_ms", median(times.clone())),
        ("snapshot_max_ms", times.into_iter().fold(0.0, f64::max)),
        ("write_before_us", plain),
        ("write_after_us", median(after)),
        ("longest_step_ms", work_step),
        ("checkpoint_ms", begun.elapsed().as_secs_f64() * 1e3),
        ("checkpoint_step_ms", driver.longest_step.as_secs_f64() * 1e3),
        ("memory_bytes_per_tib", memory * (1024 * GIB_BLOCKS) as f64 / mapped as f64),
    ]);
}

/// Reads of a volume with a chain of snapshots beside those of one without, in turns.
pub fn chain(device: Place, snapshots: u64) {
    let mut driver = Driver::open(device, Setup::format());
    for index in [0, 1] {
        driver.make_volume(index, CHAIN_BLOCKS);
        driver.fill(index, CHAIN_BLOCKS);
    }
    let mut times = Vec::new();
    for number in 0..snapshots {
        for index in [0, 1] {
            load(Access::Write, index, 4, Until::Operations(CHAIN_WRITES)).run(&mut driver);
        }
        times.push(take_snapshot(&mut driver, 0, number).as_secs_f64() * 1e3);
    }
    driver.settle();
    let mut figures = [const { Vec::new() }; 4];
    for _ in 0..CHAIN_ROUNDS {
        for index in [0, 1] {
            let one = load(Access::Read, index, 1, Until::Elapsed(CHAIN_TIME)).run(&mut driver);
            figures[usize::from(index)].push(one.at(50));
            let many = load(Access::Read, index, 32, Until::Elapsed(CHAIN_TIME)).run(&mut driver);
            figures[usize::from(index) + 2].push(many.operations as f64 / many.seconds);
        }
    }
    let [with, without, with_iops, without_iops] = figures.map(median);
    print(&[
        ("snapshot_ms", median(times)),
        ("read_us", with),
        ("read_none_us", without),
        ("read_iops", with_iops),
        ("read_none_iops", without_iops),
    ]);
}
