//! The NVMe/TCP target of one reactor as a state machine: connections, associations, subsystems.
//!
//! The executor feeds bytes and results and carries out [`Effect`]s; [`Target::take_output`] gives
//! what has to be sent. What a volume does with a command is replication's; which hosts may
//! connect is asked for each association ([`Effect::HostConnect`]). Every volume has its subsystem
//! (docs/architecture.md, Names); the discovery subsystem is there on every port.
//!
//! Nothing here panics on bytes from outside: a malformed PDU ends its connection, and with it its
//! association, and nothing else.

mod admin;
mod api;
mod authenticate;
mod connect;
mod connection;
mod controller;
mod copy;
mod features;
mod io;
mod limits;
mod pairs;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use tercet_proto::{Instant, Token, VolumeId};

pub use api::{
    Ana, AssociationId, CloseReason, CntlidRange, Command, CommandError, ConnectionId, Done,
    Effect, HostIdentity, Refusal,
};
pub use authenticate::Keys;
pub use connection::{DATA_PDU_BYTES_MAX, OUTPUT_BYTES_MAX, TRANSFER_BUDGET_BYTES};
pub use limits::{HOST_TRANSFER_BYTES_MAX, TARGET_TRANSFER_BYTES_MAX, Usage};

use crate::log::DiscoveryRecord;
use crate::status::Status;
use authenticate::Authentication;
use connection::{Connection, Request};
use controller::{Admission, Controller, Event, Kind};

/// Entries of an admin queue.
pub const ADMIN_QUEUE_ENTRIES_MAX: u16 = 128;
/// Connections of one target.
pub const CONNECTIONS_MAX: usize = 1024;
/// Connections without a queue: beyond them the one that has been without longest gives way.
pub const HANDSHAKES_MAX: usize = 256;
/// Queues of one host, by its NQN, admin queues included.
pub const HOST_QUEUES_MAX: usize = 512;
/// Records of the discovery log.
pub const DISCOVERY_RECORDS_MAX: usize = 3072;
/// A connection that has no queue after this long is closed.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// The subsystem of a volume at this member.
#[derive(Debug)]
struct Subsystem {
    blocks: u64,
    ana: Ana,
    /// Change count of the ANA log.
    ana_changes: u64,
    /// Secrets of hosts, by NQN.
    keys: BTreeMap<String, Keys>,
    cntlids: CntlidRange,
    next_cntlid: u16,
}

/// What a connection is a queue of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Nothing yet; closed at this time.
    New(Instant),
    /// Connect waits for the executor to say where the volume is; closed at this time.
    Waiting(Instant),
    /// Queue of an association; 0 is the admin queue.
    Queue(AssociationId, u16),
}

#[derive(Debug)]
struct Peer {
    connection: Connection,
    role: Role,
    /// Connect while the executor is asked where the volume is.
    connect: Option<Request>,
    told_send: bool,
    /// How the queue is authenticated, if it has to be.
    authentication: Option<Box<Authentication>>,
    /// Commands that are more than one of the executor's, or answered differently.
    work: BTreeMap<u16, io::Work>,
}

/// A connection on its way from one target to another, with its Connect.
#[derive(Debug)]
pub struct Detached(Box<Peer>);

/// A connection was refused: there are [`CONNECTIONS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{CONNECTIONS_MAX} NVMe/TCP connections are open: close some or add reactors")]
pub struct TooManyConnections;

/// See the module.
#[derive(Debug, Default)]
pub struct Target {
    subsystems: BTreeMap<VolumeId, Subsystem>,
    peers: BTreeMap<ConnectionId, Box<Peer>>,
    controllers: BTreeMap<AssociationId, Controller>,
    next_association: u64,
    discovery: Vec<DiscoveryEntry>,
    discovery_generation: u64,
    discovery_cntlid: u16,
    deadline: Option<Instant>,
    /// Queues came or went: what each may have under way has to be shared out again.
    is_unshared: bool,
}

/// A discovery record and who may see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryEntry {
    /// Where a volume is to be had.
    pub record: DiscoveryRecord,
    /// NQNs of the hosts that may connect.
    pub hosts: BTreeSet<String>,
}

impl Target {
    /// A target whose associations are numbered from `first_association`: the numbers of the
    /// targets of one engine must not meet (rule H3's associations are unique per instance).
    pub fn new(first_association: u64) -> Self {
        Self { next_association: first_association, ..Self::default() }
    }

