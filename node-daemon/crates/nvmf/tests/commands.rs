//! Commands that the user-space host never sends, as bytes: fused operations, Verify, Copy, Abort,
//! features, logs, events.

#[path = "support/memory.rs"]
mod memory;
#[path = "support/raw.rs"]
mod raw;

use bytes::Bytes;
use raw::{ADMIN, BLOCKS, IO, Raw, Reply, host_data, property_set, volume};
use tercet_nvmf::command::{Completion, Data, Entry, admin, feature, fuse, io};
use tercet_nvmf::log::page;
use tercet_nvmf::status::Status;
use tercet_nvmf::target::{Ana, Command, CommandError};
use tercet_nvmf::{BLOCK_BYTES, NSID, TRANSFER_BYTES_MAX};
use tercet_proto::BlockRange;

fn range_entry(opcode: u8, id: u16, start: u64, count: u32) -> Entry {
    let mut entry = Entry::new(opcode, id);
    entry.set_nsid(NSID);
    entry.set_range(start, count);
    entry
}

/// A half of a fused operation.
fn half(opcode: u8, id: u16, start: u64, count: u32, what: u8) -> Entry {
    let mut entry = range_entry(opcode, id, start, count);
    entry.0[1] |= what;
    entry
}

fn block(stamp: u8) -> Vec<u8> {
    vec![stamp; BLOCK_BYTES]
}

fn statuses(completions: &[Completion]) -> Vec<(u16, Status)> {
    completions.iter().map(|completion| (completion.id, completion.status)).collect()
}

#[test]
fn a_fused_compare_and_write_is_one_command_to_the_volume() {
    let mut raw = Raw::live();
    raw.send(IO, half(io::COMPARE, 1, 7, 1, fuse::FIRST), &block(0));
    assert!(raw.commands.is_empty(), "half of an operation does not run");
    raw.send(IO, half(io::WRITE, 2, 7, 1, fuse::SECOND), &block(5));
    let done = raw.completions(IO);
    assert_eq!(statuses(&done), [(1, Status::SUCCESS), (2, Status::SUCCESS)]);
    let range = BlockRange { start: 7, count: 1 };
    let (old, new) = (Bytes::from(block(0)), Bytes::from(block(5)));
    assert_eq!(raw.commands, [Command::CompareWrite(range, old, new)]);
    assert_eq!(raw.blocks[7 * BLOCK_BYTES], 5);
    // The same again: the block is another now.
    raw.send(IO, half(io::COMPARE, 1, 7, 1, fuse::FIRST), &block(0));
    raw.send(IO, half(io::WRITE, 2, 7, 1, fuse::SECOND), &block(6));
    let done = raw.completions(IO);
    assert_eq!(statuses(&done), [(1, Status::COMPARE_FAILURE), (2, Status::FAILED_FUSED)]);
    assert_eq!(raw.blocks[7 * BLOCK_BYTES], 5, "a compare that fails writes nothing");
}

#[test]
fn the_halves_data_may_come_in_any_order() {
    for second_first in [false, true] {
        let mut raw = Raw::live();
        let (old, new) = (vec![0; 8 * BLOCK_BYTES], vec![9; 8 * BLOCK_BYTES]);
        let transport = |mut entry: Entry| {
            entry.set_data(Data::Transport(old.len() as u32));
            entry
        };
        raw.send(IO, transport(half(io::COMPARE, 1, 16, 8, fuse::FIRST)), &[]);
        raw.send(IO, transport(half(io::WRITE, 2, 16, 8, fuse::SECOND)), &[]);
        let r2ts = raw.take(IO);
        assert!(matches!(r2ts[..], [Reply::R2T(_), Reply::R2T(_)]), "{r2ts:?}");
        let mut data = [host_data(1, &old), host_data(2, &new)];
        if second_first {
            data.reverse();
        }
        raw.input(IO, &data[0]);
        assert!(raw.commands.is_empty());
        raw.input(IO, &data[1]);
        let done = raw.completions(IO);
        assert_eq!(statuses(&done), [(1, Status::SUCCESS), (2, Status::SUCCESS)]);
        assert!(raw.blocks[16 * BLOCK_BYTES..24 * BLOCK_BYTES].iter().all(|&byte| byte == 9));
    }
}

