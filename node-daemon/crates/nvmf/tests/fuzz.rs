//! Whole sessions whose fields are set to what no host sends: every header field of every PDU, every
//! dword of every command, digests made right again so that the parsers behind them are reached.
//!
//! After each session the connections are closed, and the target has to be as before: nothing is kept,
//! and the association beside it answers. The counts at the end say what the target answered; that
//! each way to refuse was reached shows that the sessions got that far. Other sessions have bits
//! flipped on the way, in both directions: with digests on, nobody may take such a byte for data.
//! `TERCET_NVMF_FUZZ_CASES` makes more of them; a failure names its case.

#[path = "support/memory.rs"]
mod memory;
#[path = "support/raw.rs"]
mod raw;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use raw::{
    ADMIN, ENABLED, HOST_NQN, IO, Raw, Reply, Rng, capsule, connect, evidence, hello, number_from,
    property_set, volume,
};
use tercet_nvmf::command::{Data, Entry, admin, feature, fuse, io};
use tercet_nvmf::fabrics::{PropertyEntry, property};
use tercet_nvmf::host::{
    HostEffect, HostOptions, Multipath, Operation, OperationError, OperationId,
};
use tercet_nvmf::log::page;
use tercet_nvmf::names::{DISCOVERY_NQN, volume_nqn};
use tercet_nvmf::pdu::{Common, Digests, FatalStatus, PduType, Transfer, crc32c, flags};
use tercet_nvmf::status::Status;
use tercet_nvmf::target::{CloseReason, ConnectionId, Effect};
use tercet_nvmf::{BLOCK_BYTES, NSID};
use tercet_proto::BlockRange;

const BLOCKS: u64 = 512;
const VICTIM_NQN: &str = "nqn.2026-11.io.tercet:host:victim";

/// A PDU as its parts, so that digests can be made right after a change.
struct Pdu {
    header: Vec<u8>,
    data: Vec<u8>,
}

impl Pdu {
    fn command(mut entry: Entry, data: &[u8]) -> Self {
        if !data.is_empty() {
            entry.set_data(Data::InCapsule(data.len() as u32));
        }
        let whole = capsule(entry, data, Digests::default());
        Self { header: whole[..72].to_vec(), data: data.to_vec() }
    }

    fn data(transfer: Transfer, byte: u8) -> Self {
        let mut header = vec![0; 24];
        let pdu_bytes = 24 + transfer.bytes;
        Common { kind: PduType::H2CData, flags: flags::LAST, data_offset: 24, pdu_bytes }
            .put(&mut header);
        transfer.put(&mut header);
        Self { header, data: vec![byte; transfer.bytes as usize] }
    }

    /// Flags, PDO and PLEN as these digests make them.
    fn fit(&mut self, digests: Digests) {
        if self.header[0] == PduType::IcReq as u8 {
            return;
        }
        let bare = self.header.len() + digests.header_bytes();
        self.header[1] |= if digests.header { flags::HDGST } else { 0 };
        let mut pdu_bytes = bare;
        if !self.data.is_empty() {
            self.header[1] |= if digests.data { flags::DDGST } else { 0 };
            self.header[3] = bare as u8;
            pdu_bytes += self.data.len() + digests.data_bytes();
        }
        self.header[4..8].copy_from_slice(&(pdu_bytes as u32).to_le_bytes());
    }

    fn wire(&self, digests: Digests, rng: &mut Rng) -> Vec<u8> {
        let mut out = self.header.clone();
        let wrong = u32::from(rng.one_in(40));
        let has_digests = self.header[0] != PduType::IcReq as u8;
        if digests.header && has_digests {
            out.extend_from_slice(&(crc32c(&self.header) ^ wrong).to_le_bytes());
        }
        out.extend_from_slice(&self.data);
        if digests.data && !self.data.is_empty() {
            let wrong = u32::from(rng.one_in(20));
            out.extend_from_slice(&(crc32c(&self.data) ^ wrong).to_le_bytes());
        }
        out
    }

