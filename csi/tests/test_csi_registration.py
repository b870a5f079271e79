"""The node service registers itself: what the kubelet's plugin watcher does with its socket."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import grpc.aio
import pytest

from tercet_csi.v1 import csi_pb2, csi_pb2_grpc
from tercet_csi.v1 import pluginregistration_pb2 as pb
from tercet_csi.v1 import pluginregistration_pb2_grpc as pb_grpc

START_TIMEOUT_S = 60.0


async def appears(path) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        while not path.exists():
            await asyncio.sleep(0.02)


def channel(path) -> grpc.aio.Channel:
    # The kubelet gives the socket's path as authority, too.
    return grpc.aio.insecure_channel(f"unix:{path}")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "plugins_registry").mkdir()
    return tmp_path


@pytest.fixture
async def service(folder):
    """`tercet-csi node` as the chart starts it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from tercet_csi.main import app; app()", "node"),
        *("--node", "n1", "--endpoint", f"unix://{folder}/csi/csi.sock"),
        *("--register", str(folder / "plugins_registry")),
        *("--attacher", f"unix://{folder}/attach.sock", "--state-dir", str(folder / "state")),
    )
    yield process
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_the_kubelet_is_told_who_serves_and_where(service, folder):
    socket = folder / "plugins_registry" / "csi.tercet.io-reg.sock"
    await appears(socket)
    async with channel(socket) as asked:
        stub = pb_grpc.RegistrationStub(asked)
        told = await stub.GetInfo(pb.InfoRequest(), wait_for_ready=True)
        assert (told.type, told.name) == ("CSIPlugin", "csi.tercet.io")
        assert list(told.supported_versions) == ["1.0.0"]
        async with channel(told.endpoint) as driver:
            info = await csi_pb2_grpc.NodeStub(driver).NodeGetInfo(csi_pb2.NodeGetInfoRequest())
        assert info.node_id == "n1"
        await stub.NotifyRegistrationStatus(pb.RegistrationStatus(plugin_registered=True))
        await stub.NotifyRegistrationStatus(pb.RegistrationStatus(error="no such version"))
        assert service.returncode is None


async def test_it_takes_its_sockets_with_it(service, folder):
    socket = folder / "plugins_registry" / "csi.tercet.io-reg.sock"
    await appears(socket)
    os.kill(service.pid, signal.SIGTERM)
    assert await asyncio.wait_for(service.wait(), START_TIMEOUT_S) == 0
    assert not socket.exists()
    assert not (folder / "csi" / "csi.sock").exists()
