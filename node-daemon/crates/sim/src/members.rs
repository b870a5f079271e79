//! Nodes that are lost for good, given up, or away for long, and the operator and agents that put
//! their replicas on the fourth node (M1, M2).
//!
//! Of four nodes three are members of every volume. At its time a *loss* takes one of them: its device
//! is blank and it stays off until it is replaced; or it lives and is only to be given up; or it is
//! off and comes back in the middle, with all that it had. All other faults go on meanwhile. In the
//! end no change may be left half done, nobody may keep a replica that no configuration names, and
//! the fourth node's replicas are equal to the others' as any member's.
//!
//! Left to `phases` is the comparison, to the engines all that decides.

use rand::Rng;
use tercet_proto::{Config, ConfigState, Member, NewReplica, ReplicaId};
use tercet_replication::api::{Control, Replacement};
use uuid::Uuid;

use crate::cluster::Asked;
use crate::device::Device;
use crate::mix::{Loss, MS, S};
use crate::probes::Probe;
use crate::world::World;

/// Between two looks of the operator and the agents.
const LOOK_NS: u64 = 300 * MS;

/// A loss that cannot be yet waits for so long.
const POSTPONED_NS: u64 = 500 * MS;

/// Changes of a thousand that are stopped half way, where the one who goes is alive.
const STOPPED_PERMILLE: u32 = 400;

/// For how long.
const STOPPED_NS: (u64, u64) = (6 * S, 12 * S);

/// Changes of a thousand whose primary is parted from its heir, where it gives its place away.
const PARTED_PERMILLE: u32 = 700;

/// For how long.
const PARTED_NS: (u64, u64) = (3 * S, 6 * S);

/// How long a node that comes back stays away.
const AWAY_NS: (u64, u64) = (500 * MS, 8 * S);

/// One node's replacement by another.
#[derive(Clone, Debug)]
pub struct Job {
    loss: Loss,
    victim: usize,
    spare: usize,
    /// The victim's replica of each volume.
    old: Vec<ReplicaId>,
    /// The operator wants it no more.
    withdrawn: bool,
}

impl World {
    /// Puts the seed's losses into the queue.
    pub fn schedule_losses(&mut self) {
        for (at, loss) in self.mix.losses.clone() {
            self.at(at, move |world| world.lose(loss));
        }
        if !self.mix.losses.is_empty() {
            self.after(LOOK_NS, Self::look_after_members);
        }
    }

    /// The nodes that a volume's replicas are on, or shall be at first.
    pub fn homes(&self, volume: usize) -> Vec<usize> {
        match &self.volumes[volume].view.config {
            Some(config) if !self.mix.losses.is_empty() => {
                let node = |m: &Member| self.nodes.iter().position(|node| node.name == m.node);
                config.members.iter().map(|m| node(m).expect("a node of this run")).collect()
            }
            _ => self.volumes[volume].homes.clone(),
        }
    }

    fn config(&self, volume: usize) -> Option<&Config> {
        self.volumes[volume].view.config.as_ref()
    }

    /// Takes a member away, if no other is being replaced and every volume is at rest.
    fn lose(&mut self, loss: Loss) {
        if self.healed {
            return;
        }
        let rests =
            |volume: usize| self.config(volume).is_some_and(|c| c.state == ConfigState::Active);
        if self.job.is_some() || !(0..self.mix.volumes).all(rests) {
            self.after(POSTPONED_NS, move |world| world.lose(loss));
            return;
        }
        let homes = self.homes(0);
        let elsewhere = |volume: usize| self.homes(volume).iter().any(|n| !homes.contains(n));
        if (1..self.mix.volumes).any(elsewhere) {
            return; // a withdrawal came between two volumes' changes: no node is spare for both
        }
        let victim = homes[self.rng.random_range(0..homes.len())];
        let spare = (0..self.mix.nodes).find(|node| !homes.contains(node)).expect("a fourth node");
        let name = self.nodes[victim].name.clone();
        let old = (0..self.mix.volumes).map(|volume| {
            let members = &self.config(volume).expect("looked at above").members;
            members.iter().find(|m| m.node == name).expect("a member of all").replica
        });
        let old = old.collect();
        self.faults_done += 1;
        self.tell(|world| format!("LOSS {loss:?} of {name}, for {}", world.nodes[spare].name));
        self.job = Some(Job { loss, victim, spare, old, withdrawn: false });
        match loss {
            Loss::Retired => {}
            Loss::Wiped => {
                self.take_away(victim);
                self.nodes[victim].device = Device::new(&mut self.rng, self.mix.disk_ns);
                for volume in &mut self.volumes {
                    volume.replicas[victim] = None;
                }
            }
            Loss::Away => {
                self.take_away(victim);
                let lasts = self.between(AWAY_NS);
                self.after(lasts, Self::comes_back);
            }
        }
    }

