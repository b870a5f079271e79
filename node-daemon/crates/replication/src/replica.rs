//! One replica: what it is, which role it has, and what it does when the object changes.
//!
//! A replica follows (`secondary.rs`), is a candidate that seals and adopts (`candidate.rs`), or
//! leads (`primary.rs`). Being sealed (`seal.rs`) goes on beside any role that has ended. Whatever
//! is newer ends what is older, for ever (T8): [`Replica::demote`] is the only way down.

use std::collections::BTreeMap;

use tercet_proto::message::{ReplicaMessage, Tail};
use tercet_proto::{
    Config, ConfigState, Epoch, InstanceId, Instant, Member, NodeName, Promise, ReplicaId,
    ReplicaState, Token, VolumeId,
};

use crate::api::{Ana, ControlDone, ControlError, Notice, Output, Replacement, VolumeView};
use crate::candidate::Candidate;
use crate::copy_target::Incoming;
use crate::cx::{Cx, Purpose, Sender};
use crate::heir::Succession;
use crate::hosts::Hosts;
use crate::log::Log;
use crate::options::canary;
use crate::primary::Primary;
use crate::repair::Repairs;
use crate::seal::{GrantsOut, Sealing};
use crate::takeover::Watch;

/// What the replica does in its epoch.
#[derive(Clone, Debug, Hash)]
pub(crate) enum Role {
    /// Takes entries of the promised (epoch, instance); matched up to here in this epoch (W3).
    Follower { matched: tercet_proto::Lsn },
    /// Its compare-and-swap took place: seals, adopts (T4, T5).
    Candidate(Box<Candidate>),
    /// Leads (T6 on).
    Primary(Box<Primary>),
}

impl Role {
    pub const FOLLOWER: Self = Self::Follower { matched: tercet_proto::Lsn(0) };
}

/// The newest configuration seen, promised or not.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Known {
    pub config: Config,
    /// When its epoch was first seen here (T2).
    pub since: Instant,
    /// Its primary has announced a commit of its own epoch: it serves (T2).
    pub opened: bool,
}

/// A hand-over that was begun here and is over when the other one serves.
#[derive(Clone, Debug, Hash)]
pub(crate) struct HandedOver {
    /// Who waits for the answer.
    pub token: Option<Token>,
    pub epoch: Epoch,
    /// Who was named.
    pub to: Option<NodeName>,
    pub until: Instant,
}

#[derive(Clone, Debug, Hash)]
pub(crate) struct Replica {
    pub volume: VolumeId,
    pub id: ReplicaId,
    pub log: Log,
    /// Durable.
    pub promise: Option<Promise>,
    pub known: Option<Known>,
    pub role: Role,
    pub sealing: Option<Sealing>,
    pub grants: GrantsOut,
    /// Members' instances that exclude this volume from their grants, up to an epoch (L3).
    pub excluded: BTreeMap<InstanceId, Epoch>,
    pub watch: Watch,
    pub hosts: Hosts,
    /// A compare-and-swap that is out, and until when an answer is waited for.
    pub swap: Option<(Token, Instant)>,
    /// The outcome of a swap is unknown: asked for a consistent read, when (T3).
    pub reading: Option<Instant>,
    pub handed_over: Vec<HandedOver>,
    /// Being asked to follow a primary that hands over (T10).
    pub succession: Succession,
    /// What is copied to this replica (C2).
    pub incoming: Incoming,
    /// Blocks that are bad here (C4).
    pub repairs: Repairs,
    /// The change of members that the object asks for (M1).
    pub replacement: Option<Replacement>,
    /// When it wants a tick, if earlier than the next beat.
    pub deadline: Option<Instant>,
    ana: Ana,
}

