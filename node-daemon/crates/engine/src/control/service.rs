//! The calls of the control API.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tercet_proto::disk::CHUNK_BLOCKS;
use tercet_proto::{BLOCK_BYTES, NewReplica, NodeName, ReplicaId, VolumeId};
use tercet_replication::api::{Control, ControlDone, Input, SwapOutcome};
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinSet;
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status};
use tracing::{info, warn};
use uuid::Uuid;

use super::directory::{COMMIT, Directory};
use super::{convert, status};
use crate::core::{HostKeys, ToReactor};
use crate::opener::Opener;
use crate::outbox::{Outbox, SwapId};
use crate::pb::engine as pb;
use crate::plan::{Plan, PlanError};
use crate::state;
use crate::table::Volume;

/// How long volumes may take to be handed over before an orderly stop; a little longer than shards
/// take at most (`Timing::hand_over`, twice).
const HAND_OVER: Duration = Duration::from_secs(5);
/// Bytes of a row of `Storage::chunk_sums`.
const CHUNK_SUM_BYTES: usize = 12;

/// Rows of a chunk map in one answer, but for what its last page has more.
const CHUNK_ROWS: usize = 4032;

/// What the membership may hold of a peer.
const STANDINGS: [&str; 3] = ["Alive", "Suspected", "Dead"];

/// The control API of one engine.
pub struct Service {
    directory: Arc<Directory>,
    outbox: Arc<Outbox>,
    opener: Opener,
    state_dir: PathBuf,
    stop: Arc<Notify>,
    /// Held while a replica is made: where it goes depends on those before it.
    creating: Mutex<()>,
}

impl Service {
    /// Of an engine whose state directory this is; `stop` is told when it shall end.
    pub fn new(
        directory: Arc<Directory>,
        outbox: Arc<Outbox>,
        opener: Opener,
        state_dir: PathBuf,
        stop: Arc<Notify>,
    ) -> Self {
        Self { directory, outbox, opener, state_dir, stop, creating: Mutex::default() }
    }

    /// Carries out a plan: at start the remembered one, later the agent's.
    pub fn carry_out(&self, plan: &Arc<Plan>) -> Result<(), Status> {
        self.directory.set_plan(Arc::clone(plan))?;
        self.opener.open(plan);
        Ok(())
    }

    /// Hands over what this engine leads and gives its leases back, for a bounded time: all shards at
    /// once, each goes on serving until another can.
    pub async fn hand_over_all(&self) {
        let Some(plan) = self.directory.plan() else {
            return;
        };
        let mut shards = JoinSet::new();
        for shard in 0..plan.shards() {
            let directory = Arc::clone(&self.directory);
            shards.spawn(async move {
                let asked = directory.ask_shard(shard, Control::Stop, HAND_OVER).await;
                if let Err(error) = asked {
                    warn!(shard, %error, "not everything was handed over");
                }
            });
        }
        shards.join_all().await;
    }

    /// Hosts' secrets are there before the view that lets the hosts in.
    fn set_keys(&self, volume: VolumeId, keys: &HostKeys) -> Result<(), Status> {
        for reactor in 0..self.directory.reactors.0.len() {
            self.directory.reactors.post(reactor, ToReactor::Keys(volume, keys.clone()))?;
        }
        Ok(())
    }

    /// Replicas whose ids do not name their shard are found by how many shards there are.
    async fn may_add_devices(&self) -> Result<(), Status> {
        let reactors = self.directory.statuses().await?;
        let mut replicas = reactors.iter().flat_map(|reactor| &reactor.replicas);
        match replicas.find(|report| report.status.replica.shard().is_none()) {
            None => Ok(()),
            Some(older) => Err(Status::failed_precondition(format!(
                "devices: replica {} of {} is of a version before replicas named their shard: no \
                 device can be added beside it; move its volume to another node first",
                older.status.replica, older.name
            ))),
        }
    }

