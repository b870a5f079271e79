//! What hosts do on their volumes, and what they note of it for the checker.

use std::collections::BTreeMap;

use bytes::Bytes;
use rand::Rng;
use tercet_proto::{BLOCK_BYTES, BlockRange};
use tercet_replication::api::{HostCommand, HostDone, HostError};

use crate::checker::{Action, NEVER, Op};
use crate::mix::Mix;
use crate::probes::Probe;
use crate::stamp::{self, Stamp};
use crate::world::World;

/// Blocks of neighbours that one host of a shared volume writes.
const OWNED_BLOCKS: u64 = 8;

/// One write in so many is a fused compare-and-write, where the host knows what to expect.
const COMPARED_EVERY: u64 = 4;

/// What an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read.
    Read,
    /// Write, with the stamp of its blocks.
    Write(Stamp),
    /// A fused compare-and-write of one block: what it expects, and the stamp that it writes.
    CompareWrite(Stamp, Stamp),
    /// Write zeroes or deallocate.
    Zero(bool),
    /// Flush.
    Flush,
}

/// An operation of a host that has no answer yet.
#[derive(Clone, Debug)]
pub struct Command {
    number: u64,
    kind: Kind,
    range: BlockRange,
    invoked: u64,
    /// How often it was sent.
    pub tries: u32,
    /// A copy of it was sent that was never answered: it may have taken effect.
    pub lost_copy: bool,
}

impl Command {
    /// What is sent.
    pub fn wire(&self) -> HostCommand {
        match self.kind {
            Kind::Read => HostCommand::Read(self.range),
            Kind::Write(stamp) => HostCommand::Write(self.range, self.bytes(stamp)),
            Kind::CompareWrite(expected, stamp) => {
                HostCommand::CompareWrite(self.range, self.bytes(expected), self.bytes(stamp))
            }
            Kind::Zero(discard) => HostCommand::Zero(self.range, discard),
            Kind::Flush => HostCommand::Flush,
        }
    }

    fn bytes(&self, stamp: Stamp) -> Bytes {
        let mut bytes = Vec::with_capacity(self.range.bytes());
        for block in self.range.start..self.range.end() {
            stamp::encode(stamp, block, &mut bytes);
        }
        Bytes::from(bytes)
    }

    fn ops(&self, ended: u64, answered: bool) -> Vec<(u64, Op)> {
        let action = match self.kind {
            Kind::Write(stamp) => Action::Write(stamp),
            Kind::CompareWrite(expected, stamp) => Action::Swap { expected, stamp },
            Kind::Zero(_) => Action::Write(Stamp::ZERO),
            Kind::Read | Kind::Flush => return Vec::new(),
        };
        self.ops_of(action, ended, answered)
    }

    /// What a compare that differed shows: unless a lost copy of it may be what it met.
    fn differed(&self, ended: u64) -> Vec<(u64, Op)> {
        match self.kind {
            Kind::CompareWrite(expected, _) if !self.lost_copy => {
                self.ops_of(Action::Differs(expected), ended, true)
            }
            _ => self.ops(ended, false),
        }
    }

    fn ops_of(&self, action: Action, ended: u64, answered: bool) -> Vec<(u64, Op)> {
        let op = Op { invoked: self.invoked, ended, answered, action, id: self.number };
        (self.range.start..self.range.end()).map(|block| (block, op)).collect()
    }
}

/// A host's plan for a volume.
pub struct Work {
    sharers: u64,
    share: u64,
    /// Whether new operations are begun.
    pub going: bool,
    /// Operations that were answered.
    pub answered: u64,
    /// Blocks with a write in flight.
    writing: BTreeMap<u64, u32>,
    /// Blocks with compare-and-writes in flight: several at once, for one of them to succeed.
    comparing: BTreeMap<u64, u32>,
    /// What this host has last found or written.
    known: BTreeMap<u64, Stamp>,
    /// Writes of an earlier boot, settled by the first answer of this one (rule H3).
    unsettled: Vec<Command>,
}

