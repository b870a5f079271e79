//! One TCP connection of a host: initialization, capsules, R2T and data transfers, responses.
//!
//! Knows PDUs and the length of a command's data, not what a command does: whole requests come
//! out, responses go in. Bounded: commands by the queue's entries, data by
//! [`TRANSFER_BUDGET_BYTES`], output by [`OUTPUT_BYTES_MAX`] (the executor stops reading above
//! it). Any byte sequence ends in requests or in a [`Fatal`]. The two commands of a fused operation
//! become one request: what ties them together is that one follows the other, which is known here
//! alone (`pairs.rs`).

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};
use tercet_proto::page_aligned;

use super::api::CloseReason;
use super::pairs::{Next, Pair};
use crate::auth::MESSAGE_BYTES_MAX;
use crate::command::{self, COPY_RANGES_MAX, Completion, Data, Entry, admin, fctype, io};
use crate::fabrics::CONNECT_DATA_BYTES;
use crate::frame::{Frame, Framer, Reader};
use crate::log::ERRORS_MAX;
use crate::outbox::Outbox;
use crate::pdu::{
    COMMON_BYTES, Common, Digests, Fatal, FatalStatus, IcReq, IcResp, PduType, SHORT_BYTES,
    Transfer, crc32c, crc32c_pieces, flags, parse_termination, termination,
};
use crate::status::Status;
use crate::{ADMIN_IN_CAPSULE_BYTES_MAX, BLOCK_BYTES, IN_CAPSULE_BYTES_MAX, TRANSFER_BYTES_MAX};

/// MAXH2CDATA: whole transfers in one PDU, so that a payload is gathered once at most.
pub const DATA_PDU_BYTES_MAX: usize = TRANSFER_BYTES_MAX;
/// Data of commands under way on one connection, at most (`limits.rs`); commands beyond it wait
/// their turn.
pub const TRANSFER_BUDGET_BYTES: usize = 8 << 20;
/// Output above which nothing is read and no waiting command started.
pub const OUTPUT_BYTES_MAX: usize = 4 << 20;
/// Entries of a queue before Connect has said how many: Connect itself.
const ENTRIES_BEFORE_CONNECT: u16 = 1;

/// A command whose data has arrived.
#[derive(Debug)]
pub(super) struct Request {
    pub entry: Entry,
    /// Data from the host.
    pub data: Bytes,
    /// Bytes that the host has room for.
    pub room: u32,
    /// The second command of a fused operation: its entry and data.
    pub fused: Option<(Entry, Bytes)>,
}

/// A command that failed, for the Error Information log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    pub entry: Entry,
    pub status: Status,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// Waits for budget: its data, and what of it came in the capsule.
    Waiting(Data, Bytes),
    /// An R2T is out.
    Receiving { bytes: u32, received: u32, gathered: BytesMut, intact: bool },
    /// Its data is there; it waits for the other command of its fused operation.
    Arrived(Bytes),
    /// The request was handed out.
    Running,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub entry: Entry,
    pub stage: Stage,
    /// What it is of a fused operation.
    pub pair: Pair,
    /// What it takes of the budget.
    cost_bytes: usize,
    /// Data in its capsule.
    capsule_bytes: usize,
    /// Bytes that the host has room for.
    room: u32,
    /// Tells a reused identifier from its predecessor.
    generation: u32,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    framer: Framer,
    pub outbox: Outbox,
    initialized: bool,
    digests: Digests,
    /// Alignment of C2HData in bytes (HPDA).
    alignment_bytes: usize,
    entries: u16,
    flow_control: bool,
    head: u16,
    /// By command identifier.
    pub(super) slots: BTreeMap<u16, Slot>,
    /// What the next command is to the one before it.
    pub(super) next: Next,
    waiting: VecDeque<u16>,
    in_use_bytes: usize,
    /// Data in capsules of commands under way.
    capsule_bytes: usize,
    /// What may be under way at a time; one command may exceed it.
    budget_bytes: usize,
    generation: u32,
    pub requests: VecDeque<Request>,
    /// The last commands that failed, until they are taken into the log.
    pub failures: VecDeque<Failure>,
    is_admin: bool,
}

