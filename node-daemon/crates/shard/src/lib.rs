//! One store and the replicas in it as a single state machine: what a reactor and the simulator
//! drive.
//!
//! The engine runs one shard per core; the simulator runs one per simulated node. Both do no more
//! than carry out [`Effect`]s and hand in [`Event`]s, so everything that can lose data is the same
//! code in both. Sockets, PDUs, threads and clocks are left to them.

mod machine;
mod report;
mod shard;

use tercet_replication::api::{Input, Output};
use tercet_store::disk::{DiskDone, DiskOp, DiskToken};

pub use report::Options;
pub use shard::Shard;
pub use tercet_replication::Identity;
pub use tercet_store::options::{FormatOptions, OpenError, OpenReport, Usage};
pub use tercet_store::{ScrubPace, ScrubStatus};

/// What happens to a shard.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "moved once, on the way of every write: no box")]
pub enum Event {
    /// From links, hosts, the agent.
    Input(Input),
    /// From the device.
    Disk(DiskDone),
    /// Time has come to at least `next_deadline`.
    Tick,
}

/// What the executor shall do, in order.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "moved once, on the way of every write: no box")]
pub enum Effect {
    /// For links, hosts, the agent.
    Output(Output),
    /// Submit to the device.
    Disk(DiskToken, DiskOp),
}
