//! The engine of a node and its supervisor: see `docs/engine.md`.

use std::ffi::OsString;
use std::process::ExitCode;

use tercet_engine::args::{Args, USAGE};
use tercet_engine::{logging, offline, worker};
use tracing::error;

/// Exit code for a command line that cannot be.
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let [command, rest @ ..] = &words[..]
        && let Some(command @ ("fsck" | "inspect")) = command.to_str()
    {
        return offline::main(command, rest);
    }
    let args = match Args::parse(words) {
        Ok(args) => args,
        Err(wrong) => {
            eprintln!("tercet-engine: {wrong}\n\n{USAGE}\n\n{}", offline::USAGE);
            return ExitCode::from(EXIT_USAGE);
        }
    };
    logging::start(args.log_format);
    worker::main(&args).unwrap_or_else(|failure| {
        error!(error = %failure, "cannot run");
        ExitCode::FAILURE
    })
}
