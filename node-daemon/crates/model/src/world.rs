//! A state of the whole: three nodes, the messages on their way, the Volume object; and every step
//! that may follow.
//!
//! Nothing happens by itself and nothing is forced: any message may arrive at any time, again, or
//! never; a node may be given time or stand still for ever; a disk may be slow; the agent's answers
//! may be late or lost, its watch may show any older value of the object. What a space bounds
//! ([`Bounds`]) is only how often the rarer things happen.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use tercet_proto::{Config, Epoch, Token};
use tercet_replication::model::Leads;

use crate::NODES;
use crate::judge::Wrong;
use crate::local::{Answer, Book, Local, Outcome, Step, instance};
use crate::packet::Packet;

/// How often what happens, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "independent bounds")]
pub struct Bounds {
    /// Hosts' writes.
    pub writes: u8,
    /// Ends of an engine, with any first part of what is on its way to its disk kept.
    pub crashes: u8,
    /// Members that stand.
    pub takeovers: u8,
    /// Leases' times that go by.
    pub leases: u8,
    /// Answers of the API server that are lost.
    pub lost_answers: u8,
    /// Disks replaced while an engine is down.
    pub wipes: u8,
    /// Returns of the object to an older value.
    pub restores: u8,
    /// Hand-overs asked for.
    pub hand_overs: u8,
    /// Beats that are answered with a grant (L2).
    pub grants: u8,
    /// Times that a node is given time: whatever it waits to try again is tried again.
    pub ticks: u8,
    /// Whether a message that would do nothing now is kept, for it may do something later.
    pub repeats: bool,
    /// Whether a grant takes its time, and may come again; else it is given and heard in one step.
    pub slow_grants: bool,
    /// Whether a disk takes its time; else what is queued is durable at once.
    pub slow_disks: bool,
    /// Whether the configuration becomes Active; else that swap waits for ever.
    pub active: bool,
}

/// A compare-and-swap on its way to the API server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Swap {
    node: usize,
    starts: u8,
    token: Token,
    old: Arc<Config>,
    new: Arc<Config>,
}

/// One state.
#[derive(Clone)]
pub struct State {
    /// The nodes.
    pub locals: [Arc<Local>; NODES],
    /// Messages that may still matter, in order.
    pub net: Vec<Packet>,
    /// Every value of the object's configuration; the last is the present one.
    pub object: Arc<Vec<Arc<Config>>>,
    /// Swaps that are not executed yet.
    pub swaps: Vec<Swap>,
    /// Nodes whose agent reads the object consistently, as bits.
    pub reads: u8,
    /// Writes that hosts have made so far.
    pub written: u8,
    /// What hosts have seen: these writes, in this order, by acknowledgement or by a read.
    pub seen: Vec<u8>,
    /// The newest epoch in which something was seen.
    pub seen_epoch: Epoch,
    /// What may still happen.
    pub left: Bounds,
    /// What must not be.
    pub wrong: Option<Wrong>,
}

impl State {
    fn key(&self) -> impl Hash + PartialEq + '_ {
        let ids = (self.locals[0].id, self.locals[1].id, self.locals[2].id);
        let api = (&self.object, &self.swaps, self.reads);
        (ids, &self.net, api, self.written, &self.seen, self.seen_epoch, self.left, &self.wrong)
    }

    /// How often each node's engine has started.
    pub fn starts(&self) -> [u8; NODES] {
        [0, 1, 2].map(|i: usize| self.locals[i].starts)
    }

    /// The present configuration.
    pub fn config(&self) -> &Arc<Config> {
        self.object.last().expect("the model begins with one")
    }

    /// A node that serves in an epoch after the first.
    pub fn serves_after_takeover(&self) -> bool {
        self.locals.iter().any(|local| {
            matches!(local.facts.leads, Leads::Primary { epoch, serving: true } if epoch.0 > 1)
        })
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} seen {:?} {:?}", self.locals, self.seen, self.wrong)
    }
}

