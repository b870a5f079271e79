//! `Volume.status.config`: the one thing that is agreed on through the API server, and which steps
//! between two of its values are legal.
//!
//! The same rules stand as CEL in the CRD and in Python (`tercet_api.config`); the vectors in
//! `crds/vectors/config_steps.json` hold all three together. Who may take a step, and when, is
//! left to `tercet-replication`.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::ids::{Epoch, InstanceId, NodeName, ReplicaId};

/// Most members (and learners, and previous members) of a configuration.
pub const MEMBERS_MAX: usize = 3;

/// Whether the primary has made the log whole yet (rules T4-T7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ConfigState {
    /// The primary is sealing, adopting and committing; previous members count (rule M1).
    Recovering,
    /// Done: `members` alone count.
    Active,
}

/// Who leads an epoch: one start of one engine (rule T1).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Primary {
    /// The node.
    pub node: NodeName,
    /// The instance of its engine.
    pub instance: InstanceId,
}

/// A replica that counts in a majority.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member {
    /// The node that keeps it.
    pub node: NodeName,
    /// Its id.
    pub replica: ReplicaId,
}

/// A volume's configuration, as JSON in the Volume object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Its number.
    pub epoch: Epoch,
    /// Recovering or Active.
    pub state: ConfigState,
    /// Who leads.
    pub primary: Primary,
    /// 1 to 3 replicas on distinct nodes.
    pub members: Vec<Member>,
    /// While members change: the set that counts as well (rule M1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_members: Option<Vec<Member>>,
    /// Replicas that are being filled and count nowhere (rule M1).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub learners: Vec<Member>,
    /// The one replica that is the quorum by itself (rules W6, M4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub single_copy: Option<ReplicaId>,
    /// Equals `epoch` in the one step after a restored API server (rule M3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<Epoch>,
}

/// Why a step from one configuration to the next is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error, Serialize, Deserialize)]
pub enum IllegalStep {
    /// The configuration would be taken away.
    #[error("a configuration is never taken away")]
    TakenAway,
    /// Not {1, Recovering} at first.
    #[error("the first configuration has epoch 1 and is Recovering")]
    First,
    /// The epoch falls.
    #[error("an epoch never falls")]
    EpochFell,
    /// Another primary instance, members or previous members within one epoch.
    #[error("primary and members change only with a new epoch")]
    EditedEpoch,
    /// Active to Recovering within an epoch, or a new epoch that is not Recovering.
    #[error("a new epoch starts Recovering and becomes Active once")]
    State,
    /// The primary's node has no member.
    #[error("the primary is a member")]
    PrimaryNoMember,
    /// No member, more than three, or two on one node.
    #[error("there are 1 to 3 members on distinct nodes")]
    Members,
    /// More than one member differs between two sets that must follow each other.
    #[error("one member changes at a time")]
    TwoMembers,
    /// Members changed without keeping the old set, or the old set dropped before Active.
    #[error("while members change both sets count until Active")]
    PreviousMembers,
    /// singleCopy names no member (of both sets), or is entered, changed or left in a way other
    /// than W6 and M4 allow.
    #[error("singleCopy names the new primary's member, and is left with it as previous set")]
    SingleCopy,
    /// A learner that is a member as well, more than three, or two on one node.
    #[error("there are at most 3 learners, none of them a member")]
    Learners,
    /// A new member that was no learner before (rules T9, M1).
    #[error("a new member was a learner before")]
    Newcomer,
    /// `restored` is there and does not equal the new epoch, or is added within an epoch.
    #[error("restored equals the new epoch")]
    Restored,
}

impl Config {
    /// Whether a replica with this id is a member.
    pub fn is_member(&self, replica: ReplicaId) -> bool {
        self.members.iter().any(|member| member.replica == replica)
    }

    /// The set that counts as well while members change (rule M1); empty when there is none.
    pub fn previous(&self) -> &[Member] {
        self.previous_members.as_deref().unwrap_or_default()
    }

    /// Every replica that counts in a majority now, each once.
    pub fn voters(&self) -> impl Iterator<Item = &Member> {
        let only_before = self.previous().iter().filter(|m| !self.is_member(m.replica));
        self.members.iter().chain(only_before)
    }

