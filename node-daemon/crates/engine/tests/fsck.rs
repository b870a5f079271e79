//! `tercet-engine fsck` on devices that real engines wrote: refused while an engine runs, whole after
//! it was killed, and a flipped bit is named.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Cluster, blocking};
use tercet_engine::host::{Host, HostOptions, Operation};
use tercet_nvmf::names::volume_nqn;
use tercet_proto::{BLOCK_BYTES, BlockRange, VolumeId};

const HOST: &str = "nqn.2026-11.io.tercet:host:test";
const BLOCKS: u32 = 32;

fn fsck(device: &Path, output: &str) -> Output {
    let engine = env!("CARGO_BIN_EXE_tercet-engine");
    let run = Command::new(engine).args(["fsck", "-o", output]).arg(device).output();
    run.expect("the engine's own binary runs")
}

/// An engine that was killed holds its device until its last operation has ended (R3).
fn fsck_when_free(device: &Path, output: &str) -> Output {
    let start = Instant::now();
    loop {
        let done = fsck(device, output);
        if done.status.code() != Some(8) || start.elapsed() > common::PATIENCE {
            return done;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// 32 blocks, each full of its number.
fn payload() -> Bytes {
    (0..BLOCKS).flat_map(|block| vec![block as u8 + 100; BLOCK_BYTES]).collect()
}

fn flip_last_block_of_payload(device: &Path) {
    let file = File::options().read(true).write(true).open(device).expect("the device");
    let wanted = vec![BLOCKS as u8 + 99; BLOCK_BYTES];
    let mut block = vec![0; BLOCK_BYTES];
    let mut at = 0;
    while file.read_exact_at(&mut block, at).is_ok() {
        if block == wanted {
            file.write_all_at(b"rot", at + 99).expect("written");
            return;
        }
        at += BLOCK_BYTES as u64;
    }
    panic!("the payload is not on {}", device.display());
}

#[tokio::test]
async fn a_killed_engines_device_is_whole_until_a_bit_rots() {
    let mut cluster = Cluster::start("fsck");
    let volume = cluster.create_volume(64 << 20, HOST).await;
    let primary = cluster.wait_serving(volume, None).await;
    let mut options = HostOptions::new(&volume_nqn(VolumeId(volume)), HOST, [7; 16]);
    options.endpoints = cluster.paths();
    let host = Arc::new(Host::connect(options).expect("a host"));
    blocking(move || {
        host.wait_ready(Duration::from_secs(20)).expect("a usable path");
        let range = BlockRange { start: 64, count: BLOCKS };
        host.run(Operation::Write(range, payload())).expect("written");
        // The next record's mark covers the first one's extents: from now on what rots there is
        // damage and not the torn end of a log (R1).
        let next = BlockRange { start: 0, count: 1 };
        let block = Bytes::from(vec![1; BLOCK_BYTES]);
        host.run(Operation::Write(next, block)).expect("written");
    })
    .await;

    let device = cluster.nodes[primary].dir.join("device");
    let busy = fsck(&device, "table");
    let said = String::from_utf8_lossy(&busy.stderr).into_owned();
    assert_eq!(busy.status.code(), Some(8), "{said}");
    assert!(said.contains("in use by an engine"), "{said}");

    let killed = &mut cluster.nodes[primary].supervisor;
    killed.kill().expect("killed, and its engine with it");
    killed.wait().expect("reaped");
    let whole = fsck_when_free(&device, "json");
    let said = String::from_utf8_lossy(&whole.stdout).into_owned();
    assert_eq!(whole.status.code(), Some(0), "{said}");
    let told: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let store = &told["stores"][0]["store"];
    assert_eq!(store["contents"]["replicas"][0]["volume"], volume.to_string());
    assert!(store["blocks_checked"].as_u64() >= Some(u64::from(BLOCKS)), "{said}");

    flip_last_block_of_payload(&device);
    let rotten = fsck(&device, "table");
    let said = String::from_utf8_lossy(&rotten.stdout).into_owned();
    assert_eq!(rotten.status.code(), Some(4), "{said}");
    assert!(said.contains("DAMAGED") && said.contains("wrong checksum"), "{said}");
    assert!(said.contains(&format!("PROBLEM  volume {volume}")), "{said}");

    let nothing = fsck(&cluster.dir.join("nowhere"), "table");
    assert_eq!(nothing.status.code(), Some(8));
}
