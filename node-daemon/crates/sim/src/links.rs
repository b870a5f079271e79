//! Links between the engines of two nodes: up and down as TCP connections are, each end learning of
//! it at its own time.
//!
//! On a link that is up, messages arrive in order, unless the seed's mix loses, doubles or delays
//! some: replication.md tolerates that, whatever the transport does.

use rand::Rng;
use tercet_proto::InstanceId;
use tercet_proto::message::{Message, VERSION, VERSION_HAND_OVER};
use tercet_replication::api::{Input, PeerId};

use crate::mix::MS;
use crate::pipes::PipeId;
use crate::world::World;

/// Between two attempts to connect.
const RETRY_NS: u64 = 200 * MS;

/// The link of a pair of nodes.
pub struct Link {
    ends: [usize; 2],
    /// Grows with each connection.
    number: u64,
    connected: Option<Connected>,
    /// Whether each end has been told that it is up.
    told: [bool; 2],
    /// The life of each end that has still to learn that the last connection is down.
    owed_down: [Option<u64>; 2],
}

struct Connected {
    /// From each end to the other.
    pipes: [PipeId; 2],
    lives: [u64; 2],
    instances: [InstanceId; 2],
}

impl World {
    /// Makes the links and begins to connect them.
    pub fn make_links(&mut self) {
        for a in 0..self.mix.nodes {
            for b in a + 1..self.mix.nodes {
                let index = self.links.len();
                self.links.push(Link {
                    ends: [a, b],
                    number: 0,
                    connected: None,
                    told: [false; 2],
                    owed_down: [None; 2],
                });
                self.after(MS, move |world| world.link_try(index));
            }
        }
    }

    /// The link between two nodes.
    pub fn link_index(&self, a: usize, b: usize) -> usize {
        let ends = [a.min(b), a.max(b)];
        self.links.iter().position(|link| link.ends == ends).expect("a pair of nodes")
    }

    fn link_try(&mut self, index: usize) {
        let wait = self.rng.random_range(RETRY_NS / 2..RETRY_NS);
        self.after(wait, move |world| world.link_try(index));
        let [a, b] = self.links[index].ends;
        if self.links[index].connected.is_some() || !self.net.is_open(a, b) {
            return;
        }
        if !self.nodes[a].runs() || !self.nodes[b].runs() {
            return;
        }
        let pipes = [self.pipe(a, b), self.pipe(b, a)];
        let lives = [self.nodes[a].life, self.nodes[b].life];
        let instances = [self.nodes[a].instance, self.nodes[b].instance];
        let link = &mut self.links[index];
        link.number += 1;
        let number = link.number;
        link.connected = Some(Connected { pipes, lives, instances });
        for (side, life) in lives.into_iter().enumerate() {
            let delay = self.delay();
            self.after(delay, move |world| {
                let node = world.links[index].ends[side];
                world.on_node(node, life, move |world| world.link_told_up(index, number, side));
            });
        }
    }

    /// Tells an end that its link is up, once for each connection.
    fn link_told_up(&mut self, index: usize, number: u64, side: usize) {
        let link = &mut self.links[index];
        let Some(connected) = &link.connected else { return };
        if link.number != number || link.told[side] {
            return;
        }
        link.told[side] = true;
        let instance = connected.instances[1 - side];
        let link_of = link.ends;
        let (node, peer) = (link_of[side], link_of[1 - side]);
        self.link_told_down(index, side);
        let peer = self.peer_id(peer);
        self.tell(|world| format!("{}: link to {} is up", world.nodes[node].name, peer.node));
        let older = self.mix.older.is_some_and(|older| link_of.contains(&older));
        let version = if older { VERSION_HAND_OVER - 1 } else { VERSION };
        self.input(node, Input::PeerUp { peer, instance, shards: 1, version });
    }

    /// The connection ends; each end learns of it after a while.
    pub fn link_break(&mut self, index: usize, notice_ns: u64) {
        let Some(connected) = self.links[index].connected.take() else { return };
        for side in 0..2 {
            self.break_pipe(connected.pipes[side]);
            let told = std::mem::take(&mut self.links[index].told[side]);
            let node = self.links[index].ends[side];
            if !told {
                continue;
            }
            let wait = self.rng.random_range(0..=notice_ns);
            let life = connected.lives[side];
            self.links[index].owed_down[side] = Some(life);
            self.after(wait, move |world| {
                world.on_node(node, life, move |world| world.link_told_down(index, side));
            });
        }
    }

