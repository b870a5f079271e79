//! Who this shard is, the times it goes by and the limits it keeps.

use std::time::Duration;

use tercet_proto::{InstanceId, Instant, NodeName};

/// Who this shard is; drawn and read by the executor at start.
#[derive(Clone, Debug, Hash)]
pub struct Identity {
    /// This node.
    pub node: NodeName,
    /// This start of the engine.
    pub instance: InstanceId,
    /// This shard's number on this node.
    pub shard: u16,
    /// When the lock of R3 was got: L4 counts from here.
    pub locked_at: Instant,
}

/// The times of the protocol. All nodes have the same `lease`.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Timing {
    /// D of rule L2.
    pub lease: Duration,
    /// Between two beats of a pair, and between two tries of anything that may have been lost.
    pub beat: Duration,
    /// T2: without an echo for so long, the primary is missed.
    pub missing_after: Duration,
    /// T2: a new primary has to serve within this time of its compare-and-swap.
    pub serve_within: Duration,
    /// T2: the worse tail stands so much later, for each better one.
    pub stand_step: Duration,
    /// T2: who did not serve stands aside for this long, then twice as long, and so on.
    pub aside_min: Duration,
    /// T2: the longest time to stand aside.
    pub aside_max: Duration,
    /// W5: a commit that no entry carries is announced after this time.
    pub announce_after: Duration,
    /// T3: without the agent's answer for so long, the outcome of a swap is unknown.
    pub swap_answer: Duration,
    /// A hand-over for which nobody stands within this time is called off; who stands has as long
    /// again for its swap. The old primary serves meanwhile.
    pub hand_over: Duration,
    /// Hand-over, after the swap: so long the old primary may answer what it has before it gives its
    /// lease back. The new one waits half as long again, then seals whatever became of it.
    pub drain: Duration,
    /// M1: while only the set before a change answers, for so long the change is not taken back.
    pub abort_after: Duration,
    /// C3: hosts that asked for nothing for so long leave a copy all of the bandwidth.
    pub copy_quiet: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(1),
            beat: Duration::from_millis(250),
            missing_after: Duration::from_millis(700),
            serve_within: Duration::from_secs(3),
            stand_step: Duration::from_millis(100),
            aside_min: Duration::from_secs(1),
            aside_max: Duration::from_secs(30),
            announce_after: Duration::from_millis(5),
            swap_answer: Duration::from_secs(10),
            hand_over: Duration::from_secs(2),
            drain: Duration::from_millis(100),
            abort_after: Duration::from_secs(5),
            copy_quiet: Duration::from_millis(500),
        }
    }
}

impl Timing {
    /// How long a holder counts a grant from when it sent the request: D less 3 % (L2).
    pub(crate) fn held(&self) -> Duration {
        self.lease * 97 / 100
    }
}

/// What bounds the queues.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Limits {
    /// W7: entries that a secondary may be behind before it is served from the log.
    pub recent_entries: usize,
    /// W7: the same in bytes of payload.
    pub recent_bytes: usize,
    /// C1: bytes of payload read from the log and sent at a time.
    pub chunk_bytes: usize,
    /// Commands of hosts that wait for the log, the lease or an older association's entries.
    pub held_commands: usize,
    /// Entries that are appended and not committed.
    pub window_entries: usize,
    /// Snapshots, growths and the like that are not committed.
    pub controls: usize,
    /// C3: bytes a second that a copy sends to a member while hosts are at work.
    pub copy_busy_bytes_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            recent_entries: 1024,
            recent_bytes: 4 << 20,
            chunk_bytes: 1 << 20,
            held_commands: 1024,
            window_entries: 4096,
            controls: 64,
            copy_busy_bytes_s: 32 << 20,
        }
    }
}

/// A rule that is broken on purpose, to show that the tests have teeth. Each names its rule.
#[cfg(feature = "canary")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Canary {
    /// W4: a host gets its completion when the primary alone is durable.
    AckBeforeMajority,
    /// T4: acknowledgements of the older epoch still leave after the promise.
    AckAfterPromise,
    /// W3: durable entries are acknowledged, matched or not.
    AckUnmatchedSuffix,
    /// W5: durable entries are applied, matched or not.
    ApplyUnmatchedSuffix,
    /// T4: an older epoch is promised after a newer one.
    IgnorePromised,
    /// A number of an epoch is promised to two instances.
    PromiseTwoInstances,
    /// T1: a restarted engine goes on in the epoch that it led.
    ResumeOldEpoch,
    /// T6: copies of an older epoch's entry are counted.
    CountOlderEntry,
    /// L1: reads are answered without a lease.
    ReadWithoutLease,
    /// L3: a pair's grant counts for a volume that its granter is sealing.
    PairGrantForSealed,
    /// L4: a restarted replica completes a seal at once.
    ForgetGrants,
    /// L5: the exit of one instance counts for whichever its node has.
    ExitOfAnyInstance,
    /// L2, T4: a seal does not wait for the grants that are out.
    SealWithoutWait,
    /// H2: a secondary keeps a host's command and runs it when it is promoted.
    QueueOnSecondary,
    /// H4: a demotion keeps the associations.
    KeepAssociations,
    /// H3: a host that came again does I/O before its older association's entries are committed.
    ServeReconnectEarly,
    /// T5: an incomplete replica's tail is adopted.
    AdoptIncomplete,
    /// T5: the first majority's tail is adopted, without asking which is the largest.
    AdoptOwn,
    /// T9: a missing replica counts as an empty one.
    EmptyReplica,
    /// M1: while members change the new set's majority is enough.
    NewSetAlone,
    /// L1: a fused compare-and-write waits for nothing that overlaps it.
    CompareAtOnce,
    /// L5: a primary goes on serving after it has given its lease back.
    ServeAfterGiveBack,
}

/// Everything a [`crate::Node`] is told at its start.
#[derive(Clone, Debug, Hash)]
pub struct Options {
    /// Who it is.
    pub identity: Identity,
    /// Times.
    pub timing: Timing,
    /// Limits.
    pub limits: Limits,
    /// A rule to break.
    #[cfg(feature = "canary")]
    pub canary: Option<Canary>,
}

impl Options {
    /// With default times and limits.
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            timing: Timing::default(),
            limits: Limits::default(),
            #[cfg(feature = "canary")]
            canary: None,
        }
    }
}

/// Whether a canary is on; always false, and compiled away, without the feature.
macro_rules! canary {
    ($options:expr, $name:ident) => {{
        #[cfg(feature = "canary")]
        let broken = $options.canary == Some($crate::options::Canary::$name);
        #[cfg(not(feature = "canary"))]
        let broken = {
            let _ = &$options;
            false
        };
        broken
    }};
}
pub(crate) use canary;
