//! Volumes as block devices on a node whose kernel has no NVMe/TCP host: the user-space host below
//! a FUSE file below a loop device.
//!
//! Layout of the state folder: `VOLUME-UUID/` is the mount point of a volume's FUSE file system,
//! with the one file in it. Nothing else is kept: who attaches gives all there is to know, so a
//! start after a crash clears what is left (loop devices over files below the folder, dead FUSE
//! mounts) and the csi node attaches again. A process that keeps the FUSE descriptor while this
//! one is replaced would hand it to [`Attachment`] in place of a new mount.

pub mod args;
pub mod bench;
pub mod http;
mod loopdev;
pub mod record;
pub mod service;
mod volume_file;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use fuser::{BackgroundSession, Config, MountOption, Session};
use rustix::mount::{UnmountFlags, unmount};
use tercet_nvmf::BLOCK_BYTES;
use tercet_nvmf::names::parse_volume_nqn;
use tracing::{info, warn};

use crate::host::{Geometry, Host, HostOptions, Operation, OperationError, Status};
use loopdev::LoopDevice;
use volume_file::{FILE_NAME, VolumeFile};

/// Volumes that one process attaches.
pub const ATTACHMENTS_MAX: usize = 256;
/// How often a volume's size is looked at when nothing tells.
const RESIZE_POLL: Duration = Duration::from_secs(1);
/// Threads that read FUSE requests of one volume.
const FUSE_THREADS: usize = 2;

/// Why a volume was not attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A parameter cannot be.
    #[error("{0}")]
    Invalid(String),
    /// No path was usable in time.
    #[error("no path to {nqn} became usable within {timeout_ms} ms: {why}")]
    NoPath {
        /// The subsystem.
        nqn: String,
        /// How long it was waited for.
        timeout_ms: u128,
        /// What the last try met.
        why: String,
    },
    /// The members refuse this host.
    #[error("host {host_nqn} is not among the attachments of {nqn}")]
    NotAllowed {
        /// The subsystem.
        nqn: String,
        /// The host.
        host_nqn: String,
    },
    /// Somebody has the device mounted or open.
    #[error("{device} of {nqn} is in use: unmount it first")]
    InUse {
        /// The subsystem.
        nqn: String,
        /// The device.
        device: String,
    },
    /// The volume does not take a last flush.
    #[error("{nqn} cannot be flushed: {error}")]
    Flush {
        /// The subsystem.
        nqn: String,
        /// Why.
        error: OperationError,
    },
    /// FUSE, loop or file system.
    #[error("{what} of {nqn} failed: {error}")]
    System {
        /// The subsystem.
        nqn: String,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        error: io::Error,
    },
}

/// An attached volume as `List` shows it.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The subsystem.
    pub nqn: String,
    /// /dev/loopN.
    pub device: PathBuf,
    /// The volume's size.
    pub size_bytes: u64,
    /// Its paths.
    pub status: Status,
}

/// A volume that is attached. Parts in the order in which they are taken down.
struct Attachment {
    device: LoopDevice,
    session: BackgroundSession,
    mount_point: PathBuf,
    host: Arc<Host>,
    size_bytes: Arc<AtomicU64>,
    is_ending: Arc<AtomicBool>,
    resizer: JoinHandle<()>,
    options: HostOptions,
}

/// A volume's place in the table; calls for one volume exclude each other by it.
type Place = Arc<Mutex<Option<Attachment>>>;

/// The volumes of this node, by NQN.
pub struct Attacher {
    state_dir: PathBuf,
    places: Mutex<HashMap<String, Place>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder of the lock panics")
}

fn system(nqn: &str, what: &'static str) -> impl FnOnce(io::Error) -> AttachError {
    let nqn = nqn.to_owned();
    move |error| AttachError::System { nqn, what, error }
}

impl Attacher {
    /// An attacher with that state folder. What an earlier process left there is cleared.
    pub fn start(state_dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(state_dir)?;
        let state_dir = state_dir.canonicalize()?;
        // Devices first: once its file is unmounted, a device no longer says where it lay.
        let loops = loopdev::clear_below(&state_dir)?;
        let mounts = unmount_below(&state_dir)?;
        if mounts + loops > 0 {
            info!(mounts, loops, "cleared what an earlier process left");
        }
        Ok(Self { state_dir, places: Mutex::new(HashMap::new()) })
    }

    /// A volume's place, if there is room for one.
    fn place(&self, nqn: &str) -> Option<Place> {
        let mut places = lock(&self.places);
        if !places.contains_key(nqn) && places.len() >= ATTACHMENTS_MAX {
            places.retain(|_, place| place.try_lock().map_or(true, |place| place.is_some()));
        }
        let has_room = places.len() < ATTACHMENTS_MAX || places.contains_key(nqn);
        has_room.then(|| Arc::clone(places.entry(nqn.to_owned()).or_default()))
    }

