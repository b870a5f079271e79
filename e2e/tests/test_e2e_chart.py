"""The checks of the chart see what they are there for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from tercet_e2e.binaries import TOOLS, Binaries
from tercet_e2e.chart import conform, documents, kubernetes_openapi, pods, rendered, violations
from tercet_e2e.images import base_packages, own_names, sidecar_names
from tercet_e2e.openapi import custom_schemas, schemas, strict

ROOT = Path(__file__).parents[2]
LABELS = {"app.kubernetes.io/instance": "t", "app.kubernetes.io/component": "operator"}
CONTAINER = {
    "name": "operator",
    "image": "i",
    "args": ["--namespace=$(N)"],
    "env": [{"name": "N", "value": "n"}],
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    },
}
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "p", "labels": LABELS},
    "spec": {"serviceAccountName": "a", "containers": [CONTAINER]},
}
ACCOUNT = {"kind": "ServiceAccount", "metadata": {"name": "a", "labels": LABELS}}


def changed(path: str, value: object) -> list[dict]:
    """The pod with one member set (None: taken away), and its account."""
    pod = copy.deepcopy(POD)
    node = pod
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if part.isdecimal() else node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return [ACCOUNT, pod]


def test_a_pod_without_privileges_is_fine():
    assert violations([ACCOUNT, POD]) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.containers.0.securityContext.privileged", True, "may not be privileged"),
        ("spec.containers.0.securityContext.readOnlyRootFilesystem", False, "can be written"),
        ("spec.containers.0.securityContext.allowPrivilegeEscalation", None, "gain privileges"),
        ("spec.containers.0.securityContext.runAsNonRoot", None, "may run as root"),
        ("spec.containers.0.securityContext.capabilities", {"drop": ["KILL"]}, "capabilities"),
        ("spec.containers.0.env", [], "no variable N"),
        ("spec.containers.0.name", "engine", "has to be privileged"),
        ("spec.hostNetwork", True, "hostNetwork"),
        ("spec.hostPID", True, "processes"),
        ("spec.serviceAccountName", "b", "no service account b"),
        ("metadata.labels", {"app.kubernetes.io/component": "operator"}, "labels"),
    ],
)
def test_each_rule_is_seen_to_be_broken(path, value, said):
    (line,) = violations(changed(path, value))
    assert said in line


def test_what_a_config_map_carries_is_looked_at_too():
    carried = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\n"
    text = (
        "kind: ConfigMap\nmetadata: {name: c}\ndata:\n  node.json: '{}'\n  wipe.yaml: |\n"
        + "".join(f"    {line}\n" for line in carried.splitlines())
    )
    assert [item["kind"] for item in documents(text)] == ["ConfigMap", "Secret"]


def test_named_properties_leave_no_room_for_others():
    schema = {
        "type": "object",
        "properties": {
            "properties": {"type": "object", "additionalProperties": {"type": "string"}},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "inner": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
    made = strict(schema)
    assert made["additionalProperties"] is False
    assert made["properties"]["inner"]["additionalProperties"] is False
    assert made["properties"]["properties"] == schema["properties"]["properties"]
    assert "additionalProperties" not in made["properties"]["free"]


def test_a_custom_kind_has_its_definitions_schema():
    crd = {
        "spec": {
            "group": "example.org",
            "names": {"kind": "Thing"},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": {"properties": {}}}}],
        }
    }
    assert list(custom_schemas([crd])) == [("example.org/v1", "Thing")]


@pytest.mark.local
def test_kubeconform_refuses_what_an_api_server_would():
    kubeconform = Binaries.default().ensure(["kubeconform"])["kubeconform"]
    known = schemas(kubernetes_openapi(), {("v1", "Pod")})
    assert conform(kubeconform, [POD], known) == []
    for path, value, said in (
        ("spec.containers.0.imagePullPolice", "Always", "imagePullPolice"),
        ("spec.containers.0.securityContext.runAsUser", "root", "runAsUser"),
        ("spec.containers", None, "containers"),
        ("kind", "Pot", "Pot"),
    ):
        _, pod = changed(path, value)
        lines = conform(kubeconform, [pod], known)
        assert any(said in line for line in lines), (path, lines)


@pytest.mark.local
def test_every_image_of_the_chart_can_be_made_here():
    own, sidecars = own_names(ROOT), sidecar_names(ROOT)
    made = {*own.values(), *sidecars.values()}
    values = ROOT / "charts/tercet/ci/default-values.yaml"
    helm = Binaries.default().ensure(["helm"])["helm"]
    items = documents(rendered(helm, ROOT / "charts/tercet", values, snapshots=True))
    named = {
        container["image"]
        for item in items
        for pod, _ in pods(item)
        for container in [*pod.get("initContainers", ()), *pod["containers"]]
    }
    assert named
    assert named <= made
    assert set(sidecars) <= set(TOOLS)


def test_a_base_has_the_packages_of_all_images():
    listing = (ROOT / "images/packages").read_text()
    assert {"python3", "python3-venv", "e2fsprogs", "xfsprogs"} <= set(base_packages(listing))
