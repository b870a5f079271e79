"""The operator's processes against a real API server, with agents that write what agents write.

The operator has its own service account and no more rights than `tercet_api.rbac` gives it.
"""

from __future__ import annotations

import asyncio
import base64
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytest_asyncio
from crds_control_plane import Cluster
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from operator_agents import GIB, Agent, agents

from tercet_api.clients import Api, Json, Listed, NotFound, put, snapshots, storage_nodes, volumes
from tercet_api.coordination import leases
from tercet_api.coordination.membership import NODE_LEASE_DURATION_S
from tercet_api.generate import MANIFESTS, RBAC_FILE
from tercet_api.names import NAMESPACE, OPERATOR_LEASE, SIGNER, is_uuid
from tercet_api.objects import (
    ConditionStatus,
    Metadata,
    NodePhase,
    Orphan,
    Snapshot,
    SnapshotSpec,
    Source,
    Volume,
    VolumePhase,
    VolumeSpec,
)
from tercet_e2e.controlplane import kubeconfig
from tercet_e2e.ports import Ports

pytestmark = [pytest.mark.local, pytest.mark.asyncio(loop_scope="module")]

WAIT_S = 60.0
START_S = 180.0
"""Python, kopf and the client take seconds of processor time to load, more on a busy machine."""
TAKEOVER_S = 40.0
T = TypeVar("T")


async def until(look: Callable[[], Awaitable[T | None]], what: str, wait_s: float = WAIT_S) -> T:
    """Look again and again until there is something."""
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s:
        found = await look()
        if found is not None:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {wait_s:.0f} s: {what}")


def account_kubeconfig(cluster: Cluster, folder: Path, account: str, *bound: str) -> Path:
    """A kubeconfig with a token of one of Tercet's service accounts."""
    token = cluster.kubectl_run("-n", NAMESPACE, "create", "token", account, *bound).strip()
    authority = cluster.plane.certificates.cluster.files.cert
    text = kubeconfig(cluster.plane.addresses.api_url, authority, account, {"token": token})
    path = folder / f"{account}-{abs(hash(bound))}.yaml"
    path.write_text(text)
    return path


class Process:
    """One operator as a process."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    def get(self, path: str) -> tuple[int, str]:
        """Ask its HTTP server."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def end(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.process.returncode is None:
            self.process.send_signal(number)


@asynccontextmanager
async def operator(config: Path, folder: Path, port: int) -> AsyncIterator[Process]:
    """An operator, ended with SIGTERM; it must exit 0 unless it was killed."""
    log = folder / f"operator-{port}.log"
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tercet_operator", "--kubeconfig", str(config)),
            *("--http", f"127.0.0.1:{port}", "--log-format", "text"),
            stderr=output,
        )
    running = Process(process, port, log)

    async def serves() -> bool | None:
        assert process.returncode is None, f"the operator ended:\n{log.read_text()}"
        try:
            return True if await asyncio.to_thread(running.get, "/healthz") else None
        except OSError:
            return None

    try:
        await until(serves, "the operator serves", START_S)
        yield running
    finally:
        running.end(signal.SIGTERM)
        code = await asyncio.wait_for(process.wait(), WAIT_S)
        sys.stderr.write(log.read_text())
        assert code in {0, -signal.SIGKILL}, f"the operator ended with {code}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def setup(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Api, list[Agent], Path, Path]]:
    """Namespace, rights, three agents; and the operator's kubeconfig."""
    folder = tmp_path_factory.mktemp("operator")
    cluster.kubectl_run("create", "namespace", NAMESPACE)
    cluster.kubectl_run("apply", "-f", str(MANIFESTS / RBAC_FILE))
    config = account_kubeconfig(cluster, folder, "tercet-operator")
    async with Api(cluster.kubeconfig) as api, agents(api) as running:
        yield api, running, config, folder


@pytest.fixture(scope="module")
def ports() -> Iterator[Ports]:
    """Ports that no outgoing connection is given before an operator listens there."""
    with Ports() as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def leader(
    setup: tuple[Api, list[Agent], Path, Path], ports: Ports
) -> AsyncIterator[Process]:
    """One operator for the tests that need no second."""
    _, _, config, folder = setup
    async with operator(config, folder, ports.take()) as process:

        async def leads() -> bool | None:
            _, text = await asyncio.to_thread(process.get, "/metrics")
            return True if "tercet_operator_leading 1.0" in text else None

        await until(leads, "the operator leads")
        yield process


