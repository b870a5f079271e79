//! Snapshots taken while hosts write, and read at the end through clones (S1, S3).
//!
//! A snapshot is checked three ways: its clone's replicas are equal on all nodes; every block of it is
//! a read of that block at the snapshot's time (linearizability); and there is one point in time
//! at which all its blocks were so together.

use std::collections::BTreeMap;

use rand::Rng;
use tercet_proto::storage::Incomplete;
use tercet_proto::{Place, SnapshotId, Source};
use tercet_replication::api::{Control, ControlDone, ControlError};

use crate::checker::{Action, NEVER, Op, seconds};
use crate::cluster::{Asked, attachment};
use crate::mix::MS;
use crate::probes::Probe;
use crate::stamp::Stamp;
use crate::world::World;

/// Between two attempts to take a snapshot.
const RETRY_NS: u64 = 400 * MS;

/// Most snapshots of a run.
const SNAPSHOTS_MAX: usize = 6;

/// Most clones that are made while faults go on.
const EARLY_CLONES_MAX: usize = 2;

/// How many snapshots of a thousand are cloned at once, while there may be more.
const EARLY_CLONE_PERMILLE: u32 = 600;

/// How soon after the snapshot is ready.
const EARLY_CLONE_NS: u64 = 300 * MS;

/// How many of a thousand such snapshots are deleted once their clone has a configuration.
const DELETE_PERMILLE: u32 = 400;

/// A snapshot that was asked for.
pub struct Snapshot {
    /// The volume's number.
    pub volume: usize,
    /// Which.
    pub id: SnapshotId,
    asked: u64,
    /// When it was ready, and where it is in the log.
    pub done: Option<(u64, Place)>,
    /// A clone that was made of it while faults went on.
    pub clone: Option<usize>,
    /// Whether it is to be deleted, and whether that is done.
    pub deletion: Option<bool>,
}

/// All of them.
#[derive(Default)]
pub struct Snapshots {
    /// In the order in which they were asked for.
    pub all: Vec<Snapshot>,
}

impl World {
    /// Takes snapshots from time to time.
    pub fn schedule_snapshot(&mut self) {
        let wait = self.around(self.mix.snapshot_ns);
        self.after(wait, |world| {
            if world.healed || world.snapshots.all.len() >= SNAPSHOTS_MAX {
                return;
            }
            let volume = world.rng.random_range(0..world.mix.volumes);
            let id = SnapshotId::from_bytes(world.id_bytes());
            let number = world.snapshots.all.len();
            let asked = world.now;
            let (done, clone, deletion) = (None, None, None);
            world.snapshots.all.push(Snapshot { volume, id, asked, done, clone, deletion });
            world.tell(|_| format!("CSI: asks for snapshot {number} of volume {volume} (S1)"));
            world.snapshot_try(number);
            world.schedule_snapshot();
        });
    }

    fn snapshot_try(&mut self, number: usize) {
        let snapshot = &self.snapshots.all[number];
        if snapshot.done.is_some() {
            return;
        }
        let (volume, id) = (snapshot.volume, snapshot.id);
        if let Some(node) = self.primary_by_object(volume) {
            let control = Control::Snapshot(self.volumes[volume].id, id);
            self.ask(node, control, Asked::Snapshot(number));
        }
        self.after(RETRY_NS, move |world| world.snapshot_try(number));
    }

    /// A snapshot's request was answered.
    pub fn snapshot_answered(&mut self, number: usize, result: &Result<ControlDone, ControlError>) {
        let now = self.now;
        let snapshot = &mut self.snapshots.all[number];
        let Ok(ControlDone::Place(place)) = *result else { return };
        if snapshot.done.is_some() {
            return;
        }
        snapshot.done = Some((now, place));
        let volume = snapshot.volume;
        self.tell(|_| format!("snapshot {number} of volume {volume} is ready at {place:?}"));
        let writing = self
            .hosts
            .iter()
            .filter_map(|host| host.mounts.get(&volume))
            .any(|mount| !mount.commands.is_empty());
        if writing {
            self.probe(Probe::SnapshotDuringWrites);
        }
        let early = self.snapshots.all.iter().filter(|snapshot| snapshot.clone.is_some()).count();
        if !self.healed && early < EARLY_CLONES_MAX && self.permille(EARLY_CLONE_PERMILLE) {
            let wait = self.rng.random_range(0..EARLY_CLONE_NS);
            self.after(wait, move |world| world.clone_early(number));
        }
    }

    /// A clone while faults go on: some members have not applied the snapshot yet (S3).
    fn clone_early(&mut self, number: usize) {
        if !self.mix.losses.is_empty() {
            return; // its replicas would be lost with a node's, and nobody replaces them here
        }
        if self.rotten.is_some() {
            // A replica whose making rots away would be made twice: not what is looked at here.
            return self.after(RETRY_NS, move |world| world.clone_early(number));
        }
        if !self.healed {
            self.tell(|_| format!("CSI: asks for a clone of snapshot {number} (S3)"));
            let clone = self.make_clone(number);
            self.snapshots.all[number].clone = Some(clone);
        }
    }

