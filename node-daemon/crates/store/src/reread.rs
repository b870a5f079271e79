//! Reads that the device refuses with an error (rule C4): each block is read once more, alone.
//!
//! A place that cannot be read is no reason to give up a store of a million others. What fails
//! again reads as a pattern that nobody writes: its checksum is wrong then, so that whoever asked
//! takes it for the bad block that it is, as if a bit had rotted. A device that reads nothing any
//! more is given up nevertheless, and one that is gone at once.

use crate::arena::Buf;
use crate::disk::{DiskDone, DiskError, DiskOp, DiskToken};
use crate::store::{OpKind, Store};
use tercet_proto::BLOCK_BYTES;

/// So many blocks in a row that cannot be read are the device's end, not a bad place on it.
const UNREADABLE_IN_ROW_MAX: u64 = 4096;
/// What stands for bytes that cannot be read.
const UNREADABLE: [u8; 16] = *b"tercet unreadabl";

/// A read that is done again block by block.
#[derive(Debug)]
pub(crate) struct Reread {
    kind: OpKind,
    first: u32,
    whole: Buf,
    /// Blocks that are done.
    done: usize,
    /// The next one is being read.
    reading: bool,
}

impl Store {
    /// Where a read began, if it is one that is tried again.
    fn read_from(&self, kind: OpKind) -> Option<u32> {
        match kind {
            OpKind::Read { job, part } => Some(self.read_first(job, part)),
            OpKind::Leaf { no, part } => Some(self.leaves.runs(no)[part].0),
            OpKind::CopyRead { unit } => self.checkpoint.as_ref().map(|now| now.copy_first(unit)),
            _ => None,
        }
    }

    /// The device has refused a read: it is done again. Gives back what is no such thing.
    pub(crate) fn read_again(&mut self, kind: OpKind, done: DiskDone) -> Option<DiskDone> {
        let refused = matches!(done.result, Err(DiskError::Io(_))) && self.failed.is_none();
        let Some(first) = self.read_from(kind).filter(|_| refused) else { return Some(done) };
        let whole = done.buf.expect("a read's buffer comes back");
        let id = self.next_reread;
        self.next_reread += 1;
        self.rereads.insert(id, Reread { kind, first, whole, done: 0, reading: false });
        None
    }

    /// Sends the next block of each on its way, where there are buffers.
    pub(crate) fn pump_rereads(&mut self) {
        let idle = self.rereads.iter().filter(|(_, reread)| !reread.reading);
        let idle: Vec<u64> = idle.map(|(id, _)| *id).collect();
        for id in idle {
            let Some(into) = self.options.arena.take(1) else { return };
            let reread = self.rereads.get_mut(&id).expect("listed");
            reread.reading = true;
            let block = u64::from(reread.first) + reread.done as u64;
            let offset = block * BLOCK_BYTES as u64;
            self.submit(OpKind::Reread { id }, DiskOp::Read { offset, into });
        }
    }

    /// A block has been read again, or not.
    pub(crate) fn on_reread(&mut self, id: u64, done: DiskDone) {
        let reread = self.rereads.get_mut(&id).expect("a read in progress");
        let into = reread.whole.chunks_mut(BLOCK_BYTES).nth(reread.done).expect("a block of it");
        reread.reading = false;
        reread.done += 1;
        if done.result.is_ok() {
            into.copy_from_slice(&done.buf.expect("a read's buffer comes back"));
            self.unreadable_in_row = 0;
        } else {
            let pieces = into.chunks_mut(UNREADABLE.len());
            pieces.for_each(|piece| piece.copy_from_slice(&UNREADABLE));
            self.unreadable_in_row += 1;
        }
        let over = reread.done == reread.whole.len() / BLOCK_BYTES;
        if self.unreadable_in_row > UNREADABLE_IN_ROW_MAX {
            self.fail("nothing can be read from it any more");
        }
        let failed = self.failed.is_some();
        if over || failed {
            let Reread { kind, whole, .. } = self.rereads.remove(&id).expect("looked up above");
            let result = if failed { Err(DiskError::Gone) } else { Ok(()) };
            self.completed(kind, DiskDone { token: DiskToken(0), buf: Some(whole), result });
        }
    }
}
