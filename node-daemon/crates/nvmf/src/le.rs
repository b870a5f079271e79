//! Little-endian fields at byte offsets, as the specifications' tables name them.
//!
//! Offsets are constants of a table against slices of a checked length: an index out of bounds
//! here is a broken invariant, never a peer's doing.

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

pub(crate) fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// An ASCII field padded with spaces (Base 1.4.2: SN, MN, FR, transport addresses).
pub(crate) fn put_ascii(field: &mut [u8], text: &str) {
    field.fill(b' ');
    let count = text.len().min(field.len());
    field[..count].copy_from_slice(&text.as_bytes()[..count]);
}

/// A null-terminated UTF-8 field (NQNs). Panics when it does not fit with its terminator.
pub(crate) fn put_nqn(field: &mut [u8], nqn: &str) {
    assert!(nqn.len() < field.len(), "an NQN of at most {} bytes", field.len() - 1);
    field.fill(0);
    field[..nqn.len()].copy_from_slice(nqn.as_bytes());
}

/// A null-terminated UTF-8 field; `None` when it is neither terminated nor UTF-8.
pub(crate) fn nqn_at(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|&byte| byte == 0)?;
    std::str::from_utf8(&field[..end]).ok()
}
