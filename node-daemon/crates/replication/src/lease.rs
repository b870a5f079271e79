//! Pairs of shards: liveness (T2), grants (L2), exclusions (L3), proven exits (L5).
//!
//! A pair is two engine *instances* (L3): a peer that comes back with another instance is a new
//! pair, and numbers, grants and exclusions start anew. Each side is both holder (it asks) and
//! granter (it answers). One answer carries echo and grant, and with it every exclusion that the
//! holder has not said to have processed, so a grant that arrives is never ahead of its exclusions:
//! where they do not all fit, the answer is no grant.
//!
//! What a grant means for a volume is decided in `replica.rs` (`lease_until`): only for a member that
//! has answered in this epoch, as this instance, and is not excluded.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tercet_proto::message::{EXCLUSIONS_MAX, Message, PairEnvelope, PairMessage};
use tercet_proto::{Epoch, InstanceId, Instant, Member, NodeName, ReplicaId, VolumeId};

use crate::api::{Output, PeerId};
use crate::options::Identity;

/// Beats of which the sending time is remembered; at 4 a second more than any lease.
const BEATS_REMEMBERED: usize = 64;
/// Proven exits that are remembered.
const EXITS_REMEMBERED: usize = 256;

/// This shard and one at a peer.
#[derive(Clone, Debug, Hash)]
struct Pair {
    instance: InstanceId,
    shards: u16,
    /// Of the protocol, that both speak.
    version: u16,
    up: bool,
    failed: bool,
    // As the one who asks.
    number: u64,
    sent: VecDeque<(u64, Instant)>,
    echoed: Instant,
    granted_until: Instant,
    processed: u64,
    // As the one who grants: exclusions that the holder has not processed, by number.
    exclusions: BTreeMap<u64, (VolumeId, Epoch)>,
    excluded: u64,
}

impl Pair {
    fn new(instance: InstanceId, shards: u16, version: u16) -> Self {
        Self {
            instance,
            shards,
            version,
            up: true,
            failed: false,
            number: 0,
            sent: VecDeque::new(),
            echoed: Instant(0),
            granted_until: Instant(0),
            processed: 0,
            exclusions: BTreeMap::new(),
            excluded: 0,
        }
    }
}

/// Every pair of this shard.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Pairs {
    me: Identity,
    held: Duration,
    by_peer: BTreeMap<PeerId, Pair>,
    /// When the last grant to an instance was given; kept while it can be out.
    granted: BTreeMap<InstanceId, Instant>,
    /// Instances that have ended, each proven by its own node.
    exited: VecDeque<(NodeName, InstanceId)>,
    /// Instances of this node that have ended: each peer is told.
    own_exits: Vec<InstanceId>,
    /// This shard's store has failed.
    pub failed: bool,
    /// This engine is about to stop: it takes nothing over any more.
    pub stopping: bool,
}

/// Exclusions that a peer's answer brought: volumes that do not count its grants any more.
pub(crate) type Excluded = Vec<(VolumeId, Epoch)>;

impl Pairs {
    pub fn new(me: Identity, held: Duration) -> Self {
        Self {
            me,
            held,
            by_peer: BTreeMap::new(),
            granted: BTreeMap::new(),
            exited: VecDeque::new(),
            own_exits: Vec::new(),
            failed: false,
            stopping: false,
        }
    }

    pub fn up(
        &mut self,
        peer: &PeerId,
        (instance, shards, version): (InstanceId, u16, u16),
        now: Instant,
        out: &mut Vec<Output>,
    ) {
        match self.by_peer.get_mut(peer) {
            Some(pair) if pair.instance == instance => {
                pair.up = true;
                pair.shards = shards;
                pair.version = version;
            }
            _ => {
                self.by_peer.insert(peer.clone(), Pair::new(instance, shards, version));
            }
        }
        let to_instance = instance;
        for instance in self.own_exits.clone() {
            let exit = PairMessage::Exited { instance };
            self.send(peer.clone(), to_instance, exit, out);
        }
        self.beat(peer, now, out);
    }

    pub fn down(&mut self, peer: &PeerId) {
        if let Some(pair) = self.by_peer.get_mut(peer) {
            pair.up = false; // proves nothing (L5): grants stay what they are
        }
    }

