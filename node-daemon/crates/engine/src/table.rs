//! The node's table: what every reactor looks up and rarely changes. The plan (peers with their
//! addresses, ports, how many shards) and the volumes with their epoch, their nodes, who may connect
//! and the shard that has this node's replica.
//!
//! Each reactor has a replica of its own (`tercet-noderep`) and looks at it when it has taken
//! events or a message, before it acts on any of them: hence what is written here before something
//! is done is seen by every reactor before it can see that something (docs/node-replication.md,
//! O6). Between two such looks a look-up touches no memory that another core writes.
//!
//! The table decides nothing about data: that is each replica's own promise (rules W2, T4).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tercet_noderep::Dispatch;
use tercet_nvmf::log::DiscoveryRecord;
use tercet_nvmf::names::volume_nqn;
use tercet_nvmf::target::DiscoveryEntry;
use tercet_proto::{Epoch, NodeName, VolumeId};
use tercet_replication::api::VolumeView;

use crate::plan::Plan;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Table {
    plan: Option<Arc<Plan>>,
    volumes: BTreeMap<VolumeId, Arc<Volume>>,
    homes: BTreeMap<VolumeId, u16>,
    versions: Versions,
}

/// How often something was changed: who remembers these knows what to do anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Versions {
    /// The plan.
    pub plan: u64,
    /// What the discovery log is made of.
    pub discovery: u64,
}

/// What the agent told of a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    /// Of the newest configuration that was told.
    pub epoch: Epoch,
    /// Its members' nodes.
    pub nodes: Vec<NodeName>,
    /// NQNs of the hosts that may connect.
    pub hosts: BTreeSet<String>,
}

/// A change of the table.
#[derive(Clone, Debug)]
pub enum Change {
    /// The engine is told what to be.
    Plan(Arc<Plan>),
    /// The agent tells of a volume.
    Volume(VolumeId, Arc<Volume>),
    /// The volume's replica here is on this shard, or is about to be made there. While another shard
    /// has it this changes nothing.
    Home(VolumeId, u16),
    /// Its replica was not made after all.
    NoHome(VolumeId),
    /// The volume has no replica here any more.
    Forget(VolumeId),
}

impl Volume {
    /// Of a view.
    pub fn of(view: &VolumeView) -> Self {
        let members = view.config.iter().flat_map(|config| &config.members);
        Self {
            epoch: view.config.as_ref().map_or(Epoch(0), |config| config.epoch),
            nodes: members.map(|member| member.node.clone()).collect(),
            hosts: view.attachments.iter().map(|one| one.host_nqn.clone()).collect(),
        }
    }

    /// What is known after `told`: a view from before a swap, out of a watch's cache, takes epoch
    /// and members back to nobody's use; attachments are of the spec, which has no epoch.
    fn after(&self, told: &Arc<Self>) -> Arc<Self> {
        if told.epoch >= self.epoch {
            return Arc::clone(told);
        }
        let (epoch, nodes) = (self.epoch, self.nodes.clone());
        Arc::new(Self { epoch, nodes, hosts: told.hosts.clone() })
    }
}

impl Dispatch for Table {
    type Read<'a> = VolumeId;
    type Found = Option<u16>;
    type Write = Change;
    type Done = ();

    fn read(&self, volume: VolumeId) -> Option<u16> {
        self.shard_of(volume)
    }

    fn write(&mut self, change: Change) {
        match change {
            Change::Plan(plan) => {
                self.plan = Some(plan);
                self.versions.plan += 1;
                self.versions.discovery += 1; // peers' addresses are in it
            }
            Change::Volume(volume, told) => self.tell(volume, &told),
            Change::Home(volume, shard) => {
                self.homes.entry(volume).or_insert(shard);
            }
            Change::NoHome(volume) => {
                self.homes.remove(&volume);
            }
            Change::Forget(volume) => {
                self.homes.remove(&volume);
                if self.volumes.remove(&volume).is_some() {
                    self.versions.discovery += 1;
                }
            }
        }
    }
}

impl Table {
    fn tell(&mut self, volume: VolumeId, told: &Arc<Volume>) {
        let known = self.volumes.get(&volume);
        let new = known.map_or_else(|| Arc::clone(told), |known| known.after(told));
        if known.is_none_or(|old| (&old.nodes, &old.hosts) != (&new.nodes, &new.hosts)) {
            self.versions.discovery += 1;
        }
        self.volumes.insert(volume, new);
    }

    /// What the engine was told to be, if it was.
    pub fn plan(&self) -> Option<&Arc<Plan>> {
        self.plan.as_ref()
    }

    /// See [`Versions`].
    pub fn versions(&self) -> Versions {
        self.versions
    }

    /// What was told of a volume.
    pub fn volume(&self, volume: VolumeId) -> Option<&Volume> {
        self.volumes.get(&volume).map(Arc::as_ref)
    }

    /// The shard that has the volume's replica, or has been chosen for it; none: no shard that is
    /// open has one.
    pub fn home(&self, volume: VolumeId) -> Option<u16> {
        self.homes.get(&volume).copied()
    }

    /// The shard to ask about a volume: where its replica is, else one that will say that it has
    /// none. None while the engine has been told nothing.
    pub fn shard_of(&self, volume: VolumeId) -> Option<u16> {
        let plan = self.plan.as_ref()?;
        Some(self.home(volume).unwrap_or_else(|| volume.shard(plan.shards())))
    }

    /// Whether telling this would change anything.
    pub fn would_change(&self, volume: VolumeId, told: &Arc<Volume>) -> bool {
        self.volumes.get(&volume).is_none_or(|known| known.after(told) != *known)
    }

    /// Where every volume is to be had, and who may see it, as the engine of `node` tells it.
    pub fn discovery(&self, node: &NodeName) -> Vec<DiscoveryEntry> {
        let Some(plan) = &self.plan else {
            return Vec::new();
        };
        // Nodes of one cluster use the same ports.
        let port = plan.ports.nvme_tcp;
        let mut addresses = BTreeMap::from([(node.as_str(), (plan.address, 1))]);
        for (port_id, peer) in (2..).zip(&plan.peers) {
            addresses.insert(&peer.node, (peer.address.ip(), port_id));
        }
        let mut entries = Vec::new();
        for (volume, known) in &self.volumes {
            for node in &known.nodes {
                let Some(&(address, port_id)) = addresses.get(node.as_str()) else {
                    continue;
                };
                let subsystem_nqn = volume_nqn(*volume);
                let record = DiscoveryRecord { subsystem_nqn, address, port, port_id };
                entries.push(DiscoveryEntry { record, hosts: known.hosts.clone() });
            }
        }
        entries
    }
}

#[cfg(test)]
mod tests;