#[test]
fn a_half_alone_is_missed_at_the_next_command() {
    let mut raw = Raw::live();
    raw.send(IO, half(io::COMPARE, 1, 0, 1, fuse::FIRST), &block(0));
    raw.send(IO, range_entry(io::FLUSH, 2, 0, 1), &[]);
    let done = raw.completions(IO);
    assert_eq!(statuses(&done), [(1, Status::MISSING_FUSED), (2, Status::SUCCESS)]);
    let second = raw.call(IO, half(io::WRITE, 3, 0, 1, fuse::SECOND), &block(1)).0;
    assert_eq!(second.status, Status::MISSING_FUSED);
    // Two firsts: only the later one is one.
    raw.send(IO, half(io::COMPARE, 4, 0, 1, fuse::FIRST), &block(0));
    raw.send(IO, half(io::COMPARE, 5, 0, 1, fuse::FIRST), &block(0));
    raw.send(IO, half(io::WRITE, 6, 0, 1, fuse::SECOND), &block(1));
    let done = raw.completions(IO);
    assert_eq!(
        statuses(&done),
        [(4, Status::MISSING_FUSED), (5, Status::SUCCESS), (6, Status::SUCCESS)]
    );
}

#[test]
fn a_missed_half_is_answered_once_its_data_is_there() {
    let mut raw = Raw::live();
    let mut first = half(io::COMPARE, 1, 16, 8, fuse::FIRST);
    first.set_data(Data::Transport(8 * BLOCK_BYTES as u32));
    raw.send(IO, first, &[]);
    raw.send(IO, range_entry(io::FLUSH, 2, 0, 1), &[]);
    assert_eq!(statuses(&raw.completions(IO)), [(2, Status::SUCCESS)]);
    raw.input(IO, &host_data(1, &vec![0; 8 * BLOCK_BYTES]));
    assert_eq!(statuses(&raw.completions(IO)), [(1, Status::MISSING_FUSED)]);
    assert!(raw.closed.is_empty());
}

#[test]
fn a_half_that_is_wrong_fails_the_other_one() {
    // The first is wrong in itself: 8 bytes for a block.
    let mut raw = Raw::live();
    raw.send(IO, half(io::COMPARE, 1, 0, 1, fuse::FIRST), &[0; 8]);
    raw.send(IO, half(io::WRITE, 2, 0, 1, fuse::SECOND), &block(1));
    let done = raw.completions(IO);
    assert_eq!(statuses(&done), [(1, Status::SGL_LENGTH), (2, Status::FAILED_FUSED)]);
    // The second is.
    raw.send(IO, half(io::COMPARE, 1, 0, 1, fuse::FIRST), &block(0));
    raw.send(IO, half(io::WRITE, 2, 0, 1, fuse::SECOND), &[0; 8]);
    let done = raw.completions(IO);
    assert_eq!(statuses(&done), [(2, Status::SGL_LENGTH), (1, Status::FAILED_FUSED)]);
    // They do not fit each other: other blocks, or no Compare and Write.
    for (first, second) in [
        (half(io::COMPARE, 1, 0, 1, fuse::FIRST), half(io::WRITE, 2, 1, 1, fuse::SECOND)),
        (half(io::WRITE, 1, 0, 1, fuse::FIRST), half(io::WRITE, 2, 0, 1, fuse::SECOND)),
    ] {
        raw.send(IO, first, &block(0));
        raw.send(IO, second, &block(1));
        let done = raw.completions(IO);
        assert_eq!(statuses(&done), [(1, Status::INVALID_FIELD), (2, Status::INVALID_FIELD)]);
    }
    assert!(raw.commands.is_empty());
    let reserved = raw.call(IO, half(io::WRITE, 3, 0, 1, 3), &block(1)).0;
    assert_eq!(reserved.status, Status::INVALID_FIELD);
    let on_admin = raw.call(ADMIN, half(admin::KEEP_ALIVE, 3, 0, 1, fuse::FIRST), &[]).0;
    assert_eq!(on_admin.status, Status::INVALID_FIELD);
}

