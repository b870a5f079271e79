//! Messages of a copy (rules C2, C3): what they say, and their bytes.
//!
//! The source offers a view, again and again until it hears of it; everything else is asked by the
//! target, one question at a time, so a lost message costs the time to the next offer and no more.
//! They are of version 2 of the protocol; a peer of version 1 is sent none.

use bytes::Bytes;

use super::codec::{WireError, crc32c};
use super::wire::{Reader, Writer};
use crate::copy::{
    COPY_BLOCKS_MAX, COPY_RANGES_MAX, COPY_SNAPSHOTS_MAX, STAMP_BLOCKS_MAX, STAMP_RUNS_MAX,
    StampRun, View, ViewId,
};
use crate::entry::{BLOCK_BYTES, BlockRange, Place};
use crate::ids::SnapshotId;
use crate::storage::SnapshotState;

/// What source and target of a copy say to each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CopyMessage {
    /// Primary to a member that is incomplete or behind the log: here is a view.
    Offer {
        /// The view.
        view: View,
        /// The place before the first entry of my log: who has it needs no copy (C1).
        start: Place,
        /// The no-op of this epoch is committed (T6).
        settled: bool,
    },
    /// Target: what stamps has this part from here on?
    AskStamps {
        /// Of the view.
        view: ViewId,
        /// The part.
        part: u32,
        /// The first block.
        from: u64,
    },
    /// The answer; without runs the part ends here.
    Stamps {
        /// Of the view.
        view: ViewId,
        /// The part.
        part: u32,
        /// The first block.
        from: u64,
        /// In order.
        runs: Vec<StampRun>,
    },
    /// Target: the bytes of these ranges.
    AskBlocks {
        /// Of the view.
        view: ViewId,
        /// The part.
        part: u32,
        /// Which.
        ranges: Vec<BlockRange>,
    },
    /// The answer.
    Blocks {
        /// Of the view.
        view: ViewId,
        /// The part.
        part: u32,
        /// Which.
        ranges: Vec<BlockRange>,
        /// All of them, one after the other.
        payload: Bytes,
    },
    /// Target: all of the view is here, durably.
    Copied {
        /// The view.
        view: ViewId,
    },
    /// The answer where the log goes on from the view; else another offer follows.
    Finish {
        /// The view.
        view: ViewId,
    },
}

impl CopyMessage {
    /// Whether the target says it to the source.
    pub fn is_question(&self) -> bool {
        matches!(self, Self::AskStamps { .. } | Self::AskBlocks { .. } | Self::Copied { .. })
    }
}

pub(super) const OFFER: u8 = 14;
const ASK_STAMPS: u8 = 15;
const STAMPS: u8 = 16;
const ASK_BLOCKS: u8 = 17;
const BLOCKS: u8 = 18;
const COPIED: u8 = 19;
pub(super) const FINISH: u8 = 20;

pub(super) fn fields(
    message: &CopyMessage,
    writer: &mut Writer<'_>,
    payloads: &mut Vec<Bytes>,
) -> u8 {
    match message {
        CopyMessage::Offer { view, start, settled } => {
            view_fields(view, writer);
            writer.place(*start);
            writer.flag(*settled);
            OFFER
        }
        CopyMessage::AskStamps { view, part, from } => {
            part_fields((*view, *part), writer);
            writer.u64(*from);
            ASK_STAMPS
        }
        CopyMessage::Stamps { view, part, from, runs } => {
            assert!(runs.len() <= STAMP_RUNS_MAX, "at most {STAMP_RUNS_MAX} runs");
            part_fields((*view, *part), writer);
            writer.u64(*from);
            writer.u16(runs.len() as u16);
            for run in runs {
                writer.u32(run.count);
                writer.place(run.stamp);
                writer.flag(run.hole);
            }
            STAMPS
        }
        CopyMessage::AskBlocks { view, part, ranges } => {
            part_fields((*view, *part), writer);
            range_fields(ranges, writer);
            ASK_BLOCKS
        }
        CopyMessage::Blocks { view, part, ranges, payload } => {
            assert_eq!(payload.len(), bytes_of(ranges), "blocks come with their bytes");
            part_fields((*view, *part), writer);
            range_fields(ranges, writer);
            writer.u32(crc32c(payload));
            payloads.push(payload.clone());
            BLOCKS
        }
        CopyMessage::Copied { view } => {
            writer.u64(view.0);
            COPIED
        }
        CopyMessage::Finish { view } => {
            writer.u64(view.0);
            FINISH
        }
    }
}

