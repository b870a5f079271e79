//! `tercet-engine fsck` and `inspect`: what is on a device that no engine runs, without changing it.
//!
//! `inspect` reads metadata and log, `fsck` every block as well. Exit codes are fsck(8)'s: 0 all is
//! well, 4 something is damaged, 8 the device cannot be looked at, 16 the command line cannot be.
//! A device that an engine has locked is refused (rule R3): what is read from under a running engine
//! proves nothing.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use serde_json::json;
use tercet_proto::BLOCK_BYTES;
use tercet_proto::disk::Superblock;
use tercet_store::arena::Arena;
use tercet_store::disk::{Disk, DiskDone, DiskError, DiskOp, DiskToken};
use tercet_store::inspect::{Copy, Depth, Inspection, Problem};
use tercet_store::{OpenError, Options, Store};
use thiserror::Error;

/// How to use it.
pub const USAGE: &str = "\
usage: tercet-engine fsck DEVICE [-o table|json]     every block of a device that no engine runs
       tercet-engine inspect DEVICE [-o table|json]  its metadata and log
Nothing is changed. Exit code: 0 whole, 4 damaged, 8 it cannot be looked at, 16 wrong usage.";

const EXIT_DAMAGED: u8 = 4;
const EXIT_CANNOT_LOOK: u8 = 8;
const EXIT_USAGE: u8 = 16;
const ARENA_BYTES: usize = 16 << 20;
/// Progress is told after this time, and again after each such time.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);
/// Problems shown in a table at most; JSON has all.
const PROBLEMS_SHOWN_MAX: usize = 50;

