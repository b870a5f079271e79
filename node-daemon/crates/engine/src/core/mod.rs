//! A reactor's core: everything that one thread owns, and the loop that drives it.
//!
//! Shards, links, hosts and devices meet here and nowhere else; each is a state machine of another
//! crate or a table of this one. The loop takes what has happened from the ring, turns it into
//! events of shards, and carries out their effects until none is left; then the ring is entered
//! once for all of it. Nothing waits in here but the ring, and start-up: a log that is replayed.

mod hosts;
mod links;
mod shards;
mod types;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::process::exit;
use std::sync::Arc;
use std::time::Duration;

use tercet_noderep::Replica;
use tercet_proto::Instant;
use tercet_reactor::{Event, Inbox, ListenerId, Reactor, now};
use tercet_store::arena::Arena;
use tracing::{error, info};

use crate::control::Directory;
use crate::outbox::{Notice, Outbox};
use crate::plan::Plan;
use crate::table::{Table, Versions};
use hosts::Hosts;
use links::Links;
use shards::Slot;
pub use types::{HostKeys, NewShard, ReactorStatus, ReplicaReport, ShardReport, ToReactor};

/// Messages that wait for a reactor.
pub const MESSAGES_MAX: usize = 4096;
/// Pause before a port that cannot be listened on is tried again.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    NvmeTcp,
    Replication,
}

/// See the module's text.
pub struct Core {
    number: usize,
    reactor: Reactor,
    inbox: Inbox<ToReactor>,
    directory: Arc<Directory>,
    outbox: Arc<Outbox>,
    arena: Arena,
    /// This reactor's replica; see `look`.
    table: Replica<Table>,
    /// What of the table has been acted upon.
    seen: Versions,
    slots: Vec<Slot>,
    /// Events of shards that have not been stepped yet.
    work: VecDeque<(usize, tercet_shard::Event)>,
    effects: Vec<tercet_shard::Effect>,
    asked: shards::Asked,
    early: shards::Early,
    links: Links,
    hosts: Hosts,
    listeners: HashMap<ListenerId, Service>,
    listen_at: Option<Instant>,
}

impl Core {
    /// Reactor `number` of an engine.
    pub fn new(
        number: usize,
        reactor: Reactor,
        inbox: Inbox<ToReactor>,
        directory: Arc<Directory>,
        outbox: Arc<Outbox>,
        arena: Arena,
    ) -> Self {
        let (hosts, table) = (Hosts::new(number), directory.table_for(number));
        Self {
            number,
            reactor,
            inbox,
            directory,
            outbox,
            arena,
            table,
            seen: Versions::default(),
            slots: Vec::new(),
            work: VecDeque::new(),
            effects: Vec::new(),
            asked: shards::Asked::default(),
            early: shards::Early::default(),
            links: Links::default(),
            hosts,
            listeners: HashMap::new(),
            listen_at: None,
        }
    }

    /// Runs until the process ends.
    pub fn run(mut self) -> ! {
        let mut events = Vec::new();
        loop {
            if let Err(failure) = self.reactor.poll(self.next_deadline(), &mut events) {
                error!(reactor = self.number, error = %failure, "the ring cannot be entered");
                exit(1);
            }
            self.look();
            for event in events.drain(..) {
                self.happened(event);
                self.settle();
            }
            self.tick();
            self.settle();
        }
    }

    /// Looks at the node's table: after events or a message have come, before any is acted upon.
    /// Whatever was written before what caused them is seen from here on (`table`).
    fn look(&mut self) {
        let now = self.table.latest().versions();
        let seen = std::mem::replace(&mut self.seen, now);
        if seen.plan != now.plan {
            self.plan_links();
        }
        // Hosts of the discovery subsystem stay where connections come in.
        if self.number == 0 && seen.discovery != now.discovery {
            self.hosts.set_discovery(self.table.held().discovery(&self.directory.node));
        }
    }

    /// What to be, as of the last look.
    fn plan(&self) -> Option<&Arc<Plan>> {
        self.table.held().plan()
    }

    fn next_deadline(&self) -> Option<Instant> {
        let shards = self.slots.iter().filter_map(Slot::next_deadline);
        let others = [self.links.next_deadline(), self.hosts.next_deadline(), self.listen_at];
        shards.chain(others.into_iter().flatten()).min()
    }

