//! The engine's parent: starts it, and again at once when it dies.
//!
//! The kubelet's back-off of 10 s to 5 min would undo a quick restart, so the container has a
//! supervisor of its own. It keeps nothing that a start needs: who kills it kills the engine with
//! it, and the next start is a recovery like any other. One thing it knows that nobody else does:
//! that a process it has reaped is over, which proves that instance's leases over (rule L5) even
//! while the disk still has its last writes. It hands that to the next start.

use std::collections::VecDeque;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::args::Args;
use crate::state::InstanceFile;

/// Exit code of an engine that found its own data contradictory: it must not start again by
/// itself, the evidence is to be kept.
pub const EXIT_FATAL: u8 = 70;
/// Delay before a start after a second engine in a row that lived shorter than `LONG_LIFE`: doubled
/// from the first to the last. Before that there is none.
const DELAY_FIRST: Duration = Duration::from_millis(50);
const DELAY_LAST: Duration = Duration::from_secs(1);
/// Who lived as long as the longest delay needs none: starts are no more frequent for that, and hosts
/// wait for the next engine to say that this one is over (L5).
const LONG_LIFE: Duration = DELAY_LAST;
/// How long an orderly stop may take before it is a kill.
const STOP: Duration = Duration::from_secs(8);
/// Proven exits that are handed on.
const EXITS_MAX: usize = 8;

/// Runs until SIGTERM, an orderly stop, or a fatal exit of the engine.
pub fn run(args: &Args) -> io::Result<ExitCode> {
    std::fs::create_dir_all(&args.state_dir)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(supervise(args))
}

async fn supervise(args: &Args) -> io::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let instance_file = InstanceFile::in_dir(&args.state_dir);
    let mut exits = VecDeque::new();
    let mut delay = Duration::ZERO;
    let mut short_lives = 0_u32;
    loop {
        if !delay.is_zero() && asked_to_stop(&mut terminate, &mut interrupt, delay).await {
            return Ok(ExitCode::SUCCESS);
        }
        let born = Instant::now();
        let mut child = start(args, &exits)?;
        let pid = child.id().unwrap_or_default();
        let status = tokio::select! {
            status = child.wait() => status?,
            _ = terminate.recv() => return stop(&mut child).await,
            _ = interrupt.recv() => return stop(&mut child).await,
        };
        if let Some(instance) = instance_file.instance_of(pid) {
            remember(&mut exits, instance);
        }
        if let Some(code) = last(status) {
            return Ok(code);
        }
        short_lives = if born.elapsed() >= LONG_LIFE { 0 } else { short_lives + 1 };
        delay = pause(short_lives);
        warn!(pid, %status, ?delay, "the engine has died and is started again");
    }
}

/// The code to end with, when this exit is not to be followed by a start.
fn last(status: ExitStatus) -> Option<ExitCode> {
    match status.code() {
        Some(0) => {
            info!("the engine has stopped");
            Some(ExitCode::SUCCESS)
        }
        Some(code) if code == i32::from(EXIT_FATAL) => {
            error!("the engine stopped itself for good: see its last log line");
            Some(ExitCode::from(EXIT_FATAL))
        }
        _ => None,
    }
}

fn start(args: &Args, exits: &VecDeque<Uuid>) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(args.for_worker());
    for instance in exits {
        command.arg("--proven-exit").arg(instance.to_string());
    }
    let child = command.kill_on_drop(true).spawn()?;
    info!(pid = child.id(), "the engine is started");
    Ok(child)
}

/// How long to wait after so many short lives in a row.
fn pause(short_lives: u32) -> Duration {
    match short_lives {
        0 | 1 => Duration::ZERO,
        more => (DELAY_FIRST * 2_u32.pow((more - 2).min(8))).min(DELAY_LAST),
    }
}

fn remember(exits: &mut VecDeque<Uuid>, instance: Uuid) {
    if exits.back() != Some(&instance) {
        exits.push_back(instance);
    }
    while exits.len() > EXITS_MAX {
        exits.pop_front();
    }
}

async fn asked_to_stop(terminate: &mut Signal, interrupt: &mut Signal, delay: Duration) -> bool {
    tokio::select! {
        () = sleep(delay) => false,
        _ = terminate.recv() => true,
        _ = interrupt.recv() => true,
    }
}

/// Asks the engine to stop in order; it is killed when it takes too long. Either way all is well.
async fn stop(child: &mut Child) -> io::Result<ExitCode> {
    if let Some(pid) = child.id().and_then(|id| rustix::process::Pid::from_raw(id.cast_signed())) {
        // It may have died meanwhile; it has not been reaped, so the number is still its own.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    match timeout(STOP, child.wait()).await {
        Ok(status) => {
            let status = status?;
            info!(code = status.code(), signal = status.signal(), "the engine has stopped");
        }
        Err(_) => child.kill().await?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_death_costs_nothing_and_a_loop_of_deaths_is_slowed() {
        let pauses = (0..9).map(pause).map(|pause| pause.as_millis());
        assert!(pauses.eq([0, 0, 50, 100, 200, 400, 800, 1000, 1000]));
        assert_eq!(pause(u32::MAX), DELAY_LAST);
    }

    #[test]
    fn the_newest_exits_are_kept() {
        let mut exits = VecDeque::new();
        let all: Vec<Uuid> = (0..20).map(|_| Uuid::new_v4()).collect();
        for &instance in &all {
            remember(&mut exits, instance);
            remember(&mut exits, instance);
        }
        assert!(exits.iter().eq(&all[20 - EXITS_MAX..]));
    }
}
