//! What the agent asks of a replica: snapshots (S1), growth, hand-over, comparison.
//!
//! Appends are idempotent by id: asked twice, a snapshot is one entry and both are answered with its
//! place. An answer is given when the entry is committed; when the epoch ends first the outcome is
//! not known here and the agent asks again.

use bytes::Bytes;

use tercet_proto::message::ReplicaMessage;
use tercet_proto::{EntryKind, Epoch, NodeName, SnapshotId, Token};

use crate::api::{ControlDone, ControlError, Output};
use crate::cx::{Cx, Purpose};
use crate::primary::{Leaving, Origin};
use crate::replica::{HandedOver, Replica, Role};

type Answer = Result<ControlDone, ControlError>;

impl Replica {
    fn append_control(&mut self, kind: EntryKind, token: Token, cx: &mut Cx<'_>) {
        let origin = Origin::Control { tokens: vec![token] };
        if let Err(error) = self.append(kind, Bytes::new(), origin, cx) {
            cx.out.push(Output::ControlDone(token, Err(error.into())));
        }
    }

    /// Whether requests that append are taken; answers when not.
    fn orders(&self, token: Token, cx: &mut Cx<'_>) -> bool {
        let busy = match &self.role {
            Role::Primary(primary) if primary.serving && primary.leaving.is_none() => {
                primary.controls().len() >= cx.options.limits.controls
            }
            _ => {
                let not = Err(ControlError::NotPrimary(self.volume));
                cx.out.push(Output::ControlDone(token, not));
                return false;
            }
        };
        if busy {
            let busy = Err(tercet_proto::StorageError::Busy.into());
            cx.out.push(Output::ControlDone(token, busy));
        }
        !busy
    }

    /// S1: an entry in the log, once for each id.
    pub fn snapshot(&mut self, id: SnapshotId, token: Token, cx: &mut Cx<'_>) {
        if !self.orders(token, cx) {
            return;
        }
        let there = cx.storage.snapshots(self.volume).into_iter().find(|s| s.id == id);
        if let Some(there) = there {
            cx.out.push(Output::ControlDone(token, Ok(ControlDone::Place(there.place))));
            return;
        }
        let Role::Primary(primary) = &mut self.role else { unreachable!("it orders") };
        if let Some(pending) = primary.pending_snapshot(id)
            && let Origin::Control { tokens } = &mut pending.origin
        {
            tokens.push(token);
            return;
        }
        self.append_control(EntryKind::Snapshot { id }, token, cx);
    }

    /// Deletes a snapshot; one that is not there is deleted already.
    pub fn snapshot_delete(&mut self, id: SnapshotId, token: Token, cx: &mut Cx<'_>) {
        if !self.orders(token, cx) {
            return;
        }
        let Role::Primary(primary) = &mut self.role else { unreachable!("it orders") };
        let coming = primary.pending_snapshot(id).is_some();
        if coming || cx.storage.snapshots(self.volume).iter().any(|s| s.id == id) {
            self.append_control(EntryKind::SnapshotDelete { id }, token, cx);
        } else {
            cx.out.push(Output::ControlDone(token, Ok(ControlDone::Place(self.log.applied))));
        }
    }

    /// Grows the volume; never shrinks it.
    pub fn grow(&mut self, size_blocks: u64, token: Token, cx: &mut Cx<'_>) {
        if !self.orders(token, cx) {
            return;
        }
        let now = self.log.size_at_tail();
        let answer: Answer = if size_blocks < now {
            Err(ControlError::Shrink { volume: self.volume, size_blocks: now })
        } else if size_blocks == self.log.size_blocks {
            Ok(ControlDone::Place(self.log.applied))
        } else {
            self.append_control(EntryKind::Grow { size_blocks }, token, cx);
            return;
        };
        cx.out.push(Output::ControlDone(token, answer));
    }

    /// Checksums of what is applied here, whatever the role.
    pub fn chunk_sums(&mut self, token: Token, cx: &mut Cx<'_>) {
        let own = cx.tokens.issue(Purpose::Sums(token, self.log.applied));
        cx.storage.chunk_sums(self.volume, own);
    }

    /// What is mapped where, of what is applied here, whatever the role.
    pub fn chunk_map(&mut self, from: u64, token: Token, cx: &mut Cx<'_>) {
        let own = cx.tokens.issue(Purpose::Chunks(token, self.log.applied));
        cx.storage.chunk_map(self.volume, from, own);
    }

    /// The agent asks for a hand-over.
    pub fn ask_hand_over(&mut self, to: Option<NodeName>, token: Token, cx: &mut Cx<'_>) {
        if self.orders(token, cx) {
            self.hand_over(to, Some(token), cx);
        }
    }

    /// Begins a hand-over: no new commands, the path inaccessible, what is appended is answered.
    pub fn hand_over(&mut self, to: Option<NodeName>, token: Option<Token>, cx: &mut Cx<'_>) {
        let until = cx.now + cx.options.timing.hand_over;
        let Role::Primary(primary) = &mut self.role else { return };
        if primary.leaving.is_some() {
            return; // on its way already, and somebody waits for its answer
        }
        primary.leaving = Some(Leaving { to, token, until });
        self.wake(until);
        self.check_lease(cx);
        self.refuse_held(cx);
        self.leave(cx);
    }

    /// Held commands were never ordered: their hosts try elsewhere (H2).
    fn refuse_held(&mut self, cx: &mut Cx<'_>) {
        self.retry_held(cx); // while leaving, each ends as inaccessible
        assert!(!self.hosts.has_held(), "nothing is held by one who leaves");
    }

    /// Goes on with a hand-over: when all is answered and a member has everything, the lease is
    /// given back for good (L5), and that member stands at once.
    pub fn leave(&mut self, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &self.role else { return };
        let Some(leaving) = &primary.leaving else { return };
        let (token, until) = (leaving.token, leaving.until);
        let answered = primary.window.is_empty() && primary.reads == 0;
        let successor = self.successor(leaving.to.as_ref()).filter(|_| answered);
        let epoch = primary.epoch();
        if let Some(successor) = successor {
            if let Role::Primary(primary) = &mut self.role {
                primary.leaving = None; // from now on the other one serving answers it
            }
            let until = cx.now + cx.options.timing.hand_over;
            if let Some(token) = token {
                self.handed_over.push(HandedOver { token, epoch, until });
                self.wake(until);
            }
            self.demote(cx);
            self.send_give_back(epoch, cx);
            let from = self.sender(epoch);
            cx.send(&successor.node, successor.replica, from, ReplicaMessage::Stand);
        } else if cx.now >= until {
            if let Role::Primary(primary) = &mut self.role {
                primary.leaving = None;
            }
            if let Some(token) = token {
                let late = Err(ControlError::Interrupted(self.volume));
                cx.out.push(Output::ControlDone(token, late));
            }
            self.check_lease(cx); // goes on serving
        }
    }

    /// L5: final for this (epoch, instance): it has stopped answering reads before.
    pub fn send_give_back(&mut self, epoch: Epoch, cx: &mut Cx<'_>) {
        assert!(self.leading_epoch().is_none(), "who gives back has stopped");
        self.grants.give_back(epoch, cx.options.identity.instance);
        let Some(known) = &self.known else { return };
        for member in self.others(&known.config.clone()) {
            let from = self.sender(epoch);
            cx.send(&member.node, member.replica, from, ReplicaMessage::GiveBack);
        }
    }
}
