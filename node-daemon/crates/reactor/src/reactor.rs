//! The reactor: devices, streams, listeners and the mailbox of one thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use io_uring::{cqueue, opcode, squeue, types};
use tercet_proto::Instant;
use tercet_store::arena::Arena;
use tercet_store::disk::{DiskDone, DiskOp, DiskToken};
use tracing::error;

use crate::clock::now;
use crate::device::Device;
use crate::file_disk::Disks;
use crate::net::{Listener, ListenerId, StreamId, Streams};
use crate::operation::{Operation, Operations};
use crate::ring::Ring;
use crate::wake::Waker;

/// Names a device of this reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskId(pub(crate) u32);

/// How a reactor behaves.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long to look for completions before the thread sleeps, while traffic flows; zero where
    /// cores are scarce. An idle reactor always sleeps.
    pub spin: Duration,
}

/// How long after the last event traffic is taken to flow.
const FLOWING: Duration = Duration::from_millis(1);
/// Device operations that one `poll` reports at most. What comes in together is not handled
/// together: the first are answered, and what follows them is on its way, while the others wait.
/// Else a device has nothing to do while its answers are looked at.
const DISK_EVENTS_MAX: usize = 8;
/// How long a reactor that ends waits for what the kernel still has.
const END_ROUNDS_MAX: u32 = 30;

/// What has happened.
#[derive(Debug)]
pub enum Event {
    /// A device operation has completed.
    Disk {
        /// Where.
        disk: DiskId,
        /// Which, and how it went.
        done: DiskDone,
    },
    /// A connection has come in: `attach` it here, or hand it to another reactor.
    Accepted {
        /// Where it came in.
        listener: ListenerId,
        /// The connection.
        socket: OwnedFd,
    },
    /// `connect` has succeeded.
    Connected {
        /// The stream.
        stream: StreamId,
    },
    /// Bytes have come in.
    Received {
        /// The stream.
        stream: StreamId,
        /// What.
        bytes: Bytes,
    },
    /// The stream is gone; not after `close`, `finish` or `detach`.
    Closed {
        /// The stream.
        stream: StreamId,
        /// Why; nothing when the other side closed it.
        reason: Option<io::Error>,
    },
    /// Everything has been sent; follows `tell_drained`.
    Drained {
        /// The stream.
        stream: StreamId,
    },
    /// The socket that `detach` was asked for.
    Detached {
        /// The stream that it was.
        stream: StreamId,
        /// The socket.
        socket: OwnedFd,
    },
    /// The mailbox has something, or had.
    Woken,
}

/// One thread's ring and everything that it touches. Made and used on that thread.
pub struct Reactor {
    // Before everything that the kernel may write to: dropped first (fields drop in order), and
    // `drop` below has waited for the kernel by then.
    pub(crate) ring: Ring,
    pub(crate) operations: Operations,
    pub(crate) streams: Streams,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) disks: Disks,
    /// Events that came while somebody waited for one of another kind.
    pub(crate) backlog: VecDeque<Event>,
    waker: Arc<Waker>,
    settings: Settings,
    last_event: Instant,
    ending: bool,
}

impl Reactor {
    /// A reactor for the calling thread.
    pub fn new(settings: Settings) -> io::Result<Self> {
        let mut reactor = Self {
            ring: Ring::new()?,
            operations: Operations::default(),
            streams: Streams::default(),
            listeners: Vec::new(),
            disks: Disks::default(),
            backlog: VecDeque::new(),
            waker: Arc::new(Waker::new()?),
            settings,
            last_event: Instant(0),
            ending: false,
        };
        reactor.arm_wake(Box::new(0));
        Ok(reactor)
    }

    /// What ends this reactor's wait, from any thread.
    pub fn waker(&self) -> Arc<Waker> {
        Arc::clone(&self.waker)
    }

    /// Registers the memory of device buffers. `false`: refused, everything works without.
    pub fn register_arena(&mut self, arena: &Arena) -> bool {
        self.ring.register_arena(arena)
    }

    /// Takes over a device.
    pub fn add_disk(&mut self, device: Device) -> io::Result<DiskId> {
        let index = self.disks.len();
        let fixed = self.ring.register_file(index, device.fd.as_raw_fd())?;
        self.disks.push(device, fixed);
        Ok(DiskId(index))
    }

    /// Submits a device operation; its completion comes as `Event::Disk`.
    pub fn submit(&mut self, disk: DiskId, token: DiskToken, op: DiskOp) {
        self.submit_disk(disk.0, token, op);
    }

