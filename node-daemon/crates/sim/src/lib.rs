//! A deterministic simulator of whole nodes, hosts, clocks, networks and the API server, around the
//! real `tercet_shard::Shard`: what replication.md calls deterministic simulation.
//!
//! One thread, virtual time, one source of chance: a seed reproduces everything. How to run it and
//! what is checked: docs/testing-simulation.md.

pub mod canaries;
pub mod checker;
mod cluster;
mod decay;
mod device;
mod host;
mod links;
mod members;
pub mod mix;
mod nemesis;
mod node;
mod observe;
mod phases;
mod pipes;
pub mod probes;
pub mod run;
mod snapshots;
pub mod stamp;
mod target;
mod work;
mod world;
