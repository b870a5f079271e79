//! Bytes from outside: whatever comes, nothing panics, memory stays bounded, and the other
//! connections of a target go on. Sessions are made of what a real host sends, mutated.

#[path = "support/memory.rs"]
mod memory;
#[path = "support/raw.rs"]
mod raw;

use bytes::Bytes;
use proptest::prelude::*;
use raw::{BLOCKS, ENABLED, capsule, hello, property_set, volume};
use tercet_nvmf::command::{Data, Entry, admin, feature, io};
use tercet_nvmf::fabrics::{PropertyEntry, property};
use tercet_nvmf::host::{HostEffect, HostOptions, Multipath, Operation, OperationId};
use tercet_nvmf::names::volume_nqn;
use tercet_nvmf::pdu::Digests;
use tercet_nvmf::target::{
    Ana, CntlidRange, Command, ConnectionId, Done, Effect, OUTPUT_BYTES_MAX, TRANSFER_BUDGET_BYTES,
    Target,
};
use tercet_nvmf::{BLOCK_BYTES, NSID, TRANSFER_BYTES_MAX};
use tercet_proto::{BlockRange, Instant};

const NOW: Instant = raw::START;

fn target() -> Target {
    let mut target = Target::new(1);
    target.add_volume(volume(), BLOCKS, Ana::Optimized, CntlidRange::of_member(0));
    target
}

fn connect(queue: u16, cntlid: u16, digests: Digests) -> Vec<u8> {
    let (entry, data) = raw::connect(&volume_nqn(volume()), raw::HOST_NQN, queue, cntlid, false);
    capsule(entry, &data, digests)
}

fn admin_session(digests: Digests) -> Vec<Vec<u8>> {
    let bare = |entry| capsule(entry, &[], digests);
    let mut pdus = vec![hello(digests), connect(0, 0xffff, digests)];
    let get = PropertyEntry { wide: true, offset: property::CAP, value: 0 };
    pdus.push(bare(get.get(0)));
    pdus.push(bare(property_set(ENABLED)));
    for (id, which) in [(2, 0), (3, 1), (4, 2), (5, 3), (6, 6), (7, 8)] {
        let mut entry = Entry::new(admin::IDENTIFY, id);
        entry.set_nsid(u32::from(which != 1));
        entry.set_dword(10, which);
        entry.set_data(Data::Transport(4096));
        pdus.push(bare(entry));
    }
    for (id, page) in [(8, 1u32), (9, 2), (10, 3), (11, 4), (12, 5), (13, 0xc)] {
        let mut entry = Entry::new(admin::GET_LOG_PAGE, id);
        entry.set_dword(10, page | 127 << 16);
        entry.set_data(Data::Transport(512));
        pdus.push(bare(entry));
    }
    let mut entry = Entry::new(admin::SET_FEATURES, 14);
    entry.set_dword(10, u32::from(feature::QUEUE_COUNT));
    entry.set_dword(11, 0x0001_0001);
    pdus.push(bare(entry));
    for opcode in [admin::ASYNC_EVENT, admin::KEEP_ALIVE, admin::ABORT] {
        pdus.push(bare(Entry::new(opcode, 15 + u16::from(opcode))));
    }
    pdus
}

fn io_session(cntlid: u16, digests: Digests) -> Vec<Vec<u8>> {
    let mut pdus = vec![hello(digests), connect(1, cntlid, digests)];
    let command = |opcode, id, count: u32| {
        let mut entry = Entry::new(opcode, id);
        entry.set_nsid(NSID);
        entry.set_range(u64::from(id), count);
        entry
    };
    pdus.push(capsule(command(io::WRITE, 1, 1), &[7; BLOCK_BYTES], digests));
    for (opcode, id, count) in [(io::READ, 2, 4), (io::WRITE, 3, 64), (io::COMPARE, 4, 64)] {
        let mut entry = command(opcode, id, count);
        entry.set_data(Data::Transport(count * BLOCK_BYTES as u32));
        pdus.push(capsule(entry, &[], digests));
    }
    pdus.push(capsule(command(io::WRITE_ZEROES, 5, 100), &[], digests));
    pdus.push(capsule(command(io::FLUSH, 6, 1), &[], digests));
    let mut entry = Entry::new(io::DATASET_MANAGEMENT, 7);
    entry.set_nsid(NSID);
    entry.set_dword(10, 1);
    entry.set_dword(11, 4);
    pdus.push(capsule(entry, &[1; 32], digests));
    pdus
}

