//! Who misses the primary, who stands, and when (T2, T3).
//!
//! Nothing here decides safety: a takeover at the wrong time costs a short stall, never data. So
//! the rules aim at calm: a majority has to miss the primary, the better tail goes first, and who
//! failed to serve stands aside for longer each time, spread by the replica's id instead of chance.
//!
//! An engine that has just come back goes last, whatever its tail. A new primary is always one of the
//! sealed (T4), and its own seal waits until D after its lock (L4): it could not serve before, while
//! two others, whose grants to the dead one are given back (L5), are sealed at once. So it stands
//! when that wait is over, if nobody has by then.

use std::collections::BTreeMap;
use std::time::Duration;

use tercet_proto::message::{Envelope, ReplicaMessage, Tail};
use tercet_proto::{Config, ConfigState, Instant, Member, Place, Primary, ReplicaId};

use crate::api::{Notice, Output, PeerId};
use crate::cx::Cx;
use crate::replica::{Replica, Role};
use crate::seal::forgotten;

/// An opinion older than this many beats does not count.
const OPINION_BEATS: u32 = 2;

/// What a follower thinks of its primary.
#[derive(Clone, Debug, Hash, Default)]
pub(crate) struct Watch {
    asked: Option<Instant>,
    opinions: BTreeMap<ReplicaId, Opinion>,
    /// When a majority missed the primary first.
    agreed: Option<Instant>,
    /// The primary itself said so (hand-over).
    stand_now: bool,
    /// T2: did not serve, so others go first.
    aside_until: Instant,
    aside_count: u32,
}

#[derive(Clone, Debug, Hash)]
struct Opinion {
    at: Instant,
    misses: bool,
    tail: Tail,
}

impl Opinion {
    /// It misses the primary, and said so a moment ago.
    fn counts(&self, cx: &Cx<'_>) -> bool {
        self.misses && cx.now.since(self.at) <= cx.options.timing.beat * OPINION_BEATS
    }
}

impl Watch {
    pub fn new_epoch(&mut self) {
        self.asked = None;
        self.opinions.clear();
        self.agreed = None;
        self.stand_now = false;
    }

    /// A primary serves in this epoch: whoever failed before starts anew.
    pub fn served(&mut self) {
        self.aside_count = 0;
        self.aside_until = Instant(0);
    }

    pub fn stand_now(&mut self) {
        self.stand_now = true;
    }

    fn stand_aside(&mut self, now: Instant, base: Duration, max: Duration, spread: Duration) {
        let doubled = base.saturating_mul(1 << self.aside_count.min(16)).min(max);
        self.aside_count = self.aside_count.saturating_add(1);
        self.aside_until = now + doubled + spread;
    }
}

/// The member that leads by this configuration: of `members`, but while these are being changed
/// and one that leaves leads on.
fn leader(config: &Config) -> Option<&Member> {
    config.voters().find(|member| member.node == config.primary.node)
}

impl Replica {
    /// T2: whether this replica misses the primary of the newest configuration.
    pub fn misses_primary(&self, cx: &Cx<'_>) -> bool {
        let Some(known) = &self.known else { return false };
        let Primary { node, instance } = &known.config.primary;
        let late = cx.now.since(known.since) > cx.options.timing.serve_within;
        if self.leading_epoch() == Some(known.config.epoch) {
            return late && !self.is_serving(); // it agrees that another should try
        }
        let gone = cx.has_exited(node, *instance)
            || self.grants.is_given_back(known.config.epoch, *instance);
        if gone {
            return true;
        }
        if *node == cx.options.identity.node {
            return *instance != cx.options.identity.instance || late;
        }
        let alive = leader(&known.config).and_then(|led| cx.pairs.liveness(led, self.volume));
        let other_answers = alive.is_some_and(|(answers, _, _)| answers != *instance);
        let failed = alive.is_some_and(|(_, failed, _)| failed);
        let heard = alive.map_or(known.since, |(_, _, echoed)| echoed.max(known.since));
        let silent = cx.now.since(heard) > cx.options.timing.missing_after;
        other_answers || failed || silent || (late && !known.opened)
    }

    /// A member of the newest configuration that may lead it: complete, not failed, not about to stop (T2).
    pub fn may_stand(&self, config: &Config, cx: &Cx<'_>) -> bool {
        let node = &cx.options.identity.node;
        config.members.iter().any(|m| m.replica == self.id && m.node == *node)
            && self.log.incomplete.is_none()
            && !cx.pairs.failed
            && !cx.pairs.stopping
            && config.epoch >= self.promised_epoch()
    }

