//! The table by itself, and between real reactors.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use tercet_noderep::{NodeReplicated, Options, Replica};
use tercet_proto::InstanceId;
use tercet_reactor::{Event, Postbox, Reactor, Settings, mailbox};
use uuid::Uuid;

use super::*;
use crate::control::{Directory, Reactors};
use crate::core::ToReactor;
use crate::herald::Herald;
use crate::plan::{PeerPlan, Ports};

const VOLUME: VolumeId = VolumeId(Uuid::from_u128(7));

fn told(epoch: u64, nodes: &[&str], hosts: &[&str]) -> Arc<Volume> {
    Arc::new(Volume {
        epoch: Epoch(epoch),
        nodes: nodes.iter().map(|node| NodeName::new(node)).collect(),
        hosts: hosts.iter().map(ToString::to_string).collect(),
    })
}

fn plan(peers: &[(&str, u8)]) -> Arc<Plan> {
    let address = |last| IpAddr::V4(Ipv4Addr::new(127, 0, 1, last));
    let peer = |(node, last): &(&str, u8)| PeerPlan {
        node: (*node).to_owned(),
        address: SocketAddr::new(address(*last), 4421),
    };
    Arc::new(Plan {
        cluster: Uuid::from_u128(1),
        address: address(1),
        ports: Ports { nvme_tcp: 4420, discovery: 8009, replication: 4421 },
        devices: Vec::new(),
        shards_per_device: 1,
        peers: peers.iter().map(peer).collect(),
    })
}

#[test]
fn an_older_view_takes_no_epoch_and_no_member_back() {
    let mut table = Table::default();
    table.write(Change::Volume(VOLUME, told(4, &["a", "b"], &["host-1"])));
    table.write(Change::Volume(VOLUME, told(3, &["a", "c"], &["host-2"])));
    let known = table.volume(VOLUME).expect("told");
    assert_eq!(*known, *told(4, &["a", "b"], &["host-2"]), "attachments have no epoch");
    assert!(!table.would_change(VOLUME, &told(3, &["a", "c"], &["host-2"])));
    assert!(table.would_change(VOLUME, &told(5, &["a", "b"], &["host-2"])));
}

#[test]
fn a_volume_is_where_its_replica_is() {
    let mut table = Table::default();
    assert_eq!((table.shard_of(VOLUME), table.home(VOLUME)), (None, None));
    table.write(Change::Plan(plan(&[])));
    table.write(Change::Home(VOLUME, 3));
    table.write(Change::Home(VOLUME, 5));
    assert_eq!(table.shard_of(VOLUME), Some(3), "the first that has it keeps it");
    table.write(Change::Forget(VOLUME));
    table.write(Change::Home(VOLUME, 5));
    assert_eq!(table.home(VOLUME), Some(5));
    table.write(Change::NoHome(VOLUME));
    assert_eq!(table.home(VOLUME), None);
}

#[test]
fn the_discovery_log_is_made_anew_only_for_what_is_in_it() {
    let mut table = Table::default();
    let mut changes = |change| {
        let before = table.versions().discovery;
        table.write(change);
        table.versions().discovery - before
    };
    assert_eq!(changes(Change::Volume(VOLUME, told(1, &["a"], &[]))), 1);
    assert_eq!(changes(Change::Volume(VOLUME, told(2, &["a"], &[]))), 0, "only the epoch");
    assert_eq!(changes(Change::Volume(VOLUME, told(2, &["a"], &["host"]))), 1);
    assert_eq!(changes(Change::Plan(plan(&[]))), 1, "addresses");
    assert_eq!(changes(Change::Forget(VOLUME)), 1);
    assert_eq!(changes(Change::Forget(VOLUME)), 0);
}

