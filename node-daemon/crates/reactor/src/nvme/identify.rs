//! What a namespace and its controller say of themselves (Identify, NVM Express 2.0).

use std::fmt;
use std::str::FromStr;

/// Bytes of an Identify structure.
pub(crate) const IDENTIFY_BYTES: usize = 4096;
/// The unit of MDTS is the smallest page of the controller, which is at least this.
const PAGE_SHIFT: u32 = 12;
/// Where a namespace's structure has its NGUID.
const NGUID_AT: usize = 104;
/// The type of a UUID in the list of a namespace's identifiers.
const TYPE_UUID: u8 = 3;
/// Where in a controller's structure: MDTS, optional commands, volatile write cache.
const MDTS_AT: usize = 77;
const ONCS_AT: usize = 520;
const VWC_AT: usize = 525;
const ONCS_DATASET_MANAGEMENT: u16 = 1 << 2;
const ONCS_WRITE_ZEROES: u16 = 1 << 3;

/// The NGUID of a namespace, or its UUID where it has none (drives have either): it is the drive's,
/// and stays when the drive moves to another slot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nguid(pub [u8; 16]);

impl fmt::Display for Nguid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for Nguid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Nguid({self})")
    }
}

impl FromStr for Nguid {
    type Err = String;

    /// 32 hex digits, not all of them 0; hyphens, as the kernel prints them, are passed over.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no NGUID: 32 hex digits, not all 0");
        let digits: Vec<u32> = text
            .chars()
            .filter(|&character| character != '-')
            .map(|character| character.to_digit(16).ok_or_else(wrong))
            .collect::<Result<_, _>>()?;
        let mut bytes = [0; 16];
        if digits.len() != 2 * bytes.len() || digits.iter().all(|&digit| digit == 0) {
            return Err(wrong());
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = (pair[0] << 4 | pair[1]) as u8;
        }
        Ok(Self(bytes))
    }
}

/// What the kernel's queue in front of the namespace allows; its quirks for known drives are in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_field_names)] // what they limit, unit, max: the house's way
pub(crate) struct QueueLimits {
    /// Most bytes of a command.
    pub(crate) transfer_bytes_max: u64,
    /// Most pieces of memory of a command.
    pub(crate) segments_max: u64,
    /// Most bytes of a Write Zeroes; 0: not to be used. None: the kernel does not say.
    pub(crate) zeroes_bytes_max: Option<u64>,
    /// Most bytes of a deallocation; 0: not to be used. None: the kernel does not say.
    pub(crate) deallocate_bytes_max: Option<u64>,
}

impl QueueLimits {
    /// Of a queue that the kernel says nothing of: as little as any drive takes.
    pub(crate) const SMALL: Self = Self {
        transfer_bytes_max: 128 << 10,
        segments_max: 32,
        zeroes_bytes_max: None,
        deallocate_bytes_max: None,
    };
}

/// A namespace that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Namespace {
    /// None: it has neither an NGUID nor a UUID.
    pub(crate) nguid: Option<Nguid>,
    pub(crate) nsid: u32,
    /// Blocks have two to the power of this many bytes: 9 to 12.
    pub(crate) block_shift: u8,
    pub(crate) capacity_bytes: u64,
    /// A completed write is durable only with FUA, or flushed.
    pub(crate) volatile_cache: bool,
    /// Most bytes of a read or write, a multiple of 4,096.
    pub(crate) transfer_bytes_max: u64,
    /// Most bytes of a Write Zeroes; 0: the drive has no such command.
    pub(crate) zeroes_bytes_max: u64,
    /// Most bytes of a deallocation; 0: the drive has no such command.
    pub(crate) deallocate_bytes_max: u64,
}

