//! Devices of a reactor, and the `Disk` that start-up code uses. Operations of files and block
//! devices are here, those of namespaces in `nvme`.
//!
//! A write with `fua` carries `RWF_DSYNC`: durable on completion, with one flush at most and none
//! where the device takes FUA. `Flush` is `fdatasync`. A short read or write (a file system may
//! split) goes on where it stopped; a file that ends early is a device error. Zeroes are written to
//! a file as any other bytes, so that its space is prepared; a block device is told to write them.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;

use io_uring::{opcode, squeue, types};
use rustix::fs::FallocateFlags;
use rustix::io::ReadWriteFlags;
use tercet_proto::Instant;
use tercet_store::disk::{Disk, DiskDone, DiskError, DiskOp, DiskToken};

use crate::device::{Device, DeviceKind, Discard, SECTOR_BYTES};
use crate::operation::{DiskKind, DiskOperation, Memory, Operation};
use crate::reactor::{DiskId, Event, Reactor};

/// Zeroes to write where a device cannot write them by itself.
#[repr(align(4096))]
pub(crate) struct Zeroes(pub(crate) [u8; 256 << 10]);
pub(crate) static ZEROES: Zeroes = Zeroes([0; 256 << 10]);

/// So many queued entries go to the kernel at once, not with the next `poll`: the device begins
/// while the rest is made ready.
const SUBMIT_QUEUED: usize = 4;

/// A device, and what the ring knows of it.
pub(crate) struct Slot {
    pub(crate) device: Device,
    /// It is a registered file.
    pub(crate) fixed: bool,
    /// It takes registered memory; some kernels do not for a namespace.
    pub(crate) fixed_buffers: bool,
}

impl Slot {
    /// Whether the device has nothing to do for such an operation.
    fn has_nothing_to_do(&self, kind: DiskKind) -> bool {
        let nvme = self.device.nvme.as_ref();
        match kind {
            DiskKind::Deallocate { .. } => {
                self.device.discard == Discard::Keep
                    || nvme.is_some_and(|namespace| namespace.deallocate_bytes_max == 0)
            }
            DiskKind::Flush => nvme.is_some_and(|namespace| !namespace.volatile_cache),
            DiskKind::Read { .. } | DiskKind::Write { .. } | DiskKind::WriteZeroes { .. } => false,
        }
    }
}

#[derive(Default)]
pub(crate) struct Disks {
    pub(crate) slots: Vec<Slot>,
}

impl Disks {
    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.slots.len()).expect("few devices")
    }

    pub(crate) fn push(&mut self, device: Device, fixed: bool) {
        self.slots.push(Slot { device, fixed, fixed_buffers: true });
    }
}

/// Builds an entry for a fixed file or a plain descriptor.
macro_rules! on_file {
    ($slot:expr, $index:expr, $fd:ident => $entry:expr) => {
        if $slot.fixed {
            let $fd = types::Fixed($index);
            $entry
        } else {
            let $fd = types::Fd($slot.device.fd.as_raw_fd());
            $entry
        }
    };
}

impl Reactor {
    pub(crate) fn submit_disk(&mut self, disk: u32, token: DiskToken, op: DiskOp) {
        let (kind, memory) = match op {
            DiskOp::Read { offset, into } => (DiskKind::Read { offset }, Memory::Into(into)),
            DiskOp::Write { offset, data, fua } => {
                (DiskKind::Write { offset, fua }, Memory::From(data))
            }
            DiskOp::Flush => (DiskKind::Flush, Memory::None),
            DiskOp::Deallocate { offset, len } => {
                (DiskKind::Deallocate { offset, len }, Memory::None)
            }
            DiskOp::WriteZeroes { offset, len } => {
                (DiskKind::WriteZeroes { offset, len }, Memory::None)
            }
        };
        let slot = &self.disks.slots[disk as usize];
        let (offset, bytes) = kind.range(&memory);
        assert!(offset.is_multiple_of(SECTOR_BYTES), "offsets are multiples of 4,096");
        assert!(bytes.is_multiple_of(SECTOR_BYTES), "lengths are multiples of 4,096");
        assert!(
            offset.checked_add(bytes).is_some_and(|end| end <= slot.device.capacity_bytes),
            "inside the device"
        );
        if slot.has_nothing_to_do(kind) {
            let done = DiskDone { token, buf: None, result: Ok(()) };
            return self.backlog.push_back(Event::Disk { disk: DiskId(disk), done });
        }
        if slot.device.nvme.is_some() {
            return self.start_nvme(disk, token, kind, memory);
        }
        self.start_disk(DiskOperation { disk, token, kind, memory, done_bytes: 0 });
    }

