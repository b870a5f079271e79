//! A path: the association with one endpoint, from the first byte to its loss, over and over.
//!
//! Sets up (TCP 3.1, Base 6.3): admin queue, properties, Identify, number of queues, I/O queues,
//! events, namespace, and the ANA log last, so that the first I/O follows it (rule H4). Then keeps
//! the association alive, follows its events and hands completions up. A path that is lost closes
//! all its connections, says so when they are closed, and tries again after a growing delay.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use tercet_proto::Instant;

use super::api::{ConnectionId, HostEffect, HostOptions, PathState};
use super::authenticate::AUTHENTICATION_TAG;
use super::queue::{Completed, Queue};
use crate::ADMIN_IN_CAPSULE_BYTES_MAX;
use crate::auth::Initiator;
use crate::command::{Entry, admin, feature};
use crate::fabrics::{
    CNTLID_DYNAMIC, ConnectData, ConnectEntry, PropertyEntry, configuration, controller_status,
    property,
};
use crate::identify::{ControllerView, IDENTIFY_BYTES, NamespaceView, cns, notice};
use crate::log::{ANA_BYTES, AnaState, page, parse_ana};
use crate::status::Status;
use crate::target::ADMIN_QUEUE_ENTRIES_MAX;
use crate::{BLOCK_SHIFT, NSID};

/// An association stands within this time, or the try is over.
const SETUP_TIMEOUT: Duration = Duration::from_secs(3);
/// First and longest delay between tries.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Between two looks at CSTS.RDY.
const READY_POLL: Duration = Duration::from_millis(10);
/// Between two looks at the ANA log when a path says optimized and answers inaccessible.
const ANA_POLL: Duration = Duration::from_millis(5);
/// Between two looks at the ANA log while operations wait for any path.
const ANA_POLL_WAITING: Duration = Duration::from_millis(200);

/// Tag of an I/O queue's Connect; operations have smaller ones.
pub(super) const CONNECT_TAG: u64 = u64::MAX;

/// What an admin command was for: its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Step {
    Connect,
    Capabilities,
    Enable,
    Status,
    Controller,
    QueueCount,
    EventConfig,
    Namespace,
    Ana,
    Event,
    KeepAlive,
    Changed,
}

const STEPS: [Step; 12] = [
    Step::Connect,
    Step::Capabilities,
    Step::Enable,
    Step::Status,
    Step::Controller,
    Step::QueueCount,
    Step::EventConfig,
    Step::Namespace,
    Step::Ana,
    Step::Event,
    Step::KeepAlive,
    Step::Changed,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing is open; tries again then.
    Down(Instant),
    /// Setting up, until then.
    Setup(Instant),
    Live,
    /// Waits for its connections to be closed.
    Closing,
}

#[derive(Debug)]
pub(super) struct Link {
    id: ConnectionId,
    pub queue: Queue,
    /// While the queue is authenticated.
    pub authentication: Option<Box<Initiator>>,
    /// Its Connect has been answered, and it is authenticated if it has to be.
    is_live: bool,
    told_send: bool,
}

/// What a path has to say to the multipath above it.
#[derive(Debug)]
pub(super) enum Said {
    /// An operation's command ended.
    Completed(Completed),
    /// What the namespace is, and the limits of the controller.
    Namespace(NamespaceView, ControllerView),
    /// The path's ANA state was read; the association is live.
    Ana,
    /// The association has begun to end.
    Lost,
    /// Nothing of the last association is open any more.
    Ended,
}

/// What a path acts through during one call.
pub(super) struct Context<'a> {
    pub options: &'a HostOptions,
    pub now: Instant,
    pub effects: &'a mut Vec<HostEffect>,
    pub next_connection: &'a mut u64,
    pub random: &'a mut u64,
    pub said: Vec<Said>,
}

