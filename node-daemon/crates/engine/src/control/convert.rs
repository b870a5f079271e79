//! Between the control API's messages and the types of the crates below. What cannot be converted
//! is `INVALID_ARGUMENT`, with the field's name.

use std::collections::BTreeMap;

use tercet_nvmf::auth::Secret;
use tercet_nvmf::target::Keys;
use tercet_proto::StorageError;
use tercet_proto::{
    BLOCK_BYTES, ChunkRow, Config, ConfigState, Epoch, InstanceId, Lsn, Member, NodeName, Place,
    Primary, ReplicaId, SnapshotId, Source, VolumeId,
};
use tercet_replication::api::{Attachment, ControlError, Replacement, SwapOutcome, VolumeView};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::core::HostKeys;
use crate::pb::engine as pb;

/// Largest volume: 2^44 bytes.
const VOLUME_BYTES_MAX: u64 = 1 << 44;

fn bad(field: &str, why: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {why}"))
}

fn uuid(field: &str, text: &str) -> Result<Uuid, Status> {
    Uuid::parse_str(text).map_err(|_| bad(field, format!("{text:?} is no UUID")))
}

/// A volume's id.
pub fn volume(text: &str) -> Result<VolumeId, Status> {
    uuid("volume", text).map(VolumeId)
}

/// A replica's id.
pub fn replica(text: &str) -> Result<ReplicaId, Status> {
    uuid("replica", text).map(ReplicaId)
}

/// A snapshot's id.
pub fn snapshot(text: &str) -> Result<SnapshotId, Status> {
    uuid("snapshot", text).map(SnapshotId)
}

/// What a clone starts from.
pub fn source(volume: VolumeId, source: &pb::CloneSource) -> Result<Source, Status> {
    let place = Place { epoch: Epoch(source.epoch), lsn: Lsn(source.lsn) };
    if place.epoch.0 == 0 || place.lsn.0 == 0 {
        return Err(bad("source", "epoch and lsn of the snapshot are missing"));
    }
    Ok(Source { volume, snapshot: snapshot(&source.snapshot)?, place })
}

/// A size in blocks.
pub fn blocks(field: &str, bytes: u64) -> Result<u64, Status> {
    if bytes == 0 || bytes > VOLUME_BYTES_MAX || !bytes.is_multiple_of(BLOCK_BYTES as u64) {
        let why = format!("{bytes}: a multiple of {BLOCK_BYTES}, at most {VOLUME_BYTES_MAX}");
        return Err(bad(field, why));
    }
    Ok(bytes / BLOCK_BYTES as u64)
}

fn member(field: &str, member: &pb::Member) -> Result<Member, Status> {
    if member.node.is_empty() {
        return Err(bad(field, "a member has a node"));
    }
    let replica = ReplicaId(uuid(field, &member.replica)?);
    Ok(Member { node: NodeName::new(&member.node), replica })
}

fn members(field: &str, members: &[pb::Member]) -> Result<Vec<Member>, Status> {
    members.iter().map(|one| member(field, one)).collect()
}

/// A configuration.
pub fn config(config: &pb::Config) -> Result<Config, Status> {
    let state = match config.state() {
        pb::config::State::Recovering => ConfigState::Recovering,
        pb::config::State::Active => ConfigState::Active,
        pb::config::State::Unspecified => return Err(bad("config.state", "missing")),
    };
    let primary = config.primary.as_ref().ok_or_else(|| bad("config.primary", "missing"))?;
    let previous = members("config.previous_members", &config.previous_members)?;
    let single = config.single_copy.as_deref();
    Ok(Config {
        epoch: Epoch(config.epoch),
        state,
        primary: Primary {
            node: NodeName::new(&primary.node),
            instance: InstanceId(uuid("config.primary.instance", &primary.instance)?),
        },
        members: members("config.members", &config.members)?,
        previous_members: (!previous.is_empty()).then_some(previous),
        learners: members("config.learners", &config.learners)?,
        single_copy: single
            .map(|text| uuid("config.single_copy", text))
            .transpose()?
            .map(ReplicaId),
        restored: config.restored.map(Epoch),
    })
}

/// A configuration for the agent.
pub fn config_to_pb(config: &Config) -> pb::Config {
    let members = |members: &[Member]| {
        let one = |member: &Member| pb::Member {
            node: member.node.to_string(),
            replica: member.replica.to_string(),
        };
        members.iter().map(one).collect()
    };
    let state = match config.state {
        ConfigState::Recovering => pb::config::State::Recovering,
        ConfigState::Active => pb::config::State::Active,
    };
    pb::Config {
        epoch: config.epoch.0,
        state: state.into(),
        primary: Some(pb::Primary {
            node: config.primary.node.to_string(),
            instance: config.primary.instance.to_string(),
        }),
        members: members(&config.members),
        previous_members: members(config.previous()),
        learners: members(&config.learners),
        single_copy: config.single_copy.map(|replica| replica.to_string()),
        restored: config.restored.map(|epoch| epoch.0),
    }
}

