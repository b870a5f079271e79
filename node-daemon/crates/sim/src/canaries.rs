//! Builds with one rule broken on purpose: each has to be caught within a stated number of seeds,
//! or the tests have no teeth.
//!
//! The rules are broken in `tercet-replication` and `tercet-store` themselves (feature `canary`);
//! here is only which there are and how many seeds each may take.

use std::time::Instant;

use crate::run::{Settings, run_seeds};

/// A rule to break.
#[cfg(feature = "canary")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Canary {
    /// Of the protocol.
    Replication(tercet_replication::options::Canary),
    /// Of the store.
    Store(tercet_store::options::Canary),
}

/// There are none in this build.
#[cfg(not(feature = "canary"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Canary {}

/// A canary and its bound.
#[derive(Clone, Copy, Debug)]
pub struct Bird {
    /// Its name.
    pub name: &'static str,
    /// The rule that it breaks.
    pub canary: Canary,
    /// Seeds within which it has to be caught; 0 where that is not demanded of the simulator.
    pub seeds_max: u64,
}

/// What became of a canary.
#[derive(Clone, Debug)]
pub struct Caught {
    /// Which.
    pub name: &'static str,
    /// After how many seeds, and by what; none when it was not.
    pub by: Option<(u64, String)>,
    /// Seeds that it was given.
    pub seeds_max: u64,
    /// Wall clock.
    pub seconds: f64,
}

/// Runs seeds with a rule broken until one fails.
pub fn hunt(bird: &Bird, start: u64, jobs: usize, seeds_max: u64) -> Caught {
    let settings = Settings { telling: false, canary: Some(bird.canary) };
    let began = Instant::now();
    let summary = run_seeds(start, seeds_max, jobs, true, &settings);
    let by = summary.failed.first().map(|outcome| {
        let why = outcome.violation.clone().unwrap_or_default();
        (outcome.seed - start + 1, why)
    });
    Caught { name: bird.name, by, seeds_max, seconds: began.elapsed().as_secs_f64() }
}

/// All that this build has.
#[cfg(not(feature = "canary"))]
pub fn all() -> Vec<Bird> {
    Vec::new()
}

/// All that this build has.
#[cfg(feature = "canary")]
pub fn all() -> Vec<Bird> {
    use tercet_replication::options::Canary as R;
    use tercet_store::options::Canary as S;
    macro_rules! birds {
        ($($kind:ident $of:ident :: $name:ident $seeds:literal),* $(,)?) => {
            vec![$(Bird {
                name: stringify!($name),
                canary: Canary::$kind($of::$name),
                seeds_max: $seeds,
            }),*]
        };
    }
    // Those with 0 are known and hunted with `--only`, but not demanded here: the crates' own tests
    // show them (docs/testing-simulation.md says which).
    birds![
        Replication R::AckBeforeMajority 100,
        Replication R::AckAfterPromise 60,
        Replication R::AckUnmatchedSuffix 0,
        Replication R::ApplyUnmatchedSuffix 60,
        Replication R::IgnorePromised 100,
        Replication R::PromiseTwoInstances 0,
        Replication R::ResumeOldEpoch 200,
        Replication R::CountOlderEntry 500,
        Replication R::ReadWithoutLease 150,
        Replication R::PairGrantForSealed 0,
        Replication R::ForgetGrants 1000,
        Replication R::ExitOfAnyInstance 30,
        Replication R::SealWithoutWait 250,
        Replication R::QueueOnSecondary 30,
        Replication R::KeepAssociations 30,
        Replication R::ServeReconnectEarly 600,
        Replication R::AdoptIncomplete 0,
        Replication R::AdoptOwn 100,
        Replication R::EmptyReplica 0,
        Replication R::NewSetAlone 300,
        Replication R::CompareAtOnce 30,
        Replication R::ServeAfterGiveBack 100,
        Store S::SkipFlush 30,
        Store S::TornTailForDamage 60,
        Store S::ReuseFreedEarly 0,
        Store S::CutEarly 0,
        Store S::ForgetDrop 0,
        Store S::RepairOtherVersion 30,
        Store S::IgnoreChecksums 30,
        Store S::EmptyClone 0,
        Store S::ForgetRelease 0,
        Store S::ForgetDeadLeaf 0,
        Store S::LosePatch 0,
        Store S::ReadUnwrittenLeaf 0,
    ]
}
