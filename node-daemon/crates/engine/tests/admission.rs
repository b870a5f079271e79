//! Who gets at a volume: real engines, real sockets, the user-space host; attachments change while
//! hosts are connected.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Cluster, PATIENCE, blocking};
use tercet_engine::host::{Host, HostOptions, Operation};
use tercet_nvmf::names::volume_nqn;
use tercet_proto::{BlockRange, VolumeId};
use uuid::Uuid;

const FIRST: &str = "nqn.2026-11.io.tercet:host:first";
const SECOND: &str = "nqn.2026-11.io.tercet:host:second";
/// Made for these tests: 32 bytes 1 to 32, and 32 bytes 2 to 33.
const SECRET: &str = "DHHC-1:00:AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyAl7OaH:";
const OTHER_SECRET: &str = "DHHC-1:00:AgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4fICGrMmyA:";
const MIB: u64 = 1 << 20;

fn options(cluster: &Cluster, volume: Uuid, host_nqn: &str) -> HostOptions {
    let mut options = HostOptions::new(&volume_nqn(VolumeId(volume)), host_nqn, [7; 16]);
    options.endpoints = cluster.paths();
    options
}

async fn is_let_in(options: HostOptions, patience: Duration) -> Option<Arc<Host>> {
    let host = Arc::new(Host::connect(options).expect("a host"));
    let waiting = Arc::clone(&host);
    blocking(move || waiting.wait_ready(patience)).await.map(|_| host)
}

/// Hosts that any of the engines has an association of.
async fn hosts(cluster: &Cluster, volume: Uuid) -> Vec<String> {
    let mut hosts = Vec::new();
    for number in 0..cluster.nodes.len() {
        let status = cluster.agent_of(number).status().await.expect("a status");
        let of_volume = status.replicas.into_iter().filter(|one| one.volume == volume.to_string());
        hosts.extend(of_volume.flat_map(|one| one.hosts));
    }
    hosts
}

#[tokio::test]
async fn a_host_that_is_not_attached_any_more_loses_its_associations_at_once() {
    let cluster = Cluster::start("detached");
    let volume = cluster.create_volume(16 * MIB, FIRST).await;
    cluster.wait_serving(volume, None).await;
    let first = is_let_in(options(&cluster, volume, FIRST), PATIENCE).await.expect("attached");
    assert!(hosts(&cluster, volume).await.contains(&FIRST.to_owned()));
    cluster.objects.attach(volume, SECOND, None);
    let begun = Instant::now();
    while hosts(&cluster, volume).await.contains(&FIRST.to_owned()) {
        assert!(begun.elapsed() < Duration::from_secs(5), "{}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("refused on all paths after {:?}", begun.elapsed());
    is_let_in(options(&cluster, volume, SECOND), PATIENCE).await.expect("attached");
    let again = is_let_in(options(&cluster, volume, FIRST), Duration::from_secs(2)).await;
    assert!(again.is_none(), "it stays outside");
    drop(first);
}

#[tokio::test]
async fn a_host_with_a_secret_shows_that_it_knows_it_and_so_do_the_engines() {
    let cluster = Cluster::start("secrets");
    let volume = cluster.create_volume(16 * MIB, FIRST).await;
    cluster.wait_serving(volume, None).await;
    let secrets = Some((SECRET, OTHER_SECRET));
    cluster.objects.attach(volume, SECOND, secrets);
    let mut right = options(&cluster, volume, SECOND);
    right.secret = Some(SECRET.parse().expect("a secret"));
    right.controller_secret = Some(OTHER_SECRET.parse().expect("a secret"));
    let host = is_let_in(right.clone(), PATIENCE).await;
    let host = host.unwrap_or_else(|| panic!("it is let in: {}", cluster.logs()));
    let read = blocking(move || host.run(Operation::Read(BlockRange { start: 0, count: 1 }))).await;
    assert!(read.is_ok());
    for change in [
        |options: &mut HostOptions| options.secret = None,
        |options: &mut HostOptions| options.secret = options.controller_secret.clone(),
        |options: &mut HostOptions| options.controller_secret = options.secret.clone(),
    ] {
        let mut wrong = right.clone();
        change(&mut wrong);
        let host = is_let_in(wrong, Duration::from_secs(1)).await;
        assert!(host.is_none(), "it is kept out");
    }
    let said = cluster.logs();
    assert!(!said.contains("AQIDBAUGBwgJ"), "no secret is in a log");
}
