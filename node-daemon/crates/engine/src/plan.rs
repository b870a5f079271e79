//! What the agent's Configure says, checked: where to listen, where to keep data, who the peers
//! are. Plain data; `state` remembers it, `opener` and the reactors carry it out.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tercet_reactor::Nguid;
use thiserror::Error;
use uuid::Uuid;

use crate::pb::engine as pb;

/// Most devices of an engine.
pub const DEVICES_MAX: usize = 16;
/// Most peers of an engine.
pub const PEERS_MAX: usize = 1024;
/// A device's capacity is a multiple of this, and at least `DEVICE_BYTES_MIN`.
pub const DEVICE_STEP_BYTES: u64 = 4 << 20;
/// The smallest device.
pub const DEVICE_BYTES_MIN: u64 = 256 << 20;

/// A checked Configure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The cluster's UUID.
    pub cluster: Uuid,
    /// Address to listen on.
    pub address: IpAddr,
    /// Ports to listen on.
    pub ports: Ports,
    /// Devices in the order that numbers their shards: never reordered, only added to.
    pub devices: Vec<DevicePlan>,
    /// Shards on each device, fixed at the first Configure.
    pub shards_per_device: u16,
    /// Every other node.
    pub peers: Vec<PeerPlan>,
}

/// Ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// NVMe/TCP.
    pub nvme_tcp: u16,
    /// NVMe/TCP discovery.
    pub discovery: u16,
    /// Replication links.
    pub replication: u16,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicePlan {
    /// Its name within the `StorageNode`.
    pub id: String,
    /// Where it is.
    pub source: DeviceSource,
}

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceSource {
    /// A file, made when absent.
    File {
        /// Its path.
        path: PathBuf,
        /// Its size.
        capacity_bytes: u64,
    },
    /// A block device, or the generic device of an `NVMe` namespace.
    Block {
        /// Its path.
        path: PathBuf,
    },
    /// An `NVMe` namespace, past the block layer.
    Nvme {
        /// What it is, wherever it is.
        #[serde(with = "as_text")]
        nguid: Nguid,
    },
}

/// What has a text of its own is kept as that.
mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(
        value: &impl Display,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerPlan {
    /// Its `StorageNode`'s name.
    pub node: String,
    /// Where its engine listens for links.
    pub address: SocketAddr,
}

/// What is wrong with a Configure.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlanError {
    /// A field that can never be so.
    #[error("{field}: {why}")]
    Invalid {
        /// The field.
        field: String,
        /// Why not.
        why: String,
    },
    /// It contradicts what this engine already keeps data by.
    #[error("{field}: {why}")]
    Contradicts {
        /// The field.
        field: String,
        /// Why not.
        why: String,
    },
}

fn invalid(field: impl Into<String>, why: impl Into<String>) -> PlanError {
    PlanError::Invalid { field: field.into(), why: why.into() }
}

fn contradicts(field: &str, why: impl Into<String>) -> PlanError {
    PlanError::Contradicts { field: field.to_owned(), why: why.into() }
}

impl Plan {
    /// Checks a Configure for the engine of `node`, which keeps `current` by now.
    pub fn check(
        request: &pb::ConfigureRequest,
        node: &str,
        reactors: u16,
        current: Option<&Self>,
    ) -> Result<Self, PlanError> {
        if request.node != node {
            let why = format!("this is the engine of {node}, not of {}", request.node);
            return Err(invalid("node", why));
        }
        match request.link_security() {
            pb::LinkSecurity::Plain => {}
            pb::LinkSecurity::Unspecified => {
                return Err(invalid("link_security", "must be chosen"));
            }
        }
        let plan = Self {
            cluster: Uuid::parse_str(&request.cluster_id)
                .map_err(|error| invalid("cluster_id", error.to_string()))?,
            address: address("address", &request.address)?,
            ports: ports(request.ports.as_ref())?,
            devices: in_place(devices(&request.devices)?, current),
            shards_per_device: current.map_or(reactors, |plan| plan.shards_per_device),
            peers: peers(&request.peers, node)?,
        };
        if let Some(current) = current {
            plan.follows(current)?;
        }
        Ok(plan)
    }

    fn follows(&self, current: &Self) -> Result<(), PlanError> {
        if self.cluster != current.cluster {
            let why = format!("the data here belongs to cluster {}", current.cluster);
            return Err(contradicts("cluster_id", why));
        }
        if !self.devices.starts_with(&current.devices) {
            let why = "devices can be added; those that there are cannot be changed or taken away \
                       while the engine keeps data on them";
            return Err(contradicts("devices", why));
        }
        Ok(())
    }

    /// Whether devices are added to those of `current`.
    pub fn adds_devices(&self, current: &Self) -> bool {
        self.devices.len() > current.devices.len()
    }

    /// Shards of this engine.
    pub fn shards(&self) -> u16 {
        u16::try_from(self.devices.len()).expect("at most 16 devices") * self.shards_per_device
    }
}

/// Those that there are first, in their order; who describes them has none.
fn in_place(mut devices: Vec<DevicePlan>, current: Option<&Plan>) -> Vec<DevicePlan> {
    let known = current.map(|plan| plan.devices.as_slice()).unwrap_or_default();
    let number = |id: &str| known.iter().position(|device| device.id == id).unwrap_or(known.len());
    devices.sort_by_key(|device| number(&device.id));
    devices
}

