//! Replication links: one TCP connection for each pair of a local shard and a peer's shard.
//!
//! The node whose name sorts lower dials, so that two nodes never cross; the other waits. Each side
//! begins with a Hello; the acceptor's first frame decides whose connection it is, and moves it to
//! the reactor that has the shard. A link that fails, for whatever reason, is closed and dialled
//! again after a short pause: messages may be lost, and the protocol above deals with that. What
//! waits on a link is bounded; a peer that takes too little loses the link, not our memory (W7).
//!
//! [`Transport`] is where encryption fits: bytes of the socket on one side, of the protocol on the
//! other.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tercet_proto::message::{
    Decoder, Frame, Hello, Message, ProvenExit, VERSION, VERSION_MIN, encode, encode_hello,
};
use tercet_proto::{InstanceId, Instant, NodeName};
use tercet_reactor::{StreamId, StreamLimits, now};
use tercet_replication::api::{Input, PeerId};
use tercet_shard::Event;
use tracing::{debug, info, warn};

use super::Core;
use super::types::{MovedLink, ToReactor};

/// What waits on a link, and how long a peer may not acknowledge it.
const LIMITS: StreamLimits =
    StreamLimits { send_queue_bytes_max: 32 << 20, unacknowledged_max: Duration::from_secs(5) };
/// How long a connection may take to say who it is.
const HELLO: Duration = Duration::from_secs(2);
/// Pauses between attempts to dial: an eighth of the time that the link has been down, so that an
/// engine that comes back at once is found at once; plus up to half as much again.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// Connections whose peer is not known yet.
const STRANGERS_MAX: usize = 64;
/// Bytes by which a link's buffer for frame heads grows.
const HEADS_BYTES: usize = 16 << 10;

/// Between a socket and the protocol. Today plain; an encrypted one decrypts and encrypts here.
#[derive(Debug, Default)]
struct Transport;

impl Transport {
    /// What the protocol gets of what the socket gave.
    #[allow(clippy::unused_self)] // an encrypted transport has state
    fn received(&mut self, bytes: Bytes) -> Bytes {
        bytes
    }

    /// What the socket gets of what the protocol sends.
    #[allow(clippy::unused_self)] // an encrypted transport has state
    fn sent<'a>(
        &mut self,
        pieces: impl Iterator<Item = Bytes> + 'a,
    ) -> impl Iterator<Item = Bytes> + 'a {
        pieces
    }
}

/// A connection.
struct Link {
    transport: Transport,
    decoder: Decoder,
    heads: BytesMut,
    /// Where it leads, as far as known.
    route: Option<Route>,
    /// The instance at the other end, once its Hello has come.
    instance: Option<InstanceId>,
    /// The version of the protocol that both speak.
    version: u16,
    /// Closed when no Hello has come by then.
    hello_until: Instant,
}

/// From one of our shards to one of a peer's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Route {
    slot: usize,
    peer: PeerId,
}

/// A route that this side dials.
struct Dial {
    to: SocketAddr,
    stream: Option<StreamId>,
    at: Instant,
    /// Since when there is no link.
    down_since: Instant,
}

/// All links of a reactor.
#[derive(Default)]
pub(super) struct Links {
    streams: HashMap<StreamId, Link>,
    up: HashMap<Route, StreamId>,
    dials: BTreeMap<Route, Dial>,
    /// How many shards a node has, as its last Hello said.
    shards: HashMap<NodeName, u16>,
    /// How many shards this engine had when the links were made; they say so in their Hello.
    own_shards: u16,
    /// Links that are being detached, and what they said.
    moving: HashMap<StreamId, (Hello, Decoder)>,
    /// Scratch for encoding.
    head: Vec<u8>,
    payloads: Vec<Bytes>,
    sent_bytes: u64,
    received_bytes: u64,
}

impl Links {
    pub(super) fn has(&self, stream: StreamId) -> bool {
        self.streams.contains_key(&stream)
    }

    pub(super) fn up(&self) -> Vec<(PeerId, InstanceId)> {
        let instance = |stream| self.streams[stream].instance.expect("a link that is up");
        self.up.iter().map(|(route, stream)| (route.peer.clone(), instance(stream))).collect()
    }

