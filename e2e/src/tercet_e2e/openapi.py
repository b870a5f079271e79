"""JSON Schemas of Kubernetes' kinds, made of its OpenAPI file: what kubeconform checks against.

Published collections of such schemas have to be fetched from somewhere; the pinned Kubernetes
module has the very same types in its `swagger.json`. Every object with named properties gets
`additionalProperties: false`, so that a misspelt field is an error, as it is for an API server with
strict field validation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Json = dict[str, Any]
Kind = tuple[str, str]
"""apiVersion and kind."""
_PREFIX = "#/definitions/"
_GVK = "x-kubernetes-group-version-kind"
_FREE: Mapping[str, Json] = {
    # What OpenAPI v2 cannot say of these.
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["string", "integer"]},
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {"type": ["string", "number"]},
}


def schemas(spec: Json, kinds: Iterable[Kind]) -> dict[Kind, Json]:
    """A schema for each of these kinds that the file knows, with all that it refers to."""
    definitions: Mapping[str, Json] = spec["definitions"]
    names = {
        (f"{gvk['group']}/{gvk['version']}".removeprefix("/"), gvk["kind"]): name
        for name, definition in definitions.items()
        for gvk in definition.get(_GVK, ())
    }
    return {kind: _schema(kind, names[kind], definitions) for kind in kinds if kind in names}


def _schema(kind: Kind, name: str, definitions: Mapping[str, Json]) -> Json:
    reached: dict[str, Json] = {}
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each not in reached:
            reached[each] = _FREE.get(each) or strict(definitions[each])
            waiting += _references(reached[each])
    own = dict(reached[name])
    own["properties"] = own["properties"] | {
        "apiVersion": {"const": kind[0]},
        "kind": {"const": kind[1]},
    }
    own["required"] = sorted({*own.get("required", ()), "apiVersion", "kind"})
    return own | {"definitions": reached}


def custom_schemas(crds: Iterable[Json]) -> dict[Kind, Json]:
    """The schemas of custom kinds, out of their CustomResourceDefinitions."""
    found = {}
    for crd in crds:
        spec = crd["spec"]
        for version in spec["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"] = schema["properties"] | {"metadata": {"type": "object"}}
            kind = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            found[kind] = schema
    return found


def strict(node: Any) -> Any:
    """The same schema, with no room for fields that it does not name."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: strict(value) for key, value in node.items()}
    open_ended = "additionalProperties" in made or made.get("x-kubernetes-preserve-unknown-fields")
    # `properties` can itself be the name of a property: that one has a schema as its value.
    named = isinstance(made.get("properties"), dict) and "$ref" not in made["properties"]
    if named and made.get("type") == "object" and not open_ended:
        made["additionalProperties"] = False
    return made


def _references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for each in node for name in _references(each)]
    if not isinstance(node, dict):
        return []
    found = [name for each in node.values() for name in _references(each)]
    reference = node.get("$ref")
    if isinstance(reference, str):
        found.append(reference.removeprefix(_PREFIX))
    return found
