//! Streams and listeners of a reactor.
//!
//! Receiving: one operation in flight per stream, into a buffer that grows while it is filled and
//! is handed out in slices without a copy. It is armed again only at the next `poll`, so between
//! two polls a stream can be handed to another thread with nothing in the kernel. Sending: one
//! vectored `sendmsg` in flight per stream takes everything that has gathered meanwhile; what
//! waits is bounded, and who hits the bound is told.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use io_uring::{opcode, types};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, sockopt};
use tercet_proto::Instant;

use crate::clock::now;
use crate::operation::{Operation, SocketAddress};
use crate::reactor::{Event, Reactor};

/// Names a stream; never the name of another one later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId {
    pub(crate) index: u32,
    generation: u32,
}

impl StreamId {
    /// As a number that is unique in this reactor while the stream lives.
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// Back from [`StreamId::to_bits`].
    pub fn from_bits(bits: u64) -> Self {
        Self { index: bits as u32, generation: (bits >> 32) as u32 }
    }
}

/// Names a listener of this reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerId(pub(crate) u32);

/// What a stream may hold.
#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    /// Most bytes that wait to be sent.
    pub send_queue_bytes_max: usize,
    /// How long sent bytes may stay unacknowledged before the connection counts as dead.
    pub unacknowledged_max: Duration,
}

/// Receive buffer of a quiet stream.
const RECEIVE_BYTES_MIN: usize = 16 << 10;
/// Receive buffer of a stream that fills its buffers.
const RECEIVE_BYTES_MAX: usize = 256 << 10;
/// Pieces in one `sendmsg`.
const PIECES_MAX: usize = 128;
/// How long a stream that is finishing may take to send its last bytes and see the other's end.
const FINISH: Duration = Duration::from_secs(1);
/// Connections that wait in the kernel to be accepted.
const BACKLOG: i32 = 1024;
/// Pause of a listener whose accept failed (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Connecting,
    Open,
    /// Sends what is queued, shuts its side, then closes.
    Finishing {
        deadline: Instant,
    },
    /// Becomes `Event::Detached` when nothing is in flight.
    Detaching,
    /// Nothing more is reported; gone when nothing is in flight.
    Closed,
}

pub(crate) struct Stream {
    fd: OwnedFd,
    generation: u32,
    state: State,
    limits: StreamLimits,
    buffer: BytesMut,
    receive_bytes: usize,
    receive: Option<u32>,
    send: Option<u32>,
    connect: Option<u32>,
    batch: Box<Batch>,
    queue: VecDeque<Bytes>,
    queued_bytes: usize,
    shut: bool,
    /// Nothing is received while set.
    held: bool,
    /// Whoever sends wants to know when everything has gone.
    tell_drained: bool,
}

/// The vector of a send in flight, and the bytes it points to.
struct Batch {
    header: libc::msghdr,
    vector: [libc::iovec; PIECES_MAX],
    pieces: VecDeque<Bytes>,
}

impl Batch {
    fn new() -> Box<Self> {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Box::new(Self {
            // SAFETY: a msghdr of zeroes is an empty message.
            header: unsafe { std::mem::zeroed() },
            vector: [empty; PIECES_MAX],
            pieces: VecDeque::with_capacity(PIECES_MAX),
        })
    }

    /// Fills the vector from the queue. The kernel reads header, vector and pieces until the
    /// completion; none of them moves before (the batch is boxed and left alone meanwhile).
    fn load(&mut self, queue: &mut VecDeque<Bytes>) -> *const libc::msghdr {
        while self.pieces.len() < PIECES_MAX {
            let Some(piece) = queue.pop_front() else {
                break;
            };
            self.pieces.push_back(piece);
        }
        for (slot, piece) in self.vector.iter_mut().zip(&self.pieces) {
            slot.iov_base = piece.as_ptr().cast_mut().cast();
            slot.iov_len = piece.len();
        }
        self.header.msg_iov = self.vector.as_mut_ptr();
        self.header.msg_iovlen = self.pieces.len();
        &raw const self.header
    }

    /// Drops what was sent.
    fn advance(&mut self, mut sent: usize) {
        while sent > 0 {
            let first = self.pieces.front_mut().expect("no more was sent than given");
            if sent < first.len() {
                let _ = first.split_to(sent);
                return;
            }
            sent -= first.len();
            self.pieces.pop_front();
        }
    }
}

