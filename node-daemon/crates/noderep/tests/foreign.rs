//! Foreign code at its worst, on real threads: copies, changes, clones and questions that panic, stand
//! still or call back. What it may cost is said in docs/node-replication.md; a stale answer, a change
//! that is half done or done twice, and a thread that waits for ever are never among it.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use tercet_noderep::{Dispatch, NodeReplicated, Options, Replica, State, WriteError};

/// Where foreign code is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    /// The structure is cloned.
    Copy,
    /// A change is cloned.
    Clone,
    /// In the middle of a change.
    Change,
    /// A question.
    Question,
}

type Hook = Box<dyn FnMut(Point)>;

thread_local! {
    /// What happens to this thread at such a place.
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

fn reach(point: Point) {
    // Not in its place while it runs: it may come to such a place itself, or panic.
    let Some(mut hook) = HOOK.take() else {
        return;
    };
    hook(point);
    HOOK.set(Some(hook));
}

/// From now on, in this thread.
fn on(hook: impl FnMut(Point) + 'static) {
    HOOK.set(Some(Box::new(hook)));
}

/// When this thread comes there for the first time.
fn once_at(here: Point, action: impl FnOnce() + 'static) {
    let mut action = Some(action);
    on(move |point| {
        if point == here
            && let Some(action) = action.take()
        {
            action();
        }
    });
}

/// Panics once, when this thread comes there for the `times`th time.
fn panic_at(here: Point, mut times: usize) {
    on(move |point| {
        times -= usize::from(point == here);
        assert!(times > 0, "as the test wants it");
    });
}

/// How many changes there were.
struct Count {
    changes: u64,
    /// Changed after the other, so that half a change shows.
    twin: u64,
}

impl Clone for Count {
    fn clone(&self) -> Self {
        reach(Point::Copy);
        Self { changes: self.changes, twin: self.twin }
    }
}

/// Whether it panics whoever carries it out.
struct Change {
    panics: bool,
}

const ONE: Change = Change { panics: false };

impl Clone for Change {
    fn clone(&self) -> Self {
        reach(Point::Clone);
        Self { panics: self.panics }
    }
}

impl Dispatch for Count {
    type Read<'a> = ();
    type Found = u64;
    type Write = Change;
    type Done = u64;

    fn read(&self, (): ()) -> u64 {
        reach(Point::Question);
        assert_eq!(self.changes, self.twin, "half a change is seen");
        self.changes
    }

    fn write(&mut self, change: Change) -> u64 {
        self.changes += 1;
        reach(Point::Change);
        assert!(!change.panics, "as the test wants it");
        self.twin += 1;
        self.changes
    }
}

fn structure(options: Options) -> NodeReplicated<Count> {
    NodeReplicated::new(Count { changes: 0, twin: 0 }, options)
}

fn usual(log_entries: usize) -> NodeReplicated<Count> {
    structure(Options { log_entries, ..Options::default() })
}

fn patient(patience: Duration) -> NodeReplicated<Count> {
    structure(Options { patience, ..Options::default() })
}

fn state_of(all: &NodeReplicated<Count>, name: &str) -> State {
    all.members().iter().find(|member| member.name == name).expect("there").state
}

fn write(replica: &mut Replica<Count>, times: u64) {
    for _ in 0..times {
        replica.write(ONE).expect("nobody is in the way");
    }
}

/// What the call says; None: it panicked.
fn attempt<R>(call: impl FnOnce() -> R) -> Option<R> {
    catch_unwind(AssertUnwindSafe(call)).ok()
}

#[test]
fn a_copy_that_panics_leaves_the_replica_put_out_and_spoils_nobody_elses() {
    let all = usual(2);
    let (mut writer, mut late) = (all.replica("writer"), all.replica("late"));
    write(&mut writer, 5);
    panic_at(Point::Copy, 1);
    assert_eq!(attempt(|| late.read(())), None);
    assert_eq!(state_of(&all, "late"), State::Evicted);
    assert_eq!(writer.write(ONE), Ok(6), "what writers work on is whole");
    assert_eq!(late.read(()), 6, "its old copy is not passed off as the newest");

    panic_at(Point::Copy, 1);
    assert!(attempt(|| all.replica("guest")).is_none());
    assert_eq!(all.members().len(), 2, "nobody has come");
    write(&mut writer, 5);
    assert_eq!(all.replica("guest").read(()), 11);
}

#[test]
fn a_clone_that_panics_in_a_replica_loses_no_change_and_does_none_twice() {
    let all = usual(64);
    let (mut writer, mut late) = (all.replica("writer"), all.replica("late"));
    write(&mut writer, 60);
    for times in [1, 20] {
        panic_at(Point::Clone, times);
        assert_eq!(attempt(|| late.read(())), None);
        assert_eq!(late.held().changes, 0, "as of before");
    }
    write(&mut writer, 1);
    assert_eq!(late.read(()), 61);
    assert!(all.members().iter().all(|member| member.evictions == 0), "it is copied on, not anew");
}

#[test]
fn a_change_that_panics_in_one_replica_alone_has_it_copied_anew() {
    let all = usual(64);
    let (mut writer, mut late) = (all.replica("writer"), all.replica("late"));
    write(&mut writer, 40);
    panic_at(Point::Change, 10);
    assert_eq!(attempt(|| late.read(())), None);
    assert!(attempt(|| late.held().changes).is_none(), "half a change is not shown");
    write(&mut writer, 1);
    assert_eq!(late.read(()), 41);
}

#[test]
fn a_question_that_panics_spoils_nothing_and_its_replica_can_go() {
    let all = usual(8);
    let (mut writer, mut asks) = (all.replica("writer"), all.replica("asks"));
    write(&mut writer, 3);
    panic_at(Point::Question, 1);
    assert_eq!(attempt(|| asks.read(())), None);
    assert_eq!((asks.held().changes, asks.read(())), (3, 3));
    let goes = thread::spawn(move || {
        panic_at(Point::Question, 1);
        asks.read(())
    });
    goes.join().expect_err("it panics, and its replica goes");
    write(&mut writer, 20);
    assert_eq!(all.members().len(), 1);
}

/// Four changes, in one batch unless a thread was late: the first stands still until the others are
/// posted, and the third panics. Says how many were told that nothing was written.
fn batch_of_four() -> usize {
    let all = usual(16);
    let mut replicas: Vec<_> =
        ["stands", "plain", "panics", "last"].map(|name| all.replica(name)).into();
    let stands = Arc::new(AtomicBool::new(false));
    let mut told = 0;
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (place, replica) in replicas.iter_mut().enumerate() {
            let stands = Arc::clone(&stands);
            threads.push(scope.spawn(move || {
                if place == 0 {
                    once_at(Point::Change, move || {
                        stands.store(true, Ordering::Release);
                        thread::sleep(Duration::from_millis(60));
                    });
                } else {
                    while !stands.load(Ordering::Acquire) {
                        thread::yield_now();
                    }
                }
                let change = Change { panics: place == 2 };
                let answer = attempt(|| replica.write(change));
                // Whoever carried the batch out has panicked, and is told from now on like others.
                let again = replica.write(ONE);
                (answer, again)
            }));
        }
        for thread in threads {
            let (answer, again) = thread.join().expect("ends well");
            told += usize::from(answer == Some(Err(WriteError::Poisoned)));
            if answer.is_none() || answer == Some(Err(WriteError::Poisoned)) {
                assert_eq!(again, Err(WriteError::Poisoned));
            }
        }
    });
    for replica in &mut replicas {
        assert_eq!(replica.write(ONE), Err(WriteError::Poisoned));
    }
    let seen: Vec<_> = replicas.iter_mut().map(|replica| replica.read(())).collect();
    assert!(seen.iter().all(|one| *one == seen[0]), "reads go on, and agree: {seen:?}");
    assert!(told < 3 || seen[0] == 0, "who was told that nothing was written sees nothing");
    assert_eq!(all.members().len(), 4, "how they are can still be asked");
    assert!(attempt(|| all.replica("guest")).is_none(), "there is nothing to copy");
    told
}

