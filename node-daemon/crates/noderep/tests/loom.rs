//! Every interleaving of a few threads, and every order in which the memory model lets their loads
//! and stores be seen (loom). A data race in a slot or a seat is a failure too.
//!
//! loom knows no real time, so "after" here means: after something that the writer did after its
//! write, and that was seen (an effect). Schedules with at most [`preemptions`] changes of thread
//! that no thread asked for are tried; all the others too with `TERCET_NODEREP_TIMES` above 1.
//! More threads and longer histories: `shuttle.rs`, on sequentially consistent memory.

#![cfg(feature = "loom")]

mod common;

use std::sync::Arc as StdArc;
use std::sync::atomic::{AtomicUsize, Ordering as StdOrdering};
use std::time::{Duration, Instant};

use common::{Add, Registers, evidence, times};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use tercet_noderep::{NodeReplicated, Options, Replica, WriteError};

/// Attempts of a writer before it gives up.
const ATTEMPTS: Duration = Duration::from_nanos(3);

fn options() -> Options {
    Options {
        log_entries: 2,
        patience: ATTEMPTS,
        #[cfg(feature = "canary")]
        canary: common::canary(),
    }
}

fn preemptions() -> Option<usize> {
    if times() > 1 { None } else { Some(3) }
}

/// Tries every schedule, and tells how many there were.
fn holds(name: &str, model: fn(&Options)) {
    let started = Instant::now();
    let count = StdArc::new(AtomicUsize::new(0));
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions();
    let (counted, options) = (StdArc::clone(&count), options());
    builder.check(move || {
        counted.fetch_add(1, StdOrdering::Relaxed);
        model(&options);
    });
    evidence(&format!("noderep_loom_{name}"), count.load(StdOrdering::Relaxed), started);
}

fn add(replica: &mut Replica<Registers>) -> Result<u64, WriteError> {
    replica.write(Add { register: 0, amount: 1 })
}

