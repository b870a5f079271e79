//! Floods: connections that send something else, half of something, or nothing, by the hundred
//! thousand. They cost no memory that stays, at most so much while they last, and the hosts that have
//! their queues do not notice. `TERCET_NVMF_FLOOD` sets how many (a million takes a minute or two).

#[path = "support/memory.rs"]
mod memory;
#[path = "support/raw.rs"]
mod raw;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use raw::{
    ADMIN, ENABLED, HOST_NQN, IO, Raw, capsule, connect, evidence, hello, number_from,
    property_set, volume,
};
use tercet_nvmf::command::{Entry, io};
use tercet_nvmf::names::volume_nqn;
use tercet_nvmf::pdu::Digests;
use tercet_nvmf::status::Status;
use tercet_nvmf::target::{
    CloseReason, ConnectionId, HANDSHAKES_MAX, HOST_QUEUES_MAX, HOST_TRANSFER_BYTES_MAX,
    TARGET_TRANSFER_BYTES_MAX,
};
use tercet_nvmf::{BLOCK_BYTES, IO_QUEUES_MAX, NSID, TRANSFER_BYTES_MAX};

/// Counts what is allocated.
struct Counting;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
/// One test at a time: the count is the process's.
static ALONE: Mutex<()> = Mutex::new(());

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller has promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller has promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn live_bytes() -> usize {
    LIVE_BYTES.load(Ordering::Relaxed)
}

fn command(opcode: u8, id: u16, count: u32) -> Entry {
    let mut entry = Entry::new(opcode, id);
    entry.set_nsid(NSID);
    entry.set_range(0, count);
    entry
}

/// What the connections of a flood send: each kind in turn.
fn bad_beginnings() -> Vec<Vec<u8>> {
    let hello = hello(Digests::default());
    let mut other_volume = hello.clone();
    let nqn = volume_nqn(tercet_proto::VolumeId::from_bytes([7; 16]));
    let (entry, data) = connect(&nqn, HOST_NQN, 0, 0xffff, true);
    other_volume.extend(capsule(entry, &data, Digests::default()));
    let mut early_write = hello.clone();
    early_write.extend(capsule(command(io::WRITE, 1, 1), &[1; BLOCK_BYTES], Digests::default()));
    let mut huge = hello.clone();
    huge.extend([4, 0, 72, 72, 0xff, 0xff, 0xff, 0xff]);
    let mut half_capsule = hello.clone();
    half_capsule.extend(&capsule(entry, &data, Digests::default())[..700]);
    let mut again = hello.clone();
    again.extend(&hello);
    vec![
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        Vec::new(),
        hello[..100].to_vec(),
        hello,
        other_volume,
        early_write,
        huge,
        half_capsule,
        again,
    ]
}

#[test]
fn a_flood_costs_no_memory_and_no_other_hosts_time() {
    let _alone = ALONE.lock();
    let count = number_from("TERCET_NVMF_FLOOD", 100_000);
    let started = std::time::Instant::now();
    let kinds = bad_beginnings();
    let mut raw = Raw::sized(64);
    raw.go_live();
    let usage = raw.target.usage();
    let before = live_bytes();
    let mut most = 0;
    let mut open = std::collections::VecDeque::new();
    for index in 0..count {
        let id = ConnectionId(10 + index);
        raw.open_bare(id);
        let bytes = &kinds[index as usize % kinds.len()];
        if !bytes.is_empty() {
            raw.input(id, bytes);
        }
        raw.take(id);
        if raw.closed.contains_key(&id) {
            raw.close(id);
        } else {
            open.push_back(id);
        }
        // What gave way is closed by now; the test forgets it as well.
        while open.len() > HANDSHAKES_MAX {
            let oldest = open.pop_front().expect("many");
            assert_eq!(raw.closed.get(&oldest), Some(&CloseReason::Crowded), "the oldest goes");
            raw.close(oldest);
        }
        most = most.max(live_bytes().saturating_sub(before));
        if index % 100 == 0 {
            let flush = raw.call(IO, command(io::FLUSH, 1, 1), &[]).0;
            assert!(flush.status.is_success(), "answered in the same step");
            raw.commands.clear();
        }
        if index % 10_000 == 0 {
            raw.call(ADMIN, Entry::new(0x18, 1), &[]);
        }
    }
    // Those that say nothing are closed in time.
    raw.call(ADMIN, Entry::new(0x18, 1), &[]);
    raw.wait(Duration::from_millis(4_900));
    raw.call(ADMIN, Entry::new(0x18, 1), &[]);
    raw.wait(Duration::from_millis(200));
    for id in open {
        let reason = raw.closed.get(&id);
        let is_expected = matches!(reason, Some(CloseReason::Handshake | CloseReason::Crowded));
        assert!(is_expected, "{reason:?}");
        raw.close(id);
    }
    assert_eq!(raw.target.usage(), usage);
    let left = live_bytes().saturating_sub(before);
    println!("at most {} KiB at a time, {left} bytes left", most >> 10);
    assert!(left < 64 << 10, "{left} bytes are left");
    assert!(most < 8 << 20, "{most} bytes at a time");
    evidence("nvmf_flood_connections", count, started);
}

