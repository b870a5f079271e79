//! M1, T9: a member that is lost is replaced by a learner, one at a time, and nothing that was
//! acknowledged is lost on the way, whoever dies meanwhile.

mod harness;

use harness::store::snapshot_id;
use harness::{Cluster, MS, SIZE_BLOCKS, VOLUME, at, block, host};
use tercet_proto::message::{CopyMessage, Message, ReplicaMessage};
use tercet_proto::storage::NewReplica;
use tercet_proto::{Config, ConfigState, Epoch, Member, ReplicaId};
use tercet_replication::Options;
use tercet_replication::api::{
    AssociationId, Control, ControlDone, HostCommand, HostDone, Notice, Replacement,
};

const NEWCOMER: ReplicaId = ReplicaId::from_bytes([9; 16]);

/// Members on nodes 0 to 2, node 0 leading; node 3 has no replica.
fn four_with(seed: u64, customize: fn(&mut Options)) -> (Cluster, AssociationId) {
    let mut cluster = Cluster::with(4, seed, customize);
    cluster.kill(3);
    cluster.machines[3].store.forget(VOLUME);
    cluster.start(3);
    cluster.create(0);
    cluster.run_until_served();
    let id = cluster.connect(0, host(1));
    for n in 0..20 {
        cluster.write(0, id, n, n);
    }
    cluster.control(0, Control::Snapshot(VOLUME, snapshot_id(1)));
    cluster.run_ms(5);
    cluster.write(0, id, 5, 55);
    (cluster, id)
}

fn four(seed: u64) -> (Cluster, AssociationId) {
    four_with(seed, |_| {})
}

/// What an agent does for a replica that is placed to take another's place; the answer.
fn make_learner(cluster: &mut Cluster) -> (ReplicaId, bool) {
    let new = NewReplica {
        volume: VOLUME,
        replica: NEWCOMER,
        name: "v".into(),
        size_blocks: SIZE_BLOCKS,
        source: None,
        incomplete: false,
    };
    let token = cluster.control(3, Control::CreateLearner(new));
    cluster.run_ms(50);
    match cluster.controls.get(&token) {
        Some(Ok(ControlDone::Replica { replica, incomplete })) => (*replica, *incomplete),
        other => panic!("no replica: {other:?}"),
    }
}

/// The operator's request, once the replica has been reported.
fn ask_to_replace(cluster: &mut Cluster, old: usize) {
    let (old, node) = (cluster.machines[old].replica, cluster.machines[3].name.clone());
    let learner = Member { node, replica: NEWCOMER };
    cluster.object.replacement = Some(Replacement { old, learner });
    cluster.publish();
}

fn replace(cluster: &mut Cluster, old: usize) {
    assert_eq!(make_learner(cluster), (NEWCOMER, true), "no copy before it is copied to");
    ask_to_replace(cluster, old);
}

fn config(cluster: &Cluster) -> &Config {
    cluster.object.config.as_ref().expect("a configuration")
}

fn run_until(cluster: &mut Cluster, what: &str, done: impl Fn(&Cluster) -> bool) {
    let until = cluster.now + 20_000 * MS;
    while cluster.now < until {
        if done(cluster) {
            return;
        }
        cluster.run_to(cluster.now + MS / 10);
    }
    let statuses: Vec<_> = (0..4).map(|i| cluster.status(i)).collect();
    panic!("not after 20 s: {what}: {:?} {statuses:#?}", cluster.object.config);
}

fn changed(cluster: &Cluster) -> bool {
    let config = config(cluster);
    config.state == ConfigState::Active && config.is_member(NEWCOMER)
}

fn both_sets(cluster: &Cluster) -> bool {
    config(cluster).previous_members.is_some()
}

fn assert_equal(cluster: &Cluster, nodes: &[usize]) {
    let first = cluster.machines[nodes[0]].store.content(VOLUME);
    for i in nodes {
        let machine = &cluster.machines[*i];
        assert!(machine.store.content(VOLUME) == first, "{} differs", machine.name);
    }
}

fn copied_blocks(cluster: &Cluster) -> u64 {
    let blocks = cluster.sent.iter().filter_map(|(_, _, message)| match message {
        Message::Replica(_, ReplicaMessage::Copy(CopyMessage::Blocks { ranges, .. })) => {
            Some(ranges.iter().map(|range| u64::from(range.count)).sum::<u64>())
        }
        _ => None,
    });
    blocks.sum()
}

