//! The I/O of one host: sockets and epoll around `tercet_nvmf::host::Multipath`, in the thread that
//! calls [`Driver::turn`].
//!
//! A submitted operation is on the socket when `submit` returns; its completion is in
//! [`Driver::finished`] after the turn in which it arrived. While operations are under way a turn
//! looks for a bounded time before it sleeps, because to wake an idle core costs more than a round
//! trip; with nothing under way it sleeps at once.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::Duration;

use bytes::Bytes;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fd::OwnedFd;
use rustix::time::{ClockId, clock_gettime};
use tercet_nvmf::host::{
    ConnectionId, Geometry, HostEffect, HostOptions, Multipath, Operation, OperationError,
    OperationId, PathState, SubmitError,
};
use tercet_proto::Instant;
use tracing::{info, warn};

use super::socket::{Outcome, Socket};

/// Epoll's name for the eventfd; connections count from 0.
const WAKE: u64 = u64::MAX;
/// Events taken at once.
const EVENTS_MAX: usize = 64;
/// Receives of one connection in one turn, so that none starves the others.
const RECEIVES_MAX: usize = 16;

/// An operation that has ended: a read's data in order.
pub type Finished = (OperationId, Result<Vec<Bytes>, OperationError>);

/// Now, on the clock of deadlines.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::Boottime);
    Instant(time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned())
}

/// See the module.
#[derive(Debug)]
pub struct Driver {
    host: Multipath,
    epoll: OwnedFd,
    wake: OwnedFd,
    sockets: HashMap<ConnectionId, Socket>,
    effects: Vec<HostEffect>,
    /// What epoll said last: whose, and what.
    events: Vec<(u64, EventFlags)>,
    spin: Duration,
    name: String,
    /// Operations that have ended since the caller looked last.
    pub finished: Vec<Finished>,
    /// Operations whose command went out once more, for a caller that asked to know.
    pub sent_again: Option<Vec<OperationId>>,
    /// Why the path that was lost last was lost.
    pub last_loss: Option<String>,
    /// Geometry or a path has changed since the caller looked last.
    pub changed: bool,
}