    /// Tells an end that its last connection is down, once, and before it is told of the next.
    fn link_told_down(&mut self, index: usize, side: usize) {
        let link = &mut self.links[index];
        let (node, peer) = (link.ends[side], link.ends[1 - side]);
        let owed = link.owed_down[side].take();
        if owed == Some(self.nodes[node].life) {
            let peer = self.peer_id(peer);
            self.tell(|world| format!("{}: link to {} is down", world.nodes[node].name, peer.node));
            self.input(node, Input::PeerDown(peer));
        }
    }

    /// A cut that lasts too long ends the connection.
    pub fn link_watch_cut(&mut self, a: usize, b: usize) {
        let index = self.link_index(a, b);
        let number = self.links[index].number;
        let timeout = self.mix.link_timeout_ns;
        let wait = self.rng.random_range(timeout / 2..=timeout);
        self.after(wait, move |world| {
            if world.links[index].number == number && !world.net.is_open(a, b) {
                world.tell(|world| {
                    let (a, b) = (&world.nodes[a].name, &world.nodes[b].name);
                    format!("link {a} - {b} times out")
                });
                world.link_break(index, MS);
            }
        });
    }

    /// A node's process or power is gone: its links end.
    pub fn links_of_dead(&mut self, node: usize, silent: bool) {
        for peer in 0..self.mix.nodes {
            if peer == node {
                continue;
            }
            let index = self.link_index(node, peer);
            let number = self.links[index].number;
            let (a, b) = (node, peer);
            let wait = if silent || !self.net.is_open(a, b) {
                self.rng.random_range(self.mix.link_timeout_ns / 2..=self.mix.link_timeout_ns)
            } else {
                self.delay()
            };
            self.after(wait, move |world| {
                if world.links[index].number == number {
                    world.link_break(index, MS);
                }
            });
        }
    }

    /// A dead node's connections that nobody has noticed yet end when it comes back.
    pub fn links_reset(&mut self, node: usize) {
        for peer in (0..self.mix.nodes).filter(|peer| *peer != node).collect::<Vec<_>>() {
            let index = self.link_index(node, peer);
            self.link_break(index, MS);
        }
    }

    /// `Output::Send`.
    pub fn send(&mut self, from: usize, peer: &PeerId, message: Message) {
        let Some(to) = self.nodes.iter().position(|node| node.name == peer.node) else {
            self.violate(format!("a message to {peer:?}, which is no node"));
            return;
        };
        let index = self.link_index(from, to);
        let side = usize::from(self.links[index].ends[1] == from);
        let link = &self.links[index];
        let Some(connected) = &link.connected else { return };
        if !link.told[side] || connected.lives[side] != self.nodes[from].life {
            return;
        }
        let (pipe, number) = (connected.pipes[side], link.number);
        self.saw_sent(from, to, &message);
        if self.permille(self.mix.lose_permille) && !self.healed {
            return;
        }
        if self.permille(self.mix.double_permille) && !self.healed {
            self.send_by(pipe, index, number, 1 - side, message.clone());
        }
        self.send_by(pipe, index, number, 1 - side, message);
    }

    fn send_by(&mut self, pipe: PipeId, index: usize, number: u64, to: usize, message: Message) {
        let deliver = move |world: &mut Self| world.link_deliver(index, number, to, message);
        if !self.healed && self.permille(self.mix.late_permille) {
            let late = self.rng.random_range(MS..300 * MS);
            self.after(late, deliver);
        } else {
            self.push(pipe, Box::new(deliver));
        }
    }

    fn link_deliver(&mut self, index: usize, number: u64, side: usize, message: Message) {
        let link = &self.links[index];
        let Some(connected) = &link.connected else { return };
        if link.number != number {
            return;
        }
        let (node, peer, life) = (link.ends[side], link.ends[1 - side], connected.lives[side]);
        self.on_node(node, life, move |world| {
            world.link_told_up(index, number, side);
            if world.links[index].number == number && world.links[index].connected.is_some() {
                let peer = world.peer_id(peer);
                world.saw_received(node, &message);
                world.input(node, Input::Message(peer, message));
            }
        });
    }

    /// How a node's one shard is named to its peers.
    pub fn peer_id(&self, node: usize) -> PeerId {
        PeerId { node: self.nodes[node].name.clone(), shard: 0 }
    }
}
