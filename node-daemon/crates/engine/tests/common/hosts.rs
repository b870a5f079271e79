//! A host's user beside the agents: blocks that say what they are.

use std::sync::Arc;

use bytes::Bytes;
use tercet_engine::host::{Host, HostOptions, Operation};
use tercet_nvmf::names::volume_nqn;
use tercet_proto::{BLOCK_BYTES, BlockRange, VolumeId};
use uuid::Uuid;

use super::{Cluster, PATIENCE, blocking};

pub const HOST: &str = "nqn.2026-11.io.tercet:host:test";

pub async fn attach(cluster: &Cluster, volume: Uuid) -> Arc<Host> {
    let mut options = HostOptions::new(&volume_nqn(VolumeId(volume)), HOST, [7; 16]);
    options.endpoints = cluster.paths();
    let host = Arc::new(Host::connect(options).expect("a host"));
    let waiting = Arc::clone(&host);
    let ready = blocking(move || waiting.wait_ready(PATIENCE)).await;
    assert!(ready.is_some(), "no path is usable: {:?} {}", host.status(), cluster.logs());
    host
}

/// Runs what a host's user does beside the agents.
pub async fn with_host<T: Send + 'static>(
    host: &Arc<Host>,
    work: impl FnOnce(&Host) -> T + Send + 'static,
) -> T {
    let host = Arc::clone(host);
    blocking(move || work(&host)).await
}

pub fn range(start: u64, count: u32) -> BlockRange {
    BlockRange { start, count }
}

/// A block that says what it is.
pub fn stamp(block: u64, round: u64) -> Bytes {
    let mut bytes = vec![0; BLOCK_BYTES];
    for (index, piece) in (0_u64..).zip(bytes.chunks_exact_mut(8)) {
        piece.copy_from_slice(&(block ^ (round << 32) ^ (index << 48)).to_le_bytes());
    }
    Bytes::from(bytes)
}

pub fn write(host: &Host, block: u64, round: u64) {
    host.run(Operation::Write(range(block, 1), stamp(block, round))).expect("written");
}

pub fn check(host: &Host, block: u64, round: u64) {
    let pieces = host.run(Operation::Read(range(block, 1))).expect("read");
    let bytes: Vec<u8> = pieces.concat();
    assert!(bytes == stamp(block, round), "block {block} is not that of round {round}");
}
