//! The new primary before it leads: seals a majority (T4), adopts the largest tail (T5).
//!
//! Its compare-and-swap has taken place, so nobody else has this number. It seals itself by the
//! same steps as everyone (`seal.rs`), tells the others whose own seal answers it has, and looks
//! again at all answers with each new one: a later answer may be the larger tail, or the commit
//! that nobody had heard of before.

use std::collections::BTreeMap;

use tercet_proto::message::{Envelope, ReplicaMessage, Tail};
use tercet_proto::storage::Incomplete;
use tercet_proto::{Config, Entry, InstanceId, Instant, Lsn, Place, ReplicaId};

use crate::api::PeerId;
use crate::change::counted;
use crate::cx::{Cx, FetchRead, Purpose};
use crate::options::canary;
use crate::primary::Primary;
use crate::replica::{Replica, Role};
use crate::takeover::best;

#[derive(Clone, Debug, Hash)]
pub(crate) struct Candidate {
    pub config: Config,
    /// The seal answers, with the instance that gave each; this replica's own among them.
    answers: BTreeMap<ReplicaId, (InstanceId, Tail)>,
    /// The attachments are from a consistent read of this epoch or later (T7).
    pub attachments_known: bool,
    sent: Option<Instant>,
    fetch: Option<Fetch>,
}

#[derive(Clone, Debug, Hash)]
struct Fetch {
    source: ReplicaId,
    after: Place,
    sent: Instant,
}

impl Candidate {
    fn tails(&self) -> impl Iterator<Item = (&ReplicaId, &Tail)> {
        self.answers.iter().map(|(id, (_, tail))| (id, tail))
    }

    pub fn has_answer(&self, replica: ReplicaId) -> bool {
        self.answers.contains_key(&replica)
    }

    fn instances(&self) -> Vec<InstanceId> {
        self.answers.values().map(|(instance, _)| *instance).collect()
    }
}

impl Replica {
    /// T4 begins: the swap took place, or the first configuration names this instance (T9).
    pub fn start_candidate(&mut self, config: Config, cx: &mut Cx<'_>) {
        self.demote(cx);
        self.succession.forget();
        self.role = Role::Candidate(Box::new(Candidate {
            config: counted(config.clone(), cx),
            answers: BTreeMap::new(),
            attachments_known: false,
            sent: None,
            fetch: None,
        }));
        self.start_seal(config, cx);
        self.tick_candidate(cx);
    }

    /// Asks again whoever has not answered.
    pub fn tick_candidate(&mut self, cx: &mut Cx<'_>) {
        let Role::Candidate(candidate) = &mut self.role else { return };
        let due = candidate.sent.is_none_or(|at| cx.now.since(at) >= cx.options.timing.beat);
        if due {
            candidate.sent = Some(cx.now);
            self.send_seals(cx);
        }
        self.adopt(cx);
        self.abort_own_change(cx);
    }

    fn send_seals(&mut self, cx: &mut Cx<'_>) {
        let Role::Candidate(candidate) = &self.role else { return };
        let (config, sealed) = (candidate.config.clone(), candidate.instances());
        for member in self.others(&config) {
            let Role::Candidate(candidate) = &self.role else { return };
            if !candidate.answers.contains_key(&member.replica) {
                let seal = ReplicaMessage::Seal { config: config.clone(), sealed: sealed.clone() };
                cx.send(&member.node, member.replica, self.sender(config.epoch), seal);
            }
        }
    }

    /// This replica's own seal is complete.
    pub fn sealed_self(&mut self, cx: &mut Cx<'_>) {
        let tail = self.report(cx);
        self.on_sealed(self.id, cx.options.identity.instance, tail, cx);
    }

