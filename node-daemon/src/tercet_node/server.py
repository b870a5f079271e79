"""The agent's own service (agent.proto) over TCP with mutual TLS, for cli, csi and operator.

Only who shows a certificate of the cluster's CA is heard. The credentials are fetched at each
handshake, so that a renewed certificate or CA is used without a restart.
"""

from __future__ import annotations

from typing import NoReturn, TypeAlias

import grpc
import grpc.aio
import structlog

from tercet_api.protos import agent_pb2, agent_pb2_grpc
from tercet_node.certificates import Certificates
from tercet_node.engine import MESSAGE_BYTES_MAX, Engine
from tercet_node.errors import EngineAway, EngineError, NotHere, OutcomeUnknown
from tercet_node.world import World

CALLS_MAX = 16
CALLS_EACH_MAX = 4
STOP_GRACE_S = 0.5

log = structlog.get_logger(__name__)
ChunkSumsContext: TypeAlias = (
    "grpc.aio.ServicerContext[agent_pb2.ChunkSumsRequest, agent_pb2.ChunkSumsResponse]"
)
NodeStatusContext: TypeAlias = (
    "grpc.aio.ServicerContext[agent_pb2.NodeStatusRequest, agent_pb2.NodeStatusResponse]"
)


class AgentService(agent_pb2_grpc.AgentServicer):
    """Answers out of the engine."""

    def __init__(self, engine: Engine, world: World) -> None:
        self._engine = engine
        self._world = world

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
            links=[agent_pb2.Link(node=link.node, up=link.up) for link in status.links],
        )


async def _abort(context: ChunkSumsContext | NodeStatusContext, error: EngineError) -> NoReturn:
    code = grpc.StatusCode.UNKNOWN
    if isinstance(error, EngineAway | OutcomeUnknown):
        code = grpc.StatusCode.UNAVAILABLE
    elif isinstance(error, NotHere):
        code = grpc.StatusCode.NOT_FOUND
    await context.abort(code, str(error))
    raise AssertionError("abort returned")


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