/// A step of the whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A message arrives.
    Deliver(Packet),
    /// A node is given time.
    Tick(usize),
    /// A holder's beat reaches a granter, whose answer is on its way (L2).
    Beat {
        /// Who asks.
        holder: usize,
        /// Who answers.
        granter: usize,
    },
    /// A disk completes its oldest operation.
    Flush(usize),
    /// An engine ends, with so many operations still landing.
    Crash(usize, u8),
    /// An engine starts on an empty disk, or on its own.
    Start {
        /// Where.
        node: usize,
        /// The disk was replaced.
        wiped: bool,
    },
    /// A member stands (T2).
    Stand(usize),
    /// A host writes.
    Write(usize),
    /// The API server executes a swap; whether the answer is lost.
    Swap {
        /// Which.
        index: usize,
        /// No answer comes.
        lost: bool,
    },
    /// A consistent read of the object is answered.
    Read(usize),
    /// A watch shows a value of the object, present or older.
    Observe(usize, usize),
    /// A hand-over is asked for.
    HandOver(usize),
    /// The object returns to an older value.
    Restore(usize),
    /// A lease's time goes by.
    Elapse,
}

/// The steps of a space.
pub struct World<'a> {
    /// Nodes and messages.
    pub book: &'a Book,
    /// What never changes while the space is explored.
    pub bounds: Bounds,
}

