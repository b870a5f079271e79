//! The control protocols as code, generated from `node-daemon/proto` and `crds/proto`.

#![allow(missing_docs, clippy::all, clippy::pedantic)] // generated; documented in the .proto files

/// The agent's control of the engine.
pub mod engine {
    tonic::include_proto!("tercet.engine.v1");
}

/// The csi node's control of the attacher.
pub mod attach {
    tonic::include_proto!("tercet.attach.v1");
}
