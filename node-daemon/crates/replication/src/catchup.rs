//! What each secondary lacks, and how it gets it (W1, W2, W7, C1).
//!
//! The newest entries stay in memory, bounded in number and bytes ([`Recent`]): that is the queue to
//! every secondary at once. Who acknowledges in time is sent each entry when it is made. Who falls
//! out of that bound is lagging (W7): it costs no memory and is served from the log in chunks, the
//! next when the last is acknowledged, until it has caught up with the queue (C1).
//!
//! Lost or overtaken messages are found by a *probe*: one message that names the last entry sent.
//! A secondary that has it says so; one that has not names its last entry that is not after it, and
//! the next probe starts there, so matching always comes to an end (W2).

use std::collections::VecDeque;

use tercet_proto::message::{ENTRIES_MAX, Envelope, ReplicaMessage, Tail};
use tercet_proto::{
    Config, Entry, Epoch, InstanceId, Instant, Lsn, Member, NodeName, Place, ReplicaId,
    StorageError, VolumeId,
};

use crate::api::{MemberStatus, Notice, Output};
use crate::cx::{Cx, Purpose, Sender};
use crate::in_sync::InSync;
use crate::log::Log;
use crate::options::Limits;
use crate::primary::Primary;
use crate::replica::{Replica, Role};

/// M1: entries that a learner may be behind what is committed when it takes a member's place.
const KEEPS_UP_ENTRIES: u64 = 64;

/// The newest entries of the log (W7).
#[derive(Clone, Debug, Hash, Default)]
pub(crate) struct Recent {
    entries: VecDeque<Entry>,
    bytes: usize,
}

impl Recent {
    pub fn push(&mut self, entry: Entry, limits: &Limits) {
        self.bytes += entry.payload.len();
        self.entries.push_back(entry);
        while self.entries.len() > limits.recent_entries || self.bytes > limits.recent_bytes {
            let oldest = self.entries.pop_front().expect("over a limit");
            self.bytes -= oldest.payload.len();
            if self.entries.is_empty() {
                break;
            }
        }
    }

    /// Whether everything after `lsn` is here.
    fn reaches(&self, lsn: Lsn, tail: Lsn) -> bool {
        lsn >= tail
            || self.entries.front().is_some_and(|first| first.header.place.lsn <= lsn.next())
    }

    /// Forgets what every secondary has acknowledged.
    fn forget(&mut self, upto: Lsn) {
        while self.entries.front().is_some_and(|first| first.header.place.lsn <= upto) {
            let oldest = self.entries.pop_front().expect("looked at above");
            self.bytes -= oldest.payload.len();
        }
    }

    /// Entries after `lsn`, in messages of bounded size: the first.
    fn after(&self, lsn: Lsn, limits: &Limits) -> Vec<Entry> {
        let Some(first) = self.entries.front() else { return Vec::new() };
        let skip = (lsn.next().0 - first.header.place.lsn.0) as usize;
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += entry.payload.len();
            bytes <= limits.chunk_bytes || bytes == entry.payload.len()
        };
        self.entries.iter().skip(skip).take(ENTRIES_MAX).take_while(fits).cloned().collect()
    }
}

/// What the primary knows of another voter, or of a learner.
#[derive(Clone, Debug, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts of one member")]
pub(crate) struct MemberState {
    pub replica: ReplicaId,
    pub node: NodeName,
    /// It is fed like the others and counts nowhere (M1).
    pub learner: bool,
    /// Durable and matched in this epoch (W3).
    pub matched: Lsn,
    /// Which instance answered in this epoch: its pair's grants count (L3).
    pub answered: Option<InstanceId>,
    sealed: bool,
    incomplete: bool,
    pub in_sync: InSync,
    /// The commit that it has heard of.
    heard: Lsn,
    /// Sent up to here.
    sent: Lsn,
    /// The place that the last probe named: nothing else is sent before it is answered.
    probing: Option<Place>,
    /// Served from the log (W7, C1).
    lagging: bool,
    /// It lacks what this log no longer has: only a copy helps (C2).
    beyond: bool,
    /// An entry that it lacks cannot be read from this log: the log is as good as cut (C4).
    pub unreadable: bool,
    reading: bool,
    /// When it last said something new, or was last probed.
    progress: Instant,
}

