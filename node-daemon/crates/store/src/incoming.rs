//! The target's side of a copy (rules C2, C3): the replica's own map becomes the source's view.
//!
//! Pieces go to fresh blocks and then, in memory, into the map of a replica that is durably
//! incomplete; checkpoints take along what has come so far, so a restart begins with that. The log
//! knows nothing of it but the end: one record, written when a checkpoint that holds all pieces is
//! durable, says at which place the map now is. It names that checkpoint (every record does), so no
//! start can ever find the record without the pieces. Entries of before go with it.

use bytes::Bytes;
use tercet_proto::copy::Piece;
use tercet_proto::disk::{Item, Run, crc32c};
use tercet_proto::storage::{SnapshotState, StorageError};
use tercet_proto::{BLOCK_BYTES, Place, Token, VolumeId};

use crate::disk::DiskOp;
use crate::log::{Effect, IO_BLOCKS_MAX};
use crate::map::Space;
use crate::replica::{Payload, Replica, Snapshot, touched_leaves};
use crate::store::{OpKind, Store};

/// Part of the arena that copies leave to others.
const ARENA_SHARE_KEPT: usize = 4;

/// Pieces on their way to the device; their blocks are held meanwhile.
#[derive(Debug)]
pub(crate) struct Writing {
    volume: VolumeId,
    number: u64,
    pieces: Vec<(Piece, Vec<Run>)>,
    writes_left: usize,
    /// Leaves that they make dirty, at most.
    leaves: u64,
    token: Token,
}

impl Writing {
    pub(crate) fn blocks(&self) -> impl Iterator<Item = u32> + '_ {
        self.pieces.iter().flat_map(|(_, runs)| runs).flat_map(|run| run.0..run.0 + run.1)
    }
}

impl Store {
    /// The replica that a copy changes: it cannot be taken for a whole one (C2).
    fn copied(&mut self, volume: VolumeId) -> &mut Replica {
        let replica = self.replicas.get_mut(&volume).expect("who copies is here");
        assert!(replica.incomplete.is_some(), "C2: marked before the first block is changed");
        self.changed = true;
        replica
    }

    pub(crate) fn begin_copy(&mut self, volume: VolumeId, keep: &[SnapshotState]) {
        let replica = self.copied(volume);
        let (kept, gone) =
            replica.snapshots.drain(..).partition(|snapshot| keep.contains(&snapshot.state));
        replica.snapshots = kept;
        let gone: Vec<Snapshot> = gone;
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        for snapshot in gone {
            snapshot.map.release(&mut space);
        }
    }

    pub(crate) fn resize_copy(&mut self, volume: VolumeId, size_blocks: u64) {
        self.copied(volume);
        let replica = self.replicas.get_mut(&volume).expect("looked at");
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        replica.head.resize(replica.size_blocks, size_blocks, &mut space);
        replica.size_blocks = size_blocks;
    }

    pub(crate) fn snapshot_copy(&mut self, volume: VolumeId, state: SnapshotState) {
        let replica = self.copied(volume);
        let map = replica.head.clone();
        let at = replica.snapshots.partition_point(|other| other.state.place < state.place);
        replica.snapshots.insert(at, Snapshot { state, map });
    }

