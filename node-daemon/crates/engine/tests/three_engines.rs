//! Three real engines, real sockets, real files, the user-space host; only the objects are in
//! memory. What a host was told is written is there, whoever is killed.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::agent::Client;
use common::hosts::{HOST, attach, check, range, with_host, write};
use common::{Cluster, blocking};
use tercet_engine::host::{Host, Operation};
use tercet_engine::pb::engine as pb;
use tercet_proto::BLOCK_BYTES;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn acknowledged_writes_survive_the_primary_and_all_replicas_become_equal() {
    let cluster = Cluster::start("failover");
    let volume = cluster.create_volume(64 * MIB, HOST).await;
    let mut primary = cluster.wait_serving(volume, None).await;
    let host = attach(&cluster, volume).await;
    for round in 1..=3_u64 {
        let first = move |host: &Host| (0..100).for_each(|block| write(host, block, round));
        with_host(&host, first).await;
        cluster.nodes[primary].kill_engine();
        let second = move |host: &Host| {
            let mut longest = Duration::ZERO;
            for block in 100..200 {
                let begun = Instant::now();
                write(host, block, round);
                longest = longest.max(begun.elapsed());
            }
            (0..200).for_each(|block| check(host, block, round));
            longest
        };
        let longest = with_host(&host, second).await;
        println!("round {round}: longest stall {longest:?}");
        assert!(longest < Duration::from_secs(10), "{longest:?} {}", cluster.logs());
        primary = cluster.wait_serving(volume, None).await;
    }
    let sums = cluster.equal_sums(volume).await;
    assert!(!sums.is_empty(), "something was written");
}

/// The primary's node is lost again and again, and comes back each time: the next to lose is the one
/// that took over, and who takes over then has come back last.
#[tokio::test]
async fn nodes_that_are_lost_one_after_the_other_and_come_back() {
    let mut cluster = Cluster::start("lost");
    let volume = cluster.create_volume(64 * MIB, HOST).await;
    let host = attach(&cluster, volume).await;
    for trial in 1..=3_u64 {
        let primary = cluster.wait_serving(volume, None).await;
        let first = move |host: &Host| (0..20).for_each(|block| write(host, block, trial));
        with_host(&host, first).await;
        cluster.lose(primary);
        let lost = Instant::now();
        let second = move |host: &Host| write(host, 21, trial);
        with_host(&host, second).await;
        let stall = lost.elapsed();
        println!("trial {trial}: {primary} is lost, a stall of {stall:?}");
        assert!(stall < Duration::from_secs(4), "{stall:?} {}", cluster.logs());
        cluster.revive(primary);
        cluster.equal_sums(volume).await;
    }
}

#[tokio::test]
async fn a_snapshot_zeroes_and_large_writes_are_the_same_on_every_node() {
    let cluster = Cluster::start("kinds");
    let volume = cluster.create_volume(64 * MIB, HOST).await;
    cluster.wait_serving(volume, None).await;
    let host = attach(&cluster, volume).await;
    with_host(&host, |host| {
        let large = Bytes::from(vec![0x5a; 128 << 10]);
        for at in 0..16 {
            host.run(Operation::Write(range(at * 32, 32), large.clone())).expect("written");
        }
        host.run(Operation::WriteZeroes(range(8, 40), true)).expect("zeroed");
        host.run(Operation::Flush).expect("flushed");
        let read = host.run(Operation::Read(range(0, 64))).expect("read").concat();
        let zero = |block: usize| (8..48).contains(&block);
        for (block, bytes) in read.chunks(BLOCK_BYTES).enumerate() {
            let value = if zero(block) { 0 } else { 0x5a };
            assert!(bytes.iter().all(|&byte| byte == value), "block {block}");
        }
    })
    .await;
    let wanted =
        pb::SnapshotRequest { volume: volume.to_string(), snapshot: Uuid::new_v4().to_string() };
    let snapshot = |mut client: Client| {
        let wanted = wanted.clone();
        async move { client.create_snapshot(wanted).await }
    };
    let first = cluster.ask_primary(volume, snapshot).await;
    assert_eq!(first, cluster.ask_primary(volume, snapshot).await, "idempotent");
    // A machine that stands still for a second has a take-over: only while one node serves before
    // and after are the others known not to.
    let others = loop {
        let primary = cluster.wait_serving(volume, None).await;
        let mut others = Vec::new();
        for number in (0..3).filter(|&number| number != primary) {
            let client = cluster.agent_of(number).client().await.expect("a connection");
            others.push(snapshot(client).await);
        }
        if cluster.serving(volume).await == Some(primary) {
            break others;
        }
    };
    for other in others {
        let refused = other.expect_err("not the primary");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    }
    let sums = cluster.equal_sums(volume).await;
    assert!(!sums.is_empty());
}

/// What an API server takes for a swap: more than a host may wait, less than a hand-over may take.
const SWAP: Duration = Duration::from_millis(1500);

