//! Fields to bytes and back: little-endian, no padding, every length bounded before it is believed.
//!
//! A [`Reader`] never allocates more than the bytes it was given can fill.

use crate::config::{Config, ConfigState, MEMBERS_MAX, Member, Primary};
use crate::entry::{BLOCK_BYTES, BlockRange, EntryHeader, EntryKind, Place};
use crate::ids::{Epoch, InstanceId, Lsn, NodeName, ReplicaId, SnapshotId, VolumeId};
use crate::storage::Incomplete;

use super::codec::{PAYLOAD_BYTES_MAX, WireError};
use super::{Envelope, Tail};

/// Longest name of a node, in bytes.
pub(super) const NODE_NAME_BYTES_MAX: usize = 253;

/// Writes fields at the end of a buffer.
pub(super) struct Writer<'a>(pub &'a mut Vec<u8>);

impl Writer<'_> {
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub fn flag(&mut self, value: bool) {
        self.0.push(u8::from(value));
    }

    pub fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn id(&mut self, value: &[u8; 16]) {
        self.0.extend_from_slice(value);
    }

    pub fn place(&mut self, place: Place) {
        self.u64(place.epoch.0);
        self.u64(place.lsn.0);
    }

    pub fn envelope(&mut self, envelope: &Envelope) {
        self.id(envelope.volume.as_bytes());
        self.id(envelope.from.as_bytes());
        self.id(envelope.to.as_bytes());
        self.id(envelope.instance.as_bytes());
        self.u64(envelope.epoch.0);
    }

    pub fn node(&mut self, node: &NodeName) {
        let name = node.as_str().as_bytes();
        assert!(name.len() <= NODE_NAME_BYTES_MAX, "a node's name is a DNS label");
        self.u8(name.len() as u8);
        self.0.extend_from_slice(name);
    }

    pub fn tail(&mut self, tail: &Tail) {
        self.place(tail.tail);
        self.place(tail.commit);
        self.u64(tail.log_start.0);
        // Why it is incomplete is its own matter; what it may have acknowledged is T5's.
        match tail.incomplete.map(Incomplete::acknowledged) {
            None => self.u8(0),
            Some(Some(place)) => {
                self.u8(1);
                self.place(place);
            }
            Some(None) => self.u8(2),
        }
    }

    fn members(&mut self, members: &[Member]) {
        assert!(members.len() <= MEMBERS_MAX, "at most {MEMBERS_MAX} members");
        self.u8(members.len() as u8);
        for member in members {
            self.node(&member.node);
            self.id(member.replica.as_bytes());
        }
    }

    pub fn config(&mut self, config: &Config) {
        self.u64(config.epoch.0);
        self.flag(config.state == ConfigState::Active);
        self.node(&config.primary.node);
        self.id(config.primary.instance.as_bytes());
        self.members(&config.members);
        self.flag(config.previous_members.is_some());
        self.members(config.previous());
        self.members(&config.learners);
        self.flag(config.single_copy.is_some());
        if let Some(single) = config.single_copy {
            self.id(single.as_bytes());
        }
        self.flag(config.restored.is_some());
        if let Some(restored) = config.restored {
            self.u64(restored.0);
        }
    }

    pub fn header(&mut self, header: &EntryHeader) {
        self.place(header.place);
        self.u64(header.prev_epoch.0);
        match header.kind {
            EntryKind::Noop => self.u8(0),
            EntryKind::Write { range, payload_crc } => {
                self.u8(1);
                self.range(range);
                self.u32(payload_crc);
            }
            EntryKind::Zero { range, discard } => {
                self.u8(if discard { 3 } else { 2 });
                self.range(range);
            }
            EntryKind::Grow { size_blocks } => {
                self.u8(4);
                self.u64(size_blocks);
            }
            EntryKind::Snapshot { id } => {
                self.u8(5);
                self.id(id.as_bytes());
            }
            EntryKind::SnapshotDelete { id } => {
                self.u8(6);
                self.id(id.as_bytes());
            }
        }
    }

    pub fn range(&mut self, range: BlockRange) {
        self.u64(range.start);
        self.u32(range.count);
    }
}

