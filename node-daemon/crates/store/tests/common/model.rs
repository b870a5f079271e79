//! The model: what a volume shall look like, as a log of all entries and a map of blocks.

use std::collections::BTreeMap;

use tercet_proto::disk::CHUNK_BLOCKS;
use tercet_proto::storage::Source;
use tercet_proto::{EntryHeader, EntryKind, Place, ReplicaId, SnapshotId};

/// What a volume looks like: tag of each block that is not zero.
pub type Content = BTreeMap<u64, u64>;

#[derive(Clone, Debug)]
pub struct ModelEntry {
    pub header: EntryHeader,
    pub tag: u64,
}

#[derive(Clone, Debug)]
pub struct ModelSnapshot {
    pub id: SnapshotId,
    pub place: Place,
    pub size: u64,
    pub content: Content,
}

#[derive(Clone, Debug)]
pub struct ModelVolume {
    pub replica: ReplicaId,
    /// The log as it is meant to be now, from lsn 1.
    pub log: Vec<ModelEntry>,
    /// Every entry ever appended.
    pub ever: BTreeMap<Place, ModelEntry>,
    /// Told durable, and nothing at or below it was dropped since.
    pub acked: Place,
    pub applied: u64,
    pub content: Content,
    pub size: u64,
    pub snapshots: Vec<ModelSnapshot>,
    pub promise_acked: u64,
    pub promise_asked: u64,
    pub epoch: u64,
    /// A clone that was made before its snapshot was applied (S3), until it is told filled.
    pub awaits: Option<Awaits>,
}

#[derive(Clone, Debug)]
pub struct Awaits {
    pub source: Source,
    /// What the snapshot has, once it is applied.
    pub content: Option<Content>,
}

impl ModelVolume {
    pub fn tail(&self) -> Place {
        self.log.last().map_or(Place::EMPTY, |entry| entry.header.place)
    }

    pub fn place_at(&self, lsn: u64) -> Place {
        match lsn {
            0 => Place::EMPTY,
            lsn => self.log[lsn as usize - 1].header.place,
        }
    }

    /// Size once everything in the log is applied.
    pub fn size_at_tail(&self) -> u64 {
        self.log[self.applied as usize..].iter().fold(self.size, |size, entry| {
            match entry.header.kind {
                EntryKind::Grow { size_blocks } => size.max(size_blocks),
                _ => size,
            }
        })
    }

    /// Chunks with a written block: number, blocks, shared ones, last change. What no entry of this
    /// volume's wrote came with the clone.
    pub fn chunk_map(&self) -> Vec<(u64, u32, u32, Place)> {
        let mut stamps: BTreeMap<u64, Place> = BTreeMap::new();
        for entry in &self.log[..self.applied as usize] {
            if let EntryKind::Write { range, .. } | EntryKind::Zero { range, .. } =
                entry.header.kind
            {
                stamps.extend((range.start..range.end()).map(|block| (block, entry.header.place)));
            }
        }
        let stamp = |block| stamps.get(&block).copied().unwrap_or(Place::EMPTY);
        let snapshot = self.snapshots.last().map_or(Place::EMPTY, |last| last.place);
        let mut rows: Vec<(u64, u32, u32, Place)> = Vec::new();
        for block in self.content.keys() {
            let chunk = block / CHUNK_BLOCKS as u64;
            if rows.last().is_none_or(|row| row.0 != chunk) {
                let first = chunk * CHUNK_BLOCKS as u64;
                let all = first..first + CHUNK_BLOCKS as u64;
                rows.push((chunk, 0, 0, all.map(stamp).max().unwrap_or(Place::EMPTY)));
            }
            let row = rows.last_mut().expect("pushed");
            row.1 += 1;
            row.2 += u32::from(stamp(*block) <= snapshot);
        }
        rows
    }

    pub fn apply_next(&mut self) {
        let entry = self.log[self.applied as usize].clone();
        self.applied += 1;
        match entry.header.kind {
            EntryKind::Noop => {}
            EntryKind::Write { range, .. } => {
                for index in 0..u64::from(range.count) {
                    self.content.insert(range.start + index, entry.tag + (index << 40));
                }
            }
            EntryKind::Zero { range, .. } => {
                self.content.retain(|block, _| *block < range.start || *block >= range.end());
            }
            EntryKind::Grow { size_blocks } => self.size = self.size.max(size_blocks),
            EntryKind::Snapshot { id } => {
                if self.snapshots.iter().all(|snapshot| snapshot.id != id) {
                    self.snapshots.push(ModelSnapshot {
                        id,
                        place: entry.header.place,
                        size: self.size,
                        content: self.content.clone(),
                    });
                }
            }
            EntryKind::SnapshotDelete { id } => self.snapshots.retain(|snap| snap.id != id),
        }
    }
}
