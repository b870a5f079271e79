"""What operator and agents do to objects, as far as the controller waits for it."""

import asyncio
import contextlib
from typing import Any

from fakeapi import FakeApi

from tercet_api.clients import ApiError

V1 = "/apis/tercet.io/v1alpha1"
NOW = "2026-01-01T00:00:00Z"


class Cluster:
    """Switches say what it does: a test turns one off to see the controller wait."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api
        self.unplaceable = ""
        self.placing = True
        self.fencing = True
        self.fence_epoch = 1
        self.kick = asyncio.Event()

    def add_node(self, name: str, capacity_bytes: int = 2**30) -> None:
        self.api.objects[f"/api/v1/nodes/{name}"] = {"metadata": {"name": name}}
        ready = {"type": "Ready", "status": "True", "reason": "Up", "lastTransitionTime": NOW}
        self.api.objects[f"{V1}/storagenodes/{name}"] = {
            "metadata": {"name": name, "uid": name, "generation": 1},
            "spec": {"nodeName": name, "address": "127.0.1.1"},
            "status": {"capacityBytes": capacity_bytes, "conditions": [ready]},
        }

    def volumes(self) -> list[dict[str, Any]]:
        return [o for p, o in self.api.objects.items() if p.startswith(f"{V1}/volumes/")]

    async def run(self) -> None:
        while True:
            for path, found in list(self.api.objects.items()):
                with contextlib.suppress(ApiError):
                    await self._serve(path, found)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.kick.wait(), 0.005)
            self.kick.clear()

    async def _serve(self, path: str, found: dict[str, Any]) -> None:
        status = found.get("status", {})
        wanted: dict[str, Any] = {}
        if path.startswith(f"{V1}/volumes/") and self.placing:
            wanted = self._volume_status(found)
        elif path.startswith(f"{V1}/snapshots/"):
            volume = self.api.objects[f"{V1}/volumes/{found['spec']['volume']}"]
            wanted = {
                "readyToUse": True,
                "creationTime": NOW,
                "sizeBytes": volume["spec"]["sizeBytes"],
                "volumeUuid": volume["spec"]["uuid"],
            }
        if wanted and any(status.get(key) != value for key, value in wanted.items()):
            await self.api.request("PATCH", f"{path}/status", {"status": wanted})

    def _volume_status(self, found: dict[str, Any]) -> dict[str, Any]:
        ready = {"type": "Ready", "lastTransitionTime": NOW}
        if self.unplaceable:
            why = {"status": "False", "reason": "Unplaceable", "message": self.unplaceable}
            return {"conditions": [ready | why]}
        member = "0b0c0d0e-0000-4000-8000-00000000000"
        members = [{"node": f"n{i}", "replica": f"{member}{i}"} for i in (1, 2, 3)]
        wanted = {
            "conditions": [ready | {"status": "True", "reason": "Serving", "message": ""}],
            "sizeBytes": found["spec"]["sizeBytes"],
            "replicas": [m | {"state": "InSync"} for m in members],
            "endpoints": [
                {"node": f"n{i}", "address": f"127.0.1.{i}", "port": 4420} for i in (1, 2, 3)
            ],
            "config": {
                "epoch": 1,
                "state": "Active",
                "primary": {"node": "n1", "instance": f"{member}1"},
                "members": members,
            },
        }
        if self.fencing:
            generation = found["metadata"]["generation"]
            wanted["fence"] = {"epoch": self.fence_epoch, "generation": generation}
        return wanted
