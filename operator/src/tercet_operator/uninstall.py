"""`tercet-uninstall before|after`: what the chart's hooks do around `helm uninstall`.

Finalizers of a stopped operator leave objects stuck, a certificate authority that nobody knows of
would meet the next installation, and folders on the nodes belong to nobody. But taking things away
must never take data: while a Volume, a Snapshot or a replica without a Volume is there, `before`
refuses, and Helm leaves the release as it is.

`before` runs while everything still does: the operator lets go of the StorageNodes. `after` runs
when the release is gone: it waits for the last pods, takes away what they made, and has one pod on
each node empty Tercet's folders there. Both can be run again. What a node that does not answer
keeps is said and left behind.

A refusal of `before` changes nothing in the cluster, but Helm then holds the release for one that
is being uninstalled and refuses to upgrade it. So a refusal ends with the commands that lead on.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import yaml

from tercet_api.clients import (
    Api,
    ApiError,
    Json,
    NotFound,
    Refused,
    snapshots,
    storage_nodes,
    volumes,
)
from tercet_api.names import (
    CA_CONFIG_MAP,
    CA_SECRET,
    GROUP,
    MEMBERSHIP_CONFIG_MAP,
    NAMESPACE,
    NODE_LEASE_PREFIX,
    OPERATOR_LEASE,
    SIGNER,
    SNAPSHOTS,
    STORAGENODES,
    VOLUMES,
)
from tercet_api.objects import Snapshot, StorageNode, Volume
from tercet_operator.logs import configure_logs

LOOK_AGAIN_S = 0.5
RELEASE_S = 30.0
"""How long the operator may take to let go of a StorageNode before we do it."""
NAMES_SHOWN_MAX = 10
SIDECAR_LEASES = (
    "csi-tercet-io",
    "external-attacher-leader-csi-tercet-io",
    "external-resizer-csi-tercet-io",
    "external-snapshotter-leader-csi-tercet-io",
)
REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"

log = structlog.get_logger(__name__)


class Refusal(Exception):
    """Something is there that must not go; the message says what, and what to do."""


class Stuck(Exception):
    """Something does not go; the message says what, and what to do."""


def refusal(
    found_volumes: Sequence[Volume],
    found_snapshots: Sequence[Snapshot],
    nodes: Sequence[StorageNode],
) -> str | None:
    """Why nothing may be taken away, or None."""
    orphans = [f"{node.name}/{orphan.name}" for node in nodes for orphan in node.status.orphans]
    for what, names, advice in (
        (
            "Volumes",
            [item.name for item in found_volumes],
            "delete their PersistentVolumeClaims, or else `kubectl delete tvol NAME`",
        ),
        (
            "Snapshots",
            [item.name for item in found_snapshots],
            "delete their VolumeSnapshots, or else `kubectl delete tsnap NAME`",
        ),
        (
            "replicas without a Volume",
            orphans,
            "see docs/objects.md: they may be the only copy of a volume whose object was lost",
        ),
    ):
        if names:
            shown = ", ".join(sorted(names)[:NAMES_SHOWN_MAX])
            more = f" and {len(names) - NAMES_SHOWN_MAX} more" * (len(names) > NAMES_SHOWN_MAX)
            return f"there are {what}: {shown}{more}; {advice}"
    return None


@dataclass(frozen=True, slots=True)
class Release:
    """The installation, as Helm knows it."""

    name: str
    revision: int
    """The one whose hooks these are: the release that Helm holds for being uninstalled."""

    def ways_on(self, namespace: str) -> str:
        """What to do after `before` has refused, as commands."""
        at = f"{self.name} -n {namespace}"
        return (
            "Nothing was changed: everything runs on. But Helm now holds the release for one that "
            "is being uninstalled and will not upgrade it. Ways on:\n"
            f"  keep the release:  helm rollback {self.name} {self.revision} -n {namespace}\n"
            f"  try again, once nothing of these is left:  helm uninstall {at}\n"
            "  take it away, and leave all data where it is for a later installation:  "
            f"helm uninstall {at} --no-hooks"
        )

    def way_back(self, namespace: str) -> str:
        """What to do after `after` has refused: the release is gone, and the data is not."""
        return (
            "The release is gone, and what it keeps on nodes and in the API server stays. Install "
            f"it again as {self.name} into {namespace} to go on with these."
        )


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    timeout_s: float
    pods: str
    wipe: Path | None
    crds: bool
    leases: Sequence[str] = ()
    """Of others' pieces that the release has brought along."""


