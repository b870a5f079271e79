"""csi-sanity against the driver on a whole cluster, with mounts and with block devices.

It asks the real controller and the real node service, so that behind each answer are an API server,
the operator, agents and engines. Nothing may fail, and nothing may be left out but what the driver
does not claim to do: each reason is checked against what it claims.
"""

import shutil
import tempfile
import time
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio
from rich import print as show

from tercet_csi.v1 import csi_pb2 as csi
from tercet_csi.v1 import csi_pb2_grpc
from tercet_e2e.binaries import Binaries
from tercet_e2e.evidence import record
from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster
from tercet_e2e.sanity import Access, Spec, Verdict, judge
from tercet_e2e.story.leftovers import leftovers

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

NODE = "node-1"
VOLUMES_MAX = 2
"""So few that csi-sanity fills the node, and is told that it is full."""
RUN_MIN = 80
"""Specs that v5.6.0 asks a driver with our capabilities; fewer: it has not asked what it should."""

# Why csi-sanity leaves a spec out, and the claim whose absence makes that right.
LEFT_OUT = {
    "GroupControllerService not supported": "GROUP_CONTROLLER_SERVICE",
    "Modify volume not supported": "MODIFY_VOLUME",
    "Modify Volume not supported": "MODIFY_VOLUME",
    "ControllerModifyVolume not supported": "MODIFY_VOLUME",
    "SNAPSHOT_ACCESSIBILITY_CONSTRAINTS not supported": "SNAPSHOT_ACCESSIBILITY_CONSTRAINTS",
    "ControllerGetVolumeHealth not supported": "GET_VOLUME_HEALTH",
    "ControllerListVolumeHealth not supported": "LIST_VOLUME_HEALTH",
    "NodeGetVolumeHealth not supported": "GET_VOLUME_HEALTH",
    "NodeGetStorageHealth not supported": "GET_STORAGE_HEALTH",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    """Three storage nodes, Ready, that take few volumes each."""
    root = Path(tempfile.mkdtemp(prefix="te-"))
    async with LocalCluster(root, volumes_max=VOLUMES_MAX) as found:
        await found.wait_ready()
        yield found
    assert leftovers(root) == []
    shutil.rmtree(root)


async def claims(cluster: LocalCluster) -> set[str]:
    """Names of everything that both services say they can do."""
    node = f"unix:{cluster.nodes[NODE].driver_socket}"
    async with (
        grpc.aio.insecure_channel(node) as to_node,
        grpc.aio.insecure_channel(f"unix:{cluster.controller_socket}") as to_controller,
    ):
        plugin = await csi_pb2_grpc.IdentityStub(to_node).GetPluginCapabilities(
            csi.GetPluginCapabilitiesRequest()
        )
        controller = await csi_pb2_grpc.ControllerStub(to_controller).ControllerGetCapabilities(
            csi.ControllerGetCapabilitiesRequest()
        )
        nodes = await csi_pb2_grpc.NodeStub(to_node).NodeGetCapabilities(
            csi.NodeGetCapabilitiesRequest()
        )
    found = {csi.PluginCapability.Service.Type.Name(c.service.type) for c in plugin.capabilities}
    for kind, answer in (
        (csi.ControllerServiceCapability, controller),
        (csi.NodeServiceCapability, nodes),
    ):
        found |= {kind.RPC.Type.Name(c.rpc.type) for c in answer.capabilities}
    return found


def wrongly_left_out(verdict: Verdict, claimed: set[str]) -> list[Spec]:
    """Skipped for a reason that we do not know, or although the driver claims that it can."""
    return [
        spec
        for spec in verdict.of("skipped")
        if LEFT_OUT.get(spec.message) is None or LEFT_OUT[spec.message] in claimed
    ]


def told(specs: list[Spec]) -> str:
    return "\n".join(f"{spec.state} {spec.name}\n    {spec.message}" for spec in specs)


@pytest.mark.parametrize("access", ["mount", "block"])
async def test_the_judge_finds_no_fault(cluster: LocalCluster, access: Access):
    program = Binaries.default().ensure(["csi-sanity"])["csi-sanity"]
    started_s = time.monotonic()
    verdict = await judge(
        program,
        cluster.nodes[NODE].driver_socket,
        cluster.controller_socket,
        access,
        cluster.state.root / access,
    )
    seconds = time.monotonic() - started_s
    claimed = await claims(cluster)
    wrong = wrongly_left_out(verdict, claimed)
    passed, skipped = len(verdict.of("passed")), len(verdict.of("skipped"))
    show(
        f"csi-sanity, {access}: {len(verdict.run)} run, {passed} passed, {len(verdict.failed)} "
        f"failed, {skipped} skipped in {seconds:.0f} s"
    )
    record(f"csi-sanity, {access}: specs run", len(verdict.run), len(verdict.failed), seconds)
    record(f"csi-sanity, {access}: specs passed", passed, 0, seconds)
    record(f"csi-sanity, {access}: skipped, not claimed", skipped, len(wrong), seconds)
    assert not verdict.failed, told(verdict.failed)
    assert not wrong, told(wrong)
    assert passed >= RUN_MIN
    # It has deleted all that it made, and that is really gone.
    kubectl = Kubectl(cluster.kubectl)
    assert await kubectl.list("tvol") == []
    assert await kubectl.list("tsnap") == []
