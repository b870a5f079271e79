//! Handing over in good order, at the primary that leaves (T10): a drain, an upgrade, or somebody asks.
//!
//! The member that shall follow swaps **while this one still serves** (`heir.rs`), so a host stands still
//! only from when the swap is known until the new primary's no-op is committed, not while the API server
//! thinks. Three steps:
//!
//! 1. *Choosing*, *asked*: a member that keeps up is asked to take over. Nothing has changed: commands are
//!    taken, reads answered under the lease. It declines, says nothing, or its swap is lost: another is
//!    asked, or the same again, until it is called off.
//! 2. *Draining*: its swap took place. No new commands; what is in flight is answered, for a bounded time.
//! 3. The lease is given back for good (L5), this replica leads no more, and the new one seals (T4).
//!
//! Nothing here decides safety. Whatever of it is lost, late or doubled, the new primary's seal ends this
//! epoch as in any takeover (T4, L2); the steps only see to it that there is nothing left to end.
//!
//! A member of an older version of the protocol is handed over to the older way: drain, give back, and
//! only then `Stand`. The swap is then part of what a host waits for.

use tercet_proto::message::{
    Envelope, HandOverMessage, NotFollowing, ReplicaMessage, VERSION_HAND_OVER,
};
use tercet_proto::{
    Config, Epoch, InstanceId, Instant, Member, NodeName, Promise, ReplicaId, StorageError, Token,
};

use crate::api::{ControlDone, ControlError, Output, PeerId};
use crate::catchup::MemberState;
use crate::cx::Cx;
use crate::options::canary;
use crate::primary::Primary;
use crate::replica::{HandedOver, Replica, Role};

/// Beats that a member may take to say that it stands.
const STANDS_BEATS: u32 = 2;

/// A hand-over on its way.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Leaving {
    to: Option<NodeName>,
    pub token: Option<Token>,
    /// The engine is about to stop: where nobody follows the lease is given back all the same.
    last: bool,
    /// Called off then, if nothing is swapped.
    until: Instant,
    /// What stood in the way last.
    why: &'static str,
    step: Step,
}

#[derive(Clone, Debug, Hash)]
enum Step {
    /// Nobody is asked; it serves. The last who declined, and when.
    Choosing(Option<(ReplicaId, Instant)>),
    /// A member was asked to swap; it serves.
    Asked(Asked),
    /// No new commands; what is in flight is answered.
    Draining { since: Instant, then: Then },
}

#[derive(Clone, Debug, Hash)]
struct Asked {
    heir: Member,
    instance: InstanceId,
    number: u64,
    /// First, and last.
    since: Instant,
    sent: Instant,
    /// It has said that it stands.
    stands: bool,
    /// Since when its epoch is known here, from the object.
    seen: Option<Instant>,
}

/// Who follows when all is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Then {
    /// This replica's swap took place.
    Swapped(ReplicaId, InstanceId),
    /// The one that has everything, and swaps only now: it speaks an older version.
    Stand,
    /// Whoever takes over: the engine ends.
    Anyone,
}

impl Primary {
    /// Whether commands are refused because a hand-over is in its last step.
    pub fn drains(&self) -> bool {
        self.leaving.as_ref().is_some_and(|l| matches!(l.step, Step::Draining { .. }))
    }

    /// Whether the configuration is left alone, for a member's swap of it may be on its way.
    pub fn leaves_config_alone(&self) -> bool {
        self.leaving.as_ref().is_some_and(|l| !matches!(l.step, Step::Choosing(_)))
    }
}

/// What is asked of `on_stands` and `on_declined`: whether they answer this asking.
fn answers(asked: &Asked, envelope: &Envelope, number: u64) -> bool {
    (asked.heir.replica, asked.instance, asked.number) == (envelope.from, envelope.instance, number)
}

impl Replica {
    /// The agent asks for a hand-over.
    pub fn ask_hand_over(&mut self, to: Option<NodeName>, token: Token, cx: &mut Cx<'_>) {
        if !self.orders(token, cx) {
            return;
        }
        let Role::Primary(primary) = &self.role else { unreachable!("it orders") };
        let member = |node: &NodeName| primary.config.members.iter().any(|m| m.node == *node);
        let answer = match &to {
            _ if primary.leaving.is_some() => Err(StorageError::Busy.into()),
            Some(node) if *node == cx.options.identity.node => Ok(ControlDone::Ok),
            Some(node) if !member(node) => {
                let (volume, why) = (self.volume, "it has no member there");
                Err(ControlError::NotHandedOver { volume, to, why })
            }
            _ => return self.hand_over(to, Some(token), false, cx),
        };
        cx.out.push(Output::ControlDone(token, answer));
    }

