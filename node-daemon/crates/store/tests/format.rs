//! Golden bytes of every structure, and that no bytes whatever make a parser panic.

mod common;

use std::fmt::Write as _;

use common::{config, id, volume_id};
use proptest::prelude::*;
use tercet_proto::disk::{
    EntryItem, Get, Item, LeafBlock, LeafImage, Location, Name, Put, RecordHeader, RootBlock, Slot,
    StoreId, Superblock, crc32c,
};
use tercet_proto::storage::{Incomplete, Source};
use tercet_proto::{
    BLOCK_BYTES, BlockRange, EntryHeader, EntryKind, Epoch, InstanceId, Lsn, NodeName, Place,
    ReplicaId, SnapshotId,
};
use tercet_store::Store;
use tercet_store::simdisk::SimDisk;

const STORE: StoreId = StoreId([7; 16]);

fn place(epoch: u64, lsn: u64) -> Place {
    Place { epoch: Epoch(epoch), lsn: Lsn(lsn) }
}

fn superblock() -> Superblock {
    Superblock {
        version: 3,
        store: STORE,
        cluster: uuid::Uuid::from_bytes([8; 16]),
        node: NodeName::new("node-a"),
        shard: 3,
        generation: 9,
        instance: InstanceId::from_bytes([10; 16]),
        capacity_blocks: 4096,
        ring: (64, 1024),
        data: (1088, 3008),
    }
}

fn slot() -> Slot {
    Slot {
        store: STORE,
        sequence: 11,
        log_start: 12,
        previous: 13,
        previous_crc: 14,
        frozen: 15,
        root: 1100,
        root_blocks: 2,
        root_bytes: 5000,
        root_crc: 16,
    }
}

fn root() -> RootBlock {
    RootBlock { store: STORE, sequence: 11, index: 1, next: 0, payload: vec![17; 100] }
}

fn leaf() -> LeafImage {
    let mut blocks = vec![LeafBlock::NEVER; 1024].into_boxed_slice();
    for index in 0..4_u32 {
        let stamp = place(1, 2);
        blocks[index as usize + 5] = LeafBlock { device: 2000 + index, crc: 90 + index, stamp };
    }
    blocks[1023].stamp = place(1, 3);
    LeafImage { store: STORE, id: 18, chunk: 19, blocks }
}

fn entry(kind: EntryKind, location: Location, crcs: Vec<u32>) -> EntryItem {
    let header = EntryHeader { place: place(2, 5), prev_epoch: Epoch(1), kind };
    EntryItem { header, location, crcs }
}

fn items() -> Vec<Item> {
    let (volume, number) = (volume_id(1), 4);
    let item = |drop_after, entry| Item::Entry { volume, number, drop_after, entry };
    let range = BlockRange { start: 100, count: 2 };
    let write = EntryKind::Write { range, payload_crc: 20 };
    let id = SnapshotId::from_bytes(id(21));
    let source = Source { volume: volume_id(2), snapshot: id, place: place(1, 28) };
    vec![
        item(None, entry(write, Location::Record(3), vec![22, 23])),
        item(Some(Lsn(4)), entry(write, Location::Extents(vec![(2000, 1), (2002, 1)]), vec![1, 2])),
        item(None, entry(EntryKind::Noop, Location::None, Vec::new())),
        item(None, entry(EntryKind::Zero { range, discard: true }, Location::None, Vec::new())),
        item(None, entry(EntryKind::Grow { size_blocks: 24 }, Location::None, Vec::new())),
        item(None, entry(EntryKind::Snapshot { id }, Location::None, Vec::new())),
        item(None, entry(EntryKind::SnapshotDelete { id }, Location::None, Vec::new())),
        Item::Drop { volume, number, after: Lsn(25) },
        Item::Create {
            volume,
            number,
            replica: ReplicaId::from_bytes([26; 16]),
            name: "pvc-1".to_owned(),
            size_blocks: 27,
            source: Some(source),
            incomplete: false,
        },
        Item::Delete { volume, number },
        Item::Promise { volume, number, config: config(29) },
        Item::Incomplete { volume, number, incomplete: Some(Incomplete::Unknown) },
        Item::Incomplete {
            volume,
            number,
            incomplete: Some(Incomplete::AcknowledgedUpTo(place(3, 30))),
        },
    ]
}