    /// Exports a volume. Panics when it is exported already.
    pub fn add_volume(&mut self, volume: VolumeId, blocks: u64, ana: Ana, cntlids: CntlidRange) {
        assert!(cntlids.first >= 1 && cntlids.first <= cntlids.last);
        assert!(cntlids.last <= crate::fabrics::CNTLID_MAX);
        let next_cntlid = cntlids.first;
        let keys = BTreeMap::new();
        let subsystem = Subsystem { blocks, ana, ana_changes: 0, keys, cntlids, next_cntlid };
        assert!(self.subsystems.insert(volume, subsystem).is_none(), "{volume:?} is exported");
    }

    /// Whether the volume is exported.
    pub fn has_volume(&self, volume: VolumeId) -> bool {
        self.subsystems.contains_key(&volume)
    }

    /// Takes a volume away; its associations end.
    pub fn remove_volume(&mut self, volume: VolumeId, effects: &mut Vec<Effect>) {
        self.subsystems.remove(&volume);
        for association in self.associations(Kind::Volume(volume)) {
            self.end_association(association, CloseReason::Ended, effects);
        }
    }

    /// What the discovery subsystem tells. A change is told to the discovery hosts whose log it is
    /// in.
    pub fn set_discovery(&mut self, mut entries: Vec<DiscoveryEntry>, effects: &mut Vec<Effect>) {
        entries.truncate(DISCOVERY_RECORDS_MAX);
        if entries == self.discovery {
            return;
        }
        let before = std::mem::replace(&mut self.discovery, entries);
        self.discovery_generation += 1;
        for association in self.associations(Kind::Discovery) {
            let controller = self.controllers.get_mut(&association).expect("listed");
            let host = controller.host.nqn.as_str();
            if !records_for(host, &before).eq(records_for(host, &self.discovery)) {
                controller.raise(Event::Discovery);
                self.tell_events(association, effects);
            }
        }
    }

    /// This member's path to a volume is in that state now (rule H1).
    pub fn set_ana(&mut self, volume: VolumeId, ana: Ana, effects: &mut Vec<Effect>) {
        let Some(subsystem) = self.subsystems.get_mut(&volume) else {
            return;
        };
        if subsystem.ana == ana {
            return;
        }
        subsystem.ana = ana;
        subsystem.ana_changes += 1;
        self.raise(Kind::Volume(volume), Event::Ana, effects);
    }

    /// The volume has this size now.
    pub fn set_size(&mut self, volume: VolumeId, blocks: u64, effects: &mut Vec<Effect>) {
        let Some(subsystem) = self.subsystems.get_mut(&volume) else {
            return;
        };
        if subsystem.blocks == blocks {
            return;
        }
        subsystem.blocks = blocks;
        for association in self.associations(Kind::Volume(volume)) {
            self.controllers.get_mut(&association).expect("listed").namespace_changed = true;
        }
        self.raise(Kind::Volume(volume), Event::Namespace, effects);
    }

    fn associations(&self, kind: Kind) -> Vec<AssociationId> {
        let of_kind = self.controllers.values().filter(|controller| controller.kind == kind);
        of_kind.map(|controller| controller.association).collect()
    }

    fn raise(&mut self, kind: Kind, event: Event, effects: &mut Vec<Effect>) {
        for association in self.associations(kind) {
            let controller = self.controllers.get_mut(&association).expect("listed");
            controller.raise(event);
            self.tell_events(association, effects);
        }
    }

    /// Completes Asynchronous Event Requests for what is pending.
    fn tell_events(&mut self, association: AssociationId, effects: &mut Vec<Effect>) {
        let Some(controller) = self.controllers.get_mut(&association) else {
            return;
        };
        let admin = controller.admin;
        let Some(peer) = self.peers.get_mut(&admin) else {
            return;
        };
        while let Some((request, event)) = controller.next_event() {
            peer.connection.respond(request, Status::SUCCESS, event.result());
        }
        tell_send(admin, peer, effects);
    }

