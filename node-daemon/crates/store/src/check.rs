//! Counts everything again and says what does not agree: for tests and for doubts.

use std::collections::{HashMap, HashSet};

use tercet_proto::disk::Run;

use crate::cache::LeafData;
use crate::checkpoint::Checkpoint;
use crate::incoming::Writing;
use crate::leaf::LeafNo;
use crate::load::LeafError;
use crate::map::Map;
use crate::parked::Parked;
use crate::replica::{LogEntry, Payload};
use crate::store::Store;
use crate::view::Frozen;

/// What reads a run of the device, as it is now.
pub type ReadRun<'a> = &'a mut dyn FnMut(Run) -> Vec<u8>;

impl Store {
    /// Compares counted with found: holders of each block and of each leaf, free blocks,
    /// reservations, the log's entries. Empty when all is well. Reads every leaf; takes time in
    /// proportion to the device.
    pub fn check(&self, read: ReadRun<'_>) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut fresh: HashMap<u32, u32> = HashMap::new();
        let mut hold = |block: u32| *fresh.entry(block).or_insert(0) += 1;
        for no in self.leaves.all() {
            if let Some(dirty) = self.leaves.dirty_of(no) {
                let held = dirty.patch.iter().filter(|(_, block)| block.device != 0);
                held.for_each(|(_, block)| hold(block.device));
                continue;
            }
            self.leaves.runs(no).iter().flat_map(|run| run.0..run.0 + run.1).for_each(&mut hold);
            match self.leaf_by(no, read) {
                Ok(data) => {
                    data.iter().filter(|block| block.device != 0).for_each(|b| hold(b.device));
                }
                Err(error) => wrong.push(error.to_string()),
            }
        }
        let root = self.root_runs.iter();
        let new_root = self.checkpoint.iter().flat_map(Checkpoint::root_runs);
        let entries = self.replicas.values().flat_map(|replica| &replica.entries);
        let dropped = self.dropped_entries();
        let extents = entries.clone().chain(dropped).flat_map(|entry| match &entry.payload {
            Payload::Extents(runs) => runs.as_slice(),
            _ => &[],
        });
        for run in root.chain(new_root).chain(extents) {
            (run.0..run.0 + run.1).for_each(&mut hold);
        }
        self.writing.values().flat_map(Writing::blocks).for_each(&mut hold);
        self.mending.values().map(|mending| mending.fresh).for_each(&mut hold);
        wrong.extend(self.alloc.compare(&fresh));
        self.check_references(&mut wrong);
        if entries.clone().count() as u64 != self.log.entries {
            wrong.push(format!("{} entries counted", self.log.entries));
        }
        let unapplied = self.replicas.values().flat_map(|replica| {
            let applied = replica.applied.lsn;
            replica.entries.iter().filter(move |entry| entry.header.place.lsn > applied)
        });
        let reserved: u64 =
            unapplied.chain(self.dropped_entries()).map(LogEntry::reserve_blocks).sum();
        if reserved != self.alloc.reserved {
            wrong.push(format!("{} blocks reserved, {reserved} needed", self.alloc.reserved));
        }
        wrong
    }

    /// A clean leaf, from memory or from the device.
    pub(crate) fn leaf_by(&self, no: LeafNo, read: ReadRun<'_>) -> Result<LeafData, LeafError> {
        if let Some(data) = self.leaves.data(no) {
            return Ok(LeafData::clone(data));
        }
        let place = self.leaves.place_of(no);
        let bytes: Vec<u8> = place.runs.iter().flat_map(|run| read(*run)).collect();
        self.decode_leaf(&place, &bytes)
    }

    /// Who names each leaf, found again.
    fn check_references(&self, wrong: &mut Vec<String>) {
        let mut fresh: HashMap<LeafNo, u32> = HashMap::new();
        let mut hold = |no: LeafNo, count: u32| *fresh.entry(no).or_insert(0) += count;
        let mut seen = HashSet::new();
        for segment in self.all_maps().flat_map(Map::segments) {
            if seen.insert(segment.as_ptr()) {
                segment.iter().filter_map(|chunk| chunk.leaf()).for_each(|no| hold(no, 1));
            }
        }
        let (mut dead, mut patched) = (0, 0);
        for no in self.leaves.all() {
            let Some(dirty) = self.leaves.dirty_of(no) else { continue };
            dirty.base.leaf().into_iter().for_each(|base| hold(base, 1));
            patched += dirty.patch.len() as u64;
        }
        let listed = self.checkpoint.iter().flat_map(|now| &now.leaves);
        let parked = self.parked.values().flat_map(Parked::leaves);
        listed.chain(parked).for_each(|no| hold(*no, 1));
        self.leaves.pins().chain(self.loads.held()).for_each(|(no, count)| hold(no, count));
        for no in self.leaves.all() {
            let (have, want) = (self.leaves.refs(no), fresh.get(&no).copied().unwrap_or(0));
            if have != want {
                wrong.push(format!("{no:?}: {have} references counted, {want} found"));
            }
            dead += u64::from(have == 0);
        }
        if dead != self.leaves.dead.len() as u64 || patched != self.leaves.patched {
            wrong.push(format!("{dead} dead leaves and {patched} patched blocks found"));
        }
        let live = self.leaves.all().count() as u64 - dead - self.loads.burials as u64;
        if live != self.leaves.live {
            wrong.push(format!("{} leaves counted, {live} found", self.leaves.live));
        }
    }

    fn all_maps(&self) -> impl Iterator<Item = &Map> {
        let replicas = self.replicas.values();
        let live = replicas.flat_map(|replica| {
            std::iter::once(&replica.head).chain(replica.snapshots.iter().map(|snap| &snap.map))
        });
        let frozen = self.checkpoint.iter().flat_map(Checkpoint::maps);
        let views = self.views.values().flat_map(Frozen::maps);
        live.chain(frozen).chain(views).chain(self.read_maps()).chain(self.log.created_maps())
    }

    fn dropped_entries(&self) -> impl Iterator<Item = &LogEntry> {
        self.log.dropped_entries()
    }
}
