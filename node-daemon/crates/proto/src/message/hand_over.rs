//! Messages of a hand-over (rule T10): what they say, and their bytes.
//!
//! The member that shall follow swaps while the primary still serves, so each of these may be lost
//! and nothing has stopped: the primary asks again, or goes on in its epoch. They are of version 4 of
//! the protocol; a peer of an older version is sent none, and is handed over to as before, with
//! [`super::ReplicaMessage::Stand`].

use super::codec::WireError;
use super::wire::{Reader, Writer};
use crate::config::Config;

/// What a primary and the member that shall follow it say to each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HandOverMessage {
    /// Primary to a member: follow me; swap while I serve.
    TakeOver {
        /// Counts the askings of this epoch.
        number: u64,
    },
    /// The member stands: its compare-and-swap is on its way (T3).
    Stands {
        /// Of the asking.
        number: u64,
    },
    /// Its swap took place: stop, answer what you have, and give your lease back (L5).
    Swapped {
        /// What is there now.
        config: Config,
    },
    /// It does not follow; nothing has changed.
    Declined {
        /// Of the asking.
        number: u64,
        /// Why.
        why: NotFollowing,
    },
}

/// Why a member does not follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NotFollowing {
    /// Incomplete, its store has failed, its engine has just started (L4) or is about to stop.
    Unfit,
    /// Another swap of it is on its way.
    Busy,
    /// Its swap did not take place.
    Lost,
}

pub(super) const TAKE_OVER: u8 = 24;
const STANDS: u8 = 25;
const SWAPPED: u8 = 26;
pub(super) const DECLINED: u8 = 27;

pub(super) fn fields(message: &HandOverMessage, writer: &mut Writer<'_>) -> u8 {
    match message {
        HandOverMessage::TakeOver { number } => {
            writer.u64(*number);
            TAKE_OVER
        }
        HandOverMessage::Stands { number } => {
            writer.u64(*number);
            STANDS
        }
        HandOverMessage::Swapped { config } => {
            writer.config(config);
            SWAPPED
        }
        HandOverMessage::Declined { number, why } => {
            writer.u64(*number);
            writer.u8(match why {
                NotFollowing::Unfit => 0,
                NotFollowing::Busy => 1,
                NotFollowing::Lost => 2,
            });
            DECLINED
        }
    }
}

pub(super) fn parse(kind: u8, reader: &mut Reader<'_>) -> Result<HandOverMessage, WireError> {
    Ok(match kind {
        TAKE_OVER => HandOverMessage::TakeOver { number: reader.u64()? },
        STANDS => HandOverMessage::Stands { number: reader.u64()? },
        SWAPPED => HandOverMessage::Swapped { config: reader.config()? },
        DECLINED => {
            let number = reader.u64()?;
            let why = match reader.u8()? {
                0 => NotFollowing::Unfit,
                1 => NotFollowing::Busy,
                2 => NotFollowing::Lost,
                _ => return Err(WireError::Field("reason")),
            };
            HandOverMessage::Declined { number, why }
        }
        other => return Err(WireError::Type(other)),
    })
}