impl Namespace {
    /// What Identify of the namespace (CNS 0), of the controller (CNS 1) and of the namespace's
    /// identifiers (CNS 3; zeroes where the drive does not know it) say, within the limits of the
    /// queue. The error says why the namespace cannot be used.
    pub(crate) fn parse(
        nsid: u32,
        namespace: &[u8; IDENTIFY_BYTES],
        controller: &[u8; IDENTIFY_BYTES],
        identifiers: &[u8; IDENTIFY_BYTES],
        queue: &QueueLimits,
    ) -> Result<Self, String> {
        let size_blocks = u64::from_le_bytes(array(namespace, 0));
        if size_blocks == 0 {
            return Err("it is not attached to this controller".to_owned());
        }
        if namespace[99] & 1 != 0 {
            return Err("it is write protected".to_owned());
        }
        let format = usize::from(namespace[26] & 0xf | namespace[26] >> 1 & 0x30);
        let format_at = 128 + 4 * format;
        let metadata_bytes = u16::from_le_bytes(array(namespace, format_at));
        let block_shift = namespace[format_at + 2];
        if metadata_bytes != 0 {
            let why = format!(
                "its format has {metadata_bytes} bytes of metadata in each block: format it \
                 without"
            );
            return Err(why);
        }
        if !(9..=12).contains(&block_shift) {
            return Err(format!("its blocks have 2^{block_shift} bytes, 512 to 4,096 can be used"));
        }
        let capacity_bytes = size_blocks
            .checked_shl(u32::from(block_shift))
            .filter(|bytes| bytes >> block_shift == size_blocks)
            .ok_or("its size is absurd")?;
        let transfer_bytes_max = transfer_bytes_max(controller[MDTS_AT], queue);
        let optional = u16::from_le_bytes(array(controller, ONCS_AT));
        let has = |bit, most: Option<u64>, usual| {
            if optional & bit == 0 { 0 } else { whole(most.unwrap_or(usual)) }
        };
        let discards = has(ONCS_DATASET_MANAGEMENT, queue.deallocate_bytes_max, u64::MAX);
        Ok(Self {
            nguid: nguid(array(namespace, NGUID_AT)).or_else(|| uuid(identifiers)),
            nsid,
            block_shift,
            capacity_bytes,
            volatile_cache: controller[VWC_AT] & 1 != 0,
            transfer_bytes_max,
            zeroes_bytes_max: has(ONCS_WRITE_ZEROES, queue.zeroes_bytes_max, transfer_bytes_max),
            deallocate_bytes_max: discards,
        })
    }

    pub(crate) fn block_bytes(&self) -> u64 {
        1 << self.block_shift
    }
}

fn nguid(bytes: [u8; 16]) -> Option<Nguid> {
    (bytes != [0; 16]).then_some(Nguid(bytes))
}

/// The UUID in a list of identifiers: each has its type, its length and two bytes more in front.
fn uuid(identifiers: &[u8; IDENTIFY_BYTES]) -> Option<Nguid> {
    let mut rest = &identifiers[..];
    while let [kind, bytes, _, _, value @ ..] = rest
        && *bytes > 0
    {
        let (value, next) = value.split_at_checked(usize::from(*bytes))?;
        if *kind == TYPE_UUID {
            return nguid(value.try_into().ok()?);
        }
        rest = next;
    }
    None
}

/// MDTS, the queue's limit, and a segment for each page: pages of a buffer lie anywhere.
fn transfer_bytes_max(mdts: u8, queue: &QueueLimits) -> u64 {
    let pages = if mdts == 0 { None } else { 1_u64.checked_shl(u32::from(mdts)) };
    let drive = pages.and_then(|pages| pages.checked_mul(1 << PAGE_SHIFT)).unwrap_or(u64::MAX);
    let segments = queue.segments_max.saturating_mul(1 << PAGE_SHIFT);
    whole(drive.min(queue.transfer_bytes_max).min(segments)).max(1 << PAGE_SHIFT)
}

