//! The faults: each kind begins at its time and ends by itself, or when all is healed.

use rand::Rng;
use tercet_replication::api::{Control, ReplicaStatus};
use tercet_shard::{OpenReport, Shard};

use crate::cluster::{Asked, attachment};
use crate::mix::{Fault, MS, S};
use crate::pipes::Site;
use crate::probes::Probe;
use crate::world::World;

/// The lease time of rule L2, to tell long pauses from short ones.
const D_NS: u64 = S;

/// A replica that nobody talks to has written its mark after this time, on any device (R1).
const QUIET_NS: u64 = 500 * MS;

/// A fault that would be one too many waits for so long.
const POSTPONED_NS: u64 = 200 * MS;

/// Between two looks at whether a host is fenced.
const FENCE_POLL_NS: u64 = 50 * MS;

impl World {
    /// Puts the seed's faults into the queue.
    pub fn schedule_faults(&mut self) {
        for (at, fault) in self.mix.faults.clone() {
            self.at(at, move |world| world.inject(fault));
        }
    }

    fn inject(&mut self, fault: Fault) {
        if self.healed {
            return;
        }
        // More is not tolerated: two bad replicas of three, or one of two.
        let rot_allowed = self.mix.nodes == 3 && !self.rotted;
        let fault = if fault == Fault::Rot && !rot_allowed { Fault::KillRestart } else { fault };
        if self.rotten.is_some() || (fault == Fault::Rot && !self.is_calm()) {
            self.after(POSTPONED_NS, move |world| world.inject(fault));
            return;
        }
        self.faults_done += 1;
        let lasts = self.around(self.mix.fault_ns).min(4 * self.mix.fault_ns) + MS;
        let node = self.draw_node();
        self.tell(|world| {
            format!("FAULT {fault:?} ({}, {} ms)", world.nodes[node].name, lasts / MS)
        });
        match fault {
            Fault::KillRestart => {
                let back = self.between((30 * MS, 300 * MS));
                self.kill(node, back);
            }
            Fault::KillLater => self.kill(node, lasts + 500 * MS),
            Fault::PowerOne => self.power_off(node, lasts + 200 * MS),
            Fault::PowerAll => {
                self.probe(Probe::PowerLossAll);
                for node in 0..self.mix.nodes {
                    let lasts = self.rng.random_range(200 * MS..2 * S);
                    self.power_off(node, lasts);
                }
            }
            Fault::Pause => self.fault_pause(node, lasts + 100 * MS),
            Fault::CutPair => {
                let (a, b) = self.draw_sites();
                self.cut_for(a, b, lasts);
                self.cut_for(b, a, lasts);
            }
            Fault::CutOneWay => {
                self.probe(Probe::CutOneWay);
                let (a, b) = self.draw_sites();
                self.cut_for(a, b, lasts);
            }
            Fault::Isolate => {
                for other in (0..=self.api_site()).filter(|other| *other != node) {
                    self.cut_for(node, other, lasts);
                    self.cut_for(other, node, lasts);
                }
            }
            Fault::CutOff => self.fault_cut_off(node, lasts + S),
            Fault::PartedAtRestart => self.fault_parted(node),
            Fault::LinkFlap => self.fault_flap(node),
            Fault::ApiAway => {
                self.cluster.away = true;
                self.after(lasts, |world| world.cluster.away = false);
            }
            Fault::ApiCut => {
                let api = self.api_site();
                self.cut_for(node, api, lasts);
                self.cut_for(api, node, lasts);
            }
            Fault::DiskSlow | Fault::DiskStuck => self.fault_disk(node, fault, lasts),
            Fault::HostReboot | Fault::HostCut | Fault::HostFlap | Fault::Detach => {
                self.fault_host(node, fault, lasts);
            }
            Fault::HandOver => self.fault_hand_over(lasts),
            Fault::ClockRate => self.change_rate(node),
            Fault::Rot => self.fault_rot(node),
        }
    }

    /// Rather a node that serves something.
    fn draw_node(&mut self) -> usize {
        let serving: Vec<usize> =
            (0..self.nodes.len()).filter(|n| !self.nodes[*n].serving.is_empty()).collect();
        if !serving.is_empty() && self.permille(600) {
            return serving[self.rng.random_range(0..serving.len())];
        }
        self.rng.random_range(0..self.nodes.len())
    }

    fn draw_sites(&mut self) -> (Site, Site) {
        let nodes = self.mix.nodes;
        let a = self.rng.random_range(0..nodes);
        let others = if self.permille(700) { nodes } else { self.api_site() + 1 };
        if others == 1 {
            return (a, self.api_site());
        }
        loop {
            let b = self.rng.random_range(0..others);
            if b != a {
                return if self.permille(500) { (a, b) } else { (b, a) };
            }
        }
    }

