//! One node of a state: the production [`Node`], its [`Store`], and what each input makes of them.
//!
//! A state of the whole is three of these. The same one occurs in very many states, so each is kept
//! once, known by the hash of all that it is, and remembers what every input did to it: the
//! production code runs once for each pair of a node's state and an input, not for each state of the
//! whole. That is what makes the number of states reachable.
//!
//! Time is a count of leases (D of L2): a grant that is given at one count has run out at the next,
//! whose holder counts 3 % less. Nodes' clocks agree; their rates are left to the simulator.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tercet_proto::message::{Message, PairMessage, ReplicaMessage, VERSION};
use tercet_proto::{
    BlockRange, Config, EntryHeader, Epoch, InstanceId, Instant, NodeName, Place, ReplicaId, Token,
};
use tercet_replication::api::{
    AssociationId, Attachment, Control, HostCommand, HostDone, HostIdentity, Input, Output, PeerId,
    SwapOutcome, VolumeView,
};
use tercet_replication::model::Leads;
use tercet_replication::{Identity, Limits, Node, Options, Timing};

use crate::packet::{Packet, Packets, Route, hash_of};
use crate::store::{Store, writes};
use crate::{NODES, SIZE_BLOCKS, VOLUME};

/// D of rule L2, in the model's nanoseconds.
const LEASE_NS: u64 = 100;
/// When the model begins: long after the locks (L4).
const BEGIN_NS: u64 = 1_000;
/// The host that only reads.
const READER: u8 = 9;

/// Which rule is broken on purpose: none, in a build without the feature.
#[derive(Clone, Copy, Debug, Default)]
pub struct Broken {
    /// The rule.
    #[cfg(feature = "canary")]
    pub canary: Option<tercet_replication::options::Canary>,
}

/// What happens to one node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// A message arrives.
    Deliver(Packet),
    /// It is given time: whatever it waits to try again is tried again.
    Tick,
    /// What it asks its peers for (L2), without anything else.
    Ask,
    /// It stands (T2, T3).
    Stand,
    /// A host's write with that number.
    Write(u8),
    /// The oldest operation on its way to the device is durable.
    Flush,
    /// The engine ends; so many operations on their way still land.
    Crash(u8),
    /// The engine starts.
    Start,
    /// The disk is replaced.
    Wipe,
    /// A link to a peer's start.
    PeerUp(usize, u8),
    /// That earlier start of its own node has ended, proven (L5).
    ProvenExit(u8),
    /// The object's configuration, and whether it was read consistently.
    Observe(Arc<Config>, bool),
    /// The answer to a swap: done, lost, or unknown; with the object's configuration.
    Swapped(Token, Answer, Arc<Config>),
    /// A hand-over is asked for.
    HandOver,
    /// A lease's time has gone by.
    Elapse,
}

/// How a swap ended, as the agent says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It took place.
    Swapped,
    /// It did not.
    Lost,
    /// The answer was lost.
    Unknown,
}

/// What a step did.
#[derive(Debug)]
pub struct Outcome {
    /// The node after it.
    pub next: Arc<Local>,
    /// Messages that were sent.
    pub sends: Vec<Packet>,
    /// Beats among them (L2): asked for by `Step::Ask`, lost otherwise.
    pub beats: Vec<Packet>,
    /// Compare-and-swaps.
    pub swaps: Vec<(Token, Arc<Config>, Arc<Config>)>,
    /// A consistent read of the object is wanted.
    pub reads: bool,
    /// Writes that were acknowledged, with all writes that are applied then.
    pub acked: Vec<u8>,
    /// An assertion of the production code, or its alarm.
    pub broken: Option<String>,
}

impl Outcome {
    /// Nothing happened.
    pub fn is_nothing(&self, before: &Local) -> bool {
        self.next.id == before.id
            && self.sends.is_empty()
            && self.swaps.is_empty()
            && !self.reads
            && self.acked.is_empty()
            && self.broken.is_none()
    }
}

impl Outcome {
    /// Nothing happened but that messages were sent which are on their way already.
    pub fn is_idle(&self, before: &Local, net: &[Packet]) -> bool {
        self.next.id == before.id
            && self.sends.iter().all(|packet| net.binary_search(packet).is_ok())
            && self.swaps.is_empty()
            && !self.reads
            && self.acked.is_empty()
            && self.broken.is_none()
    }
}

