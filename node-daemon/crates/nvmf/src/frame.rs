//! Cuts PDUs out of a byte stream, checks their common header and digests.
//!
//! Payloads are slices of the fed buffer where they lie in it whole and are a good part of it (a
//! small slice would keep a large buffer alive for as long as the entry is retained), and are
//! gathered once otherwise. Nothing is allocated before the length that a header claims has been
//! checked against what this connection may carry, so a peer costs at most one payload of memory.

use bytes::{Bytes, BytesMut};
use tercet_proto::page_aligned;

use crate::le::u32_at;
use crate::pdu::{
    COMMON_BYTES, Common, DIGEST_BYTES, Digests, Fatal, FatalStatus, HEADER_BYTES_MAX, PduType,
    SHORT_BYTES, TERM_DATA_BYTES_MAX, crc32c, flags,
};

/// A payload stays a slice of the fed buffer when it is at least this share of it.
const SLICE_SHARE_MIN: usize = 4;

/// Which end of the connection reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// A controller: takes ICReq, H2CTermReq, CapsuleCmd, H2CData.
    Controller,
    /// A host: takes ICResp, C2HTermReq, CapsuleResp, C2HData, R2T.
    Host,
}

/// A whole PDU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The common header.
    pub common: Common,
    /// The header, CH included, HLEN bytes of it valid.
    pub header: [u8; HEADER_BYTES_MAX],
    /// The data; empty without.
    pub data: Bytes,
    /// False when a data digest did not match: not fatal, the command fails (TCP 3.3.1.1).
    pub data_intact: bool,
}

impl Frame {
    /// The valid part of the header.
    pub fn header(&self) -> &[u8] {
        &self.header[..self.common.kind.header_bytes()]
    }
}

/// A header whose data has not arrived whole.
#[derive(Debug)]
struct Pending {
    common: Common,
    /// Padding before the data that has still to be skipped.
    pad_bytes: usize,
    data_bytes: usize,
    digest_bytes: usize,
    gathered: BytesMut,
    data: Option<Bytes>,
    digest: [u8; DIGEST_BYTES],
    digest_have: usize,
}

/// The cutter of one direction of one connection.
#[derive(Debug)]
pub struct Framer {
    reader: Reader,
    digests: Digests,
    /// Most in-capsule data; grows never.
    capsule_bytes_max: usize,
    /// Most data of one data PDU.
    data_bytes_max: usize,
    header: [u8; HEADER_BYTES_MAX + DIGEST_BYTES],
    have: usize,
    pending: Option<Pending>,
}

impl Framer {
    /// A framer before initialization of the connection: no digests.
    pub fn new(reader: Reader, capsule_bytes_max: usize, data_bytes_max: usize) -> Self {
        Self {
            reader,
            digests: Digests::default(),
            capsule_bytes_max,
            data_bytes_max,
            header: [0; HEADER_BYTES_MAX + DIGEST_BYTES],
            have: 0,
            pending: None,
        }
    }

    /// From the next PDU on with these digests.
    pub fn set_digests(&mut self, digests: Digests) {
        self.digests = digests;
    }

    /// From the next capsule on at most that much in-capsule data.
    pub fn set_capsule_bytes_max(&mut self, bytes: usize) {
        self.capsule_bytes_max = bytes;
    }

    /// Bytes that the payload under way still lacks: how large a buffer to receive into, so that
    /// it need not be gathered from many. 0 between payloads.
    pub fn missing_bytes(&self) -> usize {
        self.pending.as_ref().map_or(0, |pending| {
            let data = pending.data.as_ref().map_or(pending.gathered.len(), Bytes::len);
            pending.pad_bytes + pending.data_bytes + pending.digest_bytes
                - data
                - pending.digest_have
        })
    }

    /// What has arrived of the header under way: goes into a termination request.
    pub fn partial_header(&self) -> &[u8] {
        &self.header[..self.have.min(HEADER_BYTES_MAX)]
    }

