"""The CustomResourceDefinitions, generated from the models.

pydantic's JSON Schema is turned into what Kubernetes calls a structural schema: references are
inlined, `X | None` becomes an optional X, titles go, integers get a width, and defaults stay in
`spec` only (a default in `status` would be written by the API server as if somebody had said it).
The CEL rules of `tercet_api.cel` are attached where they belong. The output is a plain mapping, the
same at every run, so that `make lint` can compare it with what is committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tercet_api import cel
from tercet_api.cel import Rule
from tercet_api.names import GROUP, SNAPSHOTS, STORAGENODES, VERSION, VOLUMES
from tercet_api.objects import Model, Object, Snapshot, StorageNode, Volume

Schema = dict[str, Any]
_READY = '.status.conditions[?(@.type=="Ready")].status'


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `kubectl get`; priority 1 is shown with `-o wide` only."""

    name: str
    path: str
    type: str = "string"
    priority: int = 0

    def manifest(self) -> Schema:
        """As the CRD has it."""
        column: Schema = {"name": self.name, "type": self.type, "jsonPath": self.path}
        return column | ({"priority": self.priority} if self.priority else {})


@dataclass(frozen=True, slots=True)
class Kind:
    """What a CRD needs beyond its model."""

    model: type[Object]
    plural: str
    short_name: str
    columns: Sequence[Column]
    rules: Mapping[str, Sequence[Rule]]
    """CEL rules by path: "" is the root, `spec.devices[]` the elements of a list."""


_AGE = Column("Age", ".metadata.creationTimestamp", "date")

KINDS = (
    Kind(
        StorageNode,
        STORAGENODES,
        "tsn",
        (
            Column("Ready", _READY),
            Column("Phase", ".status.phase"),
            Column("Node", ".spec.nodeName", priority=1),
            Column("Address", ".spec.address"),
            Column("Used%", ".status.usedPercent", "integer"),
            Column("Capacity", ".status.capacityBytes", "integer", priority=1),
            Column("Allocated", ".status.allocatedBytes", "integer", priority=1),
            Column("Instance", ".status.instance", priority=1),
            _AGE,
        ),
        {
            "spec": cel.STORAGE_NODE_SPEC_RULES,
            "spec.devices[]": cel.DEVICE_RULES,
        },
    ),
    Kind(
        Volume,
        VOLUMES,
        "tvol",
        (
            Column("Ready", _READY),
            Column("Phase", ".status.phase"),
            Column("Copies", ".status.copies"),
            Column("Primary", ".status.config.primary.node"),
            Column("Size", ".spec.sizeBytes", "integer"),
            Column("Used%", ".status.usedPercent", "integer"),
            Column("Epoch", ".status.config.epoch", "integer", priority=1),
            Column("UUID", ".spec.uuid", priority=1),
            _AGE,
        ),
        {
            "": cel.VOLUME_RULES,
            "spec": cel.VOLUME_SPEC_RULES,
            "spec.source": cel.SOURCE_RULES,
            "status.config": cel.CONFIG_RULES,
        },
    ),
    Kind(
        Snapshot,
        SNAPSHOTS,
        "tsnap",
        (
            Column("Ready", ".status.readyToUse", "boolean"),
            Column("Phase", ".status.phase"),
            Column("Volume", ".spec.volume"),
            Column("Size", ".status.sizeBytes", "integer"),
            Column("Taken", ".status.creationTime", "date"),
            _AGE,
        ),
        {"spec": cel.SNAPSHOT_SPEC_RULES},
    ),
)


def crds() -> dict[str, Schema]:
    """Every CRD by the name of its file."""
    return {f"{GROUP}_{kind.plural}.yaml": crd(kind) for kind in KINDS}


