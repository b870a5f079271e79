//! S3: a clone's replica that was made before its snapshot was applied on its node. It promises and is
//! sealed like any other, and is no copy until it has the snapshot's blocks.

mod harness;

use harness::{Cluster, VOLUME, at, block, host};
use tercet_proto::storage::{Incomplete, Source};
use tercet_proto::{Epoch, Lsn, Place, ReplicaId, SnapshotId, VolumeId};
use tercet_replication::api::{HostCommand, HostDone, Input, Notice};

const SOURCE: Source = Source {
    volume: VolumeId::from_bytes([9; 16]),
    snapshot: SnapshotId::from_bytes([1; 16]),
    place: Place { epoch: Epoch(1), lsn: Lsn(7) },
};

/// Three replicas of a clone, the last of which awaits its snapshot; node 0 leads.
fn with_one_incomplete(seed: u64) -> Cluster {
    let mut cluster = Cluster::new(3, seed);
    cluster.kill(2);
    // Its source is here, and has not applied the snapshot.
    cluster.machines[2].store.make(SOURCE.volume, ReplicaId::from_bytes([0x99; 16]), 64);
    cluster.machines[2].store.damage(VOLUME, Incomplete::Awaits(SOURCE));
    cluster.start(2);
    cluster.create(0);
    assert_eq!(cluster.run_until_served(), 0, "a majority is complete");
    cluster
}

fn fill(cluster: &mut Cluster) {
    cluster.machines[2].store.fill(VOLUME);
    cluster.input(2, Input::Tick);
}

fn incomplete(cluster: &Cluster) -> Vec<bool> {
    let status = cluster.status(0).expect("there");
    status.members.iter().map(|member| member.incomplete).collect()
}

#[test]
fn s3_who_awaits_its_snapshot_is_no_copy() {
    let mut cluster = with_one_incomplete(1);
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 11);
    assert_eq!(incomplete(&cluster), [false, false, true]);
    cluster.stop_disk(1, true);
    let token = cluster.command(0, id, HostCommand::Write(at(3), block(7)));
    cluster.run_ms(800);
    assert_eq!(cluster.done.get(&(id, token)), None, "W4: two complete copies, not one");
    assert!(cluster.machines[2].store.log(VOLUME).is_empty(), "it takes nothing");
    fill(&mut cluster);
    cluster.run_ms(500);
    assert_eq!(
        cluster.done.get(&(id, token)),
        Some(&Ok(HostDone::Ok)),
        "caught up (C1), it counts"
    );
    assert_eq!(incomplete(&cluster), [false; 3]);
    assert!(cluster.notices.contains(&(2, Notice::Filled)));
    cluster.stop_disk(1, false);
    cluster.run_ms(500);
    cluster.assert_converged();
}

/// What the filled replica says is lost: the primary asks again.
#[test]
fn s3_the_primary_hears_that_a_member_is_complete() {
    let mut cluster = with_one_incomplete(2);
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 11);
    cluster.filter = Box::new(|from, to, _| from != 2 && to != 2);
    fill(&mut cluster);
    cluster.run_ms(20);
    assert_eq!(incomplete(&cluster), [false, false, true]);
    cluster.filter = Box::new(|_, _, _| true);
    cluster.run_ms(1000);
    assert_eq!(incomplete(&cluster), [false; 3]);
    cluster.run_ms(500);
    cluster.assert_converged();
}

#[test]
fn s3_t5_who_awaits_its_snapshot_does_not_lead_and_is_sealed() {
    let mut cluster = with_one_incomplete(3);
    let id = cluster.connect(0, host(1));
    for n in 0..8 {
        cluster.write(0, id, n, 100 + n);
    }
    cluster.kill(0);
    cluster.run_ms(8000);
    assert!(cluster.serving_nodes().is_empty(), "one complete copy is not enough (W4)");
    let config = cluster.object.config.clone().expect("a config");
    assert_eq!(config.primary.node, cluster.machines[1].name, "node 1 stands, node 2 never does");
    fill(&mut cluster);
    let next = cluster.run_until_served();
    let id = cluster.connect(next, host(1));
    for n in 0..8 {
        assert_eq!(cluster.read(next, id, n), 100 + n);
    }
    cluster.start(0);
    cluster.run_ms(2000);
    cluster.assert_converged();
}

/// Filled and caught up, it leads like any other.
#[test]
fn s3_a_filled_replica_takes_over() {
    let mut cluster = with_one_incomplete(4);
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 11);
    fill(&mut cluster);
    cluster.run_ms(1000);
    cluster.kill(1);
    cluster.write(0, id, 2, 12);
    cluster.kill(0);
    cluster.start(1);
    let next = cluster.run_until_served();
    let id = cluster.connect(next, host(1));
    assert_eq!((cluster.read(next, id, 1), cluster.read(next, id, 2)), (11, 12));
}

/// The source's replica here is gone, or was copied past the snapshot's deletion: nothing will ever
/// fill the clone's, but a copy of the clone (seed 176: it awaited the snapshot for ever).
#[test]
fn s3_c2_a_snapshot_that_can_no_longer_come_is_not_awaited() {
    let mut cluster = with_one_incomplete(5);
    let id = cluster.connect(0, host(1));
    cluster.write(0, id, 1, 11);
    cluster.kill(2);
    cluster.machines[2].store.forget(SOURCE.volume);
    cluster.start(2);
    cluster.run_ms(3000);
    assert_eq!(incomplete(&cluster), [false; 3]);
    assert!(cluster.notices.contains(&(2, Notice::Copied)));
}
