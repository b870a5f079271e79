//! The superblock: who the store is and how the device is divided. Two copies.

use super::{
    Block, FORMAT_VERSION, FORMAT_VERSION_MIN, Get, Malformed, Put, Run, StoreId, check_seal, seal,
};
use crate::entry::BLOCK_BYTES;
use crate::ids::{InstanceId, NodeName};
use uuid::Uuid;

const MAGIC: [u8; 4] = *b"TSB1";

/// Who the store is, who opened it last, how the device is divided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Of everything on this device.
    pub version: u32,
    /// The store.
    pub store: StoreId,
    /// The cluster it belongs to.
    pub cluster: Uuid,
    /// The node it belongs to.
    pub node: NodeName,
    /// Its number on that node.
    pub shard: u16,
    /// Grows with each opening; of two copies the larger counts.
    pub generation: u64,
    /// The engine that opened it last (rule L5); all zeroes after format.
    pub instance: InstanceId,
    /// Blocks of the device that the store uses.
    pub capacity_blocks: u32,
    /// The log ring.
    pub ring: Run,
    /// The data area.
    pub data: Run,
}

impl Superblock {
    /// The block's bytes.
    pub fn encode(&self) -> Box<Block> {
        let mut put = Put(Vec::with_capacity(BLOCK_BYTES));
        put.u32(0);
        put.bytes(&MAGIC);
        put.u32(self.version);
        put.bytes(&self.store.0);
        put.bytes(self.cluster.as_bytes());
        put.u64(self.generation);
        put.bytes(self.instance.as_bytes());
        for value in [self.capacity_blocks, self.ring.0, self.ring.1, self.data.0, self.data.1] {
            put.u32(value);
        }
        put.u16(self.shard);
        put.text(self.node.as_str());
        put.0.resize(BLOCK_BYTES, 0);
        seal(&mut put.0);
        put.0.into_boxed_slice().try_into().expect("one block")
    }

    /// Reads one; whether its numbers fit the device is left to the store.
    pub fn decode(block: &[u8]) -> Result<Self, Malformed> {
        check_seal(block, MAGIC)?;
        let mut get = Get(&block[8..]);
        let version = get.u32()?;
        if !(FORMAT_VERSION_MIN..=FORMAT_VERSION).contains(&version) {
            return Err(Malformed("format version"));
        }
        Ok(Self {
            version,
            store: StoreId(get.uuid()?.into_bytes()),
            cluster: get.uuid()?,
            generation: get.u64()?,
            instance: InstanceId(get.uuid()?),
            capacity_blocks: get.u32()?,
            ring: (get.u32()?, get.u32()?),
            data: (get.u32()?, get.u32()?),
            shard: get.u16()?,
            node: NodeName::new(get.text()?),
        })
    }
}
