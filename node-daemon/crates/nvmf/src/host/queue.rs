//! One TCP connection of the host: initialization, capsules out, data both ways, completions in.
//!
//! The mirror of the target's connection. A command is named by a tag of the caller's; its
//! identifier is the index of its slot. What a completion means is left to the caller.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::command::{Completion, Data, Entry};
use crate::frame::{Frame, Framer, Reader};
use crate::outbox::Outbox;
use crate::pdu::{
    COMMAND_BYTES, COMMON_BYTES, Common, Digests, Fatal, FatalStatus, IcReq, IcResp, PduType,
    SHORT_BYTES, Transfer, crc32c, flags, parse_termination, termination,
};
use crate::status::Status;
use crate::{ADMIN_IN_CAPSULE_BYTES_MAX, TRANSFER_BYTES_MAX};

/// Least MAXH2CDATA that the specification allows (TCP 3.6.2.3).
const DATA_PDU_BYTES_MIN: u32 = 4096;

/// Why a queue's connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// What the controller sent is not NVMe/TCP, or not at this point.
    #[error("malformed input: {0}")]
    Malformed(#[from] Fatal),
    /// The controller sent a termination request.
    #[error("the controller ended the connection: error {status:#x} ({information:#x})")]
    Terminated {
        /// FES.
        status: u16,
        /// FEI.
        information: u32,
    },
}

/// A command that has ended.
#[derive(Debug)]
pub(super) struct Completed {
    pub tag: u64,
    pub status: Status,
    pub result: u64,
    pub data: Vec<Bytes>,
}

#[derive(Debug)]
struct Slot {
    tag: u64,
    payload: Bytes,
    room: usize,
    data: Vec<Bytes>,
    received: usize,
    intact: bool,
    requested: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    framer: Framer,
    pub outbox: Outbox,
    wanted: Digests,
    digests: Digests,
    initialized: bool,
    data_pdu_bytes_max: usize,
    pub in_capsule_bytes: usize,
    slots: Vec<Option<Slot>>,
    free: Vec<u16>,
    pub completed: VecDeque<Completed>,
}

impl Queue {
    /// A queue of that many entries, with these digests; begins with ICReq.
    pub fn new(entries: u16, wanted: Digests) -> Self {
        let mut queue = Self {
            framer: Framer::new(Reader::Host, 0, TRANSFER_BYTES_MAX),
            outbox: Outbox::default(),
            wanted,
            digests: Digests::default(),
            initialized: false,
            data_pdu_bytes_max: 0,
            in_capsule_bytes: ADMIN_IN_CAPSULE_BYTES_MAX,
            slots: (0..entries).map(|_| None).collect(),
            // One entry less than the queue has: a full ring is an empty one (Base 3.3.1.5).
            free: (0..entries - 1).rev().collect(),
            completed: VecDeque::new(),
        };
        let request =
            IcReq { format: 0, host_alignment: 0, digests: wanted.to_wire(), r2ts_max: 0 };
        queue.outbox.put(&request.to_wire());
        queue
    }

    /// ICResp has come: commands may go out.
    pub fn is_initialized(&self) -> bool {
        self.initialized
    }

