//! A member with a volume in memory, served over real sockets by polling: the smallest executor of
//! [`Target`] that there can be. It stands where engine and replication stand, and does of rules
//! H1-H4 what a test asks for.
#![allow(dead_code, clippy::doc_markdown, reason = "each test uses its part")]

pub mod client;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant as Clock};

use bytes::{Bytes, BytesMut};
use tercet_nvmf::auth::RANDOM_BYTES;
use tercet_nvmf::target::{
    Ana, AssociationId, CloseReason, CntlidRange, Command, CommandError, ConnectionId, Effect,
    HostIdentity, Refusal, Target,
};
use tercet_proto::{BLOCK_BYTES, Instant, Token, VolumeId};

use crate::memory::Memory;

thread_local! {
    static CLOCK: Cell<(Duration, Clock)> = Cell::new((Duration::ZERO, Clock::now()));
}

/// The most that a round of polling adds to [`now`].
const ROUND_MAX: Duration = Duration::from_millis(5);

/// Nanoseconds since the test began; moves with [`turn_clock`] only.
pub fn now() -> Instant {
    Instant(1_000_000_000 + CLOCK.get().0.as_nanos() as u64)
}

/// Begins a round: the clock goes on by the time that has passed, but a thread that got no processor
/// for long is no peer that fell silent.
pub fn turn_clock() {
    let (time, last) = CLOCK.get();
    let read = Clock::now();
    CLOCK.set((time + (read - last).min(ROUND_MAX), read));
}

/// The volume that tests use.
pub fn volume() -> VolumeId {
    VolumeId::from_bytes(*b"tercet test volu")
}

/// Bytes on their way to or from a non-blocking socket.
pub struct Wire {
    pub stream: TcpStream,
    unsent: Vec<Bytes>,
}

impl Wire {
    pub fn new(stream: TcpStream) -> Self {
        stream.set_nonblocking(true).expect("a socket");
        stream.set_nodelay(true).expect("a socket");
        Self { stream, unsent: Vec::new() }
    }

