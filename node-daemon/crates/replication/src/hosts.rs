//! Hosts: who may connect, which commands run, and what an association must not outlive (H2-H5).
//!
//! A command of a host that has meanwhile retried it elsewhere must never run late. So nobody but a
//! serving primary keeps one (H2); a demotion ends every association that could do I/O (H4); a host
//! that comes again waits until whatever it sent before is settled (H3); and one that is refused is
//! reported so only when nothing of it can appear any more (H5).

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tercet_proto::message::crc32c;
use tercet_proto::{
    BLOCK_BYTES, BlockRange, EntryKind, Epoch, Instant, Lsn, StorageError, Token, VolumeId,
};

use bytes::Bytes;

use crate::api::{
    AssociationId, Attachment, HostCommand, HostDone, HostError, HostIdentity, HostRefusal, Output,
    VolumeView,
};
use crate::cx::{Cx, HostRead, Purpose};
use crate::options::canary;
use crate::primary::Origin;
use crate::repair::READS_MAX;
use crate::replica::{Replica, Role};

/// An association of a host at this path.
#[derive(Clone, Debug, Hash)]
struct Association {
    host: HostIdentity,
    /// It existed while this node served: a demotion ends it (H4).
    could_do_io: bool,
    /// Kept over a promotion: nothing before it has read this promotion's ANA log (H4).
    gated: bool,
    /// Nothing before this is committed: entries of the host's earlier associations (H3).
    barrier: Lsn,
    /// The last entry appended for it.
    appended: Lsn,
    /// Commands appended and not answered.
    pending: usize,
}

/// A command that waits for the log, the lease, or an entry to be committed.
#[derive(Clone, Debug, Hash)]
struct Held {
    association: AssociationId,
    token: Token,
    command: HostCommand,
    /// How often it has met a bad block (C4).
    met_bad: u8,
}

/// The hosts of one volume at this path.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Hosts {
    volume: VolumeId,
    associations: BTreeMap<AssociationId, Association>,
    /// The last entry of each host's ended associations, while it may be uncommitted (H3).
    ended: BTreeMap<HostIdentity, Lsn>,
    held: VecDeque<Held>,
    /// As of this epoch and generation of the object.
    attachments: Vec<Attachment>,
    epoch: Epoch,
    generation: u64,
    fence: Option<(Epoch, u64)>,
    /// When a host asked for something last (C3).
    asked: Instant,
}

/// A fence that is to be reported once everything up to `after` is committed (H5).
#[derive(Clone, Copy, Debug, Hash)]
pub(crate) struct FenceWanted {
    generation: u64,
    after: Lsn,
}

impl Hosts {
    pub fn new(volume: VolumeId) -> Self {
        Self {
            volume,
            associations: BTreeMap::new(),
            ended: BTreeMap::new(),
            held: VecDeque::new(),
            attachments: Vec::new(),
            epoch: Epoch(0),
            generation: 0,
            fence: None,
            asked: Instant(0),
        }
    }

    /// Whether hosts have been at work a moment ago (C3).
    pub fn busy(&self, now: Instant, quiet: Duration) -> bool {
        self.asked != Instant(0) && now.since(self.asked) < quiet
    }

    fn attachment(&self, host: &HostIdentity) -> Option<&Attachment> {
        self.attachments.iter().find(|attachment| attachment.host_nqn == host.nqn)
    }

    /// Forgets an association; what it appended is remembered for the host's next one (H3).
    fn forget(&mut self, id: AssociationId) -> bool {
        let Some(gone) = self.associations.remove(&id) else { return false };
        self.held.retain(|held| held.association != id);
        let last = self.ended.entry(gone.host).or_default();
        *last = (*last).max(gone.appended);
        true
    }

    fn end(&mut self, id: AssociationId, out: &mut Vec<Output>) {
        if self.forget(id) {
            out.push(Output::HostEnd(id));
        }
    }

    fn end_where(&mut self, what: impl Fn(&Association) -> bool, out: &mut Vec<Output>) {
        let matching = self.associations.iter().filter(|(_, a)| what(a));
        let ids: Vec<_> = matching.map(|(id, _)| *id).collect();
        for id in ids {
            self.end(id, out);
        }
    }

