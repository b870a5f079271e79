//! Fabrics commands (Base 6) and controller properties (Base 3.1.3).

use crate::command::{Data, Entry, fctype};
use crate::le::{nqn_at, put_nqn, put_u16, put_u32, put_u64, u16_at, u32_at, u64_at};

/// Bytes of Connect's data (Base 6.3).
pub const CONNECT_DATA_BYTES: usize = 1024;
/// CNTLID of a Connect that asks for any controller (dynamic model).
pub const CNTLID_DYNAMIC: u16 = 0xffff;
/// Largest CNTLID that a controller may have (Base 4.6: FFF0h-FFFFh are reserved).
pub const CNTLID_MAX: u16 = 0xffef;
/// CATTR bit 2: the host does without submission queue flow control.
const CATTR_NO_FLOW_CONTROL: u8 = 1 << 2;

/// Of a Connect's result: the queue has to be authenticated (AUTHREQ.ATR).
pub const AUTHENTICATION_REQUIRED: u64 = 1 << 17;

/// Offsets of Connect's parameters, for the result of a refusal: IPO 15:0, IATTR 16 (1: in data).
pub mod parameter {
    /// QID in the entry.
    pub const QID: u32 = 42;
    /// SQSIZE in the entry.
    pub const SQSIZE: u32 = 44;
    const IN_DATA: u32 = 1 << 16;
    /// HOSTID in the data.
    pub const HOSTID: u32 = IN_DATA;
    /// CNTLID in the data.
    pub const CNTLID: u32 = IN_DATA | 16;
    /// SUBNQN in the data.
    pub const SUBNQN: u32 = IN_DATA | 256;
    /// HOSTNQN in the data.
    pub const HOSTNQN: u32 = IN_DATA | 512;
}

/// Connect's entry: RECFMT 40-41, QID 42-43, SQSIZE 44-45 (0's based), CATTR 46, KATO 48-51.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectEntry {
    /// RECFMT, 0.
    pub format: u16,
    /// 0: the admin queue.
    pub queue: u16,
    /// Entries of the queue, 0's based.
    pub last_entry: u16,
    /// No submission queue flow control.
    pub no_flow_control: bool,
    /// Keep Alive Timeout in milliseconds, 0: none.
    pub keep_alive_ms: u32,
}

impl ConnectEntry {
    /// From a Connect command.
    pub fn parse(entry: &Entry) -> Self {
        Self {
            format: u16_at(&entry.0, 40),
            queue: u16_at(&entry.0, 42),
            last_entry: u16_at(&entry.0, 44),
            no_flow_control: entry.0[46] & CATTR_NO_FLOW_CONTROL != 0,
            keep_alive_ms: u32_at(&entry.0, 48),
        }
    }

    /// The command, its data in the capsule.
    pub fn to_entry(self, id: u16) -> Entry {
        let mut entry = Entry::fabrics(fctype::CONNECT, id);
        put_u16(&mut entry.0, 40, self.format);
        put_u16(&mut entry.0, 42, self.queue);
        put_u16(&mut entry.0, 44, self.last_entry);
        entry.0[46] = if self.no_flow_control { CATTR_NO_FLOW_CONTROL } else { 0 };
        put_u32(&mut entry.0, 48, self.keep_alive_ms);
        entry.set_data(Data::InCapsule(CONNECT_DATA_BYTES as u32));
        entry
    }
}

/// Connect's data: HOSTID 0-15, CNTLID 16-17, SUBNQN 256-511, HOSTNQN 512-767.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectData {
    /// Host identifier, 128 bits.
    pub host_id: [u8; 16],
    /// Which controller.
    pub cntlid: u16,
    /// Of which subsystem.
    pub subsystem_nqn: String,
    /// Who asks.
    pub host_nqn: String,
}

impl ConnectData {
    /// From the data; the error is the result that names the wrong parameter.
    pub fn parse(data: &[u8]) -> Result<Self, u32> {
        debug_assert_eq!(data.len(), CONNECT_DATA_BYTES);
        let text = |range: std::ops::Range<usize>, parameter: u32| {
            nqn_at(&data[range])
                .filter(|nqn| crate::names::is_nqn(nqn))
                .map(str::to_owned)
                .ok_or(parameter)
        };
        Ok(Self {
            host_id: data[..16].try_into().expect("sixteen bytes"),
            cntlid: u16_at(data, 16),
            subsystem_nqn: text(256..512, parameter::SUBNQN)?,
            host_nqn: text(512..768, parameter::HOSTNQN)?,
        })
    }

