//! The load generator: operations at a fixed depth through the user-space host in this very
//! thread, one JSON object at the end, and one for each window of time if asked for: what a fault
//! costs a host is the longest latency of the windows around it.

use std::collections::VecDeque;
use std::io::Write;
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use serde::Serialize;
use tercet_nvmf::BLOCK_BYTES;
use tercet_nvmf::host::{HostOptions, Operation, OperationError, OperationId};
use tercet_proto::{BlockRange, Instant};

use super::args::Bench;
use crate::host::{Driver, Status, now};

/// How long the first path may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long what is in flight at the end may take.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// What a load gave.
#[derive(Debug, Serialize)]
pub struct Report {
    /// `read` or `write`.
    pub rw: &'static str,
    /// Places drawn at random.
    pub random: bool,
    /// Operations in flight.
    pub depth: usize,
    /// Bytes of each.
    pub block_bytes: usize,
    /// How long it took.
    pub seconds: f64,
    /// Operations that ended.
    pub operations: usize,
    /// Operations that failed.
    pub errors: usize,
    /// Operations per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Latency that half of the operations kept.
    pub p50_us: f64,
    /// Latency that 99 % kept.
    pub p99_us: f64,
    /// Longest latency.
    pub max_us: f64,
}

/// What a window of time gave.
#[derive(Debug, PartialEq, Serialize)]
pub struct Window {
    /// Its end, on `CLOCK_BOOTTIME`.
    pub at_ns: u64,
    /// Operations that ended in it.
    pub operations: usize,
    /// Operations that failed in it.
    pub errors: usize,
    /// Latency that half of them kept; 0 without any.
    pub p50_us: f64,
    /// Latency that 99 % kept.
    pub p99_us: f64,
    /// Longest latency.
    pub max_us: f64,
}

/// Why a load gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Epoll or a socket.
    #[error("the host's I/O failed: {0}")]
    Io(#[from] std::io::Error),
    /// No path in time.
    #[error("no path became usable within {timeout_s} s: {why}", timeout_s = CONNECT_TIMEOUT.as_secs())]
    NoPath {
        /// What the last try met.
        why: String,
    },
    /// The volume or span is smaller than one operation.
    #[error("the span of {0} bytes is smaller than one operation")]
    Small(u64),
    /// Operations that never ended.
    #[error("{0} operations did not end in time")]
    Stuck(usize),
}

struct Load<'a> {
    bench: &'a Bench,
    driver: Driver,
    random: SmallRng,
    payload: Bytes,
    /// Places of an operation's size that there are.
    places: u64,
    next_place: u64,
    /// When the operation of each id in flight began; ids are 0 to depth - 1.
    began: Vec<Instant>,
    latencies_ns: Vec<u64>,
    errors: usize,
    /// Places in the depth that rest, and until when; the first is done first.
    resting: VecDeque<(Instant, usize)>,
    /// End of the window under way, and what had ended before it: operations, errors.
    window: Option<(Instant, usize, usize)>,
}

/// Runs a load to its end.
pub fn run(bench: &Bench) -> Result<Report, BenchError> {
    let mut options = HostOptions::new(&bench.nqn, &bench.host_nqn, *bench.host_id.as_bytes());
    options.endpoints.clone_from(&bench.endpoints);
    options.io_queues = bench.depth.div_ceil(usize::from(options.queue_entries) - 1) as u16;
    let mut driver = Driver::new(options, bench.spin, rand::random())?;
    let blocks = connect(&mut driver)?;
    let span = bench.span_bytes.unwrap_or(u64::MAX).min(blocks * BLOCK_BYTES as u64);
    let places = span / bench.block_bytes as u64;
    if places == 0 {
        return Err(BenchError::Small(span));
    }
    let mut random = SmallRng::from_os_rng();
    let mut payload = vec![0; bench.block_bytes];
    random.fill_bytes(&mut payload);
    let mut load = Load {
        bench,
        driver,
        random,
        payload: payload.into(),
        places,
        next_place: 0,
        began: vec![Instant(0); bench.depth],
        latencies_ns: Vec::new(),
        errors: 0,
        resting: VecDeque::new(),
        window: None,
    };
    let start = now();
    load.window = bench.every.map(|every| (start + every, 0, 0));
    load.run(start + bench.duration)?;
    let elapsed = now().since(start);
    load.driver.detach();
    Ok(load.report(elapsed))
}

fn connect(driver: &mut Driver) -> Result<u64, BenchError> {
    let until = now() + CONNECT_TIMEOUT;
    loop {
        let status = Status {
            geometry: driver.geometry(),
            paths: driver.host().paths(),
            last_loss: driver.last_loss.clone(),
        };
        if let (Some(geometry), true) = (status.geometry, status.is_usable()) {
            return Ok(geometry.blocks);
        }
        if now() >= until {
            return Err(BenchError::NoPath { why: status.last_loss.unwrap_or_default() });
        }
        driver.turn(Some(until))?;
    }
}