impl Replica {
    pub fn new(state: &ReplicaState, cx: &mut Cx<'_>) -> Self {
        let known = state.promise.as_ref().map(|promise| Known {
            config: promise.config.clone(),
            since: cx.now,
            opened: false,
        });
        Self {
            volume: state.volume,
            id: state.replica,
            log: Log::new(state, cx.storage),
            promise: state.promise.clone(),
            known,
            role: Role::FOLLOWER,
            sealing: None,
            grants: GrantsOut::default(),
            excluded: BTreeMap::new(),
            watch: Watch::default(),
            hosts: Hosts::new(state.volume),
            swap: None,
            reading: None,
            handed_over: Vec::new(),
            succession: Succession::default(),
            incoming: Incoming::default(),
            repairs: Repairs::default(),
            replacement: None,
            deadline: None,
            ana: Ana::Inaccessible,
        }
    }

    /// The newest epoch promised, durable or on the way: a promise never falls.
    pub fn promised_epoch(&self) -> Epoch {
        let durable = self.promise.as_ref().map_or(Epoch(0), Promise::epoch);
        self.sealing.as_ref().map_or(durable, |sealing| durable.max(sealing.config.epoch))
    }

    pub fn known_epoch(&self) -> Epoch {
        self.known.as_ref().map_or(Epoch(0), |known| known.config.epoch)
    }

    /// Speaks about an epoch.
    pub fn sender(&self, epoch: Epoch) -> Sender {
        Sender { volume: self.volume, replica: self.id, epoch }
    }

    /// Asks for a tick at `at`, if none is asked for before.
    pub fn wake(&mut self, at: Instant) {
        self.deadline = Some(self.deadline.map_or(at, |earlier| earlier.min(at)));
    }

    pub fn report(&self, cx: &Cx<'_>) -> Tail {
        self.log.report(cx.storage)
    }

    pub fn ana(&self) -> Ana {
        self.ana
    }

    /// Tells hosts and executor about the path, once for each change (H1).
    pub fn set_ana(&mut self, ana: Ana, cx: &mut Cx<'_>) {
        if self.ana != ana {
            self.ana = ana;
            cx.out.push(Output::Ana(self.volume, ana));
        }
    }

    /// The Volume object as the agent saw it, or as a swap returned it (T3, T7).
    pub fn observe(&mut self, view: VolumeView, cx: &mut Cx<'_>) {
        let consistent = view.consistent;
        if consistent {
            self.reading = None;
        }
        let config = view.config.clone();
        self.replacement.clone_from(&view.replacement);
        self.take_attachments(view, cx);
        let Some(config) = config else {
            return; // no config never means new
        };
        self.learn(&config, consistent, cx);
        self.lead_if_named(&config, consistent, cx);
        self.tick(cx);
    }

    /// Takes in a configuration from wherever it came.
    pub fn learn(&mut self, config: &Config, consistent: bool, cx: &mut Cx<'_>) {
        let known_epoch = self.known_epoch();
        if config.epoch < known_epoch {
            if consistent && config.epoch < self.promised_epoch() {
                cx.out.push(Output::Notice(self.volume, Notice::RestoredObject(config.epoch)));
            }
            return;
        }
        if config.epoch == known_epoch {
            self.learn_edit(config, cx);
            return;
        }
        self.note_superseded(cx);
        self.known = Some(Known { config: config.clone(), since: cx.now, opened: false });
        self.watch.new_epoch();
        if config.primary.instance != cx.options.identity.instance {
            self.succession.forget();
        }
        if self.leading_epoch().is_some_and(|epoch| epoch < config.epoch) {
            if self.awaits(config) {
                self.heir_seen(cx); // its own heir's: what is in flight is answered first
            } else {
                self.demote(cx); // T8: a newer epoch seen is final
            }
        }
    }

    /// An edit within the epoch: Active, learners. Never back from Active: that view is stale.
    fn learn_edit(&mut self, config: &Config, cx: &mut Cx<'_>) {
        let Some(known) = &mut self.known else { return };
        if known.config.primary != config.primary {
            cx.out.push(Output::Notice(self.volume, Notice::RestoredObject(config.epoch)));
            return;
        }
        let back =
            known.config.state == ConfigState::Active && config.state == ConfigState::Recovering;
        if !back && known.config != *config {
            known.config = config.clone();
            if let Role::Primary(primary) = &mut self.role
                && primary.epoch() == config.epoch
            {
                primary.edited(config.clone(), self.id);
                self.advance(cx);
                self.tick_members(cx);
            }
        }
    }