    /// H4: a demotion ends each association that could do I/O here, and its commands with it.
    pub fn end_all_that_could(&mut self, out: &mut Vec<Output>) {
        self.end_where(|association| association.could_do_io, out);
        self.ended.clear(); // a later epoch's no-op commits or drops all of it (T6)
        self.held.clear();
    }

    /// Everything here ends: the replica is deleted.
    pub fn end_all(&mut self, out: &mut Vec<Output>) {
        self.end_where(|_| true, out);
    }

    /// H4: a promotion keeps associations that never could do I/O here; they wait for the ANA log.
    pub fn promoted(&mut self, out: &mut Vec<Output>) {
        self.end_where(|association| association.could_do_io, out);
        for association in self.associations.values_mut() {
            association.could_do_io = true;
            association.gated = true;
        }
    }

    pub fn read_ana(&mut self, id: AssociationId) {
        if let Some(association) = self.associations.get_mut(&id) {
            association.gated = false;
        }
    }

    /// An entry of the association is committed; whether it is still there to be answered.
    pub fn answered(&mut self, id: AssociationId) -> bool {
        let Some(association) = self.associations.get_mut(&id) else { return false };
        association.pending -= 1;
        true
    }

    /// The association whose command waited for bytes is still there.
    fn has(&self, id: AssociationId) -> bool {
        self.associations.contains_key(&id)
    }

    pub fn has_held(&self) -> bool {
        !self.held.is_empty()
    }
}

/// Whether a command is done with for now.
enum Ran {
    Done,
    /// It has to wait.
    Hold(HostCommand),
}

impl Replica {
    /// H3: one association for a host; an older one ends here and now.
    pub fn host_connect(&mut self, id: AssociationId, host: HostIdentity, cx: &mut Cx<'_>) -> bool {
        if self.hosts.attachment(&host).is_none() {
            cx.out.push(Output::HostAccepted(id, Err(HostRefusal::NotAllowed)));
            return false;
        }
        self.hosts.end_where(|older| older.host == host, cx.out);
        let committed = match &self.role {
            Role::Primary(primary) => primary.commit.lsn,
            _ => Lsn(0),
        };
        self.hosts.ended.retain(|_, last| *last > committed);
        let mut barrier = self.hosts.ended.get(&host).copied().unwrap_or_default();
        if canary!(cx.options, ServeReconnectEarly) {
            barrier = Lsn(0);
        }
        let could_do_io = self.is_serving();
        let association =
            Association { host, could_do_io, gated: false, barrier, appended: Lsn(0), pending: 0 };
        self.hosts.associations.insert(id, association);
        cx.out.push(Output::HostAccepted(id, Ok(())));
        true
    }

    pub fn host_gone(&mut self, id: AssociationId) {
        self.hosts.forget(id);
    }

    /// A command arrives.
    pub fn host_command(
        &mut self,
        association: AssociationId,
        token: Token,
        command: HostCommand,
        cx: &mut Cx<'_>,
    ) {
        self.hosts.asked = cx.now;
        match self.run((association, token, 0), command, cx) {
            Ran::Done => {}
            Ran::Hold(_) if self.hosts.held.len() >= cx.options.limits.held_commands => {
                let full = Err(HostError::Inaccessible);
                cx.out.push(Output::HostDone(association, token, full));
            }
            Ran::Hold(command) => {
                self.hosts.held.push_back(Held { association, token, command, met_bad: 0 });
            }
        }
    }

    /// Something changed for which a command may have waited.
    pub fn retry_held(&mut self, cx: &mut Cx<'_>) {
        if !self.hosts.has_held() || !self.is_serving() {
            return;
        }
        for held in std::mem::take(&mut self.hosts.held) {
            let Held { association, token, command, met_bad } = held;
            if let Ran::Hold(command) = self.run((association, token, met_bad), command, cx) {
                self.hosts.held.push_back(Held { association, token, command, met_bad });
            }
        }
    }