/// Why nothing was looked at.
#[derive(Debug, Error)]
pub enum OfflineError {
    /// The command line.
    #[error("{0}\n\n{USAGE}")]
    Usage(String),
    /// An engine has it.
    #[error("device {0} is in use by an engine: stop it first (`fuser -v {0}` shows who has it)")]
    InUse(PathBuf),
    /// The operating system says no.
    #[error("device {path}: {source}")]
    System {
        /// The device.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The store's code says no.
    #[error("device {path}: {source}")]
    Open {
        /// The device.
        path: PathBuf,
        /// Why not.
        source: OpenError,
    },
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Args {
    depth: Depth,
    device: PathBuf,
    json: bool,
}

impl Args {
    fn parse(command: &str, rest: &[OsString]) -> Result<Self, OfflineError> {
        let usage = |why: String| Err(OfflineError::Usage(why));
        let depth = if command == "fsck" { Depth::Blocks } else { Depth::Metadata };
        let (mut device, mut json) = (None, false);
        let mut words = rest.iter().map(|word| word.to_string_lossy());
        while let Some(word) = words.next() {
            match word.as_ref() {
                "-o" | "--output" => match words.next().as_deref() {
                    Some("json") => json = true,
                    Some("table") => json = false,
                    other => return usage(format!("-o takes table or json, not {other:?}")),
                },
                option if option.starts_with('-') => {
                    return usage(format!("unknown option {option}"));
                }
                path if device.is_none() => device = Some(PathBuf::from(path)),
                more => return usage(format!("one device at a time, not {more} as well")),
            }
        }
        match device {
            Some(device) => Ok(Self { depth, device, json }),
            None => usage("DEVICE is missing".to_owned()),
        }
    }
}

/// Runs `fsck` or `inspect` with the arguments behind that word.
pub fn main(command: &str, rest: &[OsString]) -> ExitCode {
    match Args::parse(command, rest).and_then(|args| look(&args)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_DAMAGED),
        Err(error) => {
            eprintln!("tercet-engine {command}: {error}");
            let usage = matches!(error, OfflineError::Usage(_));
            ExitCode::from(if usage { EXIT_USAGE } else { EXIT_CANNOT_LOOK })
        }
    }
}

/// One store of a device.
struct Region {
    number: u64,
    found: Inspection,
}

/// Looks at each store of the device; true: all are whole.
fn look(args: &Args) -> Result<bool, OfflineError> {
    let path = args.device.as_path();
    let device = ReadOnly::open(path)?;
    let count = device.regions();
    let mut regions = Vec::new();
    for number in 0..count {
        let mut disk = device.region(number, count);
        let options = Options::new(Arena::new(ARENA_BYTES));
        let mut told = Instant::now();
        let mut progress = |done: u64, total: u64| {
            if told.elapsed() >= PROGRESS_EVERY {
                told = Instant::now();
                eprintln!("store {} of {count}: {done} of {total} blocks", number + 1);
            }
        };
        let found = Store::inspect(&mut disk, options, args.depth, &mut progress)
            .map_err(|source| OfflineError::Open { path: path.to_path_buf(), source })?;
        regions.push(Region { number, found });
    }
    let text = if args.json { as_json(path, &regions) } else { as_table(path, &regions) };
    let mut out = std::io::stdout().lock();
    // A reader that has gone wants no more.
    drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
    Ok(regions.iter().all(|region| region.found.problems.is_empty()))
}

fn as_json(path: &Path, regions: &[Region]) -> String {
    let stores =
        regions.iter().map(|region| json!({"region": region.number, "store": region.found}));
    let whole = json!({"device": path, "stores": stores.collect::<Vec<_>>()});
    format!("{whole:#}\n")
}

fn as_table(path: &Path, regions: &[Region]) -> String {
    let mut lines = vec![format!("device {}", path.display())];
    for region in regions {
        let found = &region.found;
        let copies = |copies: &[Copy]| -> String {
            let words = copies.iter().map(|copy| match (&copy.number, &copy.problem) {
                (Some(number), _) => format!("{} at block {}", number, copy.block),
                (None, why) => format!("{} at block {}", why.as_deref().unwrap_or(""), copy.block),
            });
            words.collect::<Vec<_>>().join(", ")
        };
        lines.push(format!("store {}", region.number));
        lines.push(format!("  superblocks  {}", copies(&found.superblocks)));
        lines.push(format!("  checkpoints  {}", copies(&found.slots)));
        lines.extend(contents(found));
        for problem in found.problems.iter().take(PROBLEMS_SHOWN_MAX) {
            lines.push(format!("  PROBLEM  {}", say(problem)));
        }
        let more = found.problems.len().saturating_sub(PROBLEMS_SHOWN_MAX);
        if more > 0 {
            lines.push(format!("  and {more} more problems: -o json has all"));
        }
        let verdict = if found.problems.is_empty() { "whole" } else { "DAMAGED" };
        lines.push(format!("  {verdict}; {} blocks read and compared", found.blocks_checked));
    }
    lines.join("\n") + "\n"
}

fn contents(found: &Inspection) -> Vec<String> {
    let Some(all) = &found.contents else { return Vec::new() };
    let who = format!("  cluster {}, node {}, shard {}", all.cluster, all.node, all.shard);
    let used = format!(
        "  {} of {} bytes held; log: {} entries in {} records; {} tombstones",
        all.allocated_bytes, all.capacity_bytes, all.log_entries, all.log_records, all.tombstones
    );
    let mut lines = vec![who, used];
    for one in &all.replicas {
        let state = one
            .incomplete
            .as_deref()
            .map_or("complete".to_owned(), |why| format!("INCOMPLETE ({why})"));
        lines.push(format!(
            "  volume {} ({}): replica {}, {} bytes, {} mapped, tail {:?}, applied {:?}, {state}",
            one.volume,
            one.name,
            one.replica,
            one.size_bytes,
            one.mapped_bytes,
            one.tail,
            one.applied
        ));
        lines.extend(one.snapshots.iter().map(|snapshot| {
            format!("    snapshot {}: {} bytes mapped", snapshot.snapshot, snapshot.mapped_bytes)
        }));
    }
    lines
}

fn say(problem: &Problem) -> String {
    match problem {
        Problem::Copy { what, block, why } => {
            format!("{what} at block {block}: {why}; the other copy counts")
        }
        Problem::Closed { why } => format!("the store does not open: {why}"),
        Problem::Log { volume } => format!(
            "volume {volume}: its log is damaged; this replica is incomplete and is filled from \
             the others when the engine runs"
        ),
        Problem::Count { what } => what.clone(),
        Problem::Block { volume, snapshot, block, lsn, device_block, why } => {
            let place = match (block, lsn) {
                (Some(block), _) => format!("block {block}"),
                (None, Some(lsn)) => format!("payload of entry {lsn}"),
                (None, None) => "a block".to_owned(),
            };
            let of = snapshot.map_or(String::new(), |one| format!(" of snapshot {one}"));
            format!("volume {volume}: {place}{of} at device block {device_block}: {why}")
        }
    }
}

/// A device or file, read with plain system calls. Offsets are those of a region.
struct ReadOnly {
    file: File,
    base_bytes: u64,
    capacity_bytes: u64,
    done: Vec<DiskDone>,
}

impl ReadOnly {
    fn open(path: &Path) -> Result<Self, OfflineError> {
        let system = |source| OfflineError::System { path: path.to_path_buf(), source };
        let meta = std::fs::metadata(path).map_err(system)?;
        let block = meta.file_type().is_block_device();
        let flags = if block { OFlags::EXCL } else { OFlags::empty() };
        let flags = flags.bits().cast_signed();
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let file = opened.map_err(|error| match error.raw_os_error() {
            Some(errno) if errno == Errno::BUSY.raw_os_error() => {
                OfflineError::InUse(path.to_path_buf())
            }
            _ => system(error),
        })?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(OfflineError::InUse(path.to_path_buf())),
            Err(errno) => return Err(system(errno.into())),
        }
        let bytes = (&file).seek(SeekFrom::End(0)).map_err(system)?;
        let capacity_bytes = bytes / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        Ok(Self { file, base_bytes: 0, capacity_bytes, done: Vec::new() })
    }

