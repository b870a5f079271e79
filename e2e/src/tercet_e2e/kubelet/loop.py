"""The stand-in's main loop: observe, decide, carry out; woken by changes, never by polling.

Only two things look at the clock: backing off from what failed, and the kubelet's own habit of
reading the claims of mounted volumes again to notice that they grew.
"""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import structlog

from tercet_e2e.errors import E2eError
from tercet_e2e.kube import Conflict, Kube, KubeError, NotFound, Watcher, core
from tercet_e2e.kubelet import model
from tercet_e2e.kubelet.containers import Containers
from tercet_e2e.kubelet.csi import CsiError, CsiNode
from tercet_e2e.kubelet.decide import decide
from tercet_e2e.kubelet.model import Action, Observed, Pod, PodUid, Run, VolumeAction
from tercet_e2e.kubelet.node import NodeObjects
from tercet_e2e.kubelet.observe import Observer, handles_of
from tercet_e2e.kubelet.podfiles import CLAIM, command_of, write_volumes
from tercet_e2e.kubelet.records import PodRecord, Records, VolumeSpec
from tercet_e2e.kubelet.status import status_of, timestamp
from tercet_e2e.kubelet.volumes import Volumes

Json = dict[str, Any]

RETRY_MIN_S = 0.2
RETRY_MAX_S = 5.0
CLAIMS_PERIOD_S = 5.0
EVENT_AGAIN_S = 30.0
STATUS_RETRY_S = 1.0
EVENT_REASONS = {
    model.Resolve: "FailedMount",
    model.Prepare: "FailedMount",
    model.Stage: "FailedMount",
    model.Publish: "FailedMount",
    model.Unpublish: "FailedUnmount",
    model.Unstage: "FailedUnmount",
    model.Expand: "VolumeResizeFailed",
    model.Start: "Failed",
}

log = structlog.get_logger(__name__)


