//! Replaying the log over a checkpoint.
//!
//! Below `frozen` the checkpoint already holds what records did: they only bring back the entries
//! that the log retains, and at `frozen` each replica's log must be what the checkpoint says. From
//! `frozen` on, records do what they did at first. Nothing is applied, for nobody knows yet what is
//! committed; except that a clone's source is applied up to the snapshot, which it was before.
//!
//! A replica whose entries do not follow each other is damaged (rule R1): its log ends before the
//! gap, and it is incomplete with the largest place that anything names.

use std::collections::BTreeMap;

use tercet_proto::disk::{EntryItem, Item, Location, Run};
use tercet_proto::storage::{Incomplete, Source};
use tercet_proto::{Lsn, Place, Promise, VolumeId};

use crate::log::RecordInfo;
use crate::map::Map;
use crate::options::OpenReport;
use crate::replica::{LogEntry, Payload, Replica, touched_leaves};
use crate::scan::{Piece, Scan, Scanned};
use crate::store::Store;

type Entries = BTreeMap<u64, LogEntry>;

pub(crate) struct Replay<'a> {
    store: &'a mut Store,
    frozen: u64,
    crossed: bool,
    logs: BTreeMap<VolumeId, Entries>,
    damaged: BTreeMap<VolumeId, Incomplete>,
    report: OpenReport,
    /// Anything was damaged.
    hurt: bool,
}

/// The worse of two.
fn worse(a: Incomplete, b: Incomplete) -> Incomplete {
    match (a.acknowledged(), b.acknowledged()) {
        (Some(a), Some(b)) => Incomplete::AcknowledgedUpTo(a.max(b)),
        _ => Incomplete::Unknown,
    }
}

impl<'a> Replay<'a> {
    pub(crate) fn new(
        store: &'a mut Store,
        frozen: u64,
        carried: Vec<(VolumeId, LogEntry)>,
    ) -> Self {
        let mut replay = Self {
            store,
            frozen,
            crossed: false,
            logs: BTreeMap::new(),
            damaged: BTreeMap::new(),
            report: OpenReport::default(),
            hurt: false,
        };
        for (volume, entry) in carried {
            if let Payload::Extents(runs) = &entry.payload {
                replay.store.alloc.hold_runs(runs);
            }
            replay.insert(volume, entry);
        }
        replay
    }

    pub(crate) fn run(mut self, scan: Scan) -> OpenReport {
        // Before anything may take a block, everything that the log names is held.
        for piece in &scan.pieces {
            let Piece::Record(record) = piece else {
                continue;
            };
            for runs in record.items.iter().filter_map(extents) {
                self.store.alloc.hold_runs(runs);
            }
        }
        for piece in scan.pieces {
            match piece {
                Piece::Record(record) => self.record(*record),
                Piece::Lost(names) => self.lost(names),
            }
        }
        self.cross();
        self.store.log.head = scan.end;
        self.store.log.durable = scan.end;
        // What no mark covers yet is owed one: it may be acknowledged from now on (rule R1).
        self.store.log.mark_written = scan.mark.min(scan.end);
        self.settle();
        if self.hurt {
            // So that replicas which are filled again are not found damaged by the next start.
            self.store.cut_all = true;
            self.store.checkpoint_wanted = true;
        }
        self.report
    }

    fn lost(&mut self, names: Option<Vec<tercet_proto::disk::Name>>) {
        self.hurt = true;
        if let Some(names) = names {
            for name in names {
                self.damage(name.volume, Incomplete::AcknowledgedUpTo(name.place));
            }
        } else {
            let all: Vec<VolumeId> = self.store.replicas.keys().copied().collect();
            for volume in all {
                self.damage(volume, Incomplete::Unknown);
            }
        }
    }

    fn damage(&mut self, volume: VolumeId, how: Incomplete) {
        self.hurt = true;
        let all = self.damaged.entry(volume).or_insert(how);
        *all = worse(*all, how);
    }

    fn record(&mut self, record: Scanned) {
        if record.header.position >= self.frozen {
            self.cross();
        }
        let info = RecordInfo {
            position: record.header.position,
            crc: record.crc,
            items: record.header.items,
            entries: record.items.iter().filter(|item| matches!(item, Item::Entry { .. })).count()
                as u32,
            extent_blocks: record
                .items
                .iter()
                .filter_map(extents)
                .flatten()
                .map(|run| u64::from(run.1))
                .sum(),
        };
        self.report.log_records += 1;
        self.report.log_entries += u64::from(info.entries);
        self.store.log.previous = (info.position, info.crc);
        self.store.log.names = names_of(&record);
        self.store.log.records.push_back(info);
        let payload = record.header.position + u64::from(record.header.header_blocks);
        for (index, item) in record.items.into_iter().enumerate() {
            let bad = record.bad.contains(&index);
            self.item(item, bad, info.position, payload);
        }
    }

