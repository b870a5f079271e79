"""The volumes of the failover benchmark, watched, and the hosts on them.

Volumes are objects made by hand that let the host `bench` in. What they are just now comes from one
watch: a poll of two hundred objects would be work of its own beside what is measured.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Self

import aiohttp
import grpc.aio

from tercet_api.names import API_VERSION, STORAGENODES, VOLUMES, host_id, host_nqn, volume_nqn
from tercet_e2e.bench.floor import BenchError
from tercet_e2e.bench.writer import Writer
from tercet_e2e.kube import Json, Watcher, group
from tercet_e2e.local import AGENT_HTTP, LocalCluster, Programs, is_ready
from tercet_node.protos import engine_pb2
from tercet_node.protos.engine_pb2_grpc import EngineStub

HOST = "bench"
BLOCK_BYTES = 4096
AT_ONCE = 20
TIMEOUT_S = 120.0
HAND_OVER_TIMEOUT_S = 10.0
READY_S = 5.0
PAUSE_S = 0.05

Look = Callable[[Json], bool]


def is_whole(volume: Json) -> bool:
    """Served by a settled configuration whose replicas are all in sync."""
    status = volume.get("status", {})
    config = status.get("config", {})
    if config.get("state") != "Active" or config.get("previousMembers") or config.get("learners"):
        return False
    members = {member["node"] for member in config["members"]}
    in_sync = {r["node"] for r in status.get("replicas", []) if r["state"] == "InSync"}
    return is_ready(volume) and members <= in_sync


def primary(volume: Json) -> str:
    """The node that leads it."""
    return str(volume["status"]["config"]["primary"]["node"])


def epoch(volume: Json) -> int:
    """Of its configuration."""
    return int(volume["status"]["config"]["epoch"])


class Fleet:
    """An async context manager around a cluster's Volumes and StorageNodes."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.kube = cluster.base.kube
        self.program = str(Programs.find().attach)
        self._news = asyncio.Event()
        self._volumes = Watcher(self.kube, group(API_VERSION, VOLUMES), self._news.set)
        self._nodes = Watcher(self.kube, group(API_VERSION, STORAGENODES), self._news.set)

    async def __aenter__(self) -> Self:
        watches = (self._volumes, self._nodes)
        self._tasks = [asyncio.create_task(watch.run()) for watch in watches]
        await asyncio.gather(*(watch.synced.wait() for watch in watches))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def volume(self, name: str) -> Json:
        """As it was seen last; empty when it is not there."""
        return _named(self._volumes, name)

    def node(self, name: str) -> Json:
        """As it was seen last."""
        return _named(self._nodes, name)

    async def until(
        self, what: str, look: Callable[[], bool], timeout_s: float = TIMEOUT_S
    ) -> None:
        """Wait for something that the watched objects show. Raises BenchError."""
        deadline_s = time.monotonic() + timeout_s
        while not look():
            self._news.clear()
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise BenchError(f"not after {timeout_s:.0f} s: {what}")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left_s)

    async def whole(self, names: Sequence[str]) -> None:
        """Wait until all of these are whole."""
        await self.until(
            f"{names[0]} and the like are whole",
            lambda: all(is_whole(self.volume(n)) for n in names),
        )

    async def agents(self) -> None:
        """Wait until every node's agent has its session with the engine, and all it follows.

        A replica is in sync again seconds before its node's agent has started, and an engine
        without one has nobody to swap a configuration for it: while two nodes are so, nobody takes
        over (T3), which is another fault than the one that a trial is about.
        """
        nodes = self.cluster.nodes.values()
        await agents_ready([f"http://{node.address}:{AGENT_HTTP}/readyz" for node in nodes])

    async def make(
        self, names: Sequence[str], size_bytes: int, hosts: Sequence[str] = (HOST,)
    ) -> None:
        """Make volumes that let these hosts in, and wait until they are whole."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(name: str) -> None:
            async with slots:
                manifest = _manifest(name, size_bytes, hosts)
                await self.kube.create(group(API_VERSION, VOLUMES), manifest)

        await asyncio.gather(*(one(name) for name in names))
        await self.whole(names)

    async def remove(self, names: Sequence[str]) -> None:
        """Shut the host out, delete the volumes, and wait until they are gone."""
        for name in names:
            path = group(API_VERSION, VOLUMES, name)
            await self.kube.patch(path, {"spec": {"attachments": []}})
            await self.kube.delete(path)
        await self.until("the volumes are gone", lambda: not any(map(self.volume, names)))

    def arguments(
        self,
        name: str,
        size_bytes: int,
        host: str = HOST,
        block_bytes: int = BLOCK_BYTES,
        depth: int = 1,
    ) -> list[str]:
        """tercet-attach's, for a host of a volume that writes at random.

        Every node is an endpoint, so that a member that comes later has a path as well: hosts of
        pods learn it from the csi node, which this host does without.
        """
        found = ["bench", "--rw", "write", "--random", "--depth", str(depth)]
        found += ["--block-bytes", str(block_bytes), "--nqn", self.nqn(name)]
        found += ["--host-nqn", host_nqn(host), "--host-id", host_id(host)]
        found += ["--span-bytes", str(size_bytes), "--log-format", "json"]
        for endpoint in self.endpoints():
            found += ["--endpoint", endpoint]
        return found

    def nqn(self, name: str) -> str:
        """Of a volume."""
        return volume_nqn(self.volume(name)["spec"]["uuid"])

    def endpoints(self) -> list[str]:
        """Where the nodes serve hosts."""
        return [f"{node.address}:4420" for node in self.cluster.nodes.values()]

    async def hand_over(self, name: str, to_node: str | None = None) -> None:
        """Ask the engine that leads a volume to hand it over (T10), as a drain does."""
        volume = self.volume(name)
        socket = self.cluster.nodes[primary(volume)].folder / "engine.sock"
        # The default authority, the socket's path, is refused by the engine's HTTP/2.
        options = [("grpc.default_authority", "localhost")]
        async with grpc.aio.insecure_channel(f"unix:{socket}", options=options) as channel:
            request = engine_pb2.HandOverRequest(volume=volume["spec"]["uuid"], to_node=to_node)
            try:
                await EngineStub(channel).HandOver(request, timeout=HAND_OVER_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                raise BenchError(f"{name} is not handed over: {error.details()}") from None

    def writer(self, name: str, size_bytes: int, every_ms: int, pause_ms: int = 0) -> Writer:
        """A host that writes to the volume."""
        return Writer(self.program, self.arguments(name, size_bytes), every_ms, pause_ms)


async def agents_ready(urls: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until all of these say that they are ready. Raises BenchError."""
    deadline_s = time.monotonic() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=READY_S)) as session:
        for url in urls:
            said = await _readiness(session, url)
            while said:
                if time.monotonic() > deadline_s:
                    raise BenchError(f"not after {timeout_s:.0f} s: {url}: {said}")
                await asyncio.sleep(PAUSE_S)
                said = await _readiness(session, url)


async def _readiness(session: aiohttp.ClientSession, url: str) -> str:
    """What is missing; nothing: it is ready."""
    try:
        async with session.get(url) as answer:
            return "" if answer.status == HTTPStatus.OK else await answer.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        return repr(error)


def _named(watcher: Watcher, name: str) -> Json:
    found = (item for item in watcher.objects.values() if item["metadata"]["name"] == name)
    return next(found, {})


def _manifest(name: str, size_bytes: int, hosts: Sequence[str]) -> Json:
    spec = {
        "uuid": str(uuid.uuid4()),
        "sizeBytes": size_bytes,
        "replicas": 3,
        "attachments": [{"nodeName": "node-1", "hostNQN": host_nqn(host)} for host in hosts],
    }
    metadata = {"name": name}
    return {"apiVersion": API_VERSION, "kind": "Volume", "metadata": metadata, "spec": spec}
