//! A non-blocking TCP connection of the host: connects, sends vectored, receives into buffers that
//! the state machine may keep.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bytes::{Buf, Bytes};
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, connect,
    recv, sendmsg, socket_with, sockopt,
};

/// Bytes of a receive buffer when no large payload is under way.
const RECEIVE_BYTES: usize = 16 * 1024;
/// Bytes beyond a payload under way, for the PDUs behind it.
const RECEIVE_EXTRA_BYTES: usize = 4 * 1024;

/// How an attempt to send or receive ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All that there was.
    Done,
    /// The kernel takes or has no more for now.
    Blocked,
    /// The connection is over.
    Over,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    pub is_open: bool,
    /// Waits for room in the kernel's buffer.
    pub wants_room: bool,
    unsent: Vec<Bytes>,
    /// Pieces of `unsent` that have gone.
    sent: usize,
}

impl Socket {
    /// Begins to connect.
    pub fn connect(address: SocketAddr) -> rustix::io::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = socket_with(family, SocketType::STREAM, flags, None)?;
        sockopt::set_tcp_nodelay(&fd, true)?;
        match connect(&fd, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error),
        }
        Ok(Self { fd, is_open: false, wants_room: true, unsent: Vec::new(), sent: 0 })
    }

    /// Whether the connection that was begun is there, once the socket is writable.
    pub fn finish_connect(&mut self) -> bool {
        self.is_open = matches!(sockopt::socket_error(&self.fd), Ok(Ok(())));
        self.is_open
    }

    /// Where pieces for the next [`Socket::flush`] go.
    pub fn unsent(&mut self) -> &mut Vec<Bytes> {
        &mut self.unsent
    }

    /// Whether everything handed over has gone.
    pub fn is_flushed(&self) -> bool {
        self.sent == self.unsent.len()
    }

    /// Sends what there is.
    pub fn flush(&mut self) -> Outcome {
        while !self.is_flushed() {
            let rest = &self.unsent[self.sent..];
            let slices: Vec<IoSlice<'_>> = rest
                .iter()
                .take(tercet_nvmf::outbox::PIECES_MAX)
                .map(|piece| IoSlice::new(piece))
                .collect();
            let mut control = SendAncillaryBuffer::default();
            match sendmsg(&self.fd, &slices, &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => self.consume(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Outcome::Blocked,
                Err(_) => return Outcome::Over,
            }
        }
        self.unsent.clear();
        self.sent = 0;
        Outcome::Done
    }

    fn consume(&mut self, mut count: usize) {
        while count > 0 {
            let piece = &mut self.unsent[self.sent];
            if piece.len() > count {
                piece.advance(count);
                return;
            }
            count -= piece.len();
            *piece = Bytes::new();
            self.sent += 1;
        }
    }

    /// Receives once, with room for a payload that lacks `missing_bytes`.
    pub fn receive(&mut self, missing_bytes: usize, out: &mut Bytes) -> Outcome {
        let room = RECEIVE_BYTES.max(missing_bytes + RECEIVE_EXTRA_BYTES);
        let mut buffer = Vec::with_capacity(room);
        loop {
            match recv(&self.fd, spare_capacity(&mut buffer), RecvFlags::empty()) {
                Ok((0, _)) => return Outcome::Over,
                Ok((count, _)) => {
                    let is_full = count == room;
                    *out = Bytes::from(buffer);
                    return if is_full { Outcome::Done } else { Outcome::Blocked };
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Outcome::Blocked,
                Err(_) => return Outcome::Over,
            }
        }
    }

    /// Closes at once: what the kernel has queued is dropped (as Linux does it), so that no
    /// command leaves this node after it has been sent elsewhere.
    pub fn abort(self) {
        let _ = sockopt::set_socket_linger(&self.fd, Some(std::time::Duration::ZERO));
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
