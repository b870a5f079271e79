//! Hosts of a reactor: the NVMe/TCP target between sockets and shards.
//!
//! The target decides what a byte means, replication what a command does and who may connect; here
//! one's effects become the other's inputs. A connection comes in at the first reactor and is moved
//! to the reactor that has its volume when its Connect names one. Backpressure goes both ways: a
//! host that does not read its answers gets no more of them made, and one whose commands use up
//! their room is not read from.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use tercet_nvmf::auth::{Computation, Computed};
use tercet_nvmf::target::{
    self, Ana as TargetAna, CloseReason, CntlidRange, Command, CommandError, ConnectionId,
    Detached, DiscoveryEntry, Done, Effect, Refusal, Target,
};
use tercet_proto::{Config, Instant, NodeName, VolumeId};
use tercet_reactor::{StreamId, StreamLimits, now};
use tercet_replication::api::{
    Ana, AssociationId, HostCommand, HostDone, HostError, HostIdentity, HostRefusal, Input, Output,
};
use tercet_shard::Event;
use tracing::{debug, info, warn};

use super::Core;
use super::types::{HostKeys, MovedHost, ToReactor};
use crate::control::Directory;

/// What waits on a host's connection, and how long a host may not acknowledge it.
const LIMITS: StreamLimits =
    StreamLimits { send_queue_bytes_max: 16 << 20, unacknowledged_max: Duration::from_secs(10) };
/// While more than this waits on a connection, no more answers are made for it.
const SEND_ENOUGH_BYTES: usize = 1 << 20;
/// Computations that wait for one thread: half a second's worth in the largest group.
const COMPUTATIONS_MAX: usize = 64;
/// Associations of one reactor have numbers from reactor << this.
const ASSOCIATION_BITS: u32 = 48;

/// An association that replication knows.
struct Association {
    slot: usize,
    volume: VolumeId,
    nqn: String,
}

/// See the module's text.
pub(super) struct Hosts {
    target: Target,
    effects: Vec<Effect>,
    associations: HashMap<AssociationId, Association>,
    anas: HashMap<VolumeId, Ana>,
    /// Which share of the CNTLIDs each exported volume has here.
    exported: HashMap<VolumeId, usize>,
    /// Connections that are being moved to another reactor, and which.
    moving: HashMap<StreamId, (usize, Detached)>,
    /// Connections that are not read from until there is room.
    held: Vec<StreamId>,
    commands: [u64; 3],
    bytes: [u64; 2],
    /// Connections that ended with something other than NVMe/TCP, or nothing.
    bad_connections: u64,
    /// Secrets of each volume's hosts.
    keys: HashMap<VolumeId, HostKeys>,
    /// The thread that computes, once there was something to compute.
    computing: Option<SyncSender<(ConnectionId, Computation)>>,
}

/// The thread that computes for a reactor's hosts; ends with the reactor.
fn computing(reactor: usize, directory: Arc<Directory>) -> SyncSender<(ConnectionId, Computation)> {
    let (sender, computations) = sync_channel::<(ConnectionId, Computation)>(COMPUTATIONS_MAX);
    let work = move || {
        for (id, computation) in computations {
            let computed = Box::new(computation.run(&rand::random()));
            if directory.reactors.post(reactor, ToReactor::Computed(id, computed)).is_err() {
                warn!("a host is not authenticated: its reactor is busy");
            }
        }
    };
    let thread = std::thread::Builder::new().name("authentication".to_owned());
    thread.spawn(work).expect("a thread");
    sender
}

fn connection(stream: StreamId) -> ConnectionId {
    ConnectionId(stream.to_bits())
}

fn stream(connection: ConnectionId) -> StreamId {
    StreamId::from_bits(connection.0)
}

