//! Where the kernel keeps a namespace, and what it and its drive say of it.
//!
//! `ng0n1` and `nvme0n1` are two names of one namespace: the generic character device and the block
//! device. By NGUID it is looked for in sysfs, so that drives which are not ours are not spoken to;
//! only a drive of which the kernel shows no identifier (it distrusts those of some models) is
//! asked. A namespace that the kernel makes no block device of (a format that it does not know) is
//! not found; the engine could not use it either.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::nvme::Nguid;
use crate::nvme::command::{COMMAND_BYTES, Command, Opcode};
use crate::nvme::identify::{IDENTIFY_BYTES, Namespace, QueueLimits};

/// `NVME_IOCTL_ID`: `_IO('N', 0x40)`, the namespace's number.
const IOCTL_ID: libc::c_ulong = 0x4e40;
/// `NVME_IOCTL_ADMIN_CMD`: `_IOWR('N', 0x41, 72 bytes)`.
const IOCTL_ADMIN: libc::c_ulong = 0xc048_4e41;
/// Identify: the namespace, its controller, its identifiers.
const CNS_NAMESPACE: u32 = 0;
const CNS_CONTROLLER: u32 = 1;
const CNS_IDENTIFIERS: u32 = 3;

/// Name of the block device of a generic one: `nvme0n1` of `ng0n1`.
pub(crate) fn block_name(generic: &str) -> Option<String> {
    let numbers = generic.strip_prefix("ng")?;
    numbers.starts_with(|first: char| first.is_ascii_digit()).then(|| format!("nvme{numbers}"))
}

/// Name of the generic device of a whole block device: `ng0n1` of `nvme0n1`, none of `nvme0n1p1`.
pub(crate) fn generic_name(block: &str) -> Option<String> {
    let numbers = block.strip_prefix("nvme")?;
    let (controller, namespace) = numbers.split_once('n')?;
    let all_digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (all_digits(controller) && all_digits(namespace)).then(|| format!("ng{numbers}"))
}

/// The namespaces of this machine that have an NGUID or a UUID, by the names of their generic
/// devices. `ask` asks the drive itself.
pub(crate) fn namespaces(
    sys: &Path,
    ask: impl Fn(&str) -> Option<Nguid>,
) -> io::Result<Vec<(String, Nguid)>> {
    let class = sys.join("class/nvme-generic");
    let entries = match fs::read_dir(class) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let block = block_name(&name).map(|block| sys.join("block").join(block));
        let shown = block.and_then(|block| {
            // The kernel shows what a namespace has; the first that is there counts.
            let mut texts = ["nguid", "uuid"].iter().map(|id| fs::read_to_string(block.join(id)));
            texts.find_map(Result::ok)?.trim().parse().ok()
        });
        let nguid = shown.or_else(|| ask(&name));
        found.extend(nguid.map(|nguid| (name, nguid)));
    }
    found.sort();
    Ok(found)
}

/// What the kernel's queue allows.
pub(crate) fn queue_limits(sys: &Path, block: &str) -> Result<QueueLimits, String> {
    let folder = sys.join("block").join(block).join("queue");
    let text = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let number = |name| text(name).and_then(|text| text.trim().parse::<u64>().ok());
    if text("zoned").is_some_and(|zoned| zoned.trim() != "none") {
        return Err("it is zoned: it takes writes in order only".to_owned());
    }
    let kilobytes = number("max_hw_sectors_kb");
    let small = QueueLimits::SMALL;
    Ok(QueueLimits {
        transfer_bytes_max: kilobytes.map_or(small.transfer_bytes_max, |kb| kb << 10),
        segments_max: number("max_segments").unwrap_or(small.segments_max),
        zeroes_bytes_max: number("write_zeroes_max_bytes"),
        deallocate_bytes_max: number("discard_max_hw_bytes"),
    })
}

/// Asks an open generic device what it is.
pub(crate) fn identify(fd: &OwnedFd, queue: &QueueLimits) -> io::Result<Result<Namespace, String>> {
    // SAFETY: the request takes no argument; the descriptor is open.
    let nsid = unsafe { libc::ioctl(fd.as_raw_fd(), IOCTL_ID) };
    let nsid = u32::try_from(nsid).map_err(|_| io::Error::last_os_error())?;
    let namespace = identify_one(fd, nsid, CNS_NAMESPACE)?;
    let controller = identify_one(fd, 0, CNS_CONTROLLER)?;
    // Drives older than NVMe 1.3 do not know it.
    let identifiers = identify_one(fd, nsid, CNS_IDENTIFIERS);
    let identifiers = identifiers.unwrap_or_else(|_| Box::new([0; IDENTIFY_BYTES]));
    Ok(Namespace::parse(nsid, &namespace, &controller, &identifiers, queue))
}

