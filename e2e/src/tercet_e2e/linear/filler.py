"""Takes all space of the devices, and gives it back.

A second volume is written, kept as a snapshot and written again, until writes are refused; then the
snapshot is deleted. Refused are the writes of every volume on those devices, so the hosts of a
history meet it as well.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from tercet_api.names import API_VERSION, SNAPSHOTS, STORAGENODES
from tercet_e2e.bench.fleet import Fleet
from tercet_e2e.bench.floor import BenchError
from tercet_e2e.bench.writer import Writer
from tercet_e2e.kube import KubeError, NotFound, group
from tercet_e2e.linear.network import Network

HOST = "filler"
VOLUME = "linear-filler"
SNAPSHOT = "linear-filler"
SHARE = 0.55
"""Of the devices' capacity that the volume takes: twice it is more than there is."""
ALIGNED_BYTES = 4 << 20
WINDOW_MS = 100
PAUSE_MS = 20
BLOCK_BYTES = 128 << 10
DEPTH = 4
FULL_TIMEOUT_S = 60.0
SPACE_TIMEOUT_S = 60.0
PAUSE_S = 0.1


class Filler:
    """The volume, and a host that writes to it."""

    def __init__(self, fleet: Fleet, network: Network) -> None:
        self._fleet = fleet
        self._network = network
        self._size_bytes = 0

    async def make(self) -> None:
        """Make the volume and write all of it. Raises BenchError."""
        nodes = await self._fleet.kube.list(group(API_VERSION, STORAGENODES))
        capacity = min(int(node["status"]["capacityBytes"]) for node in nodes)
        self._size_bytes = int(capacity * SHARE) // ALIGNED_BYTES * ALIGNED_BYTES
        await self._fleet.make([VOLUME], self._size_bytes, [HOST])
        # The writer goes round and round; once is enough.
        async with self._writer() as writer:
            await self._written(writer, self._size_bytes)

    async def _written(self, writer: Writer, count_bytes: int) -> None:
        deadline_s = time.monotonic() + FULL_TIMEOUT_S
        while sum(window.operations for window in writer.windows) * BLOCK_BYTES < count_bytes:
            if time.monotonic() > deadline_s:
                raise BenchError(f"{count_bytes} bytes are not written in {FULL_TIMEOUT_S:.0f} s")
            await asyncio.sleep(PAUSE_S)

    async def fill(self, hold_s: float) -> None:
        """Take all space, keep it for so long, give it back. Raises BenchError."""
        await self._cut_snapshot()
        try:
            async with self._writer() as writer:
                await writer.until("a write is refused", lambda w: w.errors > 0, FULL_TIMEOUT_S)
                await asyncio.sleep(hold_s)
        finally:
            await self._delete_snapshot()
        async with self._writer() as writer:
            await writer.until(
                "a write is taken again", lambda w: w.operations > w.errors, SPACE_TIMEOUT_S
            )

    def _writer(self) -> Writer:
        words = self._fleet.arguments(VOLUME, self._size_bytes, HOST, BLOCK_BYTES, DEPTH)
        program, *enter = self._network.enter(HOST)
        arguments = [*enter, self._fleet.program, *(w for w in words if w != "--random")]
        return Writer(program, arguments, WINDOW_MS, PAUSE_MS)

    async def _cut_snapshot(self) -> None:
        manifest = {
            "apiVersion": API_VERSION,
            "kind": "Snapshot",
            "metadata": {"name": SNAPSHOT},
            "spec": {"volume": VOLUME},
        }
        await self._fleet.kube.create(group(API_VERSION, SNAPSHOTS), manifest)
        deadline_s = time.monotonic() + FULL_TIMEOUT_S
        while True:
            with suppress(KubeError):
                found = await self._fleet.kube.get(group(API_VERSION, SNAPSHOTS, SNAPSHOT))
                if found.get("status", {}).get("readyToUse"):
                    return
            if time.monotonic() > deadline_s:
                raise BenchError(f"snapshot {SNAPSHOT} is not ready after {FULL_TIMEOUT_S:.0f} s")
            await asyncio.sleep(PAUSE_S)

    async def _delete_snapshot(self) -> None:
        deadline_s = time.monotonic() + SPACE_TIMEOUT_S
        while True:
            try:
                await self._fleet.kube.delete(group(API_VERSION, SNAPSHOTS, SNAPSHOT))
                await self._fleet.kube.get(group(API_VERSION, SNAPSHOTS, SNAPSHOT))
            except NotFound:
                return
            except KubeError:  # the API server stands still
                pass
            if time.monotonic() > deadline_s:
                raise BenchError(f"snapshot {SNAPSHOT} is not gone after {SPACE_TIMEOUT_S:.0f} s")
            await asyncio.sleep(PAUSE_S)