    /// Sets a field of one, two, four or eight bytes to something that is likely to matter.
    fn mutate(&mut self, rng: &mut Rng) {
        let fields: &[(usize, usize)] = match self.header[0] {
            0 => &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 4), (8, 2), (10, 1), (11, 1), (12, 4)],
            // Entry fields stand 8 bytes later than in the entry.
            4 => &[
                (0, 1),
                (1, 1),
                (2, 1),
                (3, 1),
                (4, 4),
                (8, 1),
                (9, 1),
                (10, 2),
                (12, 4),
                (12, 1),
                (32, 8),
                (40, 4),
                (47, 1),
                (48, 4),
                (48, 8),
                (50, 2),
                (52, 4),
                (52, 2),
                (54, 1),
                (56, 4),
                (56, 2),
                (60, 4),
                (64, 4),
                (68, 4),
            ],
            _ => &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 4), (8, 2), (10, 2), (12, 4), (16, 4)],
        };
        if !self.data.is_empty() && rng.one_in(4) {
            let at = rng.below(self.data.len());
            self.data[at] ^= 1 << rng.below(8);
            return;
        }
        let (at, bytes) = fields[rng.below(fields.len())];
        let mut field = [0; 8];
        field[..bytes].copy_from_slice(&self.header[at..at + bytes]);
        let old = u64::from_le_bytes(field);
        let new = match rng.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => old.wrapping_add(1),
            3 => old.wrapping_sub(1),
            4 => 1 << rng.below(bytes * 8),
            5 => old ^ 1 << rng.below(bytes * 8),
            6 => rng.next() & 0xff,
            _ => rng.next(),
        };
        self.header[at..at + bytes].copy_from_slice(&new.to_le_bytes()[..bytes]);
    }
}

fn block_command(opcode: u8, id: u16, start: u64, count: u32) -> Entry {
    let mut entry = Entry::new(opcode, id);
    entry.set_nsid(NSID);
    entry.set_range(start, count);
    entry
}

fn with_transport(mut entry: Entry, bytes: u32) -> Entry {
    entry.set_data(Data::Transport(bytes));
    entry
}

fn connect_pdu(subsystem_nqn: &str, queue: u16, cntlid: u16, rng: &mut Rng) -> Pdu {
    let flow_control = rng.one_in(2);
    let (entry, data) = connect(subsystem_nqn, VICTIM_NQN, queue, cntlid, flow_control);
    Pdu::command(entry, &data)
}

/// What a host sends on an admin queue, each kind of command once.
fn admin_session(rng: &mut Rng) -> Vec<Pdu> {
    let is_discovery = rng.one_in(4);
    let nqn = if is_discovery { DISCOVERY_NQN.to_owned() } else { volume_nqn(volume()) };
    let mut pdus = vec![connect_pdu(&nqn, 0, 0xffff, rng)];
    let get = PropertyEntry { wide: true, offset: property::CAP, value: 0 };
    pdus.push(Pdu::command(get.get(0), &[]));
    pdus.push(Pdu::command(property_set(ENABLED), &[]));
    for which in [0, 1, 2, 3, 5, 6, 7, 8, 0x10, 0x11, 0x12, 0x13] {
        let mut entry = with_transport(Entry::new(admin::IDENTIFY, 2), 4096);
        entry.set_nsid(u32::from(which != 1));
        entry.set_dword(10, which);
        pdus.push(Pdu::command(entry, &[]));
    }
    for which in [
        page::ERRORS,
        page::HEALTH,
        page::FIRMWARE,
        page::CHANGED_NAMESPACES,
        page::EFFECTS,
        page::ANA,
        page::DISCOVERY,
    ] {
        let mut entry = with_transport(Entry::new(admin::GET_LOG_PAGE, 3), 512);
        entry.set_dword(10, u32::from(which) | 127 << 16);
        pdus.push(Pdu::command(entry, &[]));
    }
    for (which, value) in [
        (feature::QUEUE_COUNT, 0x0001_0001),
        (feature::KEEP_ALIVE, 5000),
        (feature::ASYNC_EVENTS, 0x100),
        (feature::TEMPERATURE_THRESHOLD, 300),
        (feature::ARBITRATION, 7),
    ] {
        for opcode in [admin::SET_FEATURES, admin::GET_FEATURES] {
            let mut entry = Entry::new(opcode, 4);
            entry.set_dword(10, u32::from(which));
            entry.set_dword(11, value);
            pdus.push(Pdu::command(entry, &[]));
        }
    }
    for (opcode, id) in [(admin::ASYNC_EVENT, 5), (admin::KEEP_ALIVE, 6), (admin::ABORT, 7)] {
        let mut entry = Entry::new(opcode, id);
        entry.set_dword(10, 5 << 16);
        pdus.push(Pdu::command(entry, &[]));
    }
    pdus
}