impl MemberState {
    fn new(member: &Member, learner: bool, now: Instant) -> Self {
        Self {
            replica: member.replica,
            node: member.node.clone(),
            learner,
            matched: Lsn(0),
            answered: None,
            sealed: false,
            incomplete: false,
            in_sync: InSync::default(),
            heard: Lsn(0),
            sent: Lsn(0),
            probing: None,
            lagging: false,
            beyond: false,
            unreadable: false,
            reading: false,
            progress: now,
        }
    }

    /// Everyone but `own`.
    pub fn of(config: &Config, own: ReplicaId, now: Instant) -> Vec<Self> {
        let voters = config.voters().map(|one| Self::new(one, false, now));
        let learners = config.learners.iter().map(|one| Self::new(one, true, now));
        voters.chain(learners).filter(|one| one.replica != own).collect()
    }

    /// It has sealed for this epoch; its tail is where matching starts.
    pub fn sealed(&mut self, instance: InstanceId, tail: &Tail) {
        self.answered = Some(instance);
        if !self.sealed {
            self.sealed = true;
            self.incomplete = tail.incomplete.is_some();
            self.probing = Some(tail.tail);
            self.sent = Lsn(u64::MAX); // the probe is still to be sent
        }
    }

    /// Whether its acknowledgements count (W4, C2).
    pub fn counts(&self) -> bool {
        self.sealed && !self.incomplete
    }

    /// Says it when the member is in sync from now on, or is not any more.
    fn tell_in_sync(&mut self, volume: VolumeId, commit: Lsn, cx: &mut Cx<'_>) {
        let holds = self.counts() && self.in_sync.holds(self.matched, commit, cx.now);
        if self.in_sync.changes(holds) {
            let notice = Notice::MemberInSync(self.node.clone(), holds);
            cx.out.push(Output::Notice(volume, notice));
        }
    }

    /// Whether it is within the log (M1), so that its acknowledgements are soon as good as any.
    pub fn keeps_up(&self, commit: Lsn) -> bool {
        self.counts() && !self.beyond && self.matched.0 + KEEPS_UP_ENTRIES >= commit.0
    }

    /// Whether it is offered a copy (C2). Who is complete decides itself whether to give up what it
    /// has (`copy_target`); before the no-op is committed it may be the one that has to take it (T6).
    pub fn needs_copy(&self) -> bool {
        self.sealed && (self.incomplete || self.beyond)
    }

    /// It is no complete copy, or is one again: either way nothing is known of its log any more.
    fn set_incomplete(&mut self, incomplete: bool) {
        if self.incomplete != incomplete {
            self.incomplete = incomplete;
            self.in_sync = InSync::default();
            self.unreadable &= incomplete; // a copy has gone past it
            (self.matched, self.sent) = (Lsn(0), Lsn(u64::MAX));
            self.probing = Some(Place { epoch: Epoch(u64::MAX), lsn: Lsn(u64::MAX) });
        }
    }

    fn has_probe_to_send(&self) -> bool {
        self.sent == Lsn(u64::MAX)
    }
}

/// Borrowed from the replica while members are fed.
struct Feed<'a> {
    log: &'a Log,
    from: Sender,
    commit: Place,
    recent: &'a Recent,
}