/// What version 2 has besides (S3).
fn items_of_version_2() -> Vec<Item> {
    let (volume, number) = (volume_id(1), 4);
    let snapshot = SnapshotId::from_bytes(id(21));
    let source = Source { volume: volume_id(2), snapshot, place: place(1, 28) };
    vec![
        Item::Create {
            volume,
            number,
            replica: ReplicaId::from_bytes([26; 16]),
            name: "pvc-1".to_owned(),
            size_blocks: 27,
            source: Some(source),
            incomplete: true,
        },
        Item::Create {
            volume,
            number,
            replica: ReplicaId::from_bytes([26; 16]),
            name: "pvc-2".to_owned(),
            size_blocks: 27,
            source: None,
            incomplete: false,
        },
        Item::Incomplete { volume, number, incomplete: Some(Incomplete::Awaits(source)) },
        Item::Fill { volume, number, source },
    ]
}

/// What version 3 has besides (C2).
fn items_of_version_3() -> Vec<Item> {
    vec![Item::Finish { volume: volume_id(1), number: 4, place: place(3, 40) }]
}

fn record() -> (RecordHeader, Vec<u8>) {
    record_of(&items())
}

fn record_of(items: &[Item]) -> (RecordHeader, Vec<u8>) {
    let mut put = Put::default();
    for item in items {
        item.encode(&mut put);
    }
    let header = RecordHeader {
        store: STORE,
        instance: InstanceId::from_bytes([10; 16]),
        position: 31,
        mark: 30,
        checkpoint: 11,
        previous: 28,
        previous_crc: 32,
        header_blocks: 1,
        payload_blocks: 5,
        items: items.len() as u32,
        names: Some(vec![Name { volume: volume_id(1), place: place(2, 4) }]),
    };
    (header, put.0)
}

/// CRCs of the bytes of format version 3; but for the superblock's version, and the last two, they
/// are those of version 1. A change here is a change of the format: it needs a new version and a way
/// from this one.
#[test]
fn the_bytes_are_those_of_version_3() {
    let area = |(header, items): (RecordHeader, Vec<u8>)| {
        let mut area = vec![0; BLOCK_BYTES];
        header.encode(&items, &mut area);
        area
    };
    let golden = [
        ("superblock", superblock().encode().to_vec(), GOLDEN[0]),
        ("slot", slot().encode().to_vec(), GOLDEN[1]),
        ("root", root().encode().to_vec(), GOLDEN[2]),
        ("leaf", leaf().encode(), GOLDEN[3]),
        ("record", area(record()), GOLDEN[4]),
        ("record of version 2", area(record_of(&items_of_version_2())), GOLDEN[5]),
        ("record of version 3", area(record_of(&items_of_version_3())), GOLDEN[6]),
    ];
    for (what, bytes, expected) in golden {
        let hex = bytes[..64].iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("a string takes all");
            text
        });
        assert_eq!((hex.as_str(), crc32c(&bytes[4..])), expected, "{what}");
    }
}

include!("golden.rs.in");

