//! `model`: explores the spaces of the model check from the command line.
//!
//! `model run` explores the spaces that `make test` does, `--long` all of them; `model canaries`
//! (a build with that feature) breaks one rule at a time and shows the way to what goes wrong. Exit
//! code 1 when something is wrong, or when a broken rule is not noticed.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::process::ExitCode;

use serde_json::json;
use tercet_model::local::Broken;
use tercet_model::space::{Explored, SAFE, SPACES, Space};

const USAGE: &str = "usage:
  model run [--space NAME] [--long] [--jobs J] [--evidence FILE]
  model canaries [--only NAME] [--trace] [--jobs J] [--evidence FILE]";

/// Where rows of evidence go when no option says it.
const EVIDENCE_VARIABLE: &str = "TERCET_EVIDENCE";

/// What was asked for.
#[derive(Default)]
struct Arguments {
    space: Option<String>,
    only: Option<String>,
    long: bool,
    trace: bool,
    jobs: usize,
    evidence: Option<String>,
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    let arguments = match parse(words) {
        Ok(arguments) => arguments,
        Err(why) => return usage(&why),
    };
    std::panic::set_hook(Box::new(|_| {})); // a broken assertion is told with the way to it
    match command.as_str() {
        "run" => run(&arguments),
        "canaries" => canaries(&arguments),
        _ => usage("run or canaries?"),
    }
}

fn usage(why: &str) -> ExitCode {
    eprintln!("model: {why}\n{USAGE}");
    ExitCode::from(2)
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments { jobs: 2, ..Arguments::default() };
    arguments.evidence = std::env::var(EVIDENCE_VARIABLE).ok().filter(|path| !path.is_empty());
    while let Some(word) = words.next() {
        match word.as_str() {
            "--long" => arguments.long = true,
            "--trace" => arguments.trace = true,
            _ => {
                let value = words.next().ok_or(format!("{word} needs a value"))?;
                match word.as_str() {
                    "--space" => arguments.space = Some(value),
                    "--only" => arguments.only = Some(value),
                    "--jobs" => {
                        let jobs = value.parse().map_err(|_| format!("{value}: no number"))?;
                        arguments.jobs = usize::max(jobs, 1);
                    }
                    "--evidence" => arguments.evidence = Some(value),
                    _ => return Err(format!("{word} is not known")),
                }
            }
        }
    }
    Ok(arguments)
}

fn run(arguments: &Arguments) -> ExitCode {
    let wanted = |space: &&Space| match &arguments.space {
        Some(name) => space.name == name,
        None => arguments.long || !space.long,
    };
    let spaces: Vec<_> = SPACES.iter().filter(wanted).collect();
    if spaces.is_empty() {
        let names: Vec<_> = SPACES.iter().map(|space| space.name).collect();
        return usage(&format!("no such space; there are {}", names.join(", ")));
    }
    let (mut states, mut wrong, mut seconds) = (0, 0, 0.0);
    println!("{:<14} {:>10} {:>6} {:>8}  reached", "space", "states", "depth", "seconds");
    for space in spaces {
        let explored = space.explore(Broken::default(), arguments.jobs, None);
        let reached: Vec<_> =
            explored.found.keys().filter(|name| **name != SAFE).copied().collect();
        println!(
            "{:<14} {:>10} {:>6} {:>8.1}  {}",
            space.name,
            explored.states,
            explored.depth,
            explored.seconds,
            reached.join("; "),
        );
        states += explored.states;
        seconds += explored.seconds;
        let missing: Vec<_> = space.reaches.iter().filter(|n| !reached.contains(n)).collect();
        if !missing.is_empty() {
            wrong += 1;
            println!("  never reached: {missing:?}");
        }
        wrong += usize::from(tell(&explored));
    }
    println!("{states} states, every one within the bounds; {wrong} spaces wrong; {seconds:.1} s");
    evidence_row(arguments, "model states", states, wrong, seconds);
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The way to what is wrong, if anything is.
fn tell(explored: &Explored) -> bool {
    let Some(way) = explored.found.get(SAFE) else { return false };
    for step in way {
        println!("    {step}");
    }
    true
}

#[cfg(not(feature = "canary"))]
fn canaries(arguments: &Arguments) -> ExitCode {
    let (only, trace) = (&arguments.only, arguments.trace);
    usage(&format!("no canaries (only {only:?}, trace {trace}) but with --features canary"))
}

#[cfg(feature = "canary")]
fn canaries(arguments: &Arguments) -> ExitCode {
    use tercet_model::{canaries::BIRDS, space::named};
    let (mut missed, mut count, mut seconds) = (0, 0, 0.0);
    println!(
        "{:<20} {:<14} {:>9} {:>8} {:>5}  what",
        "canary", "space", "states", "seconds", "steps"
    );
    for bird in BIRDS.iter().filter(|b| arguments.only.as_ref().is_none_or(|o| o == b.name)) {
        let space = arguments.space.as_deref().unwrap_or(bird.space);
        let Some(space) = named(space) else { return usage(&format!("no space {space}")) };
        let explored = space.explore(Broken { canary: Some(bird.canary) }, arguments.jobs, None);
        let way = explored.found.get(SAFE);
        let what = way.and_then(|way| way.last()).map_or("NOT CAUGHT", String::as_str);
        let what: String = what.chars().take(100).collect();
        println!(
            "{:<20} {:<14} {:>9} {:>8.1} {:>5}  {what}",
            bird.name,
            space.name,
            explored.states,
            explored.seconds,
            way.map_or(0, |way| way.len() - 1),
        );
        if arguments.trace {
            tell(&explored);
        }
        count += 1;
        missed += usize::from(way.is_none());
        seconds += explored.seconds;
    }
    evidence_row(arguments, "model canaries caught", count - missed, missed, seconds);
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn evidence_row(arguments: &Arguments, name: &str, count: usize, violations: usize, seconds: f64) {
    let Some(path) = &arguments.evidence else { return };
    let row =
        json!({"evidence": name, "count": count, "violations": violations, "seconds": seconds});
    let opened = OpenOptions::new().create(true).append(true).open(path);
    if let Err(error) = opened.and_then(|mut file| writeln!(file, "{row}")) {
        eprintln!("model: {path}: {error}");
    }
}
