//! The user-space host against the target over loopback sockets, volume in memory.
//!
//! Both ends are ours: what they misread alike is left to tests/golden.rs (layouts written down
//! by hand) and to a foreign host (docs/nvme-tcp.md says which, and how).

#[path = "support/memory.rs"]
mod memory;
mod support;

use std::time::Duration;

use bytes::Bytes;
use support::client::{Client, for_a_while, options, run, until};
use support::{Node, now, volume};
use tercet_nvmf::host::{HostOptions, Operation, OperationError, PathState};
use tercet_nvmf::log::AnaState;
use tercet_nvmf::pdu::Digests;
use tercet_nvmf::status::Status;
use tercet_nvmf::target::{Ana, CloseReason, Refusal};
use tercet_nvmf::{BLOCK_BYTES, IN_CAPSULE_BYTES_MAX, TRANSFER_BYTES_MAX};
use tercet_proto::BlockRange;

const BLOCKS: u64 = 2048;

fn range(start: u64, count: u32) -> BlockRange {
    BlockRange { start, count }
}

fn pattern(seed: u8, count: u32) -> Bytes {
    let bytes = count as usize * BLOCK_BYTES;
    (0..bytes).map(|at| (at / 7) as u8 ^ seed.wrapping_add((at >> 12) as u8)).collect()
}

fn live(nodes: &mut [Node], options: HostOptions) -> Client {
    let mut client = Client::new(options);
    let count = nodes.len();
    until(nodes, &mut client, "all paths are live", |_, client| {
        let paths = client.host.paths();
        paths.len() == count && paths.iter().all(|(_, state)| matches!(state, PathState::Live(_)))
    });
    client
}

fn alone() -> Vec<Node> {
    vec![Node::new(0, BLOCKS, Ana::Optimized)]
}

/// Every size class: in the capsule, just above it, odd, and the longest transfer.
fn write_and_read_back(nodes: &mut [Node], client: &mut Client) {
    let in_capsule = (IN_CAPSULE_BYTES_MAX / BLOCK_BYTES) as u32;
    let longest = (TRANSFER_BYTES_MAX / BLOCK_BYTES) as u32;
    for (seed, count) in [(1, 1), (2, in_capsule), (3, in_capsule + 1), (4, 37), (5, longest)] {
        let data = pattern(seed, count);
        let at = range(u64::from(seed) * 300, count);
        assert_eq!(run(nodes, client, Operation::Write(at, data.clone())), Ok(vec![]));
        assert_eq!(run(nodes, client, Operation::Read(at)), Ok(data.to_vec()));
        let bytes = at.start as usize * BLOCK_BYTES..at.end() as usize * BLOCK_BYTES;
        assert_eq!(nodes[0].blocks[bytes], data[..]);
    }
}

#[test]
fn what_is_written_is_read_whatever_the_digests() {
    for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut nodes = alone();
        let mut options = options(&nodes);
        options.digests = Digests { header, data };
        let mut client = live(&mut nodes, options);
        let geometry = client.geometry.expect("the volume is known");
        assert_eq!(geometry.blocks, BLOCKS);
        assert_eq!(geometry.transfer_bytes_max, TRANSFER_BYTES_MAX);
        assert_eq!(geometry.nguid, *volume().as_bytes());
        write_and_read_back(&mut nodes, &mut client);
        assert!(nodes[0].closed.is_empty(), "{:?}", nodes[0].closed);
    }
}

#[test]
fn pdus_may_be_torn_anywhere() {
    let mut nodes = alone();
    nodes[0].receive_bytes = 1013;
    let mut options = options(&nodes);
    options.digests = Digests { header: true, data: true };
    let mut client = Client::new(options);
    client.receive_bytes = 997;
    until(&mut nodes, &mut client, "the volume is known", |_, client| client.geometry.is_some());
    write_and_read_back(&mut nodes, &mut client);
}

#[test]
fn other_commands_do_what_they_say() {
    let mut nodes = alone();
    let options = options(&nodes);
    let mut client = live(&mut nodes, options);
    let data = pattern(9, 8);
    let at = range(16, 8);
    run(&mut nodes, &mut client, Operation::Write(at, data.clone())).expect("written");
    run(&mut nodes, &mut client, Operation::Flush).expect("a barrier");
    run(&mut nodes, &mut client, Operation::Compare(at, data.clone())).expect("equal");
    let other = run(&mut nodes, &mut client, Operation::Compare(at, pattern(8, 8)));
    assert!(
        matches!(other, Err(OperationError::Status(status)) if status.same(Status::COMPARE_FAILURE))
    );
    run(&mut nodes, &mut client, Operation::WriteZeroes(range(16, 2), false)).expect("zeroed");
    run(&mut nodes, &mut client, Operation::Deallocate(range(22, 2))).expect("given back");
    let read = run(&mut nodes, &mut client, Operation::Read(at)).expect("read");
    let edge = 2 * BLOCK_BYTES;
    assert!(read[..edge].iter().chain(&read[6 * BLOCK_BYTES..]).all(|&byte| byte == 0));
    assert_eq!(read[edge..6 * BLOCK_BYTES], data[edge..6 * BLOCK_BYTES]);
    let beyond = run(&mut nodes, &mut client, Operation::Read(range(BLOCKS - 1, 2)));
    assert!(
        matches!(beyond, Err(OperationError::Status(status)) if status.same(Status::LBA_RANGE))
    );
}

