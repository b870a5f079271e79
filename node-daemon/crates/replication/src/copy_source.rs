//! The primary's side of a copy (C2, C3): who gets one, and from which view.
//!
//! A member that is incomplete, or that lacks what this log no longer has, is offered a frozen view
//! and asks for what differs; this side answers and keeps nothing of how far it has come. The view
//! stays while it is asked for, and is offered again when nothing was heard for a beat, so a lost
//! message costs that. Once all of it has arrived the log has to go on from there: if it was cut
//! meanwhile, a newer view follows, of which only the changes since then differ.
//!
//! A complete member gives up what it has only on the word of a primary whose no-op is committed:
//! before that its tail may be the one that counts (T5).

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use bytes::{Bytes, BytesMut};
use tercet_proto::message::{CopyMessage, Envelope, ReplicaMessage};
use tercet_proto::{
    BlockRange, Epoch, Instant, NodeName, ReplicaId, StorageError, View, ViewId, VolumeId,
};

use crate::api::PeerId;
use crate::cx::{Cx, Purpose};
use crate::replica::{Replica, Role};

/// A view is given up when it was not asked for over so many beats.
const SILENT_BEATS: u32 = 8;

/// The views that members copy from.
pub(crate) type Outgoing = BTreeMap<ReplicaId, Source>;

/// What one member copies from.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Source {
    view: View,
    node: NodeName,
    /// When the member last asked, or the view was frozen.
    heard: Instant,
    offered: Instant,
}

/// Blocks that are being read for a member.
#[derive(Clone, Debug, Hash)]
pub(crate) struct CopyRead {
    pub volume: VolumeId,
    epoch: Epoch,
    peer: PeerId,
    to: ReplicaId,
    view: ViewId,
    part: u32,
    ranges: Vec<BlockRange>,
}

impl Replica {
    /// Offers views to whoever needs one, and gives up those that nobody needs.
    pub fn tick_copies(&mut self, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &mut self.role else { return };
        let settled = primary.settled();
        let beat = cx.options.timing.beat;
        let needs = |id: ReplicaId| {
            primary.members.iter().find(|m| m.replica == id).is_some_and(|m| m.needs_copy(settled))
        };
        let over = |id: &ReplicaId, source: &Source| {
            !needs(*id) || cx.now.since(source.heard) > beat * SILENT_BEATS
        };
        let ended: Vec<ReplicaId> =
            primary.copies.iter().filter(|(id, source)| over(id, source)).map(|e| *e.0).collect();
        for id in ended {
            let source = primary.copies.remove(&id).expect("listed");
            cx.storage.thaw(source.view.id);
        }
        let members = primary.members.iter().filter(|m| m.needs_copy(settled));
        let wanting: Vec<_> = members.map(|m| (m.replica, m.node.clone())).collect();
        for (id, node) in wanting {
            self.offer(id, &node, cx);
        }
    }

