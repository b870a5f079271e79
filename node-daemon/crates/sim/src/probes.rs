//! Counters for rare paths: a probe that never fired over all seeds says that the simulator does
//! not reach what it claims to test.

use std::collections::BTreeMap;
use std::fmt::Write as _;

macro_rules! probes {
    ($($(#[doc = $doc:literal])* $name:ident),* $(,)?) => {
        /// A rare path.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Probe { $($(#[doc = $doc])* $name),* }

        /// Every probe with what it means.
        pub const ALL: &[(Probe, &str)] = &[$((Probe::$name, concat!($($doc),*))),*];
    };
}

probes! {
    /// an engine was killed with host writes in flight
    KilledWithWrites,
    /// an engine restarted on the spot and proved its predecessor's exit (L5)
    ProvenExit,
    /// a peer was told of a primary's exit while the configuration still named it (L5)
    PrimaryExitTold,
    /// a node lost its power with writes that were not durable
    PowerLoss,
    /// all nodes lost their power at once
    PowerLossAll,
    /// a process stood still for longer than D and led a volume (L1)
    PausedPrimary,
    /// a second primary took over while the first one's process still ran (T4)
    TakeoverFromLiving,
    /// a takeover dropped a suffix that its log conflicted with (W2)
    Truncated,
    /// a replica's seal waited for a grant (T4)
    SealWaited,
    /// a swap whose answer was lost had taken place (T3)
    UnknownTookPlace,
    /// a swap whose answer was lost had not taken place (T3)
    UnknownDidNot,
    /// a swap was executed after its asker had been told that its outcome is unknown (T3)
    SwapLate,
    /// a swap lost its race (T3)
    SwapLost,
    /// a lagging replica caught up from the log (C1)
    CaughtUp,
    /// a primary lost its lease and got it back in the same epoch (T8)
    LeaseRegained,
    /// an incomplete replica was left out of an adoption (T5)
    IncompleteSkipped,
    /// a start found damage and marked replicas incomplete (R1)
    Damaged,
    /// a host rebooted with writes in flight (H3)
    HostRebooted,
    /// a member that was asked to follow swapped while the old primary served (T10)
    HeirSwapped,
    /// the old primary gave its lease back after its heir had swapped (T10, L5)
    GaveWay,
    /// a member that was asked to follow declined, or lost its swap (T10)
    HeirDeclined,
    /// an engine ended after its swap, while the old primary served (T10)
    HeirDied,
    /// a primary handed over to a member of an older version (T10)
    HandedOverToOlder,
    /// a command ran into a node that did not serve any more (H2)
    CommandRefused,
    /// a command was tried again elsewhere (H2)
    CommandRetried,
    /// a delayed earlier copy of a command that was tried elsewhere reached a node (H2)
    LateCopy,
    /// a compare-and-write found what it expected (L1)
    CompareWrote,
    /// a compare-and-write found something else (L1)
    CompareDiffered,
    /// a demotion ended an association (H4)
    AssociationEnded,
    /// an association was kept over a promotion (H4)
    AssociationKept,
    /// a host was fenced (H5)
    Fenced,
    /// a snapshot was taken while writes were in flight (S1)
    SnapshotDuringWrites,
    /// a clone of a snapshot was read and compared (S3)
    CloneRead,
    /// a clone's replica was made before its snapshot was applied there (S3)
    CloneIncomplete,
    /// a clone got its first configuration while one of its replicas was incomplete (S3)
    ConfiguredIncomplete,
    /// a clone's replica got its snapshot's blocks later (S3)
    CloneFilled,
    /// a replica was copied from a view (C2)
    Copied,
    /// a block went bad on one node (C4)
    BlockWentBad,
    /// a bad block was repaired from another member's version (C4)
    BlockRepaired,
    /// no member could give a bad block when it was asked for (C4)
    BlockNotRepaired,
    /// a host's read met a bad block and failed, because no member had it (C4)
    ReadFailed,
    /// a member that was lost or given up was replaced on another node (M1)
    Replaced,
    /// a replacement was withdrawn, for the node was back in time (M1)
    ReplacementWithdrawn,
    /// a change of members became Active (M1)
    ChangeFinished,
    /// a takeover carried a change of members on (M1, T3)
    ChangeCarriedOn,
    /// a change of members was taken back (M1)
    ChangeAborted,
    /// a primary that gave its place away was parted from its heir and not told (M1)
    ChangeParted,
    /// a replica that no configuration named any more was deleted (M2)
    StrayDeleted,
    /// a snapshot was deleted while a clone's replica still awaited it (S3)
    DeletedWhileAwaited,
    /// a link was cut in one direction (T2)
    CutOneWay,
    /// the API server was away while a volume had no primary (T3)
    TakeoverWithoutApi,
    /// a takeover went through while one replica was away (T4)
    TakeoverWithTwo,
    /// a device was stuck for longer than D
    DiskStuck,
    /// an engine crashed while the epoch that it was to lead was Recovering
    CrashWhileRecovering,
}

/// How often each fired.
#[derive(Clone, Debug, Default)]
pub struct Probes(BTreeMap<Probe, u64>);

impl Probes {
    /// It happened.
    pub fn hit(&mut self, probe: Probe) {
        *self.0.entry(probe).or_default() += 1;
    }

    /// How often it happened.
    pub fn count(&self, probe: Probe) -> u64 {
        self.0.get(&probe).copied().unwrap_or(0)
    }

    /// Adds another run's counts.
    pub fn add(&mut self, other: &Self) {
        for (probe, count) in &other.0 {
            *self.0.entry(*probe).or_default() += count;
        }
    }

    /// A line for each, those that never fired marked.
    pub fn report(&self) -> String {
        let mut text = String::new();
        for (probe, meaning) in ALL {
            let count = self.count(*probe);
            let mark = if count == 0 { "NEVER" } else { "" };
            writeln!(text, "{count:>9} {mark:<5} {probe:?}:{meaning}").expect("memory");
        }
        text
    }
}
