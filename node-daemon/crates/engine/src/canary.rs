//! A rule of the protocol that is broken on purpose, to show that what judges real processes has
//! teeth. Only in builds with the feature `canary`; which rule stands in the environment, so that
//! one build has them all.

use tercet_replication::options::Canary;
use tracing::error;

const VARIABLE: &str = "TERCET_CANARY";

/// The rule to break; none where the variable is absent.
///
/// # Panics
/// Names one that there is not: an engine that breaks no rule would show nothing.
pub fn from_environment() -> Option<Canary> {
    let name = std::env::var(VARIABLE).ok()?;
    let canary = match name.as_str() {
        "AckBeforeMajority" => Canary::AckBeforeMajority,
        "ResumeOldEpoch" => Canary::ResumeOldEpoch,
        "ReadWithoutLease" => Canary::ReadWithoutLease,
        "SealWithoutWait" => Canary::SealWithoutWait,
        "QueueOnSecondary" => Canary::QueueOnSecondary,
        "KeepAssociations" => Canary::KeepAssociations,
        "ServeReconnectEarly" => Canary::ServeReconnectEarly,
        _ => panic!("{VARIABLE}: there is no canary {name:?} for real processes"),
    };
    error!(?canary, "this engine breaks a rule on purpose");
    Some(canary)
}