impl Connection {
    pub fn new() -> Self {
        Self {
            framer: Framer::new(Reader::Controller, ADMIN_IN_CAPSULE_BYTES_MAX, DATA_PDU_BYTES_MAX),
            outbox: Outbox::default(),
            initialized: false,
            digests: Digests::default(),
            alignment_bytes: 4,
            entries: ENTRIES_BEFORE_CONNECT,
            flow_control: true,
            head: 0,
            slots: BTreeMap::new(),
            next: Next::Any,
            waiting: VecDeque::new(),
            in_use_bytes: 0,
            capsule_bytes: 0,
            budget_bytes: TRANSFER_BUDGET_BYTES,
            generation: 0,
            requests: VecDeque::new(),
            failures: VecDeque::new(),
            is_admin: true,
        }
    }

    /// Connect succeeded: the queue's size and kind.
    pub fn set_queue(&mut self, entries: u16, flow_control: bool, is_admin: bool) {
        self.entries = entries;
        self.flow_control = flow_control;
        self.is_admin = is_admin;
        let most = if is_admin { ADMIN_IN_CAPSULE_BYTES_MAX } else { IN_CAPSULE_BYTES_MAX };
        self.framer.set_capsule_bytes_max(most);
    }

    /// Whether the executor should read from the socket.
    pub fn wants_input(&self) -> bool {
        self.outbox.queued_bytes() < OUTPUT_BYTES_MAX && self.capsule_bytes < self.budget_bytes
    }

    /// From the next command on, that much data may be under way.
    pub fn set_budget(&mut self, bytes: usize) {
        self.budget_bytes = bytes;
    }

    /// Commands that have not been answered.
    pub fn commands(&self) -> usize {
        self.slots.len()
    }

    /// Bytes of their data.
    pub fn held_bytes(&self) -> usize {
        self.in_use_bytes + self.capsule_bytes
    }

    /// See [`Framer::missing_bytes`].
    pub fn missing_bytes(&self) -> usize {
        self.framer.missing_bytes()
    }

    /// The generation of a command under way; names it together with queue and identifier.
    pub fn generation(&self, id: u16) -> Option<u32> {
        self.slots.get(&id).map(|slot| slot.generation)
    }

    /// Commands that have been handed out and not been answered.
    pub fn running(&self) -> usize {
        self.slots.values().filter(|slot| matches!(slot.stage, Stage::Running)).count()
    }

