//! The user-space host over non-blocking sockets, driven by polling together with its members.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant as Clock};

use bytes::Bytes;
use tercet_nvmf::auth::RANDOM_BYTES;
use tercet_nvmf::host::{
    ConnectionId, Geometry, HostEffect, HostOptions, Multipath, Operation, OperationError,
    OperationId, PathState,
};
use tercet_nvmf::names::volume_nqn;

use super::{Node, Wire, now, turn_clock, volume};

/// Longest that anything in a test may take.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// A host.
pub struct Client {
    pub host: Multipath,
    wires: BTreeMap<ConnectionId, Wire>,
    next_operation: u64,
    pub completed: BTreeMap<OperationId, Result<Vec<u8>, OperationError>>,
    pub geometry: Option<Geometry>,
    pub path_events: Vec<(SocketAddr, PathState, Option<String>)>,
    pub receive_bytes: usize,
    /// While set nothing is read, as if the process were stopped.
    pub is_stopped: bool,
}

/// Options for the tests' volume behind these members.
pub fn options(nodes: &[Node]) -> HostOptions {
    let mut options =
        HostOptions::new(&volume_nqn(volume()), "nqn.2026-11.io.tercet:host:test", [7; 16]);
    options.endpoints = nodes.iter().map(Node::address).collect();
    options
}

impl Client {
    pub fn new(options: HostOptions) -> Self {
        Self {
            host: Multipath::new(options, 42, now()),
            wires: BTreeMap::new(),
            next_operation: 0,
            completed: BTreeMap::new(),
            geometry: None,
            path_events: Vec::new(),
            receive_bytes: 64 * 1024,
            is_stopped: false,
        }
    }

    pub fn submit(&mut self, operation: Operation) -> OperationId {
        let id = OperationId(self.next_operation);
        self.next_operation += 1;
        let mut effects = Vec::new();
        self.host.submit(id, operation, now(), &mut effects).expect("an operation that fits");
        self.execute(effects);
        id
    }

    /// One round; true when something happened.
    pub fn poll(&mut self) -> bool {
        if self.is_stopped {
            return false;
        }
        let mut effects = Vec::new();
        let ids: Vec<ConnectionId> = self.wires.keys().copied().collect();
        let mut busy = false;
        for id in ids {
            let wire = self.wires.get_mut(&id).expect("listed");
            let sent = wire.send(Vec::new());
            match wire.receive(self.receive_bytes) {
                Some(bytes) if bytes.is_empty() && sent => {}
                Some(bytes) if sent => {
                    busy = true;
                    self.host.input(id, bytes, now(), &mut effects);
                }
                _ => {
                    busy = true;
                    self.wires.remove(&id);
                    self.host.closed(id, now(), &mut effects);
                }
            }
        }
        if self.host.next_deadline().is_some_and(|at| at <= now()) {
            self.host.tick(now(), &mut effects);
        }
        busy |= !effects.is_empty();
        self.execute(effects);
        busy
    }

    pub fn execute(&mut self, effects: Vec<HostEffect>) {
        let mut next = effects;
        while !next.is_empty() {
            let mut more = Vec::new();
            for effect in next {
                self.execute_one(effect, &mut more);
            }
            next = more;
        }
    }

    fn execute_one(&mut self, effect: HostEffect, more: &mut Vec<HostEffect>) {
        match effect {
            HostEffect::Open(id, address) => match TcpStream::connect(address) {
                Ok(stream) => {
                    self.wires.insert(id, Wire::new(stream));
                    self.host.opened(id, now(), more);
                }
                Err(_) => self.host.closed(id, now(), more),
            },
            HostEffect::Send(id) => {
                let mut out = Vec::new();
                while self.host.take_output(id, &mut out) {}
                if let Some(wire) = self.wires.get_mut(&id) {
                    wire.send(out);
                }
            }
            HostEffect::Close(id, last) => {
                if let Some(mut wire) = self.wires.remove(&id) {
                    wire.send(last);
                }
                self.host.closed(id, now(), more);
            }
            HostEffect::Compute(id, computation) => {
                let computed = computation.run(&[7; RANDOM_BYTES]);
                self.host.computed(id, &computed, now(), more);
            }
            HostEffect::Completed(id, result) => {
                let result = result.map(|pieces: Vec<Bytes>| pieces.concat());
                assert!(self.completed.insert(id, result).is_none(), "{id:?} completed twice");
            }
            HostEffect::SentAgain(_) => {}
            HostEffect::Geometry(geometry) => self.geometry = Some(geometry),
            HostEffect::Path(address, state, why) => self.path_events.push((address, state, why)),
        }
    }

    pub fn detach(&mut self) {
        let mut effects = Vec::new();
        self.host.detach(now(), &mut effects);
        self.execute(effects);
    }
}

/// Members and a host that are polled together until something is so.
pub fn until(
    nodes: &mut [Node],
    client: &mut Client,
    what: &str,
    mut is_so: impl FnMut(&[Node], &Client) -> bool,
) {
    let deadline = Clock::now() + PATIENCE;
    while !is_so(nodes, client) {
        turn_clock();
        let mut busy = client.poll();
        for node in nodes.iter_mut() {
            busy |= node.poll();
        }
        if !busy {
            std::thread::sleep(Duration::from_micros(100));
        }
        assert!(Clock::now() < deadline, "{what}: {:?}", client.path_events);
    }
}

/// Polls for that long.
pub fn for_a_while(nodes: &mut [Node], client: &mut Client, duration: Duration) {
    let start = now();
    until(nodes, client, "time passes", |_, _| now().since(start) >= duration);
}

/// Runs an operation to its end.
pub fn run(
    nodes: &mut [Node],
    client: &mut Client,
    operation: Operation,
) -> Result<Vec<u8>, OperationError> {
    let id = client.submit(operation);
    until(nodes, client, "an operation ends", |_, client| client.completed.contains_key(&id));
    client.completed.remove(&id).expect("it ended")
}
