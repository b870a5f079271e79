//! One thread, many replicas, any order of calls (proptest): each answer is that of a structure that
//! is there once. The log is so short that replicas are put out and copied anew all the time.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use common::{Add, REGISTERS, Registers, evidence};
use proptest::collection::vec;
use proptest::prelude::*;
use tercet_noderep::{Dispatch, NodeReplicated, Options, State};

const REPLICAS: usize = 4;

#[derive(Clone, Copy, Debug)]
enum Step {
    Read(usize, usize),
    Write(usize, Add),
    /// The replica is dropped, and another takes its place.
    Renew(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let (replica, register) = (0..REPLICAS, 0..REGISTERS);
    prop_oneof![
        4 => (replica.clone(), register.clone()).prop_map(|(r, x)| Step::Read(r, x)),
        6 => (replica.clone(), register, 1..9_u64).prop_map(|(replica, register, amount)| {
            Step::Write(replica, Add { register, amount })
        }),
        1 => replica.prop_map(Step::Renew),
    ]
}

#[test]
fn answers_are_those_of_a_structure_that_is_there_once() {
    let started = Instant::now();
    let (steps, evictions) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let cases = if cfg!(miri) { 5 } else { 500 };
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(script in vec(step(), 1..200), log_bits in 1..4_u32)| {
        let options = Options { log_entries: 1 << log_bits, ..Options::default() };
        let all = NodeReplicated::new(Registers::default(), options);
        let mut replicas: Vec<_> = (0..REPLICAS).map(|_| all.replica("one")).collect();
        let mut model = Registers::default();
        for step in &script {
            match *step {
                Step::Read(replica, register) => {
                    prop_assert_eq!(replicas[replica].read(register), model.read(register));
                }
                Step::Write(replica, add) => {
                    let was = replicas[replica].write(add).expect("nobody is in the way");
                    prop_assert_eq!(was, model.write(add));
                }
                Step::Renew(replica) => replicas[replica] = all.replica("another"),
            }
        }
        let members = all.members();
        prop_assert_eq!(members.len(), REPLICAS);
        for member in &members {
            evictions.fetch_add(member.evictions as usize, Ordering::Relaxed);
            if let State::Lags(lag) = member.state {
                prop_assert!(lag <= 1 << log_bits);
            }
        }
        for replica in &mut replicas {
            prop_assert_eq!(replica.latest(), &model);
        }
        steps.fetch_add(script.len(), Ordering::Relaxed);
    });
    assert!(evictions.into_inner() > 0, "the scripts are too tame");
    evidence("noderep_model_operations", steps.into_inner(), started);
}
