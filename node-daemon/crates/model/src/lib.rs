//! The bounded model check: every state that three nodes can reach within stated bounds, with the
//! production state machine (`tercet-replication`) in each of them (docs/testing-model.md).
//!
//! | module | what |
//! |---|---|
//! | `store` | one node's disk |
//! | `local` | one node in one of its states, and what each input does to it |
//! | `packet` | messages on their way |
//! | `world` | a state of the whole and every step that may follow |
//! | `judge` | what must never be, and what has to be reached |
//! | `space` | the named spaces, explored with stateright |
//! | `tell` | the way to a state in words |
//! | `canaries` | rules broken on purpose |

#[cfg(feature = "canary")]
pub mod canaries;
pub mod judge;
pub mod local;
pub mod packet;
pub mod space;
pub mod store;
pub mod tell;
pub mod world;

use tercet_proto::VolumeId;

/// Replicas of the volume.
pub const NODES: usize = 3;
/// The volume.
pub const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
/// Its size: more than there are writes and hosts.
pub const SIZE_BLOCKS: u64 = 16;
