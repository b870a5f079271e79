//! Reads and writes of a device through the reactor alone, without a store: what is left between
//! the two is what the reactor costs, and beside fio on the same device whether it costs too much.
//!
//! Writes are not durable: fio's passthrough has none that are. What was on the device is lost.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tercet_reactor::{DiskId, Event, OpenDevice, Reactor, Settings};
use tercet_store::arena::{Arena, Buf};
use tercet_store::disk::{DiskOp, DiskToken};

use crate::driver::{mix, open_device};
use crate::load::Access;

const BLOCK_BYTES: u64 = 4096;

/// A closed loop of random blocks.
pub struct Raw {
    pub access: Access,
    pub depth: usize,
    pub time: Duration,
    /// Blocks from the device's start that are used.
    pub blocks: u64,
}

/// What came of it: operations, seconds, times in order.
pub struct Figures {
    pub operations: usize,
    pub seconds: f64,
    pub p50_us: f64,
}

impl Raw {
    /// Runs on a device of its own reactor.
    pub fn run(&self, wanted: &OpenDevice) -> Figures {
        let arena = Arena::new(self.depth * BLOCK_BYTES as usize);
        let mut reactor = Reactor::new(Settings { spin: Duration::ZERO }).expect("a ring");
        reactor.register_arena(&arena);
        let disk = reactor.add_disk(open_device(wanted)).expect("a device");
        let mut idle: VecDeque<Buf> =
            std::iter::from_fn(|| arena.take(1)).take(self.depth).collect();
        let mut begun_at = vec![Instant::now(); self.depth];
        let mut free: Vec<usize> = (0..self.depth).collect();
        let (mut number, mut times_us, mut events) = (0, Vec::new(), Vec::new());
        let begun = Instant::now();
        loop {
            let goes_on = begun.elapsed() < self.time;
            while goes_on && let Some(slot) = free.pop() {
                begun_at[slot] = Instant::now();
                let buf = idle.pop_front().expect("a buffer for each slot");
                reactor.submit(disk, DiskToken(slot as u64), self.operation(number, buf));
                number += 1;
            }
            if free.len() == self.depth {
                break;
            }
            reactor.poll(None, &mut events).expect("a ring");
            for done in events.drain(..).filter_map(|event| completed(event, disk)) {
                done.2.unwrap_or_else(|error| panic!("{error}"));
                times_us.push(begun_at[done.0].elapsed().as_secs_f64() * 1e6);
                free.push(done.0);
                idle.push_back(done.1);
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        times_us.sort_by(f64::total_cmp);
        Figures { operations: times_us.len(), seconds, p50_us: times_us[times_us.len() / 2] }
    }

    fn operation(&self, number: u64, buf: Buf) -> DiskOp {
        let offset = mix(number) % self.blocks * BLOCK_BYTES;
        match self.access {
            Access::Read => DiskOp::Read { offset, into: buf },
            Access::Write => DiskOp::Write { offset, data: buf.into(), fua: false },
        }
    }
}

type Completed = (usize, Buf, Result<(), tercet_store::disk::DiskError>);

fn completed(event: Event, on: DiskId) -> Option<Completed> {
    match event {
        Event::Disk { disk, done } if disk == on => {
            Some((done.token.0 as usize, done.buf.expect("a buffer comes back"), done.result))
        }
        _ => None,
    }
}