#[test]
fn more_operations_than_the_queue_has_entries_all_end() {
    let mut nodes = alone();
    let mut options = options(&nodes);
    options.io_queues = 2;
    options.queue_entries = 16;
    let mut client = live(&mut nodes, options);
    let data = pattern(3, 64);
    let ids: Vec<_> = (0..200)
        .map(|index| client.submit(Operation::Write(range(index % 16 * 64, 64), data.clone())))
        .collect();
    until(&mut nodes, &mut client, "all are written", |_, client| {
        ids.iter().all(|id| client.completed.contains_key(id))
    });
    assert!(client.completed.values().all(Result::is_ok));
    assert_eq!(nodes[0].connections(), 3);
}

#[test]
fn operations_wait_for_a_primary_and_follow_it() {
    let mut nodes: Vec<_> =
        (0..3).map(|index| Node::new(index, BLOCKS, Ana::Inaccessible)).collect();
    let options = options(&nodes);
    let mut client = live(&mut nodes, options);
    let data = pattern(1, 1);
    let first = client.submit(Operation::Write(range(0, 1), data.clone()));
    for_a_while(&mut nodes, &mut client, Duration::from_millis(300));
    assert!(!client.completed.contains_key(&first), "no member serves");
    nodes[1].set_ana(Ana::Change);
    nodes[1].set_ana(Ana::Optimized);
    until(&mut nodes, &mut client, "the primary takes it", |_, client| {
        client.completed.contains_key(&first)
    });
    assert_eq!(nodes[1].blocks[..BLOCK_BYTES], data[..]);
    assert_eq!((nodes[0].commands, nodes[2].commands), (0, 0), "H2: nobody else queues it");
    assert!(nodes[1].ana_reads >= 2, "H4: the log was read after the promotion");

    // An orderly hand-over: commands are answered inaccessible, another serves.
    nodes[1].holds = true;
    let second = client.submit(Operation::Write(range(1, 1), data.clone()));
    until(&mut nodes, &mut client, "it arrives", |nodes, _| nodes[1].commands == 2);
    nodes[1].set_ana(Ana::Inaccessible);
    nodes[1].fail_held();
    nodes[2].set_ana(Ana::Optimized);
    until(&mut nodes, &mut client, "the new primary takes it", |_, client| {
        client.completed.contains_key(&second)
    });
    assert_eq!(nodes[2].blocks[BLOCK_BYTES..2 * BLOCK_BYTES], data[..]);
    assert!(client.completed.values().all(Result::is_ok));
}

#[test]
fn a_primary_that_does_not_answer_is_left_when_another_serves() {
    let mut nodes: Vec<_> =
        (0..2).map(|index| Node::new(index, BLOCKS, Ana::Inaccessible)).collect();
    nodes[0].set_ana(Ana::Optimized);
    let options = options(&nodes);
    let mut client = live(&mut nodes, options);
    nodes[0].holds = true; // SIGSTOP: its sockets stay open
    let id = client.submit(Operation::Write(range(5, 1), pattern(5, 1)));
    until(&mut nodes, &mut client, "it arrives", |nodes, _| nodes[0].commands == 1);
    let start = now();
    nodes[1].set_ana(Ana::Optimized);
    until(&mut nodes, &mut client, "it is sent elsewhere", |_, client| {
        client.completed.contains_key(&id)
    });
    assert!(now().since(start) < Duration::from_millis(500));
    assert_eq!(nodes[1].commands, 1);
    assert_eq!(nodes[0].blocks[5 * BLOCK_BYTES], 0, "the old primary never ran it");
}

#[test]
fn a_killed_primary_costs_a_retry_and_no_error() {
    let mut nodes = alone();
    let mut options = options(&nodes);
    options.io_queues = 2;
    let mut client = live(&mut nodes, options);
    for round in 0..3u64 {
        nodes[0].holds = true;
        let ids: Vec<_> = (0..20)
            .map(|index| {
                let count = if index % 2 == 0 { 1 } else { 32 };
                client.submit(Operation::Write(range(index * 32, count), pattern(1, count)))
            })
            .collect();
        let before = nodes[0].commands;
        until(&mut nodes, &mut client, "some arrive", |nodes, _| nodes[0].commands > before);
        nodes[0].kill();
        nodes[0].holds = false;
        let start = now();
        until(&mut nodes, &mut client, "all end", |_, client| {
            ids.iter().all(|id| client.completed.contains_key(id))
        });
        assert!(now().since(start) < Duration::from_millis(500), "round {round}");
        assert!(client.completed.values().all(Result::is_ok));
    }
}

