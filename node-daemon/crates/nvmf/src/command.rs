//! Submission and completion queue entries (Base 4.2, TCP 3.3.2): opcodes, identifiers, SGLs.

use crate::le::{put_u16, put_u32, put_u64, u16_at, u32_at, u64_at};
use crate::status::Status;

/// Bytes of a submission queue entry.
pub const ENTRY_BYTES: usize = 64;
/// Bytes of a completion queue entry.
pub const COMPLETION_BYTES: usize = 16;

/// Opcodes of the admin queue (Base 5).
pub mod admin {
    /// Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT: u8 = 0x0c;
    /// Keep Alive.
    pub const KEEP_ALIVE: u8 = 0x18;
}

/// Opcodes of I/O queues (Base 7, NVM 3).
pub mod io {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Compare.
    pub const COMPARE: u8 = 0x05;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Verify.
    pub const VERIFY: u8 = 0x0c;
    /// Copy.
    pub const COPY: u8 = 0x19;
}

/// FUSE (Base 4.2): what a command is of a fused operation.
pub mod fuse {
    /// A command of its own.
    pub const ALONE: u8 = 0;
    /// The first of two.
    pub const FIRST: u8 = 1;
    /// The second of two.
    pub const SECOND: u8 = 2;
}

/// The opcode of every Fabrics command (Base 6).
pub const FABRICS: u8 = 0x7f;

/// Fabrics command types (FCTYPE, byte 4).
pub mod fctype {
    /// Property Set.
    pub const PROPERTY_SET: u8 = 0x00;
    /// Connect.
    pub const CONNECT: u8 = 0x01;
    /// Authentication Send.
    pub const AUTHENTICATION_SEND: u8 = 0x05;
    /// Authentication Receive.
    pub const AUTHENTICATION_RECEIVE: u8 = 0x06;
    /// Property Get.
    pub const PROPERTY_GET: u8 = 0x04;
    /// Disconnect.
    pub const DISCONNECT: u8 = 0x08;
}

/// Feature identifiers (Base 5.27).
pub mod feature {
    /// Arbitration.
    pub const ARBITRATION: u8 = 0x01;
    /// Power Management.
    pub const POWER_MANAGEMENT: u8 = 0x02;
    /// Temperature Threshold.
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    /// Error Recovery.
    pub const ERROR_RECOVERY: u8 = 0x05;
    /// Number of Queues.
    pub const QUEUE_COUNT: u8 = 0x07;
    /// Write Atomicity Normal.
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    /// Asynchronous Event Configuration.
    pub const ASYNC_EVENTS: u8 = 0x0b;
    /// Keep Alive Timer.
    pub const KEEP_ALIVE: u8 = 0x0f;
    /// Host Identifier.
    pub const HOST_ID: u8 = 0x81;
}

/// A write of zeroes that may deallocate (NVM 3.2.8: CDW12 bit 25).
pub const WRITE_ZEROES_DEALLOCATE: u32 = 1 << 25;
/// Attribute Deallocate of Dataset Management (NVM 3.2.3: CDW11 bit 2).
pub const DSM_DEALLOCATE: u32 = 1 << 2;
/// Bytes of a Dataset Management range.
pub const DSM_RANGE_BYTES: usize = 16;
/// Most ranges of one Dataset Management command (NR is 0's based in 8 bits).
pub const DSM_RANGES_MAX: usize = 256;

/// Bytes of a Source Range Entry of Copy, descriptor format 0 (NVM 3.2.2).
pub const COPY_RANGE_BYTES: usize = 32;
/// Most source ranges of one Copy: what fits into 4 KiB (MSRC + 1).
pub const COPY_RANGES_MAX: usize = 128;
/// Most blocks of one Copy, and of each of its source ranges (MCL, MSSRL): one write, so that a
/// copy is written whole or not at all.
pub const COPY_BLOCKS_MAX: u32 = (crate::TRANSFER_BYTES_MAX / crate::BLOCK_BYTES) as u32;

/// In-capsule data: SGL Data Block (0h), sub type offset (1h).
const SGL_IN_CAPSULE: u8 = 0x01;
/// Data in PDUs of its own: Transport SGL Data Block (5h), sub type transport specific (Ah).
const SGL_TRANSPORT: u8 = 0x5a;
/// PSDT 01b in byte 1: SGLs, as NVMe/TCP demands.
const PSDT_SGL: u8 = 0x40;

/// A command: an entry of 64 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub [u8; ENTRY_BYTES]);

/// Where a command's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// No data.
    None,
    /// That many bytes in the capsule.
    InCapsule(u32),
    /// That many bytes, moved by data PDUs.
    Transport(u32),
}

impl Data {
    /// Bytes of it.
    pub fn bytes(self) -> u32 {
        match self {
            Self::None => 0,
            Self::InCapsule(bytes) | Self::Transport(bytes) => bytes,
        }
    }
}

impl Entry {
    /// A command with this opcode and identifier, no data.
    pub fn new(opcode: u8, id: u16) -> Self {
        let mut entry = Self([0; ENTRY_BYTES]);
        entry.0[0] = opcode;
        entry.0[1] = PSDT_SGL;
        put_u16(&mut entry.0, 2, id);
        entry.0[39] = SGL_TRANSPORT;
        entry
    }