    /// The engine is about to stop: what serves is handed over, what does not serve yet ends here.
    pub fn leave_for_good(&mut self, cx: &mut Cx<'_>) {
        match self.leading_epoch() {
            Some(_) if self.is_serving() => self.hand_over(None, None, true, cx),
            Some(epoch) => {
                self.demote(cx);
                self.send_give_back(epoch, cx);
            }
            None => {}
        }
    }

    fn hand_over(
        &mut self,
        to: Option<NodeName>,
        token: Option<Token>,
        last: bool,
        cx: &mut Cx<'_>,
    ) {
        let until = cx.now + cx.options.timing.hand_over;
        let Role::Primary(primary) = &mut self.role else { return };
        match &mut primary.leaving {
            Some(leaving) => leaving.last |= last, // on its way, and somebody may wait for its answer
            none => {
                let (why, step) = ("nobody could be asked", Step::Choosing(None));
                *none = Some(Leaving { to, token, last, until, why, step });
            }
        }
        self.leave(cx);
    }

    /// Goes on with a hand-over.
    pub fn leave(&mut self, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &self.role else { return };
        match primary.leaving.as_ref().map(|leaving| &leaving.step) {
            None => {}
            Some(Step::Choosing(_)) => self.choose_heir(cx),
            Some(Step::Asked(_)) => self.await_heir(cx),
            Some(Step::Draining { .. }) => self.drain(cx),
        }
    }

    fn leaving(&mut self) -> Option<&mut Leaving> {
        match &mut self.role {
            Role::Primary(primary) => primary.leaving.as_mut(),
            _ => None,
        }
    }

    fn asked(&mut self) -> Option<&mut Asked> {
        match &mut self.leaving()?.step {
            Step::Asked(asked) => Some(asked),
            _ => None,
        }
    }

    fn choose_heir(&mut self, cx: &mut Cx<'_>) {
        let beat = cx.options.timing.beat;
        let Role::Primary(primary) = &self.role else { return };
        let Some(Leaving { to, until, step: Step::Choosing(refused), .. }) = &primary.leaving
        else {
            return;
        };
        let (until, refused) = (*until, *refused);
        if cx.now >= until || primary.members.iter().all(|m| m.learner) {
            return self.call_off(cx);
        }
        let early = refused.map(|(_, at)| at + beat).filter(|at| cx.now < *at);
        let heir = self.heir_for(to.as_ref(), refused.map(|(id, _)| id), cx);
        self.wake(early.unwrap_or(cx.now + beat).min(until));
        if early.is_some() || self.swap.is_some() || self.reading.is_some() {
            return; // the heir has to know what it swaps: no swap of this one's is on its way
        }
        let Some((heir, instance, version)) = heir else {
            if let Some(leaving) = self.leaving() {
                leaving.why = "no member that keeps up with the log is reached";
            }
            return;
        };
        if version < VERSION_HAND_OVER {
            return self.begin_drain(Then::Stand, cx);
        }
        let Role::Primary(primary) = &mut self.role else { return };
        primary.askings += 1;
        let (number, now) = (primary.askings, cx.now);
        let (since, sent, stands, seen) = (now, now, false, None);
        let asked = Asked { heir, instance, number, since, sent, stands, seen };
        if let Some(leaving) = self.leaving() {
            leaving.step = Step::Asked(asked);
        }
        self.ask_heir(cx);
    }