impl Feed<'_> {
    /// Starts a probe at the last own entry that is not after `hint`.
    fn probe(&self, member: &mut MemberState, hint: Place, cx: &mut Cx<'_>) {
        let named = self.log.not_after(cx.storage, hint);
        let entries = if self.recent.reaches(named.lsn, self.log.tail.lsn) {
            self.recent.after(named.lsn, &cx.options.limits)
        } else {
            Vec::new()
        };
        member.probing = Some(named);
        member.progress = cx.now;
        member.sent = entries.last().map_or(named, |entry| entry.header.place).lsn;
        self.send(member, named, entries, cx);
    }

    /// Asks whether what was sent has arrived.
    fn ask(&self, member: &mut MemberState, cx: &mut Cx<'_>) {
        let sent = self.log.place_at(cx.storage, member.sent).unwrap_or(self.log.applied);
        member.probing = Some(sent);
        member.progress = cx.now;
        self.send(member, sent, Vec::new(), cx);
    }

    /// Asks whether it still is incomplete: an acknowledgement says that it is not (S3, C2). Every
    /// log has the place before its first entry. It hears of the commit, too (T5).
    fn ask_if_complete(&self, member: &mut MemberState, cx: &mut Cx<'_>) {
        member.progress = cx.now;
        self.send(member, Place::EMPTY, Vec::new(), cx);
    }

    /// Tells the commit; nothing waits for the answer.
    fn announce(&self, member: &mut MemberState, cx: &mut Cx<'_>) {
        member.progress = cx.now;
        self.send(member, self.log.tail, Vec::new(), cx);
    }

    fn send(&self, member: &MemberState, prev: Place, entries: Vec<Entry>, cx: &mut Cx<'_>) {
        let append = ReplicaMessage::Append { prev, commit: self.commit, entries };
        cx.send(&member.node, member.replica, self.from, append);
    }

    /// Sends what is new, or begins to read it from the log.
    fn feed(&self, member: &mut MemberState, cx: &mut Cx<'_>) {
        if !member.counts() {
            return;
        }
        if member.has_probe_to_send() {
            let hint = member.probing.expect("set with the mark");
            self.probe(member, hint, cx);
            return;
        }
        if member.probing.is_some() || member.reading {
            return;
        }
        let tail = self.log.tail.lsn;
        // W7: who has not acknowledged what the queue has let go of is lagging.
        member.lagging |= !self.recent.reaches(member.matched, tail);
        if member.lagging && member.matched < member.sent {
            return; // paced: the next chunk when the last is acknowledged (C1)
        }
        while member.sent < tail && self.recent.reaches(member.sent, tail) {
            let entries = self.recent.after(member.sent, &cx.options.limits);
            let prev = entries[0].header.prev();
            member.sent = entries.last().expect("at least one").header.place.lsn;
            member.lagging = false;
            self.send(member, prev, entries, cx);
        }
        if member.sent < tail {
            member.lagging = true;
            if cx.storage.header(self.from.volume, member.sent.next()).is_none() {
                member.beyond = true; // the log has been cut since
                return;
            }
            member.reading = true;
            let purpose = Purpose::LagRead(self.from.volume, self.from.epoch, member.replica);
            let token = cx.tokens.issue(purpose);
            let bytes_max = cx.options.limits.chunk_bytes;
            cx.storage.read_log(self.from.volume, member.sent.next(), bytes_max, token);
        }
    }
}

/// Splits a replica into what feeds and who is fed.
fn split(replica: &mut Replica) -> Option<(Feed<'_>, &mut Vec<MemberState>)> {
    let from = replica.sender(replica.known_epoch());
    let Role::Primary(primary) = &mut replica.role else { return None };
    let Primary { config, members, recent, commit, .. } = &mut **primary;
    let from = Sender { epoch: config.epoch, ..from };
    Some((Feed { log: &replica.log, from, commit: *commit, recent }, members))
}

impl Replica {
    /// Sends every member what it lacks.
    pub fn feed(&mut self, cx: &mut Cx<'_>) {
        if let Some((feed, members)) = split(self) {
            for member in members {
                feed.feed(member, cx);
            }
        }
    }

