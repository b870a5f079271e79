//! Command line of `tercet-attach`, as `docs/processes.md` and `docs/nvme-tcp.md` have it.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tercet_nvmf::TRANSFER_BYTES_MAX;
use tercet_nvmf::host::ENDPOINTS_MAX;
use tercet_nvmf::names::parse_volume_nqn;
use thiserror::Error;
use uuid::Uuid;

use crate::args::LogFormat;

/// How to use it.
pub const USAGE: &str = "\
usage: tercet-attach serve --socket PATH --state-dir DIR [--http ADDRESS:PORT]
                           [--log-format json|text]
       tercet-attach bench --nqn NQN --endpoint ADDRESS:PORT [--endpoint ...] --rw read|write
                           [--random] [--depth N] [--block-bytes N] [--seconds N] [--span-bytes N]
                           [--spin-us N] [--pause-ms N] [--every-ms N] [--host-nqn NQN]
                           [--host-id UUID] [--log-format json|text]

       tercet-attach record --nqn NQN --endpoint ADDRESS:PORT [--endpoint ...] --host-nqn NQN
                           --host-id UUID --out FILE --writer N [--blocks N] [--clients N]
                           [--pace-us N] [--seed N] [--log-format json|text]

serve  attaches volumes as block devices on request over the socket
bench  loads a volume through the user-space host and prints one JSON object; writes destroy
       what is there
record does random operations on a volume's first blocks until its input ends, and writes down what
       it asked and what it was told: a history whose linearizability can be judged";

/// Most operations in flight of a load.
pub const DEPTH_MAX: usize = 1024;

/// Fewest blocks of a history: an operation is about up to four of them.
pub const RECORD_BLOCKS_MIN: u64 = 8;

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Args {
    /// Serve attach.proto.
    Serve(Serve, LogFormat),
    /// Load a volume.
    Bench(Bench, LogFormat),
    /// Record a history.
    Record(Record, LogFormat),
}

/// Arguments of `serve`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// The Unix socket.
    pub socket: PathBuf,
    /// Mount points.
    pub state_dir: PathBuf,
    /// Health and metrics.
    pub http: Option<SocketAddr>,
}

/// Arguments of `bench`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bench {
    /// The volume.
    pub nqn: String,
    /// Its members.
    pub endpoints: Vec<SocketAddr>,
    /// Who loads.
    pub host_nqn: String,
    /// Its identifier.
    pub host_id: Uuid,
    /// Writes rather than reads.
    pub is_write: bool,
    /// Places drawn at random rather than one after the other.
    pub is_random: bool,
    /// Operations in flight.
    pub depth: usize,
    /// Bytes of each.
    pub block_bytes: usize,
    /// How long.
    pub duration: Duration,
    /// Only the first bytes of the volume; all when absent.
    pub span_bytes: Option<u64>,
    /// How long a turn looks for completions before it sleeps.
    pub spin: Duration,
    /// How long each place in the depth rests after an operation.
    pub pause: Duration,
    /// How long a window of time is of which a line is printed; none are when absent.
    pub every: Option<Duration>,
}

/// Arguments of `record`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The volume.
    pub nqn: String,
    /// Its members.
    pub endpoints: Vec<SocketAddr>,
    /// Who asks.
    pub host_nqn: String,
    /// Its identifier.
    pub host_id: Uuid,
    /// Where the history goes.
    pub out: PathBuf,
    /// Makes what this process writes unlike what any other does.
    pub writer: u32,
    /// Blocks from the start of the volume that operations are about.
    pub blocks: u64,
    /// Operations in flight: each client does one after the other.
    pub clients: usize,
    /// How long a client waits before its next operation.
    pub pace: Duration,
    /// Of what is drawn.
    pub seed: u64,
}

/// What is wrong with a command line.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ArgsError {
    /// None of the commands.
    #[error("the first argument must be serve, bench or record")]
    Command,
    /// An unknown argument.
    #[error("unknown argument {0}")]
    Unknown(String),
    /// An argument that must be there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A value that cannot be.
    #[error("{name} cannot be {value:?}: {why}")]
    Value {
        /// The argument.
        name: String,
        /// What was given.
        value: String,
        /// Why it cannot be.
        why: &'static str,
    },
}

impl Args {
    /// Reads the arguments after the program's name.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, ArgsError> {
        let mut args = args.into_iter().map(|arg| arg.to_string_lossy().into_owned());
        match args.next().as_deref() {
            Some("serve") => serve(args),
            Some("bench") => bench(args),
            Some("record") => record(args),
            _ => Err(ArgsError::Command),
        }
    }
}