    fn item(&mut self, item: Item, bad: bool, position: u64, payload: u64) {
        let volume = item.volume();
        match item {
            Item::Entry { number, drop_after, entry, .. } => {
                let place = entry.header.place;
                let entry = self.entry(entry, position, payload);
                if self.number(volume) != Some(number) {
                    return self.release(&entry);
                }
                if bad {
                    self.release(&entry);
                    return self.damage(volume, Incomplete::AcknowledgedUpTo(place));
                }
                if let Some(after) = drop_after {
                    self.drop_behind(volume, after);
                }
                self.append(volume, entry);
            }
            Item::Drop { number, after, .. } => {
                if self.number(volume) == Some(number) {
                    self.drop_behind(volume, after);
                }
            }
            Item::Finish { number, place, .. } => {
                if self.number(volume) == Some(number) {
                    self.finish(volume, place);
                }
            }
            _ if !self.crossed => {}
            Item::Create { number, replica, name, size_blocks, source, incomplete, .. } => {
                if self.store.replicas.contains_key(&volume) {
                    self.remove(volume); // its deletion was in a record that is lost
                }
                let mut new = Replica::new(number, replica, name, Map::default(), size_blocks);
                if incomplete {
                    new.incomplete = source.map(Incomplete::Awaits);
                } else {
                    new.head = self.source(volume, source);
                }
                new.head.grow(size_blocks);
                self.store.next_number = self.store.next_number.max(number + 1);
                self.store.replicas.insert(volume, new);
            }
            Item::Delete { number, .. } => {
                if self.number(volume) == Some(number) {
                    self.remove(volume);
                }
            }
            Item::Promise { number, config, .. } => {
                if let Some(replica) = self.replica(volume, number) {
                    replica.promise = Some(Promise { config });
                }
            }
            Item::Incomplete { number, incomplete, .. } => {
                if let Some(replica) = self.replica(volume, number) {
                    replica.incomplete = incomplete;
                }
            }
            Item::Fill { number, source, .. } => {
                if self.replica(volume, number).is_some_and(|replica| replica.awaits()) {
                    self.fill(volume, source);
                }
            }
        }
    }

    /// A clone that awaited its snapshot has its chunks (rule S3).
    fn fill(&mut self, volume: VolumeId, source: Source) {
        let mut map = self.source(volume, Some(source));
        let replica = self.store.replicas.get_mut(&volume).expect("looked at");
        map.grow(replica.size_blocks);
        replica.head = map; // there were holes only
        replica.incomplete = None; // a source that is damaged is told by `damaged`
    }

    /// A copy has ended (rule C2): whatever was there before went with it, damage included. What it
    /// made is in the checkpoint.
    fn finish(&mut self, volume: VolumeId, place: Place) {
        self.drop_all(volume);
        self.damaged.remove(&volume);
        if self.crossed {
            let replica = self.store.replicas.get_mut(&volume).expect("looked at");
            (replica.applied, replica.tail) = (place, place);
            replica.incomplete = None;
        }
    }

    fn entry(&self, item: EntryItem, position: u64, payload: u64) -> LogEntry {
        let place = match item.location {
            Location::None => Payload::None,
            Location::Record(at) => Payload::Ring(self.store.log.block(payload + u64::from(at))),
            Location::Extents(runs) => Payload::Extents(runs),
        };
        let crcs = item.crcs.into();
        LogEntry { header: item.header, payload: place, crcs, memory: None, position }
    }

    fn number(&self, volume: VolumeId) -> Option<u64> {
        self.store.replicas.get(&volume).map(|replica| replica.number)
    }

    fn replica(&mut self, volume: VolumeId, number: u64) -> Option<&mut Replica> {
        self.store.replicas.get_mut(&volume).filter(|replica| replica.number == number)
    }

    fn applied(&self, volume: VolumeId) -> Lsn {
        self.store.replicas[&volume].applied.lsn
    }

    /// Gives up an entry's blocks; they stay pending, for the log still names them (rule W8).
    fn release(&mut self, entry: &LogEntry) {
        if let Payload::Extents(runs) = &entry.payload {
            self.store.alloc.release_runs(runs);
        }
    }

    fn insert(&mut self, volume: VolumeId, entry: LogEntry) {
        let lsn = entry.header.place.lsn;
        if lsn > self.applied(volume) {
            self.store.alloc.reserved += entry.reserve_blocks();
            self.store.potential_leaves += touched_leaves(entry.header.kind);
        }
        self.logs.entry(volume).or_default().insert(lsn.0, entry);
    }

    fn remove_entry(&mut self, volume: VolumeId, entry: &LogEntry) {
        if entry.header.place.lsn > self.applied(volume) {
            self.store.alloc.reserved -= entry.reserve_blocks();
            self.store.potential_leaves -= touched_leaves(entry.header.kind);
        }
        self.release(entry);
    }

    /// The replica is deleted; what was lost of it before is of no matter.
    fn remove(&mut self, volume: VolumeId) {
        self.drop_all(volume);
        self.store.remove_replica(volume);
        self.damaged.remove(&volume);
    }

    fn drop_all(&mut self, volume: VolumeId) {
        for (_, entry) in self.logs.remove(&volume).unwrap_or_default() {
            self.remove_entry(volume, &entry);
        }
    }