/// What a host sends on an I/O queue, each kind of command once.
fn io_session(cntlid: u16, rng: &mut Rng) -> Vec<Pdu> {
    let mut pdus = vec![connect_pdu(&volume_nqn(volume()), 1, cntlid, rng)];
    let block = vec![7; BLOCK_BYTES];
    pdus.push(Pdu::command(block_command(io::WRITE, 1, 1, 1), &block));
    for (opcode, id, count) in [(io::READ, 2, 4), (io::WRITE, 3, 16), (io::COMPARE, 4, 16)] {
        let entry = block_command(opcode, id, 0, count);
        pdus.push(Pdu::command(with_transport(entry, count * BLOCK_BYTES as u32), &[]));
    }
    pdus.push(Pdu::command(block_command(io::WRITE_ZEROES, 5, 3, 100), &[]));
    pdus.push(Pdu::command(block_command(io::FLUSH, 6, 1, 1), &[]));
    pdus.push(Pdu::command(block_command(io::VERIFY, 7, 1, 20), &[]));
    for (opcode, id, what) in [(io::COMPARE, 8, fuse::FIRST), (io::WRITE, 9, fuse::SECOND)] {
        let mut entry = block_command(opcode, id, 9, 1);
        entry.0[1] |= what;
        pdus.push(Pdu::command(entry, &block));
    }
    let mut entry = block_command(io::DATASET_MANAGEMENT, 10, 0, 1);
    entry.set_dword(10, 1);
    entry.set_dword(11, 4);
    let mut ranges = [0; 32];
    (ranges[4], ranges[20], ranges[24]) = (3, 1, 9);
    pdus.push(Pdu::command(entry, &ranges));
    let mut entry = block_command(io::COPY, 11, 60, 1);
    entry.set_dword(12, 1);
    let mut sources = [0; 64];
    (sources[16], sources[40], sources[48]) = (2, 9, 1);
    pdus.push(Pdu::command(entry, &sources));
    let mut disconnect = Entry::fabrics(8, 12);
    disconnect.set_data(Data::None);
    pdus.push(Pdu::command(disconnect, &[]));
    pdus
}

#[derive(Default)]
struct Seen {
    pdus: u64,
    mutated: u64,
    /// Completions by their status.
    statuses: BTreeMap<u16, u64>,
    /// Ends by FES.
    ends: BTreeMap<u16, u64>,
}

