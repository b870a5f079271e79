//! Newtypes for everything that is named or counted, so that the compiler keeps an epoch out of an
//! lsn's place. Words as in docs/architecture.md.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// The id whose sixteen bytes are `bytes`, in the order of RFC 9562.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }

            /// The sixteen bytes, in the order of RFC 9562.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

uuid_id!(
    /// A volume for ever: `Volume.spec.uuid`, the CSI volumeHandle, the NGUID.
    VolumeId
);
uuid_id!(
    /// One node's copy of a volume; drawn when the replica is made (rule T9).
    ReplicaId
);
uuid_id!(
    /// One start of an engine; drawn at each start (rule T1).
    InstanceId
);
uuid_id!(
    /// `Snapshot.metadata.uid`: makes appends of a snapshot idempotent (rules S1, S4).
    SnapshotId
);

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The next number. Panics past 2^64 - 1: never wraps.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect("a counter never wraps"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

impl ReplicaId {
    /// A fresh id for a replica on this shard, below 4,096, of its engine: a UUID of version 8 (RFC
    /// 9562, section 5.8) with the shard's number in the twelve bits behind the version; all other
    /// bits are those of `random`. So whoever knows a member knows where on its node to send.
    #[must_use]
    pub fn on_shard(random: Uuid, shard: u16) -> Self {
        assert!(shard < 1 << 12, "shard {shard} has no place in an id");
        let mut bytes = random.into_bytes();
        bytes[6] = 0x80 | (shard >> 8) as u8;
        bytes[7] = (shard & 0xff) as u8;
        bytes[8] = 0x80 | (bytes[8] & 0x3f);
        Self::from_bytes(bytes)
    }

    /// The shard that the id names. None: it is older than ids that do; then the volume's hash tells
    /// ([`VolumeId::shard`]).
    #[must_use]
    pub fn shard(&self) -> Option<u16> {
        let bytes = self.as_bytes();
        let names = bytes[6] >> 4 == 8 && bytes[8] >> 6 == 0b10;
        names.then(|| u16::from(bytes[6] & 0xf) << 8 | u16::from(bytes[7]))
    }
}

impl VolumeId {
    /// The shard of an engine with `shards` shards that keeps the volume's replica, where the
    /// replica's id does not say it ([`ReplicaId::shard`]). FNV-1a over the sixteen bytes, modulo.
    #[must_use]
    pub fn shard(&self, shards: u16) -> u16 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in self.as_bytes() {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        (hash % u64::from(shards.max(1))) as u16
    }
}

counter!(
    /// The number of a volume's configuration; grows with each takeover. 0: before the first.
    Epoch
);
counter!(
    /// Place of an entry in a volume's log; runs on across epochs. 0: the empty log.
    Lsn
);
counter!(
    /// Names one request to an executor, so that its answer finds the asker. Unique per asker.
    Token
);

/// A `StorageNode`'s name (a DNS label of at most 253 bytes).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(Arc<str>);

impl NodeName {
    /// The node called `name`.
    pub fn new(name: &str) -> Self {
        Self(Arc::from(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for NodeName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for NodeName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::new(&String::deserialize(deserializer)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replicas_id_names_its_shard() {
        let random = Uuid::from_bytes([0xff; 16]);
        for shard in [0, 1, 255, 256, 4095] {
            let id = ReplicaId::on_shard(random, shard);
            assert_eq!(id.shard(), Some(shard));
            assert_eq!(id.0.get_version_num(), 8);
            assert_eq!(id.0.get_variant(), uuid::Variant::RFC4122);
            assert_eq!(id.to_string().parse::<Uuid>().map(ReplicaId), Ok(id));
        }
        let text = ReplicaId::on_shard(random, 0x123).to_string();
        assert_eq!(text, "ffffffff-ffff-8123-bfff-ffffffffffff");
    }

    #[test]
    fn an_older_id_names_none() {
        let older: Uuid = "c9a646d3-9c61-4cb7-bfd0-1f1b7f1f3f2a".parse().expect("a UUID");
        assert_eq!(ReplicaId(older).shard(), None);
        assert_eq!(ReplicaId::from_bytes([0x88; 16]).shard(), Some(0x888));
        assert_eq!(ReplicaId::from_bytes([0x0; 16]).shard(), None);
    }
}
