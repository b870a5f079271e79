//! The node's end of hosts' connections: what the NVMe/TCP target does around the shard.
//!
//! One connection stands for an association with all its queues. The target reports what arrives
//! and carries out what the shard says; whether a command may run is the shard's business alone
//! (rules H2, H3, H4).

use tercet_proto::{Token, VolumeId};
use tercet_replication::api::{
    Ana, AssociationId, HostCommand, HostDone, HostError, HostIdentity, HostRefusal, Input,
};

use crate::host::ConnectionId;
use crate::probes::Probe;
use crate::world::World;

/// An association at a node.
pub struct Association {
    /// Its connection.
    pub connection: ConnectionId,
    /// Its volume's number.
    pub volume: usize,
    /// When the host was last heard.
    pub heard: u64,
}

/// What a host sends.
#[derive(Clone, Debug)]
pub enum HostMessage {
    /// The first of a connection.
    Connect(HostIdentity),
    /// Get Log Page, ANA.
    ReadAna,
    /// A command.
    Command(Token, HostCommand),
    /// Keep Alive.
    KeepAlive,
    /// The host has closed its end.
    Close,
}

/// What a node sends.
#[derive(Clone, Debug)]
pub enum NodeMessage {
    /// Connect's answer.
    Accepted(Result<(), HostRefusal>),
    /// The ANA log page.
    AnaLog(Ana),
    /// The ANA log page has changed (an asynchronous event).
    AnaChanged,
    /// A command's answer.
    Done(Token, Result<HostDone, HostError>),
    /// Keep Alive's answer.
    Alive,
    /// The node has closed its end.
    Closed,
}

impl World {
    /// Something has arrived at a node on a host's connection.
    pub fn target_receive(&mut self, connection: ConnectionId, message: HostMessage) {
        let c = &self.connections[connection];
        let (node, life) = (c.node, c.node_life);
        self.on_node(node, life, move |world| world.target_take(connection, message));
    }

    fn target_take(&mut self, id: ConnectionId, message: HostMessage) {
        let connection = &self.connections[id];
        let (node, volume) = (connection.node, connection.volume);
        if !connection.node_open {
            return;
        }
        let late = !connection.host_open;
        let known = connection.association;
        if let Some(association) = known.and_then(|a| self.nodes[node].associations.get_mut(&a)) {
            association.heard = self.now;
        }
        match (message, known) {
            (HostMessage::Connect(identity), None) => self.target_connect(id, identity),
            (HostMessage::ReadAna, Some(association)) => {
                self.input(node, Input::HostReadAna(association));
                let ana = self.nodes[node].ana.get(&volume).copied();
                self.target_send(id, NodeMessage::AnaLog(ana.unwrap_or(Ana::Inaccessible)));
            }
            (HostMessage::Command(token, command), Some(association)) => {
                if late {
                    self.probe(Probe::LateCopy);
                }
                self.input(node, Input::HostCommand(association, token, command));
            }
            (HostMessage::KeepAlive, Some(_)) => self.target_send(id, NodeMessage::Alive),
            (HostMessage::Close, Some(association)) => self.target_gone(node, association),
            _ => {}
        }
    }

    fn target_connect(&mut self, id: ConnectionId, identity: HostIdentity) {
        let (node, volume) = (self.connections[id].node, self.connections[id].volume);
        self.nodes[node].association_last += 1;
        let association = AssociationId(self.nodes[node].association_last);
        self.connections[id].association = Some(association);
        let entry = Association { connection: id, volume, heard: self.now };
        self.nodes[node].associations.insert(association, entry);
        let volume = self.volumes[volume].id;
        self.target_keep_alive(node, association);
        self.input(node, Input::HostConnect(volume, association, identity));
    }

    /// Ends an association whose host is not heard for longer than the keep-alive time-out.
    fn target_keep_alive(&mut self, node: usize, association: AssociationId) {
        let (life, wait) = (self.nodes[node].life, self.mix.kato_ns);
        self.after(wait, move |world| {
            world.on_node(node, life, move |world| {
                let Some(entry) = world.nodes[node].associations.get(&association) else { return };
                if world.now - entry.heard > world.mix.kato_ns {
                    world.target_gone(node, association);
                } else {
                    world.target_keep_alive(node, association);
                }
            });
        });
    }

    fn target_gone(&mut self, node: usize, association: AssociationId) {
        let Some(entry) = self.nodes[node].associations.remove(&association) else { return };
        self.target_close(entry.connection);
        self.input(node, Input::HostGone(association));
    }

    fn target_close(&mut self, id: ConnectionId) {
        if std::mem::take(&mut self.connections[id].node_open) {
            self.target_send(id, NodeMessage::Closed);
        }
    }

    fn target_send(&mut self, id: ConnectionId, message: NodeMessage) {
        let pipe = self.connections[id].to_host;
        self.push(pipe, Box::new(move |world| world.host_receive(id, message)));
    }

    /// `Output::HostAccepted`.
    pub fn target_accepted(
        &mut self,
        node: usize,
        association: AssociationId,
        result: Result<(), HostRefusal>,
    ) {
        let Some(entry) = self.nodes[node].associations.get(&association) else { return };
        let connection = entry.connection;
        self.target_send(connection, NodeMessage::Accepted(result));
        if result.is_err() {
            self.nodes[node].associations.remove(&association);
            self.target_close(connection);
        }
    }

    /// `Output::HostDone`.
    pub fn target_done(
        &mut self,
        node: usize,
        association: AssociationId,
        token: Token,
        result: Result<HostDone, HostError>,
    ) {
        if result == Err(HostError::Inaccessible) {
            self.probe(Probe::CommandRefused);
        }
        let Some(entry) = self.nodes[node].associations.get(&association) else { return };
        let (connection, volume) = (entry.connection, entry.volume);
        if matches!(result, Ok(HostDone::Data(_))) {
            self.saw_read(node, volume);
        }
        self.target_send(connection, NodeMessage::Done(token, result));
    }

    /// `Output::HostEnd`.
    pub fn target_end(&mut self, node: usize, association: AssociationId) {
        if let Some(entry) = self.nodes[node].associations.remove(&association) {
            self.probe(Probe::AssociationEnded);
            self.target_close(entry.connection);
        }
    }

    /// `Output::Ana`.
    pub fn target_ana(&mut self, node: usize, volume: VolumeId, ana: Ana) {
        let number = self.volume_number(volume);
        self.tell(|world| format!("{}: volume {number}: path {ana:?}", world.nodes[node].name));
        let before = self.nodes[node].ana.insert(number, ana);
        if before == Some(ana) {
            return;
        }
        if ana == Ana::Optimized && before.is_some() && self.nodes[node].kept_epoch(number) {
            self.probe(Probe::LeaseRegained);
        }
        let told: Vec<ConnectionId> = self.nodes[node]
            .associations
            .values()
            .filter(|entry| entry.volume == number)
            .map(|entry| entry.connection)
            .collect();
        if ana == Ana::Optimized && !told.is_empty() {
            self.probe(Probe::AssociationKept);
        }
        for connection in told {
            self.target_send(connection, NodeMessage::AnaChanged);
        }
    }
}
