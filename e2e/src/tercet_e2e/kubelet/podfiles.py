"""The volumes of a pod that are no CSI volumes, its environment and its containers' commands.

emptyDir, hostPath, configMap, secret, and projected (with the service account's token, which the
API server adds to every pod). Written once, when the pod starts: later changes of a ConfigMap or an
expiring token do not reach a pod that runs.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tercet_e2e.errors import E2eError
from tercet_e2e.kube import Kube, core
from tercet_e2e.kubelet.containers import Bind, Command

Json = dict[str, Any]

TOKEN_LIFETIME_S = 24 * 3600
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CLAIM = "persistentVolumeClaim"


class PodFileError(E2eError):
    """A plain volume or an environment variable of a pod cannot be made."""


async def write_volumes(kube: Kube, pod: Json, folder: Path) -> None:
    """Makes every plain volume of the pod below `folder/volumes/<name>`."""
    for volume in pod["spec"].get("volumes", []):
        target = folder / "volumes" / volume["name"]
        if CLAIM in volume or "hostPath" in volume:
            continue
        target.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            target.chmod(0o777)
            continue
        sources = volume["projected"]["sources"] if "projected" in volume else [volume]
        for source in sources:
            for name, content in (await _files(kube, pod, source)).items():
                file = target / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                file.chmod(0o600 if "secret" in source else 0o644)


async def _files(kube: Kube, pod: Json, source: Json) -> dict[str, bytes]:
    namespace = pod["metadata"]["namespace"]
    if "configMap" in source:
        config = source["configMap"]
        found = await kube.get(core("configmaps", config["name"], namespace=namespace))
        data = {key: value.encode() for key, value in found.get("data", {}).items()}
        data |= {key: base64.b64decode(v) for key, v in found.get("binaryData", {}).items()}
        return _selected(data, config.get("items"))
    if "secret" in source:
        secret = source["secret"]
        name = secret.get("secretName") or secret["name"]
        found = await kube.get(core("secrets", name, namespace=namespace))
        data = {key: base64.b64decode(value) for key, value in found.get("data", {}).items()}
        return _selected(data, secret.get("items"))
    if "serviceAccountToken" in source:
        token = source["serviceAccountToken"]
        return {token["path"]: (await _token(kube, pod, token)).encode()}
    if "downwardAPI" in source:
        items = source["downwardAPI"].get("items", [])
        return {i["path"]: field(pod, i["fieldRef"]["fieldPath"]).encode() for i in items}
    raise PodFileError(f"projected source {', '.join(source)} is not supported on this node")


def _selected(data: dict[str, bytes], items: list[Json] | None) -> dict[str, bytes]:
    if items is None:
        return data
    missing = [item["key"] for item in items if item["key"] not in data]
    if missing:
        raise PodFileError(f"references non-existent keys: {', '.join(missing)}")
    return {item["path"]: data[item["key"]] for item in items}


async def _token(kube: Kube, pod: Json, source: Json) -> str:
    meta = pod["metadata"]
    bound = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
    audience = source.get("audience")
    spec = {
        "audiences": [audience] if audience else [],
        "expirationSeconds": max(int(source.get("expirationSeconds", 0)), TOKEN_LIFETIME_S),
        "boundObjectRef": bound,
    }
    account = pod["spec"].get("serviceAccountName", "default")
    path = core("serviceaccounts", account, namespace=meta["namespace"], sub="token")
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    answer = await kube.create(path, request)
    return str(answer["status"]["token"])


def field(pod: Json, path: str) -> str:
    """A field of the pod, as the downward API names them."""
    meta, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
    values = {
        "metadata.name": meta["name"],
        "metadata.namespace": meta["namespace"],
        "metadata.uid": meta["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.hostIP": status.get("hostIP", ""),
        "status.podIP": status.get("podIP", ""),
    }
    if path not in values:
        raise PodFileError(f"the field {path} is not supported on this node")
    return str(values[path])


async def command_of(
    kube: Kube, pod: Json, container: Json, folder: Path, published: dict[str, Path]
) -> Command:
    """What a container runs: its command with arguments, environment and mounts."""
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
    binds = []
    env = {"PATH": DEFAULT_PATH, "HOSTNAME": pod["metadata"]["name"], "HOME": "/root"}
    for mount in container.get("volumeMounts", []):
        volume = volumes[mount["name"]]
        source = published.get(mount["name"]) or _plain_source(volume, folder)
        if mount.get("subPath"):
            source /= mount["subPath"]
            source.mkdir(parents=True, exist_ok=True)
        read_only = bool(mount.get("readOnly")) or bool(volume.get(CLAIM, {}).get("readOnly"))
        binds.append(Bind(source, mount["mountPath"], read_only))
    devices = container.get("volumeDevices", [])
    binds += [Bind(published[d["name"]], d["devicePath"], read_only=False) for d in devices]
    for variable in container.get("env", []):
        env[variable["name"]] = await _variable(kube, pod, variable)
    arguments = [*container["command"], *container.get("args", [])]
    return Command(
        argv=[_expand(argument, env) for argument in arguments],
        env=env,
        cwd=container.get("workingDir") or "/",
        binds=binds,
        privileged=bool(container.get("securityContext", {}).get("privileged")),
    )


def _plain_source(volume: Json, folder: Path) -> Path:
    if "hostPath" not in volume:
        return folder / "volumes" / str(volume["name"])
    path = Path(volume["hostPath"]["path"])
    if volume["hostPath"].get("type") == "DirectoryOrCreate":
        path.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        raise PodFileError(f"hostPath {path} of volume {volume['name']} does not exist")
    return path


async def _variable(kube: Kube, pod: Json, variable: Json) -> str:
    origin = variable.get("valueFrom")
    if not origin:
        return str(variable.get("value", ""))
    namespace = pod["metadata"]["namespace"]
    if "fieldRef" in origin:
        return field(pod, origin["fieldRef"]["fieldPath"])
    if "configMapKeyRef" in origin:
        reference = origin["configMapKeyRef"]
        found = await kube.get(core("configmaps", reference["name"], namespace=namespace))
        return str(found["data"][reference["key"]])
    if "secretKeyRef" in origin:
        reference = origin["secretKeyRef"]
        found = await kube.get(core("secrets", reference["name"], namespace=namespace))
        return base64.b64decode(found["data"][reference["key"]]).decode()
    raise PodFileError(f"variable {variable['name']}: {', '.join(origin)} is not supported here")


def _expand(argument: str, env: dict[str, str]) -> str:
    for name, value in env.items():
        argument = argument.replace(f"$({name})", value)
    return argument
