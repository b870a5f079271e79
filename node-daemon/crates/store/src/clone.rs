//! Clones (rule S3): a replica that shares a snapshot's chunks from its creation on, or, where the
//! source's replica here has not applied the snapshot yet, from then on.
//!
//! Until then it is incomplete: durably so from the very record that makes it, so that no crash can
//! leave an empty replica that counts as a copy. Nobody appends to it meanwhile. When the snapshot is
//! applied its map is taken at once, before anything can delete the snapshot again, and one record
//! makes the replica complete. No checkpoint begins in between (`unsettled`), so what is replayed
//! after a crash takes the same map at the same place of the log.

use tercet_proto::disk::Item;
use tercet_proto::storage::{Incomplete, NewReplica, Source, StorageError, StorageEvent};
use tercet_proto::{EntryKind, Place, VolumeId};

use crate::log::Effect;
use crate::map::{Map, Space};
use crate::store::Store;

/// A clone that waits for its source's snapshot to be applied here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Awaiting {
    number: u64,
    size_blocks: u64,
    source: Source,
}

impl Store {
    /// The map that a replica begins with, and what it awaits; or why it cannot be made.
    pub(crate) fn prepare_create(
        &mut self,
        new: &NewReplica,
    ) -> Result<(Map, Option<Incomplete>), StorageError> {
        self.alive()?;
        if self.replicas.contains_key(&new.volume) || self.creating.contains(&new.volume) {
            return Err(StorageError::Exists(new.volume));
        }
        self.check_space(1, 0)?;
        let empty = Map::new(new.size_blocks);
        let Some(source) = new.source else {
            return Ok((empty, None));
        };
        if let Some(map) = self.inherited(source, new.size_blocks)? {
            return Ok((map, None));
        }
        let replica = self.live_replica(source.volume)?;
        let there = replica.incomplete.is_none() && replica.applied.lsn >= source.place.lsn;
        if !new.incomplete || there {
            return Err(StorageError::NoSnapshot(source.volume, source.snapshot));
        }
        let awaits = (!self.takes_empty_clones()).then_some(Incomplete::Awaits(source));
        Ok((empty, awaits))
    }

    /// The snapshot's map as a clone has it, where it is applied here. While the source itself is
    /// being copied its map is in no log, and after a crash it may be another (C2).
    fn inherited(&mut self, source: Source, size_blocks: u64) -> Result<Option<Map>, StorageError> {
        let replica = self.live_replica(source.volume)?;
        if replica.incomplete.is_some() {
            return Ok(None);
        }
        let found = replica.snapshots.iter().find(|snap| snap.state.id == source.snapshot);
        let Some(snapshot) = found else { return Ok(None) };
        assert!(size_blocks >= snapshot.state.size_blocks, "S3: at least the source's size");
        let of = snapshot.map.clone();
        let mut map = of.inherit(&mut self.leaves);
        of.release(&mut Space { alloc: &mut self.alloc, leaves: &mut self.leaves });
        map.grow(size_blocks);
        Ok(Some(map))
    }

    /// From now on it is looked at whenever a snapshot is applied.
    pub(crate) fn await_snapshot(&mut self, volume: VolumeId, awaiting: Awaiting) {
        self.awaiting.insert(volume, awaiting);
    }

    /// An entry was applied at run time: clones may have waited for it.
    pub(crate) fn fill_clones(&mut self, volume: VolumeId, kind: EntryKind) {
        let EntryKind::Snapshot { id } = kind else { return };
        let of_this = |source: Source| (source.volume, source.snapshot) == (volume, id);
        let waiting = self.awaiting.iter().filter(|(_, one)| of_this(one.source));
        let waiting: Vec<VolumeId> = waiting.map(|(clone, _)| *clone).collect();
        for clone in waiting {
            self.fill(clone);
        }
    }

    /// A copy has made a volume what it is (C2): clones may have waited for its snapshots.
    pub(crate) fn fill_clones_of(&mut self, volume: VolumeId) {
        let waiting = self.awaiting.iter().filter(|(_, one)| one.source.volume == volume);
        let waiting: Vec<VolumeId> = waiting.map(|(clone, _)| *clone).collect();
        for clone in waiting {
            self.fill(clone);
        }
    }

    /// After opening: whoever waits does so again, and a fill that a crash cut off is made up for.
    pub(crate) fn resume_fills(&mut self) {
        let waiting = self.replicas.iter().filter_map(|(volume, replica)| {
            let Some(Incomplete::Awaits(source)) = replica.incomplete else { return None };
            Some((*volume, Awaiting::new(replica.number, replica.size_blocks, source)))
        });
        self.awaiting = waiting.collect();
        let clones: Vec<VolumeId> = self.awaiting.keys().copied().collect();
        for clone in clones {
            self.fill(clone);
        }
    }

    fn fill(&mut self, volume: VolumeId) {
        let Awaiting { number, size_blocks, source } = self.awaiting[&volume];
        let Ok(Some(map)) = self.inherited(source, size_blocks) else { return };
        self.awaiting.remove(&volume);
        self.log.unsettled += 1;
        let item = Item::Fill { volume, number, source };
        self.push_change(&item, Effect::Fill { volume, number, map });
    }

    /// The record that makes a clone complete is durable.
    pub(crate) fn filled(&mut self, volume: VolumeId, number: u64, map: Map) {
        self.log.unsettled -= 1;
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        let found = self.replicas.get_mut(&volume).filter(|found| found.number == number);
        let Some(replica) = found.filter(|found| found.awaits()) else {
            return map.release(&mut space);
        };
        assert_eq!(replica.tail, Place::EMPTY, "S3: nobody appends to an incomplete replica");
        std::mem::replace(&mut replica.head, map).release(&mut space);
        replica.incomplete = None;
        self.events.push(StorageEvent::Filled { volume });
    }

    #[cfg(not(feature = "canary"))]
    #[allow(clippy::unused_self)] // the other build looks at the options
    fn takes_empty_clones(&self) -> bool {
        false
    }

    #[cfg(feature = "canary")]
    fn takes_empty_clones(&self) -> bool {
        self.options.canary == Some(crate::options::Canary::EmptyClone)
    }
}

impl Awaiting {
    pub(crate) fn new(number: u64, size_blocks: u64, source: Source) -> Self {
        Self { number, size_blocks, source }
    }
}