    fn take_away(&mut self, node: usize) {
        self.end_process(node, false);
        let node = &mut self.nodes[node];
        node.powered = false;
        node.gone = true;
        node.boot += 1;
        node.device.power_loss(&mut self.rng);
    }

    fn give_back(&mut self, node: usize) {
        self.nodes[node].gone = false;
        let boot = self.nodes[node].boot;
        self.power_on(node, boot);
    }

    /// A node that was away is back, and the operator wants it to stay what it was.
    pub fn comes_back(&mut self) {
        let Some(job) = self.job.as_mut().filter(|job| job.loss == Loss::Away) else { return };
        let victim = job.victim;
        job.withdrawn = true;
        if self.nodes[victim].gone {
            self.give_back(victim);
        }
    }

    fn look_after_members(&mut self) {
        for volume in 0..self.mix.volumes {
            self.look_at_change(volume);
        }
        for node in 0..self.mix.nodes {
            self.delete_strays(node);
        }
        let over = self
            .job
            .as_ref()
            .is_some_and(|job| (0..self.mix.volumes).all(|v| self.is_over(v, job)));
        if over {
            self.finish_job();
        }
        self.after(LOOK_NS, Self::look_after_members);
    }

    /// No change goes on, and the old one is in no set (or, withdrawn, the new one is not).
    fn is_over(&self, volume: usize, job: &Job) -> bool {
        let Some(config) = self.config(volume) else { return false };
        let old = config.is_member(job.old[volume]);
        config.state == ConfigState::Active
            && config.learners.is_empty()
            && (job.withdrawn || !old)
            && self.volumes[volume].view.replacement.is_none()
            && [job.victim, job.spare].iter().all(|node| self.has_no_stray(*node, volume))
    }

    fn finish_job(&mut self) {
        let job = self.job.take().expect("it is over");
        let replaced =
            (0..self.mix.volumes).any(|v| self.config(v).is_some_and(|c| !c.is_member(job.old[v])));
        self.probe(if replaced { Probe::Replaced } else { Probe::ReplacementWithdrawn });
        self.tell(|world| format!("{} is replaced: {replaced} (M1)", world.nodes[job.victim].name));
        if self.nodes[job.victim].gone {
            self.give_back(job.victim);
        }
    }

    /// The operator: makes the learner, asks for the change, and takes the request back.
    fn look_at_change(&mut self, volume: usize) {
        let Some(job) = self.job.clone() else { return };
        let Some(config) = self.config(volume).cloned() else { return };
        let wanted = !job.withdrawn && config.is_member(job.old[volume]);
        let made = self.volumes[volume].replicas[job.spare];
        let request = match made {
            Some(replica) if wanted => {
                let node = self.nodes[job.spare].name.clone();
                Some(Replacement { old: job.old[volume], learner: Member { node, replica } })
            }
            _ => None,
        };
        if wanted && made.is_none() {
            let new = NewReplica {
                volume: self.volumes[volume].id,
                replica: ReplicaId::on_shard(Uuid::from_bytes(self.id_bytes()), 0),
                name: format!("volume{volume}"),
                size_blocks: self.mix.blocks,
                source: None,
                incomplete: false,
            };
            self.ask(job.spare, Control::CreateLearner(new), Asked::Learner(volume));
        }
        if self.volumes[volume].view.replacement != request {
            self.volumes[volume].view.replacement = request;
            self.changed(volume);
        }
    }

    /// A learner's replica is made, and reported.
    pub fn learner_made(&mut self, volume: usize, node: usize, replica: ReplicaId) {
        let expected = self.job.as_ref().is_some_and(|job| job.spare == node && !job.withdrawn);
        if expected {
            self.volumes[volume].replicas[node] = Some(replica);
        }
    }

