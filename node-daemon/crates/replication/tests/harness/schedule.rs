//! Random schedules: loss, doubling, reordering, crashes, power loss, cut links, pauses, an API
//! server that loses answers. Nothing acknowledged is lost, reads are linearizable, one node serves
//! at a time; once all is healed everyone serves again and the replicas converge.

use super::register::Workload;
use super::{Cluster, Faults, KIND, MS, VOLUME};
use rand::Rng;
use tercet_replication::Options;
use tercet_replication::api::Control;

const NODES: usize = 3;

fn one_serves(cluster: &Cluster) {
    let running = |i: &usize| cluster.machines[*i].paused_until <= cluster.now;
    let serving: Vec<_> = cluster.serving_nodes().into_iter().filter(running).collect();
    assert!(serving.len() <= 1, "two serve at {}: {serving:?}", cluster.now);
}

fn hurt(cluster: &mut Cluster, work: &mut Workload, down: &mut [bool; NODES]) {
    let i = cluster.rng.random_range(0..NODES);
    match cluster.rng.random_range(0..18) {
        0 | 1 if !down[i] => {
            cluster.kill(i);
            down[i] = true;
        }
        2 if !down[i] => {
            let kept = cluster.rng.random_range(0..4);
            cluster.power_loss(i, kept);
            down[i] = true;
        }
        3..=7 => {
            if let Some(i) = (0..NODES).find(|i| down[*i]) {
                cluster.start(i);
                down[i] = false;
            }
        }
        8 => {
            let j = cluster.rng.random_range(0..NODES);
            cluster.cut.insert((i, j));
        }
        9 => cluster.cut.clear(),
        10 => {
            let ms = cluster.rng.random_range(100..2500);
            cluster.machines[i].paused_until = cluster.now + ms * MS;
        }
        11 => cluster.api_up = cluster.rng.random_bool(0.7),
        12 => work.reboot(i % 2),
        13 => {
            let stopped = cluster.rng.random_bool(0.3);
            cluster.stop_disk(i, stopped);
        }
        14 | 15 => {
            for j in 0..NODES {
                cluster.cut.extend([(i, j), (j, i)]); // alone, but its hosts still reach it
            }
        }
        _ => hand_over(cluster),
    }
}

/// Whoever serves is asked to hand over, to anybody or to a node that is drawn.
fn hand_over(cluster: &mut Cluster) {
    if let Some(&from) = cluster.serving_nodes().first() {
        let to = cluster.rng.random_range(0..2 * NODES);
        let to = cluster.machines.get(to).map(|machine| machine.name.clone());
        cluster.swap_ms = cluster.rng.random_range(0..60);
        cluster.control(from, Control::HandOver(VOLUME, to));
    }
}

/// One seed: trouble, then healing; returns how many operations were completed.
pub fn run(seed: u64, customize: fn(&mut Options)) -> usize {
    let mut cluster = Cluster::with(NODES, seed, customize);
    cluster.faults = Faults {
        lose: cluster.rng.random_range(0.0..0.15),
        double: cluster.rng.random_range(0.0..0.15),
        delay_us: cluster.rng.random_range(100..20_000),
        disk_us: cluster.rng.random_range(100..30_000),
        swap_unknown: cluster.rng.random_range(0.0..0.3),
    };
    cluster.create(0);
    let mut work = Workload::new(2, 8, NODES);
    let mut down = [false; NODES];
    for _ in 0..600 {
        for _ in 0..cluster.rng.random_range(0..6) {
            work.begin(&mut cluster);
        }
        work.step(&mut cluster);
        let ms = cluster.rng.random_range(1..40);
        cluster.run_ms(ms);
        one_serves(&cluster);
        if cluster.rng.random_bool(0.08) {
            hurt(&mut cluster, &mut work, &mut down);
        }
    }
    heal(&mut cluster, &mut work, &mut down);
    work.completed
}

fn heal(cluster: &mut Cluster, work: &mut Workload, down: &mut [bool; NODES]) {
    cluster.cut.clear();
    cluster.api_up = true;
    cluster.faults = KIND;
    cluster.swap_ms = 0;
    for (i, down) in down.iter_mut().enumerate() {
        cluster.stop_disk(i, false);
        cluster.machines[i].paused_until = 0;
        if std::mem::take(down) {
            cluster.start(i);
        }
    }
    cluster.publish();
    for _ in 0..6000 {
        work.step(cluster);
        cluster.run_ms(10);
        one_serves(cluster);
        if work.pending() == 0 {
            break;
        }
    }
    let statuses: Vec<_> = (0..NODES).map(|i| cluster.status(i)).collect();
    assert_eq!(work.pending(), 0, "no progress after healing: {:?} {statuses:?}", work.describe());
    cluster.run_ms(3000);
    cluster.assert_converged();
}
