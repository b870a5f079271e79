//! Log pages (Base 5.16.1): error information, health, firmware slots, changed namespaces,
//! effects, ANA, discovery.

use crate::command::{admin, io};
use crate::le::{put_ascii, put_nqn, put_u16, put_u32, put_u64, u16_at, u32_at, u64_at};
use crate::{ANA_GROUP, NSID};

/// Log page identifiers.
pub mod page {
    /// Error Information.
    pub const ERRORS: u8 = 0x01;
    /// SMART / Health Information.
    pub const HEALTH: u8 = 0x02;
    /// Firmware Slot Information.
    pub const FIRMWARE: u8 = 0x03;
    /// Changed Namespace List.
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    /// Commands Supported and Effects.
    pub const EFFECTS: u8 = 0x05;
    /// Asymmetric Namespace Access.
    pub const ANA: u8 = 0x0c;
    /// Discovery.
    pub const DISCOVERY: u8 = 0x70;
}

/// Bytes of the ANA log of one group with one namespace: what [`ana`] gives at most.
pub const ANA_BYTES: usize = 16 + 32 + 4;
/// Bytes of the discovery log's header and of each of its records.
pub const DISCOVERY_RECORD_BYTES: usize = 1024;

/// ANA state of a group on a controller (Base 8.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AnaState {
    /// 01h.
    Optimized,
    /// 02h; never given by the target, taken by the host.
    NonOptimized,
    /// 03h.
    Inaccessible,
    /// 04h; never given by the target.
    PersistentLoss,
    /// 0Fh: changing, for at most ANATT.
    Change,
}

impl AnaState {
    /// As it stands in the log.
    pub fn to_wire(self) -> u8 {
        match self {
            Self::Optimized => 0x01,
            Self::NonOptimized => 0x02,
            Self::Inaccessible => 0x03,
            Self::PersistentLoss => 0x04,
            Self::Change => 0x0f,
        }
    }

    /// From the log; `None` for a reserved value.
    pub fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte & 0xf {
            0x01 => Self::Optimized,
            0x02 => Self::NonOptimized,
            0x03 => Self::Inaccessible,
            0x04 => Self::PersistentLoss,
            0x0f => Self::Change,
            _ => return None,
        })
    }
}

/// Bytes of an entry of the Error Information log.
pub const ERROR_BYTES: usize = 64;
/// Entries of the Error Information log (ELPE + 1).
pub const ERRORS_MAX: usize = 16;

/// A command that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorEntry {
    /// Of all errors of this controller, counted from 1.
    pub count: u64,
    /// SQID.
    pub queue: u16,
    /// CID.
    pub command: u16,
    /// Its status.
    pub status: crate::status::Status,
    /// SLBA of an I/O command.
    pub lba: u64,
    /// NSID.
    pub nsid: u32,
}

/// Error Information (Base 5.16.1.2), the newest first: error count 0-7, SQID 8-9, CID 10-11, status
/// 12-13 (with its phase bit), parameter location 14-15 (FFFFh: not known), LBA 16-23, NSID 24-27,
/// TRTYPE 29.
pub fn errors<'a>(newest_first: impl Iterator<Item = &'a ErrorEntry>) -> Vec<u8> {
    const TCP: u8 = 3;
    let mut out = vec![0; ERROR_BYTES * ERRORS_MAX];
    for (entry, out) in newest_first.zip(out.chunks_exact_mut(ERROR_BYTES)) {
        put_u64(out, 0, entry.count);
        put_u16(out, 8, entry.queue);
        put_u16(out, 10, entry.command);
        put_u16(out, 12, entry.status.to_wire());
        put_u16(out, 14, 0xffff);
        put_u64(out, 16, entry.lba);
        put_u32(out, 24, entry.nsid);
        out[29] = TCP;
    }
    out
}

