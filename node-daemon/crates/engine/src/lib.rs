//! The engine of a node: the process around the state machines of the other crates.
//!
//! `tercet-engine` is a supervisor and a worker. The worker has one thread for each reactor, which
//! owns shards, links and hosts ([`core`]), and a control thread that speaks gRPC with the agent
//! ([`control`]). Nothing is shared between reactors but a list of postboxes and the node's table, of
//! which each has a replica of its own ([`table`]).

pub mod args;
pub mod attach;
#[cfg(feature = "canary")]
pub mod canary;
pub mod control;
pub mod core;
pub mod herald;
pub mod host;
pub mod logging;
pub mod offline;
pub mod opener;
pub mod outbox;
pub mod pb;
pub mod plan;
pub mod state;
pub mod supervisor;
pub mod table;
pub mod worker;
