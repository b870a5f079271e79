"""What tests of a whole cluster share: kubectl as its administrator, nodes with the image driver.

A module with a name of its own: several folders of tests have a `conftest`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tercet_e2e.cluster import Cluster
from tercet_e2e.processes import ProcessName, Program

DRIVER_PROGRAM = Path(__file__).with_name("imagedriver.py")
DRIVER = "images.example.test"


class Kubectl:
    """kubectl as the administrator of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._argv = [str(cluster.tools["kubectl"]), f"--kubeconfig={cluster.kubeconfig}"]

    def __call__(self, *arguments: str, manifest: str | None = None) -> str:
        done = subprocess.run(
            [*self._argv, *arguments],
            input=manifest,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def apply(self, manifest: str) -> None:
        """Applies a manifest."""
        self("apply", "-f", "-", manifest=manifest)


async def add_driver(running: Cluster, names: tuple[str, ...]) -> None:
    """Nodes, the image driver on each, its controller, and the sidecars."""
    images = running.state.root / "images"
    socket = running.state.root / "driver.sock"
    argv = [sys.executable, DRIVER_PROGRAM, "--images", images, "--socket"]
    await running.processes.start(Program(ProcessName("driver"), [*argv, socket]))
    for name in names:
        node = await running.add_node(name, zone=f"zone-{name}")
        own = [*argv, node.driver_socket, "--node", name]
        await running.processes.start(Program(ProcessName(f"driver-{name}"), own))
        await running.wait_driver(name, DRIVER)
    await running.add_sidecars(socket)
    Kubectl(running).apply(CLASSES)


CLASSES = f"""
apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: {{name: {DRIVER}}}
spec: {{attachRequired: true}}
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: images}}
provisioner: {DRIVER}
allowVolumeExpansion: true
volumeBindingMode: WaitForFirstConsumer
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotClass
metadata: {{name: images}}
driver: {DRIVER}
deletionPolicy: Delete
"""
