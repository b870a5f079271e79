//! What must never be, and what has to be reached.
//!
//! Hosts' view first. Every reply shows some first part of one growing list of writes: an
//! acknowledgement shows all that is applied up to that write, a read all that is applied. Reads are
//! not steps of the model: wherever the production code *would* answer a read, it is taken as read, for
//! a read changes nothing at the node and the strictest history is the one with all reads in it. So
//! linearizability is: what is shown never contradicts what was seen, and no read shows less.
//!
//! Then the protocol's own promises, which break earlier and give shorter counterexamples.
//!
//! Not checked here: hosts' associations (H1 to H5), payloads, order of reads that take time at the
//! disk. The simulator has these.

use tercet_proto::{Epoch, IllegalStep, Lsn};
use tercet_replication::model::Leads;

use crate::NODES;
use crate::store::{write_of, writes};
use crate::world::State;

/// What must not be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Wrong {
    /// A read shows less than was seen before, or something else (L1).
    Stale {
        /// The node that answers.
        node: usize,
    },
    /// A reply contradicts what was seen (W4, T5).
    Contradicts {
        /// The node that answers.
        node: usize,
    },
    /// A serving primary of a later epoch lacks what was seen (T5, T6).
    Lost {
        /// The primary.
        node: usize,
    },
    /// Two nodes may read at once (L2).
    TwoLeases,
    /// Two nodes lead one epoch (T1, T3).
    TwoPrimaries(Epoch),
    /// Two logs have applied different entries at one place (W5).
    Diverged(Lsn),
    /// A swap that the API server refuses was tried.
    IllegalStep(IllegalStep),
    /// The production code's own assertion, or its alarm (W2).
    Assertion(String),
}

/// Whether one list is the first part of the other.
fn agree(a: &[u8], b: &[u8]) -> bool {
    a.iter().zip(b).all(|(a, b)| a == b)
}

impl State {
    fn epoch_of(&self, i: usize) -> Option<Epoch> {
        match self.locals[i].facts.leads {
            Leads::Primary { epoch, .. } => Some(epoch),
            _ => None,
        }
    }

    /// Something was shown to a host at a node.
    fn show(&mut self, i: usize, shown: &[u8]) {
        if !agree(shown, &self.seen) {
            self.wrong.get_or_insert(Wrong::Contradicts { node: i });
        } else if shown.len() > self.seen.len() {
            self.seen = shown.to_vec();
        } else {
            return;
        }
        // Only a primary answers. One that hands over in the same step leads no more, but has
        // promised nothing newer yet.
        let epoch = self.epoch_of(i).unwrap_or(self.locals[i].facts.promised);
        self.seen_epoch = self.seen_epoch.max(epoch);
    }

    /// Acknowledgements that a node has just sent.
    pub(crate) fn judge_acks(&mut self, i: usize, acked: &[u8]) {
        for write in acked {
            let local = &self.locals[i];
            let applied = writes(local.log(), local.applied().lsn);
            match applied.iter().position(|other| other == write) {
                Some(at) => self.show(i, &applied[..=at]),
                None => {
                    self.wrong.get_or_insert(Wrong::Lost { node: i });
                }
            }
        }
    }

    /// Everything that can be said of a state by itself.
    pub(crate) fn judge(&mut self) {
        self.judge_reads();
        for i in 0..NODES {
            if let Leads::Primary { epoch, serving: true } = self.locals[i].facts.leads
                && epoch >= self.seen_epoch
                && !self.locals[i].facts.logged.starts_with(&self.seen)
            {
                self.wrong.get_or_insert(Wrong::Lost { node: i });
            }
            for j in 0..i {
                self.judge_two(i, j);
            }
        }
    }

    fn judge_reads(&mut self) {
        let shown = |i: usize| self.locals[i].facts.readable.clone().map(|shown| (i, shown));
        let mut readable: Vec<_> = (0..NODES).filter_map(shown).collect();
        if readable.len() > 1 {
            self.wrong.get_or_insert(Wrong::TwoLeases);
        }
        readable.sort_by_key(|(_, shown)| usize::MAX - shown.len()); // the longest is read first
        for (i, shown) in readable {
            self.show(i, &shown);
            if shown.len() < self.seen.len() {
                self.wrong.get_or_insert(Wrong::Stale { node: i });
            }
        }
    }

    fn judge_two(&mut self, i: usize, j: usize) {
        let (a, b) = (&self.locals[i], &self.locals[j]);
        // A returned object may name two candidates of one number; only one is ever promised it.
        let (epoch, other) = (self.epoch_of(i), self.epoch_of(j));
        let both = a.applied().lsn.min(b.applied().lsn);
        let differs = a.log().iter().zip(b.log()).take(both.0 as usize).find(|(a, b)| a != b);
        let diverged = differs.map(|(entry, _)| entry.place.lsn);
        if epoch.is_some() && epoch == other {
            self.wrong.get_or_insert(Wrong::TwoPrimaries(epoch.unwrap_or_default()));
        }
        if let Some(lsn) = diverged {
            self.wrong.get_or_insert(Wrong::Diverged(lsn));
        }
    }

    /// A takeover took place, and a write of the new epoch was seen.
    pub fn written_after_takeover(&self) -> bool {
        let of_later = |i: usize| {
            let local = &self.locals[i];
            let upto = local.applied().lsn;
            let later = local.log().iter().filter(|h| h.place.epoch.0 > 1 && h.place.lsn <= upto);
            later.filter_map(|h| write_of(&h.kind)).any(|write| self.seen.contains(&write))
        };
        (0..NODES).any(of_later)
    }

    /// Two nodes take hosts' commands, each for its own epoch: the older one does not know yet (T8).
    pub fn two_serve(&self) -> bool {
        let serving = |leads| matches!(leads, Leads::Primary { serving: true, .. });
        self.locals.iter().filter(|local| serving(local.facts.leads)).count() > 1
    }

    /// A member that started again has applied what was written meanwhile (C1).
    pub fn caught_up(&self) -> bool {
        self.locals.iter().any(|local| {
            let applied = writes(local.log(), local.applied().lsn);
            local.starts > 0 && local.facts.leads == Leads::No && !applied.is_empty()
        })
    }

    /// A write is in no log any more: it was never seen, and a takeover dropped it (W2, T5).
    pub fn dropped(&self) -> bool {
        let gone = |write: u8| self.locals.iter().all(|l| !l.facts.logged.contains(&write));
        self.serves_after_takeover() && (1..=self.written).any(gone)
    }

    /// A node may read in a later epoch.
    pub fn read_after_takeover(&self) -> bool {
        let later = |i: usize| self.epoch_of(i).is_some_and(|epoch| epoch.0 > 1);
        (0..NODES).any(|i| later(i) && self.locals[i].facts.readable.is_some())
    }
}
