"""The chart on a real API server: accepted strictly, upgraded, and gone again with its traces.

No kubelet is here: pods are not started. What runs in them is the clusters' tests' part.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "crds" / "tests"))

from crds_control_plane import running  # noqa: E402

from tercet_api.names import (  # noqa: E402
    CA_CONFIG_MAP,
    CA_SECRET,
    FINALIZER,
    MEMBERSHIP_CONFIG_MAP,
    SIGNER,
)
from tercet_e2e.binaries import Binaries  # noqa: E402
from tercet_e2e.chart import rendered  # noqa: E402
from tercet_e2e.objects import snapshot_crds  # noqa: E402

pytestmark = pytest.mark.local
CHART = ROOT / "charts/tercet"
NAMESPACE = "some-namespace"
TIMEOUT_S = 180
KINDS = "crd/volumes.tercet.io"


@pytest.fixture(scope="module")
def plane():
    """A control plane of its own: what is taken away here must not be another test's."""
    with running() as started:
        manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        started.kubectl_run("apply", "-f", "-", stdin=json.dumps(manifest))
        started.kubectl_run("apply", "-f", "-", stdin=yaml.safe_dump_all(snapshot_crds()))
        yield started


@pytest.fixture(scope="module")
def helm(plane):
    """Runs helm on the control plane; returns its output."""
    program = Binaries.default().ensure(["helm"])["helm"]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [program, "--kubeconfig", plane.kubeconfig, "--namespace", NAMESPACE, *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"helm {arguments}: {done.stderr}"
        return done.stdout

    return run


@pytest.mark.parametrize("values", sorted((CHART / "ci").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_api_server_accepts_every_object_strictly(plane, values):
    program = Binaries.default().ensure(["helm"])["helm"]
    text = rendered(program, CHART, values, snapshots=True)
    options = ("--dry-run=server", "--validate=strict", "-n", NAMESPACE)
    said = plane.kubectl_run("apply", *options, "-f", "-", stdin=text)
    assert "server dry run" in said


def test_installed_upgraded_and_taken_away_the_kinds_stay(plane, helm):
    # The control plane's fixture has made the kinds: as after an earlier release, they are taken.
    notes = helm("install", "tercet", str(CHART), "--take-ownership")
    assert f"helm test tercet -n {NAMESPACE}" in notes
    before = _deployment(plane)
    helm("upgrade", "tercet", str(CHART), "--set", "image.tag=v2,operator.replicas=3")
    after = _deployment(plane)
    assert before["spec"]["replicas"] == 2
    assert after["spec"]["replicas"] == 3
    image = after["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "tercet-operator:v2"
    helm("uninstall", "tercet", "--no-hooks", "--wait")
    assert plane.kubectl_run("get", KINDS, "-o", "name")
    assert not plane.kubectl_run(
        "-n", NAMESPACE, "get", "deploy,ds,sa", "-l", _SELECTOR, "-o", "name"
    )


_SELECTOR = "app.kubernetes.io/name=tercet"


def _deployment(plane) -> dict:
    return json.loads(
        plane.kubectl_run("-n", NAMESPACE, "get", "deploy", "tercet-operator", "-o", "json")
    )


@pytest.fixture
def hooks(plane, tmp_path):
    """Runs tercet-uninstall with the account that the chart's hooks have, and no other rights."""
    program = Binaries.default().ensure(["helm"])["helm"]
    text = rendered(program, CHART, CHART / "ci/default-values.yaml", snapshots=True)
    made = [item for item in yaml.safe_load_all(text) if item and _of_hooks(item)]
    plane.kubectl_run("apply", "-n", NAMESPACE, "-f", "-", stdin=yaml.safe_dump_all(made))
    token = plane.kubectl_run("-n", NAMESPACE, "create", "token", "tercet-uninstall").strip()
    config = yaml.safe_load(plane.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    wipe = tmp_path / "wipe.yaml"
    wipe.write_text(next(i for i in made if i["kind"] == "ConfigMap")["data"]["wipe.yaml"])

    def run(when: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tercet_operator.uninstall", when, *more]
        command += ["--release", "tercet", "--revision", "4"]
        # No operator is here that would let go of StorageNodes: `before` need not wait for it long.
        command += ["--kubeconfig", str(path), "--timeout", "5" if when == "before" else "60"]
        if when == "after":
            command += ["--wipe", str(wipe)]
        environment = {"PATH": "/usr/bin:/bin", "TERCET_NAMESPACE": NAMESPACE}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    return run


def _of_hooks(item: dict) -> bool:
    hooked = "delete" in item["metadata"].get("annotations", {}).get("helm.sh/hook", "")
    return hooked and item["kind"] != "Job"


SNAPSHOT_LEASE = "snapshot-controller-leader"
STORAGE_NODE = {
    "apiVersion": "tercet.io/v1alpha1",
    "kind": "StorageNode",
    "metadata": {"name": "n1", "finalizers": [FINALIZER]},
    "spec": {"nodeName": "n1", "address": "10.0.0.1", "devices": [{"id": "d0", "path": "/dev/x"}]},
}
VOLUME = {
    "apiVersion": "tercet.io/v1alpha1",
    "kind": "Volume",
    "metadata": {"name": "db"},
    "spec": {"sizeBytes": 1 << 30},
}
TRACES = [
    {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": CA_SECRET}},
    *(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}
        for name in (CA_CONFIG_MAP, MEMBERSHIP_CONFIG_MAP)
    ),
    *(
        {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}}
        for name in ("tercet-operator", "storagenode-n1", "csi-tercet-io", SNAPSHOT_LEASE)
    ),
]
OTHERS = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "other"}}


def _apply(plane, *items: dict) -> None:
    text = yaml.safe_dump_all(items)
    plane.kubectl_run("apply", "-n", NAMESPACE, "-f", "-", stdin=text)


def _names(plane, kinds: str) -> set[str]:
    return set(plane.kubectl_run("-n", NAMESPACE, "get", kinds, "-o", "name").split())


def test_while_there_is_a_volume_nothing_goes(plane, hooks):
    _apply(plane, STORAGE_NODE, VOLUME)
    for when in ("before", "after"):
        done = hooks(when)
        assert done.returncode == 1, done.stderr
        assert "refused: there are Volumes: db" in done.stderr
        lead = f"helm rollback tercet 4 -n {NAMESPACE}" if when == "before" else "Install it again"
        assert lead in done.stderr
    assert _names(plane, "storagenode") == {"storagenode.tercet.io/n1"}
    plane.kubectl_run("delete", "volume.tercet.io", "db")


def test_without_volumes_all_traces_go_and_nothing_of_others(plane, hooks):
    _apply(plane, STORAGE_NODE, OTHERS, *TRACES)
    request = {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"name": "tercet-node-n1-x"},
        "spec": {"signerName": SIGNER, "usages": ["client auth"], "request": _request()},
    }
    _apply(plane, request)
    done = hooks("before")
    assert done.returncode == 0, done.stderr
    assert not _names(plane, "storagenode"), "nobody would take its finalizer off later"
    _apply(plane, STORAGE_NODE)  # an agent's last start
    done = hooks("after", "--crds", f"--lease={SNAPSHOT_LEASE}")
    assert done.returncode == 0, done.stderr
    left = _names(plane, "lease,secret,daemonset,csr")
    assert f"lease.coordination.k8s.io/{SNAPSHOT_LEASE}" not in left
    assert not {name for name in left if "tercet" in name or "storagenode" in name}
    assert "lease.coordination.k8s.io/other" in left
    ours = {f"configmap/{name}" for name in (CA_CONFIG_MAP, MEMBERSHIP_CONFIG_MAP)}
    assert not ours & _names(plane, "configmap")
    plane.kubectl_run("wait", "--for=delete", KINDS, "--timeout=60s")
    done = hooks("after", "--crds")
    assert done.returncode == 0, f"once more: {done.stderr}"


def _request() -> str:
    """A certificate request, as base64 of PEM."""
    import base64

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "storagenode:n1")])
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    return base64.b64encode(request.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)).decode()