    fn configured(&self) -> Result<Arc<Plan>, Status> {
        self.directory.plan().ok_or_else(|| Status::unavailable("not configured yet"))
    }
}

fn plan_refusal(error: &PlanError) -> Status {
    let text = error.to_string();
    match error {
        PlanError::Invalid { .. } => Status::invalid_argument(text),
        PlanError::Contradicts { .. } => Status::failed_precondition(text),
    }
}

fn place(done: &ControlDone) -> Response<pb::PlaceResponse> {
    let ControlDone::Place(place) = done else {
        unreachable!("an entry of the log is answered with its place, not {done:?}")
    };
    Response::new(pb::PlaceResponse { epoch: place.epoch.0, lsn: place.lsn.0 })
}

type Events = Pin<Box<dyn Stream<Item = Result<pb::EngineEvent, Status>> + Send>>;

#[tonic::async_trait]
impl pb::engine_server::Engine for Service {
    type EventsStream = Events;

    async fn configure(
        &self,
        request: Request<pb::ConfigureRequest>,
    ) -> Result<Response<pb::ConfigureResponse>, Status> {
        let request = request.into_inner();
        let current = self.directory.plan();
        let reactors = u16::try_from(self.directory.reactors.0.len()).expect("few reactors");
        let node = self.directory.node.as_str();
        let plan = Plan::check(&request, node, reactors, current.as_deref()).map_err(|error| {
            warn!(%error, "the agent's configuration is refused");
            plan_refusal(&error)
        })?;
        if current.as_deref().is_some_and(|current| plan.adds_devices(current)) {
            self.may_add_devices().await?;
        }
        if current.as_deref() != Some(&plan) {
            state::save(&self.state_dir, &plan).map_err(|e| Status::internal(e.to_string()))?;
            info!(devices = plan.devices.len(), peers = plan.peers.len(), "configured");
            self.carry_out(&Arc::new(plan))?;
        }
        let instance = self.directory.instance.to_string();
        Ok(Response::new(pb::ConfigureResponse { instance }))
    }

    async fn observe_volume(
        &self,
        request: Request<pb::ObserveVolumeRequest>,
    ) -> Result<Response<pb::ObserveVolumeResponse>, Status> {
        let request = request.into_inner();
        self.configured()?;
        let volume = convert::volume(&request.volume)?;
        let view =
            request.view.as_ref().ok_or_else(|| Status::invalid_argument("view: missing"))?;
        let keys = convert::keys(view)?;
        let view = convert::view(view)?;
        self.set_keys(volume, &keys)?;
        // Before the volume's shard hears of it: what comes of it finds every reactor informed.
        self.directory.tell(volume, Volume::of(&view))?;
        self.outbox.view_came(volume, view.fence, view.consistent);
        self.directory.observe(volume, &view)?;
        Ok(Response::new(pb::ObserveVolumeResponse {}))
    }

    async fn create_replica(
        &self,
        request: Request<pb::CreateReplicaRequest>,
    ) -> Result<Response<pb::CreateReplicaResponse>, Status> {
        let request = request.into_inner();
        let volume = convert::volume(&request.volume)?;
        let source = match &request.source {
            Some(_) if request.learner => {
                let why = "source: a learner is copied to, it starts from nothing (M1)";
                return Err(Status::invalid_argument(why));
            }
            Some(source) => Some(convert::source(convert::volume(&source.volume)?, source)?),
            None => None,
        };
        let size_blocks = convert::blocks("size_bytes", request.size_bytes)?;
        let _one_at_a_time = self.creating.lock().await;
        let known = self.directory.home(volume).is_some();
        let from = source.as_ref().map(|source| source.volume);
        let shard = self.directory.make_home(volume, request.size_bytes, from).await?;
        let new = NewReplica {
            volume,
            replica: ReplicaId::on_shard(Uuid::new_v4(), shard),
            name: request.name,
            size_blocks,
            source,
            incomplete: true,
        };
        let control =
            if request.learner { Control::CreateLearner(new) } else { Control::CreateReplica(new) };
        let done = self.directory.ask(volume, control).await;
        if !known && done.as_ref().is_err_and(|error| error.code() == Code::ResourceExhausted) {
            self.directory.unsettle(volume)?; // nothing was made: another shard may have room
        }
        match done? {
            ControlDone::Replica { replica, incomplete } => {
                let replica = replica.to_string();
                Ok(Response::new(pb::CreateReplicaResponse { replica, incomplete }))
            }
            other => unreachable!("a replica's id answers its creation, not {other:?}"),
        }
    }