    /// Attaches a volume; again with other endpoints: they replace the first.
    pub fn attach(
        &self,
        options: HostOptions,
        read_only: bool,
        timeout: Duration,
    ) -> Result<(PathBuf, u64), AttachError> {
        let nqn = options.subsystem_nqn.clone();
        let place = self.place(&nqn).ok_or_else(|| {
            AttachError::Invalid(format!("{ATTACHMENTS_MAX} volumes are attached"))
        })?;
        let mut place = lock(&place);
        if let Some(attachment) = place.as_mut() {
            if attachment.options.host_nqn != options.host_nqn {
                let text = format!("{nqn} is attached for {}", attachment.options.host_nqn);
                return Err(AttachError::Invalid(text));
            }
            attachment.host.set_endpoints(options.endpoints.clone());
            attachment.options = options;
            let size = attachment.size_bytes.load(Ordering::Acquire);
            return Ok((attachment.device.path().to_owned(), size));
        }
        let attachment = self.build(options, read_only, timeout)?;
        let device = attachment.device.path().to_owned();
        let size = attachment.size_bytes.load(Ordering::Acquire);
        info!(volume = nqn, device = %device.display(), size, "attached");
        *place = Some(attachment);
        Ok((device, size))
    }

    fn build(
        &self,
        options: HostOptions,
        read_only: bool,
        timeout: Duration,
    ) -> Result<Attachment, AttachError> {
        let nqn = options.subsystem_nqn.clone();
        let volume = parse_volume_nqn(&nqn)
            .ok_or_else(|| AttachError::Invalid(format!("{nqn} is no volume's NQN")))?;
        let mount_point = self.state_dir.join(volume.to_string());
        let host = Host::connect(options.clone()).map_err(system(&nqn, "the host"))?;
        let host = Arc::new(host);
        let geometry = wait_ready(&host, &options, timeout)?;
        let size_bytes = Arc::new(AtomicU64::new(geometry.blocks * BLOCK_BYTES as u64));
        let file = VolumeFile::new(
            Arc::clone(&host),
            Arc::clone(&size_bytes),
            geometry.transfer_bytes_max as u32,
            read_only,
        );
        let session = mount(file, &mount_point).map_err(system(&nqn, "the FUSE mount"))?;
        let device = match LoopDevice::over(&mount_point.join(FILE_NAME), read_only) {
            Ok(device) => device,
            Err(error) => {
                let _ = session.umount_and_join();
                return Err(system(&nqn, "the loop device")(error));
            }
        };
        let is_ending = Arc::new(AtomicBool::new(false));
        let resizer = Resizer {
            host: Arc::clone(&host),
            size_bytes: Arc::clone(&size_bytes),
            is_ending: Arc::clone(&is_ending),
            device: device.handle().map_err(system(&nqn, "the loop device"))?,
            file: mount_point.join(FILE_NAME),
        };
        let resizer = std::thread::Builder::new()
            .name("resize".into())
            .spawn(move || resizer.run(geometry.blocks))
            .map_err(system(&nqn, "a thread"))?;
        Ok(Attachment {
            device,
            session,
            mount_point,
            host,
            size_bytes,
            is_ending,
            resizer,
            options,
        })
    }

    /// Detaches a volume; fine when it is not attached.
    pub fn detach(&self, nqn: &str) -> Result<(), AttachError> {
        let Some(place) = lock(&self.places).get(nqn).cloned() else {
            return Ok(());
        };
        let mut place = lock(&place);
        let Some(attachment) = place.as_ref() else {
            return Ok(());
        };
        let device = attachment.device.path().display().to_string();
        if attachment.device.is_in_use() {
            return Err(AttachError::InUse { nqn: nqn.to_owned(), device });
        }
        // What was answered is durable; the flush shows that the volume still answers.
        if attachment.host.status().is_usable() {
            attachment
                .host
                .run(Operation::Flush)
                .map_err(|error| AttachError::Flush { nqn: nqn.to_owned(), error })?;
        }
        let attachment = place.take().expect("looked up");
        attachment.take_down(nqn)?;
        info!(volume = nqn, device, "detached");
        Ok(())
    }

