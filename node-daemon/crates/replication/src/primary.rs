//! The primary: orders (W1), counts what is committed (W4, T6), serves (T7), keeps or loses its
//! lease (L2, T8).
//!
//! A change goes into the own log and to both secondaries in one step (W1). Committed is the least
//! of what a majority has durable and what is durable here: this replica applies, reads and reports
//! only from its own durable log (W4). Nothing counts below the no-op of its own epoch (T6). What
//! the secondaries still lack is `catchup.rs`'s.

use std::collections::VecDeque;

use tercet_proto::message::Tail;
use tercet_proto::{
    BlockRange, Config, ConfigState, Entry, EntryHeader, EntryKind, Epoch, InstanceId, Instant,
    Lsn, Place, ReplicaId, SnapshotId, StorageError, Token,
};

use bytes::Bytes;

use crate::api::{Ana, AssociationId, ControlDone, HostDone, Notice, Output};
use crate::catchup::{MemberState, Recent};
use crate::copy_source::Outgoing;
use crate::cx::Cx;
use crate::hand_over::Leaving;
use crate::options::canary;
use crate::replica::{Replica, Role};

/// Who waits for an entry to be committed.
#[derive(Clone, Debug, Hash)]
pub(crate) enum Origin {
    /// Nobody: the no-op.
    Protocol,
    /// A host's command.
    Host(AssociationId, Token),
    /// Requests of the agent's, answered with the entry's place.
    Control { tokens: Vec<Token> },
}

/// An entry that is appended and not committed.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Pending {
    pub lsn: Lsn,
    pub kind: EntryKind,
    pub origin: Origin,
}

#[derive(Clone, Debug, Hash)]
pub(crate) struct Primary {
    pub config: Config,
    pub members: Vec<MemberState>,
    pub recent: Recent,
    /// In order of lsn; the first is the first that is not committed.
    pub window: VecDeque<Pending>,
    /// The no-op of this epoch, once it is appended (T6).
    pub noop: Option<Lsn>,
    /// Everything up to here is committed; nothing before the no-op is (T6).
    pub commit: Place,
    /// T7.
    pub serving: bool,
    attachments_known: bool,
    active_wanted: Option<Instant>,
    pub leaving: Option<Leaving>,
    /// How often a member was asked to follow, in this epoch.
    pub askings: u64,
    /// Reads of hosts at storage.
    pub reads: usize,
    /// What fused compare-and-writes compare at storage: no change of it is ordered meanwhile (L1).
    pub comparing: Vec<(AssociationId, Token, BlockRange)>,
    pub fence: Option<crate::hosts::FenceWanted>,
    /// What members copy from (C2).
    pub copies: Outgoing,
}

impl Primary {
    pub fn new(config: Config, own: ReplicaId, attachments_known: bool, now: Instant) -> Self {
        let members = MemberState::of(&config, own, now);
        Self {
            config,
            members,
            recent: Recent::default(),
            window: VecDeque::new(),
            noop: None,
            commit: Place::EMPTY,
            serving: false,
            attachments_known,
            active_wanted: None,
            leaving: None,
            askings: 0,
            reads: 0,
            comparing: Vec::new(),
            fence: None,
            copies: Outgoing::default(),
        }
    }

    pub fn epoch(&self) -> Epoch {
        self.config.epoch
    }

    /// The no-op of this epoch is committed (T6).
    pub fn settled(&self) -> bool {
        self.noop.is_some_and(|noop| self.commit.lsn >= noop)
    }

    pub fn member(&mut self, replica: ReplicaId) -> Option<&mut MemberState> {
        self.members.iter_mut().find(|member| member.replica == replica)
    }

    /// An edit within the epoch is known: Active drops the old quorum (T7, M1).
    /// Whoever has become a learner is asked for its promise at once.
    pub fn edited(&mut self, config: Config, own: ReplicaId) {
        let named = |m: &MemberState| config.everyone().any(|one| one.replica == m.replica);
        self.members.retain(named);
        for fresh in MemberState::of(&config, own, Instant(0)) {
            if self.member(fresh.replica).is_none() {
                self.members.push(fresh);
            }
        }
        self.config = config;
    }