impl World<'_> {
    /// Everything that may happen next.
    pub fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.wrong.is_some() {
            return;
        }
        actions.extend(state.net.iter().map(|packet| Action::Deliver(*packet)));
        for (i, local) in state.locals.iter().enumerate() {
            if local.is_up() {
                Self::of_running(state, i, actions);
            } else {
                actions.push(Action::Start { node: i, wiped: false });
                if state.left.wipes > 0 {
                    actions.push(Action::Start { node: i, wiped: true });
                }
            }
        }
        for (index, swap) in state.swaps.iter().enumerate() {
            if self.bounds.active || swap.new.epoch != swap.old.epoch {
                actions.push(Action::Swap { index, lost: false });
                if state.left.lost_answers > 0 {
                    actions.push(Action::Swap { index, lost: true });
                }
            }
        }
        if state.left.restores > 0 {
            actions.extend((0..state.object.len() - 1).map(Action::Restore));
        }
        if state.left.leases > 0 {
            actions.push(Action::Elapse);
        }
    }

    fn of_running(state: &State, i: usize, actions: &mut Vec<Action>) {
        let local = &state.locals[i];
        let left = &state.left;
        if left.ticks > 0 {
            actions.push(Action::Tick(i));
        }
        if local.ops() > 0 {
            actions.push(Action::Flush(i));
        }
        if local.facts.leads != Leads::No && left.grants > 0 {
            let others = (0..NODES).filter(|other| *other != i && state.locals[*other].is_up());
            actions.extend(others.map(|granter| Action::Beat { holder: i, granter }));
        }
        if left.crashes > 0 {
            actions.extend((0..=local.ops() as u8).map(|kept| Action::Crash(i, kept)));
        }
        if left.takeovers > 0 {
            actions.push(Action::Stand(i));
        }
        if matches!(local.facts.leads, Leads::Primary { serving: true, .. }) {
            if left.writes > 0 {
                actions.push(Action::Write(i));
            }
            if left.hand_overs > 0 {
                actions.push(Action::HandOver(i));
            }
        }
        if state.reads & 1 << i != 0 {
            actions.push(Action::Read(i));
        }
        actions.extend((0..state.object.len()).map(|version| Action::Observe(i, version)));
    }

    /// The state after a step; none when nothing has changed.
    pub fn next(&self, state: &State, action: &Action) -> Option<State> {
        let mut next = state.clone();
        match *action {
            Action::Deliver(packet) => {
                self.step(&mut next, packet.to(), &Step::Deliver(packet)).then_some(())?;
            }
            Action::Tick(i) => {
                if self.bounds.ticks < u8::MAX {
                    next.left.ticks -= 1;
                }
                self.step(&mut next, i, &Step::Tick).then_some(())?;
            }
            Action::Beat { holder, granter } => self.beat(&mut next, holder, granter)?,
            Action::Flush(i) => self.step(&mut next, i, &Step::Flush).then_some(())?,
            Action::Crash(i, kept) => {
                next.left.crashes -= 1;
                self.step(&mut next, i, &Step::Crash(kept));
                next.reads &= !(1 << i);
                next.net.retain(|packet| packet.to() != i);
            }
            Action::Start { node, wiped } => self.start(&mut next, node, wiped),
            Action::Stand(i) => {
                next.left.takeovers -= 1;
                self.step(&mut next, i, &Step::Stand).then_some(())?;
            }
            Action::Write(i) => {
                next.left.writes -= 1;
                next.written += 1;
                let step = Step::Write(next.written);
                self.step(&mut next, i, &step).then_some(())?;
            }
            Action::Swap { index, lost } => self.swap(&mut next, index, lost),
            Action::Read(i) => {
                next.reads &= !(1 << i);
                let config = Arc::clone(next.config());
                self.step(&mut next, i, &Step::Observe(config, true));
            }
            Action::Observe(i, version) => {
                let config = Arc::clone(&next.object[version]);
                self.step(&mut next, i, &Step::Observe(config, false)).then_some(())?;
            }
            Action::HandOver(i) => {
                next.left.hand_overs -= 1;
                self.step(&mut next, i, &Step::HandOver).then_some(())?;
            }
            Action::Restore(version) => {
                next.left.restores -= 1;
                let older = Arc::clone(&next.object[version]);
                Arc::make_mut(&mut next.object).push(older);
            }
            Action::Elapse => self.elapse(&mut next),
        }
        next.settle(state);
        if !self.bounds.repeats {
            self.forget_idle(&mut next);
        }
        Some(next)
    }

    /// Forgets messages whose arrival would do nothing now.
    fn forget_idle(&self, state: &mut State) {
        let starts = state.starts();
        let net = std::mem::take(&mut state.net);
        let idle = |packet: &Packet| {
            let local = &state.locals[packet.to()];
            let outcome = local.step(&Step::Deliver(*packet), starts, self.book);
            outcome.is_idle(local, &net)
        };
        state.net = net.iter().filter(|packet| !idle(packet)).copied().collect();
    }

    /// One node's step, and what came of it; whether anything did.
    fn step(&self, state: &mut State, i: usize, step: &Step) -> bool {
        let outcome = state.locals[i].step(step, state.starts(), self.book);
        if outcome.is_nothing(&state.locals[i]) {
            return false;
        }
        state.take(i, &outcome);
        if !self.bounds.slow_disks && !matches!(step, Step::Flush) {
            while state.locals[i].is_up() && state.locals[i].ops() > 0 {
                self.step(state, i, &Step::Flush);
            }
        }
        true
    }

    /// The beat arrives at once, its answer when it will: a late beat only makes the granter wait for
    /// longer, and its `processed` only ever grows.
    fn beat(&self, state: &mut State, holder: usize, granter: usize) -> Option<()> {
        let asked = state.locals[holder].step(&Step::Ask, state.starts(), self.book);
        let beat = asked.beats.iter().find(|beat| beat.to() == granter)?;
        if self.bounds.slow_grants {
            state.left.grants -= 1;
            return self.step(state, granter, &Step::Deliver(*beat)).then_some(());
        }
        let before = state.net.len();
        state.left.grants -= 1;
        let granted = self.step(state, granter, &Step::Deliver(*beat));
        let answers: Vec<_> = state.net.drain(before..).collect();
        let mut heard = false;
        for answer in answers {
            heard |= self.step(state, holder, &Step::Deliver(answer));
        }
        (granted || heard).then_some(())
    }

    /// L5: the new engine has its disk's lock, so it can prove that its predecessor has ended.
    fn start(&self, state: &mut State, i: usize, wiped: bool) {
        if wiped {
            state.left.wipes -= 1;
            self.step(state, i, &Step::Wipe);
        }
        let before = state.locals[i].starts;
        self.step(state, i, &Step::Start);
        state.net.retain(|packet| packet.from() != i);
        for other in (0..NODES).filter(|other| *other != i) {
            if state.locals[other].is_up() {
                let theirs = state.locals[other].starts;
                self.step(state, i, &Step::PeerUp(other, theirs));
                let own = state.locals[i].starts;
                self.step(state, other, &Step::PeerUp(i, own));
            }
        }
        self.step(state, i, &Step::ProvenExit(before));
    }

    /// T3: compares the whole old value. The API server refuses an illegal step, which nobody tries.
    fn swap(&self, state: &mut State, index: usize, lost: bool) {
        let Swap { node, starts, token, old, new } = state.swaps.remove(index);
        let done = **state.config() == *old;
        if done {
            if let Err(illegal) = Config::check_step(Some(&old), Some(&new)) {
                state.wrong = Some(Wrong::IllegalStep(illegal));
            }
            Arc::make_mut(&mut state.object).push(new);
        }
        if lost {
            state.left.lost_answers -= 1;
        }
        if state.locals[node].is_up() && state.locals[node].starts == starts {
            let answer = match (lost, done) {
                (true, _) => Answer::Unknown,
                (false, true) => Answer::Swapped,
                (false, false) => Answer::Lost,
            };
            let config = Arc::clone(state.config());
            self.step(state, node, &Step::Swapped(token, answer, config));
        }
    }

    fn elapse(&self, state: &mut State) {
        state.left.leases -= 1;
        for i in 0..NODES {
            self.step(state, i, &Step::Elapse);
        }
        state.net.retain(|packet| !packet.is_grant());
    }

    /// Three nodes that serve the volume, the first leading epoch 1, with all that the beginning has
    /// to say forgotten (rule T9 runs here like any other takeover).
    pub fn begin(&self) -> State {
        let locals = [0, 1, 2].map(|i| self.book.first(i));
        let mut state = State {
            locals,
            net: Vec::new(),
            object: Arc::new(vec![Arc::new(first_config())]),
            swaps: Vec::new(),
            reads: 0,
            written: 0,
            seen: Vec::new(),
            seen_epoch: Epoch(1),
            left: Bounds::NOTHING,
            wrong: None,
        };
        for i in 0..NODES {
            for other in (0..NODES).filter(|other| *other != i) {
                self.step(&mut state, i, &Step::PeerUp(other, 0));
            }
        }
        let all = World { book: self.book, bounds: Bounds { active: true, ..self.bounds } };
        while let Some(next) = all.any(&state) {
            state = next;
            assert!(state.wrong.is_none(), "the beginning goes well: {:?}", state.wrong);
        }
        let last = Arc::clone(state.config());
        let locals = state.locals.each_ref().map(|local| local.checkpointed(self.book));
        let object = Arc::new(vec![last]);
        State { locals, net: Vec::new(), object, left: self.bounds, ..state }
    }

    /// The first step that changes anything, with no fault.
    fn any(&self, state: &State) -> Option<State> {
        let mut actions = Vec::new();
        self.actions(state, &mut actions);
        let newest = |action: &&Action| match action {
            Action::Observe(_, version) => version + 1 == state.object.len(),
            _ => true,
        };
        let chosen = actions.iter().filter(newest);
        chosen.filter_map(|action| self.next(state, action)).find(|next| next != state)
    }
}

