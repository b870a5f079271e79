//! Three nodes, their stores, a network that loses, doubles and reorders, and an API server: all in
//! one thread, by one seed. Every schedule can be run again.
#![allow(dead_code)] // each test file uses a part of it

pub mod register;
pub mod schedule;
pub mod store;
pub mod stories;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use store::MemStore;
use tercet_proto::config::MEMBERS_MAX;
use tercet_proto::message::{Message, VERSION};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, Config, ConfigState, Epoch, InstanceId, Instant, Member, NodeName,
    Primary, ReplicaId, Token, VolumeId,
};
use tercet_replication::api::{
    Ana, AssociationId, Attachment, Control, ControlDone, ControlError, HostCommand, HostDone,
    HostError, HostIdentity, HostRefusal, Input, Notice, Output, PeerId, ReplicaStatus,
    SwapOutcome, VolumeView,
};
use tercet_replication::{Identity, Node, Options};

pub const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
pub const SIZE_BLOCKS: u64 = 64;
pub const MS: u64 = 1_000_000;

/// How unkind network, disks and API server are.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    pub lose: f64,
    pub double: f64,
    pub delay_us: u64,
    pub disk_us: u64,
    pub swap_unknown: f64,
}

pub const KIND: Faults =
    Faults { lose: 0.0, double: 0.0, delay_us: 100, disk_us: 200, swap_unknown: 0.0 };

#[derive(Debug)]
enum Event {
    Deliver { from: usize, to: usize, instances: (InstanceId, InstanceId), message: Box<Message> },
    Flush(usize),
    View(usize, Box<VolumeView>),
    Swap { node: usize, instance: InstanceId, token: Token, old: Box<Config>, new: Box<Config> },
    Swapped { node: usize, instance: InstanceId, token: Token, outcome: Box<SwapOutcome> },
    Read(usize),
    Link(usize, usize),
    Unlink(usize, usize),
}

/// Whether a message from one node to another passes.
pub type Filter = Box<dyn Fn(usize, usize, &Message) -> bool>;

pub struct Machine {
    pub name: NodeName,
    pub replica: ReplicaId,
    pub instance: InstanceId,
    pub node: Option<Node>,
    pub store: MemStore,
    pub ana: Ana,
    pub paused_until: u64,
    flush_planned: bool,
    disk_stopped: bool,
}

pub struct Cluster {
    pub now: u64,
    pub machines: Vec<Machine>,
    pub object: VolumeView,
    pub api_up: bool,
    pub faults: Faults,
    pub rng: SmallRng,
    pub cut: BTreeSet<(usize, usize)>,
    pub notices: Vec<(usize, Notice)>,
    pub done: BTreeMap<(AssociationId, Token), Result<HostDone, HostError>>,
    pub accepted: BTreeMap<AssociationId, Result<(), HostRefusal>>,
    pub ended: BTreeSet<AssociationId>,
    pub controls: BTreeMap<Token, Result<ControlDone, ControlError>>,
    pub fenced: Vec<(usize, Epoch, u64)>,
    pub sent: Vec<(usize, usize, Message)>,
    /// Messages for which this says no are lost.
    pub filter: Filter,
    pub customize: fn(&mut Options),
    /// Of the protocol, on links that come up from now on.
    pub version: u16,
    /// How long the API server takes for a swap, beyond the network's time.
    pub swap_ms: u64,
    events: BTreeMap<(u64, u64), Event>,
    seq: u64,
    ids: u64,
}

pub fn instance(n: u64) -> InstanceId {
    let mut bytes = [0xee; 16];
    bytes[8..].copy_from_slice(&n.to_be_bytes());
    InstanceId::from_bytes(bytes)
}

pub fn host(n: u8) -> HostIdentity {
    HostIdentity { nqn: format!("nqn.host{n}"), id: [n; 16] }
}

/// A block whose every byte depends on the stamp.
pub fn block(stamp: u64) -> Bytes {
    let mut bytes = vec![stamp as u8; BLOCK_BYTES];
    bytes[..8].copy_from_slice(&stamp.to_le_bytes());
    Bytes::from(bytes)
}

