//! Being sealed (T4): stop, drain, promise durably, wait out grants, and only then answer.
//!
//! The order is the rule. From the first moment nothing is accepted and nothing acknowledged; the
//! volume goes on the holder's exclusions before anything else (L3); the tail is read last, when no
//! log write is in flight and no grant is out. A candidate seals itself by the same steps.

use std::collections::BTreeSet;

use tercet_proto::message::{Envelope, ReplicaMessage};
use tercet_proto::{Config, Epoch, InstanceId, Instant, NodeName, Promise, StorageError, Token};

use crate::api::{Output, PeerId};
use crate::cx::{Cx, Purpose};
use crate::options::canary;
use crate::replica::{Replica, Role};

/// A seal that goes on.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Sealing {
    /// What is promised.
    pub config: Config,
    step: Step,
    /// Instances whose own seal answer the new primary has.
    sealed: BTreeSet<InstanceId>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Log writes are in flight.
    Drain,
    /// The promise is on its way to the device.
    Promise(Token),
    /// Durable; grants are out.
    Wait,
}

/// Grants of this replica that may be out, to whichever instance holds them (T4).
#[derive(Clone, Debug, Hash, Default)]
pub(crate) struct GrantsOut {
    out: Vec<GrantOut>,
    /// Final for that (epoch, instance) (L5).
    given_back: BTreeSet<(Epoch, InstanceId)>,
}

#[derive(Clone, Debug, Hash)]
struct GrantOut {
    epoch: Epoch,
    /// The node on which the holder is, and its instance.
    node: NodeName,
    holder: InstanceId,
    until: Instant,
}

impl GrantsOut {
    pub fn give_back(&mut self, epoch: Epoch, holder: InstanceId) {
        self.given_back.retain(|(older, _)| older.0 + 8 > epoch.0); // bounded: the last few epochs
        self.given_back.insert((epoch, holder));
    }

    pub fn is_given_back(&self, epoch: Epoch, holder: InstanceId) -> bool {
        self.given_back.contains(&(epoch, holder))
    }

    /// Until when to wait, but for holders that cannot read any more.
    fn until(
        &mut self,
        now: Instant,
        harmless: impl Fn(&NodeName, InstanceId) -> bool,
    ) -> Option<Instant> {
        self.out.retain(|grant| grant.until > now);
        let back = &self.given_back;
        let waits = |grant: &&GrantOut| {
            !harmless(&grant.node, grant.holder) && !back.contains(&(grant.epoch, grant.holder))
        };
        self.out.iter().filter(waits).map(|grant| grant.until).max()
    }
}

/// L4: until when a predecessor's grants may be out, which nobody remembers: D after the lock.
pub(crate) fn forgotten(cx: &Cx<'_>) -> Option<Instant> {
    let until = cx.options.identity.locked_at + cx.options.timing.lease;
    (until > cx.now && !canary!(cx.options, ForgetGrants)).then_some(until)
}

impl Replica {
    /// A new primary asks for the promise.
    pub fn on_seal(
        &mut self,
        peer: PeerId,
        envelope: &Envelope,
        config: Config,
        sealed: Vec<InstanceId>,
        cx: &mut Cx<'_>,
    ) {
        let counts = config.everyone().any(|m| m.replica == self.id);
        let fits = config.epoch == envelope.epoch
            && config.primary.instance == envelope.instance
            && config.primary.node == peer.node
            && counts;
        if !fits {
            return;
        }
        let promised = self.promised_epoch();
        let to_another = self.promised_instance() != Some(envelope.instance);
        let older = config.epoch < promised && !canary!(cx.options, IgnorePromised);
        let twice =
            config.epoch == promised && to_another && !canary!(cx.options, PromiseTwoInstances);
        if older || twice {
            self.tell_newer((peer, envelope.from), cx);
            return;
        }
        self.learn(&config, false, cx);
        if config.epoch != promised || to_another {
            self.start_seal(config, cx);
        }
        match &mut self.sealing {
            Some(sealing) => {
                sealing.sealed.extend(sealed);
                self.tick_seal(cx);
            }
            None => self.seal_again(sealed, cx),
        }
    }

    /// Promised already. This instance answers at once, for it has waited; but a promise that a
    /// predecessor made durable says nothing of the predecessor's grants, which may be out (L4).
    fn seal_again(&mut self, sealed: Vec<InstanceId>, cx: &mut Cx<'_>) {
        if let (Some(promise), Some(_)) = (&self.promise, forgotten(cx)) {
            let (config, sealed) = (promise.config.clone(), sealed.into_iter().collect());
            self.sealing = Some(Sealing { config, step: Step::Wait, sealed });
            self.tick_seal(cx);
        } else {
            self.answer_seal(cx);
        }
    }

    /// The instance promised, durable or on the way.
    fn promised_instance(&self) -> Option<InstanceId> {
        match (&self.sealing, &self.promise) {
            (Some(sealing), _) => Some(sealing.config.primary.instance),
            (None, Some(promise)) => Some(promise.instance()),
            (None, None) => None,
        }
    }