    /// A voter has sealed.
    pub fn on_sealed(
        &mut self,
        from: ReplicaId,
        instance: InstanceId,
        tail: Tail,
        cx: &mut Cx<'_>,
    ) {
        match &mut self.role {
            Role::Candidate(candidate) => {
                if !candidate.config.voters().any(|member| member.replica == from) {
                    return;
                }
                let news = candidate.answers.insert(from, (instance, tail)).is_none();
                if news {
                    self.seal_knows(&[instance], cx);
                    self.send_seals(cx); // the others need not wait out that one's grants (T4)
                }
                self.adopt(cx);
            }
            Role::Primary(_) => self.member_sealed(from, instance, tail, cx),
            Role::Follower { .. } => {}
        }
    }

    /// A voter's node says that the replica is not there: it counts in no majority (T9).
    pub fn on_no_replica(&mut self, envelope: &Envelope, cx: &mut Cx<'_>) {
        if canary!(cx.options, EmptyReplica) {
            let log_start = Lsn(1);
            let (tail, commit) = (Place::EMPTY, Place::EMPTY);
            let empty = Tail { tail, commit, log_start, incomplete: None };
            self.on_sealed(envelope.from, envelope.instance, empty, cx);
        }
    }

    /// T5: adopts, once a majority of both sets is sealed and its best tail is good enough.
    fn adopt(&mut self, cx: &mut Cx<'_>) {
        let Role::Candidate(candidate) = &mut self.role else { return };
        let answers = &candidate.answers;
        let own = answers.contains_key(&self.id);
        if !own || !candidate.config.is_quorum(|replica| answers.contains_key(&replica)) {
            return;
        }
        let fit = |tail: &Tail| tail.incomplete.is_none() || canary!(cx.options, AdoptIncomplete);
        let Some((source, target)) = best(candidate.tails().filter(|(_, tail)| fit(tail))) else {
            return;
        };
        let missing = candidate.config.voters().any(|m| !answers.contains_key(&m.replica));
        let reaches = |tail: &Tail| {
            let acknowledged = match tail.incomplete.map(Incomplete::acknowledged) {
                None => true,
                Some(Some(place)) => place <= target,
                Some(None) => !missing,
            };
            tail.commit <= target && acknowledged
        };
        let enough = candidate.tails().all(|(_, tail)| reaches(tail));
        if !enough && !canary!(cx.options, AdoptIncomplete) {
            return; // wait for another
        }
        if self.log.incomplete.is_some() {
            return; // never stands; named by the object it waits for others to take over
        }
        if self.log.tail == target || canary!(cx.options, AdoptOwn) {
            self.become_primary(cx);
        } else {
            self.fetch(source, target, cx);
        }
    }

    /// Asks the one with the largest tail for what follows this replica's last entry.
    fn fetch(&mut self, source: ReplicaId, target: Place, cx: &mut Cx<'_>) {
        let first = self.log.not_after_nor_applied(cx.storage, target);
        let Role::Candidate(candidate) = &mut self.role else { return };
        let after = match &candidate.fetch {
            Some(fetch) if fetch.source == source => {
                if cx.now.since(fetch.sent) < cx.options.timing.beat {
                    return;
                }
                fetch.after
            }
            _ => first,
        };
        self.send_fetch(source, after, cx);
    }

    fn send_fetch(&mut self, source: ReplicaId, after: Place, cx: &mut Cx<'_>) {
        let Role::Candidate(candidate) = &mut self.role else { return };
        candidate.fetch = Some(Fetch { source, after, sent: cx.now });
        let epoch = candidate.config.epoch;
        let node = candidate.config.voters().find(|m| m.replica == source).map(|m| m.node.clone());
        if let Some(node) = node {
            cx.send(&node, source, self.sender(epoch), ReplicaMessage::Fetch { after });
        }
    }

