//! Authentication of a queue (`crate::auth`) between Connect and everything else.
//!
//! A host with a secret is told at Connect that authentication is required. Until it has done so its
//! queue takes nothing but Authentication Send and Receive, and the executor hears nothing of it:
//! whoever knows a host's NQN alone must not end that host's association (rule H3).

use tercet_proto::{Instant, VolumeId};

use super::api::{AssociationId, CloseReason, ConnectionId, Effect};
use super::connection::Request;
use super::controller::{Admission, Kind};
use super::{HANDSHAKE_TIMEOUT, Peer, Role, Target, tell_send};
use crate::auth::{AuthEntry, Computed, MESSAGE_BYTES_MAX, Responder, Secret};
use crate::command::{FABRICS, fctype};
use crate::names::volume_nqn;
use crate::status::Status;

/// What a host and a volume's controllers have to know of each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    /// The host's: without it the host gets no queue.
    pub host: Secret,
    /// The controllers', if the host may ask them.
    pub controller: Option<Secret>,
}

/// A queue that has to be authenticated, or has been.
#[derive(Debug)]
pub(super) struct Authentication {
    responder: Responder,
    /// Until when it has to be.
    until: Instant,
    /// Authentication Receive that waits for its message: its identifier and room.
    receive: Option<(u16, u32)>,
}

impl Authentication {
    /// When the queue is closed; `None` once it is authenticated.
    pub(super) fn deadline(&self) -> Option<Instant> {
        (!self.responder.is_authenticated()).then_some(self.until)
    }
}

impl Target {
    /// The secrets of a volume's hosts, by host NQN, from now on: queues that are connected stay.
    pub fn set_keys(&mut self, volume: VolumeId, keys: std::collections::BTreeMap<String, Keys>) {
        if let Some(subsystem) = self.subsystems.get_mut(&volume) {
            subsystem.keys = keys;
        }
    }

    /// How a queue of this host has to be authenticated, if it has to be.
    pub(super) fn authentication(
        &self,
        kind: Kind,
        host_nqn: &str,
        now: Instant,
    ) -> Option<Box<Authentication>> {
        let Kind::Volume(volume) = kind else { return None };
        let keys = self.subsystems[&volume].keys.get(host_nqn)?.clone();
        let nqn = volume_nqn(volume);
        Some(Box::new(Authentication {
            responder: Responder::new(host_nqn, &nqn, keys.host, keys.controller),
            until: now + HANDSHAKE_TIMEOUT,
            receive: None,
        }))
    }

    /// Whether a request is for authentication alone, or has to wait for it: then it is answered here.
    /// `Some(false)` when the connection ends.
    pub(super) fn authenticate(
        &mut self,
        id: ConnectionId,
        peer: &mut Peer,
        request: &Request,
        effects: &mut Vec<Effect>,
    ) -> Option<bool> {
        let authentication = peer.authentication.as_mut()?;
        let entry = &request.entry;
        let kind = entry.fabrics_type();
        let is_message = entry.opcode() == FABRICS
            && matches!(kind, fctype::AUTHENTICATION_SEND | fctype::AUTHENTICATION_RECEIVE);
        if !is_message {
            let is_authenticated = authentication.responder.is_authenticated();
            if is_authenticated {
                return None;
            }
            peer.connection.respond(entry.id(), Status::AUTHENTICATION_REQUIRED, 0);
            if let Some((second, _)) = &request.fused {
                peer.connection.respond(second.id(), Status::AUTHENTICATION_REQUIRED, 0);
            }
            return Some(true);
        }
        let fields = AuthEntry::parse(entry);
        let moved = if kind == fctype::AUTHENTICATION_SEND {
            request.data.len() as u32
        } else {
            request.room
        };
        let fits = fields.bytes == moved && (1..=MESSAGE_BYTES_MAX).contains(&(moved as usize));
        if !fields.is_nvme() || !fits || authentication.receive.is_some() {
            peer.connection.respond(entry.id(), Status::INVALID_FIELD, 0);
            return Some(true);
        }
        let was_authenticated = authentication.responder.is_authenticated();
        if kind == fctype::AUTHENTICATION_SEND {
            let computation = authentication.responder.send(&request.data);
            peer.connection.respond(entry.id(), Status::SUCCESS, 0);
            effects.extend(computation.map(|computation| Effect::Compute(id, computation)));
        } else {
            authentication.receive = Some((entry.id(), request.room));
        }
        Some(self.go_on(peer, was_authenticated, effects))
    }

    /// Answers the Authentication Receive that waits, if its message is there. False when the
    /// connection ends: the other side has been told why.
    fn go_on(
        &mut self,
        peer: &mut Peer,
        was_authenticated: bool,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let authentication = peer.authentication.as_mut().expect("it is being authenticated");
        let mut ends = authentication.responder.failure().is_some();
        if let Some((command, room)) = authentication.receive
            && let Some(mut message) = authentication.responder.receive()
        {
            authentication.receive = None;
            if message.len() > room as usize {
                peer.connection.respond(command, Status::SGL_LENGTH, 0);
                return false;
            }
            message.resize(room as usize, 0);
            ends |= authentication.responder.failure().is_some();
            peer.connection.respond_data(command, vec![message.into()]);
        }
        if !was_authenticated
            && authentication.responder.is_authenticated()
            && let Role::Queue(association, 0) = peer.role
        {
            self.ask_for_host(association, effects);
        }
        !ends
    }

    /// The admin queue is authenticated: now the executor is asked whether the host may.
    fn ask_for_host(&mut self, association: AssociationId, effects: &mut Vec<Effect>) {
        let Some(controller) = self.controllers.get_mut(&association) else { return };
        if let (Admission::Authenticating, Kind::Volume(volume)) =
            (controller.admission, controller.kind)
        {
            controller.admission = Admission::Asking;
            effects.push(Effect::HostConnect(volume, association, controller.host.clone()));
        }
    }

    /// The executor has run an [`Effect::Compute`]. For a connection that is gone: dropped.
    pub fn computed(
        &mut self,
        id: ConnectionId,
        computed: Computed,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let Some(mut peer) = self.peers.remove(&id) else { return };
        if let Some(authentication) = &mut peer.authentication {
            let was_authenticated = authentication.responder.is_authenticated();
            authentication.responder.computed(computed);
            if !self.go_on(&mut peer, was_authenticated, effects) {
                return self.drop_peer(id, peer, CloseReason::Authentication, effects);
            }
        }
        self.run_requests(id, peer, now, effects);
    }

    /// The executor's answer for an authenticated host.
    pub(super) fn admitted(
        &mut self,
        association: AssociationId,
        is_allowed: bool,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let controller = self.controllers.get_mut(&association).expect("looked up");
        let id = controller.admin;
        if !is_allowed {
            // With what it has still to be told: that it is authenticated.
            if let Some(peer) = self.peers.remove(&id) {
                self.drop_peer(id, peer, CloseReason::Ended, effects);
            }
            return;
        }
        controller.admission = Admission::Open;
        if let Some(mut peer) = self.peers.remove(&id) {
            tell_send(id, &mut peer, effects);
            self.run_requests(id, peer, now, effects);
        }
    }
}
