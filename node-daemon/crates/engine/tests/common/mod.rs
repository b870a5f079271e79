//! Three real engines on loopback addresses, and an agent for each that follows one object store in
//! memory: what the API server and the agents are to the engines, in two hundred lines.

#![allow(dead_code)] // each test binary uses its part

pub mod agent;
pub mod hosts;
pub mod objects;

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::Agent;
use objects::Objects;
use tercet_engine::pb::engine as pb;
use uuid::Uuid;

/// How long anything may take that a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(90);
pub const DEVICE_BYTES: u64 = 256 << 20;

/// Runs what blocks beside the agents.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("the work does not panic")
}

/// Three nodes.
pub struct Cluster {
    pub dir: PathBuf,
    pub objects: Arc<Objects>,
    pub nodes: Vec<Node>,
    ports: pb::Ports,
    id: Uuid,
    reactors: usize,
}

pub struct Node {
    pub name: String,
    pub address: IpAddr,
    pub dir: PathBuf,
    pub socket: PathBuf,
    pub supervisor: Child,
    pub agent: Option<Agent>,
}

impl Node {
    /// Pid of the engine proper.
    pub fn engine_pid(&self) -> Option<i32> {
        let text = std::fs::read_to_string(self.dir.join("instance")).ok()?;
        let value: serde_json::Value = serde_json::from_str(&text).ok()?;
        i32::try_from(value["pid"].as_i64()?).ok()
    }

    pub fn kill_engine(&self) -> i32 {
        self.signal_engine(rustix::process::Signal::KILL)
    }