#[test]
fn a_host_gets_in_while_others_only_knock() {
    let _alone = ALONE.lock();
    let mut raw = Raw::sized(64);
    for index in 0..2 * HANDSHAKES_MAX as u64 {
        raw.open_bare(ConnectionId(10 + index));
    }
    raw.go_live();
    assert_eq!(raw.target.usage().handshakes, HANDSHAKES_MAX - 1, "one has given way");
    assert!(raw.call(IO, command(io::FLUSH, 1, 1), &[]).0.status.is_success());
}

/// Connects queues of one host until it gets no more; gives those for I/O.
fn fill(raw: &mut Raw) -> Vec<ConnectionId> {
    let nqn = volume_nqn(volume());
    let (mut id, mut queues) = (10, Vec::new());
    loop {
        let (admin, _) = raw.join(ConnectionId(id), &nqn, HOST_NQN, 0, 0xffff);
        if !admin.status.is_success() {
            assert!(admin.status.same(Status::CONNECT_BUSY) && !admin.status.is_final());
            return queues;
        }
        raw.call(ConnectionId(id), property_set(ENABLED), &[]);
        id += 1;
        for queue in 1..=IO_QUEUES_MAX {
            let (joined, _) =
                raw.join(ConnectionId(id), &nqn, HOST_NQN, queue, admin.result as u16);
            if !joined.status.is_success() {
                assert!(joined.status.same(Status::CONNECT_BUSY));
                return queues;
            }
            queues.push(ConnectionId(id));
            id += 1;
        }
    }
}

#[test]
fn one_host_has_its_queues_and_no_more() {
    let _alone = ALONE.lock();
    let mut raw = Raw::sized(64);
    fill(&mut raw);
    let usage = raw.target.usage();
    assert_eq!(usage.connections - usage.handshakes, HOST_QUEUES_MAX);
    let other = "nqn.2026-11.io.tercet:host:other";
    let (done, _) = raw.join(ConnectionId(5000), &volume_nqn(volume()), other, 0, 0xffff);
    assert!(done.status.is_success(), "another host has its own");
}

#[test]
fn data_under_way_is_shared_out() {
    let _alone = ALONE.lock();
    let mut raw = Raw::sized(256);
    let nqn = volume_nqn(volume());
    let mut queues = Vec::new();
    for host in 0..8 {
        let host_nqn = format!("{HOST_NQN}:{host}");
        let admin = ConnectionId(1000 + host * 100);
        let (done, _) = raw.join(admin, &nqn, &host_nqn, 0, 0xffff);
        raw.call(admin, property_set(ENABLED), &[]);
        for queue in 1..=IO_QUEUES_MAX {
            let id = ConnectionId(admin.0 + u64::from(queue));
            let (joined, _) = raw.join(id, &nqn, &host_nqn, queue, done.result as u16);
            assert!(joined.status.is_success());
            queues.push(id);
        }
    }
    // Every queue asks for more than its share.
    raw.holds = true;
    for &id in &queues {
        for command_id in 0..8 {
            raw.send(id, command(io::VERIFY, command_id, 256), &[]);
        }
    }
    let usage = raw.target.usage();
    assert!(usage.transfer_bytes <= TARGET_TRANSFER_BYTES_MAX, "{usage:?}");
    assert!(usage.transfer_bytes >= TARGET_TRANSFER_BYTES_MAX / 2, "{usage:?}");
    let of_first: usize = raw.held.iter().filter(|(association, ..)| association.0 == 1).count();
    assert!(of_first * TRANSFER_BYTES_MAX <= HOST_TRANSFER_BYTES_MAX);
    // All of them are answered in the end.
    while !raw.held.is_empty() {
        raw.release();
    }
    assert_eq!(raw.commands.len(), queues.len() * 8);
    assert_eq!((raw.target.usage().transfer_bytes, raw.target.usage().commands), (0, 0));
}

#[test]
fn capsules_that_nobody_runs_stop_the_reading() {
    let _alone = ALONE.lock();
    let mut raw = Raw::sized(64);
    let queues = fill(&mut raw);
    raw.holds = true;
    let share = HOST_TRANSFER_BYTES_MAX / HOST_QUEUES_MAX;
    let most = share / (4 * BLOCK_BYTES);
    for id in 0..most as u16 {
        assert!(raw.target.wants_input(queues[0]), "{id} capsules");
        raw.send(queues[0], command(io::WRITE, id, 4), &[3; 4 * BLOCK_BYTES]);
    }
    assert!(!raw.target.wants_input(queues[0]), "{most} capsules are its share");
    assert!(raw.target.wants_input(queues[1]), "another queue has its own");
    raw.release();
    assert!(raw.target.wants_input(queues[0]));
    assert_eq!(raw.target.usage().transfer_bytes, 0);
}
