//! The secondary: takes entries (W2), acknowledges (W3), applies (W5).
//!
//! `matched` is volatile and belongs to one promised (epoch, instance): it starts at nothing with
//! each promise and each start, so what another primary wrote is never acknowledged or applied on
//! this one's word **(W3, W5)**. While a seal goes on nothing is taken and nothing acknowledged (T4).

use tercet_proto::message::{Envelope, ReplicaMessage};
use tercet_proto::{Entry, Lsn, Place};

use crate::api::{Notice, Output, PeerId};
use crate::cx::Cx;
use crate::options::canary;
use crate::replica::{Replica, Role};

impl Replica {
    /// Whether a message of a primary fits the durable promise and no seal is going on (W2, T4).
    pub fn fits_promise(&self, envelope: &Envelope, cx: &Cx<'_>) -> bool {
        let promised = self
            .promise
            .as_ref()
            .is_some_and(|p| p.epoch() == envelope.epoch && p.instance() == envelope.instance);
        let resumed = canary!(cx.options, ResumeOldEpoch)
            && self.promise.as_ref().is_some_and(|p| p.epoch() == envelope.epoch);
        (promised || resumed) && self.sealing.is_none()
    }

    /// W2: entries directly after `prev`, or the question whether `prev` matches.
    pub fn on_append(
        &mut self,
        peer: PeerId,
        envelope: &Envelope,
        (prev, commit): (Place, Place),
        entries: Vec<Entry>,
        cx: &mut Cx<'_>,
    ) {
        if !self.fits_promise(envelope, cx) {
            if canary!(cx.options, AckAfterPromise) {
                self.acknowledge_late(peer.clone(), envelope, prev, entries, cx);
            }
            if envelope.epoch < self.promised_epoch() {
                self.tell_newer((peer, envelope.from), cx);
            }
            return;
        }
        if !matches!(self.role, Role::Follower { .. }) {
            return; // its own epoch; nobody else has its number
        }
        self.hear_commit(commit, envelope, cx);
        if self.log.incomplete.is_some() {
            self.refuse((peer, envelope), prev, true, cx); // C2, S3: acknowledges nothing
            return;
        }
        if !self.log.has(cx.storage, prev) {
            self.refuse((peer, envelope), prev, false, cx);
            return;
        }
        let asked = entries.is_empty();
        let last = entries.last().map_or(prev, |entry| entry.header.place);
        match self.take_entries(entries, cx) {
            Taken::Appended | Taken::Nothing => {}
            Taken::Busy => return, // asked again by the primary
            Taken::Conflict(why) => {
                cx.out.push(Output::Fatal(why));
                return;
            }
        }
        if asked || last.lsn <= self.log.durable.lsn {
            self.matched_with_primary(last.lsn, cx);
        } else {
            self.note_matched(last.lsn, cx); // one acknowledgement for each durable event
        }
    }

    fn note_matched(&mut self, upto: Lsn, cx: &mut Cx<'_>) {
        let Role::Follower { matched } = &mut self.role else { unreachable!("checked before") };
        *matched = (*matched).max(upto);
        self.apply_committed(cx);
    }

    /// The log here is the primary's up to `upto` (W3): says so.
    pub fn matched_with_primary(&mut self, upto: Lsn, cx: &mut Cx<'_>) {
        self.note_matched(upto, cx);
        self.acknowledge(cx);
    }

    /// What T4 forbids: takes and acknowledges entries of an older epoch.
    fn acknowledge_late(
        &mut self,
        peer: PeerId,
        envelope: &Envelope,
        prev: Place,
        entries: Vec<Entry>,
        cx: &mut Cx<'_>,
    ) {
        let older = envelope.epoch < self.promised_epoch();
        let follows = matches!(self.role, Role::Follower { .. }) && self.log.has(cx.storage, prev);
        let Some(last) = entries.last().map(|entry| entry.header.place.lsn) else { return };
        if older && follows && matches!(self.take_entries(entries, cx), Taken::Appended) {
            let commit = self.log.heard.lsn;
            let ack = ReplicaMessage::Ack { length: last, matched: last, commit };
            cx.answer(peer, envelope.from, self.sender(envelope.epoch), ack);
        }
    }

    fn hear_commit(&mut self, commit: Place, envelope: &Envelope, cx: &mut Cx<'_>) {
        self.log.heard = self.log.heard.max(commit);
        if commit.epoch == envelope.epoch
            && let Some(known) = &mut self.known
            && known.config.epoch == envelope.epoch
            && !known.opened
        {
            known.opened = true;
            self.watch.served();
            self.tick(cx);
        }
    }

    fn refuse(
        &self,
        (peer, envelope): (PeerId, &Envelope),
        named: Place,
        incomplete: bool,
        cx: &mut Cx<'_>,
    ) {
        let applied = self.log.applied;
        let hint = self.log.not_after_nor_applied(cx.storage, named);
        let refusal = ReplicaMessage::Refuse { named, applied, hint, incomplete };
        cx.answer(peer, envelope.from, self.sender(envelope.epoch), refusal);
    }

