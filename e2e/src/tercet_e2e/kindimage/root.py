"""The file system of a node: Debian's packages, what kind has for its nodes, our few files.

Packages come from where this machine's apt has Debian from. The entrypoint, the units and the
kubelet's drop-ins are kind's own, out of its module, so that they fit the kind that is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tercet_e2e.binaries import KIND, KUBERNETES, Progress, module_file
from tercet_e2e.docker import debian
from tercet_e2e.errors import BinaryError

KIND_MODULE = "sigs.k8s.io/kind"
BOOTSTRAP = "mmdebstrap"
BOOTSTRAP_TIMEOUT_S = 1800.0
CNI_PLUGINS = ("ptp", "loopback", "host-local", "portmap")
NODE_PROGRAMS = ("kubelet", "kubeadm", "kubectl")
NOT_NEEDED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/log")
EMPTIED = ("var/cache/apt", "var/lib/apt/lists", "var/cache/debconf", "var/tmp", "tmp")
# Units that Debian enables and that a node in a container does not need, or must not have.
NOT_WANTED = (
    "lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service",
    "lib/systemd/system/multi-user.target.wants/*",
    "lib/systemd/system/local-fs.target.wants/*",
    "lib/systemd/system/sockets.target.wants/*udev*",
    "lib/systemd/system/sockets.target.wants/*initctl*",
    "lib/systemd/system/basic.target.wants/*",
    "etc/systemd/system/*.wants/*",
)
ENABLED = ("kubelet.service", "containerd.service", "undo-mount-hacks.service")
MASKED = ("systemd-binfmt.service",)  # it would register things with the machine's kernel


def packages(listing: str) -> list[str]:
    """The names in a list with a reason behind each."""
    lines = (line.partition("#")[0].strip() for line in listing.splitlines())
    return [line for line in lines if line]


def sources(apt: Path = Path("/etc/apt")) -> list[Path]:
    """Where this machine has Debian from; nothing leaves it to the bootstrap."""
    known = (apt / "sources.list.d" / "debian.sources", apt / "sources.list")
    return [path for path in known if path.is_file() and path.read_text().strip()][:1]


def suite(release: Path = Path("/etc/os-release")) -> str:
    """The name of this machine's Debian. Raises BinaryError on another system."""
    found = re.search(r"^VERSION_CODENAME=(\w+)$", release.read_text(), re.MULTILINE)
    if found is None or "ID=debian" not in release.read_text():
        raise BinaryError("making a node image takes a Debian system: pass an image instead")
    return found.group(1)


def bootstrapped(names: Sequence[str], folder: Path, progress: Progress) -> Path:
    """An archive of a file system with Debian's packages in it, kept by their names."""
    digest = hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()[:12]
    target = folder / f"root-{suite()}-{digest}.tar"
    if not target.exists():
        progress("Debian's packages for the node")
        partial = folder / f".{target.name}"
        partial.unlink(missing_ok=True)
        bootstrap(names, partial, progress)
        for old in folder.glob("root-*.tar"):
            old.unlink()
        partial.rename(target)
    return target


def bootstrap(names: Sequence[str], target: Path, progress: Progress) -> None:
    """Make an archive with Debian's packages in it."""
    tool = debian.unpacked(BOOTSTRAP, progress)
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--quiet"]
    command += ["--format=tar", f"--include={','.join(names)}", suite(), str(target)]
    command += [str(path) for path in sources()]
    environment = debian.environment(tool) | {"LC_ALL": "C.UTF-8"}
    environment["PERL5LIB"] = str(tool / "usr/share/perl5")
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=BOOTSTRAP_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise BinaryError(f"making the file system of a node failed:\n{done.stderr[-3000:]}")


def trim(root: Path) -> None:
    """Take out what a node in a container does not need."""
    for path in NOT_NEEDED:
        shutil.rmtree(root / path, ignore_errors=True)
    (root / "var/log").mkdir()
    for path in EMPTIED:
        for entry in (root / path).glob("*"):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    shutil.rmtree(root / "dev")
    (root / "dev").mkdir()


def furnish(root: Path, ours: Path, tools: Mapping[str, Path], pause: str) -> None:
    """Put in the programs, kind's files and ours."""
    for pattern in NOT_WANTED:
        for entry in root.glob(pattern):
            entry.unlink()
    base = module_file(KIND_MODULE, KIND, "images/base/files")
    for entry in sorted(base.glob("**/*")):
        if entry.is_file():
            _install(entry, root / entry.relative_to(base), _mode(entry))
    for name in NODE_PROGRAMS:
        _install(tools[name], root / "usr/bin" / name, 0o755)
    _install(ours / "podnet.py", root / "usr/local/lib/podnet.py", 0o644)
    for name in ("default-cni.yaml", "default-storage.yaml"):
        _write(root / "kind/manifests" / name, (ours / name).read_text().replace("@PAUSE@", pause))
    _write(root / "kind/version", KUBERNETES)
    for name in ("containerd", "ctr"):
        _link(root / "usr/local/bin" / name, f"/usr/bin/{name}")
    for name in CNI_PLUGINS:
        _link(root / "opt/cni/bin" / name, f"/usr/lib/cni/{name}")
    _configure_runtime(root, pause)
    _configure_system(root)


def _mode(entry: Path) -> int:
    # Files of a Go module have lost their modes: what is a program shows in its first bytes.
    return 0o755 if entry.read_bytes().startswith(b"#!") else 0o644


def _install(source: Path, target: Path, mode: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def _link(link: Path, aim: str) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(aim)


def _configure_runtime(root: Path, pause: str) -> None:
    path = root / "etc/containerd/config.toml"
    text = re.sub(r'sandbox_image = "[^"]*"', f'sandbox_image = "{pause}"', path.read_text())
    # Machines that are containers themselves cannot lower a process's OOM score.
    text = text.replace("restrict_oom_score_adj = false", "restrict_oom_score_adj = true")
    path.write_text(text)
    spec = json.loads(debian.run(["chroot", root, "ctr", "oci", "spec"]))
    spec["process"].pop("rlimits", None)  # nor raise its limits
    _write(root / "etc/containerd/cri-base.json", json.dumps(spec))


def _configure_system(root: Path) -> None:
    with (root / "etc/systemd/journald.conf").open("a") as journald:
        journald.write("ReadKMsg=no\n")
    units = root / "etc/systemd/system"
    for name in ENABLED:
        _link(units / "multi-user.target.wants" / name, f"/etc/systemd/system/{name}")
    for name in MASKED:
        _link(units / name, os.devnull)
    for name in ("fstab", "machine-id", "hostname"):
        _write(root / "etc" / name, "")
    (root / "etc/kubernetes/manifests").mkdir(parents=True, exist_ok=True)
