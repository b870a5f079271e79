//! Commands of I/O queues: checked against the namespace, handed to the executor, answered.

use bytes::Bytes;
use tercet_proto::{BlockRange, Instant, Token, VolumeId};

use super::api::{Ana, AssociationId, Command, CommandError, Done, Effect};
use super::connection::Request;
use super::controller::Kind;
use super::{Peer, Role, Target};
use crate::command::{
    DSM_DEALLOCATE, DSM_RANGE_BYTES, Entry, FABRICS, WRITE_ZEROES_DEALLOCATE, fctype, io,
};
use crate::le::{u16_at, u32_at, u64_at};
use crate::status::Status;
use crate::{BLOCK_BYTES, NSID};

/// NSID that names all namespaces.
const NSID_ALL: u32 = 0xffff_ffff;

/// Ranges of a Dataset Management command that have still to be zeroed, last first: one at a
/// time, so that a command counts as one towards what replication queues.
#[derive(Debug)]
pub(super) struct Train {
    ranges: Vec<BlockRange>,
}

/// A command's token: queue 63:48, identifier 47:32, generation 31:0. Unique in its association
/// for as long as an answer can come.
fn token(queue: u16, command: u16, generation: u32) -> Token {
    Token(u64::from(queue) << 48 | u64::from(command) << 32 | u64::from(generation))
}

pub(super) fn split_token(token: Token) -> (u16, u16, u32) {
    ((token.0 >> 48) as u16, (token.0 >> 32) as u16, token.0 as u32)
}

/// What to do with a command that is in order.
enum Step {
    /// Give it to the executor.
    Run(Command),
    /// Give these, one after the other.
    RunTrain(Train),
    /// Answer it: there is nothing to do.
    Nothing,
}

impl Target {
    /// False when the connection ends.
    pub(super) fn io_request(
        &mut self,
        association: AssociationId,
        peer: &mut Peer,
        request: Request,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Some(controller) = self.controllers.get_mut(&association) else {
            return false;
        };
        controller.last_seen = now;
        let id = request.entry.id();
        if request.entry.opcode() == FABRICS {
            return self.io_fabrics(association, peer, &request.entry);
        }
        let volume = match controller.kind {
            Kind::Volume(volume) if controller.is_ready() => volume,
            _ => {
                peer.connection.respond(id, Status::SEQUENCE_ERROR, 0);
                return true;
            }
        };
        match self.check(volume, request) {
            Ok(Step::Run(command)) => {
                self.count(association, &command);
                run(association, peer, id, command, effects);
            }
            Ok(Step::RunTrain(mut train)) => {
                let range = train.ranges.pop().expect("a train is not empty");
                peer.trains.insert(id, train);
                run(association, peer, id, Command::Zero(range, true), effects);
            }
            Ok(Step::Nothing) => peer.connection.respond(id, Status::SUCCESS, 0),
            Err(status) => peer.connection.respond(id, status, 0),
        }
        true
    }

    /// Disconnect (Base 6.4) ends a queue that is idle, and the association when it is not: what
    /// still runs must not meet what the host does on another queue afterwards (rule H3).
    fn io_fabrics(&mut self, association: AssociationId, peer: &mut Peer, entry: &Entry) -> bool {
        let status = match entry.fabrics_type() {
            fctype::DISCONNECT if u16_at(&entry.0, 40) != 0 => Status::CONNECT_FORMAT,
            fctype::DISCONNECT => {
                if let (Role::Queue(_, queue), 1) = (peer.role, peer.connection.running()) {
                    let controller = self.controllers.get_mut(&association).expect("checked");
                    controller.queues.remove(&queue);
                }
                peer.connection.respond(entry.id(), Status::SUCCESS, 0);
                return false;
            }
            fctype::CONNECT => Status::SEQUENCE_ERROR,
            _ => Status::INVALID_FIELD,
        };
        peer.connection.respond(entry.id(), status, 0);
        true
    }

    /// Everything that can be said of a command without the volume's state.
    fn check(&self, volume: VolumeId, request: Request) -> Result<Step, Status> {
        let entry = &request.entry;
        if entry.fused() != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let is_known = matches!(
            entry.opcode(),
            io::FLUSH
                | io::READ
                | io::WRITE
                | io::COMPARE
                | io::WRITE_ZEROES
                | io::DATASET_MANAGEMENT
        );
        if !is_known {
            return Err(Status::INVALID_OPCODE);
        }
        let takes_all = entry.opcode() == io::FLUSH && entry.nsid() == NSID_ALL;
        if entry.nsid() != NSID && !takes_all {
            return Err(Status::INVALID_NAMESPACE);
        }
        let subsystem = &self.subsystems[&volume];
        // Base 8.1.3.3: such a path takes no command of the namespace (rule H2).
        match subsystem.ana {
            Ana::Optimized => {}
            Ana::Inaccessible => return Err(Status::ANA_INACCESSIBLE),
            Ana::Change => return Err(Status::ANA_TRANSITION),
        }
        step(entry, request.data, request.room, subsystem.blocks)
    }