impl Hosts {
    pub(super) fn new(reactor: usize) -> Self {
        let first_association = (reactor as u64) << ASSOCIATION_BITS;
        Self {
            target: Target::new(first_association),
            effects: Vec::new(),
            associations: HashMap::new(),
            anas: HashMap::new(),
            exported: HashMap::new(),
            moving: HashMap::new(),
            held: Vec::new(),
            commands: [0; 3],
            bytes: [0; 2],
            bad_connections: 0,
            keys: HashMap::new(),
            computing: None,
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.target.next_deadline()
    }

    pub(super) fn set_discovery(&mut self, entries: Vec<DiscoveryEntry>) {
        self.target.set_discovery(entries, &mut self.effects);
    }

    pub(super) fn set_keys(&mut self, volume: VolumeId, keys: HostKeys) {
        let known = self.keys.entry(volume).or_default();
        if keys.as_of >= known.as_of {
            self.target.set_keys(volume, keys.keys.clone());
            *known = keys;
        }
    }

    /// NQNs of the hosts with an association at this volume.
    pub(super) fn of_volume(&self, volume: VolumeId) -> Vec<String> {
        let mut nqns: Vec<_> = self
            .associations
            .values()
            .filter(|association| association.volume == volume)
            .map(|association| association.nqn.clone())
            .collect();
        nqns.sort();
        nqns.dedup();
        nqns
    }

    pub(super) fn counters(&self) -> [(&'static str, u64); 6] {
        [
            ("host_read_commands_total", self.commands[0]),
            ("host_write_commands_total", self.commands[1]),
            ("host_other_commands_total", self.commands[2]),
            ("host_read_bytes_total", self.bytes[0]),
            ("host_write_bytes_total", self.bytes[1]),
            ("host_bad_connections_total", self.bad_connections),
        ]
    }

    fn count(&mut self, command: &Command) {
        match command {
            Command::Read(range) => {
                self.commands[0] += 1;
                self.bytes[0] += range.bytes() as u64;
            }
            Command::Write(range, _) | Command::CompareWrite(range, ..) => {
                self.commands[1] += 1;
                self.bytes[1] += range.bytes() as u64;
            }
            _ => self.commands[2] += 1,
        }
    }

    /// Exports the volume, once it is known which of its members this is (rule H1). A learner is
    /// none yet. Who takes a member's place takes its CNTLIDs; while both are there, the one that
    /// goes gets others, and its hosts connect anew.
    pub(super) fn export(
        &mut self,
        volume: VolumeId,
        blocks: u64,
        config: &Config,
        node: &NodeName,
    ) {
        let member = config.voters().position(|member| member.node == *node);
        if self.exported.get(&volume) == member.as_ref() {
            return;
        }
        if self.exported.remove(&volume).is_some() {
            self.target.remove_volume(volume, &mut self.effects);
        }
        let Some(member) = member else { return };
        self.exported.insert(volume, member);
        let ana = self.anas.get(&volume).copied().unwrap_or(Ana::Inaccessible);
        let range = CntlidRange::of_member(u16::try_from(member).expect("few members"));
        self.target.add_volume(volume, blocks, target_ana(ana), range);
        let keys = self.keys.get(&volume).map(|known| known.keys.clone());
        self.target.set_keys(volume, keys.unwrap_or_default());
        debug!(%volume, blocks, member, "exported");
    }

    pub(super) fn withdraw(&mut self, volume: VolumeId) {
        self.anas.remove(&volume);
        self.exported.remove(&volume);
        self.target.remove_volume(volume, &mut self.effects);
    }
}

fn target_ana(ana: Ana) -> TargetAna {
    match ana {
        Ana::Optimized => TargetAna::Optimized,
        Ana::Inaccessible => TargetAna::Inaccessible,
        Ana::Change => TargetAna::Change,
    }
}

fn host_command(command: Command) -> HostCommand {
    match command {
        Command::Read(range) => HostCommand::Read(range),
        Command::Write(range, data) => HostCommand::Write(range, data),
        Command::Zero(range, discard) => HostCommand::Zero(range, discard),
        Command::Flush => HostCommand::Flush,
        Command::Compare(range, data) => HostCommand::Compare(range, data),
        Command::CompareWrite(range, expected, data) => {
            HostCommand::CompareWrite(range, expected, data)
        }
    }
}

fn command_result(result: Result<HostDone, HostError>) -> Result<Done, CommandError> {
    match result {
        Ok(HostDone::Ok) => Ok(Done::Ok),
        Ok(HostDone::Data(pieces)) => Ok(Done::Data(pieces)),
        Ok(HostDone::Differs(block)) => Ok(Done::Differs(block)),
        Err(HostError::Inaccessible) => Err(CommandError::Inaccessible),
        Err(HostError::OutOfRange) => Err(CommandError::OutOfRange),
        Err(HostError::ReadOnly) => Err(CommandError::ReadOnly),
        Err(HostError::NoSpace) => Err(CommandError::NoSpace),
        Err(HostError::Media) => Err(CommandError::Media),
    }
}

impl Core {
    pub(super) fn host_accepted(&mut self, socket: OwnedFd) {
        let attached = match self.reactor.attach(socket, LIMITS) {
            Ok(stream) => stream,
            Err(error) => return warn!(%error, "a host's connection is lost before it began"),
        };
        let id = connection(attached);
        if let Err(error) = self.hosts.target.open(id, now(), &mut self.hosts.effects) {
            warn!(%error, "a host's connection is refused");
            self.reactor.close(attached);
        }
        self.carry_out_hosts();
    }

    pub(super) fn host_received(&mut self, stream: StreamId, bytes: Bytes) {
        let id = connection(stream);
        self.hosts.target.input(id, bytes, now(), &mut self.hosts.effects);
        self.carry_out_hosts();
        let gone = self.hosts.moving.contains_key(&stream);
        if !gone && !self.hosts.target.wants_input(id) {
            self.reactor.hold(stream);
            self.hosts.held.push(stream);
        }
    }

    pub(super) fn host_closed(&mut self, stream: StreamId) {
        self.hosts.moving.remove(&stream);
        self.hosts.target.closed(connection(stream), &mut self.hosts.effects);
        self.carry_out_hosts();
    }

    pub(super) fn host_drained(&mut self, stream: StreamId) {
        self.send_answers(connection(stream));
        self.carry_out_hosts();
    }

    pub(super) fn tick_hosts(&mut self, now: Instant) {
        self.hosts.target.tick(now, &mut self.hosts.effects);
        self.carry_out_hosts();
        // Rooms that have become free while the last events were handled.
        let Self { hosts, reactor, .. } = self;
        hosts.held.retain(|&stream| {
            let room = hosts.target.wants_input(connection(stream));
            if room {
                reactor.resume(stream);
            }
            !room && reactor.is_open(stream)
        });
    }

    fn send_answers(&mut self, id: ConnectionId) {
        let to = stream(id);
        if self.reactor.queued_bytes(to) > SEND_ENOUGH_BYTES {
            return self.reactor.tell_drained(to);
        }
        let mut out = Vec::new();
        self.hosts.target.take_output(id, now(), &mut out, &mut self.hosts.effects);
        if !self.reactor.send(to, out) {
            self.reactor.close(to);
            self.hosts.target.closed(id, &mut self.hosts.effects);
        }
    }

    /// Carries out what the target wants, until it wants nothing.
    pub(super) fn carry_out_hosts(&mut self) {
        while !self.hosts.effects.is_empty() {
            for effect in std::mem::take(&mut self.hosts.effects) {
                self.host_effect(effect);
            }
        }
    }

    fn host_effect(&mut self, effect: Effect) {
        match effect {
            Effect::Send(id) => self.send_answers(id),
            Effect::Close(id, last, reason) => {
                let to = stream(id);
                let from = self.reactor.peer_address(to);
                let is_bad = matches!(
                    reason,
                    CloseReason::Malformed(_) | CloseReason::Handshake | CloseReason::Crowded
                );
                self.hosts.bad_connections += u64::from(is_bad);
                // A flood of them is no flood of the log.
                if is_bad && self.hosts.bad_connections.is_power_of_two() {
                    let count = self.hosts.bad_connections;
                    warn!(?from, %reason, count, "a host's connection is closed");
                } else {
                    debug!(?from, %reason, "a host's connection is closed");
                }
                // A queue that is full keeps the host from its last words, not from its end.
                let _ = self.reactor.send(to, last);
                self.reactor.finish(to);
            }
            Effect::HostConnect(volume, association, identity) => {
                self.host_connects(volume, association, identity);
            }
            Effect::HostGone(association) => {
                let association = AssociationId(association.0);
                if let Some(known) = self.hosts.associations.remove(&association) {
                    self.push(known.slot, Input::HostGone(association));
                    self.outbox.changed();
                }
            }
            Effect::HostReadAna(association) => {
                let association = AssociationId(association.0);
                if let Some(known) = self.hosts.associations.get(&association) {
                    self.push(known.slot, Input::HostReadAna(association));
                }
            }
            Effect::HostCommand(association, token, command) => {
                let association = AssociationId(association.0);
                self.hosts.count(&command);
                if let Some(known) = self.hosts.associations.get(&association) {
                    let command = host_command(command);
                    self.push(known.slot, Input::HostCommand(association, token, command));
                }
            }
            Effect::Compute(id, computation) => self.compute(id, computation),
            Effect::Elsewhere(id, volume) => self.host_elsewhere(id, volume),
        }
    }

    /// Powers take milliseconds: another thread's. One that has too much to do already refuses,
    /// and the host tries again.
    fn compute(&mut self, id: ConnectionId, computation: Computation) {
        let worker = self
            .hosts
            .computing
            .get_or_insert_with(|| computing(self.number, Arc::clone(&self.directory)));
        if worker.try_send((id, computation)).is_err() {
            warn!("a host's connection is closed: too many hosts are being authenticated");
            self.reactor.close(stream(id));
            self.hosts.target.closed(id, &mut self.hosts.effects);
        }
    }

    pub(super) fn host_computed(&mut self, id: ConnectionId, computed: Computed) {
        self.hosts.target.computed(id, computed, now(), &mut self.hosts.effects);
        self.carry_out_hosts();
    }

    fn push(&mut self, slot: usize, input: Input) {
        self.work.push_back((slot, Event::Input(input)));
    }

    fn host_connects(
        &mut self,
        volume: VolumeId,
        association: target::AssociationId,
        identity: target::HostIdentity,
    ) {
        let Some(slot) = self.slot_of(volume) else {
            let refused = Err(Refusal::NoVolume);
            self.hosts.target.accepted(association, refused, now(), &mut self.hosts.effects);
            return;
        };
        let association = AssociationId(association.0);
        let known = Association { slot, volume, nqn: identity.nqn.clone() };
        self.hosts.associations.insert(association, known);
        let identity = HostIdentity { nqn: identity.nqn, id: identity.id };
        self.push(slot, Input::HostConnect(volume, association, identity));
        self.outbox.changed();
    }

    fn host_elsewhere(&mut self, id: ConnectionId, volume: VolumeId) {
        let shard = self.table.held().shard_of(volume);
        match shard.map(|shard| self.directory.reactors.of_shard(shard)) {
            Some(home) if home != self.number => {
                let to = stream(id);
                if let Some(detached) = self.hosts.target.detach(id) {
                    self.reactor.detach(to);
                    self.hosts.moving.insert(to, (home, detached));
                }
            }
            _ => self.hosts.target.refuse(id, &mut self.hosts.effects),
        }
    }

    pub(super) fn host_detached(&mut self, stream: StreamId, socket: OwnedFd) {
        let Some((home, detached)) = self.hosts.moving.remove(&stream) else {
            return;
        };
        let moved = ToReactor::Host(Box::new(MovedHost { socket, detached }));
        if self.directory.reactors.post(home, moved).is_err() {
            warn!("a host's connection is closed: its reactor is busy");
        }
    }

    pub(super) fn host_moved(&mut self, moved: MovedHost) {
        let Ok(stream) = self.reactor.attach(moved.socket, LIMITS) else {
            return;
        };
        let id = connection(stream);
        self.hosts.target.adopt(id, moved.detached, now(), &mut self.hosts.effects);
        self.carry_out_hosts();
    }

    /// Replication's word on hosts.
    pub(super) fn host_output(&mut self, output: Output) {
        let Self { hosts, .. } = self;
        let (target, effects) = (&mut hosts.target, &mut hosts.effects);
        match output {
            Output::HostAccepted(association, result) => {
                let refusal = |refusal| match refusal {
                    HostRefusal::NoVolume => Refusal::NoVolume,
                    HostRefusal::NotAllowed => Refusal::NotAllowed,
                };
                if let (Err(why), Some(known)) = (result, hosts.associations.get(&association)) {
                    let (volume, host) = (known.volume, &known.nqn);
                    warn!(%volume, host, ?why, "a host is refused");
                    hosts.associations.remove(&association);
                }
                let association = target::AssociationId(association.0);
                target.accepted(association, result.map_err(refusal), now(), effects);
            }
            Output::HostDone(association, token, result) => {
                let association = target::AssociationId(association.0);
                target.done(association, token, command_result(result), now(), effects);
            }
            Output::HostEnd(association) => {
                hosts.associations.remove(&association);
                target.end(target::AssociationId(association.0), effects);
            }
            Output::Ana(volume, ana) => {
                hosts.anas.insert(volume, ana);
                target.set_ana(volume, target_ana(ana), effects);
                info!(%volume, ?ana, "path");
                self.outbox.changed();
            }
            Output::Resized(volume, blocks) => target.set_size(volume, blocks, effects),
            other => unreachable!("not for hosts: {other:?}"),
        }
        self.carry_out_hosts();
    }
}