#[test]
fn what_was_written_is_read() {
    assert_eq!(Superblock::decode(&*superblock().encode()), Ok(superblock()));
    assert_eq!(Slot::decode(&*slot().encode()), Ok(slot()));
    assert_eq!(RootBlock::decode(&*root().encode()), Ok(root()));
    assert_eq!(LeafImage::decode(&leaf().encode()), Ok(leaf()));
    let (header, bytes) = record();
    let mut area = vec![0; BLOCK_BYTES];
    let crc = header.encode(&bytes, &mut area);
    assert_eq!(RecordHeader::probe(&area, STORE, 31), Some(1));
    assert_eq!(RecordHeader::probe(&area, STORE, 32), None);
    assert_eq!(RecordHeader::decode(&area), Ok((header, crc, bytes.as_slice())));
    let mut get = Get(&bytes);
    for item in items() {
        assert_eq!(Item::decode(&mut get), Ok(item));
    }
    assert!(get.0.is_empty());
    for items in [items_of_version_2(), items_of_version_3()] {
        let (_, bytes) = record_of(&items);
        let mut get = Get(&bytes);
        for item in items {
            assert_eq!(Item::decode(&mut get), Ok(item));
        }
        assert!(get.0.is_empty());
    }
}

/// A store of an older version is opened, and is one of version 3 from then on; a later one is not.
#[test]
fn versions() {
    for version in [1, 2, 3] {
        let found = Superblock::decode(&*Superblock { version, ..superblock() }.encode());
        assert_eq!(found.map(|found| found.version), Ok(version));
    }
    for version in [0, 4] {
        let found = Superblock::decode(&*Superblock { version, ..superblock() }.encode());
        assert!(found.is_err(), "version {version}");
    }
    for version in [1, 2] {
        opens_and_is_the_newest(version);
    }
}

fn opens_and_is_the_newest(version: u32) {
    let mut disk = SimDisk::new(64 << 20);
    let options = common::options();
    Store::format(&mut disk, &common::format_options(), &options).expect("formats");
    for block in [0, 16] {
        let new = disk.sector(block);
        let found = Superblock::decode(&*new).expect("a superblock");
        let old = Superblock { version, ..found }.encode();
        let differs = |bit: &usize| (new[bit / 8] ^ old[bit / 8]) >> (bit % 8) & 1 == 1;
        (0..BLOCK_BYTES * 8).filter(differs).for_each(|bit| disk.flip(block, bit));
    }
    let instance = InstanceId::from_bytes(id(1));
    Store::open(&mut disk, options, instance).expect("opens an older version");
    for block in [0, 16] {
        let found = Superblock::decode(&*disk.sector(block));
        assert_eq!(found.map(|found| found.version), Ok(3));
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let (header, items) = record();
    let mut area = vec![0; BLOCK_BYTES];
    header.encode(&items, &mut area);
    for bit in 0..area.len() * 8 {
        area[bit / 8] ^= 1 << (bit % 8);
        assert!(RecordHeader::decode(&area).is_err(), "bit {bit}");
        area[bit / 8] ^= 1 << (bit % 8);
    }
    let mut bytes = leaf().encode();
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(LeafImage::decode(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}

/// Puts a right CRC in front of wrong bytes.
fn seal(bytes: &mut [u8]) {
    let crc = crc32c(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic(
        which in 0..5_usize,
        changes in prop::collection::vec((8..400_usize, any::<u8>()), 1..20),
    ) {
        let (header, items) = record();
        let mut area = vec![0; BLOCK_BYTES];
        header.encode(&items, &mut area);
        let mut bytes = [
            superblock().encode().to_vec(),
            slot().encode().to_vec(),
            root().encode().to_vec(),
            leaf().encode(),
            area,
        ][which].clone();
        for (at, value) in changes {
            bytes[at] = value;
        }
        seal(&mut bytes);
        let _ = Superblock::decode(&bytes);
        let _ = Slot::decode(&bytes);
        let _ = RootBlock::decode(&bytes);
        let _ = LeafImage::decode(&bytes);
        if let Ok((header, _, items)) = RecordHeader::decode(&bytes) {
            let mut get = Get(items);
            for _ in 0..header.items.min(1000) {
                if Item::decode(&mut get).is_err() {
                    break;
                }
            }
        }
    }
}
