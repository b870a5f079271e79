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

/// What an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read.
    Read,
    /// Write, with the stamp of its blocks.
    Write(Stamp),
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
}

impl Command {
    /// What is sent.
    pub fn wire(&self) -> HostCommand {
        match self.kind {
            Kind::Read => HostCommand::Read(self.range),
            Kind::Write(stamp) => {
                let mut bytes = Vec::with_capacity(self.range.bytes());
                for block in self.range.start..self.range.end() {
                    stamp::encode(stamp, block, &mut bytes);
                }
                HostCommand::Write(self.range, Bytes::from(bytes))
            }
            Kind::Zero(discard) => HostCommand::Zero(self.range, discard),
            Kind::Flush => HostCommand::Flush,
        }
    }

    fn ops(&self, ended: u64, answered: bool) -> Vec<(u64, Op)> {
        let stamp = match self.kind {
            Kind::Write(stamp) => stamp,
            Kind::Zero(_) => Stamp::ZERO,
            Kind::Read | Kind::Flush => return Vec::new(),
        };
        let action = Action::Write(stamp);
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

    fn may_write(&self, range: BlockRange) -> bool {
        (range.start..range.end()).all(|block| {
            (block / OWNED_BLOCKS) % self.sharers == self.share
                && !self.writing.contains_key(&block)
        })
    }

    fn mark(&mut self, range: BlockRange) {
        for block in range.start..range.end() {
            *self.writing.entry(block).or_default() += 1;
        }
    }

    fn unmark(&mut self, range: BlockRange) {
        for block in range.start..range.end() {
            self.writing.remove(&block);
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
        let kind = match kind {
            Kind::Write(_) | Kind::Zero(_) if !work.may_write(range) => Kind::Read,
            kind => kind,
        };
        if matches!(kind, Kind::Write(_) | Kind::Zero(_)) {
            work.mark(range);
        }
        self.begin_command(host, volume, Command { number, kind, range, invoked: 0, tries: 0 });
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
            let command = Command { number, kind, range, invoked: 0, tries: 0 };
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
                    Action::Write(_) => None,
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
        match command.kind {
            Kind::Write(_) | Kind::Zero(_) => work.unmark(command.range),
            Kind::Read | Kind::Flush => {}
        }
        ops.extend(command.ops(now, true));
        for (block, op) in ops {
            self.histories.add(volume, block, op);
        }
        self.ops_done += 1;
        self.note(number);
        match done {
            HostDone::Data(pieces) => self.note_read(volume, &command, &pieces),
            HostDone::Ok if command.kind != Kind::Read => {}
            other => self.violate(format!("#{number} {:?} was answered {other:?}", command.kind)),
        }
    }

    fn note_read(&mut self, volume: usize, command: &Command, pieces: &[Bytes]) {
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
            self.histories.add(
                volume,
                block,
                Op { invoked, ended, answered: true, action, id: number },
            );
        }
        self.tell(|_| format!("volume {volume}: #{number} read {range:?} as {seen:?}"));
    }

    /// A command failed, which never happens while a member can become primary; but a read of a
    /// block that has gone bad and that no other member can give, until it is repaired (C4).
    pub fn command_failed(&mut self, host: usize, volume: usize, number: u64, error: HostError) {
        let reads = self.hosts[host].mounts[&volume].commands[&number].kind == Kind::Read;
        if reads && error == HostError::Media && self.decay.on && !self.decay.mended {
            self.probe(Probe::ReadFailed);
            let mount = self.hosts[host].mounts.get_mut(&volume).expect("looked at");
            mount.commands.remove(&number);
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