impl Work {
    /// No work.
    pub fn idle() -> Self {
        Self {
            sharers: 1,
            share: 0,
            going: false,
            answered: 0,
            writing: BTreeMap::new(),
            comparing: BTreeMap::new(),
            known: BTreeMap::new(),
            unsettled: Vec::new(),
        }
    }

    /// The work of `host` on `volume`.
    pub fn new(mix: &Mix, host: usize, volume: usize) -> Self {
        let of_volume: Vec<usize> = (0..mix.host_volumes.len())
            .filter(|h| mix.host_volumes[*h].contains(&volume))
            .collect();
        let share = of_volume.iter().position(|h| *h == host).expect("a host of the volume");
        Self { sharers: of_volume.len() as u64, share: share as u64, going: true, ..Self::idle() }
    }

    fn may_change(&self, kind: Kind, range: BlockRange) -> bool {
        let compares = matches!(kind, Kind::CompareWrite(..));
        (range.start..range.end()).all(|block| {
            (block / OWNED_BLOCKS) % self.sharers == self.share
                && !self.writing.contains_key(&block)
                && (compares || !self.comparing.contains_key(&block))
        })
    }

    /// What becomes of a write where the host knows the block: now and then it compares first.
    fn compared(&self, kind: Kind, range: BlockRange) -> Kind {
        match (kind, self.known.get(&range.start)) {
            (Kind::Write(stamp), Some(known))
                if range.count == 1
                    && *known != Stamp::ZERO
                    && stamp.0.is_multiple_of(COMPARED_EVERY) =>
            {
                Kind::CompareWrite(*known, stamp)
            }
            _ => kind,
        }
    }

    fn mark(&mut self, command: &Command) {
        for block in command.range.start..command.range.end() {
            match command.kind {
                Kind::Read | Kind::Flush => {}
                Kind::Write(_) | Kind::Zero(_) => *self.writing.entry(block).or_default() += 1,
                Kind::CompareWrite(..) => *self.comparing.entry(block).or_default() += 1,
            }
        }
    }

    fn unmark(&mut self, command: &Command) {
        let marks = match command.kind {
            Kind::Read | Kind::Flush => return,
            Kind::Write(_) | Kind::Zero(_) => &mut self.writing,
            Kind::CompareWrite(..) => &mut self.comparing,
        };
        for block in command.range.start..command.range.end() {
            // A command of an earlier boot is forgotten with its marks.
            if let Some(count) = marks.get_mut(&block) {
                *count -= 1;
                if *count == 0 {
                    marks.remove(&block);
                }
            }
        }
    }

    /// What the host knows of blocks by an answer.
    fn learn(&mut self, command: &Command, done: &HostDone) {
        let stamp = match (command.kind, done) {
            (Kind::Write(stamp) | Kind::CompareWrite(_, stamp), HostDone::Ok) => stamp,
            (Kind::Zero(_), HostDone::Ok) => Stamp::ZERO,
            _ => return,
        };
        for block in command.range.start..command.range.end() {
            self.known.insert(block, stamp);
        }
    }
}

impl World {
    /// Begins an operation, unless enough are under way, and comes again.
    pub fn work(&mut self, host: usize, life: u64, volume: usize) {
        let depth = self.mix.depth;
        if self.hosts[host].life != life || !self.hosts[host].alive {
            return;
        }
        let Some(mount) = self.hosts[host].mounts.get(&volume) else { return };
        if mount.attached && mount.work.going && mount.commands.len() < depth {
            self.begin(host, volume);
        }
        // Sometimes several at once.
        let wait = if self.permille(600) { 0 } else { self.mix.think_ns * 5 / 2 };
        let wait = self.around(wait.max(1));
        self.after(wait, move |world| world.work(host, life, volume));
    }

