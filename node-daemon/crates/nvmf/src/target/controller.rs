//! A controller, which in the dynamic model is an association: properties, features, events.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tercet_proto::{Instant, VolumeId};

use super::api::{AssociationId, ConnectionId, HostIdentity};
use super::connection::Failure;
use super::features::Settings;
use crate::fabrics::{self, ConnectEntry, configuration, controller_status, property};
use crate::identify::{ASYNC_EVENTS_MAX, notice};
use crate::log::{Counters, ERRORS_MAX, ErrorEntry, page};
use crate::status::Status;
use crate::{IO_QUEUES_MAX, QUEUE_ENTRIES_MAX};

/// How long a discovery controller without Keep Alive stands with no command (Base 3.1.2.3).
const DISCOVERY_IDLE_MAX: Duration = Duration::from_mins(2);

/// What a controller is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Volume(VolumeId),
    Discovery,
}

/// Whether the executor knows of the association.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// As far as its Connect is answered.
    Open,
    /// The host has to authenticate first.
    Authenticating,
    /// It has; the executor is asked whether it may.
    Asking,
}

/// An asynchronous event (Base 5.2): which notice, what the completion says, which log clears it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Temperature,
    Namespace,
    Ana,
    Discovery,
}

impl Event {
    pub const ALL: [Self; 4] = [Self::Temperature, Self::Namespace, Self::Ana, Self::Discovery];

    /// Its bit in the Asynchronous Event Configuration.
    pub fn bit(self) -> u32 {
        match self {
            Self::Temperature => notice::TEMPERATURE,
            Self::Namespace => notice::NAMESPACE,
            Self::Ana => notice::ANA,
            Self::Discovery => notice::DISCOVERY,
        }
    }

    /// The log page that has the news.
    pub fn page(self) -> u8 {
        match self {
            Self::Temperature => page::HEALTH,
            Self::Namespace => page::CHANGED_NAMESPACES,
            Self::Ana => page::ANA,
            Self::Discovery => page::DISCOVERY,
        }
    }

