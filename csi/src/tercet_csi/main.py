"""`tercet-csi controller` and `tercet-csi node`: command lines of docs/processes.md."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import grpc.aio
import structlog
import typer

from tercet_csi.identity import Identity
from tercet_csi.server import serve
from tercet_csi.v1 import csi_pb2_grpc

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Endpoint = Annotated[str, typer.Option(help="Where to serve CSI: unix://PATH.")]
Http = Annotated[str | None, typer.Option(help="ADDRESS:PORT of metrics; none without it.")]
LogFormat = Annotated[str, typer.Option(help="json or text.")]


@app.command()
def controller(
    endpoint: Endpoint,
    kubeconfig: Annotated[Path | None, typer.Option(help="Absent inside a cluster.")] = None,
    http: Http = None,
    log_format: LogFormat = "text",
) -> None:
    """Serve CSI Identity and Controller."""
    _logging(log_format)
    asyncio.run(_controller(endpoint, kubeconfig, http))


async def _controller(endpoint: str, kubeconfig: Path | None, http: str | None) -> None:
    from tercet_api.clients import Api
    from tercet_csi.controller.cluster import Cluster, refusal
    from tercet_csi.controller.service import ControllerService

    async with Api(kubeconfig) as api, asyncio.TaskGroup() as tasks:
        cluster = Cluster(api)
        followers = [
            tasks.create_task(kind.follow())
            for kind in (cluster.volumes, cluster.snapshots, cluster.nodes)
        ]

        async def ready() -> bool:
            return cluster.ready

        def register(server: grpc.aio.Server) -> None:
            csi_pb2_grpc.add_IdentityServicer_to_server(Identity(ready), server)
            csi_pb2_grpc.add_ControllerServicer_to_server(ControllerService(cluster), server)

        await serve(endpoint, http, register, refusal)
        for follower in followers:
            follower.cancel()


@app.command()
def node(
    endpoint: Endpoint,
    node: Annotated[str, typer.Option(help="Name of this Kubernetes node.")],
    state_dir: Annotated[Path, typer.Option(help="What is staged is remembered here.")],
    attacher: Annotated[
        str | None, typer.Option(help="tercet-attach's socket: unix://PATH.")
    ] = None,
    topology: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, again and again.")] = None,
    volumes_max: Annotated[
        int, typer.Option(min=1, help="How many volumes this node takes at a time.")
    ] = 128,
    register: Annotated[
        Path | None, typer.Option(help="The kubelet's plugins_registry, to register there.")
    ] = None,
    http: Http = None,
    log_format: LogFormat = "text",
) -> None:
    """Serve CSI Identity and Node."""
    _logging(log_format)
    pairs = [item.partition("=") for item in topology or []]
    wrong = [key for key, sign, _ in pairs if not key or not sign]
    if wrong:
        raise typer.BadParameter(f"--topology {wrong[0]!r} is not KEY=VALUE")
    segments = {key: value for key, _, value in pairs}
    asyncio.run(_node(endpoint, node, state_dir, attacher, segments, volumes_max, register, http))


async def _node(
    endpoint: str,
    name: str,
    state_dir: Path,
    attacher_endpoint: str | None,
    topology: dict[str, str],
    volumes_max: int,
    kubelet: Path | None,
    http: str | None,
) -> None:
    from tercet_csi.node.attach import choose
    from tercet_csi.node.commands import run
    from tercet_csi.node.filesystem import FileSystems
    from tercet_csi.node.records import Records
    from tercet_csi.node.service import NodeOptions, NodeService

    attacher = choose(attacher_endpoint)
    service = NodeService(
        NodeOptions(name, topology, volumes_max),
        attacher,
        FileSystems(run),
        Records(state_dir / "staged"),
    )

    def register(server: grpc.aio.Server) -> None:
        csi_pb2_grpc.add_IdentityServicer_to_server(Identity(attacher.ready), server)
        csi_pb2_grpc.add_NodeServicer_to_server(service, server)

    async with asyncio.TaskGroup() as tasks:
        follower = tasks.create_task(service.paths.run())
        await serve(endpoint, http, register, kubelet=kubelet)
        follower.cancel()


def _logging(log_format: str) -> None:
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=False)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
