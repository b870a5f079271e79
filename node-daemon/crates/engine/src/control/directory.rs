//! How the control thread reaches reactors and shards.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tercet_noderep::{NodeReplicated, Options, Replica};
use tercet_proto::{InstanceId, NodeName, VolumeId};
use tercet_reactor::{PostError, Postbox};
use tercet_replication::api::{Control, ControlDone, Input, VolumeView};
use tokio::sync::oneshot;
use tonic::Status;

use super::placement::{self, Room};
use super::{convert, status};
use crate::core::{ReactorStatus, ShardReport, ToReactor};
use crate::herald::Herald;
use crate::opener::{DeviceState, OPENING};
use crate::plan::Plan;
use crate::table::{Change, Table, Volume};

/// How long a reactor may take for an answer of its own.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a request may take that has to become durable or committed.
pub(super) const COMMIT: Duration = Duration::from_secs(30);

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

    /// The one that listens, and keeps the hosts of the discovery subsystem.
    fn first(&self) -> &[Postbox<ToReactor>] {
        &self.0[..1]
    }

    /// Ends the wait of some. One whose mailbox is full is not asleep: it looks at the table before
    /// its next message.
    fn wake(some: &[Postbox<ToReactor>]) -> Result<(), Status> {
        for postbox in some {
            if let Err(PostError::Ended(_)) = postbox.post(ToReactor::Look) {
                return Err(Status::unavailable("the engine is ending"));
            }
        }
        Ok(())
    }

    /// The reactor that has a shard.
    pub fn of_shard(&self, shard: u16) -> usize {
        usize::from(shard) % self.0.len()
    }
}

fn change(table: &mut Replica<Table>, change: Change) -> Result<(), Status> {
    table.write(change).map_err(|error| {
        tracing::error!(%error, "the node's table cannot be changed");
        Status::unavailable(format!("the node's table: {error}"))
    })
}

/// Who this engine is and where what is; shared by control, opener and reactors at start.
pub struct Directory {
    /// This node.
    pub node: NodeName,
    /// This start.
    pub instance: InstanceId,
    /// Instances of this node that have ended, as its parent has seen (rule L5).
    pub proven_exits: Vec<InstanceId>,
    /// Tells the peers of these, and of the one that the superblocks name.
    pub herald: Herald,
    /// The reactors.
    pub reactors: Reactors,
    table: NodeReplicated<Table>,
    /// The replica of all threads that are no reactor; no reactor takes this lock.
    own: Mutex<Replica<Table>>,
    devices: Mutex<Vec<DeviceState>>,
    standings: Mutex<BTreeMap<String, String>>,
}

impl Directory {
    /// Of an engine that is told nothing yet.
    pub fn new(
        node: NodeName,
        instance: InstanceId,
        proven_exits: Vec<InstanceId>,
        herald: Herald,
        reactors: Reactors,
    ) -> Self {
        let table = NodeReplicated::new(Table::default(), Options::default());
        let own = Mutex::new(table.replica("control"));
        let (devices, standings) = (Mutex::default(), Mutex::default());
        Self { node, instance, proven_exits, herald, reactors, table, own, devices, standings }
    }

    /// A reactor's own replica of the table.
    pub fn table_for(&self, reactor: usize) -> Replica<Table> {
        self.table.replica(&format!("reactor-{reactor}"))
    }