    /// The data. Panics when an NQN is too long.
    pub fn to_wire(&self) -> Vec<u8> {
        let mut out = vec![0; CONNECT_DATA_BYTES];
        out[..16].copy_from_slice(&self.host_id);
        put_u16(&mut out, 16, self.cntlid);
        put_nqn(&mut out[256..512], &self.subsystem_nqn);
        put_nqn(&mut out[512..768], &self.host_nqn);
        out
    }
}

/// Controller properties (Base 3.1.3) by offset.
pub mod property {
    /// Controller Capabilities, 8 bytes.
    pub const CAP: u32 = 0x00;
    /// Version, 4 bytes.
    pub const VS: u32 = 0x08;
    /// Controller Configuration, 4 bytes.
    pub const CC: u32 = 0x14;
    /// Controller Status, 4 bytes.
    pub const CSTS: u32 = 0x1c;
}

/// Version 1.4.0: multi-path and ANA are whole, and hosts do not expect I/O command sets.
pub const VERSION: u32 = 0x0001_0400;
/// CAP.TO: readiness within this many units of 500 ms.
const READY_TIMEOUT_500MS: u64 = 15;

/// CAP: MQES 15:0 (0's based), CQR 16, TO 31:24, CSS 37 (the NVM command set); pages of 4 KiB.
pub fn capabilities(queue_entries_max: u16) -> u64 {
    u64::from(queue_entries_max - 1) | 1 << 16 | READY_TIMEOUT_500MS << 24 | 1 << 37
}

/// CC (Base 3.1.3.5).
pub mod configuration {
    /// EN.
    pub const ENABLE: u32 = 1;
    /// CSS 6:4, MPS 10:7, AMS 13:11: all have to be 0 here.
    pub const MUST_BE_ZERO: u32 = 0x3ff0;
    /// SHN 15:14: 01b normal, 10b abrupt.
    pub const SHUTDOWN: u32 = 3 << 14;
    /// A normal shutdown.
    pub const SHUTDOWN_NORMAL: u32 = 1 << 14;
    /// IOSQES 19:16 and IOCQES 23:20.
    pub const ENTRY_SIZES: u32 = 0xff << 16;
    /// 2^6 and 2^4 bytes.
    pub const ENTRY_SIZES_EXPECTED: u32 = 0x46 << 16;
}

/// CSTS (Base 3.1.3.6).
pub mod controller_status {
    /// RDY.
    pub const READY: u32 = 1;
    /// CFS: fatal.
    pub const FATAL: u32 = 1 << 1;
    /// SHST 3:2 = 01b.
    pub const SHUTDOWN_PROCESSING: u32 = 1 << 2;
    /// SHST 3:2 = 10b.
    pub const SHUTDOWN_COMPLETE: u32 = 2 << 2;
}

/// Property Get and Set: ATTRIB 40 (0: 4 bytes, 1: 8 bytes), OFST 44-47, VALUE 48-55.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PropertyEntry {
    /// Eight bytes rather than four.
    pub wide: bool,
    /// Which property.
    pub offset: u32,
    /// The value to set.
    pub value: u64,
}

impl PropertyEntry {
    /// From a Property Get or Set; `None` for a reserved size.
    pub fn parse(entry: &Entry) -> Option<Self> {
        let wide = match entry.0[40] & 7 {
            0 => false,
            1 => true,
            _ => return None,
        };
        Some(Self { wide, offset: u32_at(&entry.0, 44), value: u64_at(&entry.0, 48) })
    }

    /// A Property Get.
    pub fn get(self, id: u16) -> Entry {
        self.entry(fctype::PROPERTY_GET, id)
    }

    /// A Property Set.
    pub fn set(self, id: u16) -> Entry {
        self.entry(fctype::PROPERTY_SET, id)
    }

    fn entry(self, kind: u8, id: u16) -> Entry {
        let mut entry = Entry::fabrics(kind, id);
        entry.0[40] = u8::from(self.wide);
        put_u32(&mut entry.0, 44, self.offset);
        put_u64(&mut entry.0, 48, self.value);
        entry
    }
}