    /// A Fabrics command; its data is set with [`Entry::set_data`].
    pub fn fabrics(kind: u8, id: u16) -> Self {
        let mut entry = Self::new(FABRICS, id);
        entry.0[4] = kind;
        entry
    }

    /// From the 64 bytes behind a capsule's common header. Panics on another length.
    pub fn parse(bytes: &[u8]) -> Self {
        Self(bytes.try_into().expect("a capsule's entry has 64 bytes"))
    }

    /// OPC.
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }

    /// FUSE, CDW0 bits 9:8.
    pub fn fused(&self) -> u8 {
        self.0[1] & 3
    }

    /// CID.
    pub fn id(&self) -> u16 {
        u16_at(&self.0, 2)
    }

    /// FCTYPE of a Fabrics command.
    pub fn fabrics_type(&self) -> u8 {
        self.0[4]
    }

    /// NSID.
    pub fn nsid(&self) -> u32 {
        u32_at(&self.0, 4)
    }

    /// Command dword `number`, 0 to 15.
    pub fn dword(&self, number: usize) -> u32 {
        u32_at(&self.0, number * 4)
    }

    /// SLBA of an I/O command: dwords 10 and 11.
    pub fn start_lba(&self) -> u64 {
        u64_at(&self.0, 40)
    }

    /// NLB of an I/O command (0's based on the wire), as a count.
    pub fn block_count(&self) -> u32 {
        u32::from(u16_at(&self.0, 48)) + 1
    }

    /// Sets NSID.
    pub fn set_nsid(&mut self, nsid: u32) {
        put_u32(&mut self.0, 4, nsid);
    }

    /// Sets a command dword.
    pub fn set_dword(&mut self, number: usize, value: u32) {
        put_u32(&mut self.0, number * 4, value);
    }

    /// Sets SLBA and NLB. Panics when `count` is not 1 to 65,536.
    pub fn set_range(&mut self, start: u64, count: u32) {
        put_u64(&mut self.0, 40, start);
        let last = count.checked_sub(1).expect("at least one block");
        put_u16(&mut self.0, 48, u16::try_from(last).expect("at most 65,536 blocks"));
    }

    /// Sets SGL1 (bytes 24-39: address 24-31, length 32-35, identifier 39).
    pub fn set_data(&mut self, data: Data) {
        put_u64(&mut self.0, 24, 0);
        put_u32(&mut self.0, 32, data.bytes());
        self.0[39] = match data {
            Data::InCapsule(_) => SGL_IN_CAPSULE,
            Data::None | Data::Transport(_) => SGL_TRANSPORT,
        };
    }

    /// SGL1, checked against the data that came in the capsule (TCP 3.3.2: SGLs only, offset 0
    /// because ICDOFF is 0).
    pub fn data(&self, capsule_bytes: usize) -> Result<Data, Status> {
        // Fabrics commands have no PSDT: the byte is reserved (Base 6).
        if self.opcode() != FABRICS && self.0[1] & 0xc0 != PSDT_SGL {
            return Err(Status::INVALID_FIELD);
        }
        let bytes = u32_at(&self.0, 32);
        match self.0[39] {
            SGL_IN_CAPSULE if u64_at(&self.0, 24) != 0 => Err(Status::SGL_OFFSET),
            SGL_IN_CAPSULE if bytes as usize != capsule_bytes => Err(Status::SGL_LENGTH),
            SGL_IN_CAPSULE if bytes == 0 => Ok(Data::None),
            SGL_IN_CAPSULE => Ok(Data::InCapsule(bytes)),
            _ if capsule_bytes != 0 => Err(Status::SGL_TYPE),
            SGL_TRANSPORT if bytes == 0 => Ok(Data::None),
            SGL_TRANSPORT => Ok(Data::Transport(bytes)),
            // A null descriptor, as a command without data may carry.
            0 if bytes == 0 => Ok(Data::None),
            _ => Err(Status::SGL_TYPE),
        }
    }
}

/// A completion (Base 4.2.3.1): result 0-7, SQHD 8-9, SQID 10-11 (reserved in Fabrics), CID 12-13,
/// status 14-15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Dwords 0 and 1.
    pub result: u64,
    /// SQHD; 0xffff when submission queue flow control is off.
    pub queue_head: u16,
    /// CID.
    pub id: u16,
    /// Status.
    pub status: Status,
}

impl Completion {
    /// From the 16 bytes behind a capsule's common header.
    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            result: u64_at(bytes, 0),
            queue_head: u16_at(bytes, 8),
            id: u16_at(bytes, 12),
            status: Status::from_wire(u16_at(bytes, 14)),
        }
    }

    /// Into 16 bytes.
    pub fn put(self, out: &mut [u8]) {
        put_u64(out, 0, self.result);
        put_u16(out, 8, self.queue_head);
        put_u16(out, 10, 0);
        put_u16(out, 12, self.id);
        put_u16(out, 14, self.status.to_wire());
    }
}