    /// Offers a member its view, a fresh one if it has none, unless it was just heard of.
    fn offer(&mut self, to: ReplicaId, node: &NodeName, cx: &mut Cx<'_>) {
        if cx.pairs.route(node, self.volume).is_none() {
            return; // nobody would hear it
        }
        let from = self.sender(self.leading_epoch().expect("called by a primary"));
        let start = self.log.start(cx.storage);
        let Role::Primary(primary) = &mut self.role else { return };
        let settled = primary.settled();
        let unreadable = primary.member(to).is_some_and(|member| member.unreadable);
        let source = match primary.copies.entry(to) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(room) => {
                let Some(view) = cx.storage.freeze(self.volume) else { return };
                let (heard, offered) = (cx.now, Instant(0));
                room.insert(Source { view, node: node.clone(), heard, offered })
            }
        };
        let beat = cx.options.timing.beat;
        let quiet = source.heard.max(source.offered);
        if source.offered != Instant(0) && cx.now.since(quiet) < beat {
            return;
        }
        source.offered = cx.now;
        // Who has this place needs no copy: where the log cannot be read, the view's own (C4).
        let start = if unreadable { source.view.place } else { start };
        let offer = CopyMessage::Offer { view: source.view.clone(), start, settled };
        cx.send(node, to, from, ReplicaMessage::Copy(offer));
    }

    /// Gives up every view: this replica no longer leads.
    pub fn end_copies(copies: Outgoing, cx: &mut Cx<'_>) {
        for source in copies.into_values() {
            cx.storage.thaw(source.view.id);
        }
    }

    /// A member asks for something of its view.
    pub fn on_copy_question(
        &mut self,
        peer: PeerId,
        envelope: &Envelope,
        message: CopyMessage,
        cx: &mut Cx<'_>,
    ) {
        let (CopyMessage::AskStamps { view, .. }
        | CopyMessage::AskBlocks { view, .. }
        | CopyMessage::Copied { view }) = &message
        else {
            return;
        };
        let from = self.sender(envelope.epoch);
        let Role::Primary(primary) = &mut self.role else { return };
        let source = primary.copies.get_mut(&envelope.from).filter(|one| one.view.id == *view);
        let Some(source) = source.filter(|_| primary.config.epoch == envelope.epoch) else {
            return; // given up meanwhile: a fresh view is offered
        };
        source.heard = cx.now;
        match message {
            CopyMessage::AskStamps { view, part, from: first } => {
                if let Some(runs) = cx.storage.view_stamps(view, part as usize, first) {
                    let stamps = CopyMessage::Stamps { view, part, from: first, runs };
                    cx.answer(peer, envelope.from, from, ReplicaMessage::Copy(stamps));
                }
            }
            CopyMessage::AskBlocks { view, part, ranges } => {
                let read = CopyRead {
                    volume: self.volume,
                    epoch: envelope.epoch,
                    peer,
                    to: envelope.from,
                    view,
                    part,
                    ranges: ranges.clone(),
                };
                let token = cx.tokens.issue(Purpose::CopyRead(read));
                cx.storage.read_view(view, part as usize, &ranges, token);
            }
            _ => self.on_copied(peer, envelope, cx),
        }
    }

    /// Storage has the blocks that a member asked for. If it could not, that one asks again.
    pub fn on_copy_read(
        &mut self,
        read: CopyRead,
        result: Result<Vec<Bytes>, StorageError>,
        cx: &mut Cx<'_>,
    ) {
        let CopyRead { epoch, peer, to, view, part, ranges, .. } = read;
        if self.leading_epoch() != Some(epoch) {
            return;
        }
        let mut pieces = match result {
            Ok(pieces) => pieces,
            Err(StorageError::Checksum { .. }) => return self.give_up_view(to, view, cx),
            Err(_) => return,
        };
        let payload = if pieces.len() == 1 {
            pieces.remove(0)
        } else {
            let mut whole = BytesMut::new();
            whole.extend(pieces);
            whole.freeze()
        };
        let blocks = CopyMessage::Blocks { view, part, ranges, payload };
        cx.answer(peer, to, self.sender(epoch), ReplicaMessage::Copy(blocks));
    }

    /// A block of a view is bad. It is repaired in every view too (C4), but for one that only the
    /// view has by now: a fresh one is offered, which has what came after it.
    fn give_up_view(&mut self, to: ReplicaId, view: ViewId, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &mut self.role else { return };
        if primary.copies.get(&to).is_some_and(|source| source.view.id == view) {
            primary.copies.remove(&to);
            cx.storage.thaw(view);
        }
    }

    /// All of a view has arrived: it is good if the log goes on from there (C1).
    fn on_copied(&mut self, peer: PeerId, envelope: &Envelope, cx: &mut Cx<'_>) {
        let from = self.sender(envelope.epoch);
        let Role::Primary(primary) = &mut self.role else { return };
        let source = primary.copies.get(&envelope.from).expect("looked up by the caller");
        let (view, at) = (source.view.id, source.view.place);
        let goes_on =
            at.lsn == self.log.tail.lsn || cx.storage.header(self.volume, at.lsn.next()).is_some();
        if goes_on {
            let finish = ReplicaMessage::Copy(CopyMessage::Finish { view });
            cx.answer(peer, envelope.from, from, finish);
            return;
        }
        let source = primary.copies.remove(&envelope.from).expect("looked at above");
        cx.storage.thaw(view);
        self.offer(envelope.from, &source.node, cx);
    }
}
