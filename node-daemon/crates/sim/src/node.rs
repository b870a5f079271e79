//! A node: its clock, its device, and the process with the real `Shard` that runs on it.
//!
//! A process has a life, counted up at each start: whatever was meant for an earlier life is
//! dropped. A process that stands still (SIGSTOP) takes nothing in and answers nothing, but its
//! connections stay, its device goes on, and all that arrived meanwhile is taken in at once when it
//! goes on.

use std::collections::{BTreeMap, VecDeque};

use rand::Rng;
use tercet_proto::{ConfigState, InstanceId, Instant, NodeName, Token};
use tercet_replication::api::{Ana, AssociationId, Input, Notice, Output};
use tercet_shard::{Effect, Event, Identity, OpenReport, Shard};

use crate::cluster::{Asked, Volume};
use crate::device::Device;
use crate::mix::{MS, S, US};
use crate::probes::Probe;
use crate::target::Association;
use crate::world::World;

/// Rates differ from true time by at most this: within 1 % of each other.
const RATE_MAX_PPB: i64 = 5_000_000;

/// Ticks within a microsecond that say that a deadline never passes.
const TICKS_MAX: u32 = 100;

/// `CLOCK_BOOTTIME` of a node.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    base_ns: u64,
    base_local_ns: u64,
    rate_ppb: i64,
}

impl Clock {
    fn local(self, now: u64) -> Instant {
        let passed = i128::from(now - self.base_ns);
        let passed = passed + passed * i128::from(self.rate_ppb) / 1_000_000_000;
        Instant(self.base_local_ns + u64::try_from(passed).expect("time goes on"))
    }

    /// The first true time at which the clock shows at least `local`.
    fn when(self, local: Instant) -> u64 {
        let ahead = i128::from(local.0.saturating_sub(self.base_local_ns));
        let ahead = ahead * 1_000_000_000 / (1_000_000_000 + i128::from(self.rate_ppb));
        self.base_ns + u64::try_from(ahead).expect("within the run") + 1
    }
}

type Deferred = Box<dyn FnOnce(&mut World)>;

/// A node machine.
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// Counts starts of the process.
    pub life: u64,
    /// Counts starts of the machine: the agent lives as long.
    pub boot: u64,
    /// Whether the machine has power.
    pub powered: bool,
    /// Whether it stays off whatever happens.
    pub gone: bool,
    /// The engine that runs, or ran last.
    pub instance: InstanceId,
    shard: Option<Shard>,
    /// Its device.
    pub device: Device,
    clock: Clock,
    /// How many faults hold the process now.
    pub paused: u32,
    inbox: VecDeque<Deferred>,
    tick_at: Option<u64>,
    ticks: (u64, u32),
    /// Hosts' associations of this life.
    pub associations: BTreeMap<AssociationId, Association>,
    /// Last drawn.
    pub association_last: u64,
    /// What each volume's path was last told to be.
    pub ana: BTreeMap<usize, Ana>,
    /// Requests of the agent that wait for an answer.
    pub asked: BTreeMap<Token, Asked>,
    /// Last drawn.
    pub token_last: u64,
    /// Volumes that this life has said it serves, with their epochs.
    pub serving: BTreeMap<usize, u64>,
    optimized: BTreeMap<usize, Option<u64>>,
}

impl Node {
    /// Whether a process runs, standing still or not.
    pub fn runs(&self) -> bool {
        self.shard.is_some()
    }

    /// Whether the epoch in which it serves is the one in which its path was optimized last.
    pub fn kept_epoch(&mut self, volume: usize) -> bool {
        let epoch = self.serving.get(&volume).copied();
        let before = std::mem::replace(self.optimized.entry(volume).or_default(), epoch);
        epoch.is_some() && before == epoch
    }

    /// The shard, to look at.
    pub fn shard(&self) -> Option<&Shard> {
        self.shard.as_ref()
    }
}