    /// A node's replica of a volume that no configuration names and nobody expects any more.
    fn stray(&self, node: usize, volume: usize) -> Option<ReplicaId> {
        let state = self.nodes[node].shard()?.storage().replica(self.volumes[volume].id)?;
        let config = self.config(volume)?;
        let promised = state.promise.as_ref().map(tercet_proto::Promise::epoch);
        let named = config.everyone().any(|member| member.replica == state.replica);
        let awaited = self.job.as_ref().is_some_and(|job| job.spare == node && !job.withdrawn);
        let settled = config.state == ConfigState::Active && Some(config.epoch) >= promised;
        (settled && !named && !awaited).then_some(state.replica)
    }

    /// Whether no node keeps a replica that belongs to no configuration.
    pub fn no_strays(&self) -> bool {
        let volumes = 0..self.mix.volumes;
        (0..self.mix.nodes).all(|node| volumes.clone().all(|v| self.has_no_stray(node, v)))
    }

    fn has_no_stray(&self, node: usize, volume: usize) -> bool {
        let there = |node: usize| {
            let shard = self.nodes[node].shard();
            shard.and_then(|shard| shard.storage().replica(self.volumes[volume].id))
        };
        let named =
            |id| self.config(volume).is_some_and(|c| c.everyone().any(|one| one.replica == id));
        self.nodes[node].gone
            || self.nodes[node].runs() && there(node).is_none_or(|s| named(s.replica))
    }

    /// M2: the agent deletes what an Active configuration does not name, after a consistent read.
    fn delete_strays(&mut self, node: usize) {
        if !self.nodes[node].runs() || !self.api_reaches(node) {
            return;
        }
        for volume in 0..self.mix.volumes {
            if let Some(replica) = self.stray(node, volume) {
                self.probe(Probe::StrayDeleted);
                self.volumes[volume].replicas[node] = None;
                let id = self.volumes[volume].id;
                self.ask(node, Control::DeleteReplica(id, replica), Asked::Nothing);
            }
        }
    }

    /// The object goes from one configuration to another: which step of a change that is (M1).
    pub fn saw_step(&mut self, old: &Config, new: &Config) {
        let both = (old.previous_members.is_some(), new.previous_members.is_some());
        match both {
            (true, true) if new.primary != old.primary => self.probe(Probe::ChangeCarriedOn),
            (true, false) if new.epoch > old.epoch => self.probe(Probe::ChangeAborted),
            (true, false) => self.probe(Probe::ChangeFinished),
            (false, true) if new.primary.node != old.primary.node => self.part_a_change(new),
            (false, true) => self.stop_a_change(),
            _ => {}
        }
    }

    /// The primary gives its own place away, and mostly does not hear that it has: it is parted from
    /// its heir just then, together with the third member. Nobody may serve on the word of the new
    /// set alone (M1), for those two are a majority of the old one.
    fn part_a_change(&mut self, new: &Config) {
        let Some(job) = self.job.as_ref().filter(|job| job.loss == Loss::Retired) else { return };
        let (victim, spare) = (job.victim, job.spare);
        if self.healed || !self.permille(PARTED_PERMILLE) {
            return;
        }
        let heir = self.nodes.iter().position(|node| node.name == new.primary.node);
        let heir = heir.expect("a node of this run");
        let apart = [victim, spare, heir];
        let other = (0..self.mix.nodes).find(|node| !apart.contains(node)).expect("a third member");
        self.probe(Probe::ChangeParted);
        self.cluster.answer_lost = true;
        let lasts = self.between(PARTED_NS);
        for a in [victim, other] {
            for b in [heir, spare, self.api_site()] {
                self.cut_both(a, b, lasts);
            }
        }
    }

    /// Sometimes the newcomer and a member lose their power just when both sets count, for longer
    /// than a change is waited for: only the set that shall go has a majority then (M1).
    fn stop_a_change(&mut self) {
        let Some(job) = self.job.as_ref().filter(|job| job.loss == Loss::Retired) else { return };
        let (victim, spare) = (job.victim, job.spare);
        if self.healed || !self.permille(STOPPED_PERMILLE) {
            return;
        }
        let common = (0..self.mix.nodes).filter(|node| *node != victim && *node != spare);
        let common: Vec<usize> = common.collect();
        let other = common[self.rng.random_range(0..common.len())];
        for node in [spare, other] {
            let lasts = self.between(STOPPED_NS);
            self.power_off(node, lasts);
        }
    }
}
