//! Frames: a header, a body of fields, then payloads as they are.
//!
//! [`encode`] copies no payload: it hands out the pieces that follow the bytes it wrote. A
//! [`Decoder`] is fed with what the socket gave; where a frame lies within one fed buffer its
//! payloads are slices of that buffer, otherwise the frame is put together once. The header is
//! checked before a length is believed, so garbage costs no memory.

use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use thiserror::Error;

use crate::entry::{Entry, EntryKind};
use crate::ids::{Epoch, Lsn};

use super::wire::{Reader, Writer};
use super::{
    ENTRIES_MAX, EXCLUSIONS_MAX, EXITS_MAX, Envelope, Frame, Hello, Message, PairEnvelope,
    PairMessage, ProvenExit, ReplicaMessage, SEALED_MAX, VERSION, VERSION_MIN,
};
use super::{copy, hand_over, repair};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 24;
/// Most bytes of all payloads of one frame.
pub const PAYLOAD_BYTES_MAX: usize = 8 << 20;
/// Most bytes of the fields of one frame: `ENTRIES_MAX` entries and what goes with them.
pub const BODY_BYTES_MAX: usize = 64 << 10;

const MAGIC: [u8; 4] = *b"TREP";

/// Why bytes are no frame. The link is closed: after one bad frame there is no next.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// Another protocol, or out of step.
    #[error("not a replication frame")]
    Magic,
    /// A version that is not spoken here.
    #[error("protocol version {0}, this engine speaks {VERSION}")]
    Version(u16),
    /// The header does not have its checksum.
    #[error("the header's checksum is wrong")]
    HeaderChecksum,
    /// The body does not have its checksum.
    #[error("the body's checksum is wrong")]
    BodyChecksum,
    /// An entry's payload does not have its checksum.
    #[error("the payload's checksum is wrong at lsn {0}")]
    PayloadChecksum(Lsn),
    /// The blocks of a copy do not have their checksum.
    #[error("the checksum of the blocks of a copy is wrong")]
    BlocksChecksum,
    /// No such type of message.
    #[error("unknown type of message {0}")]
    Type(u8),
    /// A length beyond its limit.
    #[error("{what}: {bytes} bytes, the limit is {limit}")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// How long.
        bytes: usize,
        /// At most.
        limit: usize,
    },
    /// Fields end before the message does.
    #[error("the message is shorter than its fields")]
    Short,
    /// Bytes are left after the last field or payload.
    #[error("the message is longer than its fields")]
    Long,
    /// A field has a value that does not exist.
    #[error("bad {0}")]
    Field(&'static str),
    /// Entries do not follow each other.
    #[error("entries with a gap at lsn {0}")]
    Gap(Lsn),
}

/// CRC32C (Castagnoli), as in every format of this project.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

mod kind {
    pub const HELLO: u8 = 0;
    pub const APPEND: u8 = 1;
    pub const ACK: u8 = 2;
    pub const REFUSE: u8 = 3;
    pub const SEAL: u8 = 4;
    pub const SEALED: u8 = 5;
    pub const NEWER: u8 = 6;
    pub const NO_REPLICA: u8 = 7;
    pub const CONSULT: u8 = 8;
    pub const OPINION: u8 = 9;
    pub const FETCH: u8 = 10;
    pub const FETCHED: u8 = 11;
    pub const GIVE_BACK: u8 = 12;
    pub const STAND: u8 = 13;
    pub const BEAT: u8 = 32;
    pub const BEAT_ANSWER: u8 = 33;
    pub const EXITED: u8 = 34;
    pub const PROVEN_EXIT: u8 = 48;
}

/// Appends the frame's header and body to `head` and its payloads to `payloads`: what goes over the
/// link is all of `head`, then the payloads in order.
pub fn encode(message: &Message, head: &mut Vec<u8>, payloads: &mut Vec<Bytes>) {
    let start = head.len();
    let first_payload = payloads.len();
    head.resize(start + HEADER_BYTES, 0);
    let kind = match message {
        Message::Replica(envelope, message) => {
            Writer(head).envelope(envelope);
            replica_fields(message, head, payloads)
        }
        Message::Pair(envelope, message) => {
            let mut writer = Writer(head);
            writer.id(envelope.instance.as_bytes());
            writer.id(envelope.to_instance.as_bytes());
            pair_fields(message, &mut writer)
        }
    };
    let payload_bytes = payloads[first_payload..].iter().map(Bytes::len).sum();
    finish((message.version(), kind), payload_bytes, &mut head[start..]);
}