def crd(kind: Kind) -> Schema:
    """One CustomResourceDefinition."""
    name = kind.model.KIND
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{kind.plural}.{GROUP}",
            # Whoever uninstalls the chart keeps the objects: data may hang on them.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": GROUP,
            "names": {
                "kind": name,
                "listKind": f"{name}List",
                "plural": kind.plural,
                "singular": name.lower(),
                "shortNames": [kind.short_name],
                "categories": ["tercet"],
            },
            "scope": "Cluster",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [column.manifest() for column in kind.columns],
                    "schema": {"openAPIV3Schema": object_schema(kind)},
                }
            ],
        },
    }


def object_schema(kind: Kind) -> Schema:
    """The structural schema of a whole object, rules attached."""
    fields = kind.model.model_fields
    spec, status = fields["spec"].annotation, fields["status"].annotation
    assert isinstance(spec, type)
    assert issubclass(spec, Model)
    assert isinstance(status, type)
    assert issubclass(status, Model)
    schema = {
        "type": "object",
        "description": _text(kind.model.__doc__),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(spec, defaults=True),
            "status": structural(status, defaults=False),
        },
    }
    for path, rules in kind.rules.items():
        _at(schema, path)["x-kubernetes-validations"] = [
            {"rule": rule.rule, "message": rule.message} for rule in rules
        ]
    return schema


def structural(model: type[Model], *, defaults: bool) -> Schema:
    """The structural schema of one model."""
    source = model.model_json_schema(by_alias=True, mode="validation")
    return _convert(source, source.get("$defs", {}), defaults)


_KEPT = (
    "type",
    "description",
    "enum",
    "format",
    "pattern",
    "minimum",
    "maximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
)


def _convert(node: Schema, definitions: Mapping[str, Schema], defaults: bool) -> Schema:
    """One schema node as Kubernetes takes it. Asserts on what has no structural form."""
    node = _resolved(node, definitions)
    known = {*_KEPT, "title", "default", "properties", "required", "items", "additionalProperties"}
    unknown = node.keys() - known - {"propertyNames", "$defs"}
    assert not unknown, f"no structural form for {sorted(unknown)} in {node}"
    out = {key: node[key] for key in _KEPT if key in node}
    if "description" in out:
        out["description"] = _text(out["description"])
    if out.get("type") == "integer":
        out["format"] = "int64"
    if out.get("type") == "string" and "enum" not in out:
        assert "maxLength" in out, f"a string without maxLength: {node}"
    if defaults and node.get("default") is not None:
        out["default"] = node["default"]
    if "properties" in node:
        out["properties"] = {
            name: _convert(each, definitions, defaults) for name, each in node["properties"].items()
        }
        if node.get("required"):
            out["required"] = list(node["required"])
    if "items" in node:
        assert "maxItems" in out, f"a list without maxItems: {node}"
        out["items"] = _convert(node["items"], definitions, defaults)
        out.setdefault("x-kubernetes-list-type", "atomic")
    if isinstance(node.get("additionalProperties"), dict):
        assert "maxProperties" in out, f"a mapping without maxProperties: {node}"
        out["additionalProperties"] = _convert(node["additionalProperties"], definitions, defaults)
    return out


def _resolved(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The node with its reference inlined and `| None` taken off."""
    if "anyOf" in node:
        kinds = [each for each in node["anyOf"] if each != {"type": "null"}]
        assert len(kinds) == 1, f"a choice of types has no structural form: {node}"
        node = {**kinds[0], **{key: value for key, value in node.items() if key != "anyOf"}}
    if "$ref" in node:
        target = definitions[node["$ref"].removeprefix("#/$defs/")]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
        return _resolved(node, definitions)
    return node


def _at(schema: Schema, path: str) -> Schema:
    """The node of a schema that a rule's path names."""
    for part in path.split(".") if path else []:
        schema = schema["properties"][part.removesuffix("[]")]
        if part.endswith("[]"):
            schema = schema["items"]
    return schema


def _text(text: str | None) -> str:
    """A docstring as one paragraph, without the marks of Python's documentation."""
    return " ".join((text or "").replace("`", "").split())
