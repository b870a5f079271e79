//! Hosts: NVMe/TCP initiators with multipath as Linux has it.
//!
//! A host keeps an association to every node for each of its volumes, sends a command over a path
//! that it has read to be optimized, and tries it elsewhere when the path is lost or the node
//! refuses; an earlier copy may still be under way then (rule H2). It reconnects, notices silence
//! (KATO), and may die and boot again with the same identity (rule H3). It waits for ever rather
//! than fail a command.
//!
//! It never has two writes to a block in flight, as no file system has; reads and writes of a block
//! do run at once. A block is written by one host only.

use std::collections::{BTreeMap, VecDeque};

use rand::Rng;
use tercet_proto::Token;
use tercet_replication::api::{Ana, AssociationId, HostDone, HostError, HostIdentity};

use crate::mix::MS;
use crate::pipes::PipeId;
use crate::probes::Probe;
use crate::target::{HostMessage, NodeMessage};
use crate::work::{Command, Work};
use crate::world::World;

/// Names a connection for the whole run.
pub type ConnectionId = usize;

/// Between the end of a connection and the next attempt, at most.
const RECONNECT_NS: u64 = 500 * MS;

/// A host that knows nothing of ANA shuns a path that refused a command for so long.
const SHUNNED_NS: u64 = 100 * MS;

/// How long a connection may take to be accepted.
const CONNECT_TIMEOUT_NS: u64 = 3_000 * MS;

/// A connection of a host to a node for a volume: an association with its queues.
pub struct Connection {
    /// The host.
    pub host: usize,
    host_life: u64,
    /// The volume's number.
    pub volume: usize,
    /// The node.
    pub node: usize,
    /// Which process of it.
    pub node_life: u64,
    to_node: PipeId,
    /// The way back.
    pub to_host: PipeId,
    /// Whether the host has not given it up.
    pub host_open: bool,
    /// Whether the node has not.
    pub node_open: bool,
    /// What the node calls it.
    pub association: Option<AssociationId>,
}

/// A path of a host to a volume.
#[derive(Default)]
pub struct Path {
    /// Its connection.
    pub connection: Option<ConnectionId>,
    /// What the host last read; none before.
    pub ana: Option<Ana>,
    heard: u64,
    /// A host that knows nothing of ANA does not try it before.
    shunned_until: u64,
    token_last: u64,
    sent: BTreeMap<Token, u64>,
}

/// A volume at a host.
pub struct Mount {
    /// One for each node.
    pub paths: Vec<Path>,
    /// Operations that wait for an answer, by number.
    pub commands: BTreeMap<u64, Command>,
    /// Those that wait for a path.
    pub queue: VecDeque<u64>,
    /// Whether the host still may use it, as far as it knows.
    pub attached: bool,
    working: bool,
    /// What is done next.
    pub work: Work,
}

/// A host machine.
pub struct Host {
    /// Counts boots.
    pub life: u64,
    /// Whether it runs.
    pub alive: bool,
    /// The same over all boots.
    pub identity: HostIdentity,
    /// Its volumes.
    pub mounts: BTreeMap<usize, Mount>,
}

impl World {
    /// Makes the hosts; they connect at once and try until it works.
    pub fn make_hosts(&mut self) {
        for (index, volumes) in self.mix.host_volumes.clone().into_iter().enumerate() {
            let nqn = format!("nqn.2014-08.org.nvmexpress:uuid:host{index}");
            let identity = HostIdentity { nqn, id: self.id_bytes() };
            let mounts = volumes
                .iter()
                .map(|v| (*v, self.new_mount(Work::new(&self.mix, index, *v))))
                .collect();
            self.hosts.push(Host { life: 1, alive: true, identity, mounts });
            self.host_boot(index);
        }
    }

    /// A volume that a host has just attached.
    pub fn new_mount(&self, work: Work) -> Mount {
        let paths = (0..self.mix.nodes).map(|_| Path::default()).collect();
        Mount {
            paths,
            commands: BTreeMap::new(),
            queue: VecDeque::new(),
            attached: true,
            working: false,
            work,
        }
    }

    /// Connects everything and begins to work.
    pub fn host_boot(&mut self, host: usize) {
        let volumes: Vec<usize> = self.hosts[host].mounts.keys().copied().collect();
        for volume in volumes {
            self.host_mount(host, volume);
        }
    }

    /// Connects a volume's paths and begins to work on it.
    pub fn host_mount(&mut self, host: usize, volume: usize) {
        let life = self.hosts[host].life;
        for node in 0..self.mix.nodes {
            let wait = self.rng.random_range(MS..RECONNECT_NS);
            self.after(wait, move |world| world.host_connect(host, life, volume, node));
        }
        let mount = self.hosts[host].mounts.get_mut(&volume).expect("mounted");
        if !std::mem::replace(&mut mount.working, true) {
            self.after(MS, move |world| world.work(host, life, volume));
        }
    }