    /// Looks after the primary, and stands when it is time.
    pub fn tick_watch(&mut self, cx: &mut Cx<'_>) {
        let Some(known) = &self.known else { return };
        let config = known.config.clone();
        if !self.may_stand(&config, cx) || self.swap.is_some() || self.reading.is_some() {
            return;
        }
        if self.watch.stand_now {
            self.stand(&config, cx); // handed over: the primary has stopped by itself
            return;
        }
        if !self.misses_primary(cx) {
            self.watch.agreed = None;
            self.wake_when_silent(&config, cx);
            return;
        }
        self.consult(&config, cx);
        if cx.now < self.watch.aside_until {
            self.wake(self.watch.aside_until);
            return;
        }
        let opinions = &self.watch.opinions;
        let has = |r| r == self.id || opinions.get(&r).is_some_and(|o| o.counts(cx));
        let majority = config.is_quorum(has).then(|| config.clone());
        let Some(base) = majority.or_else(|| self.abort_due(has, cx)) else {
            self.watch.agreed = None;
            return;
        };
        let agreed = *self.watch.agreed.get_or_insert(cx.now);
        match self.turn(&config, agreed, cx) {
            Some(at) if cx.now < at => self.wake(at),
            Some(_) => self.stand(&base, cx),
            None => {}
        }
    }

    /// T2: when this replica stands. The better tail goes first, the other 100 ms later; an engine
    /// that has just come back goes after those whose seal need not wait (L4). Behind the start of
    /// the best one's log: does not stand.
    fn turn(&self, config: &Config, agreed: Instant, cx: &Cx<'_>) -> Option<Instant> {
        let mine = self.report(cx);
        let others = self.watch.opinions.iter();
        let better = others.filter(|(id, o)| {
            o.counts(cx)
                && o.tail.incomplete.is_none()
                && (o.tail.tail, **id) > (mine.tail, self.id)
        });
        let best = better.clone().max_by_key(|(_, o)| o.tail.tail);
        if best.is_some_and(|(_, o)| mine.tail.lsn.next() < o.tail.log_start) {
            return None;
        }
        let returned = self.returned(config, cx);
        let rank = better.filter(|(id, _)| Some(**id) != returned).count() as u32;
        let turn = agreed + cx.options.timing.stand_step * rank;
        Some(forgotten(cx).map_or(turn, |until| turn.max(until)))
    }

    /// The member that led, when another instance answers in its place: it goes last. If it came
    /// back long ago two may stand at a time, and one of their swaps is lost (T3).
    fn returned(&self, config: &Config, cx: &Cx<'_>) -> Option<ReplicaId> {
        let led = leader(config)?;
        let (answers, _, _) = cx.pairs.liveness(led, self.volume)?;
        (answers != config.primary.instance).then_some(led.replica)
    }

    /// Asks to be woken when the primary becomes missed, rather than a beat later.
    fn wake_when_silent(&mut self, config: &Config, cx: &mut Cx<'_>) {
        let alive = leader(config).and_then(|led| cx.pairs.liveness(led, self.volume));
        if let (Some((_, _, echoed)), Some(known)) = (alive, &self.known) {
            let at = echoed.max(known.since) + cx.options.timing.missing_after;
            self.wake(at + Duration::from_millis(1));
        }
    }

    /// T2: asks the other members, once in a while.
    fn consult(&mut self, config: &Config, cx: &mut Cx<'_>) {
        let step = cx.options.timing.stand_step;
        if self.watch.asked.is_some_and(|at| cx.now.since(at) < step) {
            return;
        }
        self.watch.asked = Some(cx.now);
        self.wake(cx.now + step);
        for member in self.others(config) {
            let from = self.sender(config.epoch);
            cx.send(&member.node, member.replica, from, ReplicaMessage::Consult);
        }
    }

    /// Another member misses the primary of that epoch. The configured primary's own engine asks only
    /// when it does not serve (it handed over, and nobody followed): it need not be silent as well, or
    /// the volume stays without a primary for as long as that engine answers.
    pub fn on_consult(&mut self, peer: PeerId, envelope: &Envelope, cx: &mut Cx<'_>) {
        if envelope.epoch < self.known_epoch() {
            if envelope.epoch < self.promised_epoch() {
                self.tell_newer((peer, envelope.from), cx);
            }
            return;
        }
        let current = envelope.epoch == self.known_epoch();
        let asked_by_primary =
            self.known.as_ref().is_some_and(|k| k.config.primary.instance == envelope.instance);
        let misses = current && (asked_by_primary || self.misses_primary(cx));
        let tail = self.report(cx);
        let opinion = ReplicaMessage::Opinion { misses, tail };
        cx.answer(peer, envelope.from, self.sender(envelope.epoch), opinion);
        if misses && !asked_by_primary {
            self.consult_back(envelope.from, cx);
        }
    }

