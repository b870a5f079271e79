//! Features (Base 5.15, 5.27): what a host sets on its controller and reads back.
//!
//! None is saved; each lives as long as its association. Those that steer a drive's inside
//! (arbitration, power states, error recovery) are kept because a host may expect to read what it
//! has set; there is nothing here that they would change.

use tercet_proto::Instant;

use super::Target;
use super::admin::{Outcome, Reply};
use super::api::AssociationId;
use super::controller::{Controller, Event, Kind};
use crate::IO_QUEUES_MAX;
use crate::command::{Entry, feature};
use crate::identify::WARNING_TEMPERATURE_K;
use crate::log::ROOM_TEMPERATURE_K;
use crate::status::Status;

/// AB 2:0, LPW 15:8, MPW 23:16, HPW 31:24 of Arbitration.
const ARBITRATION_FIELDS: u32 = 0xffff_ff07;
/// TLER of Error Recovery; DULBE (bit 16) needs an error that the namespace does not have.
const ERROR_RECOVERY_FIELDS: u32 = 0xffff;

/// Feature values that nothing but the host looks at.
#[derive(Debug)]
pub(super) struct Settings {
    arbitration: u32,
    /// Warns at and above the first, at and below the second, in kelvin.
    over_k: u16,
    under_k: u16,
    error_recovery: u32,
    /// DN: writes beyond AWUN need not be atomic over a power loss; there are none.
    write_atomicity: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            arbitration: 0,
            over_k: WARNING_TEMPERATURE_K,
            under_k: 0,
            error_recovery: 0,
            write_atomicity: 0,
        }
    }
}

impl Settings {
    /// Whether the temperature is beyond a threshold.
    pub(super) fn is_warm(&self) -> bool {
        ROOM_TEMPERATURE_K >= self.over_k || ROOM_TEMPERATURE_K <= self.under_k
    }

    /// The threshold that dword 11 names: TMPSEL 19:16 (0: composite, Fh: all), THSEL 21:20.
    fn threshold(&mut self, dword: u32) -> Option<&mut u16> {
        match (dword >> 16 & 0xf, dword >> 20 & 3) {
            (0 | 0xf, 0) => Some(&mut self.over_k),
            (0 | 0xf, 1) => Some(&mut self.under_k),
            _ => None,
        }
    }

    /// The value of a feature, of which dword 11 says what is meant.
    fn value(&mut self, which: u8, dword: u32) -> Option<u32> {
        Some(match which {
            feature::ARBITRATION => self.arbitration,
            feature::POWER_MANAGEMENT => 0,
            feature::TEMPERATURE_THRESHOLD => {
                u32::from(*self.threshold(dword)?) | dword & 0x003f_0000
            }
            feature::ERROR_RECOVERY => self.error_recovery,
            feature::WRITE_ATOMICITY => self.write_atomicity,
            _ => return None,
        })
    }