class Uninstall:
    """Carries it out on one cluster."""

    def __init__(self, api: Api, options: Options, namespace: str = NAMESPACE) -> None:
        self._api = api
        self._options = options
        self._core = f"/api/v1/namespaces/{namespace}"
        self._leases = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._daemonsets = f"/apis/apps/v1/namespaces/{namespace}/daemonsets"
        self._nodes = storage_nodes(api)

    async def before(self) -> None:
        """While the release still runs. Raises Refusal (nothing was changed), Stuck, ApiError."""
        await self._check()
        await self._remove_nodes(min(RELEASE_S, self._options.timeout_s))

    async def after(self) -> None:
        """When the release is gone. Raises Refusal, Stuck, ApiError."""
        await self._until(self._no_pods, self._options.timeout_s, "pods have ended")
        if not await self._kinds_exist():
            log.info("no kinds of Tercet here: nothing is left of its objects")
        else:
            await self._check()
            # Nobody who would let go of them is left: an agent's last start may have made one.
            await self._remove_nodes(0)
        await self._wipe()
        await self._remove_traces()
        if self._options.crds:
            for plural in (STORAGENODES, VOLUMES, SNAPSHOTS):
                await self._delete(f"{CRDS}/{plural}.{GROUP}")

    async def _check(self) -> None:
        why = refusal(
            await volumes(self._api).list(),
            await snapshots(self._api).list(),
            await self._nodes.list(),
        )
        if why is not None:
            raise Refusal(why)

    async def _kinds_exist(self) -> bool:
        try:
            await self._nodes.list()
        except NotFound:
            return False
        return True

    async def _remove_nodes(self, patience_s: float) -> None:
        for node in await self._nodes.list():
            await self._delete(f"{self._nodes.path}/{node.name}")
        if await self._until(self._no_nodes, patience_s, "StorageNodes are gone"):
            return
        # There is no volume (we looked): the finalizer guards nothing any more.
        for node in await self._nodes.list():
            try:
                await self._nodes.patch(
                    node.name, {"metadata": {"uid": node.uid, "finalizers": None}}
                )
            except (NotFound, Refused):
                continue
        if not await self._until(self._no_nodes, self._options.timeout_s, "StorageNodes are gone"):
            left = ", ".join(node.name for node in await self._nodes.list())
            raise Stuck(
                f"StorageNodes do not go: {left}; `kubectl get tsn -o yaml` says whose finalizers "
                "are on them: see to these, then uninstall again"
            )

    async def _no_nodes(self) -> bool:
        return not await self._nodes.list()

    async def _no_pods(self) -> bool:
        query = {"labelSelector": self._options.pods}
        left = (await self._api.request("GET", f"{self._core}/pods", query=query))["items"]
        names = [pod["metadata"]["name"] for pod in left]
        if names:
            log.info("waiting for pods to end", pods=names[:NAMES_SHOWN_MAX])
        return not names

    async def _wipe(self) -> None:
        """Have one pod on each node empty Tercet's folders."""
        if self._options.wipe is None:
            return
        manifest = yaml.safe_load(self._options.wipe.read_text())
        path = f"{self._daemonsets}/{manifest['metadata']['name']}"
        await self._delete(path, "Foreground")
        await self._until(lambda: self._gone(path), self._options.timeout_s, "an older one is gone")
        await self._api.request("POST", self._daemonsets, manifest)
        done = await self._until(
            lambda: self._everywhere(path), self._options.timeout_s, "folders on nodes are empty"
        )
        if not done:
            log.warning("not every node answered: its folders are left as they are")
        # In the foreground: it is gone when its pods are.
        await self._delete(path, "Foreground")
        await self._until(lambda: self._gone(path), self._options.timeout_s, "the last pods ended")

    async def _everywhere(self, path: str) -> bool:
        found = await self._api.request("GET", path)
        status = found.get("status") or {}
        seen = status.get("observedGeneration", 0) >= found["metadata"]["generation"]
        wanted, ready = status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
        return bool(seen and ready >= wanted)

    async def _gone(self, path: str) -> bool:
        try:
            await self._api.request("GET", path)
        except NotFound:
            return True
        return False

    async def _remove_traces(self) -> None:
        """What the pieces made for themselves."""
        for name in (OPERATOR_LEASE, *SIDECAR_LEASES, *self._options.leases):
            await self._delete(f"{self._leases}/{name}")
        for name in await self._names(self._leases):
            if name.startswith(NODE_LEASE_PREFIX):
                await self._delete(f"{self._leases}/{name}")
        for item in (await self._api.request("GET", REQUESTS))["items"]:
            if item["spec"].get("signerName") == SIGNER:
                await self._delete(f"{REQUESTS}/{item['metadata']['name']}")
        for name in (CA_CONFIG_MAP, MEMBERSHIP_CONFIG_MAP):
            await self._delete(f"{self._core}/configmaps/{name}")
        await self._delete(f"{self._core}/secrets/{CA_SECRET}")

    async def _names(self, path: str) -> list[str]:
        found: Json = await self._api.request("GET", path)
        return [item["metadata"]["name"] for item in found["items"]]

    async def _delete(self, path: str, propagation: str = "Background") -> None:
        try:
            await self._api.request("DELETE", path, {"propagationPolicy": propagation})
        except NotFound:
            return
        log.info("deleted", path=path)

    async def _until(
        self, check: Callable[[], Awaitable[bool]], timeout_s: float, what: str
    ) -> bool:
        """Whether it came true within that time."""
        ends_s = time.monotonic() + timeout_s
        while not await check():
            if time.monotonic() >= ends_s:
                log.warning("not within the time", what=what, timeout_s=timeout_s)
                return False
            await asyncio.sleep(LOOK_AGAIN_S)
        return True