#[test]
fn each_half_gets_the_status_of_its_own_fault() {
    for (error, of_first, of_second) in [
        (CommandError::ReadOnly, Status::FAILED_FUSED, Status::WRITE_PROTECTED),
        (CommandError::NoSpace, Status::FAILED_FUSED, Status::CAPACITY),
        (CommandError::Media, Status::UNRECOVERED_READ, Status::FAILED_FUSED),
        (CommandError::Inaccessible, Status::ANA_INACCESSIBLE, Status::ANA_INACCESSIBLE),
    ] {
        let mut raw = Raw::live();
        raw.fails = Some(error);
        raw.send(IO, half(io::COMPARE, 1, 0, 1, fuse::FIRST), &block(0));
        raw.send(IO, half(io::WRITE, 2, 0, 1, fuse::SECOND), &block(1));
        assert_eq!(statuses(&raw.completions(IO)), [(1, of_first), (2, of_second)]);
    }
}

#[test]
fn verify_reads_and_sends_nothing() {
    let mut raw = Raw::live();
    let (completion, data) = raw.call(IO, range_entry(io::VERIFY, 1, 3, 200), &[]);
    assert_eq!((completion.status, data.len()), (Status::SUCCESS, 0));
    assert_eq!(raw.commands, [Command::Read(BlockRange { start: 3, count: 200 })]);
    let too_long = raw.call(IO, range_entry(io::VERIFY, 1, 0, 257), &[]).0;
    assert_eq!(too_long.status, Status::INVALID_FIELD, "VSL");
    let beyond = raw.call(IO, range_entry(io::VERIFY, 1, BLOCKS, 1), &[]).0;
    assert_eq!(beyond.status, Status::LBA_RANGE);
    raw.fails = Some(CommandError::Media);
    let broken = raw.call(IO, range_entry(io::VERIFY, 1, 0, 1), &[]).0;
    assert_eq!(broken.status, Status::UNRECOVERED_READ);
}

#[test]
fn verifies_wait_for_the_memory_that_they_take() {
    let mut raw = Raw::live();
    raw.holds = true;
    for id in 0..40 {
        raw.send(IO, range_entry(io::VERIFY, id, 0, 256), &[]);
    }
    assert_eq!(raw.held.len(), 8, "8 MiB at a time");
    while !raw.held.is_empty() {
        raw.release();
    }
    assert_eq!(raw.completions(IO).len(), 40);
}

/// A Copy to `to` of these (start, blocks).
fn copy(id: u16, to: u64, sources: &[(u64, u32)]) -> (Entry, Vec<u8>) {
    let mut entry = range_entry(io::COPY, id, to, 1);
    entry.set_dword(12, sources.len() as u32 - 1);
    let mut data = vec![0; sources.len() * 32];
    for (range, &(start, count)) in data.chunks_exact_mut(32).zip(sources) {
        range[8..16].copy_from_slice(&start.to_le_bytes());
        range[16..18].copy_from_slice(&((count - 1) as u16).to_le_bytes());
    }
    (entry, data)
}

#[test]
fn copy_gathers_its_sources_into_one_write() {
    let mut raw = Raw::live();
    for index in 0..32u8 {
        let at = usize::from(index) * BLOCK_BYTES;
        raw.blocks[at..at + BLOCK_BYTES].fill(index);
    }
    let (entry, data) = copy(1, 100, &[(5, 3), (20, 1), (0, 2)]);
    assert_eq!(raw.call(IO, entry, &data).0.status, Status::SUCCESS);
    let found: Vec<u8> = (100..106).map(|at| raw.blocks[at * BLOCK_BYTES]).collect();
    assert_eq!(found, [5, 6, 7, 20, 0, 1]);
    let writes = raw.commands.iter().filter(|command| matches!(command, Command::Write(..)));
    assert_eq!(writes.count(), 1, "whole or not at all");
    // Overlapping: what is read is what was there before.
    let (entry, data) = copy(1, 6, &[(5, 3)]);
    assert_eq!(raw.call(IO, entry, &data).0.status, Status::SUCCESS);
    let found: Vec<u8> = (5..9).map(|at| raw.blocks[at * BLOCK_BYTES]).collect();
    assert_eq!(found, [5, 5, 6, 7]);
}

