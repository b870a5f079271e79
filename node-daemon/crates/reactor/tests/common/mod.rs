//! The devices that a suite runs over: a file, a block device, a namespace; and straight use of
//! them.
//!
//! Without being told it is a file and, where the tests are root's, a loop device over one.
//! `TERCET_TEST_DEVICES` names others, separated by commas: `file`, `path:/dev/...` or `nguid:...`.
//! What is on those is lost. One test at a time then (`--test-threads 1`): they share them.

#![allow(dead_code)] // each test binary uses its part

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tercet_reactor::{
    Device, DeviceError, Discard, DiskId, FileDisk, Nguid, OpenDevice, Place, Reactor, Settings,
};
use tercet_store::arena::{Arena, Buf};
use tercet_store::disk::{Disk, DiskDone, DiskOp, DiskToken};

pub const MIB: u64 = 1 << 20;
pub const SECTOR: usize = 4096;
/// How the suite is told its devices, and one of its processes its device.
pub const DEVICES: &str = "TERCET_TEST_DEVICES";

/// A folder of a test's own, gone afterwards.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let base = option_env!("CARGO_TARGET_TMPDIR").map(PathBuf::from);
        let base = base.filter(|path| path.exists()).unwrap_or_else(std::env::temp_dir);
        let path = base.join(format!("tercet-reactor-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path); // of a killed run whose number comes again
        fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    pub fn device(&self, bytes: u64) -> OpenDevice {
        let place = Place::Path(self.0.join("device"));
        OpenDevice { place, create_bytes: Some(bytes), discard: Discard::Punch }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A loop device over a file, detached afterwards.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path, bytes: u64) -> Self {
        fs::File::create(file).and_then(|file| file.set_len(bytes)).expect("a file");
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--direct-io=on"]).arg(file);
        let done = losetup.output().expect("losetup runs");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Self(PathBuf::from(String::from_utf8_lossy(&done.stdout).trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A device to test, and what it lives on.
pub struct Backend {
    pub name: String,
    pub wanted: OpenDevice,
    /// Dropped in this order.
    lower: (Option<Loop>, Option<Folder>),
}

impl Backend {
    fn file(name: &str, bytes: u64) -> Self {
        let folder = Folder::new(name);
        let wanted = folder.device(bytes);
        Self { name: "file".into(), wanted, lower: (None, Some(folder)) }
    }

    fn block(name: &str, bytes: u64) -> Self {
        let folder = Folder::new(&format!("{name}-loop"));
        let device = Loop::new(&folder.0.join("backing"), bytes);
        let wanted = open_path(&device.0);
        Self { name: "loop".into(), wanted, lower: (Some(device), Some(folder)) }
    }

    /// What `TERCET_TEST_DEVICES` calls it, so that another process finds it.
    pub fn spec(&self) -> String {
        match &self.wanted.place {
            Place::Path(path) => format!("path:{}", path.display()),
            Place::Nguid(nguid) => format!("nguid:{nguid}"),
        }
    }

    /// An existing device.
    pub fn named(spec: &str) -> Self {
        let wanted = match spec.split_once(':') {
            Some(("path", path)) => open_path(Path::new(path)),
            Some(("nguid", text)) => {
                let nguid: Nguid = text.parse().expect("an NGUID");
                let place = Place::Nguid(nguid);
                OpenDevice { place, create_bytes: None, discard: Discard::Punch }
            }
            _ => panic!("{DEVICES}: {spec:?} is neither file nor path:... nor nguid:..."),
        };
        Self { name: spec.to_owned(), wanted, lower: (None, None) }
    }

    /// Opens it, waiting for the last one's operations to end, and for children that other tests
    /// start: between fork and exec they hold every descriptor of this process, and so the lock.
    pub fn open(&self) -> Device {
        loop {
            match Device::open(&self.wanted) {
                Err(DeviceError::Locked { .. }) => std::thread::sleep(Duration::from_millis(1)),
                opened => return opened.unwrap_or_else(|error| panic!("{}: {error}", self.name)),
            }
        }
    }
}

fn open_path(path: &Path) -> OpenDevice {
    let place = Place::Path(path.to_path_buf());
    OpenDevice { place, create_bytes: None, discard: Discard::Punch }
}

/// The devices to run over, with at least `bytes`.
pub fn backends(name: &str, bytes: u64) -> Vec<Backend> {
    if let Ok(specs) = std::env::var(DEVICES) {
        let one = |spec: &str| match spec {
            "file" => Backend::file(name, bytes),
            spec => Backend::named(spec),
        };
        return specs.split(',').map(one).collect();
    }
    let mut all = vec![Backend::file(name, bytes)];
    if rustix::process::geteuid().is_root() {
        all.push(Backend::block(name, bytes));
    }
    all
}

/// A device in a reactor of its own.
pub struct Bench {
    pub arena: Arena,
    pub reactor: Reactor,
    pub disk: DiskId,
}

impl Bench {
    pub fn new(device: Device, arena_bytes: usize, registered: bool) -> Self {
        let arena = Arena::new(arena_bytes);
        let mut reactor = Reactor::new(Settings { spin: Duration::ZERO }).expect("a ring");
        if registered {
            assert!(reactor.register_arena(&arena), "root may lock {arena_bytes} bytes");
        }
        let disk = reactor.add_disk(device).expect("added");
        Self { arena, reactor, disk }
    }

    pub fn file_disk(&mut self) -> FileDisk<'_> {
        FileDisk::new(&mut self.reactor, self.disk)
    }

    /// Submits all, waits for all; in the order given.
    pub fn run(&mut self, ops: Vec<DiskOp>) -> Vec<DiskDone> {
        let count = ops.len();
        let mut disk = self.file_disk();
        for (number, op) in (0..).zip(ops) {
            disk.submit(DiskToken(number), op);
        }
        let mut done = Vec::new();
        while done.len() < count {
            disk.wait(&mut done);
        }
        assert_eq!(done.len(), count);
        done.sort_by_key(|one| one.token);
        done
    }

    /// As `run`; all succeed.
    pub fn must(&mut self, ops: Vec<DiskOp>) -> Vec<DiskDone> {
        let done = self.run(ops);
        for one in &done {
            assert_eq!(one.result, Ok(()));
        }
        done
    }

    pub fn filled(&self, bytes: usize, value: u8) -> Buf {
        filled(&self.arena, bytes, value)
    }

    pub fn read(&mut self, offset: u64, bytes: usize) -> Buf {
        let into = self.filled(bytes, 0xee);
        let done = self.must(vec![DiskOp::Read { offset, into }]).remove(0);
        done.buf.expect("its buffer")
    }
}

pub fn filled(arena: &Arena, bytes: usize, value: u8) -> Buf {
    let mut buf = arena.take(bytes / SECTOR).expect("room in the arena");
    buf.fill(value);
    buf
}