    pub(super) fn counters(&self) -> [(&'static str, u64); 2] {
        [
            ("link_sent_bytes_total", self.sent_bytes),
            ("link_received_bytes_total", self.received_bytes),
        ]
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let dials = self.dials.values().filter(|dial| dial.stream.is_none()).map(|dial| dial.at);
        let silent = self.streams.values().filter(|link| link.instance.is_none());
        dials.chain(silent.map(|link| link.hello_until)).min()
    }

    fn open(&mut self, stream: StreamId, route: Option<Route>, decoder: Decoder) {
        let link = Link {
            transport: Transport,
            decoder,
            heads: BytesMut::new(),
            route,
            instance: None,
            version: VERSION_MIN,
            hello_until: now() + HELLO,
        };
        self.streams.insert(stream, link);
    }

    fn strangers(&self) -> usize {
        self.streams.values().filter(|link| link.route.is_none()).count()
    }
}

impl Core {
    /// Dials whom this side has to dial; forgets who is no peer any more.
    pub(super) fn plan_links(&mut self) {
        let Some(plan) = self.plan().cloned() else {
            return;
        };
        self.renew_links(plan.shards());
        let own = self.directory.node.as_str();
        let mut wanted = BTreeMap::new();
        for peer in plan.peers.iter().filter(|peer| own < peer.node.as_str()) {
            let node = NodeName::new(&peer.node);
            let shards = self.links.shards.get(&node).copied().unwrap_or(1);
            for slot in (0..self.slots.len()).filter(|&slot| self.slots[slot].is_open()) {
                for shard in 0..shards {
                    let peer_id = PeerId { node: node.clone(), shard };
                    wanted.insert(Route { slot, peer: peer_id }, peer.address);
                }
            }
        }
        let gone: Vec<_> = self.links.dials.keys().cloned().collect();
        for route in gone.into_iter().filter(|route| !wanted.contains_key(route)) {
            if let Some(stream) = self.links.dials.remove(&route).and_then(|dial| dial.stream) {
                self.close_link(stream);
            }
        }
        for (route, to) in wanted {
            let fresh = || Dial { to, stream: None, at: Instant(0), down_since: now() };
            self.links.dials.entry(route).or_insert_with(fresh).to = to;
        }
        let known = |peer: &PeerId| plan.peers.iter().any(|p| p.node == peer.node.as_str());
        let lost: Vec<_> = self.links.up.iter().filter(|(route, _)| !known(&route.peer)).collect();
        let lost: Vec<StreamId> = lost.into_iter().map(|(_, stream)| *stream).collect();
        for stream in lost {
            self.close_link(stream);
        }
    }

    /// A device was added: peers learn of its shards by the Hello of the next links.
    fn renew_links(&mut self, shards: u16) {
        let before = std::mem::replace(&mut self.links.own_shards, shards);
        if before != 0 && before != shards {
            let up: Vec<StreamId> = self.links.up.values().copied().collect();
            for stream in up {
                self.close_link(stream);
            }
        }
    }

    pub(super) fn tick_links(&mut self, now: Instant) {
        if self.links.next_deadline().is_none_or(|at| at > now) {
            return;
        }
        let silent = |link: &Link| link.instance.is_none() && link.hello_until <= now;
        let late = self.links.streams.iter().filter(|(_, link)| silent(link));
        let late: Vec<StreamId> = late.map(|(stream, _)| *stream).collect();
        for stream in late {
            self.refuse_link(stream, "no Hello in time");
        }
        let due = self.links.dials.iter().filter(|(_, d)| d.stream.is_none() && d.at <= now);
        let due: Vec<Route> = due.map(|(route, _)| route.clone()).collect();
        for route in due {
            self.dial(&route);
        }
    }

    fn dial(&mut self, route: &Route) {
        let from = self.plan().map(|plan| SocketAddr::new(plan.address, 0));
        let to = self.links.dials[route].to;
        match self.reactor.connect(from, to, LIMITS) {
            Ok(stream) => {
                self.links.open(stream, Some(route.clone()), Decoder::default());
                self.links.dials.get_mut(route).expect("just looked at").stream = Some(stream);
            }
            Err(error) => {
                debug!(peer = %route.peer.node, %to, %error, "cannot dial");
                self.dial_later(route);
            }
        }
    }

