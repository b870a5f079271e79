//! What a step works with beside the replica itself: time, storage, links, and where answers go.

use std::collections::BTreeMap;

use tercet_proto::message::{Envelope, Message, ReplicaMessage};
use tercet_proto::storage::Storage;
use tercet_proto::{
    Epoch, InstanceId, Instant, NewReplica, NodeName, Place, ReplicaId, Token, VolumeId,
};

use crate::api::{AssociationId, HostCommand, Output, PeerId};
use crate::copy_source::{CopyRead, CopyStamps};
use crate::lease::Pairs;
use crate::options::Options;
#[cfg(feature = "canary")]
use crate::options::canary;
use crate::repair::VersionRead;

/// Borrowed for one step.
pub(crate) struct Cx<'a> {
    pub now: Instant,
    pub options: &'a Options,
    pub storage: &'a mut dyn Storage,
    pub out: &'a mut Vec<Output>,
    pub pairs: &'a mut Pairs,
    pub tokens: &'a mut Tokens,
}

impl Cx<'_> {
    /// Sends to the replica `to` on `node`, when there is a link.
    pub fn send(&mut self, node: &NodeName, to: ReplicaId, from: Sender, message: ReplicaMessage) {
        if let Some(peer) = self.pairs.route(node, to, from.volume) {
            self.answer(peer, to, from, message);
        }
    }

    /// Whether that instance of that node has ended, proven (L5).
    pub fn has_exited(&self, node: &NodeName, instance: InstanceId) -> bool {
        #[cfg(feature = "canary")]
        if canary!(self.options, ExitOfAnyInstance) && self.pairs.any_exited(node) {
            return true;
        }
        self.pairs.has_exited(node, instance)
    }

    /// Sends over this very link.
    pub fn answer(&mut self, peer: PeerId, to: ReplicaId, from: Sender, message: ReplicaMessage) {
        let instance = self.options.identity.instance;
        let Sender { volume, replica, epoch } = from;
        let envelope = Envelope { volume, from: replica, to, instance, epoch };
        self.out.push(Output::Send(peer, Message::Replica(envelope, message)));
    }
}

/// Who speaks, and about which epoch.
#[derive(Clone, Copy, Debug, Hash)]
pub(crate) struct Sender {
    pub volume: VolumeId,
    pub replica: ReplicaId,
    pub epoch: Epoch,
}

/// What an answer of storage or of the agent is for.
#[derive(Clone, Debug, Hash)]
pub(crate) enum Purpose {
    /// `create_replica` for a control request.
    Create(Token, NewReplica, Kind),
    /// `set_incomplete` for a learner that has just been made (M1).
    Learner(Token, VolumeId),
    /// `delete_replica` for a control request.
    Delete(Token, VolumeId),
    /// `set_promise`.
    Promise(VolumeId),
    /// `read` for a host's command.
    HostRead(VolumeId, HostRead),
    /// `read_log` for a lagging member (C1).
    LagRead(VolumeId, Epoch, ReplicaId),
    /// `read_log` for a new primary's fetch (T5).
    FetchRead(VolumeId, FetchRead),
    /// `read_view` for a member that copies (C2).
    CopyRead(CopyRead),
    /// `view_stamps` for a member that copies (C2).
    CopyStamps(CopyStamps),
    /// `stamps` of a replica that is copied (C2).
    OwnStamps(VolumeId),
    /// A step of a copy here (C2).
    Copy(VolumeId),
    /// `read_version` for a member whose block is bad (C4).
    VersionRead(VersionRead),
    /// `repair` of a bad block here (C4).
    Repair(VolumeId),
    /// `chunk_sums` for a control request.
    Sums(Token, Place),
    /// `chunk_map` for a control request.
    Chunks(Token, Place),
    /// A compare-and-swap.
    Swap(VolumeId),
}

/// What a replica is made as (T9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// One of a new volume's.
    First,
    /// To take another's place (M1).
    Learner,
}

/// A host's command that waits for bytes.
#[derive(Clone, Debug, Hash)]
pub(crate) struct HostRead {
    pub epoch: Epoch,
    pub association: AssociationId,
    pub token: Token,
    pub command: HostCommand,
    /// How often it has met a bad block (C4).
    pub met_bad: u8,
}

/// Whom to send the entries.
#[derive(Clone, Debug, Hash)]
pub(crate) struct FetchRead {
    pub epoch: Epoch,
    pub peer: PeerId,
    pub to: ReplicaId,
    pub after: Place,
}

/// Requests that are out, by the token that their answer will carry.
#[derive(Clone, Debug, Hash, Default)]
pub(crate) struct Tokens {
    last: u64,
    out: BTreeMap<Token, Purpose>,
}

impl Tokens {
    pub fn issue(&mut self, purpose: Purpose) -> Token {
        self.last += 1;
        let token = Token(self.last);
        self.out.insert(token, purpose);
        token
    }

    pub fn take(&mut self, token: Token) -> Option<Purpose> {
        self.out.remove(&token)
    }

    /// Whether a replica of this volume is being made or deleted.
    pub fn is_changing(&self, volume: VolumeId) -> bool {
        self.out.values().any(|purpose| match purpose {
            Purpose::Create(_, new, _) => new.volume == volume,
            Purpose::Delete(_, one) | Purpose::Learner(_, one) => *one == volume,
            _ => false,
        })
    }
}

#[cfg(feature = "model")]
impl Tokens {
    /// See `Node::forget_pace`: the number of a request that was answered is free again.
    pub fn forget_pace(&mut self) {
        self.last = self.out.keys().next_back().map_or(0, |token| token.0);
    }
}
