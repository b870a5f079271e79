"""What the Helm chart has of the models: the kinds as files, accounts and roles as a template.

Helm reads nothing outside of a chart's folder, so the chart holds copies; `tercet_api.generate`
writes and compares them. A role's text is YAML but for two marks, which become Helm's own words: a
chart is installed into any namespace, and each of its objects carries the chart's labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import yaml

from tercet_api import rbac
from tercet_api.manifests import crds
from tercet_api.rbac import Manifest

ROLES_FILE = "templates/rbac.yaml"
UNINSTALL_FILE = "templates/uninstall-rbac.yaml"
CRDS_FOLDER = "files/crds"
_NAMESPACE = "release-namespace"
_LABELS = "chart-labels"
_ANNOTATIONS = "hook-annotations"
_WORDS = {
    _NAMESPACE: "{{ $.Release.Namespace }}",
    f"labels: {_LABELS}": 'labels: {{- include "tercet.labels" $ | nindent 4 }}',
    f"annotations: {_ANNOTATIONS}": (
        'annotations: {{- include "tercet.uninstall.hook" $ | nindent 4 }}'
    ),
}


class NoAliases(yaml.SafeDumper):
    """Writes what stands in two places twice."""

    def ignore_aliases(self, data: object) -> bool:
        """Never."""
        return True


def files() -> dict[str, str]:
    """The text of every generated file by its path below the chart's folder."""
    texts = {
        f"{CRDS_FOLDER}/{name}": yaml.safe_dump(manifest, sort_keys=False, width=100)
        for name, manifest in crds().items()
    }
    always = [*rbac.manifests(_NAMESPACE), *rbac.sidecar_manifests(_NAMESPACE)]
    texts[ROLES_FILE] = (
        f"{_template(always)}\n{{{{- if .Values.snapshotController.enabled }}}}\n---\n"
        f"{_template(rbac.snapshot_controller_manifests(_NAMESPACE))}\n{{{{- end }}}}\n"
    )
    hooks = _template(rbac.uninstall_manifests(_NAMESPACE), hooks=True)
    texts[UNINSTALL_FILE] = (
        f'{{{{- if eq .Values.uninstall.volumes "refuse" }}}}\n{hooks}\n{{{{- end }}}}\n'
    )
    return texts


def _template(manifests: Iterable[Manifest], *, hooks: bool = False) -> str:
    labelled = []
    for manifest in manifests:
        made = deepcopy(manifest)
        made["metadata"]["labels"] = _LABELS
        if hooks:
            made["metadata"]["annotations"] = _ANNOTATIONS
        labelled.append(made)
    text = yaml.dump_all(labelled, Dumper=NoAliases, sort_keys=False, width=1000).rstrip()
    for mark, word in _WORDS.items():
        text = text.replace(mark, word)
    return text
