//! The other side of a copy (C2, C3): a replica that becomes what a view of its primary's is.
//!
//! A pass goes through the parts of the view, the snapshots that are not here first and the volume
//! last. It asks for stamps, compares them with those of its own map, asks for the blocks that
//! differ, and writes them; one question is out at a time, of at most a megabyte, which is the pace
//! (C3). Everything of a pass is volatile but what it has written: after a restart, a lost message or
//! another primary the next offer begins anew, and finds most stamps equal.
//!
//! The replica is durably incomplete from before the first block **(C2)**: it acknowledges nothing,
//! does not stand and does not serve. A view is taken only if it holds whatever this replica may
//! ever have acknowledged: then T5 misses nothing once the mark is gone.

use std::collections::VecDeque;

use bytes::Bytes;
use tercet_proto::copy::{COPY_BLOCKS_MAX, COPY_RANGES_MAX};
use tercet_proto::message::{CopyMessage, Envelope, ReplicaMessage};
use tercet_proto::storage::{Incomplete, Source};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, Piece, Place, ReplicaId, StampRun, Stamps, StorageError, Token, View,
    ViewId,
};

use crate::api::{Notice, Output, PeerId};
use crate::cx::{Cx, Purpose, Sender};
use crate::log::Log;
use crate::replica::{Replica, Role};

/// Blocks of a part that differ and have to come from the source.
type Wanted = VecDeque<(BlockRange, Place)>;

/// A copy, seen from its target.
#[derive(Clone, Debug, Default, Hash)]
pub(crate) struct Incoming {
    pass: Option<Pass>,
    /// What storage does for a copy: nothing new begins before it is done, even if the pass has
    /// ended meanwhile. A piece that landed behind another pass's look at the stamps would stay.
    storing: Option<(Token, Storing)>,
}

/// A step of a copy at storage.
#[derive(Clone, Copy, Debug, Hash)]
enum Storing {
    /// The mark.
    Mark,
    /// Pieces.
    Pieces,
    /// A checkpoint that holds all pieces.
    Settle,
    /// The record that makes them the replica's state at this place.
    Finish(Place),
}

impl Incoming {
    /// Nothing more is asked or written; what storage does already it will finish.
    pub fn stop(&mut self) {
        self.pass = None;
    }
}

/// One pass over a view.
#[derive(Clone, Debug, Hash)]
struct Pass {
    view: View,
    peer: PeerId,
    source: ReplicaId,
    sender: Sender,
    part: usize,
    /// Stamps are known up to here.
    from: u64,
    wanted: Wanted,
    step: Step,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Stamps from `from` on are asked for.
    Stamps,
    /// These blocks are asked for.
    Blocks(Vec<(BlockRange, Place)>),
    /// These came; the own ones have to be read first.
    Comparing(Token, Vec<StampRun>),
    /// Storage is at work.
    Storing,
    /// All is here; whether the log goes on from it is asked.
    Copied,
}

impl Pass {
    fn part_blocks(&self) -> u64 {
        let snapshot = self.view.snapshots.get(self.part);
        snapshot.map_or(self.view.size_blocks, |snapshot| snapshot.size_blocks)
    }

    fn ask(&self, message: CopyMessage, cx: &mut Cx<'_>) {
        let message = ReplicaMessage::Copy(message);
        cx.answer(self.peer.clone(), self.source, self.sender, message);
    }

    /// Sends the question that is out, for the first time or again.
    fn send(&self, cx: &mut Cx<'_>) {
        let (view, part) = (self.view.id, self.part as u32);
        match &self.step {
            Step::Stamps => self.ask(CopyMessage::AskStamps { view, part, from: self.from }, cx),
            Step::Blocks(asked) => {
                let ranges = asked.iter().map(|(range, _)| *range).collect();
                self.ask(CopyMessage::AskBlocks { view, part, ranges }, cx);
            }
            Step::Copied => self.ask(CopyMessage::Copied { view }, cx),
            Step::Comparing(..) | Step::Storing => {}
        }
    }
}

/// Where stamps of a view differ from the own ones: holes, and what has to be fetched. Both begin at
/// the same block; the own runs reach at least as far.
fn compare(from: u64, theirs: &[StampRun], own: &[StampRun]) -> (Vec<Piece>, Wanted) {
    let (mut holes, mut wanted): (Vec<Piece>, Wanted) = (Vec::new(), Wanted::new());
    let mut own = own.iter().copied();
    let mut mine = StampRun { count: 0, stamp: Place::EMPTY, hole: true };
    let mut at = from;
    for run in theirs {
        let mut left = run.count;
        while left > 0 {
            if mine.count == 0 {
                mine = own.next().expect("the own runs reach as far");
            }
            let count = left.min(mine.count);
            if (run.stamp, run.hole) != (mine.stamp, mine.hole) {
                let range = BlockRange { start: at, count };
                if run.hole {
                    push(&mut holes, range, run.stamp);
                } else {
                    wanted.push_back((range, run.stamp));
                }
            }
            (left, mine.count, at) = (left - count, mine.count - count, at + u64::from(count));
        }
    }
    (holes, wanted)
}

