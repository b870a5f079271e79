"""Writes container images as one file that `docker load` and `ctr images import` both take.

An archive has the layout of the Open Container Initiative (index.json, blobs by digest) and, for
Docker, a manifest.json over the same blobs. Layers are plain tar: they are made and unpacked on one
machine, where compressing costs more than it saves. Times in layers are zero, so that the same
files give the same digest.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COPY_BYTES = 1 << 20
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Config:
    """What a container of the image runs."""

    entrypoint: tuple[str, ...] = ()
    environment: tuple[str, ...] = (PATH,)
    user: str = ""
    stop_signal: str = ""

    def document(self, layer_digest: str) -> dict[str, Any]:
        """The configuration blob, for an image of one layer."""
        fields = {
            "Env": list(self.environment),
            "Entrypoint": list(self.entrypoint),
            "User": self.user,
            "StopSignal": self.stop_signal,
            "WorkingDir": "/",
        }
        return {
            "architecture": architecture(),
            "os": "linux",
            "config": {key: value for key, value in fields.items() if value},
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
            "history": [{"created_by": "tercet-e2e"}],
        }


@dataclass(slots=True)
class Tree:
    """The files of a small image: where each lands, and where it comes from."""

    files: dict[str, Path] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)

    def write(self, target: Path) -> None:
        """Write the layer."""
        made: set[str] = set()
        with tarfile.open(target, "w") as layer:
            for path in sorted(self.folders):
                _make_folders(layer, made, f"{path}/.")
            for path, aim in sorted(self.links.items()):
                _make_folders(layer, made, path)
                entry = tarfile.TarInfo(path.lstrip("/"))
                entry.type, entry.linkname = tarfile.SYMTYPE, aim
                layer.addfile(entry)
            for path, source in sorted(self.files.items()):
                _make_folders(layer, made, path)
                entry = tarfile.TarInfo(path.lstrip("/"))
                found = source.stat()
                entry.size, entry.mode = found.st_size, found.st_mode & 0o7777
                with source.open("rb") as content:
                    layer.addfile(entry, content)


def _make_folders(layer: tarfile.TarFile, made: set[str], path: str) -> None:
    parent = path.strip("/").rpartition("/")[0]
    if not parent or parent in made:
        return
    _make_folders(layer, made, parent)
    made.add(parent)
    entry = tarfile.TarInfo(parent)
    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
    layer.addfile(entry)


def write_whole(root: Path, target: Path) -> None:
    """Write a whole file system as a layer, with owners and modes as they are."""
    with tarfile.open(target, "w") as layer:
        for entry in sorted(root.iterdir()):
            layer.add(entry, arcname=entry.name, filter=_numeric)


def _numeric(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    entry.uname = entry.gname = ""
    return None if entry.type == tarfile.CHRTYPE and "/dev/" in entry.name else entry


def architecture() -> str:
    """What this machine is, in the words of images."""
    machine = platform.machine()
    return ARCHITECTURES.get(machine, machine)


def digest_of(path: Path) -> str:
    """A file's digest."""
    with path.open("rb") as content:
        return "sha256:" + hashlib.file_digest(content, "sha256").hexdigest()


def write_archive(target: Path, name: str, layer: Path, config: Config) -> None:
    """Write an image of one layer under a name such as `a.test/b:v1`."""
    layer_digest = digest_of(layer)
    config_blob = _encoded(config.document(layer_digest))
    blobs = {_digest(config_blob): config_blob}
    manifest = _encoded(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": _descriptor(CONFIG_TYPE, _digest(config_blob), len(config_blob)),
            "layers": [_descriptor(LAYER_TYPE, layer_digest, layer.stat().st_size)],
        }
    )
    blobs[_digest(manifest)] = manifest
    described = _descriptor(MANIFEST_TYPE, _digest(manifest), len(manifest)) | {
        "platform": {"architecture": architecture(), "os": "linux"},
        "annotations": {
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name.rpartition(":")[2],
        },
    }
    docker = {
        "Config": blob_path(_digest(config_blob)),
        "RepoTags": [name],
        "Layers": [blob_path(layer_digest)],
    }
    with tarfile.open(target, "w") as archive:
        _put(archive, "oci-layout", _encoded({"imageLayoutVersion": "1.0.0"}))
        _put(archive, "index.json", _encoded({"schemaVersion": 2, "manifests": [described]}))
        _put(archive, "manifest.json", _encoded([docker]))
        for digest, blob in blobs.items():
            _put(archive, blob_path(digest), blob)
        entry = tarfile.TarInfo(blob_path(layer_digest))
        entry.size, entry.mode = layer.stat().st_size, 0o644
        with layer.open("rb") as content:
            archive.addfile(entry, content)


def blob_path(digest: str) -> str:
    """Where a blob lies in an archive."""
    return "blobs/" + digest.replace(":", "/")


def _descriptor(kind: str, digest: str, size_bytes: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest, "size": size_bytes}


def _encoded(document: Mapping[str, Any] | Iterable[Any]) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


def _digest(blob: bytes) -> str:
    return "sha256:" + hashlib.sha256(blob).hexdigest()


def _put(archive: tarfile.TarFile, path: str, blob: bytes) -> None:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(blob), 0o644
    archive.addfile(entry, io.BytesIO(blob))
