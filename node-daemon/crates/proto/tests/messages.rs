//! The byte format of messages: golden bytes, round trips, and whatever a broken or hostile peer
//! may send: an error, never a panic, never memory for what is only announced.

use bytes::Bytes;
use proptest::prelude::*;
use tercet_proto::message::{
    CopyMessage, Declined, Decoder, Envelope, Frame, HEADER_BYTES, HandOverMessage, Hello, Message,
    NotFollowing, PairEnvelope, PairMessage, ProvenExit, RepairMessage, ReplicaMessage, Tail,
    WireError, crc32c, encode, encode_hello, encode_proven_exit,
};
use tercet_proto::storage::Incomplete;
use tercet_proto::{
    BLOCK_BYTES, BlockRange, BlockVersion, Config, ConfigState, Entry, EntryHeader, EntryKind,
    Epoch, InstanceId, Lsn, Member, NodeName, Place, Primary, ReplicaId, SnapshotId, SnapshotState,
    StampRun, View, ViewId, VolumeId,
};

fn place(epoch: u64, lsn: u64) -> Place {
    Place { epoch: Epoch(epoch), lsn: Lsn(lsn) }
}

fn envelope() -> Envelope {
    Envelope {
        volume: VolumeId::from_bytes([1; 16]),
        from: ReplicaId::from_bytes([2; 16]),
        to: ReplicaId::from_bytes([3; 16]),
        instance: InstanceId::from_bytes([4; 16]),
        epoch: Epoch(5),
    }
}

fn config() -> Config {
    let member = |n: u8| Member {
        node: NodeName::new(&format!("n{n}")),
        replica: ReplicaId::from_bytes([n; 16]),
    };
    Config {
        epoch: Epoch(5),
        state: ConfigState::Recovering,
        primary: Primary { node: NodeName::new("n1"), instance: InstanceId::from_bytes([4; 16]) },
        members: vec![member(1), member(2), member(4)],
        previous_members: Some(vec![member(1), member(2), member(3)]),
        learners: vec![member(5)],
        single_copy: Some(ReplicaId::from_bytes([1; 16])),
        restored: Some(Epoch(5)),
    }
}

fn tail(incomplete: Option<Incomplete>) -> Tail {
    Tail { tail: place(3, 40), commit: place(3, 38), log_start: Lsn(7), incomplete }
}

fn entries() -> Vec<Entry> {
    let range = BlockRange { start: 9, count: 2 };
    let id = SnapshotId::from_bytes([8; 16]);
    let payload = Bytes::from(vec![0x5a; 2 * BLOCK_BYTES]);
    let kinds = [
        EntryKind::Noop,
        EntryKind::Write { range, payload_crc: crc32c(&payload) },
        EntryKind::Zero { range, discard: false },
        EntryKind::Zero { range, discard: true },
        EntryKind::Grow { size_blocks: 77 },
        EntryKind::Snapshot { id },
        EntryKind::SnapshotDelete { id },
    ];
    let entry = |(i, kind): (usize, EntryKind)| {
        let header = EntryHeader { place: place(5, 11 + i as u64), prev_epoch: Epoch(4), kind };
        let write = matches!(kind, EntryKind::Write { .. });
        Entry { header, payload: if write { payload.clone() } else { Bytes::new() } }
    };
    kinds.into_iter().enumerate().map(entry).collect()
}

/// What version 2 has besides (C2).
fn copies() -> Vec<Message> {
    use CopyMessage as C;
    let (view, part) = (ViewId(7), 1);
    let snapshot = |n: u8| SnapshotState {
        id: SnapshotId::from_bytes([n; 16]),
        place: place(2, u64::from(n)),
        size_blocks: 60,
    };
    let offered = View {
        id: view,
        place: place(4, 30),
        size_blocks: 77,
        snapshots: vec![snapshot(8), snapshot(9)],
    };
    let run = |count, hole| StampRun { count, stamp: place(3, 12), hole };
    let ranges = vec![BlockRange { start: 9, count: 1 }, BlockRange { start: 12, count: 2 }];
    let payload = Bytes::from(vec![0x5a; 3 * BLOCK_BYTES]);
    let copies = [
        C::Offer { view: offered, start: place(4, 20), settled: true },
        C::AskStamps { view, part, from: 1024 },
        C::Stamps { view, part, from: 1024, runs: vec![run(3, true), run(9, false)] },
        C::AskBlocks { view, part, ranges: ranges.clone() },
        C::Blocks { view, part, ranges, payload },
        C::Copied { view },
        C::Finish { view },
    ];
    let message = |copy| Message::Replica(envelope(), ReplicaMessage::Copy(copy));
    copies.into_iter().map(message).collect()
}