    /// Submits what is queued, waits until something has happened or `deadline` has come, and
    /// appends what has happened. Without a deadline it waits as long as it takes.
    pub fn poll(&mut self, deadline: Option<Instant>, events: &mut Vec<Event>) -> io::Result<()> {
        let before = events.len();
        self.resume_accepts();
        self.arm_streams();
        events.extend(self.backlog.drain(..));
        if self.ring.ready() {
            self.ring.enter(Some(Duration::ZERO))?;
        } else {
            let wait = self.wait_time(deadline, events.len() > before);
            let soon = wait == Some(Duration::ZERO) || self.spin()?;
            self.ring.enter(if soon { Some(Duration::ZERO) } else { wait })?;
        }
        let disk = |event: &Event| matches!(event, Event::Disk { .. });
        let mut disk_events = 0;
        while disk_events < DISK_EVENTS_MAX
            && let Some(completion) = self.ring.completion()
        {
            let seen = events.len();
            self.complete(&completion, events);
            disk_events += events[seen..].iter().filter(|event| disk(event)).count();
        }
        if events.len() > before {
            self.last_event = now();
        }
        Ok(())
    }

    fn wait_time(&self, deadline: Option<Instant>, has_events: bool) -> Option<Duration> {
        if has_events {
            return Some(Duration::ZERO);
        }
        let earliest = deadline.into_iter().chain(self.net_deadline()).min()?;
        Some(earliest.since(now()))
    }

    /// Looks for completions for a moment while traffic flows. Whether there are some.
    fn spin(&mut self) -> io::Result<bool> {
        if self.settings.spin.is_zero() || now().since(self.last_event) > FLOWING {
            return Ok(false);
        }
        self.ring.enter(Some(Duration::ZERO))?;
        let until = now() + self.settings.spin;
        while now() < until {
            for _ in 0..16 {
                if self.ring.ready() {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
        }
        Ok(false)
    }

    /// Queues an operation.
    ///
    /// # Safety
    /// What the entry points to is kept in the operation, or elsewhere in the reactor until the
    /// operation's completion.
    pub(crate) unsafe fn start(
        &mut self,
        operation: Operation,
        entry: impl Into<squeue::Entry128>,
    ) -> u32 {
        let number = self.operations.insert(operation);
        let entry: squeue::Entry128 = entry.into();
        // SAFETY: the caller's promise; the reactor waits for the kernel before it is dropped.
        unsafe { self.ring.push(&entry.user_data(u64::from(number))) };
        number
    }

    fn complete(&mut self, completion: &cqueue::Entry32, events: &mut Vec<Event>) {
        let number = u32::try_from(completion.user_data()).expect("our own number");
        let result = completion.result();
        if let Operation::Accept { listener } = *self.operations.get_mut(number) {
            if result >= 0 {
                // SAFETY: the kernel has just made this descriptor for us.
                let socket = unsafe { OwnedFd::from_raw_fd(result) };
                events.push(Event::Accepted { listener: ListenerId(listener), socket });
            }
            if !cqueue::more(completion.flags()) {
                self.operations.remove(number);
                if !self.ending {
                    self.accept_ended(listener, result);
                }
            }
            return;
        }
        match self.operations.remove(number) {
            Operation::Disk(operation) => self.disk_completed(operation, result, events),
            Operation::Command { operation, index, fixed_buffer } => {
                self.command_completed(operation, index, fixed_buffer, result, events);
            }
            Operation::Nvme(_) => unreachable!("the kernel has its commands"),
            Operation::Receive { stream } => self.received(stream, result, events),
            Operation::Send { stream } => self.sent(stream, result, events),
            Operation::Connect { stream, .. } => self.connected(stream, result, events),
            Operation::Wake { counter } => {
                self.waker.clear();
                if !self.ending {
                    self.arm_wake(counter);
                    events.push(Event::Woken);
                }
            }
            Operation::Accept { .. } | Operation::Cancel => {}
        }
    }

    fn arm_wake(&mut self, mut counter: Box<u64>) {
        let fd = types::Fd(self.waker.fd().as_raw_fd());
        let pointer: *mut u64 = &raw mut *counter;
        let entry = opcode::Read::new(fd, pointer.cast(), 8).build();
        // SAFETY: the counter is boxed and kept in the operation.
        unsafe { self.start(Operation::Wake { counter }, entry) };
    }
}

impl Drop for Reactor {
    /// Waits until the kernel has nothing of ours, or leaks what it may still write to.
    fn drop(&mut self) {
        self.ending = true;
        let mut events = Vec::new();
        for _ in 0..END_ROUNDS_MAX {
            if self.operations.in_flight() == 0 {
                return;
            }
            let entered = self.ring.enter(Some(Duration::ZERO));
            self.ring.cancel_all();
            if entered.and_then(|()| self.ring.enter(Some(Duration::from_millis(100)))).is_err() {
                break;
            }
            while let Some(completion) = self.ring.completion() {
                self.complete(&completion, &mut events);
            }
        }
        if self.operations.in_flight() > 0 {
            error!(operations = self.operations.in_flight(), "the kernel keeps operations: leaked");
            std::mem::forget(std::mem::take(&mut self.operations));
            std::mem::forget(std::mem::take(&mut self.streams));
        }
    }
}
