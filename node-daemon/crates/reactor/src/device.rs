//! Opening a device: found, locked, measured, before a single byte of it is read.
//!
//! Rule R3: an exclusive `flock` on the very descriptor that the ring does its I/O on. It is free
//! only when nothing of a dead engine is in flight any more, because a ring's operations hold the
//! open file, not the process. The lock counts for one inode, and two device nodes of one device
//! are two inodes; so a block device is opened by the name that the kernel itself gave it, and with
//! `O_EXCL`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, fallocate, flock, fstat,
    mkdir, open, seek,
};
use rustix::io::Errno;
use thiserror::Error;

/// Offsets, lengths and capacities are multiples of this.
pub const SECTOR_BYTES: u64 = 4096;

/// What kind of thing a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A file in a file system.
    File,
    /// A block device.
    Block,
}

/// What `Deallocate` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// Nothing: a prepared file stays prepared (a hole would make later writes slower).
    Keep,
    /// Punches a hole; a block device discards.
    Punch,
}

/// Which device to open, and what may be done to it.
#[derive(Clone, Debug)]
pub struct OpenDevice {
    /// Path of the file or block device.
    pub path: PathBuf,
    /// For a file: its size; made when absent. For a block device: nothing, it is measured.
    pub create_bytes: Option<u64>,
    /// What `Deallocate` does.
    pub discard: Discard,
}

/// Why a device cannot be opened. Nothing was changed.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// Somebody else has it, or operations of a dead engine are still in flight (rule R3).
    #[error(
        "device {path} is locked by another process, or its last writes are still in flight: it \
         is tried until it is free; `fuser -v {path}` shows who has it open"
    )]
    Locked {
        /// The device.
        path: PathBuf,
    },
    /// It is smaller than what was asked for, and shrinking or growing it is not ours to do.
    #[error(
        "device {path} has {actual_bytes} bytes, {wanted_bytes} are configured: enlarge it, or put \
         the right one there; it is tried again"
    )]
    Size {
        /// The device.
        path: PathBuf,
        /// Its size.
        actual_bytes: u64,
        /// What the configuration says.
        wanted_bytes: u64,
    },
    /// Neither a file nor a block device.
    #[error("device {path} is neither a file nor a block device")]
    Kind {
        /// The device.
        path: PathBuf,
    },
    /// The operating system says no.
    #[error("device {path}: cannot {action}: {source}")]
    System {
        /// The device.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// An open and locked device. The lock lasts until the last operation on it has ended.
#[derive(Debug)]
pub struct Device {
    pub(crate) fd: Arc<OwnedFd>,
    /// Where this region begins.
    pub(crate) base_bytes: u64,
    pub(crate) path: PathBuf,
    pub(crate) kind: DeviceKind,
    pub(crate) discard: Discard,
    pub(crate) capacity_bytes: u64,
}

impl Device {
    /// Opens, locks and measures a device. Never blocks for the lock: who wants to wait asks again.
    pub fn open(wanted: &OpenDevice) -> Result<Self, DeviceError> {
        let path = wanted.path.as_path();
        let (fd, kind) = open_locked(path, wanted.create_bytes.is_some())?;
        let size = measure(&fd, path)?;
        let capacity_bytes = match (kind, wanted.create_bytes) {
            (DeviceKind::File, Some(bytes)) if size == 0 => {
                reserve(&fd, path, bytes)?;
                bytes
            }
            (_, Some(bytes)) if size < bytes => {
                let path = path.to_path_buf();
                return Err(DeviceError::Size { path, actual_bytes: size, wanted_bytes: bytes });
            }
            (_, Some(bytes)) => bytes,
            (_, None) => size,
        } / SECTOR_BYTES
            * SECTOR_BYTES;
        Ok(Self {
            fd: Arc::new(fd),
            base_bytes: 0,
            path: path.to_path_buf(),
            kind,
            discard: wanted.discard,
            capacity_bytes,
        })
    }

    /// Region `index` of `count` equal ones: the same open file and the same lock, which lasts
    /// until all of them are gone. Each belongs to one shard.
    #[must_use]
    pub fn region(&self, index: u16, count: u16) -> Self {
        assert!(index < count, "one of the regions");
        let bytes = self.capacity_bytes / u64::from(count) / SECTOR_BYTES * SECTOR_BYTES;
        Self {
            fd: Arc::clone(&self.fd),
            base_bytes: self.base_bytes + bytes * u64::from(index),
            path: self.path.clone(),
            kind: self.kind,
            discard: self.discard,
            capacity_bytes: bytes,
        }
    }

    /// Bytes that can be addressed, a multiple of 4,096.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// File or block device.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn system(path: &Path, action: &'static str) -> impl FnOnce(Errno) -> DeviceError + use<> {
    let path = path.to_path_buf();
    move |errno| DeviceError::System { path, action, source: errno.into() }
}

fn open_locked(path: &Path, create: bool) -> Result<(OwnedFd, DeviceKind), DeviceError> {
    let direct = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let flags = if create { direct | OFlags::CREATE } else { direct };
    let mode = Mode::RUSR | Mode::WUSR;
    if create {
        make_folder(path)?;
    }
    let fd = open(path, flags, mode).map_err(system(path, "open it with O_DIRECT"))?;
    let stat = fstat(&fd).map_err(system(path, "look at it"))?;
    let (fd, kind) = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => (fd, DeviceKind::File),
        FileType::BlockDevice => {
            let own = kernel_name(path, stat.st_rdev)?;
            let again = open(&own, direct | OFlags::EXCL, mode).map_err(|errno| match errno {
                Errno::BUSY => DeviceError::Locked { path: path.to_path_buf() },
                errno => system(path, "open it exclusively")(errno),
            })?;
            (again, DeviceKind::Block)
        }
        _ => {
            return Err(DeviceError::Kind { path: path.to_path_buf() });
        }
    };
    match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok((fd, kind)),
        Err(Errno::WOULDBLOCK) => Err(DeviceError::Locked { path: path.to_path_buf() }),
        Err(errno) => Err(system(path, "lock it")(errno)),
    }
}

