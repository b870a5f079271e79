//! Repair (C4): a block that storage found bad is answered and repaired from another voter's
//! version of *equal stamp*, and from nothing else.
//!
//! Who has a bad block asks one voter after the other. That one applies what it may (W5) and then
//! answers the very version that was asked for, or declines; storage takes the bytes only if they
//! are what was written. Any role asks and any role answers: a stamp names one content for ever, so
//! no epoch is needed to know what the bytes are worth.
//!
//! A host's read that met a bad block is held like one that waits for the lease, and runs anew when
//! the block is repaired: so it is answered while the lease holds (L1), from storage, like every
//! read. Where nobody has the block, that read fails, and the next one does not wait for what was
//! just asked in vain. Everything here is bounded: blocks that are remembered, questions that are
//! out, rounds; what is given up is found again by scrub or by the next read.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tercet_proto::message::{Declined, Envelope, RepairMessage, ReplicaMessage};
use tercet_proto::{
    BlockRange, BlockVersion, Epoch, Instant, Member, NodeName, ReplicaId, SnapshotId, Stamps,
    StorageError, Token, VolumeId,
};

use crate::api::{Notice, Output, PeerId};
use crate::cx::{Cx, Purpose};
use crate::replica::{Replica, Role};

/// Bad blocks of a volume that are looked after at a time.
const REPAIRS_MAX: usize = 1024;
/// Blocks of a volume that are asked for or written at a time.
const UNDER_WAY_MAX: usize = 16;
/// Rounds over all voters before a block is given up.
const ROUNDS_MAX: u32 = 8;
/// Pause behind the first round; twice as long behind each next one.
const REST: Duration = Duration::from_secs(1);
/// The longest pause.
const REST_MAX: Duration = Duration::from_secs(32);
/// Beats until an answer is not waited for any more.
const ANSWER_BEATS: u32 = 2;
/// How often a host's read meets a bad block that was repaired just before it: then the device is
/// no better than the block.
pub(crate) const READS_MAX: u8 = 4;

/// A bad block.
#[derive(Clone, Debug, Hash)]
struct Repair {
    version: BlockVersion,
    /// Rounds that were in vain.
    rounds: u32,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// To be asked for when others are done.
    Waiting,
    /// This voter was asked, the `index`th; its answer is waited for until then.
    Asked { index: usize, to: ReplicaId, until: Instant },
    /// Storage writes what that voter gave.
    Writing { index: usize, token: Token },
    /// Nobody had it.
    Resting { until: Instant },
}

/// The bad blocks of a volume here.
#[derive(Clone, Debug, Hash, Default)]
pub(crate) struct Repairs {
    blocks: BTreeMap<(Option<SnapshotId>, u64), Repair>,
}

/// A version that is being read for a peer.
#[derive(Clone, Debug, Hash)]
pub(crate) struct VersionRead {
    pub volume: VolumeId,
    peer: PeerId,
    to: ReplicaId,
    epoch: Epoch,
    version: BlockVersion,
}

fn key(version: &BlockVersion) -> (Option<SnapshotId>, u64) {
    (version.snapshot, version.block)
}

impl Repairs {
    /// Whether a block of the volume itself in this range will be repaired, or given up, soon.
    pub fn under_way(&self, range: BlockRange) -> bool {
        let mut blocks = self.blocks.range((None, range.start)..(None, range.end()));
        blocks.any(|(_, repair)| !matches!(repair.step, Step::Resting { .. }))
    }

    /// Bad blocks that are known and not repaired.
    pub fn count(&self) -> u64 {
        self.blocks.len() as u64
    }

    fn busy(&self) -> usize {
        let busy = |step: &Step| matches!(step, Step::Asked { .. } | Step::Writing { .. });
        self.blocks.values().filter(|repair| busy(&repair.step)).count()
    }

    fn by_token(&mut self, token: Token) -> Option<&mut Repair> {
        let mut all = self.blocks.values_mut();
        all.find(|r| matches!(r.step, Step::Writing { token: other, .. } if other == token))
    }
}

impl Replica {
    /// Storage found a bad block.
    pub fn on_bad_block(&mut self, version: BlockVersion, cx: &mut Cx<'_>) {
        let known = self.repairs.blocks.get(&key(&version));
        let same = known.is_some_and(|repair| repair.version.stamp == version.stamp);
        let full = known.is_none() && self.repairs.blocks.len() >= REPAIRS_MAX;
        // Who is no complete copy is filled anew; what is bad then is found then (C2).
        if same || full || self.log.incomplete.is_some() {
            return;
        }
        let repair = Repair { version, rounds: 0, step: Step::Waiting };
        self.repairs.blocks.insert(key(&version), repair);
        cx.out.push(Output::Notice(self.volume, Notice::BadBlock(version)));
        self.go_on_repairing(cx);
    }