    pub fn signal_engine(&self, signal: rustix::process::Signal) -> i32 {
        let pid = self.engine_pid().expect("an engine runs");
        let raw = rustix::process::Pid::from_raw(pid).expect("a pid");
        rustix::process::kill_process(raw, signal).expect("signalled");
        pid
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

/// Below the ports that the kernel gives to outgoing connections: nobody else takes one between two
/// lives of an engine.
const PORTS: pb::Ports = pb::Ports { nvme_tcp: 14420, discovery: 18009, replication: 14421 };

/// A loopback network of a cluster's own: clusters of other tests and runs have the same ports.
fn network(id: Uuid) -> [u8; 3] {
    let [a, b, ..] = *id.as_bytes();
    [127, 128 | a, b]
}

pub fn spawn(dir: &Path, name: &str, socket: &Path, reactors: usize) -> Child {
    let log = File::options().create(true).append(true).open(dir.join("log")).expect("a log");
    Command::new(env!("CARGO_BIN_EXE_tercet-engine"))
        .args(["supervise", "--node", name, "--reactors", &reactors.to_string(), "--socket"])
        .arg(socket)
        .arg("--state-dir")
        .arg(dir)
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("a supervisor")
}

impl Cluster {
    pub fn start(name: &str) -> Self {
        Self::with_reactors(name, 1)
    }

    pub fn with_reactors(name: &str, reactors: usize) -> Self {
        let mut cluster = Self::prepare(name, reactors, |_, _| {});
        cluster.start_agents();
        cluster
    }

    /// Engines that are told nothing yet; `prepare` sees each node's folder before its start.
    pub fn prepare(name: &str, reactors: usize, prepare: impl Fn(u8, &Path)) -> Self {
        let id = Uuid::new_v4(); // a process's number comes again, and may find a failed run's folder
        let unique = format!("tercet-{name}-{}", id.simple());
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(unique);
        let mut cluster = Self {
            dir,
            objects: Arc::new(Objects::default()),
            nodes: Vec::new(),
            ports: PORTS,
            id,
            reactors,
        };
        let [a, b, c] = network(id);
        for number in 1..=3_u8 {
            let name = format!("node-{number}");
            let dir = cluster.dir.join(&name);
            std::fs::create_dir_all(&dir).expect("a folder");
            prepare(number - 1, &dir);
            // Short: a socket's path is.
            let socket = std::env::temp_dir().join(format!("{}.sock", Uuid::new_v4().simple()));
            let supervisor = spawn(&dir, &name, &socket, reactors);
            let address = IpAddr::V4(Ipv4Addr::new(a, b, c, number));
            let node = Node { name, address, dir, socket, supervisor, agent: None };
            cluster.nodes.push(node);
        }
        cluster
    }

    /// Kills a node's supervisor, and the engine with it.
    pub fn lose(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        node.supervisor.kill().expect("killed");
        node.supervisor.wait().expect("reaped");
    }

    /// Starts the supervisor of a lost node.
    pub fn revive(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        node.supervisor = spawn(&node.dir, &node.name, &node.socket, self.reactors);
    }

    pub fn start_agents(&mut self) {
        for number in 0..3 {
            let agent = self.agent(number);
            self.nodes[number].agent = Some(agent);
        }
    }

    pub fn configure_request(&self, number: usize) -> pb::ConfigureRequest {
        let node = &self.nodes[number];
        let path = node.dir.join("device").display().to_string();
        let file = pb::FileDevice { path, capacity_bytes: DEVICE_BYTES };
        let device = pb::Device { id: "d0".into(), source: Some(pb::device::Source::File(file)) };
        let peer = |other: &Node| pb::Peer {
            node: other.name.clone(),
            address: other.address.to_string(),
            replication_port: self.ports.replication,
        };
        let peers = self.nodes.iter().filter(|other| other.name != node.name).map(peer);
        pb::ConfigureRequest {
            node: node.name.clone(),
            cluster_id: self.id.to_string(),
            address: node.address.to_string(),
            ports: Some(self.ports),
            devices: vec![device],
            peers: peers.collect(),
            link_security: pb::LinkSecurity::Plain.into(),
        }
    }

    /// The agents begin anew, and ask for this.
    pub fn restart_agents(&mut self, change: impl Fn(&mut pb::ConfigureRequest)) {
        for number in 0..3 {
            let mut configure = self.configure_request(number);
            change(&mut configure);
            let (socket, objects) = (self.nodes[number].socket.clone(), Arc::clone(&self.objects));
            self.nodes[number].agent = Some(Agent::start(socket, configure, objects));
        }
    }

    fn agent(&self, number: usize) -> Agent {
        let node = &self.nodes[number];
        let configure = self.configure_request(number);
        Agent::start(node.socket.clone(), configure, Arc::clone(&self.objects))
    }

    pub fn agent_of(&self, number: usize) -> &Agent {
        self.nodes[number].agent.as_ref().expect("every node has an agent")
    }

    /// NVMe/TCP addresses, by node.
    pub fn paths(&self) -> Vec<SocketAddr> {
        let port = u16::try_from(self.ports.nvme_tcp).expect("a port");
        self.nodes.iter().map(|node| SocketAddr::new(node.address, port)).collect()
    }

    pub fn port(&self, of: impl Fn(&pb::Ports) -> u32) -> u16 {
        u16::try_from(of(&self.ports)).expect("a port")
    }

    /// Makes a volume as the operator does: a replica on each node, then the first configuration.
    pub async fn create_volume(&self, size_bytes: u64, host_nqn: &str) -> Uuid {
        self.create(size_bytes, host_nqn, None).await
    }

    /// As `create_volume`, a clone of a snapshot.
    pub async fn create(
        &self,
        size_bytes: u64,
        host_nqn: &str,
        source: Option<pb::CloneSource>,
    ) -> Uuid {
        let volume = Uuid::new_v4();
        let mut members = Vec::new();
        for node in &self.nodes {
            let agent = node.agent.as_ref().expect("an agent");
            let request = pb::CreateReplicaRequest {
                volume: volume.to_string(),
                name: "pvc-test".into(),
                size_bytes,
                source: source.clone(),
                learner: false,
            };
            let replica = agent.create_replica(request).await;
            members.push(pb::Member { node: node.name.clone(), replica });
        }
        let first = self.nodes[0].agent.as_ref().expect("an agent");
        let primary =
            pb::Primary { node: self.nodes[0].name.clone(), instance: first.instance().await };
        let config = pb::Config {
            epoch: 1,
            state: pb::config::State::Recovering.into(),
            primary: Some(primary),
            members,
            ..pb::Config::default()
        };
        self.objects.create(volume, size_bytes, host_nqn, config);
        volume
    }

    /// Which node serves the volume now.
    pub async fn serving(&self, volume: Uuid) -> Option<usize> {
        for number in 0..self.nodes.len() {
            let Some(status) = self.agent_of(number).status().await else {
                continue;
            };
            let id = volume.to_string();
            if status.replicas.iter().any(|replica| replica.volume == id && replica.serving) {
                return Some(number);
            }
        }
        None
    }

    pub async fn wait_serving(&self, volume: Uuid, but: Option<usize>) -> usize {
        let start = Instant::now();
        loop {
            if let Some(number) = self.serving(volume).await
                && Some(number) != but
            {
                return number;
            }
            let logs = || self.logs();
            assert!(start.elapsed() < PATIENCE, "nobody serves {volume}: {}", logs());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asks the node that serves the volume, again when another has taken over meanwhile.
    pub async fn ask_primary<T, F: Future<Output = Result<tonic::Response<T>, tonic::Status>>>(
        &self,
        volume: Uuid,
        call: impl Fn(agent::Client) -> F,
    ) -> T {
        let start = Instant::now();
        loop {
            let primary = self.wait_serving(volume, None).await;
            let Some(client) = self.agent_of(primary).client().await else {
                continue;
            };
            match call(client).await {
                Ok(answer) => return answer.into_inner(),
                Err(status) if status.code() == tonic::Code::FailedPrecondition => {}
                Err(status) => panic!("{status} {}", self.logs()),
            }
            assert!(start.elapsed() < PATIENCE, "no primary does it {}", self.logs());
        }
    }

    pub fn logs(&self) -> String {
        let one = |node: &Node| {
            let log = node.log();
            let lines: Vec<_> = log.lines().rev().take(60).collect();
            let lines: Vec<_> = lines.into_iter().rev().collect();
            format!("\n== {}\n{}", node.name, lines.join("\n"))
        };
        self.nodes.iter().map(one).collect()
    }

    /// Each node's map has the chunks that have a checksum, if it is of the same place.
    async fn same_chunks(&self, volume: Uuid, sums: &pb::ChunkSumsResponse) {
        for number in 0..self.nodes.len() {
            let map = self.agent_of(number).chunk_map(volume).await.expect("answers as for sums");
            if (map.epoch, map.lsn) == (sums.epoch, sums.lsn) {
                let chunks = map.rows.iter().map(|row| row.chunk);
                assert!(chunks.eq(sums.sums.iter().map(|sum| sum.index)), "node {number}: {map:?}");
                assert!(map.rows.iter().all(|row| row.mapped_bytes > 0 && row.extents > 0));
                assert!(!map.device.is_empty() && map.region < map.regions, "{map:?}");
            }
        }
    }

    /// The checksums of a volume on each node, once all have applied the same place.
    pub async fn equal_sums(&self, volume: Uuid) -> BTreeMap<u64, u32> {
        let start = Instant::now();
        loop {
            let mut all = Vec::new();
            for number in 0..self.nodes.len() {
                all.push(self.agent_of(number).chunk_sums(volume).await);
            }
            let first = all[0].clone();
            if let Some(first) = first
                && all.iter().all(|sums| sums.as_ref() == Some(&first))
            {
                self.same_chunks(volume, &first).await;
                return first.sums.iter().map(|sum| (sum.index, sum.crc32c)).collect();
            }
            if start.elapsed() > PATIENCE {
                let places: Vec<_> = all
                    .iter()
                    .map(|s| s.as_ref().map(|s| (s.epoch, s.lsn, s.sums.len())))
                    .collect();
                panic!("the replicas of {volume} stay different: {places:?} {}", self.logs());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            // The engine dies with its supervisor.
            let _ = node.supervisor.kill();
            let _ = node.supervisor.wait();
            let _ = std::fs::remove_file(&node.socket);
        }
        if std::thread::panicking() {
            eprintln!("logs are kept below {}", self.dir.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
