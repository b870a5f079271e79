//! A host of bytes: capsules as they stand on the wire against a [`Target`] in the same thread, with
//! a volume in memory. For what the user-space host never sends: fused operations, Copy, Abort,
//! features, queues out of order.
#![allow(dead_code, clippy::doc_markdown, reason = "each test uses its part")]

use std::collections::BTreeMap;

use bytes::Bytes;
use tercet_nvmf::auth::{Computation, RANDOM_BYTES};
use tercet_nvmf::command::{Completion, Data, Entry};
use tercet_nvmf::fabrics::{ConnectData, ConnectEntry, PropertyEntry, property};
use tercet_nvmf::frame::{Framer, Reader};
use tercet_nvmf::names::volume_nqn;
use tercet_nvmf::pdu::{Common, Digests, IcReq, PduType, Transfer, crc32c, flags};
use tercet_nvmf::target::{
    Ana, AssociationId, CloseReason, CntlidRange, Command, CommandError, ConnectionId, Done,
    Effect, HostIdentity, Refusal, Target,
};
use tercet_nvmf::{QUEUE_ENTRIES_MAX, TRANSFER_BYTES_MAX};
use tercet_proto::{Instant, Token, VolumeId};

use crate::memory::Memory;

pub const START: Instant = Instant(1_000_000_000);
pub const BLOCKS: u64 = 4096;
pub const HOST_NQN: &str = "nqn.2026-11.io.tercet:host:raw";

pub fn volume() -> VolumeId {
    VolumeId::from_bytes(*b"tercet test volu")
}

/// A command capsule as a host sends it.
pub fn capsule(mut entry: Entry, data: &[u8], digests: Digests) -> Vec<u8> {
    if !data.is_empty() {
        entry.set_data(Data::InCapsule(data.len() as u32));
    }
    let bare = 72 + digests.header_bytes();
    let tail = if data.is_empty() { 0 } else { data.len() + digests.data_bytes() };
    let mut out = vec![0; 72];
    let mut common_flags = if digests.header { flags::HDGST } else { 0 };
    if !data.is_empty() && digests.data {
        common_flags |= flags::DDGST;
    }
    Common {
        kind: PduType::CapsuleCmd,
        flags: common_flags,
        data_offset: if data.is_empty() { 0 } else { bare as u8 },
        pdu_bytes: (bare + tail) as u32,
    }
    .put(&mut out);
    out[8..72].copy_from_slice(&entry.0);
    if digests.header {
        let digest = crc32c(&out);
        out.extend_from_slice(&digest.to_le_bytes());
    }
    out.extend_from_slice(data);
    if !data.is_empty() && digests.data {
        out.extend_from_slice(&crc32c(data).to_le_bytes());
    }
    out
}

/// All data of a command after its R2T, in one PDU without digests.
pub fn host_data(command_id: u16, data: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 24];
    let pdu_bytes = (24 + data.len()) as u32;
    Common { kind: PduType::H2CData, flags: flags::LAST, data_offset: 24, pdu_bytes }.put(&mut out);
    let bytes = data.len() as u32;
    Transfer { command_id, tag: command_id, offset: 0, bytes }.put(&mut out);
    out.extend_from_slice(data);
    out
}

pub fn hello(digests: Digests) -> Vec<u8> {
    let request = IcReq { format: 0, host_alignment: 0, digests: digests.to_wire(), r2ts_max: 0 };
    request.to_wire().to_vec()
}

/// Connect of a host with this NQN to the volume, or to another subsystem.
pub fn connect(
    subsystem_nqn: &str,
    host_nqn: &str,
    queue: u16,
    cntlid: u16,
    flow_control: bool,
) -> (Entry, Vec<u8>) {
    let entry = ConnectEntry {
        format: 0,
        queue,
        last_entry: QUEUE_ENTRIES_MAX - 1,
        no_flow_control: !flow_control,
        keep_alive_ms: 5000,
    };
    let data = ConnectData {
        host_id: [9; 16],
        cntlid,
        subsystem_nqn: subsystem_nqn.to_owned(),
        host_nqn: host_nqn.to_owned(),
    };
    (entry.to_entry(0), data.to_wire())
}

pub fn property_set(value: u64) -> Entry {
    PropertyEntry { wide: false, offset: property::CC, value }.set(1)
}

/// CC of an enabled controller.
pub const ENABLED: u64 = 0x0046_0001;

