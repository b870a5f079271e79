"""Models, names and what is generated from them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tercet_api import cel, rbac
from tercet_api.generate import (
    CHART,
    MANIFESTS,
    chart_files,
    chart_generated,
    differences,
    files,
    main,
    write,
)
from tercet_api.manifests import KINDS, Schema, object_schema
from tercet_api.names import CLONE_LABEL, clone_labels, host_id, host_nqn, is_uuid, volume_nqn
from tercet_api.objects import Attachment, Metadata, Volume, VolumePhase, VolumeSpec

GIB = 1 << 30


def test_json_names() -> None:
    """What kubectl shows is what the models read and write."""
    spec = VolumeSpec.model_validate(
        {"sizeBytes": GIB, "attachments": [{"nodeName": "w1", "hostNQN": "nqn.x"}]}
    )
    assert spec.attachments == [Attachment(node_name="w1", host_nqn="nqn.x")]
    assert spec.to_json()["attachments"][0] == {
        "nodeName": "w1",
        "hostNQN": "nqn.x",
        "readOnly": False,
    }
    made = Volume(metadata=Metadata(name="v"), spec=VolumeSpec(size_bytes=GIB)).manifest()
    assert made["metadata"] == {"name": "v"}
    assert "status" not in made
    assert made["spec"]["replicas"] == 3


def test_an_absent_status_reads_as_an_empty_one() -> None:
    """Nobody has to ask which of the two it is."""
    found = Volume.model_validate({"metadata": {"name": "v"}, "spec": {"sizeBytes": GIB}})
    assert found.status.replicas == []
    assert found.status.config is None
    assert not found.deleting


def test_deletion_needs_two_words() -> None:
    """The object's own deletionTimestamp and the operator's phase."""
    found = Volume.model_validate({"metadata": {"name": "v"}, "spec": {"sizeBytes": GIB}})
    found.status.phase = VolumePhase.DELETING
    assert not found.deletion_allowed
    found.metadata.deletion_timestamp = "2026-11-20T12:00:00Z"
    assert found.deletion_allowed
    found.status.phase = VolumePhase.READY
    assert not found.deletion_allowed


@pytest.mark.parametrize("size", [GIB + 1, 4096, (64 << 40) + 4096])
def test_impossible_sizes(size: int) -> None:
    """Whole blocks, within the limits."""
    with pytest.raises(ValidationError):
        VolumeSpec(size_bytes=size)


def test_names() -> None:
    """A host's names are the same at every start; an NQN is made of a UUID only."""
    assert host_nqn("w1") == f"nqn.2026-11.io.tercet:host:{host_id('w1')}"
    assert is_uuid(host_id("w1"))
    assert host_id("w1") != host_id("w2")
    assert not is_uuid(host_id("w1") + "\n")
    with pytest.raises(ValueError, match="no canonical UUID"):
        volume_nqn("ABC")


def test_a_clones_label_fits_whatever_the_volumes_name_is() -> None:
    """A volume's name has up to 253 characters, a label's value 63, alphanumeric at both ends."""
    assert clone_labels("pvc-1") == {CLONE_LABEL: "pvc-1"}
    assert clone_labels("a" * 62 + ".b")[CLONE_LABEL] == "a" * 62


def walk(schema: Schema) -> list[Schema]:
    """Every node of a schema."""
    below = [*schema.get("properties", {}).values()]
    below += [schema[key] for key in ("items", "additionalProperties") if key in schema]
    return [schema, *(each for node in below for each in walk(node))]


def test_everything_in_the_schemas_is_bounded() -> None:
    """Lists, strings and mappings have a maximum: CEL's cost and etcd's objects depend on it."""
    for kind in KINDS:
        properties = object_schema(kind)["properties"]
        for node in [*walk(properties["spec"]), *walk(properties["status"])]:
            if node["type"] == "array":
                assert "maxItems" in node
            if node["type"] == "string":
                assert "maxLength" in node or "enum" in node
            if "additionalProperties" in node:
                assert "maxProperties" in node
        assert not any("default" in node for node in walk(properties["status"]))


def test_committed_manifests_are_up_to_date(tmp_path: Path) -> None:
    """`make generate` was run; and the check sees it when it was not."""
    assert differences(MANIFESTS, files()) == []
    assert main([str(tmp_path)]) == 0
    assert main(["--check", str(tmp_path)]) == 0
    (tmp_path / "tercet.io_volumes.yaml").write_text("other")
    (tmp_path / "stray.yaml").write_text("")
    (tmp_path / "rbac" / "tercet.yaml").unlink()
    assert len(differences(tmp_path, files())) == 3
    assert main(["--check", str(tmp_path)]) == 1
    assert main([str(tmp_path)]) == 0
    assert differences(tmp_path, files()) == []


def test_the_charts_copies_are_up_to_date(tmp_path: Path) -> None:
    """Kinds and roles of the chart are those of the models; what is left over is seen."""
    wanted = chart_files()
    assert differences(CHART, wanted, chart_generated(CHART)) == []
    write(tmp_path, wanted, ())
    (tmp_path / "files/crds/tercet.io_volumes.yaml").write_text("other")
    (tmp_path / "files/crds/stray.yaml").write_text("")
    (tmp_path / "templates/rbac.yaml").unlink()
    assert len(differences(tmp_path, wanted, chart_generated(tmp_path))) == 3
    write(tmp_path, wanted, chart_generated(tmp_path))
    assert differences(tmp_path, wanted, chart_generated(tmp_path)) == []


def test_a_chart_may_be_installed_into_any_namespace() -> None:
    """No role of the chart names a namespace of its own but the one of the cluster's id."""
    text = chart_files()["templates/rbac.yaml"]
    namespaces = {line.strip() for line in text.splitlines() if "namespace:" in line}
    assert namespaces == {"namespace: {{ $.Release.Namespace }}"}
    assert "tercet-system" not in text


def test_rules_say_what_is_wrong() -> None:
    """Each rule has a message a person can act on, and none stands twice."""
    for rules in (cel.VOLUME_RULES, cel.CONFIG_RULES, cel.VOLUME_SPEC_RULES, cel.DEVICE_RULES):
        assert len({rule.rule for rule in rules}) == len(rules)
        assert all(len(rule.message) > 10 for rule in rules)


def test_only_the_operator_reads_the_cas_key() -> None:
    """No other account has any rule on secrets, and it only on that one."""
    for account, rules in {**rbac.CLUSTER_RULES, **rbac.NAMESPACE_RULES}.items():
        secret = [rule for rule in rules if "secrets" in rule["resources"]]
        assert not secret or account == rbac.OPERATOR
    reads = [r for r in rbac.NAMESPACE_RULES[rbac.OPERATOR] if "get" in r["verbs"]]
    assert [r["resourceNames"] for r in reads if "secrets" in r["resources"]] == [["tercet-ca"]]


def test_importing_the_package_imports_no_client() -> None:
    """The csi node must stay small."""
    code = (
        "import sys, tercet_api, tercet_api.objects, tercet_api.names, tercet_api.config, "
        "tercet_api.manifests, tercet_api.rbac\n"
        "sys.exit(any(name.split('.')[0] in {'kubernetes', 'aiohttp'} for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