    pub fn cut_for(&mut self, from: Site, to: Site, lasts: u64) {
        self.net.cut(from, to);
        let nodes = self.mix.nodes;
        if from < nodes && to < nodes {
            self.link_watch_cut(from, to);
        }
        self.after(lasts, move |world| {
            if !world.healed {
                world.heal(from, to);
            }
        });
    }

    /// Two sites lose each other for so long.
    pub fn cut_both(&mut self, a: Site, b: Site, lasts: u64) {
        self.cut_for(a, b, lasts);
        self.cut_for(b, a, lasts);
    }

    fn fault_cut_off(&mut self, node: usize, lasts: u64) {
        for other in (0..self.mix.nodes).chain([self.api_site()]).filter(|other| *other != node) {
            self.cut_both(node, other, lasts);
        }
    }

    /// One member has missed the primary for longer than D when the other one restarts without it.
    fn fault_parted(&mut self, node: usize) {
        let (nodes, lasts) = (self.mix.nodes, 4 * S);
        self.cut_both(node, self.api_site(), lasts);
        if nodes < 3 {
            return;
        }
        let last = (node + 1) % nodes;
        for other in (0..nodes).filter(|other| *other != node && *other != last) {
            self.cut_both(node, other, lasts);
        }
        self.after(D_NS + 300 * MS, move |world| {
            if !world.healed {
                world.cut_both(node, last, lasts - D_NS - 300 * MS);
                let back = world.between((10 * MS, 60 * MS));
                world.kill(last, back);
            }
        });
    }

    fn kill(&mut self, node: usize, back: u64) {
        self.end_process(node, true);
        self.after(back, move |world| world.start(node));
    }

    /// A node loses its power, and gets it back after a while.
    pub fn power_off(&mut self, node: usize, back: u64) {
        if !self.nodes[node].powered {
            return;
        }
        self.end_process(node, false);
        self.nodes[node].powered = false;
        self.nodes[node].boot += 1;
        let Self { nodes, rng, .. } = self;
        if nodes[node].device.power_loss(rng) {
            self.probe(Probe::PowerLoss);
        }
        let boot = self.nodes[node].boot;
        self.after(back, move |world| world.power_on(node, boot));
    }

    /// It has its power again, unless it lost it anew meanwhile.
    pub fn power_on(&mut self, node: usize, boot: u64) {
        if self.nodes[node].powered || self.nodes[node].gone || self.nodes[node].boot != boot {
            return;
        }
        self.nodes[node].powered = true;
        self.reboot_clock(node);
        self.links_reset(node);
        self.start(node);
    }

    /// Whether nothing else is wrong, so that one more fault is the only one.
    fn is_calm(&self) -> bool {
        let sites = 0..=self.api_site();
        let cut = sites.clone().any(|a| sites.clone().any(|b| self.net.is_cut(a, b)));
        let well = |node: &crate::node::Node| {
            let swift = node.device.slow == 1 && node.device.stuck_until <= self.now;
            node.runs() && node.paused == 0 && swift
        };
        // A clone's replica that awaits its snapshot is one that is missing already (S3).
        let whole = self.volumes.iter().all(|volume| volume.view.config.is_some())
            && (0..self.nodes.len()).all(|node| !self.has_incomplete(node));
        !cut && whole
            && self.nodes.iter().all(well)
            && (0..self.nodes.len()).all(|node| self.is_in_step(node))
    }

    fn has_incomplete(&self, node: usize) -> bool {
        let statuses = self.nodes[node].shard().map(Shard::statuses).unwrap_or_default();
        statuses.iter().any(|status| status.incomplete)
    }

    fn fault_rot(&mut self, node: usize) {
        self.rotted = true;
        self.rotten = Some(node);
        // Alone for a while, so that a mark follows its last record: all are below it (R1).
        for other in (0..=self.api_site()).filter(|other| *other != node) {
            self.cut_both(node, other, QUIET_NS + 50 * MS);
        }
        self.after(QUIET_NS, move |world| {
            if world.healed {
                world.rotten = None;
            } else {
                world.rot(node);
            }
        });
    }

    fn rot(&mut self, node: usize) {
        let tails = |shard: &Shard| {
            let still = |status: &&ReplicaStatus| !shard.storage().in_flight(status.volume);
            let all = shard.statuses();
            all.iter().filter(still).map(|status| (status.volume, status.tail)).collect()
        };
        self.rot_tails = self.nodes[node].shard().map(tails).unwrap_or_default();
        self.end_process(node, true);
        let Self { nodes, rng, .. } = self;
        let block = nodes[node].device.rot(rng);
        self.tell(|_| format!("a bit rots in block {block:?} (R1)"));
        self.after(50 * MS, move |world| world.start(node));
        self.after(S, move |world| world.rot_known(node));
    }