    /// Who keeps up with the log and is reached: rather one that can swap meanwhile, rather another
    /// than the last who declined, rather the one that lacks least.
    fn heir_for(
        &self,
        to: Option<&NodeName>,
        refused: Option<ReplicaId>,
        cx: &Cx<'_>,
    ) -> Option<(Member, InstanceId, u16)> {
        let Role::Primary(primary) = &self.role else { return None };
        let fit = |m: &MemberState| {
            let (instance, version) = cx.pairs.reached((&m.node, m.replica), self.volume)?;
            let fits = to.is_none_or(|node| *node == m.node)
                && primary.config.single_copy.is_none() // nobody else has everything (W6)
                && primary.config.is_member(m.replica)
                && m.keeps_up(primary.commit.lsn)
                && m.answered == Some(instance);
            let rank = (version >= VERSION_HAND_OVER, refused != Some(m.replica), m.matched);
            let member = Member { node: m.node.clone(), replica: m.replica };
            fits.then_some((rank, (member, instance, version)))
        };
        let all = primary.members.iter().filter_map(fit);
        all.max_by_key(|(rank, _)| *rank).map(|(_, found)| found)
    }

    fn ask_heir(&mut self, cx: &mut Cx<'_>) {
        let beat = cx.options.timing.beat;
        let Some(epoch) = self.leading_epoch() else { return };
        let from = self.sender(epoch);
        let Some(asked) = self.asked() else { return };
        asked.sent = cx.now;
        let message = ReplicaMessage::HandOver(HandOverMessage::TakeOver { number: asked.number });
        cx.send(&asked.heir.node, asked.heir.replica, from, message);
        self.wake(cx.now + beat);
    }

    /// Somebody was asked: nothing has changed yet.
    fn await_heir(&mut self, cx: &mut Cx<'_>) {
        let (now, beat, volume) = (cx.now, cx.options.timing.beat, self.volume);
        let Some(leaving) = self.leaving() else { return };
        let until = leaving.until;
        let Step::Asked(asked) = &leaving.step else { return };
        let reached = cx.pairs.reached((&asked.heir.node, asked.heir.replica), volume);
        let there = reached.is_some_and(|(instance, _)| instance == asked.instance);
        let patient = now.since(asked.since) < beat * STANDS_BEATS;
        let (heir, stands) = (Then::Swapped(asked.heir.replica, asked.instance), asked.stands);
        let again = asked.sent + beat;
        if let Some(seen) = asked.seen {
            // Its swap took place, whatever has become of it (T8). Who takes over from a dead heir seals.
            match seen + cx.options.timing.hand_over {
                over if over <= now => self.begin_drain(heir, cx),
                over => self.wake(over),
            }
        } else if !patient && !there {
            self.refused("the link to the member that was asked is down", cx);
        } else if !patient && !stands {
            self.refused("the member that was asked does not answer", cx);
        } else if until <= now {
            self.call_off(cx);
        } else if !stands && again <= now {
            self.ask_heir(cx);
        } else {
            self.wake(if stands { until } else { again.min(until) });
        }
    }

    /// The member that was asked does not follow: nothing has changed.
    fn refused(&mut self, why: &'static str, cx: &mut Cx<'_>) {
        let now = cx.now;
        let Some(leaving) = self.leaving() else { return };
        let Step::Asked(asked) = &leaving.step else { return };
        let (heir, seen) =
            (Then::Swapped(asked.heir.replica, asked.instance), asked.seen.is_some());
        leaving.why = why;
        leaving.step = Step::Choosing(Some((asked.heir.replica, now)));
        if seen {
            self.begin_drain(heir, cx); // it has lost sight of a swap that took place
        } else {
            self.leave(cx);
        }
    }

    /// No new commands from here on, and held ones end: they were never ordered (H2).
    fn begin_drain(&mut self, then: Then, cx: &mut Cx<'_>) {
        let now = cx.now;
        let Some(leaving) = self.leaving() else { return };
        leaving.step = Step::Draining { since: now, then };
        self.check_lease(cx);
        self.retry_held(cx); // each ends as inaccessible
        assert!(!self.hosts.has_held(), "nothing is held by one who leaves");
        self.leave(cx);
    }