    fn dial_later(&mut self, route: &Route) {
        let Some(dial) = self.links.dials.get_mut(route) else {
            return;
        };
        let now = now();
        let pause = (now.since(dial.down_since) / 8).clamp(PAUSE_MIN, PAUSE_MAX);
        let nanos = u64::try_from(pause.as_nanos()).expect("a short pause");
        // Jitter: two nodes that lost each other at one instant need not stay in step.
        let jitter = Duration::from_nanos(now.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) % nanos / 2);
        dial.stream = None;
        dial.at = now + pause + jitter;
    }

    pub(super) fn link_connected(&mut self, stream: StreamId) {
        let Some(link) = self.links.streams.get(&stream) else {
            return;
        };
        let route = link.route.clone().expect("we dialled it");
        self.say_hello(stream, &route);
    }

    fn say_hello(&mut self, stream: StreamId, route: &Route) {
        let plan = self.plan().expect("links are there after a plan");
        let hello = Hello {
            version_min: VERSION_MIN,
            version_max: VERSION,
            cluster: *plan.cluster.as_bytes(),
            node: self.directory.node.clone(),
            instance: self.directory.instance,
            shard: self.slots[route.slot].shard,
            shards: plan.shards(),
            to_shard: route.peer.shard,
        };
        let mut head = Vec::new();
        encode_hello(&hello, &mut head);
        let sent = self.reactor.send(stream, [Bytes::from(head)]);
        assert!(sent, "a new link has room for a Hello");
    }

    pub(super) fn link_accepted(&mut self, socket: OwnedFd) {
        if self.links.strangers() >= STRANGERS_MAX {
            warn!("too many connections that do not say who they are: one is closed");
            return;
        }
        match self.reactor.attach(socket, LIMITS) {
            Ok(stream) => self.links.open(stream, None, Decoder::default()),
            Err(error) => warn!(%error, "a link is lost before it began"),
        }
    }

    pub(super) fn link_received(&mut self, stream: StreamId, bytes: Bytes) {
        self.links.received_bytes += bytes.len() as u64;
        let link = self.links.streams.get_mut(&stream).expect("looked for before");
        let bytes = link.transport.received(bytes);
        link.decoder.feed(bytes);
        while let Some(link) = self.links.streams.get_mut(&stream) {
            let peer = link.route.as_ref().map(|route| (route.slot, route.peer.clone()));
            match (link.decoder.next_frame(), peer) {
                (Ok(None), _) => return,
                (Ok(Some(Frame::Message(message))), Some((slot, peer)))
                    if link.instance.is_some() =>
                {
                    let input = Input::Message(peer, message);
                    self.work.push_back((slot, Event::Input(input)));
                }
                (Ok(Some(Frame::ProvenExit(exit))), None) => {
                    match self.exit_told(exit) {
                        Ok(()) => self.close_link(stream), // there is no second frame
                        Err(why) => self.refuse_link(stream, &why),
                    }
                }
                (Ok(Some(Frame::Hello(hello))), _) if link.instance.is_none() => {
                    if let Err(why) = self.hello(stream, hello) {
                        self.refuse_link(stream, &why);
                    }
                }
                (Ok(Some(_)), _) => self.refuse_link(stream, "a frame at the wrong time"),
                (Err(error), _) => self.refuse_link(stream, &error.to_string()),
            }
        }
    }

    /// A peer that has no links yet has proven that instances of its node have ended (L5): all shards
    /// here are told.
    fn exit_told(&mut self, exit: ProvenExit) -> Result<(), String> {
        let ProvenExit { cluster, node, instance, exited } = exit;
        self.check_peer(&cluster, &node)?;
        info!(peer = %node, %instance, last = exited.last().map(ToString::to_string), "exits told");
        for reactor in (0..self.directory.reactors.0.len()).filter(|&other| other != self.number) {
            let told = ToReactor::Exited(node.clone(), exited.clone());
            if self.directory.reactors.post(reactor, told).is_err() {
                debug!(reactor, "it is busy, and hears of an exit with its link");
            }
        }
        self.exited(&node, &exited);
        Ok(())
    }

