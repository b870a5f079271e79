//! Counts everything again and says what does not agree: for tests and for doubts.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::incoming::Writing;
use crate::map::{Chunk, Leaf, Map};
use crate::replica::{LogEntry, Payload};
use crate::store::Store;
use crate::view::Frozen;

impl Store {
    /// Compares counted with found: holders of each block, free blocks, reservations, leaves, the
    /// log's entries. Empty when all is well. Reads no device; takes time in proportion to it.
    pub fn check(&self) -> Vec<String> {
        let mut fresh: HashMap<u32, u32> = HashMap::new();
        let mut hold = |block: u32| *fresh.entry(block).or_insert(0) += 1;
        let mut leaves: HashMap<u64, Arc<Leaf>> = HashMap::new();
        for map in self.all_maps() {
            for chunk in &map.chunks {
                if let Chunk::Leaf { leaf, .. } = chunk {
                    leaves.insert(leaf.id, Arc::clone(leaf));
                }
            }
        }
        for leaf in self.checkpoint.iter().flat_map(Checkpoint::leaves) {
            leaves.insert(leaf.id, Arc::clone(leaf)); // a view that is given up leaves them there
        }
        for leaf in leaves.values() {
            leaf.blocks.iter().filter(|block| block.device != 0).for_each(|b| hold(b.device));
        }
        let places = self.leaves.places.values().flat_map(|place| &place.runs);
        let root = self.root_runs.iter();
        let new_root = self.checkpoint.iter().flat_map(Checkpoint::root_runs);
        let entries = self.replicas.values().flat_map(|replica| &replica.entries);
        let dropped = self.dropped_entries();
        let extents = entries.clone().chain(dropped).flat_map(|entry| match &entry.payload {
            Payload::Extents(runs) => runs.as_slice(),
            _ => &[],
        });
        for run in places.chain(root).chain(new_root).chain(extents) {
            (run.0..run.0 + run.1).for_each(&mut hold);
        }
        self.read_holds().for_each(&mut hold);
        self.writing.values().flat_map(Writing::blocks).for_each(&mut hold);
        self.mending.values().map(|mending| mending.fresh).for_each(&mut hold);
        let mut wrong = self.alloc.compare(&fresh);
        let ids: HashSet<&u64> = leaves.keys().collect();
        if leaves.len() as u64 != self.leaves.live
            || !self.leaves.places.keys().all(|id| ids.contains(id))
        {
            wrong.push(format!("{} leaves counted, {} found", self.leaves.live, leaves.len()));
        }
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
