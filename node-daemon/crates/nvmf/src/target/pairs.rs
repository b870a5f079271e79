//! Fused operations on an I/O queue (Base 3.4.2): which two commands belong together.
//!
//! The first says that it is the first; the second is the very next command of the queue. Both are
//! here before either runs, whichever's data comes first. When one fails before that the other is
//! answered Command Aborted due to Failed Fused Command, and a first without a second (or the other
//! way round) Missing Fused Command. What the pair does is `io.rs`'s.

use super::connection::{Connection, Request, Stage};
use crate::command::fuse;
use crate::status::Status;

/// What a command is of a fused operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pair {
    /// Nothing, or handed out.
    Alone,
    /// The first; the second's identifier once it has come.
    First(Option<u16>),
    /// The second of this first.
    Second(u16),
    /// The other one has failed or never came: answered so as soon as its own data has arrived.
    Doomed(Status),
}

/// What the next command is to the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Anything.
    Any,
    /// The second of this first.
    SecondOf(u16),
    /// The second of a first that has failed.
    SecondOfFailed,
}

impl Connection {
    /// Ties a command that has just come to the one before it.
    pub(super) fn pair(&mut self, id: u16) -> Result<(), Status> {
        let fused = self.slots[&id].entry.fused();
        let next = std::mem::replace(&mut self.next, Next::Any);
        if fused == fuse::SECOND {
            return match next {
                Next::SecondOf(first) => {
                    self.set_pair(first, Pair::First(Some(id)));
                    self.set_pair(id, Pair::Second(first));
                    Ok(())
                }
                Next::SecondOfFailed => Err(Status::FAILED_FUSED),
                Next::Any => Err(Status::MISSING_FUSED),
            };
        }
        if let Next::SecondOf(first) = next {
            self.fail_half(first, Status::MISSING_FUSED);
        }
        match fused {
            fuse::ALONE => Ok(()),
            fuse::FIRST => {
                self.set_pair(id, Pair::First(None));
                self.next = Next::SecondOf(id);
                Ok(())
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn set_pair(&mut self, id: u16, pair: Pair) {
        self.slots.get_mut(&id).expect("half of a pair is under way").pair = pair;
    }

    /// Fails half of a pair now, or when its data has arrived: until then the host may still send
    /// it, and its identifier is not free.
    fn fail_half(&mut self, id: u16, status: Status) {
        let has_arrived = matches!(self.slots[&id].stage, Stage::Arrived(_));
        self.set_pair(id, if has_arrived { Pair::Alone } else { Pair::Doomed(status) });
        if has_arrived {
            self.respond(id, status, 0);
        }
    }

    /// A command that was half of a pair has failed before both were handed out.
    pub(super) fn unpair(&mut self, id: u16, pair: Pair) {
        match pair {
            Pair::First(Some(other)) | Pair::Second(other) => {
                self.fail_half(other, Status::FAILED_FUSED);
            }
            Pair::First(None) => {
                debug_assert_eq!(self.next, Next::SecondOf(id));
                self.next = Next::SecondOfFailed;
            }
            Pair::Alone | Pair::Doomed(_) => {}
        }
    }

    /// Hands the pair of `id` out when both are there.
    pub(super) fn join(&mut self, id: u16) {
        let (first, second) = match self.slots[&id].pair {
            Pair::First(Some(second)) => (id, second),
            Pair::Second(first) => (first, id),
            _ => return,
        };
        let have_arrived =
            [first, second].iter().all(|id| matches!(self.slots[id].stage, Stage::Arrived(_)));
        if !have_arrived {
            return;
        }
        let mut take = |id: u16| {
            let slot = self.slots.get_mut(&id).expect("checked");
            slot.pair = Pair::Alone;
            match std::mem::replace(&mut slot.stage, Stage::Running) {
                Stage::Arrived(data) => (slot.entry, data),
                _ => unreachable!("checked"),
            }
        };
        let (entry, data) = take(first);
        let fused = Some(take(second));
        self.requests.push_back(Request { entry, data, room: 0, fused });
    }
}