pub fn stamp(data: &[Bytes]) -> u64 {
    let first = data.first().expect("a block");
    u64::from_le_bytes(first[..8].try_into().expect("eight bytes"))
}

pub fn at(block: u64) -> BlockRange {
    BlockRange { start: block, count: 1 }
}

impl Cluster {
    /// Nodes with a replica each, linked, and the first configuration with node 0 as primary.
    pub fn new(nodes: usize, seed: u64) -> Self {
        Self::with(nodes, seed, |_| {})
    }

    pub fn with(nodes: usize, seed: u64, customize: fn(&mut Options)) -> Self {
        let machines = (0..nodes).map(|i| {
            let mut store = MemStore::default();
            let replica = ReplicaId::from_bytes([i as u8 + 1; 16]);
            store.make(VOLUME, replica, SIZE_BLOCKS);
            Machine {
                name: NodeName::new(&format!("node-{i}")),
                replica,
                instance: instance(0),
                node: None,
                store,
                ana: Ana::Inaccessible,
                paused_until: 0,
                flush_planned: false,
                disk_stopped: false,
            }
        });
        let attachments =
            (0..4).map(|n| Attachment { host_nqn: host(n).nqn, read_only: false }).collect();
        let object = VolumeView {
            attachments,
            size_blocks: SIZE_BLOCKS,
            generation: 1,
            ..VolumeView::default()
        };
        let mut cluster = Self {
            now: 10_000 * MS,
            machines: machines.collect(),
            object,
            api_up: true,
            faults: KIND,
            rng: SmallRng::seed_from_u64(seed),
            cut: BTreeSet::new(),
            notices: Vec::new(),
            done: BTreeMap::new(),
            accepted: BTreeMap::new(),
            ended: BTreeSet::new(),
            controls: BTreeMap::new(),
            fenced: Vec::new(),
            sent: Vec::new(),
            filter: Box::new(|_, _, _| true),
            customize,
            version: VERSION,
            swap_ms: 0,
            events: BTreeMap::new(),
            seq: 0,
            ids: 0,
        };
        for i in 0..nodes {
            cluster.start(i);
        }
        cluster
    }

    /// Three nodes that serve the volume, node 0 leading.
    pub fn serving(seed: u64) -> Self {
        let mut cluster = Self::new(3, seed);
        cluster.create(0);
        cluster.run_until_served();
        cluster
    }

    /// The operator's first configuration (T9).
    pub fn create(&mut self, leader: usize) {
        let members = self.machines.iter().take(MEMBERS_MAX);
        let members = members.map(|m| Member { node: m.name.clone(), replica: m.replica });
        let lead = &self.machines[leader];
        self.object.config = Some(Config {
            epoch: Epoch(1),
            state: ConfigState::Recovering,
            primary: Primary { node: lead.name.clone(), instance: lead.instance },
            members: members.collect(),
            previous_members: None,
            learners: Vec::new(),
            single_copy: None,
            restored: None,
        });
        self.publish();
    }

    pub fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    fn plan(&mut self, after_us: u64, event: Event) {
        self.seq += 1;
        self.events.insert((self.now + after_us * 1000, self.seq), event);
    }

    fn delay(&mut self) -> u64 {
        let most = self.faults.delay_us.max(1);
        50 + self.rng.random_range(0..most)
    }

    /// Every node's watch sees the object as it is now, some time later.
    pub fn publish(&mut self) {
        let view = VolumeView { consistent: false, ..self.object.clone() };
        for i in 0..self.machines.len() {
            let delay = self.delay() * 2;
            if self.api_up {
                self.plan(delay, Event::View(i, Box::new(view.clone())));
            }
        }
    }

