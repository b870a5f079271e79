//! Groups of the Diffie-Hellman exchange: those of RFC 7919, made from the formula that the RFC
//! defines them by, and powers in them.
//!
//! p = 2^b - 2^(b-64) + ([2^(b-130) e] + X) 2^64 - 1, generator 2. Exponents have 512 bits, more than
//! twice the strength of the largest group (RFC 7919 5.2 asks for at most 400).

use std::sync::OnceLock;

use crypto_bigint::modular::{BoxedMontyForm, BoxedMontyParams};
use crypto_bigint::{BoxedUint, Odd};

/// Bytes of an exponent.
const EXPONENT_BYTES: usize = 64;
/// Longest nonce: an output of the longest hash.
const NONCE_BYTES: usize = 64;
/// Random bytes that a [`Computation`] uses.
pub const RANDOM_BYTES: usize = NONCE_BYTES + EXPONENT_BYTES + 4;

/// Groups, with their identifiers (Base 8.13.5.2, table "DH groups").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Group {
    /// 00h: no exchange.
    Null = 0,
    /// 01h: ffdhe2048.
    Ffdhe2048 = 1,
    /// 02h: ffdhe3072.
    Ffdhe3072 = 2,
    /// 03h: ffdhe4096.
    Ffdhe4096 = 3,
    /// 04h: ffdhe6144.
    Ffdhe6144 = 4,
    /// 05h: ffdhe8192.
    Ffdhe8192 = 5,
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Null,
        Self::Ffdhe2048,
        Self::Ffdhe3072,
        Self::Ffdhe4096,
        Self::Ffdhe6144,
        Self::Ffdhe8192,
    ];

    /// The group with this identifier.
    pub fn from_wire(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|group| *group as u8 == byte)
    }

    /// Bits of the prime, and X of the formula (RFC 7919 appendix A); none for the null group.
    fn definition(self) -> Option<(usize, u64)> {
        Some(match self {
            Self::Null => return None,
            Self::Ffdhe2048 => (2048, 560_316),
            Self::Ffdhe3072 => (3072, 2_625_351),
            Self::Ffdhe4096 => (4096, 5_736_041),
            Self::Ffdhe6144 => (6144, 15_705_020),
            Self::Ffdhe8192 => (8192, 10_965_728),
        })
    }

    /// Bytes of a public value: DHVLEN.
    pub fn bytes(self) -> usize {
        self.definition().map_or(0, |(bits, _)| bits / 8)
    }

    /// The prime, big endian; empty for the null group.
    pub fn prime(self) -> Vec<u8> {
        self.definition().map_or(Vec::new(), |(bits, offset)| prime(bits, offset))
    }

    fn parameters(self) -> &'static BoxedMontyParams {
        static PARAMETERS: [OnceLock<BoxedMontyParams>; 6] = [const { OnceLock::new() }; 6];
        PARAMETERS[self as usize].get_or_init(|| {
            let prime = self.prime();
            let bits = prime.len() as u32 * 8;
            let prime = BoxedUint::from_be_slice(&prime, bits).expect("as long as it says");
            let odd: Option<Odd<BoxedUint>> = Odd::new(prime).into();
            BoxedMontyParams::new_vartime(odd.expect("a prime above 2"))
        })
    }

    fn power(self, base: &[u8], exponent: &[u8; EXPONENT_BYTES]) -> Vec<u8> {
        let parameters = self.parameters();
        let bits = parameters.bits_precision();
        let base = BoxedUint::from_be_slice(base, bits).expect("as long as the prime");
        let exponent_bits = EXPONENT_BYTES as u32 * 8;
        let exponent = BoxedUint::from_be_slice(exponent, exponent_bits).expect("64 bytes");
        let base = BoxedMontyForm::new(base, parameters.clone());
        base.pow_bounded_exp(&exponent, exponent_bits).retrieve().to_be_bytes().to_vec()
    }

    fn public(self, exponent: &[u8; EXPONENT_BYTES]) -> Vec<u8> {
        let mut generator = vec![0; self.bytes()];
        if let Some(last) = generator.last_mut() {
            *last = 2;
            return self.power(&generator, exponent);
        }
        generator
    }

    /// Whether a peer's public value is one: as long as the prime, above 1 and below p - 1, so that
    /// it is in no subgroup of two elements (RFC 7919 5.1).
    fn accepts(self, public: &[u8]) -> bool {
        let mut above = self.prime();
        if public.len() != above.len() || above.is_empty() {
            return false;
        }
        *above.last_mut().expect("not empty") -= 1;
        let (last, rest) = public.split_last().expect("not empty");
        let is_small = rest.iter().all(|&byte| byte == 0) && *last <= 1;
        !is_small && public < &above[..]
    }
}