    /// The object names this instance as the primary of an epoch that is not promised yet: T4 to T7
    /// run, whoever made the swap (T9). An instance leads an epoch at most once (T1).
    fn lead_if_named(&mut self, config: &Config, consistent: bool, cx: &mut Cx<'_>) {
        let mine = config.primary.instance == cx.options.identity.instance
            && config.primary.node == cx.options.identity.node;
        let news = mine && config.epoch > self.promised_epoch() && config.is_member(self.id);
        if news && !self.waits_for_predecessor(config, consistent, cx) {
            self.start_candidate(config.clone(), cx);
        }
        if canary!(cx.options, ResumeOldEpoch) && !mine {
            self.resume(config, cx);
        }
        if consistent && mine && self.leading_epoch() == Some(config.epoch) {
            self.attachments_known(cx);
        }
    }

    /// What T1 forbids: goes on in an epoch that an earlier instance of this node led.
    fn resume(&mut self, config: &Config, cx: &mut Cx<'_>) {
        let led = config.primary.node == cx.options.identity.node
            && config.epoch == self.promised_epoch()
            && self.sealing.is_none();
        if !led || !matches!(self.role, Role::Follower { .. }) {
            return;
        }
        let mut primary = Primary::new(config.clone(), self.id, true, cx.now);
        for member in &mut primary.members {
            member.sealed(config.primary.instance, &self.log.report(cx.storage));
        }
        self.role = Role::Primary(Box::new(primary));
        self.open(cx);
    }

    /// The epoch that this replica leads or tries to.
    pub fn leading_epoch(&self) -> Option<Epoch> {
        match &self.role {
            Role::Follower { .. } => None,
            Role::Candidate(candidate) => Some(candidate.config.epoch),
            Role::Primary(primary) => Some(primary.epoch()),
        }
    }

    /// Whether host commands are taken.
    pub fn is_serving(&self) -> bool {
        matches!(&self.role, Role::Primary(primary) if primary.serving)
    }

    /// T8: ends leading for good. H4: every association that could do I/O here ends with it.
    pub fn demote(&mut self, cx: &mut Cx<'_>) {
        self.note_handed_over(cx);
        let role = std::mem::replace(&mut self.role, Role::FOLLOWER);
        let Role::Primary(primary) = role else { return };
        self.set_ana(Ana::Inaccessible, cx);
        if !canary!(cx.options, KeepAssociations) {
            self.hosts.end_all_that_could(cx.out);
        }
        if primary.serving {
            cx.out.push(Output::Notice(self.volume, Notice::Stopped(primary.epoch())));
        }
        let controls = primary.controls();
        Self::end_copies(primary.copies, cx);
        for token in controls {
            let interrupted = Err(ControlError::Interrupted(self.volume));
            cx.out.push(Output::ControlDone(token, interrupted));
        }
    }

    /// L2: until when a majority's grants hold, this replica's own included.
    pub fn lease_until(&self, cx: &Cx<'_>) -> Option<Instant> {
        let Role::Primary(primary) = &self.role else { return None };
        let epoch = primary.epoch();
        primary.config.quorum_value(|replica| {
            if replica == self.id {
                return Some(Instant(u64::MAX));
            }
            let member = primary.members.iter().find(|m| m.replica == replica)?;
            let instance = member.answered?; // L3: only after it has answered in this epoch
            let excluded = self.excluded.get(&instance).is_some_and(|upto| *upto >= epoch);
            if excluded && !canary!(cx.options, PairGrantForSealed) {
                return None;
            }
            cx.pairs.granted_until((&member.node, replica), self.volume, instance)
        })
    }

