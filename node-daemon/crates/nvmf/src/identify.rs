//! Identify data structures (Base 5.17, NVM 4.1.5): written by the target, read by the host.

use tercet_proto::VolumeId;

use crate::command::{COPY_BLOCKS_MAX, COPY_RANGES_MAX};
use crate::fabrics::VERSION;
use crate::le::{nqn_at, put_ascii, put_nqn, put_u16, put_u32, put_u64, u16_at, u32_at, u64_at};
use crate::log::ERRORS_MAX;
use crate::{
    ANA_GROUP, ANATT_S, BLOCK_BYTES, BLOCK_SHIFT, IN_CAPSULE_BYTES_MAX, MDTS, NSID,
    QUEUE_ENTRIES_MAX, TRANSFER_BYTES_MAX,
};

/// Bytes of every Identify structure.
pub const IDENTIFY_BYTES: usize = 4096;
/// Keep Alive granularity in units of 100 ms (KAS).
pub const KEEP_ALIVE_UNITS: u16 = 1;
/// Asynchronous event requests that a controller keeps, 0's based on the wire (AERL).
pub const ASYNC_EVENTS_MAX: usize = 4;
/// Pages of 4 KiB, as a power of two, that one Write Zeroes may cover (WZSL): all of NLB.
const WRITE_ZEROES_SHIFT: u8 = 16;
/// Pages of 4 KiB, as a power of two, that one Verify may cover (VSL): they are read at once.
const VERIFY_SHIFT: u8 = MDTS;
/// Blocks of an atomic write, 0's based (AWUN, AWUPF, ACWU and the namespace's own): whatever MDTS
/// lets through is one entry of the log (rule W1), read from one map.
const ATOMIC_BLOCKS: u16 = (TRANSFER_BYTES_MAX / BLOCK_BYTES) as u16 - 1;
/// Temperature, in kelvin, that a controller has to name (WCTEMP); the health log's never gets there.
pub const WARNING_TEMPERATURE_K: u16 = 343;
/// The same of CCTEMP.
const CRITICAL_TEMPERATURE_K: u16 = 353;

/// CNS values (Base 5.17.1).
pub mod cns {
    /// Identify Namespace.
    pub const NAMESPACE: u8 = 0x00;
    /// Identify Controller.
    pub const CONTROLLER: u8 = 0x01;
    /// Active Namespace ID list.
    pub const NAMESPACE_LIST: u8 = 0x02;
    /// Namespace Identification Descriptor list.
    pub const DESCRIPTORS: u8 = 0x03;
    /// I/O Command Set specific Identify Namespace.
    pub const COMMAND_SET_NAMESPACE: u8 = 0x05;
    /// I/O Command Set specific Identify Controller.
    pub const COMMAND_SET_CONTROLLER: u8 = 0x06;
    /// I/O Command Set specific Active Namespace ID list.
    pub const COMMAND_SET_NAMESPACE_LIST: u8 = 0x07;
    /// I/O Command Set independent Identify Namespace.
    pub const INDEPENDENT_NAMESPACE: u8 = 0x08;
    /// Allocated Namespace ID list.
    pub const ALLOCATED_NAMESPACE_LIST: u8 = 0x10;
    /// Identify Namespace of an allocated namespace.
    pub const ALLOCATED_NAMESPACE: u8 = 0x11;
    /// Controllers that have the namespace attached.
    pub const NAMESPACE_CONTROLLERS: u8 = 0x12;
    /// Controllers of the subsystem.
    pub const CONTROLLERS: u8 = 0x13;
}

/// Bits of OAES and of the Asynchronous Event Configuration feature.
pub mod notice {
    /// SMART / Health critical warning: temperature (no notice, but configured with them).
    pub const TEMPERATURE: u32 = 1 << 1;
    /// Namespace Attribute Notices.
    pub const NAMESPACE: u32 = 1 << 8;
    /// Asymmetric Namespace Access Change Notices.
    pub const ANA: u32 = 1 << 11;
    /// Discovery Log Page Change Notification.
    pub const DISCOVERY: u32 = 1 << 31;
}

/// What differs from controller to controller.
#[derive(Clone, Copy, Debug)]
pub struct Controller<'a> {
    /// NQN of the subsystem.
    pub subsystem_nqn: &'a str,
    /// Which volume; `None` for a discovery controller.
    pub volume: Option<VolumeId>,
    /// CNTLID.
    pub cntlid: u16,
}