/// Appends a link's first frame to `head`.
pub fn encode_hello(hello: &Hello, head: &mut Vec<u8>) {
    let start = head.len();
    head.resize(start + HEADER_BYTES, 0);
    let mut writer = Writer(head);
    writer.u16(hello.version_min);
    writer.u16(hello.version_max);
    writer.id(&hello.cluster);
    writer.node(&hello.node);
    writer.id(hello.instance.as_bytes());
    writer.u16(hello.shard);
    writer.u16(hello.shards);
    writer.u16(hello.to_shard);
    finish((VERSION_MIN, kind::HELLO), 0, &mut head[start..]);
}

/// Appends the only frame of a connection that tells of an exit (L5) to `head`.
pub fn encode_proven_exit(exit: &ProvenExit, head: &mut Vec<u8>) {
    let start = head.len();
    head.resize(start + HEADER_BYTES, 0);
    let mut writer = Writer(head);
    writer.id(&exit.cluster);
    writer.node(&exit.node);
    writer.id(exit.instance.as_bytes());
    assert!((1..=EXITS_MAX).contains(&exit.exited.len()), "1 to {EXITS_MAX} exits");
    writer.u8(exit.exited.len() as u8);
    for exited in &exit.exited {
        writer.id(exited.as_bytes());
    }
    finish((VERSION_MIN, kind::PROVEN_EXIT), 0, &mut head[start..]);
}

fn replica_fields(message: &ReplicaMessage, head: &mut Vec<u8>, payloads: &mut Vec<Bytes>) -> u8 {
    let mut writer = Writer(head);
    match message {
        ReplicaMessage::Append { prev, commit, entries } => {
            writer.place(*prev);
            writer.place(*commit);
            entry_fields(entries, &mut writer, payloads);
            return kind::APPEND;
        }
        ReplicaMessage::Fetched { after, hint, entries } => {
            writer.place(*after);
            writer.place(*hint);
            entry_fields(entries, &mut writer, payloads);
            return kind::FETCHED;
        }
        ReplicaMessage::Ack { length, matched, commit } => {
            writer.u64(length.0);
            writer.u64(matched.0);
            writer.u64(commit.0);
            return kind::ACK;
        }
        ReplicaMessage::Refuse { named, applied, hint, incomplete } => {
            writer.place(*named);
            writer.place(*applied);
            writer.place(*hint);
            writer.flag(*incomplete);
            return kind::REFUSE;
        }
        ReplicaMessage::Seal { config, sealed } => {
            assert!(sealed.len() <= SEALED_MAX, "at most {SEALED_MAX} sealed instances");
            writer.config(config);
            writer.u8(sealed.len() as u8);
            for instance in sealed {
                writer.id(instance.as_bytes());
            }
            return kind::SEAL;
        }
        ReplicaMessage::Newer { config } => {
            writer.config(config);
            return kind::NEWER;
        }
        ReplicaMessage::Opinion { misses, tail } => {
            writer.flag(*misses);
            writer.tail(tail);
            return kind::OPINION;
        }
        ReplicaMessage::Copy(message) => return copy::fields(message, &mut writer, payloads),
        ReplicaMessage::Repair(message) => return repair::fields(message, &mut writer, payloads),
        ReplicaMessage::HandOver(message) => return hand_over::fields(message, &mut writer),
        _ => {}
    }
    match message {
        ReplicaMessage::Sealed(tail) => {
            writer.tail(tail);
            kind::SEALED
        }
        ReplicaMessage::Fetch { after } => {
            writer.place(*after);
            kind::FETCH
        }
        ReplicaMessage::NoReplica => kind::NO_REPLICA,
        ReplicaMessage::Consult => kind::CONSULT,
        ReplicaMessage::GiveBack => kind::GIVE_BACK,
        ReplicaMessage::Stand => kind::STAND,
        _ => unreachable!("written above"),
    }
}

