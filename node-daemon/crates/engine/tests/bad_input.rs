//! What must not harm an engine: impossible configurations, devices that are not its own or not
//! whole, garbage on every port. A clear error where one looks, nothing changed, nobody down.

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use common::{Cluster, DEVICE_BYTES};
use rustix::fs::{FlockOperation, flock};
use tercet_engine::pb::engine as pb;
use tonic::Code;

const HOST: &str = "nqn.2026-11.io.tercet:host:test";

/// Waits until node `number`'s only device is in a state that `is` wants, and gives its message.
async fn device(
    cluster: &Cluster,
    number: usize,
    is: impl Fn(&pb::DeviceStatus) -> bool,
) -> String {
    let start = Instant::now();
    let mut last = None;
    while start.elapsed() < common::PATIENCE {
        if let Some(status) = cluster.agent_of(number).status().await {
            if let Some(device) = status.devices.first()
                && is(device)
            {
                return device.message.clone();
            }
            last = Some(status.devices);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the device is {last:?} {}", cluster.logs());
}

/// Makes a good request a bad one.
type Spoil = Box<dyn Fn(&mut pb::ConfigureRequest)>;

/// The connection ends, soon, whatever is sent.
fn make_noise(address: SocketAddr, noise: &[u8]) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(common::PATIENCE)).expect("a timeout");
    // It may be closed before everything is written, which is as good.
    let _ = stream.write_all(noise);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{address} keeps the connection: {error}"),
    }
}

