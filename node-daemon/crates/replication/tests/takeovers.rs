//! How soon a volume is served again when its primary's engine is killed and comes back on the spot.

mod harness;

use harness::{Cluster, MS, at, block, host};
use tercet_proto::Epoch;
use tercet_proto::message::{Message, ReplicaMessage};
use tercet_replication::api::{HostCommand, Input};

/// What a kill -9 and a restart take before the new engine has replayed its log.
const RESTART_MS: u64 = 250;
/// D of rule L2.
const LEASE_MS: u64 = 1000;

/// Three nodes, the first of which leads and is killed with an entry that nobody else has.
fn killed_with_the_best_tail(seed: u64) -> Cluster {
    let mut cluster = Cluster::serving(seed);
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 5);
    cluster.filter = Box::new(|from, _, message| {
        let appends = matches!(message, Message::Replica(_, ReplicaMessage::Append { .. }));
        from != 0 || !appends
    });
    cluster.command(0, id, HostCommand::Write(at(2), block(6)));
    cluster.run_ms(5);
    cluster.kill(0);
    cluster.filter = Box::new(|_, _, _| true);
    cluster.run_ms(RESTART_MS);
    cluster
}

/// The new engine proves its predecessor's exit before it has a link (R3, L5).
fn restart(cluster: &mut Cluster, i: usize) {
    let (name, exited) = (cluster.machines[i].name.clone(), cluster.machines[i].instance);
    cluster.start(i);
    cluster.input(i, Input::ProvenExit(name, exited));
}

/// How long until somebody serves, and who.
fn served(cluster: &mut Cluster) -> (u64, usize) {
    let began = cluster.now;
    let next = cluster.run_until_served();
    ((cluster.now - began) / MS, next)
}

/// Seen with real processes: of trials with `kill -9` some stood still for more than a second. The
/// engine that had come back had the best tail, stood first, won, and then waited out its own D (L4)
/// while two others could have been sealed at once.
#[test]
fn t2_l4_who_comes_back_stands_after_those_whose_seal_need_not_wait() {
    for seed in 1..=60 {
        let mut cluster = killed_with_the_best_tail(seed);
        restart(&mut cluster, 0);
        served_by_another(&mut cluster, seed);
        let mut cluster = killed_with_the_best_tail(seed);
        cluster.cut.extend([(0, 1), (1, 0), (0, 2), (2, 0)]);
        restart(&mut cluster, 0);
        // So slow a start that it asks the others with its first link, and not before they ask.
        cluster.machines[0].paused_until = cluster.now + 100 * MS + MS / 4;
        cluster.run_ms(98);
        cluster.cut.clear();
        served_by_another(&mut cluster, seed);
    }
}

fn served_by_another(cluster: &mut Cluster, seed: u64) {
    let (took_ms, next) = served(cluster);
    assert!(next != 0 && took_ms <= 20, "seed {seed}: node {next} after {took_ms} ms");
    cluster.run_ms(2000);
    cluster.assert_converged();
}

/// It goes last, and it goes: nobody else can swap here.
#[test]
fn t2_who_comes_back_stands_when_nobody_else_does() {
    for seed in 1..=20 {
        let mut cluster = killed_with_the_best_tail(seed);
        cluster.cut.extend([(1, 1), (2, 2)]);
        restart(&mut cluster, 0);
        let (took_ms, next) = served(&mut cluster);
        assert!(next == 0 && took_ms <= LEASE_MS + 20, "seed {seed}: {next} after {took_ms} ms");
    }
}

/// The third is gone for good: who comes back has to be sealed, so its D is waited out, and no more.
#[test]
fn l4_with_one_other_left_its_seal_is_waited_for() {
    for seed in 1..=20 {
        let mut cluster = killed_with_the_best_tail(seed);
        cluster.kill(2);
        restart(&mut cluster, 0);
        let (took_ms, next) = served(&mut cluster);
        let bound = LEASE_MS - 20..=LEASE_MS + 20;
        assert!(next == 1 && bound.contains(&took_ms), "seed {seed}: {next} after {took_ms} ms");
    }
}

/// All three lose their power: each waits out its own D, and whoever stands does so in that time.
#[test]
fn l4_when_all_come_back_the_volume_is_served_after_one_lease() {
    for seed in 1..=20 {
        let mut cluster = killed_with_the_best_tail(seed);
        for other in [1, 2] {
            cluster.power_loss(other, usize::MAX);
        }
        cluster.run_ms(10);
        for i in 0..3 {
            restart(&mut cluster, i);
        }
        let (took_ms, next) = served(&mut cluster);
        assert!(took_ms <= LEASE_MS + 150, "seed {seed}: node {next} after {took_ms} ms");
    }
}

/// The next engine of the primary's node tells the exit before it has replayed its log (L5): two others
/// take over while it has no link at all. The news reaches them at two times; who heard of it first is
/// asked again by no clock, but by the one who hears of it later.
#[test]
fn l5_t2_an_exit_that_is_told_early_is_taken_up_before_the_next_engine_has_a_link() {
    for seed in 1..=60 {
        for apart_ms in [0, 1, 7, 40] {
            let mut cluster = killed_with_the_best_tail(seed);
            let (name, exited) = (cluster.machines[0].name.clone(), cluster.machines[0].instance);
            let (first, second) = if seed % 2 == 0 { (1, 2) } else { (2, 1) };
            cluster.input(first, Input::ProvenExit(name.clone(), exited));
            cluster.run_ms(apart_ms);
            cluster.input(second, Input::ProvenExit(name, exited));
            let (took_ms, next) = served(&mut cluster);
            assert!(next != 0 && took_ms <= 20, "seed {seed}: node {next} after {took_ms} ms");
            restart(&mut cluster, 0);
            cluster.run_ms(2000);
            cluster.assert_converged();
        }
    }
}

/// Who has locked a node's device, or reaped its engine, knows of that node's instances and no other.
#[test]
fn l5_what_a_node_says_of_anothers_instance_counts_for_nothing() {
    for seed in 1..=20 {
        let mut cluster = Cluster::serving(seed);
        let (living, liar) = (cluster.machines[0].instance, cluster.machines[2].name.clone());
        for i in 0..3 {
            cluster.input(i, Input::ProvenExit(liar.clone(), living));
        }
        cluster.run_ms(3000);
        assert_eq!(cluster.object.config.as_ref().map(|config| config.epoch), Some(Epoch(1)));
        assert_eq!(cluster.serving_nodes(), [0], "seed {seed}");
    }
}

/// A seal that waits for the dead one's grants goes on with the news of its exit, not with a beat.
#[test]
fn l5_the_news_of_an_exit_ends_a_seals_wait_at_once() {
    for seed in 1..=20 {
        let mut cluster = killed_with_the_best_tail(seed);
        let (name, exited) = (cluster.machines[0].name.clone(), cluster.machines[0].instance);
        cluster.start(0);
        cluster.run_ms(30);
        assert_eq!(cluster.serving_nodes(), [0_usize; 0], "the dead one may have a lease (T4)");
        cluster.input(0, Input::ProvenExit(name, exited));
        let (took_ms, _) = served(&mut cluster);
        assert!(took_ms <= 10, "seed {seed}: {took_ms} ms");
    }
}
