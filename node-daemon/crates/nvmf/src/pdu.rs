//! PDUs of NVMe/TCP (TCP 3.6): types, header layouts and digests.
//!
//! Only layouts: what a PDU means at this point of a session is left to the connections, and how
//! PDUs are cut out of a stream to [`crate::frame`].

use crate::le::{put_u16, put_u32, u16_at, u32_at};

/// Bytes of the common header (CH).
pub const COMMON_BYTES: usize = 8;
/// ICReq and ICResp.
pub const IC_BYTES: usize = 128;
/// CH and a submission queue entry.
pub const COMMAND_BYTES: usize = COMMON_BYTES + 64;
/// CH and a completion queue entry; also the data, R2T and termination headers.
pub const SHORT_BYTES: usize = 24;
/// Longest header.
pub const HEADER_BYTES_MAX: usize = IC_BYTES;
/// Bytes of a header or data digest.
pub const DIGEST_BYTES: usize = 4;
/// Most bytes of the offending PDU that a termination request carries along (TCP 3.6.2.3).
pub const TERM_DATA_BYTES_MAX: usize = 128;

/// PDU types (TCP table "PDU Types").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PduType {
    /// Initialize Connection Request.
    IcReq = 0x00,
    /// Initialize Connection Response.
    IcResp = 0x01,
    /// The host ends the connection because of an error.
    H2CTermReq = 0x02,
    /// The controller ends the connection because of an error.
    C2HTermReq = 0x03,
    /// A command, perhaps with data.
    CapsuleCmd = 0x04,
    /// A completion.
    CapsuleResp = 0x05,
    /// Data of a command, after an R2T.
    H2CData = 0x06,
    /// Data for the host.
    C2HData = 0x07,
    /// Ready to transfer.
    R2T = 0x09,
}

impl PduType {
    /// The type with this number.
    pub fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte {
            0x00 => Self::IcReq,
            0x01 => Self::IcResp,
            0x02 => Self::H2CTermReq,
            0x03 => Self::C2HTermReq,
            0x04 => Self::CapsuleCmd,
            0x05 => Self::CapsuleResp,
            0x06 => Self::H2CData,
            0x07 => Self::C2HData,
            0x09 => Self::R2T,
            _ => return None,
        })
    }

    /// HLEN of this type.
    pub fn header_bytes(self) -> usize {
        match self {
            Self::IcReq | Self::IcResp => IC_BYTES,
            Self::CapsuleCmd => COMMAND_BYTES,
            _ => SHORT_BYTES,
        }
    }

    /// Whether data may follow the header, found through PDO.
    pub fn carries_data(self) -> bool {
        matches!(self, Self::CapsuleCmd | Self::H2CData | Self::C2HData)
    }

    /// Whether a header digest protects it once digests are on (TCP 3.3.1.1).
    pub fn has_header_digest(self) -> bool {
        !matches!(self, Self::IcReq | Self::IcResp | Self::H2CTermReq | Self::C2HTermReq)
    }
}

/// FLAGS of the common header.
pub mod flags {
    /// A header digest follows the header.
    pub const HDGST: u8 = 1 << 0;
    /// A data digest follows the data.
    pub const DDGST: u8 = 1 << 1;
    /// Last PDU of this transfer.
    pub const LAST: u8 = 1 << 2;
    /// The command succeeded and no capsule response follows.
    pub const SUCCESS: u8 = 1 << 3;
}

/// Why a connection has to end (FES, TCP tables of H2CTermReq and C2HTermReq).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum FatalStatus {
    /// A header field is invalid; FEI is its byte offset.
    InvalidHeader = 0x01,
    /// A PDU out of sequence.
    Sequence = 0x02,
    /// The header digest does not match; FEI is the digest that was received.
    HeaderDigest = 0x03,
    /// Data outside the range that was asked for.
    DataOutOfRange = 0x04,
    /// To a host: more data than the limit. To a controller: more R2Ts than MAXR2T.
    LimitExceeded = 0x05,
    /// A parameter that is not supported; FEI is its byte offset.
    UnsupportedParameter = 0x06,
}

/// A fatal transport error: what a termination request says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("fatal transport error {status:?} (information {information:#x})")]
pub struct Fatal {
    /// FES.
    pub status: FatalStatus,
    /// FEI: the byte offset of the field, or the digest.
    pub information: u32,
}

impl Fatal {
    /// The header field at byte `offset` is invalid.
    pub fn header(offset: u32) -> Self {
        Self { status: FatalStatus::InvalidHeader, information: offset }
    }

    /// With this status and no further information.
    pub fn plain(status: FatalStatus) -> Self {
        Self { status, information: 0 }
    }
}

/// The common header (TCP 3.6.1): PDU-Type 0, FLAGS 1, HLEN 2, PDO 3, PLEN 4-7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Common {
    /// PDU-Type.
    pub kind: PduType,
    /// FLAGS.
    pub flags: u8,
    /// PDO: offset of the data from the start of the PDU, 0 without data.
    pub data_offset: u8,
    /// PLEN.
    pub pdu_bytes: u32,
}

impl Common {
    /// Writes the header at the front of `out`.
    pub fn put(self, out: &mut [u8]) {
        out[0] = self.kind as u8;
        out[1] = self.flags;
        out[2] = self.kind.header_bytes() as u8;
        out[3] = self.data_offset;
        put_u32(out, 4, self.pdu_bytes);
    }
}

/// Which digests both ends agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    /// After each header.
    pub header: bool,
    /// After data.
    pub data: bool,
}

