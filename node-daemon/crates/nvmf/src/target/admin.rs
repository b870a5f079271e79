//! Commands of the admin queue: properties, Identify, features, log pages, events, Keep Alive.

use bytes::Bytes;
use tercet_proto::Instant;

use super::api::{Ana, AssociationId, CloseReason, Effect};
use super::connection::Request;
use super::controller::{Event, Kind};
use super::{Peer, Target, records_for, tell_send};
use crate::NSID;
use crate::command::{Entry, FABRICS, admin, fctype};
use crate::fabrics::{PropertyEntry, property};
use crate::identify::{self, Controller as ControllerFields, cns};
use crate::log::{self, AnaState, page};
use crate::names::{DISCOVERY_NQN, volume_nqn};
use crate::status::Status;

/// A command's outcome: data, or a result.
pub(super) enum Reply {
    Data(Vec<u8>),
    Result(u64),
    /// Nothing now: an Asynchronous Event Request.
    Later,
}

pub(super) type Outcome = Result<Reply, Status>;

/// NSIDs from here on are reserved, but for the broadcast value (Base 3.2.1.2).
const NSID_RESERVED: u32 = 0xffff_fffe;
/// NSID that names all namespaces.
pub(super) const NSID_ALL: u32 = 0xffff_ffff;

impl Target {
    /// False when the connection ends.
    pub(super) fn admin_request(
        &mut self,
        association: AssociationId,
        peer: &mut Peer,
        request: &Request,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Some(controller) = self.controllers.get_mut(&association) else {
            return false;
        };
        controller.last_seen = now;
        let entry = request.entry;
        let outcome = if entry.opcode() == FABRICS {
            self.fabrics_request(association, &entry, effects)
        } else if !self.controllers[&association].is_ready() {
            Err(Status::SEQUENCE_ERROR)
        } else if entry.fused() != 0 {
            Err(Status::INVALID_FIELD)
        } else {
            self.admin_command(association, peer, request, now, effects)
        };
        match outcome {
            Ok(Reply::Data(mut data)) => {
                data.truncate(request.room as usize);
                peer.connection.respond_data(entry.id(), vec![Bytes::from(data)]);
            }
            Ok(Reply::Result(result)) => {
                peer.connection.respond(entry.id(), Status::SUCCESS, result);
            }
            Ok(Reply::Later) => {}
            Err(status) => peer.connection.respond(entry.id(), status, 0),
        }
        true
    }