    fn count(&mut self, association: AssociationId, command: &Command) {
        let counters = &mut self.controllers.get_mut(&association).expect("checked").counters;
        match command {
            Command::Read(range) | Command::Compare(range, _) => {
                counters.reads += 1;
                counters.read_bytes += range.bytes() as u64;
            }
            Command::Write(range, _) => {
                counters.writes += 1;
                counters.written_bytes += range.bytes() as u64;
            }
            Command::Zero(..) | Command::Flush => {}
        }
    }
}

/// Answers a command, or sends its next part.
pub(super) fn finish_command(
    association: AssociationId,
    peer: &mut Peer,
    token: Token,
    result: Result<Done, CommandError>,
    effects: &mut Vec<Effect>,
) {
    let (_, id, _) = split_token(token);
    let status = match result {
        Ok(Done::Data(pieces)) => {
            peer.connection.respond_data(id, pieces);
            return;
        }
        Ok(Done::Ok) => {
            let next = peer.trains.get_mut(&id).and_then(|train| train.ranges.pop());
            if let Some(range) = next {
                run(association, peer, id, Command::Zero(range, true), effects);
                return;
            }
            Status::SUCCESS
        }
        Ok(Done::Differs(_)) => Status::COMPARE_FAILURE,
        Err(CommandError::Inaccessible) => Status::ANA_INACCESSIBLE,
        Err(CommandError::OutOfRange) => Status::LBA_RANGE,
        Err(CommandError::ReadOnly) => Status::WRITE_PROTECTED,
        Err(CommandError::NoSpace) => Status::CAPACITY,
        Err(CommandError::Media) => Status::UNRECOVERED_READ,
    };
    peer.trains.remove(&id);
    peer.connection.respond(id, status, 0);
}

fn run(
    association: AssociationId,
    peer: &Peer,
    id: u16,
    command: Command,
    effects: &mut Vec<Effect>,
) {
    let Role::Queue(_, queue) = peer.role else { unreachable!("I/O comes on a queue") };
    let generation = peer.connection.generation(id).expect("the command runs");
    effects.push(Effect::HostCommand(association, token(queue, id, generation), command));
}

fn step(entry: &Entry, data: Bytes, room: u32, blocks: u64) -> Result<Step, Status> {
    let range = || {
        let range = BlockRange { start: entry.start_lba(), count: entry.block_count() };
        within(range, blocks)
    };
    Ok(match entry.opcode() {
        io::FLUSH => Step::Run(Command::Flush),
        io::READ => {
            let range = range()?;
            if range.bytes() != room as usize {
                return Err(Status::SGL_LENGTH);
            }
            Step::Run(Command::Read(range))
        }
        io::WRITE => Step::Run(Command::Write(range()?, data)),
        io::COMPARE => Step::Run(Command::Compare(range()?, data)),
        io::WRITE_ZEROES => {
            let deallocate = entry.dword(12) & WRITE_ZEROES_DEALLOCATE != 0;
            Step::Run(Command::Zero(range()?, deallocate))
        }
        io::DATASET_MANAGEMENT => {
            let ranges = dataset_ranges(entry, &data, blocks)?;
            if ranges.is_empty() { Step::Nothing } else { Step::RunTrain(Train { ranges }) }
        }
        _ => unreachable!("checked"),
    })
}

fn within(range: BlockRange, blocks: u64) -> Result<BlockRange, Status> {
    let end = range.start.checked_add(u64::from(range.count));
    if end.is_some_and(|end| end <= blocks) { Ok(range) } else { Err(Status::LBA_RANGE) }
}

/// Ranges of Dataset Management (NVM 3.2.3), last first: attributes 0-3, blocks 4-7, start 8-15.
/// Without Deallocate they are hints, and none is left.
fn dataset_ranges(entry: &Entry, data: &[u8], blocks: u64) -> Result<Vec<BlockRange>, Status> {
    let count = (entry.dword(10) as usize & 0xff) + 1;
    if entry.dword(11) & DSM_DEALLOCATE == 0 {
        return Ok(Vec::new());
    }
    let mut ranges = Vec::with_capacity(count);
    for range in data.chunks_exact(DSM_RANGE_BYTES).take(count).rev() {
        let range = BlockRange { start: u64_at(range, 8), count: u32_at(range, 4) };
        if range.count > 0 {
            ranges.push(within(range, blocks)?);
        }
    }
    Ok(ranges)
}

const _: () = assert!(BLOCK_BYTES == 1 << crate::BLOCK_SHIFT);
