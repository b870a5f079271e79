//! A metadata checkpoint: a slot (two, alternating) that names a chain of root blocks.

use super::{Block, Get, Malformed, Put, StoreId, check_seal, seal};
use crate::entry::BLOCK_BYTES;

const SLOT_MAGIC: [u8; 4] = *b"TCK1";
const ROOT_MAGIC: [u8; 4] = *b"TRT1";
const ROOT_HEADER_BYTES: usize = 48;

/// Bytes of the root stream in one root block.
pub const ROOT_PAYLOAD_BYTES: usize = BLOCK_BYTES - ROOT_HEADER_BYTES;

/// Names a complete checkpoint. Written only when everything it names is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The store.
    pub store: StoreId,
    /// Number of the checkpoint; the larger of the two slots counts.
    pub sequence: u64,
    /// The log is replayed from here.
    pub log_start: u64,
    /// Position of the record before `log_start`; `u64::MAX` where there is none.
    pub previous: u64,
    /// Its CRC, so that a stale record at `log_start` is not taken for the next one.
    pub previous_crc: u32,
    /// Records below this are in the checkpoint; all of them were durable when it was taken.
    pub frozen: u64,
    /// The first block of the root chain.
    pub root: u32,
    /// Blocks of the chain.
    pub root_blocks: u32,
    /// Bytes of the root stream.
    pub root_bytes: u64,
    /// CRC32C of the root stream.
    pub root_crc: u32,
}

impl Slot {
    /// The block's bytes.
    pub fn encode(&self) -> Box<Block> {
        let mut put = Put(Vec::with_capacity(BLOCK_BYTES));
        put.u32(0);
        put.bytes(&SLOT_MAGIC);
        put.bytes(&self.store.0);
        put.u64(self.sequence);
        put.u64(self.log_start);
        put.u64(self.previous);
        put.u64(self.frozen);
        put.u32(self.root);
        put.u32(self.root_blocks);
        put.u64(self.root_bytes);
        put.u32(self.root_crc);
        put.u32(self.previous_crc);
        put.0.resize(BLOCK_BYTES, 0);
        seal(&mut put.0);
        put.0.into_boxed_slice().try_into().expect("one block")
    }

    /// Reads one.
    pub fn decode(block: &[u8]) -> Result<Self, Malformed> {
        check_seal(block, SLOT_MAGIC)?;
        let mut get = Get(&block[8..]);
        Ok(Self {
            store: StoreId(get.uuid()?.into_bytes()),
            sequence: get.u64()?,
            log_start: get.u64()?,
            previous: get.u64()?,
            frozen: get.u64()?,
            root: get.u32()?,
            root_blocks: get.u32()?,
            root_bytes: get.u64()?,
            root_crc: get.u32()?,
            previous_crc: get.u32()?,
        })
    }
}

/// One block of a root stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootBlock {
    /// The store.
    pub store: StoreId,
    /// The checkpoint.
    pub sequence: u64,
    /// Place in the chain, from 0.
    pub index: u32,
    /// The next block of the chain; 0 at the end.
    pub next: u32,
    /// At most [`ROOT_PAYLOAD_BYTES`] of the stream.
    pub payload: Vec<u8>,
}

impl RootBlock {
    /// The block's bytes.
    pub fn encode(&self) -> Box<Block> {
        assert!(self.payload.len() <= ROOT_PAYLOAD_BYTES, "fits a root block");
        let mut put = Put(Vec::with_capacity(BLOCK_BYTES));
        put.u32(0);
        put.bytes(&ROOT_MAGIC);
        put.bytes(&self.store.0);
        put.u64(self.sequence);
        put.u32(self.index);
        put.u32(self.next);
        put.u32(u32::try_from(self.payload.len()).expect("checked"));
        put.u32(0);
        assert_eq!(put.0.len(), ROOT_HEADER_BYTES, "a root block's header");
        put.bytes(&self.payload);
        put.0.resize(BLOCK_BYTES, 0);
        seal(&mut put.0);
        put.0.into_boxed_slice().try_into().expect("one block")
    }

    /// Reads one.
    pub fn decode(block: &[u8]) -> Result<Self, Malformed> {
        check_seal(block, ROOT_MAGIC)?;
        let mut get = Get(&block[8..]);
        let store = StoreId(get.uuid()?.into_bytes());
        let (sequence, index, next) = (get.u64()?, get.u32()?, get.u32()?);
        let (len, _) = (get.u32()? as usize, get.u32()?);
        Ok(Self { store, sequence, index, next, payload: get.bytes(len)?.to_vec() })
    }
}
