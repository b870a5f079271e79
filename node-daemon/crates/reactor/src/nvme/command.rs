//! The 72 bytes of a command as the kernel takes them (`struct nvme_uring_cmd`, and alike `struct
//! nvme_passthru_cmd` of the ioctl), and how an operation is cut into commands.

use crate::nvme::identify::Namespace;
use crate::operation::DiskKind;

/// `NVME_URING_CMD_IO`: `_IOWR('N', 0x80, 72 bytes)`.
pub(crate) const URING_CMD_IO: u32 = 0xc048_4e80;
/// Bytes of a command.
pub(crate) const COMMAND_BYTES: usize = 72;
/// Bytes of one range of a deallocation.
pub(crate) const RANGE_BYTES: usize = 16;
/// Most blocks of a command that has their number in 16 bits, less one.
const BLOCKS_MAX: u64 = 1 << 16;
/// Force unit access: durable on completion (command dword 12).
const FUA: u32 = 1 << 30;
/// Dataset management: the ranges are given back (command dword 11).
const DEALLOCATE: u32 = 1 << 2;

/// What a command does: opcodes of the NVM command set, and Identify of the admin one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Opcode {
    Flush = 0x00,
    Write = 0x01,
    Read = 0x02,
    Identify = 0x06,
    WriteZeroes = 0x08,
    DatasetManagement = 0x09,
}

/// A command. Addresses are the caller's to keep valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) opcode: Opcode,
    pub(crate) nsid: u32,
    /// Where its data is in memory; 0: it has none.
    pub(crate) data: u64,
    pub(crate) data_bytes: u32,
    /// Command dwords 10, 11 and 12; the others are 0.
    pub(crate) dwords: [u32; 3],
}

impl Command {
    /// As the kernel takes it. No time-out of our own: the kernel's (30 s) counts.
    pub(crate) fn encode(&self) -> [u8; COMMAND_BYTES] {
        let mut bytes = [0; COMMAND_BYTES];
        bytes[0] = self.opcode as u8;
        bytes[4..8].copy_from_slice(&self.nsid.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.data.to_ne_bytes());
        bytes[36..40].copy_from_slice(&self.data_bytes.to_ne_bytes());
        for (dword, at) in self.dwords.iter().zip([40, 44, 48]) {
            bytes[at..at + 4].copy_from_slice(&dword.to_ne_bytes());
        }
        bytes
    }
}

/// One range of a deallocation as the drive reads it: attributes, blocks, first block.
pub(crate) fn range(first_block: u64, blocks: u32) -> [u8; RANGE_BYTES] {
    let mut bytes = [0; RANGE_BYTES];
    bytes[4..8].copy_from_slice(&blocks.to_le_bytes());
    bytes[8..].copy_from_slice(&first_block.to_le_bytes());
    bytes
}

/// A part of an operation that one command does: bytes from the operation's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

/// How large the pieces of an operation may be. `zeroes_bytes`: what there is of zeroes to write
/// where the drive cannot write them by itself.
pub(crate) fn step_bytes(kind: DiskKind, namespace: &Namespace, zeroes_bytes: u64) -> u64 {
    let block_bytes = namespace.block_bytes();
    let most = match kind {
        DiskKind::Read { .. } | DiskKind::Write { .. } => namespace.transfer_bytes_max,
        DiskKind::WriteZeroes { .. } if namespace.zeroes_bytes_max == 0 => {
            namespace.transfer_bytes_max.min(zeroes_bytes)
        }
        DiskKind::WriteZeroes { .. } => namespace.zeroes_bytes_max,
        DiskKind::Deallocate { .. } => {
            let blocks_max = u64::from(u32::MAX);
            return namespace.deallocate_bytes_max.min(blocks_max * block_bytes);
        }
        DiskKind::Flush => return u64::MAX,
    };
    most.min(BLOCKS_MAX * block_bytes)
}

/// The piece with this number, or none behind the end. An operation without bytes has one piece.
pub(crate) fn piece(index: u64, bytes: u64, step_bytes: u64) -> Option<Piece> {
    let start = index.checked_mul(step_bytes)?;
    (start < bytes || index == 0)
        .then(|| Piece { start, bytes: step_bytes.min(bytes - start.min(bytes)) })
}

