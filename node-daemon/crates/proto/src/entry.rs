//! Entries of a volume's log, and the promise that a replica gives.
//!
//! An entry is immutable once it is made (rule W8). Its header names its place and the epoch of the
//! entry before it, so that a log is matched by induction (rule W2).

use bytes::{Buf, Bytes, BytesMut};

use crate::config::Config;
use crate::ids::{Epoch, InstanceId, Lsn, SnapshotId};

/// Bytes of a block, the unit of every range, of checksums and of copy-on-write.
pub const BLOCK_BYTES: usize = 4096;

/// An empty buffer with room for so many bytes that begin at a page: a payload that is gathered there
/// goes to a device without another copy.
pub fn page_aligned(bytes: usize) -> BytesMut {
    let mut buffer = BytesMut::with_capacity(bytes + BLOCK_BYTES);
    let pad = buffer.as_ptr().align_offset(BLOCK_BYTES);
    buffer.resize(pad, 0);
    buffer.advance(pad);
    buffer
}

/// A place in a log: (epoch, lsn). Ordered as rule T5 orders tails: epoch first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Place {
    /// Epoch of the entry; 0 for the empty log.
    pub epoch: Epoch,
    /// Place of the entry; 0 for the empty log.
    pub lsn: Lsn,
}

impl Place {
    /// The place before the first entry.
    pub const EMPTY: Self = Self { epoch: Epoch(0), lsn: Lsn(0) };
}

/// `count` blocks from block `start` of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRange {
    /// First block.
    pub start: u64,
    /// Number of blocks, at least 1.
    pub count: u32,
}

impl BlockRange {
    /// The block after the last. Panics when that is no number of a block.
    pub fn end(self) -> u64 {
        self.start.checked_add(u64::from(self.count)).expect("a checked range")
    }

    /// Whether both have a block in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// Bytes of the range.
    pub fn bytes(self) -> usize {
        self.count as usize * BLOCK_BYTES
    }
}

/// What an entry does to the volume when it is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// Nothing: makes everything before it committed (rule T6).
    Noop,
    /// Sets the blocks to the payload, whose CRC32C this is.
    Write {
        /// Where.
        range: BlockRange,
        /// CRC32C of the payload.
        payload_crc: u32,
    },
    /// Makes the blocks read as zeroes; gives their space back when `discard`.
    Zero {
        /// Where.
        range: BlockRange,
        /// Deallocate rather than write zeroes.
        discard: bool,
    },
    /// Sets the volume's size; never smaller than before.
    Grow {
        /// The new size in blocks.
        size_blocks: u64,
    },
    /// Freezes the volume as it is at this place (rule S1). Idempotent by id.
    Snapshot {
        /// Which.
        id: SnapshotId,
    },
    /// Deletes a snapshot. Idempotent by id.
    SnapshotDelete {
        /// Which.
        id: SnapshotId,
    },
}

/// An entry without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EntryHeader {
    /// The epoch in which its primary made it, and its place.
    pub place: Place,
    /// Epoch of the entry directly before it (lsn - 1); 0 for the first.
    pub prev_epoch: Epoch,
    /// What it does.
    pub kind: EntryKind,
}

impl EntryHeader {
    /// The place of the entry directly before.
    pub fn prev(&self) -> Place {
        let lsn = Lsn(self.place.lsn.0.checked_sub(1).expect("entries start at lsn 1"));
        Place { epoch: self.prev_epoch, lsn }
    }

    /// Bytes of the payload that goes with it.
    pub fn payload_bytes(&self) -> usize {
        match self.kind {
            EntryKind::Write { range, .. } => range.bytes(),
            _ => 0,
        }
    }
}

/// An entry: header and, for a write, the payload (exactly `payload_bytes()` long, else empty).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Place and kind.
    pub header: EntryHeader,
    /// The blocks of a write; empty for every other kind. May be several times one block.
    pub payload: Bytes,
}

/// What a replica has promised: to accept entries of this epoch from this instance only, and
/// nothing older ever again (rules W2, T4, T8). Kept together with the configuration promised.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Promise {
    /// The configuration; its epoch and its primary's instance are the promise.
    pub config: Config,
}

impl Promise {
    /// The epoch promised.
    pub fn epoch(&self) -> Epoch {
        self.config.epoch
    }

    /// The only instance from which entries of that epoch are taken.
    pub fn instance(&self) -> InstanceId {
        self.config.primary.instance
    }
}