    /// Who asks misses the primary by now. If it did not when it was asked, it is asked again at
    /// once: news of an exit (L5) reaches two members at two times, and the first to hear of it
    /// would ask again only after a step.
    fn consult_back(&mut self, from: ReplicaId, cx: &mut Cx<'_>) {
        let opinion = self.watch.opinions.get(&from);
        let open = opinion.is_none_or(|opinion| !opinion.counts(cx));
        if open && matches!(self.role, Role::Follower { .. }) {
            self.watch.asked = None;
            self.tick_watch(cx);
        }
    }

    pub fn on_opinion(&mut self, envelope: &Envelope, misses: bool, tail: Tail, cx: &mut Cx<'_>) {
        if envelope.epoch == self.known_epoch() && matches!(self.role, Role::Follower { .. }) {
            let opinion = Opinion { at: cx.now, misses, tail };
            self.watch.opinions.insert(envelope.from, opinion);
            let voters = self.known.as_ref().map(|known| &known.config);
            if let Some(config) = voters {
                self.watch.opinions.retain(|id, _| config.voters().any(|m| m.replica == *id));
            }
            self.tick_watch(cx);
        }
    }

    /// T3: the whole old configuration for {epoch + 1, Recovering, primary = me}; both sets,
    /// learners and the single copy are carried on. Or, where a change of members is taken back, for
    /// the one before it (M1).
    pub fn stand(&mut self, config: &Config, cx: &mut Cx<'_>) {
        self.watch.stand_now = false;
        let new = self.led_by_me(config, cx);
        let aborts = self.known.as_ref().is_some_and(|k| k.config.members != new.members);
        let notice = if aborts { Notice::AbortingChange } else { Notice::TakingOver };
        cx.out.push(Output::Notice(self.volume, notice(new.epoch)));
        self.swap(new, cx);
    }

    /// {epoch + 1, Recovering, primary = me}.
    pub fn led_by_me(&self, config: &Config, cx: &Cx<'_>) -> Config {
        let identity = &cx.options.identity;
        Config {
            epoch: config.epoch.max(self.promised_epoch()).next(),
            state: ConfigState::Recovering,
            primary: Primary { node: identity.node.clone(), instance: identity.instance },
            restored: None,
            ..config.clone()
        }
    }

    /// A newer epoch than the one that this replica led, or tried to, without ever serving (T2).
    pub fn note_superseded(&mut self, cx: &Cx<'_>) {
        let failed = match &self.role {
            Role::Follower { .. } => false,
            Role::Candidate(_) => true,
            Role::Primary(primary) => !primary.serving,
        };
        if failed {
            let timing = &cx.options.timing;
            let spread = u64::from(self.id.as_bytes()[15]);
            let spread = Duration::from_millis(spread) * 2;
            self.watch.stand_aside(cx.now, timing.aside_min, timing.aside_max, spread);
        }
    }

    /// Somebody has promised something newer: stop (T8), and learn it.
    pub fn on_newer(&mut self, config: &Config, cx: &mut Cx<'_>) {
        if self.leading_epoch().is_some_and(|epoch| epoch <= config.epoch)
            && config.primary.instance != cx.options.identity.instance
        {
            self.note_superseded(cx);
            self.demote(cx);
        }
        self.learn(config, false, cx);
        self.tick(cx);
    }

    /// The primary has given back and asks this member to follow it.
    pub fn on_stand(&mut self, envelope: &Envelope, cx: &mut Cx<'_>) {
        let current = self.known.as_ref().is_some_and(|known| {
            known.config.epoch == envelope.epoch
                && known.config.primary.instance == envelope.instance
        });
        if current {
            self.watch.stand_now();
            self.tick_watch(cx);
        }
    }
}

/// The largest tail of those that may be adopted (T5).
pub(crate) fn best<'a>(
    tails: impl Iterator<Item = (&'a ReplicaId, &'a Tail)>,
) -> Option<(ReplicaId, Place)> {
    tails.map(|(id, tail)| (tail.tail, *id)).max().map(|(place, id)| (id, place))
}

#[cfg(feature = "model")]
impl Watch {
    /// See `Node::forget_pace`.
    pub fn forget_pace(&mut self) {
        *self = Self { stand_now: self.stand_now, ..Self::default() };
    }
}
