//! The ring itself: how it is set up, how it is entered.
//!
//! What a kernel does not take is left out one by one, so that an older one still runs the engine,
//! only slower: first `DEFER_TASKRUN`, then `SINGLE_ISSUER`.

use std::io;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, squeue};
use tercet_store::arena::Arena;
use tracing::{info, warn};

/// Entries that can be queued before the kernel is entered.
const SUBMISSIONS: u32 = 512;
/// Completions that the kernel keeps without the slow overflow list.
const COMPLETIONS: u32 = 4096;
/// Most registered files: one for each device of a reactor.
pub(crate) const FILES_MAX: u32 = 64;

/// Every ring has room for an `NVMe` command in its entries and for its answer in its completions:
/// which devices a node has is known only when rings run already.
type Uring = IoUring<squeue::Entry128, cqueue::Entry32>;

/// A ring and what the kernel granted it.
pub(crate) struct Ring {
    uring: Uring,
    fixed_files: bool,
    /// Registered as buffer 0; after the ring, so that it is unmapped after the ring has gone.
    arena: Option<Arena>,
    deferred: bool,
}

impl Ring {
    /// Sets up a ring. Must be called on the thread that uses it.
    pub(crate) fn new() -> io::Result<Self> {
        let (uring, deferred) = build()?;
        let fixed_files = match uring.submitter().register_files_sparse(FILES_MAX) {
            Ok(()) => true,
            Err(error) => {
                warn!(%error, "fixed files are not available: plain descriptors are used");
                false
            }
        };
        Ok(Self { uring, fixed_files, arena: None, deferred })
    }

    /// Registers the arena's region as buffer 0. Refused (locked memory limit): plain reads and
    /// writes do the same work, the kernel pins pages each time.
    pub(crate) fn register_arena(&mut self, arena: &Arena) -> bool {
        assert!(self.arena.is_none(), "one arena is registered, once");
        let (start, bytes) = arena.region();
        let vector = libc::iovec { iov_base: start.cast_mut().cast(), iov_len: bytes };
        // SAFETY: the region lives as long as the arena, of which the ring keeps a clone.
        match unsafe { self.uring.submitter().register_buffers(&[vector]) } {
            Ok(()) => {
                self.arena = Some(arena.clone());
                true
            }
            Err(error) => {
                info!(%error, bytes, "the arena is not registered with the ring");
                false
            }
        }
    }

    /// Whether the ring knows this memory.
    pub(crate) fn knows(&self, bytes: &[u8]) -> bool {
        self.arena.as_ref().is_some_and(|arena| {
            let (start, length) = arena.region();
            let region = start.addr()..start.addr() + length;
            !bytes.is_empty() && region.contains(&bytes.as_ptr().addr())
        })
    }

    pub(crate) fn register_file(&mut self, index: u32, fd: i32) -> io::Result<bool> {
        if !self.fixed_files || index >= FILES_MAX {
            return Ok(false);
        }
        let updated = self.uring.submitter().register_files_update(index, &[fd])?;
        Ok(updated == 1)
    }

    /// Queues an entry; enters the kernel only when the queue is full.
    ///
    /// # Safety
    /// Everything that the entry points to stays valid and untouched until its completion.
    pub(crate) unsafe fn push(&mut self, entry: &squeue::Entry128) {
        loop {
            // SAFETY: the caller's promise.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return;
            }
            if let Err(error) = self.uring.submit() {
                assert!(again(&error), "the kernel takes submissions: {error}");
            }
        }
    }

    /// Hands the kernel what is queued, without waiting, once it is this much.
    pub(crate) fn submit_when(&mut self, queued: usize) {
        if self.uring.submission().len() < queued {
            return;
        }
        if let Err(error) = self.uring.submit() {
            assert!(again(&error), "the kernel takes submissions: {error}");
        }
    }

    /// Submits what is queued and waits for a completion, at most `timeout` (forever without).
    pub(crate) fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let result = match timeout {
            Some(Duration::ZERO) if self.nothing_to_enter_for() => Ok(0),
            Some(Duration::ZERO) => self.uring.submit(),
            Some(timeout) => {
                let time = Timespec::from(timeout);
                self.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
            }
            None => self.uring.submit_and_wait(1),
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) if again(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether something has completed, seen without a system call.
    pub(crate) fn ready(&mut self) -> bool {
        !self.uring.completion().is_empty() || (self.deferred && self.uring.submission().taskrun())
    }

    fn nothing_to_enter_for(&mut self) -> bool {
        let submission = self.uring.submission();
        self.deferred && submission.is_empty() && !submission.taskrun() && !submission.cq_overflow()
    }

    pub(crate) fn completion(&mut self) -> Option<cqueue::Entry32> {
        self.uring.completion().next()
    }

    /// Cancels everything that can be cancelled.
    pub(crate) fn cancel_all(&mut self) {
        let any = io_uring::types::CancelBuilder::any();
        let timeout = Timespec::from(Duration::from_secs(1));
        if let Err(error) = self.uring.submitter().register_sync_cancel(Some(timeout), any) {
            info!(%error, "not everything in flight could be cancelled");
        }
    }
}

/// What ends a wait without being an error: a signal, the time-out, or a full completion queue.
fn again(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN))
}

fn build() -> io::Result<(Uring, bool)> {
    let mut last = None;
    for (single, deferred) in [(true, true), (true, false), (false, false)] {
        let mut builder = Uring::builder();
        builder.setup_cqsize(COMPLETIONS).setup_clamp().setup_submit_all().dontfork();
        if single {
            builder.setup_single_issuer();
        }
        if deferred {
            builder.setup_defer_taskrun().setup_taskrun_flag();
        }
        match builder.build(SUBMISSIONS) {
            Ok(uring) => return Ok((uring, deferred)),
            Err(error) => last = Some(error),
        }
    }
    Err(last.expect("three attempts leave an error"))
}
