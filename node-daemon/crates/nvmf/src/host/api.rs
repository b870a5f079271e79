//! What goes into the user-space host and what comes out: the seam to its executor.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use tercet_proto::BlockRange;

use crate::auth::{Computation, Secret};
use crate::log::AnaState;
use crate::pdu::Digests;
use crate::status::Status;

pub use crate::target::ConnectionId;

/// Longest Keep Alive Timeout (rule H1).
pub const KEEP_ALIVE_MAX: Duration = Duration::from_secs(5);
/// Endpoints of one volume.
pub const ENDPOINTS_MAX: usize = 8;
/// Operations that wait or run; more are refused by [`super::Multipath::submit`].
pub const OPERATIONS_MAX: usize = 4096;

/// How to reach a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// NQN of the volume's subsystem.
    pub subsystem_nqn: String,
    /// This host's NQN.
    pub host_nqn: String,
    /// This host's 128-bit identifier.
    pub host_id: [u8; 16],
    /// The members' NVMe/TCP endpoints, at most [`ENDPOINTS_MAX`].
    pub endpoints: Vec<SocketAddr>,
    /// I/O queues for each association.
    pub io_queues: u16,
    /// Entries of each.
    pub queue_entries: u16,
    /// Digests asked for.
    pub digests: Digests,
    /// Keep Alive Timeout, at most [`KEEP_ALIVE_MAX`].
    pub keep_alive: Duration,
    /// What this host shows to know when a controller asks.
    pub secret: Option<Secret>,
    /// What controllers have to show in turn; without asking for it they are refused.
    pub controller_secret: Option<Secret>,
}

impl HostOptions {
    /// One I/O queue, no digests, a Keep Alive Timeout of 5 s.
    pub fn new(subsystem_nqn: &str, host_nqn: &str, host_id: [u8; 16]) -> Self {
        Self {
            subsystem_nqn: subsystem_nqn.to_owned(),
            host_nqn: host_nqn.to_owned(),
            host_id,
            endpoints: Vec::new(),
            io_queues: 1,
            queue_entries: crate::QUEUE_ENTRIES_MAX,
            digests: Digests::default(),
            keep_alive: KEEP_ALIVE_MAX,
            secret: None,
            controller_secret: None,
        }
    }
}

/// An operation of the host's user; drawn by the user, unique while it is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperationId(pub u64);

/// What the user wants of the volume. Ranges are at least one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read blocks: at most MDTS.
    Read(BlockRange),
    /// Write blocks: at most MDTS; durable when it is answered.
    Write(BlockRange, Bytes),
    /// Make blocks read as zeroes, at most 65,536; may deallocate when the flag says so.
    WriteZeroes(BlockRange, bool),
    /// Give blocks back.
    Deallocate(BlockRange),
    /// A barrier: everything answered before is durable, which it is.
    Flush,
    /// Compare blocks: at most MDTS.
    Compare(BlockRange, Bytes),
}

/// Why an operation failed for good. A lost path is no reason: then operations wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OperationError {
    /// The controller said so.
    #[error("{0}")]
    Status(Status),
    /// The volume was detached meanwhile.
    #[error("the volume was detached")]
    Detached,
    /// It was not taken.
    #[error(transparent)]
    Refused(#[from] SubmitError),
}

/// An operation was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// [`OPERATIONS_MAX`] are under way.
    #[error("{OPERATIONS_MAX} operations are under way: wait for some")]
    TooMany,
    /// Longer than one command can be, or data of another length than the range.
    #[error("an operation's range and data fit one command")]
    Length,
    /// The id is in use.
    #[error("the operation's id is in use")]
    Duplicate,
}

/// The volume as the controllers describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in blocks of 4,096 bytes.
    pub blocks: u64,
    /// Most bytes of one Read, Write or Compare.
    pub transfer_bytes_max: usize,
    /// NGUID.
    pub nguid: [u8; 16],
}

/// How a path is, for logs and statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathState {
    /// Waits for its next try or is on its way.
    Connecting,
    /// Connected, with this ANA state.
    Live(AnaState),
}

/// What the executor shall do, in order.
#[derive(Debug)]
pub enum HostEffect {
    /// Open a TCP connection; answered by `opened` or `closed`.
    Open(ConnectionId, SocketAddr),
    /// There is output on this connection.
    Send(ConnectionId),
    /// Close the connection. Without last bytes at once, what is queued in the kernel included;
    /// else after them, if they can be sent at once. Answered by `closed` when it is closed.
    Close(ConnectionId, Vec<Bytes>),
    /// Something to compute for a connection's authentication, with random bytes; answered by
    /// `computed`.
    Compute(ConnectionId, Computation),
    /// An operation has ended: a read's data in order.
    Completed(OperationId, Result<Vec<Bytes>, OperationError>),
    /// An operation that was sent before goes out again: the first copy may have taken effect.
    SentAgain(OperationId),
    /// The volume is known now, or has another size.
    Geometry(Geometry),
    /// A path changed; why it was lost, if it was.
    Path(SocketAddr, PathState, Option<String>),
}
