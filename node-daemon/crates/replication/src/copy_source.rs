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
//!
//! The pace (C3): each member has one question out, of at most a megabyte, so a host's command waits
//! for no more than that. While hosts are at work the next one is read only when the last would have
//! gone over at a bounded rate; when they are quiet nothing holds it up.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tercet_proto::message::{CopyMessage, Envelope, ReplicaMessage};
use tercet_proto::{
    BlockRange, Epoch, Instant, NodeName, ReplicaId, StampRun, Stamps, StorageError, View, ViewId,
    VolumeId,
};

use crate::api::{CopyStatus, PeerId};
use crate::catchup::MemberState;
use crate::cx::{Cx, Purpose};
use crate::replica::{Replica, Role};

/// A view is given up when it was not asked for over so many beats.
const SILENT_BEATS: u32 = 8;

/// What members copy from an epoch's primary.
#[derive(Clone, Debug, Default, Hash)]
pub(crate) struct Outgoing {
    /// The views that they copy from.
    sources: BTreeMap<ReplicaId, Source>,
    paces: BTreeMap<ReplicaId, Pace>,
}

/// How fast a member is copied to.
#[derive(Clone, Copy, Debug, Default, Hash)]
struct Pace {
    sent_bytes: u64,
    /// While hosts are at work nothing is read for it before.
    next: Instant,
}

impl Pace {
    /// Whether this much may be read now; if so it is counted.
    fn take(&mut self, bytes: u64, busy_bytes_s: u64, busy: bool, now: Instant) -> bool {
        if busy && now < self.next {
            return false;
        }
        self.sent_bytes += bytes;
        self.next = now + Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / busy_bytes_s);
        true
    }
}

impl Outgoing {
    /// How far the copy to a member is, for people.
    pub fn status(&self, of: ReplicaId) -> Option<CopyStatus> {
        let source = self.sources.get(&of)?;
        let (done_blocks, total_blocks) = source.progress();
        let sent_bytes = self.paces.get(&of).map_or(0, |pace| pace.sent_bytes);
        Some(CopyStatus { done_blocks, total_blocks, sent_bytes })
    }
}

/// What one member copies from.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Source {
    view: View,
    node: NodeName,
    /// When the member last asked, or the view was frozen.
    heard: Instant,
    offered: Instant,
    /// Stamps are compared up to here: part of the view, block.
    at: (u32, u64),
    /// A question that waits for its turn (C3).
    waiting: Option<CopyRead>,
}

impl Source {
    /// Blocks that are equal already, and all blocks of the view.
    fn progress(&self) -> (u64, u64) {
        let parts = self.view.snapshots.iter().map(|one| one.size_blocks);
        let parts = parts.chain([self.view.size_blocks]);
        let before = parts.clone().take(self.at.0 as usize).sum::<u64>();
        (before + self.at.1, parts.sum())
    }
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

/// Stamps that are being read for a member.
#[derive(Clone, Debug, Hash)]
pub(crate) struct CopyStamps {
    pub volume: VolumeId,
    epoch: Epoch,
    peer: PeerId,
    to: ReplicaId,
    view: ViewId,
    part: u32,
    from: u64,
}

impl Replica {
    /// Offers views to whoever needs one, and gives up those that nobody needs.
    pub fn tick_copies(&mut self, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &mut self.role else { return };
        let beat = cx.options.timing.beat;
        let needs = |id: ReplicaId| {
            primary.members.iter().find(|m| m.replica == id).is_some_and(MemberState::needs_copy)
        };
        let over = |id: &ReplicaId, source: &Source| {
            !needs(*id) || cx.now.since(source.heard) > beat * SILENT_BEATS
        };
        let sources = &primary.copies.sources;
        let ended: Vec<ReplicaId> =
            sources.iter().filter(|(id, source)| over(id, source)).map(|e| *e.0).collect();
        for id in ended {
            let source = primary.copies.sources.remove(&id).expect("listed");
            cx.storage.thaw(source.view.id);
        }
        let sources = primary.copies.sources.values_mut();
        let waiting: Vec<_> = sources.filter_map(|source| source.waiting.take()).collect();
        let members = primary.members.iter().filter(|m| m.needs_copy());
        let wanting: Vec<_> = members.map(|m| (m.replica, m.node.clone())).collect();
        for read in waiting {
            self.read_for_copy(read, cx);
        }
        for (id, node) in wanting {
            self.offer(id, &node, cx);
        }
    }

