//! What a log record holds: entries of volumes, and changes of replicas, each in a few bytes.

use super::{Get, Malformed, Put, Run};
use crate::config::Config;
use crate::entry::{BlockRange, EntryHeader, EntryKind, Place};
use crate::ids::{Epoch, Lsn, ReplicaId, SnapshotId, VolumeId};
use crate::storage::{Incomplete, Source};

/// Where an entry's payload lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// The entry has none.
    None,
    /// In the record, so many blocks behind the header area.
    Record(u32),
    /// In the data area.
    Extents(Vec<Run>),
}

/// An entry in the log or in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryItem {
    /// Place and kind.
    pub header: EntryHeader,
    /// Where the payload is.
    pub location: Location,
    /// CRC32C of each block of the payload.
    pub crcs: Vec<u32>,
}

impl EntryItem {
    /// Appends its bytes.
    pub fn encode(&self, put: &mut Put) {
        put.place(self.header.place);
        put.u64(self.header.prev_epoch.0);
        match self.header.kind {
            EntryKind::Noop => put.u8(0),
            EntryKind::Write { range, payload_crc } => {
                put.u8(1);
                put_range(put, range);
                put.u32(payload_crc);
                self.encode_location(put);
            }
            EntryKind::Zero { range, discard } => {
                put.u8(2);
                put_range(put, range);
                put.u8(u8::from(discard));
            }
            EntryKind::Grow { size_blocks } => {
                put.u8(3);
                put.u64(size_blocks);
            }
            EntryKind::Snapshot { id } => {
                put.u8(4);
                put.bytes(id.as_bytes());
            }
            EntryKind::SnapshotDelete { id } => {
                put.u8(5);
                put.bytes(id.as_bytes());
            }
        }
    }

    fn encode_location(&self, put: &mut Put) {
        match &self.location {
            Location::None => panic!("a write has a payload"),
            Location::Record(offset) => {
                put.u8(1);
                put.u32(*offset);
            }
            Location::Extents(runs) => {
                put.u8(2);
                put_runs(put, runs);
            }
        }
        for crc in &self.crcs {
            put.u32(*crc);
        }
    }

    /// Reads one.
    pub fn decode(get: &mut Get<'_>) -> Result<Self, Malformed> {
        let place = get.place()?;
        let prev_epoch = Epoch(get.u64()?);
        if place.lsn == Lsn(0) {
            return Err(Malformed("lsn 0"));
        }
        let (mut location, mut crcs) = (Location::None, Vec::new());
        let kind = match get.u8()? {
            0 => EntryKind::Noop,
            1 => {
                let range = get_range(get)?;
                let payload_crc = get.u32()?;
                location = match get.u8()? {
                    1 => Location::Record(get.u32()?),
                    2 => Location::Extents(get_runs(get)?),
                    _ => return Err(Malformed("location")),
                };
                if get.0.len() / 4 < range.count as usize {
                    return Err(Malformed("too short"));
                }
                crcs = (0..range.count).map(|_| get.u32()).collect::<Result<_, _>>()?;
                EntryKind::Write { range, payload_crc }
            }
            2 => EntryKind::Zero { range: get_range(get)?, discard: get.flag()? },
            3 => EntryKind::Grow { size_blocks: get.u64()? },
            4 => EntryKind::Snapshot { id: SnapshotId(get.uuid()?) },
            5 => EntryKind::SnapshotDelete { id: SnapshotId(get.uuid()?) },
            _ => return Err(Malformed("kind of entry")),
        };
        if let (Location::Extents(runs), EntryKind::Write { range, .. }) = (&location, kind) {
            let blocks: u64 = runs.iter().map(|run| u64::from(run.1)).sum();
            if blocks != u64::from(range.count) {
                return Err(Malformed("extents"));
            }
        }
        Ok(Self { header: EntryHeader { place, prev_epoch, kind }, location, crcs })
    }
}

fn put_range(put: &mut Put, range: BlockRange) {
    put.u64(range.start);
    put.u32(range.count);
}

fn get_range(get: &mut Get<'_>) -> Result<BlockRange, Malformed> {
    let range = BlockRange { start: get.u64()?, count: get.u32()? };
    if range.count == 0 || range.start.checked_add(u64::from(range.count)).is_none() {
        return Err(Malformed("range"));
    }
    Ok(range)
}

fn put_runs(put: &mut Put, runs: &[Run]) {
    put.u16(u16::try_from(runs.len()).expect("a bounded entry"));
    for (start, count) in runs {
        put.u32(*start);
        put.u32(*count);
    }
}

fn get_runs(get: &mut Get<'_>) -> Result<Vec<Run>, Malformed> {
    (0..get.u16()?).map(|_| Ok((get.u32()?, get.u32()?))).collect()
}

