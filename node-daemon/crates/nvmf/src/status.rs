//! Status of a completed command (Base 4.2.3) and how a host has to take it.

/// The 15-bit status field of a completion without its phase bit: SC 7:0, SCT 10:8, CRD 12:11,
/// M 13, DNR 14.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status(pub u16);

const DNR: u16 = 1 << 14;
const MORE: u16 = 1 << 13;
const CRD: u16 = 3 << 11;
const COMMAND_SPECIFIC: u16 = 1 << 8;
const MEDIA: u16 = 2 << 8;
const PATH: u16 = 3 << 8;

impl Status {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// No such opcode on this queue.
    pub const INVALID_OPCODE: Self = Self(0x01 | DNR);
    /// A field has a value that is reserved or not supported.
    pub const INVALID_FIELD: Self = Self(0x02 | DNR);
    /// The command identifier is in use on this queue.
    pub const ID_CONFLICT: Self = Self(0x03 | DNR);
    /// Something broke inside; try again.
    pub const INTERNAL: Self = Self(0x06);
    /// The host asked for it (Abort).
    pub const ABORT_REQUESTED: Self = Self(0x07);
    /// The other command of the fused operation failed.
    pub const FAILED_FUSED: Self = Self(0x09 | DNR);
    /// The other command of the fused operation did not come next.
    pub const MISSING_FUSED: Self = Self(0x0a | DNR);
    /// No such namespace.
    pub const INVALID_NAMESPACE: Self = Self(0x0b | DNR);
    /// Not in this order (I/O before the controller is enabled, a second Connect).
    pub const SEQUENCE_ERROR: Self = Self(0x0c | DNR);
    /// The SGL's length does not fit the command.
    pub const SGL_LENGTH: Self = Self(0x0f | DNR);
    /// An SGL descriptor that NVMe/TCP does not have here.
    pub const SGL_TYPE: Self = Self(0x11 | DNR);
    /// An offset that is not zero in an in-capsule SGL.
    pub const SGL_OFFSET: Self = Self(0x16 | DNR);
    /// The host identifier is of another format (all zeroes).
    pub const HOST_ID_FORMAT: Self = Self(0x18 | DNR);
    /// The volume may only be read by this host.
    pub const WRITE_PROTECTED: Self = Self(0x20 | DNR);
    /// Data did not arrive as it was sent (a data digest); try again.
    pub const TRANSIENT_TRANSPORT: Self = Self(0x22);
    /// Beyond the end of the namespace.
    pub const LBA_RANGE: Self = Self(0x80 | DNR);
    /// No space left for what is not allocated yet.
    pub const CAPACITY: Self = Self(0x81 | DNR);
    /// Too many asynchronous event requests (Base 5.2).
    pub const AER_LIMIT: Self = Self(0x05 | COMMAND_SPECIFIC | DNR);
    /// No such log page (Base 5.16).
    pub const INVALID_LOG: Self = Self(0x09 | COMMAND_SPECIFIC | DNR);
    /// The feature cannot be saved (Base 5.27).
    pub const NOT_SAVEABLE: Self = Self(0x0d | COMMAND_SPECIFIC | DNR);
    /// The feature cannot be changed (Base 5.27).
    pub const NOT_CHANGEABLE: Self = Self(0x0e | COMMAND_SPECIFIC | DNR);
    /// RECFMT of a Connect or Disconnect is not 0 (Base 6.3).
    pub const CONNECT_FORMAT: Self = Self(0x80 | COMMAND_SPECIFIC | DNR);
    /// No controller to be had now, or the volume is not here (yet): try again.
    pub const CONNECT_BUSY: Self = Self(0x81 | COMMAND_SPECIFIC);
    /// A parameter of Connect is invalid; the result says which.
    pub const CONNECT_PARAMETER: Self = Self(0x82 | COMMAND_SPECIFIC | DNR);
    /// The host may not connect. Without DNR: an attachment may be seen here a moment later, and
    /// a Linux host that is told DNR gives the path up for good.
    pub const CONNECT_HOST: Self = Self(0x84 | COMMAND_SPECIFIC);
    /// More, or longer, source ranges than Copy takes (NVM 3.2.2; command specific to I/O queues).
    pub const SIZE_LIMIT: Self = Self(0x83 | COMMAND_SPECIFIC | DNR);
    /// Disconnect on the admin queue.
    pub const QUEUE_TYPE: Self = Self(0x85 | COMMAND_SPECIFIC | DNR);
    /// The queue has to be authenticated first (Base 6.3).
    pub const AUTHENTICATION_REQUIRED: Self = Self(0x91 | COMMAND_SPECIFIC | DNR);
    /// The media cannot be read.
    pub const UNRECOVERED_READ: Self = Self(0x81 | MEDIA | DNR);
    /// Compare found a difference.
    pub const COMPARE_FAILURE: Self = Self(0x85 | MEDIA | DNR);
    /// ANA: another path has to be taken.
    pub const ANA_INACCESSIBLE: Self = Self(0x02 | PATH);
    /// ANA: this path is changing.
    pub const ANA_TRANSITION: Self = Self(0x03 | PATH);
    /// The host's own word for a command whose connection was lost.
    pub const HOST_PATH: Self = Self(0x70 | PATH);

    /// As it stands in bytes 14-15 of a completion, phase 0.
    pub fn to_wire(self) -> u16 {
        self.0 << 1
    }

    /// From bytes 14-15 of a completion.
    pub fn from_wire(field: u16) -> Self {
        Self(field >> 1)
    }

    /// Whether the command succeeded.
    pub fn is_success(self) -> bool {
        self.code() == 0
    }

    /// SCT and SC alone.
    pub fn code(self) -> u16 {
        self.0 & !(DNR | MORE | CRD)
    }

    /// The same without DNR: worth another try.
    #[must_use]
    pub fn retryable(self) -> Self {
        Self(self.0 & !DNR)
    }

    /// Whether this is the same condition, whatever its DNR bit says.
    pub fn same(self, other: Self) -> bool {
        self.code() == other.code()
    }

    /// Path related (SCT 3h): try elsewhere.
    pub fn is_path_error(self) -> bool {
        self.code() >> 8 == 3
    }

    /// Do not retry.
    pub fn is_final(self) -> bool {
        self.0 & DNR != 0
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (sct, sc) = (self.code() >> 8, self.code() & 0xff);
        write!(f, "NVMe status {sct:x}h/{sc:02x}h")?;
        if self.is_final() { f.write_str(" DNR") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_base_4_2_3_has_them() {
        assert_eq!(Status::ANA_INACCESSIBLE.to_wire(), 0x0604);
        assert_eq!(Status::INVALID_FIELD.to_wire(), 0x8004);
        assert!(Status::ANA_INACCESSIBLE.is_path_error() && !Status::ANA_INACCESSIBLE.is_final());
        assert!(Status::from_wire(0x8004).same(Status(0x02)));
        assert_eq!(Status::LBA_RANGE.to_string(), "NVMe status 0h/80h DNR");
    }
}