    /// Reads what a member asked for, or puts it off while hosts are at work (C3).
    fn read_for_copy(&mut self, read: CopyRead, cx: &mut Cx<'_>) {
        let busy = self.hosts.busy(cx.now, cx.options.timing.copy_quiet);
        let Role::Primary(primary) = &mut self.role else { return };
        let Some(source) = primary.copies.sources.get_mut(&read.to) else { return };
        let pace = primary.copies.paces.entry(read.to).or_default();
        let bytes: usize = read.ranges.iter().map(|range| range.bytes()).sum();
        if pace.take(bytes as u64, cx.options.limits.copy_busy_bytes_s, busy, cx.now) {
            let (view, part, ranges) = (read.view, read.part as usize, read.ranges.clone());
            let token = cx.tokens.issue(Purpose::CopyRead(read));
            cx.storage.read_view(view, part, &ranges, token);
        } else {
            let at = pace.next;
            source.waiting = Some(read);
            self.wake(at);
        }
    }

    /// Offers a member its view, a fresh one if it has none, unless it was just heard of.
    fn offer(&mut self, to: ReplicaId, node: &NodeName, cx: &mut Cx<'_>) {
        if cx.pairs.route(node, to, self.volume).is_none() {
            return; // nobody would hear it
        }
        let from = self.sender(self.leading_epoch().expect("called by a primary"));
        let start = self.log.start(cx.storage);
        let Role::Primary(primary) = &mut self.role else { return };
        let settled = primary.settled();
        let unreadable = primary.member(to).is_some_and(|member| member.unreadable);
        let source = match primary.copies.sources.entry(to) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(room) => {
                let Some(view) = cx.storage.freeze(self.volume) else { return };
                let (heard, offered) = (cx.now, Instant(0));
                let (node, at, waiting) = (node.clone(), (0, 0), None);
                room.insert(Source { view, node, heard, offered, at, waiting })
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
        for source in copies.sources.into_values() {
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
        let Role::Primary(primary) = &mut self.role else { return };
        let source = primary.copies.sources.get_mut(&envelope.from);
        let source = source.filter(|one| one.view.id == *view);
        let Some(source) = source.filter(|_| primary.config.epoch == envelope.epoch) else {
            return; // given up meanwhile: a fresh view is offered
        };
        source.heard = cx.now;
        match message {
            CopyMessage::AskStamps { view, part, from: first } => {
                source.at = (part, first);
                let (volume, epoch, to) = (self.volume, envelope.epoch, envelope.from);
                let asked = CopyStamps { volume, epoch, peer, to, view, part, from: first };
                let token = cx.tokens.issue(Purpose::CopyStamps(asked.clone()));
                match cx.storage.view_stamps(view, part as usize, first, token) {
                    Stamps::Later => return,
                    Stamps::Here(runs) => self.on_copy_stamps(asked, Ok(runs), cx),
                    Stamps::Gone => {}
                }
                cx.tokens.take(token);
            }
            CopyMessage::AskBlocks { view, part, ranges } => {
                let read = CopyRead {
                    volume: self.volume,
                    epoch: envelope.epoch,
                    peer,
                    to: envelope.from,
                    view,
                    part,
                    ranges,
                };
                self.read_for_copy(read, cx);
            }
            _ => self.on_copied(peer, envelope, cx),
        }
    }

    /// Storage has the stamps that a member asked for. If it could not, that one asks again.
    pub fn on_copy_stamps(
        &mut self,
        asked: CopyStamps,
        result: Result<Vec<StampRun>, StorageError>,
        cx: &mut Cx<'_>,
    ) {
        let CopyStamps { epoch, peer, to, view, part, from, .. } = asked;
        let (true, Ok(runs)) = (self.leading_epoch() == Some(epoch), result) else { return };
        let stamps = CopyMessage::Stamps { view, part, from, runs };
        cx.answer(peer, to, self.sender(epoch), ReplicaMessage::Copy(stamps));
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
        if primary.copies.sources.get(&to).is_some_and(|source| source.view.id == view) {
            primary.copies.sources.remove(&to);
            cx.storage.thaw(view);
        }
    }

    /// All of a view has arrived: it is good if the log goes on from there (C1).
    fn on_copied(&mut self, peer: PeerId, envelope: &Envelope, cx: &mut Cx<'_>) {
        let from = self.sender(envelope.epoch);
        let Role::Primary(primary) = &mut self.role else { return };
        let source = primary.copies.sources.get(&envelope.from).expect("looked up by the caller");
        let (view, at) = (source.view.id, source.view.place);
        let goes_on =
            at.lsn == self.log.tail.lsn || cx.storage.header(self.volume, at.lsn.next()).is_some();
        if goes_on {
            let finish = ReplicaMessage::Copy(CopyMessage::Finish { view });
            cx.answer(peer, envelope.from, from, finish);
            return;
        }
        let source = primary.copies.sources.remove(&envelope.from).expect("looked at above");
        cx.storage.thaw(view);
        self.offer(envelope.from, &source.node, cx);
    }
}

#[cfg(feature = "model")]
impl Outgoing {
    /// See `Node::forget_pace`.
    pub fn forget_pace(&mut self, paced: Instant) {
        self.paces.clear();
        for source in self.sources.values_mut() {
            source.heard = paced;
            source.offered = source.offered.min(paced);
        }
    }
}