    /// The next PDU of `input`, which loses what was taken; `None` when it is used up.
    pub fn next(&mut self, input: &mut Bytes) -> Result<Option<Frame>, Fatal> {
        if self.pending.is_none() && !self.take_header(input)? {
            return Ok(None);
        }
        if !self.take_data(input) {
            return Ok(None);
        }
        let pending = self.pending.take().expect("take_header set it");
        self.have = 0;
        Ok(Some(self.finish(pending)))
    }

    fn fill(&mut self, input: &mut Bytes, until: usize) -> bool {
        let count = until.saturating_sub(self.have).min(input.len());
        self.header[self.have..self.have + count].copy_from_slice(&input[..count]);
        self.have += count;
        let _ = input.split_to(count);
        self.have >= until
    }

    /// Whether the whole header is there; checks it as soon as each part is.
    fn take_header(&mut self, input: &mut Bytes) -> Result<bool, Fatal> {
        if !self.fill(input, COMMON_BYTES) {
            return Ok(false);
        }
        let common = self.check_common()?;
        let header_bytes = common.kind.header_bytes();
        let digest_bytes = self.header_digest_bytes(common.kind);
        if !self.fill(input, header_bytes + digest_bytes) {
            return Ok(false);
        }
        if digest_bytes != 0 {
            let received = u32_at(&self.header, header_bytes);
            if received != crc32c(&self.header[..header_bytes]) {
                return Err(Fatal { status: FatalStatus::HeaderDigest, information: received });
            }
        }
        self.pending = Some(self.open(common)?);
        Ok(true)
    }

    fn header_digest_bytes(&self, kind: PduType) -> usize {
        if kind.has_header_digest() { self.digests.header_bytes() } else { 0 }
    }

    /// Checks type, flags, HLEN, PDO and PLEN: byte offsets 0, 1, 2, 3, 4 (TCP 3.6.1).
    fn check_common(&self) -> Result<Common, Fatal> {
        let head = &self.header;
        let kind = PduType::from_wire(head[0]).ok_or(Fatal::header(0))?;
        let for_us = match self.reader {
            Reader::Controller => matches!(
                kind,
                PduType::IcReq | PduType::H2CTermReq | PduType::CapsuleCmd | PduType::H2CData
            ),
            Reader::Host => !matches!(
                kind,
                PduType::IcReq | PduType::H2CTermReq | PduType::CapsuleCmd | PduType::H2CData
            ),
        };
        if !for_us {
            return Err(Fatal::header(0));
        }
        let digest_bytes = self.header_digest_bytes(kind);
        if (head[1] & flags::HDGST != 0) != (digest_bytes != 0) {
            return Err(Fatal::header(1));
        }
        if usize::from(head[2]) != kind.header_bytes() {
            return Err(Fatal::header(2));
        }
        let common =
            Common { kind, flags: head[1], data_offset: head[3], pdu_bytes: u32_at(head, 4) };
        self.check_length(common)?;
        Ok(common)
    }

    fn check_length(&self, common: Common) -> Result<(), Fatal> {
        let bare = common.kind.header_bytes() + self.header_digest_bytes(common.kind);
        let pdu_bytes = common.pdu_bytes as usize;
        match common.kind {
            PduType::H2CTermReq | PduType::C2HTermReq => {
                let range = SHORT_BYTES..=SHORT_BYTES + TERM_DATA_BYTES_MAX;
                if range.contains(&pdu_bytes) { Ok(()) } else { Err(Fatal::header(4)) }
            }
            kind if kind.carries_data() && pdu_bytes != bare => {
                let offset = usize::from(common.data_offset);
                if offset < bare || offset % 4 != 0 || offset > pdu_bytes {
                    return Err(Fatal::header(3));
                }
                let data_digest = common.flags & flags::DDGST != 0;
                if data_digest != self.digests.data {
                    return Err(Fatal::header(1));
                }
                let room = pdu_bytes - offset;
                let data_bytes = room
                    .checked_sub(self.digests.data_bytes())
                    .filter(|&bytes| bytes > 0)
                    .ok_or(Fatal::header(4))?;
                self.check_data_bytes(kind, data_bytes)
            }
            PduType::H2CData | PduType::C2HData => Err(Fatal::header(4)),
            _ if pdu_bytes == bare => Ok(()),
            _ => Err(Fatal::header(4)),
        }
    }

