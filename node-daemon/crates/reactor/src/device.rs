//! Opening a device: found, locked, measured, before a single byte of it is read.
//!
//! Rule R3: an exclusive `flock` on the very descriptor that the ring does its I/O on. It is free
//! only when nothing of a dead engine is in flight any more, because a ring's operations hold the
//! open file, not the process. The lock counts for one inode, and two device nodes of one device
//! are two inodes; so a block device is opened by the name that the kernel itself gave it, and with
//! `O_EXCL`. A namespace is two inodes to begin with, its generic device and its block device; who
//! has one of them keeps others from both: its user takes the other's lock (or `O_EXCL`) too.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, fallocate, flock, fstat,
    mkdir, open, seek, stat,
};
use rustix::io::Errno;
use thiserror::Error;

use crate::nvme::{Namespace, Nguid, QueueLimits, find};

/// Offsets, lengths and capacities are multiples of this.
pub const SECTOR_BYTES: u64 = 4096;
const SYS: &str = "/sys";

/// What kind of thing a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A file in a file system.
    File,
    /// A block device.
    Block,
    /// An `NVMe` namespace, past the block layer.
    Nvme,
}

/// How a device is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A file, a block device, or the generic device of a namespace (`/dev/ng0n1`).
    Path(PathBuf),
    /// A namespace, by what it is and not where.
    Nguid(Nguid),
}

impl From<PathBuf> for Place {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
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
    /// Where it is.
    pub place: Place,
    /// For a file: its size; made when absent. For any other: nothing, it is measured.
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
    /// Neither a file nor a block device nor a namespace.
    #[error("device {path} is neither a file nor a block device nor an NVMe namespace")]
    Kind {
        /// The device.
        path: PathBuf,
    },
    /// No namespace of this machine has the NGUID, or several have.
    #[error(
        "{} with NGUID {nguid} (namespaces here: {}): put the drive in, or correct the device; it \
         is tried again",
        if *.several { "more than one NVMe namespace" } else { "no NVMe namespace" },
        if .present.is_empty() { "none" } else { .present }
    )]
    NotFound {
        /// What was looked for.
        nguid: Nguid,
        /// Whether more than one has it.
        several: bool,
        /// What there is.
        present: String,
    },
    /// A namespace whose format or state the engine cannot use.
    #[error("device {path} cannot be used: {why}; it is tried again")]
    Unsuitable {
        /// The device.
        path: PathBuf,
        /// Why not.
        why: String,
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
    /// What the drive says, of a namespace.
    pub(crate) nvme: Option<Namespace>,
    /// The other name of a namespace, held so that nobody else uses it meanwhile.
    pub(crate) other_name: Option<Arc<OwnedFd>>,
}