    fn run(
        &mut self,
        (id, token, met_bad): (AssociationId, Token, u8),
        command: HostCommand,
        cx: &mut Cx<'_>,
    ) -> Ran {
        let Some(association) = self.hosts.associations.get(&id) else { return Ran::Done };
        let leaving = match &self.role {
            Role::Primary(primary) if primary.serving => primary.drains(),
            _ if canary!(cx.options, QueueOnSecondary) => return Ran::Hold(command),
            _ => true, // H2
        };
        let read_only =
            self.hosts.attachment(&association.host).is_none_or(|attachment| attachment.read_only);
        let gated = association.gated && !canary!(cx.options, QueueOnSecondary);
        if leaving || gated {
            return fail(id, token, HostError::Inaccessible, cx);
        }
        if let Err(error) = check(&command, self.log.size_blocks, read_only) {
            return fail(id, token, error, cx);
        }
        let Role::Primary(primary) = &self.role else { unreachable!("serving") };
        if association.barrier > primary.commit.lsn {
            return Ran::Hold(command); // H3
        }
        match command {
            HostCommand::Flush => {
                cx.out.push(Output::HostDone(id, token, Ok(HostDone::Ok)));
                Ran::Done
            }
            HostCommand::Read(range)
            | HostCommand::Compare(range, _)
            | HostCommand::CompareWrite(range, ..)
                if self.repairs.under_way(range) =>
            {
                Ran::Hold(command) // C4
            }
            HostCommand::Read(range) => self.start_read((id, token, met_bad), range, command, cx),
            HostCommand::Compare(range, _) => {
                if primary.overlap(range).is_some() {
                    return Ran::Hold(command); // L1: waits for overlapping earlier entries
                }
                self.start_read((id, token, met_bad), range, command, cx)
            }
            HostCommand::CompareWrite(range, ..) => {
                let waits = primary.overlap(range).is_some() || self.is_comparing(range);
                if waits && !canary!(cx.options, CompareAtOnce) {
                    return Ran::Hold(command); // L1
                }
                self.start_read((id, token, met_bad), range, command, cx)
            }
            HostCommand::Write(range, _) | HostCommand::Zero(range, _) => {
                if self.is_comparing(range) {
                    return Ran::Hold(command); // L1
                }
                self.change(id, token, command, cx)
            }
        }
    }

    fn start_read(
        &mut self,
        (association, token, met_bad): (AssociationId, Token, u8),
        range: BlockRange,
        command: HostCommand,
        cx: &mut Cx<'_>,
    ) -> Ran {
        if !self.has_lease(cx) {
            self.check_lease(cx);
            return Ran::Hold(command); // T8
        }
        let Role::Primary(primary) = &mut self.role else { unreachable!("serving") };
        primary.reads += 1;
        if matches!(command, HostCommand::CompareWrite(..)) {
            primary.comparing.push((association, token, range));
        }
        let epoch = primary.epoch();
        let read = HostRead { epoch, association, token, command, met_bad };
        let own = cx.tokens.issue(Purpose::HostRead(self.volume, read));
        cx.storage.read(self.volume, range, own);
        Ran::Done
    }

    /// L1: the bytes are there; the lease has to hold now, when the reply is sent.
    pub fn on_host_read(
        &mut self,
        read: HostRead,
        result: Result<Vec<Bytes>, StorageError>,
        cx: &mut Cx<'_>,
    ) {
        let Role::Primary(primary) = &mut self.role else { return };
        if primary.epoch() != read.epoch {
            return; // its association has ended with that epoch (H4)
        }
        primary.reads -= 1;
        let compared = primary.comparing.len();
        primary.comparing.retain(|(of, which, _)| (*of, *which) != (read.association, read.token));
        let has_compared = primary.comparing.len() != compared;
        self.finish_read(read, result, cx);
        if has_compared {
            self.retry_held(cx); // what waited for its range
        }
    }

