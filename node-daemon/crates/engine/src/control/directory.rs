//! How the control thread reaches reactors and shards.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tercet_proto::{InstanceId, NodeName, VolumeId};
use tercet_reactor::{PostError, Postbox};
use tercet_replication::api::{Control, ControlDone, Input};
use tokio::sync::oneshot;
use tonic::Status;

use super::convert;
use crate::core::{ReactorStatus, ToReactor};
use crate::opener::DeviceState;
use crate::plan::Plan;

/// How long a reactor may take for an answer of its own.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a request may take that has to become durable or committed.
const COMMIT: Duration = Duration::from_secs(30);

/// The postboxes of all reactors, in order.
#[derive(Clone)]
pub struct Reactors(pub Arc<[Postbox<ToReactor>]>);

impl Reactors {
    /// Posts to one.
    pub fn post(&self, reactor: usize, message: ToReactor) -> Result<(), Status> {
        self.0[reactor].post(message).map_err(|error| match error {
            PostError::Full(_) => Status::unavailable("the engine is busy: ask again"),
            PostError::Ended(_) => Status::unavailable("the engine is ending"),
        })
    }

    /// The reactor that has a shard.
    pub fn of_shard(&self, shard: u16) -> usize {
        usize::from(shard) % self.0.len()
    }
}

/// Who this engine is and where what is; shared by control, opener and reactors at start.
pub struct Directory {
    /// This node.
    pub node: NodeName,
    /// This start.
    pub instance: InstanceId,
    /// Instances of this node that have ended, as its parent has seen (rule L5).
    pub proven_exits: Vec<InstanceId>,
    /// The reactors.
    pub reactors: Reactors,
    plan: Mutex<Option<Arc<Plan>>>,
    devices: Mutex<Vec<DeviceState>>,
}

impl Directory {
    /// Of an engine that is told nothing yet.
    pub fn new(
        node: NodeName,
        instance: InstanceId,
        proven_exits: Vec<InstanceId>,
        reactors: Reactors,
    ) -> Self {
        let (plan, devices) = (Mutex::default(), Mutex::default());
        Self { node, instance, proven_exits, reactors, plan, devices }
    }

    /// What the engine was told, if it was.
    pub fn plan(&self) -> Option<Arc<Plan>> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// It is told this now.
    pub fn set_plan(&self, plan: Arc<Plan>) {
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan);
    }

    /// What is known of the devices.
    pub fn devices(&self) -> Vec<DeviceState> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what is known of the devices.
    pub fn update_devices(&self, change: impl FnOnce(&mut Vec<DeviceState>)) {
        change(&mut self.devices.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The shard of a volume; UNAVAILABLE while the engine has been told nothing.
    pub fn shard_of(&self, volume: VolumeId) -> Result<u16, Status> {
        let plan = self.plan().ok_or_else(|| Status::unavailable("not configured yet"))?;
        Ok(volume.shard(plan.shards()))
    }

    /// Hands an input to the volume's shard.
    pub fn input(&self, volume: VolumeId, input: Input) -> Result<(), Status> {
        let shard = self.shard_of(volume)?;
        self.reactors.post(self.reactors.of_shard(shard), ToReactor::Input(shard, Box::new(input)))
    }

    /// Asks the volume's shard and waits for the answer.
    pub async fn ask(&self, volume: VolumeId, control: Control) -> Result<ControlDone, Status> {
        let shard = self.shard_of(volume)?;
        self.ask_shard(shard, control, COMMIT).await
    }

    /// Asks a shard and waits for the answer.
    pub async fn ask_shard(
        &self,
        shard: u16,
        control: Control,
        patience: Duration,
    ) -> Result<ControlDone, Status> {
        let (sender, receiver) = oneshot::channel();
        let message = ToReactor::Control(shard, control, sender);
        self.reactors.post(self.reactors.of_shard(shard), message)?;
        match tokio::time::timeout(patience, receiver).await {
            Ok(Ok(Ok(done))) => Ok(done),
            Ok(Ok(Err(error))) => Err(convert::refusal(&error)),
            Ok(Err(_)) => Err(Status::unavailable(format!("shard {shard} is not there"))),
            Err(_) => Err(Status::aborted("not done in time, the outcome is unknown: ask again")),
        }
    }

    /// The status of every reactor.
    pub async fn statuses(&self) -> Result<Vec<ReactorStatus>, Status> {
        let mut all = Vec::new();
        for reactor in 0..self.reactors.0.len() {
            let (sender, receiver) = oneshot::channel();
            self.reactors.post(reactor, ToReactor::Status(sender))?;
            match tokio::time::timeout(ANSWER, receiver).await {
                Ok(Ok(status)) => all.push(status),
                _ => return Err(Status::unavailable("a reactor does not answer: ask again")),
            }
        }
        Ok(all)
    }
}