impl World {
    /// Makes the machines and starts their engines.
    pub fn make_nodes(&mut self) {
        for index in 0..self.mix.nodes {
            let clock = self.draw_clock();
            let mut device = Device::new(&mut self.rng, self.mix.disk_ns);
            device.scrub = self.decay.on.then_some(crate::decay::PACE);
            self.nodes.push(Node {
                name: NodeName::new(&format!("node{index}")),
                life: 0,
                boot: 0,
                powered: true,
                gone: false,
                instance: InstanceId::from_bytes([0; 16]),
                shard: None,
                device,
                clock,
                paused: 0,
                inbox: VecDeque::new(),
                tick_at: None,
                ticks: (0, 0),
                associations: BTreeMap::new(),
                association_last: 0,
                ana: BTreeMap::new(),
                asked: BTreeMap::new(),
                token_last: 0,
                serving: BTreeMap::new(),
                optimized: BTreeMap::new(),
            });
            self.after(US, move |world| world.start(index));
        }
        self.make_links();
    }

    fn draw_clock(&mut self) -> Clock {
        Clock {
            base_ns: self.now,
            base_local_ns: self.rng.random_range(S..1_000_000 * S),
            rate_ppb: self.rng.random_range(-RATE_MAX_PPB..=RATE_MAX_PPB),
        }
    }

    /// A machine that has booted counts from anew.
    pub fn reboot_clock(&mut self, node: usize) {
        self.nodes[node].clock = self.draw_clock();
    }

    /// Changes how fast a node's clock runs, within what is tolerated.
    pub fn change_rate(&mut self, node: usize) {
        let local = self.nodes[node].clock.local(self.now);
        let rate_ppb = self.rng.random_range(-RATE_MAX_PPB..=RATE_MAX_PPB);
        let clock = Clock { base_ns: self.now, base_local_ns: local.0, rate_ppb };
        self.nodes[node].clock = clock;
        self.nodes[node].tick_at = None;
        self.arm(node);
    }

    /// Starts a node's engine: lock, replay, flush (R2, R3). The peers are told of the exit that the
    /// lock proves before any link is there.
    pub fn start(&mut self, index: usize) {
        if self.nodes[index].runs() || !self.nodes[index].powered {
            return;
        }
        let instance = InstanceId::from_bytes(self.id_bytes());
        match self.nodes[index].device.last_instance() {
            Ok(exited) => exited.into_iter().for_each(|exited| self.tell_exit(index, exited)),
            Err(error) => self.violate(format!("a device without superblocks: {error}")),
        }
        let canary = self.canary;
        let node = &mut self.nodes[index];
        node.life += 1;
        node.instance = instance;
        let now = node.clock.local(self.now);
        let identity = Identity { node: node.name.clone(), instance, shard: 0, locked_at: now };
        match node.device.open(identity, canary, now) {
            Ok((shard, report)) => self.started(index, shard, &report),
            Err(error) => {
                let name = node.name.clone();
                self.violate(format!("{name} does not start: {error}"));
            }
        }
    }

    /// On a connection of its own to each peer, which may be lost, late or doubled like all else.
    fn tell_exit(&mut self, index: usize, exited: InstanceId) {
        for peer in (0..self.mix.nodes).filter(|peer| *peer != index) {
            let lost = self.permille(self.mix.lose_permille) && !self.healed;
            if lost || !self.net.is_open(index, peer) {
                continue;
            }
            let twice = self.permille(self.mix.double_permille);
            for _ in 0..=usize::from(twice) {
                let late = !self.healed && self.permille(self.mix.late_permille);
                let wait = if late { self.rng.random_range(MS..300 * MS) } else { self.delay() };
                let (life, node) = (self.nodes[peer].life, self.nodes[index].name.clone());
                self.after(wait, move |world| {
                    world.on_node(peer, life, move |world| world.exit_told(peer, node, exited));
                });
            }
        }
    }

    fn exit_told(&mut self, index: usize, node: NodeName, exited: InstanceId) {
        let primary = |volume: &Volume| {
            volume.view.config.as_ref().is_some_and(|config| config.primary.instance == exited)
        };
        if self.volumes.iter().any(primary) {
            self.probe(Probe::PrimaryExitTold);
        }
        self.tell(|world| {
            format!("{}: told that {node}'s last engine is over", world.nodes[index].name)
        });
        self.input(index, Input::ProvenExit(node, exited));
    }

