"""Generates the engine protocol's Python modules into the package when it is built or installed.

The generated modules are not committed: they follow from `proto/` and the pinned generator.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs the protobuf compiler of grpcio-tools."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate `src/tercet_node/protos/*_pb2*.py`. Raises RuntimeError when protoc refuses."""
        from grpc_tools import protoc

        root = Path(self.root)
        out = root / "src"
        stage = root / "proto"
        well_known = resources.files("grpc_tools") / "_proto"
        for source in sorted(stage.glob("*.proto")):
            arguments = [
                "protoc",
                f"-Itercet_node/protos={stage}",
                f"-I{well_known}",
                f"--python_out={out}",
                f"--pyi_out={out}",
                f"--grpc_python_out={out}",
                f"tercet_node/protos/{source.name}",
            ]
            if protoc.main(arguments) != 0:
                raise RuntimeError(f"protoc refused {source}")