class Kubelet:
    """One node's stand-in."""

    def __init__(self, kube: Kube, name: str, address: str, root: Path, cluster: str) -> None:
        self._kube = kube
        self._name = name
        self._address = address
        self._wake = asyncio.Event()
        self._records = Records(root)
        self._containers = Containers(root / "pods", self._wake.set, cluster)
        self._volumes = Volumes(kube, name, self._records)
        self._resolved: dict[tuple[PodUid, str], VolumeSpec] = {
            (uid, name): published.volume
            for uid, record in self._records.pods.items()
            for name, published in record.published.items()
        }
        self._observer = Observer(self._records, self._containers, self._resolved)
        self._prepared: set[PodUid] = set()
        self._terminating: set[PodUid] = set()
        self._busy: set[str] = set()
        self._retry: dict[str, tuple[float, float]] = {}  # key: not before, pause
        self._status_sent: dict[PodUid, Json] = {}
        self._events_sent: dict[tuple[str, str], float] = {}
        self._pods = Watcher(
            kube, core("pods"), self._wake.set, fieldSelector=f"spec.nodeName={name}"
        )
        self._nodes = Watcher(
            kube, core("nodes"), self._wake.set, fieldSelector=f"metadata.name={name}"
        )

    async def run(self, objects: NodeObjects, driver_sockets: list[Path]) -> None:
        """Runs until cancelled. The Node is registered already."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(objects.keep_lease())
            tasks.create_task(objects.keep_status())
            tasks.create_task(self._pods.run())
            tasks.create_task(self._nodes.run())
            tasks.create_task(self._follow_claims())
            for socket in driver_sockets:
                tasks.create_task(self._keep_driver(socket, objects))
            await self._pods.synced.wait()
            await self._nodes.synced.wait()
            while True:
                self._wake.clear()
                self._pass(tasks, objects)
                await self._wait()

    def find_log(self, namespace: str, pod: str, container: str) -> Any:
        """For the log server."""
        wanted = {"namespace": namespace, "name": pod}
        found = (
            uid
            for uid, manifest in self._pods.objects.items()
            if all(manifest["metadata"][key] == value for key, value in wanted.items())
        )
        uid = PodUid(next(found, ""))
        if not uid:
            return None

        def running() -> bool:
            return self._containers.report(uid, container).container.run is Run.RUNNING

        return self._containers.log_path(uid, container), running

    def _node(self) -> Json:
        return next(iter(self._nodes.objects.values()), {})

    def _manifest(self, uid: PodUid) -> Json:
        manifest = self._pods.objects.get(uid)
        if manifest is None:
            raise NotFound(f"pod {uid} is gone")
        return manifest

    def _observe(self) -> Observed:
        node = self._node()
        pods = [
            self._observer.pod(
                manifest,
                node,
                prepared=PodUid(uid) in self._prepared,
                terminating=PodUid(uid) in self._terminating,
            )
            for uid, manifest in self._pods.objects.items()
        ]
        pods += [
            self._observer.gone(record)
            for uid, record in self._records.pods.items()
            if uid not in self._pods.objects
        ]
        staged = {handle: item.state for handle, item in self._records.staged.items()}
        return Observed(
            now_s=time.time(),
            pods=tuple(pods),
            staged=staged,
            busy=frozenset(self._busy),
            not_before_s={key: entry[0] for key, entry in self._retry.items()},
            in_use=handles_of(node.get("status", {}).get("volumesInUse") or []),
        )

    def _pass(self, tasks: asyncio.TaskGroup, objects: NodeObjects) -> None:
        observed = self._observe()
        decision = decide(observed)
        for action in decision.actions:
            self._busy.add(action.key)
            tasks.create_task(self._guard(action, self._do(action, objects)))
        for pod in observed.pods:
            if pod.present and not pod.failed:
                self._send_status(tasks, pod)
        self._wake_s = decision.wake_s

    async def _wait(self) -> None:
        timeout_s = None if self._wake_s is None else max(self._wake_s - time.time(), 0.01)
        try:
            await asyncio.wait_for(self._wake.wait(), timeout_s)
        except TimeoutError:
            return

    async def _guard(self, action: Action, work: Awaitable[None]) -> None:
        """Runs one action; a failure delays the next try and is told where users look."""
        try:
            await work
            self._retry.pop(action.key, None)
        except (E2eError, OSError) as error:
            before = self._retry.get(action.key)
            pause_s = min(before[1] * 2, RETRY_MAX_S) if before else RETRY_MIN_S
            self._retry[action.key] = (time.time() + pause_s, pause_s)
            log.warning("action failed", action=action.key, error=str(error), retry_s=pause_s)
            if before is not None:
                # Not the first time: the Node authoriser learns of a new pod a moment after us.
                await self._tell(action, error)
        finally:
            self._busy.discard(action.key)
            self._wake.set()

    async def _do(self, action: Action, objects: NodeObjects) -> None:
        if isinstance(action, VolumeAction):
            await self._do_volume(action)
            return
        match action:
            case model.ReportInUse(handles):
                await self._report_in_use(handles, objects)
            case model.Resolve(uid, volume):
                await self._resolve(uid, volume)
            case model.Prepare(uid):
                await self._prepare(uid)
            case model.Start(uid, container):
                await self._start(uid, container)
            case model.Terminate(uid):
                self._terminating.add(uid)
                self._signal(uid, signal.SIGTERM)
            case model.Kill(uid):
                self._signal(uid, signal.SIGKILL)
            case model.Finish(uid):
                await self._finish(uid)
            case model.Forget(uid):
                self._forget(uid)

    async def _do_volume(self, action: VolumeAction) -> None:
        match action:
            case model.Stage(handle, uid):
                spec = next(
                    s for (u, _), s in self._resolved.items() if u == uid and s.handle == handle
                )
                await self._volumes.stage(spec)
            case model.Unstage(handle):
                await self._volumes.unstage(handle)
            case model.Publish(handle, uid, volume):
                read_only = self._read_only(uid, volume)
                await self._volumes.publish(uid, volume, handle, read_only)
            case model.Unpublish(_, uid, volume):
                await self._volumes.unpublish(uid, volume)
            case model.Expand(_, uid, volume):
                await self._volumes.expand(uid, volume, self._resolved[uid, volume])
                await self._resolve(uid, volume)

    async def _report_in_use(
        self, handles: frozenset[model.VolumeHandle], objects: NodeObjects
    ) -> None:
        names = {spec.handle: spec.unique_name for spec in self._resolved.values()}
        for record in self._records.pods.values():
            names |= {p.volume.handle: p.volume.unique_name for p in record.published.values()}
        names |= {h: s.volume.unique_name for h, s in self._records.staged.items()}
        await objects.report_in_use(names[handle] for handle in handles)

    async def _resolve(self, uid: PodUid, volume: str) -> None:
        manifest = self._manifest(uid)
        claim = next(v for v in manifest["spec"]["volumes"] if v["name"] == volume)[CLAIM]
        namespace = manifest["metadata"]["namespace"]
        found = await self._volumes.resolve(namespace, claim["claimName"])
        if self._resolved.get((uid, volume)) != found:
            self._resolved[uid, volume] = found
            self._wake.set()

    def _read_only(self, uid: PodUid, volume: str) -> bool:
        volumes = self._manifest(uid)["spec"]["volumes"]
        claim = next(v for v in volumes if v["name"] == volume)[CLAIM]
        return bool(claim.get("readOnly"))

    async def _prepare(self, uid: PodUid) -> None:
        manifest = self._manifest(uid)
        meta = manifest["metadata"]
        # The record comes first: whatever is made for the pod from here on will be found again.
        if uid not in self._records.pods:
            self._records.set_pod(PodRecord(uid, meta["namespace"], meta["name"]))
        await write_volumes(self._kube, manifest, self._records.pod_folder(uid))
        self._prepared.add(uid)

    async def _start(self, uid: PodUid, name: str) -> None:
        manifest = self._manifest(uid)
        spec = manifest["spec"]
        containers = [*spec.get("initContainers", []), *spec["containers"]]
        container = next(c for c in containers if c["name"] == name)
        folder = self._records.pod_folder(uid)
        published = self._observer.published_paths(uid)
        command = await command_of(self._kube, manifest, container, folder, published)
        await self._containers.start(uid, name, command)

    def _signal(self, uid: PodUid, number: signal.Signals) -> None:
        folder = self._records.pod_folder(uid) / "containers"
        for path in folder.iterdir() if folder.is_dir() else []:
            self._containers.signal(uid, path.name, number)

    async def _finish(self, uid: PodUid) -> None:
        manifest = self._manifest(uid)
        meta = manifest["metadata"]
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}}
        path = core("pods", meta["name"], namespace=meta["namespace"])
        try:
            await self._kube.delete(path, body)
        except (NotFound, Conflict):
            return  # gone, or a newer pod of the same name: either way ours is no more

    def _forget(self, uid: PodUid) -> None:
        self._records.drop_pod(uid)
        self._prepared.discard(uid)
        self._terminating.discard(uid)
        self._status_sent.pop(uid, None)
        for key in [key for key in self._resolved if key[0] == uid]:
            del self._resolved[key]
        for retry in [key for key in self._retry if uid in key]:
            del self._retry[retry]

    def _send_status(self, tasks: asyncio.TaskGroup, pod: Pod) -> None:
        key = f"status/{pod.uid}"
        manifest = self._manifest(pod.uid)
        names = [container.name for container in pod.containers]
        reports = self._observer.reports(pod.uid, names)
        before = self._status_sent.get(pod.uid) or manifest.get("status", {})
        started = before.get("startTime") or timestamp(time.time())
        status = status_of(pod, manifest["spec"], reports, self._address, started)
        if key in self._busy or status == self._status_sent.get(pod.uid):
            return
        self._busy.add(key)
        tasks.create_task(self._patch_status(key, pod.uid, manifest["metadata"], status))

    async def _patch_status(self, key: str, uid: PodUid, meta: Json, status: Json) -> None:
        path = core("pods", meta["name"], namespace=meta["namespace"], sub="status")
        try:
            body = {"metadata": {"uid": uid}, "status": status}
            await self._kube.patch(path, body, "strategic")
            self._status_sent[uid] = status
        except (NotFound, Conflict):
            self._status_sent[uid] = status  # the pod is gone; the watch will say so
        except KubeError as error:
            log.warning("pod status not written", pod=meta["name"], error=str(error))
            await asyncio.sleep(STATUS_RETRY_S)
        finally:
            self._busy.discard(key)
            self._wake.set()

    async def _tell(self, action: Action, error: Exception) -> None:
        """An event on the pod, so that `kubectl describe` shows why it waits."""
        uid = getattr(action, "pod", None)
        reason = EVENT_REASONS.get(type(action))
        manifest = self._pods.objects.get(uid or "")
        message = str(error)[:1000]
        last_s = self._events_sent.get((action.key, message), 0.0)
        if manifest is None or reason is None or time.time() - last_s < EVENT_AGAIN_S:
            return
        self._events_sent[action.key, message] = time.time()
        meta, now = manifest["metadata"], timestamp(time.time())
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{meta['name']}.{uuid.uuid4().hex[:16]}",
                "namespace": meta["namespace"],
            },
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": meta["name"],
                "namespace": meta["namespace"],
                "uid": meta["uid"],
            },
            "reason": reason,
            "message": message,
            "type": "Warning",
            "source": {"component": "kubelet", "host": self._name},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._kube.create(core("events", namespace=meta["namespace"]), event)
        except KubeError as failure:
            log.warning("event not written", pod=meta["name"], error=str(failure))

    async def _follow_claims(self) -> None:
        """Notices that the claim of a published volume has grown."""
        while True:
            await asyncio.sleep(CLAIMS_PERIOD_S)
            for uid, record in list(self._records.pods.items()):
                for volume in list(record.published):
                    try:
                        await self._resolve(uid, volume)
                    except E2eError as error:
                        log.debug("claim not read", pod=record.name, error=str(error))

    async def _keep_driver(self, socket: Path, objects: NodeObjects) -> None:
        """Registers the driver behind a socket as soon as it answers."""
        async with CsiNode(socket) as driver:
            pause_s = RETRY_MIN_S
            while True:
                try:
                    info = await driver.info()
                    await objects.register_driver(info)
                    break
                except (CsiError, KubeError) as error:
                    log.info("driver is not there yet", socket=str(socket), error=str(error))
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 2, RETRY_MAX_S)
            self._volumes.drivers[info.driver] = driver
            log.info("driver registered", driver=info.driver, node_id=info.node_id)
            self._wake.set()
            await asyncio.Event().wait()