    /// How many equal regions, one for each shard, the device is divided into: the first store says
    /// how long its own is. One, where it cannot be read.
    fn regions(&self) -> u64 {
        let mut block = vec![0; BLOCK_BYTES];
        let copies = [0_u64, 16].into_iter().find_map(|at| {
            self.file.read_exact_at(&mut block, at * BLOCK_BYTES as u64).ok()?;
            Superblock::decode(&block).ok()
        });
        let own = copies.map_or(0, |one| u64::from(one.capacity_blocks) * BLOCK_BYTES as u64);
        self.capacity_bytes.checked_div(own).map_or(1, |count| count.max(1))
    }

    /// As the engine divides it (`tercet_reactor::Device::region`).
    fn region(&self, number: u64, count: u64) -> Self {
        let bytes = self.capacity_bytes / count / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        let file = self.file.try_clone().expect("a descriptor is left");
        Self { file, base_bytes: bytes * number, capacity_bytes: bytes, done: Vec::new() }
    }
}

impl Disk for ReadOnly {
    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    fn submit(&mut self, token: DiskToken, op: DiskOp) {
        let DiskOp::Read { offset, mut into } = op else {
            panic!("looking at a device changes nothing: {op:?}");
        };
        let read = self.file.read_exact_at(&mut into, self.base_bytes + offset);
        let errno = |error: std::io::Error| {
            DiskError::Io(error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()))
        };
        let result = read.map_err(errno);
        self.done.push(DiskDone { token, buf: Some(into), result });
    }

    fn poll(&mut self, done: &mut Vec<DiskDone>) {
        done.append(&mut self.done);
    }

    fn wait(&mut self, done: &mut Vec<DiskDone>) {
        self.poll(done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, OfflineError> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        Args::parse("fsck", &words)
    }

    #[test]
    fn arguments_are_a_device_and_a_format() {
        let device = PathBuf::from("/dev/sdb");
        let args = parse("/dev/sdb -o json").expect("good");
        assert_eq!(args, Args { depth: Depth::Blocks, device, json: true });
        for wrong in ["", "-o json", "/a /b", "/a -o yaml", "/a --fix"] {
            assert!(matches!(parse(wrong), Err(OfflineError::Usage(_))), "{wrong}");
        }
    }
}
