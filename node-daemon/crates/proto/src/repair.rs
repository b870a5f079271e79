//! The seam for repair (rule C4): a block that cannot be read, or does not have its checksum, is
//! replaced by a peer's version of the same stamp.
//!
//! A *version* of a block is named by the entry that wrote it: blocks of one volume with equal
//! stamps are equal, if neither is a hole (`copy` says why). Storage tells what it finds bad by
//! `StorageEvent::Bad`; whom to ask for it is `tercet-replication`'s.

use bytes::Bytes;

use crate::entry::Place;
use crate::ids::{SnapshotId, Token, VolumeId};

/// A block as one entry left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockVersion {
    /// In a snapshot, or in the volume itself.
    pub snapshot: Option<SnapshotId>,
    /// Which block.
    pub block: u64,
    /// The entry that changed it last.
    pub stamp: Place,
}

/// What repair needs of a store.
pub trait Repairs {
    /// Reads this version of a block. Answered by `StorageEvent::Read`, with `OtherVersion` where
    /// the block has another stamp here, or is a hole.
    fn read_version(&mut self, volume: VolumeId, version: BlockVersion, token: Token);

    /// Replaces the bytes of this version, everywhere here where they are shared, if they are what
    /// was written: `OtherVersion` where the block has another stamp by now, `Checksum` where these
    /// bytes are others. Answered by `Done` when reads see it. It is durable with the next
    /// checkpoint; what a crash undoes is found bad again.
    fn repair(&mut self, volume: VolumeId, version: BlockVersion, data: Bytes, token: Token);
}