/// Feeds a session on a connection, some of it mutated; R2Ts are answered.
fn run_session(
    raw: &mut Raw,
    id: ConnectionId,
    pdus: Vec<Pdu>,
    rate: usize,
    rng: &mut Rng,
    seen: &mut Seen,
) {
    let digests = Digests { header: rng.one_in(2), data: rng.one_in(2) };
    raw.open_bare(id);
    let hello = Pdu { header: hello(digests), data: Vec::new() };
    let mut todo: std::collections::VecDeque<Pdu> = [hello].into_iter().chain(pdus).collect();
    // PDUs where none of their kind may be.
    match rng.below(30) {
        0 => drop(todo.pop_front()),
        1 => {
            let again = todo[0].header.clone();
            todo.insert(rng.below(todo.len()), Pdu { header: again, data: Vec::new() });
        }
        2 => {
            let transfer = Transfer { command_id: 3, tag: 3, offset: 0, bytes: 4096 };
            todo.insert(rng.below(todo.len()), Pdu::data(transfer, 7));
        }
        _ => {}
    }
    while let Some(mut pdu) = todo.pop_front() {
        pdu.fit(digests);
        seen.pdus += 1;
        if rng.one_in(rate) {
            seen.mutated += 1;
            pdu.mutate(rng);
        }
        let wire = pdu.wire(digests, rng);
        let chunk_bytes = if rng.one_in(3) { 1 + rng.below(200) } else { 1 << 20 };
        for chunk in wire.chunks(chunk_bytes) {
            raw.input(id, chunk);
        }
        assert!(raw.target.missing_bytes(id) <= (1 << 20) + 260);
        for reply in raw.take(id) {
            match reply {
                Reply::Completion(completion) => {
                    *seen.statuses.entry(completion.status.code()).or_default() += 1;
                }
                Reply::R2T(transfer) => todo.push_front(Pdu::data(transfer, 7)),
                Reply::Data(..) => {}
            }
        }
        if let Some(reason) = raw.closed.get(&id) {
            if let CloseReason::Malformed(fatal) = reason {
                *seen.ends.entry(fatal.status as u16).or_default() += 1;
            }
            break;
        }
    }
}

#[test]
fn mutated_sessions_leave_nothing_behind() {
    let cases = number_from("TERCET_NVMF_FUZZ_CASES", 6_000);
    let started = std::time::Instant::now();
    let mut seen = Seen::default();
    let mut raw = Raw::sized(BLOCKS);
    raw.go_live();
    let before = raw.target.usage();
    for case in 0..cases {
        let mut rng = Rng(case);
        let (first, second) = (ConnectionId(3 + case * 2), ConnectionId(4 + case * 2));
        let rate = 2 + rng.below(8);
        if rng.one_in(2) {
            let pdus = admin_session(&mut rng);
            run_session(&mut raw, first, pdus, rate, &mut rng, &mut seen);
        } else {
            let (done, _) = raw.join(first, &volume_nqn(volume()), VICTIM_NQN, 0, 0xffff);
            raw.call(first, property_set(ENABLED), &[]);
            let pdus = io_session(done.result as u16, &mut rng);
            run_session(&mut raw, second, pdus, rate, &mut rng, &mut seen);
        }
        raw.close(second);
        raw.close(first);
        assert_eq!(raw.target.usage(), before, "case {case}");
        let flush = block_command(io::FLUSH, 9, 0, 1);
        assert!(raw.call(IO, flush, &[]).0.status.is_success(), "case {case}");
        raw.commands.clear();
    }
    assert!(raw.call(ADMIN, Entry::new(admin::KEEP_ALIVE, 1), &[]).0.status.is_success());
    println!("statuses {:x?}", seen.statuses);
    println!("ends {:x?}, {} PDUs mutated", seen.ends, seen.mutated);
    evidence("nvmf_fuzz_sessions", cases, started);
    evidence("nvmf_fuzz_pdus", seen.pdus, started);
    assert_reached(&seen);
}

/// Each way to refuse has been reached: the sessions get that far.
fn assert_reached(seen: &Seen) {
    for end in [
        FatalStatus::InvalidHeader,
        FatalStatus::Sequence,
        FatalStatus::HeaderDigest,
        FatalStatus::DataOutOfRange,
        FatalStatus::LimitExceeded,
        FatalStatus::UnsupportedParameter,
    ] {
        assert!(seen.ends.contains_key(&(end as u16)), "{end:?} was never reached");
    }
    for status in [
        Status::SUCCESS,
        Status::INVALID_OPCODE,
        Status::INVALID_FIELD,
        Status::INVALID_NAMESPACE,
        Status::SEQUENCE_ERROR,
        Status::SGL_LENGTH,
        Status::SGL_TYPE,
        Status::SGL_OFFSET,
        Status::TRANSIENT_TRANSPORT,
        Status::FAILED_FUSED,
        Status::MISSING_FUSED,
        Status::LBA_RANGE,
        Status::SIZE_LIMIT,
        Status::INVALID_LOG,
        Status::NOT_SAVEABLE,
        Status::CONNECT_FORMAT,
        Status::CONNECT_PARAMETER,
        Status::COMPARE_FAILURE,
        Status::ABORT_REQUESTED,
    ] {
        assert!(seen.statuses.contains_key(&status.code()), "{status} was never reached");
    }
}

