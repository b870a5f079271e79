//! gRPC of `crds/proto/attach.proto` over the [`Attacher`]. Calls that wait run on threads of their
//! own, never on the control thread.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tercet_nvmf::auth::SecretError;
use tercet_nvmf::host::{ENDPOINTS_MAX, HostOptions, PathState};
use tercet_nvmf::log::AnaState;
use tercet_nvmf::names::{is_nqn, parse_volume_nqn};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{AttachError, Attached, Attacher};
use crate::pb::attach as pb;

/// How long an Attach waits when it does not say.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
/// Longest that an Attach may wait.
const TIMEOUT_MAX: Duration = Duration::from_mins(5);

/// See the module.
pub struct Service {
    attacher: Arc<Attacher>,
}

impl Service {
    /// The service over an attacher.
    pub fn new(attacher: Arc<Attacher>) -> Self {
        Self { attacher }
    }
}

fn status(error: &AttachError) -> Status {
    let text = error.to_string();
    match error {
        AttachError::Invalid(_) => Status::invalid_argument(text),
        AttachError::NoPath { .. } => Status::deadline_exceeded(text),
        AttachError::NotAllowed { .. } => Status::permission_denied(text),
        AttachError::InUse { .. } => Status::failed_precondition(text),
        AttachError::Flush { .. } | AttachError::System { .. } => Status::internal(text),
    }
}

fn invalid(text: String) -> Status {
    Status::invalid_argument(text)
}

fn options(request: &pb::AttachRequest) -> Result<HostOptions, Status> {
    if parse_volume_nqn(&request.subsystem_nqn).is_none() {
        return Err(invalid(format!("subsystem_nqn {:?} is no volume's", request.subsystem_nqn)));
    }
    if !is_nqn(&request.host_nqn) {
        return Err(invalid(format!("host_nqn {:?} is no NQN", request.host_nqn)));
    }
    let host_id = Uuid::parse_str(&request.host_id)
        .ok()
        .filter(|id| !id.is_nil())
        .ok_or_else(|| invalid(format!("host_id {:?} is no UUID", request.host_id)))?;
    if request.endpoints.is_empty() || request.endpoints.len() > ENDPOINTS_MAX {
        return Err(invalid(format!("there are 1 to {ENDPOINTS_MAX} endpoints")));
    }
    let mut options =
        HostOptions::new(&request.subsystem_nqn, &request.host_nqn, *host_id.as_bytes());
    for endpoint in &request.endpoints {
        let address: Option<IpAddr> = endpoint.address.parse().ok();
        let port = u16::try_from(endpoint.port).ok().filter(|&port| port != 0);
        let (Some(address), Some(port)) = (address, port) else {
            let text = format!("endpoint {}:{}", endpoint.address, endpoint.port);
            return Err(invalid(format!("{text} is no IP address and port")));
        };
        options.endpoints.push(SocketAddr::new(address, port));
    }
    let secret = |field: &str, text: &Option<String>| {
        let parsed = text.as_deref().map(str::parse).transpose();
        parsed.map_err(|error: SecretError| invalid(format!("{field}: {error}")))
    };
    options.secret = secret("host_secret", &request.host_secret)?;
    options.controller_secret = secret("controller_secret", &request.controller_secret)?;
    Ok(options)
}

/// Runs something that waits on a thread of its own.
async fn apart<T: Send + 'static>(
    act: impl FnOnce() -> Result<T, AttachError> + Send + 'static,
) -> Result<T, Status> {
    let result = tokio::task::spawn_blocking(act).await;
    result.map_err(|error| Status::internal(error.to_string()))?.map_err(|error| status(&error))
}

#[tonic::async_trait]
impl pb::attacher_server::Attacher for Service {
    async fn attach(
        &self,
        request: Request<pb::AttachRequest>,
    ) -> Result<Response<pb::AttachResponse>, Status> {
        let request = request.into_inner();
        let options = options(&request)?;
        let timeout = match request.timeout_ms {
            0 => TIMEOUT_DEFAULT,
            given => TIMEOUT_MAX.min(Duration::from_millis(u64::from(given))),
        };
        let attacher = Arc::clone(&self.attacher);
        let read_only = request.read_only;
        let (device, size_bytes) =
            apart(move || attacher.attach(options, read_only, timeout)).await?;
        let device_path = device.display().to_string();
        Ok(Response::new(pb::AttachResponse { device_path, size_bytes }))
    }

    async fn detach(
        &self,
        request: Request<pb::DetachRequest>,
    ) -> Result<Response<pb::DetachResponse>, Status> {
        let nqn = request.into_inner().subsystem_nqn;
        let attacher = Arc::clone(&self.attacher);
        apart(move || attacher.detach(&nqn)).await?;
        Ok(Response::new(pb::DetachResponse {}))
    }

    async fn list(
        &self,
        _: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        let attached = self.attacher.list().into_iter().map(row).collect();
        Ok(Response::new(pb::ListResponse { attached }))
    }
}

fn row(attached: Attached) -> pb::Attached {
    let paths = attached.status.paths.iter().map(|&(endpoint, state)| pb::Path {
        endpoint: Some(pb::Endpoint {
            address: endpoint.ip().to_string(),
            port: u32::from(endpoint.port()),
        }),
        connected: matches!(state, PathState::Live(_)),
        optimized: state == PathState::Live(AnaState::Optimized),
    });
    pb::Attached {
        subsystem_nqn: attached.nqn,
        device_path: attached.device.display().to_string(),
        size_bytes: attached.size_bytes,
        paths: paths.collect(),
    }
}
