//! The phases of a run: safety under faults, healing, progress within a bound, convergence, and
//! the comparison of everything with everything.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use bytes::Bytes;
use tercet_proto::storage::Incomplete;
use tercet_proto::{Lsn, Place};
use tercet_replication::api::{Control, ControlDone, ControlError};

use crate::cluster::Asked;
use crate::mix::{FAULTS_MIN, MS, OPS_MIN, S};
use crate::probes::Probe;
use crate::work::Work;
use crate::world::World;

/// How long the volumes may take to serve again once all is healed.
const PROGRESS_NS: u64 = 40 * S;

/// Operations of every host on every volume that show progress.
const PROGRESS_OPS: u64 = 20;

/// How long a run may go on until it has enough operations.
const ENOUGH_NS: u64 = 200 * S;

/// How long replicas may take to become equal once all is quiet.
const CONVERGE_NS: u64 = 30 * S;

/// Clones that are read at the end.
const CLONES_MAX: usize = 2;

/// Between two looks.
const LOOK_NS: u64 = 50 * MS;

/// What replicas of a volume said of their chunks.
pub type Sums = BTreeMap<usize, Option<(Place, Vec<Bytes>)>>;

impl World {
    /// Runs all phases.
    pub fn run(&mut self) {
        self.schedule_faults();
        self.schedule_losses();
        self.schedule_snapshot();
        self.schedule_look();
        self.schedule_decay();
        self.run_until(self.mix.faulty_ns);
        self.wait_for(PROGRESS_NS, |world| world.faults_done >= FAULTS_MIN);
        self.heal_all();
        self.progress();
        self.finish_changes();
        self.finish_work();
        for volume in 0..self.mix.volumes {
            self.converge(volume);
        }
        self.mend();
        self.read_clones();
        if self.violation.is_some() {
            return;
        }
        self.note_unanswered();
        if let Err(why) = self.histories.check(self.mix.volumes) {
            self.violate(format!("not linearizable: {why}"));
        }
        if self.faults_done < FAULTS_MIN || self.ops_done < OPS_MIN {
            let (faults, ops) = (self.faults_done, self.ops_done);
            self.violate(format!("only {faults} faults and {ops} operations: a weak seed"));
        }
    }

    /// Waits until `done`, in virtual time; whether it came about.
    fn wait_for(&mut self, within: u64, done: impl FnMut(&mut Self) -> bool) -> bool {
        self.wait_until(within, LOOK_NS, done)
    }

    /// As above, with so much time between two looks.
    pub fn wait_until(
        &mut self,
        within: u64,
        between: u64,
        mut done: impl FnMut(&mut Self) -> bool,
    ) -> bool {
        let until = self.now + within;
        while self.violation.is_none() && self.now < until {
            if done(self) {
                return true;
            }
            self.run_until(self.now + between);
        }
        false
    }

    fn progress(&mut self) {
        let answered: Vec<(usize, usize, u64)> =
            self.mounts().map(|(host, volume, work)| (host, volume, work.answered)).collect();
        let went_on = self.wait_for(PROGRESS_NS, |world| {
            answered.iter().all(|(host, volume, before)| {
                world.hosts[*host].mounts[volume].work.answered >= before + PROGRESS_OPS
            })
        });
        if !went_on {
            let stuck: Vec<String> = answered
                .iter()
                .filter(|(h, v, n)| self.hosts[*h].mounts[v].work.answered < n + PROGRESS_OPS)
                .map(|(host, volume, _)| format!("host{host} on volume {volume}"))
                .collect();
            let state = self.state_story();
            self.violate(format!("no progress after healing: {}\n{state}", stuck.join(", ")));
        }
        self.wait_for(ENOUGH_NS, |world| world.ops_done >= OPS_MIN);
    }

