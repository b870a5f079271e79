//! A message on its way, as a number.
//!
//! The network of a state is the sorted list of the numbers of all messages that were ever sent and
//! may still matter: each may arrive at any later moment, again, or never. So loss, duplication and
//! reordering are in every state, and a message that is sent twice is one. The number's low bits say
//! what [`Packet::may_matter`] needs, the others are a hash of the message; the message itself is
//! looked up in [`Packets`] only when a node meets it for the first time.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::sync::{Arc, RwLock};

use tercet_proto::message::{HandOverMessage, Message, PairMessage, ReplicaMessage};

/// A message by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Packet(u64);

/// Bits of the number, from the lowest: to, from, starts of both, epoch, kind; then the hash.
const FROM: u32 = 2;
const TO_STARTS: u32 = 4;
const FROM_STARTS: u32 = 6;
const EPOCH: u32 = 8;
const KIND: u32 = 12;
const HASH: u32 = 14;

/// What can make a message pointless.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Nothing but the end of an instance.
    Lasting = 0,
    /// An answer to whoever leads that epoch: nobody listens who has promised a newer one.
    Answer = 1,
    /// A grant, pointless when time has gone on.
    Grant = 2,
}

/// A hash that is the same in each run.
pub fn hash_of(value: &impl Hash) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(value)
}

impl Packet {
    fn new(route: Route, message: &Message) -> Self {
        let (kind, epoch) = match message {
            Message::Replica(envelope, message) => {
                use HandOverMessage::{Declined, Stands};
                use ReplicaMessage::{Ack, Fetched, HandOver, NoReplica, Refuse, Sealed};
                let answers = matches!(
                    message,
                    Ack { .. }
                        | Refuse { .. }
                        | Sealed(_)
                        | Fetched { .. }
                        | NoReplica
                        | HandOver(Stands { .. } | Declined { .. })
                );
                (if answers { Kind::Answer } else { Kind::Lasting }, envelope.epoch.0)
            }
            Message::Pair(_, PairMessage::BeatAnswer { .. }) => (Kind::Grant, 0),
            Message::Pair(..) => (Kind::Lasting, 0),
        };
        assert!(epoch < 16 && route.starts.0 < 4 && route.starts.1 < 4, "bits of a number");
        let low = route.to as u64
            | (route.from as u64) << FROM
            | u64::from(route.starts.1) << TO_STARTS
            | u64::from(route.starts.0) << FROM_STARTS
            | epoch << EPOCH
            | (kind as u64) << KIND;
        Self(hash_of(&(route, message)) << HASH | low)
    }

    fn bits(self, at: u32, count: u32) -> u64 {
        self.0 >> at & ((1 << count) - 1)
    }

    /// The node that it is for.
    pub fn to(self) -> usize {
        self.bits(0, 2) as usize
    }

    /// The node that sent it.
    pub fn from(self) -> usize {
        self.bits(FROM, 2) as usize
    }

    /// Whether it was sent by that start of its sender to that start of its receiver.
    fn is_between(self, from_starts: u8, to_starts: u8) -> bool {
        self.bits(FROM_STARTS, 2) == u64::from(from_starts)
            && self.bits(TO_STARTS, 2) == u64::from(to_starts)
    }

    /// Whether its arrival can still change anything. Links belong to two starts. An answer to one
    /// who has promised a newer epoch finds nobody who leads that epoch (T1, T8).
    pub fn may_matter(self, from_starts: u8, to_starts: u8, to_promised: u64) -> bool {
        let answered = self.bits(KIND, 2) == Kind::Answer as u64;
        self.is_between(from_starts, to_starts) && !(answered && self.bits(EPOCH, 4) < to_promised)
    }

    /// A grant: it runs out with time (L2).
    pub fn is_grant(self) -> bool {
        self.bits(KIND, 2) == Kind::Grant as u64
    }
}

/// Between which starts of which nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Route {
    /// The sender.
    pub from: usize,
    /// The receiver.
    pub to: usize,
    /// The sender's and the receiver's count of starts.
    pub starts: (u8, u8),
}

/// Every message that was ever sent in any state, by its number.
#[derive(Debug, Default)]
pub struct Packets {
    known: RwLock<HashMap<Packet, Arc<(Route, Message)>>>,
}

impl Packets {
    /// The number of a message.
    pub fn intern(&self, route: Route, message: Message) -> Packet {
        let packet = Packet::new(route, &message);
        let mut known = self.known.write().expect("no panic while it is held");
        let there = known.entry(packet).or_insert_with(|| Arc::new((route, message.clone())));
        assert_eq!(**there, (route, message), "two messages of one number");
        packet
    }

    /// The message of a number.
    pub fn get(&self, packet: Packet) -> Arc<(Route, Message)> {
        let known = self.known.read().expect("no panic while it is held");
        Arc::clone(&known[&packet])
    }

    /// How many different messages there are.
    pub fn count(&self) -> usize {
        self.known.read().expect("no panic while it is held").len()
    }
}
