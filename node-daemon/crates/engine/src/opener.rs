//! Opens and locks devices, on a thread of its own, and hands their regions to the reactors.
//!
//! A device may be locked for seconds after its last engine died, because that engine's last
//! writes have not landed (rule R3); it is tried until it is free. A device that is too small, or
//! gone, is reported and tried less and less often: a person may repair it, and the engine serves
//! its other devices meanwhile.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tercet_reactor::{Device, DeviceError, Discard, OpenDevice, Place, now};
use tracing::{error, info};

use crate::control::Directory;
use crate::core::{NewShard, ToReactor};
use crate::plan::{DevicePlan, DeviceSource, Plan};

/// Pause between attempts at a locked device.
const LOCKED_PAUSE: Duration = Duration::from_millis(10);
/// Pauses between attempts at a device that cannot be opened: doubled from the first to the last.
const FAILED_PAUSE_FIRST: Duration = Duration::from_millis(100);
const FAILED_PAUSE_LAST: Duration = Duration::from_secs(5);

/// What is said of a device that is neither open nor failed; the agent knows the word.
pub const OPENING: &str = "opening";

/// What is known of a device. An empty message: it is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Its name within the `StorageNode`.
    pub id: String,
    /// What is wrong with it, for people.
    pub message: String,
}

/// See the module's text.
pub struct Opener {
    directory: Arc<Directory>,
    begun: Mutex<BTreeSet<String>>,
}

impl Opener {
    /// For the reactors of this directory.
    pub fn new(directory: Arc<Directory>) -> Self {
        Self { directory, begun: Mutex::default() }
    }

    /// Opens the devices of a plan that nobody has begun to open. Returns at once.
    pub fn open(&self, plan: &Arc<Plan>) {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, device) in (0..).zip(&plan.devices) {
            if begun.insert(device.id.clone()) {
                let (directory, plan) = (Arc::clone(&self.directory), Arc::clone(plan));
                directory.update_devices(|devices| {
                    let message = OPENING.to_owned();
                    devices.push(DeviceState { id: device.id.clone(), message });
                });
                let name = format!("open-{}", device.id);
                let started = thread::Builder::new()
                    .name(name.chars().take(15).collect())
                    .spawn(move || open_until_done(&directory, &plan, number));
                started.expect("a thread can be started at the start");
            }
        }
    }
}

fn open_until_done(directory: &Directory, plan: &Plan, number: u16) {
    let wanted = &plan.devices[usize::from(number)];
    let mut pause = FAILED_PAUSE_FIRST;
    let mut told = String::new();
    let device = loop {
        let failure = match Device::open(&to_open(wanted)) {
            Ok(device) => break device,
            Err(failure) => failure,
        };
        let text = failure.to_string();
        if text != told {
            error!(device = wanted.id, error = text, "the device cannot be opened: trying again");
            tell(directory, number, &text);
            told = text;
        }
        if matches!(failure, DeviceError::Locked { .. }) {
            thread::sleep(LOCKED_PAUSE);
        } else {
            thread::sleep(pause);
            pause = (pause * 2).min(FAILED_PAUSE_LAST);
        }
    };
    let locked_at = now();
    let (path, kind) = (device.path().display(), device.kind());
    let bytes = device.capacity_bytes();
    info!(device = wanted.id, %path, ?kind, bytes, "the device is locked");
    tell(directory, number, "");
    for region in 0..plan.shards_per_device {
        let shard = NewShard {
            shard: number * plan.shards_per_device + region,
            device_id: wanted.id.clone(),
            device: device.region(region, plan.shards_per_device),
            locked_at,
        };
        let reactor = directory.reactors.of_shard(shard.shard);
        let mut message = ToReactor::Shard(Box::new(shard));
        // A reactor that replays another device's log takes nothing meanwhile.
        while let Err(error) = directory.reactors.0[reactor].post(message) {
            message = match error {
                tercet_reactor::PostError::Full(message) => message,
                tercet_reactor::PostError::Ended(_) => return,
            };
            thread::sleep(LOCKED_PAUSE);
        }
    }
}

fn tell(directory: &Directory, number: u16, message: &str) {
    directory.update_devices(|devices| {
        message.clone_into(&mut devices[usize::from(number)].message);
    });
}

fn to_open(device: &DevicePlan) -> OpenDevice {
    let (place, create_bytes) = match &device.source {
        DeviceSource::File { path, capacity_bytes } => {
            (Place::Path(path.clone()), Some(*capacity_bytes))
        }
        DeviceSource::Block { path } => (Place::Path(path.clone()), None),
        DeviceSource::Nvme { nguid } => (Place::Nguid(*nguid), None),
    };
    let discard = if create_bytes.is_some() { Discard::Keep } else { Discard::Punch };
    OpenDevice { place, create_bytes, discard }
}
