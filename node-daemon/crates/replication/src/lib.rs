//! The replication protocol (docs/replication.md) as a state machine: no clock, thread, I/O or
//! randomness inside.
//!
//! [`Node`] holds every replica of one shard and its pairs (rule L3). `step(input, now, storage,
//! outputs)` is all there is; `next_deadline` says when it wants a `Tick` at the latest.
//!
//! Where each rule lives:
//!
//! | module | rules |
//! |---|---|
//! | `node` | what fits and what is dropped, "none" (T9), creation and deletion |
//! | `replica` | learning configurations (T1, T8), one way down (H4), lease of a volume (L2, L3) |
//! | `primary` | W1, W4, T6, T7, T8 |
//! | `catchup` | W7, C1, the primary's side of W2 and W3 |
//! | `copy_source`, `copy_target` | C2, C3 |
//! | `repair` | C4 |
//! | `change` | M1 |
//! | `secondary` | W2, W3, W5 |
//! | `log` | places: matching (W2), never below `applied` |
//! | `takeover` | T2, T3 |
//! | `candidate` | T4 and T5 at the new primary |
//! | `seal` | T4 at everyone, L4, the granter's side of L3 and L5 |
//! | `lease` | L2, L3, L5: pairs of instances |
//! | `hosts` | L1 at the reply, H2, H3, H4, H5 |
//! | `control` | S1, growth |
//! | `hand_over`, `heir` | T10, L5 in good order |
//!
//! W8, R1-R3 and S2 are the store's; H1 is the target's, told by `Output::Ana`.

pub mod api;
mod candidate;
mod catchup;
mod change;
mod control;
mod copy_source;
mod copy_target;
mod cx;
mod hand_over;
mod heir;
mod hosts;
mod in_sync;
mod lease;
mod log;
#[cfg(feature = "model")]
pub mod model;
mod node;
pub mod options;
mod primary;
mod repair;
mod replica;
mod seal;
mod secondary;
mod takeover;

pub use node::Node;
pub use options::{Identity, Limits, Options, Timing};