fn entry_fields(entries: &[Entry], writer: &mut Writer<'_>, payloads: &mut Vec<Bytes>) {
    assert!(entries.len() <= ENTRIES_MAX, "at most {ENTRIES_MAX} entries in a message");
    writer.u16(entries.len() as u16);
    for entry in entries {
        assert_eq!(entry.payload.len(), entry.header.payload_bytes(), "an entry has its payload");
        writer.header(&entry.header);
        if !entry.payload.is_empty() {
            payloads.push(entry.payload.clone());
        }
    }
}

fn pair_fields(message: &PairMessage, writer: &mut Writer<'_>) -> u8 {
    match message {
        PairMessage::Beat { number, processed } => {
            writer.u64(*number);
            writer.u64(*processed);
            kind::BEAT
        }
        PairMessage::BeatAnswer { number, grant, failed, exclusions_upto, exclusions } => {
            assert!(exclusions.len() <= EXCLUSIONS_MAX, "at most {EXCLUSIONS_MAX} exclusions");
            writer.u64(*number);
            writer.flag(*grant);
            writer.flag(*failed);
            writer.u64(*exclusions_upto);
            writer.u16(exclusions.len() as u16);
            for (volume, epoch) in exclusions {
                writer.id(volume.as_bytes());
                writer.u64(epoch.0);
            }
            kind::BEAT_ANSWER
        }
        PairMessage::Exited { instance } => {
            writer.id(instance.as_bytes());
            kind::EXITED
        }
    }
}

/// Fills the header in, once the body is known.
fn finish((version, kind): (u16, u8), payload_bytes: usize, frame: &mut [u8]) {
    let (header, body) = frame.split_at_mut(HEADER_BYTES);
    assert!(body.len() <= BODY_BYTES_MAX, "a body of {} bytes", body.len());
    assert!(payload_bytes <= PAYLOAD_BYTES_MAX, "payloads of {payload_bytes} bytes");
    header[0..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&version.to_le_bytes());
    header[6] = kind;
    header[7] = 0;
    header[8..12].copy_from_slice(&(body.len() as u32).to_le_bytes());
    header[12..16].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
    header[16..20].copy_from_slice(&crc32c(body).to_le_bytes());
    let crc = crc32c(&header[..20]);
    header[20..24].copy_from_slice(&crc.to_le_bytes());
}

/// A checked header.
#[derive(Clone, Copy, Debug)]
struct Header {
    kind: u8,
    body_bytes: usize,
    payload_bytes: usize,
    body_crc: u32,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        if bytes[..4] != MAGIC {
            return Err(WireError::Magic);
        }
        let mut reader = Reader(&bytes[4..]);
        let version = reader.u16()?;
        let kind = reader.u8()?;
        let reserved = reader.u8()?;
        let body_bytes = reader.u32()? as usize;
        let payload_bytes = reader.u32()? as usize;
        let body_crc = reader.u32()?;
        if reader.u32()? != crc32c(&bytes[..20]) {
            return Err(WireError::HeaderChecksum);
        }
        if !(VERSION_MIN..=VERSION).contains(&version) && kind != kind::HELLO {
            return Err(WireError::Version(version));
        }
        if reserved != 0 {
            return Err(WireError::Field("reserved byte"));
        }
        limit("body", body_bytes, BODY_BYTES_MAX)?;
        limit("payloads", payload_bytes, PAYLOAD_BYTES_MAX)?;
        Ok(Self { kind, body_bytes, payload_bytes, body_crc })
    }

    fn frame_bytes(&self) -> usize {
        HEADER_BYTES + self.body_bytes + self.payload_bytes
    }
}

fn limit(what: &'static str, bytes: usize, limit: usize) -> Result<(), WireError> {
    if bytes > limit { Err(WireError::TooLong { what, bytes, limit }) } else { Ok(()) }
}

/// Turns the bytes of a link into frames, whatever pieces they come in.
#[derive(Debug, Default)]
pub struct Decoder {
    fed: VecDeque<Bytes>,
    fed_bytes: usize,
    header: Option<Header>,
}

