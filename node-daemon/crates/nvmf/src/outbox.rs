//! Bytes on their way to a socket: small PDUs share a buffer, payloads stay where they are.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};

/// Most pieces of one vectored send that [`Outbox::take`] gives.
pub const PIECES_MAX: usize = 64;
/// Bytes that the shared buffer grows by.
const BUFFER_BYTES: usize = 4096;

/// What has still to be sent on one connection, in order.
#[derive(Debug, Default)]
pub struct Outbox {
    pieces: VecDeque<Bytes>,
    tail: BytesMut,
    queued_bytes: usize,
}

impl Outbox {
    /// Appends a copy of `bytes`: headers, digests, completions.
    pub fn put(&mut self, bytes: &[u8]) {
        if self.tail.capacity() - self.tail.len() < bytes.len() {
            self.seal();
            self.tail.reserve(bytes.len().max(BUFFER_BYTES));
        }
        self.tail.put_slice(bytes);
        self.queued_bytes += bytes.len();
    }

    /// Appends a payload without copying it.
    pub fn put_payload(&mut self, payload: Bytes) {
        if payload.is_empty() {
            return;
        }
        self.seal();
        self.queued_bytes += payload.len();
        self.pieces.push_back(payload);
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
    }

    /// Bytes that wait.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.queued_bytes == 0
    }

    /// Takes at most [`PIECES_MAX`] pieces, to be sent in order with one vectored send. What a
    /// short send leaves is the caller's to send first.
    pub fn take(&mut self, out: &mut Vec<Bytes>) {
        self.seal();
        let count = self.pieces.len().min(PIECES_MAX);
        for piece in self.pieces.drain(..count) {
            self.queued_bytes -= piece.len();
            out.push(piece);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}
