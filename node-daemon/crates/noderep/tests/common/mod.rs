//! What the tests of this crate share: a structure whose answers give much away, a checker of
//! histories, rows of evidence.
//!
//! The checker (Wing and Gong, with Lowe's memory of what was tried) searches for an order of all
//! calls that a single-threaded structure could have answered like this and in which no call is
//! before one that had ended when it began. It is exponential in calls at the same time, not in
//! calls; histories here are of some dozen. It does not know of calls without an answer: a write
//! that was refused must be as if it had never been, so it is left out.

#![allow(dead_code)] // each test uses its part

use std::collections::HashSet;
use std::time::Instant;

#[cfg(feature = "canary")]
use tercet_noderep::Canary;
use tercet_noderep::Dispatch;

/// Environment variable with the name of the rule to break.
#[cfg(feature = "canary")]
const CANARY: &str = "TERCET_NODEREP_CANARY";
#[cfg(feature = "canary")]
const CANARIES: [Canary; 9] = [
    Canary::TailRelaxed,
    Canary::LookRelaxed,
    Canary::PositionRelaxed,
    Canary::ReclaimAll,
    Canary::EvictCopying,
    Canary::AnswerRelaxed,
    Canary::AnswerEarly,
    Canary::StaleRead,
    Canary::ForgetEviction,
];

/// Registers of the structure.
pub const REGISTERS: usize = 3;

/// A few numbers. `twin` is changed after `values`, so that half a change shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Registers {
    values: [u64; REGISTERS],
    changes: u64,
    twin: u64,
}

/// Add to a register; gives what was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Add {
    pub register: usize,
    pub amount: u64,
}

impl Dispatch for Registers {
    type Read<'a> = usize;
    type Found = u64;
    type Write = Add;
    type Done = u64;

    fn read(&self, register: usize) -> u64 {
        self.assert_whole();
        self.values[register]
    }

    fn write(&mut self, Add { register, amount }: Add) -> u64 {
        self.changes += 1;
        let was = self.values[register];
        self.values[register] += amount;
        self.twin += 1;
        was
    }
}

impl Registers {
    pub fn assert_whole(&self) {
        assert_eq!(self.changes, self.twin, "half a change is seen");
    }

    pub fn changes(&self) -> u64 {
        self.changes
    }
}

/// What a thread did.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    Read(usize),
    Write(Add),
}

/// A call and its answer; times are of one clock that never stands still.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub begun: u64,
    pub ended: u64,
    pub operation: Operation,
    pub answer: u64,
}

/// Whether one thread could have given these answers.
pub fn is_linearizable(calls: &[Call]) -> bool {
    assert!(calls.len() <= 64, "one bit for each call");
    let mut tried = HashSet::new();
    let mut ways = vec![(0_u64, Registers::default())];
    let all = if calls.len() == 64 { u64::MAX } else { (1 << calls.len()) - 1 };
    while let Some((done, state)) = ways.pop() {
        if done == all {
            return true;
        }
        if !tried.insert((done, state.clone())) {
            continue;
        }
        let left = || calls.iter().enumerate().filter(|(index, _)| done >> index & 1 == 0);
        // Whoever began after another had ended cannot be before it.
        let first_end = left().map(|(_, call)| call.ended).min().expect("some are left");
        for (index, call) in left().filter(|(_, call)| call.begun < first_end) {
            let mut next = state.clone();
            let answer = match call.operation {
                Operation::Read(register) => next.read(register),
                Operation::Write(add) => next.write(add),
            };
            if answer == call.answer {
                ways.push((done | 1 << index, next));
            }
        }
    }
    false
}

/// How much more than usual is tried: `TERCET_NODEREP_TIMES`.
pub fn times() -> usize {
    std::env::var("TERCET_NODEREP_TIMES").map_or(1, |text| text.parse().expect("a number"))
}

/// A row of evidence, where somebody collects it.
pub fn evidence(name: &str, count: usize, started: Instant) {
    use std::io::Write as _;
    let seconds = started.elapsed().as_secs_f64();
    println!("{name}: {count} in {seconds:.1} s");
    if let Ok(path) = std::env::var("TERCET_EVIDENCE") {
        let opened = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let row = format!(
            "{{\"evidence\": \"{name}\", \"count\": {count}, \"violations\": 0, \
             \"seconds\": {seconds:.3}}}\n"
        );
        opened.and_then(|mut file| file.write_all(row.as_bytes())).expect("a row of evidence");
    }
}

/// The rule to break in this process.
#[cfg(feature = "canary")]
pub fn canary() -> Option<Canary> {
    let name = std::env::var(CANARY).ok()?;
    Some(*CANARIES.iter().find(|one| format!("{one:?}") == name).expect("a canary's name"))
}

/// Breaks each rule in a process of its own and runs the test there that must fail: a checker that
/// has found something may not be able to unwind.
#[cfg(feature = "canary")]
pub fn catch(name: &str, canaries: &[(Canary, &str)]) {
    let started = Instant::now();
    let run = |canary: Option<Canary>, test: &str| {
        let mut command = std::process::Command::new(std::env::current_exe().expect("itself"));
        command.args(["--exact", test]).env("RUST_BACKTRACE", "0").env_remove("TERCET_EVIDENCE");
        if let Some(canary) = canary {
            command.env(CANARY, format!("{canary:?}"));
        }
        command.output().expect("it can be run")
    };
    for (canary, test) in canaries {
        let output = run(Some(*canary), test);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = said + &String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("running 1 test"), "{test} is not there: {said}");
        assert!(!output.status.success(), "{canary:?} is not caught by {test}");
        let why = said.lines().skip_while(|line| !line.contains("panicked at")).nth(1);
        println!("{canary:?}: caught by {test}: {}", why.unwrap_or("its process died"));
    }
    evidence(name, canaries.len(), started);
}

#[test]
fn the_checker_knows_a_history_that_no_single_thread_could_give() {
    let write = |begun, ended, answer| Call {
        begun,
        ended,
        operation: Operation::Write(Add { register: 0, amount: 5 }),
        answer,
    };
    let read = |begun, ended, answer| Call { begun, ended, operation: Operation::Read(0), answer };
    assert!(is_linearizable(&[write(1, 4, 0), read(2, 3, 5), read(5, 6, 5)]));
    assert!(is_linearizable(&[write(1, 4, 0), read(2, 3, 0), read(5, 6, 5)]));
    assert!(!is_linearizable(&[write(1, 4, 0), read(2, 3, 0), read(5, 6, 0)]), "a stale read");
    assert!(!is_linearizable(&[write(1, 9, 0), read(2, 3, 5), read(4, 6, 0)]), "back in time");
    assert!(!is_linearizable(&[write(1, 3, 0), write(2, 4, 0)]), "a lost change");
}