/// Identify Controller (CNS 01h).
pub fn controller(about: Controller<'_>) -> Vec<u8> {
    let mut out = vec![0; IDENTIFY_BYTES];
    let serial = about.volume.map_or_else(
        || "discovery".to_owned(),
        |volume| volume.0.as_simple().to_string()[..20].to_owned(),
    );
    put_ascii(&mut out[4..24], &serial); // SN
    put_ascii(&mut out[24..64], "Tercet volume"); // MN
    put_ascii(&mut out[64..72], env!("CARGO_PKG_VERSION")); // FR
    out[77] = MDTS;
    put_u16(&mut out, 78, about.cntlid); // CNTLID
    put_u32(&mut out, 80, VERSION); // VER
    put_u32(&mut out, 96, 1 | 1 << 6); // CTRATT: 128-bit host identifier, TBKAS
    out[111] = if about.volume.is_some() { 1 } else { 2 }; // CNTRLTYPE: I/O or discovery
    out[258] = 3; // ACL, 0's based
    out[259] = ASYNC_EVENTS_MAX as u8 - 1; // AERL, 0's based
    out[260] = 1 | 1 << 1; // FRMW: one slot, read only
    out[261] = 1 << 1 | 1 << 2; // LPA: effects log, extended data (offsets)
    out[262] = ERRORS_MAX as u8 - 1; // ELPE, 0's based
    put_u16(&mut out, 320, KEEP_ALIVE_UNITS); // KAS
    put_u16(&mut out, 514, QUEUE_ENTRIES_MAX); // MAXCMD
    put_u32(&mut out, 536, 1 | 1 << 20); // SGLS: supported, offsets in capsules
    put_nqn(&mut out[768..1024], about.subsystem_nqn); // SUBNQN
    if about.volume.is_some() {
        io_controller(&mut out);
    } else {
        put_u32(&mut out, 92, crate::identify::notice::DISCOVERY); // OAES
        put_u32(&mut out, 1792, 4); // IOCCSZ: no I/O queues, but not 0
        put_u32(&mut out, 1796, 1); // IORCSZ
    }
    out
}

/// The fields that only an I/O controller has.
fn io_controller(out: &mut [u8]) {
    out[76] = 1 | 1 << 1 | 1 << 3; // CMIC: several ports, several controllers, ANA
    put_u32(out, 92, notice::NAMESPACE | notice::ANA); // OAES
    put_u16(out, 266, WARNING_TEMPERATURE_K); // WCTEMP
    put_u16(out, 268, CRITICAL_TEMPERATURE_K); // CCTEMP
    out[342] = ANATT_S; // ANATT
    out[343] = 1 | 1 << 2 | 1 << 4 | 1 << 6; // ANACAP: optimized, inaccessible, change; fixed group
    put_u32(out, 344, ANA_GROUP); // ANAGRPMAX
    put_u32(out, 348, 1); // NANAGRPID
    out[512] = 0x66; // SQES: 64 bytes
    out[513] = 0x44; // CQES: 16 bytes
    put_u32(out, 516, NSID); // NN
    // ONCS: Compare, Dataset Management, Write Zeroes, Save and Select fields, Verify, Copy
    put_u16(out, 520, 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 8);
    put_u16(out, 522, 1); // FUSES: Compare and Write
    // VWC: none, every write is durable when it is answered; Flush to all namespaces is taken.
    out[525] = 3 << 1;
    put_u16(out, 526, ATOMIC_BLOCKS); // AWUN
    put_u16(out, 528, ATOMIC_BLOCKS); // AWUPF
    put_u16(out, 532, ATOMIC_BLOCKS); // ACWU
    put_u16(out, 534, 1); // OCFS: Copy descriptor format 0
    put_u32(out, 540, NSID); // MNAN
    put_u32(out, 1792, ((64 + IN_CAPSULE_BYTES_MAX) / 16) as u32); // IOCCSZ
    put_u32(out, 1796, 1); // IORCSZ
    out[1803] = 1; // MSDBD: one SGL descriptor
    out[1804] = 1; // OFCS: Disconnect
}

/// What a host has to know of a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerView {
    /// CNTLID.
    pub cntlid: u16,
    /// Most bytes of one command; `None` without a limit.
    pub transfer_bytes_max: Option<usize>,
    /// In-capsule data of an I/O command.
    pub in_capsule_bytes: usize,
    /// KAS: 0 when Keep Alive is not supported.
    pub keep_alive_units: u16,
    /// ANA is reported.
    pub ana: bool,
    /// ONCS.
    pub optional_commands: u16,
    /// VWC: whether a Flush is needed at all.
    pub volatile_cache: bool,
    /// MAXCMD; 0 when not reported.
    pub commands_max: u16,
    /// SUBNQN.
    pub subsystem_nqn: String,
}

impl ControllerView {
    /// From Identify Controller; `None` when it is no I/O controller that this host can use.
    pub fn parse(data: &[u8]) -> Option<Self> {
        let capsule_units = u32_at(data, 1792) as usize;
        if data.len() < IDENTIFY_BYTES || u16_at(data, 1800) != 0 || capsule_units < 4 {
            return None; // ICDOFF has to be 0, a capsule has to hold its entry
        }
        if u32_at(data, 536).is_multiple_of(4) {
            return None; // no SGLs
        }
        Some(Self {
            cntlid: u16_at(data, 78),
            transfer_bytes_max: match data[77] {
                0 => None,
                shift => Some(4096usize.checked_shl(u32::from(shift.min(16)))?),
            },
            in_capsule_bytes: capsule_units.saturating_mul(16) - 64,
            keep_alive_units: u16_at(data, 320),
            ana: data[76] & 1 << 3 != 0,
            optional_commands: u16_at(data, 520),
            volatile_cache: data[525] & 1 != 0,
            commands_max: u16_at(data, 514),
            subsystem_nqn: nqn_at(&data[768..1024])?.to_owned(),
        })
    }
}

