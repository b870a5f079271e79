//! Handing over in good order (T10): the member that follows swaps while the old primary serves, so a
//! host waits for a seal and a no-op. Then each way in which that can go wrong: the old primary goes on
//! in its epoch, or somebody takes over as from any primary; nothing is lost.

mod harness;

use harness::{Cluster, MS, SIZE_BLOCKS, VOLUME, at, block, host, ms};
use tercet_proto::message::{HandOverMessage, Message, ReplicaMessage};
use tercet_proto::storage::Incomplete;
use tercet_proto::{
    Config, ConfigState, Epoch, Lsn, Member, NodeName, Place, Primary, ReplicaId, Token,
};
use tercet_replication::api::{
    AssociationId, Control, ControlDone, ControlError, HostCommand, Notice,
};

/// What an API server takes for a swap: longer than a host may wait.
const SWAP_MS: u64 = 300;
/// A seal and a no-op here: a few messages of at most 150 us, a few writes of at most 220 us.
const STALL_MS: u64 = 5;
/// How long the new primary waits for the old one at most.
const PATIENCE_MS: u64 = 150;

/// Three nodes, the first of which serves a host that has written, and an API server that is slow.
fn cluster(seed: u64) -> (Cluster, AssociationId) {
    let mut cluster = Cluster::serving(seed);
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 11);
    cluster.swap_ms = SWAP_MS;
    (cluster, id)
}

fn hand_over(cluster: &mut Cluster, to: Option<usize>) -> Token {
    let to = to.map(|i| cluster.machines[i].name.clone());
    cluster.control(0, Control::HandOver(VOLUME, to))
}

fn epoch(cluster: &Cluster) -> Epoch {
    cluster.object.config.as_ref().expect("a config").epoch
}

fn is(message: &Message, what: fn(&HandOverMessage) -> bool) -> bool {
    matches!(message, Message::Replica(_, ReplicaMessage::HandOver(message)) if what(message))
}

fn said(cluster: &Cluster, what: fn(&HandOverMessage) -> bool) -> bool {
    cluster.sent.iter().any(|(_, _, message)| is(message, what))
}

fn is_swapped(message: &HandOverMessage) -> bool {
    matches!(message, HandOverMessage::Swapped { .. })
}

fn is_declined(message: &HandOverMessage) -> bool {
    matches!(message, HandOverMessage::Declined { .. })
}

fn is_give_back(message: &Message) -> bool {
    matches!(message, Message::Replica(_, ReplicaMessage::GiveBack))
}

/// Runs until another than node 0 serves: how long it was served at all, and not served at all.
fn until_handed_over(cluster: &mut Cluster) -> (u64, u64, usize) {
    let (mut served, mut stalled) = (0, 0);
    for _ in 0..40_000 {
        cluster.run_to(cluster.now + MS / 4);
        match cluster.serving_nodes()[..] {
            [0] => served += 1,
            [] => stalled += 1,
            [i] => return (served / 4, stalled / 4, i),
            _ => panic!("two serve"),
        }
    }
    panic!("nobody follows within 10 s: {:?} {:?}", cluster.object.config, cluster.notices);
}

fn value(cluster: &mut Cluster, at_block: u64) -> u64 {
    cluster.swap_ms = 0;
    let i = cluster.run_until_served();
    let id = cluster.connect(i, host(1));
    cluster.read(i, id, at_block)
}