    fn started(&mut self, index: usize, shard: Shard, report: &OpenReport) {
        let node = &mut self.nodes[index];
        node.shard = Some(shard);
        node.associations.clear();
        node.ana.clear();
        node.asked.clear();
        node.serving.clear();
        node.optimized.clear();
        node.tick_at = None;
        let life = node.life;
        self.probe_start(report);
        self.check_rotten(index, report);
        self.tell(|world| format!("{}: starts ({report:?})", world.nodes[index].name));
        self.arm(index);
        let wait = self.between((MS, 20 * MS));
        self.after(wait, move |world| {
            world.on_node(index, life, move |world| world.agent_started(index));
        });
    }

    fn probe_start(&mut self, report: &OpenReport) {
        if !report.damaged.is_empty() {
            self.probe(Probe::Damaged);
        }
        if report.previous_instance.is_some() {
            self.probe(Probe::ProvenExit);
        }
    }

    /// The process is gone (kill -9, power).
    pub fn end_process(&mut self, index: usize, power_stays: bool) {
        let Some(shard) = self.nodes[index].shard.take() else { return };
        if shard.statuses().iter().any(|s| s.serving) {
            self.probe(Probe::KilledWithWrites);
        }
        let instance = self.nodes[index].instance;
        let recovering = |volume: &Volume| {
            volume.view.config.as_ref().is_some_and(|config| {
                config.state == ConfigState::Recovering && config.primary.instance == instance
            })
        };
        if self.volumes.iter().any(recovering) {
            self.probe(Probe::CrashWhileRecovering);
        }
        self.probe_heir_died(index);
        drop(shard);
        let node = &mut self.nodes[index];
        node.inbox.clear();
        node.asked.clear();
        node.paused = 0;
        node.tick_at = None;
        if power_stays {
            node.device.process_died();
        }
        let silent = !power_stays;
        self.links_of_dead(index, silent);
        self.connections_of_dead(index, silent);
    }

    fn probe_heir_died(&mut self, index: usize) {
        let instance = self.nodes[index].instance;
        let leads = |volume: &Volume| {
            let config = volume.view.config.as_ref();
            config.filter(|config| config.primary.instance == instance).map(|config| config.epoch.0)
        };
        for volume in 0..self.volumes.len() {
            let Some(epoch) = leads(&self.volumes[volume]) else { continue };
            let before = |n: usize| self.nodes[n].serving.get(&volume) == Some(&(epoch - 1));
            if (0..self.nodes.len()).any(|other| other != index && before(other)) {
                self.probe(Probe::HeirDied);
            }
        }
    }

    /// Does something in a node's process of that life; later, while it stands still; never, once
    /// it has ended.
    pub fn on_node(&mut self, index: usize, life: u64, what: impl FnOnce(&mut Self) + 'static) {
        let node = &mut self.nodes[index];
        if node.life != life || node.shard.is_none() || self.violation.is_some() {
            return;
        }
        if node.paused > 0 {
            node.inbox.push_back(Box::new(what));
            return;
        }
        what(self);
    }

    /// The process stands still from now on.
    pub fn pause(&mut self, index: usize) {
        self.nodes[index].paused += 1;
    }

    /// It goes on, with all that has arrived.
    pub fn resume(&mut self, index: usize, life: u64) {
        let node = &mut self.nodes[index];
        if node.life != life || node.shard.is_none() {
            return;
        }
        node.paused = node.paused.saturating_sub(1);
        if node.paused > 0 {
            return;
        }
        for what in std::mem::take(&mut node.inbox) {
            self.on_node(index, life, what);
        }
    }

    /// Something for the shard that did not come from its device.
    pub fn input(&mut self, index: usize, input: Input) {
        self.feed(index, Event::Input(input));
    }