impl Context<'_> {
    /// xorshift64*: only jitter hangs on it.
    pub fn draw(&mut self) -> u64 {
        let mut x = *self.random;
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        *self.random = x;
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Path {
    pub endpoint: SocketAddr,
    stage: Stage,
    admin: Option<Link>,
    io: Vec<Link>,
    closing: BTreeSet<ConnectionId>,
    tries: u32,
    controller: Option<ControllerView>,
    ana: AnaState,
    poll_ready_at: Option<Instant>,
    keep_alive_at: Instant,
    keep_alive_sent: Option<Instant>,
    ana_reading: bool,
    ana_again: bool,
    ana_poll_at: Option<Instant>,
    /// Another path is optimized since: what still runs here is given until then.
    pub superseded_at: Option<Instant>,
    is_removed: bool,
}

impl Path {
    /// A path that tries at once.
    pub fn new(endpoint: SocketAddr, now: Instant) -> Self {
        Self {
            endpoint,
            stage: Stage::Down(now),
            admin: None,
            io: Vec::new(),
            closing: BTreeSet::new(),
            tries: 0,
            controller: None,
            ana: AnaState::Inaccessible,
            poll_ready_at: None,
            keep_alive_at: now,
            keep_alive_sent: None,
            ana_reading: false,
            ana_again: false,
            ana_poll_at: None,
            superseded_at: None,
            is_removed: false,
        }
    }

    pub fn has(&self, id: ConnectionId) -> bool {
        self.closing.contains(&id) || self.links().any(|link| link.id == id)
    }

    fn links(&self) -> impl Iterator<Item = &Link> {
        self.admin.iter().chain(&self.io)
    }

    pub(super) fn link(&mut self, id: ConnectionId) -> Option<&mut Link> {
        self.admin.iter_mut().chain(&mut self.io).find(|link| link.id == id)
    }

    /// Whether operations may be sent here, and how well.
    pub fn ana(&self) -> Option<AnaState> {
        (self.stage == Stage::Live).then_some(self.ana)
    }

    pub fn state(&self) -> PathState {
        self.ana().map_or(PathState::Connecting, PathState::Live)
    }

    /// No connection is open or being closed, and none will be.
    pub fn is_gone(&self) -> bool {
        self.is_removed && matches!(self.stage, Stage::Down(_))
    }

    pub fn remove(&mut self, context: &mut Context<'_>) {
        self.is_removed = true;
        self.lose("the endpoint was removed", context);
    }

    pub fn missing_bytes(&self, id: ConnectionId) -> usize {
        self.links().find(|link| link.id == id).map_or(0, |link| link.queue.missing_bytes())
    }

    /// Tags of operations under way here.
    pub fn operations(&self) -> impl Iterator<Item = u64> + '_ {
        self.io.iter().flat_map(|link| link.queue.tags()).filter(|&tag| tag < AUTHENTICATION_TAG)
    }

    /// Room on the I/O queue that has most.
    pub fn room(&self) -> usize {
        self.io.iter().map(|link| link.queue.room()).max().unwrap_or(0)
    }

    /// Sends an operation's command. Panics without room.
    pub fn submit(
        &mut self,
        entry: Entry,
        tag: u64,
        payload: Bytes,
        room: usize,
        effects: &mut Vec<HostEffect>,
    ) {
        debug_assert_eq!(self.stage, Stage::Live);
        let link = self.io.iter_mut().max_by_key(|link| link.queue.room()).expect("live");
        link.queue.submit(entry, tag, payload, room);
        tell_send(link, effects);
    }

    /// A command came back with a path error: the ANA log says what is true now.
    pub fn distrust(&mut self, status: Status, now: Instant) {
        self.ana = match status {
            status if status.same(Status::ANA_TRANSITION) => AnaState::Change,
            _ => AnaState::Inaccessible,
        };
        self.poll_ana_at(now + ANA_POLL);
    }

    fn poll_ana_at(&mut self, at: Instant) {
        self.ana_poll_at = Some(self.ana_poll_at.map_or(at, |poll| poll.min(at)));
    }

    /// Operations wait although this path is live: look again before long.
    pub fn watch(&mut self, now: Instant) {
        if self.stage == Stage::Live && self.ana_poll_at.is_none() {
            self.poll_ana_at(now + ANA_POLL_WAITING);
        }
    }

    pub fn opened(&mut self, id: ConnectionId, context: &mut Context<'_>) {
        if let Some(link) = self.link(id) {
            tell_send(link, context.effects);
        }
    }

    pub fn take_output(&mut self, id: ConnectionId, out: &mut Vec<Bytes>) -> bool {
        let Some(link) = self.link(id) else {
            return false;
        };
        link.queue.outbox.take(out);
        link.told_send = !link.queue.outbox.is_empty();
        link.told_send
    }

    pub fn closed(&mut self, id: ConnectionId, context: &mut Context<'_>) {
        if !self.closing.remove(&id) {
            if self.admin.as_ref().is_some_and(|link| link.id == id) {
                self.admin = None;
            }
            self.io.retain(|link| link.id != id);
            self.lose("a connection was closed", context);
        }
        self.end_if_closed(context);
    }

    /// Begins to end the association: what has not been sent is not sent any more.
    pub fn lose(&mut self, why: &str, context: &mut Context<'_>) {
        self.end(why, false, context);
    }

    /// The same; with `last_words` what is queued (a termination request, a shutdown) goes first.
    fn end(&mut self, why: &str, last_words: bool, context: &mut Context<'_>) {
        if matches!(self.stage, Stage::Down(_) | Stage::Closing) {
            return;
        }
        self.stage = Stage::Closing;
        for mut link in self.admin.take().into_iter().chain(self.io.drain(..)) {
            let mut last = Vec::new();
            while last_words && !link.queue.outbox.is_empty() {
                link.queue.outbox.take(&mut last);
            }
            self.closing.insert(link.id);
            context.effects.push(HostEffect::Close(link.id, last));
        }
        let why = Some(why.to_owned());
        context.effects.push(HostEffect::Path(self.endpoint, PathState::Connecting, why));
        context.said.push(Said::Lost);
        self.end_if_closed(context);
    }

    /// Orderly: the controller is told that the host shuts down (Base 3.6.1).
    pub fn shut_down(&mut self, context: &mut Context<'_>) {
        if let (Stage::Live, Some(link)) = (self.stage, &mut self.admin) {
            let value = u64::from(
                configuration::ENABLE
                    | configuration::ENTRY_SIZES_EXPECTED
                    | configuration::SHUTDOWN_NORMAL,
            );
            let set = PropertyEntry { wide: false, offset: property::CC, value };
            if link.queue.room() > 0 {
                link.queue.submit(set.set(0), Step::Enable as u64, Bytes::new(), 0);
            }
        }
        self.is_removed = true;
        self.end("the volume was detached", true, context);
    }

    fn end_if_closed(&mut self, context: &mut Context<'_>) {
        if self.stage != Stage::Closing || !self.closing.is_empty() {
            return;
        }
        let delay = RETRY_MAX.min(RETRY_MIN * 2u32.saturating_pow(self.tries.min(16)));
        self.tries += 1;
        // Three quarters to five quarters of it.
        let jitter = delay.as_nanos() as u64 / 2;
        let jittered = delay * 3 / 4 + Duration::from_nanos(context.draw() % jitter.max(1));
        self.stage = Stage::Down(context.now + jittered);
        self.superseded_at = None;
        context.said.push(Said::Ended);
    }

    fn open(&mut self, queue: Queue, context: &mut Context<'_>) -> Link {
        let id = ConnectionId(*context.next_connection);
        *context.next_connection += 1;
        context.effects.push(HostEffect::Open(id, self.endpoint));
        Link { id, queue, authentication: None, is_live: false, told_send: false }
    }

    fn start(&mut self, context: &mut Context<'_>) {
        self.stage = Stage::Setup(context.now + SETUP_TIMEOUT);
        self.controller = None;
        self.ana = AnaState::Inaccessible;
        self.poll_ready_at = None;
        self.keep_alive_sent = None;
        self.keep_alive_at = context.now + context.options.keep_alive / 4;
        self.ana_reading = false;
        self.ana_again = false;
        self.ana_poll_at = None;
        let queue = Queue::new(ADMIN_QUEUE_ENTRIES_MAX / 4, context.options.digests);
        self.admin = Some(self.open(queue, context));
    }

    pub fn input(&mut self, id: ConnectionId, bytes: Bytes, context: &mut Context<'_>) {
        let Some(link) = self.link(id) else { return };
        let was_initialized = link.queue.is_initialized();
        let result = link.queue.input(bytes);
        if let Err(error) = result {
            self.end(&error.to_string(), true, context);
            return;
        }
        if !was_initialized && link.queue.is_initialized() {
            self.connect_queue(id, context);
        }
        while let Some(completed) = self.link(id).and_then(|link| link.queue.completed.pop_front())
        {
            if completed.tag == AUTHENTICATION_TAG {
                self.authentication_completed(id, &completed, context);
            } else if self.admin.as_ref().is_some_and(|link| link.id == id) {
                self.admin_completed(&completed, context);
            } else if completed.tag == CONNECT_TAG {
                self.io_connected(id, &completed, context);
            } else {
                context.said.push(Said::Completed(completed));
            }
        }
        if let Some(link) = self.link(id) {
            tell_send(link, context.effects);
        }
    }

    fn connect_queue(&mut self, id: ConnectionId, context: &Context<'_>) {
        let options = context.options;
        let index = self.io.iter().position(|link| link.id == id);
        let queue = index.map_or(0, |index| index as u16 + 1);
        let is_admin = queue == 0;
        let entry = ConnectEntry {
            format: 0,
            queue,
            last_entry: if is_admin {
                ADMIN_QUEUE_ENTRIES_MAX / 4 - 1
            } else {
                options.queue_entries - 1
            },
            no_flow_control: true,
            keep_alive_ms: if is_admin { options.keep_alive.as_millis() as u32 } else { 0 },
        };
        let data = ConnectData {
            host_id: options.host_id,
            cntlid: match &self.controller {
                Some(controller) if !is_admin => controller.cntlid,
                _ => CNTLID_DYNAMIC,
            },
            subsystem_nqn: options.subsystem_nqn.clone(),
            host_nqn: options.host_nqn.clone(),
        };
        let tag = if is_admin { Step::Connect as u64 } else { CONNECT_TAG };
        let payload = Bytes::from(data.to_wire());
        let link = self.link(id).expect("a link");
        link.queue.submit(entry.to_entry(0), tag, payload, 0);
    }

    /// Sends an admin command; `room` bytes of data come back.
    fn ask(&mut self, step: Step, entry: Entry, room: usize) {
        if let Some(link) = &mut self.admin {
            link.queue.submit(entry, step as u64, Bytes::new(), room);
        }
    }

    fn get(&mut self, step: Step, wide: bool, offset: u32) {
        self.ask(step, PropertyEntry { wide, offset, value: 0 }.get(0), 0);
    }

    fn identify(&mut self, step: Step, which: u8, nsid: u32) {
        let mut entry = Entry::new(admin::IDENTIFY, 0);
        entry.set_nsid(nsid);
        entry.set_dword(10, u32::from(which));
        self.ask(step, entry, IDENTIFY_BYTES);
    }

    fn read_log(&mut self, step: Step, which: u8, bytes: usize) {
        let mut entry = Entry::new(admin::GET_LOG_PAGE, 0);
        entry.set_nsid(u32::MAX);
        entry.set_dword(10, u32::from(which) | ((bytes / 4 - 1) as u32) << 16);
        self.ask(step, entry, bytes);
    }

    fn set_feature(&mut self, step: Step, which: u8, value: u32) {
        let mut entry = Entry::new(admin::SET_FEATURES, 0);
        entry.set_dword(10, u32::from(which));
        entry.set_dword(11, value);
        self.ask(step, entry, 0);
    }

    fn read_ana(&mut self) {
        self.ana_poll_at = None;
        if self.ana_reading {
            self.ana_again = true;
            return;
        }
        self.ana_reading = true;
        self.read_log(Step::Ana, page::ANA, ANA_BYTES);
    }

    fn admin_completed(&mut self, completed: &Completed, context: &mut Context<'_>) {
        let step = STEPS[completed.tag as usize];
        if !completed.status.is_success() {
            let why = format!("{step:?} failed: {}", completed.status);
            return self.lose(&why, context);
        }
        let data = completed.data.concat();
        match step {
            Step::Connect => {
                let link = self.admin.as_mut().expect("it answers");
                link.queue.in_capsule_bytes = ADMIN_IN_CAPSULE_BYTES_MAX;
                let id = link.id;
                self.queue_connected(id, completed.result, context);
            }
            Step::Capabilities => {
                let value = u64::from(configuration::ENABLE | configuration::ENTRY_SIZES_EXPECTED);
                let set = PropertyEntry { wide: false, offset: property::CC, value };
                self.ask(Step::Enable, set.set(0), 0);
            }
            Step::Enable => self.get(Step::Status, false, property::CSTS),
            Step::Status => self.check_ready(completed.result as u32, context),
            Step::Controller => self.know_controller(&data, context),
            Step::QueueCount => self.open_queues(completed.result, context),
            Step::EventConfig => {
                self.ask(Step::Event, Entry::new(admin::ASYNC_EVENT, 0), 0);
                self.identify(Step::Namespace, cns::NAMESPACE, NSID);
            }
            Step::Namespace => self.know_namespace(&data, context),
            Step::Ana => self.know_ana(&data, context),
            Step::Event => self.event(completed.result),
            Step::KeepAlive => self.keep_alive_sent = None,
            Step::Changed => self.identify(Step::Namespace, cns::NAMESPACE, NSID),
        }
    }

    fn check_ready(&mut self, status: u32, context: &mut Context<'_>) {
        if status & controller_status::FATAL != 0 {
            self.lose("the controller reports a fatal status", context);
        } else if status & controller_status::READY != 0 {
            self.identify(Step::Controller, cns::CONTROLLER, 0);
        } else {
            self.poll_ready_at = Some(context.now + READY_POLL);
        }
    }

    fn know_controller(&mut self, data: &[u8], context: &mut Context<'_>) {
        let Some(view) = ControllerView::parse(data) else {
            return self.lose("Identify Controller is not that of an NVMe/TCP controller", context);
        };
        if view.subsystem_nqn != context.options.subsystem_nqn || view.keep_alive_units == 0 {
            return self.lose("Identify Controller names another subsystem", context);
        }
        self.controller = Some(view);
        let last = u32::from(context.options.io_queues - 1);
        self.set_feature(Step::QueueCount, feature::QUEUE_COUNT, last | last << 16);
    }

    fn open_queues(&mut self, result: u64, context: &mut Context<'_>) {
        let granted = (result & 0xffff).min(result >> 16 & 0xffff) as u16 + 1;
        for _ in 0..granted.min(context.options.io_queues) {
            let mut queue = Queue::new(context.options.queue_entries, context.options.digests);
            let controller = self.controller.as_ref().expect("identified");
            queue.in_capsule_bytes = controller.in_capsule_bytes;
            let link = self.open(queue, context);
            self.io.push(link);
        }
    }

    fn io_connected(&mut self, id: ConnectionId, completed: &Completed, context: &mut Context<'_>) {
        let status = completed.status;
        if !status.is_success() {
            return self.lose(&format!("Connect of an I/O queue failed: {status}"), context);
        }
        self.queue_connected(id, completed.result, context);
    }

    /// A queue is connected and, if it has to be, authenticated.
    pub(super) fn queue_ready(&mut self, id: ConnectionId, context: &mut Context<'_>) {
        self.link(id).expect("a link").is_live = true;
        if self.admin.as_ref().is_some_and(|link| link.id == id) {
            self.get(Step::Capabilities, true, property::CAP);
            return self.flush(id, context);
        }
        if self.io.iter().all(|link| link.is_live) {
            let events = notice::NAMESPACE | notice::ANA;
            self.set_feature(Step::EventConfig, feature::ASYNC_EVENTS, events);
            self.flush_admin(context);
        }
    }

    pub(super) fn flush(&mut self, id: ConnectionId, context: &mut Context<'_>) {
        if let Some(link) = self.link(id) {
            tell_send(link, context.effects);
        }
    }

    fn flush_admin(&mut self, context: &mut Context<'_>) {
        if let Some(link) = &mut self.admin {
            tell_send(link, context.effects);
        }
    }

    fn know_namespace(&mut self, data: &[u8], context: &mut Context<'_>) {
        let view = NamespaceView::parse(data);
        if view.block_shift != BLOCK_SHIFT || view.metadata_bytes != 0 {
            return self.lose("the namespace has no blocks of 4,096 bytes", context);
        }
        let controller = self.controller.clone().expect("identified");
        context.said.push(Said::Namespace(view, controller));
        if matches!(self.stage, Stage::Setup(_)) {
            self.read_ana();
        }
    }

    fn know_ana(&mut self, data: &[u8], context: &mut Context<'_>) {
        self.ana_reading = false;
        let Some(state) = parse_ana(data, NSID) else {
            return self.lose("the ANA log does not have the namespace's group", context);
        };
        if std::mem::take(&mut self.ana_again) {
            self.read_ana();
        }
        let was = self.state();
        self.ana = state;
        self.stage = Stage::Live;
        self.tries = 0;
        if was != self.state() {
            context.effects.push(HostEffect::Path(self.endpoint, self.state(), None));
        }
        context.said.push(Said::Ana);
    }

    /// An asynchronous event (Base 5.2): the log page in bits 23:16 tells what changed.
    fn event(&mut self, result: u64) {
        self.ask(Step::Event, Entry::new(admin::ASYNC_EVENT, 0), 0);
        match (result >> 16) as u8 {
            page::ANA => self.read_ana(),
            page::CHANGED_NAMESPACES => {
                self.read_log(Step::Changed, page::CHANGED_NAMESPACES, 4096);
            }
            _ => {}
        }
    }

    /// When [`Path::tick`] has to be called at the latest.
    pub fn next_deadline(&self, options: &HostOptions) -> Option<Instant> {
        let at = match self.stage {
            Stage::Down(_) if self.is_removed => return None,
            Stage::Down(at) => at,
            Stage::Closing => return None,
            Stage::Setup(until) => self.poll_ready_at.map_or(until, |at| at.min(until)),
            Stage::Live => {
                let alive = match self.keep_alive_sent {
                    Some(sent) => sent + options.keep_alive / 2,
                    None => self.keep_alive_at,
                };
                [self.ana_poll_at, self.superseded_at].into_iter().flatten().fold(alive, Ord::min)
            }
        };
        Some(at)
    }

    pub fn tick(&mut self, context: &mut Context<'_>) {
        let now = context.now;
        match self.stage {
            Stage::Down(at) if at <= now && !self.is_removed => self.start(context),
            Stage::Setup(until) if until <= now => {
                self.lose("the association was not set up in time", context);
            }
            Stage::Setup(_) if self.poll_ready_at.is_some_and(|at| at <= now) => {
                self.poll_ready_at = None;
                self.get(Step::Status, false, property::CSTS);
            }
            Stage::Live => self.tick_live(context),
            _ => {}
        }
        self.flush_admin_live(context);
    }

    /// Bytes of an admin queue that is not open yet wait for `opened`.
    fn flush_admin_live(&mut self, context: &mut Context<'_>) {
        if self.admin.as_ref().is_some_and(|link| link.is_live) {
            self.flush_admin(context);
        }
    }

    fn tick_live(&mut self, context: &mut Context<'_>) {
        let now = context.now;
        if self.superseded_at.is_some_and(|at| at <= now) {
            self.superseded_at = None;
            if self.operations().next().is_some() {
                return self.lose("another path has taken over", context);
            }
        }
        match self.keep_alive_sent {
            Some(sent) if sent + context.options.keep_alive / 2 <= now => {
                return self.lose("Keep Alive was not answered", context);
            }
            None if self.keep_alive_at <= now => {
                self.keep_alive_sent = Some(now);
                self.keep_alive_at = now + context.options.keep_alive / 4;
                self.ask(Step::KeepAlive, Entry::new(admin::KEEP_ALIVE, 0), 0);
            }
            _ => {}
        }
        if self.ana_poll_at.is_some_and(|at| at <= now) {
            self.read_ana();
        }
    }
}

fn tell_send(link: &mut Link, effects: &mut Vec<HostEffect>) {
    if !link.told_send && !link.queue.outbox.is_empty() {
        link.told_send = true;
        effects.push(HostEffect::Send(link.id));
    }
}