    /// Drops entries behind `after`. Damage may have taken what `after` names.
    fn drop_behind(&mut self, volume: VolumeId, after: Lsn) {
        let dropped = self.logs.entry(volume).or_default().split_off(&(after.0 + 1));
        for (_, entry) in dropped {
            self.remove_entry(volume, &entry);
        }
        if self.crossed {
            let replica = &self.store.replicas[&volume];
            if after < replica.tail.lsn {
                let kept = self.logs[&volume].get(&after.0).map(|entry| entry.header.place);
                let tail = kept.unwrap_or(replica.applied);
                self.store.replicas.get_mut(&volume).expect("looked at").tail = tail;
            }
        }
    }

    fn append(&mut self, volume: VolumeId, entry: LogEntry) {
        let place = entry.header.place;
        if !self.crossed {
            // What was dropped before the checkpoint may be missing in between: `cross` looks.
            self.drop_behind(volume, Lsn(place.lsn.0 - 1));
            return self.insert(volume, entry);
        }
        if entry.header.prev() != self.store.replicas[&volume].tail {
            self.release(&entry);
            return self.damage(volume, Incomplete::AcknowledgedUpTo(place));
        }
        self.insert(volume, entry);
        self.store.replicas.get_mut(&volume).expect("looked at").tail = place;
    }

    /// At the checkpoint each log must be what the checkpoint says.
    fn cross(&mut self) {
        if std::mem::replace(&mut self.crossed, true) {
            return;
        }
        let volumes: Vec<VolumeId> = self.store.replicas.keys().copied().collect();
        for volume in volumes {
            let replica = &self.store.replicas[&volume];
            let (applied, durable) = (replica.applied, replica.durable);
            let log = self.logs.entry(volume).or_default();
            let mut tail = applied;
            while tail != durable
                && let Some(entry) = log.get(&tail.lsn.next().0)
                && entry.header.prev() == tail
            {
                tail = entry.header.place;
            }
            if tail != durable {
                self.damage(volume, Incomplete::AcknowledgedUpTo(durable));
            }
            self.store.replicas.get_mut(&volume).expect("one of the keys").tail = tail;
            self.drop_behind(volume, tail.lsn);
        }
    }

    /// The map that a clone begins with.
    fn source(&mut self, clone: VolumeId, source: Option<Source>) -> Map {
        let Some(Source { volume, snapshot: id, place }) = source else {
            return Map::default();
        };
        while self.store.replicas.contains_key(&volume) && self.applied(volume) < place.lsn {
            let next = self.applied(volume).next().0;
            let Some(entry) = self.logs.get(&volume).and_then(|log| log.get(&next)) else {
                break;
            };
            let entry = entry.clone();
            let mut replica = self.store.replicas.remove(&volume).expect("looked at");
            self.store.apply_to(&mut replica, &entry);
            self.store.replicas.insert(volume, replica);
        }
        let replica = self.store.replicas.get(&volume);
        let snapshot = replica
            .and_then(|replica| replica.snapshots.iter().find(|snapshot| snapshot.state.id == id));
        if let Some(snapshot) = snapshot {
            return snapshot.map.inherit(&mut self.store.leaves);
        }
        self.damage(clone, Incomplete::Unknown);
        Map::default()
    }

    /// Logs become what they are at run time.
    fn settle(&mut self) {
        for (volume, log) in std::mem::take(&mut self.logs) {
            let tail = self.store.replicas[&volume].tail;
            let mut keep = Entries::new();
            let mut wanted = tail.lsn.0;
            for (lsn, entry) in log.into_iter().rev() {
                if lsn == wanted {
                    wanted -= 1;
                    keep.insert(lsn, entry);
                } else {
                    self.remove_entry(volume, &entry);
                }
            }
            let replica = self.store.replicas.get_mut(&volume).expect("logs are of replicas");
            replica.entries = keep.into_values().collect();
            self.store.log.entries += replica.entries.len() as u64;
        }
        for (volume, replica) in &mut self.store.replicas {
            replica.durable = replica.tail;
            if let Some(how) = self.damaged.remove(volume) {
                let acknowledged = worse(how, Incomplete::AcknowledgedUpTo(replica.tail));
                let before = replica.incomplete;
                replica.incomplete =
                    Some(before.map_or(acknowledged, |before| worse(before, acknowledged)));
                if before != replica.incomplete {
                    self.report.damaged.push(*volume);
                }
            }
        }
    }
}

fn extents(item: &Item) -> Option<&Vec<Run>> {
    match item {
        Item::Entry { entry, .. } => match &entry.location {
            Location::Extents(runs) => Some(runs),
            _ => None,
        },
        _ => None,
    }
}

fn names_of(record: &Scanned) -> Option<Vec<tercet_proto::disk::Name>> {
    let mut names = BTreeMap::new();
    for item in &record.items {
        let name = names.entry(item.volume()).or_insert(Place::EMPTY);
        if let Item::Entry { entry, .. } = item {
            *name = entry.header.place;
        }
    }
    crate::log::name_list(names)
}