    /// Requests of the agent's that are not answered yet.
    pub fn controls(&self) -> Vec<Token> {
        let waiting = self.window.iter().flat_map(|pending| match &pending.origin {
            Origin::Control { tokens } => tokens.clone(),
            _ => Vec::new(),
        });
        waiting.chain(self.leaving.as_ref().and_then(|leaving| leaving.token)).collect()
    }

    /// The last appended entry that overlaps and is not committed (L1).
    pub fn overlap(&self, range: BlockRange) -> Option<Lsn> {
        let touches = |kind: &EntryKind| match kind {
            EntryKind::Write { range: other, .. } | EntryKind::Zero { range: other, .. } => {
                other.overlaps(range)
            }
            _ => false,
        };
        self.window.iter().rev().find(|p| touches(&p.kind)).map(|p| p.lsn)
    }

    /// The entry of a snapshot that is appended and not committed.
    pub fn pending_snapshot(&mut self, id: SnapshotId) -> Option<&mut Pending> {
        self.window.iter_mut().find(|p| p.kind == EntryKind::Snapshot { id })
    }
}

impl Replica {
    /// T6: the no-op of the new epoch, and everyone is told.
    pub fn open(&mut self, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &mut self.role else { return };
        if primary.noop.is_some() {
            return;
        }
        primary.commit = self.log.applied;
        let lsn = self.log.tail.lsn.next();
        if self.append(EntryKind::Noop, Bytes::new(), Origin::Protocol, cx).is_ok()
            && let Role::Primary(primary) = &mut self.role
        {
            primary.noop = Some(lsn);
            self.advance(cx);
        }
    }

    /// W1: the next lsn, the own log and all secondaries, in one step.
    ///
    /// # Errors
    /// Storage refuses: nothing was changed, no number was used.
    pub fn append(
        &mut self,
        kind: EntryKind,
        payload: Bytes,
        origin: Origin,
        cx: &mut Cx<'_>,
    ) -> Result<Lsn, StorageError> {
        let Role::Primary(primary) = &mut self.role else { unreachable!("only a primary orders") };
        let before = self.log.tail;
        let place = Place { epoch: primary.config.epoch, lsn: before.lsn.next() };
        let header = EntryHeader { place, prev_epoch: before.epoch, kind };
        let entry = Entry { header, payload };
        self.log.append(cx.storage, None, vec![entry.clone()])?;
        primary.window.push_back(Pending { lsn: place.lsn, kind, origin });
        primary.recent.push(entry, &cx.options.limits);
        self.feed(cx);
        Ok(place.lsn)
    }

    /// W4, T6: what is committed now; answers, applies and announces.
    pub fn advance(&mut self, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &mut self.role else { return };
        let Some(noop) = primary.noop else { return };
        let durable = self.log.durable.lsn;
        let members = &primary.members;
        let value = |replica| match members.iter().find(|m| m.replica == replica) {
            Some(member) => member.counts().then_some(member.matched),
            None => (replica == self.id).then_some(durable),
        };
        let mut commit = primary.config.quorum_value(value).unwrap_or(Lsn(0)).min(durable);
        if canary!(cx.options, AckBeforeMajority) && durable >= noop {
            commit = durable;
        }
        let older = commit < noop && !canary!(cx.options, CountOlderEntry); // T6
        if older || commit <= primary.commit.lsn {
            return;
        }
        let place = self.log.place_at(cx.storage, commit).expect("a committed entry is retained");
        primary.commit = place;
        for member in &mut primary.members {
            member.in_sync.committed(commit, member.matched, cx.now);
        }
        self.log.heard = self.log.heard.max(place);
        self.apply(commit, cx);
        self.answer_committed(commit, cx);
        self.serve(cx);
        self.retry_held(cx);
        self.report_fence(cx);
        self.wake(cx.now + cx.options.timing.announce_after);
        self.leave(cx);
    }

    fn answer_committed(&mut self, commit: Lsn, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &mut self.role else { return };
        while primary.window.front().is_some_and(|pending| pending.lsn <= commit) {
            let pending = primary.window.pop_front().expect("looked at above");
            match pending.origin {
                Origin::Protocol => {}
                Origin::Host(association, token) => {
                    if self.hosts.answered(association) {
                        let done = Output::HostDone(association, token, Ok(HostDone::Ok));
                        cx.out.push(done);
                    }
                }
                Origin::Control { tokens } => {
                    let at = Place { epoch: primary.config.epoch, lsn: pending.lsn };
                    for token in tokens {
                        cx.out.push(Output::ControlDone(token, Ok(ControlDone::Place(at))));
                    }
                }
            }
        }
    }