    /// Who may speak here: another node of this cluster.
    fn check_peer(&self, cluster: &[u8; 16], node: &NodeName) -> Result<(), String> {
        let plan = self.plan().expect("links are there after a plan");
        if cluster != plan.cluster.as_bytes() {
            return Err(format!("{node} is of another cluster"));
        }
        if !plan.peers.iter().any(|peer| peer.node == node.as_str()) {
            return Err(format!("{node} is no peer"));
        }
        Ok(())
    }

    /// Somebody who does not speak as agreed; nothing that he said is used.
    fn refuse_link(&mut self, stream: StreamId, why: &str) {
        let from = self.reactor.peer_address(stream);
        warn!(?from, why, "a replication connection is refused");
        self.reactor.close(stream);
        self.link_lost(stream, why);
    }

    /// The other side says who it is.
    fn hello(&mut self, stream: StreamId, hello: Hello) -> Result<(), String> {
        let plan = self.plan().cloned().expect("links are there after a plan");
        self.check_hello(&hello)?;
        self.links.shards.insert(hello.node.clone(), hello.shards);
        let link = self.links.streams.get_mut(&stream).expect("it speaks");
        if let Some(route) = link.route.clone() {
            let answered = PeerId { node: hello.node.clone(), shard: hello.shard };
            if route.peer != answered || hello.to_shard != self.slots[route.slot].shard {
                return Err(format!("{} shard {} answers instead", answered.node, answered.shard));
            }
            link.instance = Some(hello.instance);
            self.link_up(stream, route, &hello);
            self.plan_links();
            return Ok(());
        }
        if hello.to_shard >= plan.shards() {
            return Err(format!("it wants shard {} of {}", hello.to_shard, plan.shards()));
        }
        let link = self.links.streams.remove(&stream).expect("it speaks");
        if self.directory.reactors.of_shard(hello.to_shard) == self.number {
            let socketless = Accepted { stream, hello, decoder: link.decoder };
            self.accept_link(socketless)
        } else {
            self.reactor.detach(stream);
            self.links.moving.insert(stream, (hello, link.decoder));
            Ok(())
        }
    }

    fn check_hello(&self, hello: &Hello) -> Result<(), String> {
        let own = Hello { version_min: VERSION_MIN, version_max: VERSION, ..hello.clone() };
        if own.common_version(hello).is_none() {
            return Err(format!(
                "{} speaks versions {} to {}, this engine {VERSION_MIN} to {VERSION}",
                hello.node, hello.version_min, hello.version_max
            ));
        }
        self.check_peer(&hello.cluster, &hello.node)?;
        if hello.shards == 0 || hello.shard >= hello.shards {
            return Err(format!("{} says it is shard {}", hello.node, hello.shard));
        }
        Ok(())
    }

    /// The reactor that has the link's shard takes it over.
    fn accept_link(&mut self, accepted: Accepted) -> Result<(), String> {
        let Accepted { stream, hello, decoder } = accepted;
        let open =
            |slot: &usize| self.slots[*slot].shard == hello.to_shard && self.slots[*slot].is_open();
        let Some(slot) = (0..self.slots.len()).find(open) else {
            self.links.open(stream, None, decoder);
            return Err(format!("shard {} is not open", hello.to_shard));
        };
        let peer = PeerId { node: hello.node.clone(), shard: hello.shard };
        let route = Route { slot, peer };
        self.links.open(stream, Some(route.clone()), decoder);
        let link = self.links.streams.get_mut(&stream).expect("just opened");
        link.instance = Some(hello.instance);
        self.say_hello(stream, &route);
        self.link_up(stream, route, &hello);
        Ok(())
    }