    /// Whoever was lost is replaced, and nobody keeps what belongs to no configuration (M1, M2).
    fn finish_changes(&mut self) {
        if self.mix.losses.is_empty() {
            return;
        }
        if !self.wait_for(PROGRESS_NS, |world| world.job.is_none() && world.no_strays()) {
            let (job, state) = (self.job.clone(), self.state_story());
            self.violate(format!("a member is not replaced (M1): {job:?}\n{state}"));
        }
    }

    fn mounts(&self) -> impl Iterator<Item = (usize, usize, &Work)> {
        self.hosts.iter().enumerate().flat_map(|(host, h)| {
            h.mounts.iter().map(move |(volume, mount)| (host, *volume, &mount.work))
        })
    }

    /// No new operations; those under way are answered.
    fn finish_work(&mut self) {
        for host in &mut self.hosts {
            host.mounts.values_mut().for_each(|mount| mount.work.going = false);
        }
        let quiet = self.wait_for(PROGRESS_NS, |world| {
            let mut mounts = world.hosts.iter().flat_map(|host| host.mounts.values());
            mounts.all(|mount| mount.commands.is_empty())
        });
        if !quiet {
            let state = self.state_story();
            self.violate(format!("commands without an answer after healing\n{state}"));
        }
    }

    /// Every replica that is complete becomes equal to all others.
    fn converge(&mut self, volume: usize) {
        let equal = self.wait_for(CONVERGE_NS, |world| {
            world.ask_sums(volume);
            world.run_until(world.now + 10 * LOOK_NS);
            world.sums_agree(volume)
        });
        if !equal {
            let start = self.log_start(volume);
            let sums: Vec<String> = self.volumes[volume]
                .sums
                .iter()
                .map(|(node, sums)| format!("node{node}: {:?}", sums.as_ref().map(|s| s.0)))
                .collect();
            let state = self.state_story();
            self.violate(format!(
                "volume {volume} does not converge, the log begins at {start}: {}\n{state}",
                sums.join(", ")
            ));
        }
    }

    fn ask_sums(&mut self, volume: usize) {
        self.volumes[volume].sums.clear();
        for node in self.homes(volume) {
            if self.is_complete(node, volume) {
                self.volumes[volume].sums.insert(node, None);
                let control = Control::ChunkSums(self.volumes[volume].id);
                self.ask(node, control, Asked::Sums(volume));
            }
        }
    }

    fn is_complete(&self, node: usize, volume: usize) -> bool {
        let id = self.volumes[volume].id;
        let statuses = self.nodes[node].shard().map(tercet_shard::Shard::statuses);
        statuses.unwrap_or_default().iter().any(|status| status.volume == id && !status.incomplete)
    }

    /// Whether a node's replica is no complete copy and will be one by itself (C2).
    fn needs_copy(&self, node: usize, volume: usize) -> bool {
        let id = self.volumes[volume].id;
        let state = self.nodes[node].shard().and_then(|shard| shard.storage().replica(id));
        let incomplete = state.and_then(|state| state.incomplete);
        incomplete.is_some_and(|why| !matches!(why, Incomplete::Awaits(_)))
    }

    /// Whether every member's node has a replica of it: a clone lives beside its source (S3).
    fn is_everywhere(&self, volume: usize) -> bool {
        let id = self.volumes[volume].id;
        let homes = self.homes(volume);
        let mut shards = homes.iter().map(|node| self.nodes[*node].shard());
        shards.all(|shard| shard.is_some_and(|shard| shard.storage().replica(id).is_some()))
    }

    /// A replica has answered with its sums.
    pub fn sums_answered(
        &mut self,
        volume: usize,
        node: usize,
        result: Result<ControlDone, ControlError>,
    ) {
        if let Ok(ControlDone::ChunkSums(place, rows)) = result {
            self.volumes[volume].sums.insert(node, Some((place, rows)));
        }
    }