    /// The attachments are from a consistent read of this epoch (T7).
    pub fn attachments_known(&mut self, cx: &mut Cx<'_>) {
        match &mut self.role {
            Role::Candidate(candidate) => candidate.attachments_known = true,
            Role::Primary(primary) => primary.attachments_known = true,
            Role::Follower { .. } => {}
        }
        self.serve(cx);
    }

    /// T7: only now, when the no-op is committed and the attachments are known.
    pub fn serve(&mut self, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &mut self.role else { return };
        let committed = primary.settled()
            || (canary!(cx.options, CountOlderEntry) && primary.commit == self.log.durable);
        if primary.serving || !committed {
            return;
        }
        if !primary.attachments_known {
            if self.reading.is_none() {
                self.read_object(cx);
            }
            return;
        }
        primary.serving = true;
        let epoch = primary.epoch();
        self.watch.served();
        if let Some(known) = &mut self.known
            && known.config.epoch == epoch
        {
            known.opened = true;
        }
        cx.out.push(Output::Notice(self.volume, Notice::Serving(epoch)));
        self.hosts.promoted(cx.out);
        self.check_lease(cx);
        self.want_fence(cx);
        self.want_active(cx);
        self.retry_held(cx);
    }

    /// T7: the swap to Active follows, holds up nobody, and is tried again until it is known.
    fn want_active(&mut self, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &mut self.role else { return };
        let recovering = primary.config.state == ConfigState::Recovering;
        let due = primary.active_wanted.is_none_or(|at| cx.now.since(at) >= cx.options.timing.beat);
        let alone = primary.leaves_config_alone();
        if !primary.serving || !recovering || !due || alone || self.swap.is_some() {
            return;
        }
        primary.active_wanted = Some(cx.now);
        let active =
            Config { state: ConfigState::Active, previous_members: None, ..primary.config.clone() };
        self.swap(active, cx);
    }

    /// L2, T8: without a lease no reads and the path inaccessible; on when a grant comes back.
    pub fn check_lease(&mut self, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &self.role else { return };
        if !primary.serving {
            return;
        }
        let open = !primary.drains() && self.has_lease(cx);
        let ana = if open { Ana::Optimized } else { Ana::Inaccessible };
        let news = self.ana() != ana;
        self.set_ana(ana, cx);
        if open {
            if let Some(until) =
                self.lease_until(cx).filter(|until| cx.now < *until && until.0 < u64::MAX)
            {
                self.wake(until);
            }
            if news {
                self.retry_held(cx);
            }
        }
    }

    /// What a primary looks after: members that lag, the lease, Active, a hand-over.
    pub fn tick_primary(&mut self, cx: &mut Cx<'_>) {
        self.open(cx);
        self.tick_members(cx);
        self.tick_copies(cx);
        self.serve(cx);
        self.check_lease(cx);
        self.want_active(cx);
        self.tick_change(cx);
        self.retry_held(cx);
        self.leave(cx);
    }

    /// A voter's seal answer that came after the majority (T4).
    pub fn member_sealed(
        &mut self,
        from: ReplicaId,
        instance: InstanceId,
        tail: Tail,
        cx: &mut Cx<'_>,
    ) {
        let Role::Primary(primary) = &mut self.role else { return };
        if let Some(member) = primary.member(from) {
            member.sealed(instance, &tail);
            self.feed(cx);
            self.check_lease(cx);
        }
    }
}

#[cfg(feature = "model")]
impl Primary {
    /// See `Node::forget_pace`.
    pub fn forget_pace(&mut self, paced: Instant) {
        if let Some(wanted) = &mut self.active_wanted {
            *wanted = paced;
        }
        self.members.iter_mut().for_each(|member| member.forget_pace(paced));
        self.copies.forget_pace(paced);
        if let Some(leaving) = &mut self.leaving {
            leaving.forget_pace(paced);
        }
    }
}