    /// Starts an engine: replayed, locked, linked to all that run.
    pub fn start(&mut self, i: usize) {
        let fresh = instance(self.id());
        let locked_at = Instant(self.now);
        let machine = &mut self.machines[i];
        assert!(machine.node.is_none(), "not running");
        machine.instance = fresh;
        machine.ana = Ana::Inaccessible;
        let identity =
            Identity { node: machine.name.clone(), instance: fresh, shard: 0, locked_at };
        let mut options = Options::new(identity);
        (self.customize)(&mut options);
        machine.node = Some(Node::new(options, locked_at, &mut machine.store));
        for other in 0..self.machines.len() {
            if other != i && self.machines[other].node.is_some() {
                self.plan(200, Event::Link(i, other));
                self.plan(200, Event::Link(other, i));
            }
        }
        if self.api_up {
            let view = VolumeView { consistent: true, ..self.object.clone() };
            self.plan(300, Event::View(i, Box::new(view)));
        }
    }

    /// `kill -9`: what is on its way to the disk still lands.
    pub fn kill(&mut self, i: usize) {
        self.stop_engine(i, usize::MAX, false);
    }

    /// Power fails on one node, after `kept` of the operations on their way to its disk.
    pub fn power_loss(&mut self, i: usize, kept: usize) {
        self.stop_engine(i, kept, true);
    }

    fn stop_engine(&mut self, i: usize, kept: usize, forget: bool) {
        let machine = &mut self.machines[i];
        machine.node = None;
        machine.ana = Ana::Inaccessible;
        machine.store.power_loss(kept, forget);
        for other in 0..self.machines.len() {
            if other != i {
                self.plan(1000, Event::Unlink(other, i));
            }
        }
    }

    pub fn stop_disk(&mut self, i: usize, stopped: bool) {
        self.machines[i].disk_stopped = stopped;
        if !stopped {
            self.plan_flush(i);
        }
    }

    fn plan_flush(&mut self, i: usize) {
        let machine = &mut self.machines[i];
        if machine.store.has_ops() && !machine.flush_planned && !machine.disk_stopped {
            machine.flush_planned = true;
            let most = self.faults.disk_us.max(1);
            let delay = 20 + self.rng.random_range(0..most);
            self.plan(delay, Event::Flush(i));
        }
    }

    /// One input, then whatever storage has to say about it.
    pub fn input(&mut self, i: usize, input: Input) {
        let now = Instant(self.now);
        let mut out = Vec::new();
        let machine = &mut self.machines[i];
        let Some(node) = &mut machine.node else { return };
        node.step(input, now, &mut machine.store, &mut out);
        while let Some(event) = machine.store.events.pop_front() {
            node.step(Input::Storage(event), now, &mut machine.store, &mut out);
        }
        for output in out {
            self.output(i, output);
        }
        self.plan_flush(i);
    }

    fn output(&mut self, i: usize, output: Output) {
        match output {
            Output::Send(peer, message) => self.send(i, &peer, &message),
            Output::Swap { token, old, new, .. } => {
                let delay = self.delay() + self.swap_ms * 1000;
                let instance = self.machines[i].instance;
                let (old, new) = (Box::new(old), Box::new(new));
                self.plan(delay, Event::Swap { node: i, instance, token, old, new });
            }
            Output::ReadConsistent(_) => {
                let delay = self.delay();
                self.plan(delay, Event::Read(i));
            }
            Output::HostAccepted(id, result) => {
                self.accepted.insert(id, result);
            }
            Output::HostDone(id, token, result) => {
                assert!(!self.ended.contains(&id), "an ended association is not answered (H4)");
                let again = self.done.insert((id, token), result);
                assert!(again.is_none(), "a command is answered once");
            }
            Output::HostEnd(id) => {
                self.ended.insert(id);
            }
            Output::Ana(_, ana) => self.machines[i].ana = ana,
            Output::ControlDone(token, result) => {
                self.controls.insert(token, result);
            }
            Output::Notice(_, notice) => self.notices.push((i, notice)),
            Output::Fenced { epoch, generation, .. } => self.fenced.push((i, epoch, generation)),
            Output::Resized(..) => {}
            Output::Fatal(why) => panic!("node {i}: {why}"),
        }
    }