    fn set(&mut self, which: u8, value: u32) -> Result<(), Status> {
        let within = |fields: u32| match value & !fields {
            0 => Ok(value),
            _ => Err(Status::INVALID_FIELD),
        };
        match which {
            feature::ARBITRATION => self.arbitration = within(ARBITRATION_FIELDS)?,
            // PS 4:0: the one power state; WH 7:5, a hint.
            feature::POWER_MANAGEMENT => {
                within(0xe0)?;
            }
            feature::TEMPERATURE_THRESHOLD => {
                *self.threshold(value).ok_or(Status::INVALID_FIELD)? = value as u16;
            }
            feature::ERROR_RECOVERY => self.error_recovery = within(ERROR_RECOVERY_FIELDS)?,
            feature::WRITE_ATOMICITY => self.write_atomicity = within(1)?,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(())
    }
}

/// NSQA 15:0 and NCQA 31:16, 0's based.
fn queue_count_result(count: u16) -> u64 {
    let last = u64::from(count - 1);
    last | last << 16
}

/// Number of Queues: NSQR 15:0 and NCQR 31:16, 0's based, before there is any.
fn set_queue_count(controller: &mut Controller, value: u32) -> Outcome {
    if !controller.queues.is_empty() {
        return Err(Status::SEQUENCE_ERROR);
    }
    let (submission, completion) = (value & 0xffff, value >> 16);
    if submission == 0xffff || completion == 0xffff {
        return Err(Status::INVALID_FIELD);
    }
    let asked = submission.min(completion) as u16 + 1;
    controller.queue_count = asked.min(IO_QUEUES_MAX);
    Ok(Reply::Result(queue_count_result(controller.queue_count)))
}

fn set_events(controller: &mut Controller, value: u32) -> Outcome {
    if value & !controller.supported_events() & !0xff != 0 {
        return Err(Status::INVALID_FIELD);
    }
    controller.event_config = value & controller.supported_events();
    Ok(Reply::Result(0))
}

impl Target {
    /// Set Features (Base 5.27): FID 10/7:0, SV 10/31.
    pub(super) fn set_feature(
        &mut self,
        association: AssociationId,
        entry: &Entry,
        now: Instant,
    ) -> Outcome {
        const SAVE: u32 = 1 << 31;
        let controller = self.controllers.get_mut(&association).expect("checked");
        let (which, value) = (entry.dword(10) as u8, entry.dword(11));
        if entry.dword(10) & SAVE != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        match (which, controller.kind) {
            (feature::QUEUE_COUNT, Kind::Volume(_)) => set_queue_count(controller, value),
            (feature::ASYNC_EVENTS, _) => set_events(controller, value),
            (feature::KEEP_ALIVE, _) => {
                controller.set_keep_alive(value);
                controller.last_seen = now;
                let expiry = controller.expiry();
                if let Some(at) = expiry {
                    self.wake_at(at);
                }
                Ok(Reply::Result(0))
            }
            // Connect has set it (Base 5.27.1.25).
            (feature::HOST_ID, _) => Err(Status::SEQUENCE_ERROR),
            (_, Kind::Volume(_)) => {
                let was_warm = controller.settings.is_warm();
                controller.settings.set(which, value)?;
                if controller.settings.is_warm() && !was_warm {
                    controller.raise(Event::Temperature);
                }
                Ok(Reply::Result(0))
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Get Features (Base 5.15): FID 10/7:0, SEL 10/10:8 (0 current, 1 default, 2 saved, which is
    /// the default, 3 supported capabilities).
    pub(super) fn get_feature(
        &mut self,
        association: AssociationId,
        entry: &Entry,
        room: u32,
    ) -> Outcome {
        const CAPABILITIES: u32 = 3;
        const CHANGEABLE: u64 = 1 << 2;
        let controller = self.controllers.get_mut(&association).expect("checked");
        let select = entry.dword(10) >> 8 & 7;
        if select > CAPABILITIES {
            return Err(Status::INVALID_FIELD);
        }
        let is_current = select == 0;
        let value = match (entry.dword(10) as u8, controller.kind) {
            (feature::QUEUE_COUNT, Kind::Volume(_)) if is_current => {
                queue_count_result(controller.queue_count)
            }
            (feature::QUEUE_COUNT, Kind::Volume(_)) => queue_count_result(IO_QUEUES_MAX),
            (feature::ASYNC_EVENTS, _) if is_current => u64::from(controller.event_config),
            (feature::ASYNC_EVENTS, _) => u64::from(controller.default_events()),
            (feature::KEEP_ALIVE, _) if is_current => {
                controller.keep_alive.map_or(0, |timeout| timeout.as_millis() as u64)
            }
            (feature::KEEP_ALIVE, _) => 0,
            (feature::HOST_ID, _) if select == CAPABILITIES => return Ok(Reply::Result(0)),
            (feature::HOST_ID, _) => {
                const EXTENDED: u32 = 1; // EXHID: Fabrics has 128 bits only
                if entry.dword(11) & EXTENDED == 0 {
                    return Err(Status::INVALID_FIELD);
                }
                if room < 16 {
                    return Err(Status::SGL_LENGTH);
                }
                return Ok(Reply::Data(controller.host.id.to_vec()));
            }
            (which, Kind::Volume(_)) => {
                let mut defaults = Settings::default();
                let settings = if is_current { &mut controller.settings } else { &mut defaults };
                u64::from(settings.value(which, entry.dword(11)).ok_or(Status::INVALID_FIELD)?)
            }
            _ => return Err(Status::INVALID_FIELD),
        };
        Ok(Reply::Result(if select == CAPABILITIES { CHANGEABLE } else { value }))
    }
}
