//! One shard's store: log ring, chunks, snapshots, over a [`disk::Disk`].
//!
//! One idea holds it together: what the device says is a durable checkpoint and the log behind it.
//! Every change is an entry of the log first; the maps change in memory when entries are applied;
//! a checkpoint writes the maps' changed leaves to fresh blocks and then names them in one block.
//! Nothing that the newest durable checkpoint or the log behind it names is ever overwritten.
//! `docs/disk-format.md` has the bytes, and why a crash at any write is accepted. Which entries are
//! committed, and who may append, is left to `tercet-replication`; doing the I/O to the owner.

pub mod arena;
pub mod disk;
pub mod inspect;
pub mod options;
pub mod simdisk;
pub mod store;

mod alloc;
mod batch;
mod cache;
mod changes;
mod check;
mod checkpoint;
mod chunks;
mod clone;
mod format;
mod hash;
mod incoming;
mod io;
mod layout;
mod leaf;
mod load;
mod log;
mod map;
mod merge;
mod open;
mod parked;
mod read;
mod repair;
mod replay;
mod replica;
mod reread;
mod root;
mod scan;
mod scrub;
mod seam;
mod task;
mod view;

pub use check::ReadRun;
#[cfg(feature = "canary")]
pub use options::Canary;
pub use options::{FormatOptions, OpenError, OpenReport, Options, Usage};
pub use scrub::{ScrubPace, ScrubStatus};
pub use store::Store;
