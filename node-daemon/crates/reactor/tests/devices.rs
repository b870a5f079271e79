//! Devices of a reactor: data, durability flags, limits, and whose device it is (rule R3).

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tercet_reactor::{Device, DeviceError, Discard, FileDisk, OpenDevice, Reactor, Settings};
use tercet_store::arena::{Arena, Buf};
use tercet_store::disk::{Disk, DiskDone, DiskOp, DiskToken};

const MIB: u64 = 1 << 20;

/// A folder of a test's own, gone afterwards.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let unique = format!("tercet-reactor-{name}-{}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(unique);
        let _ = fs::remove_dir_all(&path); // of a killed run whose number comes again
        fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    fn device(&self, bytes: u64) -> OpenDevice {
        let path = self.0.join("device");
        OpenDevice { path, create_bytes: Some(bytes), discard: Discard::Punch }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn filled(arena: &Arena, bytes: usize, value: u8) -> Buf {
    let mut buf = arena.take(bytes / 4096).expect("room in the arena");
    buf.fill(value);
    buf
}

fn wait_all(disk: &mut FileDisk<'_>, count: usize) -> Vec<DiskDone> {
    let mut done = Vec::new();
    while done.len() < count {
        disk.wait(&mut done);
    }
    assert_eq!(done.len(), count);
    done
}

fn round_trip(registered: bool) {
    let folder = Folder::new(if registered { "fixed" } else { "plain" });
    let wanted = folder.device(64 * MIB);
    let arena = Arena::new(16 << 20);
    let mut reactor = Reactor::new(Settings { spin: Duration::ZERO }).expect("a ring");
    if registered {
        assert!(reactor.register_arena(&arena), "root may lock 16 MiB");
    }
    let id = reactor.add_disk(Device::open(&wanted).expect("a device")).expect("added");
    let mut disk = FileDisk::new(&mut reactor, id);
    assert_eq!(disk.capacity_bytes(), 64 * MIB);
    for block in 0..200_u64 {
        let data = filled(&arena, 8192, block as u8 + 1);
        let fua = block.is_multiple_of(2);
        disk.submit(DiskToken(block), DiskOp::Write { offset: block * 65536, data, fua });
    }
    for done in wait_all(&mut disk, 200) {
        assert_eq!(done.result, Ok(()));
        assert_eq!(done.buf.expect("its buffer")[0], done.token.0 as u8 + 1);
    }
    disk.submit(DiskToken(1), DiskOp::Flush);
    disk.submit(DiskToken(2), DiskOp::Deallocate { offset: 0, len: 65536 });
    for done in wait_all(&mut disk, 2) {
        assert_eq!(done.result, Ok(()));
    }
    for block in 1..200_u64 {
        let into = filled(&arena, 12288, 0xee);
        disk.submit(DiskToken(block), DiskOp::Read { offset: block * 65536, into });
    }
    for done in wait_all(&mut disk, 199) {
        let buf = done.buf.expect("its buffer");
        let value = done.token.0 as u8 + 1;
        assert!(buf[..8192].iter().all(|&byte| byte == value), "block {}", done.token.0);
        assert!(buf[8192..].iter().all(|&byte| byte == 0), "nothing was written behind it");
    }
    let mut seen = [0; 1];
    let file = fs::File::open(&wanted.path).expect("the file");
    file.read_exact_at(&mut seen, 7 * 65536).expect("read");
    assert_eq!(seen[0], 8, "others see it where it belongs");
}

#[test]
fn what_is_written_is_read_back_through_registered_memory() {
    round_trip(true);
}

#[test]
fn what_is_written_is_read_back_without_registered_memory() {
    round_trip(false);
}

#[test]
fn a_device_belongs_to_one_engine() {
    let folder = Folder::new("lock");
    let wanted = folder.device(MIB);
    let first = Device::open(&wanted).expect("a device");
    let second = Device::open(&wanted);
    assert!(matches!(second, Err(DeviceError::Locked { .. })), "{second:?}");
    drop(first);
    unlocked(&wanted);
}

/// Opens a device that nobody holds any more. Between fork and exec a child that another test starts
/// holds every descriptor of this process, and so the lock.
fn unlocked(wanted: &OpenDevice) -> Device {
    let start = Instant::now();
    loop {
        match Device::open(wanted) {
            Ok(device) => return device,
            Err(DeviceError::Locked { .. }) => thread::sleep(Duration::from_micros(200)),
            Err(error) => panic!("{error}"),
        }
        assert!(start.elapsed() < Duration::from_mins(1), "the lock becomes free");
    }
}

#[test]
fn a_fresh_nodes_folder_is_made_with_the_file_but_no_more_than_that() {
    let folder = Folder::new("fresh");
    let wanted =
        |path: PathBuf, create_bytes| OpenDevice { path, create_bytes, discard: Discard::Punch };
    let path = folder.0.join("devices").join("d0");
    assert!(Device::open(&wanted(path.clone(), None)).is_err(), "what is to be there is not made");
    assert!(!folder.0.join("devices").exists());
    Device::open(&wanted(path, Some(64 * MIB))).expect("a file in a folder of its own");
    let deep = folder.0.join("not-mounted").join("devices").join("d0");
    assert!(Device::open(&wanted(deep, Some(64 * MIB))).is_err());
    assert!(!folder.0.join("not-mounted").exists());
}

#[test]
fn regions_of_a_device_do_not_overlap_and_share_its_lock() {
    let folder = Folder::new("regions");
    let wanted = folder.device(8 * MIB);
    let arena = Arena::new(1 << 20);
    let mut reactor = Reactor::new(Settings { spin: Duration::ZERO }).expect("a ring");
    let device = Device::open(&wanted).expect("a device");
    let ids = [0, 1].map(|index| reactor.add_disk(device.region(index, 2)).expect("added"));
    drop(device);
    assert!(matches!(Device::open(&wanted), Err(DeviceError::Locked { .. })));
    for (id, value) in ids.into_iter().zip([1, 2]) {
        let mut disk = FileDisk::new(&mut reactor, id);
        assert_eq!(disk.capacity_bytes(), 4 * MIB);
        let data = filled(&arena, 4096, value);
        let offset = if value == 1 { 4 * MIB - 4096 } else { 0 };
        disk.submit(DiskToken(0), DiskOp::Write { offset, data, fua: true });
        wait_all(&mut disk, 1);
    }
    let file = fs::read(&wanted.path).expect("the file");
    let border = usize::try_from(4 * MIB).expect("small");
    assert_eq!((file[border - 1], file[border]), (1, 2));
}

#[test]
fn a_device_that_does_not_fit_is_left_as_it_is() {
    let folder = Folder::new("size");
    let path = folder.0.join("device");
    fs::write(&path, vec![1; 8192]).expect("a small file");
    let wanted = OpenDevice { path, create_bytes: Some(MIB), discard: Discard::Keep };
    let small = Device::open(&wanted);
    assert!(matches!(small, Err(DeviceError::Size { actual_bytes: 8192, .. })), "{small:?}");
    assert_eq!(fs::read(&wanted.path).expect("the file"), vec![1; 8192]);
    let folder_itself = OpenDevice { path: folder.0.clone(), ..wanted.clone() };
    assert!(Device::open(&folder_itself).is_err());
    let absent = OpenDevice { path: folder.0.join("absent"), create_bytes: None, ..wanted };
    assert!(matches!(Device::open(&absent), Err(DeviceError::System { .. })));
    assert!(!absent.path.exists(), "nothing is made that was not asked for");
}

#[test]
fn a_read_past_the_end_of_a_shrunk_file_is_an_error() {
    let folder = Folder::new("shrunk");
    let wanted = folder.device(MIB);
    let arena = Arena::new(4 << 20);
    let mut reactor = Reactor::new(Settings { spin: Duration::ZERO }).expect("a ring");
    let id = reactor.add_disk(Device::open(&wanted).expect("a device")).expect("added");
    let file = fs::OpenOptions::new().write(true).open(&wanted.path).expect("the file");
    file.set_len(4096).expect("shrunk behind our back");
    let mut disk = FileDisk::new(&mut reactor, id);
    let into = filled(&arena, 8192, 0);
    disk.submit(DiskToken(1), DiskOp::Read { offset: 0, into });
    let done = wait_all(&mut disk, 1).remove(0);
    assert!(done.result.is_err(), "half a read is no read");
    assert!(done.buf.is_some(), "the buffer comes back");
}

const CHILD: &str = "TERCET_TEST_WRITER";

/// Not a test of its own: the process that the next one kills. Writes without end.
#[test]
fn writer() {
    let Some(path) = std::env::var_os(CHILD) else {
        return;
    };
    let wanted = OpenDevice {
        path: PathBuf::from(path),
        create_bytes: Some(256 * MIB),
        discard: Discard::Keep,
    };
    let arena = Arena::new(128 << 20);
    let mut reactor = Reactor::new(Settings { spin: Duration::ZERO }).expect("a ring");
    let id = reactor.add_disk(Device::open(&wanted).expect("a device")).expect("added");
    let mut disk = FileDisk::new(&mut reactor, id);
    for round in 0_u64.. {
        for slot in 0..48_u64 {
            let data = filled(&arena, 1 << 20, (round + slot) as u8);
            let offset = (round * 48 + slot) % 256 * MIB;
            disk.submit(DiskToken(slot), DiskOp::Write { offset, data, fua: true });
        }
        wait_all(&mut disk, 48);
        println!("round {round}");
    }
}

/// Rule R3: the lock of a killed engine is free only when its last write has landed.
#[test]
fn the_lock_of_a_killed_writer_is_free_only_when_nothing_lands_any_more() {
    let folder = Folder::new("killed");
    let wanted = OpenDevice { discard: Discard::Keep, ..folder.device(256 * MIB) };
    for delay_ms in [60, 95, 130] {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "writer", "--nocapture"])
            .env(CHILD, &wanted.path)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a writer");
        // Asked by its words: whoever tries the lock meanwhile may keep the writer from it.
        let mut said = BufReader::new(child.stdout.take().expect("piped")).lines();
        assert!(said.any(|line| line.expect("a line").contains("round ")), "the writer ended");
        thread::sleep(Duration::from_millis(delay_ms));
        child.kill().expect("killed");
        let device = unlocked(&wanted);
        let at_lock = stamps(&wanted.path);
        thread::sleep(Duration::from_millis(300));
        assert!(at_lock == stamps(&wanted.path), "a dead process's write landed after the lock");
        child.wait().expect("reaped");
        drop(device);
    }
}

/// The first byte of each 4 KiB of the device.
fn stamps(path: &Path) -> Vec<u8> {
    let file = fs::File::open(path).expect("the file");
    let mut stamps = Vec::new();
    let mut block = [0; 1];
    for at in (0..256 * MIB).step_by(4096) {
        file.read_exact_at(&mut block, at).expect("read");
        stamps.push(block[0]);
    }
    stamps
}
