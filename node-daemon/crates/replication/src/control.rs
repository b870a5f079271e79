//! What the agent asks of a replica: snapshots (S1), growth, comparison. Hand-over: `hand_over.rs`.
//!
//! Appends are idempotent by id: asked twice, a snapshot is one entry and both are answered with its
//! place. An answer is given when the entry is committed; when the epoch ends first the outcome is
//! not known here and the agent asks again.

use bytes::Bytes;

use tercet_proto::{EntryKind, SnapshotId, Token};

use crate::api::{ControlDone, ControlError, Output};
use crate::cx::{Cx, Purpose};
use crate::primary::Origin;
use crate::replica::{Replica, Role};

type Answer = Result<ControlDone, ControlError>;

impl Replica {
    fn append_control(&mut self, kind: EntryKind, token: Token, cx: &mut Cx<'_>) {
        let origin = Origin::Control { tokens: vec![token] };
        if let Err(error) = self.append(kind, Bytes::new(), origin, cx) {
            cx.out.push(Output::ControlDone(token, Err(error.into())));
        }
    }

    /// Whether requests that append are taken; answers when not.
    pub fn orders(&self, token: Token, cx: &mut Cx<'_>) -> bool {
        let busy = match &self.role {
            Role::Primary(primary) if primary.serving && !primary.drains() => {
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
}