/// What the properties ask of a node.
#[derive(Debug)]
pub struct Facts {
    /// What it leads.
    pub leads: Leads,
    /// The epoch that it has promised.
    pub promised: Epoch,
    /// What a read would give now, if one would be answered: the writes that are applied (L1).
    pub readable: Option<Vec<u8>>,
    /// The writes in its log.
    pub logged: Vec<u8>,
}

/// A node in one of its states.
pub struct Local {
    /// Hash of all that it is.
    pub id: u64,
    /// Which node.
    pub index: usize,
    /// How often its engine has started before.
    pub starts: u8,
    /// How many leases' time has gone by.
    pub time: u8,
    /// For the properties.
    pub facts: Facts,
    node: Option<Node>,
    store: Store,
    known: Mutex<HashMap<Step, Arc<Outcome>>>,
}

impl std::fmt::Debug for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "node {} start {} {:?}", self.index, self.starts, self.facts)
    }
}

/// Everything that is known of nodes and messages, shared by all states.
#[derive(Debug, Default)]
pub struct Book {
    /// Messages.
    pub packets: Packets,
    locals: Mutex<HashMap<u64, Arc<Local>>>,
    broken: Broken,
}

/// The node's name.
pub fn name(index: usize) -> NodeName {
    NodeName::new(["a", "b", "c"][index])
}

/// Its replica. Ends in zero: nobody stands aside for longer (T2).
pub fn replica(index: usize) -> ReplicaId {
    let mut bytes = [0; 16];
    bytes[0] = index as u8 + 1;
    ReplicaId::from_bytes(bytes)
}

/// The instance of its `starts`-th start.
pub fn instance(index: usize, starts: u8) -> InstanceId {
    let mut bytes = [0xee; 16];
    bytes[0] = index as u8;
    bytes[1] = starts;
    InstanceId::from_bytes(bytes)
}

fn peer(index: usize) -> PeerId {
    PeerId { node: name(index), shard: 0 }
}

fn host(n: u8) -> HostIdentity {
    HostIdentity { nqn: format!("host{n}"), id: [n; 16] }
}

fn at(time: u8) -> Instant {
    Instant(BEGIN_NS + u64::from(time) * LEASE_NS)
}

/// The beats that an answer may be for, numbered by when they were sent.
fn beats(time: u8) -> Vec<(u64, Instant)> {
    (0..=time).map(|t| (u64::from(t) + 1, at(t))).collect()
}

/// Nothing is due until `Step::Tick` lets it be, and nobody misses a primary by time (T2).
fn timing() -> Timing {
    let never = Duration::from_secs(1_000_000_000);
    let (now, soon) = (Duration::ZERO, Duration::from_nanos(1));
    Timing {
        lease: Duration::from_nanos(LEASE_NS),
        beat: Duration::from_nanos(LEASE_NS / 2),
        missing_after: never,
        serve_within: never,
        stand_step: soon,
        aside_min: now,
        aside_max: now,
        announce_after: soon,
        swap_answer: never,
        hand_over: never,
        drain: soon,
        abort_after: never,
        copy_quiet: now,
    }
}

/// The object as an agent reads it: every host may connect.
fn view(config: &Config, consistent: bool) -> VolumeView {
    let hosts = (0..=READER).map(|n| Attachment { host_nqn: host(n).nqn, read_only: false });
    VolumeView {
        config: Some(config.clone()),
        attachments: hosts.collect(),
        size_blocks: SIZE_BLOCKS,
        fence: None,
        generation: 1,
        replacement: None,
        consistent,
    }
}

impl Book {
    /// With one rule broken, where the build can.
    pub fn new(broken: Broken) -> Self {
        Self { broken, ..Self::default() }
    }

    fn options(&self, index: usize, starts: u8, locked_at: Instant) -> Options {
        let identity =
            Identity { node: name(index), instance: instance(index, starts), shard: 0, locked_at };
        let options = Options::new(identity);
        let Broken { .. } = self.broken;
        Options {
            timing: timing(),
            limits: Limits::default(),
            #[cfg(feature = "canary")]
            canary: self.broken.canary,
            ..options
        }
    }

    /// A node with an empty replica that has just started and is long past its lock (L4).
    pub fn first(&self, index: usize) -> Arc<Local> {
        let mut store = Store::new(VOLUME, replica(index));
        let node = Node::new(self.options(index, 0, Instant(0)), at(0), &mut store);
        self.keep(Parts { index, starts: 0, time: 0, node: Some(node), store })
    }

