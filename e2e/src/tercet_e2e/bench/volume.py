"""A volume for the benchmark and the load on it: tercet-attach's own host, without FUSE.

The volume is an object made by hand, written once over so that reads find data, and loaded from
this machine as the host `bench`. Host, load and all three replicas share the machine's cores.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import dataclass

from tercet_api.names import API_VERSION, host_id, host_nqn, volume_nqn
from tercet_e2e.bench.cases import Case
from tercet_e2e.bench.floor import BenchError
from tercet_e2e.kubectl import Json, Kubectl
from tercet_e2e.local import is_ready

NAME = "bench"
SIZE_BYTES = 1 << 30
READY_TIMEOUT_S = 60.0
RUN_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Volume:
    """A volume that is Ready and lets the host `bench` in."""

    nqn: str
    endpoints: tuple[str, ...]

    def command(self, case: Case, seconds: int) -> list[str]:
        """The arguments of tercet-attach for one run."""
        arguments = ["bench", "--nqn", self.nqn, "--rw", case.access]
        for endpoint in self.endpoints:
            arguments += ["--endpoint", endpoint]
        arguments += ["--host-nqn", host_nqn(NAME), "--host-id", host_id(NAME)]
        arguments += ["--depth", str(case.depth), "--block-bytes", str(case.block_bytes)]
        arguments += ["--seconds", str(seconds), "--span-bytes", str(SIZE_BYTES)]
        return arguments + (["--random"] if case.random else [])


def manifest() -> Json:
    """The Volume object."""
    host = {"nodeName": "node-1", "hostNQN": host_nqn(NAME)}
    return {
        "apiVersion": API_VERSION,
        "kind": "Volume",
        "metadata": {"name": NAME},
        "spec": {
            "uuid": str(uuid.uuid4()),
            "sizeBytes": SIZE_BYTES,
            "replicas": 3,
            "attachments": [host],
        },
    }


async def make(kubectl: Kubectl) -> Volume:
    """Make the volume and wait until it is Ready."""
    made = manifest()
    await kubectl.apply(made)
    found = await kubectl.until("tvol", NAME, is_ready, READY_TIMEOUT_S, "is Ready")
    endpoints = tuple(f"{e['address']}:{e['port']}" for e in found["status"]["endpoints"])
    return Volume(volume_nqn(made["spec"]["uuid"]), endpoints)


async def remove(kubectl: Kubectl) -> None:
    """Shut the host out and delete the volume."""
    patch = json.dumps({"spec": {"attachments": []}})
    await kubectl.run("patch", "tvol", NAME, "--type=merge", "-p", patch)
    await kubectl.delete("tvol", NAME)


async def load(program: str, volume: Volume, case: Case, seconds: int) -> float:
    """One run; the figure that the case measures. Raises BenchError."""
    process = await asyncio.create_subprocess_exec(
        program,
        *volume.command(case, seconds),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, error = await asyncio.wait_for(process.communicate(), RUN_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        raise BenchError(f"{case.name}: no end after {RUN_TIMEOUT_S:.0f} s") from None
    if process.returncode != 0:
        raise BenchError(f"{case.name}: {error.decode().strip()[-500:]}")
    figures = json.loads(out)
    if figures["errors"]:
        raise BenchError(f"{case.name}: {figures['errors']} operations failed")
    if case.measure == "mib_per_s":
        return float(figures["bytes_per_second"]) / (1 << 20)
    return float(figures[case.measure])
