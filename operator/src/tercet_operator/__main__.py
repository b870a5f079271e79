"""`tercet-operator`: the command line (docs/processes.md)."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

from tercet_api.clients import Api
from tercet_api.names import NAMESPACE
from tercet_operator.leading import LeadershipLost, Operator

log = structlog.get_logger(__name__)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tercet-operator", description="Tercet's operator.")
    parser.add_argument("--kubeconfig", type=Path, help="absent: the pod's service account")
    parser.add_argument("--namespace", default=NAMESPACE, help="where its Lease stands")
    parser.add_argument("--http", default="127.0.0.1:9811", help="health and metrics: HOST:PORT")
    parser.add_argument("--log-format", choices=("json", "text"), default="json")
    return parser.parse_args(given)


def configure_logs(log_format: str) -> None:
    """One line an event on standard error, kopf's own lines among them."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=False)
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last],
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("kopf").setLevel(logging.WARNING)


async def _run(arguments: argparse.Namespace) -> int:
    async with Api(arguments.kubeconfig) as api:
        operator = Operator(api, arguments.kubeconfig, arguments.namespace)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, operator.stop)
        try:
            await operator.run(arguments.http)
        except LeadershipLost as error:
            log.error("ends", why=str(error))  # noqa: TRY400 - no trace needed
            return 1
    return 0


def main(given: Sequence[str] | None = None) -> int:
    """The entry point."""
    arguments = _arguments(given)
    configure_logs(arguments.log_format)
    return asyncio.run(_run(arguments))


if __name__ == "__main__":
    sys.exit(main())
