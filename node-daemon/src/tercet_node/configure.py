"""What the engine is told of itself and its peers, out of the StorageNode objects (pure)."""

from __future__ import annotations

from collections.abc import Iterable

from tercet_api.objects import Device, StorageNode
from tercet_node.members.sight import Sight
from tercet_node.protos import engine_pb2 as pb


def request(
    own: StorageNode,
    nodes: Iterable[StorageNode],
    cluster_id: str,
    membership: Sight | None = None,
) -> pb.ConfigureRequest:
    """The Configure call for this node: own address, ports and devices, everyone else as a peer."""
    peers = [
        pb.Peer(
            node=node.name,
            address=_address(node, membership),
            replication_port=node.spec.ports.replication,
        )
        for node in sorted(nodes, key=lambda node: node.name)
        if node.name != own.name
    ]
    ports = own.spec.ports
    return pb.ConfigureRequest(
        node=own.name,
        cluster_id=cluster_id,
        address=own.spec.address,
        ports=pb.Ports(
            nvme_tcp=ports.nvme_tcp, discovery=ports.discovery, replication=ports.replication
        ),
        devices=[_device(device) for device in own.spec.devices],
        peers=peers,
        link_security=pb.LINK_SECURITY_PLAIN,
    )


def _address(node: StorageNode, membership: Sight | None) -> str:
    """Where a peer is: by the list, where the operator's word in it is newer than the object's.

    The object is as old as the last word of the API server, which may be away from just this node.
    """
    found = None if membership is None else membership.address(node.uid)
    if found is None:
        return node.spec.address
    address, incarnation = found
    enrolled = node.status.enrolment
    newer = enrolled is not None and incarnation > enrolled.incarnation
    return address if newer else node.spec.address


def _device(device: Device) -> pb.Device:
    if device.file is not None:
        source = pb.FileDevice(path=device.file.path, capacity_bytes=device.file.capacity_bytes)
        return pb.Device(id=device.id, file=source)
    if device.path is not None:
        return pb.Device(id=device.id, path=device.path)
    return pb.Device(id=device.id, nguid=device.nguid or "")
