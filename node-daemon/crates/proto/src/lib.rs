//! What the crates of the engine share: ids, the configuration of a volume, log entries, the seam
//! between replication and storage, and the byte formats of wire and disk.
//!
//! Nothing here does I/O, reads a clock or draws a random number: ids are drawn by the executor and
//! handed in. The formats are documented byte for byte in `docs/replication-protocol.md` and
//! `docs/disk-format.md`. What a message or an entry *means* is left to `tercet-replication`, how
//! it is kept to `tercet-store`.

pub mod chunks;
pub mod config;
pub mod copy;
pub mod disk;
pub mod entry;
pub mod ids;
pub mod message;
pub mod repair;
pub mod storage;
pub mod time;

pub use chunks::{ChunkPage, ChunkRow};
pub use config::{Config, ConfigState, IllegalStep, Member, Primary};
pub use copy::{Copies, Piece, StampRun, Stamps, View, ViewId};
pub use entry::{
    BLOCK_BYTES, BlockRange, Entry, EntryHeader, EntryKind, Place, Promise, page_aligned,
};
pub use ids::{Epoch, InstanceId, Lsn, NodeName, ReplicaId, SnapshotId, Token, VolumeId};
pub use repair::{BlockVersion, Repairs};
pub use storage::{
    NewReplica, ReplicaState, SnapshotState, Source, Storage, StorageError, StorageEvent,
};
pub use time::Instant;