    fn drain(&mut self, cx: &mut Cx<'_>) {
        let drain = cx.options.timing.drain;
        let Role::Primary(primary) = &self.role else { return };
        let Some(Leaving { to, until, step: Step::Draining { since, then }, .. }) =
            &primary.leaving
        else {
            return;
        };
        let (since, until, tail) = (*since, *until, self.log.tail.lsn);
        let answered = primary.window.is_empty() && primary.reads == 0;
        match *then {
            Then::Swapped(heir, _) => {
                // One that lacks an entry has to fetch it (T5): what is under way is waited for.
                let lacks = primary.members.iter().any(|m| m.replica == heir && m.matched < tail);
                let passed = cx.now.since(since);
                if answered && (!lacks || passed >= drain / 2) || passed >= drain {
                    self.give_way(None, cx);
                } else {
                    let half = passed < drain / 2;
                    self.wake(since + if half { drain / 2 } else { drain });
                }
            }
            Then::Stand => match self.successor(to.as_ref()).filter(|_| answered) {
                Some(successor) => self.give_way(Some(successor), cx),
                None if until <= cx.now => self.call_off(cx),
                None => self.wake(until),
            },
            Then::Anyone if answered || since + drain <= cx.now => {
                let successor = self.successor(None);
                self.give_way(successor, cx);
            }
            Then::Anyone => self.wake(since + drain),
        }
    }

    /// The lease is given back for good (L5); the other one serving answers the request.
    fn give_way(&mut self, stand: Option<Member>, cx: &mut Cx<'_>) {
        let Some(epoch) = self.leading_epoch() else { return };
        if canary!(cx.options, ServeAfterGiveBack) {
            self.note_handed_over(cx);
            self.check_lease(cx);
        } else {
            self.demote(cx);
        }
        self.send_give_back(epoch, cx);
        if let Some(Member { node, replica }) = stand {
            cx.send(&node, replica, self.sender(epoch), ReplicaMessage::Stand);
        }
    }

    /// Somebody else is to lead: when that one serves, or when it takes too long, the request for a
    /// hand-over is answered, and an engine may stop: until then its seal and its acknowledgement count.
    pub fn note_handed_over(&mut self, cx: &Cx<'_>) {
        let Role::Primary(primary) = &mut self.role else { return };
        if !primary.leaves_config_alone() {
            return; // nobody was asked
        }
        let epoch = primary.epoch();
        let Some(Leaving { to, token, last, .. }) = primary.leaving.take() else { return };
        if token.is_some() || last {
            let until = cx.now + cx.options.timing.hand_over;
            self.handed_over.push(HandedOver { token, epoch, to, until });
            self.wake(until);
        }
    }

    /// Nobody follows: goes on in its epoch as if nobody had asked; or, where the engine ends, gives
    /// its lease back so that whoever takes over need not wait for it.
    fn call_off(&mut self, cx: &mut Cx<'_>) {
        let Some(leaving) = self.leaving() else { return };
        if leaving.last {
            return self.begin_drain(Then::Anyone, cx);
        }
        let Leaving { to, token, why, .. } = leaving.clone();
        if let Role::Primary(primary) = &mut self.role {
            primary.leaving = None;
        }
        if let Some(token) = token {
            let volume = self.volume;
            let refusal = Err(ControlError::NotHandedOver { volume, to, why });
            cx.out.push(Output::ControlDone(token, refusal));
        }
        self.check_lease(cx); // serves on
    }

    /// L5: final for this (epoch, instance): it has stopped answering reads before.
    pub fn send_give_back(&mut self, epoch: Epoch, cx: &mut Cx<'_>) {
        let stopped = self.leading_epoch().is_none();
        assert!(stopped || canary!(cx.options, ServeAfterGiveBack), "who gives back has stopped");
        self.grants.give_back(epoch, cx.options.identity.instance);
        let Some(known) = &self.known else { return };
        for member in self.others(&known.config.clone()) {
            let from = self.sender(epoch);
            cx.send(&member.node, member.replica, from, ReplicaMessage::GiveBack);
        }
    }

    /// Whether a newer configuration is the one that this primary asked for: it is no surprise, and
    /// what is in flight may be answered first (T8). The seal ends that, if anything has to.
    pub fn awaits(&self, config: &Config) -> bool {
        let Role::Primary(primary) = &self.role else { return false };
        let heir = match primary.leaving.as_ref().map(|leaving| &leaving.step) {
            Some(Step::Asked(asked)) => asked.instance,
            Some(Step::Draining { then: Then::Swapped(_, instance), .. }) => *instance,
            _ => return false,
        };
        primary.serving && config.epoch == primary.epoch().next() && config.primary.instance == heir
    }

