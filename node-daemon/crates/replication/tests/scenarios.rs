//! The rules, one story each, told with three nodes, one host and a disk that can be held back.

mod harness;

use harness::store::snapshot_id;
use harness::{Cluster, SIZE_BLOCKS, VOLUME, at, block, host};
use tercet_proto::message::{Message, ReplicaMessage};
use tercet_proto::storage::Incomplete;
use tercet_proto::{ConfigState, Epoch, Lsn, Place, Primary};
use tercet_replication::api::{
    Ana, Control, ControlDone, ControlError, HostCommand, HostDone, HostError, HostRefusal, Input,
    Notice, VolumeView,
};

#[test]
fn t9_t7_a_new_volume_serves_and_becomes_active() {
    let cluster = Cluster::serving(1);
    let config = cluster.object.config.clone().expect("a config");
    assert_eq!((config.epoch, config.state), (Epoch(1), ConfigState::Active));
    assert_eq!(cluster.serving_nodes(), [0]);
    assert_eq!(cluster.machines[0].ana, Ana::Optimized);
}

#[test]
fn w4_a_write_is_acknowledged_by_two_of_three_and_not_by_one() {
    let mut cluster = Cluster::serving(2);
    let id = cluster.connect(0, host(1));
    cluster.stop_disk(1, true);
    cluster.stop_disk(2, true);
    let token = cluster.command(0, id, HostCommand::Write(at(3), block(7)));
    cluster.run_ms(500);
    assert_eq!(cluster.done.get(&(id, token)), None, "one copy is not committed");
    cluster.stop_disk(2, false);
    cluster.run_ms(5);
    assert_eq!(cluster.done.get(&(id, token)), Some(&Ok(HostDone::Ok)));
    assert_eq!(cluster.read(0, id, 3), 7);
}

#[test]
fn w4_the_primary_reports_only_from_its_own_durable_log() {
    let mut cluster = Cluster::serving(3);
    let id = cluster.connect(0, host(1));
    cluster.stop_disk(0, true);
    let token = cluster.command(0, id, HostCommand::Write(at(3), block(7)));
    cluster.run_ms(300);
    assert_eq!(cluster.done.get(&(id, token)), None);
    cluster.stop_disk(0, false);
    cluster.run_ms(5);
    assert_eq!(cluster.done.get(&(id, token)), Some(&Ok(HostDone::Ok)));
}

#[test]
fn t2_t3_another_member_takes_over_within_a_second_and_a_half_and_has_every_write() {
    let mut cluster = Cluster::serving(4);
    let id = cluster.connect(0, host(1));
    for n in 0..8 {
        cluster.write(0, id, n, 100 + n);
    }
    let dead = cluster.now;
    cluster.kill(0);
    let next = cluster.run_until_served();
    let stall_ms = (cluster.now - dead) / harness::MS;
    assert!(next != 0 && stall_ms <= 1500, "node {next} after {stall_ms} ms");
    let id = cluster.connect(next, host(1));
    for n in 0..8 {
        assert_eq!(cluster.read(next, id, n), 100 + n);
    }
    cluster.start(0);
    cluster.run_ms(2000);
    cluster.assert_converged();
}

#[test]
fn l5_a_proven_exit_spares_the_wait_for_grants() {
    let mut cluster = Cluster::serving(5);
    let (name, exited) = (cluster.machines[0].name.clone(), cluster.machines[0].instance);
    let dead = cluster.now;
    cluster.kill(0);
    cluster.run_ms(20);
    cluster.start(0);
    cluster.run_ms(1);
    cluster.input(0, Input::ProvenExit(name, exited));
    cluster.run_until_served();
    let stall_ms = (cluster.now - dead) / harness::MS;
    assert!(stall_ms <= 500, "{stall_ms} ms");
}

#[test]
fn t8_a_lost_lease_stops_reads_and_the_same_epoch_goes_on_when_it_returns() {
    let mut cluster = Cluster::serving(6);
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 11);
    cluster.api_up = false;
    for other in [1, 2] {
        cluster.cut.extend([(0, other), (other, 0)]);
    }
    cluster.run_ms(1200);
    assert_eq!(cluster.machines[0].ana, Ana::Inaccessible);
    let token = cluster.command(0, id, HostCommand::Read(at(1)));
    cluster.run_ms(500);
    assert_eq!(cluster.done.get(&(id, token)), None, "held, not answered without a lease (L1)");
    cluster.cut.clear();
    cluster.run_ms(600);
    let done = cluster.done.get(&(id, token)).expect("answered");
    assert!(matches!(done, Ok(HostDone::Data(data)) if harness::stamp(data) == 11));
    assert_eq!(cluster.object.config.as_ref().map(|config| config.epoch), Some(Epoch(1)));
}