fn push(holes: &mut Vec<Piece>, range: BlockRange, stamp: Place) {
    match holes.last_mut().filter(|last| last.range.end() == range.start && last.stamp == stamp) {
        Some(last) => last.range.count += range.count,
        None => holes.push(Piece { range, stamp, data: None }),
    }
}

/// Whether a snapshot that a clone here awaits can never be applied here any more: its source has
/// been copied past its deletion, or is no longer here (S3).
fn is_gone(source: Source, cx: &Cx<'_>) -> bool {
    let there = cx.storage.snapshots(source.volume).iter().any(|s| s.id == source.snapshot);
    let state = cx.storage.replica(source.volume);
    let past = state
        .is_none_or(|state| state.incomplete.is_none() && state.applied.lsn >= source.place.lsn);
    past && !there
}

/// Takes what one question may ask for.
fn next_question(wanted: &mut Wanted) -> Vec<(BlockRange, Place)> {
    let mut asked = Vec::new();
    let mut room = COPY_BLOCKS_MAX;
    while room > 0 && asked.len() < COPY_RANGES_MAX {
        let Some((range, stamp)) = wanted.pop_front() else { break };
        let count = range.count.min(room);
        asked.push((BlockRange { count, ..range }, stamp));
        if count < range.count {
            let rest =
                BlockRange { start: range.start + u64::from(count), count: range.count - count };
            wanted.push_front((rest, stamp));
        }
        room -= count;
    }
    asked
}

impl Replica {
    /// The primary says something of a copy.
    pub fn on_copy_answer(
        &mut self,
        peer: PeerId,
        envelope: &Envelope,
        message: CopyMessage,
        cx: &mut Cx<'_>,
    ) {
        if !self.fits_promise(envelope, cx) || !matches!(self.role, Role::Follower { .. }) {
            return;
        }
        if cx.storage.replica(self.volume).is_none_or(|there| there.replica != self.id) {
            return; // deleted, and about to be told so
        }
        if let CopyMessage::Offer { view, start, settled } = message {
            self.on_offer((peer, envelope), view, start, settled, cx);
            return;
        }
        let Some(pass) = &mut self.incoming.pass else { return };
        match message {
            CopyMessage::Stamps { view, part, from, runs }
                if pass.step == Step::Stamps && pass.is_at(view, part) && pass.from == from =>
            {
                self.on_stamps(runs, cx);
            }
            CopyMessage::Blocks { view, part, ranges, payload } if pass.is_at(view, part) => {
                let asked = matches!(&pass.step, Step::Blocks(asked)
                    if asked.iter().map(|(range, _)| range).eq(&ranges));
                if asked {
                    self.on_blocks(&payload, cx);
                }
            }
            CopyMessage::Finish { view } if pass.step == Step::Copied && pass.view.id == view => {
                let place = pass.view.place;
                self.incoming.pass = None;
                let token = self.store(Storing::Finish(place), cx);
                cx.storage.copy_finish(self.volume, place, token);
            }
            _ => {}
        }
    }

    /// A view is offered: taken where it is needed and holds what was acknowledged here.
    fn on_offer(
        &mut self,
        (peer, envelope): (PeerId, &Envelope),
        view: View,
        start: Place,
        settled: bool,
        cx: &mut Cx<'_>,
    ) {
        if let Some(pass) = &mut self.incoming.pass
            && pass.view.id == view.id
            && pass.source == envelope.from
            && pass.sender.epoch == envelope.epoch
        {
            pass.peer = peer;
            pass.send(cx); // the question or its answer was lost
            return;
        }
        if self.incoming.storing.is_some() {
            return;
        }
        let acknowledged = match self.log.incomplete {
            None if self.log.has(cx.storage, start) => {
                self.matched_with_primary(start.lsn, cx); // its log goes on from here (C1)
                return;
            }
            // What the view has is committed: who lacks some of it holds no tail that anybody could
            // adopt (T5), and the no-op may wait for just this replica (T6).
            None if settled || self.log.durable < view.place => return self.mark_incomplete(cx),
            Some(Incomplete::Awaits(source)) if is_gone(source, cx) => {
                return self.mark_incomplete(cx);
            }
            None | Some(Incomplete::Awaits(_)) => return, // S3: its source's log fills it
            Some(incomplete) => incomplete.acknowledged(),
        };
        let holds = settled || acknowledged.is_some_and(|place| place <= view.place);
        if !holds || cx.storage.in_flight(self.volume) {
            return;
        }
        let shown = cx.storage.replica(self.volume).is_some_and(|one| one.incomplete.is_some());
        assert!(shown, "C2: marked durably before the first block");
        cx.storage.copy_begin(self.volume, &view.snapshots);
        let sender = self.sender(envelope.epoch);
        let (part, from, wanted, step) = (0, 0, Wanted::new(), Step::Stamps);
        let source = envelope.from;
        self.incoming.pass = Some(Pass { view, peer, source, sender, part, from, wanted, step });
        self.begin_part(cx);
    }

