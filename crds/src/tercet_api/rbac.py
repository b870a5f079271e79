"""What each of Tercet's service accounts may do: the least that its work needs.

Data, from which `make generate` writes `manifests/rbac/tercet.yaml`; a local cluster and the chart
use the same file. A role `tercet:NAME` is bound to the service account NAME.

The API server cannot tell one StorageNode's agent from another here: agents may write the status of
every object. That is no more than an agent can do to its own volumes anyway, and what a volume's
configuration may become is settled by its CEL rules and by compare-and-swap, for everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tercet_api.names import (
    CA_CONFIG_MAP,
    CA_SECRET,
    GROUP,
    NAMESPACE,
    SIGNER,
    SNAPSHOTS,
    STORAGENODES,
    VOLUMES,
)

Manifest = dict[str, Any]
RBAC = "rbac.authorization.k8s.io"
OPERATOR = "tercet-operator"
CSI_CONTROLLER = "tercet-csi-controller"
CSI_NODE = "tercet-csi-node"
NODE = "tercet-node"

_READ = ("get", "list", "watch")
_WRITE = ("update", "patch")
_EVENTS = ("", "events.k8s.io")


def _rule(
    group: str | Sequence[str],
    resources: Sequence[str],
    verbs: Sequence[str],
    names: Sequence[str] = (),
) -> Manifest:
    groups = [group] if isinstance(group, str) else list(group)
    rule: Manifest = {"apiGroups": groups, "resources": list(resources), "verbs": list(verbs)}
    return rule | ({"resourceNames": list(names)} if names else {})


_ALL = (STORAGENODES, VOLUMES, SNAPSHOTS)
_ALL_STATUS = tuple(f"{plural}/status" for plural in _ALL)
_REQUESTS = "certificatesigningrequests"

CLUSTER_RULES: dict[str, list[Manifest]] = {
    OPERATOR: [
        _rule(GROUP, _ALL, (*_READ, *_WRITE)),
        _rule(GROUP, _ALL_STATUS, ("get", *_WRITE)),
        # The snapshot that a clone starts from.
        _rule(GROUP, (SNAPSHOTS,), ("create", "delete")),
        _rule(_EVENTS, ("events",), ("create", "patch")),
        _rule("certificates.k8s.io", (_REQUESTS,), _READ),
        _rule(
            "certificates.k8s.io",
            (f"{_REQUESTS}/approval", f"{_REQUESTS}/status"),
            _WRITE,
        ),
        _rule("certificates.k8s.io", ("signers",), ("approve", "sign"), (SIGNER,)),
        # Whether somebody may have the certificate `admin`.
        _rule("authorization.k8s.io", ("subjectaccessreviews",), ("create",)),
    ],
    CSI_CONTROLLER: [
        _rule(GROUP, (VOLUMES, SNAPSHOTS), (*_READ, "create", "delete", *_WRITE)),
        _rule(GROUP, (f"{VOLUMES}/status",), ("get", "patch")),
        _rule(GROUP, (STORAGENODES,), _READ),
        _rule("", ("nodes",), _READ),
        # How many volumes a node takes.
        _rule("storage.k8s.io", ("csinodes",), ("get",)),
        _rule(_EVENTS, ("events",), ("create", "patch")),
        _rule("certificates.k8s.io", (_REQUESTS,), ("create", *_READ)),
    ],
    CSI_NODE: [],
    NODE: [
        _rule(GROUP, _ALL, _READ),
        _rule(GROUP, _ALL_STATUS, ("get", *_WRITE)),
        # The cluster's id, by which engines tell each other's cluster.
        _rule("", ("namespaces",), ("get",), ("kube-system",)),
        _rule(_EVENTS, ("events",), ("create", "patch")),
        _rule("certificates.k8s.io", (_REQUESTS,), ("create", *_READ)),
    ],
}

_LEASES = _rule("coordination.k8s.io", ("leases",), (*_READ, "create", *_WRITE))
_READ_CA = _rule("", ("configmaps",), _READ, (CA_CONFIG_MAP,))

NAMESPACE_RULES: dict[str, list[Manifest]] = {
    OPERATOR: [
        _LEASES,
        # A rule for `create` cannot name what is created.
        _rule("", ("configmaps", "secrets"), ("create",)),
        _rule("", ("configmaps",), ("get", "update"), (CA_CONFIG_MAP,)),
        # The CA's key: nobody else may read it.
        _rule("", ("secrets",), ("get",), (CA_SECRET,)),
    ],
    CSI_CONTROLLER: [_READ_CA],
    CSI_NODE: [],
    NODE: [_LEASES, _READ_CA],
}

ADMIN = {
    "apiVersion": f"{RBAC}/v1",
    "kind": "ClusterRole",
    "metadata": {"name": "tercet-admin"},
    "rules": [
        _rule(GROUP, (*_ALL, *_ALL_STATUS), ("*",)),
        _rule(GROUP, ("certificates",), ("use",), ("admin",)),
        _rule("certificates.k8s.io", (_REQUESTS,), ("create", "get", "watch")),
    ],
}
"""For people: everything of Tercet's, and a client certificate for the agents."""


def manifests() -> list[Manifest]:
    """Service accounts, roles and bindings, in the order in which they can be applied."""
    made: list[Manifest] = []
    for account in (OPERATOR, CSI_CONTROLLER, CSI_NODE, NODE):
        made.append(_object("v1", "ServiceAccount", account, NAMESPACE))
        for kind, rules, namespace in (
            ("ClusterRole", CLUSTER_RULES[account], ""),
            ("Role", NAMESPACE_RULES[account], NAMESPACE),
        ):
            if rules:
                name = f"tercet:{account}"
                made.append(_object(f"{RBAC}/v1", kind, name, namespace) | {"rules": rules})
                made.append(_binding(kind, name, namespace, account))
    return [*made, ADMIN]


def _object(version: str, kind: str, name: str, namespace: str) -> Manifest:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _binding(kind: str, name: str, namespace: str, account: str) -> Manifest:
    return _object(f"{RBAC}/v1", f"{kind}Binding", name, namespace) | {
        "roleRef": {"apiGroup": RBAC, "kind": kind, "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}],
    }