/// The prime of that many bits, big endian, by the formula.
fn prime(bits: usize, offset: u64) -> Vec<u8> {
    // e 2^(bits - 130) with 64 bits behind the point: the sum of 1/k!, least significant word first.
    let words = bits / 64;
    let mut term = vec![0u64; words];
    let point_bits = bits - 130 + 64;
    term[point_bits / 64] = 1 << (point_bits % 64);
    let mut sum = term.clone(); // 1/0!
    for k in 1u64.. {
        divide(&mut term, k);
        if term.iter().all(|&word| word == 0) {
            break;
        }
        add(&mut sum, &term);
    }
    // ([..] + X) - 1 in the middle, ones in the first word and in the last.
    sum[0] = u64::MAX;
    let mut correction = vec![0; words];
    correction[1] = offset - 1;
    add(&mut sum, &correction);
    sum[words - 1] = u64::MAX;
    sum.iter().rev().flat_map(|word| word.to_be_bytes()).collect()
}

fn divide(number: &mut [u64], by: u64) {
    let mut rest = 0u128;
    for word in number.iter_mut().rev() {
        let value = rest << 64 | u128::from(*word);
        *word = (value / u128::from(by)) as u64;
        rest = value % u128::from(by);
    }
}

fn add(number: &mut [u64], other: &[u64]) {
    let mut carry = false;
    for (word, &other) in number.iter_mut().zip(other) {
        let (sum, first) = word.overflowing_add(other);
        let (sum, second) = sum.overflowing_add(u64::from(carry));
        (*word, carry) = (sum, first || second);
    }
}

/// An exponent; never shown.
#[derive(Clone)]
struct Exponent([u8; EXPONENT_BYTES]);

impl std::fmt::Debug for Exponent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Exponent")
    }
}

/// What one side has to draw and to raise to a power. Takes up to tens of milliseconds.
#[derive(Clone, Debug)]
pub struct Computation {
    group: Group,
    exponent: Option<Exponent>,
    peer: Option<Vec<u8>>,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Computed {
    pub(super) nonce: [u8; NONCE_BYTES],
    /// Never 0, which says that there is no challenge.
    pub(super) sequence: u32,
    exponent: Exponent,
    /// This side's public value; empty without a group.
    pub(super) public: Vec<u8>,
    /// KS; empty without a group, `None` when the peer's public value is none.
    pub(super) shared: Option<Vec<u8>>,
}

impl Computation {
    /// A nonce, and a key pair of this group.
    pub(super) fn draw(group: Group) -> Self {
        Self { group, exponent: None, peer: None }
    }

    /// The same, and what is shared with the peer's public value.
    pub(super) fn draw_and_agree(group: Group, peer: &[u8]) -> Self {
        Self { group, exponent: None, peer: Some(peer.to_vec()) }
    }

    /// What the key pair that was drawn before shares with the peer's public value.
    pub(super) fn agree(group: Group, drawn: &Computed, peer: &[u8]) -> Self {
        Self { group, exponent: Some(drawn.exponent.clone()), peer: Some(peer.to_vec()) }
    }

    /// Whether it is so little that it need not be done elsewhere.
    pub fn is_light(&self) -> bool {
        self.group == Group::Null
    }

    /// Runs it, with random bytes from the system.
    pub fn run(self, random: &[u8; RANDOM_BYTES]) -> Computed {
        let (nonce, rest) = random.split_at(NONCE_BYTES);
        let (drawn, sequence) = rest.split_at(EXPONENT_BYTES);
        let drawn = || Exponent(drawn.try_into().expect("64 bytes"));
        let exponent = self.exponent.clone().unwrap_or_else(drawn);
        let public = match self.exponent {
            Some(_) => Vec::new(),
            None => self.group.public(&exponent.0),
        };
        let shared = match &self.peer {
            _ if self.group == Group::Null => Some(Vec::new()),
            Some(peer) if self.group.accepts(peer) => Some(self.group.power(peer, &exponent.0)),
            Some(_) => None,
            None => Some(Vec::new()),
        };
        let sequence = u32::from_le_bytes(sequence.try_into().expect("four bytes")).max(1);
        let nonce = nonce.try_into().expect("64 bytes");
        Computed { nonce, sequence, exponent, public, shared }
    }
}