    /// Whether all are at one place; sums that differ there are a violation.
    fn sums_agree(&mut self, volume: usize) -> bool {
        let sums: Vec<(usize, Place, Vec<u8>)> = self.volumes[volume]
            .sums
            .iter()
            .filter_map(|(node, sums)| sums.as_ref().map(|(p, rows)| (*node, *p, rows.concat())))
            .collect();
        for (node, place, rows) in &sums {
            let (first, first_place, first_rows) = &sums[0];
            if place == first_place && rows != first_rows {
                self.violate(format!(
                    "volume {volume}: node{first} and node{node} differ at {place:?}"
                ));
            }
        }
        let last = sums.iter().map(|(_, place, _)| *place).max();
        let equal = sums.iter().filter(|(_, place, _)| Some(*place) == last).count();
        let asked = self.volumes[volume].sums.len();
        let copied = self.homes(volume).iter().all(|node| !self.needs_copy(*node, volume));
        copied && !sums.is_empty() && equal == asked
    }

    /// Where the log begins from which others catch up: the primary's (C1).
    fn log_start(&self, volume: usize) -> Lsn {
        let id = self.volumes[volume].id;
        let shard = self.primary_by_object(volume).and_then(|node| self.nodes[node].shard());
        let state = shard.and_then(|shard| shard.storage().replica(id));
        state.map_or(Lsn(1), |state| state.log_start)
    }

    /// Makes clones of some snapshots, reads them whole and compares (S1, S3).
    fn read_clones(&mut self) {
        let all = &self.snapshots.all;
        let early: Vec<(usize, usize)> = (0..all.len())
            .filter_map(|number| Some((number, all[number].clone?)))
            // Where damage took the source's replica itself, the clone's cannot be made.
            .filter(|(number, clone)| {
                let made = self.volumes[*clone].view.config.is_some();
                made || self.is_everywhere(all[*number].volume)
            })
            .collect();
        let ready: Vec<usize> = (0..all.len())
            .filter(|number| all[*number].done.is_some() && all[*number].deletion.is_none())
            .filter(|number| all[*number].clone.is_none())
            .take(CLONES_MAX - early.len().min(CLONES_MAX - 1))
            .filter(|number| self.is_everywhere(all[*number].volume))
            .collect();
        for (number, clone) in early {
            self.read_clone(number, clone);
        }
        for number in ready {
            let clone = self.make_clone(number);
            self.read_clone(number, clone);
        }
    }

    fn read_clone(&mut self, number: usize, clone: usize) {
        if self.violation.is_some() {
            return;
        }
        let mount = self.new_mount(Work::idle());
        self.hosts[0].mounts.insert(clone, mount);
        self.host_mount(0, clone);
        self.begin_reads(0, clone, 0..self.mix.blocks);
        let done =
            self.wait_for(PROGRESS_NS, |world| world.hosts[0].mounts[&clone].commands.is_empty());
        if !done {
            let state = self.state_story();
            self.violate(format!("the clone of snapshot {number} is not served\n{state}"));
            return;
        }
        self.converge(clone);
        if let Some((node, _)) = self.awaiting(clone).iter().find(|(_, applied)| *applied) {
            self.violate(format!("node{node} has snapshot {number}, its clone is not filled (S3)"));
        }
        let blocks = self.read_values(clone);
        self.check_snapshot(number, &blocks);
        self.probe(Probe::CloneRead);
    }

    /// All that the replicas say of themselves.
    pub fn state_story(&self) -> String {
        let mut text = String::new();
        for node in &self.nodes {
            let statuses = node.shard().map(tercet_shard::Shard::statuses);
            for status in statuses.unwrap_or_default() {
                let number = self.volume_number(status.volume);
                let name = &node.name;
                writeln!(text, "  {name} volume {number}: {status:?}").expect("memory");
            }
        }
        for (number, volume) in self.volumes.iter().enumerate() {
            writeln!(text, "  object {number}: {:?}", volume.view.config).expect("memory");
        }
        text
    }
}
