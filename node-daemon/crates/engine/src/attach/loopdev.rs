//! Loop devices over the FUSE file: found, configured, resized, cleared (loop(4)).
//!
//! Direct I/O, so that the page cache is the upper file system's alone and a flush reaches the
//! FUSE file as FSYNC; blocks of 4,096 bytes, as the namespace has them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags, makedev, mknodat};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, NoArg, Opcode, Setter, ioctl};

const LOOP_CLR_FD: Opcode = 0x4c01;
const LOOP_SET_CAPACITY: Opcode = 0x4c07;
const LOOP_CONFIGURE: Opcode = 0x4c0a;
const LOOP_CTL_GET_FREE: Opcode = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LOOP_MAJOR: u32 = 7;
/// Others take free devices too: tries to get one.
const TRIES_MAX: usize = 16;
/// A device is cleared when its last user has gone, at most this long after.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(5);

/// `struct loop_config` of linux/loop.h: descriptor 0, block size 4, `struct loop_info64` from 8
/// (its flags at 52), reserved to 304.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_bytes: u32,
    info_head: [u32; 13],
    flags: u32,
    info_tail: [u64; 22],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304);

/// `LOOP_CTL_GET_FREE`: no argument, the number is the call's value.
struct GetFree;

// SAFETY: LOOP_CTL_GET_FREE takes no argument and writes no memory; its value is the result.
unsafe impl Ioctl for GetFree {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        out: IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// A loop device that is in use.
#[derive(Debug)]
pub struct LoopDevice {
    file: File,
    path: PathBuf,
}

impl LoopDevice {
    /// Puts a free loop device over `backing`.
    pub fn over(backing: &Path, read_only: bool) -> io::Result<Self> {
        let direct = OFlags::DIRECT.bits().cast_signed();
        let backing =
            OpenOptions::new().read(true).write(!read_only).custom_flags(direct).open(backing)?;
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        for _ in 0..TRIES_MAX {
            // SAFETY: `control` is /dev/loop-control, which knows this request (see GetFree).
            let number = unsafe { ioctl(&control, GetFree) }?.unsigned_abs();
            let path = device_node(number)?;
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            let read_only = if read_only { LO_FLAGS_READ_ONLY } else { 0 };
            let config = LoopConfig {
                fd: backing.as_raw_fd().unsigned_abs(),
                block_bytes: 4096,
                info_head: [0; 13],
                flags: LO_FLAGS_DIRECT_IO | read_only,
                info_tail: [0; 22],
                reserved: [0; 8],
            };
            // SAFETY: LOOP_CONFIGURE reads a struct loop_config, which LoopConfig is.
            let set = unsafe { ioctl(&file, Setter::<LOOP_CONFIGURE, LoopConfig>::new(config)) };
            match set {
                Ok(()) => return Ok(Self { file, path }),
                Err(Errno::BUSY) => {} // somebody was quicker
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::other("no free loop device: others take each one first"))
    }

    /// /dev/loopN.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A second handle of the same device.
    pub fn handle(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, path: self.path.clone() })
    }

    /// The backing file has another size.
    pub fn resize(&self) -> io::Result<()> {
        // SAFETY: LOOP_SET_CAPACITY takes no argument.
        Ok(unsafe { ioctl(&self.file, NoArg::<LOOP_SET_CAPACITY>::new()) }?)
    }

    /// Whether somebody has it mounted or open exclusively.
    pub fn is_in_use(&self) -> bool {
        let exclusive = OFlags::EXCL.bits().cast_signed();
        let open = OpenOptions::new().read(true).custom_flags(exclusive).open(&self.path);
        open.is_err_and(|error| error.raw_os_error() == Some(Errno::BUSY.raw_os_error()))
    }

    /// Takes it off its backing file and waits until it is off.
    pub fn clear(self) -> io::Result<()> {
        clear(&self.file)?;
        let Self { file, path } = self;
        drop(file);
        let deadline = Instant::now() + CLEAR_TIMEOUT;
        while backing_of(&path).is_some() {
            if Instant::now() > deadline {
                return Err(io::Error::from(Errno::BUSY));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn clear(file: &File) -> io::Result<()> {
    // SAFETY: LOOP_CLR_FD takes no argument.
    match unsafe { ioctl(file, NoArg::<LOOP_CLR_FD>::new()) } {
        Ok(()) | Err(Errno::NXIO) => Ok(()), // NXIO: it is off already
        Err(error) => Err(error.into()),
    }
}

/// /dev/loopN, made where it is missing (in containers).
fn device_node(number: u32) -> io::Result<PathBuf> {
    let path = PathBuf::from(format!("/dev/loop{number}"));
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.file_type().is_block_device() => Ok(path),
        Ok(_) => Err(io::Error::other(format!("{} is no block device", path.display()))),
        Err(_) => {
            let mode = Mode::RUSR | Mode::WUSR;
            let device = makedev(LOOP_MAJOR, number);
            let made = mknodat(rustix::fs::CWD, &path, FileType::BlockDevice, mode, device);
            match made {
                Ok(()) | Err(Errno::EXIST) => Ok(path),
                Err(error) => Err(error.into()),
            }
        }
    }
}

/// What a loop device lies over.
fn backing_of(device: &Path) -> Option<PathBuf> {
    let name = device.file_name()?;
    let file = Path::new("/sys/block").join(name).join("loop/backing_file");
    std::fs::read_to_string(file).ok().map(|text| PathBuf::from(text.trim_end()))
}

/// Clears every loop device that lies over a file below `folder`: what a crash left.
pub fn clear_below(folder: &Path) -> io::Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir("/sys/block")? {
        let name = entry?.file_name();
        if !name.to_string_lossy().starts_with("loop") {
            continue;
        }
        let device = Path::new("/dev").join(&name);
        if backing_of(&device).is_some_and(|backing| backing.starts_with(folder)) {
            clear(&OpenOptions::new().read(true).open(&device)?)?;
            count += 1;
        }
    }
    Ok(count)
}