    /// What is attached; a volume on its way in or out is not.
    pub fn list(&self) -> Vec<Attached> {
        let places: Vec<(String, Place)> = lock(&self.places)
            .iter()
            .map(|(nqn, place)| (nqn.clone(), Arc::clone(place)))
            .collect();
        let rows = places.into_iter().filter_map(|(nqn, place)| {
            let place = place.try_lock().ok()?;
            let attachment = place.as_ref()?;
            Some(Attached {
                nqn,
                device: attachment.device.path().to_owned(),
                size_bytes: attachment.size_bytes.load(Ordering::Acquire),
                status: attachment.host.status(),
            })
        });
        rows.collect()
    }

    /// Takes everything down that nobody uses; says what is left.
    pub fn stop(&self) {
        let names: Vec<String> = lock(&self.places).keys().cloned().collect();
        for nqn in names {
            if let Err(error) = self.detach(&nqn) {
                warn!(volume = nqn, %error, "left attached");
            }
        }
    }
}

impl Attachment {
    fn take_down(self, nqn: &str) -> Result<(), AttachError> {
        self.is_ending.store(true, Ordering::Release);
        self.resizer.join().expect("the resizing thread does not panic");
        let cleared = self.device.clear().map_err(system(nqn, "clearing the loop device"));
        let unmounted =
            self.session.umount_and_join().map_err(system(nqn, "unmounting the FUSE file"));
        let _ = std::fs::remove_dir(&self.mount_point);
        drop(self.host); // the last holder: it detaches
        cleared.and(unmounted)
    }
}

fn wait_ready(
    host: &Host,
    options: &HostOptions,
    timeout: Duration,
) -> Result<Geometry, AttachError> {
    if let Some(geometry) = host.wait_ready(timeout) {
        return Ok(geometry);
    }
    let nqn = options.subsystem_nqn.clone();
    let why = host.status().last_loss.unwrap_or_else(|| "no member serves it".to_owned());
    if why.contains(&tercet_nvmf::status::Status::CONNECT_HOST.to_string()) {
        return Err(AttachError::NotAllowed { nqn, host_nqn: options.host_nqn.clone() });
    }
    Err(AttachError::NoPath { nqn, timeout_ms: timeout.as_millis(), why })
}

fn mount(file: VolumeFile, mount_point: &Path) -> io::Result<BackgroundSession> {
    std::fs::create_dir_all(mount_point)?;
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("tercet".into()),
        MountOption::NoAtime,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoExec,
    ];
    config.n_threads = Some(FUSE_THREADS);
    config.clone_fd = true;
    Session::new(file, mount_point, &config)?.spawn()
}

/// Unmounts every FUSE mount below the folder: the processes behind them are gone.
fn unmount_below(folder: &Path) -> io::Result<usize> {
    let mut count = 0;
    for line in std::fs::read_to_string("/proc/self/mountinfo")?.lines() {
        let mut fields = line.split(' ');
        let Some(mount_point) = fields.nth(4) else {
            continue;
        };
        let is_fuse = line.split(" - ").nth(1).is_some_and(|rest| rest.starts_with("fuse"));
        if is_fuse && Path::new(mount_point).starts_with(folder) {
            unmount(mount_point, UnmountFlags::DETACH)?;
            let _ = std::fs::remove_dir(mount_point);
            count += 1;
        }
    }
    Ok(count)
}

/// Follows a volume's growth: file first, then the device over it.
struct Resizer {
    host: Arc<Host>,
    size_bytes: Arc<AtomicU64>,
    is_ending: Arc<AtomicBool>,
    device: LoopDevice,
    file: PathBuf,
}

impl Resizer {
    fn run(self, mut blocks: u64) {
        while !self.is_ending.load(Ordering::Acquire) {
            let Some(geometry) = self.host.wait_resized(blocks, RESIZE_POLL) else {
                continue;
            };
            blocks = geometry.blocks;
            self.size_bytes.store(blocks * BLOCK_BYTES as u64, Ordering::Release);
            // The kernel asks for the attributes anew, as their life is over.
            let result = std::fs::metadata(&self.file).and_then(|_| self.device.resize());
            match result {
                Ok(()) => info!(device = %self.device.path().display(), blocks, "resized"),
                Err(error) => warn!(device = %self.device.path().display(), %error, "not resized"),
            }
        }
    }
}

/// What a process in the writeback path asks of the kernel: no memory of its own is written back
/// while it serves writeback, none is swapped out. Refused without the capabilities: it goes on.
pub fn harden() {
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        info!(%error, "the kernel does not take PR_SET_IO_FLUSHER");
    }
    let all = rustix::mm::MlockAllFlags::CURRENT | rustix::mm::MlockAllFlags::ONFAULT;
    if let Err(error) = rustix::mm::mlockall(all) {
        info!(%error, "memory is not locked");
    }
}