impl Device {
    /// Opens, locks and measures a device. Never blocks for the lock: who wants to wait asks again.
    pub fn open(wanted: &OpenDevice) -> Result<Self, DeviceError> {
        let path = &match &wanted.place {
            Place::Path(path) => path.clone(),
            Place::Nguid(nguid) => find_namespace(*nguid)?,
        };
        let Opened { fd, kind, other_name, nvme } =
            open_locked(path, wanted.create_bytes.is_some())?;
        if let (Place::Nguid(nguid), Some(found)) = (&wanted.place, &nvme)
            && found.nguid != Some(*nguid)
        {
            let why = format!("the drive says that it is {:?}, not {nguid}", found.nguid);
            return Err(DeviceError::Unsuitable { path: path.clone(), why });
        }
        let size = match &nvme {
            Some(namespace) => namespace.capacity_bytes,
            None => measure(&fd, path)?,
        };
        let capacity_bytes = match (kind, wanted.create_bytes) {
            (DeviceKind::File, Some(bytes)) if size == 0 => {
                reserve(&fd, path, bytes)?;
                bytes
            }
            (_, Some(bytes)) if size < bytes => {
                let path = path.clone();
                return Err(DeviceError::Size { path, actual_bytes: size, wanted_bytes: bytes });
            }
            (_, Some(bytes)) => bytes,
            (_, None) => size,
        } / SECTOR_BYTES
            * SECTOR_BYTES;
        Ok(Self {
            fd: Arc::new(fd),
            base_bytes: 0,
            path: path.clone(),
            kind,
            discard: wanted.discard,
            capacity_bytes,
            nvme,
            other_name: other_name.map(Arc::new),
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
            nvme: self.nvme,
            other_name: self.other_name.clone(),
        }
    }

    /// Bytes that can be addressed, a multiple of 4,096.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// File, block device or namespace.
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

/// A device that is locked and not measured yet.
struct Opened {
    fd: OwnedFd,
    kind: DeviceKind,
    other_name: Option<OwnedFd>,
    nvme: Option<Namespace>,
}

fn open_locked(path: &Path, create: bool) -> Result<Opened, DeviceError> {
    let direct = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    if let Ok(found) = stat(path)
        && FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
    {
        return open_namespace(path, found.st_rdev);
    }
    if create {
        make_folder(path)?;
    }
    let flags = if create { direct | OFlags::CREATE } else { direct };
    let fd = open(path, flags, mode).map_err(system(path, "open it with O_DIRECT"))?;
    let stat = fstat(&fd).map_err(system(path, "look at it"))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            lock(&fd, path)?;
            Ok(Opened { fd, kind: DeviceKind::File, other_name: None, nvme: None })
        }
        FileType::BlockDevice => {
            let own = kernel_name(path, "block", stat.st_rdev)?;
            let fd = open_exclusively(&own, direct, path)?;
            lock(&fd, path)?;
            let other_name = lock_generic(&own, path)?;
            Ok(Opened { fd, kind: DeviceKind::Block, other_name, nvme: None })
        }
        _ => Err(DeviceError::Kind { path: path.to_path_buf() }),
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

fn lock(fd: &OwnedFd, path: &Path) -> Result<(), DeviceError> {
    match flock(fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(DeviceError::Locked { path: path.to_path_buf() }),
        Err(errno) => Err(system(path, "lock it")(errno)),
    }
}

/// `path` is what the device is called in errors.
fn open_exclusively(own: &Path, flags: OFlags, path: &Path) -> Result<OwnedFd, DeviceError> {
    open(own, flags | OFlags::EXCL, Mode::empty()).map_err(|errno| match errno {
        Errno::BUSY => DeviceError::Locked { path: path.to_path_buf() },
        errno => system(path, "open it exclusively")(errno),
    })
}

/// Where the one namespace with this NGUID is.
fn find_namespace(nguid: Nguid) -> Result<PathBuf, DeviceError> {
    let ask = |name: &str| {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let fd = open(Path::new("/dev").join(name), flags, Mode::empty()).ok()?;
        find::identify(&fd, &QueueLimits::SMALL).ok()?.ok()?.nguid
    };
    let all = find::namespaces(Path::new(SYS), ask).map_err(|source| DeviceError::System {
        path: Path::new(SYS).join("class/nvme-generic"),
        action: "list namespaces",
        source,
    })?;
    let mut fitting = all.iter().filter(|(_, found)| *found == nguid);
    match (fitting.next(), fitting.next()) {
        (Some((name, _)), None) => Ok(Path::new("/dev").join(name)),
        (first, _) => {
            let texts: Vec<String> = all.iter().map(|(name, id)| format!("{name} {id}")).collect();
            let (several, present) = (first.is_some(), texts.join(", "));
            Err(DeviceError::NotFound { nguid, several, present })
        }
    }
}

/// Opens and locks the generic device of a namespace, and its block device exclusively.
fn open_namespace(path: &Path, rdev: u64) -> Result<Opened, DeviceError> {
    let sys = Path::new(SYS);
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    if !find::is_generic(sys, major, minor) {
        return Err(DeviceError::Kind { path: path.to_path_buf() });
    }
    let own = kernel_name(path, "char", rdev)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let fd = open(&own, flags, Mode::empty()).map_err(system(path, "open it"))?;
    lock(&fd, path)?;
    let unsuitable = |why| DeviceError::Unsuitable { path: path.to_path_buf(), why };
    let name = own.file_name().unwrap_or_default().to_string_lossy();
    let block = find::block_name(&name)
        .filter(|block| sys.join("block").join(block).exists())
        .ok_or_else(|| unsuitable("the kernel makes no block device of it".to_owned()))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let other_name = open_exclusively(&Path::new("/dev").join(&block), flags, path)?;
    lock(&other_name, path)?;
    let queue = find::queue_limits(sys, &block).map_err(unsuitable)?;
    let nvme = find::identify(&fd, &queue)
        .map_err(|source| {
            let (path, action) = (path.to_path_buf(), "ask the drive what it is");
            DeviceError::System { path, action, source }
        })?
        .map_err(unsuitable)?;
    let other_name = Some(other_name);
    Ok(Opened { fd, kind: DeviceKind::Nvme, other_name, nvme: Some(nvme) })
}

/// Locks the generic device of a namespace whose block device is ours: commands of a dead engine
/// that used it past the block layer hold only that.
fn lock_generic(own: &Path, path: &Path) -> Result<Option<OwnedFd>, DeviceError> {
    let name = own.file_name().unwrap_or_default().to_string_lossy();
    let generic = find::generic_name(&name).map(|generic| Path::new("/dev").join(generic));
    let Some(generic) = generic.filter(|generic| generic.exists()) else {
        return Ok(None);
    };
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let fd = open(&generic, flags, Mode::empty()).map_err(system(path, "open its other name"))?;
    lock(&fd, path)?;
    Ok(Some(fd))
}

/// The node that the kernel made for a device: the one inode whose lock counts.
fn kernel_name(path: &Path, class: &str, rdev: u64) -> Result<PathBuf, DeviceError> {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let uevent = format!("{SYS}/dev/{class}/{major}:{minor}/uevent");
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
