"""The agent's own service (agent.proto) over TCP with mutual TLS, for cli, csi and operator.

Only who shows a certificate of the cluster's CA is heard. The credentials are fetched at each
handshake, so that a renewed certificate or CA is used without a restart.
"""

from __future__ import annotations

import uuid
from typing import NoReturn, TypeAlias

import grpc
import grpc.aio
import structlog

from tercet_api.protos import agent_pb2, agent_pb2_grpc
from tercet_node.certificates import Certificates
from tercet_node.engine import MESSAGE_BYTES_MAX, Engine
from tercet_node.errors import EngineAway, EngineError, NotHere, OutcomeUnknown
from tercet_node.members.service import Membership, NoMembers
from tercet_node.members.sight import Sight
from tercet_node.membership import CommandError, MembershipError
from tercet_node.world import World

CALLS_MAX = 16
CALLS_EACH_MAX = 4
STOP_GRACE_S = 0.5
ADMIN = b"admin"
"""Common name of the certificates that people get."""

log = structlog.get_logger(__name__)
ChunkSumsContext: TypeAlias = (
    "grpc.aio.ServicerContext[agent_pb2.ChunkSumsRequest, agent_pb2.ChunkSumsResponse]"
)
ChunkMapContext: TypeAlias = (
    "grpc.aio.ServicerContext[agent_pb2.ChunkMapRequest, agent_pb2.ChunkMapResponse]"
)
NodeStatusContext: TypeAlias = (
    "grpc.aio.ServicerContext[agent_pb2.NodeStatusRequest, agent_pb2.NodeStatusResponse]"
)
MembersContext: TypeAlias = (
    "grpc.aio.ServicerContext[agent_pb2.MembersRequest, agent_pb2.MembersResponse]"
)
LockContext: TypeAlias = (
    "grpc.aio.ServicerContext[agent_pb2.LockMembersRequest, agent_pb2.MembersResponse]"
)
CheckContext: TypeAlias = (
    "grpc.aio.ServicerContext[agent_pb2.CheckMembersRequest, agent_pb2.CheckMembersResponse]"
)


class AgentService(agent_pb2_grpc.AgentServicer):
    """Answers out of the engine and the list of members."""

    def __init__(self, engine: Engine, world: World, membership: Membership) -> None:
        self._engine = engine
        self._world = world
        self._membership = membership

    async def ChunkSums(  # noqa: N802, D102
        self, request: agent_pb2.ChunkSumsRequest, context: ChunkSumsContext
    ) -> agent_pb2.ChunkSumsResponse:
        held = self._world.held(request.volume)
        try:
            sums = await self._engine.chunk_sums(request.volume)
        except EngineError as error:
            await _abort(context, error)
        return agent_pb2.ChunkSumsResponse(
            node=self._world.node,
            replica=held.replica if held is not None else "",
            epoch=sums.epoch,
            lsn=sums.lsn,
            chunk_bytes=sums.chunk_bytes,
            sums=[agent_pb2.ChunkSum(index=s.index, crc32c=s.crc32c) for s in sums.sums],
        )

    async def ChunkMap(  # noqa: N802, D102
        self, request: agent_pb2.ChunkMapRequest, context: ChunkMapContext
    ) -> agent_pb2.ChunkMapResponse:
        held = self._world.held(request.volume)
        try:
            found = await self._engine.chunk_map(request.volume, request.from_chunk)
        except EngineError as error:
            await _abort(context, error)
        rows = [
            agent_pb2.ChunkRow(
                chunk=row.chunk,
                mapped_bytes=row.mapped_bytes,
                shared_bytes=row.shared_bytes,
                extents=row.extents,
                device_offset_bytes=row.device_offset_bytes,
                changed_epoch=row.changed_epoch,
                changed_lsn=row.changed_lsn,
            )
            for row in found.rows
        ]
        return agent_pb2.ChunkMapResponse(
            node=self._world.node,
            replica=held.replica if held is not None else "",
            device=found.device,
            region=found.region,
            regions=found.regions,
            epoch=found.epoch,
            lsn=found.lsn,
            chunk_bytes=found.chunk_bytes,
            rows=rows,
            next_chunk=found.next_chunk if found.HasField("next_chunk") else None,
        )

    async def NodeStatus(  # noqa: N802, D102
        self, request: agent_pb2.NodeStatusRequest, context: NodeStatusContext
    ) -> agent_pb2.NodeStatusResponse:
        try:
            status = await self._engine.status()
        except EngineAway:
            return agent_pb2.NodeStatusResponse(node=self._world.node)
        except EngineError as error:
            await _abort(context, error)
        replicas = [
            agent_pb2.Replica(
                volume=replica.volume,
                name=replica.name,
                replica=replica.replica,
                epoch=replica.epoch,
                serving=replica.serving,
                tail_lsn=replica.tail_lsn,
                applied_lsn=replica.applied_lsn,
                allocated_bytes=replica.allocated_bytes,
                incomplete=replica.incomplete,
            )
            for replica in status.replicas
        ]
        return agent_pb2.NodeStatusResponse(
            node=status.node,
            instance=status.instance,
            version=status.version,
            replicas=replicas,
            links=[
                agent_pb2.Link(node=link.node, up=link.up, membership=self._standing(link.node))
                for link in status.links
            ],
        )

    def _standing(self, name: str) -> str:
        """What the membership holds of a StorageNode."""
        sight, node = self._membership.sight(), self._world.nodes.get(name)
        entry = None if sight is None or node is None else sight.find(node.uid)
        return "" if sight is None or entry is None else sight.standing(entry).value

    async def Members(  # noqa: N802, D102
        self, request: agent_pb2.MembersRequest, context: MembersContext
    ) -> agent_pb2.MembersResponse:
        del request
        try:
            return self._members()
        except MembershipError as error:
            await _refuse(context, error)

    async def LockMembers(  # noqa: N802, D102
        self, request: agent_pb2.LockMembersRequest, context: LockContext
    ) -> agent_pb2.MembersResponse:
        await _for_people(context)
        try:
            if request.locked:
                self._membership.lock()
            else:
                self._membership.unlock()
            return self._members()
        except MembershipError as error:
            await _refuse(context, error)

    async def CheckMembers(  # noqa: N802, D102
        self, request: agent_pb2.CheckMembersRequest, context: CheckContext
    ) -> agent_pb2.CheckMembersResponse:
        del request
        await _for_people(context)
        try:
            checked = await self._membership.check()
        except MembershipError as error:
            await _refuse(context, error)
        return agent_pb2.CheckMembersResponse(
            node=self._world.node,
            size=len(checked.after),
            digest=f"{checked.after.digest:032x}",
            repaired=checked.changed,
        )

    def _members(self) -> agent_pb2.MembersResponse:
        sight = Sight.of(self._membership.running().node)
        names = {node.uid: name for name, node in self._world.nodes.items()}
        members = []
        for entry in sight.members:
            uid = str(uuid.UUID(bytes=entry.node))
            members.append(
                agent_pb2.Member(
                    nid=entry.nid,
                    name=names.get(uid, ""),
                    uid=uid,
                    instance=str(uuid.UUID(bytes=entry.instance)),
                    address=entry.address,
                    incarnation=entry.incarnation,
                    state=sight.standing(entry).value,
                )
            )
        return agent_pb2.MembersResponse(
            node=self._world.node,
            nid=sight.nid,
            size=sight.size,
            digest=sight.digest,
            locked=sight.locked,
            members=members,
        )