    /// Makes the object of a clone, and its replicas.
    pub fn make_clone(&mut self, number: usize) -> usize {
        let snapshot = &self.snapshots.all[number];
        let (_, place) = snapshot.done.expect("only ready ones are cloned");
        let source =
            Source { volume: self.volumes[snapshot.volume].id, snapshot: snapshot.id, place };
        let homes = self.homes(snapshot.volume);
        self.make_volume(vec![attachment(0)], homes, Some(source))
    }

    /// A clone that got its first configuration needs its snapshot no more: sometimes that is deleted.
    pub fn clone_configured(&mut self, clone: usize) {
        let of = self.snapshots.all.iter().position(|snapshot| snapshot.clone == Some(clone));
        if let Some(number) = of
            && self.permille(DELETE_PERMILLE)
        {
            self.snapshots.all[number].deletion = Some(false);
            self.snapshot_delete_try(number);
        }
    }

    fn snapshot_delete_try(&mut self, number: usize) {
        let snapshot = &self.snapshots.all[number];
        if snapshot.deletion != Some(false) {
            return;
        }
        let (volume, id) = (snapshot.volume, snapshot.id);
        if let Some(node) = self.primary_by_object(volume) {
            let control = Control::SnapshotDelete(self.volumes[volume].id, id);
            self.ask(node, control, Asked::SnapshotDelete(number));
        }
        self.after(RETRY_NS, move |world| world.snapshot_delete_try(number));
    }

    /// The deletion of a snapshot was answered.
    pub fn snapshot_deleted(&mut self, number: usize, result: &Result<ControlDone, ControlError>) {
        if result.is_err() || self.snapshots.all[number].deletion == Some(true) {
            return;
        }
        self.snapshots.all[number].deletion = Some(true);
        let clone = self.snapshots.all[number].clone;
        if clone.is_some_and(|clone| !self.awaiting(clone).is_empty()) {
            self.probe(Probe::DeletedWhileAwaited);
        }
    }

    /// The nodes whose replica of a clone awaits the snapshot, with whether that is applied there.
    pub fn awaiting(&self, clone: usize) -> Vec<(usize, bool)> {
        let id = self.volumes[clone].id;
        let state = |node: usize, volume| self.nodes[node].shard()?.storage().replica(volume);
        let awaits = |node| {
            let Some(Incomplete::Awaits(source)) = state(node, id)?.incomplete else { return None };
            let applied = state(node, source.volume).map(|replica| replica.applied.lsn);
            Some((node, applied >= Some(source.place.lsn)))
        };
        (0..self.mix.nodes).filter_map(awaits).collect()
    }

    /// Checks what a clone of snapshot `number` was read as against what hosts did, and adds it to
    /// the histories.
    pub fn check_snapshot(&mut self, number: usize, blocks: &BTreeMap<u64, Stamp>) {
        let snapshot = &self.snapshots.all[number];
        let (volume, invoked) = (snapshot.volume, snapshot.asked);
        let (ended, _) = snapshot.done.expect("only ready ones are cloned");
        if let Err(why) = self.one_cut(volume, blocks) {
            self.violate(format!(
                "snapshot {number} of volume {volume} is no point in time: {why}"
            ));
        }
        let id = self.histories.next_number();
        for (block, stamp) in blocks {
            let action = Action::Read(*stamp);
            let op = Op { invoked, ended, answered: true, action, id };
            self.histories.add(volume, *block, op);
        }
    }

    /// Whether all blocks can have been so at one time: no write that it has began after a write
    /// that it certainly should have, but lacks, was answered.
    fn one_cut(&self, volume: usize, blocks: &BTreeMap<u64, Stamp>) -> Result<(), String> {
        let (mut begun, mut begun_by) = (0, (0, Stamp::ZERO));
        let (mut lacks, mut lacks_by) = (NEVER, (0, Stamp::ZERO));
        for (block, stamp) in blocks {
            let ops = self.histories.of_block(volume, *block);
            let writes =
                || ops.iter().filter_map(|op| op.action.written().map(|written| (written, op)));
            if *stamp == Stamp::ZERO && writes().any(|(written, _)| written == Stamp::ZERO) {
                continue;
            }
            let made = writes().find(|(written, _)| written == stamp).map(|(_, op)| op);
            if made.is_none() && *stamp != Stamp::ZERO {
                return Err(format!("block {block} has {stamp}, which nobody wrote there"));
            }
            if let Some(op) = made.filter(|op| op.invoked > begun) {
                (begun, begun_by) = (op.invoked, (*block, *stamp));
            }
            let ended = made.map_or(0, |op| op.ended);
            for (written, op) in writes() {
                let after = op.answered && op.invoked > ended && written != *stamp;
                if after && op.ended < lacks {
                    (lacks, lacks_by) = (op.ended, (*block, written));
                }
            }
        }
        if begun < lacks {
            return Ok(());
        }
        Err(format!(
            "it has block {} as {}, begun at {:.6} s, but lacks {} of block {}, answered at {:.6} s",
            begun_by.0,
            begun_by.1,
            seconds(begun),
            lacks_by.1,
            lacks_by.0,
            seconds(lacks),
        ))
    }
}
