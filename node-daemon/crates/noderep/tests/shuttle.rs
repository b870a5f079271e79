//! Random schedules of more threads than loom can try out, on sequentially consistent memory
//! (shuttle): histories of reads and writes are held against a single-threaded structure, with
//! replicas that come and go, a log so short that it is always full, and writers that give up.

#![cfg(feature = "shuttle")]

mod common;

use std::sync::atomic::{AtomicU64, Ordering as StdOrdering};
use std::sync::{Arc as StdArc, Mutex as StdMutex};
use std::time::{Duration, Instant};

use common::{Add, Call, Operation, Registers, evidence, is_linearizable, times};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use tercet_noderep::{NodeReplicated, Options, Replica, WriteError};

const THREADS: usize = 4;
const CALLS_OF_THREAD: usize = 6;
const SCHEDULES: usize = 4000;
/// Schedules in which few threads overtake others, but at the worst points (PCT).
const SCHEDULES_PCT: usize = 1000;
const PCT_DEPTH: usize = 4;

fn options() -> Options {
    Options {
        log_entries: 4,
        patience: Duration::from_nanos(8),
        #[cfg(feature = "canary")]
        canary: common::canary(),
    }
}

/// What one execution did. std's locks and atomics: the schedule knows nothing of them.
#[derive(Clone, Default)]
struct Record {
    clock: StdArc<AtomicU64>,
    calls: StdArc<StdMutex<Vec<Call>>>,
}

impl Record {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, StdOrdering::SeqCst)
    }

    fn call(&self, replica: &mut Replica<Registers>, operation: Operation) {
        let begun = self.now();
        let answer = match operation {
            Operation::Read(register) => Ok(replica.read(register)),
            Operation::Write(add) => replica.write(add),
        };
        let ended = self.now();
        match answer {
            Ok(answer) => {
                let call = Call { begun, ended, operation, answer };
                self.calls.lock().expect("no panic").push(call);
            }
            // As if it had never been.
            Err(WriteError::NoRoom { .. } | WriteError::Busy { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

fn any_operation() -> Operation {
    let mut random = thread_rng();
    let register = random.gen_range(0..common::REGISTERS);
    if random.gen_bool(0.5) {
        Operation::Read(register)
    } else {
        Operation::Write(Add { register, amount: random.gen_range(1..4) })
    }
}

/// Threads call what they like; now and then one of them takes a new replica.
fn histories(options: &Options) {
    let all = NodeReplicated::new(Registers::default(), options.clone());
    let record = Record::default();
    let mut threads = Vec::new();
    for number in 0..THREADS {
        let (all, record) = (all.clone(), record.clone());
        threads.push(thread::spawn(move || {
            let mut replica = all.replica(&format!("thread-{number}"));
            for _ in 0..CALLS_OF_THREAD {
                if thread_rng().gen_bool(0.1) {
                    replica = all.replica(&format!("thread-{number}-again"));
                }
                record.call(&mut replica, any_operation());
            }
        }));
    }
    for thread in threads {
        thread.join().expect("ends well");
    }
    let calls = record.calls.lock().expect("no panic");
    assert!(is_linearizable(&calls), "no single thread answers like this: {calls:?}");
}

/// One replica is looked at and looked at; the others' reads and writes go on and end.
fn stalled_reader(options: &Options) {
    let all = NodeReplicated::new(Registers::default(), options.clone());
    let mut stalled = all.replica("stalled");
    let seen = stalled.latest().changes();
    let held = stalled.held();
    let mut threads = Vec::new();
    for number in 0..2 {
        let mut replica = all.replica(&format!("thread-{number}"));
        threads.push(thread::spawn(move || {
            let mut done = 0;
            while done < 8 {
                match replica.write(Add { register: 0, amount: 1 }) {
                    Ok(_) => done += 1,
                    Err(WriteError::Busy { .. }) => thread::yield_now(),
                    Err(WriteError::NoRoom { name, .. }) => assert_ne!(name, "stalled"),
                    Err(error) => panic!("{error}"),
                }
                assert!(replica.read(0) >= done);
            }
        }));
    }
    for thread in threads {
        thread.join().expect("ends well");
    }
    assert_eq!(held.changes(), seen, "what is looked at stands still");
    assert_eq!(stalled.read(0), 16);
}

fn holds(name: &str, model: fn(&Options)) {
    let started = Instant::now();
    let (random, pct) = (SCHEDULES * times(), SCHEDULES_PCT * times());
    shuttle::check_random(move || model(&options()), random);
    shuttle::check_pct(move || model(&options()), pct, PCT_DEPTH);
    evidence(&format!("noderep_shuttle_{name}"), random + pct, started);
}

#[test]
fn every_history_is_one_that_a_single_thread_could_give() {
    holds("histories", histories);
}

#[test]
fn a_stalled_reader_stops_nobody() {
    holds("stalled_reader", stalled_reader);
}

#[cfg(feature = "canary")]
#[test]
fn canaries_are_caught() {
    use tercet_noderep::Canary;

    // Those of memory orders are for loom: here memory is sequentially consistent.
    let test = "every_history_is_one_that_a_single_thread_could_give";
    let canaries = [
        (Canary::ReclaimAll, test),
        (Canary::EvictCopying, test),
        (Canary::AnswerEarly, test),
        (Canary::StaleRead, test),
        (Canary::ForgetEviction, test),
    ];
    common::catch("noderep_canaries_shuttle", &canaries);
}