async def _run(given: argparse.Namespace) -> int:
    options = Options(given.timeout, given.pods, given.wipe, given.crds, given.lease)
    release = Release(given.release, given.revision)
    async with Api(given.kubeconfig) as api:
        uninstall = Uninstall(api, options)
        try:
            await (uninstall.before() if given.when == "before" else uninstall.after())
        except Refusal as refused:
            before = given.when == "before"
            lead = release.ways_on(NAMESPACE) if before else release.way_back(NAMESPACE)
            print(f"refused: {refused}.\n{lead}", file=sys.stderr)
            return 1
        except (Stuck, ApiError) as error:
            print(f"failed: {error}", file=sys.stderr)
            return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tercet-uninstall", description=__doc__)
    parser.add_argument("when", choices=("before", "after"))
    parser.add_argument("--kubeconfig", type=Path, help="absent: the pod's service account")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each step")
    parser.add_argument("--pods", default="app.kubernetes.io/name=tercet", help="label selector")
    parser.add_argument("--wipe", type=Path, help="a DaemonSet that empties folders on nodes")
    parser.add_argument("--crds", action="store_true", help="delete the kinds as well")
    parser.add_argument("--lease", action="append", default=[], help="goes too; may be repeated")
    parser.add_argument("--release", default="tercet", help="its name in Helm")
    parser.add_argument("--revision", type=int, default=1, help="its revision in Helm")
    parser.add_argument("--log-format", choices=("json", "text"), default="json")
    given = parser.parse_args(arguments)
    configure_logs(given.log_format)
    return asyncio.run(_run(given))


if __name__ == "__main__":
    sys.exit(main())
