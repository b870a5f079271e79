"""The parts of the node image, each alone; that a node starts is shown by the tests in kind."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from tercet_e2e.errors import BinaryError
from tercet_e2e.kindimage import build, root
from tercet_e2e.kindimage.archive import Config, Tree, blob_path, digest_of, write_archive
from tercet_e2e.kindimage.components import Names, canonical, libraries


def load_podnet():
    spec = importlib.util.spec_from_file_location("podnet", build.files_dir() / "podnet.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["podnet"] = module
    spec.loader.exec_module(module)
    return module


def node(name: str, pods: str, *addresses: str) -> dict:
    found = [{"type": "InternalIP", "address": address} for address in addresses]
    found.append({"type": "Hostname", "address": name})
    spec = {"podCIDR": pods} if pods else {}
    return {"metadata": {"name": name}, "spec": spec, "status": {"addresses": found}}


def test_a_node_routes_to_the_pods_of_all_others_and_gives_addresses_of_its_own_range():
    nodes = [
        node("a", "10.0.0.0/24", "172.18.0.2", "fc00::2"),
        node("b", "10.0.1.0/24", "172.18.0.3"),
        node("c", "", "172.18.0.4"),
    ]
    plan = load_podnet().decide(nodes, "a", "10.0.0.0/16")
    assert plan.routes == (("10.0.1.0/24", "172.18.0.3"),)
    link = json.loads(plan.configuration)["plugins"][0]
    assert link["ipam"]["ranges"] == [[{"subnet": "10.0.0.0/24"}]]
    assert "ip saddr 10.0.0.0/16 ip daddr != 10.0.0.0/16 masquerade" in plan.packet_rules


def test_a_node_without_a_range_is_not_ready_yet():
    plan = load_podnet().decide([node("a", "", "172.18.0.2")], "a", "10.0.0.0/16")
    assert plan.configuration == ""


def test_an_archive_names_every_blob_by_its_digest_for_docker_and_for_containerd(tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    layer, target = tmp_path / "layer", tmp_path / "image.tar"
    tree = Tree(files={"/usr/bin/program": program}, links={"/bin": "usr/bin"}, folders={"/tmp"})
    tree.write(layer)
    write_archive(target, "a.test/b:v1", layer, Config(entrypoint=("/usr/bin/program",), user="1"))
    with tarfile.open(target) as archive:
        blobs = {entry.name: archive.extractfile(entry).read() for entry in archive}
    for name, blob in blobs.items():
        if name.startswith("blobs/"):
            (tmp_path / "blob").write_bytes(blob)
            assert blob_path(digest_of(tmp_path / "blob")) == name
    (docker,) = json.loads(blobs["manifest.json"])
    (described,) = json.loads(blobs["index.json"])["manifests"]
    manifest = json.loads(blobs[blob_path(described["digest"])])
    assert docker["RepoTags"] == [described["annotations"]["io.containerd.image.name"]]
    assert docker["Config"] == blob_path(manifest["config"]["digest"])
    assert docker["Layers"] == [blob_path(found["digest"]) for found in manifest["layers"]]
    config = json.loads(blobs[docker["Config"]])
    assert config["config"]["Entrypoint"] == ["/usr/bin/program"]
    assert config["config"]["User"] == "1"
    with tarfile.open(fileobj=io.BytesIO(blobs[docker["Layers"][0]])) as found:
        listed = {entry.name: entry for entry in found}
    assert listed["usr/bin/program"].mode == 0o755
    assert listed["bin"].linkname == "usr/bin"
    assert list(listed).index("usr/bin") < list(listed).index("usr/bin/program")


def test_the_names_of_images_are_what_kubeadm_says():
    names = Names.parse("a.test/etcd:3.6.5-0\na.test/coredns/coredns:v1.12.1\n")
    assert names["coredns"] == "a.test/coredns/coredns:v1.12.1"
    with pytest.raises(BinaryError, match="no image of pause"):
        names["pause"]
    with pytest.raises(BinaryError, match="not a name"):
        Names.parse("a warning\n")


def test_libraries_are_found_in_what_ldd_prints():
    listed = (
        "\tlinux-vdso.so.1 (0x00007ffc)\n"
        "\tlibnftnl.so.11 => /lib/x86_64-linux-gnu/libnftnl.so.11 (0x00007f1)\n"
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n"
    )
    assert {canonical(path) for path in libraries(listed)} == {
        "/usr/lib/x86_64-linux-gnu/libnftnl.so.11",
        "/usr/lib64/ld-linux-x86-64.so.2",
    }
    assert libraries("\tnot a dynamic executable\n") == set()


def test_debian_comes_from_where_this_machine_has_it(tmp_path):
    assert root.sources(tmp_path) == []
    (tmp_path / "sources.list").write_text("deb a b c\n")
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "other.list").write_text("deb x y z\n")
    assert root.sources(tmp_path) == [tmp_path / "sources.list"]
    (tmp_path / "sources.list.d" / "debian.sources").write_text("Types: deb\n")
    assert root.sources(tmp_path) == [tmp_path / "sources.list.d" / "debian.sources"]


def test_every_package_has_a_reason():
    listing = (build.files_dir() / "packages").read_text()
    assert all("#" in line for line in listing.splitlines())
    assert "containerd" in root.packages(listing)


def test_another_system_than_debian_is_told_to_pass_an_image(tmp_path: Path):
    release = tmp_path / "os-release"
    release.write_text("ID=other\nVERSION_CODENAME=x\n")
    with pytest.raises(BinaryError, match="pass an image"):
        root.suite(release)
    release.write_text("ID=debian\nVERSION_CODENAME=bookworm\n")
    assert root.suite(release) == "bookworm"