/// What version 3 has besides (C4).
fn repairs() -> Vec<Message> {
    use RepairMessage as R;
    let version = BlockVersion { snapshot: None, block: 77, stamp: place(3, 12) };
    let snapshot = Some(SnapshotId::from_bytes([8; 16]));
    let of_snapshot = BlockVersion { snapshot, ..version };
    let payload = Bytes::from(vec![0x5a; BLOCK_BYTES]);
    let repairs = [
        R::Ask { version },
        R::Ask { version: of_snapshot },
        R::Block { version: of_snapshot, payload },
        R::Declined { version, why: Declined::OtherVersion },
        R::Declined { version, why: Declined::Busy },
    ];
    let message = |repair| Message::Replica(envelope(), ReplicaMessage::Repair(repair));
    repairs.into_iter().map(message).collect()
}

/// What version 4 has besides (T10).
fn hand_overs() -> Vec<Message> {
    use HandOverMessage as H;
    let hand_overs = [
        H::TakeOver { number: 3 },
        H::Stands { number: 3 },
        H::Swapped { config: config() },
        H::Declined { number: 3, why: NotFollowing::Unfit },
        H::Declined { number: 3, why: NotFollowing::Lost },
    ];
    let message = |message| Message::Replica(envelope(), ReplicaMessage::HandOver(message));
    hand_overs.into_iter().map(message).collect()
}

fn messages() -> Vec<Message> {
    let later = copies().into_iter().chain(repairs()).chain(hand_overs());
    messages_of_version_1().into_iter().chain(later).collect()
}

fn messages_of_version_1() -> Vec<Message> {
    use ReplicaMessage as R;
    let replica = [
        R::Append { prev: place(4, 10), commit: place(4, 9), entries: entries() },
        R::Append { prev: place(4, 10), commit: place(4, 9), entries: Vec::new() },
        R::Ack { length: Lsn(10), matched: Lsn(12), commit: Lsn(9) },
        R::Refuse {
            named: place(4, 10),
            applied: place(2, 3),
            hint: place(3, 8),
            incomplete: true,
        },
        R::Seal { config: config(), sealed: vec![InstanceId::from_bytes([6; 16])] },
        R::Sealed(tail(None)),
        R::Sealed(tail(Some(Incomplete::Unknown))),
        R::Newer { config: Config { previous_members: None, single_copy: None, ..config() } },
        R::NoReplica,
        R::Consult,
        R::Opinion { misses: true, tail: tail(Some(Incomplete::AcknowledgedUpTo(place(2, 2)))) },
        R::Fetch { after: place(4, 10) },
        R::Fetched { after: place(4, 10), hint: place(4, 10), entries: entries() },
        R::GiveBack,
        R::Stand,
    ];
    let pair = [
        PairMessage::Beat { number: 3, processed: 2 },
        PairMessage::BeatAnswer {
            number: 3,
            grant: true,
            failed: false,
            exclusions_upto: 4,
            exclusions: vec![(VolumeId::from_bytes([1; 16]), Epoch(5))],
        },
        PairMessage::Exited { instance: InstanceId::from_bytes([6; 16]) },
    ];
    let instances = PairEnvelope {
        instance: InstanceId::from_bytes([4; 16]),
        to_instance: InstanceId::from_bytes([5; 16]),
    };
    let replica = replica.into_iter().map(|message| Message::Replica(envelope(), message));
    replica.chain(pair.into_iter().map(|message| Message::Pair(instances, message))).collect()
}

fn bytes_of(message: &Message) -> Vec<u8> {
    let (mut head, mut payloads) = (Vec::new(), Vec::new());
    encode(message, &mut head, &mut payloads);
    for payload in &payloads {
        head.extend_from_slice(payload);
    }
    head
}

