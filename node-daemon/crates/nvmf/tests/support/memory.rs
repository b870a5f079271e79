//! A volume in memory: what engine and replication answer a target where nothing goes wrong.

use std::ops::{Deref, DerefMut, Range};

use bytes::Bytes;
use tercet_nvmf::target::{Command, Done};
use tercet_proto::{BLOCK_BYTES, BlockRange};

/// The bytes of all its blocks.
pub struct Memory(Vec<u8>);

impl Deref for Memory {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.0
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

impl Memory {
    /// That many blocks of zeroes.
    pub fn new(blocks: u64) -> Self {
        Self(vec![0; blocks as usize * BLOCK_BYTES])
    }

    /// Runs a command to its end.
    pub fn run(&mut self, command: Command) -> Done {
        match command {
            Command::Read(range) => {
                let data = &self.0[bytes_of(range)];
                // In two pieces, as committed but unapplied blocks would come.
                let (front, back) = data.split_at(data.len() / 2);
                Done::Data(vec![Bytes::copy_from_slice(front), Bytes::copy_from_slice(back)])
            }
            Command::Write(range, data) => {
                self.0[bytes_of(range)].copy_from_slice(&data);
                Done::Ok
            }
            Command::Zero(range, _) => {
                self.0[bytes_of(range)].fill(0);
                Done::Ok
            }
            Command::Flush => Done::Ok,
            Command::Compare(range, data) => {
                let blocks = &self.0[bytes_of(range)];
                let differs = blocks.iter().zip(&data).position(|(have, want)| have != want);
                differs
                    .map_or(Done::Ok, |at| Done::Differs(range.start + (at / BLOCK_BYTES) as u64))
            }
            Command::CompareWrite(range, data, payload) => {
                let done = self.run(Command::Compare(range, data));
                if done == Done::Ok { self.run(Command::Write(range, payload)) } else { done }
            }
        }
    }
}

fn bytes_of(range: BlockRange) -> Range<usize> {
    let start = range.start as usize * BLOCK_BYTES;
    start..start + range.bytes()
}
