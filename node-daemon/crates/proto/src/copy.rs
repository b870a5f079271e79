//! The seam for copies (rules C2, C3): what a source gives of a frozen view, and how a target's
//! store becomes that view.
//!
//! A *view* is a volume at one applied place with its snapshots, frozen until it is thawed. Its
//! *parts* are the snapshots, oldest first, and behind them the volume itself. Every block of a part
//! has a stamp, the entry that changed it last, holes included: blocks of one volume with equal
//! stamps are equal, if both are holes or neither is (in a clone, what is inherited and what was
//! never written both read (0, 0)). So a target makes its own map equal to one part after the other by copying
//! what differs, in either direction, and keeps the map as the snapshot at the end of each part:
//! what snapshots share at the source they share here.
//!
//! A target is durably incomplete from before the first block, so nothing of this needs the log.
//! What was copied is settled by a checkpoint, and one record then makes it the volume's state.

use bytes::Bytes;

use crate::entry::{BlockRange, Place};
use crate::ids::{Token, VolumeId};
use crate::storage::SnapshotState;

/// Most blocks of one request for blocks: 1 MiB.
pub const COPY_BLOCKS_MAX: u32 = 256;
/// Most ranges of one request for blocks.
pub const COPY_RANGES_MAX: usize = 256;
/// Most runs of stamps in one answer.
pub const STAMP_RUNS_MAX: usize = 1024;
/// Most blocks that the stamps of one answer cover: 64 chunks.
pub const STAMP_BLOCKS_MAX: u64 = 64 * 1024;
/// Most snapshots of a volume that is copied.
pub const COPY_SNAPSHOTS_MAX: usize = 1024;

/// Names a view of a store until it is thawed or the engine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ViewId(pub u64);

/// A volume as it was at one applied place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// Its name.
    pub id: ViewId,
    /// Everything up to here is in it.
    pub place: Place,
    /// Size of the volume then, in blocks.
    pub size_blocks: u64,
    /// The snapshots then, oldest first.
    pub snapshots: Vec<SnapshotState>,
}

/// Neighbouring blocks with one stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StampRun {
    /// How many blocks.
    pub count: u32,
    /// The entry that changed them last.
    pub stamp: Place,
    /// Whether they read as zeroes and take no space.
    pub hole: bool,
}

/// Stamps that were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stamps {
    /// These.
    Here(Vec<StampRun>),
    /// They have to be read first: `StorageEvent::Stamps` has them.
    Later,
    /// There is no such view or part.
    Gone,
}

/// Blocks of a copy with one stamp.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Where.
    pub range: BlockRange,
    /// The entry that changed them last.
    pub stamp: Place,
    /// Their bytes; none for holes.
    pub data: Option<Bytes>,
}

/// What copies need of a store. The first four are the source's, the others the target's.
pub trait Copies {
    /// Freezes a complete volume as it is applied now; none where it is not here or incomplete.
    fn freeze(&mut self, volume: VolumeId) -> Option<View>;

    /// Gives a view up. One that is not there is none.
    fn thaw(&mut self, view: ViewId);

    /// Stamps of a part from block `from` on, at most `STAMP_RUNS_MAX` runs and `STAMP_BLOCKS_MAX`
    /// blocks; none behind its end. The token is used where they come later.
    fn view_stamps(&mut self, view: ViewId, part: usize, from: u64, token: Token) -> Stamps;

    /// Reads blocks of a part, ranges in order. Answered by `StorageEvent::Read`.
    fn read_view(&mut self, view: ViewId, part: usize, ranges: &[BlockRange], token: Token);

    /// Stamps of the volume's own map, which `range` lies in. The token is used where they come
    /// later.
    fn stamps(&mut self, volume: VolumeId, range: BlockRange, token: Token) -> Stamps;

    /// Begins a pass on an incomplete replica: gives up the snapshots that are not among these.
    fn copy_begin(&mut self, volume: VolumeId, keep: &[SnapshotState]);

    /// The volume's own map gets this size, larger or smaller.
    fn copy_resize(&mut self, volume: VolumeId, size_blocks: u64);

    /// Puts pieces into the volume's own map. Answered by `Done` when all are there, durable or not.
    fn copy_write(&mut self, volume: VolumeId, pieces: Vec<Piece>, token: Token);

    /// The volume's own map is this snapshot now.
    fn copy_snapshot(&mut self, volume: VolumeId, snapshot: SnapshotState);

    /// Makes everything so far durable. Answered by `Done`.
    fn copy_settle(&mut self, volume: VolumeId, token: Token);

    /// What was settled becomes the volume's state at `place`, in one durable step: applied up to
    /// there, complete, its log empty behind it. Answered by `Done`.
    fn copy_finish(&mut self, volume: VolumeId, place: Place, token: Token);
}
