//! The control API: gRPC on a Unix socket, on a thread of its own.
//!
//! It turns calls into messages for reactors and waits for their answers, always with a bound; it
//! decides nothing. A reactor that is busy costs the agent a wait and nobody else anything.

pub mod convert;
mod directory;
pub mod placement;
mod service;
mod status;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tracing::info;

pub use directory::{Directory, Reactors};
pub use service::Service;

use crate::pb::engine::engine_server::EngineServer;

/// Largest message that the agent may send.
const REQUEST_BYTES_MAX: usize = 4 << 20;
/// Largest answer: the checksums of a large volume.
const RESPONSE_BYTES_MAX: usize = 256 << 20;
/// Of the socket: for its owner and its group.
const SOCKET_MODE: u32 = 0o660;

/// Serves the control API until `stop` is done. A socket that a dead engine left is replaced; who
/// else could listen there has no lock of the state directory.
pub async fn serve(
    socket: &Path,
    service: Arc<Service>,
    stop: impl Future<Output = ()>,
) -> std::io::Result<()> {
    let listener = listen(socket)?;
    info!(socket = %socket.display(), "the control API is there");
    let server = EngineServer::from_arc(service)
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(RESPONSE_BYTES_MAX);
    Server::builder()
        .add_service(server)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
        .await
        .map_err(std::io::Error::other)
}

/// Who is in the folder's group may connect: the agent need not be root.
fn listen(socket: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, Permissions::from_mode(SOCKET_MODE))?;
    Ok(listener)
}
