//! What stands on a device: superblocks, log records, checkpoint slots, root blocks and leaves, each
//! as a Rust structure with `encode` and `decode`.
//!
//! The bytes are described one by one in `docs/disk-format.md`. All integers are little-endian. A
//! structure carries a CRC32C of everything else in it, a magic number, the id of the store and its
//! own place, so that torn, lost and misdirected writes are noticed. Where structures lie, when they
//! are written and what a missing one means is left to `tercet-store`.

mod codec;
mod item;
mod leaf;
mod record;
mod root;
mod superblock;

pub use codec::{Get, Malformed, Put};
pub use item::{EntryItem, Item, Location};
pub use leaf::{CHUNK_BLOCKS, LeafBlock, LeafImage};
pub use record::{NAMES_MAX, Name, RecordHeader};
pub use root::{ROOT_PAYLOAD_BYTES, RootBlock, Slot};
pub use superblock::Superblock;

use crate::entry::BLOCK_BYTES;

/// Version of everything on the device; a store opens only its own.
pub const FORMAT_VERSION: u32 = 3;

/// The oldest version that is read. Each byte of an older version means the same in this one, which
/// is written from the first opening on; an older program does not know a clone that awaits its
/// snapshot (version 2: tags 2 and 3 of a source and of `incomplete`, item 8) or a copy that ends
/// (version 3: item 9), and refuses what is newer than it.
pub const FORMAT_VERSION_MIN: u32 = 1;

/// One block, as it is read and written.
pub type Block = [u8; BLOCK_BYTES];

/// Blocks from `start` of the device on: first block and how many.
pub type Run = (u32, u32);

/// Names a store for as long as its device is formatted; drawn by the executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StoreId(pub [u8; 16]);

/// CRC32C (Castagnoli) of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC32C of the concatenation of two pieces with these CRCs, the second `len_second` bytes long.
pub fn crc32c_combine(first: u32, second: u32, len_second: u64) -> u32 {
    let algorithm = crc_fast::CrcAlgorithm::Crc32Iscsi;
    let crc =
        crc_fast::checksum_combine(algorithm, u64::from(first), u64::from(second), len_second);
    u32::try_from(crc).expect("32 bits of CRC")
}

/// Puts the CRC32C of everything behind the first four bytes into the first four.
fn seal(bytes: &mut [u8]) {
    let crc = crc32c(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
}

/// Checks [`seal`] and the magic number behind it.
fn check_seal(bytes: &[u8], magic: [u8; 4]) -> Result<(), Malformed> {
    if bytes.len() < 8 || bytes[4..8] != magic {
        return Err(Malformed("magic number"));
    }
    let stored = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
    if stored != crc32c(&bytes[4..]) {
        return Err(Malformed("checksum"));
    }
    Ok(())
}