/// Reads fields from the front of a buffer.
pub(super) struct Reader<'a>(pub &'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(WireError::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.take::<1>()?[0])
    }

    pub fn flag(&mut self) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Field("flag")),
        }
    }

    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.take().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.take().map(u64::from_le_bytes)
    }

    pub fn id(&mut self) -> Result<[u8; 16], WireError> {
        self.take()
    }

    pub fn instance(&mut self) -> Result<InstanceId, WireError> {
        self.id().map(InstanceId::from_bytes)
    }

    pub fn volume(&mut self) -> Result<VolumeId, WireError> {
        self.id().map(VolumeId::from_bytes)
    }

    pub fn place(&mut self) -> Result<Place, WireError> {
        Ok(Place { epoch: Epoch(self.u64()?), lsn: Lsn(self.u64()?) })
    }

    pub fn envelope(&mut self) -> Result<Envelope, WireError> {
        Ok(Envelope {
            volume: self.volume()?,
            from: ReplicaId::from_bytes(self.id()?),
            to: ReplicaId::from_bytes(self.id()?),
            instance: self.instance()?,
            epoch: Epoch(self.u64()?),
        })
    }

    pub fn node(&mut self) -> Result<NodeName, WireError> {
        let bytes = usize::from(self.u8()?);
        if bytes == 0 || bytes > NODE_NAME_BYTES_MAX {
            return Err(WireError::Field("name of a node"));
        }
        let (name, rest) = self.0.split_at_checked(bytes).ok_or(WireError::Short)?;
        self.0 = rest;
        let name = std::str::from_utf8(name).map_err(|_| WireError::Field("name of a node"))?;
        Ok(NodeName::new(name))
    }

    pub fn tail(&mut self) -> Result<Tail, WireError> {
        Ok(Tail {
            tail: self.place()?,
            commit: self.place()?,
            log_start: Lsn(self.u64()?),
            incomplete: match self.u8()? {
                0 => None,
                1 => Some(Incomplete::AcknowledgedUpTo(self.place()?)),
                2 => Some(Incomplete::Unknown),
                _ => return Err(WireError::Field("incomplete")),
            },
        })
    }

    fn members(&mut self) -> Result<Vec<Member>, WireError> {
        let count = usize::from(self.u8()?);
        if count > MEMBERS_MAX {
            return Err(WireError::Field("number of members"));
        }
        let member = |reader: &mut Self| {
            Ok(Member { node: reader.node()?, replica: ReplicaId::from_bytes(reader.id()?) })
        };
        (0..count).map(|_| member(self)).collect()
    }

    pub fn config(&mut self) -> Result<Config, WireError> {
        let epoch = Epoch(self.u64()?);
        let active = self.flag()?;
        let state = if active { ConfigState::Active } else { ConfigState::Recovering };
        let primary = Primary { node: self.node()?, instance: self.instance()? };
        let members = self.members()?;
        let changing = self.flag()?;
        let previous = self.members()?;
        if !changing && !previous.is_empty() {
            return Err(WireError::Field("previous members"));
        }
        let learners = self.members()?;
        let single = self.flag()?;
        let single_copy = single.then(|| self.id().map(ReplicaId::from_bytes)).transpose()?;
        let marked = self.flag()?;
        let restored = marked.then(|| self.u64().map(Epoch)).transpose()?;
        let previous_members = changing.then_some(previous);
        Ok(Config {
            epoch,
            state,
            primary,
            members,
            previous_members,
            learners,
            single_copy,
            restored,
        })
    }

    pub fn header(&mut self) -> Result<EntryHeader, WireError> {
        let place = self.place()?;
        let prev_epoch = Epoch(self.u64()?);
        let kind = match self.u8()? {
            0 => EntryKind::Noop,
            1 => EntryKind::Write { range: self.range()?, payload_crc: self.u32()? },
            2 => EntryKind::Zero { range: self.range()?, discard: false },
            3 => EntryKind::Zero { range: self.range()?, discard: true },
            4 => EntryKind::Grow { size_blocks: self.u64()? },
            5 => EntryKind::Snapshot { id: SnapshotId::from_bytes(self.id()?) },
            6 => EntryKind::SnapshotDelete { id: SnapshotId::from_bytes(self.id()?) },
            _ => return Err(WireError::Field("kind of an entry")),
        };
        if let EntryKind::Write { range, .. } = kind
            && range.count as usize > PAYLOAD_BYTES_MAX / BLOCK_BYTES
        {
            return Err(WireError::Field("blocks of an entry"));
        }
        if place.lsn.0 == 0 || place.epoch.0 == 0 || prev_epoch > place.epoch {
            return Err(WireError::Field("place of an entry"));
        }
        Ok(EntryHeader { place, prev_epoch, kind })
    }

    pub fn range(&mut self) -> Result<BlockRange, WireError> {
        let range = BlockRange { start: self.u64()?, count: self.u32()? };
        if range.count == 0 || range.start.checked_add(u64::from(range.count)).is_none() {
            return Err(WireError::Field("range of blocks"));
        }
        Ok(range)
    }
}