    fn finish_read(
        &mut self,
        read: HostRead,
        result: Result<Vec<Bytes>, StorageError>,
        cx: &mut Cx<'_>,
    ) {
        let HostRead { association, token, command, met_bad, .. } = read;
        if !self.hosts.has(association) {
            self.leave(cx);
            return;
        }
        if !self.has_lease(cx) {
            self.check_lease(cx);
            self.hosts.held.push_back(Held { association, token, command, met_bad });
            return;
        }
        if matches!(result, Err(StorageError::Checksum { .. })) {
            self.met_bad_block(Held { association, token, command, met_bad }, cx);
            return;
        }
        let done = match result {
            Ok(data) => match &command {
                HostCommand::Compare(range, expected) => Ok(compare(*range, expected, &data)),
                HostCommand::CompareWrite(range, expected, _) => {
                    match compare(*range, expected, &data) {
                        HostDone::Ok => {
                            return self.write_compared(association, token, command, cx);
                        }
                        differs => Ok(differs),
                    }
                }
                _ => Ok(HostDone::Data(data)),
            },
            Err(_) => Err(HostError::Inaccessible),
        };
        cx.out.push(Output::HostDone(association, token, done));
        self.leave(cx);
    }

    /// C4: it runs anew when the block is repaired, or fails where nobody has it.
    fn met_bad_block(&mut self, read: Held, cx: &mut Cx<'_>) {
        let (HostCommand::Read(range)
        | HostCommand::Compare(range, _)
        | HostCommand::CompareWrite(range, ..)) = read.command
        else {
            unreachable!("who reads")
        };
        let again = read.met_bad < READS_MAX && self.repairs.under_way(range);
        if again && self.hosts.held.len() < cx.options.limits.held_commands {
            self.hosts.held.push_back(Held { met_bad: read.met_bad + 1, ..read });
        } else {
            let media = Err(HostError::Media);
            cx.out.push(Output::HostDone(read.association, read.token, media));
        }
        self.retry_held(cx); // it may be repaired already, or leaving has begun
        self.leave(cx);
    }

    /// The write of a fused compare-and-write, in the very step in which it was found equal: no
    /// change of its range has been ordered since the compare began (L1).
    fn write_compared(
        &mut self,
        association: AssociationId,
        token: Token,
        command: HostCommand,
        cx: &mut Cx<'_>,
    ) {
        let Role::Primary(primary) = &self.role else { unreachable!("it compared") };
        if primary.drains() {
            cx.out.push(Output::HostDone(association, token, Err(HostError::Inaccessible)));
            return self.leave(cx);
        }
        if let Ran::Hold(command) = self.change(association, token, command, cx) {
            // No room in the log: from the start, because others may change the range meanwhile.
            self.hosts.held.push_back(Held { association, token, command, met_bad: 0 });
        }
    }

    /// Whether a change of `range` has to wait: a fused compare-and-write of it is under way, or
    /// was held before (and would wait for ever behind a stream of changes).
    fn is_comparing(&self, range: BlockRange) -> bool {
        let Role::Primary(primary) = &self.role else { return false };
        let waits = |held: &Held| matches!(&held.command, HostCommand::CompareWrite(other, ..) if other.overlaps(range));
        primary.comparing.iter().any(|(.., other)| other.overlaps(range))
            || self.hosts.held.iter().any(waits)
    }

    /// A write or zeroes: ordered at once, or held when the log has no room for now.
    fn change(
        &mut self,
        id: AssociationId,
        token: Token,
        command: HostCommand,
        cx: &mut Cx<'_>,
    ) -> Ran {
        let Role::Primary(primary) = &self.role else { unreachable!("serving") };
        if primary.window.len() >= cx.options.limits.window_entries {
            return Ran::Hold(command);
        }
        let (kind, payload) = match &command {
            HostCommand::Write(range, payload) | HostCommand::CompareWrite(range, _, payload) => {
                let payload_crc = crc32c(payload);
                (EntryKind::Write { range: *range, payload_crc }, payload.clone())
            }
            HostCommand::Zero(range, discard) => {
                (EntryKind::Zero { range: *range, discard: *discard }, Bytes::new())
            }
            _ => unreachable!("changes only"),
        };
        match self.append(kind, payload, Origin::Host(id, token), cx) {
            Ok(lsn) => {
                let association = self.hosts.associations.get_mut(&id).expect("looked up before");
                association.appended = lsn;
                association.pending += 1;
                Ran::Done
            }
            Err(StorageError::Busy) => Ran::Hold(command),
            Err(StorageError::NoSpace { .. }) => fail(id, token, HostError::NoSpace, cx),
            Err(_) => fail(id, token, HostError::Inaccessible, cx),
        }
    }

