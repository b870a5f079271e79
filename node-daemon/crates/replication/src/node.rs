//! [`Node`]: every replica of one shard, its pairs, and what goes to which.
//!
//! A message is handed to a replica only when it names that replica, and the instance that the link
//! it came over was opened with; what does not fit is dropped, but for questions about a replica
//! that is not here, which are answered "none" (T9). Time reaches a replica when it asked for it,
//! and with every beat.

use std::collections::{BTreeMap, BTreeSet};

use tercet_proto::message::{Envelope, Message, PairMessage, ReplicaMessage};
use tercet_proto::storage::{Incomplete, Storage};
use tercet_proto::{
    Instant, NewReplica, Place, ReplicaId, ReplicaState, StorageError, StorageEvent, Token,
    VolumeId,
};

use crate::api::{
    AssociationId, Control, ControlDone, ControlError, HostIdentity, HostRefusal, Input, Output,
    PeerId, ReplicaStatus, SwapOutcome,
};
use crate::cx::{Cx, Kind, Purpose, Sender};
use crate::lease::Pairs;
use crate::options::Options;
use crate::replica::Replica;

/// The state machine of one shard.
#[derive(Clone, Debug, Hash)]
pub struct Node {
    pub(crate) options: Options,
    pub(crate) pairs: Pairs,
    pub(crate) tokens: crate::cx::Tokens,
    pub(crate) replicas: BTreeMap<VolumeId, Replica>,
    associations: BTreeMap<AssociationId, VolumeId>,
    pub(crate) timers: BTreeSet<(Instant, VolumeId)>,
    pub(crate) next_beat: Instant,
    /// `Control::Stop` is waited for until then.
    stopping: Option<(Token, Instant)>,
}