#[test]
fn copy_keeps_to_its_limits() {
    let mut raw = Raw::live();
    let status = |raw: &mut Raw, entry, data: &[u8]| raw.call(IO, entry, data).0.status;
    let (entry, data) = copy(1, 1000, &[(0, 256)]);
    assert_eq!(status(&mut raw, entry, &data), Status::SUCCESS, "MSSRL, MCL");
    let (entry, data) = copy(1, 1000, &[(0, 256), (0, 1)]);
    assert_eq!(status(&mut raw, entry, &data), Status::SIZE_LIMIT, "MCL");
    let (entry, data) = copy(1, 1000, &[(0, 257)]);
    assert_eq!(status(&mut raw, entry, &data), Status::SIZE_LIMIT, "MSSRL");
    let (entry, data) = copy(1, 1000, &[(0, 2); 128]);
    assert_eq!(status(&mut raw, entry, &data), Status::SUCCESS, "MSRC");
    let (entry, data) = copy(1, 1000, &[(0, 1); 129]);
    assert_eq!(status(&mut raw, entry, &data), Status::SIZE_LIMIT, "MSRC");
    let (entry, data) = copy(1, BLOCKS - 1, &[(0, 2)]);
    assert_eq!(status(&mut raw, entry, &data), Status::LBA_RANGE);
    let (entry, data) = copy(1, 0, &[(BLOCKS - 1, 2)]);
    assert_eq!(status(&mut raw, entry, &data), Status::LBA_RANGE);
    let (mut entry, data) = copy(1, 0, &[(0, 1)]);
    entry.set_dword(12, 1 << 8);
    assert_eq!(status(&mut raw, entry, &data), Status::INVALID_FIELD, "format 1");
    raw.fails = Some(CommandError::ReadOnly);
    let (entry, data) = copy(1, 8, &[(0, 1)]);
    assert_eq!(status(&mut raw, entry, &data), Status::WRITE_PROTECTED);
}

#[test]
fn dataset_management_without_deallocate_is_a_hint() {
    let mut raw = Raw::live();
    for hint in [1, 2, 3] {
        let mut entry = range_entry(io::DATASET_MANAGEMENT, 1, 0, 1);
        entry.set_dword(10, 0);
        entry.set_dword(11, hint);
        assert_eq!(raw.call(IO, entry, &[0; 16]).0.status, Status::SUCCESS);
    }
    assert!(raw.commands.is_empty());
}

fn abort(queue: u16, command: u16) -> Entry {
    let mut entry = Entry::new(admin::ABORT, 77);
    entry.set_dword(10, u32::from(queue) | u32::from(command) << 16);
    entry
}

#[test]
fn abort_takes_back_what_has_not_begun() {
    let mut raw = Raw::live();
    // An event request.
    raw.send(ADMIN, Entry::new(admin::ASYNC_EVENT, 5), &[]);
    raw.send(ADMIN, abort(0, 5), &[]);
    let done = raw.completions(ADMIN);
    assert_eq!(statuses(&done), [(5, Status::ABORT_REQUESTED), (77, Status::SUCCESS)]);
    assert_eq!(done[1].result, 0, "aborted");
    // A command that runs is not, one that waits for room is.
    raw.holds = true;
    for id in 0..9 {
        let mut entry = range_entry(io::READ, id, 0, 256);
        entry.set_data(Data::Transport(TRANSFER_BYTES_MAX as u32));
        raw.send(IO, entry, &[]);
    }
    assert_eq!(raw.call(ADMIN, abort(1, 0), &[]).0.result, 1, "not aborted");
    assert_eq!(raw.call(ADMIN, abort(1, 8), &[]).0.result, 0);
    assert_eq!(statuses(&raw.completions(IO)), [(8, Status::ABORT_REQUESTED)]);
    raw.release();
    assert_eq!(raw.completions(IO).len(), 8);
    for (queue, command) in [(1, 8), (2, 0), (9, 9), (0, 5)] {
        assert_eq!(raw.call(ADMIN, abort(queue, command), &[]).0.result, 1, "no such command");
    }
}

