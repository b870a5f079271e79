//! The discovery subsystem for hosts that stay connected: what they see, when they are told of a
//! change, how long they stand.

#[path = "support/memory.rs"]
mod memory;
#[path = "support/raw.rs"]
mod raw;

use std::net::Ipv4Addr;
use std::time::Duration;

use raw::{ENABLED, Raw, connect, property_set};
use tercet_nvmf::command::{Data, Entry, admin, feature};
use tercet_nvmf::log::{self, DiscoveryRecord, page};
use tercet_nvmf::names::DISCOVERY_NQN;
use tercet_nvmf::status::Status;
use tercet_nvmf::target::{CloseReason, ConnectionId, DiscoveryEntry};

const A: &str = "nqn.2026-11.io.tercet:host:a";
const B: &str = "nqn.2026-11.io.tercet:host:b";
const FIRST: ConnectionId = ConnectionId(1);
const SECOND: ConnectionId = ConnectionId(2);
/// A notice: the discovery log has changed.
const CHANGED: u64 = 0x0070_f002;

fn entry(name: &str, hosts: &[&str]) -> DiscoveryEntry {
    let record = DiscoveryRecord {
        subsystem_nqn: format!("nqn.2026-11.io.tercet:volume:{name}"),
        address: Ipv4Addr::new(127, 0, 1, 1).into(),
        port: 4420,
        port_id: 1,
    };
    DiscoveryEntry { record, hosts: hosts.iter().map(|&host| host.to_owned()).collect() }
}

fn set(raw: &mut Raw, entries: Vec<DiscoveryEntry>) {
    let mut effects = Vec::new();
    raw.target.set_discovery(entries, &mut effects);
    raw.execute(effects);
}

fn join(raw: &mut Raw, id: ConnectionId, host_nqn: &str) {
    let (done, _) = raw.join(id, DISCOVERY_NQN, host_nqn, 0, 0xffff);
    assert!(done.status.is_success(), "{done:?}");
    raw.call(id, property_set(ENABLED), &[]);
}

fn read(raw: &mut Raw, id: ConnectionId) -> (u64, Vec<String>) {
    let mut entry = Entry::new(admin::GET_LOG_PAGE, 50);
    entry.set_dword(10, u32::from(page::DISCOVERY) | 1023 << 16);
    entry.set_data(Data::Transport(4096));
    let (done, data) = raw.call(id, entry, &[]);
    assert!(done.status.is_success(), "{done:?}");
    let (generation, records) = log::parse_discovery(&data).expect("a discovery log");
    let name =
        |record: DiscoveryRecord| record.subsystem_nqn.rsplit(':').next().unwrap().to_owned();
    (generation, records.into_iter().map(name).collect())
}

fn events(raw: &mut Raw, id: ConnectionId) -> Vec<u64> {
    raw.completions(id).into_iter().map(|completion| completion.result).collect()
}

#[test]
fn a_host_sees_its_volumes_and_hears_of_changes_to_them() {
    let mut raw = Raw::new();
    join(&mut raw, FIRST, A);
    join(&mut raw, SECOND, B);
    for id in [FIRST, SECOND] {
        raw.send(id, Entry::new(admin::ASYNC_EVENT, 5), &[]);
        assert!(events(&mut raw, id).is_empty());
    }
    let (generation, none) = read(&mut raw, FIRST);
    assert!(none.is_empty());
    set(&mut raw, vec![entry("one", &[A]), entry("two", &[A, B])]);
    assert_eq!((events(&mut raw, FIRST), events(&mut raw, SECOND)), (vec![CHANGED], vec![CHANGED]));
    assert_eq!(read(&mut raw, FIRST), (generation + 1, vec!["one".to_owned(), "two".to_owned()]));
    assert_eq!(read(&mut raw, SECOND), (generation + 1, vec!["two".to_owned()]));
    // The attachment of one host goes: it is told, the other is not.
    for id in [FIRST, SECOND] {
        raw.send(id, Entry::new(admin::ASYNC_EVENT, 6), &[]);
    }
    set(&mut raw, vec![entry("one", &[]), entry("two", &[A, B])]);
    assert_eq!((events(&mut raw, FIRST), events(&mut raw, SECOND)), (vec![CHANGED], vec![]));
    set(&mut raw, vec![entry("one", &[A]), entry("two", &[A, B])]);
    raw.send(FIRST, Entry::new(admin::ASYNC_EVENT, 7), &[]);
    assert!(events(&mut raw, FIRST).is_empty(), "masked until the log is read");
    assert_eq!(read(&mut raw, FIRST).1.len(), 2);
    // The same again is no change.
    set(&mut raw, vec![entry("one", &[A]), entry("two", &[A, B])]);
    assert_eq!(read(&mut raw, FIRST).0, generation + 3);
    assert!(events(&mut raw, FIRST).is_empty());
}

#[test]
fn a_discovery_host_that_stays_keeps_itself_alive() {
    let mut raw = Raw::new();
    join(&mut raw, FIRST, A);
    for _ in 0..10 {
        raw.wait(Duration::from_secs(4));
        assert!(raw.call(FIRST, Entry::new(admin::KEEP_ALIVE, 1), &[]).0.status.is_success());
    }
    raw.wait(Duration::from_secs(6));
    assert_eq!(raw.closed.get(&FIRST), Some(&CloseReason::KeepAlive));
}

#[test]
fn a_discovery_host_without_keep_alive_stands_two_minutes_at_a_time() {
    let mut raw = Raw::new();
    raw.open(FIRST);
    let (mut connect, data) = connect(DISCOVERY_NQN, A, 0, 0xffff, true);
    connect.set_dword(12, 0); // KATO
    assert!(raw.call(FIRST, connect, &data).0.status.is_success());
    raw.call(FIRST, property_set(ENABLED), &[]);
    raw.wait(Duration::from_secs(119));
    read(&mut raw, FIRST);
    raw.wait(Duration::from_secs(119));
    assert!(raw.closed.is_empty());
    raw.wait(Duration::from_secs(2));
    assert_eq!(raw.closed.get(&FIRST), Some(&CloseReason::KeepAlive));
}

#[test]
fn a_discovery_controller_has_no_volume() {
    let mut raw = Raw::new();
    join(&mut raw, FIRST, A);
    let identify = |which| {
        let mut entry = Entry::new(admin::IDENTIFY, 3);
        entry.set_dword(10, which);
        entry.set_data(Data::Transport(4096));
        entry
    };
    let (done, data) = raw.call(FIRST, identify(1), &[]);
    assert_eq!((done.status, data[111]), (Status::SUCCESS, 2), "CNTRLTYPE: discovery");
    assert_eq!(data[92..96], [0, 0, 0, 0x80], "OAES: discovery log changes");
    assert_eq!(raw.call(FIRST, identify(0), &[]).0.status, Status::INVALID_FIELD);
    let mut queues = Entry::new(admin::SET_FEATURES, 3);
    queues.set_dword(10, u32::from(feature::QUEUE_COUNT));
    assert_eq!(raw.call(FIRST, queues, &[]).0.status, Status::INVALID_FIELD);
    let (done, _) = raw.join(SECOND, DISCOVERY_NQN, A, 1, 1);
    assert!(done.status.same(Status::CONNECT_PARAMETER), "no I/O queues");
    let mut ana = Entry::new(admin::GET_LOG_PAGE, 3);
    ana.set_dword(10, u32::from(page::ANA) | 15 << 16);
    ana.set_data(Data::Transport(64));
    assert_eq!(raw.call(FIRST, ana, &[]).0.status, Status::INVALID_LOG);
}