#[test]
fn m1_a_lost_member_is_replaced_and_the_newcomer_counts() {
    let (mut cluster, id) = four(1);
    cluster.kill(2); // for good
    cluster.write(0, id, 7, 77);
    replace(&mut cluster, 2);
    run_until(&mut cluster, "the change", changed);
    let nodes: Vec<_> = config(&cluster).members.iter().map(|m| m.node.as_str()).collect();
    assert_eq!(nodes, ["node-0", "node-1", "node-3"]);
    let config = config(&cluster);
    assert_eq!((config.learners.len(), &config.previous_members), (0, &None));
    let served = cluster.run_until_served();
    let id = cluster.connect(served, host(1));
    cluster.write(served, id, 8, 88);
    cluster.run_ms(100);
    assert_equal(&cluster, &[0, 1, 3]);
    // Of the old three one alone is left: the newcomer is the second of two.
    cluster.kill(1);
    cluster.write(served, id, 9, 99);
    cluster.kill(served);
    cluster.start(1);
    let next = cluster.run_until_served();
    let id = cluster.connect(next, host(1));
    let read: Vec<_> = [5, 7, 8, 9].map(|n| cluster.read(next, id, n)).into();
    assert_eq!(read, [55, 77, 88, 99]);
}

/// W4: two of three members, however many learners have it.
#[test]
fn m1_a_learner_counts_in_no_majority() {
    let (mut cluster, id) = four(2);
    cluster.kill(2);
    replace(&mut cluster, 2);
    run_until(&mut cluster, "a learner", |c| !config(c).learners.is_empty());
    cluster.api_up = false; // it stays one
    cluster.run_ms(3000);
    let status = cluster.status(3).expect("running");
    assert!(!status.incomplete && status.applied.lsn >= cluster.status(0).expect("up").committed);
    cluster.write(0, id, 3, 33);
    cluster.kill(1);
    let token = cluster.command(0, id, HostCommand::Write(at(4), block(44)));
    cluster.run_ms(900);
    assert_eq!(cluster.done.get(&(id, token)), None, "one member of three");
    assert!(cluster.status(3).expect("running").tail >= cluster.status(0).expect("up").tail);
    cluster.start(1);
    cluster.run_ms(900);
    assert_eq!(cluster.done.get(&(id, token)), Some(&Ok(HostDone::Ok)));
}

/// T3: the primary dies between the two steps; whoever takes over has both sets.
#[test]
fn m1_a_takeover_carries_a_change_on() {
    let (mut cluster, _) = four(3);
    cluster.kill(2);
    replace(&mut cluster, 2);
    run_until(&mut cluster, "both sets", both_sets);
    cluster.kill(0);
    // Node 1 and the newcomer are a majority of the new set; of the old one node 1 is left alone.
    cluster.run_ms(4000);
    assert!(both_sets(&cluster) && cluster.serving_nodes().is_empty(), "T4: of both sets");
    cluster.start(0);
    run_until(&mut cluster, "the change", changed);
    assert!(config(&cluster).epoch > Epoch(2), "somebody took over in between");
    let served = cluster.run_until_served();
    let id = cluster.connect(served, host(1));
    assert_eq!((cluster.read(served, id, 5), cluster.read(served, id, 7)), (55, 7));
    cluster.run_ms(3000);
    assert_equal(&cluster, &[0, 1, 3]);
}

/// The newcomer dies with a member while both count; the one that was given up is back.
#[test]
fn m1_a_change_that_cannot_go_on_is_taken_back() {
    let (mut cluster, id) = four(4);
    cluster.kill(2);
    cluster.write(0, id, 7, 77);
    replace(&mut cluster, 2);
    run_until(&mut cluster, "both sets", both_sets);
    cluster.kill(3);
    cluster.kill(0);
    cluster.start(2);
    run_until(&mut cluster, "the old set", |c| {
        !both_sets(c) && config(c).state == ConfigState::Active
    });
    assert!(!config(&cluster).is_member(NEWCOMER));
    assert_eq!(config(&cluster).learners.first().map(|m| m.replica), Some(NEWCOMER));
    assert!(cluster.notices.iter().any(|(_, n)| matches!(n, Notice::AbortingChange(_))));
    let served = cluster.run_until_served();
    let id = cluster.connect(served, host(1));
    assert_eq!(cluster.read(served, id, 7), 77);
    // It is asked for still: when the newcomer is back it goes on, and keeps what it had.
    cluster.write(served, id, 7, 78);
    cluster.start(3);
    cluster.start(0);
    run_until(&mut cluster, "the change", changed);
}

/// Its node shall be given up while it lives and leads: another that keeps up leads from then on.
#[test]
fn m1_a_primary_gives_its_own_place_away() {
    let (mut cluster, id) = four(5);
    replace(&mut cluster, 0);
    cluster.write(0, id, 7, 77);
    run_until(&mut cluster, "the change", changed);
    let config = config(&cluster).clone();
    assert!(!config.is_member(cluster.machines[0].replica));
    let served = cluster.run_until_served();
    assert_ne!(served, 0);
    assert_eq!(config.primary.node, cluster.machines[served].name);
    let id = cluster.connect(served, host(1));
    assert_eq!((cluster.read(served, id, 7), cluster.read(served, id, 5)), (77, 55));
}

