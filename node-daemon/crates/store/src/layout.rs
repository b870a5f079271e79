//! Where things lie on a device.

/// The two superblocks.
pub(crate) const SUPERBLOCK_BLOCKS: [u32; 2] = [0, 16];
/// The two checkpoint slots: checkpoint n is named by slot n modulo 2.
pub(crate) const SLOT_BLOCKS: [u32; 2] = [32, 48];
/// The log ring begins here, the data area behind it.
pub(crate) const RING_START: u32 = 64;
