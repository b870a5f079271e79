//! What the simulator sees of the protocol from outside, to count rare paths and to tell the story:
//! messages on links, and what replicas say of themselves.

use std::collections::BTreeMap;

use tercet_proto::Place;
use tercet_proto::message::{HandOverMessage, Message, PairMessage, ReplicaMessage};
use tercet_shard::Shard;

use crate::mix::MS;
use crate::probes::Probe;
use crate::world::World;

/// Between two looks at the replicas.
const LOOK_NS: u64 = 25 * MS;

/// A seal's answer that took longer than any device has waited for a grant.
const SEAL_WAITED_NS: u64 = 400 * MS;

/// What was seen before.
#[derive(Default)]
pub struct Seen {
    /// When a node was first asked for a seal of a volume in an epoch.
    seals: BTreeMap<(usize, usize, u64), u64>,
    /// The newest epoch that serves or has served, of each volume.
    served: BTreeMap<usize, u64>,
    /// The epochs whose heir has said that its swap took place, of each volume.
    swapped: BTreeMap<usize, u64>,
    /// Volumes whose primary shall be cut off when it hands over, and for how long.
    traps: BTreeMap<usize, u64>,
    /// The tail of each replica at the last look.
    tails: BTreeMap<(usize, usize), (u64, Place)>,
}

impl World {
    /// Looks at all replicas from time to time.
    pub fn schedule_look(&mut self) {
        self.after(LOOK_NS, |world| {
            for node in 0..world.nodes.len() {
                world.look(node);
            }
            world.schedule_look();
        });
    }

    fn look(&mut self, node: usize) {
        let life = self.nodes[node].life;
        for status in self.nodes[node].shard().map(Shard::statuses).unwrap_or_default() {
            let volume = self.volume_number(status.volume);
            let before = self.seen.tails.insert((node, volume), (life, status.tail));
            let Some((_, tail)) = before.filter(|(lived, _)| *lived == life) else { continue };
            if status.tail.lsn < tail.lsn || status.tail.epoch < tail.epoch {
                self.probe(Probe::Truncated);
                self.tell(|world| {
                    let name = &world.nodes[node].name;
                    format!(
                        "{name}: volume {volume}: drops {tail:?} back to {:?} (W2)",
                        status.tail
                    )
                });
            }
        }
    }

    /// A message reaches a node.
    pub fn saw_received(&mut self, node: usize, message: &Message) {
        let Message::Replica(envelope, ReplicaMessage::Seal { .. }) = message else { return };
        let volume = self.volume_number(envelope.volume);
        let now = self.now;
        self.seen.seals.entry((node, volume, envelope.epoch.0)).or_insert(now);
    }

    /// A node sends a message.
    pub fn saw_sent(&mut self, node: usize, to: usize, message: &Message) {
        match message {
            Message::Replica(envelope, what) => {
                let volume = self.volume_number(envelope.volume);
                if let ReplicaMessage::Sealed(tail) = what {
                    self.saw_sealed(node, volume, envelope.epoch.0);
                    if tail.incomplete.is_some() {
                        self.probe(Probe::IncompleteSkipped);
                    }
                }
                self.saw_hand_over(node, volume, envelope.epoch.0, what);
                let rule = match what {
                    ReplicaMessage::Append { .. } | ReplicaMessage::Ack { .. } => return,
                    ReplicaMessage::Refuse { .. } => "W2",
                    ReplicaMessage::Seal { .. } | ReplicaMessage::Sealed(_) => "T4",
                    ReplicaMessage::Newer { .. } => "T8",
                    ReplicaMessage::NoReplica => "T9",
                    ReplicaMessage::Consult | ReplicaMessage::Opinion { .. } => "T2",
                    ReplicaMessage::Fetch { .. } | ReplicaMessage::Fetched { .. } => "T5",
                    ReplicaMessage::GiveBack => "L5",
                    ReplicaMessage::Stand | ReplicaMessage::HandOver(_) => "T10",
                    ReplicaMessage::Copy(_) => "C2",
                    ReplicaMessage::Repair(_) => "C4",
                };
                self.tell(|world| {
                    let (from, to) = (&world.nodes[node].name, &world.nodes[to].name);
                    let text: String = format!("{what:?}").chars().take(300).collect();
                    let epoch = envelope.epoch;
                    format!("{from} to {to}: volume {volume} epoch {epoch} ({rule}): {text}")
                });
            }
            Message::Pair(_, PairMessage::Exited { instance }) => self.tell(|world| {
                let (from, to) = (&world.nodes[node].name, &world.nodes[to].name);
                format!("{from} to {to}: instance {instance} has ended, proven (L5)")
            }),
            Message::Pair(..) => {}
        }
    }

    /// The next primary of the volume that gives its lease back is cut off at that moment (L5).
    pub fn trap_hand_over(&mut self, volume: usize, lasts: u64) {
        self.seen.traps.insert(volume, lasts);
    }

    fn saw_hand_over(&mut self, node: usize, volume: usize, epoch: u64, what: &ReplicaMessage) {
        match what {
            ReplicaMessage::HandOver(HandOverMessage::Swapped { .. }) => {
                let serves = |n: usize| self.nodes[n].serving.get(&volume) == Some(&epoch);
                if (0..self.nodes.len()).any(|other| other != node && serves(other)) {
                    self.seen.swapped.insert(volume, epoch);
                    self.probe(Probe::HeirSwapped);
                }
            }
            ReplicaMessage::HandOver(HandOverMessage::Declined { .. }) => {
                self.probe(Probe::HeirDeclined);
            }
            ReplicaMessage::GiveBack if self.seen.swapped.get(&volume) == Some(&epoch) => {
                self.probe(Probe::GaveWay);
                if let Some(lasts) = self.seen.traps.remove(&volume) {
                    self.after(1, move |world| world.spring_trap(node, lasts));
                }
            }
            ReplicaMessage::Stand => self.probe(Probe::HandedOverToOlder),
            _ => {}
        }
    }

    /// A primary says that it serves.
    pub fn saw_serving(&mut self, volume: usize, epoch: u64) {
        let served = self.seen.served.entry(volume).or_default();
        *served = (*served).max(epoch);
    }

    /// A node answers a read: nobody can serve in a newer epoch while its lease holds (L1, L2).
    pub fn saw_read(&mut self, node: usize, volume: usize) {
        let newest = self.seen.served.get(&volume).copied();
        let epoch = self.nodes[node].serving.get(&volume).copied();
        if epoch.is_some() && epoch < newest {
            let name = &self.nodes[node].name;
            self.violate(format!(
                "{name} answers a read of volume {volume} in epoch {epoch:?}, {newest:?} serves (L1)"
            ));
        }
    }

    fn saw_sealed(&mut self, node: usize, volume: usize, epoch: u64) {
        let asked = self.seen.seals.get(&(node, volume, epoch));
        if asked.is_some_and(|asked| self.now - asked > SEAL_WAITED_NS) {
            self.probe(Probe::SealWaited);
        }
    }
}
