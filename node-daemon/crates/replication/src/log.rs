//! A replica's log as the protocol sees it: places only, bytes are storage's.
//!
//! Epochs never fall from one entry to the next, so "the last entry not after (epoch, lsn)" is found
//! by going back (rule W2). Everything up to `applied` is committed and therefore the same in every
//! log (W5): it always matches and is never dropped.

use std::collections::VecDeque;

use tercet_proto::message::Tail;
use tercet_proto::storage::{Incomplete, Storage};
use tercet_proto::{Entry, EntryKind, Lsn, Place, ReplicaState, StorageError, VolumeId};

#[derive(Clone, Debug, Hash)]
pub(crate) struct Log {
    volume: VolumeId,
    /// Last entry.
    pub tail: Place,
    /// Durable up to here (W3).
    pub durable: Place,
    /// Applied up to here (W5).
    pub applied: Place,
    /// The largest commit heard of; never below `applied`.
    pub heard: Place,
    /// Size as of `applied`.
    pub size_blocks: u64,
    /// Growths that are not applied yet.
    grows: VecDeque<(Lsn, u64)>,
    /// Not fit to stand, serve or acknowledge.
    pub incomplete: Option<Incomplete>,
}

impl Log {
    pub fn new(state: &ReplicaState, storage: &dyn Storage) -> Self {
        let mut grows = VecDeque::new();
        for lsn in state.applied.lsn.0 + 1..=state.tail.lsn.0 {
            if let Some(header) = storage.header(state.volume, Lsn(lsn))
                && let EntryKind::Grow { size_blocks } = header.kind
            {
                grows.push_back((Lsn(lsn), size_blocks));
            }
        }
        Self {
            volume: state.volume,
            tail: state.tail,
            durable: state.durable,
            applied: state.applied,
            heard: state.applied,
            size_blocks: state.size_blocks,
            grows,
            incomplete: state.incomplete,
        }
    }

    /// What this replica says of itself (T2, T4). The durable part: what is not durable can vanish.
    pub fn report(&self, storage: &dyn Storage) -> Tail {
        let log_start = storage.replica(self.volume).map_or(Lsn(1), |state| state.log_start);
        Tail { tail: self.durable, commit: self.heard, log_start, incomplete: self.incomplete }
    }

    /// The place before the first entry that the log still has: whoever has it lacks nothing that
    /// is not here (C1).
    pub fn start(&self, storage: &dyn Storage) -> Place {
        let first = storage.replica(self.volume).map_or(Lsn(1), |state| state.log_start);
        match first {
            first if first > self.tail.lsn => self.tail,
            first => storage.header(self.volume, first).expect("the log starts there").prev(),
        }
    }

    /// The place of the entry at `lsn`, when the log or what is known of it says so.
    pub fn place_at(&self, storage: &dyn Storage, lsn: Lsn) -> Option<Place> {
        match lsn {
            Lsn(0) => return Some(Place::EMPTY),
            lsn if lsn > self.tail.lsn => return None,
            lsn if lsn == self.tail.lsn => return Some(self.tail),
            lsn if lsn == self.applied.lsn => return Some(self.applied),
            _ => {}
        }
        let own = storage.header(self.volume, lsn).map(|header| header.place);
        own.or_else(|| storage.header(self.volume, lsn.next()).map(|header| header.prev()))
    }

    /// Whether it is a clone's that awaits its snapshot (S3).
    pub fn awaits(&self) -> bool {
        matches!(self.incomplete, Some(Incomplete::Awaits(_)))
    }

    /// Whether the log has this entry, as far as can be known (W2).
    pub fn has(&self, storage: &dyn Storage, place: Place) -> bool {
        place.lsn <= self.applied.lsn || self.place_at(storage, place.lsn) == Some(place)
    }

    /// The last entry that is after `place` neither in epoch nor in lsn: each further try to match
    /// starts lower, so matching ends (W2). Where the log does not reach back, its first place.
    pub fn not_after(&self, storage: &dyn Storage, place: Place) -> Place {
        let mut found = Place::EMPTY;
        let mut lsn = place.lsn.min(self.tail.lsn);
        while lsn.0 > 0 {
            match self.place_at(storage, lsn) {
                Some(own) if own.epoch <= place.epoch => return own,
                Some(own) => found = own,
                None => return found,
            }
            lsn = Lsn(lsn.0 - 1);
        }
        Place::EMPTY
    }

    /// The same, but nothing that is applied here is ever given up: it is committed (W5).
    pub fn not_after_nor_applied(&self, storage: &dyn Storage, place: Place) -> Place {
        if place.lsn <= self.applied.lsn {
            return self.applied;
        }
        let own = self.not_after(storage, place);
        if own.lsn < self.applied.lsn { self.applied } else { own }
    }

    /// Appends entries directly after `drop_after`, or the tail.
    pub fn append(
        &mut self,
        storage: &mut dyn Storage,
        drop_after: Option<Lsn>,
        entries: Vec<Entry>,
    ) -> Result<(), StorageError> {
        let first = entries.first().expect("at least one entry").header;
        let last = entries.last().expect("at least one entry").header.place;
        let start = first.prev();
        assert_eq!(start.lsn, drop_after.unwrap_or(self.tail.lsn), "entries without a gap");
        assert!(start.lsn >= self.applied.lsn, "nothing applied is ever dropped (W2)");
        assert!(drop_after.is_some() || start == self.tail, "entries follow the tail (W2)");
        let grows: Vec<_> = entries.iter().filter_map(grow_of).collect();
        storage.append(self.volume, drop_after, entries)?;
        if self.durable.lsn > start.lsn {
            self.durable = start;
        }
        while self.grows.back().is_some_and(|(lsn, _)| *lsn > start.lsn) {
            self.grows.pop_back();
        }
        self.grows.extend(grows);
        self.tail = last;
        Ok(())
    }

    /// Storage says that everything up to `place` is durable. Of entries that were dropped
    /// meanwhile it may say so too late: they are no longer in the log.
    pub fn on_durable(&mut self, storage: &dyn Storage, place: Place) -> bool {
        let news = place.lsn > self.durable.lsn
            && place.lsn <= self.tail.lsn
            && self.place_at(storage, place.lsn) == Some(place);
        if news {
            self.durable = place;
        }
        news
    }

    /// Applies up to `lsn`, which is committed and durable here (W5). The new size, if it grew.
    pub fn apply(&mut self, storage: &mut dyn Storage, lsn: Lsn) -> Option<u64> {
        if lsn <= self.applied.lsn {
            return None;
        }
        assert!(lsn <= self.durable.lsn, "only what is durable here is applied (W5)");
        let place = self.place_at(storage, lsn).expect("entries not applied are retained (W8)");
        storage.apply(self.volume, lsn);
        self.applied = place;
        self.heard = self.heard.max(place);
        let before = self.size_blocks;
        while let Some((_, size_blocks)) = self.grows.front().filter(|(grow, _)| *grow <= lsn) {
            self.size_blocks = self.size_blocks.max(*size_blocks);
            self.grows.pop_front();
        }
        (self.size_blocks != before).then_some(self.size_blocks)
    }

    /// The size once everything in the log is applied.
    pub fn size_at_tail(&self) -> u64 {
        self.grows.iter().fold(self.size_blocks, |size, (_, grown)| size.max(*grown))
    }
}

fn grow_of(entry: &Entry) -> Option<(Lsn, u64)> {
    match entry.header.kind {
        EntryKind::Grow { size_blocks } => Some((entry.header.place.lsn, size_blocks)),
        _ => None,
    }
}
