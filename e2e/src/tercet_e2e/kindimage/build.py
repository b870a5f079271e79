"""Makes the node image, or finds it: one archive in the cache for each state of what goes into it.

The name's tag is the version of Kubernetes with a digest of everything that the image is made of
(versions, package list, our files, this code), so an image that exists is never stale. The images
of the control plane go into the node's own store beforehand, by a containerd that runs on this
machine for a moment and works on the node's folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tercet_e2e.binaries import KIND, KUBERNETES, TOOLS, Binaries, Progress, cache_dir
from tercet_e2e.docker import debian
from tercet_e2e.docker.engine import PACKAGE as DOCKER_PACKAGE
from tercet_e2e.errors import BinaryError
from tercet_e2e.kindimage import root as roots
from tercet_e2e.kindimage.archive import PATH, Config, write_archive, write_whole
from tercet_e2e.kindimage.components import PROGRAMS, Names, write_components

REPOSITORY = "localhost/tercet/kind-node"
KEY_LENGTH = 12
STORE_TIMEOUT_S = 30.0
IMPORT_TIMEOUT_S = 300.0
PAUSE_S = 0.1
NEEDED = (*PROGRAMS, *roots.NODE_PROGRAMS, "kube-proxy")
STORE = "var/lib/containerd"
UNPACKED = "io.containerd.snapshotter.v1.*"
NODE = Config(
    entrypoint=("/usr/local/bin/entrypoint", "/sbin/init"),
    environment=(PATH, "container=docker"),
    stop_signal="SIGRTMIN+3",  # systemd's word for its end
)


def files_dir() -> Path:
    """Our files: beside the sources in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parents[1]
    packed = package / "_kind_image"
    return packed if packed.is_dir() else package.parents[1] / "kind-image"


def key() -> str:
    """A digest of all that the image is made of."""
    versions = [KIND, *(f"{name} {TOOLS[name].version}" for name in sorted(NEEDED))]
    total = hashlib.sha256("\n".join(versions).encode())
    here = Path(__file__).resolve().parent
    for path in sorted([*files_dir().iterdir(), *here.glob("*.py")]):
        if path.is_file() and path.suffix != ".md" and not path.stem.startswith("__"):
            total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:KEY_LENGTH]


def image_name() -> str:
    """The image's name in an engine."""
    return f"{REPOSITORY}:{KUBERNETES}-{key()}"


def ensure(progress: Progress = print) -> Path:
    """The image's archive; made when it is not in the cache."""
    name = image_name()
    folder = cache_dir() / "kind-image"
    target = folder / f"{name.rpartition(':')[2]}.tar"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if target.exists():
            return target
        started_s = time.monotonic()
        partial = folder / ".partial"
        _remove(partial)
        partial.mkdir()
        try:
            names = roots.packages((files_dir() / "packages").read_text())
            base = roots.bootstrapped(names, folder, progress)
            made = _make(partial, name, base, progress)
            # A crash before this line leaves only a hidden folder that nobody takes.
            made.rename(target)
        finally:
            _remove(partial)
        progress(f"node image made in {time.monotonic() - started_s:.0f} s: {target}")
        for old in folder.glob(f"{KUBERNETES}*.tar"):
            if old != target:
                old.unlink()
    return target


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _make(work: Path, name: str, base: Path, progress: Progress) -> Path:
    tools = Binaries.default(progress).ensure(NEEDED)
    node, images = work / "node", work / "images"
    images.mkdir()
    node.mkdir()
    debian.run(["tar", "-C", node, "--numeric-owner", "-xpf", base])
    names = Names.of(tools["kubeadm"])
    roots.furnish(node, files_dir(), tools, names["pause"])
    progress("images of the control plane")
    archives = write_components(images, names, tools, node)
    roots.trim(node)
    _preload(node, archives, work)
    progress("the node's own image")
    layer, made = work / "layer.tar", work / "image.tar"
    write_whole(node, layer)
    write_archive(made, name, layer, NODE)
    return made


def _preload(node: Path, archives: Sequence[Path], work: Path) -> None:
    """Put images into the node's store; what unpacks them is the node, when it first needs one."""
    with _containerd(node, work) as (ctr, environment):
        for archive in archives:
            command = [*ctr, "images", "import", "--no-unpack", "--all-platforms", str(archive)]
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=IMPORT_TIMEOUT_S,
                check=False,
            )
            if done.returncode != 0:
                raise BinaryError(f"{archive.name} does not go into the node: {done.stderr}")
    for folder in (node / STORE).glob(UNPACKED):
        shutil.rmtree(folder)


@contextlib.contextmanager
def _containerd(node: Path, work: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """A containerd that works on the node's store; yields a ctr command and its environment."""
    environment = debian.environment(debian.unpacked(DOCKER_PACKAGE, lambda _: None))
    socket, log = work / "c.sock", work / "containerd.log"
    configuration = work / "containerd.toml"
    configuration.write_text(
        f'version = 2\nroot = "{node / STORE}"\nstate = "{work / "state"}"\noom_score = 0\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\n  address = "{socket}"\n'
    )
    command = ["setpriv", "--pdeathsig", "KILL", "--", "containerd", "-c", str(configuration)]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as daemon,
    ):
        try:
            ctr = ["ctr", "--address", str(socket), "--namespace", "k8s.io"]
            deadline_s = time.monotonic() + STORE_TIMEOUT_S
            while not _answers([*ctr, "version"], environment):
                if daemon.poll() is not None or time.monotonic() > deadline_s:
                    raise BinaryError(f"containerd does not start: {log.read_text()[-2000:]}")
                time.sleep(PAUSE_S)
            yield ctr, environment
        finally:
            daemon.terminate()
            daemon.wait()


def _answers(command: list[str], environment: dict[str, str]) -> bool:
    done = subprocess.run(
        command, env=environment, capture_output=True, timeout=STORE_TIMEOUT_S, check=False
    )
    return done.returncode == 0
