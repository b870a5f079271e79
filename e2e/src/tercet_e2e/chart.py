"""`python -m tercet_e2e chart`: whether the chart is sound, without a cluster or a network.

Helm's own lint; every object of every set of values in `charts/tercet/ci` against the schemas of
the pinned Kubernetes (kubeconform, strict: an unknown field is an error), which are made of the
OpenAPI file that the Kubernetes module carries; the suites of helm-unittest in
`charts/tercet/tests`; and rules that concern all objects together, below.

What a real API server says of the objects is left to the tests on clusters.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tercet_e2e.binaries import KUBERNETES, Binaries, module_file
from tercet_e2e.errors import BinaryError
from tercet_e2e.objects import snapshot_crds
from tercet_e2e.openapi import Kind, custom_schemas, schemas

Json = dict[str, Any]
CHART = Path("charts/tercet")
NAMESPACE = "some-namespace"
SNAPSHOT_API = "snapshot.storage.k8s.io/v1"
TIMEOUT_S = 120.0
PRIVILEGED = frozenset({"engine", "attacher", "csi-node", "load-modules"})
"""Containers that move blocks, by name; all others have no privilege at all."""
ROOT = PRIVILEGED | {"wipe"}
HOST_NETWORK = frozenset({"node", "csi-node", "attacher"})
"""Components (label app.kubernetes.io/component) that live at their node's address."""


def rendered(helm: Path, chart: Path, values: Path, *, snapshots: bool) -> str:
    """What Helm makes of the chart. Raises BinaryError with its message."""
    command = [helm, "template", "tercet", chart, "--namespace", NAMESPACE, "--values", values]
    command += ["--kube-version", KUBERNETES]
    command += ["--api-versions", SNAPSHOT_API] if snapshots else []
    done = _run([str(part) for part in command])
    if done.returncode != 0:
        raise BinaryError(f"helm template with {values.name}: {done.stderr.strip()}")
    return done.stdout


def documents(text: str) -> list[Json]:
    """The objects of a rendered chart, and what they carry as text: manifests in ConfigMaps."""
    found = [item for item in yaml.safe_load_all(text) if item]
    carried = [
        yaml.safe_load(value)
        for item in found
        if item["kind"] == "ConfigMap"
        for key, value in item["data"].items()
        if key.endswith(".yaml")
    ]
    return found + carried


def violations(items: Sequence[Json]) -> list[str]:
    """What breaks the rules that concern all objects together, one line each."""
    found = []
    accounts = {i["metadata"]["name"] for i in items if i["kind"] == "ServiceAccount"}
    for item in items:
        where = f"{item['kind']} {item['metadata']['name']}"
        labelled = "app.kubernetes.io/instance" in item["metadata"].get("labels", {})
        if not labelled and item["kind"] != "CustomResourceDefinition":
            found.append(f"{where}: it does not carry the chart's labels")
        for pod, labels in pods(item):
            found += [f"{where}: {line}" for line in _pod(pod, labels, accounts)]
    return found


def pods(item: Json) -> Iterator[tuple[Json, Mapping[str, str]]]:
    """The pods that an object is or makes, each with its labels."""
    if item["kind"] == "Pod":
        yield item["spec"], item["metadata"]["labels"]
    elif item["kind"] in {"Deployment", "DaemonSet", "Job"}:
        template = item["spec"]["template"]
        yield template["spec"], template["metadata"]["labels"]


def _pod(pod: Json, labels: Mapping[str, str], accounts: set[str]) -> Iterator[str]:
    component = labels.get("app.kubernetes.io/component")
    if pod.get("hostNetwork", False) != (component in HOST_NETWORK):
        yield f"hostNetwork does not befit {component}"
    if pod.get("hostPID") or pod.get("hostIPC"):
        yield "shares the host's processes"
    account = pod.get("serviceAccountName")
    if account not in accounts and pod.get("automountServiceAccountToken") is not False:
        yield f"there is no service account {account}"
    containers = [*pod.get("initContainers", ()), *pod["containers"]]
    for container in containers:
        yield from (f"container {container['name']}: {line}" for line in _container(container))


