"""Provider `local` for scenarios: the cluster of processes, which has the chart's classes.

Its nodes run processes of this machine, so a pod's program is this Python's own, and every folder
here is seen by every node at the same place. There are no images, no chart and no power to switch:
scenarios that need those are marked `kubelet`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tercet_e2e.binaries import Progress
from tercet_e2e.local import LocalCluster
from tercet_e2e.site import Power, Site, SiteError


class LocalSite(Site):
    """A cluster of processes on this machine. `root` has a short path: sockets lie below it."""

    python = sys.executable
    workload = (sys.executable, "-m", "tercet_e2e.workload")

    def __init__(self, root: Path, progress: Progress = print) -> None:
        super().__init__(root, progress)
        self.shared = self.shared_on_nodes = root / "shared"

    async def _start(self) -> None:
        self.shared.mkdir(parents=True, exist_ok=True)
        await self._find_tools("kubectl")
        with self.step("local cluster: control plane, three nodes, Tercet"):
            cluster = LocalCluster(self.root / "c", progress=self._progress)
            await self._stack.enter_async_context(cluster)
            self.kubeconfig = cluster.kubeconfig
            self._connect()
            await cluster.wait_ready()

    async def power(self, node: str, act: Power) -> None:
        """There is none."""
        raise SiteError(f"node {node} is processes of this machine: it cannot be switched {act}")
