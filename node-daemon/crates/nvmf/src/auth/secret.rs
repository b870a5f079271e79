//! Secrets as the specification writes them down: `DHHC-1:hh:base64:` (Base 8.13.5.8).
//!
//! hh names the hash that transforms the key (00: none), the Base64 part is the key of 32, 48 or 64
//! bytes and its CRC-32, little endian. A secret never shows itself in a log.

use super::Hash;

/// Bytes that a key may have.
const KEY_BYTES: [usize; 3] = [32, 48, 64];
const CRC_BYTES: usize = 4;
/// Longest text of a secret: prefix, Base64 of 68 bytes, colons.
const TEXT_BYTES_MAX: usize = 128;
/// What a transformed key is bound to besides the NQN.
const TRANSFORM_LABEL: &[u8] = b"NVMe-over-Fabrics";

/// A secret of a host or of a controller.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    hash: Option<Hash>,
    key: Vec<u8>,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret({} bytes, {:?})", self.key.len(), self.hash)
    }
}

/// Why a text is no secret. Says nothing of what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Not `DHHC-1:hh:...:`.
    #[error("a secret has the form DHHC-1:hh:BASE64: (make one with `nvme gen-dhchap-key`)")]
    Form,
    /// hh is none of 00, 01, 02, 03.
    #[error("the secret's hash has to be 00, 01, 02 or 03")]
    Hash,
    /// Not Base64.
    #[error("the secret's key is not Base64")]
    Base64,
    /// The key has another length.
    #[error("the secret's key has to have 32, 48 or 64 bytes (and its CRC-32)")]
    Length,
    /// The CRC does not match.
    #[error("the secret's CRC-32 does not match: it was copied wrongly or cut off")]
    Crc,
}

impl std::str::FromStr for Secret {
    type Err = SecretError;

    fn from_str(text: &str) -> Result<Self, SecretError> {
        let text = text.trim_end_matches(['\n', '\r']);
        let rest = text.strip_prefix("DHHC-1:").ok_or(SecretError::Form)?;
        let rest = rest.strip_suffix(':').ok_or(SecretError::Form)?;
        let (hash, encoded) = rest.split_once(':').ok_or(SecretError::Form)?;
        if text.len() > TEXT_BYTES_MAX {
            return Err(SecretError::Length);
        }
        let hash = match hash {
            "00" => None,
            "01" => Some(Hash::Sha256),
            "02" => Some(Hash::Sha384),
            "03" => Some(Hash::Sha512),
            _ => return Err(SecretError::Hash),
        };
        let mut key = decode_base64(encoded.as_bytes()).ok_or(SecretError::Base64)?;
        let key_bytes = key.len().checked_sub(CRC_BYTES).ok_or(SecretError::Length)?;
        if !KEY_BYTES.contains(&key_bytes) {
            return Err(SecretError::Length);
        }
        let crc = key.split_off(key_bytes);
        if crc != crc32(&key).to_le_bytes() {
            return Err(SecretError::Crc);
        }
        Ok(Self { hash, key })
    }
}

impl Secret {
    /// The key bound to an NQN: HMAC(K, NQN || "NVMe-over-Fabrics"), or K itself.
    pub(super) fn transformed(&self, nqn: &str) -> Vec<u8> {
        match self.hash {
            None => self.key.clone(),
            Some(hash) => hash.hmac(&self.key, &[nqn.as_bytes(), TRANSFORM_LABEL]),
        }
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32IsoHdlc, bytes) as u32
}

/// RFC 4648, padded, nothing else in between.
fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    if text.is_empty() || !text.len().is_multiple_of(4) {
        return None;
    }
    let padding = text.iter().rev().take_while(|&&byte| byte == b'=').count();
    if padding > 2 {
        return None;
    }
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    for (index, four) in text.chunks_exact(4).enumerate() {
        let is_last = (index + 1) * 4 == text.len();
        let mut bits = 0u32;
        for (place, &byte) in four.iter().enumerate() {
            let value = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                b'=' if is_last && place >= 4 - padding => 0,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        let count = if is_last { 3 - padding } else { 3 };
        // What padding leaves over has to be zero: one secret, one text.
        if bits.to_be_bytes()[1 + count..].iter().any(|&byte| byte != 0) {
            return None;
        }
        out.extend_from_slice(&bits.to_be_bytes()[1..=count]);
    }
    Some(out)
}