    /// T4: from here on nothing older is accepted or acknowledged.
    pub fn start_seal(&mut self, config: Config, cx: &mut Cx<'_>) {
        if self.leading_epoch().is_some_and(|epoch| epoch < config.epoch) {
            self.demote(cx); // T8
        }
        if let Some(promise) = &self.promise {
            // L3: before the seal starts, the holder's list; then D from the last grant without it.
            let (epoch, holder) = (promise.epoch(), promise.instance());
            if let Some(granted) = cx.pairs.exclude(holder, self.volume, epoch) {
                let until = granted + cx.options.timing.lease;
                let node = promise.config.primary.node.clone();
                self.grants.out.push(GrantOut { epoch, node, holder, until });
            }
        }
        self.incoming.stop(); // it was on the word of who led before (C2)
        self.sealing = Some(Sealing { config, step: Step::Drain, sealed: BTreeSet::new() });
        self.tick_seal(cx);
    }

    /// A candidate has another instance's own seal answer: nobody waits out its grants (T4).
    pub fn seal_knows(&mut self, sealed: &[InstanceId], cx: &mut Cx<'_>) {
        if let Some(sealing) = &mut self.sealing {
            sealing.sealed.extend(sealed);
            self.tick_seal(cx);
        }
    }

    /// Takes the next step of a seal, when it is time for it.
    pub fn tick_seal(&mut self, cx: &mut Cx<'_>) {
        let Some(sealing) = &mut self.sealing else { return };
        if sealing.step == Step::Drain && !cx.storage.in_flight(self.volume) {
            let token = cx.tokens.issue(Purpose::Promise(self.volume));
            sealing.step = Step::Promise(token);
            let promise = Promise { config: sealing.config.clone() };
            cx.storage.set_promise(self.volume, promise, token);
        }
        if sealing.step == Step::Wait {
            self.wait_out_grants(cx);
        }
    }

    /// The promise is durable, or storage has failed.
    pub fn on_promised(
        &mut self,
        token: Token,
        result: &Result<(), StorageError>,
        cx: &mut Cx<'_>,
    ) {
        let Some(sealing) = &mut self.sealing else { return };
        if sealing.step != Step::Promise(token) {
            return; // a newer seal has begun meanwhile
        }
        if result.is_err() {
            return; // the device has failed: `Failed` follows, and nothing is ever answered
        }
        sealing.step = Step::Wait;
        let before = self.promise.replace(Promise { config: sealing.config.clone() });
        if before.is_some_and(|before| !before.config.voters().eq(sealing.config.voters())) {
            // Which member this is may be another by now (H1): the path is told again.
            cx.out.push(Output::Ana(self.volume, self.ana()));
        }
        if matches!(self.role, Role::Follower { .. }) {
            self.role = Role::FOLLOWER; // nothing is matched in this epoch yet (W3)
        }
        self.tick_seal(cx);
    }

    fn wait_out_grants(&mut self, cx: &mut Cx<'_>) {
        let Some(sealing) = &self.sealing else { return };
        let new_primary = sealing.config.primary.instance;
        let until = self.grants.until(cx.now, |node, holder| {
            holder == new_primary || sealing.sealed.contains(&holder) || cx.has_exited(node, holder)
        });
        let until = until.max(forgotten(cx));
        if let Some(until) = until
            && !canary!(cx.options, SealWithoutWait)
        {
            self.wake(until);
            return;
        }
        self.sealing = None;
        self.answer_seal(cx);
    }

    /// Only now the tail is read and told (T4).
    fn answer_seal(&mut self, cx: &mut Cx<'_>) {
        let Some(promise) = &self.promise else { return };
        let (config, epoch) = (&promise.config, promise.epoch());
        if let Role::Candidate(candidate) = &self.role
            && candidate.config.epoch == epoch
        {
            self.sealed_self(cx);
            return;
        }
        let node = config.primary.node.clone();
        let to = config.voters().find(|member| member.node == node).map(|member| member.replica);
        let Some(to) = to else { return };
        let tail = self.report(cx);
        cx.send(&node, to, self.sender(epoch), ReplicaMessage::Sealed(tail));
    }

    /// L5: this holder reads no more in this epoch, for ever.
    pub fn on_give_back(&mut self, epoch: Epoch, holder: InstanceId, cx: &mut Cx<'_>) {
        self.grants.give_back(epoch, holder);
        self.tick_seal(cx);
        self.tick(cx);
    }

    /// The store has failed: stop, and let the others know (T2, T8).
    pub fn on_store_failed(&mut self, cx: &mut Cx<'_>) {
        if let Some(epoch) = self.leading_epoch() {
            self.demote(cx);
            self.send_give_back(epoch, cx);
        }
    }
}

#[cfg(feature = "model")]
impl GrantsOut {
    /// See `Node::forget_pace`: what has run out holds up no seal.
    pub fn forget_pace(&mut self, now: Instant) {
        self.out.retain(|grant| grant.until > now);
        self.out.sort_by_key(|grant| (grant.epoch, grant.holder, grant.until));
        self.out.dedup_by_key(|grant| (grant.epoch, grant.holder, grant.until));
    }
}