    /// R1: below a mark a bad record is damage. It is not taken for the end of a log.
    pub fn check_rotten(&mut self, node: usize, report: &OpenReport) {
        if self.rotten != Some(node) {
            return;
        }
        let before = std::mem::take(&mut self.rot_tails);
        let statuses = self.nodes[node].shard().map(Shard::statuses).unwrap_or_default();
        for (volume, tail) in before {
            let after = statuses.iter().find(|status| status.volume == volume);
            // A replica whose making itself is lost answers "none" and counts nowhere (T9), whatever
            // it had acknowledged.
            let Some(after) = after else { continue };
            let lost = after.tail < tail && !after.incomplete;
            if lost && !report.damaged.contains(&volume) {
                let (name, after) = (&self.nodes[node].name, after.tail);
                self.violate(format!(
                    "{name} had {tail:?} and starts with {after:?} as if whole: damage taken for a \
                     torn end (R1)"
                ));
            }
        }
    }

    /// Other faults go on once the damage is known, or was behind what is needed.
    fn rot_known(&mut self, node: usize) {
        // Or all others have what is committed, so that nothing hangs on this replica.
        let others = (0..self.nodes.len()).filter(|other| *other != node);
        if self.is_in_step(node) || others.into_iter().all(|other| self.is_in_step(other)) {
            self.rotten = None;
            return;
        }
        self.after(POSTPONED_NS, move |world| world.rot_known(node));
    }

    /// Whether each replica of a node has all that is committed, or says that it is incomplete.
    fn is_in_step(&self, node: usize) -> bool {
        let statuses = |n: usize| self.nodes[n].shard().map(Shard::statuses).unwrap_or_default();
        let all: Vec<_> = (0..self.nodes.len()).flat_map(statuses).collect();
        let mine = statuses(node);
        let made = self.volumes.iter().filter(|v| v.view.config.is_some()).count();
        mine.len() >= made
            && mine.iter().all(|mine| {
                let of_volume = all.iter().filter(|other| other.volume == mine.volume);
                let committed = of_volume.map(|other| other.committed).max().unwrap_or_default();
                mine.incomplete || mine.tail.lsn >= committed
            })
    }

    fn fault_pause(&mut self, node: usize, lasts: u64) {
        if !self.nodes[node].runs() {
            return;
        }
        if lasts > D_NS && !self.nodes[node].serving.is_empty() {
            self.probe(Probe::PausedPrimary);
        }
        let life = self.nodes[node].life;
        self.pause(node);
        self.after(lasts, move |world| {
            if !world.healed {
                world.resume(node, life);
            }
        });
    }

    fn fault_flap(&mut self, node: usize) {
        if self.mix.nodes > 1 {
            let step = self.rng.random_range(1..self.mix.nodes);
            let index = self.link_index(node, (node + step) % self.mix.nodes);
            self.link_break(index, 20 * MS);
        }
    }

    fn fault_disk(&mut self, node: usize, fault: Fault, lasts: u64) {
        if fault == Fault::DiskSlow {
            let factor = self.rng.random_range(5..200);
            self.nodes[node].device.slow = factor;
            self.after(lasts, move |world| world.nodes[node].device.slow = 1);
            return;
        }
        if lasts > D_NS {
            self.probe(Probe::DiskStuck);
        }
        let until = self.now + lasts;
        let device = &mut self.nodes[node].device;
        device.stuck_until = device.stuck_until.max(until);
    }

    fn fault_host(&mut self, node: usize, fault: Fault, lasts: u64) {
        let host = self.rng.random_range(0..self.hosts.len());
        if !self.hosts[host].alive {
            return;
        }
        let site = self.host_site(host);
        match fault {
            Fault::HostReboot => {
                self.host_die(host);
                self.after(lasts, move |world| {
                    if !world.hosts[host].alive {
                        world.host_reboot(host);
                    }
                });
            }
            Fault::HostCut => {
                self.cut_for(site, node, lasts);
                if self.permille(600) {
                    self.cut_for(node, site, lasts);
                }
            }
            Fault::HostFlap => self.host_flap(host, node),
            _ => self.detach(host, lasts),
        }
    }