/// A row of evidence, where somebody collects it.
pub fn evidence(name: &str, count: u64, started: std::time::Instant) {
    use std::io::Write as _;
    let seconds = started.elapsed().as_secs_f64();
    println!("{name}: {count} in {seconds:.1} s");
    if let Ok(path) = std::env::var("TERCET_EVIDENCE") {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.create(true).append(true).open(path).expect("the evidence file");
        writeln!(
            file,
            "{{\"evidence\": \"{name}\", \"count\": {count}, \"violations\": 0, \
             \"seconds\": {seconds:.3}}}"
        )
        .expect("a row of evidence");
    }
}

/// The number in an environment variable, or this one.
pub fn number_from(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// Numbers that a seed repeats.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

/// What a target sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Completion(Completion),
    Data(u16, Bytes),
    R2T(Transfer),
}

/// See the module.
pub struct Raw {
    pub target: Target,
    pub now: Instant,
    pub blocks: Memory,
    framers: BTreeMap<ConnectionId, Framer>,
    pub replies: BTreeMap<ConnectionId, Vec<Reply>>,
    pub closed: BTreeMap<ConnectionId, CloseReason>,
    /// Commands are kept back while set.
    pub holds: bool,
    pub held: Vec<(AssociationId, Token, Command)>,
    /// What the next commands end with, instead of being run.
    pub fails: Option<CommandError>,
    pub commands: Vec<Command>,
    pub hosts: BTreeMap<AssociationId, HostIdentity>,
    pub refusal: Option<Refusal>,
    /// What computations are run with; without it they are kept.
    pub random: Option<[u8; RANDOM_BYTES]>,
    pub computations: Vec<(ConnectionId, Computation)>,
}

pub const ADMIN: ConnectionId = ConnectionId(1);
pub const IO: ConnectionId = ConnectionId(2);

impl Raw {
    pub fn new() -> Self {
        Self::sized(BLOCKS)
    }

    pub fn sized(blocks: u64) -> Self {
        let mut target = Target::new(1);
        target.add_volume(volume(), blocks, Ana::Optimized, CntlidRange::of_member(0));
        Self {
            target,
            now: START,
            blocks: Memory::new(blocks),
            framers: BTreeMap::new(),
            replies: BTreeMap::new(),
            closed: BTreeMap::new(),
            holds: false,
            held: Vec::new(),
            fails: None,
            commands: Vec::new(),
            hosts: BTreeMap::new(),
            refusal: None,
            random: Some([9; RANDOM_BYTES]),
            computations: Vec::new(),
        }
    }

    /// With an enabled controller on [`ADMIN`] and an I/O queue on [`IO`], flow control on so that
    /// every command has its completion.
    pub fn live() -> Self {
        let mut raw = Self::new();
        raw.go_live();
        raw
    }

    /// See [`Raw::live`].
    pub fn go_live(&mut self) {
        let raw = self;
        let (completion, _) = raw.join(ADMIN, &volume_nqn(volume()), HOST_NQN, 0, 0xffff);
        assert!(completion.status.is_success(), "{completion:?}");
        let cntlid = completion.result as u16;
        assert!(raw.call(ADMIN, property_set(ENABLED), &[]).0.status.is_success());
        let (completion, _) = raw.join(IO, &volume_nqn(volume()), HOST_NQN, 1, cntlid);
        assert!(completion.status.is_success(), "{completion:?}");
    }

    /// Opens a connection and connects a queue on it.
    pub fn join(
        &mut self,
        id: ConnectionId,
        subsystem_nqn: &str,
        host_nqn: &str,
        queue: u16,
        cntlid: u16,
    ) -> (Completion, Vec<u8>) {
        self.open(id);
        let (entry, data) = connect(subsystem_nqn, host_nqn, queue, cntlid, true);
        self.call(id, entry, &data)
    }

    /// Opens a connection and initializes it.
    pub fn open(&mut self, id: ConnectionId) {
        self.open_bare(id);
        self.input(id, &hello(Digests::default()));
    }

    /// Opens a connection; nothing is sent.
    pub fn open_bare(&mut self, id: ConnectionId) {
        let mut effects = Vec::new();
        self.target.open(id, self.now, &mut effects).expect("room");
        self.execute(effects);
        self.framers.insert(id, Framer::new(Reader::Host, 0, TRANSFER_BYTES_MAX));
    }

    /// The host closes its connection; nothing is kept of it here.
    pub fn close(&mut self, id: ConnectionId) {
        let mut effects = Vec::new();
        self.target.closed(id, &mut effects);
        self.execute(effects);
        self.framers.remove(&id);
        self.replies.remove(&id);
        self.closed.remove(&id);
    }

    /// Time goes on.
    pub fn wait(&mut self, duration: std::time::Duration) {
        self.now = self.now + duration;
        let mut effects = Vec::new();
        self.target.tick(self.now, &mut effects);
        self.execute(effects);
    }

