//! Proven exits with real engines (rule L5): the peers of a killed engine hear that it is over before
//! the next one can speak on a link, and nobody else's word counts.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use common::{Cluster, Node, PATIENCE, blocking};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use tercet_proto::message::{ProvenExit, encode_proven_exit};
use tercet_proto::{InstanceId, NodeName};
use uuid::Uuid;

const HOST: &str = "nqn.2026-11.io.tercet:host:test";
/// Less than any way that needs no proof: `missing_after` (700 ms), or D from the last grant, which
/// is at most a beat (250 ms) old.
const BY_PROOF_ALONE: Duration = Duration::from_millis(650);
/// Takeovers of which one has to be as quick: what a busy machine delays is not the engine's.
const TRIALS: usize = 8;

fn instance(node: &Node) -> Uuid {
    let text = std::fs::read_to_string(node.dir.join("instance")).expect("an engine has run");
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    Uuid::parse_str(value["instance"].as_str().expect("a text")).expect("an instance")
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).expect("a pid"), signal).expect("it is there");
}

fn supervisor_pid(node: &Node) -> i32 {
    i32::try_from(node.supervisor.id()).expect("a pid")
}

/// How often a node has heard of this exit on a connection that is no link.
fn told(node: &Node, exited: Uuid) -> usize {
    let last = format!("last={:?}", exited.to_string());
    node.log().lines().filter(|line| line.contains("exits told") && line.contains(&last)).count()
}

async fn wait_told(cluster: &Cluster, nodes: &[usize], exited: Uuid) {
    let start = Instant::now();
    while nodes.iter().any(|&node| told(&cluster.nodes[node], exited) == 0) {
        assert!(start.elapsed() < PATIENCE, "{exited} {}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn others(but: usize) -> Vec<usize> {
    (0..3).filter(|&node| node != but).collect()
}

/// The primary's engine dies, and the next one does not get the device: somebody else has it. So it
/// replays nothing and has no link; that its parent has reaped the dead one is known all the same.
/// How long until another node serves.
async fn killed_without_a_device(cluster: &Cluster, volume: Uuid) -> Duration {
    let primary = cluster.wait_serving(volume, None).await;
    let node = &cluster.nodes[primary];
    let exited = instance(node);
    signal(supervisor_pid(node), Signal::STOP);
    let killed = Instant::now();
    node.kill_engine();
    let device = std::fs::File::open(node.dir.join("device")).expect("the device");
    while flock(&device, FlockOperation::NonBlockingLockExclusive).is_err() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    signal(supervisor_pid(node), Signal::CONT);
    wait_told(cluster, &others(primary), exited).await;
    let next = cluster.wait_serving(volume, Some(primary)).await;
    let took = killed.elapsed();
    println!("{} serves {took:?} after {}'s engine was killed", next, node.name);
    let log = node.log();
    let life = log.rsplit_once("the engine is started").expect("another life").1;
    assert!(!life.contains("the device is locked"), "{life}");
    drop(device);
    took
}

#[tokio::test]
async fn two_others_take_over_while_the_next_engine_has_no_device_yet() {
    let cluster = Cluster::start("exits");
    let volume = cluster.create_volume(16 << 20, HOST).await;
    let mut shortest = Duration::MAX;
    for _ in 0..TRIALS {
        // All three are there: the next takeover needs two of them.
        cluster.equal_sums(volume).await;
        shortest = shortest.min(killed_without_a_device(&cluster, volume).await);
        if shortest <= BY_PROOF_ALONE {
            return;
        }
    }
    panic!("the quickest takeover took {shortest:?} {}", cluster.logs());
}

/// Whoever started the next engine has reaped nobody: the lock and the superblock prove the exit.
#[tokio::test]
async fn the_superblock_names_who_is_over_before_the_log_is_replayed() {
    let mut cluster = Cluster::start("superblock");
    let volume = cluster.create_volume(16 << 20, HOST).await;
    let primary = cluster.wait_serving(volume, None).await;
    let exited = instance(&cluster.nodes[primary]);
    cluster.lose(primary);
    cluster.revive(primary);
    wait_told(&cluster, &others(primary), exited).await;
    cluster.wait_serving(volume, Some(primary)).await;
    cluster.equal_sums(volume).await;
    let log = cluster.nodes[primary].log();
    let life = log.rsplit_once("the engine is started").expect("a second life").1;
    let said = life.find("the peers are told of proven exits").expect("told");
    assert!(said < life.find("replayed").expect("replayed"), "{life}");
    for other in others(primary) {
        assert_eq!(told(&cluster.nodes[other], exited), 1, "once {}", cluster.logs());
    }
}

/// Says something to a node as an engine that starts does, and waits until the connection is closed.
fn say(to: SocketAddr, exit: &ProvenExit) {
    let mut stream = TcpStream::connect(to).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut frame = Vec::new();
    encode_proven_exit(exit, &mut frame);
    stream.write_all(&frame).expect("sent");
    // Closed, or reset: either way it is over.
    let _ = stream.read_to_end(&mut Vec::new());
}

/// What must not be believed of a living primary, and what is said about it at the other end.
async fn tell_lies(cluster: &Cluster, primary: usize) {
    let living = InstanceId(instance(&cluster.nodes[primary]));
    let id = *Uuid::parse_str(&cluster.configure_request(0).cluster_id).expect("an id").as_bytes();
    let [one, another] = others(primary)[..] else { unreachable!("two others") };
    let name = |node: usize| cluster.nodes[node].name.clone();
    let lies = [
        ([7; 16], name(primary), "is of another cluster"),
        (id, "node-9".to_owned(), "node-9 is no peer"),
        (id, name(another), "exits told"), // of an instance that was never there
    ];
    let port = cluster.port(|ports| ports.replication);
    let to = SocketAddr::new(cluster.nodes[one].address, port);
    for (cluster_id, node, answer) in lies {
        let (node, instance) = (NodeName::new(&node), InstanceId(Uuid::new_v4()));
        let exit = ProvenExit { cluster: cluster_id, node, instance, exited: vec![living] };
        blocking(move || say(to, &exit)).await;
        let log = cluster.nodes[one].log();
        assert!(log.contains(answer), "{answer}: {log}");
    }
}

#[tokio::test]
async fn a_living_primary_is_not_talked_out_of_its_lease() {
    let cluster = Cluster::start("liars");
    let volume = cluster.create_volume(16 << 20, HOST).await;
    let epoch = || cluster.objects.get(volume).expect("the object").config.epoch;
    for _ in 0..TRIALS {
        let primary = cluster.wait_serving(volume, None).await;
        let before = epoch();
        tell_lies(&cluster, primary).await;
        // Who believed one would have asked the other member at once.
        tokio::time::sleep(Duration::from_millis(500)).await;
        // A machine that stands still for a second has a takeover, lies or not.
        if epoch() == before {
            return;
        }
    }
    panic!("each time another took over {}", cluster.logs());
}