/// Work done by a controller, for the health log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes read by hosts.
    pub read_bytes: u64,
    /// Bytes written by hosts.
    pub written_bytes: u64,
    /// Read and Compare commands.
    pub reads: u64,
    /// Write commands.
    pub writes: u64,
    /// Commands that found blocks which cannot be read.
    pub media_errors: u64,
    /// Entries that the Error Information log ever had.
    pub errors: u64,
}

/// A volume's temperature, in kelvin.
pub const ROOM_TEMPERATURE_K: u16 = 298;
/// Critical warning: the temperature is beyond a threshold.
const TEMPERATURE_WARNING: u8 = 1 << 1;

/// SMART / Health: critical warning 0, composite temperature 1-2 (kelvin), spare 3, its threshold 4, data units (of
/// 1,000 blocks of 512 bytes) read 32-47 and written 48-63, commands 64-79 and 80-95, media errors
/// 160-175, error log entries 176-191.
pub fn health(counters: &Counters, is_warm: bool) -> Vec<u8> {
    const DATA_UNIT_BYTES: u64 = 512_000;
    let mut out = vec![0; 512];
    out[0] = if is_warm { TEMPERATURE_WARNING } else { 0 };
    put_u16(&mut out, 1, ROOM_TEMPERATURE_K);
    out[3] = 100;
    out[4] = 10;
    put_u64(&mut out, 32, counters.read_bytes.div_ceil(DATA_UNIT_BYTES));
    put_u64(&mut out, 48, counters.written_bytes.div_ceil(DATA_UNIT_BYTES));
    put_u64(&mut out, 64, counters.reads);
    put_u64(&mut out, 80, counters.writes);
    put_u64(&mut out, 160, counters.media_errors);
    put_u64(&mut out, 176, counters.errors);
    out
}

/// Firmware Slot Information: AFI 0 (slot 1), FRS1 8-15.
pub fn firmware() -> Vec<u8> {
    let mut out = vec![0; 512];
    out[0] = 1;
    put_ascii(&mut out[8..16], env!("CARGO_PKG_VERSION"));
    out
}

/// Changed Namespace List.
pub fn changed_namespaces(changed: bool) -> Vec<u8> {
    let mut out = vec![0; 4096];
    if changed {
        put_u32(&mut out, 0, NSID);
    }
    out
}

/// Commands Supported and Effects: admin commands from 0, I/O commands from 1024; CSUPP bit 0,
/// LBCC bit 1.
pub fn effects() -> Vec<u8> {
    let mut out = vec![0; 4096];
    for opcode in [
        admin::GET_LOG_PAGE,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::ASYNC_EVENT,
        admin::KEEP_ALIVE,
    ] {
        put_u32(&mut out, usize::from(opcode) * 4, 1);
    }
    for opcode in [io::FLUSH, io::READ, io::COMPARE, io::VERIFY] {
        put_u32(&mut out, 1024 + usize::from(opcode) * 4, 1);
    }
    for opcode in [io::WRITE, io::WRITE_ZEROES, io::DATASET_MANAGEMENT, io::COPY] {
        put_u32(&mut out, 1024 + usize::from(opcode) * 4, 1 | 1 << 1);
    }
    out
}

/// Asymmetric Namespace Access (Base 5.16.1.13): change count 0-7, descriptors 8-9; each
/// descriptor: group 0-3, NSIDs 4-7, change count 8-15, state 16, NSIDs from 32.
pub fn ana(change_count: u64, state: AnaState, groups_only: bool) -> Vec<u8> {
    let mut out = vec![0; if groups_only { ANA_BYTES - 4 } else { ANA_BYTES }];
    put_u64(&mut out, 0, change_count);
    put_u16(&mut out, 8, 1);
    put_u32(&mut out, 16, ANA_GROUP);
    put_u64(&mut out, 24, change_count);
    out[32] = state.to_wire();
    if !groups_only {
        put_u32(&mut out, 20, 1);
        put_u32(&mut out, 48, NSID);
    }
    out
}

