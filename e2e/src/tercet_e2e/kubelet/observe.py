"""Puts together what the stand-in observes: the API server's copies, records, containers' files."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tercet_e2e.kubelet.containers import Containers, Report
from tercet_e2e.kubelet.model import CsiUse, Phase, Pod, PodUid, VolumeHandle
from tercet_e2e.kubelet.podfiles import CLAIM
from tercet_e2e.kubelet.records import PodRecord, Records, VolumeSpec
from tercet_e2e.kubelet.status import problem_of

Json = dict[str, Any]
TRUNCATED_S = 1.0  # times in objects are cut off to whole seconds: a grace is never shortened
Resolved = Mapping[tuple[PodUid, str], VolumeSpec]


def parse_time(text: str) -> float:
    """Seconds since the epoch of a Kubernetes time."""
    return dt.datetime.fromisoformat(text).timestamp()


def handles_of(unique_names: Iterable[str]) -> frozenset[VolumeHandle]:
    """The CSI handles among the attach-detach controller's names."""
    parts = [name.partition("^") for name in unique_names if name.startswith("kubernetes.io/csi/")]
    return frozenset(VolumeHandle(handle) for _, _, handle in parts)


class Observer:
    """Reads pods as `model` has them."""

    def __init__(self, records: Records, containers: Containers, resolved: Resolved) -> None:
        self._records = records
        self._containers = containers
        self._resolved = resolved

    def reports(self, uid: PodUid, names: Iterable[str]) -> dict[str, Report]:
        """How containers of a pod fare."""
        return {name: self._containers.report(uid, name) for name in names}

    def pod(
        self,
        manifest: Json,
        node: Json,
        *,
        prepared: bool,
        terminating: bool,
    ) -> Pod:
        """A pod that the API server has."""
        meta, spec = manifest["metadata"], manifest["spec"]
        uid = PodUid(meta["uid"])
        deletion = meta.get("deletionTimestamp")
        names = [c["name"] for c in spec.get("initContainers", [])]
        reports = self.reports(uid, [*names, *(c["name"] for c in spec["containers"])])
        return Pod(
            uid=uid,
            name=f"{meta['namespace']}/{meta['name']}",
            deleting=deletion is not None,
            deadline_s=parse_time(deletion) + TRUNCATED_S if deletion else None,
            terminating=terminating,
            policy=spec.get("restartPolicy", "Always"),
            prepared=prepared,
            csi=tuple(self._uses(uid, spec, node.get("status", {}))),
            init=tuple(reports[name].container for name in names),
            main=tuple(reports[c["name"]].container for c in spec["containers"]),
            problem=problem_of(spec),
            failed=manifest.get("status", {}).get("phase") in ("Failed", "Succeeded"),
        )

    def _uses(self, uid: PodUid, spec: Json, node_status: Json) -> Iterable[CsiUse]:
        attached = handles_of(v["name"] for v in node_status.get("volumesAttached") or [])
        reported = handles_of(node_status.get("volumesInUse") or [])
        record = self._records.pods.get(uid)
        for volume in spec.get("volumes", []):
            if CLAIM not in volume:
                continue
            name = volume["name"]
            published = record.published.get(name) if record else None
            known = self._resolved.get((uid, name))
            yield CsiUse(
                volume=name,
                handle=known.handle if known else None,
                attached=known is not None and known.handle in attached,
                reported=known is not None and known.handle in reported,
                published=published.state if published else Phase.NONE,
                grow=known is not None and known.capacity_bytes > known.claim_bytes,
            )

    def gone(self, record: PodRecord) -> Pod:
        """A pod that only this node still knows."""
        folder = self._records.pod_folder(record.uid) / "containers"
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        reports = self.reports(record.uid, names)
        return Pod(
            uid=record.uid,
            name=f"{record.namespace}/{record.name}",
            present=False,
            csi=tuple(
                CsiUse(volume=name, handle=item.volume.handle, published=item.state)
                for name, item in record.published.items()
            ),
            main=tuple(report.container for report in reports.values()),
        )

    def published_paths(self, uid: PodUid) -> dict[str, Path]:
        """Where each CSI volume of a pod is published."""
        record = self._records.pods.get(uid)
        names = record.published if record else {}
        return {name: self._records.publish_target(uid, name) for name in names}
