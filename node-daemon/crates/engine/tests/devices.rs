//! Several shards and devices: a replica is where its id says, clones are where their source is, and
//! a device can be added while hosts write.

mod common;

use std::collections::BTreeSet;
use std::time::Instant;

use common::agent::Client;
use common::hosts::{HOST, attach, check, with_host, write};
use common::{Cluster, DEVICE_BYTES, PATIENCE};
use tercet_engine::host::Host;
use tercet_engine::pb::engine as pb;
use tercet_proto::ReplicaId;
use tonic::Code;
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const CLONES: usize = 8;

/// Device and region of a volume's replica on a node.
async fn home(cluster: &Cluster, node: usize, volume: Uuid) -> (String, u32) {
    let map = cluster.agent_of(node).chunk_map(volume).await.expect("a chunk map");
    (map.device, map.region)
}

async fn snapshot(cluster: &Cluster, volume: Uuid) -> pb::CloneSource {
    let id = Uuid::new_v4().to_string();
    let wanted = pb::SnapshotRequest { volume: volume.to_string(), snapshot: id.clone() };
    let take = |mut client: Client| {
        let wanted = wanted.clone();
        async move { client.create_snapshot(wanted).await }
    };
    let place = cluster.ask_primary(volume, take).await;
    let volume = volume.to_string();
    pb::CloneSource { volume, snapshot: id, epoch: place.epoch, lsn: place.lsn }
}

/// A volume used to be on the shard that its id hashes to: of a clone's ids only some do to the
/// source's shard, so an engine with several refused most clones.
#[tokio::test]
async fn a_clone_is_on_its_sources_shard_however_many_there_are() {
    let cluster = Cluster::with_reactors("clones", 4);
    let volume = cluster.create_volume(16 * MIB, HOST).await;
    cluster.wait_serving(volume, None).await;
    let host = attach(&cluster, volume).await;
    with_host(&host, |host| (0..20).for_each(|block| write(host, block, 1))).await;
    let source = snapshot(&cluster, volume).await;
    with_host(&host, |host| (0..20).for_each(|block| write(host, block, 2))).await;
    for _ in 0..CLONES {
        let clone = cluster.create(16 * MIB, HOST, Some(source.clone())).await;
        cluster.wait_serving(clone, None).await;
        let own = attach(&cluster, clone).await;
        with_host(&own, |host| (0..20).for_each(|block| check(host, block, 1))).await;
        for node in 0..3 {
            assert_eq!(home(&cluster, node, clone).await, home(&cluster, node, volume).await);
        }
    }
    let map = cluster.agent_of(0).chunk_map(volume).await.expect("a chunk map");
    assert_eq!((map.rows[0].mapped_bytes, map.rows[0].shared_bytes), (20 << 12, 0));
    with_host(&host, |host| (0..20).for_each(|block| check(host, block, 2))).await;
}

fn two_devices(request: &mut pb::ConfigureRequest) {
    let Some(pb::device::Source::File(first)) = request.devices[0].source.clone() else {
        unreachable!("the tests' devices are files")
    };
    let file = pb::FileDevice { path: format!("{}-1", first.path), capacity_bytes: DEVICE_BYTES };
    let source = Some(pb::device::Source::File(file));
    request.devices.push(pb::Device { id: "d1".into(), source });
}

/// Waits until each engine has both devices open.
async fn both_open(cluster: &Cluster) {
    let start = Instant::now();
    for node in 0..3 {
        loop {
            let status = cluster.agent_of(node).status().await;
            let devices = status.map(|status| status.devices).unwrap_or_default();
            if devices.len() == 2 && devices.iter().all(|device| device.state == "Ready") {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "{devices:?} {}", cluster.logs());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn a_device_is_added_under_a_writing_host_and_takes_the_next_volumes() {
    let mut cluster = Cluster::with_reactors("added", 2);
    let first = cluster.create_volume(64 * MIB, HOST).await;
    cluster.wait_serving(first, None).await;
    let before = home(&cluster, 0, first).await;
    let host = attach(&cluster, first).await;
    let writer = std::sync::Arc::clone(&host);
    let writing = tokio::task::spawn_blocking(move || {
        (0..4000).for_each(|number| write(&writer, number % 500, 1 + number / 500));
    });
    cluster.restart_agents(two_devices);
    both_open(&cluster).await;
    let mut devices = BTreeSet::from([before.0.clone()]);
    let mut second = Vec::new();
    for _ in 0..3 {
        let volume = cluster.create_volume(64 * MIB, HOST).await;
        cluster.wait_serving(volume, None).await;
        let own = attach(&cluster, volume).await;
        with_host(&own, |host| (0..50).for_each(|block| write(host, block, 9))).await;
        devices.insert(home(&cluster, 0, volume).await.0);
        second.push(volume);
    }
    assert_eq!(devices, BTreeSet::from(["d0".to_owned(), "d1".to_owned()]));
    writing.await.expect("every write is acknowledged");
    assert_eq!(home(&cluster, 0, first).await, before, "what was there stays where it is");
    // The engines that come back find every replica where it was.
    let homes = home(&cluster, 0, second[0]).await;
    for node in &cluster.nodes {
        node.kill_engine();
    }
    for &volume in second.iter().chain([&first]) {
        cluster.wait_serving(volume, None).await;
    }
    with_host(&host, |host| (0..500).for_each(|block| check(host, block, 8))).await;
    for &volume in &second {
        let own = attach(&cluster, volume).await;
        with_host(&own, |host: &Host| (0..50).for_each(|block| check(host, block, 9))).await;
    }
    for &volume in second.iter().chain([&first]) {
        assert!(!cluster.equal_sums(volume).await.is_empty());
    }
    assert_eq!(home(&cluster, 0, second[0]).await, homes);
    let mut client = cluster.agent_of(0).client().await.expect("a connection");
    let mut fewer = cluster.configure_request(0);
    let refused = client.configure(fewer.clone()).await.expect_err("one device less");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    two_devices(&mut fewer);
    fewer.devices.swap(0, 1);
    client.configure(fewer.clone()).await.expect("who lists them has no order");
    fewer.devices.remove(0);
    fewer.devices[0].id = "d2".into();
    let refused = client.configure(fewer).await.expect_err("another in place of both");
    assert!(refused.message().contains("devices"), "{refused}");
}

#[tokio::test]
async fn a_replicas_id_names_its_shard_and_asking_again_gives_the_same() {
    let cluster = Cluster::with_reactors("ids", 3);
    let volume = cluster.create_volume(16 * MIB, HOST).await;
    let request = pb::CreateReplicaRequest {
        volume: volume.to_string(),
        name: "pvc-test".into(),
        size_bytes: 16 * MIB,
        source: None,
        learner: false,
    };
    for node in 0..3 {
        let again = cluster.agent_of(node).create_replica(request.clone()).await;
        let status = cluster.agent_of(node).status().await.expect("a status");
        assert_eq!(status.replicas.len(), 1, "one replica");
        assert_eq!(status.replicas[0].replica, again);
        let id = ReplicaId(again.parse().expect("a UUID"));
        let (_, region) = home(&cluster, node, volume).await;
        assert_eq!(
            id.shard().map(u32::from),
            Some(region),
            "one device: its regions are the shards"
        );
    }
}