    fn check_data_bytes(&self, kind: PduType, data_bytes: usize) -> Result<(), Fatal> {
        let (most, status) = match kind {
            PduType::CapsuleCmd => (self.capsule_bytes_max, FatalStatus::InvalidHeader),
            _ => (self.data_bytes_max, FatalStatus::LimitExceeded),
        };
        if data_bytes <= most { Ok(()) } else { Err(Fatal { status, information: 4 }) }
    }

    /// Where the data of a checked header lies. DATAL has to agree with PLEN.
    fn open(&self, common: Common) -> Result<Pending, Fatal> {
        let bare = common.kind.header_bytes() + self.header_digest_bytes(common.kind);
        let pdu_bytes = common.pdu_bytes as usize;
        let has_digest = common.kind.carries_data() && pdu_bytes != bare && self.digests.data;
        let digest_bytes = if has_digest { DIGEST_BYTES } else { 0 };
        let start = if common.kind.carries_data() && pdu_bytes != bare {
            usize::from(common.data_offset)
        } else {
            bare
        };
        let data_bytes = pdu_bytes - start - digest_bytes;
        if matches!(common.kind, PduType::H2CData | PduType::C2HData)
            && u32_at(&self.header, 16) as usize != data_bytes
        {
            return Err(Fatal::header(16));
        }
        Ok(Pending {
            common,
            pad_bytes: start - bare,
            data_bytes,
            digest_bytes,
            gathered: BytesMut::new(),
            data: None,
            digest: [0; DIGEST_BYTES],
            digest_have: 0,
        })
    }

    /// Whether data and digest are there whole.
    fn take_data(&mut self, input: &mut Bytes) -> bool {
        let pending = self.pending.as_mut().expect("a header came before");
        let pad = pending.pad_bytes.min(input.len());
        let _ = input.split_to(pad);
        pending.pad_bytes -= pad;
        if pending.pad_bytes > 0 {
            return false;
        }
        if pending.data.is_none() && !pending.take_payload(input) {
            return false;
        }
        let missing = pending.digest_bytes - pending.digest_have;
        let count = missing.min(input.len());
        let have = pending.digest_have;
        pending.digest[have..have + count].copy_from_slice(&input.split_to(count));
        pending.digest_have += count;
        pending.digest_have == pending.digest_bytes
    }

    fn finish(&self, pending: Pending) -> Frame {
        let mut header = [0; HEADER_BYTES_MAX];
        let header_bytes = pending.common.kind.header_bytes();
        header[..header_bytes].copy_from_slice(&self.header[..header_bytes]);
        let data = pending.data.expect("taken whole");
        let data_intact =
            pending.digest_bytes == 0 || u32::from_le_bytes(pending.digest) == crc32c(&data);
        Frame { common: pending.common, header, data, data_intact }
    }
}

impl Pending {
    fn take_payload(&mut self, input: &mut Bytes) -> bool {
        let want = self.data_bytes - self.gathered.len();
        if self.gathered.is_empty() && input.len() >= want {
            let large_share = want >= input.len() / SLICE_SHARE_MIN;
            let slice = input.split_to(want);
            self.data = Some(if large_share { slice } else { Bytes::copy_from_slice(&slice) });
            return true;
        }
        if self.gathered.is_empty() {
            self.gathered = page_aligned(want);
        }
        let count = want.min(input.len());
        self.gathered.extend_from_slice(&input.split_to(count));
        if self.gathered.len() < self.data_bytes {
            return false;
        }
        self.data = Some(std::mem::take(&mut self.gathered).freeze());
        true
    }
}
