//! Devices of a reactor, one suite for all kinds: data, durability flags, limits, and whose device
//! it is (rule R3).

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Backend, Bench, Folder, MIB, SECTOR, backends, filled};
use tercet_proto::page_aligned;
use tercet_reactor::{
    Device, DeviceError, DeviceKind, Discard, FileDisk, Nguid, OpenDevice, Place,
};
use tercet_store::disk::{Data, Disk, DiskDone, DiskOp, DiskToken};

fn wait_all(disk: &mut FileDisk<'_>, count: usize) -> Vec<DiskDone> {
    let mut done = Vec::new();
    while done.len() < count {
        disk.wait(&mut done);
    }
    assert_eq!(done.len(), count);
    done
}

/// Bytes that others have as well are written from where they are, in registered memory or not; and
/// none that a device would not take from there.
fn write_shared(backend: &Backend, registered: bool) {
    let mut bench = Bench::new(backend.open(), 16 << 20, registered);
    let mut gathered = page_aligned(4 * SECTOR);
    gathered.resize(4 * SECTOR, 7);
    let others = Bytes::from_owner(bench.filled(4 * SECTOR, 9));
    for (offset, bytes) in [(0, gathered.freeze()), (MIB, others)] {
        assert!(Data::shared(&bytes.slice(1..=SECTOR)).is_none(), "it begins within a page");
        assert!(Data::shared(&bytes.slice(..SECTOR + 512)).is_none(), "it is no whole blocks");
        let data = Data::shared(&bytes.slice(SECTOR..)).expect("at a page");
        let done = bench.must(vec![DiskOp::Write { offset, data, fua: true }]);
        assert!(done[0].buf.is_none(), "nobody's buffer comes back");
        assert_eq!(bench.read(offset, 3 * SECTOR)[..], bytes[SECTOR..]);
    }
}

fn round_trip(backend: &Backend, registered: bool) {
    let mut bench = Bench::new(backend.open(), 16 << 20, registered);
    bench.must(vec![DiskOp::WriteZeroes { offset: 0, len: 16 * MIB }]);
    let arena = bench.arena.clone();
    let mut disk = bench.file_disk();
    assert!(disk.capacity_bytes() >= 64 * MIB);
    for block in 0..200_u64 {
        let data = filled(&arena, 2 * SECTOR, block as u8 + 1);
        let fua = block.is_multiple_of(2);
        disk.submit(
            DiskToken(block),
            DiskOp::Write { offset: block * 65536, data: data.into(), fua },
        );
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
        let into = filled(&arena, 3 * SECTOR, 0xee);
        disk.submit(DiskToken(block), DiskOp::Read { offset: block * 65536, into });
    }
    for done in wait_all(&mut disk, 199) {
        let buf = done.buf.expect("its buffer");
        let value = done.token.0 as u8 + 1;
        assert!(buf[..8192].iter().all(|&byte| byte == value), "block {}", done.token.0);
        assert!(buf[8192..].iter().all(|&byte| byte == 0), "nothing was written behind it");
    }
}

#[test]
fn what_is_written_is_read_back_through_registered_memory() {
    for backend in backends("fixed", 64 * MIB) {
        round_trip(&backend, true);
        write_shared(&backend, true);
    }
}

#[test]
fn what_is_written_is_read_back_without_registered_memory() {
    for backend in backends("plain", 64 * MIB) {
        round_trip(&backend, false);
        write_shared(&backend, false);
    }
}

/// Larger than what a drive takes at once, not a multiple of it, up to the device's last byte.
#[test]
fn a_large_operation_arrives_whole_and_in_order() {
    for backend in backends("large", 64 * MIB) {
        for registered in [true, false] {
            let mut bench = Bench::new(backend.open(), 16 << 20, registered);
            let blocks = 1000;
            let capacity = bench.file_disk().capacity_bytes();
            let offset = capacity - (blocks * SECTOR) as u64;
            let mut data = bench.filled(blocks * SECTOR, 0);
            for (number, block) in (1_u64..).zip(data.chunks_mut(SECTOR)) {
                block.copy_from_slice(&number.to_le_bytes().repeat(SECTOR / 8));
            }
            let written = data.to_vec();
            bench.must(vec![DiskOp::Write { offset, data: data.into(), fua: true }]);
            assert!(bench.read(offset, written.len())[..] == written, "{}", backend.name);
            let part = bench.read(offset + SECTOR as u64, 200 * SECTOR);
            assert!(part[..] == written[SECTOR..201 * SECTOR], "{}", backend.name);
        }
    }
}