/// What a control request does at a replica.
type Request = Box<dyn FnOnce(&mut Replica, &mut Cx<'_>)>;

/// Borrows everything but the replicas.
macro_rules! context {
    ($node:ident, $now:ident, $storage:ident, $out:ident) => {
        Cx {
            now: $now,
            options: &$node.options,
            storage: $storage,
            out: $out,
            pairs: &mut $node.pairs,
            tokens: &mut $node.tokens,
        }
    };
}

impl Node {
    /// A node with the replicas that storage has. Storage is open: replayed and flushed (R2).
    pub fn new(options: Options, now: Instant, storage: &mut dyn Storage) -> Self {
        let pairs = Pairs::new(options.identity.clone(), options.timing.held());
        let mut node = Self {
            options,
            pairs,
            tokens: crate::cx::Tokens::default(),
            replicas: BTreeMap::new(),
            associations: BTreeMap::new(),
            timers: BTreeSet::new(),
            next_beat: now,
            stopping: None,
        };
        let mut unsent = Vec::new(); // nothing is sent before the first link
        let out = &mut unsent;
        for state in storage.replicas() {
            let mut cx = context!(node, now, storage, out);
            node.replicas.insert(state.volume, Replica::new(&state, &mut cx));
        }
        node
    }

    /// The one transition.
    pub fn step(
        &mut self,
        input: Input,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        match input {
            Input::PeerUp { peer, instance, shards, version } => {
                self.pairs.up(&peer, (instance, shards, version), now, out);
                self.every(now, storage, out, |replica, cx| replica.on_peer_up(&peer.node, cx));
            }
            Input::PeerDown(peer) => self.pairs.down(&peer),
            Input::Message(peer, message) => self.message(peer, message, now, storage, out),
            Input::Observe(volume, view) => {
                self.with(volume, now, storage, out, |replica, cx| replica.observe(view, cx));
            }
            Input::Swapped(token, outcome) => self.swapped(token, outcome, now, storage, out),
            Input::Control(token, control) => self.control(token, control, now, storage, out),
            Input::ProvenExit(node, instance) => {
                if node == self.options.identity.node {
                    self.pairs.own_exit(instance, out);
                } else {
                    self.pairs.exited(&node, instance);
                }
                self.every(now, storage, out, Replica::tick);
            }
            Input::HostConnect(volume, id, host) => {
                self.connect((volume, id), host, now, storage, out);
            }
            Input::HostGone(id) => {
                if let Some(volume) = self.associations.remove(&id) {
                    self.with(volume, now, storage, out, |replica, _| replica.host_gone(id));
                }
            }
            Input::HostReadAna(id) => {
                if let Some(volume) = self.associations.get(&id).copied() {
                    self.with(volume, now, storage, out, |replica, _| replica.hosts.read_ana(id));
                }
            }
            Input::HostCommand(id, token, command) => {
                if let Some(volume) = self.associations.get(&id).copied() {
                    self.with(volume, now, storage, out, |replica, cx| {
                        replica.host_command(id, token, command, cx);
                    });
                }
            }
            Input::Storage(event) => self.storage(event, now, storage, out),
            Input::Tick => self.tick(now, storage, out),
        }
    }

    /// When it wants a [`Input::Tick`] at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let first = self.timers.first().map(|(at, _)| *at);
        Some(first.map_or(self.next_beat, |at| at.min(self.next_beat)))
    }

    /// What the replica of a volume here says of itself.
    pub fn status(&self, volume: VolumeId) -> Option<ReplicaStatus> {
        self.replicas.get(&volume).map(status_of)
    }

    /// Every replica here.
    pub fn statuses(&self) -> Vec<ReplicaStatus> {
        self.replicas.values().map(status_of).collect()
    }

    /// Runs something on one replica, and notes when it wants to be woken.
    pub(crate) fn with<R>(
        &mut self,
        volume: VolumeId,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
        run: impl FnOnce(&mut Replica, &mut Cx<'_>) -> R,
    ) -> Option<R> {
        let replica = self.replicas.get_mut(&volume)?;
        let before = replica.deadline;
        let mut cx = context!(self, now, storage, out);
        let result = run(replica, &mut cx);
        if replica.deadline != before {
            if let Some(at) = before {
                self.timers.remove(&(at, volume));
            }
            if let Some(at) = replica.deadline {
                self.timers.insert((at, volume));
            }
        }
        Some(result)
    }

    fn every(
        &mut self,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
        run: impl Fn(&mut Replica, &mut Cx<'_>),
    ) {
        let volumes: Vec<_> = self.replicas.keys().copied().collect();
        for volume in volumes {
            self.with(volume, now, storage, out, &run);
        }
    }

    fn tick(&mut self, now: Instant, storage: &mut dyn Storage, out: &mut Vec<Output>) {
        if self.next_beat <= now {
            self.next_beat = now + self.options.timing.beat;
            self.pairs.beat_all(now, self.options.timing.lease, out);
            self.every(now, storage, out, Replica::tick);
        }
        while let Some((_, volume)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            let due = self.timers.pop_first().expect("looked at above");
            if self.replicas.contains_key(&volume) {
                self.timers.insert(due);
                self.with(volume, now, storage, out, Replica::tick);
                assert!(!self.timers.contains(&due), "a tick answers its deadline");
            }
        }
        self.check_stopping(now, out);
    }

    fn message(
        &mut self,
        peer: PeerId,
        message: Message,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        match message {
            Message::Pair(envelope, message) => {
                let from = envelope.instance;
                let exit = matches!(message, PairMessage::Exited { .. });
                let excluded = self.pairs.message(&peer, envelope, message, now, out);
                for (volume, upto) in excluded {
                    self.with(volume, now, storage, out, |r, cx| r.exclude(from, upto, cx));
                }
                if exit {
                    self.every(now, storage, out, Replica::tick); // a seal waits no more (L5)
                }
            }
            Message::Replica(envelope, message) => {
                if self.pairs.instance_at(&peer) != Some(envelope.instance) {
                    return;
                }
                let here = self.replicas.get(&envelope.volume).map(|replica| replica.id);
                if here == Some(envelope.to) {
                    self.with(envelope.volume, now, storage, out, |replica, cx| {
                        replica.message(peer, &envelope, message, cx);
                    });
                } else if asks(&message) && !self.tokens.is_changing(envelope.volume) {
                    let mut cx = context!(self, now, storage, out);
                    let Envelope { volume, from, to, epoch, .. } = envelope;
                    let none = Sender { volume, replica: to, epoch };
                    cx.answer(peer, from, none, ReplicaMessage::NoReplica);
                }
            }
        }
    }

    fn swapped(
        &mut self,
        token: Token,
        outcome: SwapOutcome,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        let Some(Purpose::Swap(volume)) = self.tokens.take(token) else { return };
        self.with(volume, now, storage, out, |replica, cx| {
            if replica.swap.is_some_and(|(out, _)| out == token) {
                replica.swap = None;
            }
            match outcome {
                SwapOutcome::Swapped(mut view) | SwapOutcome::Lost(mut view) => {
                    view.consistent = true;
                    replica.observe(view, cx);
                }
                SwapOutcome::Unknown => replica.read_object(cx),
            }
        });
    }

    fn storage(
        &mut self,
        event: StorageEvent,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        match event {
            StorageEvent::Durable { volume, place } => {
                self.with(volume, now, storage, out, |replica, cx| {
                    replica.on_durable(place, cx);
                    replica.retry_held(cx);
                });
            }
            StorageEvent::Done { token, result } => self.done(token, result, now, storage, out),
            StorageEvent::Bad { volume, version } => {
                self.with(volume, now, storage, out, |r, cx| r.on_bad_block(version, cx));
            }
            StorageEvent::Filled { volume } => {
                self.with(volume, now, storage, out, Replica::on_filled);
            }
            StorageEvent::Read { token, result } => match self.tokens.take(token) {
                Some(Purpose::HostRead(volume, read)) => {
                    self.with(volume, now, storage, out, |r, cx| r.on_host_read(read, result, cx));
                }
                Some(Purpose::CopyRead(read)) => {
                    let volume = read.volume;
                    self.with(volume, now, storage, out, |r, cx| r.on_copy_read(read, result, cx));
                }
                Some(Purpose::VersionRead(read)) => {
                    let volume = read.volume;
                    self.with(volume, now, storage, out, |r, cx| {
                        r.on_version_read(read, result, cx);
                    });
                }
                Some(Purpose::Sums(control, place)) => {
                    let sums = result.map(|rows| ControlDone::ChunkSums(place, rows));
                    out.push(Output::ControlDone(control, sums.map_err(ControlError::from)));
                }
                _ => {}
            },
            StorageEvent::Chunks { token, result } => {
                if let Some(Purpose::Chunks(control, place)) = self.tokens.take(token) {
                    let page = result.map(|page| ControlDone::ChunkMap(place, page));
                    out.push(Output::ControlDone(control, page.map_err(ControlError::from)));
                }
            }
            StorageEvent::Stamps { token, result } => match self.tokens.take(token) {
                Some(Purpose::CopyStamps(asked)) => {
                    let volume = asked.volume;
                    self.with(volume, now, storage, out, |replica, cx| {
                        replica.on_copy_stamps(asked, result, cx);
                    });
                }
                Some(Purpose::OwnStamps(volume)) => {
                    self.with(volume, now, storage, out, |replica, cx| {
                        replica.on_own_stamps(token, result, cx);
                    });
                }
                _ => {}
            },
            StorageEvent::Log { token, result } => match self.tokens.take(token) {
                Some(Purpose::LagRead(volume, epoch, to)) => {
                    self.with(volume, now, storage, out, |replica, cx| {
                        if replica.leading_epoch() == Some(epoch) {
                            replica.on_lag_read(to, result, cx);
                        }
                    });
                }
                Some(Purpose::FetchRead(volume, read)) => {
                    if let Ok(entries) = result {
                        self.with(volume, now, storage, out, |replica, cx| {
                            replica.on_fetch_read(read, entries, cx);
                        });
                    }
                }
                _ => {}
            },
            StorageEvent::Failed(_) => {
                self.pairs.failed = true;
                self.every(now, storage, out, Replica::on_store_failed);
            }
        }
    }

    fn done(
        &mut self,
        token: Token,
        result: Result<(), StorageError>,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        match self.tokens.take(token) {
            Some(Purpose::Promise(volume)) => {
                self.with(volume, now, storage, out, |r, cx| r.on_promised(token, &result, cx));
            }
            Some(Purpose::Copy(volume)) => {
                self.with(volume, now, storage, out, |r, cx| r.on_copy_done(token, &result, cx));
            }
            Some(Purpose::Repair(volume)) => {
                self.with(volume, now, storage, out, |r, cx| r.on_repair_done(token, &result, cx));
            }
            Some(Purpose::Create(control, new, kind)) => match (&result, kind) {
                (Ok(()), Kind::Learner) => self.mark_learner(control, new.volume, storage),
                _ => self.created((control, new.volume), result, now, storage, out),
            },
            Some(Purpose::Learner(control, volume)) => {
                self.created((control, volume), result, now, storage, out);
            }
            Some(Purpose::Delete(control, volume)) => {
                let answer = result.map(|()| ControlDone::Ok).map_err(ControlError::from);
                if answer.is_ok() {
                    self.forget(volume, storage, out);
                }
                out.push(Output::ControlDone(control, answer));
            }
            _ => {}
        }
    }

    /// T9: made at creation or as a learner, never because a configuration names this node.
    fn create(
        &mut self,
        token: Token,
        (new, kind): (NewReplica, Kind),
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        let there = storage.replica(new.volume);
        if self.tokens.is_changing(new.volume) {
            out.push(Output::ControlDone(token, Err(StorageError::Busy.into())));
        } else if let Some(there) = there {
            // Crash window: made and not marked. Nobody has been told its id, so nothing names it.
            let unmarked = there.incomplete.is_none() && there.promise.is_none();
            if kind == Kind::Learner && unmarked {
                self.mark_learner(token, new.volume, storage);
            } else {
                out.push(Output::ControlDone(token, Ok(made(&there))));
            }
        } else {
            let own = self.tokens.issue(Purpose::Create(token, new.clone(), kind));
            storage.create_replica(new, own);
        }
    }

    /// M1: a learner is incomplete before anybody hears of it. An empty replica that is complete
    /// would take the whole log, and of a clone that is not all (S3).
    fn mark_learner(&mut self, control: Token, volume: VolumeId, storage: &mut dyn Storage) {
        let own = self.tokens.issue(Purpose::Learner(control, volume));
        let nothing = Incomplete::AcknowledgedUpTo(Place::EMPTY);
        storage.set_incomplete(volume, Some(nothing), own);
    }

    fn created(
        &mut self,
        (control, volume): (Token, VolumeId),
        result: Result<(), StorageError>,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        let answer = match (result, storage.replica(volume)) {
            (Ok(()), Some(state)) => {
                let mut cx = context!(self, now, storage, out);
                let replica = Replica::new(&state, &mut cx);
                self.replicas.insert(volume, replica);
                Ok(made(&state))
            }
            (Ok(()), None) => Err(StorageError::NoReplica(volume).into()),
            (Err(error), _) => Err(error.into()),
        };
        out.push(Output::ControlDone(control, answer));
    }

    fn delete(
        &mut self,
        token: Token,
        (volume, replica): (VolumeId, ReplicaId),
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        let another = storage.replica(volume).is_some_and(|there| there.replica != replica);
        if another {
            // By id only: a replica of another id was not meant, and the one meant is gone.
            out.push(Output::ControlDone(token, Ok(ControlDone::Ok)));
            return;
        }
        self.with(volume, now, storage, out, Replica::demote);
        let own = self.tokens.issue(Purpose::Delete(token, volume));
        storage.delete_replica(volume, replica, own);
    }

    /// The replica is deleted.
    fn forget(&mut self, volume: VolumeId, storage: &dyn Storage, out: &mut Vec<Output>) {
        if storage.replica(volume).is_some() {
            return;
        }
        if let Some(mut replica) = self.replicas.remove(&volume) {
            replica.hosts.end_all(out);
            if let Some(at) = replica.deadline {
                self.timers.remove(&(at, volume));
            }
        }
        self.associations.retain(|_, of| *of != volume);
    }

    fn control(
        &mut self,
        token: Token,
        control: Control,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        let (volume, run): (_, Request) = match control {
            Control::CreateReplica(new) => {
                return self.create(token, (new, Kind::First), storage, out);
            }
            Control::CreateLearner(new) => {
                return self.create(token, (new, Kind::Learner), storage, out);
            }
            Control::DeleteReplica(volume, replica) => {
                return self.delete(token, (volume, replica), now, storage, out);
            }
            Control::Stop => return self.stop(token, now, storage, out),
            Control::Snapshot(volume, id) => {
                (volume, Box::new(move |r, cx| r.snapshot(id, token, cx)))
            }
            Control::SnapshotDelete(volume, id) => {
                (volume, Box::new(move |r, cx| r.snapshot_delete(id, token, cx)))
            }
            Control::Grow(volume, size) => (volume, Box::new(move |r, cx| r.grow(size, token, cx))),
            Control::HandOver(volume, to) => {
                (volume, Box::new(move |r, cx| r.ask_hand_over(to, token, cx)))
            }
            Control::ChunkSums(volume) => (volume, Box::new(move |r, cx| r.chunk_sums(token, cx))),
            Control::ChunkMap(volume, from) => {
                (volume, Box::new(move |r, cx| r.chunk_map(from, token, cx)))
            }
        };
        if self.with(volume, now, storage, out, run).is_none() {
            let none = StorageError::NoReplica(volume);
            out.push(Output::ControlDone(token, Err(none.into())));
        }
    }

    /// Hands every volume over that this shard leads, and takes none over any more.
    fn stop(
        &mut self,
        token: Token,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        let timing = &self.options.timing;
        self.stopping = Some((token, now + timing.hand_over * 2 + timing.drain * 2));
        self.pairs.stopping = true;
        self.every(now, storage, out, Replica::leave_for_good);
        self.check_stopping(now, out);
    }

    fn check_stopping(&mut self, now: Instant, out: &mut Vec<Output>) {
        let busy = |r: &Replica| r.leading_epoch().is_some() || !r.handed_over.is_empty();
        let left = self.replicas.values().any(busy);
        if let Some((token, until)) = self.stopping
            && (!left || until <= now)
        {
            self.stopping = None;
            out.push(Output::ControlDone(token, Ok(ControlDone::Ok)));
        }
    }

    fn connect(
        &mut self,
        (volume, id): (VolumeId, AssociationId),
        host: HostIdentity,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        match self.with(volume, now, storage, out, |r, cx| r.host_connect(id, host, cx)) {
            Some(true) => {
                self.associations.insert(id, volume);
            }
            Some(false) => {}
            None => out.push(Output::HostAccepted(id, Err(HostRefusal::NoVolume))),
        }
    }
}

fn made(state: &ReplicaState) -> ControlDone {
    ControlDone::Replica { replica: state.replica, incomplete: state.incomplete.is_some() }
}

fn status_of(replica: &Replica) -> ReplicaStatus {
    ReplicaStatus {
        volume: replica.volume,
        replica: replica.id,
        epoch: replica.promised_epoch(),
        serving: replica.is_serving() && replica.ana() == crate::api::Ana::Optimized,
        tail: replica.log.tail,
        committed: replica.log.heard.lsn,
        applied: replica.log.applied,
        incomplete: replica.log.incomplete.is_some(),
        bad_blocks: replica.repairs.count(),
        members: replica.member_statuses(),
    }
}

/// Questions that are answered "none" where the replica is not here (T9).
fn asks(message: &ReplicaMessage) -> bool {
    use ReplicaMessage::{Append, Consult, Fetch, Seal};
    matches!(message, Append { .. } | Seal { .. } | Consult | Fetch { .. })
}

impl Replica {
    /// A message that names this replica.
    fn message(
        &mut self,
        peer: PeerId,
        envelope: &Envelope,
        message: ReplicaMessage,
        cx: &mut Cx<'_>,
    ) {
        match message {
            ReplicaMessage::Append { prev, commit, entries } => {
                self.on_append(peer, envelope, (prev, commit), entries, cx);
            }
            ReplicaMessage::Ack { length, matched, commit } => {
                self.on_ack(envelope, (length, matched, commit), cx);
            }
            ReplicaMessage::Refuse { named, applied, hint, incomplete } => {
                self.on_refuse(envelope, (named, applied, hint), incomplete, cx);
            }
            ReplicaMessage::Seal { config, sealed } => {
                self.on_seal(peer, envelope, config, sealed, cx);
            }
            ReplicaMessage::Sealed(tail) => {
                if self.leading_epoch() == Some(envelope.epoch) {
                    self.on_sealed(envelope.from, envelope.instance, tail, cx);
                }
            }
            ReplicaMessage::Newer { config } => self.on_newer(&config, cx),
            ReplicaMessage::NoReplica => {
                if self.leading_epoch() == Some(envelope.epoch) {
                    self.on_no_replica(envelope, cx);
                }
            }
            ReplicaMessage::Consult => self.on_consult(peer, envelope, cx),
            ReplicaMessage::Opinion { misses, tail } => {
                self.on_opinion(envelope, misses, tail, cx);
            }
            ReplicaMessage::Fetch { after } => self.on_fetch(peer, envelope, after, cx),
            ReplicaMessage::Fetched { after, hint, entries } => {
                self.on_fetched(envelope, (after, hint), entries, cx);
            }
            ReplicaMessage::GiveBack => self.on_give_back(envelope.epoch, envelope.instance, cx),
            ReplicaMessage::Stand => self.on_stand(envelope, cx),
            ReplicaMessage::Repair(message) => self.on_repair_message(peer, envelope, message, cx),
            ReplicaMessage::HandOver(message) => self.on_hand_over(peer, envelope, message, cx),
            ReplicaMessage::Copy(message) if message.is_question() => {
                self.on_copy_question(peer, envelope, message, cx);
            }
            ReplicaMessage::Copy(message) => self.on_copy_answer(peer, envelope, message, cx),
        }
    }
}