    /// Every replica that the primary feeds: who counts, then the learners (rule M1).
    pub fn everyone(&self) -> impl Iterator<Item = &Member> {
        self.voters().chain(&self.learners)
    }

    /// M1, while both sets exist: what an abort leads back to. The newcomer is a learner again, so
    /// that what it has is kept. The caller gives it its epoch and its primary.
    pub fn aborted(&self) -> Option<Self> {
        let members = self.previous_members.clone()?;
        let out = |member: &&Member| !members.contains(member);
        let newcomers = self.members.iter().filter(out).chain(&self.learners);
        let learners = newcomers.take(MEMBERS_MAX).cloned().collect();
        let previous_members = None;
        Some(Self { members, previous_members, learners, ..self.clone() })
    }

    /// Whether the replicas for which `has` is true are a majority: of `members`, and of
    /// `previousMembers` while both exist (rules W4, L2, T4); or the single copy (W6, M4).
    pub fn is_quorum(&self, has: impl Fn(ReplicaId) -> bool) -> bool {
        if let Some(single) = self.single_copy {
            return has(single);
        }
        let majority = |set: &[Member]| {
            set.iter().filter(|member| has(member.replica)).count() * 2 > set.len()
        };
        majority(&self.members) && self.previous_members.as_deref().is_none_or(majority)
    }

    /// The largest value that a majority (as in [`Config::is_quorum`]) reaches: `None` as a value
    /// is below all others, and no majority gives `None`.
    pub fn quorum_value<T: Ord + Copy>(&self, value: impl Fn(ReplicaId) -> Option<T>) -> Option<T> {
        if let Some(single) = self.single_copy {
            return value(single);
        }
        let reached = |set: &[Member]| {
            let mut values = [None; MEMBERS_MAX];
            for (slot, member) in values.iter_mut().zip(set) {
                *slot = value(member.replica);
            }
            let values = &mut values[..set.len().min(MEMBERS_MAX)];
            values.sort_unstable_by(|a, b| b.cmp(a));
            values.get(values.len() / 2).copied().flatten()
        };
        let now = reached(&self.members)?;
        match &self.previous_members {
            Some(previous) => Some(now.min(reached(previous)?)),
            None => Some(now),
        }
    }

    /// Whether the object may go from `old` to `new`: what CEL makes the API server refuse.
    /// Where several rules are broken, the first in the order of this code is named.
    pub fn check_step(old: Option<&Self>, new: Option<&Self>) -> Result<(), IllegalStep> {
        match (old, new) {
            (None, None) => Ok(()),
            (Some(_), None) => Err(IllegalStep::TakenAway),
            (None, Some(new)) => new.check_first(),
            (Some(old), Some(new)) => {
                if new.epoch < old.epoch {
                    return Err(IllegalStep::EpochFell);
                }
                new.check_shape()?;
                if new.epoch == old.epoch { old.check_edit(new) } else { old.check_new_epoch(new) }
            }
        }
    }

    fn check_first(&self) -> Result<(), IllegalStep> {
        let bare = self.previous_members.is_none()
            && self.learners.is_empty()
            && self.single_copy.is_none()
            && self.restored.is_none();
        if self.epoch != Epoch(1) || self.state != ConfigState::Recovering || !bare {
            return Err(IllegalStep::First);
        }
        self.check_shape()
    }

    /// What holds for a configuration by itself.
    fn check_shape(&self) -> Result<(), IllegalStep> {
        if !is_set(&self.members, 1)
            || !self.previous_members.as_deref().is_none_or(|p| is_set(p, 1))
        {
            return Err(IllegalStep::Members);
        }
        if !self.members.iter().any(|member| member.node == self.primary.node) {
            return Err(IllegalStep::PrimaryNoMember);
        }
        let apart = |learner: &Member| !self.members.iter().any(|m| clash(m, learner));
        if !is_set(&self.learners, 0) || !self.learners.iter().all(apart) {
            return Err(IllegalStep::Learners);
        }
        if self.state == ConfigState::Active && self.previous_members.is_some() {
            return Err(IllegalStep::PreviousMembers);
        }
        if let Some(single) = self.single_copy {
            let before = self.previous_members.as_deref();
            if !self.is_member(single)
                || !before.is_none_or(|set| set.iter().any(|m| m.replica == single))
            {
                return Err(IllegalStep::SingleCopy);
            }
        }
        if self.restored.is_some_and(|restored| restored != self.epoch) {
            return Err(IllegalStep::Restored);
        }
        Ok(())
    }

