"""A CSI driver to test the cluster without Tercet: a volume is an image file under a loop device.

Run as a process: `imagedriver.py --socket PATH --images DIR [--node NAME]`; with a node it is the
node service, without one the controller. Real file systems, loop devices and mounts, so that what
the kubelet stand-in and the clean-up do to them can be seen. Not shown by it: anything of Tercet.
"""

# ruff: noqa: N802 - the names are the protocol's
from __future__ import annotations

import argparse
import shutil
import subprocess
from concurrent import futures
from pathlib import Path

import grpc

from tercet_csi.v1 import csi_pb2 as csi
from tercet_csi.v1 import csi_pb2_grpc as rpc

DRIVER = "images.example.test"
ZONE = "images.example.test/node"


def run(*command: object) -> str:
    texts = [str(part) for part in command]
    return subprocess.run(texts, check=True, capture_output=True, text=True).stdout.strip()


def loop_of(image: Path) -> str:
    return run("losetup", "--associated", image, "--output", "NAME", "--noheadings").strip()


def is_mounted(path: Path) -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in lines)


class Identity(rpc.IdentityServicer):
    def GetPluginInfo(self, request, context):
        return csi.GetPluginInfoResponse(name=DRIVER, vendor_version="1")

    def GetPluginCapabilities(self, request, context):
        kinds = csi.PluginCapability.Service
        return csi.GetPluginCapabilitiesResponse(
            capabilities=[
                csi.PluginCapability(service=kinds(type=kinds.CONTROLLER_SERVICE)),
                csi.PluginCapability(
                    volume_expansion=csi.PluginCapability.VolumeExpansion(
                        type=csi.PluginCapability.VolumeExpansion.ONLINE
                    )
                ),
            ]
        )

    def Probe(self, request, context):
        return csi.ProbeResponse()


class Controller(rpc.ControllerServicer):
    def __init__(self, images: Path) -> None:
        self.images = images

    def ControllerGetCapabilities(self, request, context):
        kinds = csi.ControllerServiceCapability.RPC
        types = [
            kinds.CREATE_DELETE_VOLUME,
            kinds.PUBLISH_UNPUBLISH_VOLUME,
            kinds.CREATE_DELETE_SNAPSHOT,
            kinds.EXPAND_VOLUME,
        ]
        return csi.ControllerGetCapabilitiesResponse(
            capabilities=[csi.ControllerServiceCapability(rpc=kinds(type=t)) for t in types]
        )

    def CreateVolume(self, request, context):
        image = self.images / request.name
        size = request.capacity_range.required_bytes
        source = request.volume_content_source
        if not image.exists():
            if source.snapshot.snapshot_id:
                shutil.copyfile(self.images / source.snapshot.snapshot_id, image)
            with image.open("ab") as handle:
                handle.truncate(size)
        volume = csi.Volume(volume_id=request.name, capacity_bytes=size)
        if source.snapshot.snapshot_id:
            volume.content_source.CopyFrom(source)
        return csi.CreateVolumeResponse(volume=volume)

    def DeleteVolume(self, request, context):
        (self.images / request.volume_id).unlink(missing_ok=True)
        return csi.DeleteVolumeResponse()

    def ControllerPublishVolume(self, request, context):
        path = str(self.images / request.volume_id)
        return csi.ControllerPublishVolumeResponse(publish_context={"image": path})

    def ControllerUnpublishVolume(self, request, context):
        if loop_of(self.images / request.volume_id):
            context.abort(grpc.StatusCode.INTERNAL, "detached below a mounted volume")
        return csi.ControllerUnpublishVolumeResponse()

    def CreateSnapshot(self, request, context):
        target = self.images / request.name
        run("sync")
        shutil.copyfile(self.images / request.source_volume_id, target)
        snapshot = csi.Snapshot(
            snapshot_id=request.name,
            source_volume_id=request.source_volume_id,
            size_bytes=target.stat().st_size,
            ready_to_use=True,
        )
        snapshot.creation_time.GetCurrentTime()
        return csi.CreateSnapshotResponse(snapshot=snapshot)

    def DeleteSnapshot(self, request, context):
        (self.images / request.snapshot_id).unlink(missing_ok=True)
        return csi.DeleteSnapshotResponse()

    def ControllerExpandVolume(self, request, context):
        size = request.capacity_range.required_bytes
        with (self.images / request.volume_id).open("ab") as handle:
            handle.truncate(size)
        return csi.ControllerExpandVolumeResponse(capacity_bytes=size, node_expansion_required=True)


class Node(rpc.NodeServicer):
    def __init__(self, images: Path, node: str) -> None:
        self.images = images
        self.node = node

    def NodeGetCapabilities(self, request, context):
        kinds = csi.NodeServiceCapability.RPC
        types = [kinds.STAGE_UNSTAGE_VOLUME, kinds.EXPAND_VOLUME]
        return csi.NodeGetCapabilitiesResponse(
            capabilities=[csi.NodeServiceCapability(rpc=kinds(type=t)) for t in types]
        )

    def NodeGetInfo(self, request, context):
        topology = csi.Topology(segments={ZONE: self.node})
        return csi.NodeGetInfoResponse(node_id=self.node, accessible_topology=topology)

    def NodeStageVolume(self, request, context):
        image = Path(request.publish_context["image"])
        loop = loop_of(image) or run("losetup", "--find", "--show", image)
        if request.volume_capability.HasField("block"):
            return csi.NodeStageVolumeResponse()
        if subprocess.run(["blkid", loop], check=False, capture_output=True).returncode != 0:
            run("mkfs.ext4", "-q", loop)
        if not is_mounted(Path(request.staging_target_path)):
            run("mount", loop, request.staging_target_path)
        return csi.NodeStageVolumeResponse()

    def NodeUnstageVolume(self, request, context):
        if is_mounted(Path(request.staging_target_path)):
            run("umount", request.staging_target_path)
        loop = loop_of(self.images / request.volume_id)
        if loop:
            run("losetup", "--detach", loop)
        return csi.NodeUnstageVolumeResponse()

    def NodePublishVolume(self, request, context):
        target = Path(request.target_path)
        if is_mounted(target):
            return csi.NodePublishVolumeResponse()
        if request.volume_capability.HasField("block"):
            target.touch()
            run("mount", "--bind", loop_of(self.images / request.volume_id), target)
        else:
            target.mkdir(exist_ok=True)
            run("mount", "--bind", request.staging_target_path, target)
            if request.readonly:
                run("mount", "-o", "remount,bind,ro", target)
        return csi.NodePublishVolumeResponse()

    def NodeUnpublishVolume(self, request, context):
        target = Path(request.target_path)
        if is_mounted(target):
            run("umount", target)
        if target.is_dir():
            target.rmdir()
        else:
            target.unlink(missing_ok=True)
        return csi.NodeUnpublishVolumeResponse()

    def NodeExpandVolume(self, request, context):
        loop = loop_of(self.images / request.volume_id)
        run("losetup", "--set-capacity", loop)
        if not request.volume_capability.HasField("block"):
            run("resize2fs", loop)
        return csi.NodeExpandVolumeResponse(capacity_bytes=request.capacity_range.required_bytes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--node")
    arguments = parser.parse_args()
    arguments.images.mkdir(exist_ok=True)
    arguments.socket.unlink(missing_ok=True)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    rpc.add_IdentityServicer_to_server(Identity(), server)
    if arguments.node:
        rpc.add_NodeServicer_to_server(Node(arguments.images, arguments.node), server)
    else:
        rpc.add_ControllerServicer_to_server(Controller(arguments.images), server)
    server.add_insecure_port(f"unix:{arguments.socket}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