pub(crate) struct Listener {
    fd: OwnedFd,
    pub(crate) paused_until: Option<Instant>,
    accept: Option<u32>,
}

#[derive(Default)]
pub(crate) struct Streams {
    slots: Vec<Option<Stream>>,
    free: Vec<u32>,
    generation: u32,
    /// Streams whose receive or send is to be armed at the next poll.
    pub(crate) pending: Vec<u32>,
    pub(crate) finishing: Vec<u32>,
}

impl Streams {
    fn get(&mut self, id: StreamId) -> Option<&mut Stream> {
        let stream = self.slots.get_mut(id.index as usize)?.as_mut()?;
        (stream.generation == id.generation).then_some(stream)
    }

    fn at(&mut self, index: u32) -> &mut Stream {
        self.slots[index as usize].as_mut().expect("an operation's stream is there")
    }

    fn id(&self, index: u32) -> StreamId {
        let stream = self.slots[index as usize].as_ref().expect("a stream that is there");
        StreamId { index, generation: stream.generation }
    }

    fn insert(&mut self, fd: OwnedFd, state: State, limits: StreamLimits) -> StreamId {
        self.generation = self.generation.wrapping_add(1);
        let stream = Stream {
            fd,
            generation: self.generation,
            state,
            limits,
            buffer: BytesMut::new(),
            receive_bytes: RECEIVE_BYTES_MIN,
            receive: None,
            send: None,
            connect: None,
            batch: Batch::new(),
            queue: VecDeque::new(),
            queued_bytes: 0,
            shut: false,
            held: false,
            tell_drained: false,
        };
        let index = if let Some(index) = self.free.pop() {
            self.slots[index as usize] = Some(stream);
            index
        } else {
            self.slots.push(Some(stream));
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 streams")
        };
        StreamId { index, generation: self.generation }
    }
}

impl Reactor {
    /// Listens on `address` (`SO_REUSEADDR`); connections come as `Event::Accepted`.
    pub fn listen(&mut self, address: SocketAddr) -> io::Result<ListenerId> {
        let fd = tcp_socket(address)?;
        sockopt::set_socket_reuseaddr(&fd, true)?;
        rustix::net::bind(&fd, &address)?;
        rustix::net::listen(&fd, BACKLOG)?;
        let id = u32::try_from(self.listeners.len()).expect("few listeners");
        self.listeners.push(Listener { fd, paused_until: None, accept: None });
        self.arm_accept(id);
        Ok(ListenerId(id))
    }

    /// Where a listener listens (its port, when 0 was asked for).
    pub fn local_address(&self, listener: ListenerId) -> io::Result<SocketAddr> {
        let name = rustix::net::getsockname(&self.listeners[listener.0 as usize].fd)?;
        SocketAddr::try_from(name).map_err(io::Error::from)
    }

    /// Takes over a connected socket.
    pub fn attach(&mut self, socket: OwnedFd, limits: StreamLimits) -> io::Result<StreamId> {
        prepare(&socket, limits)?;
        let id = self.streams.insert(socket, State::Open, limits);
        self.streams.pending.push(id.index);
        Ok(id)
    }

    /// Connects from `from` (any port) to `to`; `Event::Connected` or `Event::Closed` follows.
    pub fn connect(
        &mut self,
        from: Option<SocketAddr>,
        to: SocketAddr,
        limits: StreamLimits,
    ) -> io::Result<StreamId> {
        let fd = tcp_socket(to)?;
        prepare(&fd, limits)?;
        if let Some(from) = from {
            rustix::net::bind(&fd, &from)?;
        }
        let raw = types::Fd(fd.as_raw_fd());
        let id = self.streams.insert(fd, State::Connecting, limits);
        let (address, length) = SocketAddress::new(to);
        let entry = opcode::Connect::new(raw, address.pointer(), length).build();
        let operation = Operation::Connect { stream: id.index, _address: address };
        // SAFETY: the address is kept in the operation.
        let number = unsafe { self.start(operation, entry) };
        self.streams.at(id.index).connect = Some(number);
        Ok(id)
    }