def _container(container: Json) -> Iterator[str]:
    name, context = container["name"], container.get("securityContext", {})
    if context.get("privileged", False) != (name in PRIVILEGED):
        yield "it may not be privileged" if name not in PRIVILEGED else "it has to be privileged"
    if not context.get("readOnlyRootFilesystem"):
        yield "its root file system can be written"
    if name not in PRIVILEGED and context.get("allowPrivilegeEscalation", True):
        yield "it may gain privileges"
    if name not in PRIVILEGED and "ALL" not in context.get("capabilities", {}).get("drop", []):
        yield "it keeps capabilities"
    if name not in ROOT and not context.get("runAsNonRoot"):
        yield "it may run as root"
    for flag in _flags(container):
        if "$(" in flag:
            variable = flag.split("$(")[1].split(")")[0]
            if variable not in {entry["name"] for entry in container.get("env", ())}:
                yield f"{flag}: no variable {variable}"


def _flags(container: Json) -> list[str]:
    return [*container.get("command", ()), *container.get("args", ())]


def check(root: Path) -> int:
    """Check the chart below root; prints what is wrong. Returns the exit code."""
    tools = Binaries.default().ensure(["helm", "kubeconform", "helm-unittest"])
    chart = root / CHART
    sets = sorted((chart / "ci").glob("*-values.yaml"))
    spec, custom = kubernetes_openapi(), custom_schemas(snapshot_crds())
    wrong = []
    count = 0
    for values in sets:
        wrong += _lint(tools["helm"], chart, values)
        for snapshots in (True, False):
            if not snapshots and _wants_snapshots(values):
                continue  # refused, as a suite shows
            text = rendered(tools["helm"], chart, values, snapshots=snapshots)
            items = documents(text)
            count += len(items)
            wrong += [f"{values.name}: {line}" for line in violations(items)]
            known = custom | schemas(spec, {(i["apiVersion"], i["kind"]) for i in items})
            found = conform(tools["kubeconform"], items, known)
            wrong += [f"{values.name}: {line}" for line in found]
    wrong += _suites(tools["helm-unittest"], chart)
    for line in wrong:
        print(line, file=sys.stderr)
    if not wrong:
        print(f"chart: {count} objects of {len(sets)} sets of values are sound")
    return 1 if wrong else 0


def _wants_snapshots(values: Path) -> bool:
    given = yaml.safe_load(values.read_text()) or {}
    return bool(given.get("snapshotController", {}).get("enabled"))


def kubernetes_openapi() -> Json:
    """The OpenAPI file of the pinned Kubernetes."""
    path = "api/openapi-spec/swagger.json"
    spec: Json = json.loads(module_file("k8s.io/kubernetes", KUBERNETES, path).read_text())
    return spec


def conform(kubeconform: Path, items: Sequence[Json], known: Mapping[Kind, Json]) -> list[str]:
    """What kubeconform says of objects whose kinds have these schemas."""
    with tempfile.TemporaryDirectory(prefix="tercet-chart-") as folder:
        for (version, kind), schema in known.items():
            # kubeconform takes the version for the group where there is none.
            path = Path(folder, version.split("/")[0], version.split("/")[-1])
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{kind.lower()}.json").write_text(json.dumps(schema))
        location = f"{folder}/{{{{.Group}}}}/{{{{.ResourceAPIVersion}}}}/{{{{.ResourceKind}}}}.json"
        command = [str(kubeconform), "-strict", "-schema-location", location]
        done = _run(command, "\n---\n".join(json.dumps(item) for item in items))
    return done.stdout.splitlines() + done.stderr.splitlines() if done.returncode else []


def _lint(helm: Path, chart: Path, values: Path) -> list[str]:
    command = [helm, "lint", chart, "--strict", "--values", values, "--kube-version", KUBERNETES]
    done = _run([*(str(part) for part in command), "--namespace", NAMESPACE])
    return [f"helm lint with {values.name}:\n{done.stdout}{done.stderr}"] if done.returncode else []


def _suites(unittest: Path, chart: Path) -> list[str]:
    done = _run([str(unittest), "--strict", str(chart)])
    return [f"helm unittest:\n{done.stdout}{done.stderr}"] if done.returncode else []


def _run(command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