fn log(raw: &mut Raw, which: u8, bytes: u32) -> Vec<u8> {
    let mut entry = Entry::new(admin::GET_LOG_PAGE, 50);
    entry.set_nsid(if which == page::HEALTH { 0xffff_ffff } else { 0 });
    entry.set_dword(10, u32::from(which) | (bytes / 4 - 1) << 16);
    entry.set_data(Data::Transport(bytes));
    let (completion, data) = raw.call(ADMIN, entry, &[]);
    assert!(completion.status.is_success(), "{completion:?}");
    data
}

#[test]
fn the_error_log_tells_which_commands_failed() {
    let mut raw = Raw::live();
    assert_eq!(log(&mut raw, page::ERRORS, 64), [0; 64]);
    raw.call(IO, range_entry(io::VERIFY, 3, BLOCKS + 7, 1), &[]);
    raw.fails = Some(CommandError::Media);
    raw.call(IO, range_entry(io::VERIFY, 4, 9, 1), &[]);
    raw.fails = Some(CommandError::Inaccessible);
    raw.call(IO, range_entry(io::VERIFY, 5, 9, 1), &[]);
    raw.call(ADMIN, Entry::new(0xc1, 6), &[]);
    let entries = log(&mut raw, page::ERRORS, 16 * 64);
    let entry = |index: usize| &entries[index * 64..(index + 1) * 64];
    let count = |index| u64::from_le_bytes(entry(index)[..8].try_into().expect("eight bytes"));
    let place = |index: usize| {
        let field = |at: usize| u16::from_le_bytes(entry(index)[at..at + 2].try_into().expect("2"));
        let lba = u64::from_le_bytes(entry(index)[16..24].try_into().expect("eight bytes"));
        (field(8), field(10), Status::from_wire(field(12)), lba)
    };
    assert_eq!((count(0), place(0)), (3, (0, 6, Status::INVALID_OPCODE, 0)));
    assert_eq!((count(1), place(1)), (2, (1, 4, Status::UNRECOVERED_READ, 9)));
    assert_eq!((count(2), place(2)), (1, (1, 3, Status::LBA_RANGE, BLOCKS + 7)));
    assert_eq!(count(3), 0, "a path error is none of a command");
    let health = log(&mut raw, page::HEALTH, 512);
    assert_eq!((health[160], health[176]), (1, 3), "media errors, log entries");
    for id in 0..100 {
        raw.call(ADMIN, Entry::new(0xc1, id), &[]);
    }
    let entries = log(&mut raw, page::ERRORS, 16 * 64);
    assert_eq!((entries[0], entries[15 * 64]), (103, 88), "the last sixteen");
}

#[test]
fn effects_are_those_of_the_commands_that_there_are() {
    let mut raw = Raw::live();
    let effects = log(&mut raw, page::EFFECTS, 4096);
    let supported = |at: usize| effects[at] & 1 != 0;
    for opcode in 0..=255u8 {
        // Fabrics commands are none of a command set; Asynchronous Event Request has no answer.
        if opcode == 0x7f {
            continue;
        }
        let mut raw = Raw::live();
        if opcode != admin::ASYNC_EVENT {
            let status = raw.call(ADMIN, Entry::new(opcode, 1), &[]).0.status;
            let known = status != Status::INVALID_OPCODE;
            assert_eq!(known, supported(usize::from(opcode) * 4), "admin {opcode:#x}");
        }
        let entry = range_entry(opcode, 1, 0, 1);
        let status = raw.call(IO, entry, &[]).0.status;
        let known = status != Status::INVALID_OPCODE;
        assert_eq!(known, supported(1024 + usize::from(opcode) * 4), "I/O {opcode:#x}");
    }
}

fn set_feature(which: u8, value: u32) -> Entry {
    let mut entry = Entry::new(admin::SET_FEATURES, 60);
    entry.set_dword(10, u32::from(which));
    entry.set_dword(11, value);
    entry
}