    /// The volume is detached: its paths are closed, its commands given up.
    pub fn host_unmount(&mut self, host: usize, volume: usize) {
        for node in 0..self.mix.nodes {
            let mount = self.hosts[host].mounts.get_mut(&volume).expect("mounted");
            if let Some(id) = mount.paths[node].connection {
                self.host_lost(id);
            }
        }
        self.abandon(host, volume);
        self.hosts[host].mounts.get_mut(&volume).expect("mounted").attached = false;
    }

    fn mount(&mut self, host: usize, life: u64, volume: usize) -> Option<&mut Mount> {
        let host = &mut self.hosts[host];
        if host.life != life || !host.alive {
            return None;
        }
        host.mounts.get_mut(&volume).filter(|mount| mount.attached)
    }

    fn host_reconnect(&mut self, host: usize, life: u64, volume: usize, node: usize) {
        let wait = self.rng.random_range(MS..RECONNECT_NS);
        self.after(wait, move |world| world.host_connect(host, life, volume, node));
    }

    fn host_connect(&mut self, host: usize, life: u64, volume: usize, node: usize) {
        let Some(mount) = self.mount(host, life, volume) else { return };
        if mount.paths[node].connection.is_some() {
            return;
        }
        let (from, to) = (self.host_site(host), node);
        if !self.nodes[node].runs() || !self.net.is_open(from, to) {
            self.host_reconnect(host, life, volume, node);
            return;
        }
        let (to_node, to_host) = (self.pipe(from, to), self.pipe(to, from));
        let id = self.connections.len();
        self.connections.push(Connection {
            host,
            host_life: life,
            volume,
            node,
            node_life: self.nodes[node].life,
            to_node,
            to_host,
            host_open: true,
            node_open: true,
            association: None,
        });
        let now = self.now;
        let mount = self.mount(host, life, volume).expect("seen above");
        mount.paths[node].connection = Some(id);
        mount.paths[node].heard = now;
        let identity = self.hosts[host].identity.clone();
        self.host_send(id, HostMessage::Connect(identity));
        self.after(CONNECT_TIMEOUT_NS, move |world| {
            if world.path_of(id).is_some_and(|path| path.ana.is_none()) {
                world.host_lost(id);
            }
        });
        self.host_keep_alive(id);
    }

    fn host_send(&mut self, id: ConnectionId, message: HostMessage) {
        let pipe = self.connections[id].to_node;
        self.push(pipe, Box::new(move |world| world.target_receive(id, message)));
    }

    /// The path that this connection is of, while it is.
    fn path_of(&mut self, id: ConnectionId) -> Option<&mut Path> {
        let c = &self.connections[id];
        if !c.host_open {
            return None;
        }
        let (host, life, volume, node) = (c.host, c.host_life, c.volume, c.node);
        let path = &mut self.mount(host, life, volume)?.paths[node];
        (path.connection == Some(id)).then_some(path)
    }

    fn host_keep_alive(&mut self, id: ConnectionId) {
        let kato = self.mix.kato_ns;
        self.after(kato / 2, move |world| {
            let now = world.now;
            let Some(path) = world.path_of(id) else { return };
            if now - path.heard > kato {
                world.host_lost(id);
            } else {
                world.host_send(id, HostMessage::KeepAlive);
                world.host_keep_alive(id);
            }
        });
    }

    /// The host gives a connection up, closes its end and tries its commands elsewhere.
    pub fn host_lost(&mut self, id: ConnectionId) {
        let Some(path) = self.path_of(id) else { return };
        let sent: Vec<u64> = std::mem::take(path).sent.into_values().collect();
        self.host_send(id, HostMessage::Close);
        self.connections[id].host_open = false;
        let c = &self.connections[id];
        let (host, life, volume, node) = (c.host, c.host_life, c.volume, c.node);
        let mount = self.mount(host, life, volume).expect("it had a path");
        for number in sent.into_iter().rev() {
            mount.commands.get_mut(&number).expect("it is not answered").lost_copy = true;
            mount.queue.push_front(number);
        }
        self.host_reconnect(host, life, volume, node);
        self.dispatch(host, volume);
    }

    /// Something has arrived at a host.
    pub fn host_receive(&mut self, id: ConnectionId, message: NodeMessage) {
        let now = self.now;
        let Some(path) = self.path_of(id) else { return };
        path.heard = now;
        match message {
            NodeMessage::Accepted(Ok(())) | NodeMessage::AnaChanged => {
                self.host_send(id, HostMessage::ReadAna);
            }
            NodeMessage::Accepted(Err(_)) | NodeMessage::Closed => self.host_lost(id),
            NodeMessage::AnaLog(ana) => {
                path.ana = Some(ana);
                let (host, volume) = (self.connections[id].host, self.connections[id].volume);
                self.dispatch(host, volume);
            }
            NodeMessage::Done(token, result) => self.host_answered(id, token, result),
            NodeMessage::Alive => {}
        }
    }

