"""Three engines and a machine with Debian's kernel, once for all tests; a volume for each."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tercet_api.names import host_id, host_nqn
from tercet_e2e.linux.engines import Engines
from tercet_e2e.linux.guest import Guest, programs
from tercet_e2e.linux.network import Network
from tercet_e2e.linux.nvme import Host, complaints
from tercet_e2e.local import Programs
from tercet_e2e.vm.parts import parts
from tercet_node.protos import engine_pb2 as pb

NODES = 3
SIZE_BYTES = 512 << 20  # mkfs.xfs makes nothing smaller than 300 MiB


def say(text: str) -> None:
    print(text, flush=True)


@pytest.fixture(scope="session")
def folder():
    made = Path(tempfile.mkdtemp(prefix="tl-"))  # short: sockets are in it
    yield made
    if "TERCET_KEEP" not in os.environ:  # to look at logs after a failure
        shutil.rmtree(made)


@pytest.fixture(scope="session")
def network():
    with Network(NODES) as made:
        yield made


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines(folder, network):
    async with Engines(folder / "engines", network, Programs.find().engine) as running:
        yield running


@pytest.fixture(scope="session")
def machine(folder, network) -> Callable[[int, str | None], Guest]:
    """Makes a machine: its number, the suite of its kernel."""

    def make(number: int, suite: str | None = None) -> Guest:
        name = f"linux-{number}"
        host = (host_nqn(name), host_id(name))
        return Guest(parts(say, suite), folder / name, network, number, host, programs(say))

    return make


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def guest(machine):
    """Debian's own kernel, or that of the suite which TERCET_LINUX_SUITE names."""
    async with machine(1, os.environ.get("TERCET_LINUX_SUITE")) as running:
        say("linux: " + await running.run("uname -r"))
        yield running


@contextlib.asynccontextmanager
async def volume_for(engines: Engines, guest: Guest, **secrets: str) -> AsyncIterator[Host]:
    """A volume that this machine may use; afterwards it has none, and its kernel is content."""
    attachment = pb.Attachment(node="linux", host_nqn=guest.host_nqn, **secrets)
    volume = await engines.create_volume(SIZE_BYTES, [attachment])
    await engines.wait_whole(volume)
    host = Host(guest, volume)
    await host.kernel_said()
    try:
        yield host
        harm = complaints(await host.kernel_said())
        assert not harm, "\n".join(harm)
    finally:
        await guest.attempt(f"umount /mnt; nvme disconnect -n {host.nqn}")
        engines.objects.attach(volume.id, [])


@pytest_asyncio.fixture(loop_scope="session")
async def host(engines, guest):
    async with volume_for(engines, guest) as made:
        yield made
