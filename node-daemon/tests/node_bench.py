"""One node's agent with an engine of the tests, the real API server, and the operator's hands."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import pytest
from node_fake_engine import Disk, FakeEngine

from tercet_api.clients import Api, NotFound, storage_nodes, volumes
from tercet_api.coordination import Swapped, swap_config
from tercet_api.names import FINALIZER, NAMESPACE
from tercet_api.objects import (
    Config,
    ConfigState,
    Device,
    FileSource,
    Member,
    Metadata,
    Primary,
    ReplicaPhase,
    StorageNode,
    StorageNodeSpec,
    Volume,
    VolumeSpec,
)
from tercet_node.agent import Agent, Settings
from tercet_node.engine import Engine

TIMEOUT_S = 60.0
GIB = 1 << 30


async def until(look, what):
    """Wait for look() to give something true."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                found = await look()
                if found:
                    return found
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {TIMEOUT_S} s: {what}") from None


class Bench:
    """One node's agent and fake engine, and the hands of the operator."""

    def __init__(self, api: Api, tmp_path, node: str) -> None:
        self.api = api
        self.node = node
        self.socket = tmp_path / "engine.sock"
        self.state_dir = tmp_path / "agent"
        self.disk = Disk()
        self.engine: FakeEngine | None = None
        self.agent: Agent | None = None
        self._stack = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task] = []
        self._engine_stack = contextlib.AsyncExitStack()
        self._agent_task: asyncio.Task | None = None

    async def start_engine(self) -> FakeEngine:
        self.engine = await self._engine_stack.enter_async_context(
            FakeEngine(self.socket, self.node, self.disk)
        )
        return self.engine

    async def kill_engine(self) -> None:
        for replica in self.disk.replicas.values():
            replica.serving = False
        await self._engine_stack.aclose()

    async def start_agent(self) -> None:
        settings = Settings(
            node=self.node,
            kubeconfig=None,
            engine_socket=self.socket,
            state_dir=self.state_dir,
            listen="127.0.0.1:0",
            http="127.0.0.1:0",
        )

        async def run() -> None:
            async with Engine(self.socket) as engine:
                self.agent = Agent(settings, self.api, engine)
                await self.agent.run()

        self.agent = None
        self._agent_task = asyncio.create_task(run())
        await until(lambda: value_of(self.agent), "the agent is there")

    async def kill_agent(self) -> None:
        if self._agent_task is not None:
            self._agent_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._agent_task
            self._agent_task = None

    async def close(self) -> None:
        await self.kill_agent()
        await self._engine_stack.aclose()
        with contextlib.suppress(NotFound):
            node = await storage_nodes(self.api).get(self.node)
            await storage_nodes(self.api).delete(self.node, uid=node.uid)

    # ---------------------------------------------------------------- objects

    async def make_node(self) -> StorageNode:
        device = Device(id="d0", file=FileSource(path="/tmp/d0", capacity_bytes=GIB))
        spec = StorageNodeSpec(node_name=self.node, address="127.0.0.1", devices=[device])
        return await storage_nodes(self.api).create(
            StorageNode(metadata=Metadata(name=self.node), spec=spec)
        )

    async def make_volume(self, **spec) -> Volume:
        name = f"v-{uuid.uuid4().hex[:8]}"
        made = await volumes(self.api).create(
            Volume(
                metadata=Metadata(name=name, finalizers=[FINALIZER]),
                spec=VolumeSpec(uuid=str(uuid.uuid4()), size_bytes=GIB, replicas=1, **spec),
            )
        )
        entry = {"node": self.node, "state": "Placed"}
        return await volumes(self.api).patch_status(made.name, {"status": {"replicas": [entry]}})

    async def volume(self, name: str) -> Volume:
        return await volumes(self.api).get(name)

    async def created(self, name: str) -> Volume:
        async def look():
            found = await self.volume(name)
            return found if found.status.replicas[0].state is ReplicaPhase.CREATED else None

        return await until(look, f"replica of {name} created")

    async def first_config(self, volume: Volume) -> Volume:
        """As the operator does when all replicas are reported: {1, Recovering}."""
        replica = volume.status.replicas[0].replica
        config = Config(
            epoch=1,
            state=ConfigState.RECOVERING,
            primary=Primary(node=self.node, instance=self.engine.instance),
            members=[Member(node=self.node, replica=replica)],
        )
        swapped = await swap_config(volumes(self.api), volume.name, volume.uid, None, config)
        assert isinstance(swapped, Swapped)
        return swapped.volume

    async def served(self) -> Volume:
        """A volume that this node serves in epoch 1, with everything said about it."""
        volume = await self.make_volume()
        volume = await self.first_config(await self.created(volume.name))
        self.engine.lead(volume.spec.uuid, 1)

        async def look():
            found = await self.volume(volume.name)
            return found if found.status.replicas[0].state is ReplicaPhase.IN_SYNC else None

        return await until(look, "InSync")


async def value_of(value):
    return value


@pytest.fixture
async def api(cluster):
    async with Api(cluster.kubeconfig) as api:
        with contextlib.suppress(Exception):
            await api.request(
                "POST",
                "/api/v1/namespaces",
                {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
            )
        yield api


@pytest.fixture
async def bench(api, tmp_path):
    bench = Bench(api, tmp_path, f"n-{uuid.uuid4().hex[:8]}")
    await bench.make_node()
    await bench.start_engine()
    await bench.start_agent()
    try:
        yield bench
    finally:
        await bench.close()


class Proxy:
    """Stands between an agent and the API server, and can cut the way. An async context manager.

    `swallow`: requests go through, answers do not: whether they were carried out is unknown.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._writers: set[asyncio.StreamWriter] = set()
        self.cut = False
        self.swallow = False

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self.hang_up()

    def hang_up(self):
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader, writer):
        if self.cut:
            writer.transport.abort()
            return
        other, onward = await asyncio.open_connection("127.0.0.1", self._to)
        if self.cut:  # meanwhile: it was not there yet to be hung up
            writer.transport.abort()
            onward.transport.abort()
            return
        self._writers |= {writer, onward}
        await asyncio.gather(self._pump(reader, onward, False), self._pump(other, writer, True))

    async def _pump(self, reader, writer, answers):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while data := await reader.read(65536):
                if not (answers and self.swallow):
                    writer.write(data)
                    await writer.drain()
        writer.close()


@pytest.fixture
async def proxied(cluster, api, tmp_path):
    port = cluster.plane.addresses.api
    async with Proxy(port) as proxy:
        path = tmp_path / "proxied"
        path.write_text(cluster.kubeconfig.read_text().replace(f":{port}", f":{proxy.port}"))
        async with Api(path) as far:
            bench = Bench(far, tmp_path, f"n-{uuid.uuid4().hex[:8]}")
            bench.proxy, bench.near = proxy, api
            await bench.make_node()
            await bench.start_engine()
            await bench.start_agent()
            try:
                yield bench
            finally:
                proxy.cut = proxy.swallow = False
                await bench.close()