@pytest.fixture
def api(setup: tuple[Api, list[Agent], Path, Path]) -> Api:
    """An administrator's connection."""
    return setup[0]


@pytest.fixture
def nodes(setup: tuple[Api, list[Agent], Path, Path]) -> list[Agent]:
    """The agents."""
    return setup[1]


async def make(api: Api, name: str, *, new: bool = True, **spec: Any) -> Volume:
    """Create a Volume, as the CSI controller (new) or as kubectl."""
    wanted = VolumeSpec(size_bytes=spec.pop("size_bytes", GIB), **spec)
    made = await volumes(api).create(Volume(metadata=Metadata(name=name), spec=wanted))
    if new:
        made = await volumes(api).patch_status(name, {"status": {"newUid": made.uid}})
    return made


async def ready(api: Api, name: str) -> Volume:
    """Wait for a volume to be Ready."""

    return await followed(
        api, name, lambda found: found.status.phase is VolumePhase.READY, f"{name} is Ready"
    )


async def followed(api: Api, name: str, check: Callable[[Volume], bool], what: str) -> Volume:
    """Follow a volume until the check holds."""
    last: Volume | None = None
    try:
        async with asyncio.timeout(WAIT_S), aclosing(volumes(api).watch(name)) as events:
            async for event in events:
                seen = event.objects if isinstance(event, Listed) else (event.object,)
                for last in seen:
                    if check(last):
                        return last
    except TimeoutError:
        pass
    raise AssertionError(f"not within {WAIT_S:.0f} s: {what}; it is {last}")


async def all_ready(api: Api, names: set[str]) -> None:
    """Follow all volumes until these are Ready."""
    left = set(names)
    async with asyncio.timeout(4 * WAIT_S), aclosing(volumes(api).watch()) as events:
        async for event in events:
            seen = event.objects if isinstance(event, Listed) else (event.object,)
            left -= {v.name for v in seen if v.status.phase is VolumePhase.READY}
            if not left:
                return


async def condition(api: Api, name: str, kind: str, reason: str, words: str = "") -> Volume:
    """Wait for a volume's condition to have this reason, and these words in its message.

    The first message may be of a world that lacks the last change of another object.
    """

    def says(found: Volume) -> bool:
        return any(
            (c.type, c.reason) == (kind, reason) and words in c.message
            for c in found.status.conditions
        )

    return await followed(api, name, says, f"{kind} of {name} says {reason}: ...{words}...")


async def remove(api: Api, name: str) -> None:
    """Delete a volume and wait until it is gone."""
    there = await volumes(api).get(name)
    await volumes(api).delete(name, uid=there.uid)

    async def gone() -> bool | None:
        try:
            await volumes(api).get(name)
        except NotFound:
            return True
        return None

    await until(gone, f"volume {name} is gone")


async def node_phase(api: Api, name: str, wanted: NodePhase) -> bool | None:
    """True once a StorageNode has this phase, for `until`."""
    return True if (await storage_nodes(api).get(name)).status.phase is wanted else None


async def reported(api: Api, agent: Agent) -> None:
    """Report what is on a node, and wait until the operator shows that it has seen it.

    Nodes and volumes are watched apart: a volume made after a report may be seen before it.
    """
    agent.used_percent = agent.used_percent % 50 + 1
    await agent.report()

    async def seen() -> bool | None:
        found = await storage_nodes(api).get(agent.name)
        return True if found.status.used_percent == agent.used_percent else None

    await until(seen, f"the operator has seen the report of {agent.name}")


async def told(api: Api, name: str, *reasons: str) -> None:
    """Wait until there are Events with these reasons on an object."""
    query = {"fieldSelector": f"involvedObject.name={name}"}

    async def look() -> bool | None:
        answer = await api.request("GET", "/api/v1/namespaces/default/events", query=query)
        return True if set(reasons) <= {item["reason"] for item in answer["items"]} else None

    await until(look, f"events {reasons} on {name}")


async def holder(api: Api) -> str | None:
    """Who holds the operators' Lease."""
    try:
        return (await leases(api).get(OPERATOR_LEASE)).spec.holder_identity or None
    except NotFound:
        return None