    fn own<R>(&self, work: impl FnOnce(&mut Replica<Table>) -> R) -> R {
        work(&mut self.own.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the engine was told, if it was.
    pub fn plan(&self) -> Option<Arc<Plan>> {
        self.own(|table| table.latest().plan().cloned())
    }

    /// It is told this now. Every reactor sees it before anything that is posted or done after
    /// this call; one that sleeps is woken, for what it has to do of its own accord.
    pub fn set_plan(&self, plan: Arc<Plan>) -> Result<(), Status> {
        self.own(|table| change(table, Change::Plan(plan)))?;
        Reactors::wake(&self.reactors.0)
    }

    /// The agent tells of a volume; as `set_plan`.
    pub fn tell(&self, volume: VolumeId, told: Volume) -> Result<(), Status> {
        let told = Arc::new(told);
        let discovery_changed = self.own(|table| {
            if !table.latest().would_change(volume, &told) {
                return Ok(false);
            }
            let before = table.held().versions();
            change(table, Change::Volume(volume, told))?;
            Ok::<_, Status>(table.latest().versions() != before)
        })?;
        if discovery_changed { Reactors::wake(self.reactors.first()) } else { Ok(()) }
    }

    /// The volume has no replica here any more.
    pub fn forget(&self, volume: VolumeId) -> Result<(), Status> {
        self.own(|table| change(table, Change::Forget(volume)))?;
        Reactors::wake(self.reactors.first())
    }

    /// What is known of the devices.
    pub fn devices(&self) -> Vec<DeviceState> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what is known of the devices.
    pub fn update_devices(&self, change: impl FnOnce(&mut Vec<DeviceState>)) {
        change(&mut self.devices.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What the membership holds of peers by node: for Status, a hint for people.
    pub fn set_standings(&self, standings: BTreeMap<String, String>) {
        *self.standings.lock().unwrap_or_else(PoisonError::into_inner) = standings;
    }

    /// What it holds of one; empty: nothing.
    pub fn standing(&self, node: &str) -> String {
        let standings = self.standings.lock().unwrap_or_else(PoisonError::into_inner);
        standings.get(node).cloned().unwrap_or_default()
    }

    /// The shard of a volume; UNAVAILABLE while the engine has been told nothing.
    pub fn shard_of(&self, volume: VolumeId) -> Result<u16, Status> {
        let shard = self.own(|table| table.read(volume));
        shard.ok_or_else(|| Status::unavailable("not configured yet"))
    }

    /// The shard that has a volume's replica, or has been chosen for it.
    pub fn home(&self, volume: VolumeId) -> Option<u16> {
        self.own(|table| table.latest().home(volume))
    }

    /// From now on the volume's replica is looked for on this shard; false: another one has it.
    pub fn settle(&self, volume: VolumeId, shard: u16) -> Result<bool, Status> {
        self.own(|table| {
            change(table, Change::Home(volume, shard))?;
            Ok(table.latest().home(volume) == Some(shard))
        })
    }

    /// The volume's replica was not made.
    pub fn unsettle(&self, volume: VolumeId) -> Result<(), Status> {
        self.own(|table| change(table, Change::NoHome(volume)))
    }

    /// Where a volume's replica lies: the device's name, and which of its regions of how many.
    pub fn device_of(&self, volume: VolumeId) -> Result<(String, u16, u16), Status> {
        let plan = self.plan().ok_or_else(|| Status::unavailable("not configured yet"))?;
        let (shard, regions) = (self.shard_of(volume)?, plan.shards_per_device);
        let device = &plan.devices[usize::from(shard / regions)];
        Ok((device.id.clone(), shard % regions, regions))
    }

    /// Hands an input to a shard.
    pub fn input(&self, shard: u16, input: Input) -> Result<(), Status> {
        self.reactors.post(self.reactors.of_shard(shard), ToReactor::Input(shard, Box::new(input)))
    }

    /// Shows a view of the volume to the shard that has its replica; to all while none is known to
    /// have it (a device may be opened later): those that have none take no notice.
    pub fn observe(&self, volume: VolumeId, view: &VolumeView) -> Result<(), Status> {
        let plan = self.plan().ok_or_else(|| Status::unavailable("not configured yet"))?;
        let shards = self.home(volume).map_or(0..plan.shards(), |home| home..home + 1);
        for shard in shards {
            self.input(shard, Input::Observe(volume, view.clone()))?;
        }
        Ok(())
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

    /// The shard for a new replica of the volume, and from now on its home: the source's, whose
    /// chunks a clone shares (S3), else the one with the most room.
    pub async fn make_home(
        &self,
        volume: VolumeId,
        size_bytes: u64,
        source: Option<VolumeId>,
    ) -> Result<u16, Status> {
        let chosen = match (self.home(volume), source) {
            (Some(home), _) => home,
            (None, Some(source)) => self.home(source).ok_or_else(|| {
                Status::not_found(format!("no replica of the source, volume {source}, is here"))
            })?,
            (None, None) => self.choose(volume, size_bytes).await?,
        };
        if self.settle(volume, chosen)? {
            Ok(chosen)
        } else {
            Err(Status::aborted("a replica of the volume came to light elsewhere: ask again"))
        }
    }

    async fn choose(&self, volume: VolumeId, size_bytes: u64) -> Result<u16, Status> {
        let reactors = self.statuses().await?;
        // The volume may have a replica on a device that is not open yet: locked or not, replayed or
        // not, as Status says it.
        let devices = status::devices(self, &reactors);
        if let Some(device) = devices.iter().find(|device| device.message == OPENING) {
            return Err(Status::unavailable(format!("device {} is being opened", device.id)));
        }
        let shards = reactors.iter().flat_map(|reactor| &reactor.shards);
        let open = shards.filter(|shard| shard.failed.is_none());
        let rooms: Vec<Room> = open.map(ShardReport::room).collect();
        placement::choose(&rooms, volume, size_bytes)
            .ok_or_else(|| Status::unavailable("no device is open: see the devices of Status"))
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
