//! Steps that look at several leaves at once: done when all of them are at hand, in one go.
//!
//! A step is tried; where it lacks a leaf that one is read, pinned, and the step tried again from its
//! beginning. Nothing has changed before it has all that it looks at, so what it sees is the state of
//! one moment, as if every leaf were in memory. How many leaves it may need is bounded by the maps
//! that share a chunk.

use bytes::Bytes;
use tercet_proto::disk::LeafBlock;
use tercet_proto::storage::{StorageError, StorageEvent};
use tercet_proto::{BlockVersion, Token, VolumeId};

use crate::leaf::LeafNo;
use crate::load::LeafError;
use crate::map::{Map, split};
use crate::parked::Parked;
use crate::store::Store;

/// What is to be done.
#[derive(Clone, Debug)]
pub(crate) enum Task {
    /// Say which versions these bad blocks are (block of the volume, block of the data area); then a
    /// read that found them may be answered.
    Tell { volume: VolumeId, bad: Vec<(u64, u32)>, job: u64 },
    /// Read a version for a peer.
    ReadVersion { volume: VolumeId, version: BlockVersion, token: Token },
    /// Begin a repair.
    Repair { volume: VolumeId, version: BlockVersion, data: Bytes, token: Token },
    /// A repair's bytes are there: put them into the maps.
    Mend { id: u64 },
    /// A step of scrub.
    Scrub,
}

impl Store {
    /// What a map says of a block, or the leaf that has to be read for that.
    pub(crate) fn look_up(&self, map: &Map, block: u64) -> Result<LeafBlock, LeafNo> {
        let (chunk, index) = split(block);
        let mut found = Vec::with_capacity(1);
        self.leaves.fill(map.chunk(chunk), (index, index + 1), &mut found)?;
        Ok(found[0])
    }

    pub(crate) fn run_task(&mut self, task: Task) {
        self.try_task(task, Vec::new());
    }

    /// Does it, or waits for a leaf that it lacks.
    pub(crate) fn try_task(&mut self, task: Task, pins: Vec<LeafNo>) {
        let tried = match &task {
            Task::Tell { volume, bad, job } => self.tell_bad(*volume, bad, *job),
            Task::ReadVersion { volume, version, token } => {
                self.read_version_now(*volume, version, *token)
            }
            Task::Repair { volume, version, data, token } => {
                self.repair_now(*volume, version, data, *token)
            }
            Task::Mend { id } => self.mend_now(*id),
            Task::Scrub => self.scrub_now(),
        };
        match tried {
            Ok(()) => self.unpin_all(&pins),
            Err(no) => self.park(no, Parked::Task(task, pins)),
        }
    }

    /// The leaf that it lacked is there.
    pub(crate) fn go_on_with_task(&mut self, task: Task, mut pins: Vec<LeafNo>, no: LeafNo) {
        if let Some(data) = self.leaves.data(no).cloned() {
            self.leaves.pin(no, data);
            pins.push(no);
        }
        self.try_task(task, pins);
    }

    /// It cannot be done.
    pub(crate) fn end_task(&mut self, task: &Task, pins: &[LeafNo], error: StorageError) {
        self.unpin_all(pins);
        match task {
            Task::Tell { job, .. } => self.part_is_over(*job),
            Task::ReadVersion { token, .. } => {
                self.events.push(StorageEvent::Read { token: *token, result: Err(error) });
            }
            Task::Repair { token, .. } => self.done(*token, Err(error)),
            Task::Mend { id } => self.give_up_mending(*id, error),
            Task::Scrub => self.skip_scrub(error == StorageError::Busy),
        }
    }

    fn unpin_all(&mut self, pins: &[LeafNo]) {
        for no in pins {
            self.leaves.unpin(*no, &mut self.alloc);
        }
    }

    /// Of what a volume's block an error is told, where a leaf is bad.
    pub(crate) fn task_error(task: &Task, error: &LeafError) -> StorageError {
        match task {
            Task::Tell { volume, bad, .. } => Self::leaf_error(*volume, bad[0].0, error),
            Task::ReadVersion { volume, version, .. } | Task::Repair { volume, version, .. } => {
                Self::leaf_error(*volume, version.block, error)
            }
            Task::Mend { .. } | Task::Scrub => StorageError::Device(error.to_string()),
        }
    }
}
