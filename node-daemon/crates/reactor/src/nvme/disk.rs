//! Operations of a namespace: cut into commands that are in flight together, and told complete when
//! the last of them is.

use std::os::fd::AsRawFd;

use io_uring::{opcode, squeue, types};
use tercet_store::disk::{DiskDone, DiskError, DiskToken};
use tracing::{error, info, warn};

use crate::file_disk::{Slot, ZEROES, disk_error};
use crate::nvme::command::{
    COMMAND_BYTES, RANGE_BYTES, URING_CMD_IO, command, piece, range, step_bytes,
};
use crate::operation::{DiskKind, Memory, Operation};
use crate::reactor::{DiskId, Event, Reactor};

/// How often a command is tried again that the drive did not refuse for good, as Linux does for its
/// own: a controller that is being reset gives back everything that it had.
const RETRIES_MAX: u8 = 5;
/// Do not retry (in a status as the kernel hands it on, without the phase bit).
const STATUS_DNR: i32 = 0x4000;
/// Status code type and status code.
const STATUS_CODE: i32 = 0x7ff;
/// Invalid namespace: it was deleted.
const STATUS_GONE: i32 = 0x00b;

/// An operation whose commands are in flight.
pub(crate) struct NvmeOperation {
    disk: u32,
    token: DiskToken,
    kind: DiskKind,
    memory: Memory,
    /// What a deallocation's commands point to, one for each.
    ranges: Box<[[u8; RANGE_BYTES]]>,
    step_bytes: u64,
    bytes: u64,
    pieces_left: u64,
    retries_left: u8,
    result: Result<(), DiskError>,
}

/// What a completion of a command means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Done,
    /// Nothing is wrong: the kernel was interrupted or short of memory.
    Again,
    /// The drive has not refused it for good.
    Retry,
    Failed(DiskError),
}

fn judge(result: i32) -> Verdict {
    match result {
        0 => Verdict::Done,
        status if status > 0 && status & STATUS_CODE == STATUS_GONE => {
            Verdict::Failed(DiskError::Gone)
        }
        status if status > 0 && status & STATUS_DNR == 0 => Verdict::Retry,
        status if status > 0 => Verdict::Failed(DiskError::Io(libc::EIO)),
        error if error == -libc::EINTR || error == -libc::EAGAIN => Verdict::Again,
        error => Verdict::Failed(disk_error(-error)),
    }
}

impl Reactor {
    /// Starts all commands of an operation.
    pub(crate) fn start_nvme(
        &mut self,
        disk: u32,
        token: DiskToken,
        kind: DiskKind,
        memory: Memory,
    ) {
        let device = &self.disks.slots[disk as usize].device;
        let namespace = device.nvme.expect("a namespace");
        let (offset, bytes) = kind.range(&memory);
        let step_bytes = step_bytes(kind, &namespace, ZEROES.0.len() as u64);
        let pieces = bytes.div_ceil(step_bytes).max(1);
        let ranges = if matches!(kind, DiskKind::Deallocate { .. }) {
            let one = |index| {
                let part = piece(index, bytes, step_bytes).expect("within the operation");
                let first = (device.base_bytes + offset + part.start) >> namespace.block_shift;
                let blocks = part.bytes >> namespace.block_shift;
                range(first, u32::try_from(blocks).expect("cut to fit"))
            };
            (0..pieces).map(one).collect()
        } else {
            Box::default()
        };
        let operation = NvmeOperation {
            disk,
            token,
            kind,
            memory,
            ranges,
            step_bytes,
            bytes,
            pieces_left: pieces,
            retries_left: RETRIES_MAX,
            result: Ok(()),
        };
        let number = self.operations.insert(Operation::Nvme(Box::new(operation)));
        for index in 0..pieces {
            self.start_command(number, index);
        }
    }

    fn start_command(&mut self, number: u32, index: u64) {
        let Operation::Nvme(operation) = self.operations.get_mut(number) else {
            unreachable!("a command belongs to an operation of a namespace");
        };
        let slot = &self.disks.slots[operation.disk as usize];
        let fixed_buffer = slot.fixed_buffers && self.ring.knows(operation.memory.bytes());
        let entry = entry(slot, operation, index, fixed_buffer);
        let command = Operation::Command { operation: number, index, fixed_buffer };
        // SAFETY: buffer and ranges are kept in the operation, which is in the table until its last
        // command has completed; the memory of both does not move. Zeroes are a constant.
        unsafe { self.start(command, entry) };
    }