/// Compare with `expected`, write `stamp`.
fn compare_write(at_block: u64, expected: u64, stamp: u64) -> HostCommand {
    HostCommand::CompareWrite(at(at_block), block(expected), block(stamp))
}

#[test]
fn l1_of_two_compare_and_writes_of_one_block_one_succeeds() {
    for seed in 100..140 {
        let mut cluster = Cluster::serving(seed);
        let hosts = [cluster.connect(0, host(1)), cluster.connect(0, host(2))];
        cluster.write(0, hosts[0], 3, 7);
        for round in 0..6 {
            let (old, new) = if round == 0 { (7, 10) } else { (10 * round, 10 * (round + 1)) };
            let tokens = [
                cluster.command(0, hosts[0], compare_write(3, old, new)),
                cluster.command(0, hosts[1], compare_write(3, old, new)),
            ];
            cluster.run_ms(1000);
            let done = |which: usize| cluster.done[&(hosts[which], tokens[which])].clone();
            let ok = [done(0), done(1)].iter().filter(|done| **done == Ok(HostDone::Ok)).count();
            assert_eq!(ok, 1, "seed {seed}: {:?} {:?}", done(0), done(1));
            assert!([done(0), done(1)].contains(&Ok(HostDone::Differs(3))));
            assert_eq!(cluster.read(0, hosts[1], 3), new);
        }
        cluster.assert_converged();
    }
}

#[test]
fn l1_a_write_behind_a_compare_and_write_is_not_lost_in_it() {
    let mut cluster = Cluster::serving(141);
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 3, 7);
    // An uncommitted entry before it, so that it waits; a change behind it waits as well.
    cluster.stop_disk(1, true);
    cluster.stop_disk(2, true);
    let first = cluster.command(0, id, HostCommand::Write(at(3), block(8)));
    let fused = cluster.command(0, id, compare_write(3, 8, 9));
    let behind = cluster.command(0, id, HostCommand::Write(at(3), block(10)));
    let beside = cluster.command(0, id, HostCommand::Write(at(4), block(11)));
    cluster.run_ms(300);
    assert!(
        [first, fused, behind, beside]
            .iter()
            .all(|token| !cluster.done.contains_key(&(id, *token)))
    );
    cluster.stop_disk(1, false);
    cluster.run_ms(1000);
    for token in [first, fused, behind, beside] {
        assert_eq!(cluster.done.get(&(id, token)), Some(&Ok(HostDone::Ok)));
    }
    assert_eq!(cluster.read(0, id, 3), 10);
    let stale = cluster.command(0, id, compare_write(3, 8, 9));
    cluster.run_ms(1000);
    assert_eq!(cluster.done.get(&(id, stale)), Some(&Ok(HostDone::Differs(3))));
    assert_eq!(cluster.read(0, id, 3), 10, "a compare that fails writes nothing");
}

#[test]
fn l1_compare_and_writes_that_waited_together_compare_one_after_the_other() {
    let mut cluster = Cluster::serving(142);
    let hosts = [cluster.connect(0, host(1)), cluster.connect(0, host(2))];
    cluster.write(0, hosts[0], 3, 7);
    // An uncommitted entry before both: what frees one frees the other.
    cluster.stop_disk(1, true);
    cluster.stop_disk(2, true);
    cluster.command(0, hosts[0], HostCommand::Write(at(3), block(8)));
    let tokens = hosts.map(|id| cluster.command(0, id, compare_write(3, 8, 9)));
    cluster.run_ms(300);
    cluster.stop_disk(1, false);
    cluster.run_ms(1000);
    let done = [0, 1].map(|which| cluster.done[&(hosts[which], tokens[which])].clone());
    let ok = done.iter().filter(|done| **done == Ok(HostDone::Ok)).count();
    assert_eq!(ok, 1, "{done:?}");
    assert!(done.contains(&Ok(HostDone::Differs(3))));
    assert_eq!(cluster.read(0, hosts[1], 3), 9);
}