/// The command for a piece that begins at byte `at` of the namespace. `data`: where its data, or
/// the range of a deallocation, is in memory.
pub(crate) fn command(
    kind: DiskKind,
    namespace: &Namespace,
    at: u64,
    bytes: u64,
    data: u64,
) -> Command {
    let first = at >> namespace.block_shift;
    let blocks = bytes >> namespace.block_shift;
    let (low, high) = (first as u32, (first >> 32) as u32);
    let nsid = namespace.nsid;
    let moves = |opcode, flags| {
        let count = u32::try_from(blocks - 1).expect("at most 65,536 blocks");
        let data_bytes = if data == 0 { 0 } else { u32::try_from(bytes).expect("below 4 GiB") };
        Command { opcode, nsid, data, data_bytes, dwords: [low, high, count | flags] }
    };
    match kind {
        DiskKind::Read { .. } => moves(Opcode::Read, 0),
        // Without a volatile cache a completed write is durable.
        DiskKind::Write { fua, .. } => {
            moves(Opcode::Write, if fua && namespace.volatile_cache { FUA } else { 0 })
        }
        DiskKind::WriteZeroes { .. } if namespace.zeroes_bytes_max == 0 => moves(Opcode::Write, 0),
        DiskKind::WriteZeroes { .. } => moves(Opcode::WriteZeroes, 0),
        DiskKind::Deallocate { .. } => Command {
            opcode: Opcode::DatasetManagement,
            nsid,
            data,
            data_bytes: RANGE_BYTES as u32,
            dwords: [0, DEALLOCATE, 0], // ranges, less one
        },
        DiskKind::Flush => {
            Command { opcode: Opcode::Flush, nsid, data: 0, data_bytes: 0, dwords: [0; 3] }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace() -> Namespace {
        Namespace {
            nguid: None,
            nsid: 7,
            block_shift: 9,
            capacity_bytes: 1 << 30,
            volatile_cache: true,
            transfer_bytes_max: 131_072,
            zeroes_bytes_max: 1 << 40,
            deallocate_bytes_max: 1 << 20,
        }
    }

    fn pieces(bytes: u64, step: u64) -> Vec<(u64, u64)> {
        (0..).map_while(|index| piece(index, bytes, step)).map(|p| (p.start, p.bytes)).collect()
    }

    #[test]
    fn a_write_is_laid_out_as_the_kernel_takes_it() {
        let kind = DiskKind::Write { offset: 0, fua: true };
        let at = (1_u64 << 44) + 4096;
        let bytes = command(kind, &namespace(), at, 8192, 0x1122_3344_5566).encode();
        let mut wanted = [0; COMMAND_BYTES];
        wanted[0] = 1;
        wanted[4] = 7;
        wanted[24..30].copy_from_slice(&[0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        wanted[37] = 0x20; // 8,192 bytes
        wanted[40] = 8; // first block 2^35 + 8
        wanted[44] = 8;
        wanted[48] = 15; // 16 blocks, less one
        wanted[51] = 0x40; // FUA
        assert_eq!(bytes, wanted);
    }

    #[test]
    fn a_drive_without_a_volatile_cache_is_not_asked_to_flush() {
        let sure = Namespace { volatile_cache: false, ..namespace() };
        let kind = DiskKind::Write { offset: 0, fua: true };
        assert_eq!(command(kind, &sure, 0, 4096, 1).dwords[2], 7);
    }

    #[test]
    fn pieces_cover_an_operation_once() {
        assert_eq!(pieces(4096, 131_072), [(0, 4096)]);
        assert_eq!(pieces(131_072, 131_072), [(0, 131_072)]);
        assert_eq!(pieces(135_168, 131_072), [(0, 131_072), (131_072, 4096)]);
        assert_eq!(pieces(0, u64::MAX), [(0, 0)]);
    }

    #[test]
    fn steps_honour_every_limit() {
        let drive = namespace();
        let read = DiskKind::Read { offset: 0 };
        assert_eq!(step_bytes(read, &drive, 1), 131_072);
        let unlimited = Namespace { transfer_bytes_max: 1 << 40, ..drive };
        assert_eq!(step_bytes(read, &unlimited, 1), 65_536 * 512, "the count has 16 bits");
        let zero = DiskKind::WriteZeroes { offset: 0, len: 0 };
        assert_eq!(step_bytes(zero, &drive, 1), 65_536 * 512);
        let none = Namespace { zeroes_bytes_max: 0, ..drive };
        assert_eq!(step_bytes(zero, &none, 65_536), 65_536);
        assert_eq!(command(zero, &none, 0, 4096, 9).opcode, Opcode::Write);
        let discard = DiskKind::Deallocate { offset: 0, len: 0 };
        assert_eq!(step_bytes(discard, &drive, 1), 1 << 20);
    }

    #[test]
    fn a_deallocation_points_to_one_range() {
        let kind = DiskKind::Deallocate { offset: 0, len: 0 };
        let made = command(kind, &namespace(), 4096, 8192, 5);
        assert_eq!((made.data, made.data_bytes, made.dwords), (5, 16, [0, 4, 0]));
        let bytes = range(0x0102_0304_0506, 16);
        assert_eq!(bytes, [0, 0, 0, 0, 16, 0, 0, 0, 6, 5, 4, 3, 2, 1, 0, 0]);
    }
}