    async fn delete_replica(
        &self,
        request: Request<pb::DeleteReplicaRequest>,
    ) -> Result<Response<pb::DeleteReplicaResponse>, Status> {
        let request = request.into_inner();
        let volume = convert::volume(&request.volume)?;
        let replica = convert::replica(&request.replica)?;
        // By its id, if that says so: its device may not be open.
        let shard = replica.shard().map_or_else(|| self.directory.shard_of(volume), Ok)?;
        let control = Control::DeleteReplica(volume, replica);
        self.directory.ask_shard(shard, control, COMMIT).await?;
        if self.directory.home(volume).is_none_or(|home| home == shard) {
            self.directory.forget(volume)?;
            self.outbox.forget(volume);
        }
        Ok(Response::new(pb::DeleteReplicaResponse {}))
    }

    async fn create_snapshot(
        &self,
        request: Request<pb::SnapshotRequest>,
    ) -> Result<Response<pb::PlaceResponse>, Status> {
        let request = request.into_inner();
        let volume = convert::volume(&request.volume)?;
        let snapshot = convert::snapshot(&request.snapshot)?;
        let done = self.directory.ask(volume, Control::Snapshot(volume, snapshot)).await?;
        Ok(place(&done))
    }

    async fn delete_snapshot(
        &self,
        request: Request<pb::SnapshotRequest>,
    ) -> Result<Response<pb::PlaceResponse>, Status> {
        let request = request.into_inner();
        let volume = convert::volume(&request.volume)?;
        let snapshot = convert::snapshot(&request.snapshot)?;
        let done = self.directory.ask(volume, Control::SnapshotDelete(volume, snapshot)).await?;
        Ok(place(&done))
    }

    async fn grow(
        &self,
        request: Request<pb::GrowRequest>,
    ) -> Result<Response<pb::PlaceResponse>, Status> {
        let request = request.into_inner();
        let volume = convert::volume(&request.volume)?;
        let size = convert::blocks("size_bytes", request.size_bytes)?;
        let done = self.directory.ask(volume, Control::Grow(volume, size)).await?;
        Ok(place(&done))
    }

    async fn hand_over(
        &self,
        request: Request<pb::HandOverRequest>,
    ) -> Result<Response<pb::HandOverResponse>, Status> {
        let request = request.into_inner();
        let volume = convert::volume(&request.volume)?;
        let to = request.to_node.as_deref().map(NodeName::new);
        self.directory.ask(volume, Control::HandOver(volume, to)).await?;
        Ok(Response::new(pb::HandOverResponse {}))
    }

    async fn chunk_sums(
        &self,
        request: Request<pb::ChunkSumsRequest>,
    ) -> Result<Response<pb::ChunkSumsResponse>, Status> {
        let volume = convert::volume(&request.into_inner().volume)?;
        let done = self.directory.ask(volume, Control::ChunkSums(volume)).await?;
        let ControlDone::ChunkSums(place, pieces) = done else {
            unreachable!("sums answer a request for sums, not {done:?}")
        };
        let rows: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
        let sum = |row: &[u8]| pb::ChunkSum {
            index: u64::from_le_bytes(row[..8].try_into().expect("eight bytes")),
            crc32c: u32::from_le_bytes(row[8..].try_into().expect("four bytes")),
        };
        Ok(Response::new(pb::ChunkSumsResponse {
            epoch: place.epoch.0,
            lsn: place.lsn.0,
            sums: rows.chunks_exact(CHUNK_SUM_BYTES).map(sum).collect(),
            chunk_bytes: CHUNK_BLOCKS as u64 * BLOCK_BYTES as u64,
        }))
    }