    fn fabrics_request(
        &mut self,
        association: AssociationId,
        entry: &Entry,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        match entry.fabrics_type() {
            fctype::PROPERTY_GET => {
                let property = PropertyEntry::parse(entry).ok_or(Status::INVALID_FIELD)?;
                let running = self.is_io_running(association);
                let controller = &self.controllers[&association];
                match controller.property(property.offset, running) {
                    Some((value, wide)) if wide == property.wide => Ok(Reply::Result(value)),
                    _ => Err(Status::INVALID_FIELD),
                }
            }
            fctype::PROPERTY_SET => {
                let property = PropertyEntry::parse(entry).ok_or(Status::INVALID_FIELD)?;
                if property.wide || property.offset != property::CC {
                    return Err(Status::INVALID_FIELD);
                }
                self.configure(association, property.value as u32, effects);
                Ok(Reply::Result(0))
            }
            fctype::CONNECT => Err(Status::SEQUENCE_ERROR),
            fctype::DISCONNECT => Err(Status::QUEUE_TYPE),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn is_io_running(&self, association: AssociationId) -> bool {
        self.controllers[&association]
            .queues
            .values()
            .any(|id| self.peers.get(id).is_some_and(|peer| peer.connection.running() > 0))
    }

    /// A reset ends the I/O of the association; the admin queue stays to say so (rule H3: what
    /// the host does next belongs to a new association).
    fn configure(&mut self, association: AssociationId, value: u32, effects: &mut Vec<Effect>) {
        let controller = self.controllers.get_mut(&association).expect("checked");
        if controller.configure(value) {
            return;
        }
        let mut controller = self.controllers.remove(&association).expect("checked");
        self.close_queues(&mut controller, CloseReason::Association, effects);
        self.controllers.insert(association, controller);
    }

    fn admin_command(
        &mut self,
        association: AssociationId,
        peer: &mut Peer,
        request: &Request,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        let entry = &request.entry;
        match entry.opcode() {
            admin::IDENTIFY => {
                if (request.room as usize) < identify::IDENTIFY_BYTES {
                    return Err(Status::SGL_LENGTH);
                }
                self.identify(association, entry).map(Reply::Data)
            }
            admin::GET_LOG_PAGE => {
                self.log_page(association, entry, request.room, effects).map(Reply::Data)
            }
            admin::SET_FEATURES => self.set_feature(association, entry, now),
            admin::GET_FEATURES => self.get_feature(association, entry, request.room),
            admin::ASYNC_EVENT => {
                let controller = self.controllers.get_mut(&association).expect("checked");
                let kept = controller.keep_request(entry.id());
                if kept { Ok(Reply::Later) } else { Err(Status::AER_LIMIT) }
            }
            admin::KEEP_ALIVE => Ok(Reply::Result(0)),
            admin::ABORT => Ok(Reply::Result(self.abort(association, peer, entry, effects))),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    /// Abort (Base 5.1): SQID 10/15:0, CID 10/31:16. Best effort: what has not begun is taken back,
    /// which are event requests and commands that wait for room; 1 says "not aborted".
    fn abort(
        &mut self,
        association: AssociationId,
        peer: &mut Peer,
        entry: &Entry,
        effects: &mut Vec<Effect>,
    ) -> u64 {
        let (queue, command) = (entry.dword(10) as u16, (entry.dword(10) >> 16) as u16);
        let controller = self.controllers.get_mut(&association).expect("checked");
        if queue == 0 {
            let kept = controller.event_requests.len();
            controller.event_requests.retain(|&request| request != command);
            let is_aborted = controller.event_requests.len() != kept;
            if is_aborted {
                peer.connection.respond(command, Status::ABORT_REQUESTED, 0);
            }
            return u64::from(!is_aborted);
        }
        let Some(&id) = controller.queues.get(&queue) else { return 1 };
        let Some(other) = self.peers.get_mut(&id) else { return 1 };
        let is_aborted = other.connection.abort(command);
        tell_send(id, other, effects);
        u64::from(!is_aborted)
    }

    fn identify(&self, association: AssociationId, entry: &Entry) -> Result<Vec<u8>, Status> {
        let controller = &self.controllers[&association];
        let which = entry.dword(10) as u8;
        let Kind::Volume(volume) = controller.kind else {
            return match which {
                cns::CONTROLLER => Ok(identify::controller(ControllerFields {
                    subsystem_nqn: DISCOVERY_NQN,
                    volume: None,
                    cntlid: controller.cntlid,
                })),
                _ => Err(Status::INVALID_FIELD),
            };
        };
        let namespace = || match entry.nsid() {
            NSID => Ok(()),
            _ => Err(Status::INVALID_NAMESPACE),
        };
        let command_set = || match entry.dword(11) >> 24 {
            0 => Ok(()),
            _ => Err(Status::INVALID_FIELD),
        };
        let list = || match entry.nsid() {
            NSID_RESERVED.. => Err(Status::INVALID_NAMESPACE),
            after => Ok(identify::namespace_list(after)),
        };
        let controllers = || {
            let all = self.controllers.values().filter(|other| other.kind == controller.kind);
            let cntlids = all.map(|other| other.cntlid).collect();
            identify::controller_list(&cntlids, (entry.dword(10) >> 16) as u16)
        };
        match which {
            cns::NAMESPACE_CONTROLLERS => namespace().map(|()| controllers()),
            cns::CONTROLLERS => Ok(controllers()),
            cns::CONTROLLER => Ok(identify::controller(ControllerFields {
                subsystem_nqn: &volume_nqn(volume),
                volume: Some(volume),
                cntlid: controller.cntlid,
            })),
            cns::NAMESPACE | cns::ALLOCATED_NAMESPACE => {
                namespace()?;
                Ok(identify::namespace(volume, self.subsystems[&volume].blocks))
            }
            cns::NAMESPACE_LIST | cns::ALLOCATED_NAMESPACE_LIST => list(),
            cns::COMMAND_SET_NAMESPACE_LIST => command_set().and_then(|()| list()),
            cns::DESCRIPTORS => namespace().map(|()| identify::descriptors(volume)),
            cns::COMMAND_SET_NAMESPACE => {
                command_set()?;
                namespace()?;
                Ok(vec![0; identify::IDENTIFY_BYTES])
            }
            cns::COMMAND_SET_CONTROLLER => {
                command_set().map(|()| identify::command_set_controller())
            }
            cns::INDEPENDENT_NAMESPACE => namespace().map(|()| identify::independent_namespace()),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Get Log Page (Base 5.16): LID 10/7:0, LSP 10/14:8, RAE 10/15, NUMDL 10/31:16, NUMDU
    /// 11/15:0, offset 12 and 13. What lies behind a page's end reads as zeroes.
    fn log_page(
        &mut self,
        association: AssociationId,
        entry: &Entry,
        room: u32,
        effects: &mut Vec<Effect>,
    ) -> Result<Vec<u8>, Status> {
        let dwords =
            u64::from(entry.dword(10) >> 16) + 1 + (u64::from(entry.dword(11) & 0xffff) << 16);
        if dwords * 4 != u64::from(room) {
            return Err(Status::SGL_LENGTH);
        }
        let offset = u64::from(entry.dword(12)) | u64::from(entry.dword(13)) << 32;
        let which = entry.dword(10) as u8;
        let groups_only = entry.dword(10) & 1 << 8 != 0;
        // SMART is the controller's alone (LPA bit 0).
        if which == page::HEALTH && !matches!(entry.nsid(), 0 | NSID_ALL) {
            return Err(Status::INVALID_FIELD);
        }
        let mut data = self.read_log(association, which, groups_only)?;
        let offset = usize::try_from(offset)
            .ok()
            .filter(|offset| offset % 4 == 0 && *offset <= data.len())
            .ok_or(Status::INVALID_FIELD)?;
        let retain = entry.dword(10) & 1 << 15 != 0;
        let controller = self.controllers.get_mut(&association).expect("checked");
        if !retain {
            if let Some(event) = Event::ALL.into_iter().find(|event| event.page() == which) {
                controller.log_read(event);
            }
            if which == page::CHANGED_NAMESPACES {
                controller.namespace_changed = false;
            }
        }
        if which == page::ANA && !controller.is_over {
            effects.push(Effect::HostReadAna(association));
        }
        data.drain(..offset);
        data.resize(room as usize, 0);
        Ok(data)
    }

    fn read_log(
        &self,
        association: AssociationId,
        which: u8,
        groups_only: bool,
    ) -> Result<Vec<u8>, Status> {
        let controller = &self.controllers[&association];
        Ok(match (controller.kind, which) {
            (Kind::Discovery, page::DISCOVERY) => {
                let records: Vec<_> = records_for(&controller.host.nqn, &self.discovery).collect();
                log::discovery(self.discovery_generation, &records)
            }
            (_, page::ERRORS) => log::errors(controller.errors.iter().rev()),
            (_, page::HEALTH) => log::health(&controller.counters, controller.settings.is_warm()),
            (_, page::FIRMWARE) => log::firmware(),
            (Kind::Volume(_), page::CHANGED_NAMESPACES) => {
                log::changed_namespaces(controller.namespace_changed)
            }
            (Kind::Volume(_), page::EFFECTS) => log::effects(),
            (Kind::Volume(volume), page::ANA) => {
                let subsystem = &self.subsystems[&volume];
                let state = match subsystem.ana {
                    Ana::Optimized => AnaState::Optimized,
                    Ana::Inaccessible => AnaState::Inaccessible,
                    Ana::Change => AnaState::Change,
                };
                log::ana(subsystem.ana_changes, state, groups_only)
            }
            _ => return Err(Status::INVALID_LOG),
        })
    }
}
