"""`python -m tercet_e2e.kubelet`: the stand-in for one node, as a process."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Annotated

import structlog
import typer

from tercet_e2e.kube import Kube, KubeError
from tercet_e2e.kubelet.logs import LogServer, server_context
from tercet_e2e.kubelet.loop import Kubelet
from tercet_e2e.kubelet.node import NodeObjects
from tercet_e2e.state import MARKER

REGISTER_PAUSE_S = 0.2

log = structlog.get_logger(__name__)


async def _register(objects: NodeObjects, labels: dict[str, str]) -> None:
    while True:
        try:
            await objects.register(labels)
            return
        except KubeError as error:
            log.info("node not registered yet", error=str(error))
            await asyncio.sleep(REGISTER_PAUSE_S)


async def _run(
    kubeconfig: Path,
    node: str,
    address: str,
    root: Path,
    labels: dict[str, str],
    drivers: list[Path],
    certs: tuple[Path, Path, Path],
    log_port: int,
) -> None:
    me = asyncio.current_task()
    assert me is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
    async with Kube(kubeconfig) as kube:
        kubelet = Kubelet(kube, node, address, root, os.environ.get(MARKER, ""))
        server = LogServer(kubelet.find_log)
        await server.start(address, log_port, server_context(*certs))
        objects = NodeObjects(kube, node, address, log_port)
        await _register(objects, labels)
        try:
            await kubelet.run(objects, drivers)
        finally:
            await server.stop()


def main(
    node: Annotated[str, typer.Option(help="Name of the node.")],
    address: Annotated[str, typer.Option(help="The node's address.")],
    kubeconfig: Annotated[Path, typer.Option(help="Identity system:node:NAME.")],
    root: Annotated[Path, typer.Option(help="Folder of pods and volumes.")],
    cert: Annotated[Path, typer.Option(help="Certificate for the log server.")],
    key: Annotated[Path, typer.Option(help="Its key.")],
    authority: Annotated[Path, typer.Option(help="The cluster's authority.")],
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, for the Node.")] = None,
    driver: Annotated[list[Path] | None, typer.Option(help="Socket of a CSI driver.")] = None,
    log_port: Annotated[int, typer.Option(help="Port of the log server.")] = 10250,
) -> None:
    """Stands in for the kubelet of one node. Ends at SIGTERM; containers go on."""
    labels = dict(entry.split("=", 1) for entry in label or [])
    work = _run(
        kubeconfig, node, address, root, labels, driver or [], (cert, key, authority), log_port
    )
    try:
        asyncio.run(work)
    except asyncio.CancelledError:
        log.info("kubelet stand-in ends", node=node)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
