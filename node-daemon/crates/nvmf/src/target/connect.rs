//! Connect (Base 6.3): from a connection to a queue of an association, and from one target to
//! another.

use tercet_proto::{Instant, VolumeId};

use super::api::{AssociationId, ConnectionId, Effect, HostIdentity, Refusal};
use super::connection::Request;
use super::controller::{Admission, Controller, Kind};
use super::{ADMIN_QUEUE_ENTRIES_MAX, Detached, HANDSHAKE_TIMEOUT, Peer, Role, Target, tell_send};
use crate::command::{FABRICS, fctype};
use crate::fabrics::{self, CNTLID_DYNAMIC, CNTLID_MAX, ConnectData, ConnectEntry, parameter};
use crate::names::{DISCOVERY_NQN, parse_volume_nqn};
use crate::status::Status;
use crate::{IO_QUEUES_MAX, QUEUE_ENTRIES_MAX};

/// Controllers of the discovery subsystem: one for each node whose hosts keep their paths by it.
const DISCOVERY_CONTROLLERS_MAX: usize = 256;

/// A refusal: status and the result that names the parameter.
type Refused = (Status, u32);

fn wrong(parameter: u32) -> Refused {
    (Status::CONNECT_PARAMETER, parameter)
}

impl Target {
    /// The first request on a connection: Connect, or nothing that is executed.
    pub(super) fn first_request(
        &mut self,
        id: ConnectionId,
        peer: &mut Peer,
        request: Request,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let entry = request.entry;
        if entry.opcode() != FABRICS || entry.fabrics_type() != fctype::CONNECT {
            peer.connection.respond(entry.id(), Status::SEQUENCE_ERROR, 0);
            return true;
        }
        match self.connect(id, peer, &request, now, effects) {
            Ok(Some(elsewhere)) => {
                let until = now + HANDSHAKE_TIMEOUT;
                self.wake_at(until);
                peer.role = Role::Waiting(until);
                peer.connect = Some(request);
                effects.push(Effect::Elsewhere(id, elsewhere));
            }
            Ok(None) => {}
            Err((status, result)) => {
                peer.connection.respond(entry.id(), status, u64::from(result));
            }
        }
        true
    }