    /// Asks for as many of those that wait as may be asked for at a time.
    fn go_on_repairing(&mut self, cx: &mut Cx<'_>) {
        while self.repairs.busy() < UNDER_WAY_MAX {
            let mut all = self.repairs.blocks.values();
            let Some(next) = all.find(|repair| repair.step == Step::Waiting) else { return };
            let version = next.version;
            self.ask_for_block(version, 0, cx);
        }
    }

    /// Whether the block is still what it was: not written over, its snapshot not deleted. Where that
    /// is not known at once it is taken for it: storage refuses a repair of anything else.
    fn is_still_there(&self, version: &BlockVersion, cx: &mut Cx<'_>) -> bool {
        match version.snapshot {
            None => {
                let range = BlockRange { start: version.block, count: 1 };
                let token = cx.tokens.issue(Purpose::OwnStamps(self.volume));
                let stamps = cx.storage.stamps(self.volume, range, token);
                cx.tokens.take(token);
                let Stamps::Here(runs) = stamps else { return true };
                runs.iter().any(|run| run.stamp == version.stamp && !run.hole)
            }
            Some(id) => cx.storage.snapshots(self.volume).iter().any(|there| there.id == id),
        }
    }

    /// Asks the first voter from `index` on to which there is a link; without any the round ends.
    fn ask_for_block(&mut self, version: BlockVersion, index: usize, cx: &mut Cx<'_>) {
        if !self.is_still_there(&version, cx) {
            self.repairs.blocks.remove(&key(&version));
            return;
        }
        let voters: Vec<Member> =
            self.known.as_ref().map(|known| self.others(&known.config)).unwrap_or_default();
        let linked =
            |member: &Member| cx.pairs.route(&member.node, member.replica, self.volume).is_some();
        let next = voters.iter().enumerate().skip(index).find(|(_, member)| linked(member));
        let until = cx.now + cx.options.timing.beat * ANSWER_BEATS;
        if let Some((index, member)) = next {
            let step = Step::Asked { index, to: member.replica, until };
            self.set_step(&version, step);
            self.wake(until);
            let from = self.sender(self.promised_epoch());
            let ask = ReplicaMessage::Repair(RepairMessage::Ask { version });
            cx.send(&member.node, member.replica, from, ask);
            return;
        }
        let Some(repair) = self.repairs.blocks.get_mut(&key(&version)) else { return };
        repair.rounds += 1;
        let rounds = repair.rounds;
        if rounds > ROUNDS_MAX {
            self.repairs.blocks.remove(&key(&version));
            return;
        }
        let rest = (REST * (1 << (rounds - 1))).min(REST_MAX);
        repair.step = Step::Resting { until: cx.now + rest };
        self.wake(cx.now + rest);
        if rounds == 1 {
            cx.out.push(Output::Notice(self.volume, Notice::NotRepaired(version)));
        }
    }

    fn set_step(&mut self, version: &BlockVersion, step: Step) {
        if let Some(repair) = self.repairs.blocks.get_mut(&key(version)) {
            repair.step = step;
        }
    }

    /// Whoever did not answer in time is passed over; what rested long enough is asked for again.
    pub fn tick_repairs(&mut self, cx: &mut Cx<'_>) {
        if self.repairs.blocks.is_empty() {
            return;
        }
        if self.log.incomplete.is_some() {
            self.repairs.blocks.clear();
            return;
        }
        let mut late = Vec::new();
        let mut first: Option<Instant> = None;
        for repair in self.repairs.blocks.values_mut() {
            match repair.step {
                Step::Asked { index, until, .. } if until <= cx.now => {
                    late.push((repair.version, index + 1));
                }
                Step::Resting { until } if until <= cx.now => repair.step = Step::Waiting,
                Step::Asked { until, .. } | Step::Resting { until } => {
                    first = Some(first.map_or(until, |first| first.min(until)));
                }
                Step::Waiting | Step::Writing { .. } => {}
            }
        }
        for (version, index) in late {
            self.ask_for_block(version, index, cx);
        }
        if let Some(first) = first {
            self.wake(first);
        }
        self.repairs_changed(cx);
    }

    /// A link is up: who is behind it may have what nobody had.
    pub fn repairs_peer_up(&mut self, node: &NodeName, cx: &mut Cx<'_>) {
        let voters = self.known.as_ref().map(|known| self.others(&known.config));
        if !voters.is_some_and(|voters| voters.iter().any(|member| member.node == *node)) {
            return;
        }
        for repair in self.repairs.blocks.values_mut() {
            if matches!(repair.step, Step::Resting { .. }) {
                repair.step = Step::Waiting;
            }
        }
        self.go_on_repairing(cx);
    }

