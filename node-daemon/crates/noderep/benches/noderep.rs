//! A table of volumes behind this crate and behind what one would take otherwise: look-ups and
//! changes in several proportions, by several threads.
//!
//! `cargo bench -p tercet-noderep -- [--millis N] [--rounds N]` prints one JSON object for each run:
//!
//! ```text
//! {"structure": "noderep", "threads": 2, "read_percent": 99, "ops_per_s": 1}
//! {"structure": "noderep", "stalled": true, "ops_per_s": 1}
//! ```
//!
//! Runs are interleaved: each round has every structure once for each case, so that a machine that
//! slows down slows all of them. `python -m tercet_e2e bench noderep` makes medians, a table and a
//! plot of them.
//!
//! Every structure holds the same map with the same hasher, is asked for the same keys in the same
//! order, and gives back the same few bytes. arc-swap copies the map for each change, which is what
//! one does with it; its writers take a lock, so that none loses another's change.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tercet_noderep::{Dispatch, NodeReplicated, Options, Replica, WriteError};

/// Rows of the table: volumes of a node.
const ROWS: u64 = 256;
const THREADS: [usize; 4] = [1, 2, 4, 8];
const READ_PERCENTS: [u32; 4] = [100, 99, 90, 50];
/// Operations between two looks at whether time is over.
const BATCH: usize = 64;

/// A row: home reactor, epoch, role.
#[derive(Clone, Copy)]
struct Row {
    home: u16,
    epoch: u64,
    serves: bool,
}

type Rows = HashMap<u64, Row>;

fn rows() -> Rows {
    let row = |key: u64| Row { home: key as u16 & 7, epoch: 1, serves: key.is_multiple_of(3) };
    (0..ROWS).map(|key| (key, row(key))).collect()
}

fn raise(rows: &mut Rows, key: u64) {
    let row = rows.get_mut(&key).expect("a row");
    row.epoch += 1;
    row.serves = !row.serves;
}

fn sum(row: &Row) -> u64 {
    row.epoch + u64::from(row.home) + u64::from(row.serves)
}

#[derive(Clone)]
struct Table(Rows);

impl Dispatch for Table {
    type Read<'a> = u64;
    type Found = u64;
    type Write = u64;
    type Done = ();

    fn read(&self, key: u64) -> u64 {
        sum(&self.0[&key])
    }

    fn write(&mut self, key: u64) {
        raise(&mut self.0, key);
    }
}

/// What one thread does with a structure.
trait Handle: Send {
    fn read(&mut self, key: u64) -> u64;
    fn write(&mut self, key: u64);
    /// Looks at the table for as long as `until` says.
    fn stall(&mut self, until: &dyn Fn());
}

struct Replicated(Replica<Table>);

impl Handle for Replicated {
    fn read(&mut self, key: u64) -> u64 {
        self.0.read(key)
    }

    fn write(&mut self, key: u64) {
        while let Err(error) = self.0.write(key) {
            assert!(matches!(error, WriteError::NoRoom { .. }), "{error}");
            thread::yield_now();
        }
    }

    fn stall(&mut self, until: &dyn Fn()) {
        let table = self.0.latest();
        until();
        black_box(table.0.len());
    }
}

macro_rules! handle {
    ($name:ident, $shared:ty, |$table:ident, $key:ident| $read:expr, $write:expr, |$stop:ident| $stall:expr) => {
        struct $name(Arc<$shared>);

        impl Handle for $name {
            fn read(&mut self, $key: u64) -> u64 {
                let $table = &self.0;
                $read
            }

            fn write(&mut self, $key: u64) {
                let $table = &self.0;
                $write
            }

            fn stall(&mut self, $stop: &dyn Fn()) {
                let $table = &self.0;
                $stall
            }
        }
    };
}

handle!(
    StdMutex,
    Mutex<Rows>,
    |table, key| sum(&table.lock().expect("no panic")[&key]),
    raise(&mut table.lock().expect("no panic"), key),
    |until| {
        let held = table.lock().expect("no panic");
        until();
        drop(held);
    }
);
handle!(
    StdRwLock,
    RwLock<Rows>,
    |table, key| sum(&table.read().expect("no panic")[&key]),
    raise(&mut table.write().expect("no panic"), key),
    |until| {
        let held = table.read().expect("no panic");
        until();
        drop(held);
    }
);
handle!(
    ParkingLot,
    parking_lot::RwLock<Rows>,
    |table, key| sum(&table.read()[&key]),
    raise(&mut table.write(), key),
    |until| {
        let held = table.read();
        until();
        drop(held);
    }
);
handle!(
    Swapped,
    (ArcSwap<Rows>, Mutex<()>),
    |table, key| sum(&table.0.load()[&key]),
    {
        let only_one = table.1.lock().expect("no panic");
        let mut rows = Rows::clone(&table.0.load());
        raise(&mut rows, key);
        table.0.store(Arc::new(rows));
        drop(only_one);
    },
    |until| {
        let held = table.0.load();
        until();
        drop(held);
    }
);
handle!(
    Dash,
    DashMap<u64, Row, std::hash::RandomState>,
    |table, key| sum(&table.get(&key).expect("a row")),
    {
        let mut row = table.get_mut(&key).expect("a row");
        row.epoch += 1;
        row.serves = !row.serves;
    },
    |until| {
        let held = table.get(&0);
        until();
        drop(held);
    }
);