    /// What has arrived: `None` when the connection is over.
    pub fn receive(&mut self, buffer_bytes: usize) -> Option<Bytes> {
        let mut buffer = BytesMut::zeroed(buffer_bytes);
        match self.stream.read(&mut buffer) {
            Ok(0) => None,
            Ok(count) => {
                buffer.truncate(count);
                Some(buffer.freeze())
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Some(Bytes::new()),
            Err(_) => None,
        }
    }

    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends what can be sent; false when the connection is over.
    pub fn send(&mut self, pieces: Vec<Bytes>) -> bool {
        self.unsent.extend(pieces);
        while let Some(piece) = self.unsent.first_mut() {
            match self.stream.write(piece) {
                Ok(count) if count == piece.len() => {
                    self.unsent.remove(0);
                }
                Ok(count) => {
                    let _ = piece.split_to(count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
        }
        true
    }
}

/// A member.
pub struct Node {
    pub target: Target,
    listener: TcpListener,
    wires: BTreeMap<ConnectionId, Wire>,
    next_connection: u64,
    pub blocks: Memory,
    /// Associations and whose they are.
    pub hosts: BTreeMap<AssociationId, HostIdentity>,
    /// Commands that are kept back while set (a slow or paused member).
    pub holds: bool,
    held: Vec<(AssociationId, Token, Command)>,
    pub refusal: Option<Refusal>,
    pub closed: Vec<CloseReason>,
    pub ana_reads: usize,
    pub commands: usize,
    /// Bytes of each receive: small ones tear PDUs.
    pub receive_bytes: usize,
}

impl Node {
    /// A member on a port of its own, with that many blocks of zeroes.
    pub fn new(index: u16, blocks: u64, ana: Ana) -> Self {
        Self::at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), index, blocks, ana)
    }

    pub fn at(address: SocketAddr, index: u16, blocks: u64, ana: Ana) -> Self {
        let listener = TcpListener::bind(address).expect("a free port");
        listener.set_nonblocking(true).expect("a socket");
        let mut target = Target::new(u64::from(index) << 48);
        target.add_volume(volume(), blocks, ana, CntlidRange::of_member(index));
        Self {
            target,
            listener,
            wires: BTreeMap::new(),
            next_connection: 0,
            blocks: Memory::new(blocks),
            hosts: BTreeMap::new(),
            holds: false,
            held: Vec::new(),
            refusal: None,
            closed: Vec::new(),
            ana_reads: 0,
            commands: 0,
            receive_bytes: 64 * 1024,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("it listens")
    }

    pub fn connections(&self) -> usize {
        self.wires.len()
    }

    /// One round; true when something happened.
    pub fn poll(&mut self) -> bool {
        let mut effects = Vec::new();
        let mut busy = self.accept();
        let ids: Vec<ConnectionId> = self.wires.keys().copied().collect();
        for id in ids {
            busy |= self.poll_wire(id, &mut effects);
        }
        self.target.tick(now(), &mut effects);
        busy |= !effects.is_empty();
        self.execute(effects);
        busy
    }

    fn accept(&mut self) -> bool {
        let Ok((stream, _)) = self.listener.accept() else {
            return false;
        };
        let id = ConnectionId(self.next_connection);
        self.next_connection += 1;
        let mut effects = Vec::new();
        if self.target.open(id, now(), &mut effects).is_ok() {
            self.wires.insert(id, Wire::new(stream));
        }
        self.execute(effects);
        true
    }

    fn poll_wire(&mut self, id: ConnectionId, effects: &mut Vec<Effect>) -> bool {
        let wire = self.wires.get_mut(&id).expect("listed");
        let mut alive = wire.send(Vec::new());
        let mut busy = false;
        if alive && self.target.wants_input(id) && !wire.has_unsent() {
            match wire.receive(self.receive_bytes) {
                Some(bytes) if bytes.is_empty() => {}
                Some(bytes) => {
                    busy = true;
                    self.target.input(id, bytes, now(), effects);
                }
                None => alive = false,
            }
        }
        if !alive {
            self.wires.remove(&id);
            self.target.closed(id, effects);
        }
        busy || !alive
    }

    /// Carries out effects, and those that follow from them.
    pub fn execute(&mut self, effects: Vec<Effect>) {
        let mut next = effects;
        while !next.is_empty() {
            let mut more = Vec::new();
            for effect in next {
                self.execute_one(effect, &mut more);
            }
            next = more;
        }
    }

    fn execute_one(&mut self, effect: Effect, more: &mut Vec<Effect>) {
        match effect {
            Effect::Send(id) => {
                let mut out = Vec::new();
                self.target.take_output(id, now(), &mut out, more);
                let sent = self.wires.get_mut(&id).is_none_or(|wire| wire.send(out));
                if !sent {
                    self.wires.remove(&id);
                    self.target.closed(id, more);
                }
            }
            Effect::Close(id, last, reason) => {
                self.closed.push(reason);
                if let Some(mut wire) = self.wires.remove(&id) {
                    wire.send(last);
                }
            }
            Effect::HostConnect(_, association, host) => {
                // H3: a new association of a host ends the older one.
                let older = self.hosts.iter().find(|(_, known)| **known == host);
                if let Some((&older, _)) = older {
                    self.hosts.remove(&older);
                    self.target.end(older, more);
                }
                let result = self.refusal.map_or(Ok(()), Err);
                if result.is_ok() {
                    self.hosts.insert(association, host);
                }
                self.target.accepted(association, result, now(), more);
            }
            Effect::HostGone(association) => {
                self.hosts.remove(&association);
                self.held.retain(|(held, ..)| *held != association);
            }
            Effect::HostReadAna(_) => self.ana_reads += 1,
            Effect::HostCommand(association, token, command) => {
                self.commands += 1;
                if self.holds {
                    self.held.push((association, token, command));
                } else {
                    let result = Ok(self.blocks.run(command));
                    self.target.done(association, token, result, now(), more);
                }
            }
            Effect::Compute(id, computation) => {
                let computed = computation.run(&[9; RANDOM_BYTES]);
                self.target.computed(id, computed, now(), more);
            }
            Effect::Elsewhere(id, _) => self.target.refuse(id, more),
        }
    }

    /// Runs what was kept back.
    pub fn release(&mut self) {
        self.holds = false;
        let mut effects = Vec::new();
        for (association, token, command) in std::mem::take(&mut self.held) {
            let result = Ok(self.blocks.run(command));
            self.target.done(association, token, result, now(), &mut effects);
        }
        self.execute(effects);
    }

    /// Answers what was kept back as a member does that stops to serve.
    pub fn fail_held(&mut self) {
        self.holds = false;
        let mut effects = Vec::new();
        for (association, token, _) in std::mem::take(&mut self.held) {
            let result = Err(CommandError::Inaccessible);
            self.target.done(association, token, result, now(), &mut effects);
        }
        self.execute(effects);
    }

    pub fn set_ana(&mut self, ana: Ana) {
        let mut effects = Vec::new();
        self.target.set_ana(volume(), ana, &mut effects);
        self.execute(effects);
    }

    /// H4: a demotion ends the associations.
    pub fn end_associations(&mut self) {
        let mut effects = Vec::new();
        for (association, _) in std::mem::take(&mut self.hosts) {
            self.target.end(association, &mut effects);
        }
        self.held.clear();
        self.execute(effects);
    }

    pub fn grow(&mut self, blocks: u64) {
        self.blocks.resize(blocks as usize * BLOCK_BYTES, 0);
        let mut effects = Vec::new();
        self.target.set_size(volume(), blocks, &mut effects);
        self.execute(effects);
    }

    /// The process dies: sockets are closed, nothing is answered.
    pub fn kill(&mut self) {
        let mut effects = Vec::new();
        for (id, _) in std::mem::take(&mut self.wires) {
            self.target.closed(id, &mut effects);
        }
        self.hosts.clear();
        self.held.clear();
    }
}