#[tokio::test]
async fn garbage_on_every_port_ends_the_connection_and_nothing_else() {
    let cluster = Cluster::start("garbage");
    let volume = cluster.create_volume(64 << 20, HOST).await;
    cluster.wait_serving(volume, None).await;
    let pids: Vec<_> = cluster.nodes.iter().map(common::Node::engine_pid).collect();
    let ports = [
        cluster.port(|ports| ports.nvme_tcp),
        cluster.port(|ports| ports.discovery),
        cluster.port(|ports| ports.replication),
    ];
    let noise: Vec<u8> =
        (0..100_000_u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
    let node = cluster.nodes[0].address;
    common::blocking(move || {
        for port in ports {
            for noise in [&noise[..], b"GET / HTTP/1.1\r\n\r\n", &[0; 4096], &[0xff; 4096]] {
                make_noise(SocketAddr::new(node, port), noise);
            }
        }
    })
    .await;
    let after: Vec<_> = cluster.nodes.iter().map(common::Node::engine_pid).collect();
    assert_eq!(pids, after, "no engine went down {}", cluster.logs());
    cluster.wait_serving(volume, None).await;
    let log = cluster.nodes[0].log();
    assert!(log.contains("a host's connection is closed"), "{log}");
    assert!(log.contains("a replication connection is refused"), "{log}");
}

#[tokio::test]
async fn impossible_configurations_are_refused_by_field() {
    let cluster = Cluster::start("refused");
    device(&cluster, 0, |device| device.state == "Ready").await;
    let mut client = cluster.agent_of(0).client().await.expect("a connection");
    let good = cluster.configure_request(0);
    let small = |request: &mut pb::ConfigureRequest| {
        let file = pb::FileDevice { path: "/x".into(), capacity_bytes: 4 << 20 };
        request.devices[0].source = Some(pb::device::Source::File(file));
    };
    let other = |request: &mut pb::ConfigureRequest| {
        let file = pb::FileDevice { path: "/x".into(), capacity_bytes: DEVICE_BYTES };
        request.devices[0].source = Some(pb::device::Source::File(file));
    };
    let cases: Vec<(Spoil, Code, &str)> = vec![
        (Box::new(|r| r.node = "node-2".into()), Code::InvalidArgument, "node"),
        (Box::new(|r| r.address = "here".into()), Code::InvalidArgument, "address"),
        (Box::new(|r| r.ports = None), Code::InvalidArgument, "ports"),
        (Box::new(|r| r.link_security = 0), Code::InvalidArgument, "link_security"),
        (Box::new(|r| r.devices.clear()), Code::InvalidArgument, "devices"),
        (Box::new(small), Code::InvalidArgument, "capacity_bytes"),
        (Box::new(other), Code::FailedPrecondition, "devices"),
        (
            Box::new(|r| r.cluster_id = uuid::Uuid::new_v4().to_string()),
            Code::FailedPrecondition,
            "cluster_id",
        ),
    ];
    for (spoil, code, field) in cases {
        let mut request = good.clone();
        spoil(&mut request);
        let refused = client.configure(request).await.expect_err(field);
        assert_eq!(refused.code(), code, "{refused}");
        assert!(refused.message().contains(field), "{refused}");
    }
    client.configure(good).await.expect("the same configuration as before is fine");
    let request = pb::ChunkSumsRequest { volume: uuid::Uuid::new_v4().to_string() };
    let unknown = client.chunk_sums(request).await.expect_err("no such volume");
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let request = pb::CreateReplicaRequest {
        volume: uuid::Uuid::new_v4().to_string(),
        name: "odd".into(),
        size_bytes: 4097,
        source: None,
        learner: false,
    };
    let odd = client.create_replica(request).await.expect_err("no multiple of a block");
    assert_eq!(odd.code(), Code::InvalidArgument, "{odd}");
}

#[tokio::test]
async fn what_the_membership_holds_of_peers_is_shown_and_nothing_else_comes_of_it() {
    let cluster = Cluster::start("hints");
    device(&cluster, 0, |device| device.state == "Ready").await;
    let agent = cluster.agent_of(0);
    let mut client = agent.client().await.expect("connected");
    let sight = |node: &str, standing: &str| pb::PeerSight {
        node: node.to_owned(),
        standing: standing.to_owned(),
    };
    let said = || async {
        let status = agent.status().await.expect("a status");
        status.links.into_iter().map(|link| (link.node, link.membership)).collect::<Vec<_>>()
    };
    let odd = pb::ObservePeersRequest { peers: vec![sight("node-2", "Unwell")] };
    let refused = client.observe_peers(odd).await.expect_err("no such standing");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    let peers = vec![sight("node-2", "Dead"), sight("elsewhere", "Alive")];
    client.observe_peers(pb::ObservePeersRequest { peers }).await.expect("taken");
    let links = said().await;
    assert!(links.contains(&("node-2".to_owned(), "Dead".to_owned())), "{links:?}");
    assert!(links.contains(&("node-3".to_owned(), String::new())), "{links:?}");
    client.observe_peers(pb::ObservePeersRequest { peers: vec![] }).await.expect("taken");
    assert!(said().await.iter().all(|(_, membership)| membership.is_empty()), "all forgotten");
}

#[tokio::test]
async fn a_locked_device_is_waited_for_and_a_damaged_one_is_left_alone() {
    let mut cluster = Cluster::prepare("devices", 1, |number, dir| {
        let path = dir.join("device");
        match number {
            // Another store's, or a file system's: certainly not ours.
            1 => fs::write(&path, vec![0x42; 300 << 20]).expect("a foreign device"),
            2 => fs::write(&path, vec![0; 4096]).expect("a cut device"),
            _ => {}
        }
    });
    let locked = File::create(cluster.nodes[0].dir.join("device")).expect("a file");
    flock(&locked, FlockOperation::NonBlockingLockExclusive).expect("locked");
    cluster.start_agents();
    let told = device(&cluster, 0, |d| d.state == "Failed" && d.message.contains("lock")).await;
    assert!(told.contains("device"), "it names the device: {told}");
    let told =
        device(&cluster, 1, |d| d.state == "Failed" && d.message.contains("superblock")).await;
    println!("damaged: {told}");
    let told =
        device(&cluster, 2, |d| d.state == "Failed" && d.message.contains("4096 bytes")).await;
    println!("too small: {told}");
    assert_eq!(fs::read(cluster.nodes[1].dir.join("device")).expect("read"), vec![0x42; 300 << 20]);
    assert_eq!(fs::read(cluster.nodes[2].dir.join("device")).expect("read"), vec![0; 4096]);
    drop(locked);
    device(&cluster, 0, |device| device.state == "Ready" && device.capacity_bytes > 0).await;
}