    /// An edit within the epoch: Active, learners; nothing else.
    fn check_edit(&self, new: &Self) -> Result<(), IllegalStep> {
        if new.primary != self.primary || new.members != self.members {
            return Err(IllegalStep::EditedEpoch);
        }
        if self.state == ConfigState::Active && new.state == ConfigState::Recovering {
            return Err(IllegalStep::State);
        }
        let becomes_active = self.state != new.state;
        if new.previous_members != self.previous_members && !becomes_active {
            return Err(IllegalStep::PreviousMembers);
        }
        if new.single_copy != self.single_copy {
            return Err(IllegalStep::SingleCopy);
        }
        if new.restored.is_some() && new.restored != self.restored {
            return Err(IllegalStep::Restored);
        }
        Ok(())
    }

    fn check_new_epoch(&self, new: &Self) -> Result<(), IllegalStep> {
        if new.state != ConfigState::Recovering {
            return Err(IllegalStep::State);
        }
        if new.restored.is_some() {
            return Ok(()); // M3: the one step that may bring any sets
        }
        self.check_single_copy(new)?;
        if self.single_copy.is_some() && new.single_copy.is_none() {
            return Ok(()); // W6's leaving, checked above
        }
        self.check_members(new)
    }

    /// W6, M4: entered by its own primary, carried on (T3), left with it as previous set.
    fn check_single_copy(&self, new: &Self) -> Result<(), IllegalStep> {
        let node_of = |replica| self.members.iter().find(|m| m.replica == replica);
        let legal = match (self.single_copy, new.single_copy) {
            (None, None) => true,
            (Some(old), Some(new)) => old == new,
            (None, Some(single)) => {
                new.members == self.members
                    && node_of(single).is_some_and(|m| m.node == new.primary.node)
            }
            (Some(single), None) => {
                new.members == self.members
                    && self.previous_members.is_none()
                    && matches!(new.previous(), [only] if only.replica == single
                        && self.members.contains(only))
            }
        };
        if legal { Ok(()) } else { Err(IllegalStep::SingleCopy) }
    }

    /// M1: a takeover carries both sets on; a change keeps the old set; an abort returns to it.
    fn check_members(&self, new: &Self) -> Result<(), IllegalStep> {
        let added: Vec<_> = new.members.iter().filter(|m| !self.members.contains(m)).collect();
        let removed = self.members.iter().filter(|m| !new.members.contains(m)).count();
        if added.len() > 1 || removed > 1 {
            return Err(IllegalStep::TwoMembers);
        }
        if new.members == self.members {
            let carried = new.previous_members == self.previous_members;
            return if carried { Ok(()) } else { Err(IllegalStep::PreviousMembers) };
        }
        if let Some(previous) = &self.previous_members {
            let aborted = new.members == *previous && new.previous_members.is_none();
            return if aborted { Ok(()) } else { Err(IllegalStep::PreviousMembers) };
        }
        if self.state != ConfigState::Active {
            return Err(IllegalStep::State);
        }
        if new.previous_members.as_ref() != Some(&self.members) {
            return Err(IllegalStep::PreviousMembers);
        }
        if !added.iter().all(|member| self.learners.contains(member)) {
            return Err(IllegalStep::Newcomer);
        }
        Ok(())
    }
}

/// Whether two members could not stand in one set.
fn clash(a: &Member, b: &Member) -> bool {
    a.node == b.node || a.replica == b.replica
}

fn is_set(members: &[Member], count_min: usize) -> bool {
    let apart = |(i, a): (usize, &Member)| !members[..i].iter().any(|b| clash(a, b));
    (count_min..=MEMBERS_MAX).contains(&members.len()) && members.iter().enumerate().all(apart)
}
