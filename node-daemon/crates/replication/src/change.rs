//! Changing members (M1): a learner is filled, takes the place of a member, or the change is undone.
//!
//! The operator says which member shall go and which replica shall come ([`Replacement`]); the agents
//! carry out swaps; when each step is due is decided here, by the primary, from what it knows of the
//! learner's log. Nothing of a change is kept but the configuration, so whoever takes over goes on:
//!
//! 1. The learner is named in an edit within the epoch. It promises, and is copied to (C2).
//! 2. It keeps up with the log: {epoch + 1, Recovering, members = new, previousMembers = old}. From here
//!    on both majorities count (W4, L2, T4), whoever leads.
//! 3. Active drops the old set (T7).
//!
//! While both exist and only the old set has a majority that answers, the change is taken back; the
//! newcomer is a learner again and keeps what it has. A request that is withdrawn before step 2 takes
//! the learner out again. What is in no set and no learner any more its agent deletes (M2).

use tercet_proto::{Config, ConfigState, Lsn, Member, Primary, ReplicaId};

use crate::api::{Notice, Output, Replacement};
use crate::cx::Cx;
use crate::options::canary;
use crate::replica::{Replica, Role};

/// Whether the object's request can be carried out from this configuration.
fn fits(config: &Config, wanted: &Replacement) -> bool {
    let Replacement { old, learner } = wanted;
    let clash = |m: &Member| m.node == learner.node || m.replica == learner.replica;
    config.is_member(*old) && !config.members.iter().any(clash)
}

impl Replica {
    /// The next step of a change, at the serving primary of an Active configuration.
    pub fn tick_change(&mut self, cx: &mut Cx<'_>) {
        if self.swap.is_some() || self.reading.is_some() {
            return;
        }
        self.abort_own_change(cx);
        let Some(new) = self.next_config(cx) else { return };
        let notice = match (&new.previous_members, new.learners.first()) {
            (Some(before), _) => {
                let only = |of: &[Member], other: &[Member]| {
                    of.iter().find(|m| !other.contains(m)).map(|m| m.node.clone())
                };
                let (old, fresh) = (only(before, &new.members), only(&new.members, before));
                old.zip(fresh).map(|(old, fresh)| Notice::Changing(old, fresh))
            }
            (None, Some(learner)) => Some(Notice::Learning(learner.node.clone())),
            (None, None) => None,
        };
        cx.out.extend(notice.map(|notice| Output::Notice(self.volume, notice)));
        self.swap(new, cx);
    }

    fn next_config(&self, cx: &Cx<'_>) -> Option<Config> {
        let (Role::Primary(primary), Some(known)) = (&self.role, &self.known) else { return None };
        let config = &known.config;
        let open = primary.serving
            && primary.leaving.is_none()
            && primary.epoch() == config.epoch
            && config.state == ConfigState::Active
            && config.single_copy.is_none();
        if !open {
            return None;
        }
        let wanted = self.replacement.as_ref().filter(|wanted| fits(config, wanted));
        let learners: Vec<_> = wanted.iter().map(|wanted| wanted.learner.clone()).collect();
        if config.learners != learners {
            return Some(Config { learners, ..config.clone() });
        }
        let Replacement { old, learner } = wanted?;
        let newcomer = primary.members.iter().find(|m| m.replica == learner.replica)?;
        let linked = cx.pairs.route(&newcomer.node, newcomer.replica, self.volume).is_some();
        if !linked || !newcomer.keeps_up(primary.commit.lsn) {
            return None;
        }
        let place = |m: &Member| if m.replica == *old { learner.clone() } else { m.clone() };
        let members: Vec<_> = config.members.iter().map(place).collect();
        let leader = if *old == self.id { self.heir(&members)? } else { config.primary.clone() };
        Some(Config {
            epoch: config.epoch.next(),
            state: ConfigState::Recovering,
            primary: leader,
            members,
            previous_members: Some(config.members.clone()),
            learners: Vec::new(),
            single_copy: None,
            restored: None,
        })
    }

    /// Who leads when this primary itself is replaced: who keeps up, rather an old member.
    fn heir(&self, members: &[Member]) -> Option<Primary> {
        let Role::Primary(primary) = &self.role else { return None };
        let stays = |id: ReplicaId| members.iter().any(|m| m.replica == id);
        let fit =
            primary.members.iter().filter(|m| m.keeps_up(primary.commit.lsn) && stays(m.replica));
        let heir = fit.max_by_key(|m| (!m.learner, m.matched))?;
        Some(Primary { node: heir.node.clone(), instance: heir.answered? })
    }

    /// M1: the configuration that takes a change back, where the set before it has a majority of
    /// those for which `has` is true and both sets together have none, for long enough.
    pub fn abort_due(&self, has: impl Fn(ReplicaId) -> bool, cx: &Cx<'_>) -> Option<Config> {
        let known = self.known.as_ref()?;
        let before = known.config.aborted()?;
        let late = cx.now.since(known.since) > cx.options.timing.abort_after;
        let due = late
            && before.is_member(self.id)
            && !known.config.is_quorum(&has)
            && before.is_quorum(&has);
        due.then_some(before)
    }

    /// A candidate, or a primary that has not served yet, cannot get both majorities.
    pub fn abort_own_change(&mut self, cx: &mut Cx<'_>) {
        if self.swap.is_some() || self.reading.is_some() {
            return;
        }
        let before = match &self.role {
            Role::Candidate(candidate) => self.abort_due(|r| candidate.has_answer(r), cx),
            Role::Primary(primary) if !primary.serving => {
                let noop = primary.noop.unwrap_or(Lsn(u64::MAX));
                let has = |replica: ReplicaId| {
                    let member = primary.members.iter().find(|m| m.replica == replica);
                    let own = replica == self.id && self.log.durable.lsn >= noop;
                    own || member.is_some_and(|m| m.counts() && m.matched >= noop)
                };
                self.abort_due(has, cx)
            }
            _ => None,
        };
        if let Some(before) = before {
            self.stand(&before, cx);
        }
    }
}

/// What majorities are counted over, for a candidate and a primary of this configuration.
pub(crate) fn counted(config: Config, cx: &Cx<'_>) -> Config {
    if canary!(cx.options, NewSetAlone) {
        return Config { previous_members: None, ..config };
    }
    config
}