/// A host and a target in one thread, with a wire between them that flips bits.
struct Noisy {
    raw: Raw,
    host: Multipath,
    rng: Rng,
    /// Bytes that each direction of a connection has carried; the first 128 are without digest.
    carried: BTreeMap<(u64, bool), usize>,
    bits_per_flip: usize,
    flips: u64,
    done: BTreeMap<OperationId, Vec<u8>>,
    failed: BTreeSet<OperationId>,
}

impl Noisy {
    fn carry(&mut self, connection: u64, to_host: bool, bytes: &[u8]) -> Vec<u8> {
        let carried = self.carried.entry((connection, to_host)).or_default();
        let mut out = bytes.to_vec();
        for byte in &mut out {
            *carried += 1;
            if *carried > 128 && self.bits_per_flip != 0 && self.rng.one_in(self.bits_per_flip / 8)
            {
                self.flips += 1;
                *byte ^= 1 << self.rng.below(8);
            }
        }
        out
    }

    fn host_effects(&mut self, effects: Vec<HostEffect>) {
        for effect in effects {
            let mut more = Vec::new();
            match effect {
                HostEffect::Open(id, _) => {
                    let mut effects = Vec::new();
                    let open = self.raw.target.open(id, self.raw.now, &mut effects);
                    open.expect("room");
                    self.target_effects(effects);
                    self.host.opened(id, self.raw.now, &mut more);
                }
                HostEffect::Send(id) => {
                    let mut out = Vec::new();
                    while self.host.take_output(id, &mut out) {}
                    let bytes = self.carry(id.0, false, &out.concat());
                    let mut effects = Vec::new();
                    let now = self.raw.now;
                    self.raw.target.input(id, bytes.into(), now, &mut effects);
                    self.target_effects(effects);
                }
                HostEffect::Close(id, _) => {
                    let mut effects = Vec::new();
                    self.raw.target.closed(id, &mut effects);
                    self.target_effects(effects);
                    self.host.closed(id, self.raw.now, &mut more);
                }
                HostEffect::Completed(id, Ok(data)) => {
                    self.done.insert(id, data.concat());
                }
                // Data that came broken several times in a row: the user is told that, not less.
                HostEffect::Completed(id, Err(OperationError::Status(status))) => {
                    assert!(status.same(Status::TRANSIENT_TRANSPORT), "{id:?}: {status}");
                    self.failed.insert(id);
                }
                HostEffect::Completed(id, Err(error)) => panic!("{id:?}: {error}"),
                HostEffect::Compute(..) => unreachable!("nobody has a secret"),
                HostEffect::Geometry(_) | HostEffect::Path(..) | HostEffect::SentAgain(_) => {}
            }
            self.host_effects(more);
        }
    }

    fn target_effects(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send(id) => {
                    let (mut out, mut more) = (Vec::new(), Vec::new());
                    self.raw.target.take_output(id, self.raw.now, &mut out, &mut more);
                    let bytes = self.carry(id.0, true, &out.concat());
                    let mut effects = Vec::new();
                    self.host.input(id, Bytes::from(bytes), self.raw.now, &mut effects);
                    self.target_effects(more);
                    self.host_effects(effects);
                }
                Effect::Close(id, ..) => {
                    let mut effects = Vec::new();
                    self.host.closed(id, self.raw.now, &mut effects);
                    self.host_effects(effects);
                }
                other => {
                    // H3: a host's new association ends its older one.
                    if let Effect::HostConnect(_, association, _) = &other {
                        let older: Vec<_> = self
                            .raw
                            .hosts
                            .keys()
                            .filter(|id| *id != association)
                            .copied()
                            .collect();
                        for id in older {
                            self.raw.hosts.remove(&id);
                            let mut effects = Vec::new();
                            self.raw.target.end(id, &mut effects);
                            self.target_effects(effects);
                        }
                    }
                    let more = self.raw.execute_outside(other);
                    self.target_effects(more);
                }
            }
        }
    }

    /// Runs until all operations are done, or so many milliseconds have passed.
    fn run(&mut self, milliseconds: u64, count: usize) {
        for _ in 0..milliseconds {
            if self.done.len() + self.failed.len() >= count {
                return;
            }
            self.raw.now = self.raw.now + Duration::from_millis(1);
            let mut effects = Vec::new();
            self.host.tick(self.raw.now, &mut effects);
            self.host_effects(effects);
            let mut effects = Vec::new();
            self.raw.target.tick(self.raw.now, &mut effects);
            self.target_effects(effects);
        }
    }
}

