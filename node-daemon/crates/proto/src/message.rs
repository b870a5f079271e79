//! Messages between engines: what they say. Their bytes are in [`codec`] and, byte for byte, in
//! `docs/replication-protocol.md`.
//!
//! Two kinds. A message between *replicas* names volume, both replicas, the sender's instance and
//! the epoch that it is about; what does not fit is dropped (replication.md, State). A message
//! between *pairs* of shards names both instances, because leases and liveness belong to two
//! starts of two engines and to nothing else (rule L3). What to do with either is left to
//! `tercet-replication`; links, order and encryption to the executor: every message may be lost,
//! doubled or overtaken.

mod codec;
mod copy;
mod hand_over;
mod repair;
mod wire;

pub use codec::{
    BODY_BYTES_MAX, Decoder, HEADER_BYTES, PAYLOAD_BYTES_MAX, WireError, crc32c, encode,
    encode_hello, encode_proven_exit,
};

pub use copy::CopyMessage;
pub use hand_over::{HandOverMessage, NotFollowing};
pub use repair::{Declined, RepairMessage};

use crate::config::Config;
use crate::entry::{Entry, Place};
use crate::ids::{Epoch, InstanceId, Lsn, NodeName, ReplicaId, VolumeId};
use crate::storage::Incomplete;

/// The version of the protocol that this crate speaks, and the oldest one that it still does.
pub const VERSION: u16 = 4;
/// The oldest version of the protocol that this crate still speaks.
pub const VERSION_MIN: u16 = 1;
/// From this version on a member swaps while the primary still serves (hand-over).
pub const VERSION_HAND_OVER: u16 = 4;
/// Most entries in one message.
pub const ENTRIES_MAX: usize = 1024;
/// Most exclusions in one answer to a beat; more follow with the next.
pub const EXCLUSIONS_MAX: usize = 1024;
/// Most instances in one message about proven exits.
pub const EXITS_MAX: usize = 16;
/// Most instances in a seal: the voters of two sets.
pub const SEALED_MAX: usize = 6;

/// First frame in each direction of a link: who is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version spoken.
    pub version_min: u16,
    /// Newest version spoken; the link uses the smaller of the two newest.
    pub version_max: u16,
    /// The cluster: links between two clusters are closed.
    pub cluster: [u8; 16],
    /// The sender's node.
    pub node: NodeName,
    /// The start of its engine.
    pub instance: InstanceId,
    /// The shard that speaks.
    pub shard: u16,
    /// How many shards its engine has.
    pub shards: u16,
    /// The shard that is spoken to.
    pub to_shard: u16,
}

impl Hello {
    /// The version that both speak, if there is one.
    pub fn common_version(&self, other: &Self) -> Option<u16> {
        let version = self.version_max.min(other.version_max);
        (version >= self.version_min && version >= other.version_min).then_some(version)
    }
}

/// The only frame of a connection that is no link: instances have ended, proven (L5). An engine
/// that starts says it while it replays its log, before it could speak on a link. Negotiated is
/// nothing: an engine that does not know the frame closes the connection, and hears of the exit when
/// there is a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProvenExit {
    /// The cluster: what another one says counts for nothing here.
    pub cluster: [u8; 16],
    /// The sender's node, on which that instance was.
    pub node: NodeName,
    /// Who says so.
    pub instance: InstanceId,
    /// Who has ended: at least one, at most [`EXITS_MAX`].
    pub exited: Vec<InstanceId>,
}

/// What a connection carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Alone on its connection.
    ProvenExit(ProvenExit),
    /// First on a link, once.
    Hello(Hello),
    /// Everything after.
    Message(Message),
}

/// A message from one engine's shard to another's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// Between two replicas of a volume.
    Replica(Envelope, ReplicaMessage),
    /// Between two shards.
    Pair(PairEnvelope, PairMessage),
}

impl Message {
    /// The version of the protocol that it came with: who speaks only an older one is not sent it,
    /// and its frame says so.
    pub fn version(&self) -> u16 {
        match self {
            Self::Replica(_, ReplicaMessage::Copy(_)) => 2,
            Self::Replica(_, ReplicaMessage::Repair(_)) => 3,
            Self::Replica(_, ReplicaMessage::HandOver(_)) => VERSION_HAND_OVER,
            _ => 1,
        }
    }
}

