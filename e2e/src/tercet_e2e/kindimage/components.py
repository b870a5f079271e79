"""The images of a control plane, named exactly as kubeadm asks for them.

Most are one static program. kube-proxy also needs the tools of the packet filter with the libraries
that they load, which come out of the node's own file system; pause is compiled from its source in
the module of Kubernetes.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tercet_e2e.binaries import KUBERNETES, module_file
from tercet_e2e.docker.debian import run
from tercet_e2e.errors import BinaryError
from tercet_e2e.kindimage.archive import Config, Tree, write_archive

KUBERNETES_MODULE = "k8s.io/kubernetes"
PAUSE_SOURCE = "build/pause/linux/pause.c"
PAUSE_USER = "65535:65535"
COREDNS_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
IPTABLES = ("iptables", "ip6tables")
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "coredns")
FILTER_PROGRAM = "/usr/sbin/xtables-nft-multi"
LISTING_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the images, as `kubeadm config images list` says them."""

    by_component: Mapping[str, str]

    @classmethod
    def of(cls, kubeadm: Path) -> Names:
        """Ask kubeadm."""
        version = f"--kubernetes-version={KUBERNETES}"
        return cls.parse(run([kubeadm, "config", "images", "list", version], LISTING_TIMEOUT_S))

    @classmethod
    def parse(cls, listed: str) -> Names:
        """Read one name a line."""
        found = {}
        for line in listed.split():
            matched = re.fullmatch(r"(?:\S+/)?([a-z-]+):\S+", line)
            if matched is None:
                raise BinaryError(f"kubeadm lists an image {line!r}, which is not a name")
            found[matched.group(1)] = line
        return cls(found)

    def __getitem__(self, component: str) -> str:
        try:
            return self.by_component[component]
        except KeyError:
            raise BinaryError(f"kubeadm lists no image of {component}") from None


def write_components(
    folder: Path, names: Names, tools: Mapping[str, Path], root: Path
) -> list[Path]:
    """Write one archive for each image into a folder; `root` is the node's file system."""
    written = []
    for component, tree, config in (
        *(
            (program, _program(program, tools[program], root), _started(program))
            for program in PROGRAMS
        ),
        ("kube-proxy", _proxy(tools["kube-proxy"], root), Config()),
        ("pause", _pause(folder), Config(entrypoint=("/pause",), user=PAUSE_USER)),
    ):
        layer, target = folder / f"{component}.layer", folder / f"{component}.tar"
        tree.write(layer)
        write_archive(target, names[component], layer, config)
        layer.unlink()
        written.append(target)
    return written


def _started(program: str) -> Config:
    # kubeadm's manifests name the command of each, but for CoreDNS they only give arguments.
    return Config(entrypoint=("/coredns",)) if program == "coredns" else Config()


def _program(program: str, built: Path, root: Path) -> Tree:
    certificates = {COREDNS_CERTIFICATES: root / COREDNS_CERTIFICATES.lstrip("/")}
    where = "/coredns" if program == "coredns" else f"/usr/local/bin/{program}"
    return Tree(files={where: built} | certificates, folders={"/tmp"})


def _proxy(built: Path, root: Path) -> Tree:
    programs = [FILTER_PROGRAM, "/usr/sbin/nft", "/usr/sbin/conntrack", "/usr/sbin/ipset"]
    modules = [f"/{found.relative_to(root)}" for found in root.glob("usr/lib/*/xtables/*.so")]
    files = {path: root / path.lstrip("/") for path in closure(root, [*programs, *modules])}
    links = {"/lib": "usr/lib", "/lib64": "usr/lib64", "/sbin": "usr/sbin", "/bin": "usr/bin"}
    for name in IPTABLES:
        for kind in ("", "-save", "-restore"):
            links[f"/usr/sbin/{name}{kind}"] = "xtables-nft-multi"
    files["/usr/local/bin/kube-proxy"] = built
    return Tree(files=files, links=links, folders={"/run", "/var/lib", "/etc", "/tmp"})


def closure(root: Path, paths: Iterable[str]) -> set[str]:
    """Paths below a file system with the shared libraries that they load."""
    found = set()
    for path in paths:
        done = subprocess.run(
            ["chroot", root, "ldd", path], capture_output=True, text=True, check=False
        )
        found |= {canonical(library) for library in libraries(done.stdout)} | {path}
    return found


def libraries(listed: str) -> set[str]:
    """The libraries that `ldd` lists."""
    return set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listed, re.MULTILINE))


def canonical(path: str) -> str:
    """A path with /lib and the like spelt as what they link to on a system with merged /usr."""
    return re.sub(r"^/(lib64|lib|sbin|bin)/", r"/usr/\1/", path)


def _pause(folder: Path) -> Tree:
    source = module_file(KUBERNETES_MODULE, KUBERNETES, PAUSE_SOURCE)
    built = folder / "pause"
    flags = ["-Os", "-Wall", "-static", f"-DVERSION={KUBERNETES}"]
    run(["gcc", *flags, "-o", built, source])
    return Tree(files={"/pause": built})