#[test]
fn h2_h4_nobody_but_the_serving_primary_keeps_a_command() {
    let mut cluster = Cluster::serving(7);
    let there = cluster.connect(1, host(1));
    let token = cluster.command(1, there, HostCommand::Write(at(1), block(1)));
    assert_eq!(cluster.done.get(&(there, token)), Some(&Err(HostError::Inaccessible)));
    let here = cluster.connect(0, host(1));
    let hand_over = Control::HandOver(VOLUME, Some(cluster.machines[1].name.clone()));
    let asked = cluster.control(0, hand_over);
    let began = cluster.now;
    while cluster.serving_nodes() != [1] {
        cluster.run_ms(1);
        assert!(cluster.now - began < 100 * harness::MS, "an orderly hand-over takes <= 100 ms");
    }
    cluster.run_ms(20);
    assert!(matches!(cluster.controls.get(&asked), Some(Ok(ControlDone::Ok))));
    assert!(cluster.ended.contains(&here), "it could do I/O at the demoted one (H4)");
    assert!(!cluster.ended.contains(&there), "it never could");
    let early = cluster.command(1, there, HostCommand::Read(at(1)));
    assert_eq!(cluster.done.get(&(there, early)), Some(&Err(HostError::Inaccessible)));
    cluster.input(1, Input::HostReadAna(there));
    assert_eq!(cluster.read(1, there, 1), 0, "the ANA log of this promotion was read there");
}

/// Seed 500201: the words of a hand-over were lost. The others saw the old primary's engine answer, so
/// they never missed it, and it consulted them for ever.
#[test]
fn t2_t8_a_hand_over_that_nobody_heard_of_leaves_a_primary() {
    let mut cluster = Cluster::serving(24);
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 11); // from here on the others know that this primary serves
    cluster.filter = Box::new(|_, _, message| {
        !matches!(message, Message::Replica(_, ReplicaMessage::Stand | ReplicaMessage::GiveBack))
    });
    let hand_over = Control::HandOver(VOLUME, Some(cluster.machines[1].name.clone()));
    cluster.control(0, hand_over);
    let asked = cluster.now;
    while cluster.serving_nodes() == [0] {
        cluster.run_ms(1);
    }
    cluster.run_until_served();
    let stall_ms = (cluster.now - asked) / harness::MS;
    assert!(stall_ms <= 5000, "{stall_ms} ms");
    assert!(cluster.object.config.as_ref().is_some_and(|config| config.epoch > Epoch(1)));
}

#[test]
fn h3_a_host_that_comes_again_waits_for_what_it_sent_before() {
    let mut cluster = Cluster::serving(8);
    let old = cluster.connect(0, host(1));
    cluster.stop_disk(1, true);
    cluster.stop_disk(2, true);
    cluster.command(0, old, HostCommand::Write(at(1), block(5)));
    cluster.run_ms(5);
    let new = cluster.connect(0, host(1));
    assert!(cluster.ended.contains(&old), "one association for a host");
    let token = cluster.command(0, new, HostCommand::Read(at(1)));
    cluster.run_ms(300);
    assert_eq!(cluster.done.get(&(new, token)), None);
    cluster.stop_disk(1, false);
    cluster.run_ms(50);
    let done = cluster.done.get(&(new, token)).expect("answered");
    assert!(matches!(done, Ok(HostDone::Data(data)) if harness::stamp(data) == 5));
}

#[test]
fn h5_a_refused_host_is_fenced_once_its_entries_are_committed() {
    let mut cluster = Cluster::serving(9);
    let id = cluster.connect(0, host(1));
    cluster.stop_disk(1, true);
    cluster.stop_disk(2, true);
    cluster.command(0, id, HostCommand::Write(at(1), block(5)));
    cluster.object.attachments.retain(|attachment| attachment.host_nqn != host(1).nqn);
    cluster.object.generation = 2;
    cluster.publish();
    cluster.run_ms(200);
    assert!(cluster.ended.contains(&id));
    assert!(!cluster.fenced.contains(&(0, Epoch(1), 2)));
    cluster.stop_disk(1, false);
    cluster.run_ms(50);
    assert!(cluster.fenced.contains(&(0, Epoch(1), 2)));
}

#[test]
fn w7_c1_a_slow_secondary_is_left_behind_and_caught_up_from_the_log() {
    let mut cluster = Cluster::serving(10);
    let id = cluster.connect(0, host(1));
    cluster.stop_disk(2, true);
    for n in 0..1500 {
        cluster.command(0, id, HostCommand::Write(at(n % SIZE_BLOCKS), block(n)));
        cluster.run_ms(1);
    }
    cluster.run_ms(50);
    assert!(cluster.done.values().all(Result::is_ok) && cluster.done.len() == 1500);
    cluster.stop_disk(2, false);
    cluster.run_ms(3000);
    assert!(cluster.machines[0].store.log_reads > 0, "beyond the queue: from the log");
    cluster.assert_converged();
}