    fn start_disk(&mut self, mut operation: DiskOperation) {
        let slot = &self.disks.slots[operation.disk as usize];
        let fixed_buffers = self.ring.knows(operation.memory.bytes());
        let entry = entry(slot, &mut operation, fixed_buffers);
        // SAFETY: the memory is kept in the operation, whether the arena's or bytes of a payload, and
        // does not move. Zeroes are a constant.
        unsafe { self.start(Operation::Disk(operation), entry) };
        self.ring.submit_when(SUBMIT_QUEUED);
    }

    pub(crate) fn disk_completed(
        &mut self,
        mut operation: DiskOperation,
        result: i32,
        events: &mut Vec<Event>,
    ) {
        let device = &self.disks.slots[operation.disk as usize].device;
        let bytes = bytes_to_move(device.kind, &operation);
        let outcome = match result {
            errno if errno == -libc::EINTR || errno == -libc::EAGAIN => {
                return self.start_disk(operation);
            }
            error if error < 0 => Err(disk_error(-error)),
            moved if bytes > 0 => {
                operation.done_bytes += usize::try_from(moved).expect("a length");
                if operation.done_bytes < bytes {
                    if moved > 0 {
                        return self.start_disk(operation);
                    }
                    Err(DiskError::Io(libc::ENXIO)) // the file ends before its size
                } else {
                    Ok(())
                }
            }
            _ => Ok(()),
        };
        if let Err(error) = outcome {
            let (device, kind) = (device.path.display(), operation.kind);
            tracing::error!(%device, ?kind, %error, "device error");
        }
        let done =
            DiskDone { token: operation.token, buf: operation.memory.into_buf(), result: outcome };
        events.push(Event::Disk { disk: DiskId(operation.disk), done });
    }
}

/// Bytes that completions count; 0: they say only how it went.
fn bytes_to_move(device: DeviceKind, operation: &DiskOperation) -> usize {
    match operation.kind {
        DiskKind::WriteZeroes { len, .. } if device == DeviceKind::File => {
            usize::try_from(len).expect("64-bit machine")
        }
        _ => operation.memory.len(),
    }
}

pub(crate) fn disk_error(errno: i32) -> DiskError {
    match errno {
        libc::ENODEV | libc::ENXIO | libc::ESHUTDOWN => DiskError::Gone,
        errno => DiskError::Io(errno),
    }
}

