//! DH-HMAC-CHAP (Base 8.13): host and controller show each other that they know a secret, before
//! anything else is said on a queue.
//!
//! [`Responder`] is the controller's side of one queue, [`Initiator`] the host's. Neither draws a
//! random number or raises a power itself: both ask for a [`Computation`], which the executor runs
//! where it holds nobody up (a power in an 8,192-bit group takes milliseconds) and brings back. Hash
//! functions are RustCrypto's (`hmac`, `sha2`: widely used, audited), as is the arithmetic
//! (`crypto-bigint`: powers in constant time, which an exponent that must stay secret needs).
//!
//! Not here: secure channel concatenation (SC_C is 0), and where secrets come from.

mod group;
mod initiator;
mod message;
mod responder;
mod secret;

pub use group::{Computation, Computed, Group, RANDOM_BYTES};
pub use initiator::Initiator;
pub use message::{AuthEntry, FailureReason, MESSAGE_BYTES_MAX};
pub use responder::Responder;
pub use secret::{Secret, SecretError};

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256, Sha384, Sha512};

/// Hash functions, with their identifiers (Base 8.13.5.2, table "hash functions").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Hash {
    /// 01h.
    Sha256 = 1,
    /// 02h.
    Sha384 = 2,
    /// 03h.
    Sha512 = 3,
}

impl Hash {
    /// All of them, the one that is preferred first.
    pub const ALL: [Self; 3] = [Self::Sha512, Self::Sha384, Self::Sha256];

    /// The function with this identifier.
    pub fn from_wire(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| *hash as u8 == byte)
    }

    /// Bytes of its output: HL.
    pub fn bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    fn digest(self, data: &[u8]) -> Vec<u8> {
        match self {
            Self::Sha256 => Sha256::digest(data).to_vec(),
            Self::Sha384 => Sha384::digest(data).to_vec(),
            Self::Sha512 => Sha512::digest(data).to_vec(),
        }
    }

    fn hmac(self, key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
        fn run<M: Mac + hmac::digest::KeyInit>(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
            let mut mac = <M as Mac>::new_from_slice(key).expect("a key of any length");
            for part in parts {
                mac.update(part);
            }
            mac.finalize().into_bytes().to_vec()
        }
        match self {
            Self::Sha256 => run::<Hmac<Sha256>>(key, parts),
            Self::Sha384 => run::<Hmac<Sha384>>(key, parts),
            Self::Sha512 => run::<Hmac<Sha512>>(key, parts),
        }
    }

    /// Compares in constant time.
    fn same(left: &[u8], right: &[u8]) -> bool {
        let differ =
            left.iter().zip(right).fold(0, |differ, (left, right)| differ | (left ^ right));
        left.len() == right.len() && std::hint::black_box(differ) == 0
    }
}

/// Who answers a challenge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Host,
    Controller,
}

/// What a response is computed over (Base 8.13.5.4).
struct Challenge<'a> {
    hash: Hash,
    /// C1 or C2.
    nonce: &'a [u8],
    /// The session key of the Diffie-Hellman exchange; empty without one.
    shared: &'a [u8],
    sequence: u32,
    transaction: u16,
    host_nqn: &'a str,
    subsystem_nqn: &'a str,
}

impl Challenge<'_> {
    /// The challenge as it goes into the response: with a group it is bound to the exchange,
    /// Ca = HMAC(H(KS), C).
    fn augmented(&self) -> Vec<u8> {
        if self.shared.is_empty() {
            return self.nonce.to_vec();
        }
        self.hash.hmac(&self.hash.digest(self.shared), &[self.nonce])
    }

    /// HMAC(Kt, Ca || S || T_ID || SC_C || who || NQN of who answers || 00h || NQN of who asked).
    fn response(&self, side: Side, secret: &Secret) -> Vec<u8> {
        const SC_C: [u8; 1] = [0];
        let (nqn, other_nqn, label) = match side {
            Side::Host => (self.host_nqn, self.subsystem_nqn, &b"HostHost"[..]),
            Side::Controller => (self.subsystem_nqn, self.host_nqn, &b"Controller"[..]),
        };
        let parts: [&[u8]; 8] = [
            &self.augmented(),
            &self.sequence.to_le_bytes(),
            &self.transaction.to_le_bytes(),
            &SC_C,
            label,
            nqn.as_bytes(),
            &[0],
            other_nqn.as_bytes(),
        ];
        self.hash.hmac(&secret.transformed(nqn), &parts)
    }
}
