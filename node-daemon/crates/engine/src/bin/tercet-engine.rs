//! The engine of a node and its supervisor: see `docs/engine.md`.

use std::process::ExitCode;

use tercet_engine::args::{Args, USAGE};
use tercet_engine::{logging, worker};
use tracing::error;

/// Exit code for a command line that cannot be.
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let args = match Args::parse(std::env::args_os().skip(1)) {
        Ok(args) => args,
        Err(wrong) => {
            eprintln!("tercet-engine: {wrong}\n\n{USAGE}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    logging::start(args.log_format);
    worker::main(&args).unwrap_or_else(|failure| {
        error!(error = %failure, "cannot run");
        ExitCode::FAILURE
    })
}