    /// Something for the shard.
    pub fn feed(&mut self, index: usize, event: Event) {
        let node = &mut self.nodes[index];
        let Some(shard) = &mut node.shard else { return };
        let now = node.clock.local(self.now);
        let mut effects = Vec::new();
        shard.step(event, now, &mut effects);
        self.note(effects.len() as u64 + 31 * index as u64);
        for effect in effects {
            match effect {
                Effect::Disk(token, op) => self.device_submit(index, token, op),
                Effect::Output(output) => self.output(index, output),
            }
        }
        self.arm(index);
    }

    fn output(&mut self, index: usize, output: Output) {
        match output {
            Output::Send(peer, message) => self.send(index, &peer, message),
            Output::Swap { token, volume, old, new } => {
                self.agent_swap(index, token, volume, old, new);
            }
            Output::ReadConsistent(volume) => self.agent_read(index, volume),
            Output::HostAccepted(association, result) => {
                self.target_accepted(index, association, result);
            }
            Output::HostDone(association, token, result) => {
                self.target_done(index, association, token, result);
            }
            Output::HostEnd(association) => self.target_end(index, association),
            Output::Ana(volume, ana) => self.target_ana(index, volume, ana),
            Output::Resized(..) => {}
            Output::Fenced { volume, epoch, generation } => {
                self.agent_fenced(index, volume, epoch, generation);
            }
            Output::ControlDone(token, result) => self.agent_control_done(index, token, result),
            Output::Notice(volume, notice) => self.noticed(index, volume, &notice),
            Output::Fatal(what) => {
                self.violate(format!("{} stops: {what}", self.nodes[index].name));
            }
        }
    }

    fn noticed(&mut self, index: usize, volume: tercet_proto::VolumeId, notice: &Notice) {
        let number = self.volume_number(volume);
        self.tell(|world| format!("{}: volume {number}: {notice:?}", world.nodes[index].name));
        match notice {
            Notice::Serving(epoch) => {
                self.probe_serving(index, number);
                self.saw_serving(number, epoch.0);
                self.nodes[index].serving.insert(number, epoch.0);
            }
            Notice::Stopped(_) => {
                self.nodes[index].serving.remove(&number);
            }
            Notice::TakingOver(_) if self.cluster.away => self.probe(Probe::TakeoverWithoutApi),
            Notice::MemberInSync(_, true) => self.probe(Probe::CaughtUp),
            Notice::Filled => self.probe(Probe::CloneFilled),
            Notice::Copied => self.probe(Probe::Copied),
            Notice::Repaired(_) => self.probe(Probe::BlockRepaired),
            Notice::NotRepaired(_) => self.probe(Probe::BlockNotRepaired),
            _ => {}
        }
    }

    fn probe_serving(&mut self, index: usize, volume: usize) {
        let others = || (0..self.nodes.len()).filter(|other| *other != index);
        let living =
            others().any(|n| self.nodes[n].runs() && self.nodes[n].serving.contains_key(&volume));
        let away = others().any(|n| !self.nodes[n].runs());
        if living {
            self.probe(Probe::TakeoverFromLiving);
        }
        if away {
            self.probe(Probe::TakeoverWithTwo);
        }
    }

    /// Wakes the shard when it wants to be woken.
    fn arm(&mut self, index: usize) {
        let node = &self.nodes[index];
        let Some(deadline) = node.shard.as_ref().and_then(Shard::next_deadline) else { return };
        let at = node.clock.when(deadline).max(self.now + 1);
        if node.tick_at.is_some_and(|earlier| earlier <= at) {
            return;
        }
        let life = node.life;
        self.nodes[index].tick_at = Some(at);
        self.at(at, move |world| {
            if world.nodes[index].tick_at == Some(at) {
                world.nodes[index].tick_at = None;
                world.on_node(index, life, move |world| world.tick(index));
            }
        });
    }

    fn tick(&mut self, index: usize) {
        let ticks = &mut self.nodes[index].ticks;
        let slot = self.now / US;
        *ticks = if ticks.0 == slot { (slot, ticks.1 + 1) } else { (slot, 1) };
        if ticks.1 > TICKS_MAX {
            self.violate(format!("{} wants ticks without end", self.nodes[index].name));
        }
        self.feed(index, Event::Tick);
    }
}