    /// How many different states of single nodes there are.
    pub fn locals(&self) -> usize {
        self.locals.lock().expect("no panic while it is held").len()
    }

    fn keep(&self, mut parts: Parts) -> Arc<Local> {
        if let Some(node) = &mut parts.node {
            node.forget_pace(at(parts.time), &beats(parts.time), at(parts.time));
        }
        let Parts { index, starts, time, node, store } = parts;
        let id = hash_of(&(index, starts, time, &node, &store));
        let mut locals = self.locals.lock().expect("no panic while it is held");
        let there = locals.entry(id).or_insert_with(|| {
            let facts = facts(node.as_ref(), &store, at(time));
            let known = Mutex::default();
            Arc::new(Local { id, index, starts, time, facts, node, store, known })
        });
        Arc::clone(there)
    }
}

fn facts(node: Option<&Node>, store: &Store, now: Instant) -> Facts {
    let status = node.and_then(|node| node.status(VOLUME));
    Facts {
        leads: node.map_or(Leads::No, |node| node.leads(VOLUME)),
        promised: status.map_or(Epoch(0), |status| status.epoch),
        readable: node.and_then(|node| read(node, store, now)),
        logged: writes(store.log(), tercet_proto::Lsn(u64::MAX)),
    }
}

/// What a read would give now: the production code's own answer, on a copy.
fn read(node: &Node, store: &Store, now: Instant) -> Option<Vec<u8>> {
    let (mut node, mut store, mut out) = (node.clone(), store.clone(), Vec::new());
    let id = AssociationId(u64::from(READER));
    let range = BlockRange { start: 0, count: 1 };
    node.step(Input::HostConnect(VOLUME, id, host(READER)), now, &mut store, &mut out);
    let command = Input::HostCommand(id, Token(0), HostCommand::Read(range));
    node.step(command, now, &mut store, &mut out);
    while let Some(event) = store.event() {
        node.step(Input::Storage(event), now, &mut store, &mut out);
    }
    out.into_iter().find_map(|output| match output {
        Output::HostDone(of, _, Ok(HostDone::Data(data))) if of == id => Some(data.concat()),
        _ => None,
    })
}

/// A node while a step is made.
struct Parts {
    index: usize,
    starts: u8,
    time: u8,
    node: Option<Node>,
    store: Store,
}

impl Local {
    /// Whether its engine runs.
    pub fn is_up(&self) -> bool {
        self.node.is_some()
    }

    /// Operations on their way to the device.
    pub fn ops(&self) -> usize {
        self.store.ops()
    }

    /// The log.
    pub fn log(&self) -> &[EntryHeader] {
        self.store.log()
    }

    /// Applied up to here.
    pub fn applied(&self) -> Place {
        self.store.applied()
    }

    /// What is applied now is what a start will find (the model's beginning).
    pub fn checkpointed(&self, book: &Book) -> Arc<Self> {
        let mut parts = self.parts();
        parts.store.checkpoint();
        book.keep(parts)
    }

    fn parts(&self) -> Parts {
        let Self { index, starts, time, .. } = *self;
        Parts { index, starts, time, node: self.node.clone(), store: self.store.clone() }
    }

    /// What a step does; the production code runs when this node has not met it before. `starts` are
    /// those of all nodes, for messages that are sent.
    pub fn step(self: &Arc<Self>, step: &Step, starts: [u8; NODES], book: &Book) -> Arc<Outcome> {
        let known = self.known.lock().expect("no panic while it is held").get(step).cloned();
        known.unwrap_or_else(|| {
            let outcome = Arc::new(self.make(step, starts, book));
            let mut known = self.known.lock().expect("no panic while it is held");
            known.insert(step.clone(), Arc::clone(&outcome));
            outcome
        })
    }