    fn draw_range(&mut self) -> BlockRange {
        let blocks = if self.permille(850) {
            self.mix.hot_blocks.min(self.mix.blocks)
        } else {
            self.mix.blocks
        };
        let start = self.rng.random_range(0..blocks);
        let most = if self.permille(700) {
            1
        } else {
            u64::from(self.mix.op_blocks_max).min(self.mix.blocks - start)
        };
        let count = self.rng.random_range(1..=most);
        BlockRange { start, count: u32::try_from(count).expect("op_blocks_max") }
    }

    fn begin(&mut self, host: usize, volume: usize) {
        let number = self.histories.next_number();
        let range = self.draw_range();
        let chance = self.rng.random_range(0..1000);
        let (write, zero) = (self.mix.write_permille, self.mix.zero_permille);
        let kind = match chance {
            c if c < write => Kind::Write(Stamp(number)),
            c if c < write + zero => Kind::Zero(self.permille(500)),
            c if c < write + zero + 15 => Kind::Flush,
            _ => Kind::Read,
        };
        let work = &mut self.hosts[host].mounts.get_mut(&volume).expect("mounted").work;
        let kind = match work.compared(kind, range) {
            Kind::Flush => Kind::Flush,
            kind if !work.may_change(kind, range) => Kind::Read,
            kind => kind,
        };
        let command = Command { number, kind, range, invoked: 0, tries: 0, lost_copy: false };
        work.mark(&command);
        self.begin_command(host, volume, command);
    }

    fn begin_command(&mut self, host: usize, volume: usize, mut command: Command) {
        command.invoked = self.now;
        self.tell(|_| {
            format!(
                "host{host} volume {volume}: begins #{} {:?} {:?}",
                command.number, command.kind, command.range
            )
        });
        let mount = self.hosts[host].mounts.get_mut(&volume).expect("mounted");
        mount.queue.push_back(command.number);
        mount.commands.insert(command.number, command);
        self.dispatch(host, volume);
    }

    /// Reads blocks one by one, at the end of a run.
    pub fn begin_reads(&mut self, host: usize, volume: usize, blocks: std::ops::Range<u64>) {
        for start in blocks {
            let number = self.histories.next_number();
            let range = BlockRange { start, count: 1 };
            let kind = Kind::Read;
            let command = Command { number, kind, range, invoked: 0, tries: 0, lost_copy: false };
            self.begin_command(host, volume, command);
        }
    }

    /// What reads of a volume that nobody writes have shown.
    pub fn read_values(&self, volume: usize) -> BTreeMap<u64, Stamp> {
        (0..self.mix.blocks)
            .filter_map(|block| {
                let op = self.histories.of_block(volume, block).first()?;
                match op.action {
                    Action::Read(stamp) => Some((block, stamp)),
                    Action::Write(_) | Action::Swap { .. } | Action::Differs(_) => None,
                }
            })
            .collect()
    }

    /// A command was answered well.
    pub fn command_done(&mut self, host: usize, volume: usize, number: u64, done: HostDone) {
        let now = self.now;
        let mount = self.hosts[host].mounts.get_mut(&volume).expect("it has a path");
        let command = mount.commands.remove(&number).expect("answered once");
        let work = &mut mount.work;
        work.answered += 1;
        let mut ops: Vec<(u64, Op)> = Vec::new();
        if !matches!(command.kind, Kind::Flush) {
            let settled = std::mem::take(&mut work.unsettled);
            ops.extend(settled.iter().flat_map(|command| command.ops(now, false)));
        }
        work.unmark(&command);
        work.learn(&command, &done);
        let differed =
            matches!((command.kind, &done), (Kind::CompareWrite(..), HostDone::Differs(_)));
        ops.extend(if differed { command.differed(now) } else { command.ops(now, true) });
        for (block, op) in ops {
            self.histories.add(volume, block, op);
        }
        self.ops_done += 1;
        self.note(number);
        match done {
            HostDone::Data(pieces) => self.note_read(host, volume, &command, &pieces),
            HostDone::Ok if command.kind != Kind::Read => {
                if matches!(command.kind, Kind::CompareWrite(..)) {
                    self.probe(Probe::CompareWrote);
                }
            }
            HostDone::Differs(_) if differed => self.probe(Probe::CompareDiffered),
            other => self.violate(format!("#{number} {:?} was answered {other:?}", command.kind)),
        }
    }

