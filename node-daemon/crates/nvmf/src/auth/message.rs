//! Messages of DH-HMAC-CHAP byte by byte (Base 8.13.5), and the commands that carry them (Base 6.1,
//! 6.2). All begin with AUTH_TYPE 0, AUTH_ID 1 and T_ID 4-5.

use super::{Group, Hash};
use crate::command::{Data, Entry};
use crate::le::{put_u16, put_u32, u16_at, u32_at};

/// Longest message: a reply with two outputs of SHA-512 and a value of the largest group is 1,168
/// bytes; Linux asks for 4,096 whatever comes.
pub const MESSAGE_BYTES_MAX: usize = 4096;

/// AUTH_TYPE of messages that all protocols share, and of this protocol's own.
const COMMON: u8 = 0;
const DHCHAP: u8 = 1;
/// Bytes in front of what a message carries.
const HEADER_BYTES: usize = 16;
/// A protocol descriptor of Negotiate, and where its groups begin.
const DESCRIPTOR_BYTES: usize = 64;
const DESCRIPTOR_GROUPS: usize = 34;
/// Identifiers that fit into a descriptor, of each kind.
const IDENTIFIERS_MAX: usize = 30;

/// AUTH_ID.
mod id {
    pub const NEGOTIATE: u8 = 0x00;
    pub const CHALLENGE: u8 = 0x01;
    pub const REPLY: u8 = 0x02;
    pub const SUCCESS1: u8 = 0x03;
    pub const SUCCESS2: u8 = 0x04;
    pub const FAILURE2: u8 = 0xf0;
    pub const FAILURE1: u8 = 0xf1;
}

/// Why authentication fails: the reason code explanation (the reason code is always 01h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u8)]
pub enum FailureReason {
    /// 01h.
    #[error("the secret is another one")]
    Failed = 1,
    /// 02h.
    #[error("the protocol is not DH-HMAC-CHAP")]
    Protocol = 2,
    /// 03h.
    #[error("a secure channel is asked for")]
    Concatenation = 3,
    /// 04h.
    #[error("no hash function in common")]
    Hash = 4,
    /// 05h.
    #[error("no Diffie-Hellman group in common")]
    Group = 5,
    /// 06h.
    #[error("a message is malformed")]
    Payload = 6,
    /// 07h.
    #[error("a message came out of order")]
    Message = 7,
}

impl FailureReason {
    fn from_wire(byte: u8) -> Self {
        use FailureReason as R;
        [R::Protocol, R::Concatenation, R::Hash, R::Group, R::Payload, R::Message]
            .into_iter()
            .find(|reason| *reason as u8 == byte)
            .unwrap_or(R::Failed)
    }
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// SC_C 6, NAPD 7, descriptors from 8: AUTHID 0, HALEN 2, DHLEN 3, hashes from 4, groups from 34.
    Negotiate {
        transaction: u16,
        concatenates: bool,
        hashes: Vec<u8>,
        groups: Vec<u8>,
    },
    /// HL 6, HashID 8, DHgID 9, DHVLEN 10-11, SEQNUM 12-15, then C1 and the DH value.
    Challenge {
        transaction: u16,
        hash: Hash,
        group: Group,
        sequence: u32,
        nonce: Vec<u8>,
        public: Vec<u8>,
    },
    /// HL 6, CVALID 8, DHVLEN 10-11, SEQNUM 12-15, then R1, C2 (room for it without one as well) and
    /// the DH value.
    Reply {
        transaction: u16,
        response: Vec<u8>,
        sequence: u32,
        nonce: Option<Vec<u8>>,
        public: Vec<u8>,
    },
    /// HL 6, RVALID 8, then R2 if that is set.
    Success1 {
        transaction: u16,
        hash: Hash,
        response: Option<Vec<u8>>,
    },
    Success2 {
        transaction: u16,
    },
    /// Reason code 6, its explanation 7; which of both sides says so.
    Failure {
        transaction: u16,
        by_host: bool,
        reason: FailureReason,
    },
}

fn header(auth_type: u8, auth_id: u8, transaction: u16) -> Vec<u8> {
    let mut out = vec![0; HEADER_BYTES];
    (out[0], out[1]) = (auth_type, auth_id);
    put_u16(&mut out, 4, transaction);
    out
}