    fn tick(&mut self) {
        let now = now();
        for slot in 0..self.slots.len() {
            if self.slots[slot].next_deadline().is_some_and(|at| at <= now) {
                self.work.push_back((slot, tercet_shard::Event::Tick));
            }
        }
        self.tick_links(now);
        self.tick_hosts(now);
        if self.listen_at.is_some_and(|at| at <= now) {
            self.listen();
        }
    }

    fn happened(&mut self, event: Event) {
        match event {
            Event::Disk { disk, done } => self.disk_done(disk, done),
            Event::Accepted { listener, socket } => match self.listeners[&listener] {
                Service::NvmeTcp => self.host_accepted(socket),
                Service::Replication => self.link_accepted(socket),
            },
            Event::Connected { stream } => self.link_connected(stream),
            Event::Received { stream, bytes } => {
                if self.links.has(stream) {
                    self.link_received(stream, bytes);
                } else {
                    self.host_received(stream, bytes);
                }
            }
            Event::Closed { stream, reason } => {
                if self.links.has(stream) {
                    let why = reason.map_or("the other side closed it".into(), |e| e.to_string());
                    self.link_lost(stream, &why);
                } else {
                    self.host_closed(stream);
                }
            }
            Event::Drained { stream } => self.host_drained(stream),
            Event::Detached { stream, socket } => {
                if !self.link_detached(stream, &socket) {
                    self.host_detached(stream, socket);
                }
            }
            Event::Woken => {
                while let Some(message) = self.inbox.take() {
                    self.look();
                    self.told(message);
                    self.settle();
                }
            }
        }
    }

    fn told(&mut self, message: ToReactor) {
        match message {
            ToReactor::Look => {}
            ToReactor::Exited(node, instances) => self.exited(&node, &instances),
            ToReactor::Shard(new) => {
                self.open_shard(*new);
                self.plan_links();
                if self.number == 0 && self.listeners.is_empty() {
                    self.listen();
                }
            }
            ToReactor::Input(shard, input) => self.input(shard, *input),
            ToReactor::Control(shard, control, answer) => self.control(shard, control, answer),
            ToReactor::Status(answer) => {
                // Whoever asked may have given up.
                let _ = answer.send(self.status());
            }
            ToReactor::Keys(volume, keys) => self.hosts.set_keys(volume, keys),
            ToReactor::Computed(id, computed) => self.host_computed(id, *computed),
            ToReactor::Link(moved) => self.link_moved(*moved),
            ToReactor::Host(moved) => self.host_moved(*moved),
        }
    }

    /// Listens on every port, or tries again later. The first reactor does so for all.
    fn listen(&mut self) {
        self.listen_at = None;
        let Some(plan) = self.plan().cloned() else {
            return;
        };
        let ports = [
            (plan.ports.nvme_tcp, Service::NvmeTcp),
            (plan.ports.discovery, Service::NvmeTcp),
            (plan.ports.replication, Service::Replication),
        ];
        for (port, service) in ports.into_iter().skip(self.listeners.len()) {
            let address = SocketAddr::new(plan.address, port);
            match self.reactor.listen(address) {
                Ok(listener) => {
                    info!(%address, ?service, "listening");
                    self.listeners.insert(listener, service);
                }
                Err(failure) => {
                    let message = format!("cannot listen on {address}: {failure}");
                    error!(%address, error = %failure, "cannot listen: trying again");
                    let (volume, reason) = (None, "ListenFailed");
                    self.outbox.notice(Notice { volume, reason, message, warning: true });
                    self.listen_at = Some(now() + LISTEN_PAUSE);
                    return;
                }
            }
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let others = self.hosts.counters().into_iter().chain(self.links.counters());
        let scrubs = self.slots.iter().map(|slot| slot.report().scrub);
        let scrubs = scrubs.flat_map(|scrub| {
            [
                ("scrub_blocks_total", scrub.checked_blocks),
                ("scrub_passes_total", scrub.passes),
                ("bad_blocks_total", scrub.bad_blocks),
                ("repaired_blocks_total", scrub.repaired_blocks),
            ]
        });
        others.chain(scrubs).collect()
    }

    fn status(&self) -> ReactorStatus {
        ReactorStatus {
            shards: self.slots.iter().map(Slot::report).collect(),
            replicas: self.replica_reports(),
            links: self.links.up(),
            counters: self.counters(),
        }
    }
}
