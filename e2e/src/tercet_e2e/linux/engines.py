"""Three engines without Kubernetes: Volume objects are in memory, an agent for each engine.

What the API server and the agents are to the engines, no more: objects with compare-and-swap, which
take only the steps that the API server would (`tercet_api.config`); agents that hand objects over
and carry out swaps and reads (T3, T7). A killed engine is started again by its supervisor, as in a
pod; `lose` and `revive` take a whole node away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

import grpc.aio

from tercet_api.config import check_step
from tercet_e2e.errors import ProcessError
from tercet_e2e.linux.network import Network, node_address
from tercet_node.convert import config_from_proto
from tercet_node.engine import Engine
from tercet_node.errors import EngineError, Rejected
from tercet_node.protos import engine_pb2 as pb
from tercet_node.protos.engine_pb2_grpc import EngineStub

DEVICE_BYTES = 2 << 30
REACTORS = 2  # connections have to find the one that has their volume
NVME_TCP, DISCOVERY, REPLICATION = 4420, 8009, 4421
LAG_BYTES_MAX = 1 << 20
PATIENCE_S = 120.0
PAUSE_S = 0.02
LOG_TAIL_LINES = 40

T = TypeVar("T")


@dataclass
class Volume:
    """A Volume object."""

    id: str
    size_bytes: int
    config: pb.Config
    attachments: list[pb.Attachment] = field(default_factory=list)
    generation: int = 1

    @property
    def name(self) -> str:
        """metadata.name."""
        return f"pvc-{self.id}"

    def view(self, *, consistent: bool) -> pb.VolumeView:
        """As agents hand it over."""
        return pb.VolumeView(
            config=self.config,
            attachments=self.attachments,
            size_bytes=self.size_bytes,
            consistent=consistent,
            generation=self.generation,
        )


def follows(member: pb.MemberStatus) -> bool:
    """Whether it has a complete copy and is not far behind."""
    return not member.incomplete and member.lag_bytes <= LAG_BYTES_MAX


class Objects:
    """All Volume objects, and who waits for a change of them."""

    def __init__(self) -> None:
        self.all: dict[str, Volume] = {}
        self._changed = asyncio.Event()

    def add(self, volume: Volume) -> None:
        """A new one."""
        assert check_step(None, config_from_proto(volume.config)) is None, volume.config
        self.all[volume.id] = volume
        self._tell()

    def swap(self, id_: str, old: pb.Config, new: pb.Config) -> bool:
        """Compare and swap; whether it took place."""
        volume = self.all[id_]
        if volume.config != old:
            return False
        wrong = check_step(config_from_proto(old), config_from_proto(new))
        assert wrong is None, f"{wrong}: {old} to {new}"
        volume.config = new
        self._tell()
        return True

    def attach(self, id_: str, attachments: Sequence[pb.Attachment]) -> None:
        """Who may use it from now on."""
        volume = self.all[id_]
        volume.attachments = list(attachments)
        volume.generation += 1
        self._tell()

    def resize(self, id_: str, size_bytes: int) -> None:
        """What is asked for; the primary is told by `Engines.grow`."""
        volume = self.all[id_]
        volume.size_bytes = size_bytes
        volume.generation += 1
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Returns at the next change."""
        await self._changed.wait()


@dataclass
class Node:
    """A node: its engine's supervisor, its agent, its folder."""

    name: str
    address: str
    folder: Path
    supervisor: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Of the engine's control API."""
        return self.folder / "engine.sock"

    def log(self) -> str:
        """The last lines of its engine's log."""
        path = self.folder / "log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join([f"== {self.name}", *lines[-LOG_TAIL_LINES:]])