/// Operations are cut at multiples of 4,096 bytes.
fn whole(bytes: u64) -> u64 {
    bytes >> PAGE_SHIFT << PAGE_SHIFT
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("N bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUEUE: QueueLimits = QueueLimits {
        transfer_bytes_max: 512 << 10,
        segments_max: 127,
        zeroes_bytes_max: Some(1 << 20),
        deallocate_bytes_max: None,
    };

    const NONE: [u8; IDENTIFY_BYTES] = [0; IDENTIFY_BYTES];

    fn structures() -> ([u8; IDENTIFY_BYTES], [u8; IDENTIFY_BYTES]) {
        let (mut namespace, mut controller) = ([0; IDENTIFY_BYTES], [0; IDENTIFY_BYTES]);
        namespace[..8].copy_from_slice(&1_000_u64.to_le_bytes());
        namespace[26] = 0x21; // format 17: the upper bits of its number are apart
        namespace[104..120].copy_from_slice(&[0xab; 16]);
        namespace[128 + 4 * 17 + 2] = 12;
        controller[MDTS_AT] = 7;
        controller[ONCS_AT] = 0b1100;
        controller[VWC_AT] = 1;
        (namespace, controller)
    }

    #[test]
    fn what_a_drive_says_is_read() {
        let (namespace, controller) = structures();
        let wanted = Namespace {
            nguid: Some(Nguid([0xab; 16])),
            nsid: 3,
            block_shift: 12,
            capacity_bytes: 4_096_000,
            volatile_cache: true,
            transfer_bytes_max: 127 * 4096,
            zeroes_bytes_max: 1 << 20,
            deallocate_bytes_max: u64::MAX >> 12 << 12,
        };
        assert_eq!(Namespace::parse(3, &namespace, &controller, &NONE, &QUEUE), Ok(wanted));
    }

    #[test]
    fn a_drive_without_an_nguid_is_known_by_its_uuid() {
        let (mut namespace, controller) = structures();
        namespace[NGUID_AT..][..16].fill(0);
        let mut identifiers = NONE;
        let known = |identifiers: &[u8; IDENTIFY_BYTES]| {
            let parsed = Namespace::parse(3, &namespace, &controller, identifiers, &QUEUE);
            parsed.expect("usable").nguid
        };
        assert_eq!(known(&identifiers), None);
        identifiers[..2].copy_from_slice(&[1, 8]); // an EUI-64
        identifiers[12..14].copy_from_slice(&[3, 16]);
        identifiers[16..32].fill(0xcd);
        assert_eq!(known(&identifiers), Some(Nguid([0xcd; 16])));
        identifiers[13] = 15;
        assert_eq!(known(&identifiers), None, "a UUID of 15 bytes");
        assert_eq!(known(&[0xff; IDENTIFY_BYTES]), None, "lengths beyond the end");
    }

    #[test]
    fn the_least_of_all_limits_counts() {
        let many = QueueLimits { segments_max: 1 << 20, ..QUEUE };
        assert_eq!(transfer_bytes_max(0, &many), 512 << 10, "no MDTS: the queue's");
        assert_eq!(transfer_bytes_max(5, &many), 128 << 10);
        assert_eq!(transfer_bytes_max(255, &many), 512 << 10);
        assert_eq!(transfer_bytes_max(5, &QueueLimits { segments_max: 2, ..QUEUE }), 8192);
    }

    #[test]
    fn a_drive_that_lacks_commands_is_not_sent_them() {
        let (namespace, mut controller) = structures();
        let parse = |controller: &[u8; IDENTIFY_BYTES], queue: &QueueLimits| {
            Namespace::parse(1, &namespace, controller, &NONE, queue).expect("usable")
        };
        controller[ONCS_AT] = 0;
        let found = parse(&controller, &QUEUE);
        assert_eq!((found.zeroes_bytes_max, found.deallocate_bytes_max), (0, 0));
        controller[ONCS_AT] = 0b1000;
        let quirk = QueueLimits { zeroes_bytes_max: Some(0), ..QUEUE };
        let found = parse(&controller, &quirk);
        assert_eq!(found.zeroes_bytes_max, 0, "the kernel knows that the drive's is broken");
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        let refusal = |change: &dyn Fn(&mut [u8; IDENTIFY_BYTES])| {
            let (mut namespace, controller) = structures();
            change(&mut namespace);
            Namespace::parse(1, &namespace, &controller, &NONE, &QUEUE).expect_err("refused")
        };
        assert!(refusal(&|namespace| namespace[128 + 4 * 17] = 8).contains("8 bytes of metadata"));
        assert!(refusal(&|namespace| namespace[128 + 4 * 17 + 2] = 16).contains("2^16"));
        assert!(refusal(&|namespace| namespace[99] = 1).contains("write protected"));
        assert!(refusal(&|namespace| namespace[..8].fill(0)).contains("not attached"));
        assert!(refusal(&|namespace| namespace[..8].fill(0xff)).contains("absurd"));
    }

    #[test]
    fn an_nguid_is_read_as_people_and_the_kernel_write_it() {
        let text = "0123456789abcdef0123456789abcdef";
        let kernel = "01234567-89ab-cdef-0123-456789ABCDEF";
        assert_eq!(text.parse::<Nguid>(), kernel.parse());
        assert_eq!(text.parse::<Nguid>().expect("an NGUID").to_string(), text);
        for wrong in ["", "0123", &"0".repeat(32), &"g".repeat(32), &"1".repeat(33)] {
            assert!(wrong.parse::<Nguid>().is_err(), "{wrong}");
        }
    }
}