    /// Something is over: the next one is asked for, and reads that waited run.
    fn repairs_changed(&mut self, cx: &mut Cx<'_>) {
        self.go_on_repairing(cx);
        self.retry_held(cx);
    }

    pub fn on_repair_message(
        &mut self,
        peer: PeerId,
        envelope: &Envelope,
        message: RepairMessage,
        cx: &mut Cx<'_>,
    ) {
        match message {
            RepairMessage::Ask { version } => self.on_block_asked(peer, envelope, version, cx),
            RepairMessage::Block { version, payload } => {
                if let Some(index) = self.asked_of(envelope.from, &version) {
                    let token = cx.tokens.issue(Purpose::Repair(self.volume));
                    self.set_step(&version, Step::Writing { index, token });
                    cx.storage.repair(self.volume, version, payload, token);
                }
            }
            RepairMessage::Declined { version, .. } => {
                if let Some(index) = self.asked_of(envelope.from, &version) {
                    self.ask_for_block(version, index + 1, cx);
                    self.repairs_changed(cx);
                }
            }
        }
    }

    /// The place of that voter among those who are asked, if its answer is waited for.
    fn asked_of(&self, from: ReplicaId, version: &BlockVersion) -> Option<usize> {
        let repair = self.repairs.blocks.get(&key(version)).filter(|r| r.version == *version)?;
        match repair.step {
            Step::Asked { index, to, .. } if to == from => Some(index),
            _ => None,
        }
    }

    /// A peer asks: what is committed is applied first, as far as W5 lets it; then the version is
    /// here, or it is declined.
    fn on_block_asked(
        &mut self,
        peer: PeerId,
        envelope: &Envelope,
        version: BlockVersion,
        cx: &mut Cx<'_>,
    ) {
        if matches!(self.role, Role::Follower { .. }) {
            self.apply_committed(cx);
        }
        let (volume, to) = (self.volume, envelope.from);
        let read = VersionRead { volume, peer, to, epoch: envelope.epoch, version };
        if self.log.incomplete.is_some() {
            return self.decline(read, Declined::Incomplete, cx);
        }
        let token = cx.tokens.issue(Purpose::VersionRead(read));
        cx.storage.read_version(volume, version, token);
    }

    fn decline(&self, read: VersionRead, why: Declined, cx: &mut Cx<'_>) {
        let declined = RepairMessage::Declined { version: read.version, why };
        let from = self.sender(read.epoch);
        cx.answer(read.peer, read.to, from, ReplicaMessage::Repair(declined));
    }

    /// Storage has the version that a peer asked for, or has not.
    pub fn on_version_read(
        &mut self,
        read: VersionRead,
        result: Result<Vec<Bytes>, StorageError>,
        cx: &mut Cx<'_>,
    ) {
        let pieces = match result {
            Ok(pieces) => pieces,
            Err(StorageError::OtherVersion(_)) => {
                return self.decline(read, Declined::OtherVersion, cx);
            }
            Err(StorageError::Busy) => return self.decline(read, Declined::Busy, cx),
            Err(_) => return self.decline(read, Declined::Bad, cx),
        };
        let mut payload = BytesMut::new();
        payload.extend(pieces);
        let block = RepairMessage::Block { version: read.version, payload: payload.freeze() };
        let from = self.sender(read.epoch);
        cx.answer(read.peer, read.to, from, ReplicaMessage::Repair(block));
    }

    /// Storage has taken a peer's bytes, or has not.
    pub fn on_repair_done(
        &mut self,
        token: Token,
        result: &Result<(), StorageError>,
        cx: &mut Cx<'_>,
    ) {
        let Some(repair) = self.repairs.by_token(token) else { return };
        let (version, step) = (repair.version, repair.step);
        let Step::Writing { index, .. } = step else { unreachable!("found by its token") };
        match result {
            Ok(()) => {
                self.repairs.blocks.remove(&key(&version));
                cx.out.push(Output::Notice(self.volume, Notice::Repaired(version)));
            }
            // Written over or deleted meanwhile: nothing is bad any more.
            Err(StorageError::OtherVersion(_)) => {
                self.repairs.blocks.remove(&key(&version));
            }
            // Those were other bytes, or there is no room for now: the next voter, the next round.
            Err(_) => self.ask_for_block(version, index + 1, cx),
        }
        self.repairs_changed(cx);
    }
}