type Handles = Vec<Box<dyn Handle>>;

const STRUCTURES: [&str; 6] =
    ["noderep", "std Mutex", "std RwLock", "parking_lot RwLock", "arc-swap", "dashmap"];

fn handles(structure: &str, count: usize) -> Handles {
    fn shared<S, H: Handle + 'static>(
        count: usize,
        value: S,
        handle: impl Fn(Arc<S>) -> H,
    ) -> Handles {
        let value = Arc::new(value);
        (0..count).map(|_| Box::new(handle(Arc::clone(&value))) as Box<dyn Handle>).collect()
    }
    match structure {
        "noderep" => {
            let all = NodeReplicated::new(Table(rows()), Options::default());
            let replica = |number| Replicated(all.replica(&format!("thread-{number}")));
            (0..count).map(|number| Box::new(replica(number)) as Box<dyn Handle>).collect()
        }
        "std Mutex" => shared(count, Mutex::new(rows()), StdMutex),
        "std RwLock" => shared(count, RwLock::new(rows()), StdRwLock),
        "parking_lot RwLock" => shared(count, parking_lot::RwLock::new(rows()), ParkingLot),
        "arc-swap" => shared(count, (ArcSwap::from_pointee(rows()), Mutex::new(())), Swapped),
        "dashmap" => shared(count, rows().into_iter().collect(), Dash),
        other => unreachable!("{other}"),
    }
}

/// One thread's work until time is over; operations done.
fn work(handle: &mut dyn Handle, seed: u64, read_percent: u32, is_over: &AtomicBool) -> u64 {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut done = 0;
    while !is_over.load(Ordering::Relaxed) {
        for _ in 0..BATCH {
            let drawn: u64 = random.random();
            let (key, percent) = (drawn % ROWS, (drawn >> 32) % 100);
            if percent < u64::from(read_percent) {
                black_box(handle.read(key));
            } else {
                handle.write(key);
            }
        }
        done += BATCH as u64;
    }
    done
}

fn run(structure: &str, threads: usize, read_percent: u32, time: Duration) -> f64 {
    let (is_over, start) = (AtomicBool::new(false), Barrier::new(threads + 1));
    let done = AtomicU64::new(0);
    let mut begun = Instant::now();
    thread::scope(|scope| {
        for (seed, mut handle) in (0..).zip(handles(structure, threads)) {
            let (is_over, start, done) = (&is_over, &start, &done);
            scope.spawn(move || {
                start.wait();
                let count = work(&mut *handle, seed, read_percent, is_over);
                done.fetch_add(count, Ordering::Relaxed);
            });
        }
        start.wait();
        begun = Instant::now();
        thread::sleep(time);
        is_over.store(true, Ordering::Relaxed);
    });
    done.into_inner() as f64 / begun.elapsed().as_secs_f64()
}

/// One thread looks at the table and stands still meanwhile, one writes now and then, one reads:
/// reads per second of the last. A lock that lets no reader pass a waiting writer gives none.
fn run_stalled(structure: &str, time: Duration) -> f64 {
    let (is_over, start) = (AtomicBool::new(false), Barrier::new(2));
    let mut all = handles(structure, 3);
    let (mut reader, mut writer, mut stalled) = (all.remove(0), all.remove(0), all.remove(0));
    let done = AtomicU64::new(0);
    thread::scope(|scope| {
        let (is_over, start, counted) = (&is_over, &start, &done);
        scope.spawn(move || {
            stalled.stall(&|| {
                start.wait();
                while !is_over.load(Ordering::Acquire) {
                    thread::sleep(Duration::from_millis(1));
                }
            });
        });
        start.wait();
        scope.spawn(move || {
            while !is_over.load(Ordering::Acquire) {
                writer.write(0);
                thread::sleep(Duration::from_millis(1));
            }
        });
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(5)); // the writer waits by now, if it has to
            while !is_over.load(Ordering::Acquire) {
                black_box(reader.read(0));
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        thread::sleep(time);
        is_over.store(true, Ordering::Release);
    });
    done.into_inner() as f64 / time.as_secs_f64()
}

fn argument(name: &str, or: u64) -> u64 {
    let mut arguments = std::env::args().skip_while(|one| one != name);
    arguments.nth(1).map_or(or, |text| text.parse().expect("a number"))
}

fn main() {
    let time = Duration::from_millis(argument("--millis", 100));
    for _ in 0..argument("--rounds", 5) {
        for read_percent in READ_PERCENTS {
            for threads in THREADS {
                for structure in STRUCTURES {
                    let ops = run(structure, threads, read_percent, time);
                    println!(
                        "{{\"structure\": \"{structure}\", \"threads\": {threads}, \
                         \"read_percent\": {read_percent}, \"ops_per_s\": {ops:.0}}}"
                    );
                }
            }
        }
        for structure in STRUCTURES {
            let ops = run_stalled(structure, time);
            println!(
                "{{\"structure\": \"{structure}\", \"stalled\": true, \"ops_per_s\": {ops:.0}}}"
            );
        }
    }
}
