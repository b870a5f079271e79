"""`tercet-agent`: the command line of the agent. SIGTERM and SIGINT end it with exit status 0."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

from tercet_node.agent import Settings, run
from tercet_node.registration import Group


def _arguments(argv: Sequence[str] | None) -> tuple[Settings, str]:
    parser = argparse.ArgumentParser(prog="tercet-agent", description=__doc__)
    parser.add_argument("--node", required=True, help="name of this node's StorageNode object")
    parser.add_argument("--kubeconfig", type=Path, help="absent: the pod's service account")
    parser.add_argument("--engine-socket", type=Path, required=True)
    parser.add_argument("--state-dir", type=Path, required=True, help="key and certificate")
    parser.add_argument("--listen", required=True, help="ADDRESS:PORT of the gRPC service")
    parser.add_argument("--http", required=True, help="ADDRESS:PORT of health and metrics")
    parser.add_argument("--register", type=Path, help="make the StorageNode of this JSON file")
    parser.add_argument("--address", default="", help="this node's own, for --register")
    parser.add_argument("--log-format", choices=("json", "text"), default="json")
    found = parser.parse_args(argv)
    for name in ("listen", "http"):
        _, _, port = getattr(found, name).rpartition(":")
        if not port.isdecimal():
            parser.error(f"--{name}: ADDRESS:PORT is asked for, not {getattr(found, name)!r}")
    if found.register is not None and not found.address:
        parser.error("--register needs --address")
    try:
        group = None if found.register is None else Group.read(found.register)
    except (OSError, ValueError) as error:
        parser.error(f"--register: {error}")
    settings = Settings(
        node=found.node,
        kubeconfig=found.kubeconfig,
        engine_socket=found.engine_socket,
        state_dir=found.state_dir,
        listen=found.listen,
        http=found.http,
        group=group,
        address=found.address,
    )
    return settings, found.log_format


def _log_to_stderr(form: str) -> None:
    renderer: structlog.types.Processor = structlog.processors.JSONRenderer()
    if form == "text":
        renderer = structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


async def _until_signalled(settings: Settings) -> None:
    task = asyncio.create_task(run(settings))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        structlog.get_logger().info("stopped", node=settings.node)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    settings, form = _arguments(argv)
    _log_to_stderr(form)
    try:
        asyncio.run(_until_signalled(settings))
    except Exception:  # noqa: BLE001  (logged whole, then the process ends)
        structlog.get_logger().exception("the agent ends", node=settings.node)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