/// Identify Namespace (CNS 00h, NVM 4.1.5.1).
pub fn namespace(volume: VolumeId, blocks: u64) -> Vec<u8> {
    let mut out = vec![0; IDENTIFY_BYTES];
    put_u64(&mut out, 0, blocks); // NSZE
    put_u64(&mut out, 8, blocks); // NCAP
    put_u64(&mut out, 16, blocks); // NUSE
    out[24] = 1 << 1; // NSFEAT: NAWUN, NAWUPF and NACWU are defined
    out[30] = 1; // NMIC: may be attached to several controllers
    out[33] = 1 | 1 << 3; // DLFEAT: deallocated reads as zeroes, Write Zeroes may deallocate
    put_u16(&mut out, 34, ATOMIC_BLOCKS); // NAWUN
    put_u16(&mut out, 36, ATOMIC_BLOCKS); // NAWUPF
    put_u16(&mut out, 38, ATOMIC_BLOCKS); // NACWU
    put_u16(&mut out, 74, COPY_BLOCKS_MAX as u16); // MSSRL
    put_u32(&mut out, 76, COPY_BLOCKS_MAX); // MCL
    out[80] = COPY_RANGES_MAX as u8 - 1; // MSRC, 0's based
    put_u32(&mut out, 92, ANA_GROUP); // ANAGRPID
    out[104..120].copy_from_slice(volume.as_bytes()); // NGUID
    out[130] = BLOCK_SHIFT; // LBAF0: MS 128-129, LBADS 130, RP 131
    out
}

/// What a host has to know of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceView {
    /// NSZE in logical blocks.
    pub blocks: u64,
    /// log2 of the bytes of one.
    pub block_shift: u8,
    /// Metadata bytes of one.
    pub metadata_bytes: u16,
    /// NGUID.
    pub nguid: [u8; 16],
    /// ANAGRPID.
    pub ana_group: u32,
}

impl NamespaceView {
    /// From Identify Namespace.
    pub fn parse(data: &[u8]) -> Self {
        // FLBAS bits 3:0 (and 6:5 in 2.0) name the format in use.
        let format = usize::from(data[26] & 0xf | (data[26] & 0x60) >> 1);
        Self {
            blocks: u64_at(data, 0),
            block_shift: data[128 + format * 4 + 2],
            metadata_bytes: u16_at(data, 128 + format * 4),
            nguid: data[104..120].try_into().expect("sixteen bytes"),
            ana_group: u32_at(data, 92),
        }
    }
}

/// Active Namespace ID list (CNS 02h): NSIDs greater than `after`.
pub fn namespace_list(after: u32) -> Vec<u8> {
    let mut out = vec![0; IDENTIFY_BYTES];
    if after < NSID {
        put_u32(&mut out, 0, NSID);
    }
    out
}

/// Namespace Identification Descriptor list (CNS 03h): NIDT 0, NIDL 1, NID from 4.
pub fn descriptors(volume: VolumeId) -> Vec<u8> {
    const NGUID: u8 = 2;
    const UUID: u8 = 3;
    const COMMAND_SET: u8 = 4;
    let mut out = vec![0; IDENTIFY_BYTES];
    let mut at = 0;
    for (kind, id) in
        [(NGUID, &volume.as_bytes()[..]), (UUID, volume.as_bytes()), (COMMAND_SET, &[0])]
    {
        out[at] = kind;
        out[at + 1] = id.len() as u8;
        out[at + 4..at + 4 + id.len()].copy_from_slice(id);
        at += 4 + id.len();
    }
    out
}

/// NVM command set specific Identify Controller (CNS 06h, CSI 0): VSL 0, WZSL 1, WUSL 2, DMRL 3,
/// DMRSL 4-7, DMSL 8-15. A limit of 0 is none.
pub fn command_set_controller() -> Vec<u8> {
    let mut out = vec![0; IDENTIFY_BYTES];
    out[0] = VERIFY_SHIFT;
    out[1] = WRITE_ZEROES_SHIFT;
    out
}

/// Controller list (CNS 12h and 13h, Base 4.4): how many, then identifiers in order, from `first` on.
pub fn controller_list(cntlids: &std::collections::BTreeSet<u16>, first: u16) -> Vec<u8> {
    const MOST: usize = 2047;
    let mut out = vec![0; IDENTIFY_BYTES];
    let mut count = 0;
    for &cntlid in cntlids.range(first..).take(MOST) {
        count += 1;
        put_u16(&mut out, count * 2, cntlid);
    }
    put_u16(&mut out, 0, count as u16);
    out
}

/// I/O Command Set independent Identify Namespace (CNS 08h): NMIC 1, ANAGRPID 4-7, NSTAT 14.
pub fn independent_namespace() -> Vec<u8> {
    let mut out = vec![0; IDENTIFY_BYTES];
    out[1] = 1; // NMIC
    put_u32(&mut out, 4, ANA_GROUP);
    out[14] = 1; // NSTAT: ready
    out
}