fn serve(mut args: impl Iterator<Item = String>) -> Result<Args, ArgsError> {
    let (mut socket, mut state_dir, mut http) = (None, None, None);
    let mut log_format = LogFormat::Text;
    while let Some(name) = args.next() {
        let value = args.next().unwrap_or_default();
        match name.as_str() {
            "--socket" => socket = Some(PathBuf::from(filled(&name, value)?)),
            "--state-dir" => state_dir = Some(PathBuf::from(filled(&name, value)?)),
            "--http" => http = Some(parsed(&name, &value, "it is no ADDRESS:PORT")?),
            "--log-format" => log_format = format(&name, value)?,
            _ => return Err(ArgsError::Unknown(name)),
        }
    }
    let socket = socket.ok_or(ArgsError::Missing("--socket"))?;
    let state_dir = state_dir.ok_or(ArgsError::Missing("--state-dir"))?;
    Ok(Args::Serve(Serve { socket, state_dir, http }, log_format))
}

fn bench(mut args: impl Iterator<Item = String>) -> Result<Args, ArgsError> {
    let mut bench = Bench {
        nqn: String::new(),
        endpoints: Vec::new(),
        host_nqn: "nqn.2026-11.io.tercet:host:bench".to_owned(),
        host_id: Uuid::from_bytes(*b"tercet-bench-hst"),
        is_write: false,
        is_random: false,
        depth: 1,
        block_bytes: 4096,
        duration: Duration::from_secs(10),
        span_bytes: None,
        spin: crate::host::SPIN,
        pause: Duration::ZERO,
        every: None,
    };
    let mut log_format = LogFormat::Text;
    let mut rw = None;
    while let Some(name) = args.next() {
        if name == "--random" {
            bench.is_random = true;
            continue;
        }
        let value = args.next().unwrap_or_default();
        let number = |why| parsed::<u64>(&name, &value, why);
        match name.as_str() {
            "--nqn" => bench.nqn = filled(&name, value)?,
            "--endpoint" => bench.endpoints.push(parsed(&name, &value, "no ADDRESS:PORT")?),
            "--host-nqn" => bench.host_nqn = filled(&name, value)?,
            "--host-id" => bench.host_id = parsed(&name, &value, "it is no UUID")?,
            "--rw" => rw = Some(direction(&name, value)?),
            "--depth" => bench.depth = number("it is no number")? as usize,
            "--block-bytes" => bench.block_bytes = number("it is no number")? as usize,
            "--seconds" => bench.duration = Duration::from_secs(number("it is no number")?),
            "--span-bytes" => bench.span_bytes = Some(number("it is no number")?),
            "--spin-us" => bench.spin = Duration::from_micros(number("it is no number")?),
            "--pause-ms" => bench.pause = Duration::from_millis(number("it is no number")?),
            "--every-ms" => bench.every = Some(Duration::from_millis(number("it is no number")?)),
            "--log-format" => log_format = format(&name, value)?,
            // The one format that there is.
            "-o" if value == "json" => {}
            _ => return Err(ArgsError::Unknown(name)),
        }
    }
    bench.is_write = rw.ok_or(ArgsError::Missing("--rw"))?;
    check(&bench)?;
    Ok(Args::Bench(bench, log_format))
}

fn record(mut args: impl Iterator<Item = String>) -> Result<Args, ArgsError> {
    let mut record = Record {
        nqn: String::new(),
        endpoints: Vec::new(),
        host_nqn: String::new(),
        host_id: Uuid::nil(),
        out: PathBuf::new(),
        writer: 0,
        blocks: 64,
        clients: 4,
        pace: Duration::ZERO,
        seed: 1,
    };
    let mut log_format = LogFormat::Text;
    while let Some(name) = args.next() {
        let value = args.next().unwrap_or_default();
        let number = |why| parsed::<u64>(&name, &value, why);
        match name.as_str() {
            "--nqn" => record.nqn = filled(&name, value)?,
            "--endpoint" => record.endpoints.push(parsed(&name, &value, "no ADDRESS:PORT")?),
            "--host-nqn" => record.host_nqn = filled(&name, value)?,
            "--host-id" => record.host_id = parsed(&name, &value, "it is no UUID")?,
            "--out" => record.out = PathBuf::from(filled(&name, value)?),
            "--writer" => record.writer = parsed(&name, &value, "it is no number of 32 bits")?,
            "--blocks" => record.blocks = number("it is no number")?,
            "--clients" => record.clients = number("it is no number")? as usize,
            "--pace-us" => record.pace = Duration::from_micros(number("it is no number")?),
            "--seed" => record.seed = number("it is no number")?,
            "--log-format" => log_format = format(&name, value)?,
            _ => return Err(ArgsError::Unknown(name)),
        }
    }
    check_record(&record)?;
    Ok(Args::Record(record, log_format))
}

