//! What a reactor is told and what it tells.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use tercet_nvmf::auth::Computed;
use tercet_nvmf::target::{ConnectionId, Detached, Keys};
use tercet_proto::message::{Decoder, Hello};
use tercet_proto::{InstanceId, Instant, NodeName, SnapshotState, VolumeId};
use tercet_reactor::Device;
use tercet_replication::api::{Control, ControlDone, ControlError, Input, PeerId, ReplicaStatus};
use tercet_shard::{ScrubStatus, Usage};
use tokio::sync::oneshot;

use crate::control::placement::Room;

/// Answer to a request of the agent's.
pub type Answer = oneshot::Sender<Result<ControlDone, ControlError>>;

/// A message to a reactor.
pub enum ToReactor {
    /// Nothing but to look at the node's table, as before every message.
    Look,
    /// Instances of a peer's node have ended, as it has proven (rule L5): for every shard.
    Exited(NodeName, Vec<InstanceId>),
    /// A shard to open: its device is locked.
    Shard(Box<NewShard>),
    /// For a shard.
    Input(u16, Box<Input>),
    /// A request for a shard, and where its answer goes.
    Control(u16, Control, Answer),
    /// Say how you are.
    Status(oneshot::Sender<ReactorStatus>),
    /// What the hosts of a volume have to know.
    Keys(VolumeId, HostKeys),
    /// What was computed for a host's connection.
    Computed(ConnectionId, Box<Computed>),
    /// A link whose Hello names a shard of this reactor.
    Link(Box<MovedLink>),
    /// A host's connection whose Connect names a volume of this reactor.
    Host(Box<MovedHost>),
}

/// What the hosts of a volume have to know.
#[derive(Clone, Debug, Default)]
pub struct HostKeys {
    /// Epoch and generation of the object that says so: a view that was overtaken takes nothing
    /// back, as it lets no refused host in again (rule H5).
    pub as_of: (u64, u64),
    /// By host NQN.
    pub keys: BTreeMap<String, Keys>,
}

/// A shard to open.
pub struct NewShard {
    /// Its number.
    pub shard: u16,
    /// The device's name within the `StorageNode`.
    pub device_id: String,
    /// Its region.
    pub device: Device,
    /// When the device's lock was got (rule L4).
    pub locked_at: Instant,
}

/// A link on its way to its shard's reactor.
pub struct MovedLink {
    /// The connection.
    pub socket: OwnedFd,
    /// What it said.
    pub hello: Hello,
    /// What was received after that.
    pub decoder: Decoder,
}

/// A host's connection on its way to its volume's reactor.
pub struct MovedHost {
    /// The connection.
    pub socket: OwnedFd,
    /// Where its protocol stands.
    pub detached: Detached,
}

/// How a reactor is.
pub struct ReactorStatus {
    /// Its shards.
    pub shards: Vec<ShardReport>,
    /// Their replicas.
    pub replicas: Vec<ReplicaReport>,
    /// Links that are up.
    pub links: Vec<(PeerId, InstanceId)>,
    /// Counters by name.
    pub counters: Vec<(&'static str, u64)>,
}

/// How a shard is.
pub struct ShardReport {
    /// Its number.
    pub shard: u16,
    /// How full it is.
    pub usage: Usage,
    /// Bytes of all volumes that have a replica there, written or not.
    pub provisioned_bytes: u64,
    /// How far scrub is, and what was found bad (rule C4).
    pub scrub: ScrubStatus,
    /// What is wrong with it.
    pub failed: Option<String>,
}

impl ShardReport {
    /// What there is for new replicas.
    pub fn room(&self) -> Room {
        Room {
            shard: self.shard,
            capacity_bytes: self.usage.capacity_bytes,
            allocated_bytes: self.usage.allocated_bytes,
            provisioned_bytes: self.provisioned_bytes,
        }
    }
}

/// How a replica is.
pub struct ReplicaReport {
    /// What replication says.
    pub status: ReplicaStatus,
    /// The Volume object's name when it was made.
    pub name: String,
    /// Its size.
    pub size_blocks: u64,
    /// Bytes that it holds on the device.
    pub allocated_bytes: u64,
    /// Its snapshots.
    pub snapshots: Vec<SnapshotState>,
    /// NQNs of the hosts with an association here.
    pub hosts: Vec<String>,
}
