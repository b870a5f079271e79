//! What hosts may take of a target: connections, queues, memory; each of them counted.
//!
//! A connection that has no queue yet, or is to authenticate, may be anybody's: there are [`HANDSHAKES_MAX`] of them, and a
//! newer one takes the place of the one that has been without longest, so that a flood of them keeps
//! nobody out who is quick. A queue is a host's: one host has at most [`HOST_QUEUES_MAX`]. Data of
//! commands under way is shared out evenly among the queues, for each host and for the target; what
//! a queue has no share for waits its turn (`connection.rs`), and one command at a time always goes.

use std::collections::BTreeMap;

use super::api::{CloseReason, ConnectionId, Effect};
use super::connection::TRANSFER_BUDGET_BYTES;
use super::controller::Admission;
use super::{HANDSHAKES_MAX, HOST_QUEUES_MAX, Role, Target};

/// Data of commands under way of one host. A queue's one command may exceed its share.
pub const HOST_TRANSFER_BYTES_MAX: usize = 64 << 20;
/// Data of commands under way of all hosts. A queue's one command may exceed its share.
pub const TARGET_TRANSFER_BYTES_MAX: usize = 256 << 20;

/// What is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Open connections.
    pub connections: usize,
    /// Those without a queue.
    pub handshakes: usize,
    /// Controllers.
    pub associations: usize,
    /// Commands that have not been answered.
    pub commands: usize,
    /// Their data: room for it, or what has arrived in capsules.
    pub transfer_bytes: usize,
    /// Output that has not been taken.
    pub output_bytes: usize,
}

impl Target {
    /// What is in use now.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage {
            connections: self.peers.len(),
            associations: self.controllers.len(),
            ..Usage::default()
        };
        for peer in self.peers.values() {
            usage.handshakes += usize::from(!matches!(peer.role, Role::Queue(..)));
            usage.commands += peer.connection.commands();
            usage.transfer_bytes += peer.connection.held_bytes();
            usage.output_bytes += peer.connection.outbox.queued_bytes();
        }
        usage
    }

    /// Makes room for a connection: that without a queue for longest is closed when there are many.
    pub(super) fn give_way(&mut self, effects: &mut Vec<Effect>) {
        if self.peers.len() < HANDSHAKES_MAX {
            return;
        }
        let mut count = 0;
        let mut oldest: Option<(tercet_proto::Instant, ConnectionId)> = None;
        for (&id, peer) in &self.peers {
            let deadline = match peer.role {
                Role::New(until) | Role::Waiting(until) => Some(until),
                Role::Queue(..) => peer.authentication.as_ref().and_then(|it| it.deadline()),
            };
            if let Some(until) = deadline {
                count += 1;
                oldest = Some(oldest.map_or((until, id), |oldest| oldest.min((until, id))));
            }
        }
        if let (HANDSHAKES_MAX.., Some((_, id))) = (count, oldest) {
            let peer = self.peers.remove(&id).expect("found");
            self.drop_peer(id, peer, CloseReason::Crowded, effects);
        }
    }

    /// Whether the host may have one more queue.
    pub(super) fn has_room_for_queue(&self, host_nqn: &str) -> bool {
        // Who has not shown to be the host takes none of its room.
        let of_host = self.controllers.values().filter(|other| {
            other.host.nqn == host_nqn && other.admission != Admission::Authenticating
        });
        of_host.map(|other| 1 + other.queues.len()).sum::<usize>() < HOST_QUEUES_MAX
    }

    /// Gives each queue its share of what may be under way, when queues came or went.
    pub(super) fn share_budgets(&mut self) {
        if !std::mem::take(&mut self.is_unshared) {
            return;
        }
        let mut of_hosts: BTreeMap<&str, usize> = BTreeMap::new();
        for controller in self.controllers.values() {
            *of_hosts.entry(&controller.host.nqn).or_default() += 1 + controller.queues.len();
        }
        let all: usize = of_hosts.values().sum();
        for controller in self.controllers.values() {
            let of_host = of_hosts[controller.host.nqn.as_str()];
            let share = (HOST_TRANSFER_BYTES_MAX / of_host)
                .min(TARGET_TRANSFER_BYTES_MAX / all)
                .min(TRANSFER_BUDGET_BYTES);
            for id in controller.queues.values().chain([&controller.admin]) {
                if let Some(peer) = self.peers.get_mut(id) {
                    peer.connection.set_budget(share);
                }
            }
        }
    }
}
