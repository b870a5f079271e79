//! The recorder: random operations of a host's clients on the first blocks of a volume, and each
//! thing asked and told written down with its time, for a judge of linearizability.
//!
//! Each client does one operation after the other. Every second one only reads, so that somebody
//! still asks a primary that commits nothing any more (L1): the others soon wait for a write there.
//! A line is in the file (in the kernel, so that a killed recorder loses none) before its command is
//! sent; a response has the time at which it was seen. All times are of one clock that every process
//! of the machine shares. A write fills its blocks with a value that no other write of any recorder
//! has, so that a read tells which write it saw; zero is a block of zeroes, [`TORN`] one that nobody
//! wrote so. A command that the host sends again over another path may have taken effect the first
//! time: the line `again` says so.
//!
//! Lines are JSON: `{"at", "op", "do": "read"|"write"|"zero", "block", "blocks"}` when an operation
//! begins; `{"at", "op", "is": "again"|"done"|"failed"}` after, with `values` of a read or `why`.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::fd::OwnedFd;
use serde::Serialize;
use tercet_nvmf::BLOCK_BYTES;
use tercet_nvmf::host::{HostOptions, Operation, OperationError, OperationId};
use tercet_proto::{BlockRange, Instant};

use super::args::Record;
use crate::host::{Driver, now};

/// The value of a block that no single write has filled.
const TORN: u64 = u64::MAX;
/// How long what is in flight at the end may take.
const DRAIN_TIMEOUT: Duration = Duration::from_mins(1);
/// Most blocks of one operation.
const SPAN_MAX: u32 = 4;
/// Blocks that most operations of a while are about, so that they meet.
const HOT_BLOCKS: u64 = 8;
/// How long those stay the same.
const HOT_NS: u64 = 2_000_000_000;
/// Of a hundred operations: about hot blocks; of those of a client that writes: writes of zeroes;
/// of any kind.
const HOT_PERCENT: u32 = 75;
const ZERO_PERCENT: u32 = 5;
const WRITE_PERCENT: u32 = 75;

/// Why a history ends.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Epoll, a socket or the file.
    #[error("the recorder's I/O failed: {0}")]
    Io(#[from] std::io::Error),
    /// Operations that never ended.
    #[error("{0} operations did not end in time")]
    Stuck(usize),
}

#[derive(Serialize)]
struct Line<'a> {
    at: u64,
    op: u64,
    #[serde(rename = "do", skip_serializing_if = "Option::is_none")]
    begun: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    block: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blocks: Option<u32>,
    #[serde(rename = "is", skip_serializing_if = "Option::is_none")]
    told: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<Vec<u64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<&'a str>,
}

impl Line<'_> {
    fn new(op: u64) -> Self {
        let (begun, block, blocks, told, values, why) = (None, None, None, None, None, None);
        Self { at: now().0, op, begun, block, blocks, told, values, why }
    }
}

/// A client: what it does, or when it does the next.
#[derive(Clone, Copy)]
enum Client {
    Busy(u64),
    Waits(Instant),
}

struct Recorder<'a> {
    record: &'a Record,
    driver: Driver,
    random: SmallRng,
    file: File,
    clients: Vec<Client>,
    next_op: u32,
}

/// Records until the standard input ends, then until everything in flight is answered.
pub fn run(record: &Record) -> Result<(), RecordError> {
    let mut options = HostOptions::new(&record.nqn, &record.host_nqn, *record.host_id.as_bytes());
    options.endpoints.clone_from(&record.endpoints);
    let mut driver = Driver::new(options, Duration::ZERO, record.seed)?;
    driver.sent_again = Some(Vec::new());
    let is_over = over_with_input(driver.waker()?);
    let file = File::options().create_new(true).append(true).open(&record.out)?;
    let random = SmallRng::seed_from_u64(record.seed);
    let clients = vec![Client::Waits(now()); record.clients];
    let mut recorder = Recorder { record, driver, random, file, clients, next_op: 0 };
    while !is_over.load(Ordering::Acquire) {
        recorder.begin_due()?;
        let due = recorder.clients.iter().filter_map(|client| match client {
            Client::Busy(_) => None,
            Client::Waits(at) => Some(*at),
        });
        recorder.turn(due.min())?;
    }
    let until = now() + DRAIN_TIMEOUT;
    while recorder.busy() > 0 {
        if now() >= until {
            return Err(RecordError::Stuck(recorder.busy()));
        }
        recorder.turn(Some(until))?;
    }
    recorder.driver.detach();
    Ok(())
}

/// A flag that is set, and the waker woken, when the standard input ends.
fn over_with_input(waker: OwnedFd) -> Arc<AtomicBool> {
    let is_over = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&is_over);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        flag.store(true, Ordering::Release);
        let _ = rustix::io::write(&waker, &1_u64.to_ne_bytes());
    });
    is_over
}