/// The longest write while `what` is done to the engines.
async fn longest_write(host: &Arc<Host>, what: impl Future<Output = ()>) -> Duration {
    let done = Arc::new(AtomicBool::new(false));
    let (ends, writer) = (Arc::clone(&done), Arc::clone(host));
    let writing = tokio::spawn(blocking(move || {
        let mut longest = Duration::ZERO;
        for block in (0..200).cycle() {
            if ends.load(Ordering::Relaxed) {
                return longest;
            }
            let begun = Instant::now();
            write(&writer, block, 1);
            longest = longest.max(begun.elapsed());
        }
        unreachable!("it cycles")
    }));
    what.await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    done.store(true, Ordering::Relaxed);
    writing.await.expect("it writes to its end")
}

/// T10: the member that follows swaps while the old primary serves.
#[tokio::test]
async fn a_host_waits_for_a_hand_over_and_not_for_the_api_server() {
    let cluster = Cluster::start("handover");
    let volume = cluster.create_volume(64 * MIB, HOST).await;
    let mut primary = cluster.wait_serving(volume, None).await;
    let host = attach(&cluster, volume).await;
    with_host(&host, |host| (0..200).for_each(|block| write(host, block, 1))).await;
    let swap_ms = u64::try_from(SWAP.as_millis()).expect("short");
    cluster.objects.swap_ms.store(swap_ms, Ordering::Relaxed);
    for step in [1, 2] {
        let to = (primary + step) % 3;
        let asked = async {
            let name = cluster.nodes[to].name.clone();
            let request = pb::HandOverRequest { volume: volume.to_string(), to_node: Some(name) };
            let mut client = cluster.agent_of(primary).client().await.expect("a connection");
            client.hand_over(request).await.expect("handed over");
        };
        let longest = longest_write(&host, asked).await;
        println!("handed over to node {to}: longest write {longest:?}");
        assert!(longest < SWAP, "{longest:?} {}", cluster.logs());
        assert_eq!(cluster.wait_serving(volume, None).await, to, "the one that was named");
        primary = to;
        tokio::time::sleep(SWAP * 2).await; // its swap to Active is answered
    }
    let stopped = async {
        cluster.nodes[primary].signal_engine(rustix::process::Signal::TERM);
        cluster.wait_serving(volume, Some(primary)).await;
    };
    let longest = longest_write(&host, stopped).await;
    println!("engine stopped: longest write {longest:?}");
    assert!(longest < SWAP, "{longest:?} {}", cluster.logs());
    with_host(&host, |host| (0..200).for_each(|block| check(host, block, 1))).await;
}

/// Volumes are spread over shards, shards over reactors: connections come in at the first reactor
/// and have to find their way.
#[tokio::test]
async fn connections_move_to_the_reactor_that_has_the_volume() {
    let cluster = Cluster::with_reactors("reactors", 2);
    let mut volumes = Vec::new();
    let mut regions = BTreeSet::new();
    for _ in 0..4 {
        let volume = cluster.create_volume(16 * MIB, HOST).await;
        let map = cluster.agent_of(0).chunk_map(volume).await.expect("a map");
        regions.insert(map.region);
        volumes.push(volume);
    }
    assert_eq!(regions, BTreeSet::from([0, 1]), "both shards have volumes");
    for &volume in &volumes {
        cluster.wait_serving(volume, None).await;
        let host = attach(&cluster, volume).await;
        let work = |host: &Host| {
            (0..20).for_each(|block| write(host, block, 3));
            (0..20).for_each(|block| check(host, block, 3));
        };
        with_host(&host, work).await;
    }
    for &volume in &volumes {
        assert!(!cluster.equal_sums(volume).await.is_empty());
    }
}

#[tokio::test]
async fn idle_engines_use_less_than_a_hundredth_of_a_core() {
    let cluster = Cluster::start("idle");
    let volume = cluster.create_volume(64 * MIB, HOST).await;
    cluster.wait_serving(volume, None).await;
    let host = attach(&cluster, volume).await;
    with_host(&host, |host| write(host, 1, 1)).await;
    // Engines that are kept waiting for a processor miss each other and take over, which is no
    // idling: one quiet stretch of several is enough, and a loop that spins has none.
    let time = Duration::from_secs(5);
    let mut most = Duration::MAX;
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before: Vec<Duration> = cluster.nodes.iter().map(cpu_time).collect();
        tokio::time::sleep(time).await;
        let used = cluster.nodes.iter().zip(before).map(|(n, was)| cpu_time(n).saturating_sub(was));
        most = used.max().expect("three engines");
        println!("an engine used {most:?} of CPU in {time:?}");
        if most <= time / 100 {
            break;
        }
    }
    assert!(most <= time / 100, "an engine used {most:?} in {time:?} {}", cluster.logs());
}

/// User and system time of a node's engine, in steps of the kernel's clock (10 ms).
fn cpu_time(node: &common::Node) -> Duration {
    let pid = node.engine_pid().expect("an engine runs");
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("its statistics");
    let after_name = stat.rsplit_once(") ").expect("a name in brackets").1;
    let field = |index: usize| {
        after_name.split(' ').nth(index).and_then(|text| text.parse::<u64>().ok()).expect("ticks")
    };
    Duration::from_millis((field(11) + field(12)) * 10)
}
