//! What goes into the target and what comes out: the seam to the executor.
//!
//! Commands, their results, path states and refusals are, one to one, those of
//! `tercet_replication::api`: this crate stands beside replication, the engine maps between them.

use bytes::Bytes;
use tercet_proto::{BlockRange, Token, VolumeId};

use crate::auth::Computation;
use crate::pdu::Fatal;

/// A TCP connection; drawn by the executor, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// An association (rule H3): one admin queue and its I/O queues. Drawn by the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AssociationId(pub u64);

/// Who a host is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostIdentity {
    /// Host NQN.
    pub nqn: String,
    /// The 128-bit host identifier.
    pub id: [u8; 16],
}

/// A host's command on a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read blocks.
    Read(BlockRange),
    /// Write blocks.
    Write(BlockRange, Bytes),
    /// Write zeroes, or deallocate when the flag says so.
    Zero(BlockRange, bool),
    /// A barrier.
    Flush,
    /// Compare blocks with these bytes.
    Compare(BlockRange, Bytes),
    /// Compare blocks with the first bytes and, only if they are equal, write the second, with no
    /// other change of them in between.
    CompareWrite(BlockRange, Bytes, Bytes),
}

/// How a command ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Done {
    /// Done.
    Ok,
    /// A read's bytes in order.
    Data(Vec<Bytes>),
    /// A compare found the first difference in this block.
    Differs(u64),
}

/// How a command ended otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// Not (any more) the serving primary: ANA inaccessible (rule H2).
    Inaccessible,
    /// Outside the volume.
    OutOfRange,
    /// The host may only read.
    ReadOnly,
    /// The device is full; nothing was changed.
    NoSpace,
    /// The block cannot be read.
    Media,
}

/// ANA state of this node's path to a volume (rule H1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ana {
    /// Serving primary with its lease.
    Optimized,
    /// Everything else.
    Inaccessible,
    /// On the way to optimized here, for at most ANATT.
    Change,
}

/// Why a host may not connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No replica of that volume here.
    NoVolume,
    /// The host NQN is not among the attachments.
    NotAllowed,
}

/// CNTLIDs that this member may give (rule H1: distinct from the other members').
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CntlidRange {
    /// The first, at least 1.
    pub first: u16,
    /// The last, at most [`crate::fabrics::CNTLID_MAX`].
    pub last: u16,
}

impl CntlidRange {
    /// CNTLIDs of each member when the range of all is divided.
    pub const SHARE: u16 = 0x1000;

    /// The share of member `index`, 0 to 14.
    pub fn of_member(index: u16) -> Self {
        assert!(index < 15, "CNTLIDs are divided into fifteen shares");
        let first = index * Self::SHARE + 1;
        Self { first, last: first + Self::SHARE - 1 }
    }
}

/// Why the target closes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// What the peer sent is not NVMe/TCP, or not at this point.
    #[error("malformed input: {0}")]
    Malformed(#[from] Fatal),
    /// The host sent a termination request.
    #[error("the host ended the connection with transport error {status:#x} ({information:#x})")]
    Terminated {
        /// FES.
        status: u16,
        /// FEI.
        information: u32,
    },
    /// The host disconnected the queue.
    #[error("the host disconnected the queue")]
    Disconnected,
    /// No queue was connected in time.
    #[error("no queue was connected within {}s", super::HANDSHAKE_TIMEOUT.as_secs())]
    Handshake,
    /// The host did not show that it knows its secret.
    #[error("the host was not authenticated")]
    Authentication,
    /// Others that have no queue either came after it.
    #[error("too many connections without a queue: newer ones came")]
    Crowded,
    /// The Keep Alive timer expired.
    #[error("the host's keep-alive timer expired")]
    KeepAlive,
    /// Another queue's connection was lost, or the controller was reset.
    #[error("the association ended with another of its connections")]
    Association,
    /// The executor's word: demotion, a new association of the same host, a volume taken away.
    #[error("the association was ended by this node")]
    Ended,
}

/// What the executor shall do, in order.
#[derive(Debug)]
pub enum Effect {
    /// There is output on this connection: take and send it.
    Send(ConnectionId),
    /// The target has forgotten the connection. Send what was taken before and these last bytes,
    /// for a bounded time, and close the socket.
    Close(ConnectionId, Vec<Bytes>, CloseReason),
    /// A host connected an admin queue, and has shown that it is that host if it has a secret;
    /// answered by [`super::Target::accepted`].
    HostConnect(VolumeId, AssociationId, HostIdentity),
    /// The association is gone, and not on the executor's word.
    HostGone(AssociationId),
    /// The host has been sent the ANA log page as it is now (rule H4).
    HostReadAna(AssociationId),
    /// A command; answered by [`super::Target::done`].
    HostCommand(AssociationId, Token, Command),
    /// Something to compute for a connection's authentication, where it holds nobody up, with random
    /// bytes; answered by [`super::Target::computed`].
    Compute(ConnectionId, Computation),
    /// A Connect for a volume that this target does not have. The connection waits: move it to the
    /// target that has the volume ([`super::Target::detach`], [`super::Target::adopt`]) or
    /// [`super::Target::refuse`] it.
    Elsewhere(ConnectionId, VolumeId),
}
