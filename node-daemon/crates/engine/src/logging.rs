//! Log lines on standard error, as text or JSON; level by `RUST_LOG`, `info` when it is not set.
//!
//! A panic is a broken invariant: it is logged and the process ends at once, whatever thread it
//! was, so that the supervisor starts a new one (crash rather than corrupt).

use tracing::error;
use tracing_subscriber::EnvFilter;

use crate::args::LogFormat;

/// Log lines of this process from now on, and what a panic does.
pub fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => lines.json().flatten_event(true).init(),
        LogFormat::Text => lines.with_ansi(false).init(),
    }
}

/// From now on a panic of any thread ends the process.
pub fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let payload = panic.payload();
        let text = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("no text");
        let thread = std::thread::current();
        let backtrace = std::backtrace::Backtrace::force_capture();
        error!(thread = thread.name(), place, %backtrace, "an invariant is broken: {text}");
        std::process::abort();
    }));
}