impl Message {
    pub(super) fn transaction(&self) -> u16 {
        match self {
            Self::Negotiate { transaction, .. }
            | Self::Challenge { transaction, .. }
            | Self::Reply { transaction, .. }
            | Self::Success1 { transaction, .. }
            | Self::Success2 { transaction }
            | Self::Failure { transaction, .. } => *transaction,
        }
    }

    pub(super) fn to_wire(&self) -> Vec<u8> {
        match self {
            Self::Negotiate { transaction, concatenates, hashes, groups } => {
                let mut out = header(COMMON, id::NEGOTIATE, *transaction);
                out.resize(8 + DESCRIPTOR_BYTES, 0);
                (out[6], out[7]) = (u8::from(*concatenates), 1);
                (out[8], out[10], out[11]) = (DHCHAP, hashes.len() as u8, groups.len() as u8);
                out[12..12 + hashes.len()].copy_from_slice(hashes);
                let at = 8 + DESCRIPTOR_GROUPS;
                out[at..at + groups.len()].copy_from_slice(groups);
                out
            }
            Self::Challenge { transaction, hash, group, sequence, nonce, public } => {
                let mut out = header(DHCHAP, id::CHALLENGE, *transaction);
                (out[6], out[8], out[9]) = (hash.bytes() as u8, *hash as u8, *group as u8);
                put_u16(&mut out, 10, public.len() as u16);
                put_u32(&mut out, 12, *sequence);
                out.extend_from_slice(nonce);
                out.extend_from_slice(public);
                out
            }
            Self::Reply { transaction, response, sequence, nonce, public } => {
                let mut out = header(DHCHAP, id::REPLY, *transaction);
                (out[6], out[8]) = (response.len() as u8, u8::from(nonce.is_some()));
                put_u16(&mut out, 10, public.len() as u16);
                put_u32(&mut out, 12, *sequence);
                out.extend_from_slice(response);
                out.extend_from_slice(nonce.as_ref().unwrap_or(&vec![0; response.len()]));
                out.extend_from_slice(public);
                out
            }
            Self::Success1 { transaction, hash, response } => {
                let mut out = header(DHCHAP, id::SUCCESS1, *transaction);
                (out[6], out[8]) = (hash.bytes() as u8, u8::from(response.is_some()));
                out.extend_from_slice(response.as_deref().unwrap_or_default());
                out
            }
            Self::Success2 { transaction } => header(DHCHAP, id::SUCCESS2, *transaction),
            Self::Failure { transaction, by_host, reason } => {
                const FAILED: u8 = 1;
                let which = if *by_host { id::FAILURE2 } else { id::FAILURE1 };
                let mut out = header(COMMON, which, *transaction);
                (out[6], out[7]) = (FAILED, *reason as u8);
                out
            }
        }
    }

    /// From the bytes of a transfer, which may be longer than the message.
    pub(super) fn parse(data: &[u8]) -> Result<Self, FailureReason> {
        if data.len() < 8 {
            return Err(FailureReason::Payload);
        }
        let transaction = u16_at(data, 4);
        match (data[0], data[1]) {
            (COMMON, id::NEGOTIATE) => parse_negotiate(transaction, data),
            (DHCHAP, id::CHALLENGE) => parse_challenge(transaction, data),
            (DHCHAP, id::REPLY) => parse_reply(transaction, data),
            (DHCHAP, id::SUCCESS1) => parse_success1(transaction, data),
            (DHCHAP, id::SUCCESS2) => Ok(Self::Success2 { transaction }),
            (COMMON | DHCHAP, which @ (id::FAILURE1 | id::FAILURE2)) => Ok(Self::Failure {
                transaction,
                by_host: which == id::FAILURE2,
                reason: FailureReason::from_wire(data[7]),
            }),
            _ => Err(FailureReason::Message),
        }
    }
}

