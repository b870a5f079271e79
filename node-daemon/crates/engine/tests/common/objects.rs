//! Volume objects in memory: compare-and-swap of a configuration, and a watch.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use tercet_engine::pb::engine as pb;
use tokio::sync::watch;
use uuid::Uuid;

#[derive(Clone, Debug)]
pub struct Object {
    pub config: pb::Config,
    pub size_bytes: u64,
    pub host_nqn: String,
    /// Secrets of the host and of the controllers.
    pub secrets: Option<(String, String)>,
    pub generation: u64,
}

impl Object {
    pub fn view(&self, consistent: bool) -> pb::VolumeView {
        let attachment = pb::Attachment {
            node: "client".into(),
            host_nqn: self.host_nqn.clone(),
            read_only: false,
            host_secret: self.secrets.as_ref().map(|secrets| secrets.0.clone()),
            controller_secret: self.secrets.as_ref().map(|secrets| secrets.1.clone()),
        };
        pb::VolumeView {
            config: Some(self.config.clone()),
            attachments: vec![attachment],
            size_bytes: self.size_bytes,
            fence: None,
            consistent,
            generation: self.generation,
            replacement: None,
        }
    }
}

pub struct Objects {
    all: Mutex<BTreeMap<Uuid, Object>>,
    changes: watch::Sender<u64>,
    /// What an agent waits for a swap, in milliseconds.
    pub swap_ms: AtomicU64,
}

impl Default for Objects {
    fn default() -> Self {
        let (all, changes) = (Mutex::default(), watch::Sender::new(0));
        Self { all, changes, swap_ms: AtomicU64::new(0) }
    }
}

impl Objects {
    pub fn create(&self, volume: Uuid, size_bytes: u64, host_nqn: &str, config: pb::Config) {
        let host_nqn = host_nqn.to_owned();
        let object = Object { config, size_bytes, host_nqn, secrets: None, generation: 1 };
        self.all.lock().expect("no panic inside").insert(volume, object);
        self.changes.send_modify(|number| *number += 1);
    }

    /// The swap took place, or not; and the object as it is now.
    pub fn swap(&self, volume: Uuid, old: &pb::Config, new: pb::Config) -> Option<(bool, Object)> {
        let mut all = self.all.lock().expect("no panic inside");
        let object = all.get_mut(&volume)?;
        let swapped = object.config == *old;
        if swapped {
            object.config = new;
            self.changes.send_modify(|number| *number += 1);
        }
        Some((swapped, object.clone()))
    }

    /// Another host is attached from now on, with or without secrets.
    pub fn attach(&self, volume: Uuid, host_nqn: &str, secrets: Option<(&str, &str)>) {
        let mut all = self.all.lock().expect("no panic inside");
        let object = all.get_mut(&volume).expect("a volume");
        host_nqn.clone_into(&mut object.host_nqn);
        object.secrets = secrets.map(|(host, controller)| (host.to_owned(), controller.to_owned()));
        object.generation += 1;
        self.changes.send_modify(|number| *number += 1);
    }

    pub fn all(&self) -> Vec<(Uuid, Object)> {
        let all = self.all.lock().expect("no panic inside");
        all.iter().map(|(volume, object)| (*volume, object.clone())).collect()
    }

    pub fn get(&self, volume: Uuid) -> Option<Object> {
        self.all.lock().expect("no panic inside").get(&volume).cloned()
    }

    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}
