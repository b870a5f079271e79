//! Rules broken on purpose, one at a time: for each the check has to find a counterexample.
//!
//! Only the rules that the model can express are here; hosts (H2 to H4), damage (R1) and incomplete
//! replicas (T5) are the simulator's. What these bounds do not show: docs/testing-model.md.

use tercet_replication::options::Canary;

/// A broken rule, and the space in which it shows.
#[derive(Clone, Copy, Debug)]
pub struct Bird {
    /// How it is called.
    pub name: &'static str,
    /// The rule.
    pub rule: &'static str,
    /// What is broken.
    pub canary: Canary,
    /// Where.
    pub space: &'static str,
}

macro_rules! birds {
    ($($canary:ident, $rule:literal, $space:literal;)*) => {
        /// All of them.
        pub const BIRDS: &[Bird] = &[$(Bird {
            name: stringify!($canary),
            rule: $rule,
            canary: Canary::$canary,
            space: $space,
        }),*];
    };
}

birds! {
    AckBeforeMajority, "W4", "takeover";
    AckAfterPromise, "T4", "takeover";
    ApplyUnmatchedSuffix, "W5", "two-takeovers";
    ResumeOldEpoch, "T1", "crash";
    ReadWithoutLease, "L1", "lease";
    PairGrantForSealed, "L3", "lease";
    SealWithoutWait, "T4, L2", "lease";
    AdoptOwn, "T5", "takeover";
    ServeAfterGiveBack, "L5", "hand-over";
}