fn replacement(wanted: &pb::Replacement) -> Result<Replacement, Status> {
    let learner = wanted.learner.as_ref();
    let learner = learner.ok_or_else(|| bad("view.replacement.learner", "missing"))?;
    Ok(Replacement {
        old: ReplicaId(uuid("view.replacement.old", &wanted.old)?),
        learner: member("view.replacement.learner", learner)?,
    })
}

/// What the agent saw of a Volume object.
pub fn view(view: &pb::VolumeView) -> Result<VolumeView, Status> {
    let attachment = |attachment: &pb::Attachment| Attachment {
        host_nqn: attachment.host_nqn.clone(),
        read_only: attachment.read_only,
    };
    Ok(VolumeView {
        config: view.config.as_ref().map(config).transpose()?,
        attachments: view.attachments.iter().map(attachment).collect(),
        size_blocks: blocks("view.size_bytes", view.size_bytes)?,
        fence: view.fence.map(|fence| (Epoch(fence.epoch), fence.generation)),
        generation: view.generation,
        replacement: view.replacement.as_ref().map(replacement).transpose()?,
        consistent: view.consistent,
    })
}

/// The secrets that come with the attachments.
pub fn keys(view: &pb::VolumeView) -> Result<HostKeys, Status> {
    let secret = |field: &str, text: &str| {
        let wrong = |error| Status::invalid_argument(format!("view.attachments.{field}: {error}"));
        text.parse::<Secret>().map_err(wrong)
    };
    let mut keys = BTreeMap::new();
    for attachment in &view.attachments {
        let host = attachment.host_secret.as_deref().map(|text| secret("host_secret", text));
        let controller =
            attachment.controller_secret.as_deref().map(|text| secret("controller_secret", text));
        match (host.transpose()?, controller.transpose()?) {
            (Some(host), controller) => {
                keys.insert(attachment.host_nqn.clone(), Keys { host, controller });
            }
            (None, Some(_)) => {
                return Err(Status::invalid_argument(
                    "view.attachments.controller_secret: needs a host_secret beside it",
                ));
            }
            (None, None) => {}
        }
    }
    let epoch = view.config.as_ref().map_or(0, |config| config.epoch);
    Ok(HostKeys { as_of: (epoch, view.generation), keys })
}

/// A row of a chunk map.
pub fn chunk_row(row: &ChunkRow) -> pb::ChunkRow {
    let bytes = |blocks: u32| u64::from(blocks) * BLOCK_BYTES as u64;
    pb::ChunkRow {
        chunk: row.chunk,
        mapped_bytes: bytes(row.mapped_blocks),
        shared_bytes: bytes(row.shared_blocks),
        extents: row.extents,
        device_offset_bytes: bytes(row.device_block),
        changed_epoch: row.changed.epoch.0,
        changed_lsn: row.changed.lsn.0,
    }
}

/// How a swap ended.
pub fn outcome(request: &pb::ReportSwapRequest) -> Result<SwapOutcome, Status> {
    use pb::report_swap_request::Outcome;
    let seen = || {
        let missing = || bad("view", "an answered swap comes with the object");
        view(request.view.as_ref().ok_or_else(missing)?)
    };
    match request.outcome() {
        Outcome::Swapped => seen().map(SwapOutcome::Swapped),
        Outcome::Lost => seen().map(SwapOutcome::Lost),
        Outcome::Unknown => Ok(SwapOutcome::Unknown),
        Outcome::Unspecified => Err(bad("outcome", "missing")),
    }
}

/// Why a request of the agent's was refused.
pub fn refusal(error: &ControlError) -> Status {
    let code = match error {
        ControlError::NotPrimary(_) | ControlError::NotHandedOver { .. } => {
            Code::FailedPrecondition
        }
        ControlError::Interrupted(_) => Code::Aborted,
        ControlError::Shrink { .. } => Code::InvalidArgument,
        ControlError::Storage(error) => match error {
            StorageError::NoReplica(_) | StorageError::NoSnapshot(..) => Code::NotFound,
            StorageError::Exists(_) => Code::AlreadyExists,
            StorageError::NoSpace { .. } => Code::ResourceExhausted,
            StorageError::Busy | StorageError::Device(_) => Code::Unavailable,
            StorageError::OtherVersion(_) => Code::FailedPrecondition,
            StorageError::Checksum { .. } => Code::DataLoss,
        },
    };
    Status::new(code, error.to_string())
}