    /// Takes bytes from the host; requests appear in [`Connection::requests`].
    pub fn input(&mut self, mut input: Bytes) -> Result<(), CloseReason> {
        loop {
            let frame = match self.framer.next(&mut input) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(fatal) => {
                    let cause = self.framer.partial_header().to_vec();
                    return Err(self.terminate(fatal, &cause));
                }
            };
            if frame.common.kind == PduType::H2CTermReq {
                let (status, information) = parse_termination(frame.header());
                return Err(CloseReason::Terminated { status, information });
            }
            if let Err(fatal) = self.take(&frame) {
                return Err(self.terminate(fatal, frame.header()));
            }
        }
    }

    fn terminate(&mut self, fatal: Fatal, cause: &[u8]) -> CloseReason {
        self.outbox.put(&termination(PduType::C2HTermReq, fatal, cause));
        CloseReason::Malformed(fatal)
    }

    fn take(&mut self, frame: &Frame) -> Result<(), Fatal> {
        match (frame.common.kind, self.initialized) {
            (PduType::IcReq, false) => self.initialize(IcReq::parse(frame.header())),
            (PduType::CapsuleCmd, true) => self.take_capsule(frame),
            (PduType::H2CData, true) => self.take_data(frame),
            _ => Err(Fatal::plain(FatalStatus::Sequence)),
        }
    }

    /// TCP 3.1: ICReq, then ICResp with the same digests, CPDA 0.
    fn initialize(&mut self, request: IcReq) -> Result<(), Fatal> {
        let unsupported =
            |offset| Err(Fatal { status: FatalStatus::UnsupportedParameter, information: offset });
        if request.format != 0 {
            return unsupported(8);
        }
        if request.host_alignment > 31 {
            return Err(Fatal::header(10));
        }
        if request.digests & !3 != 0 {
            return Err(Fatal::header(11));
        }
        self.digests = Digests::from_wire(request.digests);
        self.alignment_bytes = (usize::from(request.host_alignment) + 1) * 4;
        self.framer.set_digests(self.digests);
        self.initialized = true;
        let response = IcResp {
            format: 0,
            controller_alignment: 0,
            digests: self.digests.to_wire(),
            data_bytes_max: DATA_PDU_BYTES_MAX as u32,
        };
        self.outbox.put(&response.to_wire());
        Ok(())
    }

    fn take_capsule(&mut self, frame: &Frame) -> Result<(), Fatal> {
        let entry = Entry::parse(&frame.header()[COMMON_BYTES..]);
        let id = entry.id();
        if self.slots.contains_key(&id) {
            // Two commands with one identifier cannot be told apart any more: only a host that
            // has lost count does this.
            return Err(Fatal::header(COMMON_BYTES as u32 + 2));
        }
        if self.slots.len() >= usize::from(self.entries) {
            return Err(Fatal::plain(FatalStatus::Sequence));
        }
        self.generation = self.generation.wrapping_add(1);
        let slot = Slot {
            entry,
            stage: Stage::Running,
            pair: Pair::Alone,
            cost_bytes: 0,
            capsule_bytes: frame.data.len(),
            room: 0,
            generation: self.generation,
        };
        self.capsule_bytes += slot.capsule_bytes;
        self.slots.insert(id, slot);
        // Of the admin queue's commands none can be fused; they are told so when they run.
        let paired = if self.is_admin { Ok(()) } else { self.pair(id) };
        let admitted = paired.and_then(|()| {
            if !frame.data_intact {
                return Err(Status::TRANSIENT_TRANSPORT);
            }
            self.admit(&entry, frame.data.len())
        });
        let data = match admitted {
            Ok(data) => data,
            Err(status) => {
                self.respond(id, status, 0);
                return Ok(());
            }
        };
        let slot = self.slots.get_mut(&id).expect("just inserted");
        slot.stage = Stage::Waiting(data, frame.data.clone());
        if slot.claim_bytes(self.is_admin) == 0 {
            self.hand_out(id, frame.data.clone(), 0);
        } else {
            self.waiting.push_back(id);
            self.start_waiting();
        }
        Ok(())
    }

    /// Checks the SGL against what the command moves, before anything is allocated for it.
    fn admit(&self, entry: &Entry, capsule_bytes: usize) -> Result<Data, Status> {
        let data = entry.data(capsule_bytes)?;
        let bytes = data.bytes() as usize;
        if bytes > TRANSFER_BYTES_MAX {
            return Err(Status::INVALID_FIELD); // MDTS, Base 5.17.2.1
        }
        let from_host = host_bytes(entry, self.is_admin);
        match (from_host, data) {
            (Some((least, most)), _) if bytes < least || bytes > most => Err(Status::SGL_LENGTH),
            (None, Data::InCapsule(_)) => Err(Status::SGL_TYPE),
            _ => Ok(data),
        }
    }

    /// Starts waiting commands as far as the budget goes, in order.
    pub fn start_waiting(&mut self) {
        while let Some(&id) = self.waiting.front() {
            let slot = self.slots.get_mut(&id).expect("waiting commands have slots");
            let cost_bytes = slot.claim_bytes(self.is_admin);
            let Stage::Waiting(data, capsule) = &slot.stage else {
                unreachable!("queued as waiting")
            };
            let (data, capsule) = (*data, capsule.clone());
            let fits =
                self.in_use_bytes == 0 || self.in_use_bytes + cost_bytes <= self.budget_bytes;
            if !fits || self.outbox.queued_bytes() >= OUTPUT_BYTES_MAX {
                return;
            }
            self.waiting.pop_front();
            self.in_use_bytes += cost_bytes;
            slot.cost_bytes = cost_bytes;
            match data {
                Data::Transport(bytes) if host_bytes(&slot.entry, self.is_admin).is_some() => {
                    let gathered = BytesMut::new();
                    slot.stage = Stage::Receiving { bytes, received: 0, gathered, intact: true };
                    // TTAG = CID: one R2T for each command, and identifiers are unique here.
                    let transfer = Transfer { command_id: id, tag: id, offset: 0, bytes };
                    self.put_short(PduType::R2T, |out| transfer.put(out));
                }
                Data::Transport(bytes) => self.hand_out(id, Bytes::new(), bytes),
                Data::InCapsule(_) | Data::None => self.hand_out(id, capsule, 0),
            }
        }
    }

    /// A command's data is there: it is handed out, or waits for the other half of its operation.
    fn hand_out(&mut self, id: u16, data: Bytes, room: u32) {
        let slot = self.slots.get_mut(&id).expect("a command has its slot");
        match slot.pair {
            Pair::Alone => {
                slot.stage = Stage::Running;
                slot.room = room;
                let entry = slot.entry;
                self.requests.push_back(Request { entry, data, room, fused: None });
            }
            Pair::Doomed(status) => self.respond(id, status, 0),
            Pair::First(_) | Pair::Second(_) => {
                slot.stage = Stage::Arrived(data);
                self.join(id);
            }
        }
    }

    /// Takes back a command that waits for its turn; others run (Base 5.1: best effort).
    pub fn abort(&mut self, id: u16) -> bool {
        let Some(slot) = self.slots.get(&id) else { return false };
        let waits = matches!(slot.stage, Stage::Waiting(..)) && slot.pair == Pair::Alone;
        if waits {
            self.waiting.retain(|&waiting| waiting != id);
            self.respond(id, Status::ABORT_REQUESTED, 0);
        }
        waits
    }

    /// H2CData (TCP 3.6.2.7): in order, within the R2T, LAST with its last byte.
    fn take_data(&mut self, frame: &Frame) -> Result<(), Fatal> {
        let transfer = Transfer::parse(frame.header());
        let slot = self.slots.get_mut(&transfer.tag).ok_or(Fatal::header(10))?;
        let Stage::Receiving { bytes, received, gathered, intact } = &mut slot.stage else {
            return Err(Fatal::header(10));
        };
        if transfer.command_id != transfer.tag {
            return Err(Fatal::header(8));
        }
        let end = received.checked_add(transfer.bytes);
        if transfer.offset != *received || end.is_none_or(|end| end > *bytes) {
            return Err(Fatal { status: FatalStatus::DataOutOfRange, information: 12 });
        }
        let is_whole = transfer.bytes == *bytes;
        *received += transfer.bytes;
        *intact &= frame.data_intact;
        let is_last = frame.common.flags & flags::LAST != 0;
        if is_last != (*received == *bytes) {
            return Err(Fatal::header(1));
        }
        if !is_whole {
            if gathered.is_empty() {
                *gathered = page_aligned(*bytes as usize);
            }
            gathered.extend_from_slice(&frame.data);
        }
        if !is_last {
            return Ok(());
        }
        let intact = *intact;
        let data = if is_whole { frame.data.clone() } else { std::mem::take(gathered).freeze() };
        if intact {
            self.hand_out(transfer.command_id, data, 0);
        } else {
            self.respond(transfer.command_id, Status::TRANSIENT_TRANSPORT, 0);
        }
        Ok(())
    }

    fn put_short(&mut self, kind: PduType, fill: impl FnOnce(&mut [u8])) {
        let mut out = [0; SHORT_BYTES + 4];
        let header_digest = self.digests.header;
        let pdu_bytes = SHORT_BYTES + self.digests.header_bytes();
        let flags = if header_digest { flags::HDGST } else { 0 };
        Common { kind, flags, data_offset: 0, pdu_bytes: pdu_bytes as u32 }.put(&mut out);
        fill(&mut out[..SHORT_BYTES]);
        if header_digest {
            let digest = crc32c(&out[..SHORT_BYTES]);
            out[SHORT_BYTES..].copy_from_slice(&digest.to_le_bytes());
        }
        self.outbox.put(&out[..pdu_bytes]);
    }

    /// Answers a command; its identifier is free afterwards.
    pub fn respond(&mut self, id: u16, status: Status, result: u64) {
        let slot = self.free(id);
        if !status.is_success() {
            self.remember(&slot, status);
        }
        let queue_head = if self.flow_control { self.head } else { 0xffff };
        let completion = Completion { result, queue_head, id, status };
        self.put_short(PduType::CapsuleResp, |out| {
            completion.put(&mut out[COMMON_BYTES..]);
        });
        self.unpair(id, slot.pair);
        self.start_waiting();
    }

    /// Path errors are no errors of a command, and would push those out.
    fn remember(&mut self, slot: &Slot, status: Status) {
        if status.is_path_error() {
            return;
        }
        if self.failures.len() >= ERRORS_MAX {
            self.failures.pop_front();
        }
        self.failures.push_back(Failure { entry: slot.entry, status });
    }

    fn free(&mut self, id: u16) -> Slot {
        let slot = self.slots.remove(&id).expect("only commands under way are answered");
        self.in_use_bytes -= slot.cost_bytes;
        self.capsule_bytes -= slot.capsule_bytes;
        self.head = (self.head + 1) % self.entries.max(1);
        slot
    }

    /// Answers a command with data. One C2HData PDU; the completion travels as its SUCCESS flag
    /// when the host does without submission queue flow control (TCP 3.3.2.3).
    pub fn respond_data(&mut self, id: u16, pieces: Vec<Bytes>) {
        let data_bytes: usize = pieces.iter().map(Bytes::len).sum();
        let room = self.slots[&id].room as usize;
        assert!(data_bytes <= room, "{data_bytes} bytes for a host that has room for {room}");
        if data_bytes == 0 {
            return self.respond(id, Status::SUCCESS, 0);
        }
        let bare = SHORT_BYTES + self.digests.header_bytes();
        let offset = bare.next_multiple_of(self.alignment_bytes);
        let mut header = [0; 256];
        let mut common_flags = flags::LAST;
        if !self.flow_control {
            common_flags |= flags::SUCCESS;
        }
        common_flags |= if self.digests.header { flags::HDGST } else { 0 };
        common_flags |= if self.digests.data { flags::DDGST } else { 0 };
        Common {
            kind: PduType::C2HData,
            flags: common_flags,
            data_offset: offset as u8,
            pdu_bytes: (offset + data_bytes + self.digests.data_bytes()) as u32,
        }
        .put(&mut header);
        let transfer = Transfer { command_id: id, tag: 0, offset: 0, bytes: data_bytes as u32 };
        transfer.put(&mut header);
        if self.digests.header {
            let digest = crc32c(&header[..SHORT_BYTES]);
            header[SHORT_BYTES..bare].copy_from_slice(&digest.to_le_bytes());
        }
        self.outbox.put(&header[..offset]);
        let digest =
            self.digests.data.then(|| crc32c_pieces(pieces.iter().map(|piece| &piece[..])));
        for piece in pieces {
            self.outbox.put_payload(piece);
        }
        if let Some(digest) = digest {
            self.outbox.put(&digest.to_le_bytes());
        }
        if self.flow_control {
            self.respond(id, Status::SUCCESS, 0);
        } else {
            self.free(id);
            self.start_waiting();
        }
    }
}

