//! Real threads on real cores: histories against a single-threaded structure, replicas that stand
//! still, replicas that come and go, a change that panics.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use common::{Add, Call, Operation, Registers, evidence, is_linearizable, times};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tercet_noderep::{Dispatch, NodeReplicated, Number, Options, Replica, State, WriteError};

/// Miri runs these tests too, some thousand times slower.
const ROUNDS: usize = if cfg!(miri) { 5 } else { 1500 };
const THREADS: u64 = 3;
const CALLS_OF_THREAD: usize = 8;

fn add(register: usize, amount: u64) -> Add {
    Add { register, amount }
}

fn structure(log_entries: usize) -> NodeReplicated<Registers> {
    let options = Options { log_entries, ..Options::default() };
    NodeReplicated::new(Registers::default(), options)
}

/// Writes although a reader of another thread may just be copying from the full log.
fn write(replica: &mut Replica<Registers>, add: Add) -> u64 {
    loop {
        match replica.write(add) {
            Ok(was) => return was,
            Err(WriteError::NoRoom { .. }) => thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

fn history_of(
    mut replica: Replica<Registers>,
    seed: u64,
    clock: &AtomicU64,
    start: &Barrier,
) -> Vec<Call> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut calls = Vec::new();
    start.wait();
    for _ in 0..CALLS_OF_THREAD {
        let register = random.random_range(0..common::REGISTERS);
        let operation = if random.random_bool(0.5) {
            Operation::Read(register)
        } else {
            Operation::Write(add(register, random.random_range(1..4)))
        };
        let begun = clock.fetch_add(1, Ordering::SeqCst);
        let answer = match operation {
            Operation::Read(register) => replica.read(register),
            Operation::Write(add) => write(&mut replica, add),
        };
        let ended = clock.fetch_add(1, Ordering::SeqCst);
        calls.push(Call { begun, ended, operation, answer });
    }
    calls
}

#[test]
fn every_history_is_one_that_a_single_thread_could_give() {
    let started = Instant::now();
    let rounds = ROUNDS * times();
    for round in 0..rounds as u64 {
        let all = structure(4);
        let clock = AtomicU64::new(0);
        let start = Barrier::new(THREADS as usize);
        let calls: Vec<Call> = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|number| {
                    let replica = all.replica("one of three");
                    let (clock, start) = (&clock, &start);
                    let seed = round * THREADS + number;
                    scope.spawn(move || history_of(replica, seed, clock, start))
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("ends well")).collect()
        });
        assert!(
            is_linearizable(&calls),
            "round {round}: no single thread answers like this: {calls:?}"
        );
    }
    evidence("noderep_histories", rounds, started);
}

#[test]
fn a_stalled_reader_stops_nobody_and_is_named() {
    const WRITES: u64 = if cfg!(miri) { 40 } else { 4000 };
    let all = structure(16);
    let mut stalled = all.replica("stalled");
    let number = stalled.number();
    let mut other = all.replica("other");
    let (looks, looked) = channel();
    let (goes_on, go_on) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let value = stalled.latest();
            let before = value.clone();
            looks.send(()).expect("waited for");
            go_on.recv().expect("told");
            assert_eq!(value, &before, "what is looked at stands still");
            assert_eq!(stalled.read(0), WRITES, "it has everything once it goes on");
        });
        looked.recv().expect("looks");
        for written in 0..WRITES {
            assert_eq!(write(&mut other, add(0, 1)), written);
            assert_eq!(other.read(0), written + 1);
        }
        let members = all.members();
        let stuck = members.iter().find(|member| member.number == number).expect("there");
        assert_eq!((stuck.name.as_str(), stuck.state), ("stalled", State::Evicted));
        assert_eq!(stuck.evictions, 1, "named once, however long the log goes on");
        goes_on.send(()).expect("it waits");
    });
}

#[test]
fn a_lag_is_told_until_the_next_look() {
    let all = structure(8);
    let (mut one, mut other) = (all.replica("one"), all.replica("other"));
    for _ in 0..5 {
        write(&mut one, add(0, 1));
    }
    let lag = |name: &str| {
        let members = all.members();
        members.iter().find(|member| member.name == name).expect("there").state
    };
    assert_eq!(lag("other"), State::Lags(5));
    assert_eq!(other.read(0), 5);
    assert_eq!(lag("other"), State::Lags(0));
    assert_eq!(other.held().changes(), 5);
}

