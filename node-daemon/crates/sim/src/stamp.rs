//! Blocks that say which write made them.
//!
//! A stamped block is 512 words that all follow from the stamp and the block's number, so that a
//! torn, mixed or misplaced block is none at all.

use std::fmt;

use tercet_proto::BLOCK_BYTES;

/// Which write made a block; zero for zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp(pub u64);

impl Stamp {
    /// A block that was never written, or was zeroed.
    pub const ZERO: Self = Self(0);
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ZERO { f.write_str("zeroes") } else { write!(f, "stamp {}", self.0) }
    }
}

/// Appends the bytes of block number `block` as write `stamp` makes it.
pub fn encode(stamp: Stamp, block: u64, into: &mut Vec<u8>) {
    if stamp == Stamp::ZERO {
        into.resize(into.len() + BLOCK_BYTES, 0);
        return;
    }
    into.extend_from_slice(&stamp.0.to_le_bytes());
    for index in 1..(BLOCK_BYTES / 8) as u64 {
        into.extend_from_slice(&word(stamp, block, index).to_le_bytes());
    }
}

/// Which write made these bytes of block number `block`; none when no single write did.
pub fn decode(bytes: &[u8], block: u64) -> Option<Stamp> {
    assert_eq!(bytes.len(), BLOCK_BYTES, "a whole block");
    let at = |index: usize| {
        u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().expect("eight bytes"))
    };
    let stamp = Stamp(at(0));
    let whole = (1..BLOCK_BYTES / 8).all(|index| {
        at(index) == if stamp == Stamp::ZERO { 0 } else { word(stamp, block, index as u64) }
    });
    whole.then_some(stamp)
}

fn word(stamp: Stamp, block: u64, index: u64) -> u64 {
    (stamp.0 ^ block.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_says_its_stamp_and_a_mixed_or_misplaced_one_says_none() {
        let mut bytes = Vec::new();
        encode(Stamp(77), 5, &mut bytes);
        assert_eq!(decode(&bytes, 5), Some(Stamp(77)));
        assert_eq!(decode(&bytes, 6), None);
        let mut other = Vec::new();
        encode(Stamp(78), 5, &mut other);
        bytes[2048..].copy_from_slice(&other[2048..]);
        assert_eq!(decode(&bytes, 5), None);
        assert_eq!(decode(&[0; BLOCK_BYTES], 9), Some(Stamp::ZERO));
    }
}
