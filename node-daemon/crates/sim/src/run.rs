//! Runs seeds: one, or many on several threads, each in a world of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::probes::Probes;
use crate::world::World;

/// Between two lines that say how far it is.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// How a seed went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which.
    pub seed: u64,
    /// What must not have been, if anything.
    pub violation: Option<String>,
    /// Host operations that were answered.
    pub ops: u64,
    /// Block operations that were checked.
    pub checked: u64,
    /// Faults that took place.
    pub faults: u64,
    /// Rare paths.
    pub probes: Probes,
    /// The same for every run of the seed.
    pub digest: u64,
}

/// How many seeds went.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds that were run.
    pub seeds: u64,
    /// Those that failed, in order.
    pub failed: Vec<Outcome>,
    /// Sums over all.
    pub ops: u64,
    /// As above.
    pub checked: u64,
    /// As above.
    pub faults: u64,
    /// As above.
    pub probes: Probes,
    /// Wall clock.
    pub seconds: f64,
}

/// Runs a seed; a broken assertion is a violation as well.
pub fn run_seed(seed: u64, settings: &Settings) -> Outcome {
    let mut world = World::new(seed, settings);
    let caught = catch_unwind(AssertUnwindSafe(|| world.run()));
    if let Err(panic) = caught {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let text = text.unwrap_or_else(|| "a panic without words".into());
        world.violate(format!("an assertion broke: {text}"));
    }
    Outcome {
        seed,
        violation: world.violation.clone(),
        ops: world.ops_done,
        checked: world.histories.count,
        faults: world.faults_done as u64,
        probes: world.probes.clone(),
        digest: world.digest,
    }
}

/// What is the same for all seeds of a run.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Whether to tell the story.
    pub telling: bool,
    /// A rule that is broken on purpose.
    pub canary: Option<crate::canaries::Canary>,
}

/// Runs `count` seeds from `start` on, on `jobs` threads; stops early at the first failure when
/// asked to.
pub fn run_seeds(
    start: u64,
    count: u64,
    jobs: usize,
    stop_at_failure: bool,
    settings: &Settings,
) -> Summary {
    let (next, done, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let summary = Mutex::new(Summary::default());
    let began = Instant::now();
    std::thread::scope(|scope| {
        let worker = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count || stop.load(Ordering::Relaxed) {
                    return;
                }
                let outcome = run_seed(start + index, settings);
                if let Some(why) = &outcome.violation {
                    stop.fetch_or(stop_at_failure, Ordering::Relaxed);
                    if !stop_at_failure {
                        eprintln!(
                            "seed {} fails: {}",
                            outcome.seed,
                            why.lines().next().unwrap_or("")
                        );
                    }
                }
                summary.lock().expect("no panic holds it").add(outcome);
                done.fetch_add(1, Ordering::Relaxed);
            }
        };
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        let mut said = Instant::now();
        while workers.iter().any(|worker| !worker.is_finished()) {
            std::thread::sleep(Duration::from_millis(20));
            if said.elapsed() >= PROGRESS_EVERY && !settings.telling {
                said = Instant::now();
                let failed = summary.lock().expect("no panic holds it").failed.len();
                let (done, spent) = (done.load(Ordering::Relaxed), began.elapsed().as_secs_f64());
                eprintln!("{done} of {count} seeds, {failed} failed, {spent:.0} s");
            }
        }
    });
    let mut summary = summary.into_inner().expect("no panic holds it");
    summary.failed.sort_by_key(|outcome| outcome.seed);
    summary.seconds = began.elapsed().as_secs_f64();
    summary
}

impl Summary {
    fn add(&mut self, outcome: Outcome) {
        self.seeds += 1;
        self.ops += outcome.ops;
        self.checked += outcome.checked;
        self.faults += outcome.faults;
        self.probes.add(&outcome.probes);
        if outcome.violation.is_some() {
            self.failed.push(outcome);
        }
    }
}
