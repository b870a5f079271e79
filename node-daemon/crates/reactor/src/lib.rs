//! One thread, one `io_uring`: devices, sockets and wake-ups of a core behind a single call.
//!
//! A [`Reactor`] owns everything that the kernel may touch while an operation is in flight (device
//! buffers, receive buffers, vectors of a send, socket addresses), so no caller can free memory
//! under the kernel. It has no callbacks: [`Reactor::poll`] submits, waits and appends
//! [`Event`]s, and whoever owns the reactor steps its state machines with them. That keeps the
//! protocol free of I/O and the I/O free of protocol.
//!
//! The ring is used by its thread alone (`SINGLE_ISSUER`, `DEFER_TASKRUN`); other threads reach it
//! through a bounded [`mailbox`] and an eventfd. What a byte means, whose connection it is and what
//! to do about a failed device are left to the engine.

mod clock;
mod device;
mod file_disk;
mod net;
mod nvme;
mod operation;
mod reactor;
mod ring;
mod wake;

pub use clock::now;
pub use device::{Device, DeviceError, DeviceKind, Discard, OpenDevice, Place};
pub use file_disk::FileDisk;
pub use net::{ListenerId, StreamId, StreamLimits};
pub use nvme::Nguid;
pub use reactor::{DiskId, Event, Reactor, Settings};
pub use wake::{Inbox, PostError, Postbox, Waker, mailbox};