    /// C2: from now on nothing is acknowledged, and that will survive a restart.
    fn mark_incomplete(&mut self, cx: &mut Cx<'_>) {
        let incomplete = Incomplete::AcknowledgedUpTo(self.log.durable);
        self.log.incomplete = Some(incomplete);
        let token = self.store(Storing::Mark, cx);
        cx.storage.set_incomplete(self.volume, Some(incomplete), token);
    }

    fn store(&mut self, what: Storing, cx: &mut Cx<'_>) -> Token {
        assert!(self.incoming.storing.is_none(), "one step at a time");
        let token = cx.tokens.issue(Purpose::Copy(self.volume));
        self.incoming.storing = Some((token, what));
        if let Some(pass) = &mut self.incoming.pass {
            pass.step = Step::Storing;
        }
        token
    }

    /// Begins with the next part that is not here.
    fn begin_part(&mut self, cx: &mut Cx<'_>) {
        let own = cx.storage.snapshots(self.volume);
        let Some(pass) = &mut self.incoming.pass else { return };
        while pass.view.snapshots.get(pass.part).is_some_and(|wanted| own.contains(wanted)) {
            pass.part += 1;
        }
        cx.storage.copy_resize(self.volume, pass.part_blocks());
        (pass.from, pass.step) = (0, Step::Stamps);
        pass.send(cx);
    }

    fn on_stamps(&mut self, runs: Vec<StampRun>, cx: &mut Cx<'_>) {
        let Some(pass) = &mut self.incoming.pass else { return };
        let size = pass.part_blocks();
        if runs.is_empty() {
            if pass.from == size {
                self.end_part(cx);
            }
            return; // else no answer to what was asked
        }
        let count: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
        if count > size - pass.from {
            return;
        }
        let range = BlockRange { start: pass.from, count: count as u32 };
        let token = cx.tokens.issue(Purpose::OwnStamps(self.volume));
        match cx.storage.stamps(self.volume, range, token) {
            Stamps::Later => pass.step = Step::Comparing(token, runs),
            Stamps::Gone => self.incoming.stop(),
            Stamps::Here(own) => {
                cx.tokens.take(token);
                self.compare_stamps(&runs, &own, cx);
            }
        }
    }

    /// Storage has the own stamps.
    pub fn on_own_stamps(
        &mut self,
        token: Token,
        result: Result<Vec<StampRun>, StorageError>,
        cx: &mut Cx<'_>,
    ) {
        let Some(pass) = &mut self.incoming.pass else { return };
        if !matches!(&pass.step, Step::Comparing(out, _) if *out == token) {
            return; // of a pass that has ended
        }
        let step = std::mem::replace(&mut pass.step, Step::Stamps);
        let Step::Comparing(_, runs) = step else { unreachable!("just looked at") };
        match result {
            Ok(own) => self.compare_stamps(&runs, &own, cx),
            Err(_) => self.incoming.stop(), // begun anew with the next offer
        }
    }

    /// Takes what differs.
    fn compare_stamps(&mut self, runs: &[StampRun], own: &[StampRun], cx: &mut Cx<'_>) {
        let Some(pass) = &mut self.incoming.pass else { return };
        let count: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
        let (holes, wanted) = compare(pass.from, runs, own);
        pass.from += count;
        pass.wanted = wanted;
        if holes.is_empty() {
            self.next_step(cx);
        } else {
            self.write_pieces(holes, cx);
        }
    }

    fn write_pieces(&mut self, pieces: Vec<Piece>, cx: &mut Cx<'_>) {
        let token = self.store(Storing::Pieces, cx);
        cx.storage.copy_write(self.volume, pieces, token);
    }

    /// Asks for the next blocks that differ, or for the next stamps.
    fn next_step(&mut self, cx: &mut Cx<'_>) {
        let Some(pass) = &mut self.incoming.pass else { return };
        let asked = next_question(&mut pass.wanted);
        pass.step = if asked.is_empty() { Step::Stamps } else { Step::Blocks(asked) };
        pass.send(cx);
    }