fn decode(bytes: Vec<u8>) -> Result<Option<Frame>, WireError> {
    let mut decoder = Decoder::default();
    decoder.feed(Bytes::from(bytes));
    decoder.next_frame()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[test]
fn every_message_comes_back_as_it_was() {
    for message in messages() {
        let back = decode(bytes_of(&message)).expect("a frame").expect("whole");
        assert_eq!(back, Frame::Message(message));
    }
}

#[test]
fn pieces_of_any_size_give_the_same_frames() {
    let all: Vec<u8> = messages().iter().flat_map(bytes_of).collect();
    for size in [1, 7, 100, 4096, 5000, all.len()] {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for piece in all.chunks(size) {
            decoder.feed(Bytes::copy_from_slice(piece));
            while let Some(frame) = decoder.next_frame().expect("good frames") {
                frames.push(frame);
            }
        }
        let want: Vec<_> = messages().into_iter().map(Frame::Message).collect();
        assert_eq!(frames, want, "pieces of {size} bytes");
        assert_eq!(decoder.wanted_bytes(), HEADER_BYTES);
    }
}

#[test]
fn payloads_are_slices_of_what_was_fed() {
    let fed = Bytes::from(bytes_of(&messages()[0]));
    let within = fed.as_ptr_range();
    let mut decoder = Decoder::default();
    decoder.feed(fed.clone());
    let frame = decoder.next_frame().expect("a frame");
    let Some(Frame::Message(Message::Replica(_, ReplicaMessage::Append { entries, .. }))) = frame
    else {
        panic!("an append");
    };
    assert!(within.contains(&entries[1].payload.as_ptr()), "not copied");
}

#[test]
fn encoding_copies_no_payload() {
    let (mut head, mut payloads) = (Vec::new(), Vec::new());
    let entries = entries();
    let pointer = entries[1].payload.as_ptr();
    let append = ReplicaMessage::Append { prev: place(4, 10), commit: place(4, 9), entries };
    encode(&Message::Replica(envelope(), append), &mut head, &mut payloads);
    assert_eq!(payloads.len(), 1);
    assert_eq!(payloads[0].as_ptr(), pointer);
}

/// The bytes in docs/replication-protocol.md. They never change within a version.
#[test]
fn golden_bytes() {
    let ack = ReplicaMessage::Ack { length: Lsn(10), matched: Lsn(12), commit: Lsn(9) };
    let ack = hex(&bytes_of(&Message::Replica(envelope(), ack)));
    let ids =
        format!("{}{}{}{}", "01".repeat(16), "02".repeat(16), "03".repeat(16), "04".repeat(16));
    let fields = "05000000000000000a000000000000000c000000000000000900000000000000";
    assert_eq!(&ack[..32], "54524550010002006000000000000000");
    assert_eq!(ack[48..], ids + fields);
    let beat = PairMessage::Beat { number: 3, processed: 2 };
    let instances = PairEnvelope {
        instance: InstanceId::from_bytes([4; 16]),
        to_instance: InstanceId::from_bytes([5; 16]),
    };
    let beat = hex(&bytes_of(&Message::Pair(instances, beat)));
    assert_eq!(beat, GOLDEN_BEAT);
    let hello = Hello {
        version_min: 1,
        version_max: 1,
        cluster: [9; 16],
        node: NodeName::new("node-a"),
        instance: InstanceId::from_bytes([4; 16]),
        shard: 1,
        shards: 2,
        to_shard: 0,
    };
    let mut bytes = Vec::new();
    encode_hello(&hello, &mut bytes);
    assert_eq!(hex(&bytes), GOLDEN_HELLO);
    assert_eq!(decode(bytes), Ok(Some(Frame::Hello(hello))));
    let all: Vec<u8> = messages_of_version_1().iter().flat_map(bytes_of).collect();
    assert_eq!(format!("{:08x}", crc32c(&all)), GOLDEN_ALL, "CRC32C of one message of each kind");
}

/// What an engine says before it could speak on a link (L5).
#[test]
fn golden_bytes_of_a_proven_exit() {
    let exit = ProvenExit {
        cluster: [9; 16],
        node: NodeName::new("node-a"),
        instance: InstanceId::from_bytes([4; 16]),
        exited: vec![InstanceId::from_bytes([6; 16]), InstanceId::from_bytes([7; 16])],
    };
    let mut bytes = Vec::new();
    encode_proven_exit(&exit, &mut bytes);
    let fields = ["09", "066e6f64652d61", "04", "02", "06", "07"];
    let repeated = [16, 1, 16, 1, 16, 16];
    let fields: String = fields.iter().zip(repeated).map(|(text, n)| text.repeat(n)).collect();
    assert_eq!(hex(&bytes)[..32], *"54524550010030004800000000000000");
    assert_eq!(hex(&bytes)[48..], fields);
    assert_eq!(decode(bytes.clone()), Ok(Some(Frame::ProvenExit(exit))));
    let count = HEADER_BYTES + 16 + 7 + 16;
    for wrong in [0, 17] {
        let mut bytes = bytes.clone();
        bytes[count] = wrong;
        let body = crc32c(&bytes[HEADER_BYTES..]).to_le_bytes();
        bytes[16..20].copy_from_slice(&body);
        let crc = crc32c(&bytes[..20]).to_le_bytes();
        bytes[20..24].copy_from_slice(&crc);
        assert_eq!(decode(bytes), Err(WireError::Field("number of exits")));
    }
}

/// The messages of version 2, and who is sent them.
#[test]
fn golden_bytes_of_copies() {
    let copied = hex(&bytes_of(&copies()[5]));
    assert_eq!(&copied[..32], "54524550020013005000000000000000");
    assert_eq!(copied[copied.len() - 16..], *"0700000000000000");
    let all: Vec<u8> = copies().iter().flat_map(bytes_of).collect();
    assert_eq!(format!("{:08x}", crc32c(&all)), GOLDEN_COPIES, "CRC32C of all of them");
    assert!(copies().iter().all(|message| message.version() == 2));
    assert!(messages_of_version_1().iter().all(|message| message.version() == 1));
}

/// The messages of version 3, and who is sent them.
#[test]
fn golden_bytes_of_repairs() {
    let ask = hex(&bytes_of(&repairs()[1]));
    assert_eq!(&ask[..32], "54524550030015007100000000000000");
    let fields = format!("01{}4d00000000000000{}{}", "08".repeat(16), LSN_3, LSN_12);
    assert_eq!(ask[ask.len() - fields.len()..], *fields);
    let all: Vec<u8> = repairs().iter().flat_map(bytes_of).collect();
    assert_eq!(format!("{:08x}", crc32c(&all)), GOLDEN_REPAIRS, "CRC32C of all of them");
    assert!(repairs().iter().all(|message| message.version() == 3));
    let mut block = bytes_of(&repairs()[2]);
    *block.last_mut().expect("a payload") ^= 1;
    assert_eq!(decode(block), Err(WireError::BlocksChecksum));
}

/// The messages of version 4, and who is sent them.
#[test]
fn golden_bytes_of_hand_overs() {
    let declined = hex(&bytes_of(&hand_overs()[4]));
    assert_eq!(&declined[..32], "5452455004001b005100000000000000");
    assert_eq!(declined[declined.len() - 18..], *"030000000000000002");
    let all: Vec<u8> = hand_overs().iter().flat_map(bytes_of).collect();
    assert_eq!(format!("{:08x}", crc32c(&all)), GOLDEN_HAND_OVERS, "CRC32C of all of them");
    assert!(hand_overs().iter().all(|message| message.version() == 4));
}

const LSN_3: &str = "0300000000000000";
const LSN_12: &str = "0c00000000000000";

/// Whoever answers with more than was asked, or can be asked, is not believed.
#[test]
fn copies_are_bounded() {
    let tail = |bytes: &mut Vec<u8>, back: usize, with: &[u8]| {
        let at = bytes.len() - back;
        bytes[at..at + with.len()].copy_from_slice(with);
        let body = crc32c(&bytes[HEADER_BYTES..]).to_le_bytes();
        bytes[16..20].copy_from_slice(&body);
        let crc = crc32c(&bytes[..20]).to_le_bytes();
        bytes[20..24].copy_from_slice(&crc);
    };
    let mut stamps = bytes_of(&copies()[2]);
    tail(&mut stamps, 21, &(1_u32 << 20).to_le_bytes());
    assert_eq!(decode(stamps), Err(WireError::Field("run of stamps")));
    let mut ask = bytes_of(&copies()[3]);
    tail(&mut ask, 4, &257_u32.to_le_bytes());
    assert_eq!(decode(ask), Err(WireError::Field("number of blocks")));
    let mut blocks = bytes_of(&copies()[4]);
    *blocks.last_mut().expect("a payload") ^= 1;
    assert_eq!(decode(blocks), Err(WireError::BlocksChecksum));
}

const GOLDEN_BEAT: &str = concat!(
    "5452455001002000300000000000000003aaf112ae42f5e30404040404040404040404040404040405050505",
    "05050505050505050505050503000000000000000200000000000000"
);
const GOLDEN_HELLO: &str = concat!(
    "545245500100000031000000000000005384ac51f65a766e0100010009090909090909090909090909090909",
    "066e6f64652d6104040404040404040404040404040404010002000000"
);
const GOLDEN_ALL: &str = "b493710d";
const GOLDEN_COPIES: &str = "0598bc12";
const GOLDEN_REPAIRS: &str = "4c4ee560";
const GOLDEN_HAND_OVERS: &str = "452878de";

#[test]
fn lengths_are_refused_before_anything_is_kept() {
    let mut frame = bytes_of(&messages()[2]);
    frame[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let crc = crc32c(&frame[..20]).to_le_bytes();
    frame[20..24].copy_from_slice(&crc);
    assert!(matches!(decode(frame), Err(WireError::TooLong { what: "body", .. })));
}

#[test]
fn a_payload_that_is_not_its_own_is_refused() {
    let mut frame = bytes_of(&messages()[0]);
    *frame.last_mut().expect("a payload") ^= 1;
    assert_eq!(decode(frame), Err(WireError::PayloadChecksum(Lsn(12))));
}

#[test]
fn versions_meet_in_the_smaller_newest() {
    let hello = |version_min, version_max| Hello {
        version_min,
        version_max,
        cluster: [9; 16],
        node: NodeName::new("n"),
        instance: InstanceId::from_bytes([4; 16]),
        shard: 0,
        shards: 1,
        to_shard: 0,
    };
    assert_eq!(hello(1, 3).common_version(&hello(2, 5)), Some(3));
    assert_eq!(hello(1, 3).common_version(&hello(4, 5)), None);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = decode(bytes);
    }

    #[test]
    fn arbitrary_bodies_behind_a_good_header_never_panic(
        kind in any::<u8>(),
        body in proptest::collection::vec(any::<u8>(), 0..600),
        payload_bytes in 0_u32..64,
    ) {
        let mut frame = b"TREP".to_vec();
        frame.extend_from_slice(&2_u16.to_le_bytes());
        frame.extend_from_slice(&[kind, 0]);
        frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
        frame.extend_from_slice(&payload_bytes.to_le_bytes());
        frame.extend_from_slice(&crc32c(&body).to_le_bytes());
        let crc = crc32c(&frame).to_le_bytes();
        frame.extend_from_slice(&crc);
        frame.extend_from_slice(&body);
        frame.resize(frame.len() + payload_bytes as usize, 7);
        let _ = decode(frame);
    }

    #[test]
    fn a_flipped_bit_is_noticed(which in 0_usize..30, at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let message = messages().swap_remove(which);
        let mut frame = bytes_of(&message);
        let at = at.index(frame.len());
        frame[at] ^= 1 << bit;
        prop_assert_ne!(decode(frame), Ok(Some(Frame::Message(message))));
    }

    #[test]
    fn a_cut_frame_waits_for_the_rest(which in 0_usize..30, at in any::<prop::sample::Index>()) {
        let frame = bytes_of(&messages()[which]);
        let at = at.index(frame.len());
        prop_assert_eq!(decode(frame[..at].to_vec()), Ok(None));
    }
}