    /// Sends pieces on their way, or changes nothing.
    pub(crate) fn write_copy(
        &mut self,
        volume: VolumeId,
        pieces: Vec<Piece>,
        token: Token,
    ) -> Result<(), StorageError> {
        let number = self.live_replica(volume)?.number;
        self.copied(volume);
        let data = |piece: &Piece| piece.data.as_ref().map_or(0, |_| u64::from(piece.range.count));
        let blocks: u64 = pieces.iter().map(data).sum();
        let leaves = 2 * pieces.len() as u64;
        self.check_space(blocks, leaves)?;
        let arena = self.options.arena.clone();
        let kept = (arena.blocks() / ARENA_SHARE_KEPT) as u64;
        if blocks > 0 && (arena.free_blocks() as u64) < kept + blocks {
            return Err(StorageError::Busy);
        }
        let mut writes = Vec::new();
        let mut placed = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let mut runs = Vec::new();
            if let Some(data) = &piece.data {
                assert_eq!(data.len(), piece.range.bytes(), "a piece has its bytes");
                runs = self.alloc.take(piece.range.count).expect("looked for room");
                split_writes(&runs, data, &mut writes);
            }
            placed.push((piece, runs));
        }
        let writes_left = writes.len();
        let writing = Writing { volume, number, pieces: placed, writes_left, leaves, token };
        let mut bufs = Vec::with_capacity(writes.len());
        for (run, bytes) in &writes {
            let Some(mut buf) = arena.take(run.1 as usize) else {
                let held: Vec<u32> = writing.blocks().collect();
                self.release_blocks(&held);
                return Err(StorageError::Busy);
            };
            buf.copy_from_slice(bytes);
            bufs.push((run.0, buf));
        }
        let id = self.next_writing;
        self.next_writing += 1;
        self.writing.insert(id, writing);
        self.potential_leaves += leaves;
        for (block, data) in bufs {
            let offset = u64::from(block) * BLOCK_BYTES as u64;
            self.submit(
                OpKind::Piece { id },
                DiskOp::Write { offset, data: data.into(), fua: false },
            );
        }
        if writes.is_empty() {
            self.pieces_written(id);
        }
        Ok(())
    }

    fn release_blocks(&mut self, blocks: &[u32]) {
        for block in blocks {
            self.alloc.release(*block);
        }
    }

    /// A write of pieces has completed.
    pub(crate) fn on_piece_written(&mut self, id: u64) {
        let writing = self.writing.get_mut(&id).expect("pieces in progress");
        writing.writes_left -= 1;
        if writing.writes_left == 0 {
            self.pieces_written(id);
        }
    }

    /// All are on the device, if not durable: the map may name them.
    fn pieces_written(&mut self, id: u64) {
        let writing = self.writing.remove(&id).expect("pieces in progress");
        let volume = writing.volume;
        self.potential_leaves -= writing.leaves;
        let found = self.replicas.get(&volume).is_some_and(|one| one.number == writing.number);
        if !found {
            let held: Vec<u32> = writing.blocks().collect();
            self.release_blocks(&held);
            return self.done(writing.token, Err(StorageError::NoReplica(volume)));
        }
        self.copied(volume);
        let replica = self.replicas.get_mut(&volume).expect("looked at");
        let mut space = Space { alloc: &mut self.alloc, leaves: &mut self.leaves };
        for (piece, runs) in writing.pieces {
            assert!(piece.range.end() <= replica.size_blocks, "a piece within the volume");
            let Some(data) = piece.data else {
                replica.head.zero(piece.range, piece.stamp, &mut space);
                continue;
            };
            let crcs: Vec<u32> = data.chunks(BLOCK_BYTES).map(crc32c).collect();
            let devices = runs.iter().flat_map(|run| run.0..run.0 + run.1);
            replica.head.write(piece.range.start, devices, &crcs, piece.stamp, &mut space);
        }
        self.done(writing.token, Ok(()));
    }

    /// The next checkpoint that begins holds all that is in the map now.
    pub(crate) fn settle_copy(&mut self, token: Token) {
        if self.finishes_unsettled() {
            return self.done(token, Ok(()));
        }
        let newest = self.checkpoint.as_ref().map_or(0, crate::checkpoint::Checkpoint::sequence);
        let needed = newest.max(self.checkpoint_durable) + 1;
        self.settling.push((needed, token));
        self.changed = true;
        self.checkpoint_wanted = true;
    }

    /// A checkpoint is durable, and nobody can take an older one for the newest.
    pub(crate) fn settled(&mut self, sequence: u64) {
        let due: Vec<Token> = self
            .settling
            .extract_if(.., |(needed, _)| *needed <= sequence)
            .map(|(_, token)| token)
            .collect();
        for token in due {
            self.done(token, Ok(()));
        }
    }

    pub(crate) fn finish_copy(&mut self, volume: VolumeId, place: Place, token: Token) {
        let replica = self.copied(volume);
        assert_eq!(replica.in_flight, 0, "C2: who is incomplete takes no entry");
        let number = replica.number;
        let busy = self.writing.values().any(|writing| writing.volume == volume);
        assert!(!busy, "C2: every piece is settled before the end");
        let item = Item::Finish { volume, number, place };
        self.push_change(&item, Effect::Finish { volume, number, place, token });
    }

    /// The record that ends a copy is durable.
    pub(crate) fn copy_finished(&mut self, (volume, number): (VolumeId, u64), place: Place) {
        let found = self.replicas.get_mut(&volume).filter(|found| found.number == number);
        let Some(replica) = found else { return };
        let applied = replica.applied.lsn;
        let entries: Vec<_> = replica.entries.drain(..).collect();
        (replica.applied, replica.durable, replica.tail) = (place, place, place);
        replica.incomplete = None;
        self.log.entries -= entries.len() as u64;
        for entry in &entries {
            if entry.header.place.lsn > applied {
                self.potential_leaves -= touched_leaves(entry.header.kind);
                self.alloc.reserved -= entry.reserve_blocks();
            }
            if let Payload::Extents(runs) = &entry.payload {
                self.alloc.release_runs(runs);
            }
        }
        self.fill_clones_of(volume);
    }

    #[cfg(not(feature = "canary"))]
    #[allow(clippy::unused_self)] // the other build looks at the options
    fn finishes_unsettled(&self) -> bool {
        false
    }

    #[cfg(feature = "canary")]
    fn finishes_unsettled(&self) -> bool {
        self.options.canary == Some(crate::options::Canary::FinishUnsettled)
    }
}

/// One write for each run, none larger than what is written at once.
fn split_writes(runs: &[Run], data: &Bytes, writes: &mut Vec<(Run, Bytes)>) {
    let mut from = 0;
    for run in runs {
        let mut done = 0;
        while done < run.1 {
            let count = (run.1 - done).min(IO_BLOCKS_MAX);
            let bytes = count as usize * BLOCK_BYTES;
            writes.push(((run.0 + done, count), data.slice(from..from + bytes)));
            from += bytes;
            done += count;
        }
    }
}
