//! Little-endian bytes in and out. Reading never panics and never allocates more than it was given:
//! the bytes may be anything.

use thiserror::Error;
use uuid::Uuid;

use crate::config::{Config, ConfigState, MEMBERS_MAX, Member, Primary};
use crate::entry::Place;
use crate::ids::{Epoch, InstanceId, Lsn, NodeName, ReplicaId, SnapshotId, VolumeId};
use crate::storage::{Incomplete, Source};

/// Bytes that are not what they should be; names what was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("malformed: {0}")]
pub struct Malformed(pub &'static str);

/// Appends values.
#[derive(Debug, Default)]
pub struct Put(pub Vec<u8>);

impl Put {
    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Bytes as they are.
    pub fn bytes(&mut self, value: &[u8]) {
        self.0.extend_from_slice(value);
    }

    /// Two bytes of length and the text.
    pub fn text(&mut self, value: &str) {
        self.u16(u16::try_from(value.len()).expect("a name below 64 KiB"));
        self.bytes(value.as_bytes());
    }

    /// Epoch and lsn, eight bytes each.
    pub fn place(&mut self, place: Place) {
        self.u64(place.epoch.0);
        self.u64(place.lsn.0);
    }

    /// Volume, snapshot and its place.
    pub fn source(&mut self, source: Source) {
        self.bytes(source.volume.as_bytes());
        self.bytes(source.snapshot.as_bytes());
        self.place(source.place);
    }

    /// Tag 0 (complete), 1 and a place, 2 (unknown), or 3 and a source.
    pub fn incomplete(&mut self, incomplete: Option<Incomplete>) {
        match incomplete {
            None => self.u8(0),
            Some(Incomplete::AcknowledgedUpTo(place)) => {
                self.u8(1);
                self.place(place);
            }
            Some(Incomplete::Unknown) => self.u8(2),
            Some(Incomplete::Awaits(source)) => {
                self.u8(3);
                self.source(source);
            }
        }
    }

    fn members(&mut self, members: &[Member]) {
        self.u8(u8::try_from(members.len()).expect("few members"));
        for member in members {
            self.text(member.node.as_str());
            self.bytes(member.replica.as_bytes());
        }
    }

    /// A configuration.
    pub fn config(&mut self, config: &Config) {
        self.u64(config.epoch.0);
        self.u8(u8::from(config.state == ConfigState::Active));
        self.text(config.primary.node.as_str());
        self.bytes(config.primary.instance.as_bytes());
        self.members(&config.members);
        self.u8(u8::from(config.previous_members.is_some()));
        if let Some(previous) = &config.previous_members {
            self.members(previous);
        }
        self.members(&config.learners);
        self.u8(u8::from(config.single_copy.is_some()));
        if let Some(single) = config.single_copy {
            self.bytes(single.as_bytes());
        }
        self.u8(u8::from(config.restored.is_some()));
        if let Some(restored) = config.restored {
            self.u64(restored.0);
        }
    }
}

/// Takes values from the front.
#[derive(Clone, Copy, Debug)]
pub struct Get<'a>(pub &'a [u8]);

impl<'a> Get<'a> {
    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        if len > self.0.len() {
            return Err(Malformed("too short"));
        }
        let (head, rest) = self.0.split_at(len);
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        Ok(self.bytes(N)?.try_into().expect("as long as asked"))
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Sixteen bytes.
    pub fn uuid(&mut self) -> Result<Uuid, Malformed> {
        Ok(Uuid::from_bytes(self.array()?))
    }

    /// 0 or 1.
    pub fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed("flag")),
        }
    }

    /// Two bytes of length and the text.
    pub fn text(&mut self) -> Result<&'a str, Malformed> {
        let len = usize::from(self.u16()?);
        std::str::from_utf8(self.bytes(len)?).map_err(|_| Malformed("text"))
    }

    /// Epoch and lsn.
    pub fn place(&mut self) -> Result<Place, Malformed> {
        Ok(Place { epoch: Epoch(self.u64()?), lsn: Lsn(self.u64()?) })
    }

    /// See [`Put::source`].
    pub fn source(&mut self) -> Result<Source, Malformed> {
        let (volume, snapshot) = (VolumeId(self.uuid()?), SnapshotId(self.uuid()?));
        Ok(Source { volume, snapshot, place: self.place()? })
    }

    /// See [`Put::incomplete`].
    pub fn incomplete(&mut self) -> Result<Option<Incomplete>, Malformed> {
        match self.u8()? {
            0 => Ok(None),
            1 => Ok(Some(Incomplete::AcknowledgedUpTo(self.place()?))),
            2 => Ok(Some(Incomplete::Unknown)),
            3 => Ok(Some(Incomplete::Awaits(self.source()?))),
            _ => Err(Malformed("incomplete")),
        }
    }

    fn members(&mut self) -> Result<Vec<Member>, Malformed> {
        let count = usize::from(self.u8()?);
        if count > MEMBERS_MAX {
            return Err(Malformed("members"));
        }
        (0..count)
            .map(|_| {
                let node = NodeName::new(self.text()?);
                Ok(Member { node, replica: ReplicaId(self.uuid()?) })
            })
            .collect()
    }

    /// A configuration.
    pub fn config(&mut self) -> Result<Config, Malformed> {
        let epoch = Epoch(self.u64()?);
        let state = if self.flag()? { ConfigState::Active } else { ConfigState::Recovering };
        let node = NodeName::new(self.text()?);
        let primary = Primary { node, instance: InstanceId(self.uuid()?) };
        let members = self.members()?;
        let previous_members = if self.flag()? { Some(self.members()?) } else { None };
        let learners = self.members()?;
        let single_copy = if self.flag()? { Some(ReplicaId(self.uuid()?)) } else { None };
        let restored = if self.flag()? { Some(Epoch(self.u64()?)) } else { None };
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
}