fn entry(slot: &Slot, operation: &mut DiskOperation, fixed_buffers: bool) -> squeue::Entry {
    let index = operation.disk;
    let done = operation.done_bytes;
    match operation.kind {
        DiskKind::Read { offset } => {
            let (pointer, length) = remaining_mut(operation.memory.bytes_mut(), done);
            let at = slot.device.base_bytes + offset + done as u64;
            if fixed_buffers {
                on_file!(slot, index, fd => {
                    opcode::ReadFixed::new(fd, pointer, length, 0).offset(at).build()
                })
            } else {
                on_file!(slot, index, fd => {
                    opcode::Read::new(fd, pointer, length).offset(at).build()
                })
            }
        }
        DiskKind::Write { offset, fua } => {
            let (pointer, length) = remaining(&operation.memory.bytes()[done..]);
            let at = slot.device.base_bytes + offset + done as u64;
            let flags = if fua { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
            let flags = flags.bits().cast_signed();
            if fixed_buffers {
                on_file!(slot, index, fd => {
                    let write = opcode::WriteFixed::new(fd, pointer, length, 0);
                    write.offset(at).rw_flags(flags).build()
                })
            } else {
                on_file!(slot, index, fd => {
                    opcode::Write::new(fd, pointer, length).offset(at).rw_flags(flags).build()
                })
            }
        }
        DiskKind::Flush => on_file!(slot, index, fd => {
            opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
        }),
        DiskKind::WriteZeroes { offset, len } if slot.device.kind == DeviceKind::File => {
            let rest = usize::try_from(len).expect("64-bit machine") - done;
            let (pointer, length) = remaining(&ZEROES.0[..rest.min(ZEROES.0.len())]);
            let at = slot.device.base_bytes + offset + done as u64;
            on_file!(slot, index, fd => {
                opcode::Write::new(fd, pointer, length).offset(at).build()
            })
        }
        DiskKind::WriteZeroes { offset, len } => {
            fallocate(slot, index, FallocateFlags::ZERO_RANGE, offset, len)
        }
        DiskKind::Deallocate { offset, len } => {
            fallocate(slot, index, FallocateFlags::PUNCH_HOLE, offset, len)
        }
    }
}

fn fallocate(
    slot: &Slot,
    index: u32,
    mode: FallocateFlags,
    offset: u64,
    len: u64,
) -> squeue::Entry {
    let mode = (mode | FallocateFlags::KEEP_SIZE).bits().cast_signed();
    on_file!(slot, index, fd => {
        let fallocate = opcode::Fallocate::new(fd, len).mode(mode);
        fallocate.offset(slot.device.base_bytes + offset).build()
    })
}

fn remaining(rest: &[u8]) -> (*const u8, u32) {
    (rest.as_ptr(), u32::try_from(rest.len()).expect("a buffer below 4 GiB"))
}

fn remaining_mut(buf: &mut [u8], done: usize) -> (*mut u8, u32) {
    let rest = &mut buf[done..];
    (rest.as_mut_ptr(), u32::try_from(rest.len()).expect("a buffer below 4 GiB"))
}

/// One device of a reactor as the straight code of start-up wants it. In the engine's loop the
/// reactor itself takes operations and reports completions as events.
pub struct FileDisk<'a> {
    reactor: &'a mut Reactor,
    disk: DiskId,
    done: VecDeque<DiskDone>,
    /// Other events; the reactor reports them when this disk has been dropped.
    held: VecDeque<Event>,
}

impl<'a> FileDisk<'a> {
    /// The device `disk` of `reactor`.
    pub fn new(reactor: &'a mut Reactor, disk: DiskId) -> Self {
        Self { reactor, disk, done: VecDeque::new(), held: VecDeque::new() }
    }

    fn turn(&mut self, deadline: Option<Instant>) {
        let mut events = Vec::new();
        self.reactor.poll(deadline, &mut events).expect("a ring that was set up can be entered");
        for event in events {
            match event {
                Event::Disk { disk, done } if disk == self.disk => self.done.push_back(done),
                other => self.held.push_back(other),
            }
        }
    }
}

impl Drop for FileDisk<'_> {
    fn drop(&mut self) {
        let done = self.done.drain(..);
        let disk = self.disk;
        self.reactor.backlog.extend(done.map(|done| Event::Disk { disk, done }));
        self.reactor.backlog.append(&mut self.held);
    }
}

impl Disk for FileDisk<'_> {
    fn capacity_bytes(&self) -> u64 {
        self.reactor.disks.slots[self.disk.0 as usize].device.capacity_bytes
    }

    fn submit(&mut self, token: DiskToken, op: DiskOp) {
        self.reactor.submit(self.disk, token, op);
    }

    fn poll(&mut self, done: &mut Vec<DiskDone>) {
        self.turn(Some(Instant(0)));
        done.extend(self.done.drain(..));
    }

    fn wait(&mut self, done: &mut Vec<DiskDone>) {
        while self.done.is_empty() {
            self.turn(None);
        }
        done.extend(self.done.drain(..));
    }
}
