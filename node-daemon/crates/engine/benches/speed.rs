//! What one volume on three engines gives a host in this process: to look for silly stalls (a
//! delayed acknowledgement, a timer's granularity, a wake-up too many). Prints; judges nothing.
//! The numbers that count, beside their floors, are those of `make bench`.
//!
//! `cargo bench -p tercet-engine --bench speed`

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Cluster, blocking};
use tercet_engine::host::{Driver, HostOptions, Operation, OperationId};
use tercet_nvmf::names::volume_nqn;
use tercet_proto::{BLOCK_BYTES, BlockRange, VolumeId};
use uuid::Uuid;

const HOST: &str = "nqn.2026-11.io.tercet:host:speed";
const MIB: u64 = 1 << 20;
/// Blocks of the volume that are used.
const BLOCKS: u64 = 8192;
const TIME: Duration = Duration::from_secs(2);

fn driver(paths: Vec<std::net::SocketAddr>, volume: Uuid) -> Driver {
    let mut options = HostOptions::new(&volume_nqn(VolumeId(volume)), HOST, [9; 16]);
    options.endpoints = paths;
    let mut driver = Driver::new(options, Duration::from_micros(50), 1).expect("a driver");
    let begun = Instant::now();
    while driver.geometry().is_none() {
        assert!(begun.elapsed() < common::PATIENCE, "no path is usable");
        driver.turn(Some(tercet_engine::host::now() + Duration::from_millis(10))).expect("a turn");
    }
    driver
}

/// Keeps `depth` operations under way; what each took, in order of size, and operations per second.
fn run(
    driver: &mut Driver,
    depth: usize,
    mut next: impl FnMut(u64) -> Operation,
) -> (Vec<Duration>, f64) {
    let mut begun = std::collections::HashMap::new();
    let (mut number, mut taken) = (0, Vec::new());
    let start = Instant::now();
    while start.elapsed() < TIME {
        while begun.len() < depth {
            begun.insert(number, Instant::now());
            driver.submit(OperationId(number), next(number)).expect("taken");
            number += 1;
        }
        driver.turn(None).expect("a turn");
        for (id, result) in std::mem::take(&mut driver.finished) {
            result.expect("no operation fails");
            taken.push(begun.remove(&id.0).expect("each ends once").elapsed());
        }
    }
    while !begun.is_empty() {
        driver.turn(None).expect("a turn");
        for (id, _) in std::mem::take(&mut driver.finished) {
            begun.remove(&id.0);
        }
    }
    taken.sort();
    let rate = taken.len() as f64 / TIME.as_secs_f64();
    (taken, rate)
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(measure());
}

async fn measure() {
    let cluster = Cluster::start("speed");
    let volume = cluster.create_volume(64 * MIB, HOST).await;
    cluster.wait_serving(volume, None).await;
    let paths = cluster.paths();
    blocking(move || {
        let mut driver = driver(paths, volume);
        let payload = Bytes::from(vec![0xa5; BLOCK_BYTES]);
        let at = |number: u64| BlockRange {
            start: number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % BLOCKS,
            count: 1,
        };
        let fill = Bytes::from(vec![1; 128 << 10]);
        let large = move |number: u64| {
            let range = BlockRange { start: number * 32 % BLOCKS, count: 32 };
            Operation::Write(range, fill.clone())
        };
        let show = |name: &str, (taken, rate): (Vec<Duration>, f64)| {
            let at = |part: usize| taken[taken.len() * part / 100];
            println!("{name}: p50 {:?} p99 {:?}, {rate:.0}/s", at(50), at(99));
        };
        show("128 KiB sequential write, depth 8", run(&mut driver, 8, large));
        for depth in [1, 32] {
            let write = |number| Operation::Write(at(number), payload.clone());
            show(&format!("4 KiB write, depth {depth}"), run(&mut driver, depth, write));
            let read = |number| Operation::Read(at(number));
            show(&format!("4 KiB read, depth {depth}"), run(&mut driver, depth, read));
        }
    })
    .await;
}