/// Carries out effects as an engine would; what is sent is dropped. Returns closed connections.
fn execute(target: &mut Target, effects: Vec<Effect>) -> Vec<ConnectionId> {
    let (mut next, mut closed) = (effects, Vec::new());
    while !next.is_empty() {
        let mut more = Vec::new();
        for effect in next {
            match effect {
                Effect::Send(id) => {
                    let mut out = Vec::new();
                    target.take_output(id, NOW, &mut out, &mut more);
                    let bytes: usize = out.iter().map(Bytes::len).sum();
                    assert!(bytes <= OUTPUT_BYTES_MAX + TRANSFER_BUDGET_BYTES);
                }
                Effect::Close(id, ..) => closed.push(id),
                Effect::HostConnect(_, association, _) => {
                    target.accepted(association, Ok(()), NOW, &mut more);
                }
                Effect::HostCommand(association, token, command) => {
                    let done = match command {
                        Command::Read(range) => {
                            assert!(range.end() <= BLOCKS, "checked before it is handed out");
                            Done::Data(vec![Bytes::from(vec![0; range.bytes()])])
                        }
                        Command::Write(range, data) | Command::Compare(range, data) => {
                            assert!(range.end() <= BLOCKS && data.len() == range.bytes());
                            Done::Ok
                        }
                        Command::CompareWrite(range, expected, data) => {
                            assert!(range.end() <= BLOCKS && data.len() == range.bytes());
                            assert_eq!(expected.len(), data.len());
                            Done::Differs(range.start)
                        }
                        Command::Zero(range, _) => {
                            assert!(range.end() <= BLOCKS && range.count > 0);
                            Done::Ok
                        }
                        Command::Flush => Done::Ok,
                    };
                    target.done(association, token, Ok(done), NOW, &mut more);
                }
                Effect::Compute(..) => unreachable!("no host has a secret"),
                Effect::Elsewhere(id, _) => target.refuse(id, &mut more),
                Effect::HostGone(_) | Effect::HostReadAna(_) => {}
            }
        }
        next = more;
    }
    closed
}

/// Feeds PDUs one after the other, as a host does that waits for answers.
fn feed_all(target: &mut Target, id: ConnectionId, pdus: &[Vec<u8>], chunk_bytes: usize) -> bool {
    let mut is_closed = false;
    for pdu in pdus {
        is_closed |= feed(target, id, pdu, chunk_bytes);
    }
    is_closed
}

/// Feeds bytes in chunks; true when the connection was closed.
fn feed(target: &mut Target, id: ConnectionId, bytes: &[u8], chunk_bytes: usize) -> bool {
    let mut is_closed = false;
    for chunk in bytes.chunks(chunk_bytes.max(1)) {
        let mut effects = Vec::new();
        target.input(id, Bytes::copy_from_slice(chunk), NOW, &mut effects);
        is_closed |= execute(target, effects).contains(&id);
        assert!(target.missing_bytes(id) <= TRANSFER_BYTES_MAX + 256);
    }
    is_closed
}

/// A live association: admin queue 1, I/O queue 2.
fn live(digests: Digests) -> Target {
    let mut target = target();
    for (id, session) in [(1, admin_session(digests)), (2, io_session(1, digests))] {
        target.open(ConnectionId(id), NOW, &mut Vec::new()).expect("room");
        assert!(!feed_all(&mut target, ConnectionId(id), &session, 1 << 20));
    }
    target
}

/// Whether the association that [`live`] made still answers.
fn answers(target: &mut Target) -> bool {
    let mut entry = Entry::new(io::FLUSH, 99);
    entry.set_nsid(NSID);
    let mut effects = Vec::new();
    let bytes = Bytes::from(capsule(entry, &[], Digests::default()));
    target.input(ConnectionId(2), bytes, NOW, &mut effects);
    let is_handed_out =
        effects.iter().any(|effect| matches!(effect, Effect::HostCommand(_, _, Command::Flush)));
    execute(target, effects);
    is_handed_out
}

#[derive(Clone, Debug)]
enum Mutation {
    Flip(usize, u8),
    Cut(usize, usize),
    Repeat(usize),
    Insert(usize, Vec<u8>),
}

