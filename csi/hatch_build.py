"""Generates the stubs of CSI and of the kubelet's registration when the package is built.

The protocols come out of their pinned Go modules, whose checksums stand here; neither the .proto
files nor what is generated from them is committed. Needs `go` on PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "tercet_csi/v1"
DOWNLOAD_TIMEOUT_S = 300


class Protocol(NamedTuple):
    """A .proto file of a Go module, and the name under which it is generated."""

    module: str
    version: str
    checksum: str
    path: str
    name: str


PROTOCOLS = (
    Protocol(
        "github.com/container-storage-interface/spec",
        "v1.12.0",
        "h1:zrFOEqpR5AghNaaDG4qyedwPBqU2fU0dWjLQMP/azK0=",
        "csi.proto",
        "csi.proto",
    ),
    Protocol(
        "k8s.io/kubelet",
        "v0.34.4",
        "h1:+8aLwtoZSUnE7HLxjrAYNtlJFzlwxQ4UBleyaW4JzA8=",
        "pkg/apis/pluginregistration/v1/api.proto",
        "pluginregistration.proto",
    ),
)


class CsiBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs the protobuf compiler of grpcio-tools over each protocol."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate `src/tercet_csi/v1/*_pb2*.py`. Raises RuntimeError with what to do."""
        from grpc_tools import protoc

        out = Path(self.root) / "src"
        well_known = resources.files("grpc_tools") / "_proto"
        for protocol in PROTOCOLS:
            with tempfile.TemporaryDirectory() as stage:
                shutil.copyfile(_folder(protocol) / protocol.path, Path(stage) / protocol.name)
                arguments = [
                    "protoc",
                    f"-I{PACKAGE}={stage}",
                    f"-I{well_known}",
                    f"--python_out={out}",
                    f"--pyi_out={out}",
                    f"--grpc_python_out={out}",
                    f"{PACKAGE}/{protocol.name}",
                ]
                if protoc.main(arguments) != 0:
                    raise RuntimeError(f"protoc refused {protocol.path} of {protocol.module}")


def _folder(protocol: Protocol) -> Path:
    """The pinned module's folder in Go's module cache, fetched if it is not there."""
    go = shutil.which("go")
    if go is None:
        raise RuntimeError(
            "go is not on PATH: it fetches the CSI protocol; install Go 1.24 or later"
        )
    wanted = f"{protocol.module}@{protocol.version}"
    done = subprocess.run(
        [go, "mod", "download", "-json", wanted],
        capture_output=True,
        text=True,
        timeout=DOWNLOAD_TIMEOUT_S,
        cwd=tempfile.gettempdir(),
        env={**os.environ, "GOFLAGS": "-mod=mod"},
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"cannot fetch {wanted}: {done.stdout}{done.stderr}")
    module = json.loads(done.stdout)
    if module["Sum"] != protocol.checksum:
        raise RuntimeError(f"{wanted} has {module['Sum']}, not {protocol.checksum}: do not build")
    return Path(module["Dir"])