impl Bounds {
    /// Only what the protocol does by itself.
    pub const NOTHING: Self = Self {
        writes: 0,
        crashes: 0,
        takeovers: 0,
        leases: 0,
        lost_answers: 0,
        wipes: 0,
        restores: 0,
        hand_overs: 0,
        grants: 0,
        ticks: u8::MAX,
        repeats: true,
        slow_grants: true,
        slow_disks: true,
        active: true,
    };
}

fn first_config() -> Config {
    use tercet_proto::{ConfigState, Member, Primary};
    let member = |i| Member { node: crate::local::name(i), replica: crate::local::replica(i) };
    Config {
        epoch: Epoch(1),
        state: ConfigState::Recovering,
        primary: Primary { node: crate::local::name(0), instance: instance(0, 0) },
        members: (0..NODES).map(member).collect(),
        previous_members: None,
        learners: Vec::new(),
        single_copy: None,
        restored: None,
    }
}

impl State {
    /// A node's step becomes part of the whole.
    fn take(&mut self, i: usize, outcome: &Outcome) {
        self.locals[i] = Arc::clone(&outcome.next);
        self.net.extend(&outcome.sends);
        for (token, old, new) in &outcome.swaps {
            let starts = self.locals[i].starts;
            let (token, old, new) = (*token, Arc::clone(old), Arc::clone(new));
            self.swaps.push(Swap { node: i, starts, token, old, new });
        }
        if outcome.reads {
            self.reads |= 1 << i;
        }
        if let Some(why) = &outcome.broken {
            self.wrong.get_or_insert(Wrong::Assertion(why.clone()));
        }
        self.judge_acks(i, &outcome.acked);
    }

    /// Puts the network in order and looks at the whole.
    fn settle(&mut self, before: &Self) {
        self.net.sort_unstable();
        self.net.dedup();
        let locals = &self.locals;
        self.net.retain(|packet| {
            let (from, to) = (&locals[packet.from()], &locals[packet.to()]);
            to.is_up() && packet.may_matter(from.starts, to.starts, to.facts.promised.0)
        });
        if (0..NODES).any(|i| before.locals[i].id != self.locals[i].id) {
            self.judge();
        }
    }
}