async def test_one_leads_and_the_other_takes_over(
    setup: tuple[Api, list[Agent], Path, Path], ports: Ports
) -> None:
    """Of two operators one works; when it is killed the other does, within seconds.

    The first test here: those after it share an operator that holds the Lease.
    """
    api, _, config, folder = setup
    async with (
        operator(config, folder, ports.take()) as one,
        operator(config, folder, ports.take()) as two,
    ):
        pids = {process.process.pid: process for process in (one, two)}

        async def elected() -> Process | None:
            who = await holder(api)
            return pids.get(int(who.split("_")[-2])) if who else None

        leads = await until(elected, "one leads")
        other = two if leads is one else one
        await make(api, "before")
        await ready(api, "before")
        _, metrics = await asyncio.to_thread(other.get, "/metrics")
        assert "tercet_operator_leading 0.0" in metrics
        killed_s = time.monotonic()
        leads.end(signal.SIGKILL)
        await make(api, "after")

        async def taken_over() -> bool | None:
            return True if await elected() is other else None

        await until(taken_over, "the other leads", TAKEOVER_S)
        sys.stderr.write(f"taken over after {time.monotonic() - killed_s:.1f} s\n")
        await ready(api, "after")
        for name in ("before", "after"):
            await remove(api, name)
    assert await holder(api) is None, "a leader that ends in order gives its Lease back"


async def test_nodes_become_ready(leader: Process, api: Api, nodes: list[Agent]) -> None:
    """A node whose agent renews its Lease is Ready, and says so in columns and events."""
    for agent in nodes:

        async def look(name: str = agent.name) -> bool | None:
            found = await storage_nodes(api).get(name)
            return True if found.status.phase == "Ready" else None

        await until(look, f"{agent.name} is Ready")
    await told(api, "n1", "Ready")
    status, text = await asyncio.to_thread(leader.get, "/healthz")
    assert (status, text) == (200, "ok\n")
    _, metrics = await asyncio.to_thread(leader.get, "/metrics")
    assert "tercet_operator_leading 1.0" in metrics


async def test_life_of_a_volume(leader: Process, api: Api) -> None:
    """Created, placed on three nodes, configured, Ready; deleted, replicas first."""
    started_s = time.monotonic()
    await make(api, "life")
    found = await ready(api, "life")
    took_ms = (time.monotonic() - started_s) * 1000
    sys.stderr.write(f"volume create to Ready: {took_ms:.0f} ms\n")
    config = found.status.config
    assert config is not None
    assert is_uuid(found.spec.uuid or "")
    assert {member.node for member in config.members} == {"n1", "n2", "n3"}
    assert {place.address for place in found.status.endpoints} == {
        f"127.0.1.{number}" for number in (1, 2, 3)
    }
    assert found.status.copies == "3/3"
    await told(api, "life", "Placed", "Configured", "Serving")
    await remove(api, "life")


async def test_a_volume_by_hand_waits_for_every_node(
    leader: Process, api: Api, nodes: list[Agent]
) -> None:
    """No config never means new: one silent node holds the placement back."""
    nodes[0].reports_orphans = False
    await reported(api, nodes[0])
    await make(api, "by-hand", new=False)
    waiting = await condition(api, "by-hand", "Placed", "OrphansUnknown", "waiting for n1")
    assert not waiting.status.replicas
    nodes[0].reports_orphans = True
    await nodes[0].report()
    await ready(api, "by-hand")
    await remove(api, "by-hand")


async def test_a_volume_with_orphans_is_not_new(
    leader: Process, api: Api, nodes: list[Agent]
) -> None:
    """An orphan of its UUID keeps a volume from being made anew, whatever its creator says."""
    kept = "11111111-2222-4333-8444-555555555555"
    nodes[1].orphans = [
        Orphan(volume=kept, name="lost", replica="99999999-2222-4333-8444-555555555555")
    ]
    await reported(api, nodes[1])
    await make(api, "found-again", uuid=kept)
    found = await condition(api, "found-again", "Ready", "OrphansFound", "n2")
    assert not found.status.replicas
    nodes[1].orphans = []
    await nodes[1].report()
    await ready(api, "found-again")
    await remove(api, "found-again")


async def test_two_volumes_of_one_uuid(leader: Process, api: Api) -> None:
    """A copied manifest gets no second set of replicas."""
    first = await make(api, "original")
    original = await ready(api, "original")
    await make(api, "copy", uuid=original.spec.uuid)
    found = await condition(api, "copy", "Placed", "DuplicateUuid")
    assert not found.status.replicas
    assert first.uid != found.uid
    await remove(api, "copy")
    await remove(api, "original")


