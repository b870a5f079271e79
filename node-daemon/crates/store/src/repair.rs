//! Repair (rule C4): a version of a block for a peer, and a peer's bytes for a bad block here.
//!
//! The bytes go to a fresh block, never in place: what the durable checkpoint names is not touched,
//! and a device that cannot read a place need not be trusted to write it. When they are there, each
//! leaf that names the bad block gets one over it that names the fresh one, in every map that shares
//! it. Leaves that are not at hand are read for that (`task`). The next checkpoint makes that
//! durable as it does everything else: its flush comes before its slot. A crash before it gives
//! back the maps of before, with the bad block in them, which is found again; after it the bad
//! block is free, like any other that nobody names. The log knows nothing of it: an entry that
//! still names the bad block keeps it until it is cut, and applied once more by a start it brings
//! the bad block back, to be found again.

use std::collections::BTreeSet;

use bytes::Bytes;
use tercet_proto::disk::{LeafBlock, crc32c};
use tercet_proto::storage::StorageError;
use tercet_proto::{BLOCK_BYTES, BlockRange, BlockVersion, Repairs, StorageEvent, Token, VolumeId};

use crate::disk::DiskOp;
use crate::leaf::{Chunk, LeafNo};
use crate::map::{Space, split};
use crate::read::For;
use crate::store::{OpKind, Store};
use crate::task::Task;

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
        self.run_task(Task::ReadVersion { volume, version, token });
    }

    fn repair(&mut self, volume: VolumeId, version: BlockVersion, data: Bytes, token: Token) {
        self.run_task(Task::Repair { volume, version, data, token });
    }
}

impl Store {
    pub(crate) fn read_version_now(
        &mut self,
        volume: VolumeId,
        version: &BlockVersion,
        token: Token,
    ) -> Result<(), LeafNo> {
        let entry = self.version_of(volume, version)?;
        let range = BlockRange { start: version.block, count: 1 };
        let started = entry.and_then(|entry| {
            let parts = self.map_parts(&[range], &[entry]);
            let started = self.start_job(volume, For::Read(token), parts);
            started.map_err(|(_, error)| error)
        });
        if let Err(error) = started {
            self.events.push(StorageEvent::Read { token, result: Err(error) });
        }
        Ok(())
    }

    pub(crate) fn repair_now(
        &mut self,
        volume: VolumeId,
        version: &BlockVersion,
        data: &Bytes,
        token: Token,
    ) -> Result<(), LeafNo> {
        let entry = self.version_of(volume, version)?;
        let started =
            entry.and_then(|entry| self.start_repair(volume, (version.block, entry), data, token));
        if let Err(error) = started {
            self.done(token, Err(error));
        }
        Ok(())
    }

    /// What the map that a version is named by says of the block, if it has that version.
    fn version_of(
        &self,
        volume: VolumeId,
        version: &BlockVersion,
    ) -> Result<Result<LeafBlock, StorageError>, LeafNo> {
        let replica = match self.live_replica(volume) {
            Ok(replica) => replica,
            Err(error) => return Ok(Err(error)),
        };
        let map = match version.snapshot {
            None => Some(&replica.head),
            Some(id) => {
                let mut all = replica.snapshots.iter();
                all.find(|snapshot| snapshot.state.id == id).map(|snapshot| &snapshot.map)
            }
        };
        let found = map.map(|map| self.look_up(map, version.block)).transpose()?;
        let found = found.filter(|entry| {
            entry.device != 0 && (entry.stamp == version.stamp || self.takes_other_versions())
        });
        Ok(found.ok_or(StorageError::OtherVersion(volume)))
    }

    /// Sends the bytes to a fresh block, or changes nothing.
    fn start_repair(
        &mut self,
        volume: VolumeId,
        (block, entry): (u64, LeafBlock),
        data: &Bytes,
        token: Token,
    ) -> Result<(), StorageError> {
        assert_eq!(data.len(), BLOCK_BYTES, "a block is repaired at a time");
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
        self.submit(OpKind::Mend { id }, DiskOp::Write { offset, data: buf.into(), fua: false });
        Ok(())
    }

    /// The bytes are on the device, if not durable: the maps may name them.
    pub(crate) fn on_mended(&mut self, id: u64) {
        self.run_task(Task::Mend { id });
    }

    pub(crate) fn mend_now(&mut self, id: u64) -> Result<(), LeafNo> {
        let Mending { block, bad, fresh, crc, .. } = self.mending[&id];
        let naming = self.leaves_naming(block, bad)?;
        let Mending { volume, leaves, token, .. } =
            self.mending.remove(&id).expect("a repair in progress");
        self.potential_leaves -= leaves;
        for (no, entry) in &naming {
            self.replace_block(block, *no, LeafBlock { device: fresh, crc, ..*entry });
        }
        self.alloc.release(fresh); // the leaves hold it now, if any names it
        if naming.is_empty() {
            self.done(token, Err(StorageError::OtherVersion(volume)));
            return Ok(());
        }
        self.changed = true;
        self.scrub.repaired(bad);
        self.done(token, Ok(()));
        Ok(())
    }

    /// The bytes stay unused.
    pub(crate) fn give_up_mending(&mut self, id: u64, error: StorageError) {
        let mending = self.mending.remove(&id).expect("a repair in progress");
        self.potential_leaves -= mending.leaves;
        self.alloc.release(mending.fresh);
        self.done(mending.token, Err(error));
    }

    /// The leaves of all maps that name `bad` at this block, and what they say of it.
    fn leaves_naming(&self, block: u64, bad: u32) -> Result<Vec<(LeafNo, LeafBlock)>, LeafNo> {
        let (chunk, index) = split(block);
        let replicas = self.replicas.values().flat_map(|replica| {
            replica.snapshots.iter().map(|snapshot| &snapshot.map).chain([&replica.head])
        });
        let views = self.views.values().flat_map(crate::view::Frozen::maps);
        let all: BTreeSet<LeafNo> =
            replicas.chain(views).filter_map(|map| map.chunk(chunk).leaf()).collect();
        let mut naming = Vec::new();
        for no in all {
            let mut found = Vec::with_capacity(1);
            let own = Chunk::Leaf { no, inherited: false };
            self.leaves.fill(own, (index, index + 1), &mut found)?;
            if found[0].device == bad {
                naming.push((no, found[0]));
            }
        }
        Ok(naming)
    }

    /// Puts a leaf that has `fresh` over one that has not, in every map that names it: those that
    /// share it share the new one.
    fn replace_block(&mut self, block: u64, old: LeafNo, fresh: LeafBlock) {
        let (chunk, index) = split(block);
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        space.leaves.hold(old);
        let over = Chunk::Leaf { no: old, inherited: false };
        space.leaves.hold(old); // not its own: a new leaf is made, not this one changed
        let new = space.leaves.change(over, chunk as u32, space.alloc);
        space.alloc.hold(fresh.device);
        space.leaves.put(new, index, fresh, space.alloc);
        space.leaves.release(old, space.alloc);
        let of_replicas = self.replicas.values_mut().flat_map(|replica| {
            let snapshots = replica.snapshots.iter_mut().map(|snapshot| &mut snapshot.map);
            snapshots.chain([&mut replica.head])
        });
        let of_views = self.views.values_mut().flat_map(crate::view::Frozen::maps_mut);
        for map in of_replicas.chain(of_views) {
            map.replace_leaf(chunk, old, new, &mut space);
        }
        space.leaves.release(new, space.alloc);
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