    /// A connection was accepted.
    pub fn open(
        &mut self,
        id: ConnectionId,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> Result<(), TooManyConnections> {
        self.give_way(effects);
        if self.peers.len() >= CONNECTIONS_MAX {
            return Err(TooManyConnections);
        }
        let until = now + HANDSHAKE_TIMEOUT;
        self.wake_at(until);
        let peer = Peer {
            connection: Connection::new(),
            role: Role::New(until),
            connect: None,
            told_send: false,
            authentication: None,
            work: BTreeMap::new(),
        };
        assert!(self.peers.insert(id, Box::new(peer)).is_none(), "{id:?} is open");
        Ok(())
    }

    /// Whether the executor should read from this connection now.
    pub fn wants_input(&self, id: ConnectionId) -> bool {
        self.peers.get(&id).is_some_and(|peer| {
            peer.connection.wants_input() && !matches!(peer.role, Role::Waiting(_))
        })
    }

    /// Bytes that a payload under way on this connection lacks: how large a buffer to read into.
    pub fn missing_bytes(&self, id: ConnectionId) -> usize {
        self.peers.get(&id).map_or(0, |peer| peer.connection.missing_bytes())
    }

    /// Bytes arrived. Also for a connection that is gone: then they are dropped.
    pub fn input(
        &mut self,
        id: ConnectionId,
        bytes: Bytes,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let Some(mut peer) = self.peers.remove(&id) else {
            return;
        };
        let end = peer.connection.input(bytes);
        // Requests before the malformed PDU are void as well: the association ends (TCP 3.5).
        if let Err(reason) = end {
            self.drop_peer(id, peer, reason, effects);
            return;
        }
        self.run_requests(id, peer, now, effects);
    }

    fn run_requests(
        &mut self,
        id: ConnectionId,
        mut peer: Box<Peer>,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        while !self.is_asking(&peer)
            && let Some(request) = peer.connection.requests.pop_front()
        {
            if let Some(goes_on) = self.authenticate(id, &mut peer, &request, effects) {
                if goes_on {
                    continue;
                }
                return self.drop_peer(id, peer, CloseReason::Authentication, effects);
            }
            let goes_on = match peer.role {
                Role::New(_) | Role::Waiting(_) => {
                    self.first_request(id, &mut peer, request, now, effects)
                }
                Role::Queue(association, 0) => {
                    self.admin_request(association, &mut peer, &request, now, effects)
                }
                Role::Queue(association, _) => {
                    self.io_request(association, &mut peer, request, now, effects)
                }
            };
            if !goes_on {
                self.drop_peer(id, peer, CloseReason::Disconnected, effects);
                return;
            }
        }
        if let Role::Queue(association, queue) = peer.role
            && let Some(controller) = self.controllers.get_mut(&association)
        {
            controller.log_failures(queue, peer.connection.failures.drain(..));
        }
        let association = match peer.role {
            Role::Queue(association, 0) => Some(association),
            _ => None,
        };
        tell_send(id, &mut peer, effects);
        self.peers.insert(id, peer);
        self.share_budgets();
        if let Some(association) = association {
            self.tell_events(association, effects);
        }
    }

    /// Whether a queue's commands wait for the executor's word on its host.
    fn is_asking(&self, peer: &Peer) -> bool {
        let Role::Queue(association, _) = peer.role else { return false };
        let controller = self.controllers.get(&association);
        controller.is_some_and(|controller| controller.admission == Admission::Asking)
    }

    /// Takes what has to be sent on a connection; commands that waited for room go on.
    pub fn take_output(
        &mut self,
        id: ConnectionId,
        now: Instant,
        out: &mut Vec<Bytes>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(mut peer) = self.peers.remove(&id) else {
            return;
        };
        peer.connection.outbox.take(out);
        peer.told_send = false;
        peer.connection.start_waiting();
        self.run_requests(id, peer, now, effects);
    }

    /// The socket is closed or broken.
    pub fn closed(&mut self, id: ConnectionId, effects: &mut Vec<Effect>) {
        if let Some(peer) = self.peers.remove(&id) {
            self.leave(id, &peer, effects);
        }
    }

    /// The connection ends: its last bytes go out, its association with it.
    fn drop_peer(
        &mut self,
        id: ConnectionId,
        mut peer: Box<Peer>,
        reason: CloseReason,
        effects: &mut Vec<Effect>,
    ) {
        let mut last = Vec::new();
        while !peer.connection.outbox.is_empty() {
            peer.connection.outbox.take(&mut last);
        }
        effects.push(Effect::Close(id, last, reason));
        self.leave(id, &peer, effects);
    }

    /// The loss of the admin queue's connection ends the association (Base 3.3.2.4), that of an
    /// I/O queue's ends its I/O: what ran there must not meet what the host does next (rule H3).
    /// The admin queue stays, because Linux closes its I/O connections before it shuts the
    /// controller down through the admin queue. An I/O queue that the host has disconnected has
    /// left the association before.
    fn leave(&mut self, id: ConnectionId, peer: &Peer, effects: &mut Vec<Effect>) {
        let Role::Queue(association, queue) = peer.role else {
            return;
        };
        let reason = CloseReason::Association;
        if queue == 0 {
            return self.end_association(association, reason, effects);
        }
        let Some(controller) = self.controllers.get(&association) else {
            return;
        };
        self.is_unshared = true;
        if controller.queues.get(&queue) == Some(&id) {
            let mut controller = self.controllers.remove(&association).expect("looked up");
            self.close_queues(&mut controller, reason, effects);
            self.controllers.insert(association, controller);
        }
    }

    /// Ends an association on the executor's word (rules H3, H4): nothing is answered any more.
    pub fn end(&mut self, association: AssociationId, effects: &mut Vec<Effect>) {
        self.end_association(association, CloseReason::Ended, effects);
    }

    fn end_association(
        &mut self,
        association: AssociationId,
        reason: CloseReason,
        effects: &mut Vec<Effect>,
    ) {
        let Some(mut controller) = self.controllers.remove(&association) else {
            return;
        };
        self.is_unshared = true;
        self.close_queues(&mut controller, reason, effects);
        if self.peers.remove(&controller.admin).is_some() {
            effects.push(Effect::Close(controller.admin, Vec::new(), reason));
        }
    }

    /// Closes the I/O queues of an association that is over, and says so once.
    fn close_queues(
        &mut self,
        controller: &mut Controller,
        reason: CloseReason,
        effects: &mut Vec<Effect>,
    ) {
        for id in std::mem::take(&mut controller.queues).into_values() {
            if self.peers.remove(&id).is_some() {
                effects.push(Effect::Close(id, Vec::new(), reason));
            }
        }
        let is_told = matches!(controller.kind, Kind::Volume(_)) && reason != CloseReason::Ended;
        if is_told && !std::mem::replace(&mut controller.is_over, true) {
            effects.push(Effect::HostGone(controller.association));
        }
    }

    /// The executor has a command's result. Of a command whose connection is gone: dropped.
    pub fn done(
        &mut self,
        association: AssociationId,
        token: Token,
        result: Result<Done, CommandError>,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let Some(controller) = self.controllers.get_mut(&association) else {
            return;
        };
        let (queue, command, generation) = io::split_token(token);
        let Some(&id) = controller.queues.get(&queue) else {
            return;
        };
        let Some(mut peer) = self.peers.remove(&id) else {
            return;
        };
        if peer.connection.generation(command) == Some(generation) {
            io::finish_command(association, &mut peer, token, result, effects);
        }
        self.run_requests(id, peer, now, effects);
    }

    fn wake_at(&mut self, at: Instant) {
        self.deadline = Some(self.deadline.map_or(at, |deadline| deadline.min(at)));
    }

    /// When [`Target::tick`] has to be called at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Time has come: ends handshakes that take too long and associations whose Keep Alive timer
    /// has expired (Base 3.9).
    pub fn tick(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        let mut late = Vec::new();
        let mut next: Option<Instant> = None;
        let mut see = |at: Instant| next = Some(next.map_or(at, |next| next.min(at)));
        for (&id, peer) in &self.peers {
            match peer.role {
                Role::New(until) | Role::Waiting(until) if until <= now => late.push(id),
                Role::New(until) | Role::Waiting(until) => see(until),
                Role::Queue(..) => {
                    let deadline = peer.authentication.as_ref().and_then(|it| it.deadline());
                    match deadline {
                        Some(until) if until <= now => late.push(id),
                        Some(until) => see(until),
                        None => {}
                    }
                }
            }
        }
        let mut expired = Vec::new();
        for controller in self.controllers.values() {
            match controller.expiry() {
                Some(at) if at <= now => expired.push(controller.association),
                Some(at) => see(at),
                None => {}
            }
        }
        self.deadline = next;
        for id in late {
            let peer = self.peers.remove(&id).expect("listed");
            self.drop_peer(id, peer, CloseReason::Handshake, effects);
        }
        for association in expired {
            self.end_association(association, CloseReason::KeepAlive, effects);
        }
    }
}

/// The records that a host may see.
fn records_for<'a>(
    host_nqn: &'a str,
    entries: &'a [DiscoveryEntry],
) -> impl Iterator<Item = &'a DiscoveryRecord> {
    entries.iter().filter(move |entry| entry.hosts.contains(host_nqn)).map(|entry| &entry.record)
}

/// Tells once that a connection has output, until it is taken.
fn tell_send(id: ConnectionId, peer: &mut Peer, effects: &mut Vec<Effect>) {
    if !peer.told_send && !peer.connection.outbox.is_empty() {
        peer.told_send = true;
        effects.push(Effect::Send(id));
    }
}