async def test_too_large(leader: Process, api: Api) -> None:
    """A volume larger than the cluster says so where the user looks, and takes no room."""
    await make(api, "huge", size_bytes=200 * GIB)
    await condition(api, "huge", "Ready", "Unplaceable", f"has room for {100 * GIB} bytes")
    await remove(api, "huge")


async def test_a_replica_that_cannot_be_made(leader: Process, api: Api, nodes: list[Agent]) -> None:
    """The reason stands in the condition; with another node it is placed there."""
    nodes[2].refuses = "no space on device d1"
    await make(api, "refused", replicas=3)
    found = await condition(api, "refused", "Ready", "Unplaceable", "no space on device d1")
    assert found.status.config is None
    await remove(api, "refused")
    await make(api, "elsewhere", replicas=2, placement={"preferredNode": "n3"})
    other = await ready(api, "elsewhere")
    assert other.status.config is not None
    assert {m.node for m in other.status.config.members} == {"n1", "n2"}
    nodes[2].refuses = None
    await remove(api, "elsewhere")


async def test_deletion_waits_for_what_depends(leader: Process, api: Api) -> None:
    """Attachments and snapshots keep a volume; it goes by itself when they are gone."""
    host = {"nodeName": "w1", "hostNQN": "nqn.2026-11.io.tercet:host:x"}
    await make(api, "held", attachments=[host])
    await ready(api, "held")
    snapshot = Snapshot(metadata=Metadata(name="held-1"), spec=SnapshotSpec(volume="held"))
    made = await snapshots(api).create(snapshot)

    async def taken() -> bool | None:
        found = await snapshots(api).get("held-1")
        return True if found.status.phase == "Ready" else None

    await until(taken, "the snapshot is Ready")
    there = await volumes(api).get("held")
    await volumes(api).delete("held", uid=there.uid)
    await condition(api, "held", "Deleting", "Attached")
    await volumes(api).patch("held", [put("/spec/attachments", [])])
    found = await condition(api, "held", "Deleting", "HasSnapshots")
    assert not found.deletion_allowed
    assert all(entry.state.value == "InSync" for entry in found.status.replicas)
    await snapshots(api).delete("held-1", uid=made.uid)

    async def gone() -> bool | None:
        try:
            await volumes(api).get("held")
        except NotFound:
            return True
        return None

    await until(gone, "the volume is gone")


async def test_clone_of_a_volume(leader: Process, api: Api) -> None:
    """A clone starts from a snapshot of its own, which goes when it is Ready."""
    await make(api, "parent")
    await ready(api, "parent")
    await make(api, "child", source=Source(volume="parent"))
    child = await ready(api, "child")
    assert child.status.config is not None

    async def none_left() -> bool | None:
        return True if not await snapshots(api).list() else None

    await until(none_left, "the clone's snapshot is gone")
    await remove(api, "child")
    await remove(api, "parent")


def certificate_request(names: list[x509.GeneralName], subject: str) -> bytes:
    """A PEM request with a fresh key."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


async def ask(config: Path, name: str, pem: bytes, *usages: str) -> Json:
    """Ask for a certificate, and wait for certificate or refusal."""
    path = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
    body = {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"name": name},
        "spec": {
            "signerName": SIGNER,
            "request": base64.b64encode(pem).decode(),
            "usages": ["digital signature", *usages],
        },
    }
    async with Api(config) as asker:
        await asker.request("POST", path, body)

        async def decided() -> Json | None:
            answer = await asker.request("GET", f"{path}/{name}")
            status: Json = answer.get("status") or {}
            kinds = {c["type"] for c in status.get("conditions") or ()}
            return status if status.get("certificate") or "Denied" in kinds else None

        return await until(decided, f"request {name} is decided")


async def test_certificates(
    leader: Process,
    cluster: Cluster,
    api: Api,
    tmp_path: Path,
) -> None:
    """A node's agent gets its own node's certificate; nobody gets another's."""
    import ipaddress

    for number in (1, 2):
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"machine-n{number}"}}
        await api.request("POST", "/api/v1/nodes", node)
    bound = ("--bound-object-kind=Node", "--bound-object-name=machine-n1")
    agent = account_kubeconfig(cluster, tmp_path, "tercet-node", *bound)
    unbound = account_kubeconfig(cluster, tmp_path, "tercet-node")
    controller = account_kubeconfig(cluster, tmp_path, "tercet-csi-controller")

    def names(number: int) -> list[x509.GeneralName]:
        address = ipaddress.ip_address(f"127.0.1.{number}")
        return [x509.DNSName(f"n{number}"), x509.IPAddress(address)]

    both = ("client auth", "server auth")
    own = await ask(agent, "own", certificate_request(names(1), "storagenode:n1"), *both)
    authority = (await api.request("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps/tercet-ca"))[
        "data"
    ]["ca.crt"]
    signed = x509.load_pem_x509_certificate(base64.b64decode(own["certificate"]))
    signed.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.encode()))
    assert signed.subject.rfc4514_string() == "CN=storagenode:n1"

    refusals = {
        "other-node": (agent, certificate_request(names(2), "storagenode:n2"), "bound to node"),
        "other-names": (agent, certificate_request(names(2), "storagenode:n1"), "names must be"),
        "unbound": (unbound, certificate_request(names(1), "storagenode:n1"), "bound to no node"),
        "wrong-account": (
            controller,
            certificate_request(names(1), "storagenode:n1"),
            "for the agents",
        ),
    }
    for name, (config, pem, why) in refusals.items():
        status = await ask(config, name, pem, *both)
        assert "certificate" not in status
        assert why in status["conditions"][0]["message"]

    mine = await ask(
        controller, "controller", certificate_request([], "csi-controller"), "client auth"
    )
    assert mine["certificate"]
    admin = await ask(cluster.kubeconfig, "admin", certificate_request([], "admin"), "client auth")
    assert admin["certificate"]
    pretender = await ask(agent, "pretender", certificate_request([], "admin"), "client auth")
    assert "certificate" not in pretender