impl Driver {
    /// A driver that connects with its first turn. `spin`: how long a turn looks before it
    /// sleeps while operations are under way; `seed`: for jitter.
    pub fn new(options: HostOptions, spin: Duration, seed: u64) -> std::io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        let name = options.subsystem_nqn.clone();
        Ok(Self {
            host: Multipath::new(options, seed, now()),
            epoll,
            wake,
            sockets: HashMap::new(),
            effects: Vec::new(),
            events: Vec::with_capacity(EVENTS_MAX),
            spin,
            name,
            finished: Vec::new(),
            sent_again: None,
            last_loss: None,
            changed: true,
        })
    }

    /// A descriptor that ends a sleep when it is written to (an eventfd).
    pub fn waker(&self) -> std::io::Result<OwnedFd> {
        self.wake.try_clone()
    }

    /// The state machine: geometry, paths.
    pub fn host(&self) -> &Multipath {
        &self.host
    }

    /// The volume, once known.
    pub fn geometry(&self) -> Option<Geometry> {
        self.host.geometry()
    }

    /// Takes an operation and sends it, if a path is there.
    pub fn submit(&mut self, id: OperationId, operation: Operation) -> Result<(), SubmitError> {
        let result = self.host.submit(id, operation, now(), &mut self.effects);
        self.execute();
        result
    }

    /// The members are at these endpoints now.
    pub fn set_endpoints(&mut self, endpoints: &[std::net::SocketAddr]) {
        self.host.set_endpoints(endpoints, now(), &mut self.effects);
        self.changed = true;
        self.execute();
    }

    /// Ends everything; [`Multipath::is_ended`] tells when it has.
    pub fn detach(&mut self) {
        self.host.detach(now(), &mut self.effects);
        self.execute();
    }

    /// Waits for something to happen, until `until` at the latest, and does what has to be done.
    /// Returns early when woken or when operations have ended.
    pub fn turn(&mut self, until: Option<Instant>) -> std::io::Result<()> {
        let busy = self.host.operations() > 0;
        let spin_until = now() + if busy { self.spin } else { Duration::ZERO };
        loop {
            self.collect(Duration::ZERO)?;
            if !self.events.is_empty() || now() >= spin_until {
                break;
            }
            std::hint::spin_loop();
        }
        if self.events.is_empty() {
            let deadline = [self.host.next_deadline(), until].into_iter().flatten().min();
            let wait = deadline.map_or(Duration::MAX, |at| at.since(now()));
            if !wait.is_zero() {
                self.collect(wait)?;
            }
        }
        self.handle_events();
        let time = now();
        if self.host.next_deadline().is_some_and(|at| at <= time) {
            self.host.tick(time, &mut self.effects);
            self.execute();
        }
        Ok(())
    }

    fn collect(&mut self, wait: Duration) -> std::io::Result<()> {
        let timeout = (wait < Duration::MAX)
            .then(|| Timespec::try_from(wait).expect("a deadline within centuries"));
        self.events.clear();
        let mut buffer = [const { MaybeUninit::uninit() }; EVENTS_MAX];
        match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
            Ok((events, _)) => {
                self.events.extend(events.iter().map(|event| (event.data.u64(), event.flags)));
                Ok(())
            }
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn handle_events(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        for &(name, flags) in &events {
            if name == WAKE {
                let mut count = [0; 8];
                let _ = rustix::io::read(&self.wake, &mut count);
            } else {
                self.handle(ConnectionId(name), flags);
            }
        }
        events.clear();
        self.events = events;
    }

    fn handle(&mut self, id: ConnectionId, flags: EventFlags) {
        let Some(socket) = self.sockets.get_mut(&id) else {
            return;
        };
        if !socket.is_open {
            if !socket.finish_connect() {
                return self.lost(id);
            }
            self.host.opened(id, now(), &mut self.effects);
            self.execute();
        } else if flags.contains(EventFlags::OUT) {
            self.flush(id);
        }
        self.watch(id);
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            self.receive(id);
        }
    }

    fn receive(&mut self, id: ConnectionId) {
        for _ in 0..RECEIVES_MAX {
            let missing = self.host.missing_bytes(id);
            let Some(socket) = self.sockets.get_mut(&id) else {
                return;
            };
            let mut bytes = Bytes::new();
            let outcome = socket.receive(missing, &mut bytes);
            if !bytes.is_empty() {
                self.host.input(id, bytes, now(), &mut self.effects);
                self.execute();
            }
            match outcome {
                Outcome::Done => {}
                Outcome::Blocked => return,
                Outcome::Over => return self.lost(id),
            }
        }
    }

    /// The peer closed, or the connection failed.
    fn lost(&mut self, id: ConnectionId) {
        if self.sockets.remove(&id).is_some() {
            self.host.closed(id, now(), &mut self.effects);
            self.execute();
        }
    }

    /// Sends what the host and the socket have for this connection.
    fn flush(&mut self, id: ConnectionId) {
        let Some(socket) = self.sockets.get_mut(&id) else {
            return;
        };
        if !socket.is_open {
            return;
        }
        loop {
            let outcome = socket.flush();
            if outcome == Outcome::Over {
                return self.lost(id);
            }
            if outcome == Outcome::Blocked {
                return self.watch(id);
            }
            self.host.take_output(id, socket.unsent());
            if socket.is_flushed() {
                return self.watch(id);
            }
        }
    }

    /// Asks epoll for room only while something waits for it.
    fn watch(&mut self, id: ConnectionId) {
        let Some(socket) = self.sockets.get_mut(&id) else {
            return;
        };
        let wants_room = !socket.is_open || !socket.is_flushed();
        if wants_room != socket.wants_room {
            socket.wants_room = wants_room;
            let room = if wants_room { EventFlags::OUT } else { EventFlags::empty() };
            let data = EventData::new_u64(id.0);
            let changed = epoll::modify(&self.epoll, &*socket, data, EventFlags::IN | room);
            if changed.is_err() {
                self.lost(id);
            }
        }
    }

    /// Carries out effects in order, and those that follow from them.
    fn execute(&mut self) {
        while !self.effects.is_empty() {
            for effect in std::mem::take(&mut self.effects) {
                self.execute_one(effect);
            }
        }
    }

    fn execute_one(&mut self, effect: HostEffect) {
        self.changed |= matches!(effect, HostEffect::Geometry(_) | HostEffect::Path(..));
        match effect {
            HostEffect::Open(id, address) => {
                if self.open(id, address).is_err() {
                    self.host.closed(id, now(), &mut self.effects);
                }
            }
            HostEffect::Send(id) => self.flush(id),
            HostEffect::Close(id, last) => {
                if let Some(mut socket) = self.sockets.remove(&id) {
                    if last.is_empty() || !socket.is_open {
                        socket.abort();
                    } else {
                        socket.unsent().extend(last);
                        socket.flush();
                    }
                }
                self.host.closed(id, now(), &mut self.effects);
            }
            // A few milliseconds at most, before the volume is there: nobody waits for this thread.
            HostEffect::Compute(id, computation) => {
                let computed = computation.run(&rand::random());
                self.host.computed(id, &computed, now(), &mut self.effects);
            }
            HostEffect::Completed(id, result) => self.finished.push((id, result)),
            HostEffect::SentAgain(id) => self.sent_again.iter_mut().for_each(|all| all.push(id)),
            HostEffect::Geometry(geometry) => {
                info!(volume = self.name, blocks = geometry.blocks, "the volume is known");
            }
            HostEffect::Path(endpoint, PathState::Connecting, why) => {
                let why = why.unwrap_or_default();
                warn!(volume = self.name, %endpoint, why, "a path is lost");
                self.last_loss = Some(why);
            }
            HostEffect::Path(endpoint, state, _) => {
                info!(volume = self.name, %endpoint, ?state, "a path changed");
            }
        }
    }

    fn open(&mut self, id: ConnectionId, address: std::net::SocketAddr) -> std::io::Result<()> {
        let socket = Socket::connect(address)?;
        let flags = EventFlags::IN | EventFlags::OUT;
        epoll::add(&self.epoll, socket.as_fd(), EventData::new_u64(id.0), flags)?;
        self.sockets.insert(id, socket);
        Ok(())
    }
}