    fn send(&mut self, from: usize, peer: &PeerId, message: &Message) {
        let to = self.machines.iter().position(|m| m.name == peer.node).expect("a node");
        if !(self.filter)(from, to, message) {
            return;
        }
        self.sent.push((from, to, message.clone()));
        if self.sent.len() > 4096 {
            self.sent.drain(..2048);
        }
        let lost = self.rng.random_bool(self.faults.lose);
        if lost || self.cut.contains(&(from, to)) {
            return;
        }
        let instances = (self.machines[from].instance, self.machines[to].instance);
        let times = 1 + u32::from(self.rng.random_bool(self.faults.double));
        for _ in 0..times {
            let delay = self.delay();
            let message = Box::new(message.clone());
            self.plan(delay, Event::Deliver { from, to, instances, message });
        }
    }

    /// Runs until `until`, events and deadlines in the order of time.
    pub fn run_to(&mut self, until: u64) {
        loop {
            let event = self.events.keys().next().map(|(at, _)| *at);
            let tick = (0..self.machines.len()).filter_map(|i| self.deadline(i)).min();
            match (event, tick) {
                (Some(at), tick) if at <= until && tick.is_none_or(|(tick, _)| at <= tick) => {
                    self.now = self.now.max(at);
                    let (_, event) = self.events.pop_first().expect("looked at above");
                    self.happen(event);
                }
                (_, Some((tick, i))) if tick <= until => {
                    self.now = self.now.max(tick);
                    self.input(i, Input::Tick);
                }
                _ => break,
            }
        }
        self.now = until;
    }

    fn deadline(&self, i: usize) -> Option<(u64, usize)> {
        let machine = &self.machines[i];
        let at = machine.node.as_ref()?.next_deadline()?.0;
        Some((at.max(machine.paused_until), i))
    }