impl Decoder {
    /// Takes what the socket gave.
    pub fn feed(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.fed_bytes += bytes.len();
            self.fed.push_back(bytes);
        }
    }

    /// Bytes that are missing to the next frame, as far as known: what to read into one buffer so
    /// that nothing is put together twice.
    pub fn wanted_bytes(&self) -> usize {
        let frame = self.header.map_or(HEADER_BYTES, |header| header.frame_bytes());
        frame.saturating_sub(self.fed_bytes)
    }

    /// The next frame, or none until more is fed.
    ///
    /// # Errors
    /// The link has to be closed: there is no next frame after a bad one.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        let header = match self.header {
            Some(header) => header,
            None => match self.peek_header() {
                Some(bytes) => *self.header.insert(Header::parse(&bytes)?),
                None => return Ok(None),
            },
        };
        if self.fed_bytes < header.frame_bytes() {
            return Ok(None);
        }
        self.header = None;
        let frame = self.take(header.frame_bytes());
        parse(header, &frame).map(Some)
    }

    fn peek_header(&self) -> Option<[u8; HEADER_BYTES]> {
        if self.fed_bytes < HEADER_BYTES {
            return None;
        }
        let mut header = [0; HEADER_BYTES];
        let bytes = self.fed.iter().flat_map(|piece| piece.iter());
        header.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        Some(header)
    }

    /// Takes `bytes` from the front: a slice where one buffer has them all.
    fn take(&mut self, bytes: usize) -> Bytes {
        self.fed_bytes -= bytes;
        let front = self.fed.front_mut().expect("as many bytes were fed");
        if front.len() >= bytes {
            let frame = front.split_to(bytes);
            if front.is_empty() {
                self.fed.pop_front();
            }
            return frame;
        }
        let mut frame = BytesMut::with_capacity(bytes);
        while frame.len() < bytes {
            let front = self.fed.front_mut().expect("as many bytes were fed");
            let piece = front.split_to(front.len().min(bytes - frame.len()));
            frame.extend_from_slice(&piece);
            if front.is_empty() {
                self.fed.pop_front();
            }
        }
        frame.freeze()
    }
}

fn parse(header: Header, frame: &Bytes) -> Result<Frame, WireError> {
    let body_end = HEADER_BYTES + header.body_bytes;
    let body = &frame[HEADER_BYTES..body_end];
    if crc32c(body) != header.body_crc {
        return Err(WireError::BodyChecksum);
    }
    let mut reader = Reader(body);
    let mut payloads = frame.slice(body_end..);
    let parsed = match header.kind {
        kind::HELLO => Frame::Hello(parse_hello(&mut reader)?),
        kind::PROVEN_EXIT => Frame::ProvenExit(parse_proven_exit(&mut reader)?),
        kind::BEAT..=kind::EXITED => {
            let envelope =
                PairEnvelope { instance: reader.instance()?, to_instance: reader.instance()? };
            Frame::Message(Message::Pair(envelope, parse_pair(header.kind, &mut reader)?))
        }
        kind::APPEND..=hand_over::DECLINED => {
            let envelope: Envelope = reader.envelope()?;
            let message = parse_replica(header.kind, &mut reader, &mut payloads)?;
            Frame::Message(Message::Replica(envelope, message))
        }
        other => return Err(WireError::Type(other)),
    };
    if !reader.0.is_empty() || !payloads.is_empty() {
        return Err(WireError::Long);
    }
    Ok(parsed)
}

fn parse_hello(reader: &mut Reader<'_>) -> Result<Hello, WireError> {
    let hello = Hello {
        version_min: reader.u16()?,
        version_max: reader.u16()?,
        cluster: reader.id()?,
        node: reader.node()?,
        instance: reader.instance()?,
        shard: reader.u16()?,
        shards: reader.u16()?,
        to_shard: reader.u16()?,
    };
    if hello.shard >= hello.shards {
        return Err(WireError::Field("number of shards"));
    }
    Ok(hello)
}

fn parse_proven_exit(reader: &mut Reader<'_>) -> Result<ProvenExit, WireError> {
    let (cluster, node, instance) = (reader.id()?, reader.node()?, reader.instance()?);
    let count = usize::from(reader.u8()?);
    if !(1..=EXITS_MAX).contains(&count) {
        return Err(WireError::Field("number of exits"));
    }
    let exited = (0..count).map(|_| reader.instance()).collect::<Result<_, _>>()?;
    Ok(ProvenExit { cluster, node, instance, exited })
}