    fn link_up(&mut self, stream: StreamId, route: Route, hello: &Hello) {
        // The peer has dialled again before we noticed that the older link is dead.
        if let Some(&older) = self.links.up.get(&route) {
            self.close_link(older);
        }
        info!(peer = %route.peer.node, instance = %hello.instance, "link up");
        let link = self.links.streams.get_mut(&stream).expect("it is up");
        link.version = hello.version_max.min(VERSION); // checked with the Hello
        let peer = route.peer.clone();
        let Hello { instance, shards, .. } = *hello;
        let up = Input::PeerUp { peer, instance, shards, version: link.version };
        self.work.push_back((route.slot, Event::Input(up)));
        self.links.up.insert(route, stream);
        self.outbox.changed();
    }

    /// Closes a link on our own account.
    fn close_link(&mut self, stream: StreamId) {
        self.reactor.close(stream);
        self.link_lost(stream, "closed here");
    }

    /// The connection is gone.
    pub(super) fn link_lost(&mut self, stream: StreamId, why: &str) {
        let Some(link) = self.links.streams.remove(&stream) else {
            return;
        };
        let Some(route) = link.route else {
            return debug!(why, "a replication connection ends before it said whose it is");
        };
        if self.links.up.get(&route) == Some(&stream) {
            warn!(peer = %route.peer.node, why, "link down");
            self.links.up.remove(&route);
            if let Some(dial) = self.links.dials.get_mut(&route) {
                dial.down_since = now();
            }
            let down = Input::PeerDown(route.peer.clone());
            self.work.push_back((route.slot, Event::Input(down)));
            self.outbox.changed();
        } else {
            debug!(peer = %route.peer.node, why, "no link");
        }
        if self.links.dials.get(&route).is_some_and(|dial| dial.stream == Some(stream)) {
            self.dial_later(&route);
        }
    }

    /// Whether the detached stream was a link; then it goes to its reactor.
    pub(super) fn link_detached(&mut self, stream: StreamId, socket: &OwnedFd) -> bool {
        let Some((hello, decoder)) = self.links.moving.remove(&stream) else {
            return false;
        };
        let reactor = self.directory.reactors.of_shard(hello.to_shard);
        // A duplicate of the descriptor: the caller keeps (and drops) its own.
        let Ok(socket) = socket.try_clone() else {
            return true;
        };
        let moved = MovedLink { socket, hello, decoder };
        if self.directory.reactors.post(reactor, ToReactor::Link(Box::new(moved))).is_err() {
            warn!("a link is closed: its reactor is busy");
        }
        true
    }

    pub(super) fn link_moved(&mut self, moved: MovedLink) {
        let MovedLink { socket, hello, decoder } = moved;
        let Ok(stream) = self.reactor.attach(socket, LIMITS) else {
            return;
        };
        if let Err(why) = self.accept_link(Accepted { stream, hello, decoder }) {
            self.refuse_link(stream, &why);
        } else {
            self.link_received(stream, Bytes::new()); // what came with the Hello
        }
    }

    /// Sends a message to a peer whose link is up; drops it when none is.
    pub(super) fn send_message(&mut self, slot: usize, peer: PeerId, message: &Message) {
        let route = Route { slot, peer };
        let Some(&stream) = self.links.up.get(&route) else {
            return;
        };
        let links = &mut self.links;
        let link = links.streams.get_mut(&stream).expect("a link that is up");
        if message.version() > link.version {
            return; // a peer of an older version would close the link
        }
        encode(message, &mut links.head, &mut links.payloads);
        if link.heads.capacity() < links.head.len() {
            link.heads.reserve(links.head.len().max(HEADS_BYTES));
        }
        link.heads.extend_from_slice(&links.head);
        let head = link.heads.split().freeze();
        links.head.clear();
        let pieces = std::iter::once(head).chain(links.payloads.drain(..));
        let mut bytes = 0;
        let counted = pieces.inspect(|piece| bytes += piece.len() as u64);
        let sent = self.reactor.send(stream, link.transport.sent(counted));
        self.links.sent_bytes += bytes;
        if !sent {
            self.reactor.close(stream);
            self.link_lost(stream, "it takes too little: its queue is full");
        }
    }
}

/// A connection whose Hello has come.
struct Accepted {
    stream: StreamId,
    hello: Hello,
    decoder: Decoder,
}