    /// The attachments as the object has them: who is refused loses its association (H5).
    pub fn take_attachments(&mut self, view: VolumeView, cx: &mut Cx<'_>) {
        // Epoch and generation of one object never fall. A consistent read or a swap's answer can
        // be overtaken by a newer view, and must not let a refused host in again (H5).
        let epoch = view.config.as_ref().map_or(Epoch(0), |config| config.epoch);
        if (epoch, view.generation) < (self.hosts.epoch, self.hosts.generation) {
            return;
        }
        self.hosts.epoch = epoch;
        self.hosts.generation = view.generation;
        self.hosts.fence = view.fence;
        self.hosts.attachments = view.attachments;
        let hosts = &self.hosts;
        let refused =
            hosts.associations.iter().filter(|(_, a)| hosts.attachment(&a.host).is_none());
        let refused: Vec<_> = refused.map(|(id, _)| *id).collect();
        for id in refused {
            self.hosts.end(id, cx.out);
        }
        self.want_fence(cx);
    }

    /// H5: after everything that is in the log now, refused hosts can leave nothing behind.
    pub fn want_fence(&mut self, cx: &mut Cx<'_>) {
        let after = self.log.tail.lsn;
        let generation = self.hosts.generation;
        let over = self.known_epoch();
        let Role::Primary(primary) = &mut self.role else { return };
        if primary.epoch() < over {
            return; // it would count for nothing: the next one's does (H5)
        }
        let told = self.hosts.fence == Some((primary.epoch(), generation));
        let wanted = primary.fence.is_some_and(|fence| fence.generation == generation);
        if primary.serving && !told && !wanted {
            primary.fence = Some(FenceWanted { generation, after });
            self.report_fence(cx);
        }
    }

    pub fn report_fence(&mut self, cx: &mut Cx<'_>) {
        let Role::Primary(primary) = &mut self.role else { return };
        if primary.serving
            && let Some(FenceWanted { generation, after }) = primary.fence
            && after != Lsn(u64::MAX)
            && primary.commit.lsn >= after
        {
            primary.fence = Some(FenceWanted { generation, after: Lsn(u64::MAX) });
            let (volume, epoch) = (self.hosts.volume, primary.epoch());
            cx.out.push(Output::Fenced { volume, epoch, generation });
        }
    }
}

fn fail(id: AssociationId, token: Token, error: HostError, cx: &mut Cx<'_>) -> Ran {
    cx.out.push(Output::HostDone(id, token, Err(error)));
    Ran::Done
}

/// What can be said of a command before it is ordered.
fn check(command: &HostCommand, size_blocks: u64, read_only: bool) -> Result<(), HostError> {
    let (range, payload, changes) = match command {
        HostCommand::CompareWrite(range, expected, _) if expected.len() != range.bytes() => {
            return Err(HostError::OutOfRange);
        }
        HostCommand::Flush => return Ok(()),
        HostCommand::Read(range) => (range, None, false),
        HostCommand::Compare(range, payload) => (range, Some(payload), false),
        HostCommand::Write(range, payload) | HostCommand::CompareWrite(range, _, payload) => {
            (range, Some(payload), true)
        }
        HostCommand::Zero(range, _) => (range, None, true),
    };
    let end = range.start.checked_add(u64::from(range.count)).ok_or(HostError::OutOfRange)?;
    let fits = payload.is_none_or(|payload| payload.len() == range.bytes());
    if range.count == 0 || end > size_blocks || !fits {
        return Err(HostError::OutOfRange);
    }
    if changes && read_only { Err(HostError::ReadOnly) } else { Ok(()) }
}

/// The first block that differs, if one does.
fn compare(range: BlockRange, expected: &Bytes, data: &[Bytes]) -> HostDone {
    let found = data.iter().flat_map(|piece| piece.iter());
    match found.zip(expected.iter()).position(|(found, expected)| found != expected) {
        Some(byte) => HostDone::Differs(range.start + (byte / BLOCK_BYTES) as u64),
        None => HostDone::Ok,
    }
}

#[cfg(feature = "model")]
impl Hosts {
    /// See `Node::forget_pace`.
    pub fn forget_pace(&mut self) {
        self.asked = Instant(0);
    }
}