impl Digests {
    /// From DGST of ICReq or ICResp (bit 0 header, bit 1 data).
    pub fn from_wire(byte: u8) -> Self {
        Self { header: byte & 1 != 0, data: byte & 2 != 0 }
    }

    /// As DGST.
    pub fn to_wire(self) -> u8 {
        u8::from(self.header) | u8::from(self.data) << 1
    }

    /// Bytes that a header digest takes.
    pub fn header_bytes(self) -> usize {
        if self.header { DIGEST_BYTES } else { 0 }
    }

    /// Bytes that a data digest takes.
    pub fn data_bytes(self) -> usize {
        if self.data { DIGEST_BYTES } else { 0 }
    }
}

/// CRC32C of `bytes`, as digests carry it (TCP 3.3.1.1), little endian on the wire.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// CRC32C over pieces that follow each other.
pub fn crc32c_pieces<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    for piece in pieces {
        digest.update(piece);
    }
    digest.finalize() as u32
}

/// ICReq (TCP 3.6.2.2): PFV 8-9, HPDA 10, DGST 11, MAXR2T 12-15 (0's based).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcReq {
    /// PDU format version, 0.
    pub format: u16,
    /// HPDA: alignment of data for the host, in dwords, 0's based.
    pub host_alignment: u8,
    /// DGST with its reserved bits.
    pub digests: u8,
    /// MAXR2T: R2Ts that may be outstanding for a command, 0's based.
    pub r2ts_max: u32,
}

impl IcReq {
    /// From a header of [`IC_BYTES`].
    pub fn parse(header: &[u8]) -> Self {
        Self {
            format: u16_at(header, 8),
            host_alignment: header[10],
            digests: header[11],
            r2ts_max: u32_at(header, 12),
        }
    }

    /// The PDU.
    pub fn to_wire(self) -> [u8; IC_BYTES] {
        let mut out = [0; IC_BYTES];
        ic_common(PduType::IcReq, &mut out);
        put_u16(&mut out, 8, self.format);
        out[10] = self.host_alignment;
        out[11] = self.digests;
        put_u32(&mut out, 12, self.r2ts_max);
        out
    }
}

/// ICResp (TCP 3.6.2.3): PFV 8-9, CPDA 10, DGST 11, MAXH2CDATA 12-15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcResp {
    /// PDU format version, 0.
    pub format: u16,
    /// CPDA: alignment of data for the controller, in dwords, 0's based.
    pub controller_alignment: u8,
    /// DGST.
    pub digests: u8,
    /// MAXH2CDATA: most data of one H2CData PDU, a multiple of 4, at least 4,096.
    pub data_bytes_max: u32,
}

impl IcResp {
    /// From a header of [`IC_BYTES`].
    pub fn parse(header: &[u8]) -> Self {
        Self {
            format: u16_at(header, 8),
            controller_alignment: header[10],
            digests: header[11],
            data_bytes_max: u32_at(header, 12),
        }
    }

    /// The PDU.
    pub fn to_wire(self) -> [u8; IC_BYTES] {
        let mut out = [0; IC_BYTES];
        ic_common(PduType::IcResp, &mut out);
        put_u16(&mut out, 8, self.format);
        out[10] = self.controller_alignment;
        out[11] = self.digests;
        put_u32(&mut out, 12, self.data_bytes_max);
        out
    }
}

fn ic_common(kind: PduType, out: &mut [u8]) {
    Common { kind, flags: 0, data_offset: 0, pdu_bytes: IC_BYTES as u32 }.put(out);
}

/// The transfer header of H2CData, C2HData and R2T: CCCID 8-9, TTAG 10-11 (reserved in C2HData),
/// offset 12-15, length 16-19.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// CCCID: the command's identifier.
    pub command_id: u16,
    /// TTAG: the controller's name for the transfer.
    pub tag: u16,
    /// DATAO or R2TO.
    pub offset: u32,
    /// DATAL or R2TL.
    pub bytes: u32,
}

impl Transfer {
    /// From a header of [`SHORT_BYTES`].
    pub fn parse(header: &[u8]) -> Self {
        Self {
            command_id: u16_at(header, 8),
            tag: u16_at(header, 10),
            offset: u32_at(header, 12),
            bytes: u32_at(header, 16),
        }
    }

    /// Behind the common header in `out`.
    pub fn put(self, out: &mut [u8]) {
        put_u16(out, 8, self.command_id);
        put_u16(out, 10, self.tag);
        put_u32(out, 12, self.offset);
        put_u32(out, 16, self.bytes);
    }
}

/// A termination request (TCP 3.6.2.4, 3.6.2.5): FES 8-9, FEI 10-13, then at most 128 bytes of the
/// PDU that caused it.
pub fn termination(kind: PduType, fatal: Fatal, cause: &[u8]) -> Vec<u8> {
    debug_assert!(matches!(kind, PduType::H2CTermReq | PduType::C2HTermReq));
    let cause = &cause[..cause.len().min(TERM_DATA_BYTES_MAX)];
    let mut out = vec![0; SHORT_BYTES];
    let pdu_bytes = (SHORT_BYTES + cause.len()) as u32;
    Common { kind, flags: 0, data_offset: 0, pdu_bytes }.put(&mut out);
    put_u16(&mut out, 8, fatal.status as u16);
    put_u32(&mut out, 10, fatal.information);
    out.extend_from_slice(cause);
    out
}

/// FES and FEI of a termination request.
pub fn parse_termination(header: &[u8]) -> (u16, u32) {
    (u16_at(header, 8), u32_at(header, 10))
}