    /// The candidate that this replica has promised asks for entries; the log stands still.
    pub fn on_fetch(&mut self, peer: PeerId, envelope: &Envelope, after: Place, cx: &mut Cx<'_>) {
        let promised = self
            .promise
            .as_ref()
            .is_some_and(|p| p.epoch() == envelope.epoch && p.instance() == envelope.instance);
        if !promised || self.sealing.is_some() {
            return;
        }
        let has = self.log.place_at(cx.storage, after.lsn) == Some(after);
        // Behind the start of this log there is nothing to read (C2).
        let retained = cx.storage.header(self.volume, after.lsn.next()).is_some();
        if !has || !retained {
            let hint = self.log.not_after(cx.storage, after);
            let miss = ReplicaMessage::Fetched { after, hint, entries: Vec::new() };
            cx.answer(peer, envelope.from, self.sender(envelope.epoch), miss);
            return;
        }
        let read = FetchRead { epoch: envelope.epoch, peer, to: envelope.from, after };
        let token = cx.tokens.issue(Purpose::FetchRead(self.volume, read));
        let bytes_max = cx.options.limits.chunk_bytes;
        cx.storage.read_log(self.volume, after.lsn.next(), bytes_max, token);
    }

    /// Storage has the entries that a candidate asked for.
    pub fn on_fetch_read(&mut self, read: FetchRead, entries: Vec<Entry>, cx: &mut Cx<'_>) {
        let FetchRead { epoch, peer, to, after } = read;
        let still = self.promise.as_ref().is_some_and(|p| p.epoch() == epoch);
        if still && self.sealing.is_none() {
            let fetched = ReplicaMessage::Fetched { after, hint: after, entries };
            cx.answer(peer, to, self.sender(epoch), fetched);
        }
    }

    /// Entries of the largest tail: what contradicts them here is dropped with the same append.
    pub fn on_fetched(
        &mut self,
        envelope: &Envelope,
        (after, hint): (Place, Place),
        entries: Vec<Entry>,
        cx: &mut Cx<'_>,
    ) {
        let Role::Candidate(candidate) = &mut self.role else { return };
        let asked = candidate
            .fetch
            .as_ref()
            .is_some_and(|fetch| fetch.source == envelope.from && fetch.after == after);
        if !asked || candidate.config.epoch != envelope.epoch {
            return;
        }
        let Some(last) = entries.last().map(|entry| entry.header.place) else {
            let lower = self.log.not_after_nor_applied(cx.storage, hint);
            if lower != after {
                self.send_fetch(envelope.from, lower, cx);
            }
            return; // same place again: behind the start of its log (C2)
        };
        let follows = entries[0].header.prev() == after && after.lsn >= self.log.applied.lsn;
        if !follows {
            return;
        }
        let drops = after.lsn < self.log.tail.lsn;
        if self.log.append(cx.storage, drops.then_some(after.lsn), entries).is_err() {
            return; // no room for now: asked again with the next beat
        }
        candidate.fetch = Some(Fetch { source: envelope.from, after: last, sent: Instant(0) });
        self.adopt(cx);
    }

    /// T6: leads from here on; its first entry is a no-op of the new epoch.
    fn become_primary(&mut self, cx: &mut Cx<'_>) {
        let Role::Candidate(candidate) = std::mem::replace(&mut self.role, Role::FOLLOWER) else {
            unreachable!("called by a candidate")
        };
        let Candidate { config, answers, attachments_known, .. } = *candidate;
        let mut primary = Primary::new(config, self.id, attachments_known, cx.now);
        for (replica, (instance, tail)) in &answers {
            if let Some(member) = primary.member(*replica) {
                member.sealed(*instance, tail);
            }
        }
        self.role = Role::Primary(Box::new(primary));
        self.open(cx);
    }
}

#[cfg(feature = "model")]
impl Candidate {
    /// See `Node::forget_pace`.
    pub fn forget_pace(&mut self, paced: Instant) {
        if let Some(sent) = &mut self.sent {
            *sent = paced;
        }
        if let Some(fetch) = &mut self.fetch {
            fetch.sent = paced;
        }
    }
}