    /// L1: whether reads may be answered now.
    pub fn has_lease(&self, cx: &Cx<'_>) -> bool {
        canary!(cx.options, ReadWithoutLease)
            || self.lease_until(cx).is_some_and(|until| cx.now < until)
    }

    /// L3: the granter behind `instance` seals, or has sealed, this volume.
    pub fn exclude(&mut self, instance: InstanceId, upto: Epoch, cx: &mut Cx<'_>) {
        let known = self.excluded.entry(instance).or_default();
        *known = (*known).max(upto);
        self.check_lease(cx);
    }

    /// A compare-and-swap of the whole configuration (T3); one at a time.
    pub fn swap(&mut self, new: Config, cx: &mut Cx<'_>) {
        if self.swap.is_some() || self.reading.is_some() {
            return;
        }
        let old = self.known.as_ref().expect("swapped from a known value").config.clone();
        let token = cx.tokens.issue(Purpose::Swap(self.volume));
        self.swap = Some((token, cx.now + cx.options.timing.swap_answer));
        cx.out.push(Output::Swap { token, volume: self.volume, old, new });
    }

    /// The outcome of a swap is not known: both count until a consistent read says which (T3).
    pub fn read_object(&mut self, cx: &mut Cx<'_>) {
        self.reading = Some(cx.now);
        cx.out.push(Output::ReadConsistent(self.volume));
    }

    /// Whatever time brings. Safe to call at any moment.
    pub fn tick(&mut self, cx: &mut Cx<'_>) {
        if self.deadline.is_some_and(|at| at <= cx.now) {
            self.deadline = None;
        }
        if self.swap.is_some_and(|(_, until)| until <= cx.now) {
            self.swap = None;
            self.read_object(cx);
        }
        if self.reading.is_some_and(|at| cx.now.since(at) >= cx.options.timing.missing_after) {
            self.read_object(cx);
        }
        self.tick_seal(cx);
        match &self.role {
            Role::Follower { .. } => {
                self.tick_heir(cx);
                if matches!(self.role, Role::Follower { .. }) {
                    self.tick_watch(cx);
                }
            }
            Role::Candidate(_) => self.tick_candidate(cx),
            Role::Primary(_) => self.tick_primary(cx),
        }
        self.tick_handed_over(cx);
        self.tick_repairs(cx);
    }

    /// A hand-over is answered when the new primary serves, or when it takes too long.
    fn tick_handed_over(&mut self, cx: &mut Cx<'_>) {
        let Some(known) = &self.known else { return };
        let (epoch, opened, leads) = (known.config.epoch, known.opened, &known.config.primary.node);
        let volume = self.volume;
        self.handed_over.retain(|handed| {
            let done = opened && epoch > handed.epoch;
            let late = handed.until <= cx.now;
            let Some(token) = handed.token else { return !done && !late };
            if done {
                let to = &handed.to;
                let meant = to.as_ref().is_none_or(|to| to == leads);
                let why = "another member has taken over";
                let other = ControlError::NotHandedOver { volume, to: to.clone(), why };
                let answer = if meant { Ok(ControlDone::Ok) } else { Err(other) };
                cx.out.push(Output::ControlDone(token, answer));
            } else if late {
                let interrupted = Err(ControlError::Interrupted(volume));
                cx.out.push(Output::ControlDone(token, interrupted));
            }
            !done && !late
        });
    }

    /// All other replicas that count now.
    pub fn others(&self, config: &Config) -> Vec<Member> {
        config.voters().filter(|member| member.replica != self.id).cloned().collect()
    }

    pub fn tell_newer(&self, to: (crate::api::PeerId, ReplicaId), cx: &mut Cx<'_>) {
        let newest = match (&self.sealing, &self.promise) {
            (Some(sealing), _) => &sealing.config,
            (None, Some(promise)) => &promise.config,
            (None, None) => return,
        };
        let message = ReplicaMessage::Newer { config: newest.clone() };
        cx.answer(to.0, to.1, self.sender(newest.epoch), message);
    }
}