/// Makes the folder of a file that may be made, as on a fresh node. Only the last one: where more is
/// missing, something is not mounted, and the data would land on the disk below.
fn make_folder(path: &Path) -> Result<(), DeviceError> {
    let Some(folder) = path.parent() else { return Ok(()) };
    match mkdir(folder, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(system(path, "make its folder")(errno)),
    }
}

/// The node that the kernel made for a block device: the one inode whose lock counts.
fn kernel_name(path: &Path, rdev: u64) -> Result<PathBuf, DeviceError> {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let uevent = format!("/sys/dev/block/{major}:{minor}/uevent");
    let text = std::fs::read_to_string(&uevent).map_err(|source| DeviceError::System {
        path: path.to_path_buf(),
        action: "find the kernel's name of it",
        source,
    })?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    name.map(|name| Path::new("/dev").join(name)).ok_or_else(|| DeviceError::System {
        path: path.to_path_buf(),
        action: "find the kernel's name of it",
        source: io::Error::from(io::ErrorKind::NotFound),
    })
}

fn measure(fd: &OwnedFd, path: &Path) -> Result<u64, DeviceError> {
    seek(fd, SeekFrom::End(0)).map_err(system(path, "measure it"))
}

/// Takes the file's space from its file system now, so that no later write can lack it.
fn reserve(fd: &OwnedFd, path: &Path, bytes: u64) -> Result<(), DeviceError> {
    match fallocate(fd, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP) => {
            rustix::fs::ftruncate(fd, bytes).map_err(system(path, "size it"))?;
        }
        Err(errno) => return Err(system(path, "reserve its space")(errno)),
    }
    rustix::fs::fsync(fd).map_err(system(path, "make its size durable"))
}