    /// Commands that may be submitted now.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Tags of the commands under way.
    pub fn tags(&self) -> impl Iterator<Item = u64> + '_ {
        self.slots.iter().flatten().map(|slot| slot.tag)
    }

    /// See [`Framer::missing_bytes`].
    pub fn missing_bytes(&self) -> usize {
        self.framer.missing_bytes()
    }

    /// Sends a command; its data goes along if it fits, else it waits for an R2T. `room` bytes of
    /// data are expected back. Panics without a free slot.
    pub fn submit(&mut self, mut entry: Entry, tag: u64, payload: Bytes, room: usize) {
        assert!(self.initialized, "commands follow ICResp");
        let id = self.free.pop().expect("a free slot");
        entry.0[2..4].copy_from_slice(&id.to_le_bytes());
        let in_capsule = !payload.is_empty() && payload.len() <= self.in_capsule_bytes;
        entry.set_data(match (payload.len(), room) {
            (0, 0) => Data::None,
            (0, room) => Data::Transport(room as u32),
            (bytes, _) if in_capsule => Data::InCapsule(bytes as u32),
            (bytes, _) => Data::Transport(bytes as u32),
        });
        let carried = if in_capsule { payload.clone() } else { Bytes::new() };
        self.put_pdu(PduType::CapsuleCmd, 0, carried, |header| {
            header[COMMON_BYTES..COMMAND_BYTES].copy_from_slice(&entry.0);
        });
        let payload = if in_capsule { Bytes::new() } else { payload };
        self.slots[usize::from(id)] = Some(Slot {
            tag,
            payload,
            room,
            data: Vec::new(),
            received: 0,
            intact: true,
            requested: 0,
        });
    }

    /// Header, its digest, data and its digest.
    fn put_pdu(
        &mut self,
        kind: PduType,
        more_flags: u8,
        data: Bytes,
        fill: impl FnOnce(&mut [u8]),
    ) {
        let header_bytes = kind.header_bytes();
        let bare = header_bytes + self.digests.header_bytes();
        let has_data = !data.is_empty();
        let data_digest = has_data && self.digests.data;
        let tail = if has_data { data.len() + self.digests.data_bytes() } else { 0 };
        let mut out = [0; COMMAND_BYTES + 4];
        let mut common_flags = more_flags;
        common_flags |= if self.digests.header { flags::HDGST } else { 0 };
        common_flags |= if data_digest { flags::DDGST } else { 0 };
        Common {
            kind,
            flags: common_flags,
            data_offset: if has_data { bare as u8 } else { 0 },
            pdu_bytes: (bare + tail) as u32,
        }
        .put(&mut out);
        fill(&mut out[..header_bytes]);
        if self.digests.header {
            let digest = crc32c(&out[..header_bytes]);
            out[header_bytes..bare].copy_from_slice(&digest.to_le_bytes());
        }
        self.outbox.put(&out[..bare]);
        let digest = data_digest.then(|| crc32c(&data));
        self.outbox.put_payload(data);
        if let Some(digest) = digest {
            self.outbox.put(&digest.to_le_bytes());
        }
    }

    /// Takes bytes from the controller; completions appear in [`Queue::completed`].
    pub fn input(&mut self, mut input: Bytes) -> Result<(), QueueError> {
        loop {
            let frame = match self.framer.next(&mut input) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(fatal) => {
                    let cause = self.framer.partial_header().to_vec();
                    return Err(self.terminate(fatal, &cause));
                }
            };
            if frame.common.kind == PduType::C2HTermReq {
                let (status, information) = parse_termination(frame.header());
                return Err(QueueError::Terminated { status, information });
            }
            if let Err(fatal) = self.take(&frame) {
                return Err(self.terminate(fatal, frame.header()));
            }
        }
    }

    fn terminate(&mut self, fatal: Fatal, cause: &[u8]) -> QueueError {
        self.outbox.put(&termination(PduType::H2CTermReq, fatal, cause));
        QueueError::Malformed(fatal)
    }

    fn take(&mut self, frame: &Frame) -> Result<(), Fatal> {
        match (frame.common.kind, self.initialized) {
            (PduType::IcResp, false) => self.initialize(IcResp::parse(frame.header())),
            (PduType::CapsuleResp, true) => {
                self.take_completion(Completion::parse(&frame.header()[COMMON_BYTES..]))
            }
            (PduType::C2HData, true) => self.take_data(frame),
            (PduType::R2T, true) => self.take_request(Transfer::parse(frame.header())),
            _ => Err(Fatal::plain(FatalStatus::Sequence)),
        }
    }

    fn initialize(&mut self, response: IcResp) -> Result<(), Fatal> {
        let unsupported =
            |offset| Err(Fatal { status: FatalStatus::UnsupportedParameter, information: offset });
        if response.format != 0 {
            return unsupported(8);
        }
        if response.controller_alignment != 0 {
            return unsupported(10);
        }
        if response.digests != self.wanted.to_wire() {
            return unsupported(11);
        }
        let most = response.data_bytes_max;
        if most < DATA_PDU_BYTES_MIN || !most.is_multiple_of(4) {
            return Err(Fatal::header(12));
        }
        self.data_pdu_bytes_max = most as usize;
        self.digests = self.wanted;
        self.framer.set_digests(self.digests);
        self.initialized = true;
        Ok(())
    }

    fn slot(&mut self, id: u16, offset: u32) -> Result<&mut Slot, Fatal> {
        self.slots.get_mut(usize::from(id)).and_then(Option::as_mut).ok_or(Fatal::header(offset))
    }

    fn complete(&mut self, id: u16, status: Status, result: u64) {
        let slot = self.slots[usize::from(id)].take().expect("looked up");
        self.free.push(id);
        let status = if slot.intact { status } else { Status::TRANSIENT_TRANSPORT };
        self.completed.push_back(Completed { tag: slot.tag, status, result, data: slot.data });
    }

    fn take_completion(&mut self, completion: Completion) -> Result<(), Fatal> {
        let slot = self.slot(completion.id, COMMON_BYTES as u32 + 12)?;
        if completion.status.is_success() && slot.received != slot.room {
            return Err(Fatal::plain(FatalStatus::DataOutOfRange));
        }
        self.complete(completion.id, completion.status, completion.result);
        Ok(())
    }

    fn take_data(&mut self, frame: &Frame) -> Result<(), Fatal> {
        let transfer = Transfer::parse(frame.header());
        let slot = self.slot(transfer.command_id, 8)?;
        let bytes = transfer.bytes as usize;
        if transfer.offset as usize != slot.received || slot.room - slot.received < bytes {
            return Err(Fatal { status: FatalStatus::DataOutOfRange, information: 12 });
        }
        slot.received += bytes;
        slot.intact &= frame.data_intact;
        slot.data.push(frame.data.clone());
        if frame.common.flags & flags::SUCCESS != 0 {
            if frame.common.flags & flags::LAST == 0 || slot.received != slot.room {
                return Err(Fatal::header(1));
            }
            self.complete(transfer.command_id, Status::SUCCESS, 0);
        }
        Ok(())
    }

    /// R2T: the data that is asked for, in PDUs of at most MAXH2CDATA.
    fn take_request(&mut self, transfer: Transfer) -> Result<(), Fatal> {
        let slot = self.slot(transfer.command_id, 8)?;
        let (start, bytes) = (transfer.offset as usize, transfer.bytes as usize);
        let fits = start == slot.requested && bytes > 0 && slot.payload.len() - start >= bytes;
        if !fits {
            return Err(Fatal { status: FatalStatus::DataOutOfRange, information: 12 });
        }
        slot.requested += bytes;
        let mut rest = slot.payload.slice(start..start + bytes);
        let mut offset = transfer.offset;
        while !rest.is_empty() {
            let data = rest.split_to(rest.len().min(self.data_pdu_bytes_max));
            let part = Transfer { offset, bytes: data.len() as u32, ..transfer };
            offset += data.len() as u32;
            let last = if rest.is_empty() { flags::LAST } else { 0 };
            self.put_pdu(PduType::H2CData, last, data, |header| part.put(header));
        }
        Ok(())
    }
}

const _: () = assert!(SHORT_BYTES <= COMMAND_BYTES);