    /// Queues bytes to send. `false`: the queue would pass its bound and nothing was queued, or the
    /// stream is gone.
    #[must_use]
    pub fn send(&mut self, id: StreamId, pieces: impl IntoIterator<Item = Bytes>) -> bool {
        let Some(stream) = self.streams.get(id) else {
            return false;
        };
        if !matches!(stream.state, State::Open | State::Connecting) {
            return false;
        }
        let queued = stream.queue.len();
        let mut bytes = stream.queued_bytes;
        for piece in pieces {
            bytes += piece.len();
            if bytes > stream.limits.send_queue_bytes_max {
                stream.queue.truncate(queued);
                return false;
            }
            if !piece.is_empty() {
                stream.queue.push_back(piece);
            }
        }
        stream.queued_bytes = bytes;
        if stream.send.is_none() {
            self.streams.pending.push(id.index);
        }
        true
    }

    /// Who is at the other end, for log lines.
    pub fn peer_address(&mut self, id: StreamId) -> Option<SocketAddr> {
        let stream = self.streams.get(id)?;
        SocketAddr::try_from(rustix::net::getpeername(&stream.fd).ok()??).ok()
    }

    /// Whether the stream is there; not after it was closed or given away.
    pub fn is_open(&mut self, id: StreamId) -> bool {
        self.streams.get(id).is_some_and(|stream| stream.state == State::Open)
    }

    /// Bytes that wait to be sent.
    pub fn queued_bytes(&mut self, id: StreamId) -> usize {
        self.streams.get(id).map_or(0, |stream| stream.queued_bytes)
    }

    /// `Event::Drained` follows once everything that waits has been sent.
    pub fn tell_drained(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get(id) {
            stream.tell_drained = true;
            self.streams.pending.push(id.index);
        }
    }

    /// Receives nothing more, until `resume`. To be called when the last thing seen of the stream
    /// was `Event::Received`; what the kernel has by then fills its buffers and slows the sender.
    pub fn hold(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get(id) {
            stream.held = true;
        }
    }

    /// Receives again.
    pub fn resume(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get(id) {
            stream.held = false;
            self.streams.pending.push(id.index);
        }
    }

    /// Ends a stream at once. Nothing more is reported of it.
    pub fn close(&mut self, id: StreamId) {
        if self.streams.get(id).is_some() {
            self.close_at(id.index);
        }
    }

    /// Ends a stream after its queued bytes have been sent. Nothing more is reported of it.
    pub fn finish(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get(id) else {
            return;
        };
        if matches!(stream.state, State::Open) {
            stream.state = State::Finishing { deadline: now() + FINISH };
            self.streams.finishing.push(id.index);
            self.streams.pending.push(id.index);
        } else if matches!(stream.state, State::Connecting) {
            self.close_at(id.index);
        }
    }

    /// Gives a stream's socket away with `Event::Detached`, after its queued bytes have been sent.
    /// To be called when the last thing seen of it was `Event::Received`, so that none is lost.
    pub fn detach(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get(id) else {
            return;
        };
        assert!(stream.receive.is_none(), "a stream is detached before it receives again");
        assert!(stream.state == State::Open, "an open stream is detached");
        stream.state = State::Detaching;
        self.streams.pending.push(id.index);
    }

    fn close_at(&mut self, index: u32) {
        let stream = self.streams.at(index);
        stream.state = State::Closed;
        stream.queue.clear();
        stream.queued_bytes = 0;
        // Ends a receive or send in flight; the socket may be unconnected, which is as good.
        let _ = rustix::net::shutdown(&stream.fd, Shutdown::Both);
        let in_flight = [stream.receive, stream.send, stream.connect];
        for number in in_flight.into_iter().flatten() {
            let entry = opcode::AsyncCancel::new(u64::from(number)).build();
            // SAFETY: the entry points to nothing.
            unsafe { self.start(Operation::Cancel, entry) };
        }
        self.release(index);
    }

    /// Frees a closed stream once nothing of it is in flight.
    fn release(&mut self, index: u32) {
        let stream = self.streams.at(index);
        let idle = stream.receive.is_none() && stream.send.is_none() && stream.connect.is_none();
        if stream.state == State::Closed && idle {
            self.streams.slots[index as usize] = None;
            // Numbers may still be in the lists of pending work: they are skipped or, at worst,
            // arm a new stream that is to be armed anyway.
            self.streams.free.push(index);
        }
    }

    /// Arms what the last events left to arm.
    pub(crate) fn arm_streams(&mut self) {
        while let Some(index) = self.streams.pending.pop() {
            if self.streams.slots[index as usize].is_some() {
                self.arm_stream(index);
            }
        }
        self.expire_finishing();
    }