#[test]
fn the_discovery_log_names_each_member_that_has_an_address() {
    let mut table = Table::default();
    table.write(Change::Volume(VOLUME, told(1, &["a", "b", "gone"], &["host"])));
    assert!(table.discovery(&NodeName::new("a")).is_empty(), "not told what to be yet");
    table.write(Change::Plan(plan(&[("b", 2)])));
    let entries = table.discovery(&NodeName::new("a"));
    let addresses: Vec<_> = entries.iter().map(|one| one.record.address.to_string()).collect();
    assert_eq!(addresses, ["127.0.1.1", "127.0.1.2"]);
    assert!(entries.iter().all(|one| one.hosts.contains("host")));
    // A peer that comes back elsewhere is told at once, not with the next view of a volume.
    table.write(Change::Plan(plan(&[("b", 9)])));
    let entries = table.discovery(&NodeName::new("a"));
    assert_eq!(entries[1].record.address.to_string(), "127.0.1.9");
}

#[test]
fn a_reactor_is_woken_only_when_it_has_something_to_do() {
    let reactor = Reactor::new(Settings { spin: Duration::ZERO }).expect("a ring");
    let (postbox, inbox) = mailbox(reactor.waker(), 2);
    let (node, instance) = (NodeName::new("a"), InstanceId(Uuid::from_u128(2)));
    let reactors = Reactors(vec![postbox].into());
    let herald = Herald::start(node.clone(), instance).expect("a thread");
    let directory = Directory::new(node, instance, Vec::new(), herald, reactors);
    let mut table = directory.table_for(0);
    let mut tell = |epoch, hosts: &[&str]| {
        let volume = (*told(epoch, &["a"], hosts)).clone();
        directory.tell(VOLUME, volume).expect("told");
        table.latest().volume(VOLUME).expect("told").clone()
    };
    assert_eq!(tell(1, &[]).epoch, Epoch(1));
    assert!(matches!(inbox.take(), Some(ToReactor::Look)), "the discovery log changes");
    assert_eq!(tell(2, &[]).epoch, Epoch(2), "seen all the same");
    assert!(inbox.take().is_none(), "nothing is done about an epoch");
    for host in ["1", "2", "3"] {
        // The third finds the mailbox full, which is as good.
        assert!(tell(2, &[host]).hosts.contains(host));
    }
}

const EPOCHS: u64 = 3000;

/// What `Core` does with its table and its mailbox, and nothing else: an effect of epoch `e` comes,
/// the table is looked at, the effect is passed on.
fn reactor(mut table: Replica<Table>, postbox: &Sender<Postbox<u64>>, to: Option<&Postbox<u64>>) {
    let mut reactor = Reactor::new(Settings { spin: Duration::ZERO }).expect("a ring");
    let (own, inbox) = mailbox(reactor.waker(), EPOCHS as usize);
    postbox.send(own).expect("waited for");
    let mut events = Vec::new();
    let mut last = 0;
    while last < EPOCHS {
        reactor.poll(None, &mut events).expect("the ring can be entered");
        for event in events.drain(..) {
            assert!(matches!(event, Event::Woken), "nothing else can happen");
            while let Some(effect) = inbox.take() {
                table.latest();
                let known = table.held().volume(VOLUME).map_or(0, |volume| volume.epoch.0);
                assert!(known >= effect, "an effect of epoch {effect}, but {known} is known");
                if let Some(to) = to {
                    to.post(effect).expect("there is room");
                }
                last = effect;
            }
        }
    }
}

/// The control thread tells the table of an epoch, then the volume's home reactor; what that does
/// reaches a second reactor, and over that a third.
#[test]
fn a_change_of_epoch_is_seen_by_every_reactor_before_its_effect() {
    let options = Options { log_entries: 16, ..Options::default() };
    let all = NodeReplicated::new(Table::default(), options);
    let mut control = all.replica("control");
    thread::scope(|scope| {
        let mut next = None;
        for name in ["third", "second", "home"] {
            let (sender, postbox) = channel();
            let (table, to) = (all.replica(name), next.take());
            scope.spawn(move || reactor(table, &sender, to.as_ref()));
            next = Some(postbox.recv().expect("it starts"));
        }
        let home = next.expect("made last");
        for epoch in 1..=EPOCHS {
            let change = Change::Volume(VOLUME, told(epoch, &["a"], &[]));
            while control.write(change.clone()).is_err() {
                thread::yield_now(); // a reactor is in the middle of copying, without a core
            }
            home.post(epoch).expect("there is room");
        }
    });
}