impl Load<'_> {
    fn run(&mut self, until: Instant) -> Result<(), BenchError> {
        let depth = self.bench.depth;
        self.resting = (0..depth).map(|id| (now(), id)).collect();
        let drained = until + DRAIN_TIMEOUT;
        let mut in_flight = 0;
        loop {
            let time = now();
            if time >= until {
                self.resting.clear();
                if in_flight == 0 {
                    return Ok(());
                }
            }
            if time >= drained {
                return Err(BenchError::Stuck(in_flight));
            }
            while let Some(&(at, id)) = self.resting.front()
                && at <= time
            {
                self.resting.pop_front();
                self.submit(id);
                in_flight += 1;
            }
            let limit = if time < until { until } else { drained };
            let rested = self.resting.front().map(|&(at, _)| at);
            let window = self.window.map(|(end, ..)| end);
            let wake = [rested, window].into_iter().flatten().fold(limit, Ord::min);
            self.driver.turn(Some(wake))?;
            for (id, result) in std::mem::take(&mut self.driver.finished) {
                self.finish(id.0 as usize, &result);
                in_flight -= 1;
                self.resting.push_back((now() + self.bench.pause, id.0 as usize));
            }
            self.tell_window()?;
        }
    }

    /// Prints the window that has ended, if one has.
    fn tell_window(&mut self) -> Result<(), BenchError> {
        let time = now();
        let (Some((end, operations, errors)), Some(every)) = (self.window, self.bench.every) else {
            return Ok(());
        };
        if time < end {
            return Ok(());
        }
        let mut latencies_ns = self.latencies_ns[operations..].to_vec();
        let [p50_us, p99_us, max_us] = figures(&mut latencies_ns);
        let window = Window {
            at_ns: time.0,
            operations: latencies_ns.len(),
            errors: self.errors - errors,
            p50_us,
            p99_us,
            max_us,
        };
        let line = serde_json::to_string(&window).expect("numbers");
        writeln!(std::io::stdout(), "{line}")?;
        // A window that came late does not make the next ones shorter.
        self.window = Some(((end + every).max(time), self.latencies_ns.len(), self.errors));
        Ok(())
    }

    fn submit(&mut self, id: usize) {
        let place = if self.bench.is_random {
            self.random.random_range(0..self.places)
        } else {
            self.next_place += 1;
            (self.next_place - 1) % self.places
        };
        let count = (self.bench.block_bytes / BLOCK_BYTES) as u32;
        let range = BlockRange { start: place * u64::from(count), count };
        let operation = if self.bench.is_write {
            Operation::Write(range, self.payload.clone())
        } else {
            Operation::Read(range)
        };
        self.began[id] = now();
        let taken = self.driver.submit(OperationId(id as u64), operation);
        taken.expect("an operation that fits, and fewer than the host takes");
    }

    fn finish(&mut self, id: usize, result: &Result<Vec<Bytes>, OperationError>) {
        self.latencies_ns.push(now().since(self.began[id]).as_nanos() as u64);
        self.errors += usize::from(result.is_err());
    }

    fn report(mut self, elapsed: Duration) -> Report {
        let count = self.latencies_ns.len();
        let [p50_us, p99_us, max_us] = figures(&mut self.latencies_ns);
        let seconds = elapsed.as_secs_f64();
        let iops = count as f64 / seconds;
        Report {
            rw: if self.bench.is_write { "write" } else { "read" },
            random: self.bench.is_random,
            depth: self.bench.depth,
            block_bytes: self.bench.block_bytes,
            seconds,
            operations: count,
            errors: self.errors,
            iops,
            bytes_per_second: iops * self.bench.block_bytes as f64,
            p50_us,
            p99_us,
            max_us,
        }
    }
}

/// Latencies that half of the operations, 99 % and all of them kept, in us; 0 without any.
fn figures(latencies_ns: &mut [u64]) -> [f64; 3] {
    latencies_ns.sort_unstable();
    let count = latencies_ns.len();
    [50, 99, 100].map(|percent| {
        let index = (count * percent).div_ceil(100).clamp(1, count.max(1)) - 1;
        latencies_ns.get(index).map_or(0.0, |&ns| ns as f64 / 1000.0)
    })
}

#[cfg(test)]
mod tests {
    use super::figures;

    #[test]
    fn figures_are_of_the_sorted_latencies() {
        assert_eq!(figures(&mut []).map(f64::to_bits), [0.0_f64; 3].map(f64::to_bits));
        assert_eq!(figures(&mut [7_000]).map(f64::to_bits), [7.0_f64; 3].map(f64::to_bits));
        let mut hundred: Vec<u64> = (1..=100).rev().map(|us| us * 1000).collect();
        let expected = [50.0_f64, 99.0, 100.0];
        assert_eq!(figures(&mut hundred).map(f64::to_bits), expected.map(f64::to_bits));
    }
}