#[test]
fn zeroes_and_deallocations_keep_to_their_range() {
    for backend in backends("ranges", 64 * MIB) {
        let mut bench = Bench::new(backend.open(), 16 << 20, true);
        let around = 6 * MIB;
        for (offset, len) in [(SECTOR as u64, 4 * MIB), (5 * MIB, SECTOR as u64)] {
            for deallocate in [false, true] {
                let data = bench.filled(around as usize, 0x5a);
                bench.must(vec![DiskOp::Write { offset: 0, data: data.into(), fua: false }]);
                bench.must(vec![if deallocate {
                    DiskOp::Deallocate { offset, len }
                } else {
                    DiskOp::WriteZeroes { offset, len }
                }]);
                let seen = bench.read(0, around as usize);
                let inside = offset as usize..(offset + len) as usize;
                let name = &backend.name;
                assert!(seen[..inside.start].iter().all(|&byte| byte == 0x5a), "{name}: before");
                assert!(seen[inside.end..].iter().all(|&byte| byte == 0x5a), "{name}: behind");
                if !deallocate {
                    assert!(seen[inside].iter().all(|&byte| byte == 0), "{name}: zeroes");
                }
            }
        }
    }
}

#[test]
fn a_device_belongs_to_one_engine() {
    for backend in backends("lock", 4 * MIB) {
        let first = backend.open();
        let second = Device::open(&backend.wanted);
        assert!(matches!(second, Err(DeviceError::Locked { .. })), "{second:?}");
        if first.kind() == DeviceKind::Nvme {
            let generic = first.path().display().to_string();
            let block = generic.replace("/dev/ng", "/dev/nvme");
            for name in [&generic, &block] {
                let other = Device::open(&Backend::named(&format!("path:{name}")).wanted);
                assert!(matches!(other, Err(DeviceError::Locked { .. })), "{name}: {other:?}");
            }
            drop(first);
            let by_block = Backend::named(&format!("path:{block}")).open();
            assert_eq!(by_block.kind(), DeviceKind::Block);
            let other = Device::open(&backend.wanted);
            assert!(matches!(other, Err(DeviceError::Locked { .. })), "{other:?}");
        } else {
            drop(first);
        }
        backend.open();
    }
}

#[test]
fn a_namespace_that_is_not_there_is_named() {
    let nguid: Nguid = "fedcba98765432100123456789abcdef".parse().expect("an NGUID");
    let place = Place::Nguid(nguid);
    let absent = OpenDevice { place, create_bytes: None, discard: Discard::Punch };
    let error = Device::open(&absent).expect_err("not there").to_string();
    assert!(error.starts_with(&format!("no NVMe namespace with NGUID {nguid}")), "{error}");
    let other = OpenDevice { place: PathBuf::from("/dev/null").into(), ..absent };
    assert!(matches!(Device::open(&other), Err(DeviceError::Kind { .. })));
}

#[test]
fn a_fresh_nodes_folder_is_made_with_the_file_but_no_more_than_that() {
    let folder = Folder::new("fresh");
    let wanted = |path: PathBuf, create_bytes| OpenDevice {
        place: Place::Path(path),
        create_bytes,
        discard: Discard::Punch,
    };
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
    for backend in backends("regions", 8 * MIB) {
        let device = backend.open();
        let half = device.capacity_bytes() / 2;
        let mut bench = Bench::new(device.region(0, 2), 1 << 20, true);
        let second = bench.reactor.add_disk(device.region(1, 2)).expect("added");
        drop(device);
        assert!(matches!(Device::open(&backend.wanted), Err(DeviceError::Locked { .. })));
        let first = bench.disk;
        for (disk, value) in [(first, 1), (second, 2)] {
            bench.disk = disk;
            assert_eq!(bench.file_disk().capacity_bytes(), half);
            let data = bench.filled(SECTOR, value);
            let offset = if value == 1 { half - SECTOR as u64 } else { 0 };
            bench.must(vec![DiskOp::Write { offset, data: data.into(), fua: true }]);
        }
        drop(bench);
        let mut whole = Bench::new(backend.open(), 1 << 20, false);
        let border = whole.read(half - SECTOR as u64, 2 * SECTOR);
        assert_eq!((border[0], border[SECTOR - 1], border[SECTOR]), (1, 1, 2), "{}", backend.name);
    }
}