    fn arm_stream(&mut self, index: u32) {
        let id = self.streams.id(index);
        let stream = self.streams.at(index);
        let drained = stream.queue.is_empty() && stream.send.is_none();
        match stream.state {
            State::Detaching if drained && stream.receive.is_none() => {
                let stream = self.streams.slots[index as usize].take().expect("just seen");
                self.streams.free.push(index);
                self.backlog.push_back(Event::Detached { stream: id, socket: stream.fd });
                return;
            }
            State::Finishing { .. } if drained && !stream.shut => {
                stream.shut = true;
                if rustix::net::shutdown(&stream.fd, Shutdown::Write).is_err() {
                    return self.close_at(index);
                }
            }
            State::Open | State::Finishing { .. } | State::Detaching => {}
            State::Connecting | State::Closed => return,
        }
        if std::mem::take(&mut stream.tell_drained) {
            if drained {
                self.backlog.push_back(Event::Drained { stream: id });
            } else {
                stream.tell_drained = true;
            }
        }
        let stream = self.streams.at(index);
        let receives = match stream.state {
            State::Detaching => false,
            State::Finishing { .. } => true,
            _ => !stream.held,
        };
        if receives && stream.receive.is_none() {
            self.arm_receive(index);
        }
        let stream = self.streams.at(index);
        if stream.send.is_none() && !stream.queue.is_empty() {
            self.arm_send(index);
        }
    }

    fn arm_receive(&mut self, index: u32) {
        let stream = self.streams.at(index);
        if stream.buffer.capacity() - stream.buffer.len() < RECEIVE_BYTES_MIN / 2 {
            stream.buffer.reserve(stream.receive_bytes);
        }
        let spare = stream.buffer.spare_capacity_mut();
        let length = u32::try_from(spare.len()).expect("a receive buffer below 4 GiB");
        let pointer = spare.as_mut_ptr().cast();
        let fd = types::Fd(stream.fd.as_raw_fd());
        let entry = opcode::Recv::new(fd, pointer, length).build();
        // SAFETY: the buffer is left alone until the completion (`receive` is set), and the stream
        // is kept until then.
        let number = unsafe { self.start(Operation::Receive { stream: index }, entry) };
        self.streams.at(index).receive = Some(number);
    }

    fn arm_send(&mut self, index: u32) {
        let stream = self.streams.at(index);
        let header = stream.batch.load(&mut stream.queue);
        let fd = types::Fd(stream.fd.as_raw_fd());
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let entry = opcode::SendMsg::new(fd, header).flags(flags.cast_unsigned()).build();
        // SAFETY: the batch is boxed, left alone until the completion (`send` is set), and kept
        // with the stream until then.
        let number = unsafe { self.start(Operation::Send { stream: index }, entry) };
        self.streams.at(index).send = Some(number);
    }

    fn expire_finishing(&mut self) {
        if self.streams.finishing.is_empty() {
            return;
        }
        let now = now();
        let mut finishing = std::mem::take(&mut self.streams.finishing);
        finishing.retain(|&index| {
            let Some(stream) = self.streams.slots[index as usize].as_ref() else {
                return false;
            };
            let State::Finishing { deadline } = stream.state else {
                return false;
            };
            if deadline > now {
                return true;
            }
            self.close_at(index);
            false
        });
        self.streams.finishing = finishing;
    }

    /// When `poll` must look again for the sake of streams and listeners.
    pub(crate) fn net_deadline(&self) -> Option<Instant> {
        let finishing = self.streams.finishing.iter().filter_map(|&index| {
            match self.streams.slots[index as usize].as_ref()?.state {
                State::Finishing { deadline } => Some(deadline),
                _ => None,
            }
        });
        let paused = self.listeners.iter().filter_map(|listener| listener.paused_until);
        finishing.chain(paused).min()
    }

