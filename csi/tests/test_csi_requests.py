"""Requests are checked at the edge: what is refused, with which code, and what it says."""

import pytest

from tercet_csi.capabilities import read_access
from tercet_csi.controller.naming import is_object_name, object_name
from tercet_csi.controller.parameters import read_parameters, size_bytes
from tercet_csi.errors import InvalidArgument, OutOfRange
from tercet_csi.node.targets import Target
from tercet_csi.v1 import csi_pb2 as csi

MIB = 1024**2


def test_an_unknown_parameter_is_named():
    with pytest.raises(InvalidArgument, match="'replica' is unknown; known are replicas"):
        read_parameters({"replica": "2"})


def test_what_the_provisioner_adds_is_no_parameter_of_ours():
    assert read_parameters({"csi.storage.k8s.io/pvc/name": "a", "replicas": "2"}).replicas == 2


@pytest.mark.parametrize("value", ["0", "4", "-1", "three", ""])
def test_impossible_replicas_are_refused(value: str):
    with pytest.raises(InvalidArgument, match="replicas"):
        read_parameters({"replicas": value})


@pytest.mark.parametrize(
    ("required", "limit", "size"),
    [
        (0, 0, 1024 * MIB),
        (1, 0, 4 * MIB),
        (4 * MIB + 1, 0, 8 * MIB),
        (0, 16 * MIB, 16 * MIB),
        (8 * MIB, 8 * MIB, 8 * MIB),
    ],
)
def test_sizes_are_rounded_up_within_the_limit(required: int, limit: int, size: int):
    assert size_bytes(csi.CapacityRange(required_bytes=required, limit_bytes=limit)) == size


@pytest.mark.parametrize(
    ("required", "limit"), [(-1, 0), (2**60, 0), (4 * MIB + 1, 5 * MIB), (0, 1)]
)
def test_sizes_that_no_volume_can_have(required: int, limit: int):
    with pytest.raises(OutOfRange):
        size_bytes(csi.CapacityRange(required_bytes=required, limit_bytes=limit))


def test_names_become_object_names_always_the_same():
    assert object_name("pvc-1") == "pvc-1"
    odd = object_name("Ünüsual / name" + "x" * 100)
    assert odd == object_name("Ünüsual / name" + "x" * 100)
    assert len(odd) <= 63
    assert object_name("pvc-1\n") != object_name("pvc-1")


def test_names_have_up_to_128_bytes():
    names = {object_name("x" * 128), object_name("\u00fc" * 64), object_name("\U0001f600" * 32)}
    assert len(names) == 3
    assert all(is_object_name(name) for name in names)
    for long in ("x" * 129, "\u00fc" * 65):
        with pytest.raises(InvalidArgument, match="at most 128"):
            object_name(long)


@pytest.mark.parametrize("banned", ["\0", "\x08", "\x0b", "\x0c", "\x1f", "\x7f", "\x9f"])
def test_control_characters_are_no_name(banned: str):
    with pytest.raises(InvalidArgument, match=r"U\+00"):
        object_name(f"pvc{banned}1")
    assert object_name("pvc\t1\r\n")


def test_a_name_like_those_that_are_made_here_meets_none_of_them():
    ours = object_name("A name")
    assert object_name(ours) != ours
    assert object_name("clone-0b0c0d0e").startswith("csi-")


def test_many_writers_on_many_nodes_are_refused():
    mode = csi.VolumeCapability.AccessMode(
        mode=csi.VolumeCapability.AccessMode.MULTI_NODE_MULTI_WRITER
    )
    wish = csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=mode)
    with pytest.raises(InvalidArgument, match="one node at a time"):
        read_access(wish)


@pytest.mark.parametrize("endpoints", ["", "host", "host:port"])
def test_a_garbled_publish_context_is_refused(endpoints: str):
    with pytest.raises(InvalidArgument, match="publish_context"):
        Target.from_context({"nqn": "a", "hostNqn": "b", "hostId": "c", "endpoints": endpoints})