#[test]
fn a_device_that_does_not_fit_is_left_as_it_is() {
    let folder = Folder::new("size");
    let path = folder.0.join("device");
    fs::write(&path, vec![1; 8192]).expect("a small file");
    let place = Place::Path(path.clone());
    let wanted = OpenDevice { place, create_bytes: Some(MIB), discard: Discard::Keep };
    let small = Device::open(&wanted);
    assert!(matches!(small, Err(DeviceError::Size { actual_bytes: 8192, .. })), "{small:?}");
    assert_eq!(fs::read(&path).expect("the file"), vec![1; 8192]);
    let folder_itself = OpenDevice { place: folder.0.clone().into(), ..wanted.clone() };
    assert!(Device::open(&folder_itself).is_err());
    let absent = folder.0.join("absent");
    let wanted = OpenDevice { place: absent.clone().into(), create_bytes: None, ..wanted };
    assert!(matches!(Device::open(&wanted), Err(DeviceError::System { .. })));
    assert!(!absent.exists(), "nothing is made that was not asked for");
}

#[test]
fn a_read_past_the_end_of_a_shrunk_file_is_an_error() {
    let folder = Folder::new("shrunk");
    let wanted = folder.device(MIB);
    let mut bench = Bench::new(Device::open(&wanted).expect("a device"), 4 << 20, false);
    let Place::Path(path) = &wanted.place else { panic!("a file") };
    let file = fs::OpenOptions::new().write(true).open(path).expect("the file");
    file.set_len(4096).expect("shrunk behind our back");
    let into = bench.filled(8192, 0);
    let done = bench.run(vec![DiskOp::Read { offset: 0, into }]).remove(0);
    assert!(done.result.is_err(), "half a read is no read");
    assert!(done.buf.is_some(), "the buffer comes back");
}

const CHILD: &str = "TERCET_TEST_WRITER";
/// What the writer writes to, again and again.
const WRITTEN_BYTES: u64 = 256 * MIB;

/// Not a test of its own: the process that the next one kills. Writes without end.
#[test]
fn writer() {
    let Ok(spec) = std::env::var(CHILD) else {
        return;
    };
    let mut bench = Bench::new(Backend::named(&spec).open(), 64 << 20, true);
    for round in 0_u64.. {
        let write = |slot| {
            let data = bench.filled(MIB as usize, (round + slot) as u8);
            let offset = (round * 48 + slot) * MIB % WRITTEN_BYTES;
            DiskOp::Write { offset, data: data.into(), fua: true }
        };
        let writes = (0..48).map(write).collect();
        bench.must(writes);
        println!("round {round}");
    }
}

/// A writer that has written.
fn start_writer(spec: &str) -> Child {
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "writer", "--nocapture"])
        .env(CHILD, spec)
        .stdout(Stdio::piped())
        .spawn()
        .expect("a writer");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let written = lines.by_ref().map_while(Result::ok).any(|line| line.contains("round 0"));
    assert!(written, "{spec}: the writer writes");
    // Whoever does not read holds it up.
    thread::spawn(move || lines.for_each(drop));
    child
}

/// Rule R3: the lock of a killed engine is free only when its last write has landed.
#[test]
fn the_lock_of_a_killed_writer_is_free_only_when_nothing_lands_any_more() {
    for backend in backends("killed", WRITTEN_BYTES) {
        drop(backend.open()); // a file is made with its size
        for delay_ms in [60, 95, 130] {
            let mut child = start_writer(&backend.spec());
            thread::sleep(Duration::from_millis(delay_ms));
            child.kill().expect("killed");
            let start = Instant::now();
            let device = loop {
                match Device::open(&backend.wanted) {
                    Ok(device) => break device,
                    Err(DeviceError::Locked { .. }) => thread::sleep(Duration::from_micros(200)),
                    Err(error) => panic!("{error}"),
                }
                assert!(start.elapsed() < Duration::from_mins(1), "the lock becomes free");
            };
            println!("{}: the lock was free after {:?}", backend.name, start.elapsed());
            let mut bench = Bench::new(device, 16 << 20, true);
            let at_lock = stamps(&mut bench);
            thread::sleep(Duration::from_millis(300));
            let later = stamps(&mut bench);
            assert!(at_lock == later, "a dead process's write landed after the lock");
            child.wait().expect("reaped");
        }
    }
}

/// The first byte of each 4 KiB that the writer writes to.
fn stamps(bench: &mut Bench) -> Vec<u8> {
    let mut stamps = Vec::new();
    for at in (0..WRITTEN_BYTES).step_by(8 * MIB as usize) {
        let reads = (0..8).map(|index| {
            let into = bench.filled(MIB as usize, 0);
            DiskOp::Read { offset: at + index * MIB, into }
        });
        let reads = reads.collect();
        for done in bench.must(reads) {
            let buf = done.buf.expect("its buffer");
            stamps.extend(buf.chunks(SECTOR).map(|block| block[0]));
        }
    }
    stamps
}
