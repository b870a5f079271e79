"""Carries out the volume actions: looks claims up, makes the CSI calls, keeps the records.

Crash windows are those that `records` names: a record first, then the call; the call that undoes,
then the record's end.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from tercet_e2e.errors import E2eError
from tercet_e2e.kube import Kube, core, group
from tercet_e2e.kubelet.csi import CsiError, CsiNode
from tercet_e2e.kubelet.model import Phase, PodUid, VolumeHandle
from tercet_e2e.kubelet.records import Published, Records, StagedVolume, VolumeSpec

Json = dict[str, Any]
log = structlog.get_logger(__name__)

_SUFFIXES = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate("kMGTPE", start=1)},
    **{f"{unit}i": 1024**power for power, unit in enumerate("KMGTPE", start=1)},
}


class VolumeError(E2eError):
    """A volume cannot be brought to this pod, for now or for good."""


def quantity_bytes(text: str) -> int:
    """A Kubernetes quantity as bytes: `1Gi`, `500M`, `1e9`, `1073741824`."""
    digits = text.rstrip("kKMGTPEi")
    suffix = text[len(digits) :]
    if suffix not in _SUFFIXES:
        raise VolumeError(f"{text!r} is no quantity of bytes")
    return int(float(digits) * _SUFFIXES[suffix])


def quantity_text(size_bytes: int) -> str:
    """Bytes as people write them, when that is exact."""
    for unit in ("Gi", "Mi", "Ki"):
        if size_bytes and size_bytes % _SUFFIXES[unit] == 0:
            return f"{size_bytes // _SUFFIXES[unit]}{unit}"
    return str(size_bytes)


def attachment_name(handle: VolumeHandle, driver: str, node: str) -> str:
    """The name that the attach-detach controller gives to a VolumeAttachment."""
    digest = hashlib.sha256(f"{handle}{driver}{node}".encode()).hexdigest()
    return f"csi-{digest}"


class Volumes:
    """The CSI volumes of one node."""

    def __init__(self, kube: Kube, node: str, records: Records) -> None:
        self._kube = kube
        self._node = node
        self._records = records
        self.drivers: dict[str, CsiNode] = {}

    def _driver(self, volume: VolumeSpec) -> CsiNode:
        driver = self.drivers.get(volume.driver)
        if driver is None:
            raise CsiError(f"driver {volume.driver} is not registered on node {self._node}")
        return driver

    async def resolve(self, namespace: str, claim: str) -> VolumeSpec:
        """The volume behind a claim, when the claim is bound to a CSI volume."""
        pvc = await self._kube.get(core("persistentvolumeclaims", claim, namespace=namespace))
        pv_name = pvc["spec"].get("volumeName")
        if not pv_name or pvc.get("status", {}).get("phase") != "Bound":
            raise VolumeError(f"claim {namespace}/{claim} is not bound")
        pv = await self._kube.get(core("persistentvolumes", pv_name))
        source = pv["spec"].get("csi")
        if source is None:
            raise VolumeError(f"volume {pv_name} of claim {namespace}/{claim} is no CSI volume")
        status_bytes = quantity_bytes(pvc["status"]["capacity"]["storage"])
        return VolumeSpec(
            handle=VolumeHandle(source["volumeHandle"]),
            driver=source["driver"],
            pv=pv_name,
            claim=f"{namespace}/{claim}",
            block=pv["spec"].get("volumeMode") == "Block",
            fs_type=source.get("fsType", ""),
            access_mode=pv["spec"]["accessModes"][0],
            mount_options=tuple(pv["spec"].get("mountOptions", [])),
            attributes=source.get("volumeAttributes", {}),
            capacity_bytes=quantity_bytes(pv["spec"]["capacity"]["storage"]),
            claim_bytes=status_bytes,
        )

    async def stage(self, volume: VolumeSpec) -> None:
        """Makes a volume ready on this node."""
        name = attachment_name(volume.handle, volume.driver, self._node)
        attachment = await self._kube.get(group("storage.k8s.io/v1", "volumeattachments", name))
        status = attachment.get("status", {})
        if not status.get("attached"):
            raise VolumeError(f"volume {volume.handle} is not attached: {status}")
        staged = StagedVolume(volume, Phase.UNCERTAIN.value, status.get("attachmentMetadata") or {})
        driver = self._driver(volume)
        self._records.set_staged(staged)
        path = self._staging_path(volume)
        path.mkdir(parents=True, exist_ok=True)
        await driver.stage(volume, staged.context, path)
        self._records.set_staged(replace(staged, phase=Phase.DONE.value))

    async def unstage(self, handle: VolumeHandle) -> None:
        """Undoes `stage`."""
        staged = self._records.staged[handle]
        self._records.set_staged(replace(staged, phase=Phase.UNCERTAIN.value))
        path = self._staging_path(staged.volume)
        await self._driver(staged.volume).unstage(staged.volume, path)
        self._records.drop_staged(handle)

    async def publish(self, uid: PodUid, name: str, handle: VolumeHandle, read_only: bool) -> None:
        """Brings a staged volume to a pod."""
        staged = self._records.staged[handle]
        volume = staged.volume
        published = Published(volume, Phase.UNCERTAIN.value, read_only)
        driver = self._driver(volume)
        self._records.set_published(uid, name, published)
        target = self._records.publish_target(uid, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        await driver.publish(
            volume,
            staged.context,
            staging=self._staging_path(volume),
            target=target,
            read_only=read_only,
        )
        self._records.set_published(uid, name, replace(published, phase=Phase.DONE.value))

    async def unpublish(self, uid: PodUid, name: str) -> None:
        """Undoes `publish`."""
        published = self._records.pods[uid].published[name]
        self._records.set_published(uid, name, replace(published, phase=Phase.UNCERTAIN.value))
        target = self._records.publish_target(uid, name)
        await self._driver(published.volume).unpublish(published.volume, target)
        self._records.set_published(uid, name, None)

    async def expand(self, uid: PodUid, name: str, volume: VolumeSpec) -> None:
        """Grows what is on the volume, then tells the claim, which ends the expansion."""
        path = self._records.publish_target(uid, name)
        staging = self._staging_path(volume)
        grown_bytes = await self._driver(volume).expand(volume, staging=staging, path=path)
        namespace, _, claim = volume.claim.partition("/")
        status = {
            "capacity": {"storage": quantity_text(max(grown_bytes, volume.capacity_bytes))},
            "conditions": None,
            "allocatedResourceStatuses": None,
        }
        path_of_claim = core("persistentvolumeclaims", claim, namespace=namespace, sub="status")
        await self._kube.patch(path_of_claim, {"status": status})
        log.info("volume grown", volume=volume.handle, claim=volume.claim, bytes=grown_bytes)

    def _staging_path(self, volume: VolumeSpec) -> Path:
        return self._records.staging_folder(volume.handle) / "globalmount"
