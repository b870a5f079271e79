//! A volume in memory behind an NVMe/TCP port: something to point a foreign host at.
//!
//! `cargo run --release --example memory-target -- 127.0.0.1:4420 65536` serves 65,536 blocks. The
//! ANA state flips at each line of standard input; `grow N` sets another size.

#[path = "../tests/support/memory.rs"]
mod memory;
#[path = "../tests/support/mod.rs"]
mod support;

use std::io::BufRead;
use std::sync::mpsc;
use std::time::Duration;

use support::Node;
use tercet_nvmf::log::DiscoveryRecord;
use tercet_nvmf::names::volume_nqn;
use tercet_nvmf::target::{Ana, DiscoveryEntry};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:4420".to_owned());
    let blocks = arguments.next().map_or(65_536, |text| text.parse().expect("a number of blocks"));
    let host = arguments.next().unwrap_or_default();
    let mut node = Node::at(address.parse().expect("ADDRESS:PORT"), 0, blocks, Ana::Optimized);
    let nqn = volume_nqn(support::volume());
    println!("{nqn} at {}", node.address());
    let record = DiscoveryRecord {
        subsystem_nqn: nqn,
        address: node.address().ip(),
        port: node.address().port(),
        port_id: 1,
    };
    let entry = DiscoveryEntry { record, hosts: [host].into() };
    node.target.set_discovery(vec![entry], &mut Vec::new());
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    let mut is_optimized = true;
    loop {
        if !node.poll() {
            std::thread::sleep(Duration::from_micros(50));
        }
        for reason in node.closed.drain(..) {
            println!("closed: {reason}");
        }
        if let Ok(line) = lines.try_recv() {
            if let Some(blocks) = line.strip_prefix("grow ") {
                node.grow(blocks.parse().expect("a number of blocks"));
                println!("{blocks} blocks");
            } else {
                is_optimized = !is_optimized;
                let ana = if is_optimized { Ana::Optimized } else { Ana::Inaccessible };
                node.set_ana(ana);
                println!("{ana:?}, {} commands so far", node.commands);
            }
        }
    }
}