/// What each message between replicas names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Envelope {
    /// The volume.
    pub volume: VolumeId,
    /// The sender's replica.
    pub from: ReplicaId,
    /// The replica that is meant.
    pub to: ReplicaId,
    /// The sender's instance.
    pub instance: InstanceId,
    /// The epoch that it is about.
    pub epoch: Epoch,
}

/// What each message between pairs names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PairEnvelope {
    /// The sender's instance.
    pub instance: InstanceId,
    /// The instance that is meant.
    pub to_instance: InstanceId,
}

/// What replicas say to each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ReplicaMessage {
    /// Primary to secondary: take these entries directly after `prev` (W1, W2). Without entries it
    /// asks whether `prev` matches and announces the commit.
    Append {
        /// The entry directly before the first one here.
        prev: Place,
        /// Everything up to here is committed (W5).
        commit: Place,
        /// In order, without a gap.
        entries: Vec<Entry>,
    },
    /// Secondary to primary: durable and matched in this epoch up to here (W3).
    Ack {
        /// The length.
        length: Lsn,
        /// Matched in this epoch up to here, durable or not: nothing has to be sent again.
        matched: Lsn,
        /// The commit that it has heard of.
        commit: Lsn,
    },
    /// Secondary to primary: `named` is not in my log (W2).
    Refuse {
        /// What was named as previous.
        named: Place,
        /// Applied here: never dropped.
        applied: Place,
        /// My last entry that is not after the named one, in epoch and in lsn.
        hint: Place,
        /// I am incomplete and take nothing.
        incomplete: bool,
    },
    /// New primary to a voter: accept nothing older, promise me this configuration (T4).
    Seal {
        /// What is to be promised.
        config: Config,
        /// Instances whose own seal answer the new primary has: nobody waits out their grants.
        sealed: Vec<InstanceId>,
    },
    /// The answer, after the promise is durable and grants are waited out (T4).
    Sealed(Tail),
    /// I have promised something newer, or this epoch to another instance: stop (T8).
    Newer {
        /// The configuration that I have promised.
        config: Config,
    },
    /// The replica that you named is not here (T9).
    NoReplica,
    /// Member to member: do you miss the primary of this epoch as well (T2)?
    Consult,
    /// The answer.
    Opinion {
        /// Whether I do.
        misses: bool,
        /// How far I am, so that the better tail goes first.
        tail: Tail,
    },
    /// New primary to the one with the largest tail: what follows this place (T5)?
    Fetch {
        /// The asker's last entry.
        after: Place,
    },
    /// Entries directly after the named one; none when it is not in my log: then `hint`.
    Fetched {
        /// What was asked.
        after: Place,
        /// My last entry that is not after it, in epoch and in lsn.
        hint: Place,
        /// In order, without a gap.
        entries: Vec<Entry>,
    },
    /// Primary to members: I answer no read in this epoch any more, for ever (L5).
    GiveBack,
    /// Primary to the member that shall follow it: stand now (hand-over to one of an older version).
    Stand,
    /// Of a copy (C2).
    Copy(CopyMessage),
    /// Of a repair (C4).
    Repair(RepairMessage),
    /// Of a hand-over (T10).
    HandOver(HandOverMessage),
}

/// What a replica says of its log (T2, T4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tail {
    /// Its last entry, durable.
    pub tail: Place,
    /// The largest commit that it has heard of.
    pub commit: Place,
    /// The first entry that its log still has.
    pub log_start: Lsn,
    /// Not fit to be adopted (T5).
    pub incomplete: Option<Incomplete>,
}

/// What shards say to each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PairMessage {
    /// I am here, and ask for a grant (L2).
    Beat {
        /// Counts up; the holder knows when it sent which.
        number: u64,
        /// The exclusions up to this number are processed here (L3).
        processed: u64,
    },
    /// I heard you (T2), and grant what is not excluded (L2, L3).
    BeatAnswer {
        /// Of the beat.
        number: u64,
        /// Whether it is a grant: not when exclusions are left that did not fit.
        grant: bool,
        /// My store has failed: do not count on me (T2).
        failed: bool,
        /// The number of exclusions up to which this message goes.
        exclusions_upto: u64,
        /// Volumes for which I grant nothing in this epoch or an older one (L3): all after the
        /// number that the beat named as processed.
        exclusions: Vec<(VolumeId, Epoch)>,
    },
    /// An instance that was on the sender's node has ended, proven (L5).
    Exited {
        /// Which.
        instance: InstanceId,
    },
}