    fn host_answered(
        &mut self,
        id: ConnectionId,
        token: Token,
        answer: Result<HostDone, HostError>,
    ) {
        let path = self.path_of(id).expect("it was received");
        let Some(number) = path.sent.remove(&token) else {
            self.violate(format!("an answer to {token:?} that was not asked or was answered"));
            return;
        };
        let c = &self.connections[id];
        let (host, life, volume) = (c.host, c.host_life, c.volume);
        match answer {
            Err(HostError::Inaccessible) => {
                self.path_refused(id);
                self.host_send(id, HostMessage::ReadAna);
                let mount = self.mount(host, life, volume).expect("it has the path");
                mount.queue.push_front(number);
                self.probe(Probe::CommandRetried);
                self.dispatch(host, volume);
            }
            Err(error) => self.command_failed(host, volume, number, error),
            Ok(done) => self.command_done(host, volume, number, done),
        }
    }

    /// Sends what waits, over paths that were read to be optimized.
    pub fn dispatch(&mut self, host: usize, volume: usize) {
        let (life, blind, now) = (self.hosts[host].life, self.mix.blind, self.now);
        loop {
            let Some(mount) = self.mount(host, life, volume) else { return };
            let usable: Vec<usize> = (0..mount.paths.len())
                .filter(|node| mount.paths[*node].is_usable(blind, now))
                .collect();
            if usable.is_empty() || mount.queue.is_empty() {
                return;
            }
            let node = usable[self.rng.random_range(0..usable.len())];
            let mount = self.mount(host, life, volume).expect("seen above");
            let number = mount.queue.pop_front().expect("seen above");
            let command = mount.commands.get_mut(&number).expect("it is not answered");
            command.tries += 1;
            let (tries, wire) = (command.tries, command.wire());
            let path = &mut mount.paths[node];
            path.token_last += 1;
            let token = Token(path.token_last);
            path.sent.insert(token, number);
            let id = path.connection.expect("a path with an ANA state has one");
            if tries > 1 {
                self.probe(Probe::CommandRetried);
            }
            self.host_send(id, HostMessage::Command(token, wire));
        }
    }

    /// As Linux does: not this path until the ANA log says so again; one that knows nothing of ANA
    /// tries it again later.
    fn path_refused(&mut self, id: ConnectionId) {
        let (now, blind) = (self.now, self.mix.blind);
        let path = self.path_of(id).expect("it was received");
        path.ana = Some(Ana::Inaccessible);
        path.shunned_until = now + SHUNNED_NS;
        let (host, volume) = (self.connections[id].host, self.connections[id].volume);
        if blind {
            self.after(SHUNNED_NS, move |world| world.dispatch(host, volume));
        }
    }

    /// A node's process is gone: connections to it are reset, or fall silent.
    pub fn connections_of_dead(&mut self, node: usize, silent: bool) {
        for id in 0..self.connections.len() {
            let c = &mut self.connections[id];
            if c.node != node || !c.node_open {
                continue;
            }
            c.node_open = false;
            let (to_host, host) = (c.to_host, c.host);
            let open = self.net.is_open(self.host_site(host), node);
            if !silent && open {
                self.push(to_host, Box::new(move |world| world.host_lost(id)));
            }
        }
    }

    /// Breaks a host's connections to a node, each end noticing by itself.
    pub fn host_flap(&mut self, host: usize, node: usize) {
        for id in 0..self.connections.len() {
            let c = &self.connections[id];
            if c.node == node && c.host == host && c.host_open {
                self.host_lost(id);
            }
        }
    }

    /// The host loses its power: what was under way stays under way.
    pub fn host_die(&mut self, host: usize) {
        self.hosts[host].alive = false;
        for id in 0..self.connections.len() {
            let c = &mut self.connections[id];
            if c.host == host {
                c.host_open = false;
            }
        }
        let volumes: Vec<usize> = self.hosts[host].mounts.keys().copied().collect();
        for volume in volumes {
            self.abandon(host, volume);
            let mount = self.hosts[host].mounts.get_mut(&volume).expect("as above");
            mount.paths.iter_mut().for_each(|path| *path = Path::default());
            mount.working = false;
        }
    }

    /// It boots again, with the same identity.
    pub fn host_reboot(&mut self, host: usize) {
        self.hosts[host].life += 1;
        self.hosts[host].alive = true;
        self.host_boot(host);
    }
}

impl Path {
    /// Whether a command may be tried over it.
    fn is_usable(&self, blind: bool, now: u64) -> bool {
        match self.ana {
            Some(Ana::Optimized) => true,
            Some(_) => blind && now >= self.shunned_until,
            None => false,
        }
    }
}
