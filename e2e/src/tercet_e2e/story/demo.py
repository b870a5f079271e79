"""`make demo`: a database on a volume whose primary is killed three times while it commits.

Everything is said through kubectl and done by the real control plane; each step is checked, and
the first check that does not hold ends the story with exit code 1. `--lose-commit` takes an
acknowledged commit out of the database on purpose, to show that the checks would notice.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tercet_e2e.kubectl import Kubectl, KubectlError
from tercet_e2e.local import LocalCluster
from tercet_e2e.story import objects
from tercet_e2e.story.leftovers import leftovers
from tercet_e2e.story.teller import StoryError, Teller
from tercet_e2e.workload import Ack, longest_stall_s, read_acks

KILLS = 3
STALL_MAX_S = 3.0
COMMITS_FIRST = 100
COMMITS_BETWEEN = 100
STEP_TIMEOUT_S = 60.0
PAUSE_S = 0.05

Json = dict[str, Any]


class Demo:
    """The story on one cluster."""

    def __init__(self, cluster: LocalCluster, teller: Teller, *, lose: bool) -> None:
        self._cluster = cluster
        self._tell = teller
        self._lose = lose
        self._kubectl = Kubectl(cluster.kubectl)
        self._acks = cluster.state.root / "demo"
        self._acks.mkdir()

    def acks(self) -> list[Ack]:
        """What SQLite has acknowledged so far."""
        return read_acks(self._acks / "acks.log")

    async def tell(self) -> None:
        """The whole story. Raises StoryError at the first check that does not hold."""
        before = await self._allocated()
        volume = await self._begin()
        for number in range(1, KILLS + 1):
            await self._kill_primary(volume, number)
        await self._snapshot_while_writing()
        head = await self._restore()
        await self._final_check(volume, head)
        await self._delete_all(before)

    async def _begin(self) -> str:
        tell, kubectl = self._tell, self._kubectl
        tell.step("StorageClass, PVC and Pod through kubectl")
        await kubectl.apply(
            *objects.classes(),
            objects.claim("data", "1Gi"),
            objects.writer("writer", "data", self._acks),
        )
        found = await self._until_pod("writer", "Running")
        claim = await kubectl.get("pvc", "data")
        volume = str(claim["spec"]["volumeName"])
        attachments = await kubectl.list("volumeattachments")
        attached = [a["spec"]["nodeName"] for a in attachments if a["status"]["attached"]]
        tell.check(claim["status"]["phase"] == "Bound", f"PVC data is bound to {volume}")
        node = found["spec"]["nodeName"]
        tell.check(attached == [node], f"attached, staged and published on {node}; ext4 made")
        tell.step(f"SQLite commits with full synchronisation, {objects.WRITERS} writers")
        await self._commits(COMMITS_FIRST)
        tell.note(f"{len(self.acks())} commits acknowledged")
        return volume

    async def _kill_primary(self, volume: str, number: int) -> None:
        tell = self._tell
        config = (await self._kubectl.get("tvol", volume))["status"]["config"]
        node, epoch = config["primary"]["node"], config["epoch"]
        tell.step(f"kill -9 of the primary's engine, {number} of {KILLS}: {node}, epoch {epoch}")
        killed_ns = time.monotonic_ns()
        pid = self._cluster.kill("engine", node)
        await self._commits(len(self.acks()) + COMMITS_BETWEEN)
        resumed_ns = time.monotonic_ns()
        stall_s = longest_stall_s(self.acks(), killed_ns, resumed_ns)
        found = await self._kubectl.until(
            "tvol",
            volume,
            lambda o: (
                o["status"]["config"]["epoch"] > epoch
                and o["status"]["config"]["state"] == "Active"
            ),
            STEP_TIMEOUT_S,
            f"a newer epoch than {epoch} is Active",
        )
        config = found["status"]["config"]
        server = config["primary"]["node"]
        tell.note(f"process {pid} killed; {server} serves epoch {config['epoch']}")
        tell.check(stall_s <= STALL_MAX_S, f"writers went on; longest stall {stall_s:.2f} s")
        await self._kubectl.until(
            "tvol", volume, _all_in_sync, STEP_TIMEOUT_S, "every replica is in sync"
        )
        tell.note(f"{node} has caught up: all replicas in sync")

    async def _snapshot_while_writing(self) -> None:
        tell = self._tell
        tell.step("a VolumeSnapshot while the writers write, and a PVC from it")
        asked = self.acks()
        lines = [f"{a.writer} {a.sequence} {a.id} {a.at_ns}\n" for a in asked]
        (self._acks / "before-snapshot.log").write_text("".join(lines))
        await self._kubectl.apply(objects.volume_snapshot("snapshot", "data"))
        await self._kubectl.until(
            "volumesnapshot",
            "snapshot",
            lambda o: bool(o.get("status", {}).get("readyToUse")),
            STEP_TIMEOUT_S,
            "readyToUse",
        )
        tell.note(f"{len(asked)} commits were acknowledged before it was asked for")

    async def _restore(self) -> Json:
        tell = self._tell
        await self._kubectl.apply(
            objects.claim("restored", "1Gi", snapshot="snapshot"),
            objects.checker("restored", "restored", self._acks, "before-snapshot.log"),
        )
        verdict = await self._verdict("restored")
        tell.check(
            not verdict["problems"],
            f"the restored database is whole: {verdict['commits']} commits, among them all "
            f"{verdict['acknowledged']} acknowledged before; {_first(verdict)}",
        )
        return verdict

    async def _final_check(self, volume: str, head: Json) -> None:
        tell = self._tell
        tell.step("the writers stop; every acknowledged commit must be there")
        await self._kubectl.delete("pod", "writer")
        acks = self.acks()
        if self._lose:
            await self._lose_on_purpose(acks)
        checker = objects.checker("checker", "data", self._acks, "acks.log", head["commits"])
        await self._kubectl.apply(checker)
        verdict = await self._verdict("checker")
        tell.check(
            not verdict["problems"],
            f"integrity_check ok, {verdict['commits']} commits, none of {len(acks)} "
            f"acknowledged ones lost; {_first(verdict)}",
        )
        tell.check(
            verdict["digest"] == head["digest"],
            f"the snapshot is exactly the first {head['commits']} commits",
        )
        await self._kubectl.delete("pod", "checker", "restored")
        await asyncio.to_thread(self._verify_replicas, volume)

    def _verify_replicas(self, volume: str) -> None:
        tercet = str(Path(sys.executable).parent / "tercet")
        done = subprocess.run(
            [tercet, "volume", "verify", volume, f"--kubeconfig={self._cluster.kubeconfig}"],
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_S,
            check=False,
        )
        for line in done.stdout.splitlines():
            self._tell.note(line)
        self._tell.check(
            done.returncode == 0, f"tercet volume verify: replicas equal {done.stderr}"
        )

    async def _lose_on_purpose(self, acks: list[Ack]) -> None:
        """Take one acknowledged commit out, through a pod as the database is on the volume."""
        lost = acks[len(acks) // 2].id
        self._tell.note(f"on purpose: acknowledged commit {lost} is taken out of the database")
        code = f"from tercet_e2e.workload import *; lose_commit(Path({objects.DATABASE!r}), {lost})"
        thief = objects.pod("thief", "data", self._acks, [])
        thief["spec"]["containers"][0]["command"] = [sys.executable, "-c", code]
        await self._kubectl.apply(thief)
        await self._until_pod("thief", "Succeeded")
        await self._kubectl.delete("pod", "thief")

    async def _delete_all(self, before: dict[str, int]) -> None:
        tell, kubectl = self._tell, self._kubectl
        tell.step("all deleted")
        await kubectl.delete("pvc", "restored")
        await kubectl.delete("volumesnapshot", "snapshot")
        await kubectl.delete("pvc", "data")
        deadline_s = time.monotonic() + STEP_TIMEOUT_S
        while await kubectl.list("tvol") or await self._allocated() != before:
            if time.monotonic() > deadline_s:
                break
            await asyncio.sleep(PAUSE_S)
        tell.check(not await kubectl.list("tvol"), "no Volume is left")
        after = await self._allocated()
        tell.check(after == before, f"space is back on every node: {after} bytes allocated")

    async def _allocated(self) -> dict[str, int]:
        nodes = await self._kubectl.list("tsn")
        return {
            node["metadata"]["name"]: int(node["status"].get("allocatedBytes", 0)) for node in nodes
        }

    async def _commits(self, count: int) -> None:
        deadline_s = time.monotonic() + STEP_TIMEOUT_S
        while len(self.acks()) < count:
            if time.monotonic() > deadline_s:
                raise StoryError(f"only {len(self.acks())} commits, {count} awaited: writers stall")
            await asyncio.sleep(PAUSE_S)

    async def _until_pod(self, name: str, phase: str) -> Json:
        def reached(found: Json) -> bool:
            now = found["status"].get("phase")
            if now == "Failed" and phase != "Failed":
                raise StoryError(f"pod {name} failed; see its log: kubectl logs {name}")
            return bool(now == phase)

        return await self._kubectl.until("pod", name, reached, STEP_TIMEOUT_S, f"is {phase}")

    async def _verdict(self, pod: str) -> Json:
        def ended(found: Json) -> bool:
            return found["status"].get("phase") in {"Succeeded", "Failed"}

        await self._kubectl.until("pod", pod, ended, STEP_TIMEOUT_S, "has ended")
        log = await self._kubectl.run("logs", pod)
        try:
            verdict: Json = json.loads(log.splitlines()[-1])
        except (IndexError, ValueError):
            raise StoryError(f"pod {pod} printed no verdict: {log[-1000:]}") from None
        return verdict


def _first(verdict: Json) -> str:
    return "; ".join(verdict["problems"][:3]) or "no problem found"


def _all_in_sync(volume: Json) -> bool:
    replicas = volume["status"].get("replicas", [])
    return bool(replicas) and all(r["state"] == "InSync" for r in replicas)


async def run(*, lose: bool) -> int:
    """Tell the story on a cluster of its own; returns the exit code."""
    teller = Teller()
    root = Path(tempfile.mkdtemp(prefix="tercet-demo-"))
    teller.step("a Kubernetes control plane, CSI sidecars and three storage nodes, all processes")
    code = 0
    try:
        async with LocalCluster(root, progress=teller.note, remove=False) as cluster:
            await cluster.wait_ready()
            await Demo(cluster, teller, lose=lose).tell()
    except (StoryError, KubectlError) as error:
        teller.note(str(error))
        teller.note(f"logs are kept in {root / 'logs'}")
        code = 1
    left = leftovers(root)
    if left:
        teller.note("left behind: " + "; ".join(left))
        code = 1
    else:
        teller.note("nothing is left mounted, looped or running")
    if code == 0:
        await asyncio.to_thread(shutil.rmtree, root)
    teller.note(f"{'done' if code == 0 else 'FAILED'} in {teller.elapsed_s:.0f} s")
    return code