#[test]
fn t5_an_incomplete_replica_is_not_adopted_and_its_acknowledged_tail_is_waited_for() {
    let mut cluster = Cluster::serving(11);
    let id = cluster.connect(0, host(1));
    cluster.stop_disk(2, true);
    cluster.write(0, id, 1, 5);
    let acknowledged = Incomplete::AcknowledgedUpTo(Place { epoch: Epoch(1), lsn: Lsn(2) });
    for i in [0, 1] {
        cluster.kill(i);
    }
    cluster.power_loss(2, 0);
    cluster.machines[1].store.damage(VOLUME, acknowledged);
    cluster.machines[2].instance = cluster.machines[0].instance;
    cluster.stop_disk(2, false);
    cluster.start(1);
    cluster.start(2);
    cluster.run_ms(6000);
    assert_eq!(cluster.serving_nodes(), [0_usize; 0], "the acknowledged write is on node 0 alone");
    cluster.start(0);
    let next = cluster.run_until_served();
    let id = cluster.connect(next, host(1));
    assert_eq!(cluster.read(next, id, 1), 5);
}

#[test]
fn t9_a_wiped_node_counts_in_no_majority() {
    let mut cluster = Cluster::serving(12);
    let id = cluster.connect(0, host(1));
    cluster.stop_disk(2, true);
    cluster.write(0, id, 1, 5);
    cluster.kill(0);
    cluster.kill(1);
    cluster.machines[1].store.wipe();
    cluster.start(1);
    cluster.stop_disk(2, false);
    cluster.run_ms(6000);
    assert_eq!(cluster.serving_nodes(), [0_usize; 0]);
    let none = |(_, _, message): &(usize, usize, Message)| {
        matches!(message, Message::Replica(_, ReplicaMessage::NoReplica))
    };
    assert!(cluster.sent.iter().any(none), "it answers none");
    cluster.start(0);
    let next = cluster.run_until_served();
    let id = cluster.connect(next, host(1));
    assert_eq!(cluster.read(next, id, 1), 5);
}

#[test]
fn t1_a_restarted_primary_leads_only_in_a_new_epoch() {
    let mut cluster = Cluster::serving(13);
    cluster.kill(0);
    cluster.start(0);
    cluster.run_until_served();
    let config = cluster.object.config.clone().expect("a config");
    assert!(config.epoch > Epoch(1));
    let served = cluster.notices.iter().filter(|(_, n)| *n == Notice::Serving(Epoch(1))).count();
    assert_eq!(served, 1);
}

#[test]
fn s1_a_snapshot_is_one_entry_however_often_it_is_asked_for() {
    let mut cluster = Cluster::serving(14);
    let ask = Control::Snapshot(VOLUME, snapshot_id(1));
    let tokens = [(); 2].map(|()| cluster.control(0, ask.clone()));
    cluster.run_ms(20);
    let late = cluster.control(0, ask);
    let place = |token| match cluster.controls.get(&token) {
        Some(Ok(ControlDone::Place(place))) => *place,
        other => panic!("{other:?}"),
    };
    assert_eq!(place(tokens[0]), place(tokens[1]));
    assert_eq!(place(tokens[0]), place(late));
    let elsewhere = cluster.control(1, Control::Grow(VOLUME, 2 * SIZE_BLOCKS));
    let refused = cluster.controls.get(&elsewhere);
    assert!(matches!(refused, Some(Err(ControlError::NotPrimary(_)))));
    let shrunk = cluster.control(0, Control::Grow(VOLUME, 1));
    assert!(matches!(cluster.controls.get(&shrunk), Some(Err(ControlError::Shrink { .. }))));
}

#[test]
fn m4_two_replicas_need_both_and_one_needs_itself() {
    let mut one = Cluster::new(1, 15);
    one.create(0);
    assert_eq!(one.run_until_served(), 0);
    one.kill(0);
    one.start(0);
    assert_eq!(one.run_until_served(), 0);
    let mut two = Cluster::new(2, 16);
    two.create(0);
    two.run_until_served();
    let id = two.connect(0, host(1));
    two.stop_disk(1, true);
    let token = two.command(0, id, HostCommand::Write(at(1), block(5)));
    two.run_ms(300);
    assert_eq!(two.done.get(&(id, token)), None);
    two.stop_disk(1, false);
    two.run_ms(50);
    assert_eq!(two.done.get(&(id, token)), Some(&Ok(HostDone::Ok)));
}