fn why(cluster: &Cluster, token: Token) -> String {
    match cluster.controls.get(&token) {
        Some(Err(error @ ControlError::NotHandedOver { .. })) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn t10_a_host_waits_for_a_seal_and_a_no_op_and_not_for_the_api_server() {
    for seed in 1..=60 {
        let to = 1 + seed as usize % 2;
        let (mut cluster, _) = cluster(seed);
        let asked = hand_over(&mut cluster, Some(to));
        let (served, stalled, next) = until_handed_over(&mut cluster);
        assert_eq!(next, to, "seed {seed}: the one that was named");
        assert!(served >= SWAP_MS, "seed {seed}: the old primary served for {served} ms");
        assert!(stalled <= STALL_MS, "seed {seed}: {stalled} ms");
        cluster.run_ms(20);
        assert!(matches!(cluster.controls.get(&asked), Some(Ok(ControlDone::Ok))));
        assert_eq!(epoch(&cluster), Epoch(2));
        assert_eq!(value(&mut cluster, 1), 11);
        cluster.run_ms(1000);
        cluster.assert_converged();
    }
}

/// A host that writes all the while: what was taken before the last step is answered, each once, and
/// nothing that was answered is lost (H4, W4).
#[test]
fn h4_what_is_in_flight_is_answered_before_the_lease_is_given_back() {
    for seed in 1..=40 {
        let (mut cluster, id) = cluster(seed);
        hand_over(&mut cluster, None);
        let mut sent = Vec::new();
        while cluster.serving_nodes() == [0] {
            let n = sent.len() as u64;
            let write = HostCommand::Write(at(n % SIZE_BLOCKS), block(100 + n));
            sent.push((cluster.command(0, id, write), n));
            cluster.run_to(cluster.now + 50_000);
        }
        let refused = |done: &Option<_>| matches!(done, Some(Err(_)));
        until_handed_over(&mut cluster);
        assert!(cluster.ended.contains(&id), "H4");
        let done = |token| cluster.done.get(&(id, token)).cloned();
        let open: Vec<_> = sent.iter().filter(|(token, _)| done(*token).is_none()).collect();
        assert!(open.is_empty(), "seed {seed}: {} of {} without an answer", open.len(), sent.len());
        let taken: Vec<_> = sent.iter().filter(|(token, _)| !refused(&done(*token))).collect();
        assert!(taken.len() + 40 > sent.len(), "only the last are refused");
        let (_, last) = taken.last().expect("some");
        assert_eq!(value(&mut cluster, last % SIZE_BLOCKS), 100 + last, "seed {seed}");
        cluster.run_ms(1000);
        cluster.assert_converged();
    }
}

/// The swap is never carried out: nothing has changed, and the answer says what stood in the way.
#[test]
fn t3_a_swap_that_does_not_take_place_leaves_the_old_primary_in_its_epoch() {
    let (mut cluster, id) = cluster(3);
    cluster.cut.insert((1, 1)); // its agent has lost the API server
    let asked = hand_over(&mut cluster, Some(1));
    for _ in 0..5000 {
        cluster.run_ms(1);
        assert_eq!(cluster.serving_nodes(), [0]);
    }
    assert!(why(&cluster, asked).contains("has not answered the swap"));
    cluster.write(0, id, 1, 12);
    assert_eq!(epoch(&cluster), Epoch(1));
    // It may be asked again, and another can follow at once.
    let again = hand_over(&mut cluster, Some(2));
    assert_eq!(until_handed_over(&mut cluster).2, 2);
    cluster.run_ms(20);
    assert!(matches!(cluster.controls.get(&again), Some(Ok(ControlDone::Ok))));
    assert_eq!(value(&mut cluster, 1), 12);
}

/// The request was given up, and the swap takes place after all: the old primary makes way.
#[test]
fn t3_a_swap_that_takes_place_after_the_request_was_given_up_ends_the_epoch() {
    let (mut cluster, id) = cluster(4);
    cluster.swap_ms = 5000;
    let asked = hand_over(&mut cluster, Some(1));
    cluster.run_ms(3000);
    assert!(why(&cluster, asked).contains("has not answered the swap"));
    cluster.write(0, id, 1, 12);
    let (_, stalled, next) = until_handed_over(&mut cluster);
    assert!(next == 1 && stalled <= STALL_MS, "node {next} after {stalled} ms");
    assert_eq!(value(&mut cluster, 1), 12);
}

fn led_by(cluster: &Cluster, i: usize, epoch: u64) -> Config {
    let machine = &cluster.machines[i];
    let primary = Primary { node: machine.name.clone(), instance: machine.instance };
    let config = cluster.object.config.clone().expect("a config");
    Config { epoch: Epoch(epoch), state: ConfigState::Recovering, primary, ..config }
}

/// A second candidate wins the race (T3): the heir follows the winner, and says so.
#[test]
fn t3_who_loses_the_race_follows_the_winner() {
    for seed in 1..=20 {
        let (mut cluster, _) = cluster(seed);
        let asked = hand_over(&mut cluster, Some(1));
        cluster.run_ms(SWAP_MS / 2);
        cluster.object.config = Some(led_by(&cluster, 2, 2));
        cluster.publish();
        let (_, _, next) = until_handed_over(&mut cluster);
        assert_eq!(next, 2);
        cluster.run_ms(2500);
        assert!(why(&cluster, asked).contains("another member has taken over"));
        assert_eq!((epoch(&cluster), value(&mut cluster, 1)), (Epoch(2), 11));
    }
}

/// An edit within the epoch came between: the heir tries again with the new value (T3).
#[test]
fn t3_an_edit_that_came_between_is_swapped_over() {
    let (mut cluster, _) = cluster(5);
    hand_over(&mut cluster, Some(1));
    cluster.run_ms(SWAP_MS / 2);
    let learner = Member { node: NodeName::new("node-9"), replica: ReplicaId::from_bytes([9; 16]) };
    cluster.object.config.as_mut().expect("a config").learners = vec![learner.clone()];
    cluster.publish();
    let (served, stalled, next) = until_handed_over(&mut cluster);
    assert!(next == 1 && stalled <= STALL_MS, "node {next} after {stalled} ms");
    assert!(served >= SWAP_MS * 3 / 2, "two swaps: {served} ms");
    assert_eq!(cluster.object.config.as_ref().expect("a config").learners, [learner]);
    assert!(!said(&cluster, is_declined));
}

/// The heir dies, and its swap takes place: an ordinary takeover follows, with all that was written.
#[test]
fn t2_an_heir_that_dies_after_its_swap_is_taken_over_from() {
    for seed in 1..=20 {
        for dies_after in [SWAP_MS / 2, SWAP_MS + 1] {
            let (mut cluster, _) = cluster(seed);
            hand_over(&mut cluster, Some(1));
            cluster.run_ms(dies_after);
            cluster.kill(1);
            cluster.swap_ms = 10;
            cluster.run_ms(600);
            assert!(epoch(&cluster) >= Epoch(2), "its swap took place");
            let (_, _, next) = until_handed_over_or_again(&mut cluster);
            assert_ne!(next, 1);
            assert_eq!(value(&mut cluster, 1), 11);
            cluster.start(1);
            cluster.run_ms(3000);
            cluster.assert_converged();
        }
    }
}

/// As `until_handed_over`, but node 0 may be it again, in a later epoch.
fn until_handed_over_or_again(cluster: &mut Cluster) -> (u64, u64, usize) {
    let began = cluster.now;
    loop {
        cluster.run_ms(1);
        let later = |i: &usize| cluster.status(*i).is_some_and(|s| s.epoch > Epoch(2));
        if let Some(i) = cluster.serving_nodes().into_iter().find(later) {
            return (0, (cluster.now - began) / MS, i);
        }
        assert!(cluster.now - began < 6000 * MS, "nobody takes over: {:?}", cluster.notices);
    }
}

/// The word that its swap took place is lost: the old primary hears of it from the object (T8), a
/// little later, and stops in good order.
#[test]
fn t8_the_object_says_so_when_the_heirs_word_is_lost() {
    for seed in 1..=20 {
        let (mut cluster, _) = cluster(seed);
        cluster.filter = Box::new(|_, _, message| !is(message, is_swapped));
        hand_over(&mut cluster, Some(1));
        let (_, stalled, next) = until_handed_over(&mut cluster);
        // Its agent hears of it at once, and waits a beat for the heir's word; the heir does not wait
        // as long, and its seal comes first (T4): the old lease is waited out, no more.
        assert!(next == 1 && stalled <= 1000, "seed {seed}: {stalled} ms");
        assert_eq!(value(&mut cluster, 1), 11);
    }
}

/// Nor does its agent tell it: it is sealed, and stops (T4, T8).
#[test]
fn t4_a_primary_that_hears_nothing_is_sealed() {
    for seed in 1..=20 {
        let (mut cluster, _) = cluster(seed);
        cluster.cut.insert((0, 0));
        cluster.filter = Box::new(|_, _, message| !is(message, is_swapped));
        hand_over(&mut cluster, Some(1));
        let (_, stalled, next) = until_handed_over(&mut cluster);
        assert!(next == 1 && stalled <= 1000, "seed {seed}: {stalled} ms");
        assert_eq!(value(&mut cluster, 1), 11);
    }
}

/// It is cut off from both others at the worst moment: its lease is waited out, as always (L2).
#[test]
fn l2_a_primary_that_is_cut_off_after_the_swap_keeps_its_lease_until_it_is_over() {
    for seed in 1..=20 {
        let (mut cluster, _) = cluster(seed);
        hand_over(&mut cluster, Some(1));
        cluster.run_ms(SWAP_MS);
        for other in [1, 2] {
            cluster.cut.extend([(0, other), (other, 0)]);
        }
        cluster.cut.insert((0, 0));
        let began = cluster.now;
        let (_, _, next) = until_handed_over(&mut cluster);
        let took = (cluster.now - began) / MS;
        assert!(next == 1 && took <= 1000 + PATIENCE_MS + 20, "seed {seed}: {took} ms");
    }
}

/// The lease is given back and nobody hears of it: the wait is short, because the old primary is
/// sealed as well, and its own answer says as much (T4).
#[test]
fn l5_a_give_back_that_nobody_hears_costs_no_lease() {
    for seed in 1..=20 {
        let (mut cluster, _) = cluster(seed);
        cluster.filter = Box::new(|_, _, message| !is_give_back(message));
        hand_over(&mut cluster, Some(1));
        let (_, stalled, next) = until_handed_over(&mut cluster);
        assert!(next == 1 && stalled <= PATIENCE_MS + 20, "seed {seed}: {stalled} ms");
        assert_eq!(value(&mut cluster, 1), 11);
    }
}

/// A member that is not fit declines, and another follows; where it was the one named, nobody does.
#[test]
fn t10_a_member_that_is_not_fit_declines() {
    for named in [false, true] {
        let (mut cluster, id) = cluster(6);
        cluster.kill(1);
        let acknowledged = Incomplete::AcknowledgedUpTo(Place { epoch: Epoch(1), lsn: Lsn(2) });
        cluster.machines[1].store.damage(VOLUME, acknowledged);
        cluster.filter = Box::new(|_, _, message| {
            !matches!(message, Message::Replica(_, ReplicaMessage::Copy(_))) // it stays so
        });
        cluster.start(1);
        cluster.run_ms(3); // linked, and it has not said yet that it is incomplete
        let asked = hand_over(&mut cluster, named.then_some(1));
        if named {
            cluster.run_ms(4500);
            assert!(why(&cluster, asked).contains("to node-1"));
            assert_eq!(cluster.serving_nodes(), [0]);
            cluster.write(0, id, 1, 12);
        } else {
            assert_eq!(until_handed_over(&mut cluster).2, 2);
        }
    }
}

/// A slow disk at the heir: the old primary does not wait for ever for what it still lacks.
#[test]
fn t10_draining_is_bounded() {
    let (mut cluster, id) = cluster(7);
    hand_over(&mut cluster, Some(1));
    cluster.run_ms(SWAP_MS - 20);
    for other in [1, 2] {
        cluster.stop_disk(other, true);
    }
    let token = cluster.command(0, id, HostCommand::Write(at(1), block(12)));
    cluster.run_ms(20 + PATIENCE_MS + 50);
    assert_eq!(cluster.serving_nodes(), [0_usize; 0]);
    assert_eq!(cluster.done.get(&(id, token)), None, "one copy");
    assert!(cluster.ended.contains(&id), "H4");
    for other in [1, 2] {
        cluster.stop_disk(other, false);
    }
    let (_, stalled, next) = until_handed_over(&mut cluster);
    assert!(next == 1 && stalled <= 20, "{stalled} ms");
    let value = value(&mut cluster, 1);
    assert!([11, 12].contains(&value), "it may have taken effect, or not");
}

/// A member of an older engine is handed over to the older way.
#[test]
fn a_peer_of_an_older_version_follows_the_older_way() {
    let mut cluster = Cluster::new(3, 8);
    cluster.version = 3;
    cluster.create(0);
    cluster.run_until_served();
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 11);
    let asked = hand_over(&mut cluster, Some(1));
    until_handed_over(&mut cluster);
    cluster.run_ms(20);
    assert!(cluster.controls.contains_key(&asked));
    let newer = |message: &Message| message.version() > 3;
    assert!(!cluster.sent.iter().any(|(_, _, message)| newer(message)), "it would not understand");
    assert_eq!(value(&mut cluster, 1), 11);
}

/// An engine that stops hands over the same way, and ends when it leads nothing any more.
#[test]
fn l5_an_engine_that_stops_hands_over_while_it_serves() {
    let (mut cluster, _) = cluster(9);
    let asked = cluster.control(0, Control::Stop);
    let (served, stalled, next) = until_handed_over(&mut cluster);
    assert!(next != 0 && served >= SWAP_MS && stalled <= STALL_MS, "{served} {stalled}");
    cluster.run_ms(300);
    assert!(matches!(cluster.controls.get(&asked), Some(Ok(ControlDone::Ok))));
    assert_eq!(value(&mut cluster, 1), 11);
}

/// Where nobody can swap it gives its lease back all the same: whoever takes over need not wait for it.
#[test]
fn l5_an_engine_that_stops_with_nobody_to_follow_gives_its_lease_back() {
    let (mut cluster, _) = cluster(10);
    cluster.api_up = false;
    let asked = cluster.control(0, Control::Stop);
    cluster.run_ms(4300);
    assert!(matches!(cluster.controls.get(&asked), Some(Ok(ControlDone::Ok))));
    cluster.kill(0);
    cluster.api_up = true;
    cluster.swap_ms = 0;
    cluster.publish();
    let began = cluster.now;
    let next = cluster.run_until_served();
    let took = (cluster.now - began) / MS;
    assert!(next != 0 && took <= 1000, "node {next} after {took} ms");
    assert_eq!(value(&mut cluster, 1), 11);
}

/// One that is about to stop follows nobody.
#[test]
fn t10_who_stops_does_not_follow() {
    let (mut cluster, _) = cluster(11);
    cluster.control(1, Control::Stop);
    hand_over(&mut cluster, None);
    assert_eq!(until_handed_over(&mut cluster).2, 2);
}

/// Where there is no member named so, or it leads already, the answer comes at once.
#[test]
fn t10_a_name_that_cannot_follow_is_refused_at_once() {
    let (mut cluster, _) = cluster(12);
    let nowhere = Some(NodeName::new("node-9"));
    let asked = cluster.control(0, Control::HandOver(VOLUME, nowhere));
    assert!(why(&cluster, asked).contains("no member there"));
    let here = hand_over(&mut cluster, Some(0));
    assert!(matches!(cluster.controls.get(&here), Some(Ok(ControlDone::Ok))));
    hand_over(&mut cluster, Some(1));
    let second = hand_over(&mut cluster, Some(2));
    assert!(matches!(cluster.controls.get(&second), Some(Err(ControlError::Storage(_)))), "busy");
}

/// L5 is final for that (epoch, instance), however often the word comes; and the asking, which came
/// twice, does nothing the second time.
#[test]
fn l5_t10_words_that_come_twice_do_nothing() {
    for seed in 1..=40 {
        let mut cluster = Cluster::with(3, seed, |options| options.timing.beat = ms(50));
        cluster.create(0);
        cluster.run_until_served();
        cluster.faults.double = 1.0;
        cluster.faults.delay_us = 4000;
        cluster.swap_ms = 60;
        let id = cluster.connect(0, host(1));
        cluster.write(0, id, 1, 11);
        hand_over(&mut cluster, Some(1));
        until_handed_over(&mut cluster);
        cluster.run_ms(1000);
        assert_eq!((epoch(&cluster), cluster.serving_nodes()), (Epoch(2), vec![1]), "seed {seed}");
        let served = |n: &&(usize, Notice)| matches!(n.1, Notice::Serving(_));
        assert_eq!(cluster.notices.iter().filter(served).count(), 2, "seed {seed}");
    }
}