fn parse_replica(
    kind: u8,
    reader: &mut Reader<'_>,
    payloads: &mut Bytes,
) -> Result<ReplicaMessage, WireError> {
    Ok(match kind {
        kind::APPEND => {
            let (prev, commit) = (reader.place()?, reader.place()?);
            let entries = parse_entries(prev.lsn, reader, payloads)?;
            ReplicaMessage::Append { prev, commit, entries }
        }
        kind::FETCHED => {
            let (after, hint) = (reader.place()?, reader.place()?);
            let entries = parse_entries(after.lsn, reader, payloads)?;
            ReplicaMessage::Fetched { after, hint, entries }
        }
        kind::ACK => ReplicaMessage::Ack {
            length: Lsn(reader.u64()?),
            matched: Lsn(reader.u64()?),
            commit: Lsn(reader.u64()?),
        },
        kind::REFUSE => ReplicaMessage::Refuse {
            named: reader.place()?,
            applied: reader.place()?,
            hint: reader.place()?,
            incomplete: reader.flag()?,
        },
        kind::SEAL => {
            let config = reader.config()?;
            let count = usize::from(reader.u8()?);
            if count > SEALED_MAX {
                return Err(WireError::Field("number of sealed instances"));
            }
            let sealed = (0..count).map(|_| reader.instance()).collect::<Result<_, _>>()?;
            ReplicaMessage::Seal { config, sealed }
        }
        kind::SEALED => ReplicaMessage::Sealed(reader.tail()?),
        kind::NEWER => ReplicaMessage::Newer { config: reader.config()? },
        kind::NO_REPLICA => ReplicaMessage::NoReplica,
        kind::CONSULT => ReplicaMessage::Consult,
        kind::OPINION => ReplicaMessage::Opinion { misses: reader.flag()?, tail: reader.tail()? },
        kind::FETCH => ReplicaMessage::Fetch { after: reader.place()? },
        kind::GIVE_BACK => ReplicaMessage::GiveBack,
        kind::STAND => ReplicaMessage::Stand,
        copy::OFFER..=copy::FINISH => ReplicaMessage::Copy(copy::parse(kind, reader, payloads)?),
        repair::ASK..=repair::DECLINED => {
            ReplicaMessage::Repair(repair::parse(kind, reader, payloads)?)
        }
        hand_over::TAKE_OVER..=hand_over::DECLINED => {
            ReplicaMessage::HandOver(hand_over::parse(kind, reader)?)
        }
        other => return Err(WireError::Type(other)),
    })
}

fn parse_entries(
    prev: Lsn,
    reader: &mut Reader<'_>,
    payloads: &mut Bytes,
) -> Result<Vec<Entry>, WireError> {
    let count = usize::from(reader.u16()?);
    if count > ENTRIES_MAX {
        return Err(WireError::Field("number of entries"));
    }
    let mut entries = Vec::with_capacity(count.min(reader.0.len()));
    let mut lsn = prev;
    for _ in 0..count {
        let header = reader.header()?;
        if header.place.lsn.0 != lsn.0.checked_add(1).ok_or(WireError::Gap(lsn))? {
            return Err(WireError::Gap(header.place.lsn));
        }
        lsn = header.place.lsn;
        let bytes = header.payload_bytes();
        if bytes > payloads.len() {
            return Err(WireError::Short);
        }
        let payload = payloads.split_to(bytes);
        if let EntryKind::Write { payload_crc, .. } = header.kind
            && crc32c(&payload) != payload_crc
        {
            return Err(WireError::PayloadChecksum(lsn));
        }
        entries.push(Entry { header, payload });
    }
    Ok(entries)
}

fn parse_pair(kind: u8, reader: &mut Reader<'_>) -> Result<PairMessage, WireError> {
    Ok(match kind {
        kind::BEAT => PairMessage::Beat { number: reader.u64()?, processed: reader.u64()? },
        kind::BEAT_ANSWER => {
            let (number, grant, failed) = (reader.u64()?, reader.flag()?, reader.flag()?);
            let exclusions_upto = reader.u64()?;
            let count = usize::from(reader.u16()?);
            if count > EXCLUSIONS_MAX {
                return Err(WireError::Field("number of exclusions"));
            }
            let exclusions = (0..count)
                .map(|_| Ok((reader.volume()?, Epoch(reader.u64()?))))
                .collect::<Result<_, WireError>>()?;
            PairMessage::BeatAnswer { number, grant, failed, exclusions_upto, exclusions }
        }
        kind::EXITED => PairMessage::Exited { instance: reader.instance()? },
        other => return Err(WireError::Type(other)),
    })
}
