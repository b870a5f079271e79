//! On which shard of this engine a new replica goes (pure).
//!
//! Where the least is promised for the space there is: volumes are thin, so what is written tells
//! little of what will be. A clone goes where its source is, whose chunks it shares (rule S3). Which
//! *nodes* have a volume's replicas is the operator's business.

use tercet_proto::VolumeId;

/// A shard that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Its number.
    pub shard: u16,
    /// Bytes that it can hold.
    pub capacity_bytes: u64,
    /// Bytes that it holds.
    pub allocated_bytes: u64,
    /// Bytes of all volumes that have a replica there, written or not.
    pub provisioned_bytes: u64,
}

/// The shard for a replica of `size_bytes`; none: no shard is open. Where several are as good the
/// volume's hash chooses.
pub fn choose(rooms: &[Room], volume: VolumeId, size_bytes: u64) -> Option<u16> {
    let load = |room: &Room| {
        let promised = room.provisioned_bytes.max(room.allocated_bytes);
        u128::from(promised) + u128::from(size_bytes)
    };
    let first = usize::from(volume.shard(u16::try_from(rooms.len()).unwrap_or(u16::MAX)));
    let turned = rooms.iter().cycle().skip(first).take(rooms.len());
    let best = turned.min_by(|one, other| {
        let (left, right) = (u128::from(other.capacity_bytes), u128::from(one.capacity_bytes));
        (load(one) * left).cmp(&(load(other) * right))
    });
    best.map(|room| room.shard)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn room(shard: u16, capacity: u64, allocated: u64, provisioned: u64) -> Room {
        Room {
            shard,
            capacity_bytes: capacity * GIB,
            allocated_bytes: allocated * GIB,
            provisioned_bytes: provisioned * GIB,
        }
    }

    fn volume(number: u64) -> VolumeId {
        let mut bytes = [0; 16];
        bytes[8..].copy_from_slice(&number.to_be_bytes());
        VolumeId::from_bytes(bytes)
    }

    #[test]
    fn the_least_promised_for_its_space() {
        let rooms = [room(0, 100, 10, 50), room(1, 400, 90, 100), room(2, 100, 0, 40)];
        assert_eq!(choose(&rooms, volume(1), GIB), Some(1), "a quarter promised");
        assert_eq!(
            choose(&rooms[..1], volume(1), 900 * GIB),
            Some(0),
            "thin: the size may be more"
        );
        assert_eq!(choose(&[], volume(1), GIB), None);
    }

    #[test]
    fn snapshots_count_by_what_they_hold() {
        let rooms = [room(0, 100, 95, 10), room(1, 100, 20, 30)];
        assert_eq!(choose(&rooms, volume(1), GIB), Some(1));
    }

    #[test]
    fn equal_ones_are_all_used() {
        let rooms: Vec<_> = (0..4).map(|shard| room(shard, 100, 0, 0)).collect();
        let mut used: Vec<_> = (0..64).filter_map(|n| choose(&rooms, volume(n), GIB)).collect();
        used.sort_unstable();
        used.dedup();
        assert_eq!(used, [0, 1, 2, 3]);
    }
}