    async fn chunk_map(
        &self,
        request: Request<pb::ChunkMapRequest>,
    ) -> Result<Response<pb::ChunkMapResponse>, Status> {
        let request = request.into_inner();
        let volume = convert::volume(&request.volume)?;
        let (device, region, regions) = self.directory.device_of(volume)?;
        let mut answer = pb::ChunkMapResponse {
            chunk_bytes: CHUNK_BLOCKS as u64 * BLOCK_BYTES as u64,
            device,
            region: region.into(),
            regions: regions.into(),
            next_chunk: Some(request.from_chunk),
            ..Default::default()
        };
        while let Some(from) = answer.next_chunk.take() {
            let done = self.directory.ask(volume, Control::ChunkMap(volume, from)).await?;
            let ControlDone::ChunkMap(place, page) = done else {
                unreachable!("rows answer a request for rows, not {done:?}")
            };
            if answer.rows.is_empty() {
                (answer.epoch, answer.lsn) = (place.epoch.0, place.lsn.0);
            }
            answer.rows.extend(page.rows.iter().map(convert::chunk_row));
            answer.next_chunk = page.next;
            if answer.rows.len() >= CHUNK_ROWS {
                break;
            }
        }
        Ok(Response::new(answer))
    }

    async fn events(
        &self,
        _: Request<pb::EventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let outbox = Arc::clone(&self.outbox);
        let subscription = outbox.subscribe();
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            while let Some(request) = outbox.next(subscription).await {
                if sender.send(Ok(status::event(request))).await.is_err() {
                    return;
                }
            }
            let ended = Status::cancelled("a newer subscriber has come");
            // It may be gone already, which is as well.
            let _ = sender.send(Err(ended)).await;
        });
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn report_swap(
        &self,
        request: Request<pb::ReportSwapRequest>,
    ) -> Result<Response<pb::ReportSwapResponse>, Status> {
        let request = request.into_inner();
        let id = SwapId::from_wire(request.token);
        let outcome = convert::outcome(&request)?;
        // A swap that was answered before, or asked by an instance that is dead: idempotent.
        if let Some(volume) = self.outbox.swap_volume(id) {
            if let Some(view) = &request.view {
                self.set_keys(volume, &convert::keys(view)?)?;
            }
            if let SwapOutcome::Swapped(view) | SwapOutcome::Lost(view) = &outcome {
                self.directory.tell(volume, Volume::of(view))?; // as in `observe_volume`
            }
            self.directory.input(id.shard, Input::Swapped(id.token, outcome))?;
            self.outbox.swap_answered(id);
        }
        Ok(Response::new(pb::ReportSwapResponse {}))
    }

    async fn observe_peers(
        &self,
        request: Request<pb::ObservePeersRequest>,
    ) -> Result<Response<pb::ObservePeersResponse>, Status> {
        let peers = request.into_inner().peers;
        if let Some(peer) = peers.iter().find(|p| !STANDINGS.contains(&p.standing.as_str())) {
            let said = format!("{}: {:?} is not one of {STANDINGS:?}", peer.node, peer.standing);
            return Err(Status::invalid_argument(said));
        }
        self.directory.set_standings(peers.into_iter().map(|p| (p.node, p.standing)).collect());
        Ok(Response::new(pb::ObservePeersResponse {}))
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        let reactors = self.directory.statuses().await?;
        Ok(Response::new(status::response(&self.directory, &reactors)))
    }

    async fn stop(
        &self,
        _: Request<pb::StopRequest>,
    ) -> Result<Response<pb::StopResponse>, Status> {
        self.hand_over_all().await;
        self.stop.notify_one();
        Ok(Response::new(pb::StopResponse {}))
    }
}