/// A log of two, four changes: slots are used again while the reader looks, or it is put out.
fn reuse(options: &Options) {
    let all = NodeReplicated::new(Registers::default(), options.clone());
    let (mut writer, mut reader) = (all.replica("writer"), all.replica("reader"));
    let thread = thread::spawn(move || {
        let mut seen = 0;
        for _ in 0..2 {
            let now = reader.read(0);
            assert!(now >= seen && now <= 4, "{seen}, then {now}");
            seen = now;
        }
        reader
    });
    let mut written = 0;
    for _ in 0..4 {
        match add(&mut writer) {
            Ok(was) => {
                assert_eq!(was, written);
                written += 1;
            }
            // The reader stands still in the middle of copying.
            Err(WriteError::NoRoom { name, .. }) => assert_eq!(name, "reader"),
            // It holds the lock to be copied anew.
            Err(WriteError::Busy { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(writer.read(0), written);
    assert_eq!(thread.join().expect("ends well").read(0), written);
}

/// Two writers: one may do the other's change, or give up; nothing is lost or done twice.
fn combining(options: &Options) {
    let all = NodeReplicated::new(Registers::default(), options.clone());
    let (mut one, mut other) = (all.replica("one"), all.replica("other"));
    let thread = thread::spawn(move || add(&mut other));
    let mine = add(&mut one);
    let theirs = thread.join().expect("ends well");
    let mut done: Vec<u64> = [mine, theirs].into_iter().flatten().collect();
    done.sort_unstable();
    assert!(!done.is_empty(), "one of them had the lock");
    assert!(done.iter().copied().eq(0..done.len() as u64), "{done:?}");
    assert_eq!(one.read(0), done.len() as u64, "refused is never done");
}

/// Three threads: what is seen of a change comes after the change, for everyone.
fn effect(options: &Options) {
    let all = NodeReplicated::new(Registers::default(), options.clone());
    let (mut writer, mut reader, mut last) =
        (all.replica("writer"), all.replica("reader"), all.replica("last"));
    let told = Arc::new(AtomicU64::new(0));
    let passed_on = Arc::new(AtomicU64::new(0));
    let (tells, passes) = (Arc::clone(&told), Arc::clone(&passed_on));
    let writes = thread::spawn(move || {
        if add(&mut writer).is_ok() {
            tells.store(1, Ordering::Release);
        }
    });
    let reads = thread::spawn(move || {
        if told.load(Ordering::Acquire) == 1 {
            assert_eq!(reader.read(0), 1, "the effect is seen before the change");
            passes.store(1, Ordering::Release);
        }
    });
    if passed_on.load(Ordering::Acquire) == 1 {
        assert_eq!(last.read(0), 1, "the effect's effect is seen before the change");
    }
    writes.join().expect("ends well");
    reads.join().expect("ends well");
}

/// A read that has seen a change passes it on: no later read anywhere is older.
fn two_readers(options: &Options) {
    let all = NodeReplicated::new(Registers::default(), options.clone());
    let (mut writer, mut reader, mut last) =
        (all.replica("writer"), all.replica("reader"), all.replica("last"));
    let seen = Arc::new(AtomicU64::new(0));
    let sees = Arc::clone(&seen);
    let writes = thread::spawn(move || add(&mut writer).is_ok());
    let reads = thread::spawn(move || sees.store(reader.read(0), Ordering::Release));
    let before = seen.load(Ordering::Acquire);
    assert!(last.read(0) >= before, "back in time");
    writes.join().expect("ends well");
    reads.join().expect("ends well");
}

/// A replica comes, reads and goes while changes go round the log.
fn coming_and_going(options: &Options) {
    let all = NodeReplicated::new(Registers::default(), options.clone());
    let mut writer = all.replica("writer");
    let comes = all.clone();
    let thread = thread::spawn(move || {
        let mut guest = comes.replica("guest");
        let seen = guest.read(0);
        assert!(guest.held().changes() == seen && seen <= 3);
    });
    let written = (0..3).filter(|_| add(&mut writer).is_ok()).count() as u64;
    assert_eq!(writer.read(0), written);
    thread.join().expect("ends well");
    assert_eq!(all.replica("last").read(0), written);
}

/// A change and a question at once, from both sides.
fn both_sides(options: &Options) {
    let all = NodeReplicated::new(Registers::default(), options.clone());
    let (mut one, mut other) = (all.replica("one"), all.replica("other"));
    let turn = |replica: &mut Replica<Registers>| {
        let done = u64::from(add(replica).is_ok());
        let seen = replica.read(0);
        assert!(seen >= done && seen <= 2, "its own change is not seen");
    };
    let thread = thread::spawn(move || turn(&mut other));
    turn(&mut one);
    thread.join().expect("ends well");
}

#[test]
fn slots_are_used_again_only_when_nobody_reads_them() {
    holds("reuse", reuse);
}

#[test]
fn a_change_is_done_once_whoever_does_it() {
    holds("combining", combining);
}

#[test]
fn a_change_is_seen_before_its_effect() {
    holds("effect", effect);
}

#[test]
fn what_one_has_seen_nobody_unsees() {
    holds("two_readers", two_readers);
}

#[test]
fn replicas_come_and_go_while_others_write() {
    holds("coming_and_going", coming_and_going);
}

#[test]
fn each_sees_its_own_change() {
    holds("both_sides", both_sides);
}

#[cfg(feature = "canary")]
#[test]
fn canaries_are_caught() {
    use tercet_noderep::Canary;

    common::catch(
        "noderep_canaries_loom",
        &[
            (Canary::TailRelaxed, "slots_are_used_again_only_when_nobody_reads_them"),
            (Canary::LookRelaxed, "slots_are_used_again_only_when_nobody_reads_them"),
            (Canary::PositionRelaxed, "slots_are_used_again_only_when_nobody_reads_them"),
            (Canary::ReclaimAll, "slots_are_used_again_only_when_nobody_reads_them"),
            (Canary::EvictCopying, "slots_are_used_again_only_when_nobody_reads_them"),
            (Canary::ForgetEviction, "slots_are_used_again_only_when_nobody_reads_them"),
            (Canary::AnswerRelaxed, "a_change_is_done_once_whoever_does_it"),
            (Canary::AnswerEarly, "each_sees_its_own_change"),
            (Canary::StaleRead, "a_change_is_seen_before_its_effect"),
        ],
    );
}