    fn send(
        &self,
        peer: PeerId,
        to_instance: InstanceId,
        message: PairMessage,
        out: &mut Vec<Output>,
    ) {
        let envelope = PairEnvelope { instance: self.me.instance, to_instance };
        out.push(Output::Send(peer, Message::Pair(envelope, message)));
    }

    /// Asks every peer for a grant and for an echo.
    pub fn beat_all(&mut self, now: Instant, lease: Duration, out: &mut Vec<Output>) {
        self.granted.retain(|_, at| now.since(*at) < lease);
        let up: Vec<_> =
            self.by_peer.iter().filter(|(_, p)| p.up).map(|(peer, _)| peer.clone()).collect();
        for peer in up {
            self.beat(&peer, now, out);
        }
    }

    fn beat(&mut self, peer: &PeerId, now: Instant, out: &mut Vec<Output>) {
        let pair = self.by_peer.get_mut(peer).expect("a pair that is up");
        pair.number += 1;
        if pair.sent.len() == BEATS_REMEMBERED {
            pair.sent.pop_front();
        }
        pair.sent.push_back((pair.number, now));
        let beat = PairMessage::Beat { number: pair.number, processed: pair.processed };
        let to_instance = pair.instance;
        self.send(peer.clone(), to_instance, beat, out);
    }

    /// A message of a pair; what does not name both instances is dropped.
    pub fn message(
        &mut self,
        peer: &PeerId,
        envelope: PairEnvelope,
        message: PairMessage,
        now: Instant,
        out: &mut Vec<Output>,
    ) -> Excluded {
        let fits = self.by_peer.get(peer).is_some_and(|p| p.instance == envelope.instance);
        if !fits || envelope.to_instance != self.me.instance {
            return Vec::new();
        }
        match message {
            PairMessage::Beat { number, processed } => {
                self.on_beat(peer, number, processed, now, out);
                Vec::new()
            }
            PairMessage::BeatAnswer { number, grant, failed, exclusions_upto, exclusions } => {
                let pair = self.by_peer.get_mut(peer).expect("looked up above");
                pair.failed = failed;
                pair.processed = pair.processed.max(exclusions_upto);
                let sent = pair.sent.iter().find(|(n, _)| *n == number).map(|(_, at)| *at);
                if let Some(sent) = sent {
                    pair.echoed = pair.echoed.max(sent);
                    if grant {
                        // L2: counted from when it was sent, less 3 %.
                        pair.granted_until = pair.granted_until.max(sent + self.held);
                    }
                }
                exclusions
            }
            PairMessage::Exited { instance } => {
                self.exited(&peer.node, instance);
                Vec::new()
            }
        }
    }

    fn on_beat(
        &mut self,
        peer: &PeerId,
        number: u64,
        processed: u64,
        now: Instant,
        out: &mut Vec<Output>,
    ) {
        let failed = self.failed;
        let pair = self.by_peer.get_mut(peer).expect("looked up by the caller");
        pair.exclusions = pair.exclusions.split_off(&(processed + 1));
        let mut sent = pair.exclusions.iter().take(EXCLUSIONS_MAX);
        let exclusions: Vec<_> = sent.clone().map(|(_, excluded)| *excluded).collect();
        let complete = exclusions.len() == pair.exclusions.len();
        let upto = sent.by_ref().last().map_or(pair.excluded, |(number, _)| *number);
        let exclusions_upto = if complete { pair.excluded } else { upto };
        let grant = complete && !failed;
        let instance = pair.instance;
        if grant {
            self.granted.insert(instance, now);
        }
        let answer = PairMessage::BeatAnswer { number, grant, failed, exclusions_upto, exclusions };
        self.send(peer.clone(), instance, answer, out);
    }

    /// Before a seal: `holder` counts nothing for this volume and epoch any more, once it hears the
    /// next grant (L3). When the last grant was given that may be without it.
    pub fn exclude(
        &mut self,
        holder: InstanceId,
        volume: VolumeId,
        epoch: Epoch,
    ) -> Option<Instant> {
        for pair in self.by_peer.values_mut().filter(|pair| pair.instance == holder) {
            pair.exclusions.retain(|_, (excluded, _)| *excluded != volume);
            pair.excluded += 1;
            pair.exclusions.insert(pair.excluded, (volume, epoch));
        }
        self.granted.get(&holder).copied()
    }

