"""Applies manifests, and makes identities: service account, its rights, a kubeconfig with a token.

Manifests go through server-side apply, in their order; where a kind lives is asked of the API
server, so that custom kinds need no table here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tercet_e2e.binaries import module_file
from tercet_e2e.controlplane import ControlPlane, kubeconfig
from tercet_e2e.kube import Kube, KubeError, NotFound, core, group
from tercet_e2e.state import write_atomically

Json = dict[str, Any]

TOKEN_LIFETIME_S = 7 * 24 * 3600
ESTABLISH_TIMEOUT_S = 120.0
ESTABLISH_PAUSE_S = 0.05
SNAPSHOT_MODULE = "github.com/kubernetes-csi/external-snapshotter/client/v8"
SNAPSHOT_VERSION = "v8.6.0"


def packaged(name: str) -> list[Json]:
    """The documents of a manifest of this package."""
    text = resources.files("tercet_e2e.manifests").joinpath(name).read_text()
    return [document for document in yaml.safe_load_all(text) if document]


def documents(paths: Iterable[Path]) -> list[Json]:
    """The documents of manifest files."""
    return [entry for path in paths for entry in yaml.safe_load_all(path.read_text()) if entry]


def snapshot_crds() -> list[Json]:
    """The VolumeSnapshot kinds, out of their pinned module."""
    folder = module_file(SNAPSHOT_MODULE, SNAPSHOT_VERSION, "config/crd")
    found = documents(sorted(folder.glob("*.yaml")))
    return [entry for entry in found if entry["kind"] == "CustomResourceDefinition"]


@dataclass(slots=True)
class Applier:
    """Applies manifests with one connection; remembers where kinds live."""

    kube: Kube
    _plurals: dict[tuple[str, str], tuple[str, bool]]

    @classmethod
    def on(cls, kube: Kube) -> Applier:
        """An applier that knows nothing yet."""
        return cls(kube, {})

    async def _where(self, api_version: str, kind: str) -> tuple[str, bool]:
        # Discovery follows an established definition a moment later.
        deadline_s = time.monotonic() + ESTABLISH_TIMEOUT_S
        while (api_version, kind) not in self._plurals:
            with contextlib.suppress(NotFound):
                await self._discover(api_version)
            if (api_version, kind) in self._plurals:
                break
            if time.monotonic() > deadline_s:
                raise KubeError(f"the API server has no kind {kind} in {api_version}")
            await asyncio.sleep(ESTABLISH_PAUSE_S)
        return self._plurals[api_version, kind]

    async def _discover(self, api_version: str) -> None:
        base = "/api/v1" if api_version == "v1" else f"/apis/{api_version}"
        for entry in (await self.kube.get(base))["resources"]:
            if "/" not in entry["name"]:
                self._plurals[api_version, entry["kind"]] = (entry["name"], entry["namespaced"])

    async def path(self, manifest: Json) -> str:
        """Where an object is found."""
        api_version, meta = manifest["apiVersion"], manifest["metadata"]
        plural, namespaced = await self._where(api_version, manifest["kind"])
        namespace = meta.get("namespace", "default") if namespaced else ""
        if api_version == "v1":
            return core(plural, meta["name"], namespace=namespace)
        return group(api_version, plural, meta["name"], namespace=namespace)

    async def apply(self, manifests: Iterable[Json]) -> None:
        """Applies all, in their order; custom kinds can be used when this returns."""
        definitions: list[str] = []
        for manifest in manifests:
            is_definition = manifest["kind"] == "CustomResourceDefinition"
            if not is_definition:
                await asyncio.gather(*(self._established(path) for path in definitions))
                definitions.clear()
            path = await self.path(manifest)
            await self.kube.apply(path, manifest)
            if is_definition:
                definitions.append(path)
        await asyncio.gather(*(self._established(path) for path in definitions))

    async def _established(self, path: str) -> None:
        deadline_s = time.monotonic() + ESTABLISH_TIMEOUT_S
        while time.monotonic() < deadline_s:
            found = await self.kube.get(path)
            conditions = found.get("status", {}).get("conditions") or []
            if any(c["type"] == "Established" and c["status"] == "True" for c in conditions):
                # The handler of requests learns of it by a watch of its own, a moment later.
                with contextlib.suppress(NotFound):
                    await self.kube.list(_collection(found), limit="1")
                    return
            await asyncio.sleep(ESTABLISH_PAUSE_S)
        raise KubeError(f"{path} is not established after {ESTABLISH_TIMEOUT_S:.0f} s")


def _collection(definition: Json) -> str:
    """Where the objects of a definition are, of all namespaces."""
    spec = definition["spec"]
    version = next(v["name"] for v in spec["versions"] if v["served"])
    return group(f"{spec['group']}/{version}", spec["names"]["plural"])


def bindings(manifests: Iterable[Json], prefix: str = "tercet:") -> list[Json]:
    """Binds each role `tercet:NAME` to the service account NAME of the roles' namespace."""
    made = []
    for manifest in manifests:
        kind, meta = manifest["kind"], manifest["metadata"]
        if kind not in ("Role", "ClusterRole"):
            continue
        account = meta["name"].removeprefix(prefix)
        subject = {"kind": "ServiceAccount", "name": account, "namespace": "tercet-system"}
        reference = {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": kind,
            "name": meta["name"],
        }
        made.append(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": f"{kind}Binding",
                "metadata": dict(meta),
                "roleRef": reference,
                "subjects": [subject],
            }
        )
    return made


async def account_kubeconfig(
    kube: Kube,
    control_plane: ControlPlane,
    account: str,
    *,
    namespace: str = "tercet-system",
    node: str = "",
) -> Path:
    """A kubeconfig with a fresh token of a service account.

    With a node the token is bound to that Node object: it says which node its bearer is on, and it
    ends when the Node is deleted. That is what the signer of node certificates looks at.
    """
    spec: Json = {"audiences": [], "expirationSeconds": TOKEN_LIFETIME_S}
    if node:
        found = await kube.get(core("nodes", node))
        uid = found["metadata"]["uid"]
        spec["boundObjectRef"] = {"kind": "Node", "apiVersion": "v1", "name": node, "uid": uid}
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    path = core("serviceaccounts", account, namespace=namespace, sub="token")
    token = (await kube.create(path, request))["status"]["token"]
    credentials: Mapping[str, str] = {"token": token}
    text = kubeconfig(
        control_plane.addresses.api_url,
        control_plane.certificates.cluster.files.cert,
        account,
        credentials,
        namespace,
    )
    target = control_plane.state.kubeconfig(f"{account}-{node}" if node else account)
    write_atomically(target, text)
    return target
