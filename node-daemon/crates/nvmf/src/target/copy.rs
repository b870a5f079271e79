//! Copy (NVM 3.2.2): source ranges are read one after the other, then written as one write.
//!
//! MCL is what one write may have, so the destination changes whole or not at all, and a source
//! that overlaps it is read before it is written. Other commands may come between the reads; a host
//! that wants more has to keep away itself, as with reads of its own.

use bytes::{Bytes, BytesMut};
use tercet_proto::BlockRange;

use super::api::{Command, Done};
use super::io::within;
use crate::BLOCK_BYTES;
use crate::command::{COPY_BLOCKS_MAX, COPY_RANGE_BYTES, COPY_RANGES_MAX, Entry};
use crate::le::{u16_at, u64_at};
use crate::status::Status;

/// A Copy under way.
#[derive(Debug)]
pub(super) struct Copy {
    /// Ranges that have still to be read, last first.
    sources: Vec<BlockRange>,
    /// What has been read; its room is given before.
    gathered: BytesMut,
    /// Where it is written to; `None` once it is.
    destination: Option<BlockRange>,
}

impl Copy {
    /// A Copy and its first read: SDLBA in dwords 10 and 11, NR 12/7:0 (0's based), descriptor
    /// format 12/11:8, ranges of 32 bytes: SLBA 8-15, NLB 16-17 (0's based).
    pub(super) fn parse(
        entry: &Entry,
        data: &[u8],
        blocks: u64,
    ) -> Result<(Self, Command), Status> {
        let ranges = (entry.dword(12) as usize & 0xff) + 1;
        if entry.dword(12) >> 8 & 0xf != 0 {
            return Err(Status::INVALID_FIELD);
        }
        if ranges > COPY_RANGES_MAX {
            return Err(Status::SIZE_LIMIT);
        }
        let mut sources = Vec::with_capacity(ranges);
        let mut count = 0;
        for range in data.chunks_exact(COPY_RANGE_BYTES).take(ranges) {
            let range =
                BlockRange { start: u64_at(range, 8), count: u32::from(u16_at(range, 16)) + 1 };
            count += range.count;
            if count > COPY_BLOCKS_MAX {
                return Err(Status::SIZE_LIMIT);
            }
            sources.push(within(range, blocks)?);
        }
        let destination = within(BlockRange { start: entry.start_lba(), count }, blocks)?;
        sources.reverse();
        let first = sources.pop().expect("at least one range");
        let gathered = BytesMut::with_capacity(count as usize * BLOCK_BYTES);
        Ok((Self { sources, gathered, destination: Some(destination) }, Command::Read(first)))
    }

    /// What follows the part that has ended well; `None` when the copy has.
    pub(super) fn next(&mut self, done: Done) -> Option<Command> {
        if let Done::Data(pieces) = done {
            for piece in pieces {
                self.gathered.extend_from_slice(&piece);
            }
        }
        if let Some(range) = self.sources.pop() {
            return Some(Command::Read(range));
        }
        let destination = self.destination.take()?;
        let data: Bytes = std::mem::take(&mut self.gathered).freeze();
        assert_eq!(data.len(), destination.bytes(), "every source was read whole");
        Some(Command::Write(destination, data))
    }
}