fn check_record(record: &Record) -> Result<(), ArgsError> {
    if parse_volume_nqn(&record.nqn).is_none() {
        return Err(wrong("--nqn", record.nqn.clone(), "it is no volume's NQN"));
    }
    let missing = [
        (record.endpoints.is_empty(), "--endpoint"),
        (record.host_nqn.is_empty(), "--host-nqn"),
        (record.host_id.is_nil(), "--host-id"),
        (record.out.as_os_str().is_empty(), "--out"),
        (record.writer == 0, "--writer"),
    ];
    if let Some(&(_, name)) = missing.iter().find(|(is_missing, _)| *is_missing) {
        return Err(ArgsError::Missing(name));
    }
    if record.blocks < RECORD_BLOCKS_MIN {
        return Err(wrong("--blocks", record.blocks.to_string(), "it must be at least 8"));
    }
    if !(1..=DEPTH_MAX).contains(&record.clients) {
        return Err(wrong("--clients", record.clients.to_string(), "it must be 1 to 1024"));
    }
    Ok(())
}

fn check(bench: &Bench) -> Result<(), ArgsError> {
    let wrong_if = |is_wrong: bool, name: &str, value: String, why| {
        let error = ArgsError::Value { name: name.to_owned(), value, why };
        if is_wrong { Err(error) } else { Ok(()) }
    };
    if bench.nqn.is_empty() {
        return Err(ArgsError::Missing("--nqn"));
    }
    let nqn = bench.nqn.clone();
    wrong_if(parse_volume_nqn(&nqn).is_none(), "--nqn", nqn, "it is no volume's NQN")?;
    if bench.endpoints.is_empty() {
        return Err(ArgsError::Missing("--endpoint"));
    }
    let count = bench.endpoints.len();
    wrong_if(count > ENDPOINTS_MAX, "--endpoint", count.to_string(), "there are at most 8")?;
    let depth_fits = (1..=DEPTH_MAX).contains(&bench.depth);
    wrong_if(!depth_fits, "--depth", bench.depth.to_string(), "it must be 1 to 1024")?;
    let no_time = bench.every == Some(Duration::ZERO);
    wrong_if(no_time, "--every-ms", "0".to_owned(), "a window takes at least 1 ms")?;
    let bytes = bench.block_bytes;
    let fits = bytes > 0 && bytes.is_multiple_of(4096) && bytes <= TRANSFER_BYTES_MAX;
    wrong_if(!fits, "--block-bytes", bytes.to_string(), "a multiple of 4096 up to 1 MiB")
}

fn wrong(name: &str, value: String, why: &'static str) -> ArgsError {
    ArgsError::Value { name: name.to_owned(), value, why }
}

fn filled(name: &str, value: String) -> Result<String, ArgsError> {
    if value.is_empty() { Err(wrong(name, value, "it is empty")) } else { Ok(value) }
}

fn parsed<T: std::str::FromStr>(
    name: &str,
    value: &str,
    why: &'static str,
) -> Result<T, ArgsError> {
    value.parse().map_err(|_| wrong(name, value.to_owned(), why))
}

fn direction(name: &str, value: String) -> Result<bool, ArgsError> {
    match value.as_str() {
        "read" => Ok(false),
        "write" => Ok(true),
        _ => Err(wrong(name, value, "it must be read or write")),
    }
}

fn format(name: &str, value: String) -> Result<LogFormat, ArgsError> {
    match value.as_str() {
        "json" => Ok(LogFormat::Json),
        "text" => Ok(LogFormat::Text),
        _ => Err(wrong(name, value, "it must be json or text")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NQN: &str = "nqn.2026-11.io.tercet:volume:30313233-3435-3637-3839-616263646566";

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn a_load_is_described() {
        let line = format!("bench --nqn {NQN} --endpoint 127.0.0.1:4420 --rw write --random");
        let Ok(Args::Bench(bench, _)) = parse(&format!("{line} --depth 32 -o json")) else {
            panic!("good arguments");
        };
        assert!(bench.is_write && bench.is_random && bench.depth == 32);
        for wrong in ["--depth 0", "--block-bytes 1000", "--endpoint x", "--rw up", "--every-ms 0"]
        {
            let error = parse(&format!("{line} {wrong}")).expect_err("a wrong value");
            assert!(matches!(error, ArgsError::Value { .. }), "{error}");
        }
    }

    #[test]
    fn each_mistake_is_named() {
        assert_eq!(parse("attach"), Err(ArgsError::Command));
        assert_eq!(parse("serve --socket s"), Err(ArgsError::Missing("--state-dir")));
        assert_eq!(parse("serve --sockets s"), Err(ArgsError::Unknown("--sockets".into())));
        assert_eq!(parse("bench --rw read"), Err(ArgsError::Missing("--nqn")));
        let record = format!("record --nqn {NQN} --endpoint 127.0.0.1:4420 --host-nqn nqn.x");
        assert_eq!(parse(&record), Err(ArgsError::Missing("--host-id")));
        let record = format!("{record} --host-id 30313233-3435-3637-3839-616263646566 --out h");
        assert_eq!(parse(&record), Err(ArgsError::Missing("--writer")));
        assert!(matches!(parse(&format!("{record} --writer 1")), Ok(Args::Record(..))));
    }
}