/// A command as the kernel wants it aligned.
#[repr(C, align(8))]
struct Aligned([u8; COMMAND_BYTES]);

fn identify_one(fd: &OwnedFd, nsid: u32, cns: u32) -> io::Result<Box<[u8; IDENTIFY_BYTES]>> {
    let mut structure = Box::new([0; IDENTIFY_BYTES]);
    let command = Command {
        opcode: Opcode::Identify,
        nsid,
        data: structure.as_mut_ptr().expose_provenance() as u64,
        data_bytes: IDENTIFY_BYTES as u32,
        dwords: [cns, 0, 0],
    };
    let mut bytes = Aligned(command.encode());
    // SAFETY: the request reads and writes the 72 bytes, and writes the structure that they name;
    // both live and are reached by nobody else until it returns.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), IOCTL_ADMIN, bytes.0.as_mut_ptr()) };
    match status {
        0 => Ok(structure),
        status if status < 0 => Err(io::Error::last_os_error()),
        status => Err(io::Error::other(format!("Identify: the drive answers {status:#06x}"))),
    }
}

/// The folder of a class in which the kernel keeps a character device; its name says what it is.
pub(crate) fn is_generic(sys: &Path, major: u32, minor: u32) -> bool {
    let link: io::Result<PathBuf> =
        fs::read_link(sys.join(format!("dev/char/{major}:{minor}/subsystem")));
    link.is_ok_and(|class| class.ends_with("nvme-generic"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("tercet-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a folder");
        path
    }

    fn put(sys: &Path, path: &str, text: &str) {
        let file = sys.join(path);
        fs::create_dir_all(file.parent().expect("a folder")).expect("made");
        fs::write(file, text).expect("written");
    }

    #[test]
    fn the_two_names_of_a_namespace() {
        assert_eq!(block_name("ng0n1").as_deref(), Some("nvme0n1"));
        assert_eq!(block_name("nvme0"), None);
        assert_eq!(generic_name("nvme10n23").as_deref(), Some("ng10n23"));
        for other in ["nvme0n1p1", "nvme0c0n1", "nvme0", "sda", "nvme"] {
            assert_eq!(generic_name(other), None, "{other}");
        }
    }

    #[test]
    fn namespaces_are_found_in_sysfs() {
        let sys = folder("find");
        assert_eq!(namespaces(&sys, |_| None).expect("none"), []);
        for (name, file, text) in [
            ("0n1", "size", "1"),
            ("0n2", "nguid", "01234567-89ab-cdef-0123-456789abcdef\n"),
            ("0n2", "uuid", "ffffffff-89ab-cdef-0123-456789abcdef\n"),
            ("1n1", "uuid", "11111111-89ab-cdef-0123-456789abcdef\n"),
        ] {
            fs::create_dir_all(sys.join(format!("class/nvme-generic/ng{name}"))).expect("made");
            put(&sys, &format!("block/nvme{name}/{file}"), text);
        }
        let bogus = |name: &str| (name == "ng0n1").then_some(Nguid([0x22; 16]));
        let found = namespaces(&sys, bogus).expect("three");
        let texts: Vec<String> = found.iter().map(|(name, id)| format!("{name} {id}")).collect();
        let wanted = [
            "ng0n1 22222222222222222222222222222222",
            "ng0n2 0123456789abcdef0123456789abcdef",
            "ng1n1 1111111189abcdef0123456789abcdef",
        ];
        assert_eq!(texts, wanted);
        fs::remove_dir_all(sys).expect("removed");
    }

    #[test]
    fn limits_of_the_queue_are_the_kernels_or_small() {
        let sys = folder("limits");
        let unknown = queue_limits(&sys, "nvme0n1").expect("usable");
        assert_eq!((unknown.transfer_bytes_max, unknown.segments_max), (131_072, 32));
        for (name, text) in [
            ("max_hw_sectors_kb", "512\n"),
            ("max_segments", "127\n"),
            ("write_zeroes_max_bytes", "0\n"),
            ("discard_max_hw_bytes", "2199023255040\n"),
            ("zoned", "none\n"),
        ] {
            put(&sys, &format!("block/nvme0n1/queue/{name}"), text);
        }
        let wanted = QueueLimits {
            transfer_bytes_max: 524_288,
            segments_max: 127,
            zeroes_bytes_max: Some(0),
            deallocate_bytes_max: Some(2_199_023_255_040),
        };
        assert_eq!(queue_limits(&sys, "nvme0n1"), Ok(wanted));
        put(&sys, "block/nvme0n1/queue/zoned", "host-managed\n");
        assert!(queue_limits(&sys, "nvme0n1").expect_err("refused").contains("zoned"));
        fs::remove_dir_all(sys).expect("removed");
    }
}