    /// Completion dword 0: type 2:0 (SMART / health, or notice), information 15:8, log page 23:16.
    pub fn result(self) -> u64 {
        const HEALTH: u64 = 1;
        const NOTICE: u64 = 2;
        let (kind, information): (u64, u64) = match self {
            Self::Temperature => (HEALTH, 0x01),
            Self::Namespace => (NOTICE, 0x00),
            Self::Ana => (NOTICE, 0x03),
            Self::Discovery => (NOTICE, 0xf0),
        };
        kind | information << 8 | u64::from(self.page()) << 16
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Controller {
    pub association: AssociationId,
    pub kind: Kind,
    pub cntlid: u16,
    pub host: HostIdentity,
    pub admin: ConnectionId,
    /// I/O queues by identifier.
    pub queues: BTreeMap<u16, ConnectionId>,
    /// Connect while the executor is asked whether the host may: its identifier is in front.
    pub connect: Option<(u16, ConnectEntry)>,
    pub admission: Admission,
    /// Its I/O queues are gone for good: reset, or ended.
    pub is_over: bool,
    pub configuration: u32,
    fatal: bool,
    pub queue_count: u16,
    pub keep_alive: Option<Duration>,
    pub last_seen: Instant,
    /// Notices that the host wants.
    pub event_config: u32,
    pub event_requests: VecDeque<u16>,
    /// Notices that have to be told, and those told whose log has not been read.
    pending: u32,
    masked: u32,
    pub namespace_changed: bool,
    pub counters: Counters,
    /// The Error Information log, the newest last.
    pub errors: VecDeque<ErrorEntry>,
    pub settings: Settings,
}

impl Controller {
    pub fn new(
        association: AssociationId,
        kind: Kind,
        cntlid: u16,
        host: HostIdentity,
        admin: ConnectionId,
        now: Instant,
    ) -> Self {
        let mut controller = Self {
            association,
            kind,
            cntlid,
            host,
            admin,
            queues: BTreeMap::new(),
            connect: None,
            admission: Admission::Open,
            is_over: false,
            configuration: 0,
            fatal: false,
            queue_count: IO_QUEUES_MAX,
            keep_alive: None,
            last_seen: now,
            event_config: 0,
            event_requests: VecDeque::new(),
            pending: 0,
            masked: 0,
            namespace_changed: false,
            counters: Counters::default(),
            errors: VecDeque::new(),
            settings: Settings::default(),
        };
        controller.event_config = controller.default_events();
        controller
    }

    /// Notices that a host is told unless it says otherwise.
    pub fn default_events(&self) -> u32 {
        self.supported_events() & !notice::TEMPERATURE
    }

    /// Which events this kind of controller has.
    pub fn supported_events(&self) -> u32 {
        match self.kind {
            Kind::Volume(_) => notice::TEMPERATURE | notice::NAMESPACE | notice::ANA,
            Kind::Discovery => notice::DISCOVERY,
        }
    }

    pub fn set_keep_alive(&mut self, milliseconds: u32) {
        self.keep_alive =
            (milliseconds != 0).then(|| Duration::from_millis(u64::from(milliseconds)));
    }

    /// When the association ends unless the host is heard of (Base 3.9; traffic counts, TBKAS).
    pub fn expiry(&self) -> Option<Instant> {
        // A discovery controller without a timer ends when it has not been asked for long.
        let idle = (self.kind == Kind::Discovery).then_some(DISCOVERY_IDLE_MAX);
        self.keep_alive.or(idle).map(|timeout| self.last_seen + timeout)
    }

    /// Enabled, and not shut down.
    pub fn is_ready(&self) -> bool {
        self.configuration & configuration::ENABLE != 0
            && self.configuration & configuration::SHUTDOWN == 0
            && !self.fatal
            && self.connect.is_none()
            && self.admission == Admission::Open
    }

    /// A property's value and whether it has eight bytes.
    pub fn property(&self, offset: u32, io_running: bool) -> Option<(u64, bool)> {
        Some(match offset {
            property::CAP => (fabrics::capabilities(QUEUE_ENTRIES_MAX), true),
            property::VS => (u64::from(fabrics::VERSION), false),
            property::CC => (u64::from(self.configuration), false),
            property::CSTS => (u64::from(self.status(io_running)), false),
            _ => return None,
        })
    }

    fn status(&self, io_running: bool) -> u32 {
        if self.fatal {
            return controller_status::FATAL;
        }
        let shutdown = match self.configuration & configuration::SHUTDOWN {
            0 => 0,
            _ if io_running => controller_status::SHUTDOWN_PROCESSING,
            _ => controller_status::SHUTDOWN_COMPLETE,
        };
        let is_ready = self.configuration & configuration::ENABLE != 0;
        shutdown | if is_ready { controller_status::READY } else { 0 }
    }

    /// Sets CC. False when EN goes from 1 to 0: a reset, which ends the association's I/O queues.
    pub fn configure(&mut self, value: u32) -> bool {
        let was_enabled = self.configuration & configuration::ENABLE != 0;
        let is_enabled = value & configuration::ENABLE != 0;
        // Entry sizes may be left 0 by a discovery host, which has no I/O queue.
        let sizes = value & configuration::ENTRY_SIZES;
        let fits = value & configuration::MUST_BE_ZERO == 0
            && (sizes == configuration::ENTRY_SIZES_EXPECTED || self.kind == Kind::Discovery);
        // A reset ended the association's I/O (rule H3): a host that wants more connects anew.
        if is_enabled && !was_enabled && (!fits || self.is_over) {
            self.fatal = true;
        }
        self.configuration = value;
        is_enabled || !was_enabled
    }

    /// Commands failed on a queue: they are entries of the Error Information log.
    pub fn log_failures(&mut self, queue: u16, failures: impl Iterator<Item = Failure>) {
        for Failure { entry, status } in failures {
            self.counters.errors += 1;
            if status.same(Status::UNRECOVERED_READ) {
                self.counters.media_errors += 1;
            }
            if self.errors.len() >= ERRORS_MAX {
                self.errors.pop_front();
            }
            self.errors.push_back(ErrorEntry {
                count: self.counters.errors,
                queue,
                command: entry.id(),
                status,
                lba: if queue == 0 { 0 } else { entry.start_lba() },
                nsid: entry.nsid(),
            });
        }
    }

    /// Something happened that the host may want to hear of.
    pub fn raise(&mut self, event: Event) {
        self.pending |= event.bit();
    }

    /// Its log was read and the event not retained: the next one is told again.
    pub fn log_read(&mut self, event: Event) {
        self.pending &= !event.bit();
        self.masked &= !event.bit();
    }

    /// The next (request, event) to complete.
    pub fn next_event(&mut self) -> Option<(u16, Event)> {
        let due = self.pending & !self.masked & self.event_config;
        let event = Event::ALL.into_iter().find(|event| due & event.bit() != 0)?;
        let request = self.event_requests.pop_front()?;
        self.pending &= !event.bit();
        self.masked |= event.bit();
        Some((request, event))
    }

    /// Keeps an Asynchronous Event Request; false when there are enough.
    pub fn keep_request(&mut self, id: u16) -> bool {
        let fits = self.event_requests.len() < ASYNC_EVENTS_MAX;
        if fits {
            self.event_requests.push_back(id);
        }
        fits
    }
}
