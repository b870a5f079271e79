//! An `NVMe` namespace without the block layer: commands of the drive itself, through the ring, on
//! the generic character device (`/dev/ngXnY`, `IORING_OP_URING_CMD`).
//!
//! What the block layer does for everybody else is done here: commands are cut to what the drive
//! takes (MDTS and the limits of its queue), durability is the drive's own (FUA on the command;
//! flush, which is left out where the drive has no volatile cache), and what the drive wants tried
//! again is tried again. `find` finds a namespace by its NGUID, which moves with the drive, unlike
//! `ng0n1`; `identify` reads what it can; `command` is the layout of a command; `disk` submits. All
//! but `find` and `disk` are pure. Needs Linux 6.1 and `CAP_SYS_ADMIN`.
//!
//! Namespaces with metadata or protection information, zoned ones and read-only ones are refused.

pub(crate) mod command;
mod disk;
pub(crate) mod find;
pub(crate) mod identify;

pub(crate) use disk::NvmeOperation;
pub use identify::Nguid;
pub(crate) use identify::{Namespace, QueueLimits};
