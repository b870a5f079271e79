//! NQNs of volumes (docs/architecture.md, Names) and the well-known discovery NQN.

use tercet_proto::VolumeId;
use uuid::Uuid;

/// The well-known discovery subsystem (Base 4.5).
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// What the NQN of each volume's subsystem begins with.
pub const VOLUME_NQN_PREFIX: &str = "nqn.2026-11.io.tercet:volume:";
/// Longest NQN in bytes, without its terminator (Base 4.5).
pub const NQN_BYTES_MAX: usize = 223;

/// The NQN of a volume's subsystem.
pub fn volume_nqn(volume: VolumeId) -> String {
    format!("{VOLUME_NQN_PREFIX}{}", volume.0.as_hyphenated())
}

/// The volume whose subsystem has this NQN.
pub fn parse_volume_nqn(nqn: &str) -> Option<VolumeId> {
    let text = nqn.strip_prefix(VOLUME_NQN_PREFIX)?;
    let uuid = Uuid::try_parse(text).ok()?;
    // One volume, one name: only the hyphenated lower-case form.
    (uuid.as_hyphenated().to_string() == text).then_some(VolumeId(uuid))
}

/// Whether a host's NQN has the form and length that Base 4.5 asks for.
pub fn is_nqn(nqn: &str) -> bool {
    nqn.len() <= NQN_BYTES_MAX && nqn.starts_with("nqn.") && nqn.len() > "nqn.".len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_volume_has_one_name() {
        let volume = VolumeId::from_bytes(*b"0123456789abcdef");
        let nqn = volume_nqn(volume);
        assert_eq!(nqn, "nqn.2026-11.io.tercet:volume:30313233-3435-3637-3839-616263646566");
        assert_eq!(parse_volume_nqn(&nqn), Some(volume));
        assert_eq!(parse_volume_nqn(&nqn.replace('-', "")), None);
        assert_eq!(parse_volume_nqn(&nqn.to_uppercase()), None);
        assert_eq!(parse_volume_nqn(DISCOVERY_NQN), None);
    }
}