    pub(crate) fn command_completed(
        &mut self,
        number: u32,
        index: u64,
        fixed_buffer: bool,
        result: i32,
        events: &mut Vec<Event>,
    ) {
        let Operation::Nvme(operation) = self.operations.get_mut(number) else {
            unreachable!("a command belongs to an operation of a namespace");
        };
        let slot = &mut self.disks.slots[operation.disk as usize];
        let device = slot.device.path.display();
        // Kernels differ in the registered memory that they take here; plain addresses all do.
        if result == -libc::EINVAL && fixed_buffer {
            if slot.fixed_buffers {
                info!(%device, "this kernel takes no registered memory here: plain addresses");
                slot.fixed_buffers = false;
            }
            return self.start_command(number, index);
        }
        match judge(result) {
            Verdict::Done => {}
            Verdict::Again => return self.start_command(number, index),
            Verdict::Retry if operation.retries_left > 0 => {
                operation.retries_left -= 1;
                let (kind, status) = (operation.kind, format!("{result:#06x}"));
                warn!(%device, ?kind, index, status, "the drive gives a command back: tried again");
                return self.start_command(number, index);
            }
            verdict => {
                let failed = if let Verdict::Failed(error) = verdict {
                    error
                } else {
                    DiskError::Io(libc::EIO)
                };
                let (kind, answer) = (operation.kind, format!("{result:#06x}"));
                error!(%device, ?kind, index, answer, error = %failed, "device error");
                operation.result = Err(failed);
            }
        }
        operation.pieces_left -= 1;
        if operation.pieces_left > 0 {
            return;
        }
        let Operation::Nvme(operation) = self.operations.remove(number) else {
            unreachable!("looked at above");
        };
        let NvmeOperation { disk, token, memory, result, .. } = *operation;
        let buf = memory.into_buf();
        events.push(Event::Disk { disk: DiskId(disk), done: DiskDone { token, buf, result } });
    }
}

fn entry(slot: &Slot, operation: &mut NvmeOperation, index: u64, fixed: bool) -> squeue::Entry128 {
    let namespace = slot.device.nvme.as_ref().expect("a namespace");
    let part = piece(index, operation.bytes, operation.step_bytes).expect("within the operation");
    let (offset, _) = operation.kind.range(&operation.memory);
    let start = usize::try_from(part.start).expect("64-bit machine");
    let data = match operation.kind {
        DiskKind::Read { .. } => {
            operation.memory.bytes_mut()[start..].as_mut_ptr().expose_provenance()
        }
        DiskKind::Write { .. } => operation.memory.bytes()[start..].as_ptr().expose_provenance(),
        DiskKind::WriteZeroes { .. } if namespace.zeroes_bytes_max == 0 => {
            ZEROES.0.as_ptr().expose_provenance()
        }
        DiskKind::Deallocate { .. } => {
            let index = usize::try_from(index).expect("64-bit machine");
            operation.ranges[index].as_ptr().expose_provenance()
        }
        DiskKind::WriteZeroes { .. } | DiskKind::Flush => 0,
    };
    let at = slot.device.base_bytes + offset + part.start;
    let command = command(operation.kind, namespace, at, part.bytes, data as u64);
    let mut bytes = [0; 80];
    bytes[..COMMAND_BYTES].copy_from_slice(&command.encode());
    let buffer = fixed.then_some(0);
    if slot.fixed {
        let fd = types::Fixed(operation.disk);
        opcode::UringCmd80::new(fd, URING_CMD_IO).cmd(bytes).buf_index(buffer).build()
    } else {
        let fd = types::Fd(slot.device.fd.as_raw_fd());
        opcode::UringCmd80::new(fd, URING_CMD_IO).cmd(bytes).buf_index(buffer).build()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_drives_and_kernels() {
        let io = Verdict::Failed(DiskError::Io(libc::EIO));
        assert_eq!(judge(0), Verdict::Done);
        assert_eq!(judge(0x4281), io, "unrecovered read error, do not retry");
        assert_eq!(judge(0x371), Verdict::Retry, "aborted by a reset of the controller");
        assert_eq!(judge(0x400b), Verdict::Failed(DiskError::Gone), "the namespace was deleted");
        assert_eq!(judge(-libc::EAGAIN), Verdict::Again);
        assert_eq!(judge(-libc::ENODEV), Verdict::Failed(DiskError::Gone));
        assert_eq!(judge(-libc::ENOMEM), Verdict::Failed(DiskError::Io(libc::ENOMEM)));
    }
}