/// Mutates one PDU; `at` chooses which, and where in it.
fn mutate(pdus: &mut Vec<Vec<u8>>, mutation: Mutation) {
    let count = pdus.len();
    match mutation {
        Mutation::Flip(at, mask) => {
            let pdu = &mut pdus[at % count];
            let place = at / count % pdu.len().max(1);
            if let Some(byte) = pdu.get_mut(place) {
                *byte ^= mask;
            }
        }
        Mutation::Cut(at, bytes) => {
            let pdu = &mut pdus[at % count];
            let place = at / count % pdu.len().max(1);
            pdu.drain(place..(place + bytes).min(pdu.len()));
        }
        Mutation::Repeat(index) => pdus.insert(index % count, pdus[index % count].clone()),
        Mutation::Insert(at, what) => {
            let pdu = &mut pdus[at % count];
            let place = at / count % pdu.len().max(1);
            pdu.splice(place..place, what);
        }
    }
}

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    let one = prop_oneof![
        (any::<usize>(), 1u8..).prop_map(|(at, mask)| Mutation::Flip(at, mask)),
        // Headers are where a flip does most.
        (0usize..1500, 1u8..).prop_map(|(at, mask)| Mutation::Flip(at, mask)),
        (any::<usize>(), 1usize..200).prop_map(|(at, count)| Mutation::Cut(at, count)),
        any::<usize>().prop_map(Mutation::Repeat),
        (any::<usize>(), prop::collection::vec(any::<u8>(), 1..100))
            .prop_map(|(at, what)| Mutation::Insert(at, what)),
    ];
    prop::collection::vec(one, 1..4)
}

fn digests() -> impl Strategy<Value = Digests> {
    (any::<bool>(), any::<bool>()).prop_map(|(header, data)| Digests { header, data })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_end_their_connection_only(
        bytes in prop::collection::vec(any::<u8>(), 8..2000),
        chunk_bytes in 1usize..500,
    ) {
        prop_assume!(bytes[..8] != [0, 0, 128, 0, 128, 0, 0, 0]);
        let mut target = live(Digests::default());
        target.open(ConnectionId(3), NOW, &mut Vec::new()).expect("room");
        prop_assert!(feed(&mut target, ConnectionId(3), &bytes, chunk_bytes));
        prop_assert!(answers(&mut target));
    }

    #[test]
    fn a_mutated_admin_session_is_survived(
        digests in digests(), mutations in mutations(), chunk_bytes in 1usize..5000,
    ) {
        let mut target = live(Digests::default());
        let mut pdus = admin_session(digests);
        for mutation in mutations {
            mutate(&mut pdus, mutation);
        }
        target.open(ConnectionId(3), NOW, &mut Vec::new()).expect("room");
        feed_all(&mut target, ConnectionId(3), &pdus, chunk_bytes);
        prop_assert!(answers(&mut target));
    }

    #[test]
    fn a_mutated_io_session_is_survived(
        digests in digests(), mutations in mutations(), chunk_bytes in 1usize..5000,
    ) {
        let mut target = target();
        target.open(ConnectionId(1), NOW, &mut Vec::new()).expect("room");
        feed_all(&mut target, ConnectionId(1), &admin_session(digests), 1 << 20);
        let mut pdus = io_session(1, digests);
        for mutation in mutations {
            mutate(&mut pdus, mutation);
        }
        target.open(ConnectionId(2), NOW, &mut Vec::new()).expect("room");
        feed_all(&mut target, ConnectionId(2), &pdus, chunk_bytes);
    }

    #[test]
    fn a_host_survives_what_a_controller_sends(
        mut bytes in prop::collection::vec(any::<u8>(), 0..600),
        begins_well in any::<bool>(),
        chunk_bytes in 1usize..300,
    ) {
        let mut options =
            HostOptions::new(&volume_nqn(volume()), "nqn.2026-11.io.tercet:host:fuzz", [9; 16]);
        options.endpoints = vec!["127.0.0.1:4420".parse().expect("an address")];
        let mut host = Multipath::new(options, 1, NOW);
        let mut effects = Vec::new();
        host.submit(OperationId(0), Operation::Read(BlockRange { start: 0, count: 1 }), NOW,
            &mut effects).expect("taken");
        host.tick(NOW, &mut effects);
        if begins_well {
            let response = tercet_nvmf::pdu::IcResp {
                format: 0, controller_alignment: 0, digests: 0, data_bytes_max: 1 << 20,
            };
            bytes.splice(0..0, response.to_wire());
        }
        let id = effects.iter().find_map(|effect| match effect {
            HostEffect::Open(id, _) => Some(*id),
            _ => None,
        }).expect("it connects");
        host.opened(id, NOW, &mut effects);
        for chunk in bytes.chunks(chunk_bytes) {
            host.input(id, Bytes::copy_from_slice(chunk), NOW, &mut effects);
        }
        let ended = effects.iter().any(|effect| matches!(effect, HostEffect::Completed(..)));
        prop_assert!(!ended, "an operation waits whatever a broken controller says");
    }
}

#[test]
fn a_session_that_is_whole_is_taken_whole() {
    for (header, data) in [(false, false), (true, true)] {
        let mut target = live(Digests { header, data });
        assert!(header || answers(&mut target));
    }
}