    pub fn input(&mut self, id: ConnectionId, bytes: &[u8]) {
        let mut effects = Vec::new();
        self.target.input(id, Bytes::copy_from_slice(bytes), self.now, &mut effects);
        self.execute(effects);
    }

    /// Sends a command, its data in the capsule.
    pub fn send(&mut self, id: ConnectionId, entry: Entry, data: &[u8]) {
        self.input(id, &capsule(entry, data, Digests::default()));
    }

    /// What has been sent on a connection since it was looked at last.
    pub fn take(&mut self, id: ConnectionId) -> Vec<Reply> {
        self.replies.remove(&id).unwrap_or_default()
    }

    /// Runs one command to its completion; gives its data as well.
    pub fn call(&mut self, id: ConnectionId, entry: Entry, data: &[u8]) -> (Completion, Vec<u8>) {
        self.send(id, entry, data);
        let mut read = Vec::new();
        for reply in self.take(id) {
            match reply {
                Reply::Data(command, bytes) if command == entry.id() => read.extend(bytes),
                Reply::Completion(completion) if completion.id == entry.id() => {
                    return (completion, read);
                }
                other => panic!("{other:?} while {entry:?} runs"),
            }
        }
        panic!("no completion of {entry:?}; closed: {:?}", self.closed);
    }

    /// The completions of these commands, in the order in which they came.
    pub fn completions(&mut self, id: ConnectionId) -> Vec<Completion> {
        let only = |reply| match reply {
            Reply::Completion(completion) => Some(completion),
            _ => None,
        };
        self.take(id).into_iter().filter_map(only).collect()
    }

    /// Runs, oldest first, what was kept back.
    pub fn release(&mut self) {
        self.holds = false;
        for (association, token, command) in std::mem::take(&mut self.held) {
            let mut effects = Vec::new();
            let result = self.run(command);
            self.target.done(association, token, result, self.now, &mut effects);
            self.execute(effects);
        }
    }

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

    /// Carries out an effect that has nothing to do with a wire; gives what follows.
    pub fn execute_outside(&mut self, effect: Effect) -> Vec<Effect> {
        let mut more = Vec::new();
        self.execute_one(effect, &mut more);
        more
    }

    fn execute_one(&mut self, effect: Effect, more: &mut Vec<Effect>) {
        match effect {
            Effect::Send(id) => {
                let mut out = Vec::new();
                self.target.take_output(id, self.now, &mut out, more);
                self.read(id, &out);
            }
            Effect::Close(id, last, reason) => {
                self.read(id, &last);
                self.closed.insert(id, reason);
            }
            Effect::HostConnect(_, association, host) => {
                let result = self.refusal.map_or(Ok(()), Err);
                if result.is_ok() {
                    self.hosts.insert(association, host);
                }
                self.target.accepted(association, result, self.now, more);
            }
            Effect::HostGone(association) => {
                self.hosts.remove(&association);
            }
            Effect::HostCommand(association, token, command) => {
                self.commands.push(command.clone());
                if self.holds {
                    self.held.push((association, token, command));
                } else {
                    let result = self.run(command);
                    self.target.done(association, token, result, self.now, more);
                }
            }
            Effect::Compute(id, computation) => {
                if let Some(random) = &self.random {
                    let computed = computation.run(random);
                    self.target.computed(id, computed, self.now, more);
                } else {
                    self.computations.push((id, computation));
                }
            }
            Effect::Elsewhere(id, _) => self.target.refuse(id, more),
            Effect::HostReadAna(_) => {}
        }
    }

    fn read(&mut self, id: ConnectionId, pieces: &[Bytes]) {
        let mut input = Bytes::from(pieces.concat());
        let Some(framer) = self.framers.get_mut(&id) else { return };
        while let Some(frame) = framer.next(&mut input).expect("what a target sends is whole") {
            let reply = match frame.common.kind {
                PduType::CapsuleResp => Reply::Completion(Completion::parse(&frame.header()[8..])),
                PduType::C2HData => {
                    Reply::Data(Transfer::parse(frame.header()).command_id, frame.data)
                }
                PduType::IcResp => {
                    framer.set_digests(Digests::from_wire(frame.header()[11]));
                    continue;
                }
                PduType::R2T => Reply::R2T(Transfer::parse(frame.header())),
                _ => continue,
            };
            self.replies.entry(id).or_default().push(reply);
        }
    }

    fn run(&mut self, command: Command) -> Result<Done, CommandError> {
        if let Some(error) = self.fails {
            return Err(error);
        }
        Ok(self.blocks.run(command))
    }
}