#[test]
fn an_ended_association_is_made_anew() {
    let mut nodes = alone();
    let options = options(&nodes);
    let mut client = live(&mut nodes, options);
    nodes[0].end_associations(); // H4
    assert!(nodes[0].closed.iter().all(|&reason| reason == CloseReason::Ended));
    let data = run(&mut nodes, &mut client, Operation::Read(range(0, 1))).expect("read");
    assert_eq!(data.len(), BLOCK_BYTES);
    assert_eq!(nodes[0].hosts.len(), 1);
}

#[test]
fn a_host_that_falls_silent_is_forgotten() {
    let mut nodes = alone();
    let mut options = options(&nodes);
    options.keep_alive = Duration::from_millis(400);
    let mut client = live(&mut nodes, options);
    for_a_while(&mut nodes, &mut client, Duration::from_millis(1500));
    assert!(nodes[0].closed.is_empty(), "an idle host that lives keeps its association");
    client.is_stopped = true;
    until(&mut nodes, &mut client, "it expires", |nodes, _| nodes[0].hosts.is_empty());
    assert!(nodes[0].closed.contains(&CloseReason::KeepAlive));
}

#[test]
fn a_member_that_falls_silent_is_left() {
    let mut nodes = alone();
    let mut options = options(&nodes);
    options.keep_alive = Duration::from_millis(400);
    let mut client = live(&mut nodes, options);
    until(&mut [], &mut client, "Keep Alive is missed", |_, client| {
        client
            .path_events
            .iter()
            .any(|(_, _, why)| why.as_deref().is_some_and(|why| why.contains("Keep Alive")))
    });
}

#[test]
fn the_volume_grows_under_the_host() {
    let mut nodes = alone();
    let options = options(&nodes);
    let mut client = live(&mut nodes, options);
    for blocks in [BLOCKS * 2, BLOCKS * 3] {
        nodes[0].grow(blocks);
        until(&mut nodes, &mut client, "the host hears of it", |_, client| {
            client.geometry.is_some_and(|geometry| geometry.blocks == blocks)
        });
    }
    run(&mut nodes, &mut client, Operation::Read(range(BLOCKS * 3 - 1, 1))).expect("read");
}

#[test]
fn a_refused_host_tries_again_and_is_let_in() {
    for refusal in [Refusal::NotAllowed, Refusal::NoVolume] {
        let mut nodes = alone();
        nodes[0].refusal = Some(refusal);
        let mut client = Client::new(options(&nodes));
        until(&mut nodes, &mut client, "it is refused twice", |_, client| {
            let refused = client.path_events.iter().filter(|(_, _, why)| {
                why.as_deref().is_some_and(|why| why.contains("Connect failed"))
            });
            refused.count() >= 2
        });
        nodes[0].refusal = None;
        until(&mut nodes, &mut client, "it is let in", |_, client| client.geometry.is_some());
    }
}

#[test]
fn endpoints_come_and_go() {
    let mut nodes: Vec<_> = (0..2).map(|index| Node::new(index, BLOCKS, Ana::Optimized)).collect();
    let mut first = options(&nodes);
    let all = std::mem::take(&mut first.endpoints);
    first.endpoints = vec![all[0]];
    let mut client = Client::new(first);
    until(&mut nodes, &mut client, "live", |_, client| client.geometry.is_some());
    let mut effects = Vec::new();
    client.host.set_endpoints(&all[1..], now(), &mut effects);
    client.execute(effects);
    run(&mut nodes, &mut client, Operation::Write(range(0, 1), pattern(1, 1))).expect("written");
    assert_eq!(client.host.paths().len(), 1);
    assert_eq!(nodes[1].commands, 1);
    assert!(nodes[0].hosts.is_empty());
}

#[test]
fn detaching_ends_what_waits_and_closes_everything() {
    let mut nodes = vec![Node::new(0, BLOCKS, Ana::Inaccessible)];
    let options = options(&nodes);
    let mut client = live(&mut nodes, options);
    let id = client.submit(Operation::Flush);
    client.detach();
    assert_eq!(client.completed[&id], Err(OperationError::Detached));
    assert!(client.host.is_ended());
    until(&mut nodes, &mut client, "the member hears", |nodes, _| nodes[0].connections() == 0);
}

#[test]
fn the_second_association_of_a_host_ends_the_first() {
    let mut nodes = alone();
    let mut first = {
        let options = options(&nodes);
        live(&mut nodes, options)
    };
    let mut second = Client::new(options(&nodes));
    until(&mut nodes, &mut second, "H3", |nodes, client| {
        client.geometry.is_some() && nodes[0].closed.contains(&CloseReason::Ended)
    });
    assert!(nodes[0].hosts.len() == 1);
    first.is_stopped = true;
    assert!(matches!(first.host.paths()[0].1, PathState::Live(AnaState::Optimized)));
}
