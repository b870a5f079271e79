//! Repair (rule C4): a version of a block for a peer, and a peer's bytes for a bad block here.
//!
//! The bytes go to a fresh block, never in place: what the durable checkpoint names is not touched,
//! and a device that cannot read a place need not be trusted to write it. When they are there, each
//! leaf that names the bad block is replaced by one that names the fresh one, in every map that
//! shares it. The next checkpoint makes that durable as it does everything else: its flush comes
//! before its slot. A crash before it gives back the maps of before, with the bad block in them,
//! which is found again; after it the bad block is free, like any other that nobody names. The log
//! knows nothing of it: an entry that still names the bad block keeps it until it is cut, and
//! applied once more by a start it brings the bad block back, to be found again.

use std::sync::Arc;

use bytes::Bytes;
use tercet_proto::disk::{LeafBlock, crc32c};
use tercet_proto::storage::StorageError;
use tercet_proto::{BLOCK_BYTES, BlockRange, BlockVersion, Repairs, StorageEvent, Token, VolumeId};

use crate::disk::DiskOp;
use crate::map::{Chunk, Leaf, Map, Space, split};
use crate::store::{OpKind, Store};

/// Bytes of a peer's on their way to a fresh block.
#[derive(Debug)]
pub(crate) struct Mending {
    volume: VolumeId,
    block: u64,
    /// The bad block of the data area.
    bad: u32,
    /// The fresh one, held meanwhile, and the checksum of what is written there.
    pub(crate) fresh: u32,
    crc: u32,
    /// Leaves that it makes dirty, as far as can be told now.
    leaves: u64,
    token: Token,
}

impl Repairs for Store {
    fn read_version(&mut self, volume: VolumeId, version: BlockVersion, token: Token) {
        let parts = self.version_map(volume, &version).map(|(map, _)| {
            let range = BlockRange { start: version.block, count: 1 };
            self.map_parts(map, range)
        });
        if let Err(error) = parts.and_then(|parts| self.start_parts(volume, parts, token)) {
            self.events.push(StorageEvent::Read { token, result: Err(error) });
        }
    }

    fn repair(&mut self, volume: VolumeId, version: BlockVersion, data: Bytes, token: Token) {
        if let Err(error) = self.start_repair(volume, &version, &data, token) {
            self.done(token, Err(error));
        }
    }
}

impl Store {
    /// The map that a version is named by, and what it says of the block, if it has that version.
    fn version_map(
        &self,
        volume: VolumeId,
        version: &BlockVersion,
    ) -> Result<(&Map, LeafBlock), StorageError> {
        let replica = self.live_replica(volume)?;
        let map = match version.snapshot {
            None => Some(&replica.head),
            Some(id) => {
                let mut all = replica.snapshots.iter();
                all.find(|snapshot| snapshot.state.id == id).map(|snapshot| &snapshot.map)
            }
        };
        let found = map.map(|map| (map, map.block(version.block)));
        found
            .filter(|(_, entry)| {
                entry.device != 0 && (entry.stamp == version.stamp || self.takes_other_versions())
            })
            .ok_or(StorageError::OtherVersion(volume))
    }

    /// Sends the bytes to a fresh block, or changes nothing.
    fn start_repair(
        &mut self,
        volume: VolumeId,
        version: &BlockVersion,
        data: &Bytes,
        token: Token,
    ) -> Result<(), StorageError> {
        assert_eq!(data.len(), BLOCK_BYTES, "a block is repaired at a time");
        let block = version.block;
        let (_, entry) = self.version_map(volume, version)?;
        let crc = crc32c(data);
        if crc != entry.crc && !self.takes_other_versions() {
            return Err(StorageError::Checksum { volume, block });
        }
        // As discarding, this must work where writes find no room: it gives back what it takes.
        let leaves = u64::from(self.alloc.holders(entry.device));
        self.check_space(0, leaves)?;
        let mut buf = self.options.arena.take(1).ok_or(StorageError::Busy)?;
        buf.copy_from_slice(data);
        let fresh = self.alloc.take(1).ok_or(StorageError::Busy)?[0].0;
        let id = self.next_mending;
        self.next_mending += 1;
        self.potential_leaves += leaves;
        let mending = Mending { volume, block, bad: entry.device, fresh, crc, leaves, token };
        self.mending.insert(id, mending);
        let offset = u64::from(fresh) * BLOCK_BYTES as u64;
        self.submit(OpKind::Mend { id }, DiskOp::Write { offset, data: buf, fua: false });
        Ok(())
    }

    /// The bytes are on the device, if not durable: the maps may name them.
    pub(crate) fn on_mended(&mut self, id: u64) {
        let Mending { volume, block, bad, fresh, crc, leaves, token } =
            self.mending.remove(&id).expect("a repair in progress");
        self.potential_leaves -= leaves;
        let replaced = self.replace_block(block, bad, (fresh, crc));
        self.alloc.release(fresh); // the leaves hold it now, if any names it
        if !replaced {
            return self.done(token, Err(StorageError::OtherVersion(volume)));
        }
        self.changed = true;
        self.scrub.repaired(bad);
        self.done(token, Ok(()));
    }

    /// Puts `fresh` into the place of `bad` in every map: the leaves that differ stay as many as
    /// they were.
    fn replace_block(&mut self, block: u64, bad: u32, fresh: (u32, u32)) -> bool {
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        let mut made: Vec<(u64, Arc<Leaf>)> = Vec::new();
        let of_replicas = self.replicas.values_mut().flat_map(|replica| {
            let snapshots = replica.snapshots.iter_mut().map(|snapshot| &mut snapshot.map);
            snapshots.chain([&mut replica.head])
        });
        let of_views = self.views.values_mut().flat_map(crate::view::Frozen::maps_mut);
        for map in of_replicas.chain(of_views) {
            replace_in(map, block, bad, fresh, &mut made, &mut space);
        }
        !made.is_empty()
    }

    #[cfg(not(feature = "canary"))]
    #[allow(clippy::unused_self)] // the other build looks at the options
    fn takes_other_versions(&self) -> bool {
        false
    }

    #[cfg(feature = "canary")]
    fn takes_other_versions(&self) -> bool {
        self.options.canary == Some(crate::options::Canary::RepairOtherVersion)
    }
}

fn replace_in(
    map: &mut Map,
    block: u64,
    bad: u32,
    (device, crc): (u32, u32),
    made: &mut Vec<(u64, Arc<Leaf>)>,
    space: &mut Space<'_>,
) {
    let (chunk, index) = split(block);
    let Some(Chunk::Leaf { leaf, .. }) = map.chunks.get_mut(chunk) else { return };
    if leaf.blocks[index].device != bad {
        return;
    }
    let found = made.iter().find(|(old, _)| *old == leaf.id).map(|(_, new)| Arc::clone(new));
    let new = found.unwrap_or_else(|| {
        let mut blocks = leaf.blocks.clone();
        blocks[index] = LeafBlock { device, crc, ..blocks[index] };
        for held in blocks.iter().filter(|one| one.device != 0) {
            space.alloc.hold(held.device);
        }
        let new = Arc::new(space.leaves.new_leaf(blocks));
        made.push((leaf.id, Arc::clone(&new)));
        new
    });
    let old = std::mem::replace(leaf, new);
    space.leaves.release(old, space.alloc);
}
