//! Making a store: everything else first, the superblocks last, so that half a format is none.

use tercet_proto::disk::{FORMAT_VERSION, Put, RootBlock, Slot, Superblock, crc32c};
use tercet_proto::{BLOCK_BYTES, InstanceId};

use crate::disk::Disk;
use crate::io::Io;
use crate::layout::{RING_START, SLOT_BLOCKS, SUPERBLOCK_BLOCKS};
use crate::options::{
    ARENA_BYTES_MIN, CAPACITY_BYTES_MAX, CAPACITY_BYTES_MIN, FormatOptions, OpenError, Options,
    RING_BLOCKS_MAX, RING_BLOCKS_MIN,
};
use crate::store::Store;

/// Ring blocks of a store that is not told otherwise: a sixteenth, at most 128 MiB.
const RING_BLOCKS_DEFAULT_MAX: u32 = 1 << 15;
/// As much is zeroed at a time: 4 MiB.
const ZERO_BLOCKS: u32 = 1024;

pub(crate) fn check_capacity(capacity_bytes: u64) -> Result<u32, OpenError> {
    if !(CAPACITY_BYTES_MIN..=CAPACITY_BYTES_MAX).contains(&capacity_bytes) {
        let (min_bytes, max_bytes) = (CAPACITY_BYTES_MIN, CAPACITY_BYTES_MAX);
        return Err(OpenError::Capacity { capacity_bytes, min_bytes, max_bytes });
    }
    Ok(u32::try_from(capacity_bytes / BLOCK_BYTES as u64).expect("below the largest"))
}

fn divide(capacity_blocks: u32, format: &FormatOptions) -> Result<Superblock, OpenError> {
    let usual = (capacity_blocks / 16).clamp(RING_BLOCKS_MIN, RING_BLOCKS_DEFAULT_MAX);
    let ring_blocks = format.ring_blocks.unwrap_or(usual);
    let room = capacity_blocks - RING_START - RING_BLOCKS_MIN / 2;
    if !(RING_BLOCKS_MIN..=RING_BLOCKS_MAX.min(room)).contains(&ring_blocks) {
        let text = format!(
            "a log ring of {ring_blocks} blocks: it takes {RING_BLOCKS_MIN} to {RING_BLOCKS_MAX}, \
             and room for data behind it"
        );
        return Err(OpenError::Options(text));
    }
    let data = RING_START + ring_blocks;
    Ok(Superblock {
        version: FORMAT_VERSION,
        store: format.store,
        cluster: format.cluster,
        node: format.node.clone(),
        shard: format.shard,
        generation: 0,
        instance: InstanceId::from_bytes([0; 16]),
        capacity_blocks,
        ring: (RING_START, ring_blocks),
        data: (data, capacity_blocks - data),
    })
}

/// The root of a store without replicas.
fn empty_root(superblock: &Superblock) -> (Box<[u8; BLOCK_BYTES]>, Slot) {
    let mut put = Put::default();
    put.u64(1);
    put.u64(1);
    put.u32(0);
    put.u32(0);
    let stream = put.0;
    let slot = Slot {
        store: superblock.store,
        sequence: 1,
        log_start: 0,
        previous: u64::MAX,
        previous_crc: 0,
        frozen: 0,
        root: superblock.data.0,
        root_blocks: 1,
        root_bytes: stream.len() as u64,
        root_crc: crc32c(&stream),
    };
    let store = superblock.store;
    let root = RootBlock { store, sequence: 1, index: 0, next: 0, payload: stream };
    (root.encode(), slot)
}

impl Store {
    /// Makes a store without replicas. The log is written with zeroes.
    ///
    /// # Errors
    /// The device has the wrong size, holds a store already, or fails.
    pub fn format(
        disk: &mut dyn Disk,
        format: &FormatOptions,
        options: &Options,
    ) -> Result<(), OpenError> {
        check_arena(options)?;
        let mut io = Io::new(disk, options.arena.clone());
        let capacity_blocks = check_capacity(io.capacity_bytes())?;
        let superblock = divide(capacity_blocks, format)?;
        if !format.overwrite {
            for block in SUPERBLOCK_BLOCKS {
                if let Ok(found) = Superblock::decode(&io.read((block, 1))?) {
                    return Err(OpenError::Formatted(found.node));
                }
            }
        }
        let mut block = 0;
        while block < superblock.data.0 {
            let count = ZERO_BLOCKS.min(superblock.data.0 - block);
            io.write_zeroes((block, count))?;
            block += count;
        }
        let (root, slot) = empty_root(&superblock);
        io.write(slot.root, &*root, false)?;
        io.flush()?;
        io.write(SLOT_BLOCKS[1], &*slot.encode(), true)?;
        for block in SUPERBLOCK_BLOCKS {
            io.write(block, &*superblock.encode(), true)?;
        }
        Ok(())
    }
}

pub(crate) fn check_arena(options: &Options) -> Result<(), OpenError> {
    if options.arena.blocks() * BLOCK_BYTES < ARENA_BYTES_MIN {
        let text = format!("the arena has less than {ARENA_BYTES_MIN} bytes");
        return Err(OpenError::Options(text));
    }
    Ok(())
}