    /// An instance of that node has ended, proven there (L5). Whether that is news.
    pub fn exited(&mut self, node: &NodeName, instance: InstanceId) -> bool {
        if instance == self.me.instance || self.has_exited(node, instance) {
            return false;
        }
        if self.exited.len() == EXITS_REMEMBERED {
            self.exited.pop_front();
        }
        self.exited.push_back((node.clone(), instance));
        true
    }

    /// An instance of this node has ended: the peers are told (L5).
    pub fn own_exit(&mut self, instance: InstanceId, out: &mut Vec<Output>) {
        let node = self.me.node.clone();
        if !self.exited(&node, instance) {
            return;
        }
        self.own_exits.push(instance);
        for (peer, pair) in self.by_peer.iter().filter(|(_, pair)| pair.up) {
            self.send(peer.clone(), pair.instance, PairMessage::Exited { instance }, out);
        }
    }

    /// Whether that instance has ended, by the word of the node on which it was: nobody else can
    /// have proven it (L5).
    pub fn has_exited(&self, node: &NodeName, instance: InstanceId) -> bool {
        self.exited.iter().any(|(on, ended)| (on, *ended) == (node, instance))
    }

    /// Whether any instance of that node has.
    #[cfg(feature = "canary")]
    pub fn any_exited(&self, node: &NodeName) -> bool {
        self.exited.iter().any(|(on, _)| on == node)
    }

    /// The pair to the shard of `node` that keeps this replica of `volume`; one that is up, where
    /// there is one.
    fn find(
        &self,
        (node, replica): (&NodeName, ReplicaId),
        volume: VolumeId,
    ) -> Option<(&PeerId, &Pair)> {
        let first = PeerId { node: node.clone(), shard: 0 };
        let of_node = self.by_peer.range(first..).take_while(|(peer, _)| peer.node == *node);
        let here = |pair: &Pair| replica.shard().unwrap_or_else(|| volume.shard(pair.shards));
        of_node.filter(|(peer, pair)| peer.shard == here(pair)).max_by_key(|(_, pair)| pair.up)
    }

    /// Where to send for a volume's replica on a node.
    pub fn route(&self, node: &NodeName, replica: ReplicaId, volume: VolumeId) -> Option<PeerId> {
        let found = self.find((node, replica), volume);
        found.filter(|(_, pair)| pair.up).map(|(peer, _)| peer.clone())
    }

    /// The instance that is reached on that node over a link that is up and whose store has not
    /// failed, and the version of the protocol spoken with it.
    pub fn reached(
        &self,
        (node, replica): (&NodeName, ReplicaId),
        volume: VolumeId,
    ) -> Option<(InstanceId, u16)> {
        let found = self.find((node, replica), volume);
        let (_, pair) = found.filter(|(_, pair)| pair.up && !pair.failed)?;
        Some((pair.instance, pair.version))
    }

    /// The instance at the other end of a link that is up.
    pub fn instance_at(&self, peer: &PeerId) -> Option<InstanceId> {
        self.by_peer.get(peer).filter(|pair| pair.up).map(|pair| pair.instance)
    }

    /// The instance that answers on that node, whether its store failed, and when the newest
    /// message that it echoed was sent (T2).
    pub fn liveness(
        &self,
        member: &Member,
        volume: VolumeId,
    ) -> Option<(InstanceId, bool, Instant)> {
        let found = self.find((&member.node, member.replica), volume);
        found.map(|(_, pair)| (pair.instance, pair.failed, pair.echoed))
    }

    /// Until when the grant of that instance on that node holds (L2).
    pub fn granted_until(
        &self,
        (node, replica): (&NodeName, ReplicaId),
        volume: VolumeId,
        instance: InstanceId,
    ) -> Option<Instant> {
        let (_, pair) = self.find((node, replica), volume)?;
        (pair.instance == instance).then_some(pair.granted_until)
    }
}

#[cfg(feature = "model")]
impl Pairs {
    /// See `Node::forget_pace`: beats are numbered by when they are sent, what has run out is gone.
    pub fn forget_pace(&mut self, now: Instant, lease: Duration, beats: &[(u64, Instant)]) {
        self.granted.retain(|_, at| now.since(*at) < lease);
        for pair in self.by_peer.values_mut() {
            pair.number = beats.last().map_or(0, |(number, _)| number - 1);
            pair.sent = beats.iter().copied().collect();
            pair.echoed = Instant(0);
            if pair.granted_until <= now {
                pair.granted_until = Instant(0);
            }
        }
    }
}
