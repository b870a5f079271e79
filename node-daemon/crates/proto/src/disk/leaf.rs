//! A leaf: for each of the 1,024 blocks of a chunk where it lies, its checksum, and the place of its
//! last change (rule C2), holes included.

use super::{Get, Malformed, Put, StoreId, check_seal, seal};
use crate::entry::{BLOCK_BYTES, Place};
use crate::ids::{Epoch, Lsn};

const MAGIC: [u8; 4] = *b"TLF1";

/// Blocks of a chunk: 4 MiB.
pub const CHUNK_BLOCKS: usize = 1024;

/// One block of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafBlock {
    /// Block of the device; 0 for a hole, which reads as zeroes.
    pub device: u32,
    /// CRC32C of the block; 0 for a hole.
    pub crc: u32,
    /// The entry that changed it last.
    pub stamp: Place,
}

impl LeafBlock {
    /// Nothing was ever written.
    pub const NEVER: Self =
        Self { device: 0, crc: 0, stamp: Place { epoch: Epoch(0), lsn: Lsn(0) } };
}

/// A leaf as it is read and written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafImage {
    /// The store.
    pub store: StoreId,
    /// Names this version of this leaf; never used twice in a store.
    pub id: u64,
    /// Number of the chunk within its volume.
    pub chunk: u32,
    /// One for each block of the chunk.
    pub blocks: Box<[LeafBlock]>,
}

impl LeafImage {
    /// Its bytes: runs of blocks with one stamp and consecutive places, then a checksum for each
    /// block that is no hole; padded with zeroes to whole blocks.
    pub fn encode(&self) -> Vec<u8> {
        let mut put = Put(Vec::with_capacity(2 * BLOCK_BYTES));
        put.u32(0);
        put.bytes(&MAGIC);
        put.bytes(&self.store.0);
        put.u64(self.id);
        put.u32(self.chunk);
        let runs_at = put.0.len();
        put.u32(0);
        let mut runs = 0_u32;
        let mut start = 0;
        while start < CHUNK_BLOCKS {
            let first = self.blocks[start];
            let mut end = start + 1;
            while end < CHUNK_BLOCKS && follows(first, end - start, self.blocks[end]) {
                end += 1;
            }
            put.u16(u16::try_from(start).expect("below 1,024"));
            put.u16(u16::try_from(end - start).expect("at most 1,024"));
            put.u32(first.device);
            put.place(first.stamp);
            runs += 1;
            start = end;
        }
        for block in self.blocks.iter().filter(|block| block.device != 0) {
            put.u32(block.crc);
        }
        put.0[runs_at..runs_at + 4].copy_from_slice(&runs.to_le_bytes());
        put.0.resize(put.0.len().next_multiple_of(BLOCK_BYTES), 0);
        seal(&mut put.0);
        put.0
    }

    /// Reads one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        check_seal(bytes, MAGIC)?;
        let mut get = Get(&bytes[8..]);
        let store = StoreId(get.uuid()?.into_bytes());
        let (id, chunk, runs) = (get.u64()?, get.u32()?, get.u32()?);
        let mut blocks = vec![LeafBlock::NEVER; CHUNK_BLOCKS].into_boxed_slice();
        let mut next = 0;
        for _ in 0..runs {
            let (start, count) = (usize::from(get.u16()?), usize::from(get.u16()?));
            let (device, stamp) = (get.u32()?, get.place()?);
            if start != next || count == 0 || count > CHUNK_BLOCKS - start {
                return Err(Malformed("runs of a leaf"));
            }
            next = start + count;
            for (offset, block) in (0_u32..).zip(&mut blocks[start..next]) {
                let at = if device == 0 { 0 } else { device.checked_add(offset).ok_or(RUN)? };
                *block = LeafBlock { device: at, crc: 0, stamp };
            }
        }
        if next != CHUNK_BLOCKS {
            return Err(Malformed("runs of a leaf"));
        }
        for block in blocks.iter_mut().filter(|block| block.device != 0) {
            block.crc = get.u32()?;
        }
        Ok(Self { store, id, chunk, blocks })
    }
}

const RUN: Malformed = Malformed("device block of a leaf");

fn follows(first: LeafBlock, distance: usize, block: LeafBlock) -> bool {
    let device = if first.device == 0 { 0 } else { first.device + distance as u32 };
    block.stamp == first.stamp && block.device == device
}
