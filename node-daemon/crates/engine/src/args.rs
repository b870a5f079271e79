//! Command line of `tercet-engine`, as `docs/processes.md` has it.

use std::ffi::OsString;
use std::path::PathBuf;

use thiserror::Error;
use uuid::Uuid;

/// Most reactors of an engine.
pub const REACTORS_MAX: usize = 64;

/// How to use it.
pub const USAGE: &str = "\
usage: tercet-engine supervise --node NAME --socket PATH --state-dir DIR [--reactors N]
                               [--log-format json|text]
       tercet-engine run (the same arguments)

supervise  starts `run` with the same arguments, and again when it dies
run        is the engine itself
The agent tells the engine everything else over the socket; it is remembered in DIR/engine.json.";

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Start the engine, and again when it dies.
    Supervise,
    /// Be the engine.
    Run,
}

/// How to write log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object each.
    Json,
    /// For people.
    Text,
}

/// The command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub command: Command,
    /// The `StorageNode`'s name.
    pub node: String,
    /// The Unix socket of the control API.
    pub socket: PathBuf,
    /// What must survive a restart beside the devices.
    pub state_dir: PathBuf,
    /// Threads that do I/O; chosen by the number of cores when absent.
    pub reactors: Option<usize>,
    /// Log format.
    pub log_format: LogFormat,
    /// Instances that the parent has reaped (rule L5).
    pub proven_exits: Vec<Uuid>,
}

/// What is wrong with a command line.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ArgsError {
    /// Neither `supervise` nor `run`.
    #[error("the first argument must be supervise or run")]
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
        let command = match args.next().as_deref() {
            Some("supervise") => Command::Supervise,
            Some("run") => Command::Run,
            _ => return Err(ArgsError::Command),
        };
        let (mut node, mut socket, mut state_dir) = (None, None, None);
        let (mut reactors, mut log_format) = (None, LogFormat::Text);
        let mut proven_exits = Vec::new();
        while let Some(name) = args.next() {
            let mut value = || args.next().unwrap_or_default();
            match name.as_str() {
                "--node" => node = Some(filled(&name, value())?),
                "--socket" => socket = Some(PathBuf::from(filled(&name, value())?)),
                "--state-dir" => state_dir = Some(PathBuf::from(filled(&name, value())?)),
                "--reactors" => reactors = Some(count(&name, value())?),
                "--log-format" => log_format = format(&name, value())?,
                "--proven-exit" => proven_exits.push(instance(&name, value())?),
                _ => return Err(ArgsError::Unknown(name)),
            }
        }
        Ok(Self {
            command,
            node: node.ok_or(ArgsError::Missing("--node"))?,
            socket: socket.ok_or(ArgsError::Missing("--socket"))?,
            state_dir: state_dir.ok_or(ArgsError::Missing("--state-dir"))?,
            reactors,
            log_format,
            proven_exits,
        })
    }

    /// The arguments of `run` that stand for these, without proven exits.
    pub fn for_worker(&self) -> Vec<OsString> {
        let format = match self.log_format {
            LogFormat::Json => "json",
            LogFormat::Text => "text",
        };
        let mut args: Vec<OsString> = vec![
            "run".into(),
            "--node".into(),
            self.node.clone().into(),
            "--socket".into(),
            self.socket.clone().into(),
            "--state-dir".into(),
            self.state_dir.clone().into(),
            "--log-format".into(),
            format.into(),
        ];
        if let Some(reactors) = self.reactors {
            args.extend(["--reactors".into(), reactors.to_string().into()]);
        }
        args
    }
}

fn wrong(name: &str, value: String, why: &'static str) -> ArgsError {
    ArgsError::Value { name: name.to_owned(), value, why }
}

fn filled(name: &str, value: String) -> Result<String, ArgsError> {
    if value.is_empty() { Err(wrong(name, value, "it is empty")) } else { Ok(value) }
}

fn count(name: &str, value: String) -> Result<usize, ArgsError> {
    match value.parse() {
        Ok(count) if (1..=REACTORS_MAX).contains(&count) => Ok(count),
        _ => Err(wrong(name, value, "it must be between 1 and 64")),
    }
}

fn format(name: &str, value: String) -> Result<LogFormat, ArgsError> {
    match value.as_str() {
        "json" => Ok(LogFormat::Json),
        "text" => Ok(LogFormat::Text),
        _ => Err(wrong(name, value, "it must be json or text")),
    }
}

fn instance(name: &str, value: String) -> Result<Uuid, ArgsError> {
    Uuid::parse_str(&value).map_err(|_| wrong(name, value, "it is no UUID"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_worker_is_started_with_what_the_supervisor_was() {
        let line = "supervise --node n1 --socket /s --state-dir /d --reactors 3 --log-format json";
        let args = parse(line).expect("good arguments");
        let worker = Args::parse(args.for_worker()).expect("good arguments");
        assert_eq!(worker, Args { command: Command::Run, ..args });
    }

    #[test]
    fn each_mistake_is_named() {
        assert_eq!(parse("serve"), Err(ArgsError::Command));
        assert_eq!(parse("run --node n"), Err(ArgsError::Missing("--socket")));
        assert_eq!(parse("run --nodes n"), Err(ArgsError::Unknown("--nodes".into())));
        let rest = "--node n --socket s --state-dir d";
        for wrong in ["--reactors 0", "--reactors 65", "--log-format xml", "--proven-exit me"] {
            let error = parse(&format!("run {rest} {wrong}")).expect_err("a wrong value");
            assert!(matches!(error, ArgsError::Value { .. }), "{error}");
        }
        assert!(matches!(parse("run --node"), Err(ArgsError::Value { .. })));
    }
}
