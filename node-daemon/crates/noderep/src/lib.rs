//! Node replication: a single-threaded structure becomes linearizable and concurrent by being
//! there once for each core, kept in step by one shared log of what was written.
//!
//! For what every core reads at every turn and rarely changes. A look-up is one load of a word that
//! changes only when somebody writes, and then a look into memory that no other core touches: no
//! lock, no read-modify-write, no reference count. Writes pay for it: each is done once for every
//! replica. docs/node-replication.md has the algorithm, the argument and the measurements.
//!
//! - [`Dispatch`]: what the structure has to be.
//! - [`NodeReplicated`]: the log and the copy that writers work on; makes replicas.
//! - [`Replica`]: one core's copy. Reads are `&mut self`: it belongs to one thread at a time.
//!
//! All `unsafe` is in `log` (slots that are written by one and read by many) and `seat` (a cell that
//! changes hands); both are driven through every interleaving by loom.

#[cfg(doctest)]
mod bounds;
mod core;
mod log;
mod options;
mod patience;
mod replica;
mod seat;
mod sync;

pub use crate::core::{Member, NodeReplicated, State};
#[cfg(feature = "canary")]
pub use options::Canary;
pub use options::Options;
pub use replica::{Number, Replica, WriteError};

/// A structure that can be replicated: it changes by operations and by nothing else.
///
/// `write` must do the same to equal copies: no clock, no random number, no address, nothing that
/// another thread may change. Neither it nor a clone or a drop may use replicas of the same structure:
/// a lock is held (a write is [`WriteError::Busy`] then, all else waits for itself for ever). It must
/// not panic: a writer's copy that may be half changed refuses all further writes
/// ([`WriteError::Poisoned`]).
pub trait Dispatch: Clone {
    /// A question; it may borrow.
    type Read<'a>;
    /// Its answer.
    type Found;
    /// A change. Each replica takes a clone of its own: what is large should be behind an `Arc`.
    type Write: Clone;
    /// What the writer gets for it.
    type Done;

    /// Answers a question.
    fn read(&self, question: Self::Read<'_>) -> Self::Found;

    /// Carries out a change.
    fn write(&mut self, change: Self::Write) -> Self::Done;
}
