"""The status of a pod, as the kubelet reports it. Pure: of a `Pod` and its containers' reports."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from tercet_e2e.kubelet.containers import Report
from tercet_e2e.kubelet.model import Pod, Run

Json = dict[str, Any]


def timestamp(seconds: float) -> str:
    """A time as Kubernetes writes it."""
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def phase_of(pod: Pod) -> str:
    """Pending, Running, Succeeded or Failed."""
    if pod.problem:
        return "Failed"
    if pod.terminal:
        good = all(c.run is Run.EXITED and c.exit_code == 0 for c in pod.containers)
        return "Succeeded" if good else "Failed"
    ran = any(c.run is not Run.NEVER for c in pod.main)
    if pod.deleting and ran and all(c.run is not Run.RUNNING for c in pod.main):
        return "Succeeded" if all(c.exit_code == 0 for c in pod.main) else "Failed"
    return "Running" if ran else "Pending"


def status_of(
    pod: Pod, spec: Json, reports: Mapping[str, Report], address: str, started: str
) -> Json:
    """The status to merge into the pod's (a strategic merge: other conditions stay)."""
    phase = phase_of(pod)
    initialised = all(c.run is Run.EXITED and c.exit_code == 0 for c in pod.init)
    ready = not pod.terminal and all(c.run is Run.RUNNING for c in pod.main)
    ended = phase in ("Succeeded", "Failed")
    why = {"reason": "PodCompleted"} if phase == "Succeeded" else {}
    conditions = [
        _condition("PodReadyToStartContainers", pod.prepared and not ended, {}),
        _condition("Initialized", initialised, {}),
        _condition("ContainersReady", ready, why),
        _condition("Ready", ready, why),
    ]
    status: Json = {
        "phase": phase,
        "hostIP": address,
        "hostIPs": [{"ip": address}],
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": started,
        "conditions": conditions,
        "containerStatuses": [_container(c, reports) for c in spec["containers"]],
    }
    if init := spec.get("initContainers"):
        status["initContainerStatuses"] = [_container(c, reports) for c in init]
    if pod.problem:
        status |= {"reason": "Unsupported", "message": pod.problem}
    return status


def _condition(kind: str, holds: bool, why: Json) -> Json:
    return {"type": kind, "status": "True" if holds else "False"} | ({} if holds else why)


def _container(container: Json, reports: Mapping[str, Report]) -> Json:
    report = reports[container["name"]]
    state = report.container
    entry: Json = {
        "name": state.name,
        "image": container.get("image", ""),
        "imageID": "",
        "restartCount": state.restarts,
        "ready": state.run is Run.RUNNING,
        "started": state.run is Run.RUNNING,
    }
    if state.run is Run.NEVER:
        entry["state"] = {"waiting": {"reason": "ContainerCreating"}}
    elif state.run is Run.RUNNING:
        entry["state"] = {"running": {"startedAt": timestamp(report.started_s or 0)}}
    else:
        entry["state"] = {"terminated": _terminated(report)}
    return entry


def _terminated(report: Report) -> Json:
    code = report.container.exit_code
    reason = "Completed" if code == 0 else "StartError" if report.message else "Error"
    return {
        "exitCode": code,
        "reason": reason,
        "message": report.message,
        "startedAt": timestamp(report.started_s or 0),
        "finishedAt": timestamp(report.finished_s or 0),
    }


def problem_of(spec: Json) -> str:
    """Why a pod can never run on this node: what needs a real container runtime. Empty: it can."""
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        if not container.get("command"):
            return (
                f"container {container['name']} has no command: this node runs processes of its "
                "machine, not images; give the command"
            )
    known = {"emptyDir", "hostPath", "configMap", "secret", "projected", "persistentVolumeClaim"}
    for volume in spec.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not kinds <= known:
            return f"volume {volume['name']}: this node cannot provide {', '.join(kinds - known)}"
    return ""