fn parse_negotiate(transaction: u16, data: &[u8]) -> Result<Message, FailureReason> {
    let (concatenates, descriptors) = (data[6] != 0, usize::from(data[7]));
    for descriptor in data[8..].chunks_exact(DESCRIPTOR_BYTES).take(descriptors) {
        if descriptor[0] != DHCHAP {
            continue;
        }
        let (hashes, groups) = (usize::from(descriptor[2]), usize::from(descriptor[3]));
        if hashes > IDENTIFIERS_MAX || groups > IDENTIFIERS_MAX {
            return Err(FailureReason::Payload);
        }
        return Ok(Message::Negotiate {
            transaction,
            concatenates,
            hashes: descriptor[4..4 + hashes].to_vec(),
            groups: descriptor[DESCRIPTOR_GROUPS..DESCRIPTOR_GROUPS + groups].to_vec(),
        });
    }
    Err(FailureReason::Protocol)
}

/// Cuts that many bytes off the front.
fn cut<'a>(data: &mut &'a [u8], bytes: usize) -> Result<&'a [u8], FailureReason> {
    let (front, rest) = data.split_at_checked(bytes).ok_or(FailureReason::Payload)?;
    *data = rest;
    Ok(front)
}

fn parse_challenge(transaction: u16, data: &[u8]) -> Result<Message, FailureReason> {
    let mut rest = data;
    let head = cut(&mut rest, HEADER_BYTES)?;
    let hash = Hash::from_wire(head[8]).ok_or(FailureReason::Hash)?;
    let group = Group::from_wire(head[9]).ok_or(FailureReason::Group)?;
    let public_bytes = usize::from(u16_at(head, 10));
    if usize::from(head[6]) != hash.bytes() || public_bytes != group.bytes() {
        return Err(FailureReason::Payload);
    }
    Ok(Message::Challenge {
        transaction,
        hash,
        group,
        sequence: u32_at(head, 12),
        nonce: cut(&mut rest, hash.bytes())?.to_vec(),
        public: cut(&mut rest, public_bytes)?.to_vec(),
    })
}

fn parse_reply(transaction: u16, data: &[u8]) -> Result<Message, FailureReason> {
    let mut rest = data;
    let head = cut(&mut rest, HEADER_BYTES)?;
    let hash_bytes = usize::from(head[6]);
    let response = cut(&mut rest, hash_bytes)?.to_vec();
    let nonce = cut(&mut rest, hash_bytes)?.to_vec();
    Ok(Message::Reply {
        transaction,
        response,
        sequence: u32_at(head, 12),
        nonce: (head[8] & 1 != 0).then_some(nonce),
        public: cut(&mut rest, usize::from(u16_at(head, 10)))?.to_vec(),
    })
}

fn parse_success1(transaction: u16, data: &[u8]) -> Result<Message, FailureReason> {
    let mut rest = data;
    let head = cut(&mut rest, HEADER_BYTES)?;
    let hash = Hash::ALL.into_iter().find(|hash| hash.bytes() == usize::from(head[6]));
    let hash = hash.ok_or(FailureReason::Payload)?;
    let response = match head[8] & 1 {
        0 => None,
        _ => Some(cut(&mut rest, hash.bytes())?.to_vec()),
    };
    Ok(Message::Success1 { transaction, hash, response })
}

/// Authentication Send and Receive: SPSP0 41, SPSP1 42, SECP 43, TL or AL 44-47.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuthEntry {
    /// SECP.
    pub protocol: u8,
    /// SPSP1 and SPSP0.
    pub specific: u16,
    /// TL or AL.
    pub bytes: u32,
}

impl AuthEntry {
    /// SECP and SPSP of the NVMe protocols.
    const NVME: (u8, u16) = (0xe9, 0x0101);

    /// From a command.
    pub fn parse(entry: &Entry) -> Self {
        Self { protocol: entry.0[43], specific: u16_at(&entry.0, 41), bytes: u32_at(&entry.0, 44) }
    }

    /// Whether the fields are those of the protocols of this specification.
    pub fn is_nvme(self) -> bool {
        (self.protocol, self.specific) == Self::NVME
    }

    /// A command of this Fabrics type; a message that is sent goes along in the capsule.
    pub fn to_entry(kind: u8, id: u16, bytes: u32, data: Data) -> Entry {
        let mut entry = Entry::fabrics(kind, id);
        entry.0[43] = Self::NVME.0;
        put_u16(&mut entry.0, 41, Self::NVME.1);
        put_u32(&mut entry.0, 44, bytes);
        entry.set_data(data);
        entry
    }
}
