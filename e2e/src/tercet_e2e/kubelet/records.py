"""What the stand-in knows of its volumes and pods on disk, so that a restart finds it again.

A record is written *before* the call that it is about and removed *after* the call that undoes it:
a crash in between leaves a record for something that may not be there, never the other way round.
All CSI calls may be made again, so what is uncertain is simply done, or undone, once more. After a
start everything is uncertain: the machine may have been cleaned or started anew meanwhile, and a
container must never write into the empty folder below a mount that is gone.

    <root>/staged/<hash>/record.json      a StagedVolume; `globalmount` beside it
    <root>/pods/<uid>/record.json         a PodRecord
    <root>/pods/<uid>/volumes/...         what is published, and plain volumes
    <root>/pods/<uid>/containers/<name>/  spec, run and exit files, log (see shim)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from tercet_e2e.kubelet.model import Phase, PodUid, VolumeHandle
from tercet_e2e.state import write_atomically

UNCERTAIN = Phase.UNCERTAIN.value

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """A bound claim and its volume: all that the CSI calls need."""

    handle: VolumeHandle
    driver: str
    pv: str
    claim: str
    block: bool
    fs_type: str
    access_mode: str  # as Kubernetes names it
    mount_options: tuple[str, ...]
    attributes: dict[str, str]
    capacity_bytes: int
    claim_bytes: int  # what the claim's status says: less, and the volume is to grow

    @property
    def unique_name(self) -> str:
        """The attach-detach controller's name for it."""
        return f"kubernetes.io/csi/{self.driver}^{self.handle}"


@dataclass(frozen=True, slots=True)
class StagedVolume:
    """A volume that is staged here, or may be."""

    volume: VolumeSpec
    phase: str
    context: dict[str, str]  # what the controller gave when it attached

    @property
    def state(self) -> Phase:
        """The phase as a value."""
        return Phase(self.phase)


@dataclass(frozen=True, slots=True)
class Published:
    """A volume that is published for a pod, or may be."""

    volume: VolumeSpec
    phase: str
    read_only: bool

    @property
    def state(self) -> Phase:
        """The phase as a value."""
        return Phase(self.phase)


@dataclass(frozen=True, slots=True)
class PodRecord:
    """A pod that has something on this node."""

    uid: PodUid
    namespace: str
    name: str
    published: dict[str, Published] = field(default_factory=dict)  # by volume name in the pod


class Records:
    """The records below a folder; memory and disk always agree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.staged: dict[VolumeHandle, StagedVolume] = {}
        self.pods: dict[PodUid, PodRecord] = {}
        for folder in ("staged", "pods"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self._load()

    def _load(self) -> None:
        for entry in _read_all(self.root / "staged"):
            staged = StagedVolume(_volume(entry["volume"]), UNCERTAIN, entry["context"])
            self.staged[staged.volume.handle] = staged
        for entry in _read_all(self.root / "pods"):
            published = {
                name: Published(_volume(item["volume"]), UNCERTAIN, item["read_only"])
                for name, item in entry["published"].items()
            }
            uid = PodUid(entry["uid"])
            self.pods[uid] = PodRecord(uid, entry["namespace"], entry["name"], published)

    def staging_folder(self, handle: VolumeHandle) -> Path:
        """The folder of a staged volume."""
        return self.root / "staged" / hashlib.sha256(handle.encode()).hexdigest()[:16]

    def pod_folder(self, uid: PodUid) -> Path:
        """The folder of a pod."""
        return self.root / "pods" / uid

    def publish_target(self, uid: PodUid, volume: str) -> Path:
        """Where a volume of a pod is published."""
        return self.pod_folder(uid) / "volumes" / volume / "mount"

    def set_staged(self, staged: StagedVolume) -> None:
        """Records a volume as staged, or perhaps staged."""
        folder = self.staging_folder(staged.volume.handle)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "record.json", json.dumps(asdict(staged)))
        self.staged[staged.volume.handle] = staged

    def drop_staged(self, handle: VolumeHandle) -> None:
        """Forgets a volume that is not staged any more."""
        folder = self.staging_folder(handle)
        (folder / "record.json").unlink(missing_ok=True)
        _remove_empty(folder / "globalmount")
        _remove_empty(folder)
        self.staged.pop(handle, None)

    def set_pod(self, record: PodRecord) -> None:
        """Records a pod."""
        folder = self.pod_folder(record.uid)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "record.json", json.dumps(asdict(record)))
        self.pods[record.uid] = record

    def set_published(self, uid: PodUid, volume: str, published: Published | None) -> None:
        """Records what is published for a pod; None: no more."""
        record = self.pods[uid]
        others = {name: item for name, item in record.published.items() if name != volume}
        entry = {volume: published} if published is not None else {}
        self.set_pod(replace(record, published=others | entry))

    def drop_pod(self, uid: PodUid) -> None:
        """Removes a pod's folder; nothing may be mounted below it any more."""
        record = self.pods.get(uid)
        assert record is None or not record.published, f"pod {uid} still has volumes"
        shutil.rmtree(self.pod_folder(uid), ignore_errors=True)
        self.pods.pop(uid, None)


def _read_all(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*/record.json")):
        yield json.loads(path.read_text())


def _volume(entry: dict[str, Any]) -> VolumeSpec:
    return VolumeSpec(**{**entry, "mount_options": tuple(entry["mount_options"])})


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("folder is not empty", path=str(folder), error=str(error))