    fn on_blocks(&mut self, payload: &Bytes, cx: &mut Cx<'_>) {
        let Some(pass) = &mut self.incoming.pass else { return };
        let Step::Blocks(asked) = &pass.step else { return };
        let bytes: usize = asked.iter().map(|(range, _)| range.bytes()).sum();
        if payload.len() != bytes {
            return;
        }
        let mut from = 0;
        let pieces = asked.iter().map(|(range, stamp)| {
            let data = payload.slice(from..from + range.count as usize * BLOCK_BYTES);
            from += data.len();
            Piece { range: *range, stamp: *stamp, data: Some(data) }
        });
        let pieces = pieces.collect();
        self.write_pieces(pieces, cx);
    }

    /// The own map is this part now.
    fn end_part(&mut self, cx: &mut Cx<'_>) {
        let Some(pass) = &mut self.incoming.pass else { return };
        if let Some(snapshot) = pass.view.snapshots.get(pass.part).cloned() {
            cx.storage.copy_snapshot(self.volume, snapshot);
            pass.part += 1;
            self.begin_part(cx);
            return;
        }
        let token = self.store(Storing::Settle, cx);
        cx.storage.copy_settle(self.volume, token);
    }

    /// Storage has done a step of a copy.
    pub fn on_copy_done(
        &mut self,
        token: Token,
        result: &Result<(), StorageError>,
        cx: &mut Cx<'_>,
    ) {
        let Some((_, what)) = self.incoming.storing.take_if(|(out, _)| *out == token) else {
            return;
        };
        if result.is_err() {
            self.incoming.stop(); // no room for now: begun anew with the next offer
            return;
        }
        match what {
            Storing::Mark => {}
            Storing::Pieces => self.next_step(cx),
            Storing::Settle => {
                if let Some(pass) = &mut self.incoming.pass {
                    pass.step = Step::Copied;
                    pass.send(cx);
                }
            }
            Storing::Finish(place) => self.on_copy_finished(place, cx),
        }
    }

    /// Complete again, at the view's place; the log brings what followed (C1).
    fn on_copy_finished(&mut self, place: Place, cx: &mut Cx<'_>) {
        let Some(state) = cx.storage.replica(self.volume) else { return };
        assert_eq!((state.applied, state.incomplete), (place, None), "C2: what was settled");
        let (heard, size_blocks) = (self.log.heard, self.log.size_blocks);
        self.log = Log::new(&state, cx.storage);
        self.log.heard = self.log.heard.max(heard);
        if self.log.size_blocks != size_blocks {
            cx.out.push(Output::Resized(self.volume, self.log.size_blocks));
        }
        if let Role::Follower { matched } = &mut self.role {
            *matched = tercet_proto::Lsn(0); // of the log that was here before (W3)
        }
        cx.out.push(Output::Notice(self.volume, Notice::Copied));
        self.complete_again(cx);
    }
}

impl Pass {
    fn is_at(&self, view: ViewId, part: u32) -> bool {
        self.view.id == view && self.part as u32 == part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(count: u32, lsn: u64, hole: bool) -> StampRun {
        let stamp = Place { epoch: tercet_proto::Epoch(1), lsn: tercet_proto::Lsn(lsn) };
        StampRun { count, stamp, hole }
    }

    /// A hole that is newer, a hole that is older, data in place of a hole: in either direction.
    #[test]
    fn what_differs_is_found_in_either_direction() {
        let theirs = [run(4, 7, true), run(4, 5, false), run(2, 9, false)];
        let own = [run(2, 7, true), run(4, 8, false), run(4, 9, false)];
        let (holes, wanted) = compare(100, &theirs, &own);
        let holes: Vec<_> = holes.iter().map(|p| (p.range.start, p.range.count)).collect();
        assert_eq!(holes, [(102, 2)]);
        let wanted: Vec<_> = wanted.iter().map(|(r, s)| (r.start, r.count, s.lsn.0)).collect();
        assert_eq!(wanted, [(104, 2, 5), (106, 2, 5)]);
    }

    #[test]
    fn a_question_is_bounded_and_leaves_the_rest() {
        let stamp = Place::EMPTY;
        let mut wanted: Wanted = [(BlockRange { start: 0, count: 10 }, stamp)].into();
        wanted.push_back((BlockRange { start: 50, count: 1000 }, stamp));
        let asked = next_question(&mut wanted);
        assert_eq!(asked[1].0, BlockRange { start: 50, count: COPY_BLOCKS_MAX - 10 });
        let rest = BlockRange { start: 50 + u64::from(COPY_BLOCKS_MAX) - 10, count: 1010 - 256 };
        assert_eq!(wanted, [(rest, stamp)]);
    }
}