fn address(field: &str, text: &str) -> Result<IpAddr, PlanError> {
    text.parse().map_err(|_| invalid(field, format!("{text:?} is no IP address")))
}

fn port(field: &str, value: u32) -> Result<u16, PlanError> {
    match u16::try_from(value) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(invalid(field, format!("{value} is no port"))),
    }
}

fn ports(ports: Option<&pb::Ports>) -> Result<Ports, PlanError> {
    let ports = ports.ok_or_else(|| invalid("ports", "missing"))?;
    let checked = Ports {
        nvme_tcp: port("ports.nvme_tcp", ports.nvme_tcp)?,
        discovery: port("ports.discovery", ports.discovery)?,
        replication: port("ports.replication", ports.replication)?,
    };
    let distinct = BTreeSet::from([checked.nvme_tcp, checked.discovery, checked.replication]);
    if distinct.len() == 3 { Ok(checked) } else { Err(invalid("ports", "must be three")) }
}

fn devices(devices: &[pb::Device]) -> Result<Vec<DevicePlan>, PlanError> {
    if devices.is_empty() || devices.len() > DEVICES_MAX {
        return Err(invalid("devices", format!("1 to {DEVICES_MAX}, not {}", devices.len())));
    }
    let mut ids = BTreeSet::new();
    let mut checked = Vec::new();
    for device in devices {
        let field = format!("devices[{}]", device.id);
        if device.id.is_empty() || !ids.insert(device.id.as_str()) {
            return Err(invalid(field, "each needs an id of its own"));
        }
        checked.push(DevicePlan { id: device.id.clone(), source: source(&field, device)? });
    }
    Ok(checked)
}

fn source(field: &str, device: &pb::Device) -> Result<DeviceSource, PlanError> {
    use pb::device::Source;
    match device.source.as_ref() {
        Some(Source::File(file)) => {
            let bytes = file.capacity_bytes;
            if bytes < DEVICE_BYTES_MIN || !bytes.is_multiple_of(DEVICE_STEP_BYTES) {
                let why = format!(
                    "capacity_bytes {bytes}: at least {DEVICE_BYTES_MIN}, and a multiple of \
                     {DEVICE_STEP_BYTES}"
                );
                return Err(invalid(field, why));
            }
            let path = absolute(field, &file.path)?;
            Ok(DeviceSource::File { path, capacity_bytes: bytes })
        }
        Some(Source::Path(path)) => Ok(DeviceSource::Block { path: absolute(field, path)? }),
        Some(Source::Nguid(text)) => {
            let nguid = text.parse().map_err(|why: String| invalid(field, why))?;
            Ok(DeviceSource::Nvme { nguid })
        }
        None => Err(invalid(field, "needs a file, a path or an NGUID")),
    }
}

fn absolute(field: &str, path: &str) -> Result<PathBuf, PlanError> {
    if path.starts_with('/') {
        Ok(PathBuf::from(path))
    } else {
        Err(invalid(field, format!("{path:?} is no absolute path")))
    }
}

fn peers(peers: &[pb::Peer], node: &str) -> Result<Vec<PeerPlan>, PlanError> {
    if peers.len() > PEERS_MAX {
        return Err(invalid("peers", format!("at most {PEERS_MAX}")));
    }
    let mut nodes = BTreeSet::from([node]);
    let mut checked = Vec::new();
    for peer in peers {
        let field = format!("peers[{}]", peer.node);
        if peer.node.is_empty() || !nodes.insert(peer.node.as_str()) {
            return Err(invalid(field, "each needs a name of its own, and not this node's"));
        }
        let ip = address(&field, &peer.address)?;
        let port = port(&field, peer.replication_port)?;
        checked.push(PeerPlan { node: peer.node.clone(), address: SocketAddr::new(ip, port) });
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_nguid(text: &str) -> Result<Vec<DevicePlan>, PlanError> {
        let source = Some(pb::device::Source::Nguid(text.into()));
        devices(&[pb::Device { id: "d0".into(), source }])
    }

    #[test]
    fn a_device_by_nguid_is_kept_as_people_write_it() {
        let text = "0123456789abcdef0123456789abcdef";
        let planned = by_nguid(text).expect("a device");
        let kept = serde_json::to_string(&planned).expect("JSON");
        assert!(kept.contains(text), "{kept}");
        let read: Vec<DevicePlan> = serde_json::from_str(&kept).expect("read back");
        assert_eq!(read, planned);
        let other = kept.replace(text, "0123");
        assert!(serde_json::from_str::<Vec<DevicePlan>>(&other).is_err(), "{other}");
    }

    #[test]
    fn what_is_no_nguid_is_refused_by_name() {
        for wrong in ["", "0123", &"0".repeat(32)] {
            let refusal = by_nguid(wrong).expect_err("refused");
            assert!(matches!(refusal, PlanError::Invalid { .. }), "{refusal}");
            assert!(refusal.to_string().starts_with("devices[d0]: "), "{refusal}");
        }
    }
}
