"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler as processes on 127.0.0.1.

The same flags that kubeadm uses where they matter: TLS everywhere, Node and RBAC authorisation,
NodeRestriction, service account tokens signed and bound, admission as it is by default. etcd keeps
its fsync: the configuration of a volume is a truth that must survive. What differs from a large
cluster: one of each, and controllers that look more often.

Leaves to others: nodes (kubelet), sidecars and Tercet itself (local).
"""

from __future__ import annotations

import asyncio
import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from tercet_e2e.errors import ProcessError
from tercet_e2e.kube import Kube, KubeError, core
from tercet_e2e.pki import Authority, Pair, signing_key
from tercet_e2e.ports import Ports
from tercet_e2e.processes import Processes, ProcessName, Program
from tercet_e2e.state import StateFolder, write_atomically

LOCALHOST = "127.0.0.1"
SERVICE_RANGE = "10.96.0.0/16"
SERVICE_FIRST = "10.96.0.1"
ISSUER = "https://kubernetes.default.svc.cluster.local"
READY_TIMEOUT_S = 240.0
READY_PAUSE_S = 0.05
PROBE_TIMEOUT_S = 2.0

# Clouds and bootstrap tokens there are none.
CONTROLLERS = (
    "*",
    "-cloud-node-lifecycle-controller",
    "-service-lb-controller",
    "-node-route-controller",
    "-bootstrap-signer-controller",
    "-token-cleaner-controller",
)

ETCD = ProcessName("etcd")
API_SERVER = ProcessName("kube-apiserver")
CONTROLLER_MANAGER = ProcessName("kube-controller-manager")
SCHEDULER = ProcessName("kube-scheduler")
TOOLS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")


@dataclass(frozen=True, slots=True)
class Addresses:
    """The ports of one control plane, all on 127.0.0.1."""

    etcd: int
    etcd_peer: int
    api: int
    controller_manager: int
    scheduler: int

    @classmethod
    def choose(cls, ports: Ports) -> Addresses:
        """Takes what one control plane needs."""
        return cls(*(ports.take() for _ in range(5)))

    @property
    def api_url(self) -> str:
        """Where the API server answers."""
        return f"https://{LOCALHOST}:{self.api}"


@dataclass(frozen=True, slots=True)
class Certificates:
    """Everything that the control plane's processes show to each other."""

    cluster: Authority
    front_proxy: Authority
    tokens: Path
    etcd: Pair
    api: Pair
    api_to_etcd: Pair
    proxy_client: Pair
    controller_manager: Pair
    scheduler: Pair

    @classmethod
    def open(cls, folder: Path) -> Certificates:
        """Opens, or makes, all certificates of a control plane."""
        cluster = Authority.open(folder, "ca")
        front_proxy = Authority.open(folder, "front-proxy-ca")
        names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        local = [LOCALHOST]
        return cls(
            cluster=cluster,
            front_proxy=front_proxy,
            tokens=signing_key(folder, "sa"),
            etcd=cluster.issue("etcd", "etcd", addresses=local, dns_names=["localhost"]),
            api=cluster.issue(
                "kube-apiserver",
                "kube-apiserver",
                addresses=[LOCALHOST, SERVICE_FIRST],
                dns_names=names,
            ),
            api_to_etcd=cluster.issue("kube-apiserver-etcd", "kube-apiserver"),
            proxy_client=front_proxy.issue("front-proxy", "front-proxy-client"),
            controller_manager=cluster.issue(
                "kube-controller-manager",
                "system:kube-controller-manager",
                addresses=local,
                dns_names=["localhost"],
            ),
            scheduler=cluster.issue(
                "kube-scheduler",
                "system:kube-scheduler",
                addresses=local,
                dns_names=["localhost"],
            ),
        )


def kubeconfig(
    api_url: str, authority: Path, user: str, credentials: Mapping[str, str], namespace: str = ""
) -> str:
    """A kubeconfig with one user."""
    context = {"cluster": "local", "user": user} | ({"namespace": namespace} if namespace else {})
    cluster = {"server": api_url, "certificate-authority": str(authority)}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "local", "cluster": cluster}],
        "users": [{"name": user, "user": dict(credentials)}],
        "contexts": [{"name": "local", "context": context}],
        "current-context": "local",
    }
    return yaml.safe_dump(document, sort_keys=False)