    /// W3's acknowledgement, at the primary.
    pub fn on_ack(
        &mut self,
        envelope: &Envelope,
        (length, matched, commit): (Lsn, Lsn, Lsn),
        cx: &mut Cx<'_>,
    ) {
        let volume = self.volume;
        if self.leading_epoch() != Some(envelope.epoch) {
            return;
        }
        let Some((feed, members)) = split(self) else { return };
        let Some(member) = members.iter_mut().find(|m| m.replica == envelope.from) else { return };
        let first = member.answered != Some(envelope.instance);
        member.answered = Some(envelope.instance);
        member.sealed = true;
        let again = member.incomplete;
        member.set_incomplete(false);
        member.beyond = false;
        member.heard = member.heard.max(commit);
        member.progress = cx.now;
        member.matched = member.matched.max(length.min(feed.log.tail.lsn));
        if again {
            // Whatever it had before, where its log ends now is to be found out.
        } else if member.has_probe_to_send() || member.probing.is_some_and(|p| p.lsn <= matched) {
            let hint = member.probing.take();
            if member.has_probe_to_send() {
                member.sent = hint.map_or(matched, |place| place.lsn).min(matched);
            }
        }
        if !member.has_probe_to_send() {
            member.sent = member.sent.max(member.matched);
        }
        member.in_sync.acknowledged(member.matched, feed.commit.lsn, cx.now);
        member.tell_in_sync(volume, feed.commit.lsn, cx);
        feed.feed(member, cx);
        let in_step = members.iter().filter(|m| m.counts() && !m.lagging);
        let least = in_step.map(|m| m.matched).min();
        if let (Some(least), Role::Primary(primary)) = (least, &mut self.role) {
            primary.recent.forget(least);
        }
        self.advance(cx);
        if first {
            self.check_lease(cx);
        }
    }

    /// W2's refusal: the next probe starts lower, or what was sent is sent again.
    pub fn on_refuse(
        &mut self,
        envelope: &Envelope,
        (named, applied, hint): (Place, Place, Place),
        incomplete: bool,
        cx: &mut Cx<'_>,
    ) {
        if self.leading_epoch() != Some(envelope.epoch) {
            return;
        }
        let Some((feed, members)) = split(self) else { return };
        let Some(member) = members.iter_mut().find(|m| m.replica == envelope.from) else { return };
        let first = member.answered != Some(envelope.instance);
        member.answered = Some(envelope.instance);
        member.set_incomplete(incomplete);
        let answers = member.probing.is_none_or(|probing| probing == named);
        let hint = hint.max(applied);
        // Where its place is cut from this log, asking again at once would go on for ever (C2).
        let lower = feed.log.not_after(cx.storage, hint) != named;
        if !incomplete && answers && !member.has_probe_to_send() {
            if lower {
                feed.probe(member, hint, cx);
            } else {
                member.beyond = true;
            }
        }
        if first {
            self.check_lease(cx);
        }
    }

    /// C1: a chunk of the log for a lagging member.
    pub fn on_lag_read(
        &mut self,
        to: ReplicaId,
        result: Result<Vec<Entry>, StorageError>,
        cx: &mut Cx<'_>,
    ) {
        let Some((feed, members)) = split(self) else { return };
        let Some(member) = members.iter_mut().find(|m| m.replica == to) else { return };
        member.reading = false;
        let entries = match result {
            Ok(entries) => entries,
            Err(StorageError::Checksum { .. }) => {
                (member.beyond, member.unreadable) = (true, true); // a copy helps (C2)
                return;
            }
            Err(_) => return, // cut meanwhile, or failed: the next beat
        };
        let follows = entries.first().is_some_and(|e| e.header.place.lsn == member.sent.next());
        if !follows || member.probing.is_some() || member.has_probe_to_send() {
            return;
        }
        let prev = entries[0].header.prev();
        member.sent = entries.last().expect("at least one").header.place.lsn;
        member.progress = cx.now;
        feed.send(member, prev, entries, cx);
    }

