//! What the engine says of itself, as the control API has it.

use tercet_proto::BLOCK_BYTES;
use tercet_replication::api::{CopyStatus, MemberStatus};

use super::convert::config_to_pb;
use super::directory::Directory;
use crate::core::{ReactorStatus, ReplicaReport};
use crate::opener::OPENING;
use crate::outbox::Request;
use crate::pb::engine as pb;

/// An event for the agent.
pub fn event(request: Request) -> pb::EngineEvent {
    use pb::engine_event::Event;
    let event = match request {
        Request::Swap(id, swap) => Event::Swap(pb::SwapRequested {
            token: id.to_wire(),
            volume: swap.volume.to_string(),
            old: Some(config_to_pb(&swap.old)),
            new: Some(config_to_pb(&swap.new)),
        }),
        Request::Read(volume) => Event::Read(pb::ReadRequested { volume: volume.to_string() }),
        Request::Fenced(volume, epoch, generation) => {
            Event::Fenced(pb::Fenced { volume: volume.to_string(), epoch: epoch.0, generation })
        }
        Request::Notice(notice) => Event::Notice(pb::Notice {
            volume: notice.volume.map(|volume| volume.to_string()).unwrap_or_default(),
            reason: notice.reason.to_owned(),
            message: notice.message,
            warning: notice.warning,
        }),
        Request::Changed => Event::Changed(pb::Changed {}),
    };
    pb::EngineEvent { event: Some(event) }
}

/// The answer to Status.
pub fn response(directory: &Directory, reactors: &[ReactorStatus]) -> pb::StatusResponse {
    pb::StatusResponse {
        node: directory.node.to_string(),
        instance: directory.instance.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        devices: devices(directory, reactors),
        replicas: reactors.iter().flat_map(|reactor| &reactor.replicas).map(replica).collect(),
        links: links(directory, reactors),
        counters: counters(reactors),
    }
}

/// How each device is: open with all its shards, failed, or on its way.
pub(super) fn devices(directory: &Directory, reactors: &[ReactorStatus]) -> Vec<pb::DeviceStatus> {
    let plan = directory.plan();
    let per_device = plan.map_or(1, |plan| plan.shards_per_device);
    let mut devices = Vec::new();
    for (number, device) in (0..).zip(directory.devices()) {
        let shards = reactors.iter().flat_map(|reactor| &reactor.shards);
        let shards: Vec<_> = shards.filter(|s| s.shard / per_device == number).collect();
        let failed = shards.iter().find_map(|shard| shard.failed.as_deref());
        let message = failed.map_or(device.message, ToOwned::to_owned);
        let ready = message.is_empty() && shards.len() == usize::from(per_device);
        let bad_blocks = shards.iter().map(|shard| shard.scrub.bad_blocks_now).sum();
        let message = match (ready, message.is_empty()) {
            (true, _) if bad_blocks > 0 => format!("{bad_blocks} bad blocks are not repaired yet"),
            (false, true) => OPENING.to_owned(),
            _ => message,
        };
        devices.push(pb::DeviceStatus {
            id: device.id,
            state: if ready { "Ready" } else { "Failed" }.to_owned(),
            message,
            bad_blocks,
            capacity_bytes: shards.iter().map(|shard| shard.usage.capacity_bytes).sum(),
            allocated_bytes: shards.iter().map(|shard| shard.usage.allocated_bytes).sum(),
            reserved_bytes: 0,
        });
    }
    devices
}

fn replica(report: &ReplicaReport) -> pb::ReplicaStatus {
    let status = &report.status;
    let snapshot = |snapshot: &tercet_proto::SnapshotState| pb::SnapshotStatus {
        snapshot: snapshot.id.to_string(),
        epoch: snapshot.place.epoch.0,
        lsn: snapshot.place.lsn.0,
        size_bytes: snapshot.size_blocks * BLOCK_BYTES as u64,
    };
    pb::ReplicaStatus {
        volume: status.volume.to_string(),
        name: report.name.clone(),
        replica: status.replica.to_string(),
        epoch: status.epoch.0,
        serving: status.serving,
        tail_epoch: status.tail.epoch.0,
        tail_lsn: status.tail.lsn.0,
        committed_lsn: status.committed.0,
        applied_lsn: status.applied.lsn.0,
        incomplete: status.incomplete,
        bad_blocks: status.bad_blocks,
        size_bytes: report.size_blocks * BLOCK_BYTES as u64,
        allocated_bytes: report.allocated_bytes,
        members: status.members.iter().map(member).collect(),
        snapshots: report.snapshots.iter().map(snapshot).collect(),
        hosts: report.hosts.clone(),
    }
}

fn member(member: &MemberStatus) -> pb::MemberStatus {
    pb::MemberStatus {
        node: member.node.to_string(),
        replica: member.replica.to_string(),
        in_sync: member.in_sync,
        lag_bytes: member.lag_bytes,
        incomplete: member.incomplete,
        learner: member.learner,
        copy: member.copy.as_ref().map(copy),
    }
}

fn copy(copy: &CopyStatus) -> pb::CopyStatus {
    pb::CopyStatus {
        done_bytes: copy.done_blocks * BLOCK_BYTES as u64,
        total_bytes: copy.total_blocks * BLOCK_BYTES as u64,
        sent_bytes: copy.sent_bytes,
    }
}

fn links(directory: &Directory, reactors: &[ReactorStatus]) -> Vec<pb::LinkStatus> {
    let Some(plan) = directory.plan() else {
        return Vec::new();
    };
    let up = |node: &str| {
        let mut links = reactors.iter().flat_map(|reactor| &reactor.links);
        links.find(|(peer, _)| peer.node.as_str() == node)
    };
    let link = |node: &String| pb::LinkStatus {
        node: node.clone(),
        up: up(node).is_some(),
        instance: up(node).map(|(_, instance)| instance.to_string()).unwrap_or_default(),
        membership: directory.standing(node),
    };
    plan.peers.iter().map(|peer| link(&peer.node)).collect()
}

fn counters(reactors: &[ReactorStatus]) -> Vec<pb::Counter> {
    let mut sums = std::collections::BTreeMap::<&str, u64>::new();
    for (name, value) in reactors.iter().flat_map(|reactor| &reactor.counters) {
        *sums.entry(name).or_default() += value;
    }
    let counter = |(name, value): (&str, u64)| pb::Counter {
        name: name.to_owned(),
        labels: std::collections::HashMap::new(),
        value: value as f64,
    };
    sums.into_iter().map(counter).collect()
}
