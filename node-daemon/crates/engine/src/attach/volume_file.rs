//! A volume as the one file of a FUSE file system: direct I/O, several requests in flight, each
//! answered from the host's thread when the volume has answered it.
//!
//! FSYNC is a Flush command, punching a hole Dataset Management, zeroing a range Write Zeroes. What
//! is not in whole blocks is refused: the loop device above has blocks of 4,096 bytes.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, WriteFlags,
};
use tercet_nvmf::BLOCK_BYTES;
use tercet_nvmf::status::Status;
use tercet_proto::BlockRange;

use crate::host::{Host, Operation, OperationError};

/// The file's name in its file system.
pub const FILE_NAME: &str = "volume";
const ROOT: u64 = 1;
const FILE: u64 = 2;
/// Requests that the kernel keeps in flight.
const REQUESTS_MAX: u16 = 128;
/// Attributes are asked for each time: the size may have changed.
const ATTRIBUTES_LIFE: Duration = Duration::ZERO;
const FALLOC_FL_KEEP_SIZE: i32 = 1;
const FALLOC_FL_PUNCH_HOLE: i32 = 2;
const FALLOC_FL_ZERO_RANGE: i32 = 16;
/// Blocks of one Write Zeroes and of one Deallocate.
const ZERO_BLOCKS_MAX: u64 = 1 << 16;
const DEALLOCATE_BLOCKS_MAX: u64 = 1 << 31;

/// See the module.
pub struct VolumeFile {
    host: Arc<Host>,
    size_bytes: Arc<AtomicU64>,
    transfer_bytes_max: u32,
    read_only: bool,
}

impl VolumeFile {
    /// The file of a volume; `size_bytes` follows the volume's growth.
    pub fn new(
        host: Arc<Host>,
        size_bytes: Arc<AtomicU64>,
        transfer_bytes_max: u32,
        read_only: bool,
    ) -> Self {
        Self { host, size_bytes, transfer_bytes_max, read_only }
    }

    fn attributes(&self, inode: u64) -> FileAttr {
        let is_root = inode == ROOT;
        let size = if is_root { 0 } else { self.size_bytes.load(Ordering::Acquire) };
        FileAttr {
            ino: INodeNo(inode),
            size,
            blocks: size / 512,
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: if is_root { FileType::Directory } else { FileType::RegularFile },
            perm: if is_root { 0o700 } else { 0o600 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_BYTES as u32,
            flags: 0,
        }
    }

    /// Whole blocks within the file.
    fn range(&self, offset: u64, bytes: u64) -> Result<BlockRange, Errno> {
        let block = BLOCK_BYTES as u64;
        let end = offset.checked_add(bytes).ok_or(Errno::EINVAL)?;
        if !offset.is_multiple_of(block) || !bytes.is_multiple_of(block) || bytes == 0 {
            return Err(Errno::EINVAL);
        }
        if end > self.size_bytes.load(Ordering::Acquire) {
            return Err(Errno::EINVAL);
        }
        let count = u32::try_from(bytes / block).map_err(|_| Errno::EINVAL)?;
        Ok(BlockRange { start: offset / block, count })
    }
}

fn errno(error: OperationError) -> Errno {
    match error {
        OperationError::Status(status) if status.same(Status::CAPACITY) => Errno::ENOSPC,
        OperationError::Status(status) if status.same(Status::WRITE_PROTECTED) => Errno::EROFS,
        _ => Errno::EIO,
    }
}

/// Zeroes or deallocates a range in parts that are one command each, one after the other.
fn zero(host: &Arc<Host>, start: u64, count: u64, deallocate: bool, reply: ReplyEmpty) {
    let most = if deallocate { DEALLOCATE_BLOCKS_MAX } else { ZERO_BLOCKS_MAX };
    let part = count.min(most);
    let range = BlockRange { start, count: part as u32 };
    let operation = if deallocate {
        Operation::Deallocate(range)
    } else {
        Operation::WriteZeroes(range, false)
    };
    let next = Arc::clone(host);
    let done = move |result: Result<Vec<Bytes>, OperationError>| match result {
        Err(error) => reply.error(errno(error)),
        Ok(_) if part == count => reply.ok(),
        Ok(_) => zero(&next, start + part, count - part, deallocate, reply),
    };
    host.submit(operation, Box::new(done));
}

impl Filesystem for VolumeFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let too = |limit: u32| io::Error::other(format!("the kernel's limit is {limit}"));
        config.set_max_write(self.transfer_bytes_max).map_err(too)?;
        // Without it the kernel waits for each request of a direct I/O.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let background = |limit: u16| too(u32::from(limit));
        config.set_max_background(REQUESTS_MAX).map_err(background)?;
        config.set_congestion_threshold(REQUESTS_MAX).map_err(background)?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent.0 == ROOT && name == FILE_NAME {
            reply.entry(&ATTRIBUTES_LIFE, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match ino.0 {
            ROOT | FILE => reply.attr(&ATTRIBUTES_LIFE, &self.attributes(ino.0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if ino.0 == FILE {
            let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
            reply.opened(FileHandle(0), flags);
        } else {
            reply.error(Errno::EISDIR);
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let range = match self.range(offset, u64::from(size)) {
            Ok(range) => range,
            Err(error) => return reply.error(error),
        };
        let done = move |result: Result<Vec<Bytes>, OperationError>| match result.as_deref() {
            Ok([piece]) => reply.data(piece),
            Ok(pieces) => reply.data(&pieces.concat()),
            Err(&error) => reply.error(errno(error)),
        };
        self.host.submit(Operation::Read(range), Box::new(done));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if self.read_only {
            return reply.error(Errno::EROFS);
        }
        let range = match self.range(offset, data.len() as u64) {
            Ok(range) => range,
            Err(error) => return reply.error(error),
        };
        let size = data.len() as u32;
        let done = move |result: Result<Vec<Bytes>, OperationError>| match result {
            Ok(_) => reply.written(size),
            Err(error) => reply.error(errno(error)),
        };
        // The kernel's buffer is used again when this returns: the one copy on the way out.
        let data = Bytes::copy_from_slice(data);
        self.host.submit(Operation::Write(range, data), Box::new(done));
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let done = move |result: Result<Vec<Bytes>, OperationError>| match result {
            Ok(_) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        };
        self.host.submit(Operation::Flush, Box::new(done));
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let deallocate = match mode & !FALLOC_FL_KEEP_SIZE {
            FALLOC_FL_PUNCH_HOLE => true,
            FALLOC_FL_ZERO_RANGE => false,
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        if self.read_only {
            return reply.error(Errno::EROFS);
        }
        let block = BLOCK_BYTES as u64;
        let end = offset.checked_add(length);
        let fits = end.is_some_and(|end| end <= self.size_bytes.load(Ordering::Acquire));
        let is_whole = offset.is_multiple_of(block) && length.is_multiple_of(block);
        if !fits || !is_whole || length == 0 {
            return reply.error(Errno::EINVAL);
        }
        zero(&self.host, offset / block, length / block, deallocate, reply);
    }

    // A close flushes nothing: every write that was answered is durable.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }
}