#[test]
fn l4_a_replica_that_restarts_with_the_promise_waits_before_it_answers_the_seal() {
    let mut cluster = Cluster::with(3, 17, |options| {
        options.timing.missing_after = harness::ms(300);
        options.timing.beat = harness::ms(50);
    });
    cluster.create(0);
    cluster.run_until_served();
    cluster.cut.extend([(0, 0), (0, 2), (2, 0)]);
    cluster.run_ms(1500); // what node 2 granted is over; node 1 still grants
    assert_eq!(cluster.serving_nodes(), [0]);
    cluster.cut.extend([(0, 1), (1, 0)]);
    while cluster.status(1).expect("running").epoch != Epoch(2) {
        cluster.run_ms(1);
    }
    cluster.run_ms(1);
    cluster.kill(1); // with the promise durable and its grant to node 0 out
    cluster.start(1);
    assert_eq!(cluster.status(1).expect("running").epoch, Epoch(2));
    let began = cluster.now;
    while cluster.serving_nodes() != [2] {
        cluster.run_ms(1);
        assert!(cluster.serving_nodes().len() <= 1, "two answer reads");
        assert!(cluster.now - began < 2000 * harness::MS, "nobody takes over");
    }
}

#[test]
fn h5_t7_a_read_that_was_overtaken_lets_no_refused_host_in() {
    let mut cluster = Cluster::serving(18);
    let late = VolumeView { consistent: true, ..cluster.object.clone() };
    let id = cluster.connect(0, host(1));
    cluster.object.attachments.retain(|attachment| attachment.host_nqn != host(1).nqn);
    cluster.object.generation = 2;
    cluster.publish();
    cluster.run_ms(50);
    assert!(cluster.ended.contains(&id) && cluster.fenced.contains(&(0, Epoch(1), 2)));
    cluster.input(0, Input::Observe(VOLUME, late));
    let again = cluster.connect(0, host(1));
    assert_eq!(cluster.accepted.get(&again), Some(&Err(HostRefusal::NotAllowed)));
}

#[test]
fn t5_c2_a_candidate_behind_the_start_of_the_log_gets_nothing_and_breaks_nobody() {
    let mut cluster = Cluster::new(3, 19);
    for other in [0, 1] {
        cluster.cut.extend([(2, other), (other, 2)]);
    }
    cluster.create(0);
    cluster.run_until_served();
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 5);
    cluster.run_ms(50);
    cluster.machines[1].store.cut(VOLUME);
    cluster.kill(0);
    cluster.cut.clear();
    let mut config = cluster.object.config.clone().expect("a config");
    config.epoch = Epoch(2);
    config.state = ConfigState::Recovering;
    let empty = &cluster.machines[2];
    config.primary = Primary { node: empty.name.clone(), instance: empty.instance };
    cluster.object.config = Some(config);
    cluster.publish();
    cluster.run_ms(5000);
    let leads = cluster.object.config.as_ref().map(|config| config.primary.node.clone());
    assert_eq!(leads.as_ref(), Some(&cluster.machines[1].name), "T2: the one that has the log");
    cluster.start(0);
    let next = cluster.run_until_served();
    let id = cluster.connect(next, host(1));
    assert_eq!(cluster.read(next, id, 1), 5);
}

#[test]
fn l5_a_stop_during_a_hand_over_leaves_its_answer_to_it() {
    let mut cluster = Cluster::serving(20);
    let to = cluster.machines[1].name.clone();
    let id = cluster.connect(0, host(1));
    cluster.command(0, id, HostCommand::Write(at(1), block(5)));
    let asked = cluster.control(0, Control::HandOver(VOLUME, Some(to)));
    let stopped = cluster.control(0, Control::Stop);
    cluster.run_ms(500);
    assert!(matches!(cluster.controls.get(&asked), Some(Ok(ControlDone::Ok))));
    assert!(matches!(cluster.controls.get(&stopped), Some(Ok(ControlDone::Ok))));
    assert_eq!(cluster.serving_nodes(), [1]);
}

#[test]
fn t4_nothing_of_an_older_epoch_is_acknowledged_after_the_promise() {
    harness::stories::late_acknowledgement(|_| {});
}

/// Nothing is written, and what the primary says to a member that has started anew is lost: it held the
/// commit for told, and the member never applied its log (seed 5116).
#[test]
fn w5_a_member_that_starts_anew_hears_the_commit_of_an_idle_volume() {
    let mut cluster = Cluster::serving(21);
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 5);
    cluster.run_ms(50);
    cluster.power_loss(2, usize::MAX);
    cluster.filter = Box::new(|_, to, message| {
        to != 2 || !matches!(message, Message::Replica(_, ReplicaMessage::Append { .. }))
    });
    cluster.start(2);
    cluster.run_ms(100);
    cluster.filter = Box::new(|_, _, _| true);
    cluster.run_ms(2000);
    let status = cluster.status(2).expect("there");
    assert_eq!(status.applied, status.tail);
}