    pub(crate) fn received(&mut self, index: u32, result: i32, events: &mut Vec<Event>) {
        let id = self.streams.id(index);
        let stream = self.streams.at(index);
        stream.receive = None;
        match stream.state {
            State::Open if result > 0 => {
                let length = usize::try_from(result).expect("a positive length");
                let spare = stream.buffer.capacity() - stream.buffer.len();
                assert!(length <= spare, "the kernel keeps to the buffer");
                // SAFETY: the kernel has written `length` bytes of the spare capacity.
                unsafe { stream.buffer.set_len(stream.buffer.len() + length) };
                if length == spare {
                    stream.receive_bytes = (stream.receive_bytes * 4).min(RECEIVE_BYTES_MAX);
                }
                let bytes = stream.buffer.split().freeze();
                self.streams.pending.push(index);
                events.push(Event::Received { stream: id, bytes });
            }
            State::Open if result != -libc::EINTR => {
                let reason = (result < 0).then(|| io::Error::from_raw_os_error(-result));
                events.push(Event::Closed { stream: id, reason });
                self.close_at(index);
            }
            State::Finishing { .. } if result > 0 => {
                self.streams.pending.push(index); // what still comes is not wanted
            }
            State::Finishing { .. } => self.close_at(index),
            State::Closed => self.release(index),
            State::Open => self.streams.pending.push(index),
            State::Connecting | State::Detaching => unreachable!("nothing is received then"),
        }
    }

    pub(crate) fn sent(&mut self, index: u32, result: i32, events: &mut Vec<Event>) {
        let id = self.streams.id(index);
        let stream = self.streams.at(index);
        stream.send = None;
        if stream.state == State::Closed {
            return self.release(index);
        }
        if let Ok(length) = usize::try_from(result) {
            stream.batch.advance(length);
            stream.queued_bytes -= length;
            // What a short send left goes first again.
            while let Some(piece) = stream.batch.pieces.pop_back() {
                stream.queue.push_front(piece);
            }
            self.streams.pending.push(index);
        } else if result == -libc::EINTR {
            while let Some(piece) = stream.batch.pieces.pop_back() {
                stream.queue.push_front(piece);
            }
            self.streams.pending.push(index);
        } else {
            if stream.state == State::Open {
                let reason = Some(io::Error::from_raw_os_error(-result));
                events.push(Event::Closed { stream: id, reason });
            }
            self.close_at(index);
        }
    }

    pub(crate) fn connected(&mut self, index: u32, result: i32, events: &mut Vec<Event>) {
        let id = self.streams.id(index);
        let stream = self.streams.at(index);
        stream.connect = None;
        match stream.state {
            State::Closed => self.release(index),
            _ if result == 0 => {
                stream.state = State::Open;
                self.streams.pending.push(index);
                events.push(Event::Connected { stream: id });
            }
            _ => {
                let reason = Some(io::Error::from_raw_os_error(-result));
                events.push(Event::Closed { stream: id, reason });
                self.close_at(index);
            }
        }
    }

    pub(crate) fn arm_accept(&mut self, listener: u32) {
        let slot = &mut self.listeners[listener as usize];
        slot.paused_until = None;
        let fd = types::Fd(slot.fd.as_raw_fd());
        let entry = opcode::AcceptMulti::new(fd).flags(libc::SOCK_CLOEXEC).build();
        // SAFETY: the entry points to nothing.
        let number = unsafe { self.start(Operation::Accept { listener }, entry) };
        self.listeners[listener as usize].accept = Some(number);
    }

    pub(crate) fn resume_accepts(&mut self) {
        let now = now();
        for index in 0..self.listeners.len() {
            if self.listeners[index].paused_until.is_some_and(|until| until <= now) {
                self.arm_accept(u32::try_from(index).expect("few listeners"));
            }
        }
    }

    /// A multishot accept that the kernel has ended is armed again; after an error (no descriptors
    /// left) only after a pause, or it would fail in a loop.
    pub(crate) fn accept_ended(&mut self, listener: u32, result: i32) {
        self.listeners[listener as usize].accept = None;
        if result >= 0 {
            return self.arm_accept(listener);
        }
        if result != -libc::ECANCELED {
            let error = io::Error::from_raw_os_error(-result);
            tracing::warn!(%error, "cannot accept connections for a moment");
        }
        self.listeners[listener as usize].paused_until = Some(now() + ACCEPT_PAUSE);
    }
}

/// No delay for small messages; a peer that vanished is noticed.
fn prepare(socket: &OwnedFd, limits: StreamLimits) -> io::Result<()> {
    let unacknowledged_ms = u32::try_from(limits.unacknowledged_max.as_millis());
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_tcp_user_timeout(socket, unacknowledged_ms.unwrap_or(u32::MAX))?;
    Ok(())
}

fn tcp_socket(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    Ok(socket)
}
