//! Snapshots taken while hosts write, and read at the end through clones (S1, S3).
//!
//! A snapshot is checked three ways: its clone's replicas are equal on all nodes; every block of it is
//! a read of that block at the snapshot's time (linearizability); and there is one point in time
//! at which all its blocks were so together.

use std::collections::BTreeMap;

use rand::Rng;
use tercet_proto::SnapshotId;
use tercet_replication::api::{Control, ControlDone, ControlError};

use crate::checker::{Action, NEVER, Op, seconds};
use crate::cluster::Asked;
use crate::mix::MS;
use crate::probes::Probe;
use crate::stamp::Stamp;
use crate::world::World;

/// Between two attempts to take a snapshot.
const RETRY_NS: u64 = 400 * MS;

/// Most snapshots of a run.
const SNAPSHOTS_MAX: usize = 6;

/// A snapshot that was asked for.
pub struct Snapshot {
    /// The volume's number.
    pub volume: usize,
    /// Which.
    pub id: SnapshotId,
    asked: u64,
    /// When it was ready.
    pub done: Option<u64>,
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
            world.snapshots.all.push(Snapshot { volume, id, asked: world.now, done: None });
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
        snapshot.done = Some(now);
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
    }

    /// Checks what a clone of snapshot `number` was read as against what hosts did, and adds it to
    /// the histories.
    pub fn check_snapshot(&mut self, number: usize, blocks: &BTreeMap<u64, Stamp>) {
        let snapshot = &self.snapshots.all[number];
        let (volume, invoked) = (snapshot.volume, snapshot.asked);
        let ended = snapshot.done.expect("only ready ones are cloned");
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
            let writes = || {
                ops.iter().filter_map(|op| match op.action {
                    Action::Write(written) => Some((written, op)),
                    Action::Read(_) => None,
                })
            };
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