#[test]
fn flipped_bits_reach_nobody() {
    let cases = number_from("TERCET_NVMF_FUZZ_CASES", 6_000) / 100;
    let started = std::time::Instant::now();
    let (mut flips, mut operations) = (0, 0);
    for case in 0..cases {
        let mut options = HostOptions::new(&volume_nqn(volume()), HOST_NQN, [9; 16]);
        options.endpoints = vec!["127.0.0.1:4420".parse().expect("an address")];
        options.digests = Digests { header: true, data: true };
        let raw = Raw::sized(BLOCKS);
        let host = Multipath::new(options, case, raw.now);
        let mut noisy = Noisy {
            raw,
            host,
            rng: Rng(case),
            carried: BTreeMap::new(),
            bits_per_flip: 8 * (60_000 + 10_000 * (case as usize % 16)),
            flips: 0,
            done: BTreeMap::new(),
            failed: BTreeSet::new(),
        };
        let stamp = |at: u64| (at as u8).wrapping_mul(7).wrapping_add(case as u8) | 1;
        let range = |at: u64| BlockRange { start: at * 8, count: 8 };
        for at in 0..40 {
            let data = Bytes::from(vec![stamp(at); 8 * BLOCK_BYTES]);
            let mut effects = Vec::new();
            let write = Operation::Write(range(at), data);
            noisy.host.submit(OperationId(at), write, noisy.raw.now, &mut effects).expect("taken");
            noisy.host_effects(effects);
        }
        noisy.run(5_000, 40);
        noisy.bits_per_flip *= 2;
        for at in 0..40u64 {
            if !noisy.done.contains_key(&OperationId(at)) {
                continue;
            }
            let mut effects = Vec::new();
            let read = Operation::Read(range(at));
            let id = OperationId(100 + at);
            noisy.host.submit(id, read, noisy.raw.now, &mut effects).expect("taken");
            noisy.host_effects(effects);
        }
        noisy.run(5_000, 80);
        noisy.bits_per_flip = 0;
        noisy.run(20_000, 80);
        for at in 0..40u64 {
            let Some(data) = noisy.done.get(&OperationId(100 + at)) else { continue };
            assert!(data.len() == 8 * BLOCK_BYTES && data.iter().all(|byte| *byte == stamp(at)));
        }
        let blocks = &noisy.raw.blocks;
        for at in (0..40u64).filter(|at| noisy.done.contains_key(&OperationId(*at))) {
            let bytes = &blocks[at as usize * 8 * BLOCK_BYTES..][..8 * BLOCK_BYTES];
            assert!(bytes.iter().all(|byte| *byte == stamp(at)), "case {case}: block {at}");
        }
        let written = (0..40).filter(|at| noisy.done.contains_key(&OperationId(*at))).count();
        let failed = noisy.failed.iter().filter(|id| id.0 < 40).count();
        assert_eq!(written + failed, 40, "case {case}: a quiet wire brings everything");
        flips += noisy.flips;
        operations += noisy.done.len() as u64;
    }
    assert!(flips > cases * 5, "{flips} bits were flipped");
    assert!(operations > cases * 60, "{operations} operations were done all the same");
    evidence("nvmf_flipped_bits", flips, started);
    evidence("nvmf_operations_over_flipped_bits", operations, started);
}
