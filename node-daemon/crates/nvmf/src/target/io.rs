//! Commands of I/O queues: checked against the namespace, handed to the executor, answered.

use bytes::Bytes;
use tercet_proto::{BlockRange, Instant, Token, VolumeId};

use super::admin::NSID_ALL;
use super::api::{Ana, AssociationId, Command, CommandError, Done, Effect};
use super::connection::Request;
use super::controller::Kind;
use super::copy::Copy;
use super::{Peer, Role, Target};
use crate::command::{
    DSM_DEALLOCATE, DSM_RANGE_BYTES, Entry, FABRICS, WRITE_ZEROES_DEALLOCATE, fctype, io,
};
use crate::le::{u16_at, u32_at, u64_at};
use crate::status::Status;
use crate::{BLOCK_BYTES, NSID, TRANSFER_BYTES_MAX};

/// What a command is besides what the executor was given of it. One part at a time, so that a
/// command counts as one towards what replication queues.
#[derive(Debug)]
pub(super) enum Work {
    /// Dataset Management: ranges that have still to be zeroed, last first.
    Zero(Vec<BlockRange>),
    /// A read whose bytes stay here.
    Verify,
    /// Reads, then one write.
    Copy(Copy),
    /// A fused compare-and-write, answered for this second command as well.
    Fused(u16),
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
    /// Give it to the executor; more is to be done when it has answered.
    Begin(Command, Work),
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
                let status = Status::SEQUENCE_ERROR;
                fail(peer, id, request.fused.as_ref(), status);
                return true;
            }
        };
        let fused = request.fused.clone();
        match self.check(volume, request) {
            Ok(Step::Run(command)) => {
                self.count(association, &command);
                run(association, peer, id, command, effects);
            }
            Ok(Step::Begin(command, work)) => {
                self.count(association, &command);
                peer.work.insert(id, work);
                run(association, peer, id, command, effects);
            }
            Ok(Step::Nothing) => peer.connection.respond(id, Status::SUCCESS, 0),
            Err(status) => fail(peer, id, fused.as_ref(), status),
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
        let is_known = matches!(
            entry.opcode(),
            io::FLUSH
                | io::READ
                | io::WRITE
                | io::COMPARE
                | io::WRITE_ZEROES
                | io::DATASET_MANAGEMENT
                | io::VERIFY
                | io::COPY
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
        match request.fused {
            Some(second) => fused(entry, request.data, second, subsystem.blocks),
            None => step(entry, request.data, request.room, subsystem.blocks),
        }
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
            Command::CompareWrite(range, ..) => {
                counters.reads += 1;
                counters.read_bytes += range.bytes() as u64;
                counters.writes += 1;
                counters.written_bytes += range.bytes() as u64;
            }
            Command::Zero(..) | Command::Flush => {}
        }
    }
}

/// Answers a command, and the second of its fused operation, that cannot be done.
fn fail(peer: &mut Peer, id: u16, fused: Option<&(Entry, Bytes)>, status: Status) {
    peer.connection.respond(id, status, 0);
    if let Some((second, _)) = fused {
        peer.connection.respond(second.id(), status, 0);
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
    let status = match (peer.work.remove(&id), result) {
        (Some(Work::Fused(second)), result) => return finish_fused(peer, id, second, &result),
        (Some(Work::Zero(mut ranges)), Ok(_)) => match ranges.pop() {
            Some(range) => {
                peer.work.insert(id, Work::Zero(ranges));
                return run(association, peer, id, Command::Zero(range, true), effects);
            }
            None => Status::SUCCESS,
        },
        (Some(Work::Copy(mut copy)), Ok(done)) => match copy.next(done) {
            Some(command) => {
                peer.work.insert(id, Work::Copy(copy));
                return run(association, peer, id, command, effects);
            }
            None => Status::SUCCESS,
        },
        (Some(Work::Verify), Ok(_)) | (None, Ok(Done::Ok)) => Status::SUCCESS,
        (None, Ok(Done::Data(pieces))) => return peer.connection.respond_data(id, pieces),
        (None, Ok(Done::Differs(_))) => Status::COMPARE_FAILURE,
        (_, Err(error)) => error_status(error),
    };
    peer.connection.respond(id, status, 0);
}

fn error_status(error: CommandError) -> Status {
    match error {
        CommandError::Inaccessible => Status::ANA_INACCESSIBLE,
        CommandError::OutOfRange => Status::LBA_RANGE,
        CommandError::ReadOnly => Status::WRITE_PROTECTED,
        CommandError::NoSpace => Status::CAPACITY,
        CommandError::Media => Status::UNRECOVERED_READ,
    }
}

/// Answers both commands of a fused compare-and-write (Base 3.4.2): whose fault it is gets the
/// status, the other one that it failed with it.
fn finish_fused(peer: &mut Peer, first: u16, second: u16, result: &Result<Done, CommandError>) {
    let (of_first, of_second) = match *result {
        Ok(Done::Differs(_)) => (Status::COMPARE_FAILURE, Status::FAILED_FUSED),
        Ok(_) => (Status::SUCCESS, Status::SUCCESS),
        Err(error @ (CommandError::ReadOnly | CommandError::NoSpace)) => {
            (Status::FAILED_FUSED, error_status(error))
        }
        Err(error @ CommandError::Media) => (error_status(error), Status::FAILED_FUSED),
        // Both are to be tried elsewhere, or are as wrong as each other.
        Err(error) => (error_status(error), error_status(error)),
    };
    peer.connection.respond(first, of_first, 0);
    peer.connection.respond(second, of_second, 0);
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
            let mut ranges = dataset_ranges(entry, &data, blocks)?;
            match ranges.pop() {
                None => Step::Nothing,
                Some(range) => Step::Begin(Command::Zero(range, true), Work::Zero(ranges)),
            }
        }
        io::VERIFY => {
            let range = range()?;
            if range.bytes() > TRANSFER_BYTES_MAX {
                return Err(Status::INVALID_FIELD); // VSL, NVM 3.2.7
            }
            Step::Begin(Command::Read(range), Work::Verify)
        }
        io::COPY => {
            let (copy, first) = Copy::parse(entry, &data, blocks)?;
            Step::Begin(first, Work::Copy(copy))
        }
        _ => unreachable!("checked"),
    })
}

/// Compare and Write of the same blocks are the one fused operation that there is (NVM 2.1.6).
fn fused(entry: &Entry, data: Bytes, second: (Entry, Bytes), blocks: u64) -> Result<Step, Status> {
    let (second, payload) = second;
    let same = entry.nsid() == second.nsid()
        && entry.start_lba() == second.start_lba()
        && entry.block_count() == second.block_count();
    if (entry.opcode(), second.opcode()) != (io::COMPARE, io::WRITE) || !same {
        return Err(Status::INVALID_FIELD);
    }
    let range =
        within(BlockRange { start: entry.start_lba(), count: entry.block_count() }, blocks)?;
    Ok(Step::Begin(Command::CompareWrite(range, data, payload), Work::Fused(second.id())))
}

pub(super) fn within(range: BlockRange, blocks: u64) -> Result<BlockRange, Status> {
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
