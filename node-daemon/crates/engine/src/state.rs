//! What an engine remembers beside its devices, in `--state-dir`.
//!
//! `engine.json`: the last Configure, so that a start serves at once, without the agent. Replaced
//! in one step (new file, fsync, rename, fsync of the folder). It decides nothing about data: a
//! folder that was lost only means that the agent is waited for. `instance`: which instance which
//! process is, for the supervisor.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::warn;
use uuid::Uuid;

use crate::plan::Plan;

/// Version of `engine.json`.
const FORMAT: u32 = 1;

/// `engine.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    format: u32,
    plan: Plan,
}

/// Why the state directory cannot be used.
#[derive(Debug, Error)]
#[error("{path}: {source}")]
pub struct StateError {
    path: PathBuf,
    source: io::Error,
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StateError + use<> {
    let path = path.to_path_buf();
    move |source| StateError { path, source }
}

/// The plan of the last Configure, when there is one that can be read. One that cannot is reported
/// and left where it is until the agent's next Configure.
pub fn load(dir: &Path) -> Option<Plan> {
    let path = dir.join("engine.json");
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            warn!(path = %path.display(), %error, "cannot be read: waiting for the agent");
            return None;
        }
    };
    match serde_json::from_slice::<Remembered>(&text) {
        Ok(remembered) if remembered.format == FORMAT => Some(remembered.plan),
        Ok(remembered) => {
            let format = remembered.format;
            warn!(path = %path.display(), format, "of another version: waiting for the agent");
            None
        }
        Err(error) => {
            warn!(path = %path.display(), %error, "is damaged: waiting for the agent");
            None
        }
    }
}

/// Remembers a plan.
pub fn save(dir: &Path, plan: &Plan) -> Result<(), StateError> {
    let remembered = Remembered { format: FORMAT, plan: plan.clone() };
    let text = serde_json::to_vec_pretty(&remembered).expect("a plan is plain data");
    replace(dir, "engine.json", &text)
}

fn replace(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), StateError> {
    let (new, path) = (dir.join(format!("{name}.new")), dir.join(name));
    let mut file = File::create(&new).map_err(at(&new))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(at(&new))?;
    fs::rename(&new, &path).map_err(at(&path))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
}

/// `instance`: pid and instance of the engine that was started last.
#[derive(Clone, Debug)]
pub struct InstanceFile {
    dir: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Running {
    pid: u32,
    instance: Uuid,
}

impl InstanceFile {
    /// In this state directory.
    pub fn in_dir(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf() }
    }

    /// Written by an engine before it does anything that a peer could see. Not made durable: it is
    /// for the parent of this very process, and a start does not wait for a busy disk. What is found
    /// after a power loss names a process that is no more, or is no JSON.
    pub fn write(&self, instance: Uuid) -> Result<(), StateError> {
        let running = Running { pid: std::process::id(), instance };
        let text = serde_json::to_vec(&running).expect("plain data");
        let (new, path) = (self.dir.join("instance.new"), self.dir.join("instance"));
        fs::write(&new, text).map_err(at(&new))?;
        fs::rename(&new, &path).map_err(at(&path))
    }

    /// The instance that process `pid` was.
    pub fn instance_of(&self, pid: u32) -> Option<Uuid> {
        let text = fs::read(self.dir.join("instance")).ok()?;
        let running: Running = serde_json::from_slice(&text).ok()?;
        (running.pid == pid).then_some(running.instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_told_only_for_its_own_process() {
        let dir = std::env::temp_dir().join(format!("tercet-state-{}", Uuid::new_v4()));
        fs::create_dir_all(&dir).expect("a folder");
        let file = InstanceFile::in_dir(&dir);
        assert_eq!(file.instance_of(1), None);
        let instance = Uuid::new_v4();
        file.write(instance).expect("written");
        assert_eq!(file.instance_of(std::process::id()), Some(instance));
        assert_eq!(file.instance_of(std::process::id() + 1), None);
        fs::write(dir.join("engine.json"), b"{\"format\": 1, \"pl").expect("written");
        assert_eq!(load(&dir), None, "a damaged file is no plan");
        fs::remove_dir_all(&dir).expect("removed");
    }
}
