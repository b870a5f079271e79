//! Hash maps by numbers of our own making: block numbers, leaf numbers, tokens.
//!
//! Nobody outside chooses these keys, so a hash that nobody can foresee would protect from nothing
//! and cost a good part of each operation; one multiplication spreads them as well.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map by a number.
pub(crate) type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// Hashes one number of at most 64 bits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        panic!("keys are numbers");
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        // The map looks at the highest and at the lowest bits, so both halves of the product count.
        let product = u128::from(number) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::BuildHasher;

    use super::*;

    /// Numbers that follow each other, and blocks that are far apart, meet in few places.
    #[test]
    fn numbers_are_spread() {
        let build = BuildHasherDefault::<NumberHasher>::default();
        for step in [1_u64, 1 << 10, 1 << 32] {
            let hashes: Vec<u64> = (0..4096).map(|n| build.hash_one(n * step)).collect();
            let low: HashSet<u64> = hashes.iter().map(|hash| hash % 4096).collect();
            let high: HashSet<u64> = hashes.iter().map(|hash| hash >> 57).collect();
            assert!(low.len() > 2000 && high.len() == 128, "{step}: {} {}", low.len(), high.len());
        }
    }
}