    /// To whoever is fit, or to a node that is named; on half of them something happens just then, to
    /// either of the two (T10).
    fn fault_hand_over(&mut self, lasts: u64) {
        let volume = self.rng.random_range(0..self.mix.volumes);
        let Some(node) = self.primary_by_object(volume) else { return };
        let id = self.volumes[volume].id;
        let heir = (node + self.rng.random_range(1..=2)) % self.mix.nodes;
        let to = self.permille(500).then(|| self.nodes[heir].name.clone());
        self.ask(node, Control::HandOver(id, to), Asked::Nothing);
        if self.permille(400) {
            self.trap_hand_over(volume, lasts);
        } else if self.mix.nodes > 1 && heir != node && self.permille(500) {
            let wait = self.between((MS / 4, 40 * MS));
            self.after(wait, move |world| {
                if !world.healed && world.rotten.is_none() {
                    world.disturb_hand_over(node, heir, lasts);
                }
            });
        }
    }

    fn disturb_hand_over(&mut self, node: usize, heir: usize, lasts: u64) {
        let which = if self.permille(500) { node } else { heir };
        match self.rng.random_range(0..5) {
            0 => {
                let back = self.between((30 * MS, 300 * MS));
                self.kill(which, back);
            }
            1 => self.power_off(which, lasts + 200 * MS),
            2 => self.fault_pause(which, lasts + 100 * MS),
            3 => self.cut_both(which, self.api_site(), lasts),
            _ => {
                self.cut_for(heir, node, lasts);
                if self.permille(500) {
                    self.cut_for(node, heir, lasts);
                }
            }
        }
    }

    /// The old primary hears nobody any more, and hosts reach it still (L1, L5).
    pub fn spring_trap(&mut self, node: usize, lasts: u64) {
        if self.healed || self.rotten.is_some() {
            return;
        }
        for other in (0..self.mix.nodes).filter(|other| *other != node) {
            self.cut_for(other, node, lasts);
        }
        self.cut_both(node, self.api_site(), lasts);
    }

    /// The node that the object names as a volume's primary.
    pub fn primary_by_object(&self, volume: usize) -> Option<usize> {
        let config = self.volumes[volume].view.config.as_ref()?;
        self.nodes.iter().position(|node| node.name == config.primary.node)
    }

    /// A host's attachment is taken away, and given back once it is fenced (H5).
    fn detach(&mut self, host: usize, lasts: u64) {
        let mounts: Vec<usize> = self.hosts[host].mounts.keys().copied().collect();
        let volume = mounts[self.rng.random_range(0..mounts.len())];
        if !self.hosts[host].mounts[&volume].attached {
            return;
        }
        self.host_unmount(host, volume);
        let object = &mut self.volumes[volume].view;
        let nqn = attachment(host).host_nqn;
        object.attachments.retain(|a| a.host_nqn != nqn);
        object.generation += 1;
        let generation = object.generation;
        self.changed(volume);
        let until = self.now + lasts + 5 * S;
        self.after(FENCE_POLL_NS, move |world| world.detached(host, volume, generation, until));
    }

    fn detached(&mut self, host: usize, volume: usize, generation: u64, until: u64) {
        let object = &self.volumes[volume].view;
        let epoch = object.config.as_ref().map(|config| config.epoch);
        let fenced = object.fence.is_some_and(|(e, g)| Some(e) == epoch && g >= generation);
        if fenced {
            self.probe(Probe::Fenced);
            self.settle_by_fence(host, volume);
        }
        if fenced || self.now > until || self.healed {
            self.attach(host, volume);
            return;
        }
        self.after(FENCE_POLL_NS, move |world| world.detached(host, volume, generation, until));
    }

    fn attach(&mut self, host: usize, volume: usize) {
        let object = &mut self.volumes[volume].view;
        object.attachments.push(attachment(host));
        object.generation += 1;
        self.changed(volume);
        let mount = self.hosts[host].mounts.get_mut(&volume).expect("it was detached");
        mount.attached = true;
        if self.hosts[host].alive {
            self.host_mount(host, volume);
        }
    }

    /// Everything is well from now on.
    pub fn heal_all(&mut self) {
        self.tell(|_| "HEALED: no faults from now on".into());
        self.healed = true;
        self.cluster.away = false;
        for from in 0..=self.api_site() {
            for to in 0..=self.api_site() {
                while self.net.is_cut(from, to) {
                    self.heal(from, to);
                }
            }
        }
        self.comes_back();
        for node in 0..self.nodes.len() {
            self.nodes[node].device.slow = 1;
            self.nodes[node].device.stuck_until = 0;
            let boot = self.nodes[node].boot;
            self.power_on(node, boot);
            while self.nodes[node].paused > 0 {
                let life = self.nodes[node].life;
                self.resume(node, life);
            }
            self.start(node);
        }
        for host in 0..self.hosts.len() {
            if !self.hosts[host].alive {
                self.host_reboot(host);
            }
        }
    }
}