#[test]
fn a_batch_that_panics_is_told_to_everybody_whose_change_was_in_it() {
    let rounds = 20;
    assert!(
        (0..rounds).any(|_| batch_of_four() == 3),
        "one thread panicked with the other three changes, at least once in {rounds} rounds"
    );
}

#[test]
fn who_stands_still_while_it_copies_keeps_the_log_and_no_reader() {
    let all = usual(4);
    let (mut writer, mut other) = (all.replica("writer"), all.replica("other"));
    let mut stuck = all.replica("stuck");
    let number = stuck.number();
    write(&mut writer, 4);
    assert_eq!(other.read(()), 4);
    let (stands, stood) = channel();
    let (goes_on, go_on) = channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            once_at(Point::Clone, move || {
                stands.send(()).expect("waited for");
                go_on.recv().expect("told");
            });
            assert_eq!(stuck.read(()), 4);
        });
        stood.recv().expect("it copies");
        let refused = WriteError::NoRoom { number, name: "stuck".to_owned() };
        assert_eq!(writer.write(ONE), Err(refused));
        assert_eq!((other.read(()), writer.read(())), (4, 4), "nothing was written");
        assert_eq!(all.replica("guest").read(()), 4);
        goes_on.send(()).expect("it waits");
    });
    assert_eq!(writer.write(ONE), Ok(5), "what was refused is not done later");
    assert_eq!(other.read(()), 5);
}

