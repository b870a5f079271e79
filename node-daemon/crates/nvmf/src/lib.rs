//! NVMe/TCP: a target and a host as state machines.
//!
//! [`target::Target`] serves volumes of one reactor to any host that speaks NVMe over TCP;
//! [`host::Multipath`] is the user-space host that waits instead of failing while any member of a
//! volume can become its primary. Both take bytes and times and give bytes and effects: sockets,
//! clocks and random numbers belong to the executor (the engine, `tercet-attach`, the tests).
//!
//! Section numbers in comments: "Base" is the NVM Express Base Specification 2.0, "TCP" the
//! NVMe/TCP Transport Specification 1.0, "NVM" the NVM Command Set Specification 1.0.
//! What is spoken, field by field, is in docs/nvme-tcp.md.

#![allow(clippy::doc_markdown, reason = "the specifications' names of fields are not code")]

pub mod auth;
pub mod command;
pub mod fabrics;
pub mod frame;
pub mod host;
pub mod identify;
mod le;
pub mod log;
pub mod names;
pub mod outbox;
pub mod pdu;
pub mod status;
pub mod target;

/// Bytes of a namespace's logical block, and log2 of it (LBADS).
pub const BLOCK_BYTES: usize = tercet_proto::BLOCK_BYTES;
/// log2 of [`BLOCK_BYTES`].
pub const BLOCK_SHIFT: u8 = 12;
/// Most data of one command (MDTS): 2^8 pages of 4 KiB.
pub const TRANSFER_BYTES_MAX: usize = 1 << 20;
/// MDTS as Identify carries it, in powers of two of 4 KiB.
pub const MDTS: u8 = 8;
/// Most data that may travel in a command capsule: saves small writes the R2T round trip.
pub const IN_CAPSULE_BYTES_MAX: usize = 16 * 1024;
/// In-capsule data of the admin queue (TCP 3.3.2: 8,192 bytes, fixed).
pub const ADMIN_IN_CAPSULE_BYTES_MAX: usize = 8 * 1024;
/// Entries of a queue, admin or I/O.
pub const QUEUE_ENTRIES_MAX: u16 = 128;
/// I/O queues of one association.
pub const IO_QUEUES_MAX: u16 = 16;
/// The only namespace.
pub const NSID: u32 = 1;
/// The one ANA group of a subsystem; its state differs from controller to controller (rule H1).
pub const ANA_GROUP: u32 = 1;
/// Longest that a path stays in ANA change state, in seconds.
pub const ANATT_S: u8 = 10;