#[test]
fn replicas_come_and_go_while_others_write() {
    let started = Instant::now();
    let rounds = if cfg!(miri) { 10 } else { 2000 * times() };
    let all = structure(8);
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut writer = all.replica("writer");
        let ends = &ends;
        scope.spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                write(&mut writer, add(0, 1));
            }
        });
        let mut kept = all.replica("kept");
        let mut seen = 0;
        for round in 0..rounds {
            let mut guest = all.replica("guest");
            let now = guest.read(0);
            assert!(now >= seen, "a new replica is older than what was seen");
            seen = kept.read(0);
            assert!(seen >= now);
            if round % 3 == 0 {
                write(&mut guest, add(1, 1));
            }
        }
        ends.store(true, Ordering::Relaxed);
    });
    let names: Vec<_> = all.members().into_iter().map(|member| member.name).collect();
    assert!(names.is_empty(), "they have gone: {names:?}");
    evidence("noderep_comings_and_goings", rounds, started);
}

/// Waits where it is told to.
#[derive(Clone)]
struct Slow {
    changes: u64,
    stands: Arc<AtomicBool>,
    goes_on: Arc<AtomicBool>,
}

impl Dispatch for Slow {
    type Read<'a> = ();
    type Found = u64;
    type Write = &'static str;
    type Done = ();

    fn read(&self, (): ()) -> u64 {
        self.changes
    }

    fn write(&mut self, change: &'static str) {
        assert_ne!(change, "panic");
        if change == "stand" && !self.goes_on.load(Ordering::Acquire) {
            self.stands.store(true, Ordering::Release);
            while !self.goes_on.load(Ordering::Acquire) {
                thread::yield_now();
            }
        }
        self.changes += 1;
    }
}

fn slow(patience: Duration) -> (NodeReplicated<Slow>, Arc<AtomicBool>, Arc<AtomicBool>) {
    let (stands, goes_on) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let value = Slow { changes: 0, stands: Arc::clone(&stands), goes_on: Arc::clone(&goes_on) };
    let options = Options { patience, ..Options::default() };
    (NodeReplicated::new(value, options), stands, goes_on)
}

#[test]
fn a_writer_that_stands_still_is_named_and_stops_no_reader() {
    let (all, stands, goes_on) = slow(Duration::from_millis(20));
    let mut stuck = all.replica("stuck");
    let (mut other, mut reader) = (all.replica("other"), all.replica("reader"));
    let number = stuck.number();
    thread::scope(|scope| {
        scope.spawn(move || stuck.write("stand").expect("written in the end"));
        while !stands.load(Ordering::Acquire) {
            thread::yield_now();
        }
        let refused = other.write("more").expect_err("the lock is held");
        assert_eq!(refused, WriteError::Busy { combiner: number });
        assert_eq!(reader.read(()), 0, "reads go on: it has not happened yet");
        goes_on.store(true, Ordering::Release);
    });
    assert_eq!(reader.read(()), 1, "what was refused is not done later");
    other.write("more").expect("the lock is free");
    assert_eq!(reader.read(()), 2);
}

#[test]
fn after_a_change_that_panics_reads_go_on_and_writes_are_refused() {
    let (all, _, _) = slow(Duration::from_secs(5));
    let (mut one, mut other) = (all.replica("one"), all.replica("other"));
    one.write("first").expect("written");
    thread::scope(|scope| {
        scope.spawn(move || one.write("panic")).join().expect_err("it panics");
    });
    assert_eq!(other.write("second"), Err(WriteError::Poisoned));
    assert_eq!(other.read(()), 1);
}

#[test]
fn numbers_are_never_given_again() {
    let all = structure(2);
    assert_eq!(all.replica("one").number(), Number(1));
    assert_eq!(all.replica("two").number(), Number(2));
    assert_eq!(all.members(), Vec::new());
}