    fn note_read(&mut self, host: usize, volume: usize, command: &Command, pieces: &[Bytes]) {
        let bytes = pieces.concat();
        let (number, range) = (command.number, command.range);
        if command.kind != Kind::Read || bytes.len() != range.bytes() {
            self.violate(format!("#{number} was answered with {} bytes", bytes.len()));
            return;
        }
        let mut seen = Vec::new();
        for (block, bytes) in (range.start..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
            let Some(stamp) = stamp::decode(bytes, block) else {
                self.violate(format!("#{number} read block {block}, which no one write made"));
                return;
            };
            let (invoked, ended) = (command.invoked, self.now);
            let action = Action::Read(stamp);
            seen.push(stamp.0);
            let mount = self.hosts[host].mounts.get_mut(&volume).expect("it has a path");
            mount.work.known.insert(block, stamp);
            self.histories.add(
                volume,
                block,
                Op { invoked, ended, answered: true, action, id: number },
            );
        }
        self.tell(|_| format!("volume {volume}: #{number} read {range:?} as {seen:?}"));
    }

    /// A command failed, which never happens while a member can become primary; but a read or a
    /// compare of a block that has gone bad and that no other member can give, until it is repaired
    /// (C4).
    pub fn command_failed(&mut self, host: usize, volume: usize, number: u64, error: HostError) {
        let kind = self.hosts[host].mounts[&volume].commands[&number].kind;
        let reads = matches!(kind, Kind::Read | Kind::CompareWrite(..));
        if reads && error == HostError::Media && self.decay.on && !self.decay.mended {
            self.probe(Probe::ReadFailed);
            let now = self.now;
            let mount = self.hosts[host].mounts.get_mut(&volume).expect("looked at");
            let command = mount.commands.remove(&number).expect("looked at");
            mount.work.unmark(&command);
            if command.lost_copy {
                for (block, op) in command.ops(now, false) {
                    self.histories.add(volume, block, op);
                }
            }
            return;
        }
        let mount = &self.hosts[host].mounts[&volume];
        let command = format!("{:?}", mount.commands[&number]);
        self.violate(format!("host{host} volume {volume}: {command} failed: {error:?}"));
    }

    /// The host is gone: its reads are forgotten, its writes are open until they are settled.
    pub fn abandon(&mut self, host: usize, volume: usize) {
        let mount = self.hosts[host].mounts.get_mut(&volume).expect("mounted");
        mount.queue.clear();
        let commands = std::mem::take(&mut mount.commands);
        mount.work.writing.clear();
        mount.work.comparing.clear();
        let sent: Vec<Command> = commands
            .into_values()
            .filter(|command| command.tries > 0 && !command.ops(0, false).is_empty())
            .collect();
        let any = !sent.is_empty();
        mount.work.unsettled.extend(sent);
        if any {
            self.probe(Probe::HostRebooted);
        }
    }

    /// A fenced host's writes have taken effect by now or never will (rule H5).
    pub fn settle_by_fence(&mut self, host: usize, volume: usize) {
        let now = self.now;
        let work = &mut self.hosts[host].mounts.get_mut(&volume).expect("mounted").work;
        let settled = std::mem::take(&mut work.unsettled);
        for (block, op) in settled.iter().flat_map(|command| command.ops(now, false)) {
            self.histories.add(volume, block, op);
        }
    }

    /// At the end: what was never answered.
    pub fn note_unanswered(&mut self) {
        for host in 0..self.hosts.len() {
            let mounts = std::mem::take(&mut self.hosts[host].mounts);
            for (volume, mount) in mounts {
                let open = mount.commands.values().chain(&mount.work.unsettled);
                for (block, op) in open.flat_map(|command| command.ops(NEVER, false)) {
                    self.histories.add(volume, block, op);
                }
            }
        }
    }
}
