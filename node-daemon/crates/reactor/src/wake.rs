//! How another thread reaches a reactor: a bounded queue, and an eventfd that ends its wait.
//!
//! A post never blocks and never grows memory: a full queue is the sender's to deal with. The
//! eventfd is written only when the reactor has not been woken since it last looked, so a burst
//! costs one system call. I/O never takes this way; a connection that belongs to another thread is
//! moved there once.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

/// Ends a reactor's wait. Cheap to clone behind its `Arc`.
#[derive(Debug)]
pub struct Waker {
    fd: OwnedFd,
    woken: AtomicBool,
}

impl Waker {
    pub(crate) fn new() -> std::io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self { fd, woken: AtomicBool::new(false) })
    }

    /// Makes the reactor's `poll` return with `Event::Woken`.
    pub fn wake(&self) {
        if self.woken.swap(true, Ordering::AcqRel) {
            return; // it has not looked since the last one
        }
        let one = 1_u64.to_ne_bytes();
        // A counter that is one below its limit would block: with the flag above it never is.
        if let Err(error) = rustix::io::write(&self.fd, &one) {
            panic!("an eventfd takes one wake at a time: {error}");
        }
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// The reactor looks from now on: whoever posts after this wakes it again.
    pub(crate) fn clear(&self) {
        // A swap, not a store: it acquires what was posted before the wake that it takes back.
        self.woken.swap(false, Ordering::AcqRel);
    }
}

/// Why a post was not taken. The value comes back.
#[derive(Debug, Error)]
pub enum PostError<T> {
    /// The queue is at its limit; later it may not be.
    #[error("the reactor's queue is full")]
    Full(T),
    /// The reactor has ended.
    #[error("the reactor has ended")]
    Ended(T),
}

/// The sending end of a mailbox.
#[derive(Debug)]
pub struct Postbox<T> {
    queue: SyncSender<T>,
    waker: Arc<Waker>,
}

impl<T> Clone for Postbox<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), waker: Arc::clone(&self.waker) }
    }
}

impl<T> Postbox<T> {
    /// Hands a value to the reactor's thread. Never blocks.
    pub fn post(&self, value: T) -> Result<(), PostError<T>> {
        self.queue.try_send(value).map_err(|error| match error {
            TrySendError::Full(value) => PostError::Full(value),
            TrySendError::Disconnected(value) => PostError::Ended(value),
        })?;
        self.waker.wake();
        Ok(())
    }
}

/// The receiving end of a mailbox, on the reactor's thread.
#[derive(Debug)]
pub struct Inbox<T> {
    queue: Receiver<T>,
}

impl<T> Inbox<T> {
    /// The next value, if one is there. Drain it at each `Event::Woken`.
    pub fn take(&self) -> Option<T> {
        self.queue.try_recv().ok()
    }
}

/// A mailbox of at most `posts_max` values for the reactor that `waker` wakes.
pub fn mailbox<T>(waker: Arc<Waker>, posts_max: usize) -> (Postbox<T>, Inbox<T>) {
    assert!(posts_max > 0, "a mailbox takes at least one value");
    let (sender, receiver) = sync_channel(posts_max);
    (Postbox { queue: sender, waker }, Inbox { queue: receiver })
}
