"""The tools that a local cluster runs: found, or built once from pinned Go modules.

A tool is looked for on PATH, then in KUBEBUILDER_ASSETS, then in the cache; else it is built there
with the Go toolchain. What is found is asked for its version and taken only when that has the
pinned major.minor: a control plane of mixed age fails in ways that nobody wants to look into. (A
tool that cannot tell its version is never taken from PATH.)

The modules below `tools/` pin what is built; go.sum pins every byte that goes into it. A build goes
into a file of its own that is renamed when it is whole, below one lock for each tool, so that two
runs at the same time build once. The cache is `$TERCET_CACHE`, else `~/.cache/tercet`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tercet_e2e.errors import BinaryError

BUILD_TIMEOUT_S = 3600.0  # kube-apiserver from nothing takes four minutes on two cores
VERSION_TIMEOUT_S = 10.0
DOWNLOAD_TIMEOUT_S = 600.0
TAIL_LINES = 20

KUBERNETES = "v1.34.4"
ETCD = "v3.6.16"
KIND = "v0.33.0"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Tool:
    """A program, the package it is built from, and how to tell its version."""

    name: str
    version: str
    module: str  # folder below tools/
    package: str
    version_args: tuple[str, ...]
    version_symbols: tuple[str, ...]  # variables that the linker sets to the version

    @property
    def series(self) -> str:
        """major.minor, what another build of the tool must share to be taken."""
        return ".".join(self.version.removeprefix("v").split(".")[:2])


def _kubernetes(name: str, *version_args: str) -> Tool:
    package = f"k8s.io/kubernetes/cmd/{name}"
    symbols = (
        "k8s.io/component-base/version.gitVersion",
        "k8s.io/client-go/pkg/version.gitVersion",
    )
    return Tool(name, KUBERNETES, "kubernetes", package, version_args or ("--version",), symbols)


def _sidecar(name: str, version: str, module: str) -> Tool:
    package = f"github.com/kubernetes-csi/{module}/cmd/{name}"
    return Tool(name, version, "sidecars", package, ("--version",), ("main.version",))


TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool("etcd", ETCD, "etcd", "go.etcd.io/etcd/server/v3", ("--version",), ()),
        _kubernetes("kubectl", "version", "--client"),
        _kubernetes("kube-apiserver"),
        _kubernetes("kube-controller-manager"),
        _kubernetes("kube-scheduler"),
        # What a node of provider `kind` runs besides.
        _kubernetes("kubelet"),
        _kubernetes("kubeadm", "version", "-o", "short"),
        _kubernetes("kube-proxy"),
        Tool("kind", KIND, "kind", "sigs.k8s.io/kind", ("version",), ()),
        Tool("coredns", "v1.12.1", "coredns", ".", ("-version",), ()),
        _sidecar("csi-provisioner", "v6.3.0", "external-provisioner/v6"),
        _sidecar("csi-attacher", "v4.12.0", "external-attacher/v4"),
        _sidecar("csi-resizer", "v2.2.0", "external-resizer/v2"),
        _sidecar("csi-snapshotter", "v8.6.0", "external-snapshotter/v8"),
        _sidecar("snapshot-controller", "v8.6.0", "external-snapshotter/v8"),
        # The independent judge of CSI drivers.
        Tool(
            "csi-sanity",
            "v5.6.0",
            "sanity",
            "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity",
            ("--version",),
            ("main.VERSION",),
        ),
        # What installs the chart, and what checks it.
        Tool(
            "helm",
            "v3.22.0",
            "helm",
            "helm.sh/helm/v3/cmd/helm",
            ("version", "--short"),
            ("helm.sh/helm/v3/internal/version.version",),
        ),
        Tool(
            "kubeconform",
            "v0.8.0",
            "helm",
            "github.com/yannh/kubeconform/cmd/kubeconform",
            ("-v",),
            ("main.version",),
        ),
        Tool(
            "helm-unittest",
            "v1.1.2",
            "helm",
            "github.com/helm-unittest/helm-unittest/cmd/helm-unittest",
            ("--version",),
            ("github.com/helm-unittest/helm-unittest/internal/build.version",),
        ),
    )
}


def cache_dir(env: Mapping[str, str] = os.environ) -> Path:
    """Where built tools live, outside the tree so that a clean checkout keeps them."""
    if configured := env.get("TERCET_CACHE"):
        return Path(configured).resolve()
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "tercet"


def modules_dir() -> Path:
    """The wrapper modules: beside the sources in a checkout, inside the package in a wheel."""
    here = Path(__file__).resolve()
    packed = here.parent / "_tools"
    return packed if packed.is_dir() else here.parents[2] / "tools"


@dataclass(frozen=True, slots=True)
class Binaries:
    """Finds and builds tools; `go` is the Go program, `env` where to look (PATH and the rest)."""

    cache: Path
    env: Mapping[str, str]
    go: str = "go"
    progress: Progress = print

    @classmethod
    def default(cls, progress: Progress = print) -> Binaries:
        """Looks and builds where the environment says."""
        return cls(cache=cache_dir(), env=os.environ, progress=progress)

    def cached(self, tool: Tool) -> Path:
        """Where the build of a tool goes."""
        return self.cache / "bin" / f"{tool.name}-{tool.version}" / tool.name

    def ensure(self, names: Iterable[str]) -> dict[str, Path]:
        """The path of each tool; what is missing is built, one after the other."""
        wanted = [TOOLS[name] for name in names]
        found = {tool.name: self.find(tool) for tool in wanted}
        missing = [tool for tool in wanted if found[tool.name] is None]
        started_s = time.monotonic()
        for number, tool in enumerate(missing, start=1):
            elapsed_s = time.monotonic() - started_s
            self.progress(
                f"build {tool.name} {tool.version} ({number} of {len(missing)}, {elapsed_s:.0f} s)"
            )
            found[tool.name] = self.build(tool)
        if missing:
            self.progress(f"built {len(missing)} tools in {time.monotonic() - started_s:.0f} s")
        return {name: path for name, path in found.items() if path is not None}

    def find(self, tool: Tool) -> Path | None:
        """A usable build of the tool that is already on this machine."""
        on_path = shutil.which(tool.name, path=self.env.get("PATH"))
        assets = self.env.get("KUBEBUILDER_ASSETS")
        candidates = [Path(on_path)] if on_path else []
        candidates += [Path(assets) / tool.name] if assets else []
        for candidate in candidates:
            if os.access(candidate, os.X_OK) and self._series_of(candidate, tool) == tool.series:
                return candidate
        cached = self.cached(tool)
        return cached if os.access(cached, os.X_OK) else None

    def _series_of(self, program: Path, tool: Tool) -> str | None:
        try:
            answer = subprocess.run(
                [program, *tool.version_args],
                capture_output=True,
                text=True,
                timeout=VERSION_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        version = re.search(r"\bv?(\d+\.\d+)\.\d+", answer.stdout + answer.stderr)
        return version.group(1) if version else None

    def build(self, tool: Tool) -> Path:
        """Builds the tool into the cache, or waits for whoever is at it."""
        target = self.cached(tool)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / ".lock"):
            if os.access(target, os.X_OK):
                return target
            partial = target.parent / f".{tool.name}.{os.getpid()}"
            try:
                self._go_build(tool, partial)
                # A crash before this line leaves only a hidden file that nobody takes.
                partial.rename(target)
            finally:
                partial.unlink(missing_ok=True)
        return target

    def _go_build(self, tool: Tool, output: Path) -> None:
        if shutil.which(self.go, path=self.env.get("PATH")) is None:
            raise BinaryError(
                f"{tool.name} {tool.series} is not here, and `{self.go}` is not on PATH to build "
                "it: install the Go toolchain, 1.26 or later"
            )
        flags = " ".join(["-s", "-w", *(f"-X {s}={tool.version}" for s in tool.version_symbols)])
        major, minor = tool.series.split(".")
        if tool.module == "kubernetes":
            base = "k8s.io/component-base/version"
            flags += f" -X {base}.gitMajor={major} -X {base}.gitMinor={minor}"
            flags += f" -X {base}.gitTreeState=clean"
        command = ["nice", "-n", "10", self.go, "build", "-trimpath", "-mod=readonly"]
        command += ["-buildvcs=false", "-ldflags", flags, "-o", str(output), tool.package]
        environment = {**self.env, "CGO_ENABLED": "0", "GOWORK": "off"}
        folder = modules_dir() / tool.module
        result = _run(command, folder, environment, BUILD_TIMEOUT_S)
        if result.returncode != 0:
            tail = "\n".join(result.stderr.splitlines()[-TAIL_LINES:])
            raise BinaryError(
                f"building {tool.name} {tool.version} from {tool.package} failed:\n{tail}\n"
                f"Put a {tool.name} {tool.series} on PATH or into KUBEBUILDER_ASSETS, or mend this."
            )


def module_file(module: str, version: str, path: str, *, go: str = "go") -> Path:
    """A file of a Go module at a version: fetched into Go's own cache, checked, never copied."""
    command = [go, "mod", "download", "-json", f"{module}@{version}"]
    result = _run(command, Path("/"), dict(os.environ), DOWNLOAD_TIMEOUT_S)
    answer = json.loads(result.stdout) if result.stdout.startswith("{") else {}
    if result.returncode != 0 or "Dir" not in answer:
        reason = answer.get("Error") or result.stderr.strip()
        raise BinaryError(f"module {module}@{version} is not to be had: {reason}")
    file = Path(answer["Dir"]) / path
    if not file.exists():
        raise BinaryError(f"module {module}@{version} has no {path}")
    return file


def _run(
    command: list[str], folder: Path, env: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise BinaryError(
            f"`{error.filename}` is not on PATH: install the Go toolchain (1.26 or later)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BinaryError(f"`{' '.join(command)}` took longer than {timeout_s:.0f} s") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock; it ends with the process, so a crash leaves nothing to clean."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