impl Slot {
    /// What a command that waits will take of the budget: its transfer, and what it reads here
    /// without a transfer.
    fn claim_bytes(&self, is_admin: bool) -> usize {
        let Stage::Waiting(data, _) = &self.stage else { unreachable!("it waits") };
        let transfer_bytes = match data {
            Data::Transport(bytes) => *bytes as usize,
            Data::InCapsule(_) | Data::None => 0,
        };
        let inside_bytes = match self.entry.opcode() {
            _ if is_admin => 0,
            io::VERIFY => (self.entry.block_count() as usize * BLOCK_BYTES).min(TRANSFER_BYTES_MAX),
            io::COPY => TRANSFER_BYTES_MAX,
            _ => 0,
        };
        transfer_bytes + inside_bytes
    }
}

/// Least and most bytes that a command takes from the host; `None` when it takes none.
fn host_bytes(entry: &Entry, is_admin: bool) -> Option<(usize, usize)> {
    if entry.opcode() == command::FABRICS {
        return match entry.fabrics_type() {
            fctype::CONNECT => Some((CONNECT_DATA_BYTES, CONNECT_DATA_BYTES)),
            fctype::AUTHENTICATION_SEND => Some((1, MESSAGE_BYTES_MAX)),
            _ => None,
        };
    }
    if is_admin {
        let is_host_id = entry.opcode() == admin::SET_FEATURES
            && entry.dword(10) as u8 == command::feature::HOST_ID;
        return is_host_id.then_some((0, 4096));
    }
    match entry.opcode() {
        io::WRITE | io::COMPARE => {
            let bytes = entry.block_count() as usize * BLOCK_BYTES;
            Some((bytes, bytes))
        }
        io::COPY => {
            let least = (entry.dword(12) as usize & 0xff) + 1;
            let range = command::COPY_RANGE_BYTES;
            // More ranges than there may be are answered as that, once they are here.
            Some((least * range, COPY_RANGES_MAX.max(least) * range))
        }
        // Linux always sends room for 256 ranges, whatever NR says.
        io::DATASET_MANAGEMENT => {
            let least = (entry.dword(10) as usize & 0xff) + 1;
            let range = command::DSM_RANGE_BYTES;
            Some((least * range, command::DSM_RANGES_MAX * range))
        }
        _ => None,
    }
}
