//! The seam to a device: a trait of five methods that passthrough, block devices, files and the
//! simulated disk implement.
//!
//! Operations complete in any order. A completed write is durable only when it had `fua` or a
//! `Flush` that was submitted after its completion has completed. Offsets and lengths are multiples
//! of 4,096 bytes. What is kept where is left to the rest of this crate.

use std::ops::Deref;

use bytes::Bytes;
use tercet_proto::BLOCK_BYTES;
use thiserror::Error;

use crate::arena::Buf;

/// Names one operation until its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskToken(pub u64);

/// What a write takes to the device: whole blocks, at a page's start in memory.
#[derive(Debug)]
pub enum Data {
    /// A buffer of the arena; it comes back with the completion.
    Own(Buf),
    /// Bytes that others may read meanwhile, from where they are; nobody can change them.
    Shared(Bytes),
}

impl Data {
    /// The bytes without a copy, if they lie so that a device takes them.
    pub fn shared(bytes: &Bytes) -> Option<Self> {
        let fits = bytes.as_ptr().addr().is_multiple_of(BLOCK_BYTES)
            && bytes.len().is_multiple_of(BLOCK_BYTES)
            && !bytes.is_empty();
        fits.then(|| Self::Shared(bytes.clone()))
    }

    /// The buffer, if it is one.
    pub fn into_buf(self) -> Option<Buf> {
        match self {
            Self::Own(buf) => Some(buf),
            Self::Shared(_) => None,
        }
    }
}

impl From<Buf> for Data {
    fn from(buf: Buf) -> Self {
        Self::Own(buf)
    }
}

impl Deref for Data {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(buf) => buf,
            Self::Shared(bytes) => bytes,
        }
    }
}

/// An operation on a device.
#[derive(Debug)]
pub enum DiskOp {
    /// Fill the buffer from here.
    Read {
        /// Bytes from the start of the device.
        offset: u64,
        /// What to fill; its whole length.
        into: Buf,
    },
    /// Write the buffer here.
    Write {
        /// Bytes from the start of the device.
        offset: u64,
        /// What to write; its whole length.
        data: Data,
        /// Durable on completion.
        fua: bool,
    },
    /// Make every completed write durable.
    Flush,
    /// Give the range back; it reads as anything afterwards.
    Deallocate {
        /// Bytes from the start of the device.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// As a write of zeroes without `fua`, by the device itself where it can; a file is prepared, so
    /// that later writes there are as quick as they can be.
    WriteZeroes {
        /// Bytes from the start of the device.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// A completion. A buffer comes back with it, also after an error.
#[derive(Debug)]
pub struct DiskDone {
    /// The operation.
    pub token: DiskToken,
    /// The buffer of a read, or of a write that had one.
    pub buf: Option<Buf>,
    /// How it went.
    pub result: Result<(), DiskError>,
}

/// How an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DiskError {
    /// The device says no to this operation (`EIO` and media errors of `NVMe`).
    #[error("input/output error (errno {0})")]
    Io(i32),
    /// The device is gone.
    #[error("the device is gone")]
    Gone,
}

/// A device that takes operations and completes them later.
pub trait Disk {
    /// Bytes that can be addressed.
    fn capacity_bytes(&self) -> u64;

    /// Takes an operation. Never blocks; queues without bound only as far as the caller does.
    fn submit(&mut self, token: DiskToken, op: DiskOp);

    /// Appends what has completed since the last call.
    fn poll(&mut self, done: &mut Vec<DiskDone>);

    /// Blocks until at least one operation has completed, then as `poll`. Start-up only (recovery
    /// is written as straight code); the simulated disk returns at once.
    fn wait(&mut self, done: &mut Vec<DiskDone>);
}