    /// The heir's epoch is known from the object before the heir has said so: it may not know itself
    /// yet, or be dead. Either way this replica is the one that serves, for a while (T8).
    pub fn heir_seen(&mut self, cx: &mut Cx<'_>) {
        let now = cx.now;
        if let Some(asked) = self.asked() {
            let seen = *asked.seen.get_or_insert(now);
            self.wake(seen + cx.options.timing.hand_over);
        }
    }

    /// What primary and heir say to each other.
    pub fn on_hand_over(
        &mut self,
        peer: PeerId,
        envelope: &Envelope,
        message: HandOverMessage,
        cx: &mut Cx<'_>,
    ) {
        match message {
            HandOverMessage::TakeOver { number } => self.on_take_over(peer, envelope, number, cx),
            HandOverMessage::Swapped { config } => self.on_swapped(peer, envelope, &config, cx),
            _ if self.leading_epoch() != Some(envelope.epoch) => {}
            HandOverMessage::Stands { number } => {
                let until = cx.now + cx.options.timing.hand_over;
                let Some(leaving) = self.leaving() else { return };
                if let Step::Asked(asked) = &mut leaving.step
                    && answers(asked, envelope, number)
                    && !asked.stands
                {
                    asked.stands = true;
                    leaving.why = "the API server has not answered the swap in time";
                    leaving.until = until;
                    self.wake(until);
                }
            }
            HandOverMessage::Declined { number, why } => {
                if self.asked().is_some_and(|asked| answers(asked, envelope, number)) {
                    let why = match why {
                        NotFollowing::Unfit => "the member that was asked is not fit to lead now",
                        NotFollowing::Busy => "the member that was asked has another swap to do",
                        NotFollowing::Lost => "the swap of the member that was asked was lost",
                    };
                    self.refused(why, cx);
                }
            }
        }
    }

    /// The heir's swap took place. Whoever was asked, and whether the request still stands: this
    /// epoch is over, in good order.
    fn on_swapped(&mut self, peer: PeerId, envelope: &Envelope, config: &Config, cx: &mut Cx<'_>) {
        if config.epoch <= envelope.epoch || config.primary.instance != envelope.instance {
            return;
        }
        if self.grants.is_given_back(envelope.epoch, cx.options.identity.instance) {
            // Said before; the word was lost, or crossed this one.
            cx.answer(peer, envelope.from, self.sender(envelope.epoch), ReplicaMessage::GiveBack);
            return;
        }
        let then = Then::Swapped(envelope.from, envelope.instance);
        let current = self.is_serving() && self.leading_epoch() == Some(envelope.epoch);
        let Role::Primary(primary) = &mut self.role else {
            return self.late_swapped(envelope, config, cx);
        };
        if !current {
            return self.late_swapped(envelope, config, cx);
        }
        let step = Step::Draining { since: cx.now, then };
        match &mut primary.leaving {
            Some(leaving) if leaving.step.is_for(then) => return, // it came twice
            Some(leaving) => leaving.step = step,
            none => {
                let (to, token, last, until, why) = (None, None, false, cx.now, "");
                *none = Some(Leaving { to, token, last, until, why, step });
            }
        }
        self.learn(config, false, cx);
        self.begin_drain(then, cx);
    }
}

impl Replica {
    /// It has heard so already, and stopped at once (T8). What it led it never leads again (T1).
    fn late_swapped(&mut self, envelope: &Envelope, config: &Config, cx: &mut Cx<'_>) {
        self.on_newer(config, cx);
        let own = cx.options.identity.instance;
        let promised = |p: &Promise| p.epoch() == envelope.epoch && p.instance() == own;
        if self.leading_epoch().is_none() && self.promise.as_ref().is_some_and(promised) {
            self.send_give_back(envelope.epoch, cx);
        }
    }
}

impl Step {
    fn is_for(&self, drains: Then) -> bool {
        matches!(self, Self::Draining { then, .. } if *then == drains)
    }
}

#[cfg(feature = "model")]
impl Leaving {
    /// See `Node::forget_pace`.
    pub fn forget_pace(&mut self, paced: Instant) {
        match &mut self.step {
            Step::Choosing(refused) => {
                if let Some((_, at)) = refused {
                    *at = paced;
                }
            }
            Step::Asked(asked) => {
                (asked.since, asked.sent) = (paced, paced);
                if let Some(seen) = &mut asked.seen {
                    *seen = paced;
                }
            }
            Step::Draining { since, .. } => *since = paced,
        }
    }
}