async def test_a_node_that_falls_silent(leader: Process, api: Api, nodes: list[Agent]) -> None:
    """Its Lease expires: not Ready within seconds; it comes back by renewing."""
    await until(lambda: node_phase(api, "n3", NodePhase.READY), "n3 is Ready")
    nodes[2].renews = False
    await until(lambda: node_phase(api, "n3", NodePhase.NOT_READY), "n3 is NotReady")
    took_s = time.monotonic() - nodes[2].renewed_s
    # The operator saw the last renewal after it began, never before.
    assert NODE_LEASE_DURATION_S <= took_s < 30.0, f"shown after {took_s:.1f} s"
    await told(api, "n3", "LeaseExpired")
    nodes[2].renews = True
    await until(lambda: node_phase(api, "n3", NodePhase.READY), "n3 is Ready again")


async def test_a_node_with_replicas_is_kept(leader: Process, api: Api) -> None:
    """A StorageNode goes only when no volume has a replica there."""
    extra = Agent(api, "n9", 9, {})
    await extra.register()
    running = asyncio.create_task(extra.run())
    try:
        # A preference is not waited for: before n9 is Ready the volume would go to another node.
        await until(lambda: node_phase(api, "n9", NodePhase.READY), "n9 is Ready")
        await make(api, "on-n9", replicas=1, placement={"preferredNode": "n9"})
        placed = await ready(api, "on-n9")
        assert [entry.node for entry in placed.status.replicas] == ["n9"]
        node = await storage_nodes(api).get("n9")
        await storage_nodes(api).delete("n9", uid=node.uid)

        async def held() -> bool | None:
            found = await storage_nodes(api).get("n9")
            said = [c for c in found.status.conditions if c.type == "Deleting"]
            return True if said and said[0].status is ConditionStatus.FALSE else None

        await until(held, "n9 says what keeps it")
        await remove(api, "on-n9")

        async def gone() -> bool | None:
            try:
                await storage_nodes(api).get("n9")
            except NotFound:
                return True
            return None

        await until(gone, "n9 is gone")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_many_volumes_at_once(leader: Process, api: Api) -> None:
    """Forty volumes are placed side by side, none twice."""
    names = [f"many-{number}" for number in range(40)]
    started_s = time.monotonic()
    await asyncio.gather(*(make(api, name) for name in names))
    await all_ready(api, set(names))
    sys.stderr.write(f"{len(names)} volumes Ready after {time.monotonic() - started_s:.1f} s\n")
    found = [await volumes(api).get(name) for name in names]
    assert all(len(volume.status.replicas) == 3 for volume in found)
    assert all(volume.status.config and volume.status.config.epoch == 1 for volume in found)
    for volume in found:
        await volumes(api).delete(volume.name, uid=volume.uid)

    async def all_gone() -> bool | None:
        left = {volume.name for volume in await volumes(api).list()}
        return None if left & set(names) else True

    await until(all_gone, "all are gone", 4 * WAIT_S)
