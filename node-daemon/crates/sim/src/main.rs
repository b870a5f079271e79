//! `sim`: runs seeds and canaries from the command line.
//!
//! `sim run --seeds 1000 --jobs 2 [--start S] [--evidence FILE]`: without a start the seeds are fresh
//! ones, drawn from the clock and printed. `sim run --seed N --trace` tells a seed's story; `sim canaries [--seeds-max K]` breaks one rule at a time and shows that it is
//! noticed. Exit code 1 when a seed fails or a canary is not caught.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;
use tercet_sim::canaries::{self, Bird};
use tercet_sim::run::{Settings, Summary, run_seeds};

const USAGE: &str = "usage:
  sim run [--seeds N] [--start S] [--jobs J] [--evidence FILE] [--canary NAME]
  sim run --seed N [--trace] [--canary NAME]
  sim canaries [--seeds-max K] [--start S] [--jobs J] [--only NAME] [--evidence FILE]";

/// Where rows of evidence go when no option says it.
const EVIDENCE_VARIABLE: &str = "TERCET_EVIDENCE";

/// Fresh seeds begin at the clock's seconds times this: room for a run of that many.
const SEEDS_PER_SECOND: u64 = 1_000;

/// Where the canaries' seeds begin: the bounds are of these.
const CANARY_START: u64 = 1;

/// Seeds for a canary that has no bound.
const HUNT_SEEDS: u64 = 200;

/// What was asked for.
#[derive(Default)]
struct Arguments {
    seed: Option<u64>,
    seeds: u64,
    start: Option<u64>,
    jobs: usize,
    seeds_max: Option<u64>,
    trace: bool,
    evidence: Option<String>,
    canary: Option<String>,
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    let arguments = match parse(words) {
        Ok(arguments) => arguments,
        Err(why) => return usage(&why),
    };
    // A broken assertion is reported with its seed; only one that is looked at is told in full.
    if arguments.seed.is_none() {
        std::panic::set_hook(Box::new(|_| {}));
    }
    match command.as_str() {
        "run" => run(&arguments),
        "canaries" => hunt_all(&arguments),
        _ => usage("run or canaries?"),
    }
}

fn usage(why: &str) -> ExitCode {
    eprintln!("sim: {why}\n{USAGE}");
    ExitCode::from(2)
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments { seeds: 1000, jobs: 2, ..Arguments::default() };
    arguments.evidence = std::env::var(EVIDENCE_VARIABLE).ok().filter(|path| !path.is_empty());
    while let Some(word) = words.next() {
        if word == "--trace" {
            arguments.trace = true;
            continue;
        }
        let value = words.next().ok_or(format!("{word} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("{word} {value}: no number"));
        match word.as_str() {
            "--seed" => arguments.seed = Some(number()?),
            "--seeds" => arguments.seeds = number()?,
            "--start" => arguments.start = Some(number()?),
            "--jobs" => arguments.jobs = usize::try_from(number()?.max(1)).unwrap_or(1),
            "--seeds-max" => arguments.seeds_max = Some(number()?),
            "--evidence" => arguments.evidence = Some(value),
            "--canary" | "--only" => arguments.canary = Some(value),
            _ => return Err(format!("{word} is not known")),
        }
    }
    Ok(arguments)
}

fn run(arguments: &Arguments) -> ExitCode {
    let canary = match &arguments.canary {
        None => None,
        Some(name) => match canaries::all().into_iter().find(|bird| bird.name == name) {
            Some(bird) => Some(bird.canary),
            None => return usage(&format!("{name} is no canary of this build")),
        },
    };
    let settings = Settings { telling: arguments.trace, canary };
    let (start, count) = match arguments.seed {
        Some(seed) => (seed, 1),
        None => (arguments.start.unwrap_or_else(fresh_start), arguments.seeds),
    };
    let jobs = if arguments.seed.is_some() { 1 } else { arguments.jobs };
    println!("seeds from {start} on: `sim run --seed N --trace` tells the story of one");
    let summary = run_seeds(start, count, jobs, false, &settings);
    report(&summary);
    evidence(arguments, "simulation seeds", &summary);
    if summary.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn fresh_start() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_secs() * SEEDS_PER_SECOND
}

fn report(summary: &Summary) {
    for outcome in &summary.failed {
        let why = outcome.violation.clone().unwrap_or_default();
        println!("seed {} fails: {why}", outcome.seed);
    }
    println!("{}", summary.probes.report());
    println!(
        "{} seeds, {} failed, {} host operations, {} block operations checked, {} faults, {:.1} s",
        summary.seeds,
        summary.failed.len(),
        summary.ops,
        summary.checked,
        summary.faults,
        summary.seconds,
    );
}

fn evidence(arguments: &Arguments, name: &str, summary: &Summary) {
    let failed = summary.failed.len() as u64;
    evidence_row(arguments, name, summary.seeds, failed, summary.seconds);
    evidence_row(arguments, "simulated host operations", summary.ops, failed, summary.seconds);
    let checked = summary.checked;
    evidence_row(arguments, "simulated block operations checked", checked, failed, summary.seconds);
}

fn evidence_row(arguments: &Arguments, name: &str, count: u64, violations: u64, seconds: f64) {
    let Some(path) = &arguments.evidence else { return };
    let row =
        json!({"evidence": name, "count": count, "violations": violations, "seconds": seconds});
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .and_then(|mut file| writeln!(file, "{row}"));
    if let Err(error) = written {
        eprintln!("sim: {path}: {error}");
    }
}

fn hunt_all(arguments: &Arguments) -> ExitCode {
    let birds = canaries::all();
    if birds.is_empty() {
        return usage("this build has no canaries: build with --features canary");
    }
    let wanted = |bird: &Bird| match &arguments.canary {
        Some(only) => only == bird.name,
        None => bird.seeds_max > 0,
    };
    let start = arguments.start.unwrap_or(CANARY_START);
    let (mut missed, mut count, mut seconds) = (0, 0, 0.0);
    println!("{:<22} {:>6} {:>8}  by", "canary", "seeds", "seconds");
    for bird in birds.iter().filter(|bird| wanted(bird)) {
        let demanded = if bird.seeds_max > 0 { bird.seeds_max } else { HUNT_SEEDS };
        let seeds_max = arguments.seeds_max.unwrap_or(demanded);
        let caught = canaries::hunt(bird, start, arguments.jobs, seeds_max);
        count += 1;
        seconds += caught.seconds;
        let (seeds, by) = if let Some((seeds, why)) = &caught.by {
            (seeds.to_string(), why.lines().next().unwrap_or_default().to_owned())
        } else {
            missed += 1;
            (format!(">{}", caught.seeds_max), "NOT CAUGHT".to_owned())
        };
        let by: String = by.chars().take(150).collect();
        println!("{:<22} {seeds:>6} {:>8.1}  {by}", caught.name, caught.seconds);
    }
    evidence_row(arguments, "canaries caught", count - missed, missed, seconds);
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
