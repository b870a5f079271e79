//! What the model check (`tercet-model`) needs beside `step`: built only with the feature `model`.
//!
//! A model check goes on from each state many times and must know a state when it meets it again.
//! So a [`Node`] can be copied and hashed, and what cannot matter any more is forgotten first:
//! when something was last sent, tried or heard of *only paces* what is tried again. The check sets
//! all such times itself: nothing is due, until it lets everything be due at once. Leases, grants
//! and the wait after a start (L2 to L4) are not pace and stay.
//!
//! Who stands, and when, decides nothing about safety (T2): here any member may, at any moment,
//! which is more than every choice that T2 leaves.

use tercet_proto::storage::Storage;
use tercet_proto::{Epoch, Instant, VolumeId};

use crate::api::Output;
use crate::cx::Cx;
use crate::node::Node;
use crate::replica::{Replica, Role};

/// What a replica does in its epoch, as far as the checker's properties ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leads {
    /// Nothing: it follows.
    No,
    /// Seals and adopts (T4, T5).
    Candidate(Epoch),
    /// Orders (T6), and takes hosts' commands when it serves (T7).
    Primary {
        /// Of this epoch.
        epoch: Epoch,
        /// Whether hosts' commands are taken.
        serving: bool,
    },
}

impl Node {
    /// The member stands now, whatever it thinks of the primary, if it may stand at all (T2, T3).
    pub fn stand(
        &mut self,
        volume: VolumeId,
        now: Instant,
        storage: &mut dyn Storage,
        out: &mut Vec<Output>,
    ) {
        self.with(volume, now, storage, out, |replica, cx: &mut Cx<'_>| {
            if matches!(replica.role, Role::Follower { .. }) {
                replica.watch.stand_now();
                replica.tick_watch(cx);
            }
        });
    }

    /// What the replica leads.
    pub fn leads(&self, volume: VolumeId) -> Leads {
        match self.replicas.get(&volume).map(|replica| &replica.role) {
            None | Some(Role::Follower { .. }) => Leads::No,
            Some(Role::Candidate(candidate)) => Leads::Candidate(candidate.config.epoch),
            Some(Role::Primary(primary)) => {
                Leads::Primary { epoch: primary.epoch(), serving: primary.serving }
            }
        }
    }

    /// Forgets all that only paces. `beats` are the numbers and times of the beats that an answer
    /// may still be for; the last is this moment's. When whatever is waited for was last tried is
    /// set to `paced`: nothing is due when that is now, everything when it is long ago.
    pub fn forget_pace(&mut self, now: Instant, beats: &[(u64, Instant)], paced: Instant) {
        self.pairs.forget_pace(now, self.options.timing.lease, beats);
        self.tokens.forget_pace();
        self.timers.clear();
        self.next_beat = Instant(0);
        for replica in self.replicas.values_mut() {
            replica.forget_pace(now, paced);
        }
    }
}

impl Replica {
    fn forget_pace(&mut self, now: Instant, paced: Instant) {
        self.deadline = None;
        self.watch.forget_pace();
        self.succession.forget_pace(paced);
        self.grants.forget_pace(now);
        self.hosts.forget_pace();
        if let Some(known) = &mut self.known {
            known.since = Instant(0);
        }
        if let Some(at) = &mut self.reading {
            *at = Instant(0);
        }
        if let Some((_, until)) = &mut self.swap {
            *until = Instant(u64::MAX);
        }
        match &mut self.role {
            Role::Follower { .. } => {}
            Role::Candidate(candidate) => candidate.forget_pace(paced),
            Role::Primary(primary) => primary.forget_pace(paced),
        }
    }
}
