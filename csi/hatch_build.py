"""Generates the CSI stubs into the package when it is built or installed.

The protocol comes out of its pinned Go module, whose checksum stands here; neither the .proto file
nor what is generated from it is committed. Needs `go` on PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULE = "github.com/container-storage-interface/spec"
VERSION = "v1.12.0"
CHECKSUM = "h1:zrFOEqpR5AghNaaDG4qyedwPBqU2fU0dWjLQMP/azK0="
DOWNLOAD_TIMEOUT_S = 300


class CsiBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs the protobuf compiler of grpcio-tools over csi.proto."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate `src/tercet_csi/v1/csi_pb2*.py`. Raises RuntimeError with what to do."""
        from grpc_tools import protoc

        out = Path(self.root) / "src"
        well_known = resources.files("grpc_tools") / "_proto"
        with tempfile.TemporaryDirectory() as stage:
            shutil.copyfile(_module_dir() / "csi.proto", Path(stage) / "csi.proto")
            arguments = [
                "protoc",
                f"-Itercet_csi/v1={stage}",
                f"-I{well_known}",
                f"--python_out={out}",
                f"--pyi_out={out}",
                f"--grpc_python_out={out}",
                "tercet_csi/v1/csi.proto",
            ]
            if protoc.main(arguments) != 0:
                raise RuntimeError(f"protoc refused csi.proto of {MODULE}@{VERSION}")


def _module_dir() -> Path:
    """The pinned module's folder in Go's module cache, fetched if it is not there."""
    go = shutil.which("go")
    if go is None:
        raise RuntimeError(
            "go is not on PATH: it fetches the CSI protocol; install Go 1.24 or later"
        )
    done = subprocess.run(
        [go, "mod", "download", "-json", f"{MODULE}@{VERSION}"],
        capture_output=True,
        text=True,
        timeout=DOWNLOAD_TIMEOUT_S,
        cwd=tempfile.gettempdir(),
        env={**os.environ, "GOFLAGS": "-mod=mod"},
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"cannot fetch {MODULE}@{VERSION}: {done.stdout}{done.stderr}")
    module = json.loads(done.stdout)
    if module["Sum"] != CHECKSUM:
        raise RuntimeError(f"{MODULE}@{VERSION} has {module['Sum']}, not {CHECKSUM}: do not build")
    return Path(module["Dir"])
