//! Straight blocking reads and writes for format and open.

use tercet_proto::BLOCK_BYTES;
use tercet_proto::disk::Run;

use crate::arena::{Arena, Buf};
use crate::disk::{Disk, DiskDone, DiskError, DiskOp, DiskToken};
use crate::options::OpenError;

/// Reads on their way at a time.
const READS_MAX: usize = 16;

/// A device, used one step after the other.
pub(crate) struct Io<'a> {
    disk: &'a mut dyn Disk,
    arena: Arena,
    next: u64,
}

impl<'a> Io<'a> {
    pub(crate) fn new(disk: &'a mut dyn Disk, arena: Arena) -> Self {
        // Far from the tokens of a running store, which start at 1.
        Self { disk, arena, next: 1 << 63 }
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.disk.capacity_bytes()
    }

    fn submit(&mut self, op: DiskOp) -> u64 {
        self.next += 1;
        self.disk.submit(DiskToken(self.next), op);
        self.next
    }

    /// Waits until all of `count` operations have completed; in the order of their tokens.
    fn collect(&mut self, count: usize) -> Result<Vec<DiskDone>, DiskError> {
        let mut done = Vec::with_capacity(count);
        while done.len() < count {
            self.disk.wait(&mut done);
        }
        done.sort_by_key(|one| one.token);
        for one in &done {
            one.result?;
        }
        Ok(done)
    }

    fn buf(&self, blocks: u32) -> Result<Buf, OpenError> {
        let buf = self.arena.take(blocks as usize);
        buf.ok_or_else(|| OpenError::Options("the arena is too small or in use".to_owned()))
    }

    pub(crate) fn flush(&mut self) -> Result<(), OpenError> {
        self.submit(DiskOp::Flush);
        self.collect(1)?;
        Ok(())
    }

    pub(crate) fn write_zeroes(&mut self, run: Run) -> Result<(), OpenError> {
        let [offset, len] = [run.0, run.1].map(|blocks| u64::from(blocks) * BLOCK_BYTES as u64);
        self.submit(DiskOp::WriteZeroes { offset, len });
        self.collect(1)?;
        Ok(())
    }

    pub(crate) fn write(&mut self, block: u32, bytes: &[u8], fua: bool) -> Result<(), OpenError> {
        let mut data = self.buf((bytes.len() / BLOCK_BYTES) as u32)?;
        data.copy_from_slice(bytes);
        let offset = u64::from(block) * BLOCK_BYTES as u64;
        self.submit(DiskOp::Write { offset, data: data.into(), fua });
        self.collect(1)?;
        Ok(())
    }

    pub(crate) fn read(&mut self, run: Run) -> Result<Buf, OpenError> {
        Ok(self.read_all(&[run])?.remove(0))
    }

    /// Reads runs, several at a time.
    pub(crate) fn read_all(&mut self, runs: &[Run]) -> Result<Vec<Buf>, OpenError> {
        let mut bufs = Vec::with_capacity(runs.len());
        for group in runs.chunks(READS_MAX) {
            for (start, count) in group {
                let into = self.buf(*count)?;
                let offset = u64::from(*start) * BLOCK_BYTES as u64;
                self.submit(DiskOp::Read { offset, into });
            }
            let done = self.collect(group.len())?;
            bufs.extend(done.into_iter().map(|one| one.buf.expect("a read's buffer comes back")));
        }
        Ok(bufs)
    }
}