/// Each change that the reader carries out is followed by another one before the next.
#[test]
fn a_read_ends_however_quick_the_writers_are() {
    const WRITTEN: u64 = 10;
    const MOST: u64 = 300;
    let all = usual(1024);
    let (mut writer, mut reader) = (all.replica("writer"), all.replica("reader"));
    write(&mut writer, WRITTEN);
    let (asks, asked) = channel();
    let ready = Arc::new(Barrier::new(2));
    thread::scope(|scope| {
        let answers = Arc::clone(&ready);
        scope.spawn(move || {
            while let Ok(()) = asked.recv() {
                write(&mut writer, 1);
                answers.wait();
            }
        });
        let mut left = MOST;
        on(move |point| {
            if point == Point::Change && left > 0 {
                left -= 1;
                asks.send(()).expect("the writer is there");
                ready.wait();
            }
        });
        let seen = reader.read(());
        HOOK.take();
        assert_eq!(seen, WRITTEN, "as of its beginning");
    });
    assert_eq!(reader.read(()), 2 * WRITTEN);
}

#[test]
fn a_change_that_writes_to_its_own_structure_is_refused_and_nobody_hangs() {
    let all = patient(Duration::from_millis(5));
    let (mut writer, mut inner) = (all.replica("writer"), all.replica("inner"));
    let number = writer.number();
    let (says, said) = channel();
    once_at(Point::Change, move || {
        says.send((inner.write(ONE), inner.read(()))).expect("waited for");
    });
    assert_eq!(writer.write(ONE), Ok(1));
    let busy = Err(WriteError::Busy { combiner: number });
    assert_eq!(said.recv(), Ok((busy, 0)));
    assert_eq!((writer.write(ONE), writer.read(())), (Ok(2), 2));
}

#[test]
fn patience_without_end_is_no_overflow() {
    let all = patient(Duration::MAX);
    let (mut stands, mut waits) = (all.replica("stands"), all.replica("waits"));
    let begun = Arc::new(Barrier::new(2));
    thread::scope(|scope| {
        let begins = Arc::clone(&begun);
        scope.spawn(move || {
            once_at(Point::Change, move || {
                begins.wait();
                thread::sleep(Duration::from_millis(30));
            });
            stands.write(ONE).expect("written")
        });
        begun.wait();
        assert_eq!(waits.write(ONE), Ok(2));
    });
}
