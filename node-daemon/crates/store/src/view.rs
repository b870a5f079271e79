//! The source's side of a copy (rules C2, C3): views, frozen like a snapshot that nobody lists.
//!
//! A view is one more holder of the maps, in memory only: it costs nothing until the volume changes,
//! and a restart gives it up. Who asks for it, and how long it is kept, is replication's.

use tercet_proto::copy::{Piece, STAMP_BLOCKS_MAX, STAMP_RUNS_MAX, Stamps, View, ViewId};
use tercet_proto::storage::{SnapshotState, StorageError, StorageEvent};
use tercet_proto::{BlockRange, Copies, Place, Token, VolumeId};

use crate::map::{Map, Space};
use crate::replica::Snapshot;
use crate::store::Store;

/// A frozen view.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) volume: VolumeId,
    size_blocks: u64,
    head: Map,
    snapshots: Vec<Snapshot>,
}

impl Frozen {
    pub(crate) fn maps(&self) -> impl Iterator<Item = &Map> {
        self.snapshots.iter().map(|snapshot| &snapshot.map).chain([&self.head])
    }

    pub(crate) fn maps_mut(&mut self) -> impl Iterator<Item = &mut Map> {
        self.snapshots.iter_mut().map(|snapshot| &mut snapshot.map).chain([&mut self.head])
    }

    /// Map and size of a part: the snapshots, oldest first, then the volume.
    pub(crate) fn part(&self, part: usize) -> Option<(&Map, u64)> {
        match self.snapshots.get(part) {
            Some(snapshot) => Some((&snapshot.map, snapshot.state.size_blocks)),
            None if part == self.snapshots.len() => Some((&self.head, self.size_blocks)),
            None => None,
        }
    }
}

impl Copies for Store {
    fn freeze(&mut self, volume: VolumeId) -> Option<View> {
        let replica = self.live_replica(volume).ok().filter(|one| one.incomplete.is_none())?;
        let states: Vec<SnapshotState> =
            replica.snapshots.iter().map(|snapshot| snapshot.state.clone()).collect();
        let (place, size_blocks) = (replica.applied, replica.size_blocks);
        let (head, snapshots) = (replica.head.clone(), replica.snapshots.clone());
        self.next_view += 1;
        let id = ViewId(self.next_view);
        self.views.insert(id, Frozen { volume, size_blocks, head, snapshots });
        Some(View { id, place, size_blocks, snapshots: states })
    }

    fn thaw(&mut self, view: ViewId) {
        let Some(view) = self.views.remove(&view) else { return };
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        view.head.release(&mut space);
        for snapshot in view.snapshots {
            snapshot.map.release(&mut space);
        }
    }

    fn view_stamps(&mut self, view: ViewId, part: usize, from: u64, token: Token) -> Stamps {
        let Some(frozen) = self.views.get(&view) else { return Stamps::Gone };
        let Some((map, size_blocks)) = frozen.part(part) else { return Stamps::Gone };
        let end = size_blocks.min(from.saturating_add(STAMP_BLOCKS_MAX));
        let whose = (frozen.volume, map.clone());
        self.start_stamps(whose, (from, end), STAMP_RUNS_MAX, token)
    }

    fn read_view(&mut self, view: ViewId, part: usize, ranges: &[BlockRange], token: Token) {
        let result = self.alive().and_then(|()| self.start_view_read(view, part, ranges, token));
        if let Err(error) = result {
            self.events.push(StorageEvent::Read { token, result: Err(error) });
        }
    }

    fn stamps(&mut self, volume: VolumeId, range: BlockRange, token: Token) -> Stamps {
        let replica = self.replicas.get(&volume).expect("who copies is here");
        let whose = (volume, replica.head.clone());
        self.start_stamps(whose, (range.start, range.end()), usize::MAX, token)
    }

    fn copy_begin(&mut self, volume: VolumeId, keep: &[SnapshotState]) {
        self.begin_copy(volume, keep);
    }

    fn copy_resize(&mut self, volume: VolumeId, size_blocks: u64) {
        self.resize_copy(volume, size_blocks);
    }

    fn copy_write(&mut self, volume: VolumeId, pieces: Vec<Piece>, token: Token) {
        if let Err(error) = self.write_copy(volume, pieces, token) {
            self.done(token, Err(error));
        }
    }

    fn copy_snapshot(&mut self, volume: VolumeId, snapshot: SnapshotState) {
        self.snapshot_copy(volume, snapshot);
    }

    fn copy_settle(&mut self, volume: VolumeId, token: Token) {
        match self.live_replica(volume).map(|_| ()) {
            Ok(()) => self.settle_copy(token),
            Err(error) => self.done(token, Err(error)),
        }
    }

    fn copy_finish(&mut self, volume: VolumeId, place: Place, token: Token) {
        match self.live_replica(volume).map(|_| ()) {
            Ok(()) => self.finish_copy(volume, place, token),
            Err(error) => self.done(token, Err(error)),
        }
    }
}

impl Store {
    fn start_view_read(
        &mut self,
        view: ViewId,
        part: usize,
        ranges: &[BlockRange],
        token: Token,
    ) -> Result<(), StorageError> {
        let gone = || StorageError::Device("no such view".to_owned());
        let frozen = self.views.get(&view).ok_or_else(gone)?;
        let (map, size_blocks) = frozen.part(part).ok_or_else(gone)?;
        if ranges.iter().any(|range| range.end() > size_blocks) {
            return Err(StorageError::Device("blocks behind the end of a view".to_owned()));
        }
        let (volume, map) = (frozen.volume, map.clone());
        let result = self.start_map_read(volume, &map, ranges, token);
        map.release(&mut Space { alloc: &mut self.alloc, leaves: &mut self.leaves });
        result
    }

    #[cfg(not(feature = "canary"))]
    #[allow(clippy::unused_self)] // the other build looks at the options
    pub(crate) fn forgets_hole_stamps(&self) -> bool {
        false
    }

    #[cfg(feature = "canary")]
    pub(crate) fn forgets_hole_stamps(&self) -> bool {
        self.options.canary == Some(crate::options::Canary::NoHoleStamps)
    }
}