/// The state of `nsid`'s group in an ANA log; `None` when the log does not say it.
pub fn parse_ana(log: &[u8], nsid: u32) -> Option<AnaState> {
    let groups = if log.len() < 16 { 0 } else { u16_at(log, 8) };
    let mut at = 16;
    for _ in 0..groups {
        if log.len() < at + 32 {
            return None;
        }
        let count = u32_at(log, at + 4) as usize;
        let end = at.checked_add(32)?.checked_add(count.checked_mul(4)?)?;
        if log.len() < end {
            return None;
        }
        if (0..count).any(|index| u32_at(log, at + 32 + index * 4) == nsid) {
            return AnaState::from_wire(log[at + 16]);
        }
        at = end;
    }
    None
}

/// A record of the discovery log: where a subsystem is to be had over TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryRecord {
    /// SUBNQN.
    pub subsystem_nqn: String,
    /// TRADDR: an IP address.
    pub address: std::net::IpAddr,
    /// TRSVCID.
    pub port: u16,
    /// PORTID: distinct for each address and port.
    pub port_id: u16,
}

/// The discovery log (Base 5.16.1.23): GENCTR 0-7, NUMREC 8-15, RECFMT 16-17, records from 1024:
/// TRTYPE 0, ADRFAM 1, SUBTYPE 2, TREQ 3, PORTID 4-5, CNTLID 6-7, ASQSZ 8-9, TRSVCID 32-63,
/// SUBNQN 256-511, TRADDR 512-767, TSAS 768-1023 (SECTYPE 768).
pub fn discovery(generation: u64, records: &[&DiscoveryRecord]) -> Vec<u8> {
    let mut out = vec![0; DISCOVERY_RECORD_BYTES * (1 + records.len())];
    put_u64(&mut out, 0, generation);
    put_u64(&mut out, 8, records.len() as u64);
    for (record, out) in records.iter().zip(out[1024..].chunks_exact_mut(DISCOVERY_RECORD_BYTES)) {
        const TCP: u8 = 3;
        const NVM_SUBSYSTEM: u8 = 2;
        /// Secure channel not specified; submission queue flow control may be disabled.
        const REQUIREMENTS: u8 = 1 << 2;
        out[0] = TCP;
        out[1] = if record.address.is_ipv4() { 1 } else { 2 };
        out[2] = NVM_SUBSYSTEM;
        out[3] = REQUIREMENTS;
        put_u16(out, 4, record.port_id);
        put_u16(out, 6, crate::fabrics::CNTLID_DYNAMIC);
        put_u16(out, 8, crate::target::ADMIN_QUEUE_ENTRIES_MAX);
        put_ascii(&mut out[32..64], &record.port.to_string());
        put_nqn(&mut out[256..512], &record.subsystem_nqn);
        put_ascii(&mut out[512..768], &record.address.to_string());
    }
    out
}

/// Generation and records of a discovery log that a host has read whole.
pub fn parse_discovery(log: &[u8]) -> Option<(u64, Vec<DiscoveryRecord>)> {
    let generation = u64_at(log.get(..DISCOVERY_RECORD_BYTES)?, 0);
    let count = usize::try_from(u64_at(log, 8)).ok()?;
    let records = log[DISCOVERY_RECORD_BYTES..].chunks_exact(DISCOVERY_RECORD_BYTES);
    if records.len() < count {
        return None;
    }
    let parsed = records.take(count).filter_map(|record| {
        let text = |range: std::ops::Range<usize>| {
            std::str::from_utf8(&record[range]).ok().map(|text| text.trim_end_matches([' ', '\0']))
        };
        Some(DiscoveryRecord {
            subsystem_nqn: crate::le::nqn_at(&record[256..512])?.to_owned(),
            address: text(512..768)?.parse().ok()?,
            port: text(32..64)?.parse().ok()?,
            port_id: u16_at(record, 4),
        })
    });
    Some((generation, parsed.collect()))
}