fn get_feature(which: u8, select: u32, value: u32) -> Entry {
    let mut entry = Entry::new(admin::GET_FEATURES, 61);
    entry.set_dword(10, u32::from(which) | select << 8);
    entry.set_dword(11, value);
    entry
}

#[test]
fn features_are_read_as_they_were_set() {
    for (which, value, default, wrong) in [
        (feature::ARBITRATION, 0x0302_0105, 0, Some(0x80)),
        (feature::POWER_MANAGEMENT, 0, 0, Some(1)),
        (feature::TEMPERATURE_THRESHOLD, 350, 343, Some(0x0001_0150)),
        (feature::TEMPERATURE_THRESHOLD, 0x0010_0118, 0x0010_0000, Some(0x0020_0000)),
        (feature::ERROR_RECOVERY, 20, 0, Some(1 << 16)),
        (feature::WRITE_ATOMICITY, 1, 0, Some(2)),
        (feature::ASYNC_EVENTS, 1 << 8, 0x900, Some(1 << 9)),
        (feature::KEEP_ALIVE, 7000, 0, None),
    ] {
        let mut raw = Raw::live();
        let selector = if which == feature::TEMPERATURE_THRESHOLD { value & 0x3f_0000 } else { 0 };
        if let Some(wrong) = wrong {
            let (completion, _) = raw.call(ADMIN, set_feature(which, wrong), &[]);
            assert_eq!(completion.status, Status::INVALID_FIELD, "feature {which:#x}");
        }
        let (completion, _) = raw.call(ADMIN, set_feature(which, value), &[]);
        assert_eq!(completion.status, Status::SUCCESS, "feature {which:#x}");
        let mut read = |select| {
            let (completion, _) = raw.call(ADMIN, get_feature(which, select, selector), &[]);
            assert_eq!(completion.status, Status::SUCCESS, "feature {which:#x}");
            completion.result
        };
        assert_eq!(read(0), u64::from(value), "feature {which:#x}");
        assert_eq!((read(1), read(2)), (default, default), "feature {which:#x}");
        assert_eq!(read(3), 1 << 2, "feature {which:#x} can be changed");
        let mut saved = set_feature(which, value);
        saved.0[43] = 0x80;
        assert_eq!(raw.call(ADMIN, saved, &[]).0.status, Status::NOT_SAVEABLE);
    }
}

/// The next event that a request on the admin queue is told, if one is due.
fn next_event(raw: &mut Raw, id: u16) -> Option<u64> {
    raw.send(ADMIN, Entry::new(admin::ASYNC_EVENT, id), &[]);
    let done = raw.completions(ADMIN);
    done.first().map(|completion| {
        assert_eq!((completion.id, completion.status), (id, Status::SUCCESS));
        completion.result
    })
}