    /// Asks members that have not answered, announces commits that no entry carried (W5).
    pub fn tick_members(&mut self, cx: &mut Cx<'_>) {
        let (beat, announce) = (cx.options.timing.beat, cx.options.timing.announce_after);
        let config = match &self.role {
            Role::Primary(primary) => primary.config.clone(),
            _ => return,
        };
        let Some((feed, members)) = split(self) else { return };
        let mut again = None;
        for member in members {
            let waited = cx.now.since(member.progress);
            member.tell_in_sync(feed.from.volume, feed.commit.lsn, cx);
            if !member.sealed {
                if waited >= beat {
                    member.progress = cx.now;
                    let seal = ReplicaMessage::Seal { config: config.clone(), sealed: Vec::new() };
                    cx.send(&member.node, member.replica, feed.from, seal);
                }
                continue;
            }
            if member.incomplete {
                if waited >= beat {
                    feed.ask_if_complete(member, cx);
                }
                continue;
            }
            let behind = member.matched < feed.log.tail.lsn || member.heard < feed.commit.lsn;
            if member.has_probe_to_send() {
                feed.feed(member, cx);
            } else if behind && waited >= beat {
                member.lagging |=
                    cx.pairs.route(&member.node, member.replica, feed.from.volume).is_none();
                feed.ask(member, cx);
            } else if member.heard < feed.commit.lsn && member.probing.is_none() {
                if waited >= announce && member.matched == feed.log.tail.lsn {
                    feed.announce(member, cx);
                } else {
                    again = Some(cx.now + announce);
                }
            } else {
                feed.feed(member, cx);
            }
        }
        if let Some(at) = again {
            self.wake(at);
        }
    }

    /// A link is up: what was sent may be lost.
    pub fn on_peer_up(&mut self, node: &NodeName, cx: &mut Cx<'_>) {
        self.repairs_peer_up(node, cx);
        match &mut self.role {
            Role::Primary(_) => {
                let Some((feed, members)) = split(self) else { return };
                for member in members.iter_mut().filter(|m| m.node == *node) {
                    member.heard = Lsn(0); // a new instance has forgotten the commit: asked until told
                    if member.counts() && !member.has_probe_to_send() {
                        feed.ask(member, cx);
                    } else {
                        member.progress = Instant(0); // seals are sent at once
                    }
                }
                self.tick_primary(cx);
            }
            _ => self.tick(cx),
        }
    }

    /// Every voter, this replica included, and every learner, for `status`.
    pub fn member_statuses(&self) -> Vec<MemberStatus> {
        let Role::Primary(primary) = &self.role else { return Vec::new() };
        let tail = self.log.tail.lsn;
        let status = |voter: &Member| {
            let member = primary.members.iter().find(|m| m.replica == voter.replica);
            let matched = member.map_or(self.log.durable.lsn, |m| m.matched);
            MemberStatus {
                node: voter.node.clone(),
                replica: voter.replica,
                matched,
                lag_bytes: primary.recent.lag_bytes(matched, tail),
                in_sync: member.is_none_or(|m| m.counts() && m.in_sync.told()),
                incomplete: member.is_some_and(|m| m.incomplete),
                learner: member.is_some_and(|m| m.learner),
                copy: primary.copies.status(voter.replica),
            }
        };
        primary.config.everyone().map(status).collect()
    }

    /// The members that have everything, the named node first: who may follow (hand-over).
    pub fn successor(&self, wanted: Option<&NodeName>) -> Option<Member> {
        let Role::Primary(primary) = &self.role else { return None };
        let tail = self.log.tail.lsn;
        let ready = |m: &&MemberState| {
            m.counts()
                && m.matched == tail
                && primary.config.is_member(m.replica)
                && wanted.is_none_or(|node| *node == m.node)
        };
        let member = primary.members.iter().find(ready)?;
        Some(Member { node: member.node.clone(), replica: member.replica })
    }
}

impl Recent {
    /// Bytes that lie between, as far as they are in memory; at least a block for each other entry.
    fn lag_bytes(&self, matched: Lsn, tail: Lsn) -> u64 {
        let lacking = tail.0.saturating_sub(matched.0);
        let known = self.entries.iter().rev().take(lacking as usize);
        let (count, bytes) = known
            .fold((0, 0), |(count, bytes), entry| (count + 1, bytes + entry.payload.len() as u64));
        bytes + (lacking - count) * tercet_proto::BLOCK_BYTES as u64
    }
}

#[cfg(feature = "model")]
impl MemberState {
    /// See `Node::forget_pace`.
    pub fn forget_pace(&mut self, paced: Instant) {
        self.progress = paced;
        self.in_sync.forget_pace();
    }
}