class ControlPlane:
    """A running control plane below a state folder."""

    def __init__(
        self,
        state: StateFolder,
        processes: Processes,
        binaries: Mapping[str, Path],
        ports: Ports,
    ) -> None:
        self.state = state
        self._processes = processes
        self._binaries = binaries
        self.addresses = Addresses.choose(ports)
        self.certificates = Certificates.open(state.pki)

    @property
    def admin(self) -> Path:
        """The kubeconfig that may do everything."""
        return self.state.kubeconfig("admin")

    async def start(self) -> None:
        """Starts all and returns when the API server is ready and the rest is healthy."""
        self._write_kubeconfigs()
        await self._start(ETCD, self._etcd_arguments())
        await self._start(API_SERVER, self._api_arguments())
        await self.wait_ready(self.addresses.api, "/readyz", API_SERVER)
        # Not before their roles are there: what they are refused they try again only much later.
        await self._start(CONTROLLER_MANAGER, self._controller_manager_arguments())
        await self._start(SCHEDULER, self._scheduler_arguments())
        await self.wait_ready(self.addresses.controller_manager, "/healthz", CONTROLLER_MANAGER)
        await self.wait_ready(self.addresses.scheduler, "/healthz", SCHEDULER)
        await self._wait_default_account()

    async def _start(self, name: ProcessName, arguments: list[str]) -> None:
        argv = [str(self._binaries[str(name)]), *arguments]
        await self._processes.start(Program(name, argv))

    def client_kubeconfig(self, identity: str, pair: Pair) -> Path:
        """A kubeconfig that shows a client certificate."""
        credentials = {"client-certificate": str(pair.cert), "client-key": str(pair.key)}
        path = self.state.kubeconfig(identity)
        text = kubeconfig(
            self.addresses.api_url, self.certificates.cluster.files.cert, identity, credentials
        )
        write_atomically(path, text)
        return path

    def _write_kubeconfigs(self) -> None:
        admin = self.certificates.cluster.issue(
            "admin", "tercet-local-admin", organisations=["system:masters"]
        )
        self.client_kubeconfig("admin", admin)
        self.client_kubeconfig("controller-manager", self.certificates.controller_manager)
        self.client_kubeconfig("scheduler", self.certificates.scheduler)

    def node_kubeconfig(self, node: str) -> Path:
        """The identity of a node's kubelet, as the Node authoriser knows it."""
        pair = self.certificates.cluster.issue(
            f"kubelet-{node}", f"system:node:{node}", organisations=["system:nodes"]
        )
        return self.client_kubeconfig(f"kubelet-{node}", pair)

    def _etcd_arguments(self) -> list[str]:
        own, authority = self.certificates.etcd, self.certificates.cluster.files.cert
        client = f"https://{LOCALHOST}:{self.addresses.etcd}"
        peer = f"https://{LOCALHOST}:{self.addresses.etcd_peer}"
        return [
            "--name=local",
            f"--data-dir={self.state.etcd}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=local={peer}",
            f"--cert-file={own.cert}",
            f"--key-file={own.key}",
            f"--trusted-ca-file={authority}",
            "--client-cert-auth",
            f"--peer-cert-file={own.cert}",
            f"--peer-key-file={own.key}",
            f"--peer-trusted-ca-file={authority}",
            "--peer-client-cert-auth",
            "--logger=zap",
            "--log-level=warn",
        ]

    def _api_arguments(self) -> list[str]:
        c = self.certificates
        return [
            f"--etcd-servers=https://{LOCALHOST}:{self.addresses.etcd}",
            f"--etcd-cafile={c.cluster.files.cert}",
            f"--etcd-certfile={c.api_to_etcd.cert}",
            f"--etcd-keyfile={c.api_to_etcd.key}",
            f"--bind-address={LOCALHOST}",
            f"--advertise-address={LOCALHOST}",
            f"--secure-port={self.addresses.api}",
            f"--tls-cert-file={c.api.cert}",
            f"--tls-private-key-file={c.api.key}",
            f"--client-ca-file={c.cluster.files.cert}",
            f"--kubelet-certificate-authority={c.cluster.files.cert}",
            f"--kubelet-client-certificate={c.api_to_etcd.cert}",
            f"--kubelet-client-key={c.api_to_etcd.key}",
            "--kubelet-preferred-address-types=InternalIP",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--anonymous-auth=false",
            "--allow-privileged=true",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            # 127.0.0.1 can be no Service endpoint; nothing here speaks to the API server by one.
            "--endpoint-reconciler-type=none",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-key-file={c.tokens}",
            f"--service-account-signing-key-file={c.tokens}",
            "--service-account-extend-token-expiration=false",
            f"--requestheader-client-ca-file={c.front_proxy.files.cert}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User",
            f"--proxy-client-cert-file={c.proxy_client.cert}",
            f"--proxy-client-key-file={c.proxy_client.key}",
            "--profiling=false",
            f"--cert-dir={self.state.pki}",
        ]

    def _controller_manager_arguments(self) -> list[str]:
        c = self.certificates
        own = self.state.kubeconfig("controller-manager")
        return [
            f"--kubeconfig={own}",
            f"--authentication-kubeconfig={own}",
            f"--authorization-kubeconfig={own}",
            "--authorization-always-allow-paths=/healthz",
            f"--bind-address={LOCALHOST}",
            f"--secure-port={self.addresses.controller_manager}",
            f"--tls-cert-file={c.controller_manager.cert}",
            f"--tls-private-key-file={c.controller_manager.key}",
            f"--root-ca-file={c.cluster.files.cert}",
            f"--service-account-private-key-file={c.tokens}",
            # Its signers are for kubernetes.io/...; `tercet.io/node` is signed by the operator.
            f"--cluster-signing-cert-file={c.cluster.files.cert}",
            f"--cluster-signing-key-file={c.cluster.files.key}",
            f"--client-ca-file={c.cluster.files.cert}",
            f"--requestheader-client-ca-file={c.front_proxy.files.cert}",
            "--use-service-account-credentials=true",
            f"--controllers={','.join(CONTROLLERS)}",
            "--leader-elect=false",
            "--attach-detach-reconcile-sync-period=10s",
            "--pvclaimbinder-sync-period=5s",
            "--node-monitor-period=2s",
            "--profiling=false",
        ]

    def _scheduler_arguments(self) -> list[str]:
        own = self.state.kubeconfig("scheduler")
        return [
            f"--kubeconfig={own}",
            f"--authentication-kubeconfig={own}",
            f"--authorization-kubeconfig={own}",
            "--authorization-always-allow-paths=/healthz",
            f"--bind-address={LOCALHOST}",
            f"--secure-port={self.addresses.scheduler}",
            f"--tls-cert-file={self.certificates.scheduler.cert}",
            f"--tls-private-key-file={self.certificates.scheduler.key}",
            "--leader-elect=false",
            "--profiling=false",
        ]

    async def wait_ready(self, port: int, path: str, name: ProcessName) -> None:
        """Waits until a process of the control plane answers 200."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        url = f"https://{LOCALHOST}:{port}{path}"
        answer = "nothing"
        while time.monotonic() < deadline_s:
            answer = await asyncio.to_thread(self._probe, url)
            if answer == "ok":
                return
            await asyncio.sleep(READY_PAUSE_S)
        raise ProcessError(
            f"{name} is not ready after {READY_TIMEOUT_S:.0f} s ({url}: {answer}); "
            f"the end of {self._processes.log_path(name)}:\n{self._processes.log_tail(name)}"
        )

    def _probe(self, url: str) -> str:
        context = ssl.create_default_context(cafile=str(self.certificates.cluster.files.cert))
        admin = self.state.pki / "admin"
        context.load_cert_chain(admin.with_suffix(".crt"), admin.with_suffix(".key"))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(url, timeout=PROBE_TIMEOUT_S):
                return "ok"
        except urllib.error.HTTPError as error:
            return f"{error.code}: {error.read(200).decode(errors='replace')}"
        except (OSError, http.client.HTTPException) as error:
            return repr(error)

    async def _wait_default_account(self) -> None:
        # Without it the API server refuses pods in the namespace "default".
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        async with Kube(self.admin) as kube:
            while True:
                try:
                    await kube.get(core("serviceaccounts", "default", namespace="default"))
                    return
                except KubeError as error:
                    if time.monotonic() > deadline_s:
                        raise ProcessError(
                            f"no default service account after {READY_TIMEOUT_S:.0f} s: {error}"
                        ) from error
                await asyncio.sleep(READY_PAUSE_S)