pub(super) fn parse(
    kind: u8,
    reader: &mut Reader<'_>,
    payloads: &mut Bytes,
) -> Result<CopyMessage, WireError> {
    if kind == OFFER {
        let (view, start) = (parse_view(reader)?, reader.place()?);
        return Ok(CopyMessage::Offer { view, start, settled: reader.flag()? });
    }
    let view = ViewId(reader.u64()?);
    Ok(match kind {
        COPIED => CopyMessage::Copied { view },
        FINISH => CopyMessage::Finish { view },
        ASK_STAMPS => CopyMessage::AskStamps { view, part: reader.u32()?, from: reader.u64()? },
        STAMPS => {
            let (part, from) = (reader.u32()?, reader.u64()?);
            CopyMessage::Stamps { view, part, from, runs: parse_runs(from, reader)? }
        }
        ASK_BLOCKS => {
            let part = reader.u32()?;
            CopyMessage::AskBlocks { view, part, ranges: parse_ranges(reader)? }
        }
        BLOCKS => {
            let part = reader.u32()?;
            let (ranges, crc) = (parse_ranges(reader)?, reader.u32()?);
            let bytes = bytes_of(&ranges);
            if bytes > payloads.len() {
                return Err(WireError::Short);
            }
            let payload = payloads.split_to(bytes);
            if crc32c(&payload) != crc {
                return Err(WireError::BlocksChecksum);
            }
            CopyMessage::Blocks { view, part, ranges, payload }
        }
        other => return Err(WireError::Type(other)),
    })
}

fn bytes_of(ranges: &[BlockRange]) -> usize {
    ranges.iter().map(|range| range.count as usize * BLOCK_BYTES).sum()
}

fn part_fields((view, part): (ViewId, u32), writer: &mut Writer<'_>) {
    writer.u64(view.0);
    writer.u32(part);
}

fn view_fields(view: &View, writer: &mut Writer<'_>) {
    assert!(view.snapshots.len() <= COPY_SNAPSHOTS_MAX, "at most {COPY_SNAPSHOTS_MAX} snapshots");
    writer.u64(view.id.0);
    writer.place(view.place);
    writer.u64(view.size_blocks);
    writer.u16(view.snapshots.len() as u16);
    for snapshot in &view.snapshots {
        writer.id(snapshot.id.as_bytes());
        writer.place(snapshot.place);
        writer.u64(snapshot.size_blocks);
    }
}

fn parse_view(reader: &mut Reader<'_>) -> Result<View, WireError> {
    let (id, place, size_blocks) = (ViewId(reader.u64()?), reader.place()?, reader.u64()?);
    let count = usize::from(reader.u16()?);
    if count > COPY_SNAPSHOTS_MAX {
        return Err(WireError::Field("number of snapshots"));
    }
    let snapshot = |reader: &mut Reader<'_>| {
        let id = SnapshotId::from_bytes(reader.id()?);
        Ok(SnapshotState { id, place: reader.place()?, size_blocks: reader.u64()? })
    };
    let snapshots = (0..count).map(|_| snapshot(reader)).collect::<Result<_, WireError>>()?;
    Ok(View { id, place, size_blocks, snapshots })
}

fn range_fields(ranges: &[BlockRange], writer: &mut Writer<'_>) {
    assert!(ranges.len() <= COPY_RANGES_MAX, "at most {COPY_RANGES_MAX} ranges");
    writer.u16(ranges.len() as u16);
    for range in ranges {
        writer.range(*range);
    }
}

fn parse_ranges(reader: &mut Reader<'_>) -> Result<Vec<BlockRange>, WireError> {
    let count = usize::from(reader.u16()?);
    if count > COPY_RANGES_MAX {
        return Err(WireError::Field("number of ranges"));
    }
    let mut blocks = 0_u64;
    let mut ranges = Vec::with_capacity(count);
    for _ in 0..count {
        let range = reader.range()?;
        blocks += u64::from(range.count);
        ranges.push(range);
    }
    if blocks > u64::from(COPY_BLOCKS_MAX) {
        return Err(WireError::Field("number of blocks"));
    }
    Ok(ranges)
}

fn parse_runs(from: u64, reader: &mut Reader<'_>) -> Result<Vec<StampRun>, WireError> {
    let count = usize::from(reader.u16()?);
    if count > STAMP_RUNS_MAX {
        return Err(WireError::Field("number of runs"));
    }
    let mut blocks = 0_u64;
    let mut runs = Vec::with_capacity(count);
    for _ in 0..count {
        let run = StampRun { count: reader.u32()?, stamp: reader.place()?, hole: reader.flag()? };
        blocks += u64::from(run.count);
        if run.count == 0 {
            return Err(WireError::Field("run of stamps"));
        }
        runs.push(run);
    }
    if blocks > STAMP_BLOCKS_MAX || from.checked_add(blocks).is_none() {
        return Err(WireError::Field("run of stamps"));
    }
    Ok(runs)
}
