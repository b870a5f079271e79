//! A closed loop: so many operations under way, the next begins when one has ended.
//!
//! A write ends when it is durable; it is applied then, as replication would once it is committed.
//! A read ends when its bytes are there and have their checksums.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tercet_proto::storage::{Storage, StorageError, StorageEvent};
use tercet_proto::{BlockRange, Token};

use crate::driver::{Driver, mix, volume};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

#[derive(Clone, Copy, Debug)]
pub enum Until {
    Elapsed(Duration),
    Operations(u64),
}

/// What is done.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub access: Access,
    pub volume: u8,
    pub blocks: u32,
    pub depth: usize,
    pub random: bool,
    /// Blocks at the volume's start that are used; none: all.
    pub span: Option<u64>,
    pub until: Until,
}

/// What came of it.
#[derive(Debug)]
pub struct Figures {
    pub operations: u64,
    pub bytes: u64,
    pub seconds: f64,
    /// Of this process, for each operation.
    pub cpu_us: f64,
    times_us: Vec<f64>,
}

impl Figures {
    /// The time that so many percent of the operations did not exceed.
    pub fn at(&self, percent: usize) -> f64 {
        let last = self.times_us.len() - 1;
        self.times_us[(self.times_us.len() * percent / 100).min(last)]
    }
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

struct Running {
    begun: Instant,
    number: u64,
    seed: u64,
    /// Operations under way: what they are known by, and since when. Writes end in order.
    under_way: VecDeque<(u64, Instant)>,
    /// When the operation was wanted that has not been taken yet.
    wanted: Option<Instant>,
    times_us: Vec<f64>,
}

impl Load {
    pub fn run(&self, driver: &mut Driver) -> Figures {
        let replica = driver.store.replica(volume(self.volume)).expect("a volume");
        let size = self.span.unwrap_or(replica.size_blocks);
        let begun = Instant::now();
        let mut running = Running {
            begun,
            number: 0,
            seed: driver.store.tail(volume(self.volume)).expect("a volume").lsn.0 << 24,
            under_way: VecDeque::new(),
            wanted: None,
            times_us: Vec::new(),
        };
        let cpu = cpu_seconds();
        while self.goes_on(&running) || !running.under_way.is_empty() {
            while running.under_way.len() < self.depth && self.goes_on(&running) {
                if !self.begin(driver, &mut running, size) {
                    break;
                }
            }
            driver.turn();
            self.end(driver, &mut running);
        }
        let seconds = begun.elapsed().as_secs_f64();
        let operations = running.times_us.len() as u64;
        let cpu_us = (cpu_seconds() - cpu) * 1e6 / operations as f64;
        running.times_us.sort_by(f64::total_cmp);
        let bytes = operations * u64::from(self.blocks) * 4096;
        Figures { operations, bytes, seconds, cpu_us, times_us: running.times_us }
    }

    fn goes_on(&self, running: &Running) -> bool {
        match self.until {
            Until::Elapsed(time) => running.begun.elapsed() < time,
            Until::Operations(count) => running.number < count,
        }
    }

    /// Begins the next operation, unless the store wants to have it later.
    fn begin(&self, driver: &mut Driver, running: &mut Running, size: u64) -> bool {
        let since = *running.wanted.get_or_insert_with(Instant::now);
        let slots = size / u64::from(self.blocks);
        let slot = if self.random { mix(running.seed + running.number) } else { running.number };
        let range = BlockRange { start: slot % slots * u64::from(self.blocks), count: self.blocks };
        let name = match self.access {
            Access::Write => match driver.write(self.volume, range) {
                Some(lsn) => lsn.0,
                None => return false,
            },
            Access::Read => {
                driver.store.read(volume(self.volume), range, Token(running.number));
                running.number
            }
        };
        running.under_way.push_back((name, since));
        running.wanted = None;
        running.number += 1;
        true
    }

    fn end(&self, driver: &mut Driver, running: &mut Running) {
        let now = Instant::now();
        let mut events = std::mem::take(&mut driver.events);
        let mut ended = |since: Instant| {
            running.times_us.push(now.duration_since(since).as_secs_f64() * 1e6);
        };
        for event in events.drain(..) {
            match event {
                StorageEvent::Durable { volume: of, place } if of == volume(self.volume) => {
                    while let Some((lsn, since)) = running.under_way.front()
                        && *lsn <= place.lsn.0
                    {
                        ended(*since);
                        running.under_way.pop_front();
                    }
                    driver.apply(self.volume, place.lsn);
                }
                StorageEvent::Read { token, result } => {
                    let index = running.under_way.iter().position(|(name, _)| *name == token.0);
                    let (name, since) =
                        running.under_way.remove(index.expect("a read under way")).expect("there");
                    match result {
                        Ok(_) => ended(since),
                        // The arena is full: again, and its time goes on.
                        Err(StorageError::Busy) => panic!("read {name}: the arena is too small"),
                        Err(error) => panic!("read {name}: {error}"),
                    }
                }
                _ => {}
            }
        }
        driver.events = events;
    }
}