#[test]
fn a_resize_is_told_once_until_its_log_is_read() {
    let mut raw = Raw::live();
    assert_eq!(next_event(&mut raw, 1), None);
    let mut effects = Vec::new();
    raw.target.set_size(volume(), BLOCKS * 2, &mut effects);
    raw.execute(effects);
    let done = raw.completions(ADMIN);
    assert_eq!(statuses(&done), [(1, Status::SUCCESS)]);
    assert_eq!(done[0].result, 0x0004_0002, "a notice: namespace attribute changed, log 04h");
    assert_eq!(next_event(&mut raw, 2), None);
    let mut effects = Vec::new();
    raw.target.set_size(volume(), BLOCKS * 3, &mut effects);
    raw.execute(effects);
    assert!(raw.completions(ADMIN).is_empty(), "masked until the log is read");
    assert_eq!(log(&mut raw, page::CHANGED_NAMESPACES, 4096)[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(log(&mut raw, page::CHANGED_NAMESPACES, 4096)[..4], [0; 4], "cleared by reading");
    let mut effects = Vec::new();
    raw.target.set_size(volume(), BLOCKS * 4, &mut effects);
    raw.execute(effects);
    assert_eq!(statuses(&raw.completions(ADMIN)), [(2, Status::SUCCESS)]);
    assert_eq!(log(&mut raw, page::CHANGED_NAMESPACES, 4)[..4], [1, 0, 0, 0]);
    // A change that happens while no request waits is told to the next one; ANA has its own.
    let mut effects = Vec::new();
    raw.target.set_ana(volume(), Ana::Inaccessible, &mut effects);
    raw.target.set_size(volume(), BLOCKS * 5, &mut effects);
    raw.execute(effects);
    assert_eq!(next_event(&mut raw, 3), Some(0x0004_0002));
    assert_eq!(next_event(&mut raw, 4), Some(0x000c_0302));
}

#[test]
fn a_temperature_threshold_below_the_temperature_is_an_event() {
    let mut raw = Raw::live();
    assert_eq!(next_event(&mut raw, 1), None);
    let threshold = |kelvin| set_feature(feature::TEMPERATURE_THRESHOLD, kelvin);
    raw.call(ADMIN, set_feature(feature::ASYNC_EVENTS, 0x902), &[]);
    raw.send(ADMIN, threshold(290), &[]);
    let done = raw.completions(ADMIN);
    assert_eq!((done[1].id, done[1].result), (1, 0x0002_0101), "{done:?}");
    assert_eq!(log(&mut raw, page::HEALTH, 512)[0], 0b10);
    raw.call(ADMIN, threshold(300), &[]);
    assert_eq!(log(&mut raw, page::HEALTH, 512)[0], 0);
}

#[test]
fn the_health_log_is_the_controllers_alone() {
    let mut raw = Raw::live();
    let mut entry = Entry::new(admin::GET_LOG_PAGE, 50);
    entry.set_nsid(NSID);
    entry.set_dword(10, u32::from(page::HEALTH) | 127 << 16);
    entry.set_data(Data::Transport(512));
    assert_eq!(raw.call(ADMIN, entry, &[]).0.status, Status::INVALID_FIELD);
}

#[test]
fn identify_has_the_structures_that_hosts_ask_for() {
    let mut raw = Raw::live();
    let identify = |which: u32, nsid: u32| {
        let mut entry = Entry::new(admin::IDENTIFY, 9);
        entry.set_nsid(nsid);
        entry.set_dword(10, which);
        entry.set_data(Data::Transport(4096));
        entry
    };
    for (which, nsid) in [
        (0x00, 1),
        (0x01, 0),
        (0x02, 0),
        (0x03, 1),
        (0x05, 1),
        (0x06, 0),
        (0x07, 0),
        (0x08, 1),
        (0x10, 0),
        (0x11, 1),
        (0x12, 1),
        (0x13, 0),
    ] {
        let (completion, data) = raw.call(ADMIN, identify(which, nsid), &[]);
        assert_eq!((completion.status, data.len()), (Status::SUCCESS, 4096), "CNS {which:#x}");
        if which == 0x12 || which == 0x13 {
            assert_eq!(data[..4], [1, 0, 1, 0], "this controller");
        }
        if nsid == 1 {
            let other = raw.call(ADMIN, identify(which, 2), &[]).0.status;
            assert_eq!(other, Status::INVALID_NAMESPACE, "CNS {which:#x}");
        }
    }
    for which in [0x04, 0x09, 0x14, 0x1c, 0x80, 0xff] {
        let status = raw.call(ADMIN, identify(which, 0), &[]).0.status;
        assert_eq!(status, Status::INVALID_FIELD, "CNS {which:#x}");
    }
    let mut short = identify(1, 0);
    short.set_data(Data::Transport(4092));
    assert_eq!(raw.call(ADMIN, short, &[]).0.status, Status::SGL_LENGTH);
}

#[test]
fn a_controller_that_is_not_enabled_takes_properties_only() {
    let mut raw = Raw::live();
    raw.call(ADMIN, property_set(0x0046_4001), &[]); // CC.SHN 01b
    let status = raw.call(ADMIN, Entry::new(admin::KEEP_ALIVE, 1), &[]).0.status;
    assert_eq!(status, Status::SEQUENCE_ERROR);
    raw.send(IO, range_entry(io::FLUSH, 2, 0, 1), &[]);
    assert_eq!(statuses(&raw.completions(IO)), [(2, Status::SEQUENCE_ERROR)]);
}
