"""What each of Tercet's service accounts may do: the least that its work needs.

Data, from which `make generate` writes `manifests/rbac/tercet.yaml` for a local cluster and the
chart's `templates/rbac.yaml`. A role `tercet:NAME` is bound to the service account NAME; the roles
of the CSI sidecars to the account of the pod that they run in.

Roles cannot tell one StorageNode's agent from another: agents may write the status of every object.
That is no more than an agent can do to its own volumes anyway, and what a volume's configuration
may become is settled by its CEL rules and by compare-and-swap, for everybody. StorageNodes decide
who is certified and which device is taken, so there an admission policy tells agents apart by the
node that their token is bound to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tercet_api.names import (
    CA_CONFIG_MAP,
    CA_SECRET,
    GROUP,
    MEMBERSHIP_CONFIG_MAP,
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
        # The cluster's id, which enrolments are signed for.
        _rule("", ("namespaces",), ("get",), ("kube-system",)),
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
        # Its own StorageNode (OWN_NODE_POLICY), with the labels of its node.
        _rule(GROUP, (STORAGENODES,), ("create", "patch")),
        _rule("", ("nodes",), ("get",)),
        # The cluster's id, by which engines tell each other's cluster.
        _rule("", ("namespaces",), ("get",), ("kube-system",)),
        _rule(_EVENTS, ("events",), ("create", "patch")),
        _rule("certificates.k8s.io", (_REQUESTS,), ("create", *_READ)),
    ],
}

_LEASES = _rule("coordination.k8s.io", ("leases",), (*_READ, "create", *_WRITE))
_READ_CA = _rule("", ("configmaps",), _READ, (CA_CONFIG_MAP,))
_READ_REGISTER = _rule("", ("configmaps",), ("get",), (MEMBERSHIP_CONFIG_MAP,))

NAMESPACE_RULES: dict[str, list[Manifest]] = {
    OPERATOR: [
        _LEASES,
        # A rule for `create` cannot name what is created.
        _rule("", ("configmaps", "secrets"), ("create",)),
        _rule("", ("configmaps",), ("get", "update"), (CA_CONFIG_MAP, MEMBERSHIP_CONFIG_MAP)),
        # The CA's key: nobody else may read it.
        _rule("", ("secrets",), ("get",), (CA_SECRET,)),
    ],
    CSI_CONTROLLER: [_READ_CA],
    CSI_NODE: [],
    NODE: [_LEASES, _READ_CA, _READ_REGISTER],
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


_SNAPSHOT_GROUP = "snapshot.storage.k8s.io"
_STORAGE_GROUP = "storage.k8s.io"
_CLAIMS = "persistentvolumeclaims"
_CONTENTS = "volumesnapshotcontents"

SIDECAR_RULES: dict[str, list[Manifest]] = {
    "csi-provisioner": [
        _rule("", ("persistentvolumes",), (*_READ, "create", "patch", "delete")),
        _rule("", (_CLAIMS,), (*_READ, "update")),
        _rule("", ("nodes",), _READ),
        _rule("", ("events",), (*_READ, "create", *_WRITE)),
        _rule(
            _STORAGE_GROUP,
            ("storageclasses", "csinodes", "volumeattachments", "volumeattributesclasses"),
            _READ,
        ),
        _rule(_SNAPSHOT_GROUP, ("volumesnapshots", _CONTENTS), _READ),
    ],
    "csi-attacher": [
        _rule("", ("persistentvolumes",), (*_READ, "patch")),
        _rule(_STORAGE_GROUP, ("csinodes",), _READ),
        _rule(_STORAGE_GROUP, ("volumeattachments",), (*_READ, "patch")),
        _rule(_STORAGE_GROUP, ("volumeattachments/status",), ("patch",)),
    ],
    "csi-resizer": [
        _rule("", ("persistentvolumes",), (*_READ, "patch")),
        _rule("", (_CLAIMS,), _READ),
        _rule("", (f"{_CLAIMS}/status",), ("patch",)),
        _rule("", ("pods",), _READ),
        _rule("", ("events",), ("list", "watch", "create", *_WRITE)),
        _rule(_STORAGE_GROUP, ("volumeattributesclasses",), _READ),
    ],
    "csi-snapshotter": [
        _rule("", ("events",), ("list", "watch", "create", *_WRITE)),
        _rule(_SNAPSHOT_GROUP, ("volumesnapshotclasses",), _READ),
        _rule(_SNAPSHOT_GROUP, (_CONTENTS,), (*_READ, *_WRITE)),
        _rule(_SNAPSHOT_GROUP, (f"{_CONTENTS}/status",), _WRITE),
    ],
}
"""What the CSI sidecars may do, by program: bound to CSI_CONTROLLER, in whose pod they run."""

SNAPSHOT_CONTROLLER_RULES: list[Manifest] = [
    _rule("", ("persistentvolumes",), _READ),
    _rule("", (_CLAIMS,), (*_READ, "update")),
    _rule("", ("events",), ("list", "watch", "create", *_WRITE)),
    _rule(_STORAGE_GROUP, ("storageclasses",), _READ),
    _rule(_SNAPSHOT_GROUP, ("volumesnapshotclasses",), _READ),
    _rule(_SNAPSHOT_GROUP, (_CONTENTS,), (*_READ, "create", "delete", *_WRITE)),
    _rule(_SNAPSHOT_GROUP, (f"{_CONTENTS}/status",), ("patch",)),
    _rule(_SNAPSHOT_GROUP, ("volumesnapshots",), (*_READ, "create", "delete", *_WRITE)),
    _rule(_SNAPSHOT_GROUP, ("volumesnapshots/status",), _WRITE),
]
SNAPSHOT_CONTROLLER = "tercet-snapshot-controller"

UNINSTALL = "tercet-uninstall"
_CRD_NAMES = tuple(f"{plural}.{GROUP}" for plural in _ALL)

UNINSTALL_CLUSTER_RULES: list[Manifest] = [
    _rule(GROUP, (VOLUMES, SNAPSHOTS), ("list",)),
    _rule(GROUP, (STORAGENODES,), ("list", "patch", "delete")),
    _rule("certificates.k8s.io", (_REQUESTS,), ("list", "delete")),
    _rule("apiextensions.k8s.io", ("customresourcedefinitions",), ("delete",), _CRD_NAMES),
]
UNINSTALL_NAMESPACE_RULES: list[Manifest] = [
    _rule("", ("pods",), ("list",)),
    _rule("apps", ("daemonsets",), ("create",)),
    _rule("apps", ("daemonsets",), ("get", "delete"), ("tercet-wipe",)),
    _rule("coordination.k8s.io", ("leases",), ("list", "delete")),
    _rule("", ("configmaps",), ("delete",), (CA_CONFIG_MAP, MEMBERSHIP_CONFIG_MAP)),
    _rule("", ("secrets",), ("delete",), (CA_SECRET,)),
]
"""Of the account that exists while `helm uninstall` runs its hooks, and no longer."""

_ADMISSION = "admissionregistration.k8s.io/v1"
_TOKENS_NODE = "authentication.kubernetes.io/node-name"
_POLICY = "tercet-own-storagenode"


def own_node_policy(namespace: str) -> list[Manifest]:
    """An agent writes the StorageNode of its own node only, spec and status.

    Which node a token is bound to is the API server's word, in a pod's token as in one that was
    asked for a Node.
    """
    account = f"system:serviceaccount:{namespace}:{NODE}"
    key = f"'{_TOKENS_NODE}'"
    policy = _object(_ADMISSION, "ValidatingAdmissionPolicy", _POLICY, "") | {
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "resourceRules": [
                    {
                        "apiGroups": [GROUP],
                        "apiVersions": ["*"],
                        "operations": ["CREATE", "UPDATE"],
                        "resources": [STORAGENODES, f"{STORAGENODES}/status"],
                    }
                ]
            },
            "matchConditions": [
                {"name": "an-agent", "expression": f"request.userInfo.username == '{account}'"}
            ],
            "validations": [
                {
                    "expression": (
                        f"{key} in request.userInfo.extra && "
                        f"request.userInfo.extra[{key}].all(n, n == object.spec.nodeName)"
                    ),
                    "message": "an agent writes the StorageNode of its own node only",
                    "reason": "Forbidden",
                }
            ],
        }
    }
    binding = _object(_ADMISSION, "ValidatingAdmissionPolicyBinding", _POLICY, "") | {
        "spec": {"policyName": _POLICY, "validationActions": ["Deny"]}
    }
    return [policy, binding]


def manifests(namespace: str = NAMESPACE) -> list[Manifest]:
    """Service accounts, roles and bindings, in the order in which they can be applied."""
    made: list[Manifest] = []
    for account in (OPERATOR, CSI_CONTROLLER, CSI_NODE, NODE):
        made.append(_object("v1", "ServiceAccount", account, namespace))
        for rules, where in ((CLUSTER_RULES[account], ""), (NAMESPACE_RULES[account], namespace)):
            if rules:
                made += _bound(f"tercet:{account}", rules, where, account, namespace)
    return [*made, ADMIN, *own_node_policy(namespace)]


def sidecar_manifests(namespace: str) -> list[Manifest]:
    """The sidecars' roles, bound to the csi controller's account; they elect their leaders."""
    return [
        *(
            made
            for name, rules in SIDECAR_RULES.items()
            for made in _bound(f"tercet:{name}", rules, "", CSI_CONTROLLER, namespace)
        ),
        *_bound("tercet:csi-sidecars", [_ELECTION], namespace, CSI_CONTROLLER, namespace),
    ]


def snapshot_controller_manifests(namespace: str) -> list[Manifest]:
    """For clusters whose distribution brings no snapshot controller."""
    role, account = f"tercet:{SNAPSHOT_CONTROLLER}", SNAPSHOT_CONTROLLER
    return [
        _object("v1", "ServiceAccount", account, namespace),
        *_bound(role, SNAPSHOT_CONTROLLER_RULES, "", account, namespace),
        *_bound(role, [_ELECTION], namespace, account, namespace),
    ]


def uninstall_manifests(namespace: str) -> list[Manifest]:
    """For the hooks of `helm uninstall`."""
    role = f"tercet:{UNINSTALL}"
    return [
        _object("v1", "ServiceAccount", UNINSTALL, namespace),
        *_bound(role, UNINSTALL_CLUSTER_RULES, "", UNINSTALL, namespace),
        *_bound(role, UNINSTALL_NAMESPACE_RULES, namespace, UNINSTALL, namespace),
    ]


_ELECTION = _rule("coordination.k8s.io", ("leases",), (*_READ, "create", "delete", *_WRITE))


def _bound(
    name: str, rules: list[Manifest], where: str, account: str, namespace: str
) -> list[Manifest]:
    """A role, and its binding to an account; where: its namespace, "" for the whole cluster."""
    kind = "Role" if where else "ClusterRole"
    role = _object(f"{RBAC}/v1", kind, name, where) | {"rules": rules}
    return [role, _binding(kind, name, where, account, namespace)]


def _object(version: str, kind: str, name: str, namespace: str) -> Manifest:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _binding(kind: str, name: str, where: str, account: str, namespace: str) -> Manifest:
    return _object(f"{RBAC}/v1", f"{kind}Binding", name, where) | {
        "roleRef": {"apiGroup": RBAC, "kind": kind, "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}],
    }