/// The lost node is back in time: the learner goes again and no member has changed.
#[test]
fn m1_a_request_that_is_withdrawn_takes_the_learner_out() {
    let (mut cluster, _) = four(6);
    cluster.kill(2);
    cluster.filter = Box::new(|_, _, message| {
        !matches!(message, Message::Replica(_, ReplicaMessage::Copy(CopyMessage::Finish { .. })))
    });
    replace(&mut cluster, 2);
    run_until(&mut cluster, "a learner", |c| !config(c).learners.is_empty());
    cluster.run_ms(1000);
    let epoch = config(&cluster).epoch;
    cluster.object.replacement = None;
    cluster.publish();
    run_until(&mut cluster, "no learner", |c| config(c).learners.is_empty());
    cluster.run_ms(1000);
    assert_eq!((config(&cluster).epoch, both_sets(&cluster)), (epoch, false), "an edit within it");
    assert_eq!(cluster.machines[0].store.views(), 0, "nobody copies any more");
}

/// T9: the operator's word is not enough, nor is a configuration's: an engine that lost its replica
/// makes none, and one that nobody named promises nothing.
#[test]
fn t9_a_learner_that_is_gone_is_not_made_again() {
    let (mut cluster, id) = four(7);
    cluster.kill(2);
    replace(&mut cluster, 2);
    run_until(&mut cluster, "a learner", |c| !config(c).learners.is_empty());
    cluster.kill(3);
    cluster.machines[3].store.forget(VOLUME);
    cluster.start(3);
    cluster.run_ms(3000);
    assert_eq!(cluster.status(3), None);
    assert!(!config(&cluster).is_member(NEWCOMER));
    cluster.write(0, id, 7, 77);
}

/// Crash window: made, and the mark not durable. Asked again it is the same one, and incomplete.
#[test]
fn m1_a_learner_is_incomplete_before_anybody_hears_of_it() {
    let (mut cluster, _) = four(8);
    cluster.stop_disk(3, true);
    let new = NewReplica {
        volume: VOLUME,
        replica: NEWCOMER,
        name: "v".into(),
        size_blocks: SIZE_BLOCKS,
        source: None,
        incomplete: false,
    };
    let token = cluster.control(3, Control::CreateLearner(new));
    cluster.run_ms(50);
    assert!(!cluster.controls.contains_key(&token), "the mark is not durable");
    cluster.power_loss(3, 0);
    cluster.stop_disk(3, false);
    cluster.start(3);
    assert_eq!(cluster.status(3).map(|s| s.incomplete), Some(false), "the crash left it so");
    assert_eq!(make_learner(&mut cluster), (NEWCOMER, true));
}

fn slow_copies(options: &mut Options) {
    options.limits.copy_busy_bytes_s = 40 * 4096;
}

/// C3: a copy takes its share while hosts are at work, and all there is when they are quiet.
#[test]
fn c3_a_copy_is_paced_by_what_hosts_do() {
    let (mut cluster, id) = four_with(9, slow_copies);
    for n in 0..60 {
        cluster.command(0, id, HostCommand::Write(at(n), block(100 + n)));
    }
    cluster.run_ms(50);
    cluster.kill(2);
    replace(&mut cluster, 2);
    let mut slowest = 0;
    for n in 0..14 {
        let (began, stamp) = (cluster.now, 1000 + n);
        let token = cluster.command(0, id, HostCommand::Write(at(n), block(stamp)));
        run_until(&mut cluster, "a write", |c| c.done.contains_key(&(id, token)));
        slowest = slowest.max(cluster.now - began);
        cluster.run_to(began + 100 * MS);
    }
    let busy = copied_blocks(&cluster);
    assert!(slowest <= 5 * MS, "no write waits for a copy: {slowest} ns");
    assert!((1..100).contains(&busy), "{busy} blocks in 1.4 s at 40 a second, 82 in all");
    assert!(!changed(&cluster));
    run_until(&mut cluster, "the change", changed);
    cluster.run_ms(500);
    assert_equal(&cluster, &[0, 1, 3]);
}

/// C3: restarts of either side and a change of primary cost a look at the stamps, not the blocks.
#[test]
fn c3_a_copy_goes_on_after_restarts_and_another_primary() {
    let (mut cluster, id) = four_with(10, |options| {
        slow_copies(options);
        options.timing.copy_quiet = harness::ms(60_000); // at the slow pace all the time
    });
    for n in 0..60 {
        cluster.write(0, id, n, 100 + n);
    }
    cluster.kill(2);
    cluster.sent.clear();
    replace(&mut cluster, 2);
    let part =
        |c: &Cluster| c.status(0).is_some_and(|s| s.members.iter().any(|m| m.copy.is_some()));
    run_until(&mut cluster, "a copy", part);
    cluster.run_ms(700);
    cluster.kill(3);
    cluster.run_ms(300);
    cluster.start(3);
    cluster.run_ms(1200);
    assert!(!changed(&cluster), "still at it");
    cluster.start(2);
    cluster.kill(0);
    run_until(&mut cluster, "the change", changed);
    cluster.start(0);
    cluster.run_ms(4000);
    assert_equal(&cluster, &[0, 1, 3]);
    let blocks = copied_blocks(&cluster);
    assert!(blocks <= 82 + 40, "{blocks} blocks were sent of 82 that differ");
}