    pub fn run_ms(&mut self, ms: u64) {
        self.run_to(self.now + ms * MS);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver { from, to, instances, message } => {
                let paused = self.machines[to].paused_until;
                if paused > self.now {
                    let us = (paused - self.now) / 1000 + 1;
                    self.plan(us, Event::Deliver { from, to, instances, message });
                    return;
                }
                let same = self.machines[to].instance == instances.1
                    && self.machines[from].instance == instances.0;
                if same && !self.cut.contains(&(from, to)) {
                    let peer = self.peer(from);
                    self.input(to, Input::Message(peer, *message));
                }
            }
            Event::Flush(i) => {
                self.machines[i].flush_planned = false;
                if !self.machines[i].disk_stopped {
                    self.machines[i].store.flush();
                    self.settle(i);
                }
            }
            Event::View(i, view) => {
                if !self.cut.contains(&(i, i)) {
                    self.input(i, Input::Observe(VOLUME, *view)); // else its agent is cut off too
                }
            }
            Event::Swap { node, instance, token, old, new } => {
                self.at_api(node, instance, token, &old, *new);
            }
            Event::Swapped { node, instance, token, outcome } => {
                if self.machines[node].instance == instance {
                    self.input(node, Input::Swapped(token, *outcome));
                }
            }
            Event::Read(i) => {
                if self.api_up && !self.cut.contains(&(i, i)) {
                    let view = VolumeView { consistent: true, ..self.object.clone() };
                    let delay = self.delay();
                    self.plan(delay, Event::View(i, Box::new(view)));
                }
            }
            Event::Link(from, to) => {
                let running = |i: usize| self.machines[i].node.is_some();
                if self.cut.contains(&(from, to)) || self.cut.contains(&(to, from)) {
                    if running(from) && running(to) {
                        self.plan(5000, Event::Link(from, to)); // dialled until it answers
                    }
                } else if self.machines[to].node.is_some() {
                    let (peer, instance) = (self.peer(to), self.machines[to].instance);
                    let version = self.version;
                    self.input(from, Input::PeerUp { peer, instance, shards: 1, version });
                }
            }
            Event::Unlink(from, to) => {
                if self.machines[to].node.is_none() {
                    let peer = self.peer(to);
                    self.input(from, Input::PeerDown(peer));
                }
            }
        }
    }

    fn settle(&mut self, i: usize) {
        if self.machines[i].node.is_none() {
            self.machines[i].store.events.clear();
        } else if let Some(event) = self.machines[i].store.events.pop_front() {
            self.input(i, Input::Storage(event));
        }
    }

    /// The API server: compare, check the step, swap, tell the watches (T3).
    fn at_api(
        &mut self,
        node: usize,
        instance: InstanceId,
        token: Token,
        old: &Config,
        new: Config,
    ) {
        if self.cut.contains(&(node, node)) {
            return; // its agent is cut off: nobody ever hears of it
        }
        let unknown = self.rng.random_bool(self.faults.swap_unknown);
        let arrives = self.api_up && (!unknown || self.rng.random_bool(0.5));
        let swapped = arrives && self.object.config.as_ref() == Some(old);
        if swapped {
            let step = Config::check_step(Some(old), Some(&new));
            assert_eq!(step, Ok(()), "a legal step from {old:?} to {new:?}");
            self.object.config = Some(new);
            self.publish();
        }
        let view = VolumeView { consistent: true, ..self.object.clone() };
        let outcome = match (unknown || !self.api_up, swapped) {
            (true, _) => SwapOutcome::Unknown,
            (false, true) => SwapOutcome::Swapped(view),
            (false, false) => SwapOutcome::Lost(view),
        };
        let delay = self.delay();
        let outcome = Box::new(outcome);
        self.plan(delay, Event::Swapped { node, instance, token, outcome });
    }

    pub fn peer(&self, i: usize) -> PeerId {
        PeerId { node: self.machines[i].name.clone(), shard: 0 }
    }

    pub fn status(&self, i: usize) -> Option<ReplicaStatus> {
        self.machines[i].node.as_ref().and_then(|node| node.status(VOLUME))
    }

    /// The nodes that would answer a read now.
    pub fn serving_nodes(&self) -> Vec<usize> {
        let serves = |i: &usize| self.status(*i).is_some_and(|status| status.serving);
        (0..self.machines.len()).filter(serves).collect()
    }

    /// Runs until one node serves; which. Panics after ten seconds.
    pub fn run_until_served(&mut self) -> usize {
        for _ in 0..10_000 {
            self.run_ms(1);
            if let [i] = self.serving_nodes()[..] {
                return i;
            }
        }
        panic!("nobody serves after 10 s: {:?} {:?}", self.object.config, self.notices);
    }

    pub fn connect(&mut self, i: usize, who: HostIdentity) -> AssociationId {
        let id = AssociationId(self.id());
        self.input(i, Input::HostConnect(VOLUME, id, who));
        id
    }

    pub fn command(&mut self, i: usize, id: AssociationId, command: HostCommand) -> Token {
        let token = Token(self.id());
        self.input(i, Input::HostCommand(id, token, command));
        token
    }

    pub fn control(&mut self, i: usize, control: Control) -> Token {
        let token = Token(self.id());
        self.input(i, Input::Control(token, control));
        token
    }

    /// A write that has to be acknowledged within a second.
    pub fn write(&mut self, i: usize, id: AssociationId, block_at: u64, stamp: u64) {
        let token = self.command(i, id, HostCommand::Write(at(block_at), block(stamp)));
        self.run_ms(1000);
        assert_eq!(self.done.get(&(id, token)), Some(&Ok(HostDone::Ok)), "write {stamp}");
    }

    /// A read that has to be answered within a second.
    pub fn read(&mut self, i: usize, id: AssociationId, block_at: u64) -> u64 {
        let token = self.command(i, id, HostCommand::Read(at(block_at)));
        self.run_ms(1000);
        match self.done.get(&(id, token)) {
            Some(Ok(HostDone::Data(data))) => stamp(data),
            other => panic!("read of {block_at}: {other:?}"),
        }
    }

    /// All replicas have the same log and the same blocks, byte for byte.
    pub fn assert_converged(&self) {
        let (first, rest) = self.machines.split_first().expect("nodes");
        for machine in rest {
            let same = machine.store.log(VOLUME) == first.store.log(VOLUME)
                && machine.store.blocks(VOLUME) == first.store.blocks(VOLUME);
            let statuses: Vec<_> = (0..self.machines.len()).map(|i| self.status(i)).collect();
            assert!(same, "{} differs: {statuses:#?}", machine.name);
        }
    }
}

/// A duration in milliseconds.
pub fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}