class Engines:
    """Three nodes; an async context manager."""

    def __init__(self, folder: Path, network: Network, program: Path, nodes: int = 3) -> None:
        self.objects = Objects()
        self._network = network
        self._program = program
        self._cluster_id = str(uuid.uuid4())
        self._agents: list[asyncio.Task[None]] = []
        names = [f"node-{number}" for number in range(1, nodes + 1)]
        self.nodes = [
            Node(name, node_address(number), folder / name)
            for number, name in enumerate(names, start=1)
        ]

    async def __aenter__(self) -> Self:
        for node in self.nodes:
            node.folder.mkdir(parents=True)
            self.revive(node)
            self._agents.append(asyncio.create_task(self._agent(node), name=node.name))
        return self

    async def __aexit__(self, *_: object) -> None:
        for agent in self._agents:
            agent.cancel()
        await asyncio.gather(*self._agents, return_exceptions=True)
        for node in self.nodes:
            self.lose(node)

    def revive(self, node: Node) -> None:
        """Start a node's supervisor."""
        assert node.supervisor is None, f"{node.name} runs"
        words = ["setpriv", "--pdeathsig", "KILL", *self._network.enter, str(self._program)]
        words += ["supervise", "--node", node.name, "--socket", str(node.socket)]
        words += ["--state-dir", str(node.folder / "state"), "--reactors", str(REACTORS)]
        with (node.folder / "log").open("ab") as log:
            node.supervisor = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=log)

    def lose(self, node: Node) -> None:
        """The node dies, and does not come back by itself."""
        if node.supervisor is not None:
            node.supervisor.kill()  # the engine dies with it
            node.supervisor.wait()
            node.supervisor = None

    def signal(self, node: Node, number: signal.Signals = signal.SIGKILL) -> None:
        """To the node's engine; a killed one is started again by its supervisor."""
        text = (node.folder / "state" / "instance").read_text()
        os.kill(int(json.loads(text)["pid"]), number)

    def node(self, address: str) -> Node:
        """The node with this address."""
        return next(node for node in self.nodes if node.address == address)

    def logs(self) -> str:
        """What all engines have said last."""
        return "\n".join(node.log() for node in self.nodes)

    async def create_volume(
        self, size_bytes: int, attachments: Sequence[pb.Attachment], primary: int = 0
    ) -> Volume:
        """As the operator does: a replica on each node, then the first configuration (T9)."""
        id_ = str(uuid.uuid4())
        request = pb.CreateReplicaRequest(volume=id_, name=f"pvc-{id_}", size_bytes=size_bytes)
        members = []
        for node in self.nodes:
            made = await self._persist(node, lambda engine: engine.create_replica(request))
            members.append(pb.Member(node=node.name, replica=made.replica))
        leader = self.nodes[primary]
        status = await self._persist(leader, lambda engine: engine.status())
        config = pb.Config(
            epoch=1,
            state=pb.Config.RECOVERING,
            primary=pb.Primary(node=leader.name, instance=status.instance),
            members=members,
        )
        volume = Volume(id_, size_bytes, config, list(attachments))
        self.objects.add(volume)
        await self.wait_serving(volume)
        return volume

    async def grow(self, volume: Volume, size_bytes: int) -> None:
        """What is asked for, then the primary's entry for it."""
        self.objects.resize(volume.id, size_bytes)
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            node = await self.wait_serving(volume)
            with contextlib.suppress(EngineError):
                async with Engine(node.socket) as engine:
                    await engine.grow(volume.id, size_bytes)
                    return
            self._give_up_after(deadline_s, f"{volume.name} does not grow")
            await asyncio.sleep(PAUSE_S)

    async def hand_over(self, volume: Volume, to: Node) -> Node:
        """In good order to another member, while this one serves (T10); who serves it then."""
        node = await self.wait_serving(volume)
        request = pb.HandOverRequest(volume=volume.id, to_node=to.name)
        options = [("grpc.default_authority", "localhost")]
        async with grpc.aio.insecure_channel(f"unix:{node.socket}", options=options) as channel:
            await EngineStub(channel).HandOver(request, timeout=PATIENCE_S)
        return await self.wait_serving(volume, node)

    async def serving(self, volume: Volume) -> Node | None:
        """Who serves it now."""
        for node in self.nodes:
            replica = await self.replica(node, volume)
            if replica is not None and replica.serving:
                return node
        return None

    async def replica(self, node: Node, volume: Volume) -> pb.ReplicaStatus | None:
        """A volume's replica as its node shows it; None when no engine answers there."""
        if node.supervisor is None or not node.socket.exists():
            return None
        with contextlib.suppress(EngineError):
            async with Engine(node.socket) as engine:
                status = await engine.status()
            return next((one for one in status.replicas if one.volume == volume.id), None)
        return None

    async def wait_serving(self, volume: Volume, but: Node | None = None) -> Node:
        """Until a node, another than `but`, serves it."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            node = await self.serving(volume)
            if node is not None and node is not but:
                return node
            self._give_up_after(deadline_s, f"nobody serves {volume.name}")
            await asyncio.sleep(PAUSE_S)

    async def wait_whole(self, volume: Volume) -> Node:
        """Until all its members follow its primary; that primary.

        Under load `in_sync` comes and goes with every entry on its way: a little lag is whole.
        """
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            node = await self.wait_serving(volume)
            replica = await self.replica(node, volume)
            members = replica.members if replica is not None and replica.serving else ()
            if len(members) == len(self.nodes) and all(map(follows, members)):
                return node
            self._give_up_after(deadline_s, f"the members of {volume.name} do not catch up")
            await asyncio.sleep(PAUSE_S)

    async def equal_sums(self, volume: Volume) -> int:
        """Until all replicas have the same bytes at one place; how many chunks those are."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            answers = [await self._sums(node, volume) for node in self.nodes]
            if all(answer == answers[0] for answer in answers):
                return len(answers[0].sums)
            self._give_up_after(deadline_s, f"the replicas of {volume.name} stay different")
            await asyncio.sleep(PAUSE_S)

    async def _sums(self, node: Node, volume: Volume) -> pb.ChunkSumsResponse:
        return await self._persist(node, lambda engine: engine.chunk_sums(volume.id))

    def _give_up_after(self, deadline_s: float, what: str) -> None:
        if time.monotonic() > deadline_s:
            raise ProcessError(f"{what} within {PATIENCE_S:.0f} s\n{self.logs()}")

    async def _persist(self, node: Node, call: Callable[[Engine], Awaitable[T]]) -> T:
        """Until the engine answers and says yes."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                async with Engine(node.socket) as engine:
                    return await call(engine)
            except EngineError as error:
                self._give_up_after(deadline_s, f"{node.name} does not do it: {error}")
            await asyncio.sleep(PAUSE_S)

    def _configure(self, node: Node) -> pb.ConfigureRequest:
        file = pb.FileDevice(path=str(node.folder / "device"), capacity_bytes=DEVICE_BYTES)
        peers = [
            pb.Peer(node=other.name, address=other.address, replication_port=REPLICATION)
            for other in self.nodes
            if other is not node
        ]
        return pb.ConfigureRequest(
            node=node.name,
            cluster_id=self._cluster_id,
            address=node.address,
            ports=pb.Ports(nvme_tcp=NVME_TCP, discovery=DISCOVERY, replication=REPLICATION),
            devices=[pb.Device(id="d0", file=file)],
            peers=peers,
            link_security=pb.LINK_SECURITY_PLAIN,
        )

    async def _agent(self, node: Node) -> None:
        """Follow the objects; connect again when the engine was restarted."""
        while True:
            try:
                async with Engine(node.socket) as engine:
                    await engine.wait_ready()
                    await engine.configure(self._configure(node))
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._events(engine, group))
                        group.create_task(self._observe(engine))
            except* EngineError:
                pass
            await asyncio.sleep(PAUSE_S)

    async def _observe(self, engine: Engine) -> None:
        while True:
            change = asyncio.ensure_future(self.objects.changed())
            await asyncio.sleep(0)  # it waits from here on
            for volume in list(self.objects.all.values()):
                await engine.observe(volume.id, volume.name, volume.view(consistent=False))
            await change

    async def _events(self, engine: Engine, group: asyncio.TaskGroup) -> None:
        async for event in engine.events():
            match event.WhichOneof("event"):
                case "swap":
                    group.create_task(self._swap(engine, event.swap))
                case "read":
                    volume = self.objects.all.get(event.read.volume)
                    if volume is not None:
                        view = volume.view(consistent=True)
                        await engine.observe(volume.id, volume.name, view)

    async def _swap(self, engine: Engine, asked: pb.SwapRequested) -> None:
        swapped = self.objects.swap(asked.volume, asked.old, asked.new)
        outcome = pb.ReportSwapRequest.SWAPPED if swapped else pb.ReportSwapRequest.LOST
        view = self.objects.all[asked.volume].view(consistent=True)
        with contextlib.suppress(Rejected):  # it asks again for what it still wants
            await engine.report_swap(asked.token, outcome, view)