    fn make(self: &Arc<Self>, step: &Step, starts: [u8; NODES], book: &Book) -> Outcome {
        let run = || {
            let (mut parts, mut out) = (self.parts(), Vec::new());
            parts.run(step, book, &mut out);
            (parts, out)
        };
        let nothing = |broken| Outcome {
            next: Arc::clone(self),
            sends: Vec::new(),
            beats: Vec::new(),
            swaps: Vec::new(),
            reads: false,
            acked: Vec::new(),
            broken,
        };
        let (parts, out) = match catch_unwind(AssertUnwindSafe(run)) {
            Ok(done) => done,
            Err(panic) => return nothing(Some(text_of(&*panic))),
        };
        let mut outcome = nothing(None);
        let own_starts = parts.starts;
        for output in out {
            outcome.take(output, (self.index, own_starts), starts, book);
        }
        if *step != Step::Ask {
            outcome.next = book.keep(parts);
        }
        outcome
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

impl Outcome {
    fn take(&mut self, output: Output, own: (usize, u8), starts: [u8; NODES], book: &Book) {
        match output {
            Output::Send(peer, message) => {
                let to = (0..NODES).find(|i| name(*i) == peer.node).expect("a node");
                let route = Route { from: own.0, to, starts: (own.1, starts[to]) };
                match &message {
                    Message::Pair(_, PairMessage::Beat { .. }) => {
                        self.beats.push(book.packets.intern(route, message));
                    }
                    // Who misses whom decides nothing: any member stands at any moment (T2).
                    Message::Replica(
                        _,
                        ReplicaMessage::Consult | ReplicaMessage::Opinion { .. },
                    ) => {}
                    _ => self.sends.push(book.packets.intern(route, message)),
                }
            }
            Output::Swap { token, old, new, .. } => {
                self.swaps.push((token, Arc::new(old), Arc::new(new)));
            }
            Output::ReadConsistent(_) => self.reads = true,
            Output::HostDone(id, _, Ok(HostDone::Ok)) => self.acked.push(id.0 as u8),
            Output::Fatal(why) => self.broken = Some(why),
            _ => {}
        }
    }
}

impl Parts {
    fn run(&mut self, step: &Step, book: &Book, out: &mut Vec<Output>) {
        let now = at(self.time);
        match step {
            Step::Deliver(packet) => {
                let known = book.packets.get(*packet);
                let (route, message) = &*known;
                self.input(Input::Message(peer(route.from), message.clone()), out);
            }
            Step::Tick => {
                if let Some(node) = &mut self.node {
                    node.forget_pace(now, &beats(self.time), Instant(0));
                }
                self.input(Input::Tick, out);
            }
            Step::Ask => self.input(Input::Tick, out),
            Step::Stand => {
                if let Some(node) = &mut self.node {
                    node.stand(VOLUME, now, &mut self.store, out);
                }
            }
            Step::Write(n) => self.write(*n, out),
            Step::Flush => self.store.flush_one(),
            Step::Crash(kept) => {
                self.node = None;
                self.store.crash(usize::from(*kept));
            }
            Step::Start => {
                self.starts += 1;
                let options = book.options(self.index, self.starts, now);
                self.node = Some(Node::new(options, now, &mut self.store));
            }
            Step::Wipe => self.store.wipe(),
            Step::PeerUp(other, starts) => {
                let instance = instance(*other, *starts);
                let up =
                    Input::PeerUp { peer: peer(*other), instance, shards: 1, version: VERSION };
                self.input(up, out);
            }
            Step::ProvenExit(starts) => {
                let ended = instance(self.index, *starts);
                self.input(Input::ProvenExit(name(self.index), ended), out);
            }
            Step::Observe(config, consistent) => {
                self.input(Input::Observe(VOLUME, view(config, *consistent)), out);
            }
            Step::Swapped(token, answer, config) => {
                let outcome = match answer {
                    Answer::Swapped => SwapOutcome::Swapped(view(config, true)),
                    Answer::Lost => SwapOutcome::Lost(view(config, true)),
                    Answer::Unknown => SwapOutcome::Unknown,
                };
                self.input(Input::Swapped(*token, outcome), out);
            }
            Step::HandOver => {
                self.input(Input::Control(Token(77), Control::HandOver(VOLUME, None)), out);
            }
            Step::Elapse => self.time += 1,
        }
        self.hear_storage(out);
    }

    fn input(&mut self, input: Input, out: &mut Vec<Output>) {
        let now = at(self.time);
        if let Some(node) = &mut self.node {
            node.step(input, now, &mut self.store, out);
        }
    }

    fn hear_storage(&mut self, out: &mut Vec<Output>) {
        while let Some(event) = self.store.event() {
            self.input(Input::Storage(event), out);
        }
    }

    /// A host of its own for each write: H3's wait is the simulator's.
    fn write(&mut self, n: u8, out: &mut Vec<Output>) {
        let id = AssociationId(u64::from(n));
        let range = BlockRange { start: u64::from(n), count: 1 };
        self.input(Input::HostConnect(VOLUME, id, host(n)), out);
        let command = HostCommand::Zero(range, false);
        self.input(Input::HostCommand(id, Token(0), command), out);
    }
}
