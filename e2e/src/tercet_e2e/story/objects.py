"""The Kubernetes objects of the story: what a user would write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tercet_api.names import CSI_DRIVER

Json = dict[str, Any]

NAMESPACE = "default"
STORAGE_CLASS = "demo"
SNAPSHOT_CLASS = "demo"
DATABASE = "/data/database.sqlite"
ACKS_FOLDER = "/acks"
WRITERS = 4


def classes() -> list[Json]:
    """StorageClass and VolumeSnapshotClass."""
    return [
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": STORAGE_CLASS},
            "provisioner": CSI_DRIVER,
            "parameters": {"replicas": "3"},
            "allowVolumeExpansion": True,
            "volumeBindingMode": "WaitForFirstConsumer",
        },
        {
            "apiVersion": "snapshot.storage.k8s.io/v1",
            "kind": "VolumeSnapshotClass",
            "metadata": {"name": SNAPSHOT_CLASS},
            "driver": CSI_DRIVER,
            "deletionPolicy": "Delete",
        },
    ]


def claim(name: str, size: str, *, snapshot: str | None = None) -> Json:
    """A PersistentVolumeClaim, empty or from a snapshot."""
    spec: Json = {
        "storageClassName": STORAGE_CLASS,
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": size}},
    }
    if snapshot is not None:
        spec["dataSource"] = {
            "apiGroup": "snapshot.storage.k8s.io",
            "kind": "VolumeSnapshot",
            "name": snapshot,
        }
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": spec,
    }


def volume_snapshot(name: str, claim_name: str) -> Json:
    """A VolumeSnapshot of a claim's volume."""
    return {
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshot",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "volumeSnapshotClassName": SNAPSHOT_CLASS,
            "source": {"persistentVolumeClaimName": claim_name},
        },
    }


def pod(name: str, claim_name: str, acks: Path, arguments: list[str]) -> Json:
    """A pod that runs the workload on a claim's volume; `acks` is a folder of this machine."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 20,
            "containers": [
                {
                    "name": "workload",
                    "image": "python",
                    "command": [sys.executable, "-m", "tercet_e2e.workload", *arguments],
                    "volumeMounts": [
                        {"name": "data", "mountPath": "/data"},
                        {"name": "acks", "mountPath": ACKS_FOLDER},
                    ],
                }
            ],
            "volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": claim_name}},
                {"name": "acks", "hostPath": {"path": str(acks)}},
            ],
        },
    }


def writer(name: str, claim_name: str, acks: Path, pause_ms: int = 0) -> Json:
    """A pod whose writers commit, each with this pause after a commit."""
    log = f"{ACKS_FOLDER}/acks.log"
    wish = ["write", "--database", DATABASE, "--acks", log, "--writers", str(WRITERS)]
    return pod(name, claim_name, acks, [*wish, "--pause-ms", str(pause_ms)])


def checker(name: str, claim_name: str, acks: Path, log: str, at: int | None = None) -> Json:
    """A pod that verifies a database against a log of acknowledgements and prints the verdict."""
    wish = ["verify", "--database", DATABASE, "--acks", f"{ACKS_FOLDER}/{log}"]
    return pod(name, claim_name, acks, wish + (["--at", str(at)] if at is not None else []))
