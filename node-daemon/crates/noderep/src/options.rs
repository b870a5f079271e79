//! How a structure is replicated.

use std::time::Duration;

/// Entries of the log when nothing else is said.
const LOG_ENTRIES: usize = 1024;
/// How long a writer waits for another one when nothing else is said.
const PATIENCE: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Clone, Debug)]
pub struct Options {
    /// Entries of the log, a power of two: how far a replica may lag before it has to be copied
    /// anew. Fixed memory: that many changes.
    pub log_entries: usize,
    /// How long a writer waits for another one that is at work before it gives up, with nothing
    /// written. In builds for loom and shuttle, which have no clock: as many attempts as nanoseconds.
    pub patience: Duration,
    /// The rule to break.
    #[cfg(feature = "canary")]
    pub canary: Option<Canary>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            log_entries: LOG_ENTRIES,
            patience: PATIENCE,
            #[cfg(feature = "canary")]
            canary: None,
        }
    }
}

/// A rule that is broken on purpose (docs/node-replication.md, Canaries).
#[cfg(feature = "canary")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Canary {
    /// O1: the tail is published without Release.
    TailRelaxed,
    /// O1: a replica looks at the tail without Acquire.
    LookRelaxed,
    /// O2: a replica says what it has copied without Release.
    PositionRelaxed,
    /// O2: slots are reused whatever the slowest replica has copied.
    ReclaimAll,
    /// O3: a replica that is copying is put out all the same.
    EvictCopying,
    /// O4: a seat's answer is handed over without Release.
    AnswerRelaxed,
    /// O5: writers are answered before the tail is published.
    AnswerEarly,
    /// O6: a read does not look at the tail.
    StaleRead,
    /// O7: a replica that was put out goes on from where it was.
    ForgetEviction,
}

macro_rules! broken {
    ($options:expr, $canary:ident) => {{
        #[cfg(feature = "canary")]
        let broken = $options.canary == Some($crate::options::Canary::$canary);
        #[cfg(not(feature = "canary"))]
        let broken = {
            let _ = &$options;
            false
        };
        broken
    }};
}
pub(crate) use broken;