    /// `Some`: the volume is not here.
    fn connect(
        &mut self,
        id: ConnectionId,
        peer: &mut Peer,
        request: &Request,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> Result<Option<VolumeId>, Refused> {
        let entry = ConnectEntry::parse(&request.entry);
        if entry.format != 0 {
            return Err((Status::CONNECT_FORMAT, 0));
        }
        let data = ConnectData::parse(&request.data).map_err(wrong)?;
        if data.host_id == [0; 16] {
            return Err(wrong(parameter::HOSTID));
        }
        let most = if entry.queue == 0 { ADMIN_QUEUE_ENTRIES_MAX } else { QUEUE_ENTRIES_MAX };
        if entry.last_entry == 0 || entry.last_entry >= most {
            return Err(wrong(parameter::SQSIZE));
        }
        let kind = if data.subsystem_nqn == DISCOVERY_NQN {
            Kind::Discovery
        } else {
            let volume = parse_volume_nqn(&data.subsystem_nqn).ok_or(wrong(parameter::SUBNQN))?;
            if !self.subsystems.contains_key(&volume) {
                return Ok(Some(volume));
            }
            Kind::Volume(volume)
        };
        let command = request.entry.id();
        if entry.queue == 0 {
            self.connect_admin(id, peer, kind, (command, entry), data, now, effects)?;
        } else {
            let association = self.find_association(kind, &data)?;
            if !self.has_room_for_queue(&data.host_nqn) {
                return Err((Status::CONNECT_BUSY, 0));
            }
            self.connect_io(id, peer, association, entry)?;
            let required = self.require_authentication(peer, kind, &data.host_nqn, now);
            let cntlid = self.controllers[&association].cntlid;
            peer.connection.respond(command, Status::SUCCESS, u64::from(cntlid) | required);
        }
        Ok(None)
    }

    #[allow(clippy::too_many_arguments, reason = "one call, the parts of one Connect")]
    fn connect_admin(
        &mut self,
        id: ConnectionId,
        peer: &mut Peer,
        kind: Kind,
        connect: (u16, ConnectEntry),
        data: ConnectData,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refused> {
        if data.cntlid != CNTLID_DYNAMIC {
            return Err(wrong(parameter::CNTLID)); // dynamic model only (FCATT)
        }
        if !self.has_room_for_queue(&data.host_nqn) {
            return Err((Status::CONNECT_BUSY, 0));
        }
        let cntlid = self.draw_cntlid(kind).ok_or((Status::CONNECT_BUSY, 0))?;
        let association = AssociationId(self.next_association);
        self.next_association += 1;
        let host = HostIdentity { nqn: data.host_nqn, id: data.host_id };
        let mut controller = Controller::new(association, kind, cntlid, host.clone(), id, now);
        controller.connect = Some(connect);
        let required = self.require_authentication(peer, kind, &host.nqn, now);
        if required != 0 {
            controller.admission = Admission::Authenticating;
        }
        self.controllers.insert(association, controller);
        self.is_unshared = true;
        peer.role = Role::Queue(association, 0);
        match kind {
            Kind::Volume(_) if required != 0 => self.welcome(association, peer, now),
            Kind::Volume(volume) => effects.push(Effect::HostConnect(volume, association, host)),
            Kind::Discovery => self.welcome(association, peer, now),
        }
        Ok(())
    }

    /// What Connect's result says besides the CNTLID: that the queue has to be authenticated.
    fn require_authentication(
        &mut self,
        peer: &mut Peer,
        kind: Kind,
        host_nqn: &str,
        now: Instant,
    ) -> u64 {
        peer.authentication = self.authentication(kind, host_nqn, now);
        let Some(authentication) = &peer.authentication else { return 0 };
        let deadline = authentication.deadline();
        if let Some(until) = deadline {
            self.wake_at(until);
        }
        fabrics::AUTHENTICATION_REQUIRED
    }

    /// A CNTLID that no association of the subsystem has.
    fn draw_cntlid(&mut self, kind: Kind) -> Option<u16> {
        let in_use: std::collections::BTreeSet<u16> = self
            .controllers
            .values()
            .filter(|controller| controller.kind == kind)
            .map(|controller| controller.cntlid)
            .collect();
        let (first, last, next) = match kind {
            Kind::Discovery if in_use.len() >= DISCOVERY_CONTROLLERS_MAX => return None,
            Kind::Discovery => (1, CNTLID_MAX, &mut self.discovery_cntlid),
            Kind::Volume(volume) => {
                let subsystem = self.subsystems.get_mut(&volume)?;
                (subsystem.cntlids.first, subsystem.cntlids.last, &mut subsystem.next_cntlid)
            }
        };
        for _ in first..=last {
            let cntlid = (*next).clamp(first, last);
            *next = if cntlid == last { first } else { cntlid + 1 };
            if !in_use.contains(&cntlid) {
                return Some(cntlid);
            }
        }
        None
    }

    fn find_association(&self, kind: Kind, data: &ConnectData) -> Result<AssociationId, Refused> {
        let controller = self
            .controllers
            .values()
            .find(|controller| controller.kind == kind && controller.cntlid == data.cntlid)
            .ok_or(wrong(parameter::CNTLID))?;
        if controller.host.id != data.host_id {
            return Err(wrong(parameter::HOSTID));
        }
        if controller.host.nqn != data.host_nqn {
            return Err(wrong(parameter::HOSTNQN));
        }
        Ok(controller.association)
    }

    fn connect_io(
        &mut self,
        id: ConnectionId,
        peer: &mut Peer,
        association: AssociationId,
        entry: ConnectEntry,
    ) -> Result<(), Refused> {
        let controller = self.controllers.get_mut(&association).expect("found");
        if !controller.is_ready() || controller.is_over {
            return Err((Status::SEQUENCE_ERROR, 0));
        }
        let most = controller.queue_count.min(IO_QUEUES_MAX);
        if controller.kind == Kind::Discovery || entry.queue > most {
            return Err(wrong(parameter::QID));
        }
        if controller.queues.contains_key(&entry.queue) {
            return Err((Status::SEQUENCE_ERROR, 0));
        }
        controller.queues.insert(entry.queue, id);
        self.is_unshared = true;
        peer.role = Role::Queue(association, entry.queue);
        peer.connection.set_queue(entry.last_entry + 1, !entry.no_flow_control, false);
        Ok(())
    }

    /// The admin queue's Connect succeeds.
    fn welcome(&mut self, association: AssociationId, peer: &mut Peer, now: Instant) {
        let controller = self.controllers.get_mut(&association).expect("a controller");
        let (command, entry) = controller.connect.take().expect("Connect waits");
        controller.set_keep_alive(entry.keep_alive_ms);
        controller.last_seen = now;
        let expiry = controller.expiry();
        let cntlid = controller.cntlid;
        peer.connection.set_queue(entry.last_entry + 1, !entry.no_flow_control, true);
        let required =
            if peer.authentication.is_some() { fabrics::AUTHENTICATION_REQUIRED } else { 0 };
        peer.connection.respond(command, Status::SUCCESS, u64::from(cntlid) | required);
        if let Some(at) = expiry {
            self.wake_at(at);
        }
    }

    /// The executor's answer to [`Effect::HostConnect`]. For an association that has gone
    /// meanwhile: dropped.
    pub fn accepted(
        &mut self,
        association: AssociationId,
        result: Result<(), Refusal>,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let Some(controller) = self.controllers.get(&association) else {
            return;
        };
        if controller.admission == Admission::Asking {
            return self.admitted(association, result.is_ok(), now, effects);
        }
        if controller.connect.is_none() {
            return;
        }
        let id = controller.admin;
        let Some(mut peer) = self.peers.remove(&id) else {
            return;
        };
        match result {
            Ok(()) => self.welcome(association, &mut peer, now),
            Err(refusal) => {
                let controller = self.controllers.remove(&association).expect("looked up");
                let (command, _) = controller.connect.expect("checked");
                let (status, result) = match refusal {
                    Refusal::NoVolume => unknown_volume(),
                    Refusal::NotAllowed => (Status::CONNECT_HOST, 0),
                };
                peer.connection.respond(command, status, u64::from(result));
                let until = now + HANDSHAKE_TIMEOUT;
                self.wake_at(until);
                peer.role = Role::New(until);
            }
        }
        tell_send(id, &mut peer, effects);
        self.peers.insert(id, peer);
    }

    /// No target has the volume of an [`Effect::Elsewhere`].
    pub fn refuse(&mut self, id: ConnectionId, effects: &mut Vec<Effect>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let (Role::Waiting(until), Some(request)) = (peer.role, peer.connect.take()) else {
            return;
        };
        let (status, result) = unknown_volume();
        peer.role = Role::New(until);
        peer.connection.respond(request.entry.id(), status, u64::from(result));
        tell_send(id, peer, effects);
    }

    /// Takes a waiting connection out, for [`Target::adopt`] at another target. The socket goes
    /// along; output that has not been taken goes with the connection.
    pub fn detach(&mut self, id: ConnectionId) -> Option<Detached> {
        match self.peers.get(&id)?.role {
            Role::Waiting(_) => self.peers.remove(&id).map(Detached),
            _ => None,
        }
    }

    /// Goes on with a connection's Connect here. A volume that is not here either is refused.
    pub fn adopt(
        &mut self,
        id: ConnectionId,
        detached: Detached,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let Detached(mut peer) = detached;
        let request = peer.connect.take().expect("a detached connection waits with its Connect");
        let until = now + HANDSHAKE_TIMEOUT;
        self.wake_at(until);
        peer.role = Role::New(until);
        peer.told_send = false;
        match self.connect(id, &mut peer, &request, now, effects) {
            Ok(None) => {}
            Ok(Some(_)) => {
                let (status, result) = unknown_volume();
                peer.connection.respond(request.entry.id(), status, u64::from(result));
            }
            Err((status, result)) => {
                peer.connection.respond(request.entry.id(), status, u64::from(result));
            }
        }
        tell_send(id, &mut peer, effects);
        self.peers.insert(id, peer);
    }
}

/// Without DNR: the volume may be on its way here, and a Linux host gives up on DNR.
fn unknown_volume() -> Refused {
    (Status::CONNECT_PARAMETER.retryable(), parameter::SUBNQN)
}
