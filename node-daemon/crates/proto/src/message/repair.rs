//! Messages of a repair (rule C4): what they say, and their bytes.
//!
//! One question, one answer; a lost one costs the asker its patience and no more. They are of
//! version 3 of the protocol; a peer of an older version is sent none.

use bytes::Bytes;

use super::codec::{WireError, crc32c};
use super::wire::{Reader, Writer};
use crate::entry::BLOCK_BYTES;
use crate::ids::SnapshotId;
use crate::repair::BlockVersion;

/// What replicas say to each other of a bad block.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RepairMessage {
    /// This block is bad here: have you the same version?
    Ask {
        /// Which.
        version: BlockVersion,
    },
    /// Here it is.
    Block {
        /// Which.
        version: BlockVersion,
        /// Its bytes.
        payload: Bytes,
    },
    /// I do not give it.
    Declined {
        /// Which.
        version: BlockVersion,
        /// Why.
        why: Declined,
    },
}

/// Why a version is not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Declined {
    /// The block has another stamp here, is a hole, or is not applied up to there yet.
    OtherVersion,
    /// It is bad here as well.
    Bad,
    /// This replica is no complete copy.
    Incomplete,
    /// Too much to do for now.
    Busy,
}

pub(super) const ASK: u8 = 21;
const BLOCK: u8 = 22;
pub(super) const DECLINED: u8 = 23;

pub(super) fn fields(
    message: &RepairMessage,
    writer: &mut Writer<'_>,
    payloads: &mut Vec<Bytes>,
) -> u8 {
    match message {
        RepairMessage::Ask { version } => {
            version_fields(version, writer);
            ASK
        }
        RepairMessage::Block { version, payload } => {
            assert_eq!(payload.len(), BLOCK_BYTES, "a block");
            version_fields(version, writer);
            writer.u32(crc32c(payload));
            payloads.push(payload.clone());
            BLOCK
        }
        RepairMessage::Declined { version, why } => {
            version_fields(version, writer);
            writer.u8(match why {
                Declined::OtherVersion => 0,
                Declined::Bad => 1,
                Declined::Incomplete => 2,
                Declined::Busy => 3,
            });
            DECLINED
        }
    }
}

pub(super) fn parse(
    kind: u8,
    reader: &mut Reader<'_>,
    payloads: &mut Bytes,
) -> Result<RepairMessage, WireError> {
    let version = parse_version(reader)?;
    Ok(match kind {
        ASK => RepairMessage::Ask { version },
        BLOCK => {
            let crc = reader.u32()?;
            if payloads.len() < BLOCK_BYTES {
                return Err(WireError::Short);
            }
            let payload = payloads.split_to(BLOCK_BYTES);
            if crc32c(&payload) != crc {
                return Err(WireError::BlocksChecksum);
            }
            RepairMessage::Block { version, payload }
        }
        DECLINED => {
            let why = match reader.u8()? {
                0 => Declined::OtherVersion,
                1 => Declined::Bad,
                2 => Declined::Incomplete,
                3 => Declined::Busy,
                _ => return Err(WireError::Field("reason")),
            };
            RepairMessage::Declined { version, why }
        }
        other => return Err(WireError::Type(other)),
    })
}

fn version_fields(version: &BlockVersion, writer: &mut Writer<'_>) {
    writer.flag(version.snapshot.is_some());
    if let Some(snapshot) = version.snapshot {
        writer.id(snapshot.as_bytes());
    }
    writer.u64(version.block);
    writer.place(version.stamp);
}

fn parse_version(reader: &mut Reader<'_>) -> Result<BlockVersion, WireError> {
    let snapshot = reader.flag()?.then(|| reader.id().map(SnapshotId::from_bytes)).transpose()?;
    let block = reader.u64()?;
    if block == u64::MAX {
        return Err(WireError::Field("block"));
    }
    Ok(BlockVersion { snapshot, block, stamp: reader.place()? })
}