async def _abort(
    context: ChunkSumsContext | ChunkMapContext | NodeStatusContext, error: EngineError
) -> NoReturn:
    code = grpc.StatusCode.UNKNOWN
    if isinstance(error, EngineAway | OutcomeUnknown):
        code = grpc.StatusCode.UNAVAILABLE
    elif isinstance(error, NotHere):
        code = grpc.StatusCode.NOT_FOUND
    await context.abort(code, str(error))
    raise AssertionError("abort returned")


async def _refuse(
    context: MembersContext | LockContext | CheckContext, error: MembershipError
) -> NoReturn:
    code = grpc.StatusCode.INTERNAL
    if isinstance(error, NoMembers):
        code = grpc.StatusCode.UNAVAILABLE
    elif isinstance(error, CommandError):
        code = grpc.StatusCode.FAILED_PRECONDITION
    await context.abort(code, str(error))
    raise AssertionError("abort returned")


async def _for_people(context: LockContext | CheckContext) -> None:
    """Nodes and the csi controller have certificates of the same CA, and no business here."""
    names = context.auth_context().get("x509_common_name", ())
    if list(names) != [ADMIN]:
        shown = b", ".join(names).decode(errors="replace") or "nobody"
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"for the certificate `admin`, not for {shown}"
        )


def server_credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Mutual TLS out of whatever the certificates are at the time of a handshake."""

    def fetch() -> grpc.ServerCertificateConfiguration:
        now = certificates.current
        assert now is not None, "the server starts when there is a certificate"
        return grpc.ssl_server_certificate_configuration(
            [(now.key, now.certificate)], root_certificates=now.ca
        )

    return grpc.dynamic_ssl_server_credentials(fetch(), fetch, require_client_authentication=True)


async def serve(listen: str, service: AgentService, certificates: Certificates) -> None:
    """Serve on `listen` (address:port) from the first certificate on, until cancelled."""
    await certificates.ready.wait()
    server = grpc.aio.server(
        maximum_concurrent_rpcs=CALLS_MAX,
        options=[
            ("grpc.max_concurrent_streams", CALLS_EACH_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.so_reuseport", 0),
        ],
    )
    agent_pb2_grpc.add_AgentServicer_to_server(service, server)
    server.add_secure_port(listen, server_credentials(certificates))
    await server.start()
    log.info("serving", address=listen)
    try:
        await server.wait_for_termination()
    finally:
        await server.stop(STOP_GRACE_S)