/// One change in a record. `number` names the replica within the store; never used twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// An entry, after entries behind `drop_after` were dropped, if given (rule W2).
    Entry {
        /// The volume.
        volume: VolumeId,
        /// Its replica's number.
        number: u64,
        /// What is dropped in the same step.
        drop_after: Option<Lsn>,
        /// The entry.
        entry: EntryItem,
    },
    /// Entries behind `after` are dropped and nothing follows.
    Drop {
        /// The volume.
        volume: VolumeId,
        /// Its replica's number.
        number: u64,
        /// The last that stays.
        after: Lsn,
    },
    /// A replica is made.
    Create {
        /// The volume.
        volume: VolumeId,
        /// The replica's number.
        number: u64,
        /// Its id.
        replica: ReplicaId,
        /// The Volume object's name.
        name: String,
        /// Blocks.
        size_blocks: u64,
        /// Whose chunks it shares (rule S3).
        source: Option<Source>,
        /// It does not share them yet: the snapshot was not applied here (rule S3).
        incomplete: bool,
    },
    /// A replica is deleted and leaves a tombstone (rule M2).
    Delete {
        /// The volume.
        volume: VolumeId,
        /// The replica's number.
        number: u64,
    },
    /// A promise (rules T4, W2).
    Promise {
        /// The volume.
        volume: VolumeId,
        /// The replica's number.
        number: u64,
        /// The configuration promised.
        config: Config,
    },
    /// The replica is incomplete, or is not any more.
    Incomplete {
        /// The volume.
        volume: VolumeId,
        /// The replica's number.
        number: u64,
        /// How.
        incomplete: Option<Incomplete>,
    },
    /// A clone that was made incomplete shares its source's chunks now, and is complete (rule S3).
    Fill {
        /// The volume.
        volume: VolumeId,
        /// The replica's number.
        number: u64,
        /// Whose chunks.
        source: Source,
    },
    /// A replica is what a copy made of it, applied up to here and complete; its log is empty
    /// behind it (rule C2). What the copy made is in the checkpoint that the record names.
    Finish {
        /// The volume.
        volume: VolumeId,
        /// The replica's number.
        number: u64,
        /// The place.
        place: Place,
    },
}

impl Item {
    /// The volume that it changes.
    pub fn volume(&self) -> VolumeId {
        match self {
            Self::Entry { volume, .. }
            | Self::Drop { volume, .. }
            | Self::Create { volume, .. }
            | Self::Delete { volume, .. }
            | Self::Promise { volume, .. }
            | Self::Incomplete { volume, .. }
            | Self::Fill { volume, .. }
            | Self::Finish { volume, .. } => *volume,
        }
    }

    /// Appends its bytes.
    pub fn encode(&self, put: &mut Put) {
        let head = |put: &mut Put, tag: u8, volume: &VolumeId, number: u64| {
            put.u8(tag);
            put.bytes(volume.as_bytes());
            put.u64(number);
        };
        match self {
            Self::Entry { volume, number, drop_after, entry } => {
                head(put, if drop_after.is_some() { 2 } else { 1 }, volume, *number);
                if let Some(after) = drop_after {
                    put.u64(after.0);
                }
                entry.encode(put);
            }
            Self::Drop { volume, number, after } => {
                head(put, 3, volume, *number);
                put.u64(after.0);
            }
            Self::Create { volume, number, replica, name, size_blocks, source, incomplete } => {
                head(put, 4, volume, *number);
                put.bytes(replica.as_bytes());
                put.text(name);
                put.u64(*size_blocks);
                put.u8(u8::from(source.is_some()) + u8::from(*incomplete));
                if let Some(source) = source {
                    put.source(*source);
                }
            }
            Self::Delete { volume, number } => head(put, 5, volume, *number),
            Self::Promise { volume, number, config } => {
                head(put, 6, volume, *number);
                put.config(config);
            }
            Self::Incomplete { volume, number, incomplete } => {
                head(put, 7, volume, *number);
                put.incomplete(*incomplete);
            }
            Self::Fill { volume, number, source } => {
                head(put, 8, volume, *number);
                put.source(*source);
            }
            Self::Finish { volume, number, place } => {
                head(put, 9, volume, *number);
                put.place(*place);
            }
        }
    }

    /// Reads one.
    pub fn decode(get: &mut Get<'_>) -> Result<Self, Malformed> {
        let tag = get.u8()?;
        let (volume, number) = (VolumeId(get.uuid()?), get.u64()?);
        Ok(match tag {
            1 => Self::Entry { volume, number, drop_after: None, entry: EntryItem::decode(get)? },
            2 => {
                let drop_after = Some(Lsn(get.u64()?));
                Self::Entry { volume, number, drop_after, entry: EntryItem::decode(get)? }
            }
            3 => Self::Drop { volume, number, after: Lsn(get.u64()?) },
            4 => Self::decode_create(get, volume, number)?,
            5 => Self::Delete { volume, number },
            6 => Self::Promise { volume, number, config: get.config()? },
            7 => Self::Incomplete { volume, number, incomplete: get.incomplete()? },
            8 => Self::Fill { volume, number, source: get.source()? },
            9 => Self::Finish { volume, number, place: get.place()? },
            _ => return Err(Malformed("kind of item")),
        })
    }

    fn decode_create(get: &mut Get<'_>, volume: VolumeId, number: u64) -> Result<Self, Malformed> {
        let replica = ReplicaId(get.uuid()?);
        let name = get.text()?.to_owned();
        let size_blocks = get.u64()?;
        let (source, incomplete) = match get.u8()? {
            0 => (None, false),
            1 => (Some(get.source()?), false),
            2 => (Some(get.source()?), true),
            _ => return Err(Malformed("source")),
        };
        Ok(Self::Create { volume, number, replica, name, size_blocks, source, incomplete })
    }
}