impl Recorder<'_> {
    fn busy(&self) -> usize {
        self.clients.iter().filter(|client| matches!(client, Client::Busy(_))).count()
    }

    fn begin_due(&mut self) -> Result<(), RecordError> {
        let time = now();
        for index in 0..self.clients.len() {
            if matches!(self.clients[index], Client::Waits(at) if at <= time) {
                self.begin(index)?;
            }
        }
        Ok(())
    }

    fn begin(&mut self, client: usize) -> Result<(), RecordError> {
        self.next_op += 1;
        let op = u64::from(self.record.writer) << 32 | u64::from(self.next_op);
        let range = self.draw();
        let what = if client % 2 == 1 { 100 } else { self.random.random_range(0..100) };
        let (name, operation) = if what < ZERO_PERCENT {
            ("zero", Operation::WriteZeroes(range, self.random.random()))
        } else if what < WRITE_PERCENT {
            ("write", Operation::Write(range, fill(op, range.count as usize)))
        } else {
            ("read", Operation::Read(range))
        };
        let (begun, block, blocks) = (Some(name), Some(range.start), Some(range.count));
        self.write(&Line { begun, block, blocks, ..Line::new(op) })?;
        self.clients[client] = Client::Busy(op);
        let taken = self.driver.submit(OperationId(op), operation);
        taken.expect("an operation that fits, and fewer than the host takes");
        Ok(())
    }

    /// Every recorder has the same hot blocks at the same time: they follow from the clock.
    fn draw(&mut self) -> BlockRange {
        let count =
            self.random.random_range(1..=SPAN_MAX).min(self.random.random_range(1..=SPAN_MAX));
        let areas = self.record.blocks / HOT_BLOCKS;
        let hot = (now().0 / HOT_NS).wrapping_mul(5) % areas * HOT_BLOCKS;
        let is_hot = self.random.random_range(0..100) < HOT_PERCENT;
        let (first, span) = if is_hot { (hot, HOT_BLOCKS) } else { (0, self.record.blocks) };
        BlockRange { start: first + self.random.random_range(0..=span - u64::from(count)), count }
    }

    fn turn(&mut self, until: Option<Instant>) -> Result<(), RecordError> {
        self.driver.turn(until)?;
        // What went out again did so before anything of this turn is begun or known to have ended.
        let again = self.driver.sent_again.replace(Vec::new()).unwrap_or_default();
        for id in again {
            self.write(&Line { told: Some("again"), ..Line::new(id.0) })?;
        }
        for (id, result) in std::mem::take(&mut self.driver.finished) {
            self.end(id.0, result)?;
        }
        Ok(())
    }

    fn end(
        &mut self,
        op: u64,
        result: Result<Vec<Bytes>, OperationError>,
    ) -> Result<(), RecordError> {
        match result {
            Ok(data) => {
                let data: Vec<u8> = data.concat();
                let values: Vec<u64> = data.chunks_exact(BLOCK_BYTES).map(value).collect();
                let values = (!values.is_empty()).then_some(values);
                self.write(&Line { told: Some("done"), values, ..Line::new(op) })?;
            }
            Err(error) => {
                let why = error.to_string();
                self.write(&Line { told: Some("failed"), why: Some(&why), ..Line::new(op) })?;
            }
        }
        let mine = |client: &&mut Client| matches!(client, Client::Busy(id) if *id == op);
        let client = self.clients.iter_mut().find(mine).expect("each operation ends once");
        *client = Client::Waits(now() + self.record.pace);
        Ok(())
    }

    /// One write to the file for a line: what is in the kernel survives this process.
    fn write(&mut self, line: &Line<'_>) -> Result<(), RecordError> {
        let mut bytes = serde_json::to_vec(line).expect("a line is JSON");
        bytes.push(b'\n');
        Ok(self.file.write_all(&bytes)?)
    }
}

/// Blocks that hold a value and nothing else: each word is the value and where it stands.
fn fill(value: u64, blocks: usize) -> Bytes {
    let mut data = vec![0; blocks * BLOCK_BYTES];
    for block in data.chunks_exact_mut(BLOCK_BYTES) {
        for (index, word) in (0_u64..).zip(block.chunks_exact_mut(8)) {
            word.copy_from_slice(&value.wrapping_add(index).to_le_bytes());
        }
    }
    data.into()
}

/// The value that a block holds.
fn value(block: &[u8]) -> u64 {
    let mut words = (0_u64..).zip(
        block.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))),
    );
    let first = words.next().expect("a block is not empty").1;
    let is_whole = if first == 0 {
        block.iter().all(|&byte| byte == 0)
    } else {
        words.all(|(index, word)| word == first.wrapping_add(index))
    };
    if is_whole { first } else { TORN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_which_write_it_saw_and_whether_it_is_whole() {
        let mut data = fill(7 << 32 | 5, 2).to_vec();
        assert!(data.chunks_exact(BLOCK_BYTES).all(|block| value(block) == 7 << 32 | 5));
        data[4095] ^= 1;
        assert_eq!(value(&data[..BLOCK_BYTES]), TORN);
        let mut zeroes = vec![0; BLOCK_BYTES];
        assert_eq!(value(&zeroes), 0);
        zeroes[512] = 1;
        assert_eq!(value(&zeroes), TORN);
    }
}