    /// Appends what is new. What is there already is skipped: a duplicate drops nothing. A suffix
    /// of an older epoch is dropped in one durable step with what replaces it.
    fn take_entries(&mut self, mut entries: Vec<Entry>, cx: &mut Cx<'_>) -> Taken {
        let mut there = 0;
        for entry in &entries {
            let place = entry.header.place;
            if place.lsn > self.log.tail.lsn {
                break;
            }
            let own = cx.storage.header(self.volume, place.lsn);
            if own.is_some_and(|own| own.place == place && own != entry.header) {
                return Taken::Conflict(format!(
                    "volume {}: two different entries at epoch {} lsn {} (W2)",
                    self.volume, place.epoch, place.lsn
                ));
            }
            let same = own.map_or(place.lsn <= self.log.applied.lsn, |own| own.place == place);
            if !same {
                break;
            }
            there += 1;
        }
        entries.drain(..there);
        let Some(first) = entries.first() else { return Taken::Nothing };
        let after = first.header.prev().lsn;
        let drops = after < self.log.tail.lsn;
        if drops && after < self.log.applied.lsn {
            return Taken::Conflict(format!(
                "volume {}: epoch {} contradicts lsn {}, which is applied (W2)",
                self.volume, first.header.place.epoch, first.header.place.lsn
            ));
        }
        match self.log.append(cx.storage, drops.then_some(after), entries) {
            Ok(()) => Taken::Appended,
            Err(_) => Taken::Busy,
        }
    }

    /// W3: what is durable and matched with this primary in this epoch.
    pub fn acknowledge(&mut self, cx: &mut Cx<'_>) {
        if self.sealing.is_some() || self.log.incomplete.is_some() {
            return;
        }
        let (Role::Follower { matched }, Some(promise)) = (&self.role, &self.promise) else {
            return;
        };
        let mut length = (*matched).min(self.log.durable.lsn);
        if canary!(cx.options, AckUnmatchedSuffix) {
            length = self.log.durable.lsn;
        }
        let primary = &promise.config.primary;
        let to = promise.config.voters().find(|member| member.node == primary.node);
        let Some(to) = to.map(|member| member.replica) else { return };
        let node = primary.node.clone();
        let sender = self.sender(promise.epoch());
        let ack = ReplicaMessage::Ack { length, matched: *matched, commit: self.log.heard.lsn };
        cx.send(&node, to, sender, ack);
    }

    /// W5: the least of announced commit, matched in this epoch, durable here.
    pub fn apply_committed(&mut self, cx: &mut Cx<'_>) {
        let Role::Follower { matched } = self.role else { return };
        if self.sealing.is_some() || self.log.incomplete.is_some() {
            return;
        }
        let mut upto = self.log.heard.lsn.min(self.log.durable.lsn);
        if !canary!(cx.options, ApplyUnmatchedSuffix) {
            upto = upto.min(matched);
        }
        self.apply(upto, cx);
    }

    /// Applies, and tells hosts when the volume has grown.
    pub fn apply(&mut self, upto: Lsn, cx: &mut Cx<'_>) {
        if let Some(size_blocks) = self.log.apply(cx.storage, upto) {
            cx.out.push(Output::Resized(self.volume, size_blocks));
        }
    }

    /// S3: the clone shares its snapshot's chunks now. What it lacks of the log it is sent (C1).
    pub fn on_filled(&mut self, cx: &mut Cx<'_>) {
        if !self.log.awaits() {
            return; // a copy has begun meanwhile (C2)
        }
        self.log.incomplete = None;
        cx.out.push(Output::Notice(self.volume, Notice::Filled));
        self.complete_again(cx);
    }

    /// It counts from now on (S3, C2).
    pub fn complete_again(&mut self, cx: &mut Cx<'_>) {
        match &self.role {
            Role::Follower { .. } => self.acknowledge(cx),
            Role::Candidate(candidate) if candidate.has_answer(self.id) => self.sealed_self(cx),
            Role::Candidate(_) => {} // its seal is still to be complete
            Role::Primary(_) => unreachable!("who is incomplete never leads (T5)"),
        }
    }

    /// Storage says what is durable.
    pub fn on_durable(&mut self, place: Place, cx: &mut Cx<'_>) {
        let news = self.log.on_durable(cx.storage, place);
        if news {
            match self.role {
                Role::Follower { .. } => {
                    self.apply_committed(cx);
                    self.acknowledge(cx);
                }
                Role::Candidate(_) => {}
                Role::Primary(_) => self.advance(cx),
            }
        }
        self.tick_seal(cx);
    }
}

enum Taken {
    Appended,
    Nothing,
    /// Storage has no room for now.
    Busy,
    /// W2's alarm.
    Conflict(String),
}
